//! One VP's two halves: [`VpFlush`], which everyone may mark, and [`LocalFlush`], which its own thread holds.
//!
//! The embedder calls `LocalFlush` around every entry of a guest. Uses `word`, `queue`, `pending` and `index`.

use super::index::{NestedContext, Place, TargetIndex, VpIdentity};
use super::mutant::{self, Mutant};
use super::pending::{PendingGva, PendingSecondStage};
use super::queue::{GvaQueue, SecondStageQueue};
use super::sync::{AtomicU64, Ordering, const_outside_loom, fence};
use super::word;
use crate::addr::Level;

pub use super::pending::{EntryFlush, GvaFlush, Ranges, SecondStageFlush};

/// What other VPs may touch of a VP: its word, its queues and the nested context it may hold translations of.
///
/// `DEPTH` is the number of ranges that each queue holds before a request becomes "everything".
#[derive(Debug)]
#[repr(C, align(64))]
pub struct VpFlush<const DEPTH: usize = 16> {
    // The first cache line holds all that a direct flush of a few ranges touches.
    pub(super) word: AtomicU64,
    pub(super) identity: VpIdentity,
    pub(super) l2: GvaQueue<DEPTH>,
    pub(super) l1: GvaQueue<DEPTH>,
    pub(super) second_stage: SecondStageQueue<DEPTH>,
}

impl<const DEPTH: usize> VpFlush<DEPTH> {
    const_outside_loom! {
        /// A VP outside the guest, with nothing queued and no nested context.
        pub fn new() -> Self {
            Self {
                word: AtomicU64::new(0),
                identity: VpIdentity::new(),
                l1: GvaQueue::new(),
                l2: GvaQueue::new(),
                second_stage: SecondStageQueue::new(),
            }
        }
    }

    /// From now on, callers that flush this VP are suspended: it uses its guest's translations in software (an
    /// instruction that is being emulated, an address that was walked and is still to be used), or its TLB is locked.
    ///
    /// Inhibit first, walk then: a caller that comes later is suspended, and a walk after this call sees what earlier
    /// callers wrote.
    pub fn inhibit(&self) {
        // AcqRel: a request is before this change, and its maker's writes are seen by the walk, or after it, and its
        // maker sees the bit.
        self.word.fetch_or(word::INHIBIT, Ordering::AcqRel);
    }

    /// Ends what [`inhibit`](Self::inhibit) began. True when callers were suspended because of it: the embedder lets
    /// them issue their calls again. A true without a suspended caller is possible and harmless.
    #[must_use = "suspended callers are to be resumed"]
    pub fn uninhibit(&self) -> bool {
        // Release: the uses of the translations come before; AcqRel also orders the waiters' marks.
        self.word.fetch_and(!(word::INHIBIT | word::WAITERS), Ordering::AcqRel) & word::WAITERS != 0
    }

    /// Which guest the VP runs right now, as far as others can tell.
    pub fn runs(&self) -> Option<Level> {
        match self.word.load(Ordering::Acquire) & word::MODE {
            word::MODE_L1 => Some(Level::L1),
            word::MODE_L2 => Some(Level::L2),
            _ => None,
        }
    }
}

impl<const DEPTH: usize> Default for VpFlush<DEPTH> {
    fn default() -> Self {
        Self::new()
    }
}

/// What a change of the nested context asks of the embedder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ContextChange {
    /// It is the context whose translations the VP holds already.
    Same,
    /// It is another one. The next entry of L2 asks for everything to be flushed: do that, or use a fresh hardware
    /// tag (ASID, VPID) there.
    Retire,
}

/// The owner's half of a VP: held by the thread that runs it, one for each [`VpFlush`], ever.
///
/// Around each entry of a guest:
///
/// 1. no kick may be lost from here on: on AMD, GIF is 0; on Intel, interrupts are off and kicks are NMIs or interrupts
///    that exit (see `docs/flush.md`);
/// 2. [`enter`](Self::enter); carry out what it returns;
/// 3. enter the guest;
/// 4. [`exit`](Self::exit), or [`entry_failed`](Self::entry_failed) when no guest instruction could have run and the
///    flush may not have happened.
#[derive(Debug)]
pub struct LocalFlush<'a, const DEPTH: usize = 16> {
    vp: &'a VpFlush<DEPTH>,
    index: TargetIndex<'a>,
    slot: u16,
    running: Option<Level>,
    /// Something is pending for L1, or for L2: may be set when nothing is.
    due: Due,
    l1: PendingGva<DEPTH>,
    l2: PendingGva<DEPTH>,
    second_stage: PendingSecondStage<DEPTH>,
    context: Option<NestedContext>,
    place: Place,
}

