//! Every intercept: with its bit the operation exits with its code and information, without it the guest executes it.

use tests::model::svm::vmcb::{ctl, exit, save};
use tests::model::svm::{Event, Features, Op, Step};
use tests::model::tables::flag;

use super::{Bench, HANDLERS, IOPM, MSRPM, VMCB};

/// Vector offset, bit, operation, exit code; what happens without the bit.
fn table() -> Vec<(u64, u32, Op, u64, Step)> {
    use Op::*;
    let done = Step::Done(0);
    let ud = Step::Event(Event::Exception(6, None));
    let (cr, dr, m1, m2, m3) = (ctl::CR, ctl::DR, ctl::MISC1, ctl::MISC2, ctl::MISC3);
    vec![
        (cr, 0, MovFromCr(0), 0x00, Step::Done(0x8001_0031)),
        (cr, 3, MovFromCr(3), 0x03, Step::Done(0x20_0000)),
        (cr, 4, MovFromCr(4), 0x04, Step::Done(0xA0)),
        (cr, 8, MovFromCr(8), 0x08, done),
        (cr, 16, MovToCr(0, 0x8001_0033), 0x10, done),
        (cr, 18, MovToCr(2, 5), 0x12, done),
        (cr, 19, MovToCr(3, 0x20_0000), 0x13, done),
        (cr, 20, MovToCr(4, 0x20), 0x14, done),
        (cr, 24, MovToCr(8, 3), 0x18, done),
        (cr, 16, Clts, 0x10, done),
        (cr, 16, Lmsw(9), 0x10, done),
        (dr, 7, MovFromDr(7), 0x27, Step::Done(0x400)),
        (dr, 16, MovToDr(0, 1), 0x30, done),
        (dr, 22, MovToDr(6, 1), 0x36, done),
        (m1, 5, MovToCr(0, 0x8000_0031), 0x65, done),
        (m1, 5, Lmsw(0x5), 0x65, done),
        (m1, 6, Table(0), 0x66, done),
        (m1, 13, Table(7), 0x6D, done),
        (m1, 14, Rdtsc, 0x6E, Step::Done(2)),
        (m1, 15, Rdpmc, 0x6F, done),
        (m1, 16, Pushf, 0x70, done),
        (m1, 17, Popf, 0x71, done),
        (m1, 18, Cpuid(0, 0), 0x72, done),
        (m1, 21, Intn(0x80), 0x75, Step::Event(Event::Soft(0x80))),
        (m1, 22, Invd, 0x76, done),
        (m1, 23, Pause, 0x77, done),
        (m1, 24, Hlt, 0x78, done),
        (m1, 25, Invlpg(0x1000), 0x79, done),
        (m1, 26, Invlpga(0x1000, 1), 0x7A, done),
        (m2, 1, Vmmcall, 0x81, ud),
        (m2, 2, Vmload(0x3000), 0x82, done),
        (m2, 3, Vmsave(0x3000), 0x83, done),
        (m2, 4, Stgi, 0x84, done),
        (m2, 5, Clgi, 0x85, done),
        (m2, 6, Skinit, 0x86, ud),
        (m2, 7, Rdtscp, 0x87, Step::Done(2)),
        (m2, 9, Wbinvd, 0x89, done),
        (m2, 10, Monitor, 0x8A, done),
        (m2, 11, Mwait, 0x8B, done),
        (m2, 13, Xsetbv(3), 0x8D, ud),
        (m3, 2, Invpcid(2, 0, 0), 0xA2, done),
    ]
}

