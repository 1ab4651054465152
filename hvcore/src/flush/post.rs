//! Posting a request to one target: queue entry, then mark. Used by `domain.rs`.

use super::mutant::{self, Mutant};
use super::queue::{GvaQueue, SecondStageQueue};
use super::range::{Packed, pack};
use super::sync::Ordering;
use super::vp::VpFlush;
use super::word::{self, Marks};
use arrayvec::ArrayVec;
use tlfs_abi::flush::RangeFormat;

/// A kind of request: which guest must be running for a kick, which marks, which queue.
pub(super) trait Kind<const DEPTH: usize> {
    const MODE: u64;
    const IPI: u64;
    const MARKS: Marks;
    type Queue;
    fn queue(vp: &VpFlush<DEPTH>) -> &Self::Queue;
}

/// GVA translations of L1.
pub(super) struct L1Gva;
/// GVA translations of L2.
pub(super) struct L2Gva;
/// L2's second stage.
pub(super) struct L2SecondStage;

impl<const DEPTH: usize> Kind<DEPTH> for L1Gva {
    const MODE: u64 = word::MODE_L1;
    const IPI: u64 = word::IPI_L1;
    const MARKS: Marks = word::L1_GVA;
    type Queue = GvaQueue<DEPTH>;
    #[inline(always)]
    fn queue(vp: &VpFlush<DEPTH>) -> &Self::Queue {
        if mutant::active(Mutant::WrongTag) { &vp.l2 } else { &vp.l1 }
    }
}

impl<const DEPTH: usize> Kind<DEPTH> for L2Gva {
    const MODE: u64 = word::MODE_L2;
    const IPI: u64 = word::IPI_L2;
    const MARKS: Marks = word::L2_GVA;
    type Queue = GvaQueue<DEPTH>;
    #[inline(always)]
    fn queue(vp: &VpFlush<DEPTH>) -> &Self::Queue {
        if mutant::active(Mutant::WrongTag) { &vp.l1 } else { &vp.l2 }
    }
}

impl<const DEPTH: usize> Kind<DEPTH> for L2SecondStage {
    const MODE: u64 = word::MODE_L2;
    const IPI: u64 = word::IPI_L2;
    const MARKS: Marks = word::L2_SECOND_STAGE;
    type Queue = SecondStageQueue<DEPTH>;
    #[inline(always)]
    fn queue(vp: &VpFlush<DEPTH>) -> &Self::Queue {
        &vp.second_stage
    }
}

/// What goes into a queue.
pub(super) trait Fill<Q> {
    /// The quick attempt; false when it did not work, and nothing, or only a part, is in.
    fn fill(&self, queue: &Q) -> bool;

    /// The other attempt, when the quick one did not work; false when it does not fit.
    fn fill_behind(&self, queue: &Q) -> bool;
}

/// One GVA range.
pub(super) struct One(pub(super) u64);
/// Several items.
pub(super) struct Many<'r, T>(pub(super) &'r [T]);
/// Nothing: the mark says it all.
pub(super) struct Nothing;

impl<const DEPTH: usize> Fill<GvaQueue<DEPTH>> for One {
    #[inline(always)]
    fn fill(&self, queue: &GvaQueue<DEPTH>) -> bool {
        queue.push_first(self.0)
    }

    #[inline]
    fn fill_behind(&self, queue: &GvaQueue<DEPTH>) -> bool {
        queue.push_all(&[self.0])
    }
}

impl<const DEPTH: usize> Fill<GvaQueue<DEPTH>> for Many<'_, u64> {
    #[inline]
    fn fill(&self, queue: &GvaQueue<DEPTH>) -> bool {
        queue.push_all(self.0)
    }

    fn fill_behind(&self, _queue: &GvaQueue<DEPTH>) -> bool {
        false
    }
}

impl<const DEPTH: usize> Fill<SecondStageQueue<DEPTH>> for Many<'_, (u64, u64)> {
    #[inline]
    fn fill(&self, queue: &SecondStageQueue<DEPTH>) -> bool {
        queue.push_all(self.0)
    }

    fn fill_behind(&self, _queue: &SecondStageQueue<DEPTH>) -> bool {
        false
    }
}

impl<Q> Fill<Q> for Nothing {
    #[inline(always)]
    fn fill(&self, _queue: &Q) -> bool {
        true
    }

    fn fill_behind(&self, _queue: &Q) -> bool {
        true
    }
}

/// GVA ranges made ready for the queues.
#[derive(Debug)]
pub(super) enum Prepared<const DEPTH: usize> {
    /// None of them has a canonical byte.
    Nothing,
    /// These words.
    Words(ArrayVec<u64, DEPTH>),
    /// Too many, or an odd one.
    Everything,
}

impl<const DEPTH: usize> Prepared<DEPTH> {
    #[inline]
    pub(super) fn new(raw: &[u64], format: RangeFormat) -> Self {
        if raw.len() > DEPTH {
            return Self::Everything;
        }
        let mut words = ArrayVec::new();
        for raw in raw {
            match pack(*raw, format) {
                Packed::Nothing => (),
                Packed::Everything => return Self::Everything,
                Packed::Word(word) => {
                    if words.try_push(word).is_err() {
                        return Self::Everything;
                    }
                }
            }
        }
        if words.is_empty() { Self::Nothing } else { Self::Words(words) }
    }
}

/// How far [`post_quick`] got.
pub(super) enum Quick {
    /// All was done; the VP's word as it was before.
    Done(u64),
    /// The first slot was taken: [`post_behind`] is to be called.
    SlotTaken,
    /// The entry is in, the word changed just then: [`mark`] is to be called.
    WordChanged,
}

