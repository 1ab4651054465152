//! The registers of a CPU, of either vendor.

use crate::model::walk::{Linear, Mode, Vendor};

/// CR0, CR4, EFER and RFLAGS bits.
#[allow(missing_docs)]
pub mod bit {
    pub const CR0_PE: u64 = 1;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_VMXE: u64 = 1 << 13;
    pub const CR4_LA57: u64 = 1 << 12;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const EFER_SVME: u64 = 1 << 12;
    pub const FLAG_TF: u64 = 1 << 8;
    pub const FLAG_IF: u64 = 1 << 9;
    pub const FLAG_NT: u64 = 1 << 14;
    pub const FLAG_RF: u64 = 1 << 16;
    pub const FLAG_VM: u64 = 1 << 17;
    pub const FLAG_AC: u64 = 1 << 18;
}

use bit::*;

/// Indexes of [`State::seg`], in the VMCB's order.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const GDTR: usize = 6;
    pub const LDTR: usize = 7;
    pub const IDTR: usize = 8;
    pub const TR: usize = 9;
}

/// A segment or table register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Attributes as the VMCB packs them: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D 10, G 11. On VT-x, bit 15 means
    /// unusable.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// The registers that a world switch moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct State {
    pub seg: [Segment; 10],
    pub cpl: u8,
    pub efer: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr6: u64,
    pub dr7: u64,
    pub rflags: u64,
    pub rip: u64,
    pub rsp: u64,
    pub rax: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, KernelGsBase, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    pub sys: [u64; 8],
    pub pat: u64,
    /// DEBUGCTL, BR_FROM, BR_TO, LASTEXCPFROM, LASTEXCPTO.
    pub lbr: [u64; 5],
}

/// PAT after reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

impl State {
    /// A 64-bit kernel with paging on and SVM enabled.
    pub fn host() -> Self {
        let mut s = Self {
            efer: EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME,
            cr0: CR0_PE | CR0_ET | CR0_WP | CR0_PG,
            cr4: CR4_PAE | CR4_PGE,
            rflags: 2,
            dr6: 0xFFFF_0FF0,
            dr7: 0x400,
            pat: PAT_RESET,
            ..Self::default()
        };
        s.seg[seg::CS] = Segment { selector: 8, attributes: 0x29B, limit: u32::MAX, base: 0 };
        s.seg[seg::SS] = Segment { selector: 16, attributes: 0xC93, limit: u32::MAX, base: 0 };
        s
    }

    /// Long mode is active.
    pub fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Long mode with a 64-bit code segment.
    pub fn bits64(&self) -> bool {
        self.long_mode() && self.seg[seg::CS].attributes & (1 << 9) != 0
    }

    /// Whether `addr` is canonical in this mode; every 32-bit address is.
    pub fn canonical(&self, addr: u64) -> bool {
        let top = if self.cr4 & CR4_LA57 != 0 { 57 } else { 48 };
        if self.bits64() { sign_extend(addr, top) == addr } else { addr <= u64::from(u32::MAX) }
    }

    /// The paging that these registers ask for.
    pub fn linear(&self, vendor: Vendor, maxphyaddr: u8, pages_1g: bool) -> Linear {
        let mode = match (self.cr0 & CR0_PG != 0, self.efer & EFER_LME != 0, self.cr4 & CR4_PAE != 0) {
            (false, _, _) => Mode::Off,
            (true, true, _) if self.cr4 & CR4_LA57 != 0 => Mode::Level5,
            (true, true, _) => Mode::Level4,
            (true, false, true) => Mode::Pae,
            (true, false, false) => Mode::Bits32,
        };
        Linear {
            mode,
            vendor,
            cr3: self.cr3,
            pdptes: None,
            wp: self.cr0 & CR0_WP != 0,
            pse: self.cr4 & CR4_PSE != 0,
            pge: self.cr4 & CR4_PGE != 0,
            smep: self.cr4 & CR4_SMEP != 0,
            smap: self.cr4 & CR4_SMAP != 0,
            nxe: self.efer & EFER_NXE != 0,
            pages_1g,
            maxphyaddr,
        }
    }
}

/// Sign-extends from bit `top` - 1.
pub(crate) fn sign_extend(value: u64, top: u32) -> u64 {
    (((value << (64 - top)) as i64) >> (64 - top)) as u64
}
