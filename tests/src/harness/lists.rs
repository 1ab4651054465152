//! VP sets and lists of GVA ranges, by the library and by the reference models.

use crate::reference::{ranges, vp_set};
use hvcore::vp_index::{Lookup, VpIndexMap, VpSlot};
use std::sync::atomic::{AtomicU16, AtomicU64};
use tlfs_abi::flush::{GvaSpan, RangeFormat};
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

/// Compares a sparse set of `words` under `mask` with the model, also through a VP-index map in which the VPs of
/// `online` are known, in permuted slots.
pub fn compare_vp_set(mask: u64, words: &[u64], online: &[u16]) {
    let want = vp_set::members(mask, words);
    let Some(set) = SparseVpSet::new(mask, words) else {
        assert_eq!(want, None);
        return;
    };
    let want = want.expect("the model takes what the library takes");
    assert_eq!(set.iter().collect::<Vec<_>>(), want);
    assert_eq!(set.count() as usize, want.len());
    assert_eq!(set.valid_bank_mask(), mask);
    let mut inside = [false; 4200];
    want.iter().for_each(|index| inside[*index as usize] = true);
    for (index, inside) in (0..).zip(inside) {
        // Of banks that are not listed, the ends will do.
        let listed = index / 64 < 64 && mask >> (index / 64) & 1 == 1;
        if listed || index % 64 == 0 || index % 64 == 63 {
            assert_eq!(set.contains(index), inside, "{index}");
        }
    }
    assert!(!set.contains(u32::MAX));
    compare_translation(&VpSet::Sparse(set), &want, online);
    compare_translation(&VpSet::All, &(0..4096).collect::<Vec<_>>(), online);
}

fn compare_translation(set: &VpSet<'_>, members: &[u32], online: &[u16]) {
    let limit = online.first().map_or(1, |n| usize::from(*n) % 4096 + 1);
    let entries: Vec<AtomicU16> = (0..limit).map(|_| AtomicU16::new(0)).collect();
    let known: Vec<AtomicU64> = (0..limit.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    let map = VpIndexMap::new(&entries, &known).expect("storage fits");
    let slot = |index: u32| VpSlot::new((index * 1117 + 5) % 4096).expect("below 4,096");
    let mut up = vec![false; 4096];
    for index in online.iter().map(|n| u32::from(n % 4096)) {
        let fresh = !std::mem::replace(&mut up[index as usize], true);
        let fits = (index as usize) < limit;
        up[index as usize] &= fits;
        assert_eq!(map.assign(index, slot(index)).is_ok(), fresh && fits);
    }
    for index in (0..limit as u32 + 2).chain([4095, 4096, u32::MAX]) {
        let want = match index as usize {
            i if i >= limit => Lookup::OutOfRange,
            i if up[i] => Lookup::Known(slot(index)),
            _ => Lookup::NotYetKnown,
        };
        assert_eq!(map.lookup(index), want);
    }
    let want: Vec<VpSlot> = members.iter().filter(|i| up[**i as usize]).map(|i| slot(*i)).collect();
    assert_eq!(map.slots(set).collect::<Vec<_>>(), want);
}

/// Compares what a list entry covers with the model: page by page for some hundred pages, else at the ends.
pub fn compare_range(entry: u64, extended: bool) {
    let format = if extended { RangeFormat::Extended } else { RangeFormat::Normal };
    let GvaSpan { start, pages, page_size } = format.span(entry);
    assert!(pages >= 1 && start % page_size == 0 && [4096, 2 << 20, 1 << 30].contains(&page_size));
    let got = |n: u64| (start / 4096 + n) % (1 << 52);
    let total = pages * (page_size / 4096);
    let (first, count) = ranges::extent(entry, extended);
    assert_eq!((got(0), total), (first, count));
    if count <= 1 << 9 {
        let want = ranges::pages(entry, extended);
        assert!((0..total).map(got).eq(want));
    }
}
