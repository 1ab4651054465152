//! What the state machine works on during one call: the VP's hardware VMCSs, registers and bitmaps, the CPU's VPIDs,
//! L1's memory.
//!
//! The embedder owns all of it and lends it for the call.

use hvcore::addr::{Gva, Hpa, L1Gpa};

use crate::evmcs::ActivePage;
use crate::field::Field;
use crate::vpid::VpidPool;

/// MSR bitmap: low reads, high reads, low writes, high writes, 1 KiB each (SDM volume 3, "MSR-Bitmap Address").
pub type MsrBitmap = [u64; 512];
/// I/O bitmaps A and B, 4 KiB each, one after the other.
pub type IoBitmaps = [u64; 1024];

/// One hardware VMCS.
///
/// An implementation makes its VMCS current (VMPTRLD) when it is not, so a read or write of one VMCS after one of the
/// other costs a switch; the library groups its accesses. A field that the processor lacks reads as zero and its
/// writes are dropped.
pub trait Vmcs {
    /// VMREAD of `field`.
    fn read(&self, field: Field) -> u64;

    /// VMWRITE of `value` to `field`.
    fn write(&mut self, field: Field, value: u64);

    /// VMREAD of a field of at most 32 bits.
    #[inline]
    fn read32(&self, field: Field) -> u32 {
        self.read(field) as u32
    }
}

/// The registers that a VMCS does not hold, of the level that runs.
pub trait Gprs {
    /// The general-purpose register with encoding `n`, 0 (RAX) to 15; 4, RSP, is a VMCS field and never asked for.
    fn get(&self, n: u8) -> u64;

    /// Sets the general-purpose register with encoding `n`; never 4.
    fn set(&mut self, n: u8, value: u64);

    /// Sets CR2: a page fault is going to be injected.
    fn set_cr2(&mut self, value: u64);
}

/// A page fault of an access to linear memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// CR2: the first byte that could not be accessed.
    pub address: Gva,
    /// The error code.
    pub error_code: u32,
}

/// L1's linear memory. The embedder walks L1's page tables with the CR0, CR3, CR4, EFER, RFLAGS.AC and CPL of `vmcs`,
/// as the processor would for a data access of the guest that has just exited; accessed and dirty flags included.
///
/// What is not backed by memory reads as all ones, and writes to it are dropped. An access has at most 16 bytes and may
/// cross a page boundary: then nothing is written unless both pages can be.
pub trait Linear {
    /// Reads `buf.len()` bytes at `address`.
    fn read<V: Vmcs + ?Sized>(&self, vmcs: &V, address: Gva, buf: &mut [u8]) -> Result<(), PageFault>;

    /// Writes `bytes` at `address`.
    fn write<V: Vmcs + ?Sized>(&self, vmcs: &V, address: Gva, bytes: &[u8]) -> Result<(), PageFault>;
}

/// A bitmap that the processor reads while L2 runs, and where it is.
#[derive(Debug)]
pub struct MergedMap<'a, const WORDS: usize> {
    /// The bitmap, physically contiguous. Its contents are the library's from [`crate::NestedVmx::new`] on; all ones
    /// at first.
    pub words: &'a mut [u64; WORDS],
    /// Its physical address, page aligned.
    pub base: Hpa,
}

/// Everything one call works on.
///
/// `vmcs01` runs L1 and holds L1's state while L2 runs; `vmcs02` runs L2. General-purpose registers, CR2, the debug
/// registers but DR7, and extended state are of whichever level runs, as on the processor.
#[derive(Debug)]
pub struct Machine<'a, V: ?Sized, G: ?Sized, M: ?Sized, L: ?Sized> {
    /// L1's VMCS.
    pub vmcs01: &'a mut V,
    /// L2's VMCS.
    pub vmcs02: &'a mut V,
    /// The registers of the level that runs.
    pub gprs: &'a mut G,
    /// MSR bitmap for L2.
    pub msr_bitmap02: MergedMap<'a, 512>,
    /// I/O bitmaps for L2: A at the address, B 4 KiB above.
    pub io_bitmaps02: MergedMap<'a, 1024>,
    /// The embedder's own MSR bitmap, the one `vmcs01` points to.
    pub msr_bitmap01: &'a MsrBitmap,
    /// The embedder's own I/O bitmaps, those `vmcs01` points to; all zero when it uses none.
    pub io_bitmaps01: &'a IoBitmaps,
    /// The VPIDs of the physical CPU.
    pub vpids: &'a mut VpidPool,
    /// L1's VP assist page, while it is enabled: the enlightened VMCS is announced there.
    pub assist_page: Option<L1Gpa>,
    /// This VP's place in the partition's table of active enlightened VMCSs, where the embedder keeps one: then one page
    /// is in use on one VP only.
    pub active_evmcs: Option<ActivePage<'a>>,
    /// L1's memory.
    pub memory: &'a M,
    /// L1's memory by linear address.
    pub linear: &'a L,
}
