//! What a VP has taken from its queues and not yet flushed. Used by `vp.rs`; read by the embedder as [`EntryFlush`].

use super::queue::{GvaQueue, SecondStageQueue};
use super::range::{Clipped, GvaWidth, SecondStageItem, clip, unpack};
use super::word::Marks;
use arrayvec::ArrayVec;
use tlfs_abi::flush::GvaSpan;

/// What is to be flushed before a guest's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFlush<'p, const DEPTH: usize> {
    /// First-level (linear and combined) translations of the level that is entered.
    pub gva: GvaFlush<'p, DEPTH>,
    /// Second-stage translations, when L2 is entered.
    pub second_stage: SecondStageFlush<'p, DEPTH>,
}

/// Which GVA translations are to be flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GvaFlush<'p, const DEPTH: usize> {
    /// None.
    None,
    /// Those of these ranges, in every address space.
    Ranges(&'p Ranges<DEPTH>),
    /// All that are not global.
    EverythingNonGlobal,
    /// All of the tag.
    Everything,
}

/// Which second-stage translations are to be flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondStageFlush<'p, const DEPTH: usize> {
    /// None.
    None,
    /// What these items name, and all combined translations that derive from it.
    Items(&'p ArrayVec<SecondStageItem, DEPTH>),
    /// All roots.
    Everything,
}

/// GVA ranges as they were queued.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ranges<const DEPTH: usize>(ArrayVec<u64, DEPTH>);

impl<const DEPTH: usize> Ranges<DEPTH> {
    /// The ranges as spans of canonical pages, for an address space of `width`, or `None` when they are better flushed
    /// as "everything" (one of them wraps around, or reaches out of the non-canonical hole).
    ///
    /// Ranges without a canonical byte are left out. A large page that a span touches is to be flushed whole.
    pub fn spans(&self, width: GvaWidth) -> Option<impl Iterator<Item = GvaSpan> + '_> {
        let clipped = move |word: &u64| clip(unpack(*word), width);
        if self.0.iter().any(|word| clipped(word) == Clipped::Odd) {
            return None;
        }
        Some(self.0.iter().filter_map(move |word| match clipped(word) {
            Clipped::Span(span) => Some(span),
            _ => None,
        }))
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Bits of what is pending beside the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whole {
    No,
    NonGlobal,
    Everything,
}

/// GVA flushes of one level that are due.
#[derive(Debug)]
pub(super) struct PendingGva<const DEPTH: usize> {
    whole: Whole,
    ranges: Ranges<DEPTH>,
}

impl<const DEPTH: usize> PendingGva<DEPTH> {
    pub(super) const fn new() -> Self {
        Self { whole: Whole::No, ranges: Ranges(ArrayVec::new_const()) }
    }

    #[inline]
    pub(super) fn is_none(&self) -> bool {
        matches!(self.whole, Whole::No) && self.ranges.is_empty()
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        if !self.is_none() {
            self.whole = Whole::No;
            self.ranges.0.clear();
        }
    }

    pub(super) fn set_everything(&mut self) {
        self.whole = Whole::Everything;
        self.ranges.0.clear();
    }

    pub(super) fn view(&self) -> GvaFlush<'_, DEPTH> {
        match self.whole {
            Whole::Everything => GvaFlush::Everything,
            // Ranges may name global pages: both together are everything.
            Whole::NonGlobal if !self.ranges.is_empty() => GvaFlush::Everything,
            Whole::NonGlobal => GvaFlush::EverythingNonGlobal,
            Whole::No if self.ranges.is_empty() => GvaFlush::None,
            Whole::No => GvaFlush::Ranges(&self.ranges),
        }
    }

    /// Adds what the marks taken from the word say and what is in the queue.
    pub(super) fn drain(&mut self, taken: u64, marks: Marks, queue: &GvaQueue<DEPTH>) {
        if taken & marks.everything != 0 {
            self.set_everything();
        } else if taken & marks.non_global != 0 && self.whole == Whole::No {
            self.whole = Whole::NonGlobal;
        }
        // The queue is emptied also when everything is flushed anyway, and also without a list mark: then a producer
        // is between its entry and its mark, and the entry is flushed early.
        let mut full = false;
        let Self { whole, ranges } = self;
        let wanted = *whole != Whole::Everything;
        queue.take(|word| full |= wanted && ranges.0.try_push(word).is_err());
        if full {
            self.set_everything();
        }
    }
}

/// Second-stage flushes that are due.
#[derive(Debug)]
pub(super) struct PendingSecondStage<const DEPTH: usize> {
    everything: bool,
    items: ArrayVec<SecondStageItem, DEPTH>,
}

impl<const DEPTH: usize> PendingSecondStage<DEPTH> {
    pub(super) const fn new() -> Self {
        Self { everything: false, items: ArrayVec::new_const() }
    }

    #[inline]
    pub(super) fn is_none(&self) -> bool {
        !self.everything && self.items.is_empty()
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        if !self.is_none() {
            self.everything = false;
            self.items.clear();
        }
    }

    pub(super) fn set_everything(&mut self) {
        self.everything = true;
        self.items.clear();
    }

    pub(super) fn view(&self) -> SecondStageFlush<'_, DEPTH> {
        if self.everything {
            SecondStageFlush::Everything
        } else if self.items.is_empty() {
            SecondStageFlush::None
        } else {
            SecondStageFlush::Items(&self.items)
        }
    }

    pub(super) fn drain(&mut self, taken: u64, marks: Marks, queue: &SecondStageQueue<DEPTH>) {
        if taken & marks.everything != 0 {
            self.set_everything();
        }
        let mut full = false;
        let Self { everything, items } = self;
        queue.take(|item| full |= !*everything && items.try_push(item).is_err());
        if full {
            self.set_everything();
        }
    }
}
