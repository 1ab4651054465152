//! The shadow of L1's extended page tables: filled on EPT violations, emptied on invalidations.
//!
//! Used by the embedder around the state machine of a VP; uses the walk of L1's tables and the shadow trees of
//! `hvcore`.

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{Access, GuestMemory, SecondStage, TranslateError};
use hvcore::shadow::{
    EntryFormat, L1Change, L1Map, Leaf, Mapping, PagePool, PageSize, Rights, ShadowError, Tables, TagFlush,
};

use super::format::{A, D, EPTP_AD, EptFormat, PS, R, TYPE, W, X};
use super::pml::Pml;
use super::qualification as q;
use super::walk::{EptWalk, WalkFault, Walked, need, walk_for};
use crate::exit_reason;

/// Memory type write-back, of the host's tables and as the neutral element where types meet.
const WB: u8 = 6;

/// The host's EPT entries, with accessed and dirty flags set from the start so that hardware need not.
#[derive(Clone, Copy, Debug)]
pub struct EptEntry;

impl EntryFormat for EptEntry {
    fn table(table: Hpa) -> u64 {
        table.raw() | R | W | X | A
    }

    fn leaf(page: Hpa, size: PageSize, rights: Rights) -> u64 {
        page.raw()
            | A
            | ((u64::from(rights.memory_type) << 3) & TYPE)
            | if size == PageSize::Size4K { 0 } else { PS }
            | if rights.read { R } else { 0 }
            | if rights.write { W | D } else { 0 }
            | if rights.execute { X } else { 0 }
    }

    fn read_only(leaf: u64) -> u64 {
        leaf & !(W | D)
    }

    fn keeps(old: u64, new: u64) -> bool {
        // Only rights may differ, and only by being added.
        (old ^ new) & !(R | W | X | A | D) == 0 && old & !new & (R | W | X) == 0
    }
}

/// Why an access that L1's tables allow did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The embedder does not map the L1 GPA: an emulated device, a hole, memory of its own.
    NotMapped,
    /// The embedder lets L1 read the page only; the access was a write.
    WriteProtected,
    /// The embedder does not let L1 execute from the page; the access was a fetch.
    NotExecutable,
}

/// An access of L2 that the embedder has to carry out, or to make possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Access {
    /// Where L2's access ended in L1's memory.
    pub l1: L1Gpa,
    /// Where L2 sees it.
    pub l2: L2Gpa,
    /// The kind of access.
    pub access: Access,
    /// The access was to L2's own page tables.
    pub table_walk: bool,
    /// What stopped it.
    pub cause: Cause,
}

/// What becomes of an EPT violation of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptOutcome {
    /// The shadow tables have the translation now: run L2 again.
    Resume,
    /// L1's tables refuse the access: exit to L1. Guest-physical and guest-linear address are those of the hardware's
    /// exit.
    Reflect {
        /// Basic exit reason: 48 EPT violation, 49 EPT misconfiguration, 62 page-modification log full.
        reason: u32,
        /// Exit qualification.
        qualification: u64,
    },
    /// L1's tables allow the access, the embedder does not.
    Embedder(L1Access),
}

/// The shadow EPT of one VP, with up to `ROOTS` cached EPT pointers of L1.
///
/// A root is tagged by its own address (EP4TA). After anything that makes translations cached under it wrong, and when
/// another root becomes active, [`tag_stale`](Self::tag_stale) is true until [`tag_retired`](Self::tag_retired): the next
/// entry of L2 needs INVEPT of the active root's EPT pointer first. A VP that moves to another physical CPU needs INVEPT
/// of all contexts there, as the CPU may remember these roots from earlier.
#[derive(Debug)]
pub struct EptShadow<'a, const ROOTS: usize = 4> {
    tables: Tables<'a, EptEntry, u64, ROOTS>,
    format: EptFormat,
    /// Bits 5:0 of the EPT pointer for VMCS02.
    eptp_bits: u64,
}

impl<'a, const ROOTS: usize> EptShadow<'a, ROOTS> {
    /// Empty shadow tables in the pages of `pool`, with `levels` levels (4, or 5 when the host itself runs with five),
    /// for an L1 that is offered `format`.
    pub fn new(pool: PagePool<'a>, levels: u8, format: EptFormat) -> Result<Self, ShadowError> {
        let eptp_bits = u64::from(WB) | u64::from(levels.saturating_sub(1) & 7) << 3;
        Ok(Self { tables: Tables::new(pool, levels)?, format, eptp_bits })
    }

