//! Physical memory: sparse 4 KiB pages of 64-bit atomic words, little-endian.
//!
//! Shared by reference between the threads that are CPUs. Each access inside an aligned 8 bytes is one atomic
//! access, as on hardware; one that crosses 8 bytes is several. Loads acquire, stores release and exchanges do both:
//! that is what x86 gives, short of its total store order. Addresses outside the memory behave like an empty bus
//! (reads are all ones, writes vanish) and are counted, so that a test can insist that there were none.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = 512;
type Page = [AtomicU64; WORDS];

/// Physical memory from an address (mostly 0) up to a size.
pub struct PhysMem {
    /// Number of the first page.
    first: u64,
    pages: Box<[OnceLock<Box<Page>>]>,
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
        Self { first: base >> 12, pages: (0..n).map(|_| OnceLock::new()).collect(), strays: AtomicU64::new(0) }
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

    /// Back to all zero and no strays, for the next run.
    pub fn clear(&mut self) {
        self.pages.iter_mut().for_each(|p| drop(p.take()));
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
            Some(slot) => slot.get().map_or(0, |p| p[word(addr)].load(Ordering::Acquire)),
        }
    }

    fn cell(&self, addr: u64) -> Option<&AtomicU64> {
        let page = self.slot(addr)?.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        Some(&page[word(addr)])
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
    /// `Err` carries what was found instead; outside the memory that is all ones.
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
            let n = (8 - (at & 7) as usize).min(rest.len());
            let bytes = self.read(at, n as u64).to_le_bytes();
            let (head, tail) = rest.split_at_mut(n);
            head.copy_from_slice(&bytes[..n]);
            rest = tail;
            at = at.wrapping_add(n as u64);
        }
    }

    /// Stores `bytes` from `addr` on.
    pub fn write_bytes(&self, addr: u64, bytes: &[u8]) {
        let mut at = addr;
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = (8 - (at & 7) as usize).min(rest.len());
            let (head, tail) = rest.split_at(n);
            let mut word = [0; 8];
            word[..n].copy_from_slice(head);
            self.write(at, n as u64, u64::from_le_bytes(word));
            rest = tail;
            at = at.wrapping_add(n as u64);
        }
    }
}

fn word(addr: u64) -> usize {
    (addr as usize >> 3) & (WORDS - 1)
}

/// All ones in the low `size` bytes.
fn mask(size: u64) -> u64 {
    u64::MAX >> (64 - size * 8)
}
