//! The VP-index map: from the VP indexes that a guest names to the embedder's VP slots.
//!
//! Filled by the embedder as VPs come online; read by the flush engine and by handlers of IPIs. Uses nothing.

use core::num::NonZeroU64;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use tlfs_abi::vp_set::{BankIter, MAX_VP_INDEX, VPS_PER_BANK, VpSet};

/// A VP's place in the embedder's arrays, below 4,096.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct VpSlot(u16);

impl VpSlot {
    /// The slot `number`; `None` at or above 4,096.
    #[inline]
    pub const fn new(number: u32) -> Option<Self> {
        if number < MAX_VP_INDEX { Some(Self(number as u16)) } else { None }
    }

    /// The slot's number.
    #[inline]
    pub const fn number(self) -> usize {
        self.0 as usize
    }
}

/// What the map says about a VP index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The VP with this index is in this slot.
    Known(VpSlot),
    /// No VP with this index is online yet. It holds no translation and takes no interrupt.
    NotYetKnown,
    /// The partition can have no VP with this index.
    OutOfRange,
}

/// The storage given to a map, or an assignment to it, is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VpIndexError {
    /// More than 4,096 entries, or fewer words of `known` than entries / 64, rounded up.
    Storage,
    /// The index is not below the partition's maximum.
    OutOfRange,
    /// The index has a slot already.
    Assigned,
}

/// The map of one partition, over storage that the embedder gives: one entry for each VP index that the partition can
/// have. Any assignment of indexes to slots is possible; an index is assigned once.
///
/// The embedder gives each slot one index. Reads take no lock and may run while VPs come online.
#[derive(Debug)]
pub struct VpIndexMap<'a> {
    /// Slot + 1; 0 when not yet known.
    entries: &'a [AtomicU16],
    /// Bit n of word b: index 64 b + n is known.
    known: &'a [AtomicU64],
    /// Some index differs from its slot.
    permuted: AtomicBool,
}

impl<'a> VpIndexMap<'a> {
    /// A map for VP indexes below `entries.len()`. The storage is all zero, or what a map left there (then
    /// `assign` refuses what it holds).
    pub fn new(entries: &'a [AtomicU16], known: &'a [AtomicU64]) -> Result<Self, VpIndexError> {
        let words = entries.len().div_ceil(VPS_PER_BANK as usize);
        if entries.len() > MAX_VP_INDEX as usize || known.len() < words {
            return Err(VpIndexError::Storage);
        }
        // Conservative: only speed depends on it.
        let used = known.iter().any(|word| word.load(Ordering::Relaxed) != 0);
        Ok(Self { entries, known, permuted: AtomicBool::new(used) })
    }

