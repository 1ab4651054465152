//! L0 moves itself and its modules to the top of memory below 4 GiB, so that L1 has the rest in one piece.
//!
//! The image keeps its virtual addresses, at the top of the address space; from the move on they lead to the copy.
//! Physical memory, L1's included, is reached at [`DIRECT_MAP`]. Memory below 4 GiB is also mapped to itself until all
//! processors have started ([`forget_low`]). Used once, by [`crate::boot`], before anything is allocated and before
//! other processors run.

use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;

use crate::loader::Module;
use crate::memory::{DIRECT_MAP, FOUR_GIB, Range, phys_to_virt};
use crate::npt01::{OutOfPages, TablePage, bits};

const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Virtual minus physical address of the image where the boot loader puts it.
const IMAGE_OFFSET: u64 = match u64::from_str_radix(env!("IMAGE_OFFSET"), 16) {
    Ok(offset) => offset,
    Err(_) => panic!("the build script states no address"),
};

/// Physical minus virtual address of the image. Written once, at the move.
static MOVED_BY: AtomicU64 = AtomicU64::new(0u64.wrapping_sub(IMAGE_OFFSET));

/// Physical address of `object`, a static of the image or memory of its heap.
pub fn phys_of<T: ?Sized>(object: *const T) -> u64 {
    // Relaxed: written before other processors exist.
    (object.cast::<u8>() as u64).wrapping_add(MOVED_BY.load(Ordering::Relaxed))
}

/// Where the boot loader put the image that runs at the virtual addresses `image`.
pub fn loaded_at(image: Range) -> Range {
    Range { start: image.start.wrapping_sub(IMAGE_OFFSET), end: image.end.wrapping_sub(IMAGE_OFFSET) }
}

/// Pages that L0's own tables need for `memory` bytes of physical memory: the top, one table for each of the two maps,
/// one directory for each GiB, and two tables for the image.
pub const fn table_pages(memory: u64) -> usize {
    5 + memory.div_ceil(GIB) as usize
}

/// Where the image can go: as high below 4 GiB as RAM that ends at `low_end` allows, clear of the image itself and of
/// `modules`; `None`: it stays. `image` is a multiple of 2 MiB at both ends.
pub fn destination<'a>(image: Range, low_end: u64, modules: impl IntoIterator<Item = &'a Module<'a>>) -> Option<Range> {
    let size = image.end - image.start;
    let start = low_end.min(FOUR_GIB).checked_sub(size)? & !(MIB2 - 1);
    let target = Range { start, end: start + size };
    let clear = start >= image.end && modules.into_iter().all(|m| !m.range.overlaps(target));
    clear.then_some(target)
}

/// Fills L0's own tables in `pages` (statics of the image, zero): the virtual addresses of `image`, which lead to the
/// physical ones of `target`; the first 4 GiB at their own addresses; and physical memory up to `end` at `DIRECT_MAP`.
/// The value for CR3. The image lies in one GiB, and in a part of the address space of its own.
///
/// The tables hold the addresses that they have after the move.
pub fn tables(pages: &[TablePage], image: Range, target: Range, end: u64) -> Result<u64, OutOfPages> {
    let offset = target.start.wrapping_sub(image.start);
    let pa = |page: usize| (&raw const pages[page] as u64).wrapping_add(offset) | bits::HOST_TABLE;
    let gibs = end.max(FOUR_GIB).div_ceil(GIB) as usize;
    if pages.len() < table_pages(end.max(FOUR_GIB)) || gibs > 512 {
        return Err(OutOfPages);
    }
    let (top, low, direct, high, window, directories) = (0, 1, 2, 3, 4, 5);
    pages[top].set(0, pa(low));
    pages[top].set((DIRECT_MAP >> 39) as usize & 511, pa(direct));
    pages[top].set((image.start >> 39) as usize & 511, pa(high));
    for gib in 0..gibs {
        for i in 0..512 {
            pages[directories + gib].set(i, large(gib as u64 * GIB + i as u64 * MIB2));
        }
        pages[direct].set(gib, pa(directories + gib));
        if gib < 4 {
            pages[low].set(gib, pa(directories + gib));
        }
    }
    pages[high].set((image.start >> 30) as usize & 511, pa(window));
    for va in (image.start..image.end).step_by(MIB2 as usize) {
        pages[window].set((va >> 21) as usize & 511, large(va.wrapping_add(offset)));
    }
    Ok((&raw const pages[top] as u64).wrapping_add(offset))
}

/// Takes the memory below 4 GiB at its own addresses out of the tables in `pages`, which [`tables`] filled: an address
/// of L1's that is taken for one of L0's faults from now on. Each processor writes CR3 to forget it.
pub fn forget_low(pages: &[TablePage]) {
    pages[0].set(0, 0);
}

/// The entry for the 2 MiB at `pa`; devices below 4 GiB are not cached.
fn large(pa: u64) -> u64 {
    pa | bits::HOST_LARGE | if (0xc000_0000..FOUR_GIB).contains(&pa) { bits::UNCACHED } else { 0 }
}

