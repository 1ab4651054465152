//! The format of L1's nested page tables: the one of L1's own paging at VMRUN.
//!
//! Used by the walk; pure arithmetic on entries. Bit positions are those of the AMD64 page tables (APM volume 2, 5.3
//! and 5.4).

use hvcore::addr::{L1Gpa, L2Gpa};

/// Bit 0 of an entry: present.
pub(super) const P: u64 = 1 << 0;
/// Bit 1: writable.
pub(super) const W: u64 = 1 << 1;
/// Bit 2: user.
pub(super) const U: u64 = 1 << 2;
/// Bits 4:3: PWT and PCD.
pub(super) const CACHE: u64 = 3 << 3;
/// Bit 5: accessed.
pub(super) const A: u64 = 1 << 5;
/// Bit 6: dirty.
pub(super) const D: u64 = 1 << 6;
/// Bit 7: page size.
pub(super) const PS: u64 = 1 << 7;
/// Bit 63: no execute.
pub(super) const NX: u64 = 1 << 63;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Paging mode of L1 at VMRUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// Two levels of 4-byte entries.
    Legacy,
    /// Three levels of 8-byte entries, 32-bit addresses.
    Pae,
    /// Long mode with four levels.
    Long4,
    /// Long mode with five levels.
    Long5,
}

/// How L1's nested page tables are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NptFormat {
    /// Levels and entry size.
    pub mode: PagingMode,
    /// CR4.PSE of L1: 4 MiB pages. Without effect but in legacy mode.
    pub pse: bool,
    /// EFER.NXE of L1. Without effect in legacy mode.
    pub nxe: bool,
    /// Width of physical addresses that L1 was told, CPUID 0x80000008 EAX bits 7:0. Bits above it are reserved.
    pub phys_bits: u8,
    /// L1 was told of 1 GiB pages, CPUID 0x80000001 EDX bit 26. Otherwise the page size bit is reserved there.
    pub gib_pages: bool,
}

impl NptFormat {
    /// The format that L1's CR0, CR4 and EFER at VMRUN select, or `None` when L1's paging is off: then VMRUN with
    /// nested paging is refused. `phys_bits` and `gib_pages` are what L1's CPUID says.
    pub const fn from_registers(cr0: u64, cr4: u64, efer: u64, phys_bits: u8, gib_pages: bool) -> Option<Self> {
        if cr0 & CR0_PG == 0 {
            return None;
        }
        let mode = if efer & EFER_LMA != 0 {
            if cr4 & CR4_LA57 != 0 { PagingMode::Long5 } else { PagingMode::Long4 }
        } else if cr4 & CR4_PAE != 0 {
            PagingMode::Pae
        } else {
            PagingMode::Legacy
        };
        let legacy = matches!(mode, PagingMode::Legacy);
        Some(Self { mode, pse: legacy && cr4 & CR4_PSE != 0, nxe: efer & EFER_NXE != 0, phys_bits, gib_pages })
    }

    /// Levels of tables, the top one's number.
    #[inline(always)]
    pub const fn levels(self) -> u8 {
        match self.mode {
            PagingMode::Legacy => 2,
            PagingMode::Pae => 3,
            PagingMode::Long4 => 4,
            PagingMode::Long5 => 5,
        }
    }

    /// Bytes per entry.
    #[inline(always)]
    pub const fn entry_bytes(self) -> u64 {
        match self.mode {
            PagingMode::Legacy => 4,
            _ => 8,
        }
    }

    /// True when no-execute is in force: what makes EXITINFO1 show instruction fetches.
    #[inline(always)]
    pub const fn no_execute(self) -> bool {
        self.nxe && !matches!(self.mode, PagingMode::Legacy)
    }

    /// The top table that nCR3 names.
    #[inline(always)]
    pub const fn top(self, ncr3: u64) -> L1Gpa {
        L1Gpa::new(match self.mode {
            PagingMode::Legacy => ncr3 & 0xFFFF_F000,
            PagingMode::Pae => ncr3 & 0xFFFF_FFE0,
            PagingMode::Long4 | PagingMode::Long5 => ncr3 & ADDRESS,
        })
    }

    /// True when `gpa` is within what the tables can translate.
    #[inline(always)]
    pub const fn reaches(self, gpa: L2Gpa) -> bool {
        let width = match self.mode {
            PagingMode::Legacy | PagingMode::Pae => 32,
            PagingMode::Long4 => 48,
            PagingMode::Long5 => 57,
        };
        gpa.raw() >> width == 0
    }

