//! The shadow trees of one VP: a few roots, keyed by the nested context they translate, and what fills and empties
//! them.
//!
//! Used by `nsvm::npt` and the nested EPT; uses the page pool. No recursion; every loop is bounded by the pool, by the
//! number of levels or by the 512 entries of a table.

use core::marker::PhantomData;

use super::pool::{ENTRIES, PageList, PagePool, Slot};
use super::{EntryFormat, L1Change, PageSize, Rights, ShadowError, TagFlush};
use crate::addr::{Hpa, L1Gpa, L2Gpa};

/// Deepest tables that are supported.
const MAX_LEVELS: usize = 5;

/// A finished translation, to be installed in the active root.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// Where L2 sees it: any address in the page.
    pub l2: L2Gpa,
    /// The L1 GPA that `l2` translates to.
    pub l1: L1Gpa,
    /// The host physical address that `l1` translates to.
    pub hpa: Hpa,
    /// The largest page that both stages allow; all three addresses have the same offset in it.
    pub size: PageSize,
    /// What L2 may do.
    pub rights: Rights,
    /// The guest's tables on the way: `sources[n]` is the page of the table of level `n + 1`, or `None` where the
    /// guest has no table of that level (a large page, or a format with fewer levels).
    pub sources: [Option<L1Gpa>; MAX_LEVELS],
}

/// A root and the pages below it. Its top page is its own for good, so that its address does not change.
#[derive(Clone, Copy, Debug)]
struct Root<K> {
    key: Option<K>,
    top: u32,
    below: PageList,
    last_used: u64,
}

/// The shadow tables of one VP: entries in format `F`, up to `ROOTS` cached roots keyed by `K`.
#[derive(Debug)]
pub struct Tables<'a, F, K, const ROOTS: usize> {
    pool: PagePool<'a>,
    roots: [Root<K>; ROOTS],
    active: Option<usize>,
    /// Key and top table of the active root, at hand for every entry.
    current: Option<(K, Hpa)>,
    clock: u64,
    levels: u8,
    /// First L2 GPA that is wider than the tables.
    limit: u64,
    tag_stale: bool,
    format: PhantomData<F>,
}

/// Bits of a GPA below the index of `level`.
#[inline]
const fn span_shift(level: u8) -> u32 {
    // Levels are 1 to 6: at most 57 bits.
    12u32.wrapping_add(9u32.wrapping_mul((level as u32).wrapping_sub(1)))
}

/// Index of `gpa` in a table of `level`.
#[inline]
fn index(gpa: L2Gpa, level: u8) -> usize {
    (gpa.raw().wrapping_shr(span_shift(level)) & 511) as usize
}

/// Bytes that an entry of `level` covers.
#[inline]
fn span(level: u8) -> u64 {
    1u64.wrapping_shl(span_shift(level))
}

impl<'a, F: EntryFormat, K: Copy + Eq, const ROOTS: usize> Tables<'a, F, K, ROOTS> {
    /// Empty tables of `levels` levels (4 or 5, as the host's own second stage has) in the pages of `pool`. At least
    /// `ROOTS + levels - 1` pages are needed; some hundreds make a guest fast.
    pub fn new(mut pool: PagePool<'a>, levels: u8) -> Result<Self, ShadowError> {
        const { assert!(ROOTS > 0, "at least one root") };
        if levels != 4 && levels != 5 {
            return Err(ShadowError::Levels(levels));
        }
        let needed = ROOTS.saturating_add(usize::from(levels).saturating_sub(1));
        if pool.free() < needed {
            return Err(ShadowError::TooFewPages { needed });
        }
        let mut roots = [Root { key: None, top: 0, below: PageList::EMPTY, last_used: 0 }; ROOTS];
        for root in &mut roots {
            let mut top = PageList::EMPTY;
            root.top = pool.take(&mut top, levels).ok_or(ShadowError::TooFewPages { needed })?;
        }
        Ok(Self {
            pool,
            roots,
            active: None,
            current: None,
            clock: 0,
            levels,
            limit: span(levels.saturating_add(1)),
            tag_stale: false,
            format: PhantomData,
        })
    }

