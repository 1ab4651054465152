//! Builds page tables in the model's memory, for tests: every format, one mapping at a time.

use super::mem::PhysMem;
use super::tlb::PageSize;

/// Leaf and table flags of the x86 formats.
pub mod flag {
    /// Present.
    pub const P: u64 = 1;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// Large page.
    pub const PS: u64 = 1 << 7;
    /// Global.
    pub const G: u64 = 1 << 8;
    /// No execute.
    pub const NX: u64 = 1 << 63;
    /// EPT: read, write, execute.
    pub const RWX: u64 = 7;
    /// EPT: write-back.
    pub const WB: u64 = 6 << 3;
}

/// The shape of a table tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 32-bit paging.
    Bits32,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    Level4,
    /// 5-level paging.
    Level5,
    /// 4-level EPT.
    Ept,
}

/// Hands out zeroed frames and writes entries.
pub struct Tables<'a> {
    mem: &'a PhysMem,
    next: u64,
}

impl<'a> Tables<'a> {
    /// Frames from `first` (page-aligned) upwards.
    pub fn new(mem: &'a PhysMem, first: u64) -> Self {
        Self { mem, next: first }
    }

    /// A new zeroed frame.
    pub fn frame(&mut self) -> u64 {
        let frame = self.next;
        self.next += 4096;
        (0..512).for_each(|n| self.mem.write(frame + n * 8, 8, 0));
        frame
    }

    /// Maps the page around `from` to the one around `to` in the tree at `root` with the leaf's `flags`, creating
    /// tables with all rights. Returns the address of the leaf entry.
    pub fn map(&mut self, format: Format, root: u64, from: u64, to: u64, size: PageSize, flags: u64) -> u64 {
        let at = self.slot(format, root, from, size);
        let large = if size == PageSize::K4 { 0 } else { flag::PS };
        let bytes = if format == Format::Bits32 { 4 } else { 8 };
        self.mem.write(at, bytes, size.base(to) | flags | large);
        at
    }

    /// Address of the entry that maps `from` with a page of `size`, with the tables above it.
    pub fn slot(&mut self, format: Format, root: u64, from: u64, size: PageSize) -> u64 {
        let (levels, bits, bytes) = match format {
            Format::Bits32 => (2, 10, 4),
            Format::Pae => (3, 9, 8),
            Format::Level4 | Format::Ept => (4, 9, 8),
            Format::Level5 => (5, 9, 8),
        };
        let leaf_shift = if size == PageSize::M4 { 22 } else { size as u32 };
        let mut table = root;
        for level in (1..=levels).rev() {
            let shift = 12 + bits * (level - 1);
            let at = table + ((from >> shift) & ((1 << bits) - 1)) * bytes;
            if shift == leaf_shift {
                return at;
            }
            let entry = self.mem.read(at, bytes);
            table = if entry & 7 != 0 {
                entry & 0x000F_FFFF_FFFF_F000
            } else {
                let new = self.frame();
                let top_of_pae = format == Format::Pae && level == 3;
                self.mem.write(at, bytes, new | if top_of_pae { flag::P } else { 7 });
                new
            };
        }
        unreachable!("no page of {size:?} in {format:?}")
    }

    /// Maps `bytes` from `from` on to `to` on, in pages of `size`.
    #[allow(clippy::too_many_arguments)]
    pub fn map_range(&mut self, format: Format, root: u64, from: u64, to: u64, bytes: u64, size: PageSize, flags: u64) {
        for off in (0..bytes).step_by(size.bytes() as usize) {
            self.map(format, root, from + off, to + off, size, flags);
        }
    }
}
