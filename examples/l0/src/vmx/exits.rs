//! The exits of either level that are L0's own. Called by [`crate::vmx::nested`] when the library leaves one to L0.

use hvcore::addr::Level;
use hvcore::hypercall::{CallerMode, Outcome};
use hvcore::memory::L1Caller;
use hw::{cpu, msr, port, vmx};
use nvmx::field::Field;
use nvmx::{Fault, Gprs as _, Vmcs, exit_reason as reason};

use crate::fatal::Failure;
use crate::hyperv::Call;
use crate::npt01::Kind as Page;
use crate::vmx::vcr;
use crate::vmx::vp::Vp;
use crate::{counters, cpuid, debug, lapic, mmio, ports};

const INFO_VALID: u64 = 1 << 31;
/// Bits 10:8.
const TYPE: u64 = 7 << 8;
const TYPE_NMI: u64 = 2 << 8;

/// Exits of either level that are L0's own, with exit reason `exit`. The VMCS of the level that runs tells them.
pub fn shared(vp: &mut Vp, exit: u32) -> Result<(), Failure> {
    match exit {
        reason::CPUID => cpuid_exit(vp),
        reason::RDMSR | reason::WRMSR => msr_exit(vp, exit == reason::WRMSR),
        reason::EXCEPTION_OR_NMI => return nmi_exit(vp),
        reason::EPT_VIOLATION => {
            let v = vp.vmcs();
            let (gpa, how) = (v.read(Field::GuestPhysicalAddress), v.read(Field::ExitQualification));
            return ept_violation(vp, gpa, how);
        }
        reason::CR_ACCESS => return cr_access(vp),
        reason::XSETBV => xsetbv(vp),
        reason::IO => io_exit(vp),
        reason::VMCALL => l1_call(vp),
        reason::INVD | reason::WBINVD => {
            // SAFETY: slow, and that is all. L1's INVD writes back, too: L0's own data may be in the caches.
            unsafe { cpu::wbinvd() };
            vp.step_over();
        }
        reason::TRIPLE_FAULT => return reset_machine(vp),
        // INIT lines of other processors never get through; one from outside reaches L1 all the same.
        reason::INIT => vp.nested.pend_init(),
        reason::GETSEC => raise(vp, Fault::UD),
        _ if exit & reason::ENTRY_FAILURE != 0 => return Err(Failure::Vmcs01Refused),
        _ => return Err(Failure::UnexpectedExit),
    }
    Ok(())
}

/// Raises an exception in the level that runs.
pub fn raise(vp: &mut Vp, fault: Fault) {
    match vp.nested.level() {
        Level::L1 => nvmx::step::inject_fault(vp.m.vmcs01, vp.m.gprs, fault),
        // If L1 wants it, the next turn runs L1.
        Level::L2 => {
            let _ = vp.nested.raise_in_l2(&mut vp.m, fault);
        }
    }
}

fn cpuid_exit(vp: &mut Vp) {
    let g = vp.m.gprs.0.gprs;
    let shared = vp.shared;
    let leaf = g.rax as u32;
    // Two leaves show bits of CR4.
    let cr4 = if matches!(leaf, 1 | 7) { vcr::cr4(vp.vmcs()) } else { 0 };
    let r = cpuid::answer(leaf, g.rcx as u32, cr4, shared);
    let g = &mut vp.m.gprs.0.gprs;
    g.rax = r.eax.into();
    g.rbx = r.ebx.into();
    g.rcx = r.ecx.into();
    g.rdx = r.edx.into();
    vp.step_over();
}

fn msr_exit(vp: &mut Vp, write: bool) {
    let g = vp.m.gprs.0.gprs;
    let number = g.rcx as u32;
    let done = if write {
        write_msr(vp, number, g.rdx << 32 | g.rax & 0xffff_ffff)
    } else {
        let value = read_msr(vp, number);
        if let Some(value) = value {
            vp.m.gprs.set(0, value & 0xffff_ffff);
            vp.m.gprs.set(2, value >> 32);
        }
        value.is_some()
    };
    if done { vp.step_over() } else { raise(vp, Fault::GP) }
}

fn read_msr(vp: &mut Vp, number: u32) -> Option<u64> {
    match number {
        msr::APIC_BASE => Some(vp.apic_base),
        0x4000_0000..=0x4fff_ffff => vp.hyperv.read_msr(vp.shared, number),
        _ => None,
    }
}

fn write_msr(vp: &mut Vp, number: u32, value: u64) -> bool {
    match number {
        msr::APIC_BASE => lapic::write_base(vp.shared, vp.id, &mut vp.apic_base, value),
        msr::X2APIC_ICR => {
            mmio::send_icr(vp.shared, vp.id, (value >> 32) as u32, value as u32, || {
                // SAFETY: x2APIC mode is on, or the guest's WRMSR would have faulted; the command was checked.
                unsafe { msr::wrmsr(msr::X2APIC_ICR, value) };
            });
            true
        }
        0x4000_0000..=0x4fff_ffff => {
            let done = vp.hyperv.write_msr(vp.shared, vp.id, vp.counters, number, value);
            vp.m.assist_page = vp.hyperv.msrs.vp_assist_gpa();
            done
        }
        _ => false,
    }
}

/// An NMI arrived in the guest. L0's handler says whose it is; its IRET lets the next one in.
fn nmi_exit(vp: &mut Vp) -> Result<(), Failure> {
    let info = vp.vmcs().read(Field::ExitInterruptionInfo);
    if info & (INFO_VALID | TYPE) != INFO_VALID | TYPE_NMI {
        return Err(Failure::UnexpectedExit);
    }
    // SAFETY: L0's tables and handler are loaded.
    unsafe { vmx::take_nmi() };
    Ok(())
}

