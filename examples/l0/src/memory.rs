//! L1's physical memory as L0 reaches it.
//!
//! L0's page tables map all of physical memory at [`DIRECT_MAP`]. [`L1Memory`] implements the library's
//! [`GuestMemory`] on it: RAM that is L1's, without the hole where L0 lives. Everything that L0 does to L1's memory
//! goes through here.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::partition::Overlay;

/// Virtual address of physical address 0 in L0's page tables; as a program of the host, where its tests map memory.
pub const DIRECT_MAP: u64 = if cfg!(freestanding) { 0xffff_8000_0000_0000 } else { 0x2000_0000_0000 };

/// End of the 32-bit physical address space.
pub const FOUR_GIB: u64 = 1 << 32;

/// The virtual address at which L0 reaches physical address `pa`.
#[inline]
pub fn phys_to_virt<T>(pa: u64) -> *mut T {
    (DIRECT_MAP + pa) as *mut T
}

/// A half-open range of physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Range {
    /// True when `pa` lies in the range.
    pub const fn contains(self, pa: u64) -> bool {
        pa >= self.start && pa < self.end
    }

    /// True when the two ranges share a byte.
    pub const fn overlaps(self, other: Range) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// Where pages of L0's lie over L1's memory.
#[derive(Debug)]
pub struct Overlays {
    /// Page number in L1's memory of each overlay, or [`NOWHERE`].
    pages: [AtomicU64; OVERLAYS],
    /// Physical address of the page that is seen there.
    behind: [AtomicU64; OVERLAYS],
    /// How often an overlay has been placed or moved.
    moves: AtomicU64,
}

const OVERLAYS: usize = Overlay::ALL.len();
/// No page has this number.
const NOWHERE: u64 = u64::MAX;

impl Overlays {
    /// No overlay.
    pub const fn new() -> Self {
        Self {
            pages: [const { AtomicU64::new(NOWHERE) }; OVERLAYS],
            behind: [const { AtomicU64::new(0) }; OVERLAYS],
            moves: AtomicU64::new(0),
        }
    }

    /// Moves `which` to `gpa`, where `behind` is seen from now on; where it was before. Under the mapping lock.
    pub fn place(&self, which: Overlay, gpa: Option<u64>, behind: u64) -> Option<u64> {
        let at = Overlay::ALL.iter().position(|w| *w == which).unwrap_or(0);
        self.behind[at].store(behind, Ordering::Relaxed);
        // Twice, so that who counts before the move and who counts during it both count anew after it. Release: who
        // finds the new count, or the overlay, finds the page behind it.
        self.moves.fetch_add(1, Ordering::Release);
        let old = self.pages[at].swap(gpa.map_or(NOWHERE, |gpa| gpa >> 12), Ordering::AcqRel);
        self.moves.fetch_add(1, Ordering::Release);
        (old != NOWHERE).then_some(old << 12)
    }

    /// Physical address of the page that overlays the page of `gpa`.
    #[inline]
    pub fn at(&self, gpa: u64) -> Option<u64> {
        let found = self.pages.iter().position(|p| p.load(Ordering::Acquire) == gpa >> 12)?;
        Some(self.behind[found].load(Ordering::Relaxed))
    }

    /// How often an overlay has been placed or moved: what was found before the last time may be found no more.
    #[inline]
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// True when an overlay lies in the same 2 MiB as `gpa`.
    #[inline]
    pub fn near(&self, gpa: u64) -> bool {
        self.pages.iter().any(|p| p.load(Ordering::Acquire) >> 9 == gpa >> 21)
    }

    /// True when an overlay lies in the bytes from `start` to `end`, which is not below it.
    #[inline]
    fn touch(&self, start: u64, end: u64) -> bool {
        if self.moves.load(Ordering::Acquire) == 0 {
            return false;
        }
        let (first, last) = (start >> 12, end.wrapping_sub(1) >> 12);
        self.pages.iter().any(|p| p.load(Ordering::Acquire).wrapping_sub(first) <= last.wrapping_sub(first))
    }
}

impl Default for Overlays {
    fn default() -> Self {
        Self::new()
    }
}

/// The RAM of L1: below 4 GiB up to `low_end`, above it up to `high_end`, without `hole`.
#[derive(Clone, Copy, Debug)]
pub struct L1Memory {
    low_end: u64,
    high_end: u64,
    hole: Range,
    overlays: &'static Overlays,
}

impl L1Memory {
    /// RAM from 0 to `low_end` and from 4 GiB to `high_end` (at least 4 GiB), except `hole`, under `overlays`.
    ///
    /// # Safety
    /// That RAM is there, mapped at [`DIRECT_MAP`], and outside the hole nothing of L0's own lives in it.
    pub const unsafe fn new(low_end: u64, high_end: u64, hole: Range, overlays: &'static Overlays) -> Self {
        Self { low_end, high_end, hole, overlays }
    }

