//! A partition's VPs, and the three kinds of request. Called by hypercall handlers and by the embedder; uses the rest
//! of the folder.

use super::index::TargetIndex;
use super::mutant::{self, Mutant};
use super::post::{Fill, Kind, L1Gva, L2Gva, L2SecondStage, Many, Nothing, One, Prepared, post};
use super::queue::GvaQueue;
use super::range::SecondStageItem;
use super::shootdown::{Bits, Posted, Shootdown, Tally};
use super::sync::{AtomicU64, Ordering, fence};
use super::vp::{LocalFlush, VpFlush};
use super::word::{self, Marks};
use crate::addr::L1Gpa;
use crate::vp_index::{Lookup, VpIndexMap};
use arrayvec::ArrayVec;
use tlfs_abi::flush::RangeFormat;
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

/// Which GVA translations a request is about. The address space that a call names is not part of it: ranges are flushed
/// in every address space of the tag, which is legal and what hardware offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GvaScope<'r> {
    /// All.
    Everything,
    /// All that are not global.
    EverythingNonGlobal,
    /// Those of the list.
    Ranges {
        /// How the entries are encoded.
        format: RangeFormat,
        /// The entries as the caller wrote them.
        entries: &'r [u64],
    },
}

/// Which second-stage translations a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondStageScope<'r> {
    /// All, by whatever root.
    Everything,
    /// All that derives from this root: EPTP or nCR3; low bits are ignored.
    Root(L1Gpa),
    /// What translates the L2 GPAs of the list through this root.
    Ranges {
        /// EPTP or nCR3; low bits are ignored.
        root: L1Gpa,
        /// The entries as the caller wrote them: bits 63:12 page, 10:0 additional pages. An entry with bit 11 set has
        /// two readings and stands for the whole root.
        entries: &'r [u64],
    },
    /// What ends in these pages of L1's memory, by whatever root: the embedder has changed what is behind them.
    L1Pages {
        /// The first page.
        first: L1Gpa,
        /// Number of 4 KiB pages; more than 4,096 stand for everything.
        pages: u64,
    },
}

/// The VPs of one partition and the index of their nested contexts. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct FlushDomain<'a, const DEPTH: usize = 16> {
    vps: &'a [VpFlush<DEPTH>],
    index: TargetIndex<'a>,
}

/// The tally of targets that come one by one, in any order of slots.
struct Scatter<'s> {
    to: &'s mut Shootdown,
    at: usize,
    tally: Tally,
}

impl<'s> Scatter<'s> {
    #[inline]
    fn new(to: &'s mut Shootdown) -> Self {
        Self { to, at: 0, tally: Tally::default() }
    }

    #[inline]
    fn at(&mut self, slot: u16) -> &mut Tally {
        let at = usize::from(slot >> 6);
        if at != self.at {
            self.to.add(self.at, core::mem::take(&mut self.tally));
            self.at = at;
        }
        &mut self.tally
    }

    #[inline]
    fn finish(self) {
        self.to.add(self.at, self.tally);
    }
}

impl<'a, const DEPTH: usize> FlushDomain<'a, DEPTH> {
    /// The domain of `vps` (a VP's slot is its position there) with an index made for as many.
    pub const fn new(vps: &'a [VpFlush<DEPTH>], index: TargetIndex<'a>) -> Self {
        Self { vps, index }
    }

