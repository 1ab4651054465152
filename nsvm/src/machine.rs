//! What the state machine works on during one call: the VP's VMCBs, registers and maps, the CPU's ASIDs, L1's memory.
//!
//! The embedder owns all of it and lends it for the call.

use hvcore::addr::{Hpa, Level};

use crate::asid::AsidPool;
use crate::vmcb::Vmcb;

/// MSR permission map: 2 bits per MSR, read at the even bit, write at the odd one; 8 KiB.
pub type MsrMap = [u64; 1024];
/// IO permission map: 1 bit per port; 12 KiB.
pub type IoMap = [u64; 1536];

/// The general-purpose registers that a VMCB does not hold, as far as SVM needs them.
pub trait Gprs {
    /// RCX.
    fn rcx(&self) -> u64;
    /// RDX.
    fn rdx(&self) -> u64;
    /// Sets RDX.
    fn set_rdx(&mut self, value: u64);
}

/// Fetches instruction bytes of a guest that just exited.
pub trait Code {
    /// Copies up to 15 bytes at the CS:RIP of `vmcb`, the guest of `level`, to `bytes`; how many were got. Fewer than
    /// an instruction make the library resume the guest, which then fetches (and faults) itself.
    fn fetch(&self, level: Level, vmcb: &Vmcb, bytes: &mut [u8; 15]) -> usize;

    /// True when the code at the CS:RIP of `vmcb`, the guest of `level`, begins with the bytes of `head`, from its low
    /// byte up, that `mask` selects; `false` when it does not, or when that is not known without more work.
    ///
    /// A `false` is followed by [`fetch`](Self::fetch), so this is for an embedder that knows quickly where the code of
    /// its guests' usual exits is.
    #[inline]
    fn begins_with(&self, _level: Level, _vmcb: &Vmcb, _head: u32, _mask: u32) -> bool {
        false
    }
}

/// A permission map that the processor reads while L2 runs, and where it is.
#[derive(Debug)]
pub struct MergedMap<'a, const WORDS: usize> {
    /// The map, physically contiguous. Its contents are the library's from [`crate::NestedSvm::new`] on; all ones at
    /// first.
    pub words: &'a mut [u64; WORDS],
    /// Its physical address, page aligned.
    pub base: Hpa,
}

/// Everything one call works on.
///
/// `vmcb01` runs L1 and holds L1's state while L2 runs; `vmcb02` runs L2. FS, GS, TR, LDTR, KernelGsBase, STAR, LSTAR,
/// CSTAR, SFMASK and SYSENTER_* of whichever level runs are in `vmcb01` between runs: the embedder executes VMLOAD
/// and VMSAVE on it around every VMRUN, of either VMCB.
#[derive(Debug)]
pub struct Machine<'a, G: ?Sized, M: ?Sized, C: ?Sized> {
    /// L1's VMCB.
    pub vmcb01: &'a mut Vmcb,
    /// L2's VMCB.
    pub vmcb02: &'a mut Vmcb,
    /// The registers of the level that runs.
    pub gprs: &'a mut G,
    /// MSR permission map for L2.
    pub msrpm02: MergedMap<'a, 1024>,
    /// IO permission map for L2.
    pub iopm02: MergedMap<'a, 1536>,
    /// The embedder's own MSR permission map, the one `vmcb01` points to.
    pub msrpm01: &'a MsrMap,
    /// The embedder's own IO permission map, the one `vmcb01` points to.
    pub iopm01: &'a IoMap,
    /// The ASIDs of the physical CPU.
    pub asids: &'a mut AsidPool,
    /// L1's memory.
    pub memory: &'a M,
    /// Instruction bytes.
    pub code: &'a C,
}
