//! The page pool of a VP's shadow tables: pages that hardware reads, and a record per page that only software reads.
//!
//! Used by [`Tables`](super::Tables) alone; the embedder creates it. Uses the address types. Pages are handed out from
//! a free list and go back as whole lists, in constant time; a page is cleared when it is handed out again, and only
//! as many entries as were used.

use core::sync::atomic::{AtomicU64, Ordering};

use super::ShadowError;
use crate::addr::{Hpa, L1Gpa};

/// Entries of a table.
pub const ENTRIES: usize = 512;

/// "No page" in a list.
const NONE: u32 = u32::MAX;

/// One table as hardware reads it: 4 KiB, aligned to its size.
///
/// Ordering: one VP owns the page. Its own CPU is the only one that walks it, and only between a VM entry and the next
/// exit, both of which serialise; software touches it only outside. So relaxed stores would do; entries that link a
/// table are stored with release all the same, after the table was cleared, and a VP that moves to another CPU takes
/// the embedder's own synchronisation with it.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct ShadowPage([AtomicU64; ENTRIES]);

impl ShadowPage {
    /// An empty table.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; ENTRIES])
    }

    /// The entry in `slot` as it stands, hardware's accessed and dirty bits included; 0 past the end.
    #[inline]
    pub fn entry(&self, slot: usize) -> u64 {
        self.0.get(slot).map_or(0, |entry| entry.load(Ordering::Relaxed))
    }

    #[inline]
    fn set(&self, slot: usize, value: u64) {
        if let Some(entry) = self.0.get(slot) {
            // Release: whoever sees the link sees the cleared table behind it.
            entry.store(value, Ordering::Release);
        }
    }
}

impl Default for ShadowPage {
    fn default() -> Self {
        Self::new()
    }
}

/// What a slot of a table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Empty,
    /// The next lower table, by index in the pool.
    Table(u32),
    /// A page of L1's memory, by the L1 GPA of its start.
    Leaf(L1Gpa),
}

/// Low bits of a stored slot: pages are aligned to 4 KiB, so these are free.
const KIND_TABLE: u64 = 1;
const KIND_LEAF: u64 = 2;
const KIND_MASK: u64 = 3;

impl Slot {
    #[inline]
    const fn pack(self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Table(index) => ((index as u64) << 12) | KIND_TABLE,
            Self::Leaf(gpa) => gpa.page().raw() | KIND_LEAF,
        }
    }

    #[inline]
    const fn unpack(raw: u64) -> Self {
        match raw & KIND_MASK {
            KIND_TABLE => Self::Table((raw >> 12) as u32),
            KIND_LEAF => Self::Leaf(L1Gpa::new(raw).page()),
            _ => Self::Empty,
        }
    }
}

/// The software side of one pool page, a little over 4 KiB. Start from [`PageRecord::new`].
#[derive(Debug)]
pub struct PageRecord {
    slots: [u64; ENTRIES],
    hpa: Hpa,
    /// Next page of the list that this one is in.
    next: u32,
    level: u8,
    /// Slots that are not empty.
    used: u16,
    /// Slots that are leaves.
    leaves: u16,
    /// L1 GPA of the guest table that the entries were last composed from, if there is one.
    source: Option<L1Gpa>,
    /// Bounds of the L1 memory that leaves of this table have mapped since it was cleared, both inclusive.
    lowest: u64,
    highest: u64,
}

impl PageRecord {
    /// A record for a page not yet in a pool.
    pub const fn new() -> Self {
        Self {
            slots: [0; ENTRIES],
            hpa: Hpa::new(0),
            next: NONE,
            level: 0,
            used: 0,
            leaves: 0,
            source: None,
            lowest: u64::MAX,
            highest: 0,
        }
    }
}

impl Default for PageRecord {
    fn default() -> Self {
        Self::new()
    }
}

/// Pages that belong together and go back together.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageList {
    head: u32,
    tail: u32,
    count: usize,
}

impl PageList {
    pub(super) const EMPTY: Self = Self { head: NONE, tail: NONE, count: 0 };

    pub(super) const fn head(&self) -> u32 {
        self.head
    }

    pub(super) const fn count(&self) -> usize {
        self.count
    }
}

/// The pages of one VP's shadow tables.
#[derive(Debug)]
pub struct PagePool<'a> {
    pages: &'a [ShadowPage],
    records: &'a mut [PageRecord],
    free: PageList,
}

impl<'a> PagePool<'a> {
    /// A pool of as many pages as there are both pages and records, at most 2^32 - 1. `hpa` tells the host physical
    /// address of each page by its index in the slice. Whatever the storage held is cleared.
    pub fn new(
        pages: &'a [ShadowPage],
        records: &'a mut [PageRecord],
        mut hpa: impl FnMut(usize) -> Hpa,
    ) -> Result<Self, ShadowError> {
        let mut pool = Self { pages, records, free: PageList::EMPTY };
        for (index, (page, record)) in pool.pages.iter().zip(pool.records.iter_mut()).enumerate() {
            let Ok(number) = u32::try_from(index) else { break };
            if number == NONE {
                break;
            }
            for entry in &page.0 {
                entry.store(0, Ordering::Relaxed);
            }
            let at = hpa(index);
            if !at.is_aligned(4096) {
                return Err(ShadowError::UnalignedPage { index });
            }
            *record = PageRecord { hpa: at, next: pool.free.head, ..PageRecord::new() };
            if pool.free.tail == NONE {
                pool.free.tail = number;
            }
            pool.free.head = number;
            pool.free.count = pool.free.count.saturating_add(1);
        }
        Ok(pool)
    }

