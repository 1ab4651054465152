//! Interrupts, NMIs, INIT, virtual interrupts, injection, delivery and what interrupts it.

use tests::model::svm::state::bit::*;
use tests::model::svm::vmcb::{ctl, exit, save, vintr};
use tests::model::svm::{Event, Op, Step};

use super::{Bench, HANDLERS, IDT, STACK, VMCB, gate};

const EXIT_CPUID: u64 = 0x72;
const V: u64 = 1 << 31;

fn with_if(b: &Bench) {
    b.put(save::RFLAGS, 0x202);
}

#[test]
fn physical_interrupts_follow_the_guests_if_without_masking() {
    for (guest_if, host_if, masking, taken) in
        [(true, false, false, true), (false, true, false, false), (false, true, true, true), (true, false, true, false)]
    {
        let mut b = Bench::full();
        b.set_bits(ctl::MISC1, 1);
        b.put(save::RFLAGS, 2 | if guest_if { FLAG_IF } else { 0 });
        b.cpu.state.rflags = 2 | if host_if { FLAG_IF } else { 0 };
        b.put(ctl::VINTR, if masking { vintr::MASKING } else { 0 });
        // The line goes up after VMRUN, as the host would have taken it before.
        assert_eq!(b.vmrun(), Step::Done(0));
        b.cpu.lines.intr(Some(0x31));
        let want = if taken { Step::Exit(0x60) } else { Step::Done(0) };
        assert_eq!(b.step(Op::Nop), want, "guest {guest_if} host {host_if} masking {masking}");
        assert_eq!(b.cpu.lines.intr_pending(), Some(0x31), "an exit does not acknowledge it");
    }
}

#[test]
fn an_interrupt_that_is_not_intercepted_goes_through_the_guests_idt() {
    let mut b = Bench::full();
    with_if(&b);
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.lines.intr(Some(0x31));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Interrupt(0x31)));
    let s = b.cpu.state.clone();
    assert_eq!((s.rip, s.rflags & FLAG_IF, s.rsp), (HANDLERS + 0x310, 0, STACK - 40));
    assert_eq!(b.mem.read(STACK - 40, 8), 0x1000, "RIP");
    assert_eq!(b.mem.read(STACK - 24, 8), 0x202, "RFLAGS");
    assert_eq!((b.mem.read(STACK - 16, 8), b.cpu.lines.intr_pending()), (STACK, None));
    assert_eq!(b.step(Op::Iret), Step::Done(0));
    assert_eq!((b.cpu.state.rip, b.cpu.state.rsp, b.cpu.state.rflags), (0x1000, STACK, 0x202));
}

#[test]
fn a_trap_gate_keeps_if_and_cr8_masks() {
    let mut b = Bench::full();
    with_if(&b);
    gate(&b.mem, 0x31, 0xF, 0);
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.cr8 = 3;
    b.cpu.lines.intr(Some(0x31));
    assert_eq!(b.step(Op::Nop), Step::Done(0), "priority 3 is not above 3");
    assert_eq!(b.step(Op::MovToCr(8, 2)), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Interrupt(0x31)));
    assert_ne!(b.cpu.state.rflags & FLAG_IF, 0);
}

#[test]
fn the_shadow_of_sti_lasts_one_instruction() {
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 | 1 << 18);
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.lines.intr(Some(0x31));
    assert_eq!(b.step(Op::Sti), Step::Done(0));
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    assert_eq!(b.get(ctl::SHADOW), 1, "the instruction did not complete");
    assert_eq!(b.vmrun(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(0x60));
    assert_eq!(b.get(ctl::SHADOW), 0);
    b.cpu.lines.intr(None);
    // Without the field there is no shadow.
    b.cpu.lines.intr(Some(0x31));
    assert_eq!(b.vmrun(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(0x60));
}

#[test]
fn nmi_smi_init_exit_or_are_taken_by_priority() {
    for code in [0x63, 0x62, 0x61, 0x60] {
        let mut b = Bench::full();
        with_if(&b);
        b.set_bits(ctl::MISC1, 0xF);
        assert_eq!(b.vmrun(), Step::Done(0));
        let lines = b.cpu.lines.clone();
        lines.intr(Some(0x99));
        (code >= 0x61).then(|| lines.nmi());
        (code >= 0x62).then(|| lines.smi());
        (code >= 0x63).then(|| lines.init());
        assert_eq!(b.step(Op::Nop), Step::Exit(code));
        // The event waits for the host to set GIF.
        assert_eq!(b.step(Op::Nop), Step::Done(0));
        assert_eq!(b.step(Op::Stgi), Step::Done(0));
        match (code, b.step(Op::Nop)) {
            (0x63, step) => assert_eq!(step, Step::Init),
            (0x62, step) => assert_eq!(step, Step::Smi),
            (0x61, step) => assert_eq!(step, Step::Event(Event::Nmi)),
            (_, step) => assert_eq!(step, Step::Done(0), "the host has IF = 0"),
        }
    }
    let mut b = Bench::full();
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.lines.init();
    assert_eq!(b.step(Op::Nop), Step::Init);
}

#[test]
fn nmis_block_nmis_until_iret() {
    let mut b = Bench::full();
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Nmi));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Iret), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Nmi));
}

