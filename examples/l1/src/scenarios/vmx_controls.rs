//! Controls that only VT-x has, and entries that it refuses.

use super::Outcome;
use super::exits::nothing;
use crate::guest::{Exit, Guest};
use crate::vmcb::exit;
use crate::vmx::OTHER;
use crate::{Failure, check, cpu_guest, frames};
use core::arch::naked_asm;
use hw::vmx_host::Capabilities;
use nvmx::controls::{pin, primary};
use nvmx::exit_reason;
use nvmx::field::Field;

fn capabilities() -> Capabilities {
    // SAFETY: VMX is there.
    unsafe { Capabilities::read() }
}

/// Skips a scenario where a control is not offered.
fn needs(may: u32, control: u32, what: &'static str) -> Outcome {
    if may & control == control { Ok(()) } else { Err(Failure::Missing(what)) }
}

/// Runs the guest with bits of a field set as well.
fn run_with(guest: &mut Guest, changes: &[(Field, u64)]) -> Exit {
    guest.run_changed(|fields| {
        for (field, bits) in changes {
            let value = fields.read(*field) | bits;
            fields.write(*field, value);
        }
    })
}

/// Fields set wrong, one at a time: how the entry fails; and right again, that it does not.
pub fn refused_entries() -> Outcome {
    const GUEST: u64 = 0x8000_0021;
    let cases: [(&'static str, Field, u64, u64, u64); 19] = [
        ("pin-based controls", Field::PinBasedControls, 0, 7, 0),
        ("primary controls", Field::PrimaryControls, 0, 7, 0),
        ("VM-exit controls", Field::ExitControls, 0, 7, 0),
        ("VM-entry controls", Field::EntryControls, 0, 7, 0),
        ("CR3-target count", Field::Cr3TargetCount, 5, 7, 0),
        ("MSR bitmap", Field::MsrBitmap, 8, 7, 0),
        ("injected type 1", Field::EntryInterruptionInfo, 0x8000_0100, 7, 0),
        ("host CR0", Field::HostCr0, 0, 8, 0),
        ("host CR3", Field::HostCr3, 1 << 51, 8, 0),
        ("host CR4", Field::HostCr4, 0, 8, 0),
        ("host selector", Field::HostCsSelector, 0xB, 8, 0),
        ("host TR", Field::HostTrSelector, 0, 8, 0),
        ("host RIP", Field::HostRip, 1 << 47, 8, 0),
        ("guest CR0", Field::GuestCr0, 0, GUEST, 0),
        ("guest RFLAGS", Field::GuestRflags, 0, GUEST, 0),
        ("guest CS", Field::GuestCsAccessRights, 0xA093, GUEST, 0),
        ("guest TR", Field::GuestTrAccessRights, 0x1_008B, GUEST, 0),
        ("activity state", Field::GuestActivity, 9, GUEST, 0),
        ("link pointer", Field::VmcsLinkPointer, 8, GUEST, 4),
    ];
    let guest = cpu_guest();
    for (what, field, wrong, number, qualification) in cases {
        guest.long_mode(nothing, 0);
        guest.expect(exit::HLT)?;
        guest.long_mode(nothing, 0);
        let right = guest.side().field(field);
        let seen = guest.run_changed(|fields| fields.write(field, wrong));
        check(what, seen.code, exit::INVALID)?;
        check(what, seen.info1, number)?;
        check(what, seen.info2, qualification)?;
        let seen = guest.run_changed(|fields| {
            if field.encoding().0 >> 10 & 3 == 3 {
                fields.write(field, right);
            }
        });
        check(what, seen.code, exit::HLT)?;
    }
    Ok(())
}

#[unsafe(naked)]
unsafe extern "C" fn program_spin() {
    naked_asm!("2:", "inc r12", "jmp 2b")
}

/// The timer ends a run that nothing else would end.
pub fn preemption_timer() -> Outcome {
    needs(capabilities().pin.may, pin::PREEMPTION_TIMER, "the VMX-preemption timer")?;
    let guest = cpu_guest();
    guest.long_mode(program_spin, 0);
    let run = |guest: &mut Guest, value: u64| {
        let timer = u64::from(pin::PREEMPTION_TIMER);
        guest.run_changed(|fields| {
            let pins = fields.read(Field::PinBasedControls) | timer;
            fields.write(Field::PinBasedControls, pins);
            fields.write(Field::PreemptionTimer, value);
        })
    };
    let seen = run(guest, 0);
    check("exit with value 0", seen.code, OTHER | u64::from(exit_reason::PREEMPTION_TIMER))?;
    check("no instruction was executed", guest.gprs.r12, 0)?;
    let seen = run(guest, 5000);
    check("exit with value 5000", seen.code, OTHER | u64::from(exit_reason::PREEMPTION_TIMER))?;
    check("the guest ran", u64::from(guest.gprs.r12 > 10), 1)
}

#[unsafe(naked)]
unsafe extern "C" fn program_sti() {
    naked_asm!("inc r12", "sti", "inc r12", "inc r12", "hlt")
}

/// The exit comes when an interrupt could: after STI and the instruction behind it.
pub fn interrupt_window() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_sti, 0);
    let window = (Field::PrimaryControls, u64::from(primary::INTERRUPT_WINDOW_EXITING));
    let seen = run_with(guest, &[window]);
    check("exit", seen.code, OTHER | u64::from(exit_reason::INTERRUPT_WINDOW))?;
    check("instructions before it", guest.gprs.r12, 2)?;
    guest.expect(exit::HLT)?;
    check("instructions in all", guest.gprs.r12, 3)?;
    // With IF set it comes at once.
    guest.long_mode(program_sti, 0);
    guest.vmcb.set_rflags(2 | 1 << 9);
    let seen = run_with(guest, &[window]);
    check("exit", seen.code, OTHER | u64::from(exit_reason::INTERRUPT_WINDOW))?;
    check("instructions before it", guest.gprs.r12, 0)
}