    /// Pages on the free list.
    pub const fn free(&self) -> usize {
        self.free.count
    }

    /// The table at `index` as hardware reads it.
    pub fn page(&self, index: u32) -> Option<&ShadowPage> {
        self.pages.get(index as usize)
    }

    #[inline]
    fn record(&self, page: u32) -> Option<&PageRecord> {
        self.records.get(page as usize)
    }

    #[inline]
    fn record_mut(&mut self, page: u32) -> Option<&mut PageRecord> {
        self.records.get_mut(page as usize)
    }

    /// Takes a page from the free list, cleared, for a table of `level`, and puts it in `list`.
    pub(super) fn take(&mut self, list: &mut PageList, level: u8) -> Option<u32> {
        let page = self.free.head;
        let next = self.record(page)?.next;
        self.free.head = next;
        if next == NONE {
            self.free.tail = NONE;
        }
        self.free.count = self.free.count.saturating_sub(1);
        self.clear(page);
        let record = self.record_mut(page)?;
        record.level = level;
        record.next = list.head;
        if list.tail == NONE {
            list.tail = page;
        }
        list.head = page;
        list.count = list.count.saturating_add(1);
        Some(page)
    }

    /// Gives all pages of `list` back.
    pub(super) fn give_back(&mut self, list: &mut PageList) {
        if list.count == 0 {
            return;
        }
        let free = self.free;
        if let Some(last) = self.record_mut(list.tail) {
            last.next = free.head;
        }
        if free.tail == NONE {
            self.free.tail = list.tail;
        }
        self.free.head = list.head;
        self.free.count = free.count.saturating_add(list.count);
        *list = PageList::EMPTY;
    }

    /// Empties the table in `page`.
    pub(super) fn clear(&mut self, page: u32) {
        let (Some(entries), Some(record)) = (self.pages.get(page as usize), self.records.get_mut(page as usize)) else {
            return;
        };
        let mut left = record.used;
        for (slot, entry) in record.slots.iter_mut().zip(&entries.0) {
            if left == 0 {
                break;
            }
            if *slot != 0 {
                *slot = 0;
                entry.store(0, Ordering::Relaxed);
                left = left.saturating_sub(1);
            }
        }
        record.used = 0;
        record.leaves = 0;
        record.source = None;
        record.lowest = u64::MAX;
        record.highest = 0;
    }

    #[inline]
    pub(super) fn hpa(&self, page: u32) -> Hpa {
        self.record(page).map_or(Hpa::new(0), |record| record.hpa)
    }

    /// The page after `page` in its list; any number that is not a page past the end.
    #[inline]
    pub(super) fn next(&self, page: u32) -> u32 {
        self.record(page).map_or(NONE, |record| record.next)
    }

    #[inline]
    pub(super) fn level(&self, page: u32) -> u8 {
        self.record(page).map_or(0, |record| record.level)
    }

    #[inline]
    pub(super) fn source(&self, page: u32) -> Option<L1Gpa> {
        self.record(page).and_then(|record| record.source)
    }

    #[inline]
    pub(super) fn set_source(&mut self, page: u32, source: Option<L1Gpa>) {
        if let Some(record) = self.record_mut(page) {
            record.source = source;
        }
    }

    /// True when a leaf of `page` may map something in `first..=last`.
    pub(super) fn may_map(&self, page: u32, first: u64, last: u64) -> bool {
        self.record(page).is_some_and(|record| record.leaves > 0 && record.lowest <= last && first <= record.highest)
    }

    #[inline]
    pub(super) fn slot(&self, page: u32, slot: usize) -> Slot {
        Slot::unpack(self.record(page).and_then(|record| record.slots.get(slot)).copied().unwrap_or(0))
    }

    #[inline]
    pub(super) fn entry(&self, page: u32, slot: usize) -> u64 {
        self.page(page).map_or(0, |page| page.entry(slot))
    }

    /// Rewrites the entry and leaves what the slot stands for.
    #[inline]
    pub(super) fn set_entry(&mut self, page: u32, slot: usize, entry: u64) {
        if let Some(page) = self.page(page) {
            page.set(slot, entry);
        }
    }

    /// Sets what `slot` stands for and its entry. `bytes` is the size of what it maps or covers.
    pub(super) fn set_slot(&mut self, page: u32, slot: usize, value: Slot, entry: u64, bytes: u64) {
        let Some(record) = self.records.get_mut(page as usize) else { return };
        let Some(stored) = record.slots.get_mut(slot) else { return };
        let old = Slot::unpack(*stored);
        *stored = value.pack();
        if old == Slot::Empty && value != Slot::Empty {
            record.used = record.used.saturating_add(1);
        } else if old != Slot::Empty && value == Slot::Empty {
            record.used = record.used.saturating_sub(1);
        }
        if matches!(old, Slot::Leaf(_)) {
            record.leaves = record.leaves.saturating_sub(1);
        }
        if let Slot::Leaf(gpa) = value {
            record.leaves = record.leaves.saturating_add(1);
            record.lowest = record.lowest.min(gpa.raw());
            record.highest = record.highest.max(gpa.raw().saturating_add(bytes.saturating_sub(1)));
        }
        self.set_entry(page, slot, entry);
    }
}
