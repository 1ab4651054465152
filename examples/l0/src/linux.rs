//! Loads a Linux bzImage as L1 by the 32-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).
//!
//! The kernel goes where it prefers if L1 has RAM there, else to the first place that is large enough: it is
//! relocatable. The initial RAM disk stays where the boot loader put it.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

use crate::loader::{LoadError, Module, Region, Target, u16_at, u32_at, u64_at};
use crate::memory::Range;

/// "HdrS", in the setup header.
const MAGIC: u32 = 0x5372_6448;
const HEADER: usize = 0x1f1;
/// Where the boot parameters, the command line and the segment table are written.
const PARAMS: u64 = 0x1_0000;
const GDT: u64 = 0x1_1000;
const CMDLINE: u64 = 0x1_2000;
const CMDLINE_MAX: usize = 2048;
const MAX_E820: usize = 128;

/// How Linux starts: 32-bit protected mode, CS = 0x10, data segments 0x18, ESI = boot parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// EIP.
    pub eip: u32,
    /// ESI: the boot parameters.
    pub params: u32,
    /// Base of the segment table: 32 bytes.
    pub gdt: u32,
}

/// True when `image` is a bzImage.
pub fn is_bzimage(image: &[u8]) -> bool {
    u32_at(image, 0x202) == Some(MAGIC) && u16_at(image, 0x206).is_some_and(|version| version >= 0x20a)
}

/// Loads `image` with `cmdline` and the initial RAM disk `initrd`; `modules` are all files that must not be
/// overwritten, the image itself excepted, and `map` is the memory map that L1 sees.
pub fn load<M: GuestMemory + ?Sized>(
    memory: &M,
    image: &[u8],
    cmdline: &[u8],
    initrd: Option<&Module<'_>>,
    modules: &[Module<'_>],
    map: &[Region],
) -> Result<Entry, LoadError> {
    let bad = LoadError::BadImage;
    let setup = match *image.get(HEADER).ok_or(bad)? {
        0 => 4,
        n => usize::from(n),
    };
    let kernel = image.get((setup + 1) * 512..).ok_or(bad)?;
    let init_size = u64::from(u32_at(image, 0x260).ok_or(bad)?).max(kernel.len() as u64);
    let preferred = u64_at(image, 0x258).ok_or(bad)?;
    let alignment = u64::from(u32_at(image, 0x230).ok_or(bad)?).max(4096);
    let at = place(preferred, init_size, alignment, modules, map).ok_or(LoadError::NoRam { at: preferred })?;
    Target { memory, modules }.segment(at, kernel, kernel.len() as u64)?;

    let mut params = [0u8; 4096];
    // The setup header ends where its jump at 0x200 leads.
    let end = 0x202 + usize::from(*image.get(0x201).ok_or(bad)?);
    let header = image.get(HEADER..end).ok_or(bad)?;
    params.get_mut(HEADER..end).ok_or(bad)?.copy_from_slice(header);
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = params.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0x210, &[0xff]);
    put(0x1fa, &0xffffu16.to_le_bytes());
    put(0x214, &(at as u32).to_le_bytes());
    put(0x228, &(CMDLINE as u32).to_le_bytes());
    if let Some(initrd) = initrd {
        put(0x218, &(initrd.range.start as u32).to_le_bytes());
        put(0x21c, &((initrd.range.end - initrd.range.start) as u32).to_le_bytes());
    }
    let entries = map.len().min(MAX_E820);
    put(0x1e8, &[entries as u8]);
    for (i, region) in map.iter().take(entries).enumerate() {
        let at = 0x2d0 + 20 * i;
        put(at, &region.range.start.to_le_bytes());
        put(at + 8, &(region.range.end - region.range.start).to_le_bytes());
        put(at + 16, &region.kind.to_le_bytes());
    }
    let no_ram = |_| LoadError::NoRam { at: PARAMS };
    memory.write(L1Gpa::new(PARAMS), &params).map_err(no_ram)?;
    // Flat 32-bit code at selector 0x10, data at 0x18.
    let gdt = [0u64, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (i, descriptor) in gdt.iter().enumerate() {
        memory.write_u64(L1Gpa::new(GDT + 8 * i as u64), *descriptor).map_err(no_ram)?;
    }
    let line = cmdline.get(..CMDLINE_MAX).unwrap_or(cmdline);
    memory.write(L1Gpa::new(CMDLINE), line).map_err(no_ram)?;
    memory.write(L1Gpa::new(CMDLINE + line.len() as u64), &[0]).map_err(no_ram)?;
    Ok(Entry { eip: at as u32, params: PARAMS as u32, gdt: GDT as u32 })
}

/// An address for `size` bytes: `preferred` where L1 has RAM and no file lies, else the lowest above it.
fn place(preferred: u64, size: u64, alignment: u64, modules: &[Module<'_>], map: &[Region]) -> Option<u64> {
    let candidates = map.iter().map(|r| r.range.start).chain(modules.iter().map(|m| m.range.end));
    let starts = core::iter::once(preferred).chain(candidates.map(|c| c.max(preferred).next_multiple_of(alignment)));
    let fits = |start: &u64| {
        let range = Range { start: *start, end: *start + size };
        range.end <= 1 << 32
            && map.iter().any(|r| r.kind == 1 && r.range.start <= range.start && range.end <= r.range.end)
            && !modules.iter().any(|m| m.range.overlaps(range))
    };
    starts.filter(fits).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, end: u64, kind: u32) -> Region {
        Region { range: Range { start, end }, kind }
    }

    #[test]
    fn kernels_go_where_they_prefer_or_behind_what_is_in_the_way() {
        let map = [region(0, 0x9f000, 1), region(1 << 20, 64 << 20, 1), region(90 << 20, 200 << 20, 1)];
        assert_eq!(place(16 << 20, 48 << 20, 2 << 20, &[], &map), Some(16 << 20));
        assert_eq!(place(16 << 20, (48 << 20) + 1, 2 << 20, &[], &map), Some(90 << 20));
        let file = Module { range: Range { start: 91 << 20, end: (95 << 20) + 5 }, string: b"" };
        assert_eq!(place(16 << 20, 49 << 20, 2 << 20, &[file], &map), Some(96 << 20));
        assert_eq!(place(16 << 20, 111 << 20, 2 << 20, &[], &map), None);
    }
}
