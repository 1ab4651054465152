//! Events: injection, an exit while an injected event is delivered, virtual interrupts, refused entries.

use super::Outcome;
use crate::npt::{ALL, Table};
use crate::vmcb::{event, exit, misc1, misc2};
use crate::{check, cpu_guest, frames};
use core::arch::naked_asm;

const RFLAGS_IF: u64 = 1 << 9;

/// An IDT for a guest: every vector leads to one handler, which counts in R12 and keeps what was on the stack in R13.
struct GuestIdt {
    base: u64,
}

impl GuestIdt {
    fn new(handler: unsafe extern "C" fn()) -> Self {
        let base = frames::page();
        let target = handler as usize as u64;
        for vector in 0..256u64 {
            let low = target & 0xFFFF | u64::from(hw::cpu::cs()) << 16 | 0x8E00 << 32 | (target >> 16 & 0xFFFF) << 48;
            // SAFETY: the frame is this table's, mapped one to one.
            unsafe {
                *((base + vector * 16) as *mut u64) = low;
                *((base + vector * 16 + 8) as *mut u64) = target >> 32;
            }
        }
        Self { base }
    }
}

#[unsafe(naked)]
unsafe extern "C" fn handler() {
    naked_asm!("inc r12", "mov r13, [rsp]", "iretq")
}

/// For vectors with an error code.
#[unsafe(naked)]
unsafe extern "C" fn handler_error_code() {
    naked_asm!("inc r12", "pop r13", "iretq")
}

#[unsafe(naked)]
unsafe extern "C" fn program_nothing() {
    naked_asm!("nop", "hlt")
}

#[unsafe(naked)]
unsafe extern "C" fn program_sti() {
    naked_asm!("nop", "vmmcall", "sti", "nop", "nop", "hlt")
}

/// External interrupt, NMI and exceptions, injected one by one.
pub fn injection() -> Outcome {
    for (what, error_code) in [
        (event::TYPE_INTR | 0x41, None),
        (event::TYPE_NMI | 2, None),
        (event::TYPE_EXCEPTION | 6, None),
        (event::TYPE_EXCEPTION | 13, Some(0x1230)),
        (event::TYPE_EXCEPTION | 14, Some(7)),
        (event::TYPE_SOFTWARE | 0x80, None),
    ] {
        let guest = cpu_guest();
        guest.long_mode(program_nothing, 0);
        let idt = GuestIdt::new(if error_code.is_some() { handler_error_code } else { handler });
        guest.vmcb.set_idtr_base(idt.base);
        guest.vmcb.set_idtr_limit(0xFFF);
        let code = error_code.map_or(0, |code| code << 32 | event::ERROR_CODE);
        guest.vmcb.set_event_inj(what | event::VALID | code);
        // VT-x injects interrupts only where the guest would take them.
        guest.vmcb.set_rflags(2 | RFLAGS_IF);
        let rip = guest.vmcb.rip();
        guest.expect(exit::HLT)?;
        check("deliveries", guest.gprs.r12, 1)?;
        check("error code or return address", guest.gprs.r13, error_code.unwrap_or(rip))?;
        check("EVENTINJ is clear after the exit", guest.vmcb.event_inj() & event::VALID, 0)?;
    }
    Ok(())
}

/// The IDT's page is not mapped by the nested table: the delivery ends in a nested page fault that says what was being
/// delivered; injecting just that finishes it.
pub fn interrupted_delivery() -> Outcome {
    let table = Table::identity(4);
    let guest = cpu_guest();
    guest.long_mode(program_nothing, 0);
    let idt = GuestIdt::new(handler);
    guest.vmcb.set_idtr_base(idt.base);
    guest.vmcb.set_idtr_limit(0xFFF);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(table.root());
    guest.vmcb.set_tlb_control(1);
    table.map(idt.base, 0, 0);
    let injected = event::TYPE_INTR | 0x41 | event::VALID;
    guest.vmcb.set_event_inj(injected);
    guest.vmcb.set_rflags(2 | RFLAGS_IF);
    let fault = guest.expect(exit::NPF)?;
    check("page of EXITINFO2", fault.info2 & !0xFFF, idt.base)?;
    check("EXITINTINFO", guest.vmcb.exit_int_info() & event::WHAT, injected)?;
    check("not delivered", guest.gprs.r12, 0)?;
    table.map(idt.base, idt.base, ALL);
    guest.vmcb.set_event_inj(guest.vmcb.exit_int_info());
    guest.expect(exit::HLT)?;
    check("delivered once", guest.gprs.r12, 1)
}

/// A virtual interrupt waits for RFLAGS.IF, arrives once, and V_IRQ is clear afterwards.
pub fn virtual_interrupt() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_sti, 0);
    let idt = GuestIdt::new(handler);
    guest.vmcb.set_idtr_base(idt.base);
    guest.vmcb.set_idtr_limit(0xFFF);
    let v_intr_masking = 1 << 24;
    guest.vmcb.set_int_ctl(1 << 8 | 1 << 20 | v_intr_masking | 0x55 << 32);
    guest.expect(exit::VMMCALL)?;
    check("held while IF is clear", guest.gprs.r12, 0)?;
    check("V_IRQ still set", guest.vmcb.int_ctl() >> 8 & 1, 1)?;
    guest.skip(3);
    guest.expect(exit::HLT)?;
    check("delivered once", guest.gprs.r12, 1)?;
    check("V_IRQ is clear", guest.vmcb.int_ctl() >> 8 & 1, 0)
}

/// With the VINTR intercept the hypervisor is told when the guest could take a virtual interrupt.
pub fn interrupt_window() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_sti, 0);
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::VINTR);
    guest.vmcb.set_int_ctl(1 << 8 | 1 << 20 | 1 << 24);
    guest.expect(exit::VMMCALL)?;
    guest.skip(3);
    guest.expect(exit::VINTR)?;
    guest.vmcb.set_int_ctl(1 << 24);
    guest.expect(exit::HLT).map(drop)
}

/// Entries that VMRUN must refuse. Each case is a single change to a guest that runs.
pub fn refusals() -> Outcome {
    type Damage = fn(&mut crate::vmcb::Vmcb);
    let cases: [(&str, Damage); 5] = [
        ("EFER.SVME clear", |vmcb| vmcb.set_efer(vmcb.efer() & !(1 << 12))),
        ("CR0.NW without CD", |vmcb| vmcb.set_cr0(vmcb.cr0() & !(1 << 30) | 1 << 29)),
        ("CR0 bit 32", |vmcb| vmcb.set_cr0(vmcb.cr0() | 1 << 32)),
        ("EFER.LME and CR0.PG without CR4.PAE", |vmcb| vmcb.set_cr4(vmcb.cr4() & !(1 << 5))),
        ("the VMRUN intercept clear", |vmcb| vmcb.set_misc2(vmcb.misc2() & !misc2::VMRUN)),
    ];
    for (what, damage) in cases {
        let guest = cpu_guest();
        guest.long_mode(program_nothing, 0);
        damage(&mut guest.vmcb);
        rt::println!("  refused: {what}");
        guest.expect(exit::INVALID)?;
        guest.long_mode(program_nothing, 0);
        guest.expect(exit::HLT)?;
    }
    Ok(())
}
