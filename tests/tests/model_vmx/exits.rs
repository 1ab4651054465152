//! Exits of instructions and memory accesses: with its control the operation exits, without it the guest executes it.

use tests::model::tables::flag;
use tests::model::vmx::fields::*;
use tests::model::vmx::{Event, Op, Step, reason};

use super::{Bench, HANDLERS, IO_A, IO_B, MSR_BITMAP};

#[test]
fn unconditional_exits() {
    use Op::*;
    for (op, why) in [
        (Cpuid(1, 0), 10),
        (Invd, 13),
        (Vmcall, 18),
        (Vmclear(0x5000), 19),
        (Vmlaunch, 20),
        (Vmptrld(0x5000), 21),
        (Vmptrst(0x5000), 22),
        (Vmread(0x681E), 23),
        (Vmresume, 24),
        (Vmwrite(0x681E, 9), 25),
        (Vmxoff, 26),
        (Vmxon(0x5000), 27),
        (Invept(1, 0x5000), 50),
        (Invvpid(1, 0x5000), 53),
    ] {
        let mut b = Bench::new();
        assert_eq!(b.run(op), Step::Exit(why), "{op:?}");
        assert_eq!((b.get(EXIT_REASON), b.get(EXIT_LENGTH), b.get(GUEST_RIP)), (why, op.len(), 0x1000));
        assert_eq!((b.get(EXIT_INFO), b.get(IDT_INFO)), (0, 0));
    }
    let mut b = Bench::new();
    assert_eq!(b.run(Op::Vmptrld(0x5008)), Step::Exit(reason::VMPTRLD));
    assert_eq!(b.cpu.state.rax, 0x5008);
    // DS, 64-bit address, base RAX, no index; the operand is at [RAX].
    assert_eq!(b.get(INSTRUCTION_INFO) & 0x07C3_8380, 3 << 15 | 1 << 22 | 2 << 7);
    let mut b = Bench::new();
    assert_eq!(b.run(Op::Vmwrite(0x681E, 9)), Step::Exit(reason::VMWRITE));
    assert_eq!((b.cpu.regs[1], b.cpu.state.rax, b.get(INSTRUCTION_INFO)), (0x681E, 9, 1 << 28 | 1 << 10));
}

#[test]
fn each_control_exits_and_only_that_control() {
    use Op::*;
    let done = Step::Done(0);
    // Control field, bit, operation, reason, qualification; what happens without.
    for (field, bit, op, why, qualification, without) in [
        (PROC, 7, Hlt, 12, 0, done),
        (PROC, 9, Invlpg(0x5000), 14, 0x5000, done),
        (PROC, 10, Mwait, 36, 0, done),
        (PROC, 11, Rdpmc, 15, 0, done),
        (PROC, 12, Rdtsc, 16, 0, Step::Done(2)),
        (PROC, 15, MovToCr(3, 0x20_0000), 28, 3, done),
        (PROC, 16, MovFromCr(3), 28, 0x13, Step::Done(0x20_0000)),
        (PROC, 19, MovToCr(8, 2), 28, 8, done),
        (PROC, 20, MovFromCr(8), 28, 0x18, done),
        (PROC, 23, MovFromDr(7), 29, 0x17, Step::Done(0x400)),
        (PROC, 23, MovToDr(6, 0), 29, 6, done),
        (PROC, 29, Monitor, 39, 0, done),
        (PROC, 30, Pause, 40, 0, done),
        (PROC2, 2, Table(0), 46, 0, done),
        (PROC2, 2, Table(5), 46, 0, done),
        (PROC2, 2, Table(7), 47, 0, done),
        (PROC2, 6, Wbinvd, 54, 0, done),
    ] {
        let mut b = Bench::new();
        b.or(PROC, 1 << 31);
        b.or(field, 1 << bit);
        assert_eq!(b.run(op), Step::Exit(why), "{op:?}");
        assert_eq!((b.get(QUALIFICATION), b.get(EXIT_LENGTH)), (qualification, op.len()), "{op:?}");
        let mut b = Bench::new();
        assert_eq!(b.run(op), without, "{op:?} without its control");
    }
    // Instructions that a control makes exist, and another makes exit.
    for (op, bit, exiting, why) in [(Rdtscp, 3, 12, 51), (Invpcid(2, 0, 0), 12, 9, 58)] {
        let mut b = Bench::new();
        assert_eq!(b.run(op), Step::Event(Event::Exception(6, None)), "{op:?} is off");
        let mut b = Bench::new();
        b.or(PROC, 1 << 31);
        b.set(PROC2, 1 << bit);
        assert!(matches!(b.run(op), Step::Done(_)));
        let mut b = Bench::new();
        b.or(PROC, 1 << 31 | 1 << exiting);
        b.set(PROC2, 1 << bit);
        assert_eq!(b.run(op), Step::Exit(why));
    }
    let mut b = Bench::new();
    assert_eq!(b.run(Op::Vmrun(0)), Step::Event(Event::Exception(6, None)), "no AMD-V here");
}

