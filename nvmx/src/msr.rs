//! IA32_FEATURE_CONTROL and the VMX capability MSRs as L1 sees them (SDM volume 3, appendix A).

/// IA32_FEATURE_CONTROL.
pub const FEATURE_CONTROL: u32 = 0x3A;
/// IA32_VMX_BASIC, the first capability MSR.
pub const VMX_BASIC: u32 = 0x480;
/// IA32_VMX_EXIT_CTLS2, the last capability MSR.
pub const VMX_EXIT_CTLS2: u32 = 0x493;

/// IA32_FEATURE_CONTROL bit 0: the MSR cannot be written until reset.
pub const FEATURE_CONTROL_LOCK: u64 = 1;
/// IA32_FEATURE_CONTROL bit 2: VMXON outside SMX operation.
pub const FEATURE_CONTROL_VMX: u64 = 1 << 2;

/// As firmware leaves IA32_FEATURE_CONTROL.
pub(crate) const FEATURE_CONTROL_LOCKED: u64 = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX;
