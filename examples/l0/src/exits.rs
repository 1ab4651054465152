//! What L0 does at an exit of L1.
//!
//! Called by the run loop right after #VMEXIT, with GIF clear. Each kind of exit is one function.

use hvcore::addr::Level;
use hw::{msr, port, svm};
use nsvm::insn::Kind;
use nsvm::{Fault, L1Exit, exit_code as code};

use crate::counters;
use crate::cpuid;
use crate::debug;
use crate::fatal::Failure;
use crate::hyperv;
use crate::lapic;
use crate::mmio;
use crate::nested;
use crate::npt01::Kind as Page;
use crate::ports;
use crate::vp::Vp;

/// Carries out the exit that VMCB01 tells.
#[inline(always)]
pub fn l1(vp: &mut Vp) -> Result<(), Failure> {
    let exit = vp.m.vmcb01.control.exit_code;
    match vp.nested.l1_exit(&mut vp.m) {
        L1Exit::Resume => Ok(()),
        L1Exit::EnterL2(invalidate) => {
            nested::enter_l2(vp, invalidate);
            Ok(())
        }
        L1Exit::InvalidateAsid { asid } => {
            nested::invalidate_asid(vp, asid);
            Ok(())
        }
        L1Exit::NotMine if exit == code::CPUID => {
            cpuid_exit(vp);
            Ok(())
        }
        L1Exit::NotMine if exit == code::VMMCALL => {
            hyperv::l1_call(vp);
            Ok(())
        }
        L1Exit::NotMine => shared(vp),
        L1Exit::Shutdown => reset_machine(vp),
    }
}

/// Exits of either level that are L0's own. The VMCB of the level that runs tells them.
pub fn shared(vp: &mut Vp) -> Result<(), Failure> {
    let exit = vp.vmcb().control.exit_code;
    match exit {
        code::CPUID => cpuid_exit(vp),
        code::MSR => msr_exit(vp),
        code::NPF => {
            let control = &vp.vmcb().control;
            let (gpa, info) = (control.exit_info_2, control.exit_info_1);
            return npf(vp, gpa, info);
        }
        // The NMI is still pending: take it in L0's handler, which says whose it is.
        // SAFETY: the run loop has loaded L0's TSS; its interrupt table is loaded always.
        code::NMI => unsafe {
            hw::cpu::cli();
            svm::take_held_events();
        },
        code::IOIO => io_exit(vp),
        // INIT lines of other processors never get through; one from outside reaches L1 all the same.
        code::INIT => vp.nested.pend_init(),
        code::SHUTDOWN => return reset_machine(vp),
        code::VMMCALL => hyperv::l1_call(vp),
        _ if code::is_invalid(exit) => return Err(Failure::Vmcb01Refused),
        _ => return Err(Failure::UnexpectedExit),
    }
    Ok(())
}

/// Raises an exception in the level that runs.
pub fn raise(vp: &mut Vp, fault: Fault) {
    if vp.nested.level() == Level::L1 {
        vp.m.vmcb01.inject_exception(fault.vector, fault.error_code);
        return;
    }
    // If L1's VMCB is gone, the next exit finds that out.
    let _ = vp.nested.raise_in_l2(&mut vp.m, fault);
}

/// Moves the guest past the instruction `kind` that exited; `false` when it is another one by now.
#[inline]
pub fn step_over(vp: &mut Vp, kind: Kind) -> bool {
    vp.nested.step_over(&mut vp.m, kind)
}

fn cpuid_exit(vp: &mut Vp) {
    if !step_over(vp, Kind::Cpuid) {
        return;
    }
    let subleaf = vp.m.gprs.rcx as u32;
    let shared = vp.shared;
    let v = vp.vmcb();
    let r = cpuid::answer(v.save.rax as u32, subleaf, v.save.cr4, shared);
    v.save.rax = u64::from(r.eax);
    vp.m.gprs.rbx = u64::from(r.ebx);
    vp.m.gprs.rcx = u64::from(r.ecx);
    vp.m.gprs.rdx = u64::from(r.edx);
}

fn msr_exit(vp: &mut Vp) {
    let number = vp.m.gprs.rcx as u32;
    let rax = vp.vmcb().save.rax;
    let write = vp.vmcb().control.exit_info_1 & 1 != 0;
    let kind = if write { Kind::Wrmsr } else { Kind::Rdmsr };
    if write {
        let value = vp.m.gprs.rdx << 32 | rax & 0xffff_ffff;
        return match write_msr(vp, number, value) {
            true => {
                step_over(vp, kind);
            }
            false => raise(vp, Fault::GP),
        };
    }
    match read_msr(vp, number) {
        Some(value) => {
            if step_over(vp, kind) {
                vp.vmcb().save.rax = value & 0xffff_ffff;
                vp.m.gprs.rdx = value >> 32;
            }
        }
        None => raise(vp, Fault::GP),
    }
}

