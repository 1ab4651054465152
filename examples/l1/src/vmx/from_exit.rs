//! A VM exit, as an exit of SVM, and the guest's state back to its VMCB.

use nvmx::bits::{cr0, cr4, efer};
use nvmx::exit_reason;
use nvmx::field::Field;

use super::side::Fields;
use crate::guest::Exit;
use crate::vmcb::{Vmcb, event, exit};

/// An exit of VMX that SVM has no code for: this and the reason.
pub const OTHER: u64 = 1 << 32;

/// The synthetic exit after a direct flush.
const SYNTHETIC: u64 = 0x1000_0031;

/// What the exit says, and the state that it saved.
pub fn read(fields: &mut Fields<'_>, vmcb: &mut Vmcb) -> Exit {
    let reason = fields.read(Field::ExitReason);
    if reason >> 31 != 0 {
        return Exit { code: exit::INVALID, info1: reason, info2: fields.read(Field::ExitQualification) };
    }
    save(fields, vmcb);
    let seen = translate(fields, reason);
    vmcb.set_exit_code(seen.code);
    vmcb.set_exit_info1(seen.info1);
    vmcb.set_exit_info2(seen.info2);
    seen
}

fn save(fields: &Fields<'_>, vmcb: &mut Vmcb) {
    vmcb.set_rip(fields.read(Field::GuestRip));
    vmcb.set_rsp(fields.read(Field::GuestRsp));
    vmcb.set_rflags(fields.read(Field::GuestRflags));
    vmcb.set_cr3(fields.read(Field::GuestCr3));
    vmcb.set_cr0(fields.read(Field::GuestCr0) & !cr0::NE | vmcb.cr0() & cr0::NE);
    vmcb.set_cr4(fields.read(Field::GuestCr4) & !cr4::VMXE | vmcb.cr4() & cr4::VMXE);
    vmcb.set_efer(fields.read(Field::GuestEfer) | vmcb.efer() & !(efer::SCE | efer::LME | efer::LMA | efer::NXE));
    vmcb.set_int_state(u64::from(fields.read(Field::GuestInterruptibility) & 3 != 0));
    vmcb.set_event_inj(vmcb.event_inj() & !event::VALID);
    let vectoring = fields.read(Field::IdtVectoringInfo);
    vmcb.set_exit_int_info(vectoring | fields.read(Field::IdtVectoringErrorCode) << 32);
}

fn translate(fields: &Fields<'_>, reason: u64) -> Exit {
    let qualification = fields.read(Field::ExitQualification);
    let plain = |code| Exit { code, info1: 0, info2: 0 };
    let Ok(basic) = u32::try_from(reason) else { return plain(OTHER | reason) };
    match basic {
        exit_reason::EXCEPTION_OR_NMI => exception(fields, qualification),
        exit_reason::EXTERNAL_INTERRUPT => plain(exit::INTR),
        exit_reason::TRIPLE_FAULT => plain(exit::SHUTDOWN),
        exit_reason::CPUID => plain(exit::CPUID),
        exit_reason::HLT => plain(exit::HLT),
        exit_reason::INVLPG => plain(exit::INVLPG),
        exit_reason::RDTSC => plain(exit::RDTSC),
        exit_reason::VMCALL => plain(exit::VMMCALL),
        exit_reason::PAUSE => plain(exit::PAUSE),
        exit_reason::CR_ACCESS => {
            let write = if qualification >> 4 & 3 == 0 { exit::CR0_WRITE } else { exit::CR0_READ };
            plain(write + (qualification & 15))
        }
        exit_reason::MOV_DR => {
            let write = if qualification >> 4 & 1 == 0 { 0x30 } else { exit::DR0_READ };
            plain(write + (qualification & 7))
        }
        exit_reason::IO => port(fields, qualification),
        exit_reason::RDMSR => plain(exit::MSR),
        exit_reason::WRMSR => Exit { code: exit::MSR, info1: 1, info2: 0 },
        exit_reason::EPT_VIOLATION => violation(fields, qualification),
        _ if reason == SYNTHETIC => Exit { code: exit::HV_ENLIGHTENED, info1: 1, info2: 0 },
        _ => plain(OTHER | reason),
    }
}

fn exception(fields: &Fields<'_>, qualification: u64) -> Exit {
    let info = fields.read(Field::ExitInterruptionInfo);
    if info & 7 << 8 == event::TYPE_NMI {
        return Exit { code: exit::NMI, info1: 0, info2: 0 };
    }
    let code = if info & event::ERROR_CODE != 0 { fields.read(Field::ExitInterruptionErrorCode) } else { 0 };
    Exit { code: 0x40 + (info & 0xFF), info1: code, info2: qualification }
}

/// EXITINFO1 of IOIO: IN bit 0, size in bits 6:4, port in bits 31:16; EXITINFO2 is the next RIP.
fn port(fields: &Fields<'_>, qualification: u64) -> Exit {
    let size = (qualification & 7) + 1;
    let info1 = qualification >> 3 & 1 | size << 4 | qualification & 0xFFFF_0000;
    let next = fields.read(Field::GuestRip) + fields.read(Field::ExitInstructionLength);
    Exit { code: exit::IOIO, info1, info2: next }
}

/// EXITINFO1 of a nested page fault: P, W, U, fetch, and whether the guest's own tables were being read.
fn violation(fields: &Fields<'_>, qualification: u64) -> Exit {
    let present = u64::from(qualification >> 3 & 7 != 0);
    let stage = if qualification & 1 << 8 != 0 { 1 << 32 } else { 1 << 33 };
    let info1 = present | qualification & 2 | 4 | (qualification & 4) << 2 | stage;
    Exit { code: exit::NPF, info1, info2: fields.read(Field::GuestPhysicalAddress) }
}
