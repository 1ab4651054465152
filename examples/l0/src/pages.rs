//! Memory of one VP: the pages that the hardware reads and writes, and what it takes from L0's heap.
//!
//! Used by [`crate::boot`] and [`crate::vp`] when a VP is made.

use core::mem::offset_of;

use hvcore::addr::Hpa;
use hvcore::shadow::{PagePool, PageRecord, ShadowPage};
use nsvm::npt::NptShadow;
use nsvm::vmcb::Vmcb;

use crate::fatal::Failure;
use crate::relocate::phys_of;

/// The pages of one VP that the hardware reads and writes.
#[repr(C, align(4096))]
pub struct Pages {
    /// Runs L1; also holds the VMLOAD state of whatever guest runs.
    pub vmcb01: Vmcb,
    /// Runs L2.
    pub vmcb02: Vmcb,
    /// L0's own VMLOAD state.
    pub host_state: Vmcb,
    /// VM_HSAVE_PA.
    pub host_save: Vmcb,
    /// MSR permission map of L2.
    pub msrpm02: nsvm::MsrMap,
    /// IO permission map of L2.
    pub iopm02: nsvm::IoMap,
}

impl Pages {}

/// Physical addresses of [`Pages`].
#[derive(Clone, Copy, Debug)]
pub struct PagesPa {
    /// Of `vmcb01`.
    pub vmcb01: u64,
    /// Of `vmcb02`.
    pub vmcb02: u64,
    /// Of `host_state`.
    pub host_state: u64,
    /// Of `host_save`.
    pub host_save: u64,
    /// Of `msrpm02`.
    pub msrpm02: u64,
    /// Of `iopm02`.
    pub iopm02: u64,
}

impl PagesPa {
    /// The addresses of pages that start at physical address `base`.
    pub const fn at(base: u64) -> Self {
        Self {
            vmcb01: base + offset_of!(Pages, vmcb01) as u64,
            vmcb02: base + offset_of!(Pages, vmcb02) as u64,
            host_state: base + offset_of!(Pages, host_state) as u64,
            host_save: base + offset_of!(Pages, host_save) as u64,
            msrpm02: base + offset_of!(Pages, msrpm02) as u64,
            iopm02: base + offset_of!(Pages, iopm02) as u64,
        }
    }
}

/// Keeps `value` for good.
pub fn keep<T>(value: T) -> Result<&'static mut T, Failure> {
    let place = rt::frames::allocate(size_of::<T>() as u64, align_of::<T>() as u64).ok_or(Failure::OutOfPages)?;
    let place = place.cast::<T>();
    // SAFETY: the memory is exclusive, large and aligned enough, and never freed.
    unsafe {
        place.write(value);
        Ok(&mut *place)
    }
}

/// Pages of shadow tables per VP.
pub const SHADOW_PAGES: usize = 128;

/// Shadow tables for one VP, empty.
pub fn shadow_tables() -> Result<NptShadow<'static>, Failure> {
    NptShadow::new(shadow_pool()?, 4).map_err(|_| Failure::OutOfPages)
}

/// The pages of one VP's shadow tables.
pub fn shadow_pool() -> Result<PagePool<'static>, Failure> {
    // SAFETY: zero is a valid shadow page: 512 entries that are not present.
    let pages = unsafe { rt::frames::allocate_slice::<ShadowPage>(SHADOW_PAGES, 4096) }.ok_or(Failure::OutOfPages)?;
    let records = rt::frames::allocate((SHADOW_PAGES * size_of::<PageRecord>()) as u64, 4096);
    let records = records.ok_or(Failure::OutOfPages)?.cast::<PageRecord>();
    for i in 0..SHADOW_PAGES {
        // SAFETY: inside the memory just allocated, which is large enough and aligned to a page.
        unsafe { records.add(i).write(PageRecord::new()) };
    }
    // SAFETY: initialised above, exclusive, never freed.
    let records = unsafe { core::slice::from_raw_parts_mut(records, SHADOW_PAGES) };
    let base = phys_of(pages.as_ptr());
    PagePool::new(pages, records, |i| Hpa::new(base + 4096 * i as u64)).map_err(|_| Failure::OutOfPages)
}
