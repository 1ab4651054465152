//! The flush engine: from a parsed request to the set of VPs to kick, and what an entry takes from its queues.
//! Waiting is not part of it.
#![allow(non_snake_case)]

use gungraun::prelude::*;
use hvcore::addr::Level;
use hvcore::flush::{
    FlushDomain, GvaScope, LocalFlush, NestedContext, NestedIds, Posted, Shootdown, TargetIndex, VpFlush,
};
use hvcore::vp_index::{VpIndexMap, VpSlot};
use std::hint::black_box;
use std::sync::atomic::{AtomicU16, AtomicU64};
use tlfs_abi::flush::RangeFormat;
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

const VM: u64 = 0xFFFF_8880_1234_5000;

/// A partition whose VPs all run the same level, all with the same VM.
struct Setup {
    domain: FlushDomain<'static>,
    map: VpIndexMap<'static>,
    locals: Vec<LocalFlush<'static>>,
    scratch: Shootdown,
    set: VpSet<'static>,
    by_set: VpSet<'static>,
    scope: GvaScope<'static>,
}

fn zeros(n: usize) -> &'static [AtomicU64] {
    Vec::leak((0..n).map(|_| AtomicU64::new(0)).collect())
}

/// `vps` running VPs; a set of `targets` of them, evenly spread; `ranges` ranges.
fn setup(level: Level, vps: usize, targets: usize, ranges: u64) -> Box<Setup> {
    let shared: &'static [VpFlush] = Vec::leak((0..vps).map(|_| VpFlush::new()).collect());
    let buckets = zeros((2 * vps).next_power_of_two());
    let index = TargetIndex::new(vps, buckets, zeros(17 * TargetIndex::group_words(vps))).unwrap();
    let domain = FlushDomain::new(shared, index);
    let entries: &[AtomicU16] = Vec::leak((0..vps).map(|_| AtomicU16::new(0)).collect());
    let map = VpIndexMap::new(entries, zeros(vps.div_ceil(64))).unwrap();
    let mut locals = Vec::new();
    for slot in 0..vps as u16 {
        map.assign(u32::from(slot), VpSlot::new(u32::from(slot)).unwrap()).unwrap();
        let mut local = domain.local(slot).unwrap();
        let ids = Some(NestedIds { vm_id: VM, vp_id: u32::from(slot) });
        let _ = local.set_context(NestedContext { ids, tag: 1, root: 0x1000 });
        let _ = local.enter(Level::L2);
        local.exit();
        let _ = local.enter(level);
        locals.push(local);
    }
    let mut words = vec![0u64; 64];
    for n in 0..targets {
        let vp = n * vps / targets;
        words[vp / 64] |= 1 << (vp % 64);
    }
    let mask = words.iter().enumerate().fold(0, |mask, (n, word)| mask | u64::from(*word != 0) << n);
    words.retain(|word| *word != 0);
    let by_set = VpSet::Sparse(SparseVpSet::new(mask, Vec::leak(words)).unwrap());
    let set = if targets == vps { VpSet::All } else { by_set };
    let entries = Vec::leak((0..ranges).map(|n| 0x7000_0000_0000 + (n << 12)).collect());
    let scope = GvaScope::Ranges { format: RangeFormat::Normal, entries };
    Box::new(Setup { domain, map, locals, scratch: Shootdown::new(), set, by_set, scope })
}

fn l1(n: usize, ranges: u64) -> Box<Setup> {
    setup(Level::L1, n, n, ranges)
}

fn l2(n: usize, ranges: u64) -> Box<Setup> {
    setup(Level::L2, n, n, ranges)
}

fn by_set(mut s: Box<Setup>) -> Box<Setup> {
    s.set = s.by_set;
    s
}

// All VPs of the partition, or a set that names all of them.
#[library_benchmark]
#[bench::_1(l1(1, 1))]
#[bench::_8(l1(8, 1))]
#[bench::_64(l1(64, 1))]
#[bench::_512(l1(512, 1))]
#[bench::_4096(l1(4096, 1))]
#[bench::_64__15ranges(l1(64, 15))]
#[bench::_64__by_set(by_set(l1(64, 1)))]
#[bench::_4096__by_set(by_set(l1(4096, 1)))]
fn flush__l1(mut s: Box<Setup>) -> Box<Setup> {
    let posted = s.domain.flush_l1(&s.map, s.set, s.scope, &mut s.scratch);
    assert!(black_box(posted) == Posted::Wait);
    s
}

// All VPs of the VM, which are all VPs of the partition; or some VPs, by a set, among 4,096 that all run that VM.
#[library_benchmark]
#[bench::_1(l2(1, 1))]
#[bench::_8(l2(8, 1))]
#[bench::_64(l2(64, 1))]
#[bench::_512(l2(512, 1))]
#[bench::_4096(l2(4096, 1))]
#[bench::_64__15ranges(l2(64, 15))]
#[bench::_1of4096(setup(Level::L2, 4096, 1, 1))]
#[bench::_64of4096(setup(Level::L2, 4096, 64, 1))]
#[bench::_64__by_set(by_set(l2(64, 1)))]
#[bench::_4096__by_set(by_set(l2(4096, 1)))]
fn flush__l2(mut s: Box<Setup>) -> Box<Setup> {
    let posted = s.domain.flush_l2(black_box(VM), s.set, s.scope, &mut s.scratch);
    assert!(black_box(posted) == Posted::Wait);
    s
}

fn queued(ranges: u64) -> Box<Setup> {
    let mut s = l2(1, ranges);
    s.locals[0].exit();
    let (domain, mut scratch) = (s.domain, Shootdown::new());
    assert!(domain.flush_l2(VM, VpSet::All, s.scope, &mut scratch) == Posted::Done);
    s
}

fn idle() -> Box<Setup> {
    let mut s = l2(1, 1);
    s.locals[0].exit();
    s
}

// An entry of L2 that finds so many ranges (0: nothing) in its queue, and the exit after it.
#[library_benchmark]
#[bench::_0(idle())]
#[bench::_1(queued(1))]
#[bench::_15(queued(15))]
fn flush__drain(mut s: Box<Setup>) -> Box<Setup> {
    let local = &mut s.locals[0];
    black_box(local.enter(Level::L2));
    local.exit();
    s
}

library_benchmark_group!(name = flush, benchmarks = [flush__l1, flush__l2, flush__drain]);

main!(library_benchmark_groups = flush);
