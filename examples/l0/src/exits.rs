//! What L0 does at an exit of L1.
//!
//! Called by the run loop right after #VMEXIT, with GIF clear. Each kind of exit is one function.

use hw::{apic, msr, port, svm};

use crate::cpuid;
use crate::debug;
use crate::fatal::Failure;
use crate::mmio;
use crate::npt01::Kind;
use crate::vp::Vp;
use nsvm::exit_code as code;
use nsvm::vmcb::bits::{Event, misc1};

const GP: u8 = 13;
const UD: u8 = 6;

/// Carries out the exit that VMCB01 tells.
pub fn l1(vp: &mut Vp) -> Result<(), Failure> {
    let exit = vp.pages.vmcb01.control.exit_code;
    if vp.pages.vmcb01.control.exit_int_info & Event::VALID != 0 {
        deliver_again(vp);
    }
    match exit {
        code::CPUID => cpuid_exit(vp),
        code::MSR => msr_exit(vp),
        code::NPF => return npf(vp),
        code::NMI => take_nmi(vp),
        code::IOIO => io_exit(vp),
        code::IRET => iret(vp),
        // INIT lines of other processors never get through; one from outside resets L1's processor all the same.
        code::INIT => vp.init(),
        code::SHUTDOWN => reset_machine(vp),
        code::VMRUN..=code::SKINIT | code::INVLPGA => vp.inject(UD, None),
        _ if code::is_invalid(exit) => return Err(Failure::Vmcb01Refused),
        _ => return Err(Failure::UnexpectedExit),
    }
    Ok(())
}

/// An event was being delivered when L1 exited: deliver it again at the next entry, unless it is one of an instruction
/// that will be executed again (INTn, INT3, INTO).
fn deliver_again(vp: &mut Vp) {
    let v = &mut vp.pages.vmcb01;
    let event = v.control.exit_int_info;
    let (kind, vector) = (event >> 8 & 7, event & 0xff);
    let again = match (kind, vector) {
        (4, _) | (3, 3 | 4) => return,
        // TCG reports an interrupt as an exception when its delivery meets a nested page fault.
        (3, 32..) => event & !(7 << 8),
        _ => event,
    };
    v.control.event_inj = if again & Event::ERROR_VALID != 0 { again } else { again & 0xffff_ffff };
}

/// Length of the intercepted instruction, whose opcode is `opcode` bytes long and has no operands: prefixes count.
fn length(vp: &Vp, opcode: u64) -> u64 {
    let (bytes, n) = vp.instruction();
    let wide = vp.is_64bit();
    let prefixes = bytes.iter().take(n).take_while(|&&b| {
        matches!(b, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
            || (wide && b & 0xf0 == 0x40)
    });
    prefixes.count() as u64 + opcode
}

fn cpuid_exit(vp: &mut Vp) {
    let v = &vp.pages.vmcb01;
    let (leaf, subleaf) = (v.save.rax as u32, vp.gprs.rcx as u32);
    let r = cpuid::native(leaf, subleaf, v.save.cr4, vp.shared.enlighten);
    vp.pages.vmcb01.save.rax = u64::from(r.eax);
    vp.gprs.rbx = u64::from(r.ebx);
    vp.gprs.rcx = u64::from(r.ecx);
    vp.gprs.rdx = u64::from(r.edx);
    let length = length(vp, 2);
    vp.advance(length);
}

fn msr_exit(vp: &mut Vp) {
    let number = vp.gprs.rcx as u32;
    let write = vp.pages.vmcb01.control.exit_info_1 & 1 != 0;
    let done = if write {
        let value = vp.gprs.rdx << 32 | vp.pages.vmcb01.save.rax & 0xffff_ffff;
        write_msr(vp, number, value)
    } else {
        match read_msr(vp, number) {
            Some(value) => {
                vp.pages.vmcb01.save.rax = value & 0xffff_ffff;
                vp.gprs.rdx = value >> 32;
                true
            }
            None => false,
        }
    };
    if done {
        let length = length(vp, 2);
        vp.advance(length);
    } else {
        vp.inject(GP, Some(0));
    }
}

fn read_msr(vp: &mut Vp, number: u32) -> Option<u64> {
    match number {
        msr::EFER => Some(vp.pages.vmcb01.save.efer & !msr::EFER_SVME),
        msr::PAT => Some(vp.pages.vmcb01.save.g_pat),
        msr::APIC_BASE => Some(vp.apic_base),
        _ => None,
    }
}

fn write_msr(vp: &mut Vp, number: u32, value: u64) -> bool {
    match number {
        msr::EFER => write_efer(vp, value),
        msr::PAT => {
            // Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
            let legal = value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4..=7));
            if legal {
                vp.pages.vmcb01.save.g_pat = value;
            }
            legal
        }
        msr::APIC_BASE => write_apic_base(vp, value),
        msr::X2APIC_ICR => {
            mmio::send_icr(vp, (value >> 32) as u32, value as u32, |vp| {
                // SAFETY: x2APIC mode is on, or the guest's WRMSR would have faulted; the command was checked.
                unsafe { msr::wrmsr(msr::X2APIC_ICR, value) };
                let _ = vp;
            });
            true
        }
        _ => false,
    }
}

