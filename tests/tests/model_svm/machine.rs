//! Several CPUs: each has its own TLB, and kicks cross threads.

use std::sync::atomic::{AtomicU64, Ordering};

use tests::model::machine::Machine;
use tests::model::svm::vmcb::{ctl, write_minimal};
use tests::model::svm::{Features, Op, Step};
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::PageSize;

const PAGE: u64 = 0x5000;

/// Two CPUs with a guest each on the same nested tables; returns the machine and the nested leaf of `PAGE`.
fn two() -> (Machine<tests::model::svm::Cpu>, u64) {
    let m = Machine::amd(2, 0x40_0000, Features::FULL, 9);
    let mut t = Tables::new(&m.mem, 0x20_0000);
    let (guest, nested) = (t.frame(), t.frame());
    let rights = flag::P | flag::W | flag::U;
    t.map(Format::Level4, guest, PAGE, PAGE, PageSize::K4, rights);
    t.map_range(Format::Level4, nested, 0x20_0000, 0x20_0000, 0x10_0000, PageSize::K4, rights);
    let leaf = t.map(Format::Level4, nested, PAGE, 0x10_0000, PageSize::K4, rights);
    for n in 0..2 {
        let vmcb = 0x1000 * (n + 1);
        write_minimal(&m.mem, vmcb, guest);
        m.mem.write(vmcb + ctl::MISC1, 4, 2);
        m.mem.write(vmcb + ctl::NP, 8, 1);
        m.mem.write(vmcb + ctl::NCR3, 8, nested);
        m.mem.write(vmcb + ctl::ASID, 4, n + 1);
    }
    (m, leaf)
}

#[test]
fn a_remap_reaches_only_the_cpu_that_flushes() {
    let (mut m, leaf) = two();
    m.mem.write(0x10_0000, 8, 1);
    m.mem.write(0x10_1000, 8, 2);
    for n in 0..2 {
        m.cpus[n].mmu.audit = true;
        assert_eq!(m.step(n, Op::Vmrun(0x1000 * (n as u64 + 1))), Step::Done(0));
        assert_eq!(m.step(n, Op::Read(PAGE, 8)), Step::Done(1));
    }
    m.mem.write(leaf, 8, 0x10_1000 | flag::P | flag::W | flag::U);
    // CPU 0 is kicked and its next entry flushes; CPU 1 is forgotten.
    m.lines()[0].nmi();
    assert_eq!(m.step(0, Op::Nop), Step::Exit(0x61));
    m.mem.write(0x1000 + ctl::TLB_CONTROL, 1, 3);
    assert_eq!(m.step(0, Op::Vmrun(0x1000)), Step::Done(0));
    // The kick is still pending for the host: it takes it between.
    assert_eq!(m.step(0, Op::Nop), Step::Exit(0x61));
    assert_eq!(m.step(0, Op::Stgi), Step::Done(0));
    assert!(matches!(m.step(0, Op::Nop), Step::Event(_)));
    assert_eq!(m.step(0, Op::Vmrun(0x1000)), Step::Done(0));
    assert_eq!(m.step(0, Op::Read(PAGE, 8)), Step::Done(2));
    assert_eq!(m.step(1, Op::Read(PAGE, 8)), Step::Done(1), "stale, as hardware would be");
    assert_eq!((m.cpus[0].mmu.stale_count, m.cpus[1].mmu.stale_count), (0, 1));
}

#[test]
fn kicks_cross_threads() {
    let (mut m, _) = two();
    let lines = m.lines();
    let exits = AtomicU64::new(0);
    let [cpu, _] = &mut m.cpus[..] else { unreachable!() };
    let mem = &m.mem;
    // A host that runs guests keeps GIF clear around VMRUN: a kick before it is not lost and not taken early.
    assert_eq!(cpu.step(mem, Op::Clgi), Step::Done(0));
    std::thread::scope(|s| {
        let exits = &exits;
        let runner = s.spawn(move || {
            for n in 0..50 {
                assert_eq!(cpu.step(mem, Op::Vmrun(0x1000)), Step::Done(0));
                while cpu.step(mem, Op::Nop) == Step::Done(0) {}
                assert_eq!(mem.read(0x1000 + ctl::EXITCODE, 8), 0x61, "{n}");
                assert_eq!(cpu.step(mem, Op::Stgi), Step::Done(0));
                assert!(matches!(cpu.step(mem, Op::Nop), Step::Event(_)));
                assert_eq!(cpu.step(mem, Op::Clgi), Step::Done(0));
                // Release: whoever sees the count sees the exit.
                exits.store(n + 1, Ordering::Release);
            }
        });
        for n in 0..50 {
            lines[0].nmi();
            while exits.load(Ordering::Acquire) == n && !runner.is_finished() {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(exits.into_inner(), 50);
}