    /// The pointer to `len` bytes at `gpa`, all of them L1's RAM and none under an overlay.
    #[inline]
    fn at(&self, gpa: L1Gpa, len: usize) -> Result<*mut u8, MemoryError> {
        let start = gpa.raw();
        if self.overlays.touch(start, start.wrapping_add(len.max(1) as u64)) {
            return Err(MemoryError);
        }
        self.beneath(gpa, len)
    }

    /// Page by page, where an overlay is among them.
    #[cold]
    fn read_overlaid(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        for (i, byte) in buf.iter_mut().enumerate() {
            let gpa = gpa.checked_add(i as u64).ok_or(MemoryError)?;
            let p = match self.overlays.at(gpa.raw()) {
                Some(page) => phys_to_virt(page + gpa.page_offset()),
                None => self.beneath(gpa, 1)?,
            };
            // SAFETY: a byte of L1's RAM, or of a page of L0's that is only read.
            *byte = unsafe { AtomicU8::from_ptr(p) }.load(Ordering::Relaxed);
        }
        Ok(())
    }

    /// The pointer to `len` bytes at `gpa`, all of them L1's RAM, whatever lies over it.
    #[inline]
    fn beneath(&self, gpa: L1Gpa, len: usize) -> Result<*mut u8, MemoryError> {
        let start = gpa.raw();
        let end = start.checked_add(len as u64).ok_or(MemoryError)?;
        let ram = end <= self.low_end || (start >= FOUR_GIB && end <= self.high_end);
        if !ram || (Range { start, end }).overlaps(self.hole) {
            return Err(MemoryError);
        }
        Ok(phys_to_virt(start))
    }

    /// As [`at`](Self::at) for a naturally aligned access of `len` bytes.
    #[inline]
    fn aligned(&self, gpa: L1Gpa, len: usize) -> Result<*mut u8, MemoryError> {
        if !gpa.is_aligned(len as u64) {
            return Err(MemoryError);
        }
        self.at(gpa, len)
    }

    /// Where `len` bytes at `gpa` are, if they are L1's RAM and under no overlay. Overlays may come later.
    pub fn pointer(&self, gpa: L1Gpa, len: usize) -> Option<*const u8> {
        self.at(gpa, len).ok().map(|p| p.cast_const())
    }

    /// See [`Overlays::moves`].
    #[inline]
    pub fn overlay_moves(&self) -> u64 {
        self.overlays.moves()
    }

    /// True when the 4 KiB page of `gpa` is RAM that L1 may have.
    pub fn is_ram(&self, gpa: u64) -> bool {
        self.at(L1Gpa::new(gpa & !0xfff), 0x1000).is_ok()
    }

    /// Where L0 lives: reads as all ones for L1.
    pub fn hole(&self) -> Range {
        self.hole
    }

    /// End of RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.low_end
    }

    /// End of RAM above 4 GiB, 4 GiB when there is none.
    pub fn high_end(&self) -> u64 {
        self.high_end
    }
}

/// Bytes up to the next multiple of eight, at most `len`.
#[inline]
fn head(p: *mut u8, len: usize) -> usize {
    ((p as usize).wrapping_neg() & 7).min(len)
}