/// At once without virtual-NMI blocking; with it, not before IRET.
pub fn nmi_window() -> Outcome {
    let pins = u64::from(pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    needs(capabilities().pin.may, pins as u32, "virtual NMIs")?;
    let window = (Field::PrimaryControls, u64::from(primary::NMI_WINDOW_EXITING));
    let guest = cpu_guest();
    guest.long_mode(program_sti, 0);
    let seen = run_with(guest, &[(Field::PinBasedControls, pins), window]);
    check("exit", seen.code, OTHER | u64::from(exit_reason::NMI_WINDOW))?;
    check("instructions before it", guest.gprs.r12, 0)?;
    guest.long_mode(program_sti, 0);
    let seen = run_with(guest, &[(Field::PinBasedControls, pins), window, (Field::GuestInterruptibility, 8)]);
    check("exit while blocked", seen.code, exit::HLT)
}

#[unsafe(naked)]
unsafe extern "C" fn program_cr() {
    naked_asm!(
        "mov rax, cr4",
        "mov r8, rax",
        "xor rax, 4",
        "mov cr4, rax",
        "mov r9, 1",
        "xor rax, 0x2000",
        "mov cr4, rax",
        "hlt",
    )
}

/// Masked bits of CR4 are the shadow's; a write that changes one exits, and others do not.
pub fn cr_shadows() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_cr, 0);
    let shadow = guest.vmcb.cr4() & !(1 << 13);
    let seen = guest.run_changed(|fields| fields.write(Field::Cr4ReadShadow, shadow));
    check("CR4 as the guest reads it", guest.gprs.r8, shadow)?;
    check("a change of TSD did not exit", guest.gprs.r9, 1)?;
    check("a change of VMXE", seen.code, exit::CR4_WRITE)?;
    check("TSD is changed", guest.vmcb.cr4() & 4, (shadow & 4) ^ 4)
}

#[unsafe(naked)]
unsafe extern "C" fn program_read() {
    naked_asm!("mov rax, [rdi]", "hlt")
}

