//! The overlay pages: where they are, what they hold, and guest memory as L1 sees it through them.
//!
//! Used by the embedder, which maps the pages in L1's second stage, and around every engine's guest memory; uses
//! `interface`. The RAM beneath an overlay is untouched and reappears when the overlay goes. The VP assist page is RAM
//! and so not among them.

use super::config::Vendor;
use super::interface::Interface;
use super::sync::Ordering;
use crate::addr::{L1Gpa, PAGE_SIZE};
use crate::memory::{GuestMemory, MemoryError};
use tlfs_abi::msr::ReferenceTscPage;
use zerocopy::IntoBytes;

/// A page that the interface lays over the partition's RAM. Read-only for the guest; where two lie at one address, the
/// first is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overlay {
    /// The code that issues a hypercall. Executable.
    HypercallPage,
    /// The parameters of the reference time.
    ReferenceTscPage,
}

impl Overlay {
    /// All of them, the first one uppermost.
    pub const ALL: [Self; 2] = [Self::HypercallPage, Self::ReferenceTscPage];
}

/// An overlay page appears, goes, or moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayChange {
    /// Which page.
    pub which: Overlay,
    /// Where it was: the RAM beneath reappears there.
    pub from: Option<L1Gpa>,
    /// Where it is now.
    pub to: Option<L1Gpa>,
}

/// INT3: what the hypercall page holds beyond its code.
const FILLER: u8 = 0xCC;

impl Interface {
    /// Where the overlay page is, if it is enabled.
    pub fn overlay(&self, which: Overlay) -> Option<L1Gpa> {
        match which {
            Overlay::HypercallPage => self.hypercall_page(),
            Overlay::ReferenceTscPage => self.reference_tsc_page(),
        }
    }

    /// Copies the bytes of an overlay page from `offset` on to `out`; zeros beyond the page's end.
    ///
    /// An embedder fills the page it maps with this, and again after [`migrated`](Interface::migrated).
    pub fn overlay_contents(&self, which: Overlay, offset: usize, out: &mut [u8]) {
        let code: [u8; 4];
        let page: ReferenceTscPage;
        let (head, filler): (&[u8], u8) = match which {
            Overlay::HypercallPage => {
                code = hypercall_code(self.vendor());
                (&code, FILLER)
            }
            Overlay::ReferenceTscPage => {
                page = self.reference_tsc_contents();
                (page.as_bytes(), 0)
            }
        };
        let page = head.iter().copied().chain(core::iter::repeat(filler)).take(PAGE_SIZE as usize);
        for (to, from) in out.iter_mut().zip(page.chain(core::iter::repeat(0)).skip(offset)) {
            *to = from;
        }
    }

    fn reference_tsc_contents(&self) -> ReferenceTscPage {
        // Acquire: the parameters read after are at least as new as the sequence.
        let tsc_sequence = self.tsc_sequence.load(Ordering::Acquire);
        ReferenceTscPage {
            tsc_sequence,
            reserved_04: 0,
            tsc_scale: self.tsc_scale.load(Ordering::Relaxed),
            tsc_offset: self.tsc_offset.load(Ordering::Relaxed),
        }
    }

    /// The uppermost overlay at the page of `gpa`.
    fn overlay_at(&self, gpa: L1Gpa) -> Option<Overlay> {
        Overlay::ALL.into_iter().find(|&which| self.overlay(which) == Some(gpa.page()))
    }

    /// True when one of `length` bytes from `gpa` on is on an overlay page. Wraps like the addresses themselves.
    fn overlaid(&self, gpa: L1Gpa, length: usize) -> bool {
        let bytes = (length as u64).wrapping_add(gpa.page_offset());
        length != 0
            && Overlay::ALL
                .into_iter()
                .filter_map(|which| self.overlay(which))
                .any(|page| page.raw().wrapping_sub(gpa.page().raw()) < bytes)
    }
}

/// VMCALL or VMMCALL, then RET.
const fn hypercall_code(vendor: Vendor) -> [u8; 4] {
    match vendor {
        Vendor::Intel => [0x0F, 0x01, 0xC1, 0xC3],
        Vendor::Amd => [0x0F, 0x01, 0xD9, 0xC3],
    }
}

/// Guest memory as L1 sees it: overlay pages where they are enabled, the RAM of `M` elsewhere.
///
/// Overlay pages are read-only: a write that touches one is refused whole, as is a compare-exchange.
#[derive(Clone, Copy, Debug)]
pub struct OverlayMemory<'a, M> {
    memory: M,
    interface: &'a Interface,
}

impl<'a, M> OverlayMemory<'a, M> {
    /// `memory` under the overlays of `interface`.
    pub const fn new(memory: M, interface: &'a Interface) -> Self {
        Self { memory, interface }
    }

    /// The RAM beneath.
    pub const fn beneath(&self) -> &M {
        &self.memory
    }

    fn writable(&self, gpa: L1Gpa, length: usize) -> Result<(), MemoryError> {
        if self.interface.overlaid(gpa, length) { Err(MemoryError) } else { Ok(()) }
    }
}

impl<M: GuestMemory> OverlayMemory<'_, M> {
    /// Page by page, where an overlay is among them.
    #[cold]
    fn read_overlaid(&self, mut gpa: L1Gpa, mut buf: &mut [u8]) -> Result<(), MemoryError> {
        while !buf.is_empty() {
            let room = PAGE_SIZE.saturating_sub(gpa.page_offset()) as usize;
            let (part, rest) = buf.split_at_mut_checked(room.min(buf.len())).ok_or(MemoryError)?;
            match self.interface.overlay_at(gpa) {
                Some(which) => self.interface.overlay_contents(which, gpa.page_offset() as usize, part),
                None => self.memory.read(gpa, part)?,
            }
            gpa = L1Gpa::new(gpa.raw().wrapping_add(part.len() as u64));
            buf = rest;
        }
        Ok(())
    }
}

impl<M: GuestMemory> GuestMemory for OverlayMemory<'_, M> {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if self.interface.overlaid(gpa, buf.len()) { self.read_overlaid(gpa, buf) } else { self.memory.read(gpa, buf) }
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.writable(gpa, buf.len())?;
        self.memory.write(gpa, buf)
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        self.writable(gpa, 1)?;
        self.memory.compare_exchange_u8(gpa, current, new)
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        self.writable(gpa, 4)?;
        self.memory.compare_exchange_u32(gpa, current, new)
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        self.writable(gpa, 8)?;
        self.memory.compare_exchange_u64(gpa, current, new)
    }
}
