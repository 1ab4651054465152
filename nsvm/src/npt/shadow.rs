//! The shadow of L1's nested page tables: filled on nested page faults, emptied on invalidations.
//!
//! Used by the state machine of a VP; uses the walk of L1's tables and the shadow trees of `hvcore`.

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{Access, GuestMemory, SecondStage, TranslateError};
use hvcore::shadow::{
    EntryFormat, L1Change, L1Map, Leaf, Mapping, PagePool, PageSize, Rights, ShadowError, Tables, TagFlush,
};

use super::format::{A, D, NX, NptFormat, P, PS, U, W};
use super::info1;
use super::walk::{NptWalk, WalkFault, Walked, walk_for};

/// PAT bit of a 4 KiB entry, and of a larger one.
const PAT_4K: u64 = 1 << 7;
const PAT_LARGE: u64 = 1 << 12;

/// The host's NPT entries: long mode, with accessed and dirty bits set from the start so that hardware need not.
#[derive(Clone, Copy, Debug)]
pub struct NptEntry;

impl EntryFormat for NptEntry {
    fn table(table: Hpa) -> u64 {
        table.raw() | P | W | U | A
    }

    fn leaf(page: Hpa, size: PageSize, rights: Rights) -> u64 {
        let kind = u64::from(rights.memory_type);
        let pat = match (kind & 4 != 0, size) {
            (false, _) => 0,
            (true, PageSize::Size4K) => PAT_4K,
            (true, _) => PAT_LARGE,
        };
        page.raw()
            | P
            | U
            | A
            | ((kind & 3) << 3)
            | pat
            | if size == PageSize::Size4K { 0 } else { PS }
            | if rights.write { W | D } else { 0 }
            | if rights.execute { 0 } else { NX }
    }

    fn read_only(leaf: u64) -> u64 {
        leaf & !(W | D)
    }

    fn keeps(old: u64, new: u64) -> bool {
        let changed = old ^ new;
        // Only rights may differ, and only by being added.
        changed & !(W | D | A | NX) == 0 && (old & !new) & W == 0 && (new & !old) & NX == 0
    }
}

/// A nested context: whose translations L2 runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NptContext {
    /// nCR3 of VMCB12.
    pub ncr3: u64,
    /// L1's ASID for L2, or 0 when the enlightened NPT TLB is on: then an ASID flush leaves the translations of nCR3
    /// alone, and every ASID may share them.
    pub asid: u32,
    /// How L1's tables are read.
    pub format: NptFormat,
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

/// What becomes of a nested page fault of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NptOutcome {
    /// The shadow tables have the translation now: run L2 again.
    Resume,
    /// L1's tables refuse the access: exit to L1 with code 0x400 (#NPF).
    Reflect {
        /// EXITINFO1: what was tried and how far it got.
        info1: u64,
        /// EXITINFO2: the L2 GPA.
        info2: u64,
    },
    /// L1's tables allow the access, the embedder does not.
    Embedder(L1Access),
}

/// The shadow NPT of one VP, with up to `ROOTS` cached contexts.
///
/// After anything that makes cached translations wrong, [`tag_stale`](Self::tag_stale) is true until
/// [`tag_retired`](Self::tag_retired): the next entry of L2 takes a fresh ASID or flushes its own.
#[derive(Debug)]
pub struct NptShadow<'a, const ROOTS: usize = 4> {
    tables: Tables<'a, NptEntry, NptContext, ROOTS>,
}

impl<'a, const ROOTS: usize> NptShadow<'a, ROOTS> {
    /// Empty shadow tables in the pages of `pool`, with `levels` levels (4, or 5 when the host itself runs with five).
    pub fn new(pool: PagePool<'a>, levels: u8) -> Result<Self, ShadowError> {
        Ok(Self { tables: Tables::new(pool, levels)? })
    }

