//! Instruction bytes of a guest that exited, for processors that give neither the next RIP nor the bytes.
//!
//! The guest just executed the instruction, so permissions need no check. A walk of the guest's page tables (for L2 of
//! L1's nested tables too) finds the bytes. [`Fetch`] remembers walks: the entries of the guest's tables that they read
//! and where they led. A remembered walk counts only while every entry still has the value it had, so it gives what a
//! new walk would give. What L1's nested tables say is remembered as a TLB does: until L1 asks for its translations to
//! be dropped, or L2 runs on other tables.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::memory::{Access, GuestMemory, MemoryError, SecondStage};
use nsvm::npt::{NptFormat, NptWalk};
use nsvm::vmcb::Vmcb;

use crate::memory::L1Memory;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The registers that say how a guest translates linear addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// Those of the guest in `vmcb`.
    #[inline]
    pub fn of(vmcb: &Vmcb) -> Self {
        Self { cr0: vmcb.save.cr0, cr3: vmcb.save.cr3, cr4: vmcb.save.cr4, efer: vmcb.save.efer }
    }

    /// The guest physical address of linear address `la`; `read` reads a table entry of 4 or 8 bytes.
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

/// Bytes that a remembered walk leads to at least: as many as [`first_four`] reads.
const HEAD: usize = 4;

/// Bytes from the address to the end of its page.
const fn room(address: u64) -> usize {
    (0x1000 - (address & 0xfff)) as usize
}

/// Linear address of the next instruction of the guest in `vmcb`.
#[inline]
pub fn linear_rip(vmcb: &Vmcb) -> u64 {
    if vmcb.in_64bit_code() { vmcb.save.rip } else { vmcb.save.cs.base.wrapping_add(vmcb.save.rip) & 0xffff_ffff }
}

/// L1's nested tables for its L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nested {
    /// How they are read.
    pub format: NptFormat,
    /// Their root.
    pub ncr3: u64,
}

/// Entries that a walk reads, at most: 5 levels of the guest's own tables.
const STEPS: usize = 5;
/// CR4.LA57: 5-level paging.
const LA57: u64 = 1 << 12;

/// Walks of L1 that are remembered: instructions of one cache line never compete for a place.
const L1_WALKS: usize = 64;
/// Walks of L2 that are remembered.
const L2_WALKS: usize = 16;