#[test]
fn privilege_comes_before_the_exit_except_for_vmcall() {
    for (op, want) in [
        (Op::Vmcall, Step::Exit(reason::VMCALL)),
        (Op::Cpuid(0, 0), Step::Exit(reason::CPUID)),
        (Op::Vmptrst(0), Step::Event(Event::Exception(13, Some(0)))),
        (Op::Invd, Step::Event(Event::Exception(13, Some(0)))),
        (Op::Hlt, Step::Event(Event::Exception(13, Some(0)))),
    ] {
        let mut b = Bench::new();
        b.or(PROC, 1 << 7);
        for (field, value) in [(GUEST_SS_AR, 0xC0F3), (GUEST_SS, 3), (GUEST_CS, 3), (GUEST_CS_AR, 0xA0FB)] {
            b.set(field, value);
        }
        assert_eq!(b.run(op), want, "{op:?}");
    }
}

#[test]
fn cr0_and_cr4_masks_and_shadows() {
    let run = |mask: u64, shadow: u64, op: Op| {
        let mut b = Bench::new();
        b.set(CR0_MASK, mask);
        b.set(CR0_SHADOW, shadow);
        let step = b.run(op);
        (step, b.get(QUALIFICATION), b.cpu.state.cr0)
    };
    let now = 0x8001_0031;
    // Reads mix both.
    assert_eq!(run(0x1_0002, 2, Op::MovFromCr(0)).0, Step::Done(now & !0x1_0000 | 2));
    // A write that agrees with the shadow in the masked bits does not exit and leaves them alone.
    assert_eq!(run(0x1_0000, 0, Op::MovToCr(0, 0x8000_0033)), (Step::Done(0), 0, 0x8001_0033));
    assert_eq!(run(0x1_0000, 0, Op::MovToCr(0, 0x8001_0033)).0, Step::Exit(28));
    assert_eq!(run(8, 8, Op::Clts), (Step::Exit(28), 0x20, run(8, 8, Op::Clts).2));
    assert_eq!(run(8, 0, Op::Clts).0, Step::Done(0));
    assert_eq!(run(0, 8, Op::Clts).0, Step::Done(0));
    let (step, qualification, _) = run(8, 0, Op::Lmsw(0x9));
    assert_eq!((step, qualification), (Step::Exit(28), 0x30 | 9 << 16));
    assert_eq!(run(1, 1, Op::Lmsw(0)).0, Step::Done(0), "LMSW cannot clear PE");
    assert_eq!(run(0, 0, Op::Lmsw(0xB)), (Step::Done(0), 0, now | 0xA));
    // Fixed bits hold in non-root operation, too.
    assert_eq!(run(0, 0, Op::MovToCr(0, 0x8001_0011)).0, Step::Event(Event::Exception(13, Some(0))));
    let mut b = Bench::new();
    assert_eq!(b.run(Op::MovToCr(4, 0xA0)), Step::Event(Event::Exception(13, Some(0))), "VMXE");
    let mut b = Bench::new();
    b.set(CR4_MASK, 0x2000);
    assert_eq!(b.run(Op::MovToCr(4, 0xA0)), Step::Done(0));
    assert_eq!(b.cpu.state.cr4, 0x20A0, "masked, shadow 0");
}

#[test]
fn cr3_targets() {
    for (count, exits) in [(0, true), (1, true), (2, false), (4, false)] {
        let mut b = Bench::new();
        b.or(PROC, 1 << 15);
        b.set(CR3_TARGETS, count);
        b.set(CR3_TARGET1, 0x20_0000);
        assert_eq!(b.run(Op::MovToCr(3, 0x20_0000)) == Step::Exit(28), exits, "{count}");
    }
}

