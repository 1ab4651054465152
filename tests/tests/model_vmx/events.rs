//! Interrupts, NMIs, INIT and SIPI, windows, timers, injection, delivery and what interrupts it.

use tests::model::vmx::fields::*;
use tests::model::vmx::{Event, Op, Step, reason};

use super::{Bench, HANDLERS, IDT, STACK, gate};

const V: u64 = 1 << 31;

#[test]
fn external_interrupts() {
    // External-interrupt exiting, acknowledge, IF.
    for (exiting, ack, on) in [(true, false, false), (true, true, true), (false, false, true), (false, false, false)] {
        let mut b = Bench::new();
        b.or(PIN, u64::from(exiting));
        b.or(EXIT, u64::from(ack) << 15);
        b.set(GUEST_RFLAGS, 2 | u64::from(on) << 9);
        assert_eq!(b.enter(), Step::Done(0));
        b.cpu.lines.intr(Some(0x41));
        let step = b.step(Op::Nop);
        match (exiting, on) {
            (true, _) => {
                assert_eq!(step, Step::Exit(reason::EXTERNAL), "whatever IF says");
                assert_eq!(b.get(EXIT_INFO), if ack { V | 0x41 } else { 0 });
                assert_eq!(b.cpu.lines.intr_pending(), if ack { None } else { Some(0x41) });
            }
            (false, true) => assert_eq!(step, Step::Event(Event::Interrupt(0x41))),
            (false, false) => assert_eq!(step, Step::Done(0)),
        }
    }
}

#[test]
fn delivery_and_iret() {
    let mut b = Bench::new();
    b.set(GUEST_RFLAGS, 0x202);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.intr(Some(0x41));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Interrupt(0x41)));
    assert_eq!((b.cpu.state.rip, b.cpu.state.rsp), (HANDLERS + 0x410, STACK - 40));
    assert_eq!(b.step(Op::Iret), Step::Done(0));
    assert_eq!((b.cpu.state.rip, b.cpu.state.rsp, b.cpu.state.rflags), (0x1000, STACK, 0x202));
}

#[test]
fn shadows_hold_interrupts_for_one_instruction() {
    let mut b = Bench::new();
    b.or(PIN, 1);
    b.set(GUEST_RFLAGS, 0x202);
    b.set(INTERRUPTIBILITY, 2);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.intr(Some(0x41));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Done(0), "MOV SS holds both");
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Nmi));
}

#[test]
fn nmis_with_and_without_virtual_nmis() {
    // NMI exiting off: delivered, blocked until IRET.
    let mut b = Bench::new();
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Nmi));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
    assert_eq!(b.get(INTERRUPTIBILITY), 8);
    // Exiting: the NMI is consumed and NMIs are blocked in the host.
    let mut b = Bench::new();
    b.set(PIN, 0x1E);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::EXCEPTION));
    assert_eq!((b.get(EXIT_INFO), b.cpu.lines.nmi_pending(), b.cpu.nmi_mask), (V | 0x202, false, true));
    // Virtual NMIs: virtual blocking does not hold real ones; IRET ends it.
    let mut b = Bench::new();
    b.set(PIN, 0x3E);
    b.or(PROC, 1 << 22);
    b.set(INTERRUPTIBILITY, 8);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0), "no window while blocked");
    for n in 0..5 {
        b.mem.write(STACK + n * 8, 8, [0x1002, 8, 2, STACK, 16][n as usize]);
    }
    assert_eq!(b.step(Op::Iret), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::NMI_WINDOW));
    assert_eq!(b.get(INTERRUPTIBILITY), 0);
    let mut b = Bench::new();
    b.set(PIN, 0x3E);
    b.set(INTERRUPTIBILITY, 8);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::EXCEPTION));
    assert_eq!(b.get(INTERRUPTIBILITY), 8);
}