#[test]
fn each_bit_exits_with_its_code_and_only_that_bit() {
    for (off, bit, op, code, without) in table() {
        let mut b = Bench::full();
        b.set_bits(ctl::CR, 0);
        if let Op::Xsetbv(_) = op {
            b.put(save::CR4, 0x4_00A0);
            b.set_bits(off, 1 << bit);
            assert_eq!(b.run(op), Step::Exit(code));
            continue;
        }
        b.set_bits(off, 1 << bit);
        assert_eq!(b.run(op), Step::Exit(code), "{op:?}");
        assert_eq!((b.get(ctl::EXITCODE), b.get(save::RIP)), (code, 0x1000), "{op:?}");
        assert_eq!(b.get(ctl::NRIP), 0x1000 + op.len(), "{op:?}");
        // All other intercepts but those of the same operation.
        let mut b = Bench::full();
        assert_eq!(b.run(op), without, "{op:?} without its bit");
        assert!(b.cpu.guest().is_some());
        let mut b = Bench::new(Features { nrip_save: false, ..Features::FULL });
        b.set_bits(off, 1 << bit);
        assert_eq!(b.run(op), Step::Exit(code));
        assert_eq!(b.get(ctl::NRIP), 0, "no NRIP save");
    }
}

#[test]
fn vmrun_of_a_guest_always_exits() {
    let mut b = Bench::full();
    assert_eq!(b.run(Op::Vmrun(0x5000)), Step::Exit(0x80));
    assert_eq!(b.get(save::RAX), 0x5000);
}

#[test]
fn privilege_faults_come_before_intercepts() {
    for (off, bit, op, _, _) in table() {
        let user = matches!(op, Op::Cpuid(..) | Op::Rdtsc | Op::Rdtscp | Op::Pause | Op::Vmmcall | Op::Intn(_))
            || matches!(op, Op::Pushf | Op::Popf | Op::Rdpmc | Op::Table(0..4));
        let mut b = Bench::full();
        b.set_bits(off, 1 << bit);
        b.mem.write(VMCB + save::CPL, 1, 3);
        let step = b.run(op);
        match op {
            Op::Xsetbv(_) => assert_eq!(step, Step::Event(Event::Exception(6, None)), "CR4.OSXSAVE first"),
            _ if user => assert!(matches!(step, Step::Exit(_)), "{op:?}"),
            _ => assert_eq!(step, Step::Event(Event::Exception(13, Some(0))), "{op:?}"),
        }
    }
}

#[test]
fn svm_instructions_need_svme() {
    let mut b = Bench::full();
    assert_eq!(b.vmrun(), Step::Done(0));
    b.cpu.state.efer &= !(1 << 12);
    for op in [Op::Vmload(0), Op::Stgi, Op::Clgi, Op::Invlpga(0, 1)] {
        assert_eq!(b.step(op), Step::Event(Event::Exception(6, None)), "{op:?}");
    }
}

#[test]
fn selective_cr0_ignores_ts_and_mp() {
    for (value, exits) in [(0x8001_0031 | 8, false), (0x8001_0033, false), (0x8001_0011, true), (0x8000_0031, true)] {
        let mut b = Bench::full();
        b.set_bits(ctl::MISC1, 1 << 5);
        let want = if exits { Step::Exit(0x65) } else { Step::Done(0) };
        assert_eq!(b.run(Op::MovToCr(0, value)), want, "{value:#x}");
    }
    // The plain intercept goes first.
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 << 5);
    b.set_bits(ctl::CR, 1 << 16);
    assert_eq!(b.run(Op::MovToCr(0, 0x8000_0031)), Step::Exit(0x10));
    assert_eq!(b.info().0, 1 << 63, "decode assist: a MOV");
}

#[test]
fn the_msr_map_has_two_bits_per_msr() {
    // MSR, byte and bit of its read bit.
    for (n, byte, bit) in
        [(0x10, 4, 0), (0x1FFF, 0x7FF, 6), (0xC000_0080, 0x820, 0), (0xC000_0103, 0x840, 6), (0xC001_0117, 0x1045, 6)]
    {
        for (shift, op, info) in [(0, Op::Rdmsr(n), 0), (1, Op::Wrmsr(n, 0x5_0000_0006), 1)] {
            let mut b = Bench::full();
            b.set_bits(ctl::MISC1, 1 << 28);
            b.mem.write(MSRPM + byte, 1, 1 << (bit + shift));
            assert_eq!(b.run(op), Step::Exit(0x7C), "{op:?}");
            assert_eq!((b.info().0, b.cpu.regs[1]), (info, u64::from(n)));
            if info == 1 {
                assert_eq!((b.get(save::RAX), b.cpu.regs[2]), (6, 5));
            }
            // All bits but this one.
            let mut b = Bench::full();
            b.set_bits(ctl::MISC1, 1 << 28);
            (0..0x2000).for_each(|n| b.mem.write(MSRPM + n, 1, 0xFF));
            b.mem.write(MSRPM + byte, 1, 0xFF & !(1 << (bit + shift)));
            assert!(!matches!(b.run(op), Step::Exit(_)), "{op:?}");
        }
    }
    // Beyond the ranges: always, if MSR_PROT is on.
    for n in [0x2000, 0x4000_0000, 0xC000_2000, 0xC001_2000, 0xC002_0000, 0xFFFF_FFFF] {
        let mut b = Bench::full();
        b.set_bits(ctl::MISC1, 1 << 28);
        assert_eq!(b.run(Op::Rdmsr(n)), Step::Exit(0x7C), "{n:#x}");
        let mut b = Bench::full();
        assert_eq!(b.run(Op::Rdmsr(n)), Step::Event(Event::Exception(13, Some(0))));
    }
}

