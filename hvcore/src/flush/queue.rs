//! The two kinds of queue. Many producers, one consumer; used by this folder only, through `vp.rs` and `post.rs`.
//!
//! A queue is a handful of slots and nothing else: no head, no tail, no count. A producer puts a word into a slot that
//! it finds empty, by compare-exchange; the consumer takes what it finds and empties the slot. An entry is whole at the
//! instant it becomes visible, so no producer can be late and none waits for another; each slot is tried once, so a
//! producer is done after as many steps as there are slots. One that finds no room says so, and its caller marks
//! "everything" in the VP's word instead: enqueueing never fails.
//!
//! Order between entries has no meaning: flushes commute.

use super::range::SecondStageItem;
use super::sync::{AtomicU64, Ordering, const_outside_loom};

const EMPTY: u64 = 0;

/// A queue of packed GVA ranges.
#[derive(Debug)]
pub struct GvaQueue<const DEPTH: usize> {
    slots: [AtomicU64; DEPTH],
}

impl<const DEPTH: usize> GvaQueue<DEPTH> {
    const_outside_loom! {
        pub(super) fn new() -> Self {
            Self { slots: empty_slots() }
        }
    }

    /// Puts one word into the first slot; `false` when that is taken.
    #[inline]
    pub(super) fn push_first(&self, word: u64) -> bool {
        // Release: the consumer that takes the word sees what its producer did before, the guest's page-table writes
        // among it. (The mark in the VP's word alone would do; the slot does not rely on it.) A failure reads nothing
        // that is used.
        self.slots
            .first()
            .is_some_and(|slot| slot.compare_exchange(EMPTY, word, Ordering::Release, Ordering::Relaxed).is_ok())
    }

    /// Puts all words in; `false` when there was no room for one of them: some may be in.
    #[inline]
    pub(super) fn push_all(&self, words: &[u64]) -> bool {
        // One walk over the slots for the whole list: a slot that was taken is not looked at again.
        let mut slots = self.slots.iter();
        words.iter().all(|word| push(slots.by_ref(), *word))
    }

    /// Takes everything that is in and hands it to `each`. For the consumer.
    #[inline]
    pub(super) fn take(&self, mut each: impl FnMut(u64)) {
        for slot in &self.slots {
            // Acquire: pairs with the producer's Release.
            let word = slot.load(Ordering::Acquire);
            if word != EMPTY {
                // Only the consumer empties, so nothing came in between; no read-modify-write is needed. Relaxed: a
                // producer that finds the slot empty learns nothing else from it.
                slot.store(EMPTY, Ordering::Relaxed);
                each(word);
            }
        }
    }
}

/// Puts `word` into the first of `slots` that is empty.
#[inline]
fn push<'s>(slots: impl Iterator<Item = &'s AtomicU64>, word: u64) -> bool {
    for slot in slots {
        if slot.load(Ordering::Relaxed) == EMPTY
            && slot.compare_exchange(EMPTY, word, Ordering::Release, Ordering::Relaxed).is_ok()
        {
            return true;
        }
    }
    false
}

#[cfg(not(loom))]
const fn empty_slots<const N: usize>() -> [AtomicU64; N] {
    [const { AtomicU64::new(EMPTY) }; N]
}

#[cfg(loom)]
fn empty_slots<const N: usize>() -> [AtomicU64; N] {
    core::array::from_fn(|_| AtomicU64::new(EMPTY))
}

/// A slot being filled: its second word is not there yet. Low bits of a packed tag are never zero, so it is no tag.
const CLAIMED: u64 = 1 << 4;

/// A queue of second-stage items, two words each.
///
/// A producer claims a slot, writes the second word, then the first. The consumer passes over a claimed slot: whoever
/// claimed it has not marked its request yet, so the request is not due, and the slot stays the producer's own.
#[derive(Debug)]
pub struct SecondStageQueue<const DEPTH: usize> {
    tags: [AtomicU64; DEPTH],
    ranges: [AtomicU64; DEPTH],
}

impl<const DEPTH: usize> SecondStageQueue<DEPTH> {
    const_outside_loom! {
        pub(super) fn new() -> Self {
            Self { tags: empty_slots(), ranges: empty_slots() }
        }
    }

    /// Puts all items in; `false` when there was no room for one of them: some may be in.
    pub(super) fn push_all(&self, items: &[(u64, u64)]) -> bool {
        let mut slots = self.tags.iter().zip(&self.ranges);
        items.iter().all(|(tag, range)| {
            for (tag_slot, range_slot) in slots.by_ref() {
                // Acquire: the consumer has read the slot's old second word before this one overwrites it.
                if tag_slot.load(Ordering::Relaxed) == EMPTY
                    && tag_slot.compare_exchange(EMPTY, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
                {
                    range_slot.store(*range, Ordering::Relaxed);
                    // Release: whoever sees the tag sees the range, and all that its producer did before.
                    tag_slot.store(*tag, Ordering::Release);
                    return true;
                }
            }
            false
        })
    }

    /// Takes everything that is whole and hands it to `each`. For the consumer.
    pub(super) fn take(&self, mut each: impl FnMut(SecondStageItem)) {
        for (tag_slot, range_slot) in self.tags.iter().zip(&self.ranges) {
            // Acquire: pairs with the producer's Release, so the range is the tag's own.
            let tag = tag_slot.load(Ordering::Acquire);
            if tag != EMPTY && tag != CLAIMED {
                let range = range_slot.load(Ordering::Relaxed);
                // Release: pairs with the next claim's Acquire.
                tag_slot.store(EMPTY, Ordering::Release);
                each(SecondStageItem::unpack(tag, range));
            }
        }
    }
}