    /// Base-2 logarithm of what an entry of `level` covers.
    #[inline(always)]
    pub(super) const fn shift(self, level: u8) -> u32 {
        let index_bits = match self.mode {
            PagingMode::Legacy => 10u32,
            _ => 9,
        };
        12u32.wrapping_add(index_bits.wrapping_mul((level as u32).wrapping_sub(1)))
    }

    /// The entry for `gpa` in the table of `level` at `table`.
    #[inline(always)]
    pub(super) const fn entry_address(self, table: L1Gpa, level: u8, gpa: L2Gpa) -> L1Gpa {
        let mask = match self.mode {
            PagingMode::Legacy => 0x3FF,
            _ => 0x1FF,
        };
        // Levels are 1 to 5, so shifts stay below 64; tables lie below 2^52.
        let index = gpa.raw().wrapping_shr(self.shift(level)) & mask;
        L1Gpa::new(table.raw().wrapping_add(index.wrapping_mul(self.entry_bytes())))
    }

    /// True for the top entries of PAE, which have neither rights nor an accessed bit.
    #[inline(always)]
    pub(super) const fn is_pdpte(self, level: u8) -> bool {
        matches!(self.mode, PagingMode::Pae) && level == 3
    }

    /// True when `entry` of `level` maps a page. Decide only after [`reserved`](Self::reserved) found nothing.
    #[inline(always)]
    pub(super) const fn is_leaf(self, level: u8, entry: u64) -> bool {
        match (level, self.mode) {
            (1, _) => true,
            (2, PagingMode::Legacy) => self.pse && entry & PS != 0,
            (2, _) => entry & PS != 0,
            (3, PagingMode::Long4 | PagingMode::Long5) => entry & PS != 0,
            _ => false,
        }
    }

    /// The reserved bits that are set in a present `entry` of `level`.
    #[inline(always)]
    pub(super) const fn reserved(self, level: u8, entry: u64) -> u64 {
        let mask = match self.mode {
            PagingMode::Legacy => {
                if level == 2 && self.is_leaf(level, entry) {
                    // Bits 20:13 are address bits 39:32; bit 21 is reserved.
                    (1 << 21) | ((above(self.phys_bits) & (0xFF << 32)) >> 19)
                } else {
                    0
                }
            }
            PagingMode::Pae if level == 3 => above(self.phys_bits) | HIGH | NX | (0xF << 5) | (3 << 1),
            PagingMode::Pae => above(self.phys_bits) | HIGH | self.reserved_nx() | self.reserved_large(level, entry),
            PagingMode::Long4 | PagingMode::Long5 => {
                let by_level = match level {
                    1 => 0,
                    2 | 3 => self.reserved_large(level, entry),
                    _ => PS | BIT8,
                };
                above(self.phys_bits) | self.reserved_nx() | by_level
            }
        };
        entry & mask
    }

    #[inline(always)]
    const fn reserved_nx(self) -> u64 {
        if self.nxe { 0 } else { NX }
    }

    /// Reserved bits that depend on the page size bit, in entries of levels 2 and 3 of 8 bytes.
    #[inline(always)]
    const fn reserved_large(self, level: u8, entry: u64) -> u64 {
        match (level, entry & PS != 0) {
            (2, true) => 0xFF << 13,
            (3, true) if self.gib_pages => 0x1_FFFF << 13,
            (3, true) => PS,
            (3, false) => BIT8,
            _ => 0,
        }
    }

    /// The next table, or the start of the page, that `entry` of `level` names.
    #[inline(always)]
    pub(super) const fn target(self, level: u8, entry: u64) -> L1Gpa {
        let page = !low_mask(self.shift(level));
        L1Gpa::new(match (self.mode, self.is_leaf(level, entry)) {
            (PagingMode::Legacy, true) if level == 2 => (entry & 0xFFC0_0000) | ((entry >> 13 & 0xFF) << 32),
            (PagingMode::Legacy, _) => entry & 0xFFFF_F000,
            (_, true) => entry & ADDRESS & page,
            (_, false) => entry & ADDRESS,
        })
    }
}

/// Bit 8 of an entry that refers to a table of level 3 or above is reserved.
const BIT8: u64 = 1 << 8;
/// Bits 62:52, reserved in PAE mode.
const HIGH: u64 = 0x7FF << 52;
/// Bits 51:12.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// The low `bits` bits, for fewer than 64.
#[inline(always)]
pub(super) const fn low_mask(bits: u32) -> u64 {
    1u64.wrapping_shl(bits).wrapping_sub(1)
}

/// Address bits 51 and below that are not among the low `phys_bits`; none for widths of 52 and above.
#[inline(always)]
const fn above(phys_bits: u8) -> u64 {
    if phys_bits > 51 { 0 } else { ADDRESS & !low_mask(phys_bits as u32) }
}
