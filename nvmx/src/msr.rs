//! IA32_FEATURE_CONTROL and the VMX capability MSRs as L1 sees them (SDM volume 3, appendix A).

use crate::l1::Fault;
use crate::machine::Gprs;
use crate::state::NestedVmx;

/// IA32_FEATURE_CONTROL (SDM volume 3, "Enabling and Entering VMX Operation").
pub mod feature_control {
    /// The MSR's index.
    pub const MSR: u32 = 0x3A;
    /// Bit 0: the MSR cannot be written until reset.
    pub const LOCK: u64 = 1;
    /// Bit 2: VMXON outside SMX operation.
    pub const VMXON_OUTSIDE_SMX: u64 = 1 << 2;
    /// As firmware leaves it.
    pub const ENABLED: u64 = LOCK | VMXON_OUTSIDE_SMX;

    /// The MSR after WRMSR of `value`; `None` for #GP(0): it is locked, or `value` has bits that L1 is not offered.
    #[inline]
    pub const fn write(current: u64, value: u64) -> Option<u64> {
        if current & LOCK != 0 || value & !ENABLED != 0 { None } else { Some(value) }
    }

    /// True when VMXON outside SMX operation is allowed: VMX is enabled, and the MSR locked.
    #[inline]
    pub const fn allows_vmxon(value: u64) -> bool {
        value & ENABLED == ENABLED
    }
}

/// IA32_VMX_BASIC, the first capability MSR.
pub const VMX_BASIC: u32 = 0x480;
/// IA32_VMX_EXIT_CTLS2, the last capability MSR.
pub const VMX_EXIT_CTLS2: u32 = 0x493;

/// Encodings of the general-purpose registers that RDMSR and WRMSR use.
pub(crate) const RAX: u8 = 0;
pub(crate) const RCX: u8 = 1;
pub(crate) const RDX: u8 = 2;

/// True for the MSRs that [`NestedVmx`] answers; the embedder's MSR bitmap makes them exit.
#[inline]
pub const fn is_ours(index: u32) -> bool {
    matches!(index, feature_control::MSR | VMX_BASIC..=VMX_EXIT_CTLS2)
}

impl NestedVmx {
    /// RDMSR or WRMSR of `index`, one that [`is_ours`], by either level.
    pub(crate) fn access_msr<G: Gprs + ?Sized>(&mut self, gprs: &mut G, index: u32, write: bool) -> Result<(), Fault> {
        if write {
            let value = gprs.get(RDX) << 32 | gprs.get(RAX) & 0xFFFF_FFFF;
            // The capability MSRs are read-only.
            let written =
                if index == feature_control::MSR { feature_control::write(self.feature_control, value) } else { None };
            self.feature_control = written.ok_or(Fault::GP)?;
            return Ok(());
        }
        let value = if index == feature_control::MSR { Some(self.feature_control) } else { self.config.read(index) };
        let value = value.ok_or(Fault::GP)?;
        gprs.set(RAX, value & 0xFFFF_FFFF);
        gprs.set(RDX, value >> 32);
        Ok(())
    }
}
