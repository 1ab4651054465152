//! What the boot loader tells: command line, modules, memory map, by the Multiboot specification version 0.6.96.
//!
//! Everything is copied out of the loader's memory first, so that low memory is free afterwards. The parser reads
//! through [`PhysicalMemory`]; tests give it a byte slice.

use arrayvec::{ArrayString, ArrayVec};

/// What a multiboot loader leaves in EAX.
pub const MAGIC: u32 = 0x2BAD_B002;

/// Most modules that are kept.
pub const MAX_MODULES: usize = 8;

/// Most memory regions that are kept.
pub const MAX_REGIONS: usize = 32;

/// Longest command line that is kept, in bytes; the rest is cut off.
pub const MAX_COMMAND_LINE: usize = 512;

/// Reads bytes of physical memory below 4 GiB.
pub trait PhysicalMemory {
    /// The byte at `address`, or `None` where there is none.
    fn byte(&self, address: u32) -> Option<u8>;

    /// The little-endian word at `address`.
    fn word(&self, address: u32) -> Option<u32> {
        let mut bytes = [0; 4];
        for (i, b) in (0..).zip(&mut bytes) {
            *b = self.byte(address.checked_add(i)?)?;
        }
        Some(u32::from_le_bytes(bytes))
    }
}

/// A file that the loader put in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Physical address of its first byte.
    pub start: u64,
    /// Physical address behind its last byte.
    pub end: u64,
    /// Its command line: file name first, by custom.
    pub command_line: ArrayString<MAX_COMMAND_LINE>,
}

impl Module {
    /// The module's contents.
    #[cfg(freestanding)]
    pub fn bytes(&self) -> &'static [u8] {
        let len = (self.end - self.start) as usize;
        // SAFETY: the loader put `len` bytes there, below 4 GiB, which is mapped to itself; `frames` keeps modules out
        // of the memory it hands out, so nothing writes them.
        unsafe { core::slice::from_raw_parts(self.start as *const u8, len) }
    }
}

/// A range of RAM that is free to use, as far as the firmware is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Physical address of its first byte.
    pub start: u64,
    /// Physical address behind its last byte.
    pub end: u64,
}

/// What the boot loader told, in the image's own memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootInfo {
    /// The image's command line.
    pub command_line: ArrayString<MAX_COMMAND_LINE>,
    /// Files loaded beside the image, in the order in which they were named.
    pub modules: ArrayVec<Module, MAX_MODULES>,
    /// Usable RAM, in the firmware's order. The image and the modules lie inside these ranges.
    pub regions: ArrayVec<Region, MAX_REGIONS>,
}

/// Flag bits of the information structure: which fields the loader filled in.
mod flag {
    pub const COMMAND_LINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
}

impl BootInfo {
    /// Reads the information structure at `info`. What cannot be read is left out.
    pub fn read(memory: &impl PhysicalMemory, info: u32) -> BootInfo {
        let mut boot = BootInfo::default();
        let word = |offset: u32| info.checked_add(offset).and_then(|a| memory.word(a));
        let flags = word(0).unwrap_or(0);
        if let (true, Some(line)) = (flags & flag::COMMAND_LINE != 0, word(16)) {
            boot.command_line = string(memory, line);
        }
        if let (true, Some(count), Some(table)) = (flags & flag::MODULES != 0, word(20), word(24)) {
            boot.modules = (0..count).map_while(|i| module(memory, table, i)).take(MAX_MODULES).collect();
        }
        if let (true, Some(len), Some(map)) = (flags & flag::MEMORY_MAP != 0, word(44), word(48)) {
            boot.regions = regions(memory, map, len);
        }
        boot
    }