#[test]
fn a_kick_that_arrives_before_vmrun_exits_at_once() {
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 2);
    assert_eq!(b.step(Op::Clgi), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Done(0), "GIF holds it");
    assert_eq!(b.vmrun(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(0x61));
    assert_eq!(b.get(save::RIP), 0x1000);
}

#[test]
fn virtual_interrupts() {
    let line = |prio: u64, tpr: u64| vintr::IRQ | prio << 16 | tpr | 0x41 << 32;
    // Value, RFLAGS.IF, taken.
    for (value, on, taken) in [
        (line(4, 3), true, true),
        (line(4, 4), true, false),
        (line(4, 4) | vintr::IGN_TPR, true, true),
        (line(4, 3), false, false),
        (line(4, 3) & !vintr::IRQ, true, false),
        (line(4, 3) | vintr::GIF_ENABLE, true, false),
        (line(4, 3) | vintr::GIF_ENABLE | vintr::GIF, true, true),
    ] {
        for exits in [false, true] {
            let mut b = Bench::full();
            b.set_bits(ctl::MISC1, if exits { 1 << 4 } else { 0 } | 1 << 18);
            b.put(ctl::VINTR, value | vintr::MASKING);
            b.put(save::RFLAGS, 2 | if on { FLAG_IF } else { 0 });
            assert_eq!(b.vmrun(), Step::Done(0));
            let want = match (taken, exits) {
                (true, true) => Step::Exit(0x64),
                (true, false) => Step::Event(Event::Interrupt(0x41)),
                _ => Step::Done(0),
            };
            assert_eq!(b.step(Op::Nop), want, "{value:#x} {on}");
            if taken && !exits {
                assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
                assert_eq!(b.get(ctl::VINTR) & vintr::IRQ, 0, "acknowledged");
            } else if taken {
                assert_ne!(b.get(ctl::VINTR) & vintr::IRQ, 0, "still pending");
            }
        }
    }
}

#[test]
fn v_tpr_stands_for_cr8_with_masking() {
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 << 18);
    b.put(ctl::VINTR, vintr::MASKING | 5);
    assert_eq!(b.run(Op::MovFromCr(8)), Step::Done(5));
    assert_eq!(b.step(Op::MovToCr(8, 9)), Step::Done(0));
    assert_eq!(b.cpu.cr8, 0);
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    assert_eq!(b.get(ctl::VINTR) & 0xF, 9);
    let mut b = Bench::full();
    b.put(ctl::VINTR, 5);
    assert_eq!(b.run(Op::MovToCr(8, 9)), Step::Done(0));
    assert_eq!(b.cpu.cr8, 9, "the real TPR");
    assert_eq!(b.step(Op::MovToCr(8, 16)), Step::Event(Event::Exception(13, Some(0))));
}

#[test]
fn gif_holds_everything_and_v_gif_virtual_interrupts_only() {
    let mut b = Bench::full();
    with_if(&b);
    b.set_bits(ctl::MISC1, 3);
    b.put(ctl::VINTR, vintr::GIF_ENABLE | vintr::GIF);
    assert_eq!(b.run(Op::Clgi), Step::Done(0));
    assert!(b.cpu.gif, "CLGI cleared V_GIF");
    b.cpu.lines.intr(Some(0x50));
    assert_eq!(b.step(Op::Nop), Step::Exit(0x60));
    assert_eq!(b.get(ctl::VINTR) & vintr::GIF, 0);
    // Without V_GIF, CLGI of a guest clears the real one.
    let mut b = Bench::full();
    with_if(&b);
    b.set_bits(ctl::MISC1, 3);
    assert_eq!(b.run(Op::Clgi), Step::Done(0));
    b.cpu.lines.nmi();
    b.cpu.lines.intr(Some(0x50));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Stgi), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(0x61));
}

