//! The walk of L1's extended page tables.
//!
//! Used by the shadow fill and by the hypercall intake (as [`SecondStage`]); reads and marks entries through
//! [`GuestMemory`] only. Each entry is read once per walk; accessed and dirty flags are set by compare-exchange on the
//! value that was judged, and a walk whose entry changed under it starts over, a bounded number of times.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::memory::{Access, GuestMemory, SecondStage, TranslateError};

use super::format::{A, D, EPTP_AD, EptFormat, LEVELS, R, TYPE, W, X, low_mask};
use super::pml::Pml;
use crate::caps::Config;
use crate::check::eptp_is_valid;

/// Walks that are tried when L1 keeps changing the entries.
const ATTEMPTS: usize = 8;

/// Why L1's tables do not let an access through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// The entries do not allow it, or one is not present: an EPT violation.
    Violation {
        /// What the entries allow together: bit 0 read, bit 1 write, bit 2 execute; 0 when one is not present.
        rights: u8,
    },
    /// A present entry breaks a rule, or lies where L1 has no memory: an EPT misconfiguration.
    Misconfigured,
    /// A flag has to be set, and L1's page-modification log is full.
    LogFull,
    /// L1 changed the entries at every attempt; nobody is at fault, the access may be tried again.
    Unsettled,
}

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walked {
    pub(super) l1: L1Gpa,
    /// Level of the leaf.
    pub(super) level: u8,
    /// Bits 2:0: what the entries allow together.
    pub(super) rights: u64,
    /// The leaf's dirty flag after the walk; true where there are no such flags.
    pub(super) dirty: bool,
    /// Memory type of the leaf in bits 2:0, ignore-PAT in bit 3.
    pub(super) memory_type: u8,
    /// The page of the table of each level, `[0]` for level 1.
    pub(super) tables: [Option<L1Gpa>; LEVELS as usize],
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
struct Steps([(L1Gpa, u64); LEVELS as usize]);

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
    /// Bits that all entries have.
    all: u64,
}

impl Found {
    /// True when every flag that an access of `need` sets is set already.
    #[inline(always)]
    const fn is_marked(&self, eptp: u64, need: u64) -> bool {
        eptp & EPTP_AD == 0 || (self.all & A != 0 && (need & W == 0 || self.leaf & D != 0))
    }
}

/// One walk without side effects, refused unless the entries give all rights in `need`.
#[inline(always)]
fn look<M: GuestMemory + ?Sized, T: Trail>(
    memory: &M,
    format: &EptFormat,
    eptp: u64,
    gpa: L2Gpa,
    need: u64,
    trail: &mut T,
) -> Result<Found, WalkFault> {
    if !EptFormat::reaches(gpa) {
        return Err(WalkFault::Violation { rights: 0 });
    }
    let mut table = EptFormat::top(eptp);
    let mut all = u64::MAX;
    let mut level = LEVELS;
    loop {
        let at = EptFormat::entry_address(table, level, gpa);
        // Where L1 has no memory an entry reads as all ones, as from a bus that nobody answers on: a misconfiguration.
        let entry = memory.read_u64(at).unwrap_or(u64::MAX);
        if entry & (R | W | X) == 0 {
            return Err(WalkFault::Violation { rights: 0 });
        }
        if format.misconfigured(level, entry) {
            return Err(WalkFault::Misconfigured);
        }
        trail.passes(level, at, entry);
        all &= entry;
        let target = EptFormat::target(level, entry);
        if EptFormat::is_leaf(level, entry) || level <= 1 {
            if need & !all != 0 {
                return Err(WalkFault::Violation { rights: (all & (R | W | X)) as u8 });
            }
            let l1 = L1Gpa::new(target.raw() | (gpa.raw() & low_mask(EptFormat::shift(level))));
            return Ok(Found { level, l1, leaf: entry, all });
        }
        table = target;
        level = level.saturating_sub(1);
    }
}

/// What marking an entry came to.
enum Marked {
    /// The bits were there.
    Before,
    /// They were set now, in an entry that read so.
    Now(u64),
    /// It is another entry by now: more than accessed and dirty flags changed.
    Changed,
}

/// Sets `bits` in the entry at `at` that was read as `current`.
fn mark<M: GuestMemory + ?Sized>(memory: &M, at: L1Gpa, mut current: u64, bits: u64) -> Marked {
    // The other processors of L1 can only add the two flags; a third round would mean that somebody clears them.
    for _ in 0..3 {
        if current & bits == bits {
            return Marked::Before;
        }
        match memory.compare_exchange_u64(at, current, current | bits) {
            Ok(Ok(_)) => return Marked::Now(current),
            // A table in memory that cannot be written: hardware's update would be lost as well.
            Err(_) => return Marked::Before,
            Ok(Err(seen)) if (seen ^ current) & !(A | D) == 0 => current = seen,
            Ok(Err(_)) => return Marked::Changed,
        }
    }
    Marked::Changed
}