    /// Makes the root for `key` the active one and returns the host physical address of its top table, which stays
    /// the same as long as the root is active. A cached root is taken as it is; otherwise the least recently used one
    /// is emptied for it. A change of the active root makes the tag stale.
    #[inline]
    pub fn activate(&mut self, key: K) -> Hpa {
        match self.current {
            Some((current, top)) if current == key => top,
            _ => self.switch_to(key),
        }
    }

    #[cold]
    fn switch_to(&mut self, key: K) -> Hpa {
        self.tag_stale = true;
        self.active = None;
        self.current = None;
        self.clock = self.clock.wrapping_add(1);
        let mut chosen = 0;
        let mut oldest = u64::MAX;
        for (slot, root) in self.roots.iter().enumerate() {
            if root.key == Some(key) {
                chosen = slot;
                break;
            }
            let age = if root.key.is_none() { 0 } else { root.last_used };
            if age < oldest {
                oldest = age;
                chosen = slot;
            }
        }
        if self.roots.get(chosen).is_some_and(|root| root.key != Some(key)) {
            self.empty(chosen);
        }
        let clock = self.clock;
        let Some(root) = self.roots.get_mut(chosen) else { return Hpa::new(0) };
        root.key = Some(key);
        root.last_used = clock;
        let top = self.pool.hpa(root.top);
        self.active = Some(chosen);
        self.current = Some((key, top));
        top
    }

    /// No root is active from here on: L2 does not run, or runs without nested paging of its own. The tag becomes
    /// stale if there was one.
    pub fn deactivate(&mut self) {
        self.current = None;
        if self.active.take().is_some() {
            self.tag_stale = true;
        }
    }

    /// Key of the active root.
    #[inline]
    pub fn active_key(&self) -> Option<K> {
        self.current.map(|(key, _)| key)
    }

    /// True when translations cached under the VP's hardware tag for L2 may be wrong.
    #[inline]
    pub const fn tag_stale(&self) -> bool {
        self.tag_stale
    }

    /// The owner has given up the tag (a fresh one takes its place), or an entry that flushed it has happened.
    #[inline]
    pub const fn tag_retired(&mut self) {
        self.tag_stale = false;
    }

    /// Pages that are not in use.
    pub const fn free_pages(&self) -> usize {
        self.pool.free()
    }

    /// Puts `leaf` into the active root, as a smaller page where a table of smaller pages is in place already. False
    /// when no root is active or the address is wider than the tables are; then nothing was done.
    pub fn install(&mut self, leaf: &Leaf) -> bool {
        if leaf.l2.raw() >= self.limit {
            return false;
        }
        // Once more when the pool had to be emptied, which makes room for a whole path.
        self.try_install(leaf) || (self.make_room() && self.try_install(leaf))
    }

    fn try_install(&mut self, leaf: &Leaf) -> bool {
        let Some(root) = self.active_root() else { return false };
        let mut page = root.top;
        let mut level = self.levels;
        while level > 1 {
            self.pool.set_source(page, source(leaf, level));
            let slot = index(leaf.l2, level);
            match self.pool.slot(page, slot) {
                Slot::Table(below) => page = below,
                _ if level <= leaf.size.level() => break,
                present => {
                    let Some(below) = self.link(page, slot, level) else { return false };
                    if present != Slot::Empty {
                        // A larger page was split: other parts of it are no longer mapped.
                        self.tag_stale = true;
                    }
                    page = below;
                }
            }
            level = level.saturating_sub(1);
        }
        self.pool.set_source(page, source(leaf, level));
        self.put(page, level, leaf);
        true
    }

    /// Links a new empty table of `level - 1` in `slot`.
    fn link(&mut self, page: u32, slot: usize, level: u8) -> Option<u32> {
        let root = self.active.and_then(|active| self.roots.get_mut(active))?;
        let below = self.pool.take(&mut root.below, level.saturating_sub(1))?;
        let entry = F::table(self.pool.hpa(below));
        self.pool.set_slot(page, slot, Slot::Table(below), entry, 0);
        Some(below)
    }