/// Posts a request to `vp`, the quick way. `marks` are the request's marks and its kind's IPI-pending.
#[inline(always)]
pub(super) fn post_quick<const DEPTH: usize, K, F>(vp: &VpFlush<DEPTH>, fill: &F, marks: u64) -> Quick
where
    K: Kind<DEPTH>,
    F: Fill<K::Queue>,
{
    if mutant::active(Mutant::KickBeforePublish) || mutant::active(Mutant::RelaxedMark) {
        return Quick::Done(post_mutated::<DEPTH, K, F>(vp, fill, marks));
    }
    if !fill.fill(K::queue(vp)) {
        return Quick::SlotTaken;
    }
    // As in `mark`. Relaxed: the load is a guess that the exchange confirms.
    let old = vp.word.load(Ordering::Relaxed);
    match vp.word.compare_exchange(old, old | marks, Ordering::AcqRel, Ordering::Relaxed) {
        Ok(old) => Quick::Done(old),
        Err(_) => Quick::WordChanged,
    }
}

/// Sets the marks; the word as it was before.
#[cold]
#[inline(never)]
pub(super) fn mark<const DEPTH: usize>(vp: &VpFlush<DEPTH>, marks: u64) -> u64 {
    // The one change that counts. Release: the queue entry, and the guest's page-table writes, are before the mark.
    // Acquire: when the target has left the guest (or is about to enter it anew), what its guest did is before what
    // the caller does next. IPI-pending is set whatever the target does; outside the guest, and in the other one, it
    // means nothing, and the target takes it off when it comes or goes.
    vp.word.fetch_or(marks, Ordering::AcqRel)
}

/// As [`post_quick`], when the first slot was taken.
#[cold]
#[inline(never)]
pub(super) fn post_behind<const DEPTH: usize, K, F>(vp: &VpFlush<DEPTH>, fill: &F, marks: u64) -> u64
where
    K: Kind<DEPTH>,
    F: Fill<K::Queue>,
{
    let marks = if fill.fill_behind(K::queue(vp)) { marks } else { K::MARKS.everything | K::IPI };
    mark(vp, marks)
}

/// True when the target runs the guest and nobody else has marked it: it is to be kicked.
#[inline(always)]
pub(super) fn simply_runs<const DEPTH: usize, K: Kind<DEPTH>>(old: u64) -> bool {
    old & (word::MODE | word::INHIBIT | K::IPI) == K::MODE
}

/// The outcome for the targets of one bitmap word. What usually happens, a kick, is not counted at all.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    /// Not to kick.
    pub(super) spared: u64,
    /// To wait for; somebody else kicks.
    pub(super) wait: u64,
    /// Ask whether it still [`inhibits`].
    pub(super) inhibited: u64,
    /// The quick way did not work.
    pub(super) unfinished: u64,
}

impl Tally {
    /// Counts the target at `bit`, below 64.
    #[inline(always)]
    pub(super) fn count<const DEPTH: usize, K: Kind<DEPTH>>(&mut self, bit: u32, quick: Quick) {
        let Quick::Done(old) = quick else {
            seldom();
            self.unfinished |= 1 << (bit & 63);
            return;
        };
        if simply_runs::<DEPTH, K>(old) {
            return;
        }
        seldom();
        // With IPI-pending, somebody marked it before and kicks it, or it is about to look at its marks before it runs.
        // (Sums of bits, no choice of a field: the fields stay in registers.)
        let runs = u64::from(old & word::MODE == K::MODE);
        let marked = u64::from(old & K::IPI != 0);
        self.spared |= (1 & !(runs & !marked)) << (bit & 63);
        self.wait |= (runs & marked) << (bit & 63);
        self.inhibited |= u64::from(old & word::INHIBIT != 0) << (bit & 63);
    }

    /// The target at `bit` is none.
    #[inline(always)]
    pub(super) fn spare(&mut self, bit: u32) {
        self.spared |= 1 << (bit & 63);
    }

    /// Those of `targets` that are to be kicked.
    #[inline]
    pub(super) fn kicks(&self, targets: u64) -> u64 {
        targets & !(self.spared | self.unfinished)
    }
}

/// Tells the compiler that the branch that calls this is taken seldom.
#[cold]
#[inline]
const fn seldom() {}

/// True when the target still inhibits flushes; it will then say that somebody waits.
pub(super) fn inhibits<const DEPTH: usize>(vp: &VpFlush<DEPTH>) -> bool {
    // The bit is asked for together with the mark for the waiter: either the end of the inhibition sees the waiter, or
    // it came first. Then the uses of the translations are over (Acquire).
    vp.word.fetch_or(word::WAITERS, Ordering::AcqRel) & word::INHIBIT != 0
}

/// The defective orders, for the tests.
fn post_mutated<const DEPTH: usize, K, F>(vp: &VpFlush<DEPTH>, fill: &F, marks: u64) -> u64
where
    K: Kind<DEPTH>,
    F: Fill<K::Queue>,
{
    let order = if mutant::active(Mutant::RelaxedMark) { Ordering::Relaxed } else { Ordering::AcqRel };
    let old = vp.word.fetch_or(marks, order);
    // A wider gap, so that a test on threads has a chance to hit it.
    (0..300).for_each(|_| core::hint::spin_loop());
    if !fill.fill(K::queue(vp)) && !fill.fill_behind(K::queue(vp)) {
        vp.word.fetch_or(K::MARKS.everything, order);
    }
    old
}