/// EFER as L1 writes it: bits that the processor knows, LMA and LME by the rules of paging.
fn write_efer(vp: &mut Vp, value: u64) -> bool {
    let v = &mut vp.pages.vmcb01;
    let (old, paging) = (v.save.efer, v.save.cr0 & 1 << 31 != 0);
    // SCE, LME, NXE, LMSLE, FFXSR, TCE; LMA is read-only and may be written as anything that it is.
    let known = msr::EFER_SCE | msr::EFER_LME | msr::EFER_LMA | msr::EFER_NXE | 1 << 13 | 1 << 14 | 1 << 15;
    if value & !known != 0 || (paging && (value ^ old) & msr::EFER_LME != 0) {
        return false;
    }
    v.save.efer = value & !msr::EFER_LMA | old & msr::EFER_LMA | msr::EFER_SVME;
    true
}

/// APIC_BASE as L1 sees it. The real APIC stays enabled where it is: L0 needs it. x2APIC mode is passed on.
fn write_apic_base(vp: &mut Vp, value: u64) -> bool {
    const KNOWN: u64 = 0x000f_ffff_ffff_f000 | apic::BASE_ENABLE | apic::BASE_X2APIC | apic::BASE_BSP;
    let x2apic_there = hw::cpu::cpuid(1, 0).ecx & 1 << 21 != 0;
    let mode = |v: u64| (v & apic::BASE_ENABLE != 0, v & apic::BASE_X2APIC != 0);
    let legal = match (mode(vp.apic_base), mode(value)) {
        (_, (false, true)) => false,
        ((_, true), (true, false)) => false,
        ((false, _), (true, true)) => false,
        (_, (_, true)) => x2apic_there,
        _ => true,
    };
    if value & !KNOWN != 0 || !legal {
        return false;
    }
    let x2apic = value & apic::BASE_X2APIC != 0;
    if x2apic != (vp.apic_base & apic::BASE_X2APIC != 0) {
        // SAFETY: a legal change of mode of this processor's APIC; leaving x2APIC goes through disabled.
        unsafe {
            let real = msr::rdmsr(msr::APIC_BASE);
            if x2apic {
                msr::wrmsr(msr::APIC_BASE, real | apic::BASE_X2APIC);
            } else {
                msr::wrmsr(msr::APIC_BASE, real & !(apic::BASE_X2APIC | apic::BASE_ENABLE));
                msr::wrmsr(msr::APIC_BASE, real & !apic::BASE_X2APIC);
            }
        }
        vp.shared.ipis.set_x2apic(vp.id, x2apic);
    }
    vp.apic_base = value;
    true
}

fn npf(vp: &mut Vp) -> Result<(), Failure> {
    let (info, gpa) = (vp.pages.vmcb01.control.exit_info_1, vp.pages.vmcb01.control.exit_info_2);
    let present = info & 1 != 0;
    if present && info & 2 != 0 {
        let kind = vp.shared.npt01.lock().kind(gpa);
        if kind != Kind::Plain {
            return mmio::write(vp, gpa, kind);
        }
    }
    if !present {
        return match vp.shared.npt01.lock().map_gib(gpa) {
            Ok(true) => Ok(()),
            // Mapped meanwhile by another processor, or an address that the processor does not have.
            Ok(false) if gpa >= crate::memory::FOUR_GIB => Ok(()),
            Ok(false) => Err(Failure::UnexpectedFault),
            Err(_) => Err(Failure::OutOfPages),
        };
    }
    Err(Failure::UnexpectedFault)
}

/// An NMI exit: the NMI is still pending. Take it in L0's handler, which says whose it is.
fn take_nmi(vp: &mut Vp) {
    let _ = vp;
    // SAFETY: the run loop has loaded L0's TSS; its interrupt table is loaded always.
    unsafe { svm::take_held_events() };
}

/// L1's NMI handler is about to return: NMIs are open again.
fn iret(vp: &mut Vp) {
    let v = &mut vp.pages.vmcb01;
    v.control.intercepts.misc1 &= !misc1::IRET;
    vp.nmi_masked = false;
}

/// The port of L0's messages: reads give ones, writes vanish.
fn io_exit(vp: &mut Vp) {
    let (info, next) = (vp.pages.vmcb01.control.exit_info_1, vp.pages.vmcb01.control.exit_info_2);
    let string = info & 1 << 2 != 0;
    if info & 1 != 0 && !string {
        let rax = vp.pages.vmcb01.save.rax;
        let ones = match info >> 4 & 7 {
            1 => rax | 0xff,
            2 => rax | 0xffff,
            _ => 0xffff_ffff,
        };
        vp.pages.vmcb01.save.rax = ones;
    }
    let length = next.wrapping_sub(vp.pages.vmcb01.save.rip);
    vp.advance(length);
}

/// L1 shut down (a triple fault): the machine resets, as it would without L0.
fn reset_machine(vp: &mut Vp) {
    debug::print(format_args!(
        "l0: cpu {}: L1 shut down at rip {:#x}: resetting the machine",
        vp.id, vp.pages.vmcb01.save.rip
    ));
    // SAFETY: the reset port of PC chipsets, then the keyboard controller's: the machine restarts.
    unsafe {
        port::outb(0xcf9, 0x02);
        port::outb(0xcf9, 0x06);
        port::outb(0x64, 0xfe);
    }
    loop {
        hw::cpu::halt();
    }
}