    /// Makes `context` the one that L2 runs on and returns nCR3 for VMCB02. Cheap when it is active already.
    #[inline]
    pub fn activate(&mut self, context: NptContext) -> Hpa {
        self.tables.activate(context)
    }

    /// L2 is going to run without nested paging of its own, on the embedder's tables.
    pub fn deactivate(&mut self) {
        self.tables.deactivate();
    }

    /// The active context.
    #[inline]
    pub fn context(&self) -> Option<NptContext> {
        self.tables.active_key()
    }

    /// True when the hardware ASID that stands for L2 may hold wrong translations.
    #[inline]
    pub const fn tag_stale(&self) -> bool {
        self.tables.tag_stale()
    }

    /// L2 has a fresh ASID, or was entered with its own flushed.
    #[inline]
    pub const fn tag_retired(&mut self) {
        self.tables.tag_retired();
    }

    /// Handles a nested page fault of the active context: `gpa` and `error` are EXITINFO2 and EXITINFO1 as hardware
    /// gave them.
    pub fn fault<M: GuestMemory + ?Sized, T: L1Map + ?Sized>(
        &mut self,
        memory: &M,
        map: &T,
        gpa: L2Gpa,
        error: u64,
    ) -> NptOutcome {
        let Some(context) = self.context() else {
            return reflect(error, false, gpa, info1::PRESENT);
        };
        let access = if error & info1::WRITE != 0 {
            Access::Write
        } else if error & info1::FETCH != 0 {
            Access::Execute
        } else {
            Access::Read
        };
        let walked = match walk_for(memory, context.format, context.ncr3, gpa, access) {
            Ok(walked) => walked,
            Err(WalkFault::Unsettled) => return NptOutcome::Resume,
            Err(fault) => {
                let found = match fault {
                    WalkFault::Reserved => info1::PRESENT | info1::RESERVED,
                    WalkFault::Rights => info1::PRESENT,
                    WalkFault::NotPresent | WalkFault::Unsettled => 0,
                };
                return reflect(error, context.format.no_execute(), gpa, found);
            }
        };
        let cause = match map.map(walked.l1) {
            None => Cause::NotMapped,
            Some(mapping) if access == Access::Write && !mapping.writable => Cause::WriteProtected,
            Some(mapping) if access == Access::Execute && !mapping.executable => Cause::NotExecutable,
            Some(mapping) => {
                // An address that the host's tables cannot hold is one that L1's own never had.
                return if self.tables.install(&compose(gpa, &walked, &mapping)) {
                    NptOutcome::Resume
                } else {
                    reflect(error, context.format.no_execute(), gpa, 0)
                };
            }
        };
        let table_walk = error & info1::TABLE != 0;
        NptOutcome::Embedder(L1Access { l1: walked.l1, l2: gpa, access, table_walk, cause })
    }

    /// The L1 GPA of `gpa` for `access` if the active context has it at hand with the rights. A translation that L2
    /// itself may use without a walk, accessed and dirty bits set already; much cheaper than one.
    #[inline]
    pub fn cached(&self, gpa: L2Gpa, access: Access) -> Option<L1Gpa> {
        let (l1, entry) = self.tables.translate(gpa)?;
        let allowed = match access {
            Access::Read => true,
            Access::Write => entry & W != 0,
            Access::Execute => entry & NX == 0,
        };
        allowed.then_some(l1)
    }

    /// L1 flushed `asid` (TLB_CONTROL 3 or 7, INVLPGA): its translations are dropped. Contexts of the enlightened
    /// NPT TLB keep theirs; the caller flushes the hardware tag in any case, for the L2 virtual addresses in it.
    pub fn flush_asid(&mut self, asid: u32) -> TagFlush {
        self.tables.invalidate(|context| context.asid == asid && asid != 0)
    }

    /// L1 flushed every ASID (TLB_CONTROL 1).
    pub fn flush_all_asids(&mut self) -> TagFlush {
        self.tables.invalidate(|context| context.asid != 0)
    }