    /// The VPs' shared halves.
    pub const fn vps(&self) -> &'a [VpFlush<DEPTH>] {
        self.vps
    }

    /// The owner's half of the VP in `slot`; `None` when there is no such slot. To be made once for each slot, by the
    /// thread that will run the VP, after the VP was entered in the VP-index map and before its guest first runs.
    pub fn local(&self, slot: u16) -> Option<LocalFlush<'a, DEPTH>> {
        self.vps.get(usize::from(slot)).map(|vp| LocalFlush::new(vp, self.index, slot))
    }

    /// Flushes L1's translations on the VPs of `set`: a call from L1, or the embedder's own.
    pub fn flush_l1(
        &self,
        map: &VpIndexMap<'_>,
        set: VpSet<'_>,
        scope: GvaScope<'_>,
        scratch: &mut Shootdown,
    ) -> Posted {
        scratch.begin(word::MODE_L1, word::IPI_L1);
        Self::fence();
        self.prepared::<L1Gva>(scope, L1Targets { map, set }, scratch)
    }

    /// Flushes L2's translations on the VPs of the partition that may hold some of a context with this VM_ID and a
    /// VP_ID of `set`: a direct flush, or the embedder's own.
    pub fn flush_l2(&self, vm_id: u64, set: VpSet<'_>, scope: GvaScope<'_>, scratch: &mut Shootdown) -> Posted {
        scratch.begin(word::MODE_L2, word::IPI_L2);
        Self::fence();
        self.prepared::<L2Gva>(scope, L2Targets { vm_id, set }, scratch)
    }

    /// Flushes second-stage translations on all VPs that have ever run an L2.
    pub fn flush_second_stage(&self, scope: SecondStageScope<'_>, scratch: &mut Shootdown) -> Posted {
        scratch.begin(word::MODE_L2, word::IPI_L2);
        Self::fence();
        let items = second_stage_items::<DEPTH>(scope);
        match items {
            Some(items) if items.is_empty() => (),
            Some(items) => {
                Nested.each::<DEPTH, L2SecondStage, _>(self, &Many(&items), word::L2_SECOND_STAGE.list, scratch);
            }
            None => {
                Nested.each::<DEPTH, L2SecondStage, _>(self, &Nothing, word::L2_SECOND_STAGE.everything, scratch);
            }
        }
        scratch.posted()
    }

    /// SeqCst: between the guest's page-table writes and the look-up of targets. The other side is a VP's, after it
    /// entered itself in the index or the VP-index map and before its guest runs.
    #[inline]
    fn fence() {
        if !mutant::active(Mutant::NoIndexFence) {
            fence(Ordering::SeqCst);
        }
    }

    #[inline]
    fn prepared<K>(&self, scope: GvaScope<'_>, targets: impl Targets, scratch: &mut Shootdown) -> Posted
    where
        K: Kind<DEPTH, Queue = GvaQueue<DEPTH>>,
    {
        let Marks { list, everything, non_global } = K::MARKS;
        let mark = match scope {
            GvaScope::Everything => everything,
            GvaScope::EverythingNonGlobal => non_global,
            GvaScope::Ranges { format, entries } => match Prepared::<DEPTH>::new(entries, format) {
                Prepared::Nothing => return Posted::Done,
                Prepared::Everything => everything,
                Prepared::Words(words) => {
                    match words.as_slice() {
                        [word] => targets.each::<DEPTH, K, _>(self, &One(*word), list, scratch),
                        words => targets.each::<DEPTH, K, _>(self, &Many(words), list, scratch),
                    }
                    return scratch.posted();
                }
            },
        };
        targets.each::<DEPTH, K, _>(self, &Nothing, mark, scratch);
        scratch.posted()
    }

    /// Posts to the slots of word `at` of a bitmap that `wanted` says.
    #[inline]
    fn word<K, F>(
        &self,
        at: usize,
        word: u64,
        wanted: impl Fn(&VpFlush<DEPTH>) -> bool,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) where
        K: Kind<DEPTH>,
        F: Fill<K::Queue>,
    {
        let rest = self.vps.get(at.wrapping_mul(64)..).unwrap_or_default();
        let mut tally = Tally::default();
        for bit in Bits(word) {
            let Some(vp) = rest.get(usize::from(bit)) else { break };
            if wanted(vp) {
                post::<DEPTH, K, F>(vp, fill, mark, 1 << bit, &mut tally);
            }
        }
        scratch.add(at, tally);
    }

    /// Posts to the slots of a bitmap that `wanted` says.
    #[inline]
    fn bitmap<K, F>(
        &self,
        bitmap: &[AtomicU64],
        wanted: impl Fn(&VpFlush<DEPTH>) -> bool,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) where
        K: Kind<DEPTH>,
        F: Fill<K::Queue>,
    {
        for (at, word) in bitmap.iter().enumerate() {
            self.word::<K, F>(at, word.load(Ordering::Acquire), &wanted, fill, mark, scratch);
        }
    }
}