/// Sets the accessed flag of every entry on the way and, for a write, the dirty flag of the leaf, which L1's log is
/// told of. False when an entry changed meanwhile.
fn mark_all<M: GuestMemory + ?Sized>(
    memory: &M,
    steps: &Steps,
    leaf: u8,
    write: bool,
    gpa: L2Gpa,
    pml: Option<&mut Pml>,
) -> bool {
    // From the top down, as the processor goes.
    for (level, &(at, entry)) in [4u8, 3, 2, 1].into_iter().zip(steps.0.iter().rev()) {
        if entry == 0 {
            continue;
        }
        let dirties = write && level == leaf;
        match mark(memory, at, entry, if dirties { A | D } else { A }) {
            Marked::Changed => return false,
            // An accessed flag alone is not logged.
            Marked::Now(old) if dirties && old & D == 0 => {
                if let Some(pml) = pml {
                    pml.log(memory, gpa);
                }
                return true;
            }
            Marked::Now(_) | Marked::Before => {}
        }
    }
    true
}

/// A whole walk for an access that needs the rights in `need` (bits 2:0 of an exit qualification): checks them and,
/// when they suffice and the EPT has such flags, sets the accessed flag of every entry on the way and, for a write, the
/// dirty flag of the last.
pub(super) fn walk_for<M: GuestMemory + ?Sized>(
    memory: &M,
    format: &EptFormat,
    eptp: u64,
    gpa: L2Gpa,
    need: u64,
    mut pml: Option<&mut Pml>,
) -> Result<Walked, WalkFault> {
    let flags = eptp & EPTP_AD != 0;
    let write = need & W != 0;
    for _ in 0..ATTEMPTS {
        let mut steps = Steps::default();
        let found = look(memory, format, eptp, gpa, need, &mut steps)?;
        if !found.is_marked(eptp, need) {
            if pml.as_deref().is_some_and(Pml::is_full) {
                return Err(WalkFault::LogFull);
            }
            if !mark_all(memory, &steps, found.level, write, gpa, pml.as_deref_mut()) {
                continue;
            }
        }
        return Ok(Walked {
            l1: found.l1,
            level: found.level,
            rights: found.all & (R | W | X),
            dirty: !flags || write || found.leaf & D != 0,
            memory_type: ((found.leaf & TYPE) >> 3) as u8,
            tables: steps.0.map(|(at, entry)| (entry != 0).then(|| at.page())),
        });
    }
    Err(WalkFault::Unsettled)
}

/// The rights that an access needs, as in bits 2:0 of an entry.
#[inline]
pub(super) const fn need(access: Access) -> u64 {
    match access {
        Access::Read => R,
        Access::Write => W,
        Access::Execute => X,
    }
}

/// Translates `gpa` by L1's tables at `eptp` for `access`, as the processor does: accessed and dirty flags are set where
/// the EPT has them, and a dirty flag that is set goes to the log.
#[inline]
pub fn walk<M: GuestMemory + ?Sized>(
    memory: &M,
    format: &EptFormat,
    eptp: u64,
    gpa: L2Gpa,
    access: Access,
    pml: Option<&mut Pml>,
) -> Result<L1Gpa, WalkFault> {
    let need = need(access);
    let found = look(memory, format, eptp, gpa, need, &mut ())?;
    if found.is_marked(eptp, need) {
        return Ok(found.l1);
    }
    marking_walk(memory, format, eptp, gpa, need, pml)
}

#[cold]
#[inline(never)]
fn marking_walk<M: GuestMemory + ?Sized>(
    memory: &M,
    format: &EptFormat,
    eptp: u64,
    gpa: L2Gpa,
    need: u64,
    pml: Option<&mut Pml>,
) -> Result<L1Gpa, WalkFault> {
    walk_for(memory, format, eptp, gpa, need, pml).map(|walked| walked.l1)
}

/// L1's extended page tables as the second stage of a caller in L2.
#[derive(Clone, Copy, Debug)]
pub struct EptWalk<'a, M: ?Sized> {
    /// L1's memory.
    pub memory: &'a M,
    /// What L1 is offered.
    pub format: EptFormat,
    /// The EPT pointer of the VMCS12 that L2 runs on.
    pub eptp: u64,
    /// L1 logs page modifications: a write to a page that is not dirty yet does not go through, as the log would miss
    /// it. No call of L2 that L0 serves writes.
    pub logged: bool,
}

impl<M: GuestMemory + ?Sized> SecondStage for EptWalk<'_, M> {
    #[inline]
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        // A log that is full: nothing is logged, and nothing marked that would have to be.
        let mut full = Pml { address: L1Gpa::new(0), index: u16::MAX };
        let pml = (self.logged && access == Access::Write).then_some(&mut full);
        walk(self.memory, &self.format, self.eptp, gpa, access, pml).map_err(|_| TranslateError)
    }
}

/// VM function 0, EPTP switching (SDM volume 3, "EPTP Switching"): the EPT pointer that entry `index` (ECX) of L1's list
/// names. `None` when the function ends in an exit with reason 59: no such entry, or no legal EPT pointer in it. A list
/// where L1 has no memory reads as all ones, which is none.
pub fn switch_eptp<M: GuestMemory + ?Sized>(memory: &M, config: &Config, list: L1Gpa, index: u32) -> Option<u64> {
    if index > 511 {
        return None;
    }
    let at = list.page().checked_add(u64::from(index).wrapping_mul(8))?;
    memory.read_u64(at).ok().filter(|eptp| eptp_is_valid(config, *eptp))
}
