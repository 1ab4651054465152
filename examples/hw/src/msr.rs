//! Model-specific registers.

use core::arch::asm;

/// Local APIC base and mode.
pub const APIC_BASE: u32 = 0x1b;
/// VMX permissions: bit 0 LOCK, bit 1 VMXON in SMX operation, bit 2 VMXON outside it.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// SYSENTER: code segment.
pub const SYSENTER_CS: u32 = 0x174;
/// SYSENTER: stack pointer.
pub const SYSENTER_ESP: u32 = 0x175;
/// SYSENTER: entry point.
pub const SYSENTER_EIP: u32 = 0x176;
/// Page attribute table.
pub const PAT: u32 = 0x277;
/// VMX basic capabilities; the other capability MSRs follow, up to 0x493.
pub const VMX_BASIC: u32 = 0x480;
/// CR0 bits that are 1 in VMX operation.
pub const VMX_CR0_FIXED0: u32 = 0x486;
/// CR0 bits that may be 1 in VMX operation.
pub const VMX_CR0_FIXED1: u32 = 0x487;
/// CR4 bits that are 1 in VMX operation.
pub const VMX_CR4_FIXED0: u32 = 0x488;
/// CR4 bits that may be 1 in VMX operation.
pub const VMX_CR4_FIXED1: u32 = 0x489;
/// x2APIC interrupt command register.
pub const X2APIC_ICR: u32 = 0x830;
/// Extended feature enables.
pub const EFER: u32 = 0xc000_0080;
/// Base of FS.
pub const FS_BASE: u32 = 0xc000_0100;
/// Base of GS.
pub const GS_BASE: u32 = 0xc000_0101;
/// SVM control: bit 4 SVMDIS, bit 3 LOCK.
pub const VM_CR: u32 = 0xc001_0114;
/// Physical address of the host state-save area.
pub const VM_HSAVE_PA: u32 = 0xc001_0117;

/// EFER: system call extensions.
pub const EFER_SCE: u64 = 1;
/// EFER: long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER: no-execute enable.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER: secure virtual machine enable.
pub const EFER_SVME: u64 = 1 << 12;

/// Reads `msr`.
///
/// # Safety
/// The processor has this MSR; otherwise the instruction faults.
#[inline]
pub unsafe fn rdmsr(msr: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: the caller vouches for the MSR; RDMSR touches no memory.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags)) };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes `msr`.
///
/// # Safety
/// The processor has this MSR and takes this value, and the program can live with its effect.
#[inline]
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller vouches for the MSR, the value and the effect.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}