    /// Makes L1's `eptp` the one that L2 runs on and returns the EPT pointer for VMCS02. Cheap when it is active
    /// already. VM entry has accepted `eptp`.
    #[inline]
    pub fn activate(&mut self, eptp: u64) -> u64 {
        let flags = if self.format.hardware_flags { eptp & EPTP_AD } else { 0 };
        self.tables.activate(eptp).raw() | self.eptp_bits | flags
    }

    /// L2 is going to run without EPT of its own, on the embedder's tables.
    pub fn deactivate(&mut self) {
        self.tables.deactivate();
    }

    /// L1's EPT pointer whose root is active.
    #[inline]
    pub fn active(&self) -> Option<u64> {
        self.tables.active_key()
    }

    /// What L1 is offered.
    #[inline]
    pub const fn format(&self) -> &EptFormat {
        &self.format
    }

    /// True when the processor may have wrong translations for the active root.
    #[inline]
    pub const fn tag_stale(&self) -> bool {
        self.tables.tag_stale()
    }

    /// INVEPT of the active root, or of all contexts, was executed.
    #[inline]
    pub const fn tag_retired(&mut self) {
        self.tables.tag_retired();
    }

    /// Handles an EPT violation of L2 on the active root: `gpa` and `qualification` are the guest-physical address and
    /// the exit qualification as hardware gave them. `pml` is L1's log, if it keeps one.
    pub fn fault<M: GuestMemory + ?Sized, T: L1Map + ?Sized>(
        &mut self,
        memory: &M,
        map: &T,
        gpa: L2Gpa,
        qualification: u64,
        pml: Option<&mut Pml>,
    ) -> EptOutcome {
        let Some(eptp) = self.active() else {
            return violation(qualification, 0);
        };
        let table_walk = qualification & (q::LINEAR_VALID | q::FINAL) == q::LINEAR_VALID;
        // With the flags on, an access to a paging structure is a read and a write, whatever hardware took it for.
        let both = if table_walk && eptp & EPTP_AD != 0 { q::READ | q::WRITE } else { 0 };
        let qualification = qualification | both;
        let need = match qualification & q::ACCESS {
            0 => R,
            need => need,
        };
        let walked = match walk_for(memory, &self.format, eptp, gpa, need, pml) {
            Ok(walked) => walked,
            Err(WalkFault::Unsettled) => return EptOutcome::Resume,
            Err(WalkFault::Violation { rights }) => return violation(qualification, rights),
            Err(WalkFault::Misconfigured) => {
                return EptOutcome::Reflect { reason: exit_reason::EPT_MISCONFIGURATION, qualification: 0 };
            }
            Err(WalkFault::LogFull) => {
                let qualification = qualification & q::NMI_UNBLOCKED;
                return EptOutcome::Reflect { reason: exit_reason::PML_FULL, qualification };
            }
        };
        let cause = match map.map(walked.l1) {
            None => Cause::NotMapped,
            Some(mapping) if need & W != 0 && !mapping.writable => Cause::WriteProtected,
            Some(mapping) if need & X != 0 && !mapping.executable => Cause::NotExecutable,
            Some(mapping) => {
                // An address that the host's tables cannot hold is one that L1's own never had.
                return if self.tables.install(&compose(gpa, &walked, &mapping)) {
                    EptOutcome::Resume
                } else {
                    violation(qualification, 0)
                };
            }
        };
        let access = if need & W != 0 {
            Access::Write
        } else if need & X != 0 {
            Access::Execute
        } else {
            Access::Read
        };
        EptOutcome::Embedder(L1Access { l1: walked.l1, l2: gpa, access, table_walk, cause })
    }

    /// The L1 GPA of `gpa` for `access` if the active root has it at hand with the rights. A translation that L2 itself
    /// may use without a walk, accessed and dirty flags set already; much cheaper than one.
    #[inline]
    pub fn cached(&self, gpa: L2Gpa, access: Access) -> Option<L1Gpa> {
        let (l1, entry) = self.tables.translate(gpa)?;
        (entry & need(access) != 0).then_some(l1)
    }