#[test]
fn msr_bitmaps() {
    for (n, at) in [(0, 0), (0x1FFF, 0x3FF), (0xC000_0080, 0x410), (0xC000_1FFF, 0x7FF)] {
        let bit = 1u64 << (n & 7);
        for (op, why, base) in [(Op::Rdmsr(n), 31, 0), (Op::Wrmsr(n, 0x500), 32, 0x800)] {
            let mut b = Bench::new();
            assert_eq!(b.run(op), Step::Exit(why), "no bitmaps: every access");
            let mut b = Bench::new();
            b.or(PROC, 1 << 28);
            b.mem.write(MSR_BITMAP + base + at, 1, bit);
            assert_eq!(b.run(op), Step::Exit(why), "{op:?}");
            let mut b = Bench::new();
            b.or(PROC, 1 << 28);
            (0..0x1000).for_each(|n| b.mem.write(MSR_BITMAP + n, 1, 0xFF));
            b.mem.write(MSR_BITMAP + base + at, 1, 0xFF & !bit);
            assert!(!matches!(b.run(op), Step::Exit(_)), "{op:?}");
        }
    }
    for n in [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0x4000_0000] {
        let mut b = Bench::new();
        b.or(PROC, 1 << 28);
        assert_eq!(b.run(Op::Rdmsr(n)), Step::Exit(31));
    }
}

#[test]
fn io_bitmaps() {
    for (map, byte, bit, port, size, exits) in [
        (IO_A, 0xC, 0, 0x60, 1, true),
        (IO_A, 0xC, 1, 0x60, 1, false),
        (IO_A, 0xC, 1, 0x60, 2, true),
        (IO_B, 0, 0, 0x8000, 1, true),
        (IO_B, 0, 0, 0x7FFF, 1, false),
        (IO_B, 0, 0, 0x7FFF, 2, true),
        (IO_A, 0, 0, 0xFFFF, 1, false),
        (IO_A, 0, 0, 0xFFFF, 2, true),
    ] {
        let mut b = Bench::new();
        b.or(PROC, 1 << 25);
        b.mem.write(map + byte, 1, 1 << bit);
        assert_eq!(b.run(Op::Out(port, size, 0)) == Step::Exit(30), exits, "{port:#x} {size}");
    }
    let mut b = Bench::new();
    b.or(PROC, 1 << 24);
    assert_eq!(b.run(Op::In(0x71, 2)), Step::Exit(30));
    assert_eq!(b.get(QUALIFICATION), 0x71 << 16 | 8 | 1);
    let mut b = Bench::new();
    assert_eq!(b.run(Op::Out(0x71, 1, 5)), Step::Done(0));
    // Bitmaps replace the unconditional control.
    let mut b = Bench::new();
    b.or(PROC, 1 << 24 | 1 << 25);
    assert_eq!(b.run(Op::Out(0x71, 1, 5)), Step::Done(0));
}

#[test]
fn exceptions_by_bitmap_with_mask_and_match() {
    let run = |bitmap: u64, mask: u64, value: u64, op: Op| {
        let mut b = Bench::new();
        b.set(EXCEPTIONS, bitmap);
        b.set(PF_MASK, mask);
        b.set(PF_MATCH, value);
        let step = b.run(op);
        (step, b.get(EXIT_INFO), b.get(EXIT_ERROR), b.get(QUALIFICATION))
    };
    let pf = Op::Write(0xF0_0000, 4, 1);
    let v = 0x8000_0000;
    assert_eq!(run(1 << 14, 0, 0, pf), (Step::Exit(0), v | 0xB0E, 2, 0xF0_0000));
    assert_eq!(run(1 << 14, 2, 2, pf).0, Step::Exit(0));
    assert_eq!(run(1 << 14, 2, 0, pf).0, Step::Event(Event::Exception(14, Some(2))));
    assert_eq!(run(0, 2, 0, pf).0, Step::Exit(0), "the bit is inverted where the mask does not match");
    assert_eq!(run(0, 0, 0, pf).0, Step::Event(Event::Exception(14, Some(2))));
    assert_eq!(run(1 << 6, 0, 0, Op::Ud2).1, v | 0x306);
    assert_eq!(run(1 << 3, 0, 0, Op::Int3).1, v | 0x603, "a software exception");
    assert_eq!(run(1 << 6, 0, 0, Op::Int3).0, Step::Event(Event::Exception(3, None)));
    let mut b = Bench::new();
    b.set(EXCEPTIONS, 1 << 3);
    assert_eq!(b.run(Op::Int3), Step::Exit(0));
    assert_eq!(b.get(EXIT_LENGTH), 1);
}

