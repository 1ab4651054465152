//! KVM's paravirtual flush: the byte, the races on it, and the flush that comes of it.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

use hvcore::addr::{L1Gpa, Level};
use hvcore::flush::{FlushDomain, GvaFlush, LocalFlush, TargetIndex, VpFlush};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::pv::{FLUSH_TLB, PREEMPTED, PREEMPTED_OFFSET, PreemptedByte};
use std::cell::Cell;
use std::sync::atomic::AtomicU64;

/// One byte, which the guest changes `races` times, each just before the host's exchange, to what `guest` makes of it.
struct Byte {
    value: Cell<u8>,
    races: Cell<u32>,
    guest: fn(u8) -> u8,
    reachable: bool,
}

const RECORD: L1Gpa = L1Gpa::new(0x1040);

impl Byte {
    fn new(value: u8, races: u32, guest: fn(u8) -> u8) -> Self {
        Self { value: Cell::new(value), races: Cell::new(races), guest, reachable: true }
    }

    fn quiet(value: u8) -> Self {
        Self::new(value, 0, |byte| byte)
    }
}

impl GuestMemory for Byte {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        assert_eq!((gpa.raw(), buf.len()), (RECORD.raw() + PREEMPTED_OFFSET, 1));
        buf[0] = self.value.get();
        if self.reachable { Ok(()) } else { Err(MemoryError) }
    }
    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        assert_eq!(gpa.raw(), RECORD.raw() + PREEMPTED_OFFSET);
        if self.races.get() != 0 {
            self.races.set(self.races.get() - 1);
            self.value.set((self.guest)(self.value.get()));
        }
        let seen = self.value.get();
        if seen != current {
            return Ok(Err(seen));
        }
        self.value.set(new);
        Ok(Ok(seen))
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

fn vp() -> LocalFlush<'static> {
    let zeros = |n: usize| -> &'static [AtomicU64] { Vec::leak((0..n).map(|_| AtomicU64::new(0)).collect()) };
    let vps: &'static [VpFlush] = Vec::leak(vec![VpFlush::new()]);
    FlushDomain::new(vps, TargetIndex::new(1, zeros(1), zeros(4)).unwrap()).local(0).unwrap()
}

fn flushed(vp: &mut LocalFlush<'_>) -> bool {
    // Not by L2, which does not use L1's translations.
    assert!(vp.enter(Level::L2).is_none());
    vp.exit();
    match vp.enter(Level::L1) {
        Some(flush) => {
            assert_eq!(flush.gva, GvaFlush::Everything);
            true
        }
        None => false,
    }
}

fn byte() -> PreemptedByte {
    PreemptedByte::new(RECORD).unwrap()
}

#[test]
fn the_record_is_aligned() {
    for record in [0x1001, 0x1020, 0x103F, u64::MAX] {
        assert_eq!(PreemptedByte::new(L1Gpa::new(record)), None);
    }
    assert!(PreemptedByte::new(L1Gpa::new(0x1040)).is_some());
    assert!(PreemptedByte::new(L1Gpa::new(0xFFFF_FFFF_FFFF_FFC0)).is_some());
}

#[test]
fn a_mark_is_flushed_and_no_mark_is_not() {
    for (mark, want) in [(0, false), (FLUSH_TLB, true)] {
        let (memory, mut vp) = (Byte::quiet(0), vp());
        assert_eq!(byte().scheduled_out(&memory), Ok(true));
        assert_eq!(memory.value.get(), PREEMPTED);
        memory.value.set(PREEMPTED | mark);
        assert_eq!(byte().scheduled_in(&memory, &mut vp), Ok(want));
        assert_eq!((memory.value.get(), flushed(&mut vp)), (0, want));
    }
}

#[test]
fn a_mark_in_the_last_moment_counts() {
    let (memory, mut vp) = (Byte::new(PREEMPTED, 1, |byte| byte | FLUSH_TLB), vp());
    assert_eq!(byte().scheduled_in(&memory, &mut vp), Ok(true));
    assert_eq!((memory.value.get(), flushed(&mut vp)), (0, true));
}

#[test]
fn a_mark_survives_a_second_time_out() {
    let memory = Byte::quiet(PREEMPTED | FLUSH_TLB);
    assert_eq!(byte().scheduled_out(&memory), Ok(true));
    assert_eq!(memory.value.get(), PREEMPTED | FLUSH_TLB);
}

#[test]
fn a_byte_that_does_not_rest() {
    // Three changes are borne, four are not; then everything is flushed.
    for (races, settled) in [(3, true), (4, false)] {
        let memory = Byte::new(0, races, |byte| byte ^ 0x80);
        assert_eq!(byte().scheduled_out(&memory), Ok(settled));
        let (memory, mut vp) = (Byte::new(PREEMPTED, races, |byte| byte ^ 0x80), vp());
        assert_eq!(byte().scheduled_in(&memory, &mut vp), Ok(!settled));
        assert_eq!(flushed(&mut vp), !settled);
    }
}

#[test]
fn a_record_that_is_gone_is_flushed_for() {
    let (memory, mut vp) = (Byte { reachable: false, ..Byte::quiet(0) }, vp());
    assert_eq!(byte().scheduled_out(&memory), Err(MemoryError));
    assert_eq!(byte().scheduled_in(&memory, &mut vp), Err(MemoryError));
    assert!(flushed(&mut vp));
}
