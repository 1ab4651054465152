//! What the processor has, what L1 is offered, and CPUID leaf 0x8000_000A that says so.
//!
//! Built once by the embedder; read by the state machine. An impossible offer is an error here, not a surprise later.

use crate::vmcb::bits::{Intercepts, int_ctl, misc1, misc2, misc3, virt_ext};

/// SVM features: CPUID 0x8000_000A EDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u32);

impl Features {
    /// Nested paging.
    pub const NP: Self = Self(1);
    /// LBR virtualization.
    pub const LBR: Self = Self(1 << 1);
    /// TSC ratio MSR.
    pub const TSC_RATE: Self = Self(1 << 4);
    /// Next RIP saved.
    pub const NRIPS: Self = Self(1 << 3);
    /// VMCB clean bits.
    pub const VMCB_CLEAN: Self = Self(1 << 5);
    /// TLB_CONTROL 3 and 7.
    pub const FLUSH_BY_ASID: Self = Self(1 << 6);
    /// Decode assists.
    pub const DECODE_ASSISTS: Self = Self(1 << 7);
    /// PAUSE filter.
    pub const PAUSE_FILTER: Self = Self(1 << 10);
    /// PAUSE filter threshold.
    pub const PAUSE_THRESHOLD: Self = Self(1 << 12);
    /// Virtual VMLOAD and VMSAVE.
    pub const V_VMSAVE_VMLOAD: Self = Self(1 << 15);
    /// Virtual GIF.
    pub const VGIF: Self = Self(1 << 16);
    /// Virtual NMI.
    pub const VNMI: Self = Self(1 << 25);
    /// #GP of SVM instructions on host addresses comes before the intercept (SVME address check).
    pub const SVME_ADDR_CHECK: Self = Self(1 << 28);

    /// What the library does in software, whatever the processor has.
    pub const SOFTWARE: Self = Self(
        Self::VMCB_CLEAN.0
            | Self::FLUSH_BY_ASID.0
            | Self::V_VMSAVE_VMLOAD.0
            | Self::VGIF.0
            | Self::VNMI.0
            | Self::SVME_ADDR_CHECK.0,
    );
    /// All that can be offered. Not AVIC, nor anything of SEV.
    pub const SUPPORTED: Self = Self(
        Self::SOFTWARE.0
            | Self::NP.0
            | Self::LBR.0
            | Self::NRIPS.0
            | Self::TSC_RATE.0
            | Self::DECODE_ASSISTS.0
            | Self::PAUSE_FILTER.0
            | Self::PAUSE_THRESHOLD.0,
    );

    /// From EDX.
    #[inline]
    pub const fn from_edx(edx: u32) -> Self {
        Self(edx)
    }

    /// As EDX.
    #[inline]
    pub const fn edx(self) -> u32 {
        self.0
    }

    /// True when all of `other` is here.
    #[inline]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[inline]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What both sets have.
    #[inline]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// This set without `other`.
    #[inline]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The processor that everything runs on.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// CPUID 0x8000_000A EDX.
    pub features: Features,
    /// Width of physical addresses, bits (CPUID 0x8000_0008 EAX 7:0), of the processor and as L1 is shown it: the
    /// processor's own checks of what L1 loads go by it, too. 32 to 52.
    pub phys_bits: u8,
    /// CR4 bits that a guest may set.
    pub cr4_valid: u64,
    /// EFER bits that a guest may set (SVME among them).
    pub efer_valid: u64,
    /// CPUID 0x8000_0001 ECX and the like: which instructions can be intercepted, as intercept bits. Take
    /// [`Host::intercepts_of`].
    pub intercepts: Intercepts,
}

impl Host {
    /// The intercepts of a processor with the instructions named: RDTSCP, MONITOR/MWAIT, XSETBV, RDPRU, INVLPGB,
    /// INVPCID, MCOMMIT. Without an instruction its intercept is ignored.
    pub const fn intercepts_of(rdtscp: bool, monitor: bool, xsave: bool, rdpru: bool, invpcid: bool) -> Intercepts {
        let mut misc2 = misc2::VMRUN
            | misc2::VMMCALL
            | misc2::VMLOAD
            | misc2::VMSAVE
            | misc2::STGI
            | misc2::CLGI
            | misc2::SKINIT
            | misc2::ICEBP
            | misc2::WBINVD;
        if rdtscp {
            misc2 |= misc2::RDTSCP;
        }
        if monitor {
            misc2 |= misc2::MONITOR | misc2::MWAIT | misc2::MWAIT_ARMED;
        }
        if xsave {
            misc2 |= misc2::XSETBV;
        }
        if rdpru {
            misc2 |= misc2::RDPRU;
        }
        let misc3 = if invpcid { misc3::INVPCID } else { 0 };
        Intercepts { cr: u32::MAX, dr: u32::MAX, exceptions: u32::MAX, misc1: !misc1::FERR_FREEZE, misc2, misc3 }
    }
}

