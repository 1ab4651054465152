//! A library to load before QEMU (`LD_PRELOAD`): turns on direct flush for each processor that QEMU creates.
//!
//! KVM has a capability for it, KVM_CAP_HYPERV_DIRECT_TLBFLUSH, which QEMU does not use: its option
//! `hv-tlbflush-direct` offers direct flush to a hypervisor inside the guest instead.

use kvm_bindings::{KVM_CAP_HYPERV_DIRECT_TLBFLUSH, kvm_enable_cap};
use std::ffi::{c_int, c_ulong};

const KVM_CREATE_VCPU: c_ulong = 0xAE41;
/// Writes the 104 bytes of `kvm_enable_cap`.
const KVM_ENABLE_CAP: c_ulong = 0x4068_AEA3;
const _: () = assert!(size_of::<kvm_enable_cap>() == 0x68);

/// In place of the C library's function: the same, and the capability for a processor that was created.
///
/// # Safety
///
/// As for the system call: `argument` is what `request` needs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(file: c_int, request: c_ulong, argument: usize) -> c_int {
    // SAFETY: what the caller asked for.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, file, request, argument) } as c_int;
    if request == KVM_CREATE_VCPU && result >= 0 {
        let capability = kvm_enable_cap { cap: KVM_CAP_HYPERV_DIRECT_TLBFLUSH, ..Default::default() };
        // SAFETY: the new processor's file, and a whole structure.
        let enabled = unsafe { libc::syscall(libc::SYS_ioctl, result, KVM_ENABLE_CAP, &raw const capability) };
        let word = if enabled == 0 { "on" } else { "not offered by KVM" };
        eprintln!("direct flush for the processor of file {result}: {word}");
    }
    result
}