#[test]
fn ept_violations_and_misconfigurations() {
    let mut b = Bench::nested();
    let leaf = b.ept_leaf(HANDLERS);
    b.mem.write(leaf, 8, HANDLERS | 1 | flag::WB);
    assert_eq!(b.run(Op::Read(HANDLERS + 4, 4)), Step::Done(0));
    assert_eq!(b.step(Op::Write(HANDLERS + 4, 4, 1)), Step::Exit(reason::EPT_VIOLATION));
    let all = (b.get(QUALIFICATION), b.get(GUEST_PHYSICAL), b.get(GUEST_LINEAR), b.get(IDT_INFO));
    assert_eq!(all, (0x18A, HANDLERS + 4, HANDLERS + 4, 0));
    // Rights that grew need no INVEPT; rights that shrank do.
    b.mem.write(leaf, 8, HANDLERS | 3 | flag::WB);
    assert_eq!(b.run(Op::Write(HANDLERS + 4, 4, 1)), Step::Done(0));
    b.mem.write(leaf, 8, 0);
    assert_eq!(b.step(Op::Write(HANDLERS + 4, 4, 2)), Step::Done(0), "cached");
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
    assert_eq!(b.run(Op::Write(HANDLERS + 4, 4, 2)), Step::Done(0), "also after a world switch");
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
    b.cpu.invvpid(1, 1, 0);
    assert_eq!(b.run(Op::Write(HANDLERS + 4, 4, 2)), Step::Done(0), "INVVPID leaves guest-physical entries");
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
    b.cpu.invept(1, b.roots.1 | 0x1E);
    assert_eq!(b.run(Op::Write(HANDLERS + 4, 4, 2)), Step::Exit(reason::EPT_VIOLATION));
    b.mem.write(leaf, 8, HANDLERS | 2);
    assert_eq!(b.run(Op::Read(HANDLERS, 4)), Step::Exit(reason::EPT_MISCONFIG));
    assert_eq!(b.get(GUEST_PHYSICAL), HANDLERS);
}

#[test]
fn without_vpid_a_world_switch_drops_linear_and_combined_entries() {
    for (vpid, left) in [(true, true), (false, false)] {
        let mut b = Bench::new();
        if vpid {
            b.or(PROC, 1 << 31);
            b.set(PROC2, 1 << 5);
            b.set(VPID, 3);
        }
        assert_eq!(b.run(Op::Read(HANDLERS, 4)), Step::Done(0));
        assert!(!b.cpu.mmu.tlb.is_empty());
        assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(10));
        assert_eq!(!b.cpu.mmu.tlb.is_empty(), left, "VPID {vpid}");
    }
}

#[test]
fn guest_state_is_saved_and_host_state_loaded() {
    let mut b = Bench::new();
    b.set(HOST_GS_BASE, 0x1234);
    b.set(HOST_TR, 0x28);
    b.set(EXIT, 0x3_6FFB | 1 << 2 | 1 << 18 | 1 << 20);
    assert_eq!(b.enter(), Step::Done(0));
    b.cpu.state.rax = 9;
    assert_eq!(b.step(Op::Wrmsr(0x277, 0)), Step::Exit(32));
    assert_eq!(b.enter(), Step::Done(0));
    assert_eq!(b.step(Op::MovToDr(7, 0x155)), Step::Done(0));
    assert_eq!(b.step(Op::Sti), Step::Done(0));
    assert_eq!(b.step(Op::Cpuid(7, 1)), Step::Exit(10));
    let s = b.cpu.state.clone();
    assert_eq!((s.rip, s.rsp, s.rflags), (0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_2000, 2));
    assert_eq!((s.seg[5].base, s.seg[9].selector, s.dr7), (0x1234, 0x28, 0x400));
    assert_eq!((s.rax, b.cpu.regs[1]), (7, 1), "general registers stay the guest's");
    assert_eq!((b.get(GUEST_RFLAGS), b.get(INTERRUPTIBILITY), b.get(GUEST_DR7)), (0x202, 1, 0x555));
    assert_eq!((b.get(GUEST_EFER), b.get(GUEST_CS_AR)), (s.efer, 0xA09B));
}

#[test]
fn tsc_is_offset_and_scaled() {
    let mut b = Bench::new();
    b.set(TSC_OFFSET, 1000);
    assert_eq!(b.run(Op::Rdtsc), Step::Done(2), "not enabled");
    let mut b = Bench::new();
    b.or(PROC, 1 << 31 | 1 << 3);
    b.set(PROC2, 1 << 25);
    b.set(TSC_OFFSET, 1000);
    b.set(TSC_MULTIPLIER, 3 << 48);
    assert_eq!(b.run(Op::Rdtsc), Step::Done(1006));
}