    /// The value of `NAME=VALUE` on the command line.
    pub fn argument(&self, name: &str) -> Option<&str> {
        self.command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

fn module(memory: &impl PhysicalMemory, table: u32, index: u32) -> Option<Module> {
    let entry = table.checked_add(index.checked_mul(16)?)?;
    let (start, end) = (memory.word(entry)?, memory.word(entry.checked_add(4)?)?);
    let line = memory.word(entry.checked_add(8)?)?;
    (start <= end).then(|| Module { start: start.into(), end: end.into(), command_line: string(memory, line) })
}

fn regions(memory: &impl PhysicalMemory, map: u32, len: u32) -> ArrayVec<Region, MAX_REGIONS> {
    let mut found = ArrayVec::new();
    let end = map.saturating_add(len);
    let mut entry = map;
    while entry < end && !found.is_full() {
        // The size word does not count itself, and may be larger than the 20 bytes that follow.
        let read = |offset: u32| memory.word(entry.checked_add(offset)?).map(u64::from);
        let fields = (read(0), read(4), read(8), read(12), read(16), read(20));
        let (Some(size), Some(low), Some(high), Some(len_low), Some(len_high), Some(kind)) = fields else { break };
        let start = low | high << 32;
        let bytes = len_low | len_high << 32;
        if let (1, true, Some(end)) = (kind, bytes > 0, start.checked_add(bytes)) {
            found.push(Region { start, end });
        }
        let Some(next) = u32::try_from(size).ok().and_then(|s| entry.checked_add(s)?.checked_add(4)) else { break };
        entry = next;
    }
    found
}

fn string(memory: &impl PhysicalMemory, address: u32) -> ArrayString<MAX_COMMAND_LINE> {
    let mut text = ArrayString::new();
    for i in 0..MAX_COMMAND_LINE as u32 {
        let byte = address.checked_add(i).and_then(|a| memory.byte(a));
        let Some(byte @ 1..) = byte else { break };
        // Not more than the capacity in bytes: a byte beyond ASCII becomes one character of ASCII.
        text.push(if byte.is_ascii() { byte.into() } else { '?' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl PhysicalMemory for Bytes {
        fn byte(&self, address: u32) -> Option<u8> {
            self.0.get(address as usize).copied()
        }
    }

    impl Bytes {
        fn put(&mut self, address: u32, words: &[u32]) {
            for (i, word) in words.iter().enumerate() {
                let at = address as usize + 4 * i;
                self.0[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
        fn text(&mut self, address: u32, text: &str) {
            self.0[address as usize..][..text.len()].copy_from_slice(text.as_bytes());
        }
    }

    fn sample() -> Bytes {
        let mut m = Bytes(vec![0; 4096]);
        m.put(256, &[flag::COMMAND_LINE | flag::MODULES | flag::MEMORY_MAP, 0, 0, 0, 1024, 2, 2048]);
        m.put(256 + 44, &[24 + 28, 3072]);
        m.text(1024, "image.elf cpus=4 quiet");
        m.put(2048, &[0x20_0000, 0x20_1234, 1100, 0, 0x30_0000, 0x30_0000, 1200, 0]);
        m.text(1100, "l2.elf x=1");
        m.put(3072, &[20, 0, 0, 0x9F000, 0, 1]);
        // A longer entry of reserved memory, then nothing.
        m.put(3072 + 24, &[24, 0xF0000, 0, 0x10000, 0, 2]);
        m
    }

    #[test]
    fn reads_command_line_modules_and_usable_regions() {
        let boot = BootInfo::read(&sample(), 256);
        assert_eq!(&boot.command_line, "image.elf cpus=4 quiet");
        assert_eq!(boot.argument("cpus"), Some("4"));
        assert_eq!(boot.argument("quiet"), None);
        assert_eq!(boot.argument("cpu"), None);
        assert_eq!(boot.modules.len(), 2);
        assert_eq!((boot.modules[0].start, boot.modules[0].end), (0x20_0000, 0x20_1234));
        assert_eq!(&boot.modules[0].command_line, "l2.elf x=1");
        assert_eq!(boot.regions.as_slice(), [Region { start: 0, end: 0x9F000 }]);
    }

    #[test]
    fn fields_whose_flag_is_clear_are_not_read() {
        let mut m = sample();
        m.put(256, &[0]);
        assert_eq!(BootInfo::read(&m, 256), BootInfo::default());
    }

    #[test]
    fn more_modules_than_fit_are_cut_off() {
        let mut m = sample();
        m.put(256 + 20, &[u32::MAX]);
        assert_eq!(BootInfo::read(&m, 256).modules.len(), MAX_MODULES);
    }

    #[test]
    fn a_structure_outside_memory_is_an_empty_one() {
        assert_eq!(BootInfo::read(&sample(), 0xFFFF_FFF0), BootInfo::default());
    }
}
