//! The VP-index map while VPs come online: a reader never takes an index for a slot that is not its own, and who sees
//! a VP sees what was written to its slot before.
#![cfg(loom)]
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

use hvcore::vp_index::{Lookup, VpIndexMap, VpSlot};
use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use loom::thread;
use tlfs_abi::vp_set::VpSet;

fn slot(n: u32) -> VpSlot {
    VpSlot::new(n).unwrap()
}

/// Storage of two indexes that lives as long as the program: threads of a model need that.
fn map() -> &'static VpIndexMap<'static> {
    let entries: &'static [AtomicU16] = Vec::leak((0..2).map(|_| AtomicU16::new(0)).collect());
    let known: &'static [AtomicU64] = Vec::leak(vec![AtomicU64::new(0)]);
    Box::leak(Box::new(VpIndexMap::new(entries, known).unwrap()))
}

#[test]
fn who_sees_a_vp_sees_its_slot() {
    loom::model(|| {
        let map = map();
        let ready: &'static [AtomicBool] = Vec::leak((0..2).map(|_| AtomicBool::new(false)).collect());
        let online = thread::spawn(move || {
            for (index, to) in [(0, 1), (1, 0)] {
                ready[to as usize].store(true, Ordering::Relaxed);
                map.assign(index, slot(to)).unwrap();
            }
        });
        for slot in map.slots(&VpSet::All) {
            assert!(ready[slot.number()].load(Ordering::Relaxed));
        }
        if let Lookup::Known(found) = map.lookup(1) {
            assert_eq!(found, slot(0));
            assert!(ready[0].load(Ordering::Relaxed));
        }
        online.join().unwrap();
        assert_eq!(map.slots(&VpSet::All).collect::<Vec<_>>(), [slot(1), slot(0)]);
    });
}

#[test]
fn no_word_passes_through_with_a_permuted_index_in_it() {
    loom::model(|| {
        let map = map();
        map.assign(0, slot(0)).unwrap();
        let online = thread::spawn(move || map.assign(1, slot(7)).unwrap());
        for (_, word) in map.banks(&VpSet::All) {
            if let Some(slots) = map.slot_word(word) {
                assert_eq!(slots, 1, "index 1 is not slot 1");
            }
        }
        online.join().unwrap();
    });
}

#[test]
fn one_of_two_assignments_of_an_index_wins() {
    loom::model(|| {
        let map = map();
        let other = thread::spawn(move || map.assign(0, slot(1)).is_ok());
        let mine = map.assign(0, slot(2)).is_ok();
        assert!(mine != other.join().unwrap());
        assert_eq!(map.lookup(0), Lookup::Known(slot(if mine { 2 } else { 1 })));
    });
}

/// The control: publication before the end of the identity is recorded, as `assign` must not do it, is caught.
#[test]
#[should_panic(expected = "index 1 is not slot 1")]
fn the_model_catches_a_late_end_of_the_identity() {
    loom::model(|| {
        let known: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(1)));
        let permuted: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let online = thread::spawn(move || {
            known.fetch_or(2, Ordering::Release);
            permuted.store(true, Ordering::Relaxed);
        });
        let word = known.load(Ordering::Acquire);
        if !permuted.load(Ordering::Relaxed) {
            assert_eq!(word, 1, "index 1 is not slot 1");
        }
        online.join().unwrap();
    });
}
