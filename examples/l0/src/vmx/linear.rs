//! L1's linear memory: the operands of its VMX instructions, by a walk of its page tables as the processor does it.
//!
//! Called by the library while it emulates an instruction; uses L1's memory.

use hvcore::addr::{Gva, L1Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::field::Field;
use nvmx::{Linear, PageFault, Vmcs};

use crate::memory::L1Memory;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const ERROR_PRESENT: u32 = 1;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;
const ERROR_RESERVED: u32 = 1 << 3;

/// L1's linear memory on L1's physical memory.
#[derive(Debug)]
pub struct L1Linear {
    memory: &'static L1Memory,
    /// Bits of a table entry that are reserved, by MAXPHYADDR.
    reserved: u64,
}

/// How one access is translated.
struct Walk<'m> {
    memory: &'m L1Memory,
    reserved: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    user: bool,
    /// A supervisor access to a user page is refused.
    smap: bool,
    write: bool,
}

impl L1Linear {
    /// On `memory`, for a processor with physical addresses of `address_bits` bits.
    pub const fn new(memory: &'static L1Memory, address_bits: u32) -> Self {
        Self { memory, reserved: ADDRESS & !((1 << address_bits) - 1) }
    }

    fn walk<V: Vmcs + ?Sized>(&self, v: &V, write: bool) -> Walk<'_> {
        let cr4 = v.read(Field::GuestCr4);
        let user = nvmx::step::cpl(v) == 3;
        Walk {
            memory: self.memory,
            reserved: self.reserved,
            cr0: v.read(Field::GuestCr0),
            cr3: v.read(Field::GuestCr3),
            cr4,
            efer: v.read(Field::GuestEfer),
            user,
            smap: cr4 & CR4_SMAP != 0 && !user && v.read(Field::GuestRflags) & RFLAGS_AC == 0,
            write,
        }
    }

    /// The pieces of `len` bytes at `address`: where each is, and how long the first one is.
    fn place(&self, walk: &Walk<'_>, address: u64, len: usize) -> Result<(u64, Option<u64>, usize), PageFault> {
        let first = ((0x1000 - (address & 0xfff)) as usize).min(len);
        let at = walk.translate(address)?;
        let rest = (first < len).then(|| walk.translate(address.wrapping_add(first as u64))).transpose()?;
        Ok((at, rest, first))
    }
}

impl Linear for L1Linear {
    fn read<V: Vmcs + ?Sized>(&self, vmcs: &V, address: Gva, buf: &mut [u8]) -> Result<(), PageFault> {
        let walk = self.walk(vmcs, false);
        let (at, rest, first) = self.place(&walk, address.raw(), buf.len())?;
        let (head, tail) = buf.split_at_mut(first);
        let pieces = [Some((at, head)), rest.map(|at| (at, tail))];
        for (gpa, piece) in pieces.into_iter().flatten() {
            if self.memory.read(L1Gpa::new(gpa), piece).is_err() {
                piece.fill(0xff);
            }
        }
        Ok(())
    }

    fn write<V: Vmcs + ?Sized>(&self, vmcs: &V, address: Gva, bytes: &[u8]) -> Result<(), PageFault> {
        let walk = self.walk(vmcs, true);
        let (at, rest, first) = self.place(&walk, address.raw(), bytes.len())?;
        let (head, tail) = bytes.split_at(first);
        let pieces = [Some((at, head)), rest.map(|at| (at, tail))];
        for (gpa, piece) in pieces.into_iter().flatten() {
            // Not backed by memory: dropped.
            let _ = self.memory.write(L1Gpa::new(gpa), piece);
        }
        Ok(())
    }
}