/// A violation of L0's own tables at `gpa`, an L1 GPA. An event whose delivery it interrupted is the library's to deliver
/// again.
pub fn ept_violation(vp: &mut Vp, gpa: u64, how: u64) -> Result<(), Failure> {
    const WRITE: u64 = 1 << 1;
    const READABLE: u64 = 1 << 3;
    if how & READABLE == 0 && gpa >= crate::memory::FOUR_GIB {
        // `false`: another processor mapped it meanwhile.
        return vp.shared.npt01.lock().map_gib(gpa).map(|_| ()).map_err(|_| Failure::OutOfPages);
    }
    let kind = vp.shared.kind(gpa);
    if how & WRITE == 0 || kind == Page::Plain {
        return Err(Failure::UnexpectedFault);
    }
    mmio::write(vp, gpa, kind);
    Ok(())
}

/// L1 wrote CR0 or CR4 with a bit that L0 keeps.
fn cr_access(vp: &mut Vp) -> Result<(), Failure> {
    let how = vp.vmcs().read(Field::ExitQualification);
    let (number, kind, register) = (how & 0xf, how >> 4 & 3, (how >> 8 & 0xf) as u8);
    let value = match kind {
        // MOV to CR. 64 bits in 64-bit mode, 32 else: then the upper half is zero.
        0 => {
            let value = mmio::Storer::register(vp, register);
            if matches!(mmio::Storer::mode(vp), hw::decode::Mode::Bits64) { value } else { value & 0xffff_ffff }
        }
        // LMSW: MP, EM, TS; PE can be set only. It never has NE, so it never exits for what L0 keeps.
        3 => {
            let old = vcr::cr0(vp.vmcs());
            let source = how >> 16 & 0xffff;
            old & !0xe | source & 0xf | old & 1
        }
        _ => return Err(Failure::UnexpectedExit),
    };
    let done = match number {
        0 => vp.nested.allows_cr0(value) && vcr::write_cr0(vp, value),
        4 => vp.nested.allows_cr4(value) && vcr::write_cr4(vp, value, true),
        _ => return Err(Failure::UnexpectedExit),
    };
    if done {
        vp.step_over()
    } else {
        raise(vp, Fault::GP)
    }
    Ok(())
}

fn xsetbv(vp: &mut Vp) {
    let g = vp.m.gprs.0.gprs;
    if vcr::xsetbv(g.rcx as u32, g.rdx << 32 | g.rax & 0xffff_ffff) { vp.step_over() } else { raise(vp, Fault::GP) }
}

/// VMCALL of L1.
fn l1_call(vp: &mut Vp) {
    if !vp.shared.enlighten {
        return raise(vp, Fault::UD);
    }
    vp.counters.l1_calls.add(1);
    let call = Call { level: Level::L1, mode: mode(vp), vm_id: 0, slot: None };
    let outcome = vp.hyperv.perform(vp.shared, vp.counters, &call, &mut *vp.m.gprs, &L1Caller(&vp.shared.memory));
    match outcome {
        Outcome::Complete(_) => vp.step_over(),
        // RIP stays: the call is issued again.
        Outcome::Retry | Outcome::Suspend => {}
        Outcome::InjectUd => raise(vp, Fault::UD),
    }
}

/// The mode of the guest that called.
fn mode(vp: &mut Vp) -> CallerMode {
    let v = vp.vmcs();
    let efer = v.read(Field::GuestEfer);
    let long = efer & 1 << 10 != 0 && v.read(Field::GuestCsAccessRights) & 1 << 13 != 0;
    let cpl = v.read(Field::GuestSsAccessRights) >> 5 & 3;
    CallerMode::new(efer, v.read(Field::GuestCr0), long, cpl as u8)
}

/// A port that L0 watches. Its own: reads give ones, writes vanish. Those that end the machine: carried out, after
/// L0 has printed its counters.
fn io_exit(vp: &mut Vp) {
    let shared = vp.shared;
    let how = vp.vmcs().read(Field::ExitQualification);
    let (number, size, input, string) = ((how >> 16) as u16, (how & 7) + 1, how & 1 << 3 != 0, how & 1 << 4 != 0);
    let own = (number..number.saturating_add(size as u16)).contains(&debug::PORT);
    let rax = vp.m.gprs.0.gprs.rax;
    if !string && input {
        let value = match (own, size) {
            (true, _) => u32::MAX,
            // SAFETY: L1 owns the port, and would have done this itself.
            (false, 1) => unsafe { port::inb(number) }.into(),
            // SAFETY: as above.
            (false, 2) => unsafe { port::inw(number) }.into(),
            // SAFETY: as above.
            (false, _) => unsafe { port::inl(number) },
        };
        let value = u64::from(value);
        vp.m.gprs.0.gprs.rax = match size {
            1 => rax & !0xff | value & 0xff,
            2 => rax & !0xffff | value & 0xffff,
            _ => value,
        };
    } else if !string && !own {
        ports::end(shared, number, rax as u32, size);
    } else if !string && shared.test_hooks && rax as u8 == b'S' {
        counters::print(shared.ipis.count());
    }
    vp.step_over();
}

/// L1 shut down (a triple fault): the machine resets, as it would without L0.
pub fn reset_machine(vp: &mut Vp) -> Result<(), Failure> {
    let rip = vp.vmcs().read(Field::GuestRip);
    debug::print(format_args!("l0: cpu {}: L1 shut down at rip {rip:#x}: resetting the machine", vp.id));
    counters::print(vp.shared.ipis.count());
    ports::reset()
}
