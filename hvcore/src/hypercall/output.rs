//! Where a hypercall's output goes: memory or, for fast calls, registers.
//!
//! Filled by the calls that have output; made and finished by `request`.

use super::registers::{BLOCK, Registers, write_block};
use crate::addr::L1Gpa;
use crate::memory::{CallerMemory, GuestMemory};
use tlfs_abi::status::HvStatus;
use zerocopy::{Immutable, IntoBytes};

/// The output of one call, written forward; each byte is written once.
#[derive(Debug)]
pub struct Output<'a, C: ?Sized> {
    to: Destination<'a, C>,
    /// Bytes from the start of the destination to the next byte to write.
    at: usize,
}

#[derive(Debug)]
enum Destination<'a, C: ?Sized> {
    Nowhere,
    Memory {
        memory: &'a C,
        gpa: L1Gpa,
    },
    /// The register block; output occupies quadwords from `first` on.
    Registers {
        block: [u64; BLOCK],
        first: usize,
    },
}

impl<'a, C: CallerMemory + ?Sized> Output<'a, C> {
    /// For a call without output.
    #[inline]
    pub(super) const fn nowhere() -> Self {
        Self { to: Destination::Nowhere, at: 0 }
    }

    /// To memory from `gpa` on, beginning `at` bytes further.
    pub(super) const fn memory(memory: &'a C, gpa: L1Gpa, at: usize) -> Self {
        Self { to: Destination::Memory { memory, gpa }, at }
    }

    /// To the register block, whose present contents are `block`, from quadword `first` on, beginning `at` bytes
    /// further.
    pub(super) const fn registers(block: [u64; BLOCK], first: usize, at: usize) -> Self {
        Self { to: Destination::Registers { block, first }, at }
    }

    /// Appends `value`. HV_STATUS_INVALID_HYPERCALL_INPUT when there is no room for it or memory cannot be written.
    pub fn push<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), HvStatus> {
        const FAILED: HvStatus = HvStatus::INVALID_HYPERCALL_INPUT;
        let bytes = value.as_bytes();
        let end = self.at.checked_add(bytes.len()).ok_or(FAILED)?;
        match &mut self.to {
            Destination::Nowhere => return Err(FAILED),
            Destination::Memory { memory, gpa } => {
                let gpa = gpa.checked_add(self.at as u64).ok_or(FAILED)?;
                memory.memory().write(gpa, bytes).map_err(|_| FAILED)?;
            }
            Destination::Registers { block, first } => {
                let room = block.get_mut(*first..).ok_or(FAILED)?.as_mut_bytes();
                let target = room.get_mut(self.at..end).ok_or(FAILED)?;
                for (to, from) in target.iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
        }
        self.at = end;
        Ok(())
    }

    /// Makes output in registers visible.
    #[inline]
    pub(super) fn finish<R: Registers>(self, registers: &mut R, from: usize) {
        if let Destination::Registers { block, first } = self.to
            && self.at > from
        {
            let first_changed = first.wrapping_add(from / 8);
            write_block(registers, &block, first_changed, first.wrapping_add(self.at.div_ceil(8)));
        }
    }
}