    /// The partition's maximum number of VPs: indexes are below it.
    #[inline]
    pub fn limit(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Makes the VP in `slot` known under `index`.
    pub fn assign(&self, index: u32, slot: VpSlot) -> Result<(), VpIndexError> {
        let entry = self.entries.get(index as usize).ok_or(VpIndexError::OutOfRange)?;
        let known = self.known.get((index / VPS_PER_BANK) as usize).ok_or(VpIndexError::OutOfRange)?;
        // Relaxed suffices for the entry: nothing is published by it alone. The fetch_or below is the publication.
        entry
            .compare_exchange(0, slot.0.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed)
            .map_err(|_| VpIndexError::Assigned)?;
        if index != u32::from(slot.0) {
            self.permuted.store(true, Ordering::Relaxed);
        }
        // Release: who sees the bit (with Acquire) sees the entry, `permuted`, and what the embedder wrote to the slot.
        known.fetch_or(1 << (index % VPS_PER_BANK), Ordering::Release);
        Ok(())
    }

    #[inline]
    fn known_word(&self, bank: u32) -> u64 {
        // Acquire: pairs with the Release of `assign`.
        self.known.get(bank as usize).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The slot of an index whose bit of `known` was seen.
    #[inline]
    fn slot(&self, index: u32) -> Option<VpSlot> {
        // Relaxed: the Acquire load of the bit orders it.
        let entry = self.entries.get(index as usize)?.load(Ordering::Relaxed);
        entry.checked_sub(1).map(VpSlot)
    }

    /// The slot of one VP index.
    #[inline]
    pub fn lookup(&self, index: u32) -> Lookup {
        if index as usize >= self.entries.len() {
            return Lookup::OutOfRange;
        }
        if self.known_word(index / VPS_PER_BANK) >> (index % VPS_PER_BANK) & 1 == 0 {
            return Lookup::NotYetKnown;
        }
        self.slot(index).map_or(Lookup::NotYetKnown, Lookup::Known)
    }

    /// The slots of the VPs in `set` that are known; other indexes name nobody. Costs in proportion to the banks that
    /// the set lists and the VPs in them (for [`VpSet::All`], to the partition).
    #[inline]
    pub fn slots<'m, 's>(&'m self, set: &VpSet<'s>) -> Slots<'m, 's> {
        Slots { map: self, banks: self.banks(set), base: 0, word: 0 }
    }

    /// The known VPs of `set`, bank by bank: `(bank, word)` in terms of VP indexes.
    #[inline]
    pub fn banks<'s>(&self, set: &VpSet<'s>) -> KnownBanks<'_, 's> {
        let banks = match set {
            VpSet::All => Banks::All(0..self.limit().div_ceil(VPS_PER_BANK)),
            VpSet::Sparse(set) => Banks::Sparse(set.iter_banks()),
        };
        KnownBanks { known: self.known, banks }
    }

    /// As [`banks`](Self::banks), in terms of slots, when every index is its own slot; else `None`.
    ///
    /// Asked for each word: an assignment that ends the identity is seen together with the first bit it adds.
    #[inline]
    pub fn slot_word(&self, known_word: u64) -> Option<u64> {
        // Relaxed: `known_word` was read with Acquire, so every assignment in it is visible.
        if self.permuted.load(Ordering::Relaxed) { None } else { Some(known_word) }
    }
}

#[derive(Clone, Debug)]
enum Banks<'s> {
    All(core::ops::Range<u32>),
    Sparse(BankIter<'s>),
}

/// Iterator over the known VPs of a set, bank by bank.
#[derive(Clone, Debug)]
pub struct KnownBanks<'m, 's> {
    known: &'m [AtomicU64],
    banks: Banks<'s>,
}

impl Iterator for KnownBanks<'_, '_> {
    type Item = (u32, u64);

    #[inline]
    fn next(&mut self) -> Option<(u32, u64)> {
        let (bank, word) = match &mut self.banks {
            Banks::All(banks) => (banks.next()?, u64::MAX),
            Banks::Sparse(banks) => banks.next()?,
        };
        // Acquire: pairs with the Release of `assign`.
        let known = self.known.get(bank as usize).map_or(0, |known| known.load(Ordering::Acquire));
        Some((bank, word & known))
    }
}

/// Iterator over the slots of the known VPs of a set, by ascending VP index.
#[derive(Clone, Debug)]
pub struct Slots<'m, 's> {
    map: &'m VpIndexMap<'m>,
    banks: KnownBanks<'m, 's>,
    base: u32,
    word: u64,
}

impl Iterator for Slots<'_, '_> {
    type Item = VpSlot;

    #[inline]
    fn next(&mut self) -> Option<VpSlot> {
        loop {
            // Not zero: finding its lowest bit needs no check.
            if let Some(word) = NonZeroU64::new(self.word) {
                self.word = word.get() & word.get().wrapping_sub(1);
                if let Some(slot) = self.map.slot(self.base | word.trailing_zeros()) {
                    return Some(slot);
                }
            } else {
                let (bank, word) = self.banks.next()?;
                self.base = bank.wrapping_mul(VPS_PER_BANK);
                self.word = word;
            }
        }
    }
}