/// Why an offer is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// The processor has no nested paging; the library needs it for L1.
    NoNestedPaging,
    /// These features are neither in the processor nor in software (EDX bits).
    Unsupported(u32),
    /// L1 needs at least 2 ASIDs.
    TooFewAsids,
    /// Physical addresses are 32 to 52 bits wide.
    PhysBits,
    /// EFER.SVME is not among the valid bits.
    NoSvme,
}

/// What one L1 is offered.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub(crate) host: Host,
    pub(crate) offered: Features,
    pub(crate) asids: u32,
    pub(crate) enlightened: bool,
    /// Bits of the VMCB's interrupt control that L1 may use.
    pub(crate) int_ctl: u64,
    /// Bits of the VMCB's virtualization extensions that L1 may use.
    pub(crate) virt_ext: u64,
    /// L1 was told of 1 GiB pages.
    pub(crate) gib_pages: bool,
}

impl Config {
    /// Offers `offered` and `asids` ASIDs (numbers of L1's own, independent of the processor's) to L1; with
    /// `enlightened` the Hyper-V fields of the VMCB count.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub const fn new(host: Host, offered: Features, asids: u32, enlightened: bool) -> Result<Self, ConfigError> {
        if !host.features.has(Features::NP) {
            return Err(ConfigError::NoNestedPaging);
        }
        let possible = host.features.union(Features::SOFTWARE).intersection(Features::SUPPORTED);
        if !possible.has(offered) {
            return Err(ConfigError::Unsupported(offered.without(possible).edx()));
        }
        if asids < 2 {
            return Err(ConfigError::TooFewAsids);
        }
        if host.phys_bits < 32 || host.phys_bits > 52 {
            return Err(ConfigError::PhysBits);
        }
        if host.efer_valid & crate::vmcb::bits::efer::SVME == 0 {
            return Err(ConfigError::NoSvme);
        }
        let mut bits = int_ctl::V_TPR
            | int_ctl::V_IRQ
            | int_ctl::V_INTR_PRIO
            | int_ctl::V_IGN_TPR
            | int_ctl::V_INTR_MASKING
            | int_ctl::V_INTR_VECTOR;
        if offered.has(Features::VGIF) {
            bits |= int_ctl::V_GIF | int_ctl::V_GIF_ENABLE;
        }
        if offered.has(Features::VNMI) {
            bits |= int_ctl::V_NMI | int_ctl::V_NMI_MASK | int_ctl::V_NMI_ENABLE;
        }
        let mut virt_ext = 0;
        if offered.has(Features::LBR) {
            virt_ext |= virt_ext::LBR;
        }
        if offered.has(Features::V_VMSAVE_VMLOAD) {
            virt_ext |= virt_ext::VMLOAD_VMSAVE;
        }
        Ok(Self { host, offered, asids, enlightened, int_ctl: bits, virt_ext, gib_pages: true })
    }

    /// For an L1 that was not told of 1 GiB pages (CPUID 0x8000_0001 EDX bit 26).
    #[must_use]
    pub const fn without_gib_pages(mut self) -> Self {
        self.gib_pages = false;
        self
    }

    /// Everything that `host` and the library can offer without the embedder's help: all but [`Features::TSC_RATE`],
    /// which asks the embedder to write an MSR (see [`NestedSvm::hardware_tsc_ratio`]).
    ///
    /// [`NestedSvm::hardware_tsc_ratio`]: crate::NestedSvm::hardware_tsc_ratio
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub const fn all(host: Host, asids: u32, enlightened: bool) -> Result<Self, ConfigError> {
        let possible = host.features.union(Features::SOFTWARE).intersection(Features::SUPPORTED);
        Self::new(host, possible.without(Features::TSC_RATE), asids, enlightened)
    }

    /// CPUID leaf 0x8000_000A as L1 sees it: EAX, EBX, ECX, EDX. Leaf 0x8000_0001 ECX bit 2 (SVM) is the embedder's.
    pub const fn cpuid_8000_000a(&self) -> [u32; 4] {
        [1, self.asids, 0, self.offered.edx()]
    }

    /// What L1 is offered.
    #[inline]
    pub const fn features(&self) -> Features {
        self.offered
    }

    /// True when `gpa` lies within the physical addresses that L1 is shown.
    #[inline]
    pub(crate) const fn legal_gpa(&self, gpa: u64) -> bool {
        gpa >> (self.host.phys_bits & 63) == 0
    }
}
