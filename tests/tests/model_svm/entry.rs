//! VMRUN: its checks, what it loads and saves, clean bits and TLB control.

use tests::model::svm::state::bit::*;
use tests::model::svm::vmcb::{ctl, exit, save};
use tests::model::svm::{Features, Op, Step};

use super::{Bench, HANDLERS, VMCB};

const EXIT_CPUID: u64 = 0x72;

/// Whether VMRUN accepts the VMCB after `change`.
fn accepts(features: Features, change: impl FnOnce(&Bench)) -> bool {
    let mut b = Bench::new(features);
    change(&b);
    match b.vmrun() {
        Step::Done(0) | Step::Event(_) => true,
        Step::Exit(exit::INVALID) => {
            assert_eq!(b.get(ctl::EXITCODE), u64::MAX, "64 bits of ones");
            assert!(!b.cpu.gif);
            false
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_minimal_vmcb_enters() {
    assert!(accepts(Features::FULL, |_| {}));
    assert!(accepts(Features::TCG, |_| {}));
}

#[test]
fn each_consistency_check_fires_and_its_neighbour_does_not() {
    type Change = fn(&Bench);
    let flip = |off, bits: u64| move |b: &Bench| b.put(off, b.get(off) ^ bits);
    let cs = save::SEGMENTS + 16 + 2;
    // Each: refused, and the nearest accepted.
    let pairs: [(&str, Change, Change); 14] = [
        ("EFER.SVME", |b| b.put(save::EFER, 0xD00), |b| b.put(save::EFER, 0x1D01)),
        ("EFER reserved", |b| b.put(save::EFER, 0x1D00 | 1 << 16), |b| b.put(save::EFER, 0x1D00 | 1 << 15)),
        ("CR0 NW without CD", |b| b.put(save::CR0, 0xA001_0031), |b| b.put(save::CR0, 0xE001_0031)),
        ("CR0 high", |b| b.put(save::CR0, 0x1_8001_0031), |b| b.put(save::CR0, 0xC001_0031)),
        ("CR3", |b| b.put(save::CR3, 1 << 48), |b| b.put(save::CR3, 1 << 47)),
        ("CR4", |b| b.put(save::CR4, 0xA0 | 1 << 23), |b| b.put(save::CR4, 0xA0 | 1 << 20)),
        ("DR6", |b| b.put(save::DR6, 1 << 32), |b| b.put(save::DR6, 1 << 31)),
        ("DR7", |b| b.put(save::DR7, 1 << 63), |b| b.put(save::DR7, 1 << 31)),
        ("long without PAE", |b| b.put(save::CR4, 0x80), |b| b.put(save::CR4, 0x20)),
        ("long without PE", |b| b.put(save::CR0, 0x8001_0030), |b| b.put(save::CR0, 0x8000_0031)),
        ("VMRUN intercept", |b| b.put32(ctl::MISC2, !1), |b| b.put32(ctl::MISC2, 1)),
        ("ASID 0", |b| b.put32(ctl::ASID, 0), |b| b.put32(ctl::ASID, 32767)),
        ("IOPM", |b| b.put(ctl::IOPM, (1 << 48) - 0x2000), |b| b.put(ctl::IOPM, (1 << 48) - 0x3000)),
        ("MSRPM", |b| b.put(ctl::MSRPM, (1 << 48) - 0x1000), |b| b.put(ctl::MSRPM, (1 << 48) - 0x2000 + 0xFFF)),
    ];
    for (name, bad, good) in pairs {
        assert!(!accepts(Features::FULL, bad), "{name}");
        assert!(accepts(Features::FULL, good), "{name}, just short");
    }
    // L and D together only matter in long mode.
    let both = |b: &Bench| b.mem.write(VMCB + cs, 2, 0x69B);
    assert!(!accepts(Features::FULL, both));
    assert!(accepts(Features::FULL, |b| b.mem.write(VMCB + cs, 2, 0x49B)));
    assert!(accepts(Features::FULL, |b| {
        both(b);
        b.put(save::EFER, EFER_SVME);
    }));
    assert!(!accepts(Features::FULL, |b| b.put32(ctl::ASID, 32768)));
    assert!(!accepts(Features::TCG, |b| b.put32(ctl::ASID, 16)));
    assert!(accepts(Features::TCG, |b| b.put32(ctl::ASID, 15)));
    assert!(accepts(Features::FULL, flip(save::EFER, EFER_LMA)), "LMA follows from LME and PG");
    // Paged real mode is legal.
    assert!(accepts(Features::FULL, |b| {
        b.put(save::EFER, EFER_SVME);
        b.put(save::CR0, 0x8000_0010);
    }));
}

#[test]
fn nested_paging_has_checks_of_its_own() {
    let np = |b: &Bench| b.put(ctl::NP, 1);
    assert!(accepts(Features::FULL, np));
    assert!(!accepts(Features { nested_paging: false, ..Features::FULL }, np));
    assert!(!accepts(Features::FULL, |b| {
        np(b);
        b.put(ctl::NCR3, 1 << 48);
    }));
    for (pat, ok) in [(0x0007_0406_0007_0402, false), (0x0007_0406_0007_0408, false), (0x0101_0606_0505_0404, true)] {
        assert_eq!(
            accepts(Features::FULL, |b| {
                np(b);
                b.put(save::PAT, pat);
            }),
            ok
        );
        assert!(accepts(Features::FULL, |b| b.put(save::PAT, pat)), "not looked at without nested paging");
    }
    let mut b = Bench::nested();
    b.cpu.state.cr0 &= !CR0_PG;
    assert_eq!(b.vmrun(), Step::Exit(exit::INVALID), "the host must have paging on");
}

#[test]
fn event_injection_is_checked() {
    let v = 1u64 << 31;
    for (value, ok) in [
        (v | 0x20, true),
        (v | 0x100 | 0x20, false),
        (v | 0x500, false),
        (v | 0x600, false),
        (v | 0x700, false),
        (0x700, true),
        (v | 0x300 | 13, true),
        (v | 0x300 | 2, false),
        (v | 0x300 | 5, false),
        (v | 0x300 | 31, true),
        (v | 0x300 | 32, false),
        (v | 0x200 | 2, true),
        (v | 0x400 | 0x80, true),
    ] {
        assert_eq!(accepts(Features::FULL, |b| b.put(ctl::EVENTINJ, value)), ok, "{value:#x}");
    }
}

#[test]
fn tlb_control_values() {
    for (value, full, tcg) in [(0, true, true), (1, true, true), (2, false, false), (3, true, false), (7, true, false)]
    {
        let set = |b: &Bench| b.mem.write(VMCB + ctl::TLB_CONTROL, 1, value);
        assert_eq!(accepts(Features::FULL, set), full, "{value}");
        assert_eq!(accepts(Features::TCG, set), tcg, "{value}");
    }
}

#[test]
fn vmrun_itself_faults() {
    let mut b = Bench::full();
    for pa in [VMCB + 8, 1 << 48] {
        assert!(matches!(b.step(Op::Vmrun(pa)), Step::Event(_)), "{pa:#x}");
    }
    b.cpu.state.efer &= !EFER_SVME;
    assert!(matches!(b.vmrun(), Step::Event(_)));
    assert_eq!(b.cpu.guest(), None);
}

#[test]
fn state_is_loaded_saved_and_the_host_comes_back() {
    let mut b = Bench::full();
    b.set_bits(ctl::MISC1, 1 << 18);
    b.put(save::CR2, 0x1234);
    b.cpu.state.rip = 0x7700;
    b.cpu.state.rsp = 0x9900;
    b.cpu.state.rflags = 0x202;
    let host = b.cpu.state.clone();
    b.cpu.gif = false;
    assert_eq!(b.vmrun(), Step::Done(0));
    assert!(b.cpu.gif, "VMRUN sets GIF");
    assert_eq!((b.cpu.state.rip, b.cpu.state.cr2, b.cpu.state.rsp), (0x1000, 0x1234, 0x8000));
    assert_eq!(b.step(Op::Nop), Step::Done(0));
    b.cpu.state.rax = 5;
    assert_eq!(b.step(Op::Cpuid(1, 0)), Step::Exit(EXIT_CPUID));
    assert!(!b.cpu.gif);
    assert_eq!((b.get(save::RIP), b.get(ctl::NRIP), b.get(save::RAX)), (0x1001, 0x1003, 1));
    assert_eq!(b.get(ctl::EXITINTINFO), 0);
    let s = &b.cpu.state;
    assert_eq!((s.rip, s.rsp, s.rflags, s.cr3, s.rax), (0x7703, 0x9900, 0x202, host.cr3, VMCB));
    assert_eq!(s.cr2, 0x1234, "CR2 is not the host's to get back");
    assert_eq!(s.dr7, 0x400);
}

#[test]
fn vmload_and_vmsave_move_the_rest() {
    let mut b = Bench::full();
    b.mem.write(VMCB + save::SEGMENTS + 5 * 16 + 8, 8, 0x0000_8000_0000_0000);
    b.put(save::STAR + 4 * 8, 0x77);
    assert_eq!(b.step(Op::Vmload(VMCB)), Step::Done(0));
    assert_eq!(b.cpu.state.seg[5].base, 0xFFFF_8000_0000_0000, "bases are made canonical");
    assert_eq!(b.cpu.state.sys[4], 0x77);
    b.cpu.state.sys[1] = 0x99;
    assert_eq!(b.step(Op::Vmsave(0x3000)), Step::Done(0));
    assert_eq!(b.mem.read(0x3000 + save::STAR + 8, 8), 0x99);
    assert_eq!(b.mem.read(0x3000 + save::SEGMENTS + 5 * 16 + 8, 8), 0xFFFF_8000_0000_0000);
    // VMRUN and #VMEXIT leave them alone.
    b.set_bits(ctl::MISC1, 1 << 18);
    b.cpu.state.sys[1] = 0xAA;
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    assert_eq!(b.cpu.state.sys[1], 0xAA);
}

/// Enters twice; between the runs the hypervisor moves RIP and the RSP, changes CR2 and declares it clean or not.
fn second_cr2(features: Features, clean: u64, copies: u32) -> u64 {
    let mut b = Bench::new(features);
    b.cpu.use_clean_copies(copies);
    b.set_bits(ctl::MISC1, 1 << 18);
    b.put(save::CR2, 0x1111);
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    b.put(save::CR2, 0x2222);
    b.put(save::RIP, 0x3333);
    b.put32(ctl::CLEAN, clean);
    assert_eq!(b.vmrun(), Step::Done(0));
    assert_eq!(b.cpu.state.rip, 0x3333, "RIP is never cached");
    b.cpu.state.cr2
}

#[test]
fn a_clean_bit_lets_the_cpu_use_its_copy() {
    let group = 1 << 9;
    assert_eq!(second_cr2(Features::FULL, group, 1024), 0x1111);
    assert_eq!(second_cr2(Features::FULL, group, 0), 0x2222);
    assert_eq!(second_cr2(Features::FULL, !group, 1024), 0x2222, "another group is clean");
    assert_eq!(second_cr2(Features::TCG, group, 1024), 0x2222, "no clean bits");
}

#[test]
fn intercepts_may_come_from_the_copy() {
    let mut b = Bench::full();
    b.cpu.use_clean_copies(1024);
    b.set_bits(ctl::MISC1, 1 << 18);
    assert_eq!(b.run(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
    // The hypervisor wants HLT, too, and forgets the clean bit.
    b.set_bits(ctl::MISC1, 1 << 24);
    b.put32(ctl::CLEAN, 1);
    assert_eq!(b.run(Op::Hlt), Step::Done(0), "the old intercepts");
    assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Idle);
}

#[test]
fn tlb_control_drops_and_nothing_else_does() {
    let fill = |b: &mut Bench| {
        b.set_bits(ctl::MISC1, 1 << 18);
        assert_eq!(b.run(Op::Read(HANDLERS, 8)), Step::Done(0));
        assert_eq!(b.step(Op::Cpuid(0, 0)), Step::Exit(EXIT_CPUID));
        b.cpu.mmu.tlb.len()
    };
    let mut b = Bench::full();
    let n = fill(&mut b);
    assert!(n > 0);
    assert_eq!(fill(&mut b), n, "translations survive the world switches");
    for (value, left) in [(7, 0), (3, 0), (1, 0), (0, n)] {
        let mut b = Bench::full();
        assert_eq!(fill(&mut b), n);
        b.mem.write(VMCB + ctl::TLB_CONTROL, 1, value);
        assert_eq!(b.vmrun(), Step::Done(0));
        assert_eq!(b.cpu.mmu.tlb.len(), left, "TLB_CONTROL {value}");
    }
    // Another ASID keeps them, unless everything goes.
    for (value, left) in [(7, n), (3, n), (1, 0)] {
        let mut b = Bench::full();
        assert_eq!(fill(&mut b), n);
        b.put32(ctl::ASID, 2);
        b.mem.write(VMCB + ctl::TLB_CONTROL, 1, value);
        assert_eq!(b.vmrun(), Step::Done(0));
        assert_eq!(b.cpu.mmu.tlb.len(), left, "TLB_CONTROL {value} of another ASID");
    }
    // A refused VMRUN drops nothing.
    let mut b = Bench::full();
    assert_eq!(fill(&mut b), n);
    b.mem.write(VMCB + ctl::TLB_CONTROL, 1, 1);
    b.put(save::CR0, 1 << 32);
    assert_eq!(b.vmrun(), Step::Exit(exit::INVALID));
    assert_eq!(b.cpu.mmu.tlb.len(), n);
}