    /// Everything goes: the nested state is destroyed or restored, or L1's paging interface was reconfigured.
    pub fn flush_everything(&mut self) -> TagFlush {
        self.tables.invalidate(|_| true)
    }

    /// HvCallFlushGuestPhysicalAddressSpace: the translations of the address space whose nCR3 is `ncr3`.
    pub fn flush_address_space(&mut self, ncr3: u64) -> TagFlush {
        self.tables.invalidate(|context| same_space(context, ncr3))
    }

    /// HvCallFlushGuestPhysicalAddressList: as [`flush_address_space`](Self::flush_address_space), for `bytes` bytes
    /// from `start` on.
    pub fn flush_gpa_range(&mut self, ncr3: u64, start: L2Gpa, bytes: u64) -> TagFlush {
        self.tables.invalidate_l2(|context| same_space(context, ncr3), start, bytes)
    }

    /// The embedder changed `bytes` bytes of L1's memory from `start` on. Its own tables have the change already.
    pub fn l1_gpa_changed(&mut self, start: L1Gpa, bytes: u64, change: L1Change) -> TagFlush {
        self.tables.l1_gpa_changed(start, bytes, change)
    }

    /// Pages of the pool that are not in use.
    pub const fn free_pages(&self) -> usize {
        self.tables.free_pages()
    }

    /// The shadow entry that maps `gpa` in the active context, and the size of its page: for tests and auditors.
    pub fn lookup(&self, gpa: L2Gpa) -> Option<(u64, PageSize)> {
        self.tables.lookup(gpa)
    }
}

/// L1's tables for L2 as the second stage of a caller in L2: translations that the shadow has at hand, and walks.
#[derive(Clone, Copy, Debug)]
pub struct CachedWalk<'a, 'p, M: ?Sized, const ROOTS: usize> {
    /// The shadow, with the context of `walk` active. What is pending against it (flush requests, changes of L1's
    /// memory) has been carried out.
    pub shadow: &'a NptShadow<'p, ROOTS>,
    /// The walk of L1's tables.
    pub walk: NptWalk<'a, M>,
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

/// True when `ncr3` names the tables of `context`.
fn same_space(context: &NptContext, ncr3: u64) -> bool {
    context.format.top(context.ncr3) == context.format.top(ncr3)
}

/// The exit to L1 for a fault that got as far as `found` says.
fn reflect(error: u64, no_execute: bool, gpa: L2Gpa, found: u64) -> NptOutcome {
    let fetch = if no_execute { info1::FETCH } else { 0 };
    let stage = if error & info1::TABLE != 0 { info1::TABLE } else { info1::FINAL };
    NptOutcome::Reflect { info1: (error & (info1::WRITE | fetch)) | info1::USER | stage | found, info2: gpa.raw() }
}

/// The largest leaf that both stages allow, with the rights that both give.
fn compose(gpa: L2Gpa, walked: &Walked, mapping: &Mapping) -> Leaf {
    let by_l1 = match walked.shift {
        30.. => PageSize::Size1G,
        21..=29 => PageSize::Size2M,
        _ => PageSize::Size4K,
    };
    let offset = walked.l1.raw() & mapping.size.offset_mask();
    let mut sources = walked.tables;
    // A split page has no guest table behind its pieces.
    for (level, place) in (1u8..).zip(sources.iter_mut()) {
        if level < by_l1.level() {
            *place = None;
        }
    }
    Leaf {
        l2: gpa,
        l1: walked.l1,
        hpa: Hpa::new((mapping.hpa.raw() & !mapping.size.offset_mask()) | offset),
        size: by_l1.min(mapping.size),
        rights: Rights {
            read: true,
            // A page that is clean in L1's tables faults on the first write, which sets its dirty bit.
            write: walked.writable && walked.dirty && mapping.writable,
            execute: walked.executable && mapping.executable,
            // L1's "do not cache" is kept on top of the embedder's type.
            memory_type: mapping.memory_type | walked.cache,
        },
        sources,
    }
}