#[test]
fn virtual_nmi() {
    let mut b = Bench::full();
    b.put(ctl::VINTR, vintr::NMI_ENABLE | vintr::NMI);
    assert_eq!(b.vmrun(), Step::Exit(exit::INVALID), "needs the NMI intercept");
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 2 | 1 << 18);
    b.put(ctl::VINTR, vintr::NMI_ENABLE | vintr::NMI);
    assert_eq!(b.run(Op::Nop), Step::Event(Event::Nmi));
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    assert_eq!(b.get(ctl::VINTR) & (vintr::NMI | vintr::NMI_MASK), vintr::NMI_MASK);
    b.put(ctl::VINTR, vintr::NMI_ENABLE | vintr::NMI | vintr::NMI_MASK);
    assert_eq!(b.run(Op::Nop), Step::Done(0), "masked");
}

#[test]
fn injected_events_are_delivered_before_the_first_instruction() {
    for (value, event, frame) in [
        (V | 0x44, Event::Interrupt(0x44), 5),
        (V | 0x200, Event::Nmi, 5),
        (V | 0x300 | 1 << 11 | 13 | 0x77 << 32, Event::Exception(13, Some(0x77)), 6),
        (V | 0x300 | 6, Event::Exception(6, None), 5),
        (V | 0x400 | 0x80, Event::Soft(0x80), 5),
    ] {
        let mut b = Bench::full();
        // Not subject to intercepts.
        b.set_bits(ctl::EXCEPTIONS, 0xFFFF_FFFF);
        b.set_bits(ctl::MISC1, 1 << 18 | 1 << 21 | 2);
        b.put(ctl::EVENTINJ, value);
        b.put(ctl::NRIP, 0x1002);
        assert_eq!(b.vmrun(), Step::Event(event));
        assert_eq!(b.cpu.state.rsp, STACK - 8 * frame);
        let rip = b.mem.read(STACK - 40, 8);
        assert_eq!(rip, if matches!(event, Event::Soft(_)) { 0x1002 } else { 0x1000 });
        if frame == 6 {
            assert_eq!(b.mem.read(STACK - 48, 8), 0x77);
        }
        assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
        assert_eq!(b.get(ctl::EVENTINJ), 0, "#VMEXIT clears it");
    }
}

#[test]
fn an_exit_during_delivery_leaves_the_event_in_exitintinfo() {
    // The IDT, then the stack, is missing in the nested tables.
    for (page, write, v) in [(IDT, false, 0x44u64), (STACK - 0x1000, true, 0x45)] {
        let mut b = Bench::nested();
        let leaf = b.nested_leaf(page);
        let old = b.mem.read(leaf, 8);
        b.mem.write(leaf, 8, 0);
        b.put(ctl::EVENTINJ, V | v);
        assert_eq!(b.vmrun(), Step::Exit(exit::NPF));
        assert_eq!(b.info().0, 1 << 32 | 4 | if write { 2 } else { 0 });
        assert_eq!(b.get(ctl::EXITINTINFO), V | v);
        assert_eq!((b.get(save::RIP), b.get(save::RSP)), (0x1000, STACK));
        // Injected again after the repair, it arrives.
        b.mem.write(leaf, 8, old);
        b.put(ctl::EVENTINJ, b.get(ctl::EXITINTINFO));
        assert_eq!(b.vmrun(), Step::Event(Event::Interrupt(v as u8)));
    }
    // An instruction's own exit has none.
    let mut b = Bench::nested();
    b.mem.write(b.nested_leaf(HANDLERS), 8, 0);
    assert_eq!(b.run(Op::Read(HANDLERS, 1)), Step::Exit(exit::NPF));
    assert_eq!(b.get(ctl::EXITINTINFO), 0);
}

