//! The walk of L1's nested page tables.
//!
//! Used by the shadow fill and by the hypercall intake (as [`SecondStage`]); reads and marks entries through
//! [`GuestMemory`] only. Each entry is read once per walk; accessed and dirty bits are set by compare-exchange on the
//! value that was judged, and a walk whose entry changed under it starts over, a bounded number of times.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::memory::{Access, GuestMemory, SecondStage, TranslateError};

use super::format::{A, CACHE, D, NX, NptFormat, P, PagingMode, U, W, low_mask};
use super::info1;

/// Walks that are tried when L1 keeps changing the entries.
const ATTEMPTS: usize = 8;

/// Why L1's tables do not let an access through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// An entry is not present, or the address is wider than the tables.
    NotPresent,
    /// An entry has a reserved bit set, or lies where L1 has no memory.
    Reserved,
    /// All entries are present and the rights do not suffice.
    Rights,
    /// L1 changed the entries at every attempt; nobody is at fault, the access may be tried again.
    Unsettled,
}

impl WalkFault {
    /// EXITINFO1 of the nested page fault of an access by a physical address that no linear address led to.
    pub(crate) const fn info1(self, access: Access) -> u64 {
        let found = match self {
            Self::NotPresent | Self::Unsettled => 0,
            Self::Reserved => info1::PRESENT | info1::RESERVED,
            Self::Rights => info1::PRESENT,
        };
        let write = if matches!(access, Access::Write) { info1::WRITE } else { 0 };
        found | write | info1::USER | info1::FINAL
    }
}

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walked {
    pub(super) l1: L1Gpa,
    /// Base-2 logarithm of the page's size.
    pub(super) shift: u32,
    pub(super) writable: bool,
    pub(super) executable: bool,
    /// The dirty bit of the leaf, after the walk.
    pub(super) dirty: bool,
    /// PWT and PCD of the leaf, in bits 1:0.
    pub(super) cache: u8,
    /// The page of the table of each level, `[0]` for level 1.
    pub(super) tables: [Option<L1Gpa>; 5],
}

/// What a walk leaves behind for the marks and the shadow tables.
trait Trail {
    /// The walk went through `entry`, which is at `at` in the table of `level`.
    fn passes(&mut self, level: u8, at: L1Gpa, entry: u64);
}

/// For walks that need only the result.
impl Trail for () {
    #[inline(always)]
    fn passes(&mut self, _: u8, _: L1Gpa, _: u64) {}
}

/// Address and value of the entry of each level, `[0]` for level 1; a value of 0 where there was none.
#[derive(Default)]
struct Steps([(L1Gpa, u64); 5]);

impl Trail for Steps {
    #[inline(always)]
    fn passes(&mut self, level: u8, at: L1Gpa, entry: u64) {
        if let Some(step) = self.0.get_mut(usize::from(level).wrapping_sub(1)) {
            *step = (at, entry);
        }
    }
}

/// The end of a walk without side effects.
struct Found {
    /// Level of the leaf.
    level: u8,
    l1: L1Gpa,
    leaf: u64,
    writable: bool,
    executable: bool,
    /// Every entry on the way has its accessed bit.
    accessed: bool,
}

impl Found {
    #[inline(always)]
    const fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => true,
            Access::Write => self.writable,
            Access::Execute => self.executable,
        }
    }
}

/// One walk without side effects. The common format gets code of its own.
#[inline(always)]
fn look<M: GuestMemory + ?Sized, T: Trail>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    trail: &mut T,
) -> Result<Found, WalkFault> {
    if let PagingMode::Long4 = format.mode {
        look_in(memory, NptFormat { mode: PagingMode::Long4, ..format }, ncr3, gpa, trail)
    } else {
        look_other(memory, format, ncr3, gpa, trail)
    }
}

#[inline(never)]
fn look_other<M: GuestMemory + ?Sized, T: Trail>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    trail: &mut T,
) -> Result<Found, WalkFault> {
    look_in(memory, format, ncr3, gpa, trail)
}

#[inline(always)]
fn look_in<M: GuestMemory + ?Sized, T: Trail>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    trail: &mut T,
) -> Result<Found, WalkFault> {
    if !format.reaches(gpa) {
        return Err(WalkFault::NotPresent);
    }
    let mut table = format.top(ncr3);
    // Bits that all entries have, and bits that any entry has.
    let (mut all, mut any) = (W | U | A, 0);
    let mut level = format.levels();
    loop {
        let at = format.entry_address(table, level, gpa);
        let entry = read_entry(memory, format, at);
        if entry & P == 0 {
            return Err(WalkFault::NotPresent);
        }
        if format.reserved(level, entry) != 0 {
            return Err(WalkFault::Reserved);
        }
        trail.passes(level, at, entry);
        if !format.is_pdpte(level) {
            all &= entry;
            any |= entry;
        }
        let target = format.target(level, entry);
        if format.is_leaf(level, entry) || level <= 1 {
            if all & U == 0 {
                return Err(WalkFault::Rights);
            }
            return Ok(Found {
                level,
                l1: L1Gpa::new(target.raw() | (gpa.raw() & low_mask(format.shift(level)))),
                leaf: entry,
                writable: all & W != 0,
                executable: !format.no_execute() || any & NX == 0,
                accessed: all & A != 0,
            });
        }
        table = target;
        level = level.saturating_sub(1);
    }
}

