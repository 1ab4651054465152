//! The machine of the models of the flush protocol: page tables, TLBs and processors that loom watches.
#![allow(dead_code, unused_imports)]

pub use hvcore::addr::{L1Gpa, Level};
pub use hvcore::flush::mutant::{self, Mutant};
pub use hvcore::flush::{
    FlushDomain, GvaFlush, GvaScope, GvaWidth, LocalFlush, NestedContext, NestedIds, Posted, SecondStageFlush,
    SecondStageScope, Shootdown, TargetIndex, VpFlush,
};
pub use hvcore::vp_index::{VpIndexMap, VpSlot};
pub use loom::cell::UnsafeCell;
pub use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub use std::sync::{Mutex, PoisonError};
pub use tlfs_abi::flush::RangeFormat;
pub use tlfs_abi::vp_set::{SparseVpSet, VpSet};

pub const DEPTH: usize = 1;
pub const OLD: u64 = 0;
pub const NEW: u64 = 1;
/// The page that the guest uses, and another one.
pub const PAGE: u64 = 0x7000;
pub const OTHER: u64 = 0x9000;
pub const VM: u64 = 0x77;

/// The mutant switch is global, so models run one at a time.
pub static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn check(mutant: Mutant, model: impl Fn() + Sync + Send + 'static) {
    check_bounded(mutant, 3, model);
}

/// As `check`, with a number of preemptions: three threads have too many interleavings for three.
pub fn check_bounded(mutant: Mutant, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    mutant::set(mutant);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 2_000;
    builder.check(model);
}

/// What the threads of a model share.
pub struct World {
    pub domain: FlushDomain<'static, DEPTH>,
    pub map: VpIndexMap<'static>,
    pub kicks: [AtomicBool; 2],
    /// Initiators that are not done.
    pub waiting: AtomicU64,
    pub pte: AtomicU64,
    pub old_page: UnsafeCell<()>,
}

impl World {
    pub fn new(vps: usize, initiators: u64) -> &'static Self {
        let vps: &'static [_] = Vec::leak((0..vps).map(|_| VpFlush::new()).collect());
        let zeros = |n: usize| -> &'static [AtomicU64] { Vec::leak((0..n).map(|_| AtomicU64::new(0)).collect()) };
        let index = TargetIndex::new(vps.len(), zeros(1), zeros(4)).unwrap();
        // The map has a model of its own: here it is filled before the threads start.
        let map = VpIndexMap::new(
            Vec::leak(vps.iter().map(|_| Default::default()).collect()),
            Vec::leak(vec![Default::default()]),
        )
        .unwrap();
        for slot in 0..vps.len() as u32 {
            map.assign(slot, VpSlot::new(slot).unwrap()).unwrap();
        }
        Box::leak(Box::new(Self {
            domain: FlushDomain::new(vps, index),
            map,
            kicks: [AtomicBool::new(false), AtomicBool::new(false)],
            waiting: AtomicU64::new(initiators),
            pte: AtomicU64::new(OLD),
            old_page: UnsafeCell::new(()),
        }))
    }

    pub fn cpu(&'static self, slot: u16) -> Cpu {
        Cpu { world: self, local: self.domain.local(slot).unwrap(), tlb: [None; 2] }
    }

    /// A VP whose L2 in `context` has cached its translation.
    pub fn nested(&'static self, context: NestedContext) -> Cpu {
        let mut cpu = self.cpu(0);
        let _ = cpu.local.set_context(context);
        cpu.run_short(Level::L2);
        cpu
    }

    /// Unmaps the page, flushes by `call`, waits, and reuses the page.
    pub fn initiate(&self, call: impl Fn(&mut Shootdown) -> Posted) {
        self.pte.store(NEW, Ordering::Relaxed);
        self.flush(call);
        self.old_page.with_mut(|_| ());
    }

    pub fn flush(&self, call: impl Fn(&mut Shootdown) -> Posted) {
        let mut scratch = Shootdown::new();
        let posted = call(&mut scratch);
        for slot in scratch.kicks() {
            self.kicks[usize::from(slot)].store(true, Ordering::Relaxed);
        }
        match posted {
            Posted::Done => assert_eq!(scratch.kicks().count(), 0),
            Posted::Wait => {
                while !scratch.poll(self.domain.vps()) {
                    loom::thread::yield_now();
                }
            }
            Posted::Suspend => panic!("nobody inhibits here"),
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn l1(&self, scratch: &mut Shootdown, page: u64) -> Posted {
        let mask = 1;
        let set = VpSet::Sparse(SparseVpSet::from_mask(&mask));
        self.domain.flush_l1(&self.map, set, ranges(&[page]), scratch)
    }

    /// Flushes the page for VP_ID 5 of the VM.
    pub fn l2(&self, scratch: &mut Shootdown) -> Posted {
        let mask = 1 << 5;
        let set = VpSet::Sparse(SparseVpSet::from_mask(&mask));
        self.domain.flush_l2(VM, set, ranges(&[PAGE]), scratch)
    }

    pub fn l2_all(&self, scratch: &mut Shootdown) -> Posted {
        self.domain.flush_l2(VM, VpSet::All, ranges(&[PAGE]), scratch)
    }
}

pub fn ranges(entries: &[u64]) -> GvaScope<'_> {
    GvaScope::Ranges { format: RangeFormat::Normal, entries }
}

