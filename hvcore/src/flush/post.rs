//! Posting a request to one target: queue entry, then mark. Used by `domain.rs`.

use super::mutant::{self, Mutant};
use super::queue::GvaQueue;
use super::range::{Packed, pack};
use super::shootdown::Tally;
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
    type Queue = super::queue::SecondStageQueue<DEPTH>;
    #[inline(always)]
    fn queue(vp: &VpFlush<DEPTH>) -> &Self::Queue {
        &vp.second_stage
    }
}

/// What goes into a queue.
pub(super) trait Fill<Q> {
    /// False when it does not fit.
    fn fill(&self, queue: &Q) -> bool;
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
        queue.push_one(self.0)
    }
}

impl<const DEPTH: usize> Fill<GvaQueue<DEPTH>> for Many<'_, u64> {
    #[inline]
    fn fill(&self, queue: &GvaQueue<DEPTH>) -> bool {
        queue.push_all(self.0)
    }
}

impl<const DEPTH: usize> Fill<super::queue::SecondStageQueue<DEPTH>> for Many<'_, (u64, u64)> {
    #[inline]
    fn fill(&self, queue: &super::queue::SecondStageQueue<DEPTH>) -> bool {
        queue.push_all(self.0)
    }
}

impl<Q> Fill<Q> for Nothing {
    #[inline(always)]
    fn fill(&self, _queue: &Q) -> bool {
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

/// Posts a request to `vp`, whose bit in the tally is `bit`.
#[inline(always)]
pub(super) fn post<const DEPTH: usize, K, F>(vp: &VpFlush<DEPTH>, fill: &F, mark: u64, bit: u64, tally: &mut Tally)
where
    K: Kind<DEPTH>,
    F: Fill<K::Queue>,
{
    if mutant::active(Mutant::KickBeforePublish) || mutant::active(Mutant::RelaxedMark) {
        return post_mutated::<DEPTH, K, F>(vp, fill, mark, bit, tally);
    }
    let mark = if fill.fill(K::queue(vp)) { mark } else { K::MARKS.everything };
    // The one change that counts. Release: the queue entry, and the guest's page-table writes, are before the mark.
    // Acquire: when the target has left the guest (or is about to enter it anew), what its guest did is before what
    // the caller does next. IPI-pending is set whatever the target does; outside the guest, and in the other one, it
    // means nothing, and the target takes it off when it comes or goes.
    let old = vp.word.fetch_or(mark | K::IPI, Ordering::AcqRel);
    if old & (word::MODE | word::INHIBIT | K::IPI) == K::MODE {
        tally.kick |= bit;
    } else {
        judge::<DEPTH, K>(vp, old, bit, tally);
    }
}

/// The target is not simply running and unmarked.
#[inline]
fn judge<const DEPTH: usize, K: Kind<DEPTH>>(vp: &VpFlush<DEPTH>, old: u64, bit: u64, tally: &mut Tally) {
    if old & word::MODE == K::MODE {
        if old & K::IPI == 0 {
            tally.kick |= bit;
        } else {
            // Somebody marked it before and kicks it, or it is about to look at its marks before it runs.
            tally.wait |= bit;
        }
    }
    if old & word::INHIBIT != 0 {
        // Asked again together with the mark for the waiter: either the end of the inhibition sees the waiter, or it
        // came first. Then the uses of the translations are over (Acquire).
        let now = vp.word.fetch_or(word::WAITERS, Ordering::AcqRel);
        tally.suspended |= now & word::INHIBIT != 0;
    }
}

/// The defective orders, for the tests.
fn post_mutated<const DEPTH: usize, K, F>(vp: &VpFlush<DEPTH>, fill: &F, mark: u64, bit: u64, tally: &mut Tally)
where
    K: Kind<DEPTH>,
    F: Fill<K::Queue>,
{
    let order = if mutant::active(Mutant::RelaxedMark) { Ordering::Relaxed } else { Ordering::AcqRel };
    let old = vp.word.fetch_or(mark | K::IPI, order);
    judge::<DEPTH, K>(vp, old, bit, tally);
    if !fill.fill(K::queue(vp)) {
        vp.word.fetch_or(K::MARKS.everything, order);
    }
}