fn read_msr(vp: &mut Vp, number: u32) -> Option<u64> {
    match number {
        msr::PAT => Some(vp.vmcb().save.g_pat),
        msr::APIC_BASE => Some(vp.apic_base),
        0x4000_0000..=0x4fff_ffff => vp.hyperv.read_msr(vp.shared, number),
        _ => None,
    }
}

fn write_msr(vp: &mut Vp, number: u32, value: u64) -> bool {
    match number {
        msr::PAT => {
            // Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
            let legal = value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4..=7));
            if legal {
                vp.vmcb().save.g_pat = value;
            }
            legal
        }
        msr::APIC_BASE => lapic::write_base(vp.shared, vp.id, &mut vp.apic_base, value),
        msr::X2APIC_ICR => {
            mmio::send_icr(vp.shared, vp.id, (value >> 32) as u32, value as u32, || {
                // SAFETY: x2APIC mode is on, or the guest's WRMSR would have faulted; the command was checked.
                unsafe { msr::wrmsr(msr::X2APIC_ICR, value) };
            });
            true
        }
        0x4000_0000..=0x4fff_ffff => vp.hyperv.write_msr(vp.shared, vp.id, vp.counters, number, value),
        _ => false,
    }
}

/// A fault at `gpa`, an L1 GPA, in L0's own nested tables. `info` is EXITINFO1.
pub fn npf(vp: &mut Vp, gpa: u64, info: u64) -> Result<(), Failure> {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 1 << 1;
    if info & (PRESENT | WRITE) == PRESENT | WRITE {
        let kind = vp.shared.kind(gpa);
        if kind != Page::Plain {
            mmio::write(vp, gpa, kind);
            return Ok(());
        }
    }
    if info & PRESENT == 0 && gpa >= crate::memory::FOUR_GIB {
        // `false`: another processor mapped it meanwhile.
        return vp.shared.npt01.lock().map_gib(gpa).map(|_| ()).map_err(|_| Failure::OutOfPages);
    }
    Err(Failure::UnexpectedFault)
}

/// A port that L0 watches. Its own: reads give ones, writes vanish. Those that end the machine: carried out, after
/// L0 has printed its counters.
fn io_exit(vp: &mut Vp) {
    let shared = vp.shared;
    let v = vp.vmcb();
    let (info, next) = (v.control.exit_info_1, v.control.exit_info_2);
    let (number, input, size) = ((info >> 16) as u16, info & 1 != 0, info >> 4 & 7);
    let string = info & 1 << 2 != 0;
    let rax = v.save.rax;
    let own = (number..number.saturating_add(size as u16)).contains(&debug::PORT);
    if !string {
        let value = match (input, own, size) {
            (true, true, _) => vp.latched,
            // SAFETY: L1 owns the port, and would have done this itself.
            (true, false, 1) => unsafe { port::inb(number) }.into(),
            // SAFETY: as above.
            (true, false, 2) => unsafe { port::inw(number) }.into(),
            // SAFETY: as above.
            (true, false, _) => unsafe { port::inl(number) },
            (false, true, _) => {
                if shared.test_hooks {
                    test_hook(vp, rax as u8);
                }
                0
            }
            (false, false, _) => {
                ports::end(shared, number, rax as u32, size);
                0
            }
        };
        if input {
            let v = vp.vmcb();
            let value = u64::from(value);
            v.save.rax = match size {
                1 => rax & !0xff | value & 0xff,
                2 => rax & !0xffff | value & 0xffff,
                _ => value,
            };
        }
    }
    vp.vmcb().complete_instruction(next);
}

/// What a test asks for by a letter: L0's counters printed, or one of them to be read from the port.
fn test_hook(vp: &mut Vp, letter: u8) {
    vp.latched = match letter {
        b'S' => {
            counters::print(vp.shared.ipis.count());
            return vp.count_from_now();
        }
        b'w' => vp.counters.flush_wait_ticks.get(),
        b'e' => counters::sum(|c| c.l1_exits.get() + c.l2_exits.get()),
        b'v' => counters::sum(|c| c.l2_entries.get()),
        _ => return,
    } as u32;
}

/// L1 shut down (a triple fault): the machine resets, as it would without L0.
pub fn reset_machine(vp: &mut Vp) -> Result<(), Failure> {
    debug::print(format_args!(
        "l0: cpu {}: L1 shut down at rip {:#x}: resetting the machine",
        vp.id, vp.m.vmcb01.save.rip
    ));
    counters::print(vp.shared.ipis.count());
    ports::reset()
}