impl GuestMemory for L1Memory {
    #[inline(always)]
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        // What the library copies most: whole aligned words, of a length that is known where it is called.
        if buf.len().is_multiple_of(8)
            && gpa.is_aligned(8)
            && let Ok(p) = self.at(gpa, buf.len())
        {
            let mut p = p.cast::<u64>();
            for w in buf.chunks_exact_mut(8) {
                // SAFETY: `at` checked that the whole range is RAM which L0 maps and does not own; aligned by the test
                // above. Guests write it meanwhile, so every access is an atomic one.
                let word = unsafe { AtomicU64::from_ptr(p) }.load(Ordering::Acquire);
                w.copy_from_slice(&word.to_le_bytes());
                p = p.wrapping_add(1);
            }
            return Ok(());
        }
        self.read_any(gpa, buf)
    }

    #[inline(always)]
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        if buf.len().is_multiple_of(8) && gpa.is_aligned(8) {
            let mut p = self.at(gpa, buf.len())?.cast::<u64>();
            for w in buf.as_chunks::<8>().0 {
                // SAFETY: as for `read`.
                unsafe { AtomicU64::from_ptr(p) }.store(u64::from_le_bytes(*w), Ordering::Release);
                p = p.wrapping_add(1);
            }
            return Ok(());
        }
        self.write_any(gpa, buf)
    }

    #[inline]
    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        if !gpa.is_aligned(0x1000) {
            return None;
        }
        let p = self.at(gpa, 0x1000).ok()?;
        // SAFETY: `at` checked that the page is RAM which L0 maps and does not own; the line above the alignment.
        // Guests write it meanwhile, which atomic words allow for.
        Some(unsafe { &*p.cast::<[AtomicU64; 512]>() })
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let p = self.aligned(gpa, 1)?;
        // SAFETY: `aligned` checked range and alignment.
        Ok(unsafe { AtomicU8::from_ptr(p) }.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst))
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        let p = self.aligned(gpa, 4)?;
        // SAFETY: `aligned` checked range and alignment.
        Ok(unsafe { AtomicU32::from_ptr(p.cast()) }.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst))
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        let p = self.aligned(gpa, 8)?;
        // SAFETY: `aligned` checked range and alignment.
        Ok(unsafe { AtomicU64::from_ptr(p.cast()) }.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst))
    }

    #[inline]
    fn read_u32(&self, gpa: L1Gpa) -> Result<u32, MemoryError> {
        if gpa.is_aligned(4)
            && let Ok(p) = self.at(gpa, 4)
        {
            // SAFETY: `at` checked the range, the line above the alignment.
            return Ok(unsafe { AtomicU32::from_ptr(p.cast()) }.load(Ordering::Acquire));
        }
        let mut b = [0; 4];
        self.read_overlaid(gpa, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    #[inline]
    fn read_u64(&self, gpa: L1Gpa) -> Result<u64, MemoryError> {
        if gpa.is_aligned(8)
            && let Ok(p) = self.at(gpa, 8)
        {
            // SAFETY: `at` checked the range, the line above the alignment.
            return Ok(unsafe { AtomicU64::from_ptr(p.cast()) }.load(Ordering::Acquire));
        }
        let mut b = [0; 8];
        self.read(gpa, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
}

impl L1Memory {
    /// Reads of any length and alignment, overlays included.
    #[cold]
    fn read_any(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if let Ok(four) = <&mut [u8; 4]>::try_from(&mut *buf)
            && gpa.is_aligned(4)
        {
            *four = self.read_u32(gpa)?.to_le_bytes();
            return Ok(());
        }
        let Ok(mut p) = self.at(gpa, buf.len()) else { return self.read_overlaid(gpa, buf) };
        // SAFETY (all reads below): `at` checked that the whole range is RAM which L0 maps and does not own. Guests
        // write it meanwhile, so every access is an atomic one: bytes up to alignment, then whole words.
        let (first, rest) = buf.split_at_mut(head(p, buf.len()));
        for b in first {
            // SAFETY: see above.
            *b = unsafe { AtomicU8::from_ptr(p) }.load(Ordering::Relaxed);
            p = p.wrapping_add(1);
        }
        let mut words = rest.chunks_exact_mut(8);
        for w in &mut words {
            // SAFETY: see above; `p` is 8-byte aligned.
            let word = unsafe { AtomicU64::from_ptr(p.cast()) }.load(Ordering::Acquire);
            w.copy_from_slice(&word.to_le_bytes());
            p = p.wrapping_add(8);
        }
        let last = words.into_remainder();
        if last.len() >= 4 {
            // SAFETY: see above; `p` is 8-byte aligned and at least four bytes remain.
            let word = unsafe { AtomicU32::from_ptr(p.cast()) }.load(Ordering::Acquire);
            last[..4].copy_from_slice(&word.to_le_bytes());
            p = p.wrapping_add(4);
        }
        let done = last.len() & 4;
        for b in &mut last[done..] {
            // SAFETY: see above.
            *b = unsafe { AtomicU8::from_ptr(p) }.load(Ordering::Relaxed);
            p = p.wrapping_add(1);
        }
        Ok(())
    }

    /// Writes of any length and alignment.
    #[cold]
    fn write_any(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let mut p = self.at(gpa, buf.len())?;
        if let Ok(four) = <[u8; 4]>::try_from(buf)
            && gpa.is_aligned(4)
        {
            // SAFETY: as for `read`; the line above checked size and alignment.
            unsafe { AtomicU32::from_ptr(p.cast()) }.store(u32::from_le_bytes(four), Ordering::Release);
            return Ok(());
        }
        let (first, rest) = buf.split_at(head(p, buf.len()));
        for b in first {
            // SAFETY: as for `read`.
            unsafe { AtomicU8::from_ptr(p) }.store(*b, Ordering::Relaxed);
            p = p.wrapping_add(1);
        }
        let mut words = rest.chunks_exact(8);
        for w in &mut words {
            let word = u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]]);
            // SAFETY: as for `read`; `p` is 8-byte aligned.
            unsafe { AtomicU64::from_ptr(p.cast()) }.store(word, Ordering::Release);
            p = p.wrapping_add(8);
        }
        let last = words.remainder();
        if last.len() >= 4 {
            let word = u32::from_le_bytes([last[0], last[1], last[2], last[3]]);
            // SAFETY: as for `read`; `p` is 8-byte aligned and at least four bytes remain.
            unsafe { AtomicU32::from_ptr(p.cast()) }.store(word, Ordering::Release);
            p = p.wrapping_add(4);
        }
        let done = last.len() & 4;
        for b in &last[done..] {
            // SAFETY: as for `read`.
            unsafe { AtomicU8::from_ptr(p) }.store(*b, Ordering::Relaxed);
            p = p.wrapping_add(1);
        }
        Ok(())
    }
}
