//! Loads L1: a multiboot1 kernel (ELF32, ELF64 or address fields), its command line and modules, and the memory map
//! that L1 sees.
//!
//! Called once, by the boot processor. It writes only through [`GuestMemory`], so nothing can land on L0. Modules stay
//! where the boot loader put them.

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};

use crate::memory::Range;

/// EAX at the entry of a multiboot1 kernel.
pub const BOOT_MAGIC: u32 = 0x2bad_b002;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header carries load addresses.
const HEADER_ADDRESSES: u32 = 1 << 16;
/// Where the information for L1 is written: the place QEMU's own loader uses, free RAM below 1 MiB.
const INFO: u64 = 0x9000;
const INFO_END: u64 = 0xf000;

/// A module as the boot loader left it.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Physical addresses of its bytes.
    pub range: Range,
    /// Its command line, without the final zero.
    pub string: &'a [u8],
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Addresses.
    pub range: Range,
    /// Type as in E820: 1 RAM, 2 reserved, 3 ACPI reclaimable, 4 ACPI NVS.
    pub kind: u32,
}

/// How L1 starts: 32-bit protected mode without paging, EAX = [`BOOT_MAGIC`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// EIP.
    pub eip: u32,
    /// EBX: the multiboot information.
    pub info: u32,
}

/// Why L1 cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// No multiboot1 header in the first 8 KiB of the file.
    NoHeader,
    /// Neither address fields nor an x86 ELF file, or one that is cut short.
    BadImage,
    /// A segment goes where L1 has no RAM, or where L0 lives.
    NoRam {
        /// The physical address asked for.
        at: u64,
    },
    /// A segment would overwrite a module.
    OverModule {
        /// The physical address asked for.
        at: u64,
    },
    /// Command lines, modules and memory map do not fit the place for them.
    InfoTooLong,
}

pub(crate) fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

pub(crate) fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(crate) fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Offset and flags of the multiboot1 header.
fn header(image: &[u8]) -> Option<(usize, u32)> {
    (0..8192.min(image.len())).step_by(4).find_map(|at| {
        let (magic, flags, sum) = (u32_at(image, at)?, u32_at(image, at + 4)?, u32_at(image, at + 8)?);
        (magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(sum) == 0).then_some((at, flags))
    })
}

pub(crate) struct Target<'a, M: ?Sized> {
    pub(crate) memory: &'a M,
    pub(crate) modules: &'a [Module<'a>],
}

impl<M: GuestMemory + ?Sized> Target<'_, M> {
    /// Copies `bytes` to `at` and clears up to `size` bytes from there.
    pub(crate) fn segment(&self, at: u64, bytes: &[u8], size: u64) -> Result<(), LoadError> {
        let range = Range { start: at, end: at.checked_add(size).ok_or(LoadError::BadImage)? };
        if self.modules.iter().any(|m| m.range.overlaps(range)) {
            return Err(LoadError::OverModule { at });
        }
        let no_ram = |_: MemoryError| LoadError::NoRam { at };
        let bytes = bytes.get(..size.min(bytes.len() as u64) as usize).unwrap_or(bytes);
        self.memory.write(L1Gpa::new(at), bytes).map_err(no_ram)?;
        let zeros = [0; 512];
        let mut at = at + bytes.len() as u64;
        while at < range.end {
            let n = (range.end - at).min(512);
            self.memory.write(L1Gpa::new(at), zeros.get(..n as usize).unwrap_or(&zeros)).map_err(no_ram)?;
            at += n;
        }
        Ok(())
    }

    fn elf(&self, image: &[u8]) -> Result<u32, LoadError> {
        self.elf_segments(image).ok_or(LoadError::BadImage)?
    }

    fn elf_segments(&self, image: &[u8]) -> Option<Result<u32, LoadError>> {
        if image.get(..4)? != b"\x7fELF" {
            return None;
        }
        let wide = match *image.get(4)? {
            1 => false,
            2 => true,
            _ => return None,
        };
        let word = |at: usize| if wide { u64_at(image, at) } else { u32_at(image, at).map(u64::from) };
        let entry = word(24)?;
        let table = word(if wide { 32 } else { 28 })? as usize;
        let size = usize::from(u16_at(image, if wide { 54 } else { 42 })?);
        let count = usize::from(u16_at(image, if wide { 56 } else { 44 })?);
        let mut entry_pa = entry;
        for i in 0..count {
            let at = table.checked_add(i * size)?;
            if u32_at(image, at)? != 1 {
                continue;
            }
            let (offset, va, pa, file, mem) = if wide {
                (word(at + 8)?, word(at + 16)?, word(at + 24)?, word(at + 32)?, word(at + 40)?)
            } else {
                (word(at + 4)?, word(at + 8)?, word(at + 12)?, word(at + 16)?, word(at + 20)?)
            };
            let end = (offset as usize).checked_add(file as usize)?;
            if let Err(e) = self.segment(pa, image.get(offset as usize..end)?, mem) {
                return Some(Err(e));
            }
            // Entry points are given as virtual addresses: find the segment that holds it.
            if (va..va.checked_add(mem)?).contains(&entry) {
                entry_pa = entry - va + pa;
            }
        }
        Some(u32::try_from(entry_pa).map_err(|_| LoadError::BadImage))
    }

    fn addresses(&self, image: &[u8], header: usize) -> Result<u32, LoadError> {
        let field = |n: usize| u32_at(image, header + 12 + 4 * n).ok_or(LoadError::BadImage);
        let (header_pa, load, load_end, bss_end, entry) = (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
        let start = header.checked_sub(header_pa.wrapping_sub(load) as usize).ok_or(LoadError::BadImage)?;
        let end = if load_end == 0 { image.len() } else { start + load_end.wrapping_sub(load) as usize };
        let bytes = image.get(start..end.min(image.len())).ok_or(LoadError::BadImage)?;
        let size = if bss_end == 0 { bytes.len() as u64 } else { u64::from(bss_end.wrapping_sub(load)) };
        self.segment(u64::from(load), bytes, size.max(bytes.len() as u64))?;
        Ok(entry)
    }
}

