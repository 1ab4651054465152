//! What L1 is told about an exit of L2, and which exit reasons define which information (SDM volume 3, "VM-Exit
//! Information Fields").
//!
//! Used by the routing and by the exit itself; reads VMCS02's exit information.

use crate::bits::interruption;
use crate::events::Injection;
use crate::exit_reason;
use crate::field::Field;
use crate::machine::Vmcs;

/// What L1 is told about an exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// The exit-reason field, bit 31 for a failed entry included.
    pub reason: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit interruption information; 0 when no event is reported.
    pub interruption_info: u32,
    /// VM-exit interruption error code.
    pub error_code: u32,
    /// VM-exit instruction length, bytes.
    pub instruction_length: u32,
    /// VM-exit instruction information.
    pub instruction_info: u32,
    /// Guest-linear address.
    pub linear: u64,
    /// Guest-physical address.
    pub physical: u64,
}

impl Exit {
    /// An exit that has only a qualification.
    #[inline]
    pub const fn simple(reason: u32, qualification: u64) -> Self {
        Self {
            reason,
            qualification,
            interruption_info: 0,
            error_code: 0,
            instruction_length: 0,
            instruction_info: 0,
            linear: 0,
            physical: 0,
        }
    }

    /// The exit that `vmcs` has just made, with what its reason defines and nothing else.
    pub(crate) fn of<V: Vmcs + ?Sized>(vmcs: &V, reason: u32) -> Self {
        let read_if = |condition: bool, field| if condition { vmcs.read(field) } else { 0 };
        let basic = reason & exit_reason::BASIC;
        let has = |set: u128| basic < 128 && set >> (basic & 127) & 1 != 0;
        let interruption_info = read_if(has(INTERRUPTION), Field::ExitInterruptionInfo) as u32;
        let with_code = interruption_info & interruption::ERROR_CODE != 0;
        let length = has(LENGTH) || Injection::is_software(interruption_info);
        Self {
            reason,
            qualification: read_if(has(QUALIFICATION), Field::ExitQualification),
            interruption_info,
            error_code: read_if(with_code, Field::ExitInterruptionErrorCode) as u32,
            instruction_length: read_if(length, Field::ExitInstructionLength) as u32,
            instruction_info: read_if(has(INSTRUCTION), Field::ExitInstructionInfo) as u32,
            linear: read_if(has(LINEAR), Field::GuestLinearAddress),
            physical: read_if(has(PHYSICAL), Field::GuestPhysicalAddress),
        }
    }
}

/// A set of basic exit reasons, by bit.
const fn reasons(mut list: &[u32]) -> u128 {
    let mut set = 0;
    while let [reason, rest @ ..] = list {
        set |= 1 << (*reason & 127);
        list = rest;
    }
    set
}

use exit_reason as r;

/// Exits with VM-exit interruption information.
const INTERRUPTION: u128 = reasons(&[r::EXCEPTION_OR_NMI, r::EXTERNAL_INTERRUPT]);
/// Exits with a qualification.
const QUALIFICATION: u128 = reasons(&[
    r::EXCEPTION_OR_NMI,
    r::SIPI,
    r::TASK_SWITCH,
    r::INVLPG,
    r::VMCLEAR,
    r::VMPTRLD,
    r::VMPTRST,
    r::VMREAD,
    r::VMWRITE,
    r::VMXON,
    r::CR_ACCESS,
    r::MOV_DR,
    r::IO,
    r::INVALID_GUEST_STATE,
    r::MSR_LOADING,
    r::MWAIT,
    r::MONITOR,
    r::APIC_ACCESS,
    r::VIRTUALIZED_EOI,
    r::GDTR_IDTR_ACCESS,
    r::LDTR_TR_ACCESS,
    r::EPT_VIOLATION,
    r::INVEPT,
    r::INVVPID,
    r::APIC_WRITE,
    r::INVPCID,
    r::PML_FULL,
    r::XSAVES,
    r::XRSTORS,
]);
/// Exits with instruction information.
const INSTRUCTION: u128 = reasons(&[
    r::VMCLEAR,
    r::VMPTRLD,
    r::VMPTRST,
    r::VMREAD,
    r::VMWRITE,
    r::VMXON,
    r::IO,
    r::GDTR_IDTR_ACCESS,
    r::LDTR_TR_ACCESS,
    r::INVEPT,
    r::INVVPID,
    r::RDRAND,
    r::INVPCID,
    r::RDSEED,
    r::XSAVES,
    r::XRSTORS,
    r::UMWAIT,
    r::TPAUSE,
]);
/// Exits that instructions cause, and those of accesses whose emulation needs the instruction's length.
const LENGTH: u128 = INSTRUCTION
    | reasons(&[
        r::TASK_SWITCH,
        r::CPUID,
        r::GETSEC,
        r::HLT,
        r::INVD,
        r::INVLPG,
        r::RDPMC,
        r::RDTSC,
        r::RSM,
        r::VMCALL,
        r::VMLAUNCH,
        r::VMRESUME,
        r::VMXOFF,
        r::CR_ACCESS,
        r::MOV_DR,
        r::RDMSR,
        r::WRMSR,
        r::MWAIT,
        r::MONITOR,
        r::PAUSE,
        r::APIC_ACCESS,
        r::EPT_VIOLATION,
        r::EPT_MISCONFIGURATION,
        r::RDTSCP,
        r::WBINVD,
        r::XSETBV,
        r::VMFUNC,
        r::ENCLS,
    ]);
/// Exits with a guest-linear address.
const LINEAR: u128 = reasons(&[r::CR_ACCESS, r::IO, r::EPT_VIOLATION]);
/// Exits with a guest-physical address.
const PHYSICAL: u128 = reasons(&[r::EPT_VIOLATION, r::EPT_MISCONFIGURATION]);
/// Exits between instructions, where L2 may be inactive and debug exceptions may be pending.
pub(crate) const BETWEEN: u128 = reasons(&[
    r::EXCEPTION_OR_NMI,
    r::EXTERNAL_INTERRUPT,
    r::TRIPLE_FAULT,
    r::INIT,
    r::SIPI,
    r::IO_SMI,
    r::OTHER_SMI,
    r::INTERRUPT_WINDOW,
    r::NMI_WINDOW,
    r::MONITOR_TRAP_FLAG,
    r::MACHINE_CHECK,
    r::TPR_BELOW_THRESHOLD,
    r::VIRTUALIZED_EOI,
    r::PREEMPTION_TIMER,
    r::APIC_WRITE,
]);
