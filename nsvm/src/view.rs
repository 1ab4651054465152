//! L1's VMCB in L1's memory: in place where the memory lends its page, else by copies.
//!
//! Every word is loaded once. What crosses is whole words: all field groups of the VMCB are.

use core::sync::atomic::{AtomicU64, Ordering};

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::IntoBytes;

use crate::vmcb::Save;

/// One page of L1's memory that L1 calls a VMCB.
pub(crate) struct View<'a, M: ?Sized> {
    memory: &'a M,
    gpa: u64,
    page: Option<&'a [AtomicU64; 512]>,
}

impl<'a, M: GuestMemory + ?Sized> View<'a, M> {
    /// The page at `gpa`, which is page aligned.
    #[inline(always)]
    pub(crate) fn new(memory: &'a M, gpa: u64) -> Self {
        Self { memory, gpa, page: memory.page(L1Gpa::new(gpa)) }
    }

    /// Copies bytes from offset `FROM`, a multiple of 8, on; whole words.
    #[inline(always)]
    pub(crate) fn read<const FROM: usize>(&self, bytes: &mut [u8]) -> Result<(), MemoryError> {
        const { assert!(FROM.is_multiple_of(8)) };
        let Some(page) = self.page else {
            return self.memory.read(L1Gpa::new(self.gpa.wrapping_add(FROM as u64)), bytes);
        };
        for (to, from) in bytes.chunks_exact_mut(8).zip(page.get(FROM / 8..).unwrap_or_default()) {
            // Relaxed: the processor promises no order between the fields of a VMCB either.
            to.copy_from_slice(&from.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    /// Copies bytes to offset `FROM`, a multiple of 8, on; whole words.
    #[inline(always)]
    pub(crate) fn write<const FROM: usize>(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        const { assert!(FROM.is_multiple_of(8)) };
        let Some(page) = self.page else {
            return self.memory.write(L1Gpa::new(self.gpa.wrapping_add(FROM as u64)), bytes);
        };
        for (from, to) in bytes.chunks_exact(8).zip(page.get(FROM / 8..).unwrap_or_default()) {
            let mut word = [0; 8];
            word.copy_from_slice(from);
            // Relaxed: as for `read`. L1 reads it on this VP, after the entry that follows.
            to.store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Reads bytes `FROM..TO` of the state save area.
    #[inline(always)]
    pub(crate) fn read_save<const FROM: usize, const TO: usize>(&self, save: &mut Save) -> Result<(), MemoryError> {
        self.read::<FROM>(part::<FROM, TO>(save))
    }

    /// Writes bytes `FROM..TO` of the state save area.
    #[inline(always)]
    pub(crate) fn write_save<const FROM: usize, const TO: usize>(&self, save: &mut Save) -> Result<(), MemoryError> {
        self.write::<FROM>(part::<FROM, TO>(save))
    }
}

/// Bytes `FROM..TO` (offsets in the VMCB) of the state save area.
#[inline(always)]
fn part<const FROM: usize, const TO: usize>(save: &mut Save) -> &mut [u8] {
    const { assert!(FROM >= 0x400 && TO > FROM && TO <= 0x400 + size_of::<Save>()) };
    save.as_mut_bytes().get_mut(FROM.wrapping_sub(0x400)..TO.wrapping_sub(0x400)).unwrap_or_default()
}
