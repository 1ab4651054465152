//! Hardware VPIDs: one pool per physical CPU, two tags (L1 and L2) per virtual processor.
//!
//! A tag names a VPID of one generation of one CPU's pool. It is good as long as the VP stays on that CPU and the
//! generation lasts; a VP that moved, or whose tag was retired, gets a fresh VPID that no translation of this generation
//! was made under. When the VPIDs are used up the pool starts a new generation, whose first entry flushes all of them.
//! Nothing here is shared: a pool belongs to its CPU, a tag to its VP.
//!
//! A VPID tags linear and combined mappings. Guest-physical mappings are tagged by the EPT root alone: what becomes of
//! them is up to whoever keeps the tables.

/// A lease on a hardware VPID, kept per VP and level. The default names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    cpu: u32,
    vpid: u16,
    /// Zero is no generation of any pool.
    generation: u64,
    /// The mappings under the tag are to be flushed at the next entry.
    flush: bool,
}

impl Tag {
    /// Gives the lease up: nothing cached under it is used again.
    #[inline]
    pub const fn retire(&mut self) {
        self.generation = 0;
    }

    /// Asks for the tag's mappings to be gone by the next entry: by INVVPID of the single context where the processor
    /// has it, else by a fresh VPID.
    #[inline]
    pub const fn invalidate(&mut self) {
        self.flush = true;
    }
}

/// What the processor has (IA32_VMX_EPT_VPID_CAP, IA32_VMX_PROCBASED_CTLS2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// No VPIDs: every VM entry and exit flushes.
    None,
    /// VPIDs and INVVPID type 2, all contexts.
    AllContexts,
    /// INVVPID type 1, single context, as well.
    SingleContext,
}

/// What the embedder flushes with INVVPID before the VM entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Nothing.
    None,
    /// Type 1, single context: the VPID that is entered.
    Single,
    /// Type 2, all contexts.
    All,
}

/// What a VM entry needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The VPID; 0 only where the processor has none.
    pub vpid: u16,
    /// What to flush first.
    pub flush: Flush,
}

/// The VPIDs of one physical CPU. VPID 0 is the host's.
#[derive(Clone, Debug)]
pub struct VpidPool {
    cpu: u32,
    last: u16,
    /// The next VPID to lease; above `last` when there is none.
    next: u32,
    generation: u64,
    flush_all: bool,
    support: Support,
    /// An entry was prepared and has not happened yet.
    prepared: bool,
}

impl VpidPool {
    /// A pool for physical CPU `cpu` of the VPIDs 1 to `last` (at most 65,535; 0 counts as 1). Nothing is assumed of
    /// the TLB: the first entry flushes it.
    pub const fn new(cpu: u32, last: u16, support: Support) -> Self {
        let last = if last == 0 { 1 } else { last };
        Self { cpu, last, next: 1, generation: 1, flush_all: true, support, prepared: false }
    }

    /// The VPID to enter `tag`'s context with; a tag that is not good here becomes one that is.
    #[inline]
    pub fn assign(&mut self, tag: &mut Tag) -> Assigned {
        self.prepared = true;
        if matches!(self.support, Support::None) {
            return Assigned { vpid: 0, flush: Flush::None };
        }
        let current = tag.generation == self.generation && tag.cpu == self.cpu;
        let single = matches!(self.support, Support::SingleContext);
        if !current || (tag.flush && !single) {
            self.lease(tag);
        }
        let flush = if self.flush_all {
            Flush::All
        } else if tag.flush {
            Flush::Single
        } else {
            Flush::None
        };
        Assigned { vpid: tag.vpid, flush }
    }

    fn lease(&mut self, tag: &mut Tag) {
        if self.next > self.last as u32 {
            self.generation = self.generation.wrapping_add(1);
            self.next = 1;
            self.flush_all = true;
        }
        *tag = Tag { cpu: self.cpu, vpid: self.next as u16, generation: self.generation, flush: false };
        self.next = self.next.wrapping_add(1);
    }

    /// The VM entry that [`assign`](Self::assign) was for happened, or the embedder has flushed for it.
    #[inline]
    pub const fn entered(&mut self, tag: &mut Tag) {
        // An exit without an entry of ours (a state just restored) flushed nothing.
        if self.prepared {
            self.prepared = false;
            self.flush_all = false;
            tag.flush = false;
        }
    }

    /// The next entry on this CPU flushes every VPID.
    pub const fn flush_all(&mut self) {
        self.flush_all = true;
    }
}