/// The packed items of a scope; `None` for everything.
fn second_stage_items<const DEPTH: usize>(scope: SecondStageScope<'_>) -> Option<ArrayVec<(u64, u64), DEPTH>> {
    let mut items = ArrayVec::new();
    match scope {
        SecondStageScope::Everything => return None,
        SecondStageScope::Root(root) => items.try_push(SecondStageItem::Root(root.raw()).pack()).ok()?,
        SecondStageScope::L1Pages { pages: 0, .. } => (),
        SecondStageScope::L1Pages { first, pages } if pages <= 4096 => {
            items.try_push(SecondStageItem::L1Range { first: first.raw(), pages }.pack()).ok()?;
        }
        SecondStageScope::L1Pages { .. } => return None,
        SecondStageScope::Ranges { root, entries } => {
            let root = root.raw();
            let whole = entries.len() > DEPTH || entries.iter().any(|entry| entry & 1 << 11 != 0);
            if whole {
                items.try_push(SecondStageItem::Root(root).pack()).ok()?;
            } else {
                for entry in entries {
                    let pages = (entry & 0x7FF).wrapping_add(1);
                    items.try_push(SecondStageItem::RootRange { root, first: *entry, pages }.pack()).ok()?;
                }
            }
        }
    }
    Some(items)
}

/// A set of targets: posts a request to each.
trait Targets {
    fn each<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    );
}

/// VPs by VP index. One that is not online yet has no translations.
struct L1Targets<'t> {
    map: &'t VpIndexMap<'t>,
    set: VpSet<'t>,
}

impl Targets for L1Targets<'_> {
    #[inline]
    fn each<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) {
        for (bank, known) in self.map.banks(&self.set) {
            let at = bank as usize;
            if let Some(slots) = self.map.slot_word(known) {
                domain.word::<K, F>(at, slots, |_| true, fill, mark, scratch);
                continue;
            }
            let mut scatter = Scatter::new(scratch);
            for bit in Bits(known) {
                let Lookup::Known(slot) = self.map.lookup(bank.wrapping_mul(64).wrapping_add(u32::from(bit))) else {
                    continue;
                };
                let Some(vp) = domain.vps.get(slot.number()) else { continue };
                let slot = slot.number() as u16;
                post::<DEPTH, K, F>(vp, fill, mark, 1 << (slot & 63), scatter.at(slot));
            }
            scatter.finish();
        }
    }
}

/// VPs by the context they hold translations of.
struct L2Targets<'t> {
    vm_id: u64,
    set: VpSet<'t>,
}

impl L2Targets<'_> {
    /// Asks the index for each VP_ID of the set.
    #[inline]
    fn named<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        set: SparseVpSet<'_>,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) {
        let mut scatter = Scatter::new(scratch);
        for vp_id in set {
            domain.index.named(self.vm_id, vp_id, |slot| {
                if let Some(vp) = domain.vps.get(usize::from(slot))
                    && vp.identity.is(self.vm_id, vp_id)
                {
                    post::<DEPTH, K, F>(vp, fill, mark, 1 << (slot & 63), scatter.at(slot));
                }
            });
        }
        scatter.finish();
        let overflow = domain.index.overflow();
        if !overflow.is_empty() {
            self.scan::<DEPTH, K, F>(overflow, set, domain, fill, mark, scratch);
        }
    }

    /// Looks at each VP of a bitmap.
    fn scan<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        bitmap: &[AtomicU64],
        set: SparseVpSet<'_>,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) {
        let wanted = |vp: &VpFlush<DEPTH>| {
            vp.identity.is_of_vm(self.vm_id) && vp.identity.vp_id().is_some_and(|vp_id| set.contains(vp_id))
        };
        domain.bitmap::<K, F>(bitmap, wanted, fill, mark, scratch);
    }
}

impl Targets for L2Targets<'_> {
    #[inline]
    fn each<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) {
        let of_vm = domain.index.of_vm(self.vm_id);
        match self.set {
            VpSet::All => {
                domain.bitmap::<K, F>(of_vm, |vp| vp.identity.is_of_vm(self.vm_id), fill, mark, scratch);
            }
            // A set that names more than there are: look at those that there are.
            VpSet::Sparse(set) if u64::from(set.count()) > domain.index.count(self.vm_id) => {
                self.scan::<DEPTH, K, F>(of_vm, set, domain, fill, mark, scratch);
            }
            VpSet::Sparse(set) => self.named::<DEPTH, K, F>(set, domain, fill, mark, scratch),
        }
    }
}

/// All VPs that have run an L2.
struct Nested;

impl Targets for Nested {
    fn each<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        domain: &FlushDomain<'_, DEPTH>,
        fill: &F,
        mark: u64,
        scratch: &mut Shootdown,
    ) {
        let wanted = |vp: &VpFlush<DEPTH>| vp.word.load(Ordering::Relaxed) & word::NESTED != 0;
        for at in 0..domain.vps.len().div_ceil(64) {
            domain.word::<K, F>(at, !0, wanted, fill, mark, scratch);
        }
    }
}
