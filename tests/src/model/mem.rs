//! Physical memory: sparse 4 KiB pages of 64-bit atomic words, little-endian.
//!
//! Shared by reference between the threads that are CPUs. Each access inside an aligned 8 bytes is one atomic
//! access, as on hardware; one that crosses 8 bytes is several. Loads acquire, stores release and exchanges do both:
//! that is what x86 gives, short of its total store order. Addresses outside the memory behave like an empty bus
//! (reads are all ones, writes vanish) and are counted, so that a test can insist that there were none.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

const WORDS: usize = 512;

struct Page {
    words: [AtomicU64; WORDS],
    /// Written since [`PhysMem::keep`] or [`PhysMem::rewind`].
    dirty: AtomicBool,
    /// What `rewind` goes back to; all zero without.
    kept: Option<Box<[u64; WORDS]>>,
}

impl Page {
    fn new() -> Self {
        Self { words: [const { AtomicU64::new(0) }; WORDS], dirty: AtomicBool::new(false), kept: None }
    }
}

/// Pages of memory that live elsewhere: tables that the software under test keeps, which the CPUs walk in place.
pub trait Lent: Send + Sync {
    /// Bytes, whole pages.
    fn bytes(&self) -> u64;
    /// The word at this offset, a multiple of 8.
    fn word(&self, offset: u64) -> u64;
}

/// Physical memory from an address (mostly 0) up to a size.
pub struct PhysMem {
    /// Number of the first page.
    first: u64,
    pages: Box<[OnceLock<Box<Page>>]>,
    /// Where there are lent pages. No page of `pages` is in use there.
    lent: Vec<(u64, Arc<dyn Lent>)>,
    strays: AtomicU64,
}

impl PhysMem {
    /// Memory of `bytes` bytes, rounded up to whole pages, all zero. Untouched pages cost 16 bytes each.
    pub fn new(bytes: u64) -> Self {
        Self::starting_at(0, bytes)
    }

    /// The same from `base` on, which is page-aligned: an address of this memory is not mistaken for anything else.
    pub fn starting_at(base: u64, bytes: u64) -> Self {
        let n = usize::try_from(bytes.div_ceil(4096)).expect("memory larger than the address space");
        Self {
            first: base >> 12,
            pages: (0..n).map(|_| OnceLock::new()).collect(),
            lent: Vec::new(),
            strays: AtomicU64::new(0),
        }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.pages.len() as u64 * 4096
    }

    /// Accesses outside the memory so far.
    pub fn strays(&self) -> u64 {
        // Relaxed: a count for reports; it orders nothing.
        self.strays.load(Ordering::Relaxed)
    }

    /// From now on the memory from `base` on, which nobody has written, is `pages`. It can be read only: a write there
    /// is a stray.
    pub fn lend(&mut self, base: u64, pages: Arc<dyn Lent>) {
        self.lent.push((base, pages));
    }

    /// Back to all zero and no strays, for the next run; what was kept is forgotten.
    pub fn clear(&mut self) {
        self.pages.iter_mut().for_each(|p| drop(p.take()));
        *self.strays.get_mut() = 0;
    }

    /// Notes what the memory holds now, for [`rewind`](Self::rewind).
    pub fn keep(&mut self) {
        for page in self.pages.iter_mut().filter_map(OnceLock::get_mut) {
            page.kept = Some(Box::new(page.words.each_mut().map(|word| *word.get_mut())));
            *page.dirty.get_mut() = false;
        }
    }

    /// Back to what [`keep`](Self::keep) noted, at the cost of the pages written since, and no strays.
    pub fn rewind(&mut self) {
        for page in self.pages.iter_mut().filter_map(OnceLock::get_mut) {
            if !std::mem::take(page.dirty.get_mut()) {
                continue;
            }
            match &page.kept {
                Some(kept) => page.words.iter_mut().zip(&**kept).for_each(|(word, kept)| *word.get_mut() = *kept),
                None => page.words.iter_mut().for_each(|word| *word.get_mut() = 0),
            }
        }
        *self.strays.get_mut() = 0;
    }

    fn slot(&self, addr: u64) -> Option<&OnceLock<Box<Page>>> {
        let slot =
            (addr >> 12).checked_sub(self.first).and_then(|n| usize::try_from(n).ok()).and_then(|n| self.pages.get(n));
        if slot.is_none() {
            self.strays.fetch_add(1, Ordering::Relaxed);
        }
        slot
    }

    fn load(&self, addr: u64) -> u64 {
        match self.slot(addr) {
            None => u64::MAX,
            Some(slot) => match slot.get() {
                Some(page) => page.words[word(addr)].load(Ordering::Acquire),
                None => self.lent_at(addr).map_or(0, |(pages, offset)| pages.word(offset & !7)),
            },
        }
    }

    /// The lent pages around `addr`, and where in them it is.
    fn lent_at(&self, addr: u64) -> Option<(&dyn Lent, u64)> {
        let found = self.lent.iter().find(|(base, pages)| addr.wrapping_sub(*base) < pages.bytes());
        found.map(|(base, pages)| (&**pages, addr - base))
    }

