//! Instruction bytes of a guest that exited, for processors that give neither the next RIP nor the bytes.
//!
//! The guest just executed the instruction, so permissions need no check; tables may have changed meanwhile, in which
//! case the guest gets the length of what is there now.

use hvcore::addr::L1Gpa;
use hvcore::memory::{Access, GuestMemory, MemoryError};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The registers that say how a guest translates linear addresses.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// The longest instruction, in bytes.
pub const MAX_LENGTH: usize = 15;

impl Paging {
    /// The guest physical address of linear address `la`; `read` reads a table entry at a guest physical address.
    #[inline]
    pub fn translate(
        &self,
        la: u64,
        read: impl Fn(u64, usize) -> Result<u64, MemoryError>,
    ) -> Result<u64, MemoryError> {
        if self.cr0 & 1 << 31 == 0 {
            return Ok(la & 0xffff_ffff);
        }
        if self.cr4 & 1 << 5 == 0 {
            return self.legacy(la as u32, read);
        }
        let long = self.efer & 1 << 10 != 0;
        let (mut table, mut shift) = if !long {
            (self.cr3 & 0xffff_ffe0, 30)
        } else if self.cr4 & 1 << 12 != 0 {
            (self.cr3 & ADDRESS, 48)
        } else {
            (self.cr3 & ADDRESS, 39)
        };
        loop {
            let index_mask = if shift == 30 && !long { 3 } else { 511 };
            let entry = read(table + 8 * (la >> shift & index_mask), 8)?;
            if entry & PRESENT == 0 {
                return Err(MemoryError);
            }
            let large = entry & LARGE != 0 && (shift == 21 || (shift == 30 && long));
            if shift == 12 || large {
                let offset = (1 << shift) - 1;
                return Ok(entry & ADDRESS & !offset | la & offset);
            }
            table = entry & ADDRESS;
            shift -= 9;
        }
    }

    /// 32-bit paging without PAE.
    fn legacy(&self, la: u32, read: impl Fn(u64, usize) -> Result<u64, MemoryError>) -> Result<u64, MemoryError> {
        let pde = read((self.cr3 & 0xffff_f000) + 4 * u64::from(la >> 22), 4)?;
        if pde & PRESENT == 0 {
            return Err(MemoryError);
        }
        if pde & LARGE != 0 && self.cr4 & 1 << 4 != 0 {
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            return Ok(pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32 | u64::from(la & 0x3f_ffff));
        }
        let pte = read((pde & 0xffff_f000) + 4 * u64::from(la >> 12 & 0x3ff), 4)?;
        if pte & PRESENT == 0 {
            return Err(MemoryError);
        }
        Ok(pte & 0xffff_f000 | u64::from(la & 0xfff))
    }
}

/// Instruction bytes at linear address `la`, at most as many as `buf` takes; how many were got. `second` translates
/// guest physical addresses to L1's: the identity for L1 itself.
#[inline]
pub fn bytes<M: GuestMemory + ?Sized>(
    memory: &M,
    paging: &Paging,
    la: u64,
    buf: &mut [u8; MAX_LENGTH],
    second: impl Fn(u64, Access) -> Result<L1Gpa, MemoryError>,
) -> usize {
    let entry = |gpa, size| {
        // The processor walks guest tables as if it wrote them.
        let at = second(gpa, Access::Write)?;
        if size == 8 { memory.read_u64(at) } else { memory.read_u32(at).map(u64::from) }
    };
    let get = |la, buf: &mut [u8]| {
        let at = second(paging.translate(la, entry)?, Access::Execute)?;
        memory.read(at, buf)
    };
    let in_page = (0x1000 - (la & 0xfff)) as usize;
    if in_page >= MAX_LENGTH {
        return if get(la, buf).is_ok() { MAX_LENGTH } else { 0 };
    }
    let (first, rest) = buf.split_at_mut(in_page);
    if get(la, first).is_err() {
        return 0;
    }
    if get(la.wrapping_add(in_page as u64), rest).is_ok() { MAX_LENGTH } else { in_page }
}
