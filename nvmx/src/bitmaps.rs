//! Bitmaps of L2: L1's MSR and I/O bitmaps and the embedder's together, without copying 4 or 8 KiB at every VM entry.
//!
//! The bitmap that the processor reads is all ones except for a few *hot* words, which are the union of L1's word and
//! the embedder's and are made anew at every VM entry of L1's. An access under a cold word exits; when neither L1's
//! bitmap nor the embedder's wants it, the word becomes hot and the guest runs on. So every change that L1 made before
//! a VM entry counts after it, and a guest pays only for the words it uses.
//!
//! Called by the VM entry and by the routing of exits; reads L1's memory.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

/// How many words may be hot at once; a power of two.
const HOT: usize = 8;

/// Where L1 keeps a bitmap: the first 512 words at one address, the next 512 at another (I/O bitmap B).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) a: u64,
    pub(crate) b: u64,
}

impl Source {
    /// Word `index` of L1's bitmap. What L1 has no memory for reads as ones, as on a bus.
    fn word<M: GuestMemory + ?Sized>(&self, memory: &M, index: u16) -> u64 {
        let base = if index < 512 { self.a } else { self.b };
        let offset = u64::from(index & 511) << 3;
        memory.read_u64(L1Gpa::new(base.wrapping_add(offset))).unwrap_or(u64::MAX)
    }
}

/// The hot words of one bitmap.
#[derive(Clone, Debug, Default)]
pub(crate) struct HotWords {
    index: [u16; HOT],
    len: u8,
    /// The next to be evicted once all places are taken.
    victim: u8,
}

impl HotWords {
    /// Makes every word cold.
    pub(crate) fn clear<const WORDS: usize>(&mut self, merged: &mut [u64; WORDS]) {
        for index in self.hot() {
            set(merged, *index, u64::MAX);
        }
        self.len = 0;
    }

    fn hot(&self) -> &[u16] {
        self.index.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Makes the hot words anew from L1's bitmap and the embedder's.
    #[inline]
    pub(crate) fn refresh<const WORDS: usize, M: GuestMemory + ?Sized>(
        &self,
        merged: &mut [u64; WORDS],
        own: &[u64; WORDS],
        memory: &M,
        source: Source,
    ) {
        for index in self.hot() {
            set(merged, *index, source.word(memory, *index) | own_word(own, *index));
        }
    }

    /// Makes word `index` hot; evicts another if need be.
    pub(crate) fn admit<const WORDS: usize, M: GuestMemory + ?Sized>(
        &mut self,
        merged: &mut [u64; WORDS],
        own: &[u64; WORDS],
        memory: &M,
        source: Source,
        index: u16,
    ) {
        if !self.hot().contains(&index) {
            let place = if usize::from(self.len) < HOT {
                let place = self.len;
                self.len = self.len.wrapping_add(1);
                place
            } else {
                let place = self.victim;
                self.victim = self.victim.wrapping_add(1) & (HOT as u8).wrapping_sub(1);
                if let Some(evicted) = self.index.get(usize::from(place)) {
                    set(merged, *evicted, u64::MAX);
                }
                place
            };
            if let Some(slot) = self.index.get_mut(usize::from(place)) {
                *slot = index;
            }
        }
        set(merged, index, source.word(memory, index) | own_word(own, index));
    }
}

fn set<const WORDS: usize>(merged: &mut [u64; WORDS], index: u16, value: u64) {
    if let Some(word) = merged.get_mut(usize::from(index)) {
        *word = value;
    }
}

fn own_word<const WORDS: usize>(own: &[u64; WORDS], index: u16) -> u64 {
    own.get(usize::from(index)).copied().unwrap_or(u64::MAX)
}

/// Bits of a bitmap: which word (and the next, where the bits cross its end) and which bits in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    pub(crate) word: u16,
    pub(crate) low: u64,
    /// Bits in the word after; zero mostly.
    pub(crate) high: u64,
}

impl Bits {
    /// The bit for RDMSR or WRMSR of `msr`; `None` for an MSR outside the bitmap, which always exits.
    #[inline]
    pub(crate) const fn of_msr(msr: u32, write: bool) -> Option<Self> {
        let high = match msr & 0xFFFF_E000 {
            0x0000_0000 => 0,
            0xC000_0000 => 128,
            _ => return None,
        };
        let msr = msr & 0x1FFF;
        let direction = if write { 256 } else { 0 };
        Some(Self { word: (direction | high | msr >> 6) as u16, low: 1 << (msr & 63), high: 0 })
    }

    /// The bits of an access of `size` bytes at `port`; `None` for one that goes beyond port 0xFFFF, which always exits.
    #[inline]
    pub(crate) const fn of_port(port: u16, size: u8) -> Option<Self> {
        if port.checked_add((size as u16).saturating_sub(1)).is_none() {
            return None;
        }
        let bits: u64 = match size {
            1 => 1,
            2 => 3,
            _ => 15,
        };
        let shift = port as u32 & 63;
        let high = if shift == 0 { 0 } else { bits >> (64u32.wrapping_sub(shift) & 63) };
        Some(Self { word: port >> 6, low: bits << shift, high })
    }

    /// True when L1's bitmap has one of the bits.
    #[inline]
    pub(crate) fn wanted_by_l1<M: GuestMemory + ?Sized>(self, memory: &M, source: Source) -> bool {
        source.word(memory, self.word) & self.low != 0
            || (self.high != 0 && source.word(memory, self.word.wrapping_add(1)) & self.high != 0)
    }

    /// True when `own` has one of the bits.
    #[inline]
    pub(crate) fn wanted_by<const WORDS: usize>(self, own: &[u64; WORDS]) -> bool {
        own_word(own, self.word) & self.low != 0
            || (self.high != 0 && own_word(own, self.word.wrapping_add(1)) & self.high != 0)
    }
}