    /// The page around `addr`, to be written.
    fn page(&self, addr: u64) -> Option<&Page> {
        let slot = self.slot(addr)?;
        let page = match slot.get() {
            Some(page) => page,
            None if self.lent_at(addr).is_some() => {
                self.strays.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            None => slot.get_or_init(|| Box::new(Page::new())),
        };
        // Relaxed: read with `&mut` only.
        page.dirty.store(true, Ordering::Relaxed);
        Some(page)
    }

    fn cell(&self, addr: u64) -> Option<&AtomicU64> {
        self.page(addr).map(|page| &page.words[word(addr)])
    }

    /// Reads `size` bytes (1 to 8), little-endian.
    pub fn read(&self, addr: u64, size: u64) -> u64 {
        debug_assert!((1..=8).contains(&size));
        let off = addr & 7;
        if off + size <= 8 {
            return (self.load(addr) >> (off * 8)) & mask(size);
        }
        let low = 8 - off;
        self.read(addr, low) | (self.read(addr.wrapping_add(low), size - low) << (low * 8))
    }

    /// Writes the low `size` bytes (1 to 8) of `value`, little-endian.
    pub fn write(&self, addr: u64, size: u64, value: u64) {
        debug_assert!((1..=8).contains(&size));
        let off = addr & 7;
        if off + size > 8 {
            let low = 8 - off;
            self.write(addr, low, value);
            self.write(addr.wrapping_add(low), size - low, value >> (low * 8));
            return;
        }
        let Some(cell) = self.cell(addr) else { return };
        if size == 8 {
            cell.store(value, Ordering::Release);
            return;
        }
        let (m, v) = (mask(size) << (off * 8), (value & mask(size)) << (off * 8));
        // Neighbouring bytes may change under us: only an exchange keeps them.
        let _ = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some((old & !m) | v));
    }

    /// Replaces `expected` by `new` in `size` bytes (1, 2, 4 or 8, aligned to themselves), atomically.
    /// `Err` carries what was found instead; outside the memory, and in lent pages, that is all ones.
    pub fn cmpxchg(&self, addr: u64, size: u64, expected: u64, new: u64) -> Result<(), u64> {
        assert!(matches!(size, 1 | 2 | 4 | 8) && addr & (size - 1) == 0, "misaligned exchange");
        let off = (addr & 7) * 8;
        let m = mask(size) << off;
        let Some(cell) = self.cell(addr) else { return Err(mask(size)) };
        cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            ((old & m) >> off == expected & mask(size)).then_some((old & !m) | ((new << off) & m))
        })
        .map(drop)
        .map_err(|old| (old & m) >> off)
    }

    /// Fills `out` from `addr` on.
    pub fn read_bytes(&self, addr: u64, out: &mut [u8]) {
        let mut at = addr;
        let mut rest = out;
        while !rest.is_empty() {
            let aligned = at & 7 == 0 && rest.len() >= 8;
            let n = if aligned { rest.len().min(page_rest(at)) & !7 } else { word_rest(at).min(rest.len()) };
            let (head, tail) = rest.split_at_mut(n);
            match self.slot(at) {
                Some(slot) if aligned => {
                    let to = head.as_chunks_mut::<8>().0;
                    if let Some(page) = slot.get() {
                        for (to, from) in to.iter_mut().zip(&page.words[word(at)..]) {
                            *to = from.load(Ordering::Acquire).to_le_bytes();
                        }
                    } else {
                        (at..).step_by(8).zip(to).for_each(|(at, to)| *to = self.load(at).to_le_bytes());
                    }
                }
                None if aligned => head.fill(0xFF),
                _ => head.copy_from_slice(&self.read(at, n as u64).to_le_bytes()[..n]),
            }
            rest = tail;
            at = at.wrapping_add(n as u64);
        }
    }

    /// Stores `bytes` from `addr` on.
    pub fn write_bytes(&self, addr: u64, bytes: &[u8]) {
        let mut at = addr;
        let mut rest = bytes;
        while !rest.is_empty() {
            let aligned = at & 7 == 0 && rest.len() >= 8;
            let n = if aligned { rest.len().min(page_rest(at)) & !7 } else { word_rest(at).min(rest.len()) };
            let (head, tail) = rest.split_at(n);
            if aligned {
                if let Some(page) = self.page(at) {
                    for (to, from) in page.words[word(at)..].iter().zip(head.as_chunks::<8>().0) {
                        to.store(u64::from_le_bytes(*from), Ordering::Release);
                    }
                }
            } else {
                let mut word = [0; 8];
                word[..n].copy_from_slice(head);
                self.write(at, n as u64, u64::from_le_bytes(word));
            }
            rest = tail;
            at = at.wrapping_add(n as u64);
        }
    }
}

/// Bytes from `addr` to the end of its word.
fn word_rest(addr: u64) -> usize {
    8 - (addr & 7) as usize
}

/// Bytes from `addr` to the end of its page.
fn page_rest(addr: u64) -> usize {
    4096 - (addr & 4095) as usize
}

fn word(addr: u64) -> usize {
    (addr as usize >> 3) & (WORDS - 1)
}

/// All ones in the low `size` bytes.
fn mask(size: u64) -> u64 {
    u64::MAX >> (64 - size * 8)
}
