//! Models of the paravirtual flush: the `preempted` byte between a guest that flushes and the host that takes the
//! target off its CPU and puts it back.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hvcore --release --test loom_pv`
//!
//! The guest changes its page table, and where the byte says PREEMPTED it leaves its mark there instead of an interrupt;
//! then the flush is done for it, and it reuses the page. Page table, TLB and page are those of the other models.
#![cfg(loom)]
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod loom_support;

use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::pv::{FLUSH_TLB, PREEMPTED, PREEMPTED_OFFSET, PreemptedByte};
use loom::sync::atomic::AtomicU8;
use loom_support::*;

const RECORD: u64 = 0x1000;

/// Guest memory that is one byte.
struct Record {
    preempted: AtomicU8,
    /// How the host exchanges it.
    order: Ordering,
}

impl Record {
    fn new(order: Ordering) -> &'static Self {
        Box::leak(Box::new(Self { preempted: AtomicU8::new(0), order }))
    }

    /// A flush by another VP of the guest, as far as this byte goes: true when the mark stands for an interrupt.
    fn mark(&self) -> bool {
        let seen = self.preempted.load(Ordering::Relaxed);
        let marked = seen | FLUSH_TLB;
        // SeqCst: a locked exchange of the guest's.
        seen & PREEMPTED != 0
            && self.preempted.compare_exchange(seen, marked, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }
}

impl GuestMemory for Record {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        assert_eq!((gpa.raw(), buf.len()), (RECORD + PREEMPTED_OFFSET, 1));
        buf[0] = self.preempted.load(Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        assert_eq!(gpa.raw(), RECORD + PREEMPTED_OFFSET);
        Ok(self.preempted.compare_exchange(current, new, self.order, Ordering::Relaxed))
    }

    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

/// How the host puts the VP back.
#[derive(Clone, Copy)]
enum Back {
    /// As the library does.
    Library,
    /// By a look and a store: a mark in between is lost.
    BlindStore,
    /// Twice, off and back again in between.
    Twice,
}

/// One flush at any time in the life of a target that runs, is taken off and is put back.
fn one_flush(order: Ordering, back: Back) {
    check(Mutant::None, move || {
        let world = World::new(1, 0);
        let record = Record::new(order);
        let target = loom::thread::spawn(move || {
            let byte = PreemptedByte::new(L1Gpa::new(RECORD)).unwrap();
            let mut cpu = world.cpu(0);
            cpu.run_short(Level::L1);
            let turns = if matches!(back, Back::Twice) { 2 } else { 1 };
            for _ in 0..turns {
                assert_eq!(byte.scheduled_out(record), Ok(true));
                if matches!(back, Back::BlindStore) {
                    if record.preempted.load(Ordering::SeqCst) & FLUSH_TLB != 0 {
                        cpu.local.flush_all(Level::L1);
                    }
                    record.preempted.store(0, Ordering::SeqCst);
                } else {
                    byte.scheduled_in(record, &mut cpu.local).unwrap();
                }
                cpu.run_short(Level::L1);
            }
        });
        world.pte.store(NEW, Ordering::Relaxed);
        if record.mark() {
            world.old_page.with_mut(|_| ());
        }
        target.join().unwrap();
    });
}

#[test]
fn a_mark_is_never_lost() {
    one_flush(Ordering::SeqCst, Back::Library);
}

#[test]
fn a_mark_is_never_lost_between_two_turns() {
    one_flush(Ordering::SeqCst, Back::Twice);
}

/// Sequential consistency is more than is needed.
#[test]
fn acquire_and_release_are_enough() {
    one_flush(Ordering::AcqRel, Back::Library);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_exchange_without_order_is_found() {
    one_flush(Ordering::Relaxed, Back::Library);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_exchange_that_does_not_release_is_found() {
    one_flush(Ordering::Acquire, Back::Library);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_blind_store_is_found() {
    one_flush(Ordering::SeqCst, Back::BlindStore);
}
