//! The host side of KVM's paravirtual TLB flush: the `preempted` byte of a VP's steal-time record.
//!
//! A Linux guest that was offered KVM_FEATURE_STEAL_TIME and KVM_FEATURE_PV_TLB_FLUSH (leaf 0x40000001 EAX bits 5 and 9)
//! does not interrupt a VP whose record says that the host does not run it: it leaves a mark, and the host flushes
//! before the VP runs again.
//!
//! Called by the embedder when it takes a VP off a physical CPU and puts it back, outside the guest; uses guest memory
//! and the VP's [`LocalFlush`]. Modelled in `tests/loom_pv.rs`.

use crate::addr::{L1Gpa, Level};
use crate::flush::LocalFlush;
use crate::memory::{GuestMemory, MemoryError};

/// Offset of the `preempted` byte in the steal-time record.
pub const PREEMPTED_OFFSET: u64 = 16;
/// Bit 0 of the byte: the host does not run the VP.
pub const PREEMPTED: u8 = 1 << 0;
/// Bit 1 of the byte: the guest wants all TLB entries of the VP flushed before it runs again.
pub const FLUSH_TLB: u8 = 1 << 1;

/// Exchanges tried before the guest is taken to be playing: an honest one changes the byte at most once, from PREEMPTED
/// to PREEMPTED with FLUSH_TLB. One that changes it for ever spoils its own flushes only.
const TRIES: u32 = 4;

/// The byte of one VP, as the guest registered it (MSR_KVM_STEAL_TIME).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreemptedByte {
    gpa: L1Gpa,
}

impl PreemptedByte {
    /// The byte of the steal-time record at `record`; `None` when that is not 64-byte aligned, which the MSR refuses.
    pub const fn new(record: L1Gpa) -> Option<Self> {
        if !record.is_aligned(64) {
            return None;
        }
        match record.checked_add(PREEMPTED_OFFSET) {
            Some(gpa) => Some(Self { gpa }),
            None => None,
        }
    }

    /// The host stops running the VP: from now on the guest may leave its mark instead of an IPI. A mark that is there
    /// already stays.
    ///
    /// `false` when the byte kept changing and says what it said: the guest then sends IPIs, which is correct.
    pub fn scheduled_out<M: GuestMemory + ?Sized>(&self, memory: &M) -> Result<bool, MemoryError> {
        self.update(memory, |byte| byte | PREEMPTED).map(|old| old.is_some())
    }

    /// The host runs the VP again: the byte becomes zero, and if the guest left its mark, everything of L1 is flushed at
    /// the next entry. True when it did.
    ///
    /// To be called before [`LocalFlush::enter`]. The exchange is sequentially consistent, so what the guest did before
    /// its mark is before the VP's next walk. On an error (the record is gone), and when the byte does not come to rest, the
    /// flush happens too.
    pub fn scheduled_in<M: GuestMemory + ?Sized, const DEPTH: usize>(
        &self,
        memory: &M,
        vp: &mut LocalFlush<'_, DEPTH>,
    ) -> Result<bool, MemoryError> {
        let old = self.update(memory, |_| 0);
        let flush = !matches!(old, Ok(Some(byte)) if byte & FLUSH_TLB == 0);
        if flush {
            vp.flush_all(Level::L1);
        }
        old.map(|_| flush)
    }

    /// Replaces the byte; the old one, or `None` when it changed at every try.
    fn update<M: GuestMemory + ?Sized>(&self, memory: &M, new: impl Fn(u8) -> u8) -> Result<Option<u8>, MemoryError> {
        let mut seen = 0;
        memory.read(self.gpa, core::slice::from_mut(&mut seen))?;
        for _ in 0..TRIES {
            match memory.compare_exchange_u8(self.gpa, seen, new(seen))? {
                Ok(_) => return Ok(Some(seen)),
                Err(now) => seen = now,
            }
        }
        Ok(None)
    }
}
