//! The pages of one VP that the hardware reads and writes.

use core::mem::offset_of;

use hvcore::addr::Hpa;

use crate::fatal::Failure;
use crate::relocate::phys_of;

/// One VP's pages. Zero is a valid value.
#[repr(C, align(4096))]
pub struct Pages {
    /// The VMXON region.
    pub vmxon: [u32; 1024],
    /// Runs L1.
    pub vmcs01: [u32; 1024],
    /// Runs L2.
    pub vmcs02: [u32; 1024],
    /// Written by nobody but the processor, read by nobody.
    pub spare: [u32; 1024],
    /// MSR bitmap of L2.
    pub msr_bitmap02: [u64; 512],
    /// I/O bitmaps of L2.
    pub io_bitmaps02: [u64; 1024],
}

impl Pages {
    /// Fresh ones, all zero: too large for the stack.
    pub fn allocate() -> Result<&'static mut Self, Failure> {
        // SAFETY: zero is a valid value: words.
        let pages = unsafe { rt::frames::allocate_slice::<Self>(1, 4096) };
        pages.and_then(<[Self]>::first_mut).ok_or(Failure::OutOfPages)
    }
}

/// Physical addresses of [`Pages`].
#[derive(Clone, Copy, Debug)]
pub struct PagesPa {
    /// Of `vmxon`.
    pub vmxon: u64,
    /// Of `vmcs01`.
    pub vmcs01: u64,
    /// Of `vmcs02`.
    pub vmcs02: u64,
    /// Of `spare`.
    pub spare: u64,
    /// Of `msr_bitmap02`.
    pub msr_bitmap02: Hpa,
    /// Of `io_bitmaps02`.
    pub io_bitmaps02: Hpa,
}

impl PagesPa {
    /// The addresses of `pages`, memory of L0's heap.
    pub fn of(pages: &Pages) -> Self {
        let base = phys_of(&raw const *pages);
        Self {
            vmxon: base + offset_of!(Pages, vmxon) as u64,
            vmcs01: base + offset_of!(Pages, vmcs01) as u64,
            vmcs02: base + offset_of!(Pages, vmcs02) as u64,
            spare: base + offset_of!(Pages, spare) as u64,
            msr_bitmap02: Hpa::new(base + offset_of!(Pages, msr_bitmap02) as u64),
            io_bitmaps02: Hpa::new(base + offset_of!(Pages, io_bitmaps02) as u64),
        }
    }
}