    fn put(&mut self, page: u32, level: u8, leaf: &Leaf) {
        let size = PageSize::of_level(level);
        let slot = index(leaf.l2, level);
        let start = !size.offset_mask();
        let entry = F::leaf(Hpa::new(leaf.hpa.raw() & start), size, leaf.rights);
        if matches!(self.pool.slot(page, slot), Slot::Leaf(_)) && !F::keeps(self.pool.entry(page, slot), entry) {
            self.tag_stale = true;
        }
        let l1 = L1Gpa::new(leaf.l1.raw() & start);
        self.pool.set_slot(page, slot, Slot::Leaf(l1), entry, size.bytes());
    }

    /// Frees pages for a whole path: those of the cached roots, least recently active first, and at last those of the
    /// active root. False when there are not enough pages all the same.
    fn make_room(&mut self) -> bool {
        let path = usize::from(self.levels).saturating_sub(1);
        for _ in 0..ROOTS {
            if self.pool.free() >= path {
                break;
            }
            let mut chosen = self.active;
            let mut oldest = u64::MAX;
            for (slot, root) in self.roots.iter().enumerate() {
                if Some(slot) != self.active && root.below.count() > 0 && root.last_used < oldest {
                    oldest = root.last_used;
                    chosen = Some(slot);
                }
            }
            let Some(slot) = chosen else { return false };
            self.empty(slot);
        }
        self.pool.free() >= path
    }

    /// Drops every translation of the roots whose key `matches`.
    pub fn invalidate(&mut self, matches: impl Fn(&K) -> bool) -> TagFlush {
        let mut flush = TagFlush::NotNeeded;
        for slot in 0..ROOTS {
            let Some(key) = self.roots.get(slot).and_then(|root| root.key) else { continue };
            if !matches(&key) {
                continue;
            }
            self.empty(slot);
            if Some(slot) == self.active {
                flush = TagFlush::Needed;
            } else if let Some(root) = self.roots.get_mut(slot) {
                root.key = None;
            }
        }
        flush
    }

    /// Drops the translations of `bytes` bytes of L2's memory from `start` on, in the roots whose key `matches`. A
    /// range past the end of the address space ends there.
    pub fn invalidate_l2(&mut self, matches: impl Fn(&K) -> bool, start: L2Gpa, bytes: u64) -> TagFlush {
        let mut flush = TagFlush::NotNeeded;
        for slot in 0..ROOTS {
            let Some(root) = self.roots.get(slot).copied() else { continue };
            if !root.key.is_some_and(|key| matches(&key)) {
                continue;
            }
            self.drop_range(root.top, start, bytes);
            if Some(slot) == self.active {
                self.tag_stale = true;
                flush = TagFlush::Needed;
            }
        }
        flush
    }

    /// Drops every leaf below `top` that overlaps the range: steps from entry to entry, over what is not mapped by
    /// the size of the empty entry.
    fn drop_range(&mut self, top: u32, start: L2Gpa, bytes: u64) {
        let end = start.raw().saturating_add(bytes).min(self.limit);
        let mut gpa = start.raw();
        while gpa < end {
            let mut page = top;
            let mut level = self.levels;
            let slot = loop {
                let slot = index(L2Gpa::new(gpa), level);
                match self.pool.slot(page, slot) {
                    Slot::Table(below) if level > 1 => page = below,
                    _ => break slot,
                }
                level = level.saturating_sub(1);
            };
            if matches!(self.pool.slot(page, slot), Slot::Leaf(_)) {
                self.pool.set_slot(page, slot, Slot::Empty, 0, 0);
            }
            let covered = span(level);
            gpa = (gpa & !covered.wrapping_sub(1)).saturating_add(covered);
        }
    }

    /// The embedder has changed `bytes` bytes of L1's memory from `start` on: takes away what shadow entries of all
    /// roots derive from it, leaves in the range and whole roots with a guest table in the range.
    pub fn l1_gpa_changed(&mut self, start: L1Gpa, bytes: u64, change: L1Change) -> TagFlush {
        if bytes == 0 {
            return TagFlush::NotNeeded;
        }
        let first = start.raw();
        let last = first.saturating_add(bytes.saturating_sub(1));
        let mut flush = TagFlush::NotNeeded;
        for slot in 0..ROOTS {
            if self.root_changed(slot, first, last, change) && Some(slot) == self.active {
                self.tag_stale = true;
                flush = TagFlush::Needed;
            }
        }
        flush
    }