/// An entry that a walk read: where it is, and what it held.
type Step = (&'static AtomicU64, u64);

/// An entry that never changes: stands for those that a short walk does not have.
static NO_STEP: AtomicU64 = AtomicU64::new(0);
/// Where no instruction is: stands for one that is not remembered.
static NO_CODE: [u8; 16] = [0; 16];

/// A remembered walk. Its fields are one processor's, which never is in two of its methods at once.
#[derive(Debug)]
struct Walk {
    la: Cell<u64>,
    paging: Cell<Paging>,
    /// Where overlays were when it was walked: their count of moves.
    overlays: Cell<u64>,
    path: [Cell<Step>; STEPS],
    /// The instruction; [`HEAD`] bytes of it at least are in its page. [`NO_CODE`]: nothing is remembered.
    code: Cell<*const u8>,
}

impl Walk {
    fn new() -> Self {
        Self {
            la: Cell::new(0),
            paging: Cell::new(Paging { cr0: 0, cr3: 0, cr4: 0, efer: 0 }),
            overlays: Cell::new(0),
            path: core::array::from_fn(|_| Cell::new((&NO_STEP, 0))),
            code: Cell::new((&raw const NO_CODE).cast()),
        }
    }

    fn forget(&self) {
        self.code.set((&raw const NO_CODE).cast());
    }

    /// The instruction at `la` under `paging`, with overlays where they are after so many moves, if this walk leads
    /// there and every entry it read still has the value that it had.
    #[inline(always)]
    fn leads_to(&self, la: u64, paging: &Paging, overlays: u64) -> Option<*const u8> {
        // Acquire: the bytes read next are at least as new as the tables.
        let holds = |step: &Cell<Step>| step.get().0.load(Ordering::Acquire) == step.get().1;
        let [a, b, c, d, e] = &self.path;
        let known = self.la.get() == la
            && self.overlays.get() == overlays
            && self.paging.get() == *paging
            && (holds(a) && holds(b) && holds(c) && holds(d))
            && (paging.cr4 & LA57 == 0 || holds(e));
        known.then(|| self.code.get())
    }

    fn remember(&self, la: u64, paging: &Paging, overlays: u64, path: &[Step], code: *const u8) {
        self.la.set(la);
        self.paging.set(*paging);
        self.overlays.set(overlays);
        let rest = core::iter::repeat((&NO_STEP, 0));
        for (to, from) in self.path.iter().zip(path.iter().copied().chain(rest)) {
            to.set(from);
        }
        self.code.set(code);
    }
}

/// Fetches instruction bytes of one VP's guests.
#[derive(Debug)]
pub struct Fetch {
    memory: &'static L1Memory,
    /// L1's nested tables for the L2 that runs, when L1 uses nested paging.
    nested: Cell<Option<Nested>>,
    l1: [Walk; L1_WALKS],
    l2: [Walk; L2_WALKS],
}

// SAFETY: moved to its processor once, before it remembers anything; the pointers are to memory that all share.
unsafe impl Send for Fetch {}

impl Fetch {
    /// Nothing is remembered.
    pub fn new(memory: &'static L1Memory) -> Self {
        Self {
            memory,
            nested: Cell::new(None),
            l1: core::array::from_fn(|_| Walk::new()),
            l2: core::array::from_fn(|_| Walk::new()),
        }
    }

    /// L2 runs on these tables of L1's from now on; `None`: on L1's addresses.
    #[inline]
    pub fn set_nested(&self, nested: Option<Nested>) {
        if self.nested.get() != nested {
            self.nested.set(nested);
            self.forget_nested();
        }
    }

    /// What L1's nested tables said is remembered no more. To be called when L1 asks for what derives from them to be
    /// dropped; until it does, the processor could have their translations cached just the same.
    #[cold]
    pub fn forget_nested(&self) {
        self.l2.iter().for_each(Walk::forget);
    }

    /// L1's nested tables as a second stage.
    #[inline]
    pub fn second_stage(&self) -> Option<NptWalk<'static, L1Memory>> {
        self.nested.get().map(|n| NptWalk { memory: self.memory, format: n.format, ncr3: n.ncr3 })
    }

    /// Up to 15 instruction bytes of the guest of `level` in `vmcb`; how many were got.
    pub fn bytes(&self, level: Level, vmcb: &Vmcb, bytes: &mut [u8; MAX_LENGTH]) -> usize {
        let la = linear_rip(vmcb);
        let walk = self.walk_of(level, la);
        match walk.leads_to(la, &Paging::of(vmcb), self.memory.overlay_moves()) {
            Some(code) if code != (&raw const NO_CODE).cast() && room(code as u64) >= MAX_LENGTH => {
                copy_code(code, bytes);
                MAX_LENGTH
            }
            _ => self.walk(walk, self.nested.get().filter(|_| level == Level::L2), vmcb, bytes),
        }
    }

    /// The walk of `level` that `la` may have been remembered in.
    #[inline(always)]
    fn walk_of(&self, level: Level, la: u64) -> &Walk {
        let hash = (la ^ la >> 6) as usize;
        match level {
            Level::L1 => &self.l1[hash % L1_WALKS],
            Level::L2 => &self.l2[hash % L2_WALKS],
        }
    }

    /// Walks, and remembers the walk where that is possible.
    #[cold]
    #[inline(never)]
    fn walk(&self, walk: &Walk, nested: Option<Nested>, vmcb: &Vmcb, bytes: &mut [u8; MAX_LENGTH]) -> usize {
        let (la, paging) = (linear_rip(vmcb), Paging::of(vmcb));
        walk.forget();
        let overlays = self.memory.overlay_moves();
        let recorder = Recorder { memory: self.memory, path: RefCell::new(ArrayVec::new()), whole: Cell::new(true) };
        let second = |gpa: u64, access| match nested {
            None => Ok(L1Gpa::new(gpa)),
            Some(n) => NptWalk { memory: self.memory, format: n.format, ncr3: n.ncr3 }
                .walk(L2Gpa::new(gpa), access)
                .map_err(|_| MemoryError),
        };
        let entry = |gpa, size| {
            // The processor walks guest tables as if it wrote them.
            recorder.entry(second(gpa, Access::Write)?, size)
        };
        let place = |la| second(paging.translate(la, entry)?, Access::Execute);
        let in_page = room(la);
        let Ok(at) = place(la) else { return 0 };
        if let (HEAD.., true, Some(code)) = (in_page, recorder.whole.get(), self.memory.pointer(at, HEAD)) {
            walk.remember(la, &paging, overlays, &recorder.path.borrow(), code);
        }
        if in_page < MAX_LENGTH {
            let (first, rest) = bytes.split_at_mut(in_page);
            if self.memory.read(at, first).is_err() {
                return 0;
            }
            let next = place(la.wrapping_add(in_page as u64)).and_then(|at| self.memory.read(at, rest));
            return if next.is_ok() { MAX_LENGTH } else { in_page };
        }
        if self.memory.read(at, bytes).is_err() {
            return 0;
        }
        MAX_LENGTH
    }
}

