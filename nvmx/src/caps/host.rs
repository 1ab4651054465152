//! The processor that everything runs on, as plain values.

use super::{Allowed, ConfigError, ept_vpid};
use crate::bits::cr4;
use crate::controls::{primary, secondary};

/// The processor: its capability MSRs, and what CPUID says that the entry checks need.
///
/// The fields below `vmfunc` are also where the embedder says what L1 is shown: a bit that L1's CPUID lacks is cleared.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// Pin-based controls: the "true" MSR where there is one (IA32_VMX_BASIC bit 55).
    pub pin: Allowed,
    /// Primary processor-based controls, likewise.
    pub primary: Allowed,
    /// Secondary processor-based controls that may be 1.
    pub secondary: u32,
    /// VM-exit controls, as `pin`.
    pub exit: Allowed,
    /// VM-entry controls, as `pin`.
    pub entry: Allowed,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// IA32_VMX_VMFUNC.
    pub vmfunc: u64,
    /// IA32_VMX_CR0_FIXED0: bits of CR0 that must be 1.
    pub cr0_fixed0: u64,
    /// IA32_VMX_CR0_FIXED1: bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// IA32_VMX_CR4_FIXED0: bits of CR4 that must be 1.
    pub cr4_fixed0: u64,
    /// IA32_VMX_CR4_FIXED1: bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
    /// Width of physical addresses that L1 is shown, bits (CPUID 0x8000_0008 EAX 7:0); 32 to 52.
    pub phys_bits: u8,
    /// Width of linear addresses, bits (CPUID 0x8000_0008 EAX 15:8); 48 or 57.
    pub linear_bits: u8,
    /// IA32_EFER bits that a guest may set.
    pub efer: u64,
    /// IA32_DEBUGCTL bits that a guest may set.
    pub debugctl: u64,
    /// IA32_PERF_GLOBAL_CTRL bits that a guest may set.
    pub perf_global_ctrl: u64,
    /// The processor has RTM: pending debug exceptions may have bit 16.
    pub rtm: bool,
}

impl Host {
    /// IA32_EFER of every processor with VMX and Intel 64: SCE, LME, LMA, NXE.
    pub const EFER: u64 = 0xD01;
    /// IA32_DEBUGCTL of most: LBR, BTF, and the branch-trace and freeze bits.
    pub const DEBUGCTL: u64 = 0xDFC3;

    /// Reads the capability MSRs with `read`, only those that the processor has; `phys_bits` and `linear_bits` from
    /// CPUID 0x8000_0008 EAX. What no MSR says (from `efer` on) takes common values that the embedder may replace.
    pub fn from_msrs(phys_bits: u8, linear_bits: u8, mut read: impl FnMut(u32) -> u64) -> Self {
        let basic = read(0x480);
        // The true MSRs lie 0xC above the old ones.
        let base = if basic >> 55 & 1 != 0 { 0xC } else { 0 };
        let mut controls = |msr: u32| Allowed::from_msr(read(msr.wrapping_add(base)));
        let (pin, primary) = (controls(0x481), controls(0x482));
        let (exit, entry) = (controls(0x483), controls(0x484));
        let has_secondary = primary.allowed & primary::SECONDARY_CONTROLS != 0;
        let secondary = if has_secondary { Allowed::from_msr(read(0x48B)).allowed } else { 0 };
        let ept_vpid = if secondary & (secondary::EPT | secondary::VPID) != 0 { read(0x48C) } else { 0 };
        let vmfunc = if secondary & secondary::VM_FUNCTIONS != 0 { read(0x491) } else { 0 };
        Self {
            basic,
            pin,
            primary,
            secondary,
            exit,
            entry,
            misc: read(0x485),
            ept_vpid,
            vmfunc,
            cr0_fixed0: read(0x486),
            cr0_fixed1: read(0x487),
            cr4_fixed0: read(0x488),
            cr4_fixed1: read(0x489),
            phys_bits,
            linear_bits,
            efer: Self::EFER,
            debugctl: Self::DEBUGCTL,
            perf_global_ctrl: 0,
            rtm: false,
        }
    }

    /// IA32_PERF_GLOBAL_CTRL bits by CPUID leaf 0xA: EAX 15:8 general counters, EDX 4:0 fixed ones.
    pub const fn perf_global_ctrl_of(eax: u32, edx: u32) -> u64 {
        let general = 1u64.wrapping_shl(eax >> 8 & 0x1F).wrapping_sub(1);
        let fixed = 1u64.wrapping_shl(edx & 0x1F).wrapping_sub(1);
        general | fixed << 32
    }

    /// What the library itself cannot do without.
    pub(super) const fn check(&self) -> Result<(), ConfigError> {
        let needed = primary::SECONDARY_CONTROLS | primary::MSR_BITMAPS;
        if self.primary.allowed & needed != needed {
            return Err(ConfigError::TooOld);
        }
        let walk = ept_vpid::WALK_4 | ept_vpid::WB;
        if self.secondary & secondary::EPT == 0 || self.ept_vpid & walk != walk {
            return Err(ConfigError::NoEpt);
        }
        if self.phys_bits < 32 || self.phys_bits > 52 || !matches!(self.linear_bits, 48 | 57) {
            return Err(ConfigError::AddressWidth);
        }
        if self.cr4_fixed1 & cr4::VMXE == 0 {
            return Err(ConfigError::NoVmxe);
        }
        Ok(())
    }
}