impl Walk<'_> {
    fn fault(&self, address: u64, more: u32) -> PageFault {
        let kind = if self.write { ERROR_WRITE } else { 0 } | if self.user { ERROR_USER } else { 0 };
        PageFault { address: Gva::new(address), error_code: kind | more }
    }

    /// The L1 GPA of linear address `la`; accessed and dirty flags are set.
    fn translate(&self, la: u64) -> Result<u64, PageFault> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(la & 0xffff_ffff);
        }
        if self.cr4 & CR4_PAE == 0 {
            return self.legacy(la);
        }
        let long = self.efer & EFER_LMA != 0;
        let (mut table, mut shift) = match (long, self.cr4 & CR4_LA57 != 0) {
            (false, _) => (self.cr3 & 0xffff_ffe0, 30),
            (true, true) => (self.cr3 & ADDRESS, 48),
            (true, false) => (self.cr3 & ADDRESS, 39),
        };
        let mut rights = WRITE | USER;
        let mut path = [(0, 0); 5];
        let mut steps = path.iter_mut();
        loop {
            let pdpte = shift == 30 && !long;
            let at = table + 8 * (la >> shift & if pdpte { 3 } else { 511 });
            let entry = self.memory.read_u64(L1Gpa::new(at)).unwrap_or(0);
            if entry & PRESENT == 0 {
                return Err(self.fault(la, 0));
            }
            let large = entry & LARGE != 0 && matches!(shift, 21 | 30) && !pdpte;
            let last = large || shift == 12;
            let unaligned = if large { ((1 << shift) - 1) & !0x1fff } else { 0 };
            let nx = if self.efer & EFER_NXE == 0 { NX } else { 0 };
            let ps = if entry & LARGE != 0 && shift >= 39 { LARGE } else { 0 };
            if !pdpte && entry & (self.reserved | unaligned | nx | ps) != 0 {
                return Err(self.fault(la, ERROR_PRESENT | ERROR_RESERVED));
            }
            // Entries of the PAE page-directory-pointer table have neither rights nor flags.
            if !pdpte {
                rights &= entry;
                if let Some(step) = steps.next() {
                    *step = (at, entry);
                }
            }
            if last {
                self.allow(la, rights)?;
                self.mark(&path);
                let offset = (1 << shift) - 1;
                return Ok(entry & ADDRESS & !offset | la & offset);
            }
            table = entry & ADDRESS;
            shift -= 9;
        }
    }

    /// Whether tables with `rights` allow the access.
    fn allow(&self, la: u64, rights: u64) -> Result<(), PageFault> {
        let protected = self.user || self.cr0 & CR0_WP != 0;
        let refused = self.user && rights & USER == 0
            || self.write && rights & WRITE == 0 && protected
            || self.smap && rights & USER != 0;
        if refused { Err(self.fault(la, ERROR_PRESENT)) } else { Ok(()) }
    }

    /// Sets the accessed flag of all entries of the walk, and the dirty flag of the last.
    fn mark(&self, path: &[(u64, u64)]) {
        let count = path.iter().take_while(|(at, _)| *at != 0).count();
        for (i, (at, entry)) in path.iter().take(count).enumerate() {
            let flags = if i + 1 == count && self.write { ACCESSED | DIRTY } else { ACCESSED };
            if entry & flags != flags {
                // Whoever changed the entry meanwhile wins: the processor's next walk sets the flags.
                let _ = self.memory.compare_exchange_u64(L1Gpa::new(*at), *entry, entry | flags);
            }
        }
    }

    /// 32-bit paging without PAE.
    fn legacy(&self, la: u64) -> Result<u64, PageFault> {
        let read = |at| -> Result<u32, MemoryError> { self.memory.read_u32(L1Gpa::new(at)) };
        let mark = |at: u64, entry: u32, flags: u64| {
            let flags = flags as u32;
            if entry & flags != flags {
                let _ = self.memory.compare_exchange_u32(L1Gpa::new(at), entry, entry | flags);
            }
        };
        let leaf_flags = if self.write { ACCESSED | DIRTY } else { ACCESSED };
        let pde_at = (self.cr3 & 0xffff_f000) + 4 * (la >> 22 & 0x3ff);
        let pde = read(pde_at).unwrap_or(0);
        if u64::from(pde) & PRESENT == 0 {
            return Err(self.fault(la, 0));
        }
        if u64::from(pde) & LARGE != 0 && self.cr4 & CR4_PSE != 0 {
            self.allow(la, pde.into())?;
            mark(pde_at, pde, leaf_flags);
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            return Ok(u64::from(pde & 0xffc0_0000) | u64::from(pde >> 13 & 0xff) << 32 | la & 0x3f_ffff);
        }
        let pte_at = u64::from(pde & 0xffff_f000) + 4 * (la >> 12 & 0x3ff);
        let pte = read(pte_at).unwrap_or(0);
        if u64::from(pte) & PRESENT == 0 {
            return Err(self.fault(la, 0));
        }
        self.allow(la, u64::from(pde & pte))?;
        mark(pde_at, pde, ACCESSED);
        mark(pte_at, pte, leaf_flags);
        Ok(u64::from(pte & 0xffff_f000) | la & 0xfff)
    }
}