/// Copies the image, which runs at the virtual addresses `image`, to `target` and goes on there, on the tables of `cr3`.
///
/// # Safety
/// `cr3` is from [`tables`] for the same ranges; `target` is free RAM, mapped at its own address now; interrupts are
/// off and no other processor runs the image.
pub unsafe fn go(image: Range, target: Range, cr3: u64) {
    MOVED_BY.store(target.start.wrapping_sub(image.start), Ordering::Relaxed);
    // SAFETY: the ranges do not overlap, are mapped, and the copy is what the new tables show at the image's addresses,
    // this code and its stack included; nothing is written between the copy and the switch.
    unsafe {
        core::arch::asm!(
            "rep movsq",
            "mov cr3, {cr3}",
            cr3 = in(reg) cr3,
            inout("rsi") image.start => _,
            inout("rdi") target.start => _,
            inout("rcx") (image.end - image.start) / 8 => _,
            options(nostack),
        );
    }
}

/// Moves `modules` up to below `limit`, each at a page boundary, as far as they go up at all.
///
/// # Safety
/// [`go`] has run. RAM up to `limit` is nobody else's.
pub unsafe fn move_modules<const N: usize>(modules: &mut ArrayVec<Module<'_>, N>, limit: u64) {
    let mut limit = limit;
    let mut done = [false; N];
    // The highest first: it goes where no other lies.
    while let Some((i, module)) =
        (0..).zip(modules.iter_mut()).filter(|(i, _)| !done[*i]).max_by_key(|(_, m)| m.range.start)
    {
        let size = module.range.end - module.range.start;
        let Some(to) = limit.checked_sub(size).map(|to| to & !0xfff).filter(|to| *to >= module.range.start) else {
            return;
        };
        // SAFETY: both are RAM, mapped; what lies above is moved already, what lies below is below this one.
        unsafe { core::ptr::copy(phys_to_virt::<u8>(module.range.start), phys_to_virt(to), size as usize) };
        module.range = Range { start: to, end: to + size };
        done[i] = true;
        limit = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(start: u64, end: u64) -> Module<'static> {
        Module { range: Range { start, end }, string: b"" }
    }

    /// Where it is loaded, and where it runs.
    const IMAGE: Range = Range { start: 64 << 20, end: 90 << 20 };
    const HIGH: Range = Range { start: 0xffff_ffff_8400_0000, end: 0xffff_ffff_85a0_0000 };

    #[test]
    fn the_image_goes_to_the_top_if_that_is_free() {
        let top = Range { start: (512 - 26) << 20, end: 512 << 20 };
        assert_eq!(destination(IMAGE, 512 << 20, []), Some(top));
        assert_eq!(destination(IMAGE, (512 << 20) + 4096, []), Some(top));
        assert_eq!(destination(IMAGE, 0xffff_ffff_f000, []).map(|r| r.end), Some(4 << 30));
        // Just clear of itself, and not.
        assert_eq!(destination(IMAGE, 116 << 20, []).map(|r| r.start), Some(90 << 20));
        assert_eq!(destination(IMAGE, 115 << 20, []), None);
        assert_eq!(destination(IMAGE, 512 << 20, [&module(480 << 20, 486 << 20)]), Some(top));
        assert_eq!(destination(IMAGE, 512 << 20, [&module(480 << 20, (486 << 20) + 1)]), None);
    }

    #[test]
    fn the_image_keeps_its_addresses_and_memory_is_all_there() {
        let pages: Vec<TablePage> = (0..table_pages(FOUR_GIB)).map(|_| TablePage::new()).collect();
        let target = Range { start: 200 << 20, end: 226 << 20 };
        let cr3 = tables(&pages, HIGH, target, 0).unwrap();
        let base = pages.as_ptr() as u64;
        let offset = target.start.wrapping_sub(HIGH.start);
        assert_eq!(cr3, base.wrapping_add(offset));
        let walk = |va: u64| {
            let table = |entry: u64| {
                let at =
                    (entry & 0x000f_ffff_ffff_f000).wrapping_sub(base.wrapping_add(offset) & 0x000f_ffff_ffff_f000);
                (entry & 1 != 0).then(|| &pages[at as usize / 4096])
            };
            let e = pages[0].entry((va >> 39) as usize & 511);
            let e = table(e)?.entry((va >> 30) as usize & 511);
            let e = table(e)?.entry((va >> 21) as usize & 511);
            (e & 1 != 0).then_some((e & 0x000f_ffff_ffe0_0000) + (va & 0x1f_ffff))
        };
        assert_eq!(walk(HIGH.start), Some(target.start));
        assert_eq!(walk(HIGH.end - 1), Some(target.end - 1));
        assert_eq!((walk(HIGH.start - 1), walk(HIGH.end)), (None, None));
        assert_eq!(walk(DIRECT_MAP + IMAGE.start + 5), Some(IMAGE.start + 5));
        assert_eq!((walk(0xfee0_0000), walk(IMAGE.start)), (Some(0xfee0_0000), Some(IMAGE.start)));
        assert!(tables(&pages[1..], HIGH, target, 0).is_err());
        forget_low(&pages);
        assert_eq!((walk(0xfee0_0000), walk(0x8000)), (None, None));
        assert_eq!(walk(HIGH.start), Some(target.start));
    }
}
