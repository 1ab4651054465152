//! The VP-index map: any assignment, unknown indexes, races with VPs that come online.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

use hvcore::vp_index::*;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

struct Storage(Vec<AtomicU16>, Vec<AtomicU64>);

impl Storage {
    fn new(n: usize) -> Self {
        Self((0..n).map(|_| AtomicU16::new(0)).collect(), (0..n.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }
    fn map(&self) -> VpIndexMap<'_> {
        VpIndexMap::new(&self.0, &self.1).unwrap()
    }
}

fn slot(n: u32) -> VpSlot {
    VpSlot::new(n).unwrap()
}

#[test]
fn storage_is_checked() {
    let s = Storage::new(4096);
    assert_eq!(s.map().limit(), 4096);
    let big = Storage::new(4097);
    assert_eq!(VpIndexMap::new(&big.0, &big.1).err(), Some(VpIndexError::Storage));
    assert_eq!(VpIndexMap::new(&s.0, &s.1[..63]).err(), Some(VpIndexError::Storage));
    assert!(VpIndexMap::new(&s.0[..4032], &s.1[..63]).is_ok());
    assert!(VpSlot::new(4095).is_some() && VpSlot::new(4096).is_none());
}

#[test]
fn known_unknown_and_out_of_range_differ() {
    let s = Storage::new(100);
    let map = s.map();
    assert_eq!(map.lookup(99), Lookup::NotYetKnown);
    assert_eq!(map.lookup(100), Lookup::OutOfRange);
    assert_eq!(map.lookup(u32::MAX), Lookup::OutOfRange);
    assert_eq!(map.assign(99, slot(0)), Ok(()));
    assert_eq!(map.lookup(99), Lookup::Known(slot(0)));
    assert_eq!(map.lookup(0), Lookup::NotYetKnown, "slot 0 is another's");
    assert_eq!(map.assign(99, slot(1)), Err(VpIndexError::Assigned));
    assert_eq!(map.assign(100, slot(1)), Err(VpIndexError::OutOfRange));
    assert_eq!(map.lookup(99), Lookup::Known(slot(0)));
}

#[test]
fn any_permutation_translates() {
    let s = Storage::new(4096);
    let map = s.map();
    for i in 0..4096 {
        map.assign(i, slot(i * 1117 % 4096)).unwrap();
    }
    let banks: Vec<u64> = (0..64).map(|b| 1 << b).collect();
    let set = SparseVpSet::new(u64::MAX, &banks).unwrap();
    let got: Vec<_> = map.slots(&VpSet::Sparse(set)).collect();
    let want: Vec<_> = (0..64).map(|b| slot((64 * b + b) * 1117 % 4096)).collect();
    assert_eq!(got, want);
    assert_eq!(map.slots(&VpSet::All).count(), 4096);
    assert_eq!(map.slot_word(1), None);
}

#[test]
fn unknown_members_name_nobody() {
    let s = Storage::new(130);
    let map = s.map();
    map.assign(2, slot(7)).unwrap();
    map.assign(129, slot(3)).unwrap();
    let banks = [u64::MAX; 64];
    let all = VpSet::Sparse(SparseVpSet::new(u64::MAX, &banks).unwrap());
    assert_eq!(map.slots(&all).collect::<Vec<_>>(), [slot(7), slot(3)]);
    assert_eq!(map.slots(&VpSet::All).collect::<Vec<_>>(), [slot(7), slot(3)]);
    assert_eq!(map.slots(&VpSet::Sparse(SparseVpSet::EMPTY)).count(), 0);
}

#[test]
fn words_pass_through_while_the_map_is_the_identity() {
    let s = Storage::new(128);
    let map = s.map();
    map.assign(0, slot(0)).unwrap();
    map.assign(65, slot(65)).unwrap();
    let banks: Vec<_> = map.banks(&VpSet::All).collect();
    assert_eq!(banks, [(0, 1), (1, 2)]);
    assert_eq!(map.slot_word(2), Some(2));
    // A map over storage that was used does not know: it answers with care.
    assert_eq!(s.map().slot_word(2), None);
    map.assign(5, slot(6)).unwrap();
    assert_eq!(map.slot_word(2), None);
    assert_eq!(map.lookup(65), Lookup::Known(slot(65)));
}

#[test]
fn readers_never_see_a_wrong_slot_while_vps_come_online() {
    let s = Storage::new(4096);
    let map = s.map();
    let online: Vec<AtomicBool> = (0..4096).map(|_| AtomicBool::new(false)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..4096u32 {
                // The identity for a while, then not.
                let to = if i < 2048 { i } else { 4095 - (i - 2048) };
                online[to as usize].store(true, Ordering::Relaxed);
                map.assign(i, slot(to)).unwrap();
            }
        });
        let mut seen = 0;
        while seen < 4096 {
            seen = 0;
            for (bank, word) in map.banks(&VpSet::All) {
                if let Some(slots) = map.slot_word(word) {
                    let top = 64 * bank + 63 - slots.leading_zeros().min(63);
                    assert!(slots == 0 || top < 2048, "a word passed through after the identity ended");
                }
            }
            for slot in map.slots(&VpSet::All) {
                assert!(online[slot.number()].load(Ordering::Relaxed), "{slot:?} before it is online");
                seen += 1;
            }
        }
    });
}