#[test]
fn windows() {
    let mut b = Bench::new();
    b.or(PROC, 1 << 2);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0), "IF = 0");
    assert_eq!(b.step(Op::Sti), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0), "the shadow of STI");
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::INTERRUPT_WINDOW));
    assert_eq!((b.get(GUEST_RIP), b.get(EXIT_LENGTH)), (0x1003, 0));
    // At once, before the first instruction, and out of HLT.
    b.set(ACTIVITY, 1);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::INTERRUPT_WINDOW));
    assert_eq!(b.get(ACTIVITY), 1);
}

#[test]
fn preemption_timer_and_mtf() {
    let mut b = Bench::new();
    b.set(PIN, 0x56);
    b.or(EXIT, 1 << 22);
    b.set(PREEMPTION_TIMER, 2);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
    assert_eq!(b.get(PREEMPTION_TIMER), 0);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::TIMER), "0 at entry: before the first instruction");
    assert_eq!(b.get(GUEST_RIP), 0x1001);
    let mut b = Bench::new();
    b.or(PROC, 1 << 27);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::MTF));
    assert_eq!(b.get(GUEST_RIP), 0x1001);
    // Injection of type 7, and of a vectored event with MTF set, exit at the first boundary.
    let mut b = Bench::new();
    b.set(ENTRY_INFO, V | 0x700);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::MTF));
    let mut b = Bench::new();
    b.or(PROC, 1 << 27);
    b.set(ENTRY_INFO, V | 0x202);
    assert_eq!(b.enter(), Step::Event(Event::Nmi));
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::MTF));
    assert_eq!(b.get(GUEST_RIP), HANDLERS + 0x20);
}

#[test]
fn init_sipi_and_activity_states() {
    let mut b = Bench::new();
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.sipi(0x9A);
    assert_eq!(b.step(Op::Nop), Step::Done(0), "a SIPI counts only for who waits");
    b.cpu.lines.init();
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::INIT));
    b.cpu.lines.init();
    assert_eq!(b.step(Op::Nop), Step::Done(0), "blocked in root operation");
    let mut b = Bench::new();
    b.set(ACTIVITY, 3);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.lines.nmi();
    assert_eq!(b.step(Op::Nop), Step::Idle);
    b.cpu.lines.sipi(0x9A);
    assert_eq!(b.step(Op::Nop), Step::Exit(reason::SIPI));
    assert_eq!((b.get(QUALIFICATION), b.get(ACTIVITY)), (0x9A, 3));
    let mut b = Bench::new();
    b.set(ACTIVITY, 1);
    b.set(GUEST_RFLAGS, 0x202);
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::Nop), Step::Idle);
    b.cpu.lines.intr(Some(0x41));
    assert_eq!(b.step(Op::Nop), Step::Event(Event::Interrupt(0x41)));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
}

#[test]
fn injection() {
    for (info, error, length, event, rip) in [
        (V | 0x41, 0, 0, Event::Interrupt(0x41), 0x1000),
        (V | 0x202, 0, 0, Event::Nmi, 0x1000),
        (V | 0xB0D, 0x77, 0, Event::Exception(13, Some(0x77)), 0x1000),
        (V | 0x480, 0, 2, Event::Soft(0x80), 0x1002),
        (V | 0x603, 0, 1, Event::Exception(3, None), 0x1001),
    ] {
        let mut b = Bench::new();
        b.set(GUEST_RFLAGS, 0x202);
        b.set(EXCEPTIONS, 0xFFFF_FFFF);
        b.set(ENTRY_INFO, info);
        b.set(ENTRY_ERROR, error);
        b.set(ENTRY_LENGTH, length);
        assert_eq!(b.enter(), Step::Event(event), "not subject to the bitmap");
        assert_eq!(b.mem.read(STACK - 40, 8), rip);
        assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
        assert_eq!(b.get(ENTRY_INFO), info & !V, "valid no more");
        assert_eq!(b.get(IDT_INFO), 0);
    }
}