#[test]
fn double_faults_and_shutdown() {
    // No stack page: #GP, then #PF while delivering it, makes #DF, whose delivery faults again.
    let broken = |b: &Bench| b.mem.write(b.guest_leaf(STACK - 0x1000), 8, 0);
    let mut b = Bench::full();
    broken(&b);
    assert_eq!(b.run(Op::Raise(13, Some(0))), Step::Shutdown);
    let mut b = Bench::full();
    broken(&b);
    b.set_bits(ctl::MISC1, 1 << 31);
    assert_eq!(b.run(Op::Raise(13, Some(0))), Step::Exit(exit::SHUTDOWN));
    // An intercepted second exception exits first, and names the first one.
    let mut b = Bench::full();
    broken(&b);
    b.set_bits(ctl::EXCEPTIONS, 1 << 14);
    assert_eq!(b.run(Op::Raise(13, Some(0x18))), Step::Exit(0x4E));
    assert_eq!(b.get(ctl::EXITINTINFO), V | 0x300 | 1 << 11 | 13 | 0x18 << 32);
    assert_eq!(b.info(), (2, STACK - 48));
    // #PF after #GP doubles; #PF after an interrupt does not.
    let mut b = Bench::full();
    broken(&b);
    b.set_bits(ctl::EXCEPTIONS, 1 << 8);
    assert_eq!(b.run(Op::Raise(13, Some(0))), Step::Exit(0x48));
    let mut b = Bench::full();
    b.mem.write(IDT + 0x44 * 16, 8, 0);
    b.put(ctl::EVENTINJ, V | 0x44);
    assert_eq!(b.vmrun(), Step::Event(Event::Exception(13, Some(0x44 * 8 + 3))));
}

#[test]
fn gates_are_checked() {
    let mut b = Bench::full();
    b.mem.write(VMCB + save::CPL, 1, 3);
    assert_eq!(b.run(Op::Intn(0x80)), Step::Event(Event::Exception(13, Some(0x402))), "DPL 0 from CPL 3");
    assert_eq!((b.cpu.state.cpl, b.cpu.state.rsp), (0, 0xB000 - 48), "the stack comes from the TSS");
    let mut b = Bench::full();
    gate(&b.mem, 0x80, 0xE, 3);
    b.mem.write(VMCB + save::CPL, 1, 3);
    assert_eq!(b.run(Op::Intn(0x80)), Step::Event(Event::Soft(0x80)));
    assert_eq!(b.mem.read(0xB000 - 40, 8), 0x1002, "the next instruction");
    // Not present, and beyond the limit.
    let mut b = Bench::full();
    b.mem.write(IDT + 0x80 * 16, 8, b.mem.read(IDT + 0x80 * 16, 8) & !(1 << 47));
    assert_eq!(b.run(Op::Intn(0x80)), Step::Event(Event::Exception(11, Some(0x402))));
    b.cpu.state.seg[8].limit = 0x81 * 16 - 2;
    assert_eq!(b.step(Op::Intn(0x80)), Step::Event(Event::Exception(13, Some(0x402))));
}

#[test]
fn halted_until_something_comes() {
    let mut b = Bench::full();
    with_if(&b);
    assert_eq!(b.run(Op::Hlt), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Idle);
    b.cpu.lines.intr(Some(0x60));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Interrupt(0x60)));
    assert_eq!(b.mem.read(STACK - 40, 8), 0x1001, "behind the HLT");
    assert_eq!(b.step(Op::Nop), Step::Done(0));
}

#[test]
fn real_mode_guests_take_interrupts_through_the_ivt() {
    let mut b = Bench::full();
    b.put(save::EFER, EFER_SVME);
    b.put(save::CR0, 0x10);
    b.put(save::RSP, 0x2000);
    b.put(save::RFLAGS, 0x202);
    b.mem.write(VMCB + save::SEGMENTS + 8 * 16 + 8, 8, 0);
    b.mem.write(0x21 * 4, 4, 0x0F00_0123);
    b.put(ctl::EVENTINJ, V | 0x21);
    assert_eq!(b.vmrun(), Step::Event(Event::Interrupt(0x21)));
    let s = &b.cpu.state;
    assert_eq!((s.rip, s.seg[1].base, s.rsp, s.rflags & FLAG_IF), (0x123, 0xF000, 0x1FFA, 0));
    assert_eq!(b.mem.read(0x1FFA, 2), 0x1000);
    assert_eq!(b.step(Op::Iret), Step::Done(0));
    assert_eq!((b.cpu.state.rip, b.cpu.state.rsp, b.cpu.state.rflags), (0x1000, 0x2000, 0x202));
}
