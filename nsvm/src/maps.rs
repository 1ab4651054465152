//! Permission maps of L2: L1's map and the embedder's together, without copying 8 or 12 KiB at every VMRUN.
//!
//! The map that the processor reads is all ones except for a few *hot* words, which are the union of L1's word and the
//! embedder's and are made anew at every VMRUN. An access under a cold word exits; when neither L1's map nor the
//! embedder's wants it, the word becomes hot and the guest runs on. So every change that L1 made before a VMRUN counts
//! after it, and a guest pays only for the words it uses.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

/// How many words may be hot at once; a power of two.
const HOT: usize = 8;

/// The hot words of one map.
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

    /// Makes the hot words anew from L1's map at `base` and the embedder's.
    #[inline]
    pub(crate) fn refresh<const WORDS: usize, M: GuestMemory + ?Sized>(
        &self,
        merged: &mut [u64; WORDS],
        own: &[u64; WORDS],
        memory: &M,
        base: u64,
    ) {
        for index in self.hot() {
            set(merged, *index, word(memory, base, *index) | own_word(own, *index));
        }
    }

    /// Makes word `index` hot; evicts another if need be.
    pub(crate) fn admit<const WORDS: usize, M: GuestMemory + ?Sized>(
        &mut self,
        merged: &mut [u64; WORDS],
        own: &[u64; WORDS],
        memory: &M,
        base: u64,
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
        set(merged, index, word(memory, base, index) | own_word(own, index));
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

/// Word `index` of L1's map at `base`. What L1 has no memory for reads as ones, as on a bus.
pub(crate) fn word<M: GuestMemory + ?Sized>(memory: &M, base: u64, index: u16) -> u64 {
    memory.read_u64(L1Gpa::new(base.wrapping_add(u64::from(index).wrapping_mul(8)))).unwrap_or(u64::MAX)
}

/// Bits of a permission map: which word (and the next, where the bits cross its end) and which bits in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    pub(crate) word: u16,
    pub(crate) low: u64,
    /// Bits in the word after; zero mostly.
    pub(crate) high: u64,
}

impl Bits {
    /// The intercept bit of RDMSR or WRMSR of `msr`; `None` for an MSR outside the map, which always exits.
    #[inline]
    pub(crate) const fn of_msr(msr: u32, write: bool) -> Option<Self> {
        let range = match msr & 0xFFFF_E000 {
            0x0000_0000 => 0,
            0xC000_0000 => 256,
            0xC001_0000 => 512,
            _ => return None,
        };
        let msr = msr & 0x1FFF;
        let word = (range | (msr >> 5)) as u16;
        let bit = (msr & 31) << 1 | write as u32;
        Some(Self { word, low: 1 << (bit & 63), high: 0 })
    }

    /// The intercept bits of an IO access of `size` bytes at `port`.
    #[inline]
    pub(crate) const fn of_port(port: u16, size: u8) -> Self {
        let bits: u64 = match size {
            1 => 1,
            2 => 3,
            _ => 15,
        };
        let shift = port as u32 & 63;
        let high = if shift == 0 { 0 } else { bits >> (64u32.wrapping_sub(shift) & 63) };
        Self { word: port >> 6, low: bits << shift, high }
    }

    /// True when L1's map at `base` has one of the bits.
    #[inline]
    pub(crate) fn wanted_by_l1<M: GuestMemory + ?Sized>(self, memory: &M, base: u64) -> bool {
        word(memory, base, self.word) & self.low != 0
            || (self.high != 0 && word(memory, base, self.word.wrapping_add(1)) & self.high != 0)
    }

    /// True when `own` has one of the bits.
    #[inline]
    pub(crate) fn wanted_by<const WORDS: usize>(self, own: &[u64; WORDS]) -> bool {
        own_word(own, self.word) & self.low != 0
            || (self.high != 0 && own_word(own, self.word.wrapping_add(1)) & self.high != 0)
    }
}
