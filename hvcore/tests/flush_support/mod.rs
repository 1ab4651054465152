//! Worlds of VPs for tests of the flush engine, and what they need of the library.
#![allow(dead_code, unused_imports)]

pub use hvcore::addr::{L1Gpa, Level};
pub use hvcore::flush::{
    ContextChange, FlushCalls, FlushDomain, GvaFlush, GvaScope, GvaWidth, IndexError, LocalFlush, NestedContext,
    NestedIds, Posted, SecondStageFlush, SecondStageItem, SecondStageScope, Shootdown, TargetIndex, VpFlush,
};
pub use hvcore::hypercall::Answer;
pub use hvcore::hypercall::calls::{FlushGuestPhysical, FlushTarget, FlushVirtual, GvaRanges};
pub use hvcore::vp_index::{VpIndexMap, VpSlot};
pub use std::sync::atomic::AtomicU64;
pub use tlfs_abi::flush::{FlushFlags, GvaSpan, RangeFormat};
pub use tlfs_abi::vp_set::{SparseVpSet, VpSet};

pub const VM: u64 = 0xFFFF_8880_0000_1000;

pub struct World {
    pub domain: FlushDomain<'static>,
    pub map: VpIndexMap<'static>,
    pub vps: Vec<LocalFlush<'static>>,
    pub scratch: Shootdown,
}

pub fn zeros(n: usize) -> &'static [AtomicU64] {
    Vec::leak((0..n).map(|_| AtomicU64::new(0)).collect())
}

/// `n` VPs; the VP in slot `s` has index `index(s)`; the table of contexts has `buckets` buckets.
pub fn world(n: usize, buckets: usize, index: impl Fn(u32) -> Option<u32>) -> World {
    let shared: &'static [VpFlush] = Vec::leak((0..n).map(|_| VpFlush::new()).collect());
    let targets = TargetIndex::new(n, zeros(buckets), zeros(3 * TargetIndex::group_words(n))).unwrap();
    let domain = FlushDomain::new(shared, targets);
    let map = VpIndexMap::new(Vec::leak((0..4096).map(|_| Default::default()).collect()), zeros(64)).unwrap();
    for slot in 0..n as u32 {
        if let Some(index) = index(slot) {
            map.assign(index, VpSlot::new(slot).unwrap()).unwrap();
        }
    }
    let vps = (0..n as u16).map(|slot| domain.local(slot).unwrap()).collect();
    World { domain, map, vps, scratch: Shootdown::new() }
}

pub fn simple(n: usize) -> World {
    world(n, (2 * n).next_power_of_two(), Some)
}

pub fn list(format: RangeFormat, entries: &[u64]) -> GvaScope<'_> {
    GvaScope::Ranges { format, entries }
}

pub fn normal(entries: &[u64]) -> GvaScope<'_> {
    list(RangeFormat::Normal, entries)
}

pub fn ids(vm_id: u64, vp_id: u32) -> NestedContext {
    NestedContext { ids: Some(NestedIds { vm_id, vp_id }), tag: 1, root: 0x1000 }
}

/// Banks and their mask for the VP indexes given.
pub fn sparse(indexes: &[u32]) -> (u64, Vec<u64>) {
    let mut words = [0u64; 64];
    for index in indexes {
        words[*index as usize / 64] |= 1 << (index % 64);
    }
    let mask = words.iter().enumerate().fold(0, |mask, (n, word)| mask | u64::from(*word != 0) << n);
    (mask, words.into_iter().filter(|word| *word != 0).collect())
}

impl World {
    pub fn l1(&mut self, indexes: &[u32], scope: GvaScope<'_>) -> Posted {
        let (mask, banks) = sparse(indexes);
        let set = VpSet::Sparse(SparseVpSet::new(mask, &banks).unwrap());
        self.domain.flush_l1(&self.map, set, scope, &mut self.scratch)
    }

    pub fn l2(&mut self, vm_id: u64, indexes: &[u32]) -> Posted {
        let (mask, banks) = sparse(indexes);
        let set = VpSet::Sparse(SparseVpSet::new(mask, &banks).unwrap());
        self.domain.flush_l2(vm_id, set, normal(&[0x5000]), &mut self.scratch)
    }

    pub fn kicks(&self) -> Vec<u16> {
        self.scratch.kicks().collect()
    }

    pub fn poll(&mut self) -> bool {
        self.scratch.poll(self.domain.vps())
    }

    /// All VPs in L2, VP n in the nth context; what was due is flushed.
    pub fn run_l2(&mut self, contexts: &[NestedContext]) {
        for (vp, context) in self.vps.iter_mut().zip(contexts) {
            assert_eq!(vp.set_context(*context), ContextChange::Retire);
            vp.enter(Level::L2);
            vp.exit();
            assert!(vp.enter(Level::L2).is_none());
        }
    }
}

/// What an entry of L1 flushes, as spans; panics when it is not a list.
pub fn spans(vp: &mut LocalFlush<'_>, width: GvaWidth) -> Option<Vec<GvaSpan>> {
    let flush = vp.enter(Level::L1).map(|flush| flush.gva);
    let out = match flush {
        None => Some(Vec::new()),
        Some(GvaFlush::Ranges(ranges)) => ranges.spans(width).map(|spans| spans.collect()),
        other => panic!("{other:?}"),
    };
    vp.exit();
    out
}

pub fn span(start: u64, pages: u64, page_size: u64) -> GvaSpan {
    GvaSpan { start, pages, page_size }
}

pub const K4: u64 = 4096;
pub const M2: u64 = 2 << 20;
pub const G1: u64 = 1 << 30;
