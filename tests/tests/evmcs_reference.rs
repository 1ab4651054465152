//! L0's half of the enlightened VMCS against the reference model, on generated sequences; and that generation reaches
//! what it is meant to.

use proptest::collection::vec;
use proptest::prelude::*;
use tests::harness::evmcs::{Defect, Reached, compare, compare_with};
use tests::model::rng::Rng;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sequences(bytes in vec(any::<u8>(), 0..400)) {
        compare(&bytes);
    }
}

fn noise(rng: &mut Rng) -> Vec<u8> {
    (0..300).map(|_| rng.bits() as u8).collect()
}

#[test]
fn generated_sequences_reach_every_kind_of_entry() {
    let mut rng = Rng::new(3);
    let mut all = Reached::default();
    for _ in 0..2_000 {
        let reached = compare(&noise(&mut rng));
        all.whole += reached.whole;
        all.partial += reached.partial;
        all.clean += reached.clean;
        all.unreadable += reached.unreadable;
        all.revision += reached.revision;
        all.exits += reached.exits;
    }
    let seen = [all.whole, all.partial, all.clean, all.unreadable, all.revision, all.exits];
    assert!(seen.iter().all(|count| *count > 200), "{all:?}");
}

#[test]
fn the_comparison_finds_each_defect() {
    for defect in [Defect::StrayField, Defect::NotEntered, Defect::StrayByte] {
        let found = std::panic::catch_unwind(|| {
            let mut rng = Rng::new(3);
            for _ in 0..50 {
                compare_with(&noise(&mut rng), defect);
            }
        });
        assert!(found.is_err(), "{defect:?} was not found");
    }
}