impl nsvm::Code for Fetch {
    fn fetch(&self, level: Level, vmcb: &Vmcb, bytes: &mut [u8; MAX_LENGTH]) -> usize {
        self.bytes(level, vmcb, bytes)
    }

    #[inline(always)]
    fn begins_with(&self, level: Level, vmcb: &Vmcb, head: u32, mask: u32) -> bool {
        let la = linear_rip(vmcb);
        let walk = self.walk_of(level, la);
        walk.leads_to(la, &Paging::of(vmcb), self.memory.overlay_moves())
            .is_some_and(|code| first_four(code) & mask == head)
    }
}

/// The first four bytes of code that a guest may be writing.
#[inline(always)]
fn first_four(code: *const u8) -> u32 {
    let bytes: u32;
    // SAFETY: as for `copy_code`, for the four bytes that every remembered walk leads to.
    unsafe {
        core::arch::asm!(
            "mov {bytes:e}, [{code}]",
            code = in(reg) code,
            bytes = lateout(reg) bytes,
            options(nostack, preserves_flags, readonly, pure),
        );
    }
    bytes
}

/// Copies [`MAX_LENGTH`] bytes of code that a guest may be writing.
#[inline]
fn copy_code(code: *const u8, bytes: &mut [u8; MAX_LENGTH]) {
    let (low, high): (u64, u64);
    // SAFETY: `code` points to 15 bytes of L1's RAM, mapped for good: they are in one page (the caller saw that), which
    // is RAM (the walk that found it checked that). The loads are the processor's own, so a guest's concurrent stores
    // are no data race of the program's.
    unsafe {
        core::arch::asm!(
            "mov {low}, [{code}]",
            "mov {high}, [{code} + 7]",
            code = in(reg) code,
            low = out(reg) low,
            high = out(reg) high,
            options(nostack, preserves_flags, readonly),
        );
    }
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[7..].copy_from_slice(&high.to_le_bytes());
}

/// Reads table entries of a guest from L1's memory, and notes them.
struct Recorder {
    memory: &'static L1Memory,
    path: RefCell<ArrayVec<Step, STEPS>>,
    /// Everything that the walk depends on is in `path`.
    whole: Cell<bool>,
}

impl Recorder {
    /// The table entry of `size` bytes at `gpa`. Those of four bytes are not noted.
    fn entry(&self, gpa: L1Gpa, size: usize) -> Result<u64, MemoryError> {
        if size != 8 {
            self.whole.set(false);
            return self.memory.read_u32(gpa).map(u64::from);
        }
        let value = self.memory.read_u64(gpa)?;
        let entry = if gpa.is_aligned(8) { self.memory.pointer(gpa, 8) } else { None };
        let noted = entry.is_some_and(|entry| {
            // SAFETY: `pointer` checked that these are eight bytes of L1's RAM, mapped for good; aligned by the test
            // above.
            let entry = unsafe { AtomicU64::from_ptr(entry.cast_mut().cast()) };
            self.path.borrow_mut().try_push((entry, value)).is_ok()
        });
        if !noted {
            self.whole.set(false);
        }
        Ok(value)
    }
}
