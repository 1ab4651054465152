//! Models of the flush protocol: every interleaving of a few VPs, under the C++ memory model.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hvcore --release --test loom_flush`
//!
//! A guest's page table is one atomic, its TLB a local variable, and the page that the old table entry names is a cell
//! that loom watches: the guest reads it when it uses the old translation, the initiator writes it when its flush has
//! returned. A use that is not ordered before the flush's return is a race, and loom finds it. A guest that runs leaves
//! only when it is kicked or when nobody waits for it, so a lost kick is an endless loop, which loom finds too.
#![cfg(loom)]
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

use hvcore::addr::{L1Gpa, Level};
use hvcore::flush::mutant::{self, Mutant};
use hvcore::flush::{
    FlushDomain, GvaFlush, GvaScope, GvaWidth, LocalFlush, NestedContext, NestedIds, Posted, SecondStageFlush,
    SecondStageScope, Shootdown, TargetIndex, VpFlush,
};
use hvcore::vp_index::{VpIndexMap, VpSlot};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use tlfs_abi::flush::RangeFormat;
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

const DEPTH: usize = 1;
const OLD: u64 = 0;
const NEW: u64 = 1;
/// The page that the guest uses, and another one.
const PAGE: u64 = 0x7000;
const OTHER: u64 = 0x9000;
const VM: u64 = 0x77;

/// The mutant switch is global, so models run one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn check(mutant: Mutant, model: impl Fn() + Sync + Send + 'static) {
    check_bounded(mutant, 3, model);
}

/// As `check`, with a number of preemptions: three threads have too many interleavings for three.
fn check_bounded(mutant: Mutant, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    mutant::set(mutant);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 2_000;
    builder.check(model);
}

/// What the threads of a model share.
struct World {
    domain: FlushDomain<'static, DEPTH>,
    map: VpIndexMap<'static>,
    kicks: [AtomicBool; 2],
    /// Initiators that are not done.
    waiting: AtomicU64,
    pte: AtomicU64,
    old_page: UnsafeCell<()>,
}

impl World {
    fn new(vps: usize, initiators: u64) -> &'static Self {
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

    fn cpu(&'static self, slot: u16) -> Cpu {
        Cpu { world: self, local: self.domain.local(slot).unwrap(), tlb: [None; 2] }
    }

    /// A VP whose L2 in `context` has cached its translation.
    fn nested(&'static self, context: NestedContext) -> Cpu {
        let mut cpu = self.cpu(0);
        let _ = cpu.local.set_context(context);
        cpu.run_short(Level::L2);
        cpu
    }

    /// Unmaps the page, flushes by `call`, waits, and reuses the page.
    fn initiate(&self, call: impl Fn(&mut Shootdown) -> Posted) {
        self.pte.store(NEW, Ordering::Relaxed);
        self.flush(call);
        self.old_page.with_mut(|_| ());
    }

    fn flush(&self, call: impl Fn(&mut Shootdown) -> Posted) {
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

    fn l1(&self, scratch: &mut Shootdown, page: u64) -> Posted {
        let mask = 1;
        let set = VpSet::Sparse(SparseVpSet::from_mask(&mask));
        self.domain.flush_l1(&self.map, set, ranges(&[page]), scratch)
    }

    /// Flushes the page for VP_ID 5 of the VM.
    fn l2(&self, scratch: &mut Shootdown) -> Posted {
        let mask = 1 << 5;
        let set = VpSet::Sparse(SparseVpSet::from_mask(&mask));
        self.domain.flush_l2(VM, set, ranges(&[PAGE]), scratch)
    }

    fn l2_all(&self, scratch: &mut Shootdown) -> Posted {
        self.domain.flush_l2(VM, VpSet::All, ranges(&[PAGE]), scratch)
    }
}

fn ranges(entries: &[u64]) -> GvaScope<'_> {
    GvaScope::Ranges { format: RangeFormat::Normal, entries }
}

fn context(vm_id: u64, vp_id: u32) -> NestedContext {
    NestedContext { ids: Some(NestedIds { vm_id, vp_id }), tag: 1, root: 0x4000 }
}

/// A physical CPU that runs a VP.
struct Cpu {
    world: &'static World,
    local: LocalFlush<'static, DEPTH>,
    tlb: [Option<u64>; 2],
}

impl Cpu {
    fn tlb(&mut self, level: Level) -> &mut Option<u64> {
        &mut self.tlb[usize::from(level == Level::L2)]
    }

    fn kick(&self) -> &'static AtomicBool {
        &self.world.kicks[usize::from(self.local.slot())]
    }

    /// From CLGI to the last step before the guest.
    fn prepare(&mut self, level: Level) {
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
    fn access(&mut self, level: Level) {
        let world = self.world;
        let frame = *self.tlb(level).get_or_insert_with(|| world.pte.load(Ordering::Relaxed));
        if frame == OLD {
            world.old_page.with(|_| ());
        }
    }

    /// Enters, runs until it is kicked or nobody waits, leaves.
    fn run(&mut self, level: Level) {
        self.prepare(level);
        self.access(level);
        while !self.kick().load(Ordering::Relaxed) && self.world.waiting.load(Ordering::Relaxed) != 0 {
            loom::thread::yield_now();
        }
        self.local.exit();
    }

    /// As `run`, but the guest leaves of its own will.
    fn run_short(&mut self, level: Level) {
        self.prepare(level);
        self.access(level);
        self.local.exit();
    }

    /// An entry that hardware refuses.
    fn fail(&mut self, level: Level) {
        self.kick().store(false, Ordering::Relaxed);
        let _ = self.local.enter(level);
        self.local.entry_failed();
    }
}

