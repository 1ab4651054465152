//! What completing or faulting an instruction does to the guest of a hardware VMCS that has just exited.
//!
//! Used by the state machine for both levels; an embedder may use it for the instructions it emulates itself.

use crate::bits::{access_rights, cr0, efer, interruptibility, interruption, pending_debug, rflags};
use crate::field::Field;
use crate::l1::Fault;
use crate::machine::{Gprs, Vmcs};

/// IA32_DEBUGCTL.BTF: single-step on branches.
const DEBUGCTL_BTF: u64 = 1 << 1;

/// Number of RSP among the general-purpose registers.
pub(crate) const RSP: u8 = 4;

/// True when the guest runs 64-bit code: long mode active and CS.L set.
pub fn in_64bit_code<V: Vmcs + ?Sized>(vmcs: &V) -> bool {
    vmcs.read32(Field::GuestCsAccessRights) & access_rights::L != 0 && vmcs.read(Field::GuestEfer) & efer::LMA != 0
}

/// The guest's current privilege level: the DPL of SS.
pub fn cpl<V: Vmcs + ?Sized>(vmcs: &V) -> u8 {
    (vmcs.read32(Field::GuestSsAccessRights) >> access_rights::DPL_SHIFT & 3) as u8
}

/// Ends the instruction that exited: RIP moves past it, RFLAGS.RF is clear, the interrupt shadow ends, and with
/// RFLAGS.TF a single-step #DB is pending.
pub fn complete_instruction<V: Vmcs + ?Sized>(vmcs: &mut V) {
    let flags = vmcs.read(Field::GuestRflags);
    if flags & rflags::RF != 0 {
        vmcs.write(Field::GuestRflags, flags & !rflags::RF);
    }
    complete_with(vmcs, flags);
}

/// As [`complete_instruction`], with new RFLAGS written by the caller.
pub(crate) fn complete_with<V: Vmcs + ?Sized>(vmcs: &mut V, flags: u64) {
    let next = vmcs.read(Field::GuestRip).wrapping_add(u64::from(vmcs.read32(Field::ExitInstructionLength)));
    // Only a RIP that leaves the lower 4 GiB can tell 32-bit code from 64-bit code.
    let next = if next >> 32 != 0 && !in_64bit_code(vmcs) { next & 0xFFFF_FFFF } else { next };
    vmcs.write(Field::GuestRip, next);
    let blocking = vmcs.read32(Field::GuestInterruptibility);
    if blocking & (interruptibility::STI | interruptibility::MOV_SS) != 0 {
        let left = blocking & !(interruptibility::STI | interruptibility::MOV_SS);
        vmcs.write(Field::GuestInterruptibility, left.into());
    }
    if flags & rflags::TF != 0 && vmcs.read(Field::GuestDebugctl) & DEBUGCTL_BTF == 0 {
        let pending = vmcs.read(Field::GuestPendingDebugExceptions);
        vmcs.write(Field::GuestPendingDebugExceptions, pending | pending_debug::BS);
    }
}

/// Injects `fault` at the next VM entry with `vmcs`, in place of the instruction that exited.
pub fn inject_fault<V: Vmcs + ?Sized, G: Gprs + ?Sized>(vmcs: &mut V, gprs: &mut G, fault: Fault) {
    if let Some(address) = fault.cr2 {
        gprs.set_cr2(address);
    }
    let mut info = interruption::VALID | interruption::HARDWARE_EXCEPTION | u32::from(fault.vector);
    // Exceptions have no error code in real-address mode.
    if let Some(code) = fault.error_code
        && vmcs.read(Field::GuestCr0) & cr0::PE != 0
    {
        info |= interruption::ERROR_CODE;
        vmcs.write(Field::EntryExceptionErrorCode, code.into());
    }
    vmcs.write(Field::EntryInterruptionInfo, info.into());
}

/// The general-purpose register with encoding `n`, RSP included.
pub(crate) fn register<V: Vmcs + ?Sized, G: Gprs + ?Sized>(vmcs: &V, gprs: &G, n: u8) -> u64 {
    if n == RSP { vmcs.read(Field::GuestRsp) } else { gprs.get(n) }
}

/// Sets the general-purpose register with encoding `n`, RSP included.
pub(crate) fn set_register<V: Vmcs + ?Sized, G: Gprs + ?Sized>(vmcs: &mut V, gprs: &mut G, n: u8, value: u64) {
    if n == RSP { vmcs.write(Field::GuestRsp, value) } else { gprs.set(n, value) }
}
