//! The walk of L1's nested page tables.
//!
//! Used by the shadow fill and by the hypercall intake (as [`SecondStage`]); reads and marks entries through
//! [`GuestMemory`] only. Each entry is read once per walk; accessed and dirty bits are set by compare-exchange on the
//! value that was judged, and a walk whose entry changed under it starts over, a bounded number of times.

use arrayvec::ArrayVec;
use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::memory::{Access, GuestMemory, SecondStage, TranslateError};

use super::format::{A, CACHE, D, NX, NptFormat, P, U, W, low_mask};

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

/// An entry on the way, for its accessed bit.
struct Step {
    at: L1Gpa,
    entry: u64,
}

/// One walk without side effects.
fn look<M: GuestMemory + ?Sized>(
    memory: &M,
    format: NptFormat,
    ncr3: u64,
    gpa: L2Gpa,
    steps: &mut ArrayVec<Step, 5>,
) -> Result<Walked, WalkFault> {
    if !format.reaches(gpa) {
        return Err(WalkFault::NotPresent);
    }
    let mut table = format.top(ncr3);
    let mut rights = W | U;
    let mut executable = true;
    let mut tables = [None; 5];
    let mut level = format.levels();
    loop {
        let at = format.entry_address(table, level, gpa).ok_or(WalkFault::NotPresent)?;
        let entry = read_entry(memory, format, at);
        if entry & P == 0 {
            return Err(WalkFault::NotPresent);
        }
        if format.reserved(level, entry) != 0 {
            return Err(WalkFault::Reserved);
        }
        if let Some(place) = tables.get_mut(usize::from(level).wrapping_sub(1)) {
            *place = Some(table.page());
        }
        if !format.is_pdpte(level) {
            rights &= entry;
            executable &= !format.no_execute() || entry & NX == 0;
            // Five levels, five steps: never full.
            let _ = steps.try_push(Step { at, entry });
        }
        let target = format.target(level, entry);
        if format.is_leaf(level, entry) || level <= 1 {
            if rights & U == 0 {
                return Err(WalkFault::Rights);
            }
            let shift = format.shift(level);
            return Ok(Walked {
                l1: L1Gpa::new(target.raw() | (gpa.raw() & low_mask(shift))),
                shift,
                writable: rights & W != 0,
                executable,
                dirty: entry & D != 0,
                cache: ((entry & CACHE) >> 3) as u8,
                tables,
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

/// Sets `bits` in the entry that was read as `step.entry`. False when it is another entry by now: more than accessed
/// and dirty bits changed.
fn mark<M: GuestMemory + ?Sized>(memory: &M, format: NptFormat, step: &Step, bits: u64) -> bool {
    let mut current = step.entry;
    // The other processors of L1 can only add the two bits; a third round would mean that somebody clears them.
    for _ in 0..3 {
        if current & bits == bits {
            return true;
        }
        let new = current | bits;
        let result = if format.entry_bytes() == 4 {
            memory
                .compare_exchange_u32(step.at, current as u32, new as u32)
                .map(|r| r.map(u64::from).map_err(u64::from))
        } else {
            memory.compare_exchange_u64(step.at, current, new)
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
        let mut steps = ArrayVec::new();
        let mut walked = look(memory, format, ncr3, gpa, &mut steps)?;
        let allowed = match access {
            Access::Read => true,
            Access::Write => walked.writable,
            Access::Execute => walked.executable,
        };
        if !allowed {
            return Err(WalkFault::Rights);
        }
        let write = access == Access::Write;
        let last = steps.len().saturating_sub(1);
        let settled = steps
            .iter()
            .enumerate()
            .all(|(n, step)| mark(memory, format, step, if write && n == last { A | D } else { A }));
        if settled {
            walked.dirty |= write;
            return Ok(walked);
        }
    }
    Err(WalkFault::Unsettled)
}

/// Translates `gpa` by L1's tables at `ncr3` for `access`, as the processor does: accessed and dirty bits are set.
pub fn walk<M: GuestMemory + ?Sized>(
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
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        walk(self.memory, self.format, self.ncr3, gpa, access).map_err(|_| TranslateError)
    }
}
