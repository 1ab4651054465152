//! Hardware ASIDs: one pool per physical CPU, two tags (L1 and L2) per virtual processor.
//!
//! A tag names an ASID of one generation of one CPU's pool. It is good as long as the VP stays on that CPU and the
//! generation lasts; a VP that moved, or whose tag was retired, gets a fresh ASID that no entry of this generation
//! was made under. When the ASIDs are used up the pool starts a new generation, whose first entry flushes everything.
//! Nothing here is shared: a pool belongs to its CPU, a tag to its VP.

use crate::vmcb::bits::tlb;

/// A lease on a hardware ASID, kept per VP and level. The default names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    asid: u32,
    /// That of the pool, with [`FLUSH`] when the tag's entries are to be gone by the next entry. Zero is no generation
    /// of any pool.
    generation: u64,
}

impl Tag {
    /// Gives the lease up: nothing cached under it is used again.
    #[inline]
    pub const fn retire(&mut self) {
        self.generation = 0;
    }

    /// Asks for the tag's entries to be gone by the next entry: by a flush of the ASID where the processor has one,
    /// else by a fresh ASID.
    #[inline]
    pub const fn invalidate(&mut self) {
        self.generation |= FLUSH;
    }
}

/// In a tag's generation: what was cached under it is to be gone. Above all numbers of CPUs.
const FLUSH: u64 = 1 << 15;
/// The difference of one generation of a pool from the next.
const GENERATION: u64 = 1 << 16;

/// What a VM entry has to put in the VMCB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The ASID, never 0.
    pub asid: u32,
    /// TLB_CONTROL, see [`tlb`].
    pub tlb_control: u8,
}

/// The ASIDs of one physical CPU. ASID 0 is the host's.
#[derive(Clone, Debug)]
pub struct AsidPool {
    limit: u32,
    next: u32,
    /// The CPU's number in the low 15 bits, from bit 16 on a count from 1: no two pools ever have the same.
    generation: u64,
    flush_all: bool,
    flush_by_asid: bool,
    /// An entry was prepared and has not happened yet.
    prepared: bool,
}

impl AsidPool {
    /// A pool for physical CPU `cpu` (below 32,768) whose processor has `count` ASIDs (CPUID 0x8000_000A EBX, at least
    /// 2) and, with `flush_by_asid`, TLB_CONTROL 3 (EDX bit 6). `None` for fewer than 2 ASIDs or a number too large.
    ///
    /// Nothing is assumed of the TLB: the first entry flushes it.
    pub const fn new(cpu: u32, count: u32, flush_by_asid: bool) -> Option<Self> {
        if count < 2 || cpu >= FLUSH as u32 {
            return None;
        }
        let generation = GENERATION | cpu as u64;
        Some(Self { limit: count, next: 1, generation, flush_all: true, flush_by_asid, prepared: false })
    }

    /// True when `tag` names an ASID that is still its own on this CPU, and nothing cached under it is to go.
    #[inline]
    pub(crate) const fn is_good(&self, tag: &Tag) -> bool {
        tag.generation == self.generation
    }

    /// The ASID and TLB_CONTROL to enter `tag`'s context with; a tag that is not good here becomes one that is.
    #[inline]
    pub fn assign(&mut self, tag: &mut Tag) -> Assigned {
        let flushes_asid = self.flush_by_asid && tag.generation == self.generation | FLUSH;
        if !self.is_good(tag) && !flushes_asid {
            self.lease(tag);
        }
        let tlb_control = if self.flush_all {
            tlb::ALL
        } else if flushes_asid {
            tlb::ASID
        } else {
            tlb::NONE
        };
        self.prepared = true;
        Assigned { asid: tag.asid, tlb_control }
    }

    fn lease(&mut self, tag: &mut Tag) {
        if self.next >= self.limit {
            self.flush_all();
        }
        *tag = Tag { asid: self.next, generation: self.generation };
        self.next = self.next.wrapping_add(1);
    }

    /// The VM entry that [`assign`](Self::assign) was for happened, so its flush did.
    #[inline]
    pub const fn entered(&mut self, tag: &mut Tag) {
        // An exit without an entry of ours (a state just restored) flushed nothing.
        if self.prepared {
            self.prepared = false;
            self.flush_all = false;
            tag.generation &= !FLUSH;
        }
    }

    /// True when [`entered`](Self::entered) has something to do.
    #[inline]
    pub(crate) const fn is_prepared(&self) -> bool {
        self.prepared
    }

    /// The next entry on this CPU flushes every ASID, and no tag is good here any more.
    pub const fn flush_all(&mut self) {
        self.generation = self.generation.wrapping_add(GENERATION);
        self.next = 1;
        self.flush_all = true;
    }
}