    /// L1 executed INVEPT for the single context of `eptp`, or HvCallFlushGuestPhysicalAddressSpace named it: all that
    /// derives from its EP4TA goes.
    pub fn flush_context(&mut self, eptp: u64) -> TagFlush {
        self.tables.invalidate(|key| same_ep4ta(*key, eptp))
    }

    /// L1 executed INVEPT for all contexts; the nested state is destroyed or restored.
    pub fn flush_everything(&mut self) -> TagFlush {
        self.tables.invalidate(|_| true)
    }

    /// HvCallFlushGuestPhysicalAddressList: as [`flush_context`](Self::flush_context), for `bytes` bytes from `start` on.
    pub fn flush_gpa_range(&mut self, eptp: u64, start: L2Gpa, bytes: u64) -> TagFlush {
        self.tables.invalidate_l2(|key| same_ep4ta(*key, eptp), start, bytes)
    }

    /// The embedder changed `bytes` bytes of L1's memory from `start` on. Its own tables have the change already.
    pub fn l1_gpa_changed(&mut self, start: L1Gpa, bytes: u64, change: L1Change) -> TagFlush {
        self.tables.l1_gpa_changed(start, bytes, change)
    }

    /// Pages of the pool that are not in use.
    pub const fn free_pages(&self) -> usize {
        self.tables.free_pages()
    }

    /// The shadow entry that maps `gpa` in the active root, and the size of its page: for tests and auditors.
    pub fn lookup(&self, gpa: L2Gpa) -> Option<(u64, PageSize)> {
        self.tables.lookup(gpa)
    }
}

/// L1's tables for L2 as the second stage of a caller in L2: translations that the shadow has at hand, and walks.
#[derive(Clone, Copy, Debug)]
pub struct CachedWalk<'a, 'p, M: ?Sized, const ROOTS: usize> {
    /// The shadow, with the EPT pointer of `walk` active. What is pending against it (flush requests, changes of L1's
    /// memory) has been carried out.
    pub shadow: &'a EptShadow<'p, ROOTS>,
    /// The walk of L1's tables.
    pub walk: EptWalk<'a, M>,
}

impl<M: GuestMemory + ?Sized, const ROOTS: usize> SecondStage for CachedWalk<'_, '_, M, ROOTS> {
    #[inline]
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        match self.shadow.cached(gpa, access) {
            Some(l1) => Ok(l1),
            None => self.walk.walk(gpa, access),
        }
    }
}

/// True when two EPT pointers have the same EP4TA, bits 51:12: translations are tagged with nothing else.
#[inline]
pub const fn same_ep4ta(a: u64, b: u64) -> bool {
    EptFormat::top(a).raw() == EptFormat::top(b).raw()
}

/// The violation for L1 that hardware's `qualification` becomes where L1's entries allow `rights`.
const fn violation(qualification: u64, rights: u8) -> EptOutcome {
    let qualification = qualification & !q::RIGHTS | (rights as u64) << q::RIGHTS_SHIFT;
    EptOutcome::Reflect { reason: exit_reason::EPT_VIOLATION, qualification }
}

/// The memory type of both stages, ignore-PAT of L1's leaf in bit 3: write-back gives way to the other, and two that
/// disagree meet in uncacheable.
const fn memory_type(l1: u8, host: u8) -> u8 {
    let ignore_pat = l1 & 8;
    let met = match (l1 & 7, host & 7) {
        (WB, other) | (other, WB) => other,
        (a, b) if a == b => a,
        _ => 0,
    };
    met | ignore_pat
}

/// The largest leaf that both stages allow, with the rights that both give.
fn compose(gpa: L2Gpa, walked: &Walked, mapping: &Mapping) -> Leaf {
    let by_l1 = PageSize::of_level(walked.level);
    let offset = walked.l1.raw() & mapping.size.offset_mask();
    let [first, second, third, fourth] = walked.tables;
    Leaf {
        l2: gpa,
        l1: walked.l1,
        hpa: Hpa::new((mapping.hpa.raw() & !mapping.size.offset_mask()) | offset),
        size: by_l1.min(mapping.size),
        rights: Rights {
            read: walked.rights & R != 0,
            // A page that is clean in L1's tables faults on the first write, which sets its dirty flag.
            write: walked.rights & W != 0 && walked.dirty && mapping.writable,
            execute: walked.rights & X != 0 && mapping.executable,
            memory_type: memory_type(walked.memory_type, mapping.memory_type),
        },
        sources: [first, second, third, fourth, None],
    }
}