impl<'a, const DEPTH: usize> LocalFlush<'a, DEPTH> {
    /// For `FlushDomain::local`.
    pub(super) fn new(vp: &'a VpFlush<DEPTH>, index: TargetIndex<'a>, slot: u16) -> Self {
        // SeqCst: between the VP's entry in the VP-index map (made before) and its first walk. The other side is
        // `FlushDomain`'s fence at the start of a call.
        fence(Ordering::SeqCst);
        Self {
            vp,
            index,
            slot,
            running: None,
            due: Due { l1: false, l2: false },
            l1: PendingGva::new(),
            l2: PendingGva::new(),
            second_stage: PendingSecondStage::new(),
            context: None,
            place: Place::NONE,
        }
    }

    /// The VP's slot: its position in the domain.
    pub const fn slot(&self) -> u16 {
        self.slot
    }

    /// The shared half.
    pub const fn shared(&self) -> &'a VpFlush<DEPTH> {
        self.vp
    }

    /// The nested context whose translations the VP may hold.
    pub const fn context(&self) -> Option<NestedContext> {
        self.context
    }

    /// Publishes that the VP runs `level` and returns what is to be flushed before the guest's first instruction.
    ///
    /// What is returned stays pending until [`exit`](Self::exit): after a failed entry, the next one returns it again.
    #[inline]
    pub fn enter(&mut self, level: Level) -> Option<EntryFlush<'_, DEPTH>> {
        if self.running.is_some() {
            self.leave();
        }
        self.running = Some(level);
        let (mode, due, pending) = match level {
            Level::L1 => (word::MODE_L1, word::L1_GVA.all() | word::IPI_L1, self.due.l1),
            Level::L2 => (word::MODE_L2, word::L2_GVA.all() | word::L2_SECOND_STAGE.all() | word::IPI_L2, self.due.l2),
        };
        if mutant::active(Mutant::CheckBeforePublish) {
            let old = self.vp.word.load(Ordering::Acquire);
            if old & due != 0 {
                self.drain(level, due);
            }
            self.vp.word.fetch_add(word::EPOCH_ONE | mode, Ordering::AcqRel);
            return self.pending(level);
        }
        // One change publishes the mode and tells what was marked before it. Acquire: a walk by the guest sees what
        // the makers of those marks wrote. Release: initiators that see the mode see the context it belongs to.
        let old = self.vp.word.fetch_add(word::EPOCH_ONE | mode, Ordering::AcqRel);
        if old & due == 0 && !pending {
            return None;
        }
        if old & due != 0 {
            self.drain(level, due);
        }
        self.pending(level)
    }

    fn pending(&self, level: Level) -> Option<EntryFlush<'_, DEPTH>> {
        match level {
            Level::L1 if self.l1.is_none() => None,
            Level::L1 => Some(EntryFlush { gva: self.l1.view(), second_stage: SecondStageFlush::None }),
            Level::L2 if self.l2.is_none() && self.second_stage.is_none() => None,
            Level::L2 => Some(EntryFlush { gva: self.l2.view(), second_stage: self.second_stage.view() }),
        }
    }

    /// Takes the marks and empties the queues into what is pending locally.
    #[cold]
    fn drain(&mut self, level: Level, due: u64) {
        // IPI-pending goes too: the guest does not run yet, and what was queued before this change is found below, so
        // an initiator whose mark this takes may go on. Acquire: the queues show what the marks' makers put in.
        // Release: such an initiator sees that no earlier guest run can still use what it flushed.
        let marks = self.vp.word.fetch_and(!due, Ordering::AcqRel);
        if mutant::active(Mutant::SkipDrain) {
            return;
        }
        match level {
            Level::L1 => {
                self.due.l1 = true;
                self.l1.drain(marks, word::L1_GVA, &self.vp.l1);
            }
            Level::L2 => {
                self.due.l2 = true;
                self.l2.drain(marks, word::L2_GVA, &self.vp.l2);
                self.second_stage.drain(marks, word::L2_SECOND_STAGE, &self.vp.second_stage);
            }
        }
    }

    /// The guest ran and left: what was pending for it has been flushed, and initiators that wait for this VP go on.
    #[inline]
    pub fn exit(&mut self) {
        match self.running {
            Some(Level::L1) if self.due.l1 => self.done(Level::L1),
            Some(Level::L2) if self.due.l2 => self.done(Level::L2),
            Some(_) => (),
            None => return,
        }
        self.leave();
    }

    /// Nothing is pending for `level` any more.
    fn done(&mut self, level: Level) {
        match level {
            Level::L1 => {
                self.due.l1 = false;
                self.l1.clear();
            }
            Level::L2 => {
                self.due.l2 = false;
                self.l2.clear();
                self.second_stage.clear();
            }
        }
    }

    /// The entry did not happen: what was pending stays so.
    pub fn entry_failed(&mut self) {
        if mutant::active(Mutant::ConsumeOnFailure) {
            return self.exit();
        }
        if self.running.is_some() {
            self.leave();
        }
    }

    #[inline]
    fn leave(&mut self) {
        self.running = None;
        let mut gone = word::MODE | word::IPI_L1 | word::IPI_L2;
        if mutant::active(Mutant::DropShouldFlush) {
            gone |= word::L1_GVA.all() | word::L2_GVA.all() | word::L2_SECOND_STAGE.all();
        }
        // The should-flush marks stay: they are what the initiators' IPI-pending turns into. Release: an initiator
        // that sees the mode gone is behind everything the guest did with its old translations.
        self.vp.word.fetch_and(!gone, Ordering::Release);
    }

    /// Announces the nested context that L2 will be entered with; to be called before each entry of L2 that may have
    /// changed it, outside the guest.
    ///
    /// A VP holds the translations of one nested context at most. On a change it is from now on found under the new
    /// context only; the queue of L2's GVA ranges is emptied, as everything is going to be flushed.
    pub fn set_context(&mut self, context: NestedContext) -> ContextChange {
        if self.context == Some(context) {
            return ContextChange::Same;
        }
        self.forget_context();
        self.context = Some(context);
        self.vp.word.fetch_or(word::NESTED, Ordering::Relaxed);
        if let Some(ids) = context.ids {
            self.vp.identity.publish(ids);
            self.place = self.index.insert(self.slot, ids);
        }
        if !mutant::active(Mutant::NoIndexFence) {
            // SeqCst: between the entries in the index and the guest's first walk. An initiator has such a fence
            // between its guest's page-table writes and its look-up: it finds the VP, or the VP's walk finds the
            // writes.
            fence(Ordering::SeqCst);
        }
        ContextChange::Retire
    }

    /// The VP holds no translations of a nested context any more, and no direct flush finds it: L1 left nested
    /// operation, or was reset. The next entry of L2 asks for everything to be flushed.
    pub fn forget_context(&mut self) {
        // Before the old context disappears from the index, its translations are as good as gone.
        if !mutant::active(Mutant::KeepOldTag) {
            self.due.l2 = true;
            self.l2.set_everything();
            self.vp.word.fetch_and(!word::L2_GVA.all(), Ordering::AcqRel);
            self.vp.l2.take(|_| ());
        }
        if let Some(ids) = self.context.take().and_then(|context| context.ids) {
            self.index.remove(self.slot, ids, self.place);
            self.vp.identity.withdraw();
            self.place = Place::NONE;
        }
    }

    /// The embedder retires the hardware tag of `level` for reasons of its own: the tag it uses next is fresh. What is
    /// queued and pending of `level`'s GVA ranges is dropped. Call this before the fresh tag's first use.
    pub fn retired(&mut self, level: Level) {
        // AcqRel: the requests whose marks go are before the fresh tag's first walk.
        match level {
            Level::L1 => {
                self.vp.word.fetch_and(!word::L1_GVA.all(), Ordering::AcqRel);
                self.vp.l1.take(|_| ());
                self.l1.clear();
            }
            Level::L2 => {
                self.vp.word.fetch_and(!word::L2_GVA.all(), Ordering::AcqRel);
                self.vp.l2.take(|_| ());
                self.l2.clear();
            }
        }
    }

    /// Asks for all GVA translations of `level` to be flushed at its next entry: a call of its own guest's that
    /// concerns this VP too ([`FlushCalls::flushes_caller`](super::FlushCalls::flushes_caller)).
    pub fn flush_gva(&mut self, level: Level) {
        match level {
            Level::L1 => {
                self.due.l1 = true;
                self.l1.set_everything();
            }
            Level::L2 => {
                self.due.l2 = true;
                self.l2.set_everything();
            }
        }
    }

    /// Asks for everything of `level` to be flushed at its next entry (of L2: both stages).
    pub fn flush_all(&mut self, level: Level) {
        match level {
            Level::L1 => {
                self.due.l1 = true;
                self.l1.set_everything();
            }
            Level::L2 => {
                self.due.l2 = true;
                self.l2.set_everything();
                self.second_stage.set_everything();
            }
        }
    }
}

/// Whether anything is pending, by level.
#[derive(Clone, Copy, Debug)]
struct Due {
    l1: bool,
    l2: bool,
}
