//! The format of L1's extended page tables, as far as L1 is offered it.
//!
//! Used by the walk; pure arithmetic on entries. Bit positions are those of SDM volume 3, "EPT Translation Mechanism".

use hvcore::addr::{L1Gpa, L2Gpa};

use crate::caps::{Config, ept_vpid};

/// Bit 0 of an entry: read access.
pub(super) const R: u64 = 1 << 0;
/// Bit 1: write access.
pub(super) const W: u64 = 1 << 1;
/// Bit 2: execute access.
pub(super) const X: u64 = 1 << 2;
/// Bits 5:3 of a leaf: memory type, and bit 6: ignore PAT.
pub(super) const TYPE: u64 = 0xF << 3;
/// Bit 7: the entry maps a page.
pub(super) const PS: u64 = 1 << 7;
/// Bit 8: accessed, while the EPT pointer enables it.
pub(super) const A: u64 = 1 << 8;
/// Bit 9: dirty, likewise.
pub(super) const D: u64 = 1 << 9;

/// Bits 51:12 of an entry and of the EPT pointer.
pub(super) const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// Bit 6 of the EPT pointer: accessed and dirty flags.
pub(super) const EPTP_AD: u64 = 1 << 6;

/// Levels of tables: page walks of length 4 are the only ones offered.
pub(super) const LEVELS: u8 = 4;

/// The EPT features that L1 is offered, as far as they decide how its tables are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptFormat {
    /// Execute-only translations.
    pub execute_only: bool,
    /// 2 MiB pages.
    pub pages_2m: bool,
    /// 1 GiB pages.
    pub pages_1g: bool,
    /// Width of L1's physical addresses in bits, CPUID 0x80000008 EAX bits 7:0.
    pub physical_bits: u8,
    /// The processor has accessed and dirty flags: the shadow of an EPT that has them on uses them too, so that the
    /// processor treats its accesses to L2's page tables as writes. Without, those that only read are not seen.
    pub hardware_flags: bool,
}

impl EptFormat {
    /// What L1 is offered.
    pub const fn of(config: &Config) -> Self {
        let offered = config.ept_vpid();
        Self {
            execute_only: offered & ept_vpid::EXECUTE_ONLY != 0,
            pages_2m: offered & ept_vpid::PAGES_2M != 0,
            pages_1g: offered & ept_vpid::PAGES_1G != 0,
            physical_bits: config.host().phys_bits,
            hardware_flags: config.host().ept_vpid & ept_vpid::ACCESSED_DIRTY != 0,
        }
    }

    /// The top table that `eptp` names, EP4TA.
    #[inline(always)]
    pub(super) const fn top(eptp: u64) -> L1Gpa {
        L1Gpa::new(eptp & ADDRESS)
    }

    /// Base-2 logarithm of what an entry of `level` covers.
    #[inline(always)]
    pub(super) const fn shift(level: u8) -> u32 {
        // Levels are 1 to 4.
        12u32.wrapping_add(9u32.wrapping_mul((level as u32).wrapping_sub(1)))
    }

    /// True when `gpa` is within what the tables can translate.
    #[inline(always)]
    pub(super) const fn reaches(gpa: L2Gpa) -> bool {
        gpa.raw().wrapping_shr(Self::shift(LEVELS.wrapping_add(1))) == 0
    }

    /// The entry for `gpa` in the table of `level` at `table`.
    #[inline(always)]
    pub(super) const fn entry_address(table: L1Gpa, level: u8, gpa: L2Gpa) -> L1Gpa {
        let index = gpa.raw().wrapping_shr(Self::shift(level)) & 0x1FF;
        L1Gpa::new(table.raw().wrapping_add(index.wrapping_mul(8)))
    }

    /// True when a present `entry` of `level` maps a page. Decide only after [`misconfigured`](Self::misconfigured).
    #[inline(always)]
    pub(super) const fn is_leaf(level: u8, entry: u64) -> bool {
        match level {
            1 => true,
            2 | 3 => entry & PS != 0,
            _ => false,
        }
    }

    /// True when the present `entry` of `level` breaks a rule (SDM volume 3, "EPT Misconfigurations").
    #[inline(always)]
    pub(super) const fn misconfigured(&self, level: u8, entry: u64) -> bool {
        let rights = match entry & (R | W | X) {
            // Writable, and not readable.
            W | 6 => true,
            X => !self.execute_only,
            _ => false,
        };
        let leaf = Self::is_leaf(level, entry);
        let reserved = if leaf {
            match level {
                1 => 0,
                2 if self.pages_2m => low_mask(21) & !0xFFF,
                3 if self.pages_1g => low_mask(30) & !0xFFF,
                // The large page is not offered: the bit that asks for it is reserved.
                _ => PS,
            }
        } else if level > 3 {
            0x1F << 3
        } else {
            TYPE
        };
        // Types 2, 3 and 7 are reserved.
        let memory_type = leaf && matches!(entry >> 3 & 7, 2 | 3 | 7);
        rights || entry & (reserved | ADDRESS & !low_mask(self.physical_bits as u32)) != 0 || memory_type
    }

    /// The next table, or the start of the page, that `entry` of `level` names.
    #[inline(always)]
    pub(super) const fn target(level: u8, entry: u64) -> L1Gpa {
        let page = if Self::is_leaf(level, entry) { !low_mask(Self::shift(level)) } else { u64::MAX };
        L1Gpa::new(entry & ADDRESS & page)
    }
}

/// The low `bits` bits; all of them for 64 and more.
#[inline(always)]
pub(super) const fn low_mask(bits: u32) -> u64 {
    if bits > 63 { u64::MAX } else { 1u64.wrapping_shl(bits).wrapping_sub(1) }
}