/// Writes structures one after another.
struct Info<'a, M: ?Sized> {
    memory: &'a M,
    at: u64,
}

impl<M: GuestMemory + ?Sized> Info<'_, M> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<u32, LoadError> {
        let at = self.at;
        let end = at + bytes.len() as u64;
        if end > INFO_END {
            return Err(LoadError::InfoTooLong);
        }
        self.memory.write(L1Gpa::new(at), bytes).map_err(|_| LoadError::NoRam { at })?;
        self.at = end;
        Ok(at as u32)
    }

    fn string(&mut self, bytes: &[u8]) -> Result<u32, LoadError> {
        let at = self.bytes(bytes)?;
        self.bytes(&[0])?;
        Ok(at)
    }

    fn words(&mut self, words: &[u32]) -> Result<u32, LoadError> {
        let at = self.at as u32;
        for w in words {
            self.bytes(&w.to_le_bytes())?;
        }
        Ok(at)
    }

    fn align(&mut self) {
        self.at = (self.at + 7) & !7;
    }
}

/// The memory map for L1: that of the machine with `hole` reserved. `f` gets each entry, in ascending order where the
/// machine's map is.
pub fn memory_map(machine: impl Iterator<Item = Region>, hole: Range, mut f: impl FnMut(Region)) {
    for region in machine {
        let r = region.range;
        if region.kind != 1 || !r.overlaps(hole) {
            f(region);
            continue;
        }
        if r.start < hole.start {
            f(Region { range: Range { start: r.start, end: hole.start }, kind: 1 });
        }
        f(Region { range: Range { start: hole.start.max(r.start), end: hole.end.min(r.end) }, kind: 2 });
        if hole.end < r.end {
            f(Region { range: Range { start: hole.end, end: r.end }, kind: 1 });
        }
    }
}

/// Loads the multiboot1 kernel `image` with command line `cmdline` and `modules`; `map` is the memory map that L1 sees.
pub fn multiboot<M: GuestMemory + ?Sized>(
    memory: &M,
    image: &[u8],
    cmdline: &[u8],
    modules: &[Module<'_>],
    map: &[Region],
) -> Result<Entry, LoadError> {
    let (at, flags) = header(image).ok_or(LoadError::NoHeader)?;
    let target = Target { memory, modules };
    // An ELF file is loaded as ELF even if address fields are there: they describe the same for every kernel at hand,
    // and 64-bit ELF files carry them for loaders that know ELF32 only.
    let is_elf = image.starts_with(b"\x7fELF");
    let eip = match flags & HEADER_ADDRESSES != 0 && !is_elf {
        true => target.addresses(image, at)?,
        false => target.elf(image)?,
    };
    // With address fields the header's entry point counts: the ELF entry may be for another protocol.
    let eip = match flags & HEADER_ADDRESSES != 0 {
        true => u32_at(image, at + 28).unwrap_or(eip),
        false => eip,
    };
    let mut info = Info { memory, at: INFO + 128 };
    let cmdline = info.string(cmdline)?;
    let loader = info.string(b"l0")?;
    let mut records = [[0u32; 4]; 32];
    if modules.len() > records.len() {
        return Err(LoadError::InfoTooLong);
    }
    for (record, m) in records.iter_mut().zip(modules) {
        *record = [m.range.start as u32, m.range.end as u32, info.string(m.string)?, 0];
    }
    info.align();
    let mods = info.at as u32;
    for record in records.iter().take(modules.len()) {
        info.words(record)?;
    }
    let map_at = info.at as u32;
    for region in map {
        let (base, len) = (region.range.start, region.range.end - region.range.start);
        info.words(&[20, base as u32, (base >> 32) as u32, len as u32, (len >> 32) as u32, region.kind])?;
    }
    let map_len = info.at as u32 - map_at;
    let upper = map.iter().find(|r| r.kind == 1 && r.range.contains(1 << 20)).map_or(0, |r| r.range.end - (1 << 20));
    let lower = map.iter().find(|r| r.kind == 1 && r.range.contains(0)).map_or(0, |r| r.range.end.min(0xa_0000));
    let mut head = [0u32; 29];
    let fields = [
        (0, 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9),
        (1, (lower >> 10) as u32),
        (2, (upper >> 10) as u32),
        (4, cmdline),
        (5, modules.len() as u32),
        (6, mods),
        (11, map_len),
        (12, map_at),
        (16, loader),
    ];
    for (i, value) in fields {
        if let Some(word) = head.get_mut(i) {
            *word = value;
        }
    }
    info.at = INFO;
    info.words(&head)?;
    Ok(Entry { eip, info: INFO as u32 })
}