pub fn context(vm_id: u64, vp_id: u32) -> NestedContext {
    NestedContext { ids: Some(NestedIds { vm_id, vp_id }), tag: 1, root: 0x4000 }
}

/// A physical CPU that runs a VP.
pub struct Cpu {
    pub world: &'static World,
    pub local: LocalFlush<'static, DEPTH>,
    pub tlb: [Option<u64>; 2],
}

impl Cpu {
    pub fn tlb(&mut self, level: Level) -> &mut Option<u64> {
        &mut self.tlb[usize::from(level == Level::L2)]
    }

    pub fn kick(&self) -> &'static AtomicBool {
        &self.world.kicks[usize::from(self.local.slot())]
    }

    /// From CLGI to the last step before the guest.
    pub fn prepare(&mut self, level: Level) {
        // Kicks that arrive before this point find the host and do nothing; later ones are held until the guest runs.
        self.kick().store(false, Ordering::Relaxed);
        let mut drop = false;
        if let Some(flush) = self.local.enter(level) {
            drop = match flush.gva {
                GvaFlush::None => false,
                GvaFlush::Ranges(ranges) => {
                    ranges.spans(GvaWidth::Bits48).is_none_or(|mut spans| spans.any(|span| span.start == PAGE))
                }
                GvaFlush::Everything | GvaFlush::EverythingNonGlobal => true,
            } || flush.second_stage != SecondStageFlush::None;
        }
        if drop {
            *self.tlb(level) = None;
        }
    }

    /// A guest instruction that uses the page.
    pub fn access(&mut self, level: Level) {
        let world = self.world;
        let frame = *self.tlb(level).get_or_insert_with(|| world.pte.load(Ordering::Relaxed));
        if frame == OLD {
            world.old_page.with(|_| ());
        }
    }

    /// Enters, runs until it is kicked or nobody waits, leaves.
    pub fn run(&mut self, level: Level) {
        self.prepare(level);
        self.access(level);
        while !self.kick().load(Ordering::Relaxed) && self.world.waiting.load(Ordering::Relaxed) != 0 {
            loom::thread::yield_now();
        }
        self.local.exit();
    }

    /// As `run`, but the guest leaves of its own will.
    pub fn run_short(&mut self, level: Level) {
        self.prepare(level);
        self.access(level);
        self.local.exit();
    }

    /// An entry that hardware refuses.
    pub fn fail(&mut self, level: Level) {
        self.kick().store(false, Ordering::Relaxed);
        let _ = self.local.enter(level);
        self.local.entry_failed();
    }
}