/// A request at any time in the life of a target that goes in and out: lost flush, kick before the entry, exit during
/// the kick, kick between the last check and the entry.
fn one_request(mutant: Mutant) {
    check(mutant, || {
        let world = World::new(1, 1);
        let target = loom::thread::spawn(move || {
            let mut cpu = world.cpu(0);
            cpu.run_short(Level::L1);
            cpu.run(Level::L1);
        });
        world.initiate(|scratch| world.l1(scratch, PAGE));
        target.join().unwrap();
    });
}

#[test]
fn a_request_is_never_lost() {
    one_request(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_mark_before_entry_is_found() {
    one_request(Mutant::KickBeforePublish);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_should_flush_dropped_is_found() {
    one_request(Mutant::DropShouldFlush);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_drain_skipped_is_found() {
    one_request(Mutant::SkipDrain);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_check_before_publish_is_found() {
    one_request(Mutant::CheckBeforePublish);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_wrong_queue_is_found() {
    one_request(Mutant::WrongTag);
}

/// A whole-space request: the mark alone carries it, so its ordering is all there is.
fn one_whole_request(mutant: Mutant) {
    check(mutant, || {
        let world = World::new(1, 1);
        let target = loom::thread::spawn(move || {
            let mut cpu = world.cpu(0);
            cpu.run_short(Level::L1);
            cpu.run_short(Level::L1);
        });
        world.initiate(|scratch| world.domain.flush_l1(&world.map, VpSet::All, GvaScope::EverythingNonGlobal, scratch));
        target.join().unwrap();
    });
}

#[test]
fn a_mark_orders_the_page_tables() {
    one_whole_request(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_relaxed_mark_is_found() {
    one_whole_request(Mutant::RelaxedMark);
}

/// A request that an entry takes which then fails.
fn failed_entry(mutant: Mutant) {
    check(mutant, || {
        let world = World::new(1, 1);
        let target = loom::thread::spawn(move || {
            let mut cpu = world.cpu(0);
            cpu.run_short(Level::L1);
            cpu.fail(Level::L1);
            cpu.run_short(Level::L1);
        });
        world.initiate(|scratch| world.l1(scratch, PAGE));
        target.join().unwrap();
    });
}

#[test]
fn a_failed_entry_keeps_the_request() {
    failed_entry(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_consumed_by_a_failed_entry_is_found() {
    failed_entry(Mutant::ConsumeOnFailure);
}

/// Two initiators, one target, and a queue with room for one entry: the other overflows.
fn two_initiators(mutant: Mutant) {
    check_bounded(mutant, 2, || {
        let world = World::new(1, 2);
        let mut cpu = world.cpu(0);
        cpu.run_short(Level::L1);
        let target = loom::thread::spawn(move || {
            cpu.run_short(Level::L1);
            cpu.run_short(Level::L1);
        });
        let other = loom::thread::spawn(move || world.flush(|scratch| world.l1(scratch, OTHER)));
        world.initiate(|scratch| world.l1(scratch, PAGE));
        target.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn two_initiators_and_an_overflow() {
    two_initiators(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_mark_before_entry_is_found_among_two() {
    two_initiators(Mutant::KickBeforePublish);
}

/// Two initiators of a running target that only a kick brings out: one of them kicks, whichever comes first.
#[test]
fn one_of_two_initiators_kicks() {
    check_bounded(Mutant::None, 2, || {
        let world = World::new(1, 2);
        let mut cpu = world.cpu(0);
        cpu.prepare(Level::L1);
        let post = move || {
            let mut scratch = Shootdown::new();
            assert_eq!(world.l1(&mut scratch, PAGE), Posted::Wait);
            scratch.kicks().count()
        };
        let first = loom::thread::spawn(post);
        let second = loom::thread::spawn(post);
        assert_eq!(first.join().unwrap() + second.join().unwrap(), 1);
    });
}

/// A request for L2 while the target moves between its guests.
fn transition(mutant: Mutant) {
    check(mutant, || {
        let world = World::new(1, 1);
        let mut cpu = world.nested(context(VM, 5));
        let target = loom::thread::spawn(move || {
            cpu.run_short(Level::L2);
            // Runs L1 meanwhile: no kick, and nobody waits for it.
            cpu.prepare(Level::L1);
            cpu.local.exit();
            cpu.run(Level::L2);
        });
        world.initiate(|scratch| world.l2(scratch));
        target.join().unwrap();
    });
}

#[test]
fn l1_l2_transitions_during_a_request() {
    transition(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_wrong_queue_is_found_for_l2() {
    transition(Mutant::WrongTag);
}

/// A request for L2 finds its target in L1, which stays there: marked, not kicked, not waited for.
#[test]
fn the_other_level_is_only_marked() {
    check(Mutant::None, || {
        let world = World::new(1, 1);
        let mut cpu = world.nested(context(VM, 5));
        cpu.prepare(Level::L1);
        let initiator = loom::thread::spawn(move || world.initiate(|scratch| world.l2_all(scratch)));
        // Leaves L1 only when the initiator is done, and is never kicked.
        while world.waiting.load(Ordering::Relaxed) != 0 {
            loom::thread::yield_now();
        }
        assert!(!world.kicks[0].load(Ordering::Relaxed));
        cpu.local.exit();
        cpu.run_short(Level::L2);
        initiator.join().unwrap();
    });
}

/// A context switch, and back, while a request for the first context is under way.
fn context_switch(mutant: Mutant) {
    check(mutant, || {
        let world = World::new(1, 1);
        let mut cpu = world.nested(context(VM, 5));
        let target = loom::thread::spawn(move || {
            let _ = cpu.local.set_context(context(0x88, 6));
            cpu.prepare(Level::L2);
            cpu.local.exit();
            let _ = cpu.local.set_context(context(VM, 5));
            cpu.run_short(Level::L2);
        });
        world.initiate(|scratch| world.l2(scratch));
        target.join().unwrap();
    });
}

#[test]
fn vm_id_switch_during_a_request() {
    context_switch(Mutant::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_old_tag_kept_is_found() {
    context_switch(Mutant::KeepOldTag);
}

/// A context that is entered for the first time while a request for it is under way: the index has it, or its walks see
/// the new page tables.
fn first_entry(mutant: Mutant, by_set: bool) {
    check(mutant, move || {
        let world = World::new(1, 1);
        let mut cpu = world.cpu(0);
        let target = loom::thread::spawn(move || {
            let _ = cpu.local.set_context(context(VM, 5));
            cpu.run_short(Level::L2);
            cpu.run_short(Level::L2);
        });
        world.initiate(|scratch| if by_set { world.l2(scratch) } else { world.l2_all(scratch) });
        target.join().unwrap();
    });
}

#[test]
fn first_entry_of_a_context_by_set() {
    first_entry(Mutant::None, true);
}

#[test]
fn first_entry_of_a_context_by_vm() {
    first_entry(Mutant::None, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn mutant_no_fence_is_found() {
    first_entry(Mutant::NoIndexFence, true);
}

/// Second stage: a root and a range of it, in a queue with room for one.
#[test]
fn second_stage_requests() {
    check_bounded(Mutant::None, 2, || {
        let world = World::new(1, 2);
        let mut cpu = world.nested(context(VM, 5));
        let target = loom::thread::spawn(move || {
            cpu.run_short(Level::L2);
            cpu.run_short(Level::L2);
        });
        let root = L1Gpa::new(0x4000);
        let other = loom::thread::spawn(move || {
            let scope = SecondStageScope::Ranges { root, entries: &[0x1000] };
            world.flush(|scratch| world.domain.flush_second_stage(scope, scratch));
        });
        world.initiate(|scratch| world.domain.flush_second_stage(SecondStageScope::Root(root), scratch));
        target.join().unwrap();
        other.join().unwrap();
    });
}

/// Two VPs that flush each other: both are outside, so neither waits for ever.
#[test]
fn initiators_do_not_wait_for_each_other() {
    check(Mutant::None, || {
        let world = World::new(2, 2);
        let vp = |slot: u16| {
            move || {
                let mut cpu = world.cpu(slot);
                cpu.prepare(Level::L1);
                cpu.local.exit();
                let mask = 0b11;
                let set = VpSet::Sparse(SparseVpSet::from_mask(&mask));
                world.flush(|scratch| world.domain.flush_l1(&world.map, set, ranges(&[PAGE]), scratch));
                cpu.prepare(Level::L1);
                cpu.local.exit();
            }
        };
        let other = loom::thread::spawn(vp(1));
        vp(0)();
        other.join().unwrap();
    });
}

/// A target that walks in software: the caller is suspended, and issues its call again.
#[test]
fn an_inhibiting_target_suspends_the_caller() {
    check(Mutant::None, || {
        let world = World::new(1, 1);
        let wakes: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
        let mut cpu = world.cpu(0);
        let target = loom::thread::spawn(move || {
            let shared = cpu.local.shared();
            shared.inhibit();
            cpu.access(Level::L1);
            if shared.uninhibit() {
                wakes.fetch_add(1, Ordering::Relaxed);
            }
        });
        world.pte.store(NEW, Ordering::Relaxed);
        let mut scratch = Shootdown::new();
        let mut woken = 0;
        while world.l1(&mut scratch, PAGE) == Posted::Suspend {
            // Sleeps until somebody says that the inhibition is over.
            while wakes.load(Ordering::Relaxed) == woken {
                loom::thread::yield_now();
            }
            woken += 1;
        }
        world.old_page.with_mut(|_| ());
        target.join().unwrap();
    });
}