#[test]
fn the_io_map_covers_every_byte_of_the_access() {
    // Port of the set bit, port and size of the access, exits.
    for (bit, port, size, exits) in [
        (0x60u64, 0x60, 1, true),
        (0x61, 0x60, 1, false),
        (0x61, 0x60, 2, true),
        (0x63, 0x60, 4, true),
        (0x64, 0x60, 4, false),
        (0x5F, 0x60, 4, false),
        (0x10001, 0xFFFE, 4, true),
        (0x10002, 0xFFFE, 4, false),
        (0x10002, 0xFFFF, 4, true),
    ] {
        let mut b = Bench::full();
        b.set_bits(ctl::MISC1, 1 << 27);
        b.mem.write(IOPM + bit / 8, 1, 1 << (bit % 8));
        assert_eq!(b.vmrun(), Step::Done(0));
        let got = b.step(Op::Out(port, size, 0x1234_5678));
        assert_eq!(got == Step::Exit(0x7B), exits, "{bit:#x} {port:#x} {size}");
    }
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 << 27);
    b.mem.write(IOPM + 0x70 / 8, 1, 0xFF);
    b.put(save::RAX, 0xAABB_CCDD);
    assert_eq!(b.run(Op::In(0x71, 2)), Step::Exit(0x7B));
    // Port, 64-bit address, 16-bit operand, IN; and the next RIP.
    assert_eq!(b.info(), (0x71 << 16 | 1 << 9 | 1 << 5 | 1, 0x1002));
    let mut b = Bench::full();
    b.put(save::RAX, 0x1_AABB_CCDD);
    assert_eq!(b.run(Op::Out(0x71, 1, 0x42)), Step::Done(0));
    assert_eq!(b.cpu.state.rax, 0x1_AABB_CC42, "only AL is written");
    assert_eq!((b.step(Op::In(0x71, 1)), b.cpu.ports[&0x71]), (Step::Done(0x42), 0x42));
}

#[test]
fn exceptions_exit_with_code_and_address() {
    let mut b = Bench::full();
    b.set_bits(ctl::EXCEPTIONS, 1 << 14 | 1 << 3);
    b.put(save::CR2, 0x99);
    assert_eq!(b.run(Op::Write(0xF0_0000, 4, 1)), Step::Exit(0x4E));
    assert_eq!((b.info(), b.get(save::CR2)), ((2, 0xF0_0000), 0x99), "CR2 is not written");
    let mut b = Bench::full();
    b.set_bits(ctl::EXCEPTIONS, 1 << 3);
    assert_eq!(b.run(Op::Int3), Step::Exit(0x43));
    assert_eq!((b.get(save::RIP), b.get(ctl::NRIP)), (0x1000, 0x1001));
    let mut b = Bench::full();
    assert_eq!(b.run(Op::Write(0xF0_0000, 4, 1)), Step::Event(Event::Exception(14, Some(2))));
    assert_eq!(b.cpu.state.cr2, 0xF0_0000);
    assert_eq!(b.step(Op::Read(1 << 50, 1)), Step::Event(Event::Exception(13, Some(0))), "not canonical");
}