#[test]
fn an_exit_during_delivery_names_the_event() {
    for (page, info, error, length) in
        [(IDT, V | 0x41, 0, 0), (STACK - 0x1000, V | 0xB0D, 0x77, 0), (IDT, V | 0x4FF, 0, 2), (IDT, V | 0x501, 0, 1)]
    {
        let mut b = Bench::nested();
        b.set(GUEST_RFLAGS, 0x202);
        let leaf = b.ept_leaf(page);
        let old = b.mem.read(leaf, 8);
        b.mem.write(leaf, 8, 0);
        b.set(ENTRY_INFO, info);
        b.set(ENTRY_ERROR, error);
        b.set(ENTRY_LENGTH, length);
        assert_eq!(b.enter(), Step::Exit(reason::EPT_VIOLATION));
        assert_eq!(b.get(IDT_INFO), info, "as it was injected");
        assert_eq!((b.get(GUEST_RIP), b.get(EXIT_LENGTH)), (0x1000, length));
        if error != 0 {
            assert_eq!(b.get(IDT_ERROR), error);
        }
        b.mem.write(leaf, 8, old);
        b.set(ENTRY_INFO, info);
        b.launched = true;
        assert!(matches!(b.enter(), Step::Event(_)));
        // A later exit has nothing to report.
        assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
        assert_eq!(b.get(IDT_INFO), 0);
    }
}

#[test]
fn double_and_triple_faults() {
    let broken = |b: &Bench| b.mem.write(b.guest_leaf(STACK - 0x1000), 8, 0);
    let mut b = Bench::new();
    broken(&b);
    assert_eq!(b.run(Op::Raise(13, Some(0))), Step::Exit(reason::TRIPLE_FAULT));
    assert_eq!(b.get(IDT_INFO), 0);
    let mut b = Bench::new();
    broken(&b);
    b.set(EXCEPTIONS, 1 << 14);
    assert_eq!(b.run(Op::Raise(13, Some(0x18))), Step::Exit(0));
    assert_eq!((b.get(EXIT_INFO), b.get(IDT_INFO), b.get(IDT_ERROR)), (V | 0xB0E, V | 0xB0D, 0x18));
    let mut b = Bench::new();
    broken(&b);
    b.set(EXCEPTIONS, 1 << 8);
    assert_eq!(b.run(Op::Raise(13, Some(0))), Step::Exit(0));
    assert_eq!(b.get(EXIT_INFO), V | 0xB08);
    // Serial faults do not double.
    let mut b = Bench::new();
    gate(&b.mem, 0x41, 0xC, 0);
    b.set(GUEST_RFLAGS, 0x202);
    b.set(ENTRY_INFO, V | 0x41);
    assert_eq!(b.enter(), Step::Event(Event::Exception(13, Some(0x41 * 8 + 3))));
}

#[test]
fn real_mode_of_an_unrestricted_guest() {
    let mut b = Bench::nested();
    b.or(PROC2, 1 << 7);
    b.set(ENTRY, 0x11FB);
    b.set(GUEST_CR0, 0x30);
    b.set(GUEST_CS_AR, 0x9B);
    b.set(GUEST_CS_LIMIT, 0xFFFF);
    b.set(GUEST_IDTR_BASE, 0);
    b.set(GUEST_RFLAGS, 0x202);
    b.set(GUEST_RSP, 0x2000);
    b.mem.write(0x21 * 4, 4, 0x0F00_0123);
    b.set(ENTRY_INFO, V | 0x21);
    assert_eq!(b.enter(), Step::Event(Event::Interrupt(0x21)), "{}", b.cpu.why);
    let s = &b.cpu.state;
    assert_eq!((s.rip, s.seg[1].base, s.rsp), (0x123, 0xF000, 0x1FFA));
    assert_eq!(b.step(Op::Write(0x5000, 4, 7)), Step::Done(0));
    assert_eq!(b.mem.read(0x5000, 4), 7, "linear addresses are guest-physical");
}
