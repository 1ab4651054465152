//! Pages of memory: a bump allocator over the RAM that the image, its modules and the first MiB leave free.
//!
//! Pages are handed out once and never come back: an image runs for seconds.

use crate::multiboot::{BootInfo, Region};
use spin::Mutex;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Only memory below this address is mapped.
const MAPPED: u64 = 4 << 30;

/// Hands out physical memory in ascending order.
#[derive(Debug)]
pub struct Frames {
    free: Region,
}

impl Frames {
    /// The longest stretch of usable RAM above the image (which ends at `image_end`) that holds no module.
    pub fn new(boot: &BootInfo, image_end: u64) -> Frames {
        let first = boot.modules.iter().map(|m| m.end).fold(image_end, u64::max);
        let clip = |r: &Region| Region { start: r.start.max(first), end: r.end.min(MAPPED) };
        let free = boot.regions.iter().map(clip).filter(|r| r.start < r.end).max_by_key(|r| r.end - r.start);
        Frames { free: free.unwrap_or(Region { start: 0, end: 0 }) }
    }

    /// `bytes` of memory at a multiple of `align` (a power of two), or `None` when there is no more.
    pub fn allocate(&mut self, bytes: u64, align: u64) -> Option<u64> {
        let start = self.free.start.checked_next_multiple_of(align.max(PAGE))?;
        let end = start.checked_add(bytes)?.checked_next_multiple_of(PAGE)?;
        if end > self.free.end {
            return None;
        }
        self.free.start = end;
        Some(start)
    }

    /// Bytes that are left.
    pub fn left(&self) -> u64 {
        self.free.end - self.free.start
    }
}

static FRAMES: Mutex<Frames> = Mutex::new(Frames { free: Region { start: 0, end: 0 } });

/// Called once at boot.
#[cfg(freestanding)]
pub(crate) fn init(boot: &BootInfo, image_end: u64) {
    *FRAMES.lock() = Frames::new(boot, image_end);
}

/// From now on memory is handed out from `region` only: for an image that leaves all other memory to somebody else.
///
/// # Safety
/// `region` is RAM below 4 GiB that nothing else uses.
pub unsafe fn use_region(region: Region) {
    FRAMES.lock().free = region;
}

/// `bytes` of zeroed memory at a multiple of `align`, or `None`: its physical address, which is its virtual address too.
pub fn allocate(bytes: u64, align: u64) -> Option<*mut u8> {
    let start = FRAMES.lock().allocate(bytes, align)? as *mut u8;
    // SAFETY: the range is RAM that was handed to nobody else, below 4 GiB, which is mapped to itself.
    unsafe { core::ptr::write_bytes(start, 0, bytes as usize) };
    Some(start)
}

/// As [`allocate`], as a slice of zeroed values.
///
/// # Safety
/// All bits zero must be a valid `T`.
pub unsafe fn allocate_slice<T>(count: usize, align: u64) -> Option<&'static mut [T]> {
    let bytes = u64::try_from(size_of::<T>().checked_mul(count)?).ok()?;
    let start = allocate(bytes, align.max(align_of::<T>() as u64))?.cast::<T>();
    // SAFETY: the memory is exclusive, aligned, zeroed and never freed; zero is a valid `T` by this function's contract.
    Some(unsafe { core::slice::from_raw_parts_mut(start, count) })
}

/// Bytes that are left to allocate.
pub fn left() -> u64 {
    FRAMES.lock().left()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::multiboot::Module;

    fn boot() -> BootInfo {
        let mut boot = BootInfo::default();
        boot.regions.push(Region { start: 0, end: 0x9F000 });
        boot.regions.push(Region { start: 0x10_0000, end: 0x80_0000 });
        boot.modules.push(Module { start: 0x20_0000, end: 0x20_0123, command_line: Default::default() });
        boot
    }

    #[test]
    fn starts_behind_image_and_modules() {
        assert_eq!(Frames::new(&boot(), 0x18_0000).allocate(1, 1), Some(0x20_1000));
        assert_eq!(Frames::new(&boot(), 0x30_0000).allocate(1, 1), Some(0x30_0000));
    }

    #[test]
    fn aligns_and_never_overlaps() {
        let mut frames = Frames::new(&boot(), 0x18_0000);
        assert_eq!(frames.allocate(5000, 1), Some(0x20_1000));
        assert_eq!(frames.allocate(PAGE, 1), Some(0x20_3000));
        assert_eq!(frames.allocate(PAGE, 0x20_0000), Some(0x40_0000));
    }

    #[test]
    fn gives_the_last_page_and_then_nothing() {
        let mut frames = Frames::new(&boot(), 0x7F_E000);
        assert_eq!(frames.allocate(3 * PAGE, 1), None);
        assert_eq!(frames.allocate(2 * PAGE, 1), Some(0x7F_E000));
        assert_eq!((frames.allocate(1, 1), frames.left()), (None, 0));
        assert_eq!(frames.allocate(u64::MAX, 1), None);
    }
}