    /// True when something in the root of `slot` derived from the range.
    fn root_changed(&mut self, slot: usize, first: u64, last: u64, change: L1Change) -> bool {
        let Some(root) = self.roots.get(slot).copied() else { return false };
        let mut changed = self.page_changed(root.top, first, last, change);
        let mut page = root.below.head();
        let mut table_gone = self.has_source(root.top, first, last);
        for _ in 0..root.below.count() {
            table_gone |= self.has_source(page, first, last);
            changed |= self.page_changed(page, first, last, change);
            page = self.pool.next(page);
        }
        if table_gone && change == L1Change::Unmap {
            self.empty(slot);
            changed = true;
        }
        changed
    }

    /// True when the guest table behind `page` overlaps the range.
    fn has_source(&self, page: u32, first: u64, last: u64) -> bool {
        self.pool.source(page).is_some_and(|gpa| gpa.raw() <= last && first <= gpa.raw() | 0xFFF)
    }

    fn page_changed(&mut self, page: u32, first: u64, last: u64, change: L1Change) -> bool {
        if !self.pool.may_map(page, first, last) {
            return false;
        }
        let offset = PageSize::of_level(self.pool.level(page)).offset_mask();
        let mut changed = false;
        for slot in 0..ENTRIES {
            let Slot::Leaf(gpa) = self.pool.slot(page, slot) else { continue };
            if gpa.raw() > last || gpa.raw() | offset < first {
                continue;
            }
            changed = true;
            match change {
                L1Change::Unmap => self.pool.set_slot(page, slot, Slot::Empty, 0, 0),
                L1Change::WriteProtect => {
                    let entry = self.pool.entry(page, slot);
                    self.pool.set_entry(page, slot, F::read_only(entry));
                }
            }
        }
        changed
    }

    /// Drops every translation of the root in `slot`; its top page stays its own.
    fn empty(&mut self, slot: usize) {
        let Some(root) = self.roots.get_mut(slot) else { return };
        self.pool.clear(root.top);
        self.pool.give_back(&mut root.below);
        if Some(slot) == self.active {
            self.tag_stale = true;
        }
    }

    #[inline]
    fn active_root(&self) -> Option<&Root<K>> {
        self.active.and_then(|active| self.roots.get(active))
    }

    /// What the active root says about `l2` now: the entry that maps it, hardware's accessed and dirty bits included,
    /// and the page's size.
    pub fn lookup(&self, l2: L2Gpa) -> Option<(u64, PageSize)> {
        self.find(l2).map(|(entry, size, _)| (entry, size))
    }

    /// The L1 GPA that the active root's entry for `l2` was composed from, and the entry: a translation that L2 may
    /// use just as well, so the one that an access on behalf of L2 may use.
    #[inline]
    pub fn translate(&self, l2: L2Gpa) -> Option<(L1Gpa, u64)> {
        let (entry, size, l1) = self.find(l2)?;
        Some((L1Gpa::new(l1.raw() | (l2.raw() & size.offset_mask())), entry))
    }

    #[inline]
    fn find(&self, l2: L2Gpa) -> Option<(u64, PageSize, L1Gpa)> {
        let mut page = self.active_root()?.top;
        if l2.raw() >= self.limit {
            return None;
        }
        let mut level = self.levels;
        let mut shift = span_shift(level);
        // One round per level: the tables of level 1 hold leaves only.
        while level > 0 {
            let slot = (l2.raw().wrapping_shr(shift) & 511) as usize;
            match self.pool.slot(page, slot) {
                Slot::Empty => return None,
                Slot::Leaf(l1) => return Some((self.pool.entry(page, slot), PageSize::of_level(level), l1)),
                Slot::Table(below) => page = below,
            }
            shift = shift.wrapping_sub(9);
            level = level.wrapping_sub(1);
        }
        None
    }
}

#[inline]
fn source(leaf: &Leaf, level: u8) -> Option<L1Gpa> {
    leaf.sources.get(usize::from(level).wrapping_sub(1)).copied().flatten()
}
