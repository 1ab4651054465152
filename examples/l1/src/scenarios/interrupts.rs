//! Real interrupts and NMIs while L2 runs: who gets them, and when, under GIF and V_INTR_MASKING.

use super::Outcome;
use crate::guest::Guest;
use crate::vmcb::{exit, misc1};
use crate::{Failure, check, cpu_guest, smp};
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU64, Ordering};
use rt::idt::{self, Frame};

const VECTOR: u8 = 0x51;
const V_INTR_MASKING: u64 = 1 << 24;

static INTERRUPTS: AtomicU64 = AtomicU64::new(0);
static NMIS: AtomicU64 = AtomicU64::new(0);

fn on_interrupt(_: &mut Frame) {
    INTERRUPTS.fetch_add(1, Ordering::SeqCst);
    rt::apic::end_of_interrupt();
}

fn on_nmi(_: &mut Frame) {
    NMIS.fetch_add(1, Ordering::SeqCst);
}

fn reset() {
    INTERRUPTS.store(0, Ordering::SeqCst);
    NMIS.store(0, Ordering::SeqCst);
    idt::on(VECTOR, on_interrupt);
    idt::on(2, on_nmi);
}

fn interrupts() -> u64 {
    INTERRUPTS.load(Ordering::SeqCst)
}

fn nmis() -> u64 {
    NMIS.load(Ordering::SeqCst)
}

/// Lets this processor take one held interrupt.
fn window() {
    // SAFETY: the vectors that can be pending have handlers.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Counts in R12 for ever.
#[unsafe(naked)]
unsafe extern "C" fn program_spin() {
    naked_asm!("2:", "inc r12", "pause", "jmp 2b")
}

#[unsafe(naked)]
unsafe extern "C" fn program_hlt() {
    naked_asm!("mov r12, 1", "hlt")
}

/// Runs the guest with RFLAGS.IF set at VMRUN.
fn run_with_interrupts(guest: &mut Guest) -> u64 {
    // SAFETY: GIF is clear until `run` sets it after the exit; then IF is cleared at once.
    unsafe {
        hw::svm::clgi();
        asm!("sti", "nop");
    }
    let code = guest.run_closed().code;
    // SAFETY: as above: first IF off, then GIF on.
    unsafe {
        asm!("cli");
        hw::svm::stgi();
    }
    code
}

fn interrupted(program: unsafe extern "C" fn()) -> &'static mut Guest {
    let guest = cpu_guest();
    guest.long_mode(program, 0);
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::INTR | misc1::NMI);
    guest.vmcb.set_int_ctl(V_INTR_MASKING);
    guest
}

/// An interrupt that waits at VMRUN ends the run before L2's first instruction, and stays for L1 to take.
pub fn pending_interrupt() -> Outcome {
    reset();
    let guest = interrupted(program_hlt);
    rt::apic::send_interrupt(rt::apic::id(), VECTOR);
    check("exit", run_with_interrupts(guest), exit::INTR)?;
    check("L2 did nothing", guest.gprs.r12, 0)?;
    check("not taken while IF is clear", interrupts(), 0)?;
    window();
    check("taken once", interrupts(), 1)?;
    guest.expect(exit::HLT).map(drop)
}

/// With V_INTR_MASKING it is L1's RFLAGS.IF at VMRUN that counts: clear, the interrupt waits.
pub fn masked_interrupt() -> Outcome {
    reset();
    let guest = interrupted(program_hlt);
    guest.vmcb.set_rflags(2 | 1 << 9);
    rt::apic::send_interrupt(rt::apic::id(), VECTOR);
    guest.expect(exit::HLT)?;
    check("L2 ran", guest.gprs.r12, 1)?;
    check("L2 did not get it", interrupts(), 0)?;
    window();
    check("taken once", interrupts(), 1)
}

/// What the other processor does: waits until the spinning L2 has got going, then sends.
fn send_to(argument: usize) {
    let (apic_id, nmi) = (argument as u32 >> 1, argument & 1 != 0);
    rt::smp::wait(20_000_000, || false);
    if nmi {
        rt::apic::send_nmi(apic_id);
    } else {
        rt::apic::send_interrupt(apic_id, VECTOR);
    }
}

fn from_other(nmi: bool) -> Result<&'static mut Guest, Failure> {
    if smp::count() < 2 {
        return Err(Failure::Missing("a second processor"));
    }
    reset();
    let guest = interrupted(program_spin);
    smp::spawn(1, send_to, (rt::apic::id() as usize) << 1 | usize::from(nmi));
    Ok(guest)
}

/// An interrupt from another processor ends the run of a spinning L2.
pub fn interrupt_while_running() -> Outcome {
    let guest = from_other(false)?;
    check("exit", run_with_interrupts(guest), exit::INTR)?;
    smp::join(1);
    check("L2 was running", u64::from(guest.gprs.r12 > 0), 1)?;
    window();
    check("taken once", interrupts(), 1)
}

/// An NMI from another processor ends the run; L1 takes it once GIF is set.
pub fn nmi_while_running() -> Outcome {
    let guest = from_other(true)?;
    // SAFETY: GIF is set again below.
    unsafe { hw::svm::clgi() };
    let code = guest.run_closed().code;
    let before = nmis();
    // SAFETY: the NMI has a handler.
    unsafe { hw::svm::stgi() };
    smp::join(1);
    check("exit", code, exit::NMI)?;
    check("held while GIF is clear", before, 0)?;
    check("taken once", nmis(), 1)
}

/// GIF clear holds an NMI; GIF set lets it in.
pub fn nmi_and_gif() -> Outcome {
    reset();
    // SAFETY: GIF is set again below, and the NMI has a handler.
    let before = unsafe {
        hw::svm::clgi();
        rt::apic::send_nmi(rt::apic::id());
        rt::smp::wait(1_000_000, || false);
        let before = nmis();
        hw::svm::stgi();
        before
    };
    rt::smp::wait(100_000_000, || nmis() != 0);
    check("held while GIF is clear", before, 0)?;
    check("taken once", nmis(), 1)
}

/// GIF clear holds an interrupt although RFLAGS.IF is set.
pub fn interrupt_and_gif() -> Outcome {
    reset();
    // SAFETY: GIF is set again below, and the vector has a handler.
    let before = unsafe {
        hw::svm::clgi();
        rt::apic::send_interrupt(rt::apic::id(), VECTOR);
        asm!("sti", "nop", "nop");
        rt::smp::wait(1_000_000, || false);
        let before = interrupts();
        hw::svm::stgi();
        asm!("nop", "nop", "cli");
        before
    };
    check("held while GIF is clear", before, 0)?;
    check("taken once", interrupts(), 1)
}
