//! The VP-index map: a set of VP indexes to slots, in a partition of 4,096 VPs whose indexes are permuted.
#![allow(non_snake_case)]

use gungraun::prelude::*;
use hvcore::vp_index::{VpIndexMap, VpSlot};
use std::hint::black_box;
use std::sync::atomic::{AtomicU16, AtomicU64};
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

struct Setup {
    map: VpIndexMap<'static>,
    mask: u64,
    banks: Vec<u64>,
}

/// A set of `count` VPs, spread over as many banks as it has members, up to all 64.
fn setup(count: u32) -> Box<Setup> {
    let entries: &[AtomicU16] = Vec::leak((0..4096).map(|_| AtomicU16::new(0)).collect());
    let known: &[AtomicU64] = Vec::leak((0..64).map(|_| AtomicU64::new(0)).collect());
    let map = VpIndexMap::new(entries, known).expect("storage for 4,096");
    for index in 0..4096 {
        let slot = VpSlot::new(index * 1117 % 4096).expect("below 4,096");
        map.assign(index, slot).expect("a permutation");
    }
    let (banks, mask) = match count {
        1 => (vec![1 << 63], 1 << 63),
        64 => ((0..64).map(|n| 1 << n).collect(), u64::MAX),
        _ => (vec![u64::MAX; 64], u64::MAX),
    };
    Box::new(Setup { map, mask, banks })
}

#[library_benchmark]
#[bench::_1of4096(setup(1))]
#[bench::_64of4096(setup(64))]
#[bench::_4096of4096(setup(4096))]
fn vpset__translate(s: Box<Setup>) -> Box<Setup> {
    if let Some(set) = SparseVpSet::new(s.mask, &s.banks) {
        for slot in s.map.slots(&VpSet::Sparse(set)) {
            black_box(slot);
        }
    }
    s
}

library_benchmark_group!(name = vp_set, benchmarks = vpset__translate);

main!(library_benchmark_groups = vp_set);
