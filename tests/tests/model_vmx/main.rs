//! The model's VT-x CPU against the SDM: each rule fires, and just short of it nothing happens.

mod checks;
mod events;
mod exits;

use tests::model::mem::PhysMem;
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::PageSize;
use tests::model::vmx::fields::{self as f, REVISION};
use tests::model::vmx::{Caps, Cpu, Op, Status, Step, write_minimal};

const VMXON: u64 = 0x31_0000;
const VMCS: u64 = 0x31_1000;
const MSR_BITMAP: u64 = 0x31_2000;
const IO_A: u64 = 0x31_3000;
const IO_B: u64 = 0x31_4000;
const IDT: u64 = 0x6000;
const STACK: u64 = 0x8000;
const HANDLERS: u64 = 0x4_0000;

/// A CPU in VMX operation with one VMCS that enters; guest memory is one to one from 0 to 1 MiB.
struct Bench {
    mem: PhysMem,
    cpu: Cpu,
    /// The guest's root, and the root of an EPT.
    roots: (u64, u64),
    launched: bool,
}

impl Bench {
    fn new() -> Self {
        let mem = PhysMem::new(0x40_0000);
        let mut t = Tables::new(&mem, 0x20_0000);
        let roots = (t.frame(), t.frame());
        let rights = flag::P | flag::W | flag::U;
        t.map_range(Format::Level4, roots.0, 0, 0, 0x10_0000, PageSize::K4, rights);
        let ept = flag::RWX | flag::WB;
        t.map_range(Format::Ept, roots.1, 0, 0, 0x10_0000, PageSize::K4, ept);
        t.map_range(Format::Ept, roots.1, 0x20_0000, 0x20_0000, 0x10_0000, PageSize::K4, ept);
        for v in 0..256u64 {
            gate(&mem, v, 0xE, 0);
        }
        mem.write(VMXON, 4, u64::from(REVISION));
        mem.write(VMCS, 4, u64::from(REVISION));
        let mut cpu = Cpu::new(Caps::FULL, 1);
        assert_eq!(cpu.vmxon(&mem, VMXON), Status::Ok);
        assert_eq!(cpu.vmclear(&mem, VMCS), Status::Ok);
        assert_eq!(cpu.vmptrld(&mem, VMCS), Status::Ok);
        write_minimal(&mut cpu, roots.0);
        let mut b = Self { mem, cpu, roots, launched: false };
        b.set(f::GUEST_IDTR_BASE, IDT);
        b.set(f::GUEST_TR_BASE, 0x9000);
        b.mem.write(0x9004, 8, 0xB000);
        b.set(f::MSR_BITMAP, MSR_BITMAP);
        b.set(f::IO_BITMAP_A, IO_A);
        b.set(f::IO_BITMAP_B, IO_B);
        b
    }

    /// With EPT and VPID 1.
    fn nested() -> Self {
        let mut b = Self::new();
        b.or(f::PROC, 1 << 31);
        b.or(f::PROC2, 1 << 1 | 1 << 5);
        b.set(f::VPID, 1);
        b.set(f::EPTP, b.roots.1 | 0x1E);
        b
    }

    fn set(&mut self, field: u32, value: u64) {
        assert_eq!(self.cpu.vmwrite(field, value), Status::Ok, "{field:#x}");
    }

    fn get(&mut self, field: u32) -> u64 {
        self.cpu.vmread(field).expect("a field of the model")
    }

    fn or(&mut self, field: u32, bits: u64) {
        let value = self.get(field) | bits;
        self.set(field, value);
    }

    fn step(&mut self, op: Op) -> Step {
        self.cpu.step(&self.mem, op)
    }

    /// VMLAUNCH the first time, VMRESUME later.
    fn enter(&mut self) -> Step {
        let op = if self.launched { Op::Vmresume } else { Op::Vmlaunch };
        let step = self.step(op);
        self.launched |= self.cpu.in_guest();
        step
    }

    /// Enters, runs `op`, and returns what came of it.
    fn run(&mut self, op: Op) -> Step {
        let entered = self.enter();
        assert_eq!((entered, self.cpu.in_guest()), (Step::Done(0), true), "{}", self.cpu.why);
        self.step(op)
    }

    fn ept_leaf(&self, gpa: u64) -> u64 {
        Tables::new(&self.mem, 0x3F_0000).slot(Format::Ept, self.roots.1, gpa, PageSize::K4)
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
