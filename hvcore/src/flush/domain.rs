//! A partition's VPs, and the three kinds of request. Called by hypercall handlers and by the embedder; uses the rest
//! of the folder.

use super::index::{TargetIndex, VmIndex};
use super::mutant::{self, Mutant};
use super::post::{
    Fill, Kind, L1Gva, L2Gva, L2SecondStage, Many, Nothing, One, Prepared, Quick, Tally, inhibits, mark, post_behind,
    post_quick, simply_runs,
};
use super::queue::GvaQueue;
use super::range::{Packed, SecondStageItem, pack};
use super::shootdown::{Bits, Posted, Shootdown};
use super::sync::{AtomicU64, Ordering, fence};
use super::vp::{LocalFlush, VpFlush};
use super::word::{self, Marks};
use crate::addr::L1Gpa;
use crate::vp_index::{Lookup, VpIndexMap};
use arrayvec::ArrayVec;
use tlfs_abi::flush::RangeFormat;
use tlfs_abi::vp_set::{SparseVpSet, VPS_PER_BANK, VpSet};

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
        self.flush_l1_for(None, map, set, scope, scratch)
    }

    /// As [`flush_l1`](Self::flush_l1); the VP in the slot of `caller` is not posted to.
    #[inline(always)]
    pub(super) fn flush_l1_for(
        &self,
        caller: Option<u16>,
        map: &VpIndexMap<'_>,
        set: VpSet<'_>,
        scope: GvaScope<'_>,
        scratch: &mut Shootdown,
    ) -> Posted {
        scratch.begin(word::MODE_L1, word::IPI_L1, caller);
        Self::fence();
        self.prepared::<L1Gva>(scope, L1Targets { map, set: &set }, scratch)
    }

    /// Flushes L2's translations on the VPs of the partition that may hold some of a context with this VM_ID and a
    /// VP_ID of `set`: a direct flush, or the embedder's own.
    pub fn flush_l2(&self, vm_id: u64, set: VpSet<'_>, scope: GvaScope<'_>, scratch: &mut Shootdown) -> Posted {
        self.flush_l2_for(None, vm_id, set, scope, scratch)
    }

    /// As [`flush_l2`](Self::flush_l2); the VP in the slot of `caller` is not posted to.
    #[inline(always)]
    pub(super) fn flush_l2_for(
        &self,
        caller: Option<u16>,
        vm_id: u64,
        set: VpSet<'_>,
        scope: GvaScope<'_>,
        scratch: &mut Shootdown,
    ) -> Posted {
        scratch.begin(word::MODE_L2, word::IPI_L2, caller);
        Self::fence();
        self.prepared::<L2Gva>(scope, L2Targets { index: &self.index, vm_id, set: &set }, scratch)
    }

    /// Flushes second-stage translations on all VPs that have ever run an L2.
    pub fn flush_second_stage(&self, scope: SecondStageScope<'_>, scratch: &mut Shootdown) -> Posted {
        scratch.begin(word::MODE_L2, word::IPI_L2, None);
        Self::fence();
        let items = second_stage_items::<DEPTH>(scope);
        match items {
            Some(items) if items.is_empty() => (),
            Some(items) => {
                Nested.each::<L2SecondStage, _>(self.job(
                    Many(&items),
                    word::L2_SECOND_STAGE.list | word::IPI_L2,
                    scratch,
                ));
            }
            None => {
                Nested.each::<L2SecondStage, _>(self.job(
                    Nothing,
                    word::L2_SECOND_STAGE.everything | word::IPI_L2,
                    scratch,
                ));
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
    fn job<'j, F>(&'j self, fill: F, marks: u64, scratch: &'j mut Shootdown) -> Job<'j, F, DEPTH> {
        Job { vps: self.vps, fill, marks, scratch }
    }

    /// Posts a request: in place when it is for everything, as it takes little then.
    #[inline(always)]
    fn prepared<K>(&self, scope: GvaScope<'_>, targets: impl Targets<DEPTH>, scratch: &mut Shootdown) -> Posted
    where
        K: Kind<DEPTH, Queue = GvaQueue<DEPTH>>,
    {
        let Marks { everything, non_global, .. } = K::MARKS;
        let mark = match scope {
            GvaScope::Everything => everything,
            GvaScope::EverythingNonGlobal => non_global,
            GvaScope::Ranges { .. } => return self.ranges::<K>(scope, targets, scratch),
        };
        targets.each::<K, _>(self.job(Nothing, mark | K::IPI, scratch));
        scratch.posted()
    }

    #[inline(never)]
    fn ranges<K>(&self, scope: GvaScope<'_>, targets: impl Targets<DEPTH>, scratch: &mut Shootdown) -> Posted
    where
        K: Kind<DEPTH, Queue = GvaQueue<DEPTH>>,
    {
        let Marks { list, everything, .. } = K::MARKS;
        match scope {
            GvaScope::Everything | GvaScope::EverythingNonGlobal => {}
            GvaScope::Ranges { format, entries: [entry] } => match pack(*entry, format) {
                Packed::Nothing => return Posted::Done,
                Packed::Everything => {}
                Packed::Word(word) => {
                    targets.each::<K, _>(self.job(One(word), list | K::IPI, scratch));
                    return scratch.posted();
                }
            },
            GvaScope::Ranges { format, entries } => match Prepared::<DEPTH>::new(entries, format) {
                Prepared::Nothing => return Posted::Done,
                Prepared::Everything => {}
                Prepared::Words(words) => {
                    targets.each::<K, _>(self.job(Many(words.as_slice()), list | K::IPI, scratch));
                    return scratch.posted();
                }
            },
        }
        targets.each::<K, _>(self.job(Nothing, everything | K::IPI, scratch));
        scratch.posted()
    }
}

/// One request on its way to its targets.
struct Job<'j, F, const DEPTH: usize> {
    vps: &'j [VpFlush<DEPTH>],
    fill: F,
    marks: u64,
    scratch: &'j mut Shootdown,
}

impl<F, const DEPTH: usize> Job<'_, F, DEPTH> {
    /// Posts to the VP in `slot` if `wanted` says so. All that is unusual is done at the end of a call chain, so that the
    /// usual saves no registers.
    #[inline(never)]
    fn one<K: Kind<DEPTH>>(&mut self, slot: usize, wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        let Some(vp) = self.vps.get(slot) else { return };
        if !wanted(vp) {
            return;
        }
        match post_quick::<DEPTH, K, F>(vp, &self.fill, self.marks) {
            Quick::Done(old) if simply_runs::<DEPTH, K>(old) => self.scratch.add_kick(slot),
            Quick::Done(old) => self.judged::<K>(slot, vp, old),
            Quick::SlotTaken => self.behind::<K>(slot, vp),
            Quick::WordChanged => self.again::<K>(slot, vp),
        }
    }

    /// As [`one`](Self::one), where there may be a caller to spare.
    fn one_but_caller<K: Kind<DEPTH>>(&mut self, slot: usize, wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        let spared = match self.vps.get(slot) {
            Some(vp) if self.scratch.is_caller(slot) && wanted(vp) => self.spares_caller(vp),
            _ => false,
        };
        if !spared {
            self.one::<K>(slot, wanted);
        }
    }

    #[cold]
    #[inline(never)]
    fn behind<K: Kind<DEPTH>>(&mut self, slot: usize, vp: &VpFlush<DEPTH>)
    where
        F: Fill<K::Queue>,
    {
        let old = post_behind::<DEPTH, K, F>(vp, &self.fill, self.marks);
        self.judged::<K>(slot, vp, old);
    }

    #[cold]
    #[inline(never)]
    fn again<K: Kind<DEPTH>>(&mut self, slot: usize, vp: &VpFlush<DEPTH>) {
        let old = mark(vp, self.marks);
        self.judged::<K>(slot, vp, old);
    }

    /// The target is not simply running and unmarked.
    #[inline(never)]
    fn judged<K: Kind<DEPTH>>(&mut self, slot: usize, vp: &VpFlush<DEPTH>, old: u64) {
        let mut tally = Tally::default();
        tally.count::<DEPTH, K>(slot as u32 & 63, Quick::Done(old));
        self.scratch.add(slot >> 6, tally.kicks(1 << (slot & 63)), tally.wait);
        self.scratch.suspend_if(tally.inhibited != 0 && inhibits(vp));
    }

    /// The caller's own VP is a target. It flushes itself: the request is behind what its guest did, and it is outside
    /// the guest. False when it inhibits flushes: then it is a target as any other.
    fn spares_caller(&mut self, vp: &VpFlush<DEPTH>) -> bool {
        // Relaxed: whoever inhibits is ordered with the caller by other means, or may come too late.
        let spares = vp.word.load(Ordering::Relaxed) & word::INHIBIT == 0;
        if spares {
            self.scratch.flush_caller();
        }
        spares
    }

    /// The slots of word `at` of a bitmap but the caller's own.
    #[inline(always)]
    fn without_caller(&mut self, at: usize, word: u64, wanted: impl Fn(&VpFlush<DEPTH>) -> bool) -> u64 {
        let own = self.scratch.caller_bit(at);
        if word & own == 0 {
            return word;
        }
        match self.vps.get(self.scratch.caller()) {
            Some(vp) if wanted(vp) && !self.spares_caller(vp) => word,
            _ => word & !own,
        }
    }

    /// Posts to the slots of word `at` of a bitmap that `wanted` says.
    #[inline(always)]
    fn word<K: Kind<DEPTH>>(&mut self, at: usize, word: u64, wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        if !self.scratch.has_caller() {
            return self.others::<K>(at, word, wanted);
        }
        let word = self.without_caller(at, word, &wanted);
        if word != 0 {
            self.others_seldom::<K>(at, word, wanted);
        }
    }

    /// As [`others`](Self::others), out of the way of a call that concerns its caller alone.
    #[inline(never)]
    fn others_seldom<K: Kind<DEPTH>>(&mut self, at: usize, word: u64, wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        self.others::<K>(at, word, wanted);
    }

    /// As [`word`](Self::word), for VPs other than the caller's.
    #[inline]
    fn others<K: Kind<DEPTH>>(&mut self, at: usize, word: u64, wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        let chunk = self.vps.get(at.wrapping_mul(64)..).unwrap_or_default();
        let mut tally = Tally::default();
        let (fill, marks) = (&self.fill, self.marks);
        let mut post = |bit: u32, vp: &VpFlush<DEPTH>| {
            if wanted(vp) {
                tally.count::<DEPTH, K>(bit, post_quick::<DEPTH, K, F>(vp, fill, marks));
            } else {
                tally.spare(bit);
            }
        };
        let mut targets = word;
        // A whole chunk needs no check of bounds for each target.
        if let Some(chunk) = chunk.first_chunk::<64>() {
            let mut rest = word;
            while let Some(bits) = core::num::NonZeroU64::new(rest) {
                let bit = bits.trailing_zeros();
                rest &= rest.wrapping_sub(1);
                let Some(vp) = chunk.get(bit as usize) else { break };
                post(bit, vp);
            }
        } else {
            // Fewer than 64, so the shift is no problem.
            targets &= 1u64.wrapping_shl(chunk.len() as u32).wrapping_sub(1);
            for bit in Bits(targets) {
                let Some(vp) = chunk.get(usize::from(bit)) else { break };
                post(u32::from(bit), vp);
            }
        }
        self.scratch.add(at, tally.kicks(targets), tally.wait);
        if tally.unfinished | tally.inhibited != 0 {
            self.leftovers::<K>(at, tally);
        }
    }

    /// What the loop over a word does not do itself, so that it keeps its registers.
    #[cold]
    #[inline(never)]
    fn leftovers<K: Kind<DEPTH>>(&mut self, at: usize, tally: Tally)
    where
        F: Fill<K::Queue>,
    {
        let first = at.wrapping_mul(64);
        for bit in Bits(tally.unfinished) {
            // If the entry is in already, it is now in twice: harmless.
            self.one::<K>(first.wrapping_add(usize::from(bit)), |_| true);
        }
        for bit in Bits(tally.inhibited) {
            if let Some(vp) = self.vps.get(first.wrapping_add(usize::from(bit))) {
                self.scratch.suspend_if(inhibits(vp));
            }
        }
    }

    /// Posts to the slots of a bitmap that `wanted` says.
    #[inline]
    fn bitmap<K: Kind<DEPTH>>(&mut self, bitmap: &[AtomicU64], wanted: impl Fn(&VpFlush<DEPTH>) -> bool)
    where
        F: Fill<K::Queue>,
    {
        for (at, word) in bitmap.iter().enumerate() {
            self.word::<K>(at, word.load(Ordering::Acquire), &wanted);
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
trait Targets<const DEPTH: usize> {
    fn each<K: Kind<DEPTH>, F: Fill<K::Queue>>(&self, job: Job<'_, F, DEPTH>);
}

/// VPs by VP index. One that is not online yet has no translations.
struct L1Targets<'t> {
    map: &'t VpIndexMap<'t>,
    set: &'t VpSet<'t>,
}

impl<const DEPTH: usize> Targets<DEPTH> for L1Targets<'_> {
    #[inline(always)]
    fn each<K: Kind<DEPTH>, F: Fill<K::Queue>>(&self, mut job: Job<'_, F, DEPTH>) {
        for (bank, known) in self.map.banks(self.set) {
            if let Some(slots) = self.map.slot_word(known) {
                job.word::<K>(bank as usize, slots, |_| true);
                continue;
            }
            for bit in Bits(known) {
                let vp_index = bank.wrapping_mul(VPS_PER_BANK) | u32::from(bit);
                if let Lookup::Known(slot) = self.map.lookup(vp_index) {
                    job.one_but_caller::<K>(slot.number(), |_| true);
                }
            }
        }
    }
}

/// VPs by the context they hold translations of.
struct L2Targets<'t> {
    index: &'t TargetIndex<'t>,
    vm_id: u64,
    set: &'t VpSet<'t>,
}

impl L2Targets<'_> {
    /// Asks the index for each VP_ID of the set.
    #[inline]
    fn named<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        set: SparseVpSet<'_>,
        vm: VmIndex<'_>,
        job: &mut Job<'_, F, DEPTH>,
    ) {
        // Two loops, so that who has no caller to spare does not pay for it at each target.
        if job.scratch.has_caller() {
            Self::look_up(set, vm, |slot, vp_id| {
                job.one_but_caller::<K>(slot, |vp| vp.identity.is(self.vm_id, vp_id));
            });
        } else {
            Self::look_up(set, vm, |slot, vp_id| job.one::<K>(slot, |vp| vp.identity.is(self.vm_id, vp_id)));
        }
        let overflow = self.index.overflow();
        if !overflow.is_empty() {
            self.scan::<DEPTH, K, F>(overflow, set, job);
        }
    }

    /// Hands `each` the slots that may have a VP_ID of the set, and that VP_ID.
    #[inline(always)]
    fn look_up(set: SparseVpSet<'_>, vm: VmIndex<'_>, mut each: impl FnMut(usize, u32)) {
        for (bank, word) in set.iter_banks() {
            for bit in Bits(word) {
                let vp_id = bank.wrapping_mul(VPS_PER_BANK) | u32::from(bit);
                vm.named(vp_id, |slot| each(usize::from(slot), vp_id));
            }
        }
    }

    /// Looks at each VP of a bitmap.
    #[inline(never)]
    fn scan<const DEPTH: usize, K: Kind<DEPTH>, F: Fill<K::Queue>>(
        &self,
        bitmap: &[AtomicU64],
        set: SparseVpSet<'_>,
        job: &mut Job<'_, F, DEPTH>,
    ) {
        job.bitmap::<K>(bitmap, |vp| {
            vp.identity.is_of_vm(self.vm_id) && vp.identity.vp_id().is_some_and(|vp_id| set.contains(vp_id))
        });
    }
}

impl<const DEPTH: usize> Targets<DEPTH> for L2Targets<'_> {
    #[inline(always)]
    fn each<K: Kind<DEPTH>, F: Fill<K::Queue>>(&self, mut job: Job<'_, F, DEPTH>) {
        let vm = self.index.vm(self.vm_id);
        match *self.set {
            VpSet::All => job.bitmap::<K>(vm.slots(), |vp| vp.identity.is_of_vm(self.vm_id)),
            VpSet::Sparse(set) if names_more_than(set, vm.count()) => {
                self.scan::<DEPTH, K, F>(vm.slots(), set, &mut job);
            }
            VpSet::Sparse(set) => self.named::<DEPTH, K, F>(set, vm, &mut job),
        }
    }
}

/// True when the set names more than `there_are`: then it is quicker to look at those that there are.
#[inline]
fn names_more_than(set: SparseVpSet<'_>, there_are: u64) -> bool {
    // Most often the banks have no room for that many; counting costs more.
    let room = (set.banks().len() as u64).wrapping_mul(64);
    room > there_are && u64::from(set.count()) > there_are
}

/// All VPs that have run an L2.
struct Nested;

impl<const DEPTH: usize> Targets<DEPTH> for Nested {
    fn each<K: Kind<DEPTH>, F: Fill<K::Queue>>(&self, mut job: Job<'_, F, DEPTH>) {
        for at in 0..job.vps.len().div_ceil(64) {
            job.word::<K>(at, !0, |vp| vp.word.load(Ordering::Relaxed) & word::NESTED != 0);
        }
    }
}
