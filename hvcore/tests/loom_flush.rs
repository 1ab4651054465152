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

mod loom_support;

use loom_support::*;

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