/// Page faults exit by their error code: mask and match.
pub fn page_fault_mask() -> Outcome {
    let unmapped = 0x7F12_3456_7000;
    let guest = cpu_guest();
    for (mask, value, exits) in [(0, 0, true), (2, 0, true), (2, 2, false), (1, 1, false), (3, 0, true)] {
        guest.long_mode(program_read, unmapped);
        guest.vmcb.set_exception_intercepts(1 << 14);
        guest.vmcb.set_idtr_limit(0);
        let seen = guest.run_changed(|fields| {
            fields.write(Field::PageFaultErrorCodeMask, mask);
            fields.write(Field::PageFaultErrorCodeMatch, value);
        });
        check("exit", seen.code, if exits { exit::EXCP_PF } else { exit::SHUTDOWN })?;
        if exits {
            check("address", seen.info2, unmapped)?;
        }
    }
    Ok(())
}

#[unsafe(naked)]
unsafe extern "C" fn program_lstar() {
    naked_asm!("mov ecx, 0xC0000082", "rdmsr", "mov r8, rax", "mov eax, 0x3333", "xor edx, edx", "wrmsr", "hlt",)
}

const LSTAR: u64 = 0xC000_0082;

/// MSRs are loaded at entry, stored and loaded at exit; a list that names FS.base is refused with its entry's number.
pub fn msr_lists() -> Outcome {
    let lists = frames::page() as *mut [[u64; 2]; 16];
    // SAFETY: the page is this scenario's.
    let lists = unsafe { &mut *lists };
    lists[0] = [LSTAR, 0x1111];
    lists[4] = [LSTAR, 0];
    lists[8] = [LSTAR, 0x2222];
    let at = lists.as_ptr() as u64;
    let guest = cpu_guest();
    guest.long_mode(program_lstar, 0);
    let areas = |fields: &mut crate::vmx::Fields<'_>| {
        for (field, value) in [
            (Field::EntryMsrLoadAddress, at),
            (Field::EntryMsrLoadCount, 1),
            (Field::ExitMsrStoreAddress, at + 64),
            (Field::ExitMsrStoreCount, 1),
            (Field::ExitMsrLoadAddress, at + 128),
            (Field::ExitMsrLoadCount, 1),
        ] {
            fields.write(field, value);
        }
    };
    let seen = guest.run_changed(areas);
    check("exit", seen.code, exit::HLT)?;
    check("loaded at entry", guest.gprs.r8, 0x1111)?;
    check("stored at exit", lists[4][1], 0x3333)?;
    // SAFETY: 64-bit processors have the MSR.
    check("loaded at exit", unsafe { hw::msr::rdmsr(LSTAR as u32) }, 0x2222)?;
    lists[1] = [0xC000_0100, 0];
    guest.long_mode(program_lstar, 0);
    let seen = guest.run_changed(|fields| {
        areas(fields);
        fields.write(Field::EntryMsrLoadCount, 2);
    });
    check("exit", seen.code, exit::INVALID)?;
    check("reason", seen.info1, 0x8000_0022)?;
    check("entry", seen.info2, 2)
}

#[unsafe(naked)]
unsafe extern "C" fn program_tsc() {
    naked_asm!("rdtsc", "shl rdx, 32", "or rax, rdx", "mov r8, rax", "hlt")
}

/// The guest's time stamp counter is the processor's plus the offset.
pub fn tsc_offset() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_tsc, 0);
    guest.vmcb.set_tsc_offset(1 << 50);
    let before = hw::cpu::rdtsc();
    let seen = run_with(guest, &[(Field::PrimaryControls, u64::from(primary::TSC_OFFSETTING))]);
    check("exit", seen.code, exit::HLT)?;
    let within = guest.gprs.r8 > before + (1 << 50) && guest.gprs.r8 < hw::cpu::rdtsc() + (1 << 50);
    check("the guest's time lies between", u64::from(within), 1)
}
