//! Hostile VMCBs that nothing confines, on the machine model: 100,000, or as many as `HOSTILE_VMCBS` says.

use tests::embedder::hostile::{Totals, case, storage};

const SEED: u64 = 0x4A11;

#[test]
fn hostile_vmcbs_harm_no_one() {
    let count = std::env::var("HOSTILE_VMCBS").map_or(100_000, |n| n.parse().expect("a number"));
    let mut storage = storage();
    let mut totals = [Totals::default(); 2];
    for n in 0..count {
        let outcome = case(&mut storage, SEED, n).unwrap_or_else(|why| panic!("case {n}: {why}"));
        totals[n as usize & 1].add(outcome);
    }
    println!("all random: {:?}\nvalid but for some fields: {:?}", totals[0], totals[1]);
    // Three in ten of all must get in.
    let ran: u64 = totals.iter().map(|t| t.entered + t.shutdown).sum();
    assert!(ran * 10 >= count * 3, "{totals:?}");
    assert!(totals[1].refused > 0 && totals[1].shutdown > 0 && totals[0].refused > 0, "{totals:?}");
}

#[test]
fn the_cases_repeat() {
    let mut storage = storage();
    for n in 0..64 {
        let first = case(&mut storage, SEED, n);
        assert_eq!(first, case(&mut storage, SEED, n));
    }
}