/// Reads an entry. Where L1 has no memory it reads as all ones, as from a bus that nobody answers on.
fn read_entry<M: GuestMemory + ?Sized>(memory: &M, format: NptFormat, at: L1Gpa) -> u64 {
    if format.entry_bytes() == 4 {
        memory.read_u32(at).map_or(u64::from(u32::MAX), u64::from)
    } else {
        memory.read_u64(at).unwrap_or(u64::MAX)
    }
}

/// Sets `bits` in the entry at `at` that was read as `current`. False when it is another entry by now: more than
/// accessed and dirty bits changed.
fn mark<M: GuestMemory + ?Sized>(memory: &M, format: NptFormat, at: L1Gpa, mut current: u64, bits: u64) -> bool {
    // The other processors of L1 can only add the two bits; a third round would mean that somebody clears them.
    for _ in 0..3 {
        if current & bits == bits {
            return true;
        }
        let new = current | bits;
        let result = if format.entry_bytes() == 4 {
            memory.compare_exchange_u32(at, current as u32, new as u32).map(|r| r.map(u64::from).map_err(u64::from))
        } else {
            memory.compare_exchange_u64(at, current, new)
        };
        match result {
            // A table in memory that cannot be written: hardware's update would be lost as well.
            Ok(Ok(_)) | Err(_) => return true,
            Ok(Err(seen)) if (seen ^ current) & !(A | D) == 0 => current = seen,
            Ok(Err(_)) => return false,
        }
    }
    false
}

/// Sets the accessed bit of every entry on the way and, for a write, the dirty bit of the leaf. False when an entry
/// changed meanwhile.
fn mark_all<M: GuestMemory + ?Sized>(memory: &M, format: NptFormat, steps: &Steps, leaf: u8, write: bool) -> bool {
    // From the top down, as the processor goes.
    [5u8, 4, 3, 2, 1].iter().zip(steps.0.iter().rev()).all(|(&level, &(at, entry))| {
        let bits = if write && level == leaf { A | D } else { A };
        entry == 0 || format.is_pdpte(level) || mark(memory, format, at, entry, bits)
    })
}

/// A whole walk for `access`: checks the rights and, when they suffice, sets the accessed bit of every entry on the
/// way and, for a write, the dirty bit of the last.
pub(super) fn walk_for<M: GuestMemory + ?Sized>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    access: Access,
) -> Result<Walked, WalkFault> {
    for _ in 0..ATTEMPTS {
        let mut steps = Steps::default();
        let found = look(memory, format, ncr3, gpa, &mut steps)?;
        if !found.allows(access) {
            return Err(WalkFault::Rights);
        }
        let write = access == Access::Write;
        if mark_all(memory, format, &steps, found.level, write) {
            return Ok(Walked {
                l1: found.l1,
                shift: format.shift(found.level),
                writable: found.writable,
                executable: found.executable,
                dirty: write || found.leaf & D != 0,
                cache: ((found.leaf & CACHE) >> 3) as u8,
                tables: steps.0.map(|(at, entry)| (entry != 0).then(|| at.page())),
            });
        }
    }
    Err(WalkFault::Unsettled)
}

/// Translates `gpa` by L1's tables at `ncr3` for `access`, as the processor does: accessed and dirty bits are set.
#[inline]
pub fn walk<M: GuestMemory + ?Sized>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    access: Access,
) -> Result<L1Gpa, WalkFault> {
    let found = look(memory, format, ncr3, gpa, &mut ())?;
    if !found.allows(access) {
        return Err(WalkFault::Rights);
    }
    if found.accessed && (access != Access::Write || found.leaf & D != 0) {
        return Ok(found.l1);
    }
    marking_walk(memory, format, ncr3, gpa, access)
}

#[cold]
#[inline(never)]
fn marking_walk<M: GuestMemory + ?Sized>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    access: Access,
) -> Result<L1Gpa, WalkFault> {
    walk_for(memory, format, ncr3, gpa, access).map(|walked| walked.l1)
}

/// L1's nested page tables as the second stage of a caller in L2.
#[derive(Clone, Copy, Debug)]
pub struct NptWalk<'a, M: ?Sized> {
    /// L1's memory.
    pub memory: &'a M,
    /// How to read the tables.
    pub format: NptFormat,
    /// nCR3 of the running VMCB12.
    pub ncr3: u64,
}

impl<M: GuestMemory + ?Sized> SecondStage for NptWalk<'_, M> {
    #[inline]
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        walk(self.memory, self.format, self.ncr3, gpa, access).map_err(|_| TranslateError)
    }
}
