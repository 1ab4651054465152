//! The model's AMD-V CPU against the APM: each rule fires, and just short of it nothing happens.

mod entry;
mod events;
mod intercepts;
mod machine;

use tests::model::mem::PhysMem;
use tests::model::svm::vmcb::{ctl, save, write_minimal};
use tests::model::svm::{Cpu, Features, Op, Step};
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::PageSize;

const VMCB: u64 = 0x31_0000;
const IOPM: u64 = 0x10_0000;
const MSRPM: u64 = 0x10_4000;
/// Guest memory: one to one from 0 to 1 MiB, user pages.
const IDT: u64 = 0x6000;
const STACK: u64 = 0x8000;
const HANDLERS: u64 = 0x4_0000;

/// A CPU, memory and one VMCB that enters.
struct Bench {
    mem: PhysMem,
    cpu: Cpu,
    /// The guest's root, and the nested root.
    roots: (u64, u64),
}

impl Bench {
    fn new(features: Features) -> Self {
        let mem = PhysMem::new(0x40_0000);
        let mut t = Tables::new(&mem, 0x20_0000);
        let roots = (t.frame(), t.frame());
        let rights = flag::P | flag::W | flag::U;
        for root in [roots.0, roots.1] {
            t.map_range(Format::Level4, root, 0, 0, 0x10_0000, PageSize::K4, rights);
        }
        // The guest's tables are behind the nested tables, too.
        t.map_range(Format::Level4, roots.1, 0x20_0000, 0x20_0000, 0x10_0000, PageSize::K4, rights);
        write_minimal(&mem, VMCB, roots.0);
        mem.write(VMCB + ctl::IOPM, 8, IOPM);
        mem.write(VMCB + ctl::MSRPM, 8, MSRPM);
        for v in 0..256u64 {
            gate(&mem, v, 0xE, 0);
        }
        mem.write(VMCB + save::SEGMENTS + 8 * 16 + 8, 8, IDT);
        mem.write(VMCB + save::SEGMENTS + 8 * 16 + 4, 4, 0xFFF);
        // A TSS whose stack for CPL 0 ends at 0xB000.
        mem.write(0x9004, 8, 0xB000);
        let mut cpu = Cpu::new(features, 1);
        cpu.state.seg[9].base = 0x9000;
        Self { mem, cpu, roots }
    }

    fn full() -> Self {
        Self::new(Features::FULL)
    }

    /// With nested paging.
    fn nested() -> Self {
        let b = Self::full();
        b.put(ctl::NP, 1);
        b.put(ctl::NCR3, b.roots.1);
        b
    }

    fn put(&self, off: u64, value: u64) {
        self.mem.write(VMCB + off, 8, value);
    }

    fn put32(&self, off: u64, value: u64) {
        self.mem.write(VMCB + off, 4, value);
    }

    fn set_bits(&self, off: u64, bits: u64) {
        self.put32(off, self.mem.read(VMCB + off, 4) | bits);
    }

    fn get(&self, off: u64) -> u64 {
        self.mem.read(VMCB + off, 8)
    }

    fn step(&mut self, op: Op) -> Step {
        self.cpu.step(&self.mem, op)
    }

    fn vmrun(&mut self) -> Step {
        self.step(Op::Vmrun(VMCB))
    }

    /// Enters, runs `op`, and returns what came of it.
    fn run(&mut self, op: Op) -> Step {
        assert_eq!(self.vmrun(), Step::Done(0));
        self.step(op)
    }

    fn info(&self) -> (u64, u64) {
        (self.get(ctl::EXITINFO1), self.get(ctl::EXITINFO2))
    }

    /// The leaf of `gpa` in the nested tables.
    fn nested_leaf(&self, gpa: u64) -> u64 {
        Tables::new(&self.mem, 0x3F_0000).slot(Format::Level4, self.roots.1, gpa, PageSize::K4)
    }

    fn guest_leaf(&self, va: u64) -> u64 {
        Tables::new(&self.mem, 0x3F_0000).slot(Format::Level4, self.roots.0, va, PageSize::K4)
    }
}

/// An IDT gate of `kind` with `dpl` to its handler.
fn gate(mem: &PhysMem, v: u64, kind: u64, dpl: u64) {
    let to = HANDLERS + v * 16;
    mem.write(IDT + v * 16, 8, to & 0xFFFF | 8 << 16 | kind << 40 | dpl << 45 | 1 << 47 | (to >> 16) << 48);
    mem.write(IDT + v * 16 + 8, 8, 0);
}
