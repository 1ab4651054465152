//! The intake against the reference model, on generated cases; and that generation reaches what it is meant to.

use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use tests::harness::{decode, hypercall, lists};
use tests::reference::hypercall::{Ask, End};

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hypercalls(bytes in vec(any::<u8>(), 0..600)) {
        hypercall::compare(&decode::hypercall(&bytes));
    }

    #[test]
    fn gva_ranges(entry in any::<u64>(), large in any::<bool>(), extended in any::<bool>()) {
        lists::compare_range(if large { entry | 1 << 11 } else { entry }, extended);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn vp_sets(mask in any::<u64>(), words in vec(any::<u64>(), 64), extra in 0..3usize, online in vec(any::<u16>(), 0..300)) {
        let count = (mask.count_ones() as usize + extra).saturating_sub(1).min(64);
        lists::compare_vp_set(mask, &words[..count], &online);
        lists::compare_vp_set(mask, &words[..mask.count_ones() as usize], &online);
    }
}

/// Steps of a linear congruential generator.
fn noise(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 56) as u8
}

/// A comparison that never gets past the first check shows nothing: every call is served, in both widths and from both
/// levels, and every kind of end occurs.
#[test]
fn generated_cases_reach_every_call_and_every_end() {
    let (mut served, mut ends) = (BTreeSet::new(), BTreeMap::<String, u32>::new());
    let mut state = 1;
    for _ in 0..60_000 {
        let bytes: Vec<u8> = (0..120).map(|_| noise(&mut state)).collect();
        let case = decode::hypercall(&bytes);
        let did = hypercall::compare(&case);
        let kind = match &did.end {
            End::Result { status, .. } if *status < 14 => format!("status {status}"),
            End::Result { .. } => "status of a handler".into(),
            other => format!("{other:?}"),
        };
        *ends.entry(kind).or_default() += 1;
        for ask in &did.asked {
            let name = match ask {
                Ask::Flush { ranges, vps, flags, .. } => {
                    format!("Flush list {} all {} extended {}", ranges.is_some(), vps.is_none(), flags & 8 != 0)
                }
                Ask::FlushGuestPhysical { ranges, .. } => format!("FlushGuestPhysical list {}", ranges.is_some()),
                Ask::Ipi { vps, .. } => format!("Ipi all {}", vps.is_none()),
                other => format!("{other:?}").chars().take_while(|c| c.is_alphabetic()).collect(),
            };
            served.insert((name, case.caller.long_mode_64, case.caller.from_l2));
        }
    }
    for end in ["status 0", "status 2", "status 3", "status 4", "status 5", "status 6", "status 13"] {
        assert!(ends.contains_key(end), "{end} never: {ends:?}");
    }
    for end in ["Undefined", "Again", "Suspend", "status of a handler"] {
        assert!(ends.contains_key(end), "{end} never: {ends:?}");
    }
    let names: BTreeSet<_> = served.iter().map(|(name, ..)| name.clone()).collect();
    assert_eq!(names.len(), 8 + 2 + 2 + 8, "{names:?}");
    for name in names {
        for wanted in [true, false] {
            assert!(served.iter().any(|(n, wide, _)| *n == name && *wide == wanted), "{name}, 64-bit: {wanted}");
            assert!(served.iter().any(|(n, _, l2)| *n == name && *l2 == wanted), "{name}, from L2: {wanted}");
        }
    }
}

/// The control of the comparison: a difference in one bit of one register is found.
#[test]
#[should_panic(expected = "left == right")]
fn a_difference_is_found() {
    let case = decode::hypercall(&[]);
    let mut wrong = hypercall::reference(&case);
    wrong.registers.rax ^= 1 << 32;
    assert_eq!(hypercall::library(&case), wrong);
}