#[test]
fn pause_filter_counts() {
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 << 23);
    b.mem.write(VMCB + ctl::PAUSE_COUNT, 2, 3);
    assert_eq!(b.run(Op::Pause), Step::Done(0));
    assert_eq!(b.step(Op::Pause), Step::Done(0));
    assert_eq!(b.step(Op::Pause), Step::Exit(0x77));
}

#[test]
fn tsc_is_offset_and_scaled() {
    let mut b = Bench::full();
    b.put(ctl::TSC_OFFSET, 1000);
    b.cpu.tsc_ratio = 1 << 33;
    assert_eq!(b.run(Op::Rdtsc), Step::Done(2 * 2 + 1000));
    assert_eq!(b.step(Op::Rdmsr(0x10)), Step::Done(3 * 2 + 1000));
}

#[test]
fn nested_page_faults_exit_with_their_information() {
    let mut b = Bench::nested();
    let leaf = b.nested_leaf(HANDLERS);
    b.mem.write(leaf, 8, HANDLERS | flag::P | flag::U);
    // The second instruction, behind the 9 bytes of the first.
    (0..15).for_each(|n| b.mem.write(0x1009 + n, 1, n + 0x90));
    assert_eq!(b.run(Op::Read(HANDLERS + 8, 4)), Step::Done(0));
    assert_eq!(b.step(Op::Write(HANDLERS + 8, 4, 1)), Step::Exit(exit::NPF));
    assert_eq!(b.info(), (1 << 32 | 7, HANDLERS + 8));
    let bytes: Vec<u64> = (0..16).map(|n| b.mem.read(VMCB + ctl::FETCHED + n, 1)).collect();
    assert_eq!(bytes[0], 15);
    assert_eq!(bytes[1..], (0x90..0x9F).collect::<Vec<_>>());
    assert_eq!(b.get(ctl::NRIP), 0);
    // The hypervisor repairs it; no flush is needed to add rights.
    b.mem.write(leaf, 8, HANDLERS | flag::P | flag::U | flag::W);
    assert_eq!(b.run(Op::Write(HANDLERS + 8, 4, 77)), Step::Done(0));
    assert_eq!(b.mem.read(HANDLERS + 8, 4), 77);
}

#[test]
fn a_store_across_pages_faults_whole() {
    let mut b = Bench::nested();
    let leaf = b.nested_leaf(HANDLERS + 0x1000);
    b.mem.write(leaf, 8, 0);
    assert_eq!(b.run(Op::Write(HANDLERS + 0xFFC, 8, u64::MAX)), Step::Exit(exit::NPF));
    assert_eq!(b.info(), (1 << 32 | 6, HANDLERS + 0x1000));
    assert_eq!(b.mem.read(HANDLERS + 0xFFC, 4), 0, "nothing was written");
}

#[test]
fn vmload_of_a_guest_uses_physical_addresses_unless_virtual() {
    let run = |virt: u64, features: Features| {
        let mut b = Bench::new(features);
        b.put(ctl::NP, 1);
        b.put(ctl::NCR3, b.roots.1);
        b.put(ctl::VIRT_EXT, virt);
        b.mem.write(b.nested_leaf(0x3000), 8, 0x5000 | flag::P | flag::U | flag::W);
        b.mem.write(0x3000 + save::STAR, 8, 3);
        b.mem.write(0x5000 + save::STAR, 8, 5);
        assert_eq!(b.run(Op::Vmload(0x3000)), Step::Done(0));
        b.cpu.state.sys[0]
    };
    assert_eq!(run(2, Features::FULL), 5);
    assert_eq!(run(0, Features::FULL), 3, "straight to physical memory");
    assert_eq!(run(2, Features::TCG), 3);
}

#[test]
fn prefixes_count_for_the_next_rip() {
    let mut b = Bench::full();
    b.cpu.prefixes = 2;
    b.set_bits(ctl::MISC2, 1 << 1);
    assert_eq!(b.run(Op::Nop), Step::Done(0));
    assert_eq!(b.step(Op::Vmmcall), Step::Exit(0x81));
    assert_eq!((b.get(save::RIP), b.get(ctl::NRIP)), (0x1003, 0x1008));
}
