//! What the instructions do, and how they exit from non-root operation (SDM volume 3, "Instructions that cause VM exits").

use super::caps::{pin, proc, proc2};
use super::fields as f;
use super::{Cpu, Event, GP, Op, Trap, UD, reason};
use crate::model::cpu::idt::{self, Core};
use crate::model::cpu::op::{RBX, RCX, RDX};
use crate::model::cpu::state::bit::*;
use crate::model::mem::PhysMem;
use crate::model::walk::Kind;

/// VM-exit instruction information of DS:\[RAX\] with 64-bit addresses and no index; RCX is the second register.
const MEMORY_OPERAND: u64 = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 28;
/// Register operand RAX, second register RCX.
const REGISTER_OPERAND: u64 = 1 << 10 | 1 << 28;

impl Cpu {
    pub(super) fn exec(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        let user = self.state.cpl == 3;
        match op {
            Op::Nop => {}
            Op::Jump(to) => self.state.rip = self.wrap(to),
            Op::Fetch(at) => {
                self.translate(mem, at, Kind::Fetch, user)?;
            }
            Op::Read(at, size) => {
                self.state.rax = self.load(mem, at, u64::from(size), user)?;
                return Ok(self.state.rax);
            }
            Op::Write(at, size, value) => {
                self.state.rax = value;
                self.store(mem, at, u64::from(size), value, user)?;
            }
            Op::Cpuid(..) | Op::Rdmsr(_) | Op::Wrmsr(..) | Op::In(..) | Op::Out(..) => return self.exec_io(mem, op),
            Op::MovToCr(..) | Op::MovFromCr(_) | Op::Lmsw(_) | Op::Clts | Op::MovToDr(..) | Op::MovFromDr(_) => {
                return self.exec_cr(mem, op);
            }
            Op::Ud2 => return Err(UD),
            Op::Raise(v, code) => return Err(Trap::Exception(v, code, 0)),
            Op::Int3 => return Err(Trap::Exception(3, None, 0)),
            Op::Intn(v) => return Err(Trap::Soft(Event::Soft(v))),
            Op::Iret => {
                idt::iret(self, mem)?;
                match &mut self.guest {
                    Some(g) if g.c.pin(pin::VIRTUAL_NMIS) => g.nmi_block = false,
                    Some(g) if g.c.pin(pin::NMI) => {}
                    _ => self.nmi_mask = false,
                }
            }
            Op::Vmrun(_) | Op::Vmmcall | Op::Vmload(_) | Op::Vmsave(_) | Op::Stgi | Op::Clgi => return Err(UD),
            Op::Skinit | Op::Invlpga(..) => return Err(UD),
            Op::Vmxon(_)
            | Op::Vmclear(_)
            | Op::Vmptrld(_)
            | Op::Vmptrst(_)
            | Op::Vmxoff
            | Op::Vmlaunch
            | Op::Vmresume
            | Op::Vmcall
            | Op::Vmread(_)
            | Op::Vmwrite(..)
            | Op::Invept(..)
            | Op::Invvpid(..)
            | Op::Vmfunc(_) => return self.exec_vmx(mem, op),
            _ => return self.exec_misc(mem, op),
        }
        Ok(0)
    }

    pub(super) fn kernel(&self) -> Result<(), Trap> {
        if self.state.cpl == 0 { Ok(()) } else { Err(GP) }
    }

    /// An exit with no more than a qualification, if `wanted` in non-root operation.
    pub(super) fn exit_if(&self, wanted: bool, why: u64, qualification: u64) -> Result<(), Trap> {
        if wanted && self.guest.is_some() { Err(Trap::Exit(why, qualification, 0)) } else { Ok(()) }
    }

    /// VMX instructions: all of them exit from non-root operation.
    fn exec_vmx(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        if self.guest.is_none() {
            return self.exec_root(mem, op);
        }
        // VMCALL exits from any privilege level.
        if op != Op::Vmcall {
            self.kernel()?;
        }
        let (why, info) = match op {
            Op::Vmcall => (reason::VMCALL, 0),
            Op::Vmlaunch => (reason::VMLAUNCH, 0),
            Op::Vmresume => (reason::VMRESUME, 0),
            Op::Vmxoff => (reason::VMXOFF, 0),
            Op::Vmfunc(_) => return Err(UD),
            Op::Vmxon(at) | Op::Vmclear(at) | Op::Vmptrld(at) | Op::Vmptrst(at) => {
                self.state.rax = at;
                let why = match op {
                    Op::Vmxon(_) => reason::VMXON,
                    Op::Vmclear(_) => reason::VMCLEAR,
                    Op::Vmptrld(_) => reason::VMPTRLD,
                    _ => reason::VMPTRST,
                };
                (why, MEMORY_OPERAND)
            }
            Op::Vmread(field) => {
                self.regs[RCX] = u64::from(field);
                (reason::VMREAD, REGISTER_OPERAND)
            }
            Op::Vmwrite(field, value) => {
                (self.regs[RCX], self.state.rax) = (u64::from(field), value);
                (reason::VMWRITE, REGISTER_OPERAND)
            }
            Op::Invept(kind, at) | Op::Invvpid(kind, at) => {
                (self.regs[RCX], self.state.rax) = (kind, at);
                (if matches!(op, Op::Invept(..)) { reason::INVEPT } else { reason::INVVPID }, MEMORY_OPERAND)
            }
            _ => return Err(UD),
        };
        self.set_field(f::INSTRUCTION_INFO, info);
        Err(Trap::Exit(why, 0, 0))
    }

    fn exec_misc(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        let c = self.controls();
        match op {
            Op::Hlt => {
                self.kernel()?;
                self.exit_if(c.proc(proc::HLT), reason::HLT, 0)?;
                self.activity = 1;
            }
            Op::Pause => self.exit_if(c.proc(proc::PAUSE), reason::PAUSE, 0)?,
            Op::Sti => {
                self.kernel()?;
                self.shadow = self.state.rflags & FLAG_IF == 0;
                self.state.rflags |= FLAG_IF;
            }
            Op::Cli => {
                self.kernel()?;
                self.state.rflags &= !FLAG_IF;
            }
            Op::Pushf => self.pushf(mem)?,
            Op::Popf => self.popf(mem)?,
            Op::Rdtsc | Op::Rdtscp => {
                if op == Op::Rdtscp && self.guest.is_some() && !c.proc2(proc2::RDTSCP) {
                    return Err(UD);
                }
                if self.state.cr4 & CR4_TSD != 0 {
                    self.kernel()?;
                }
                let why = if op == Op::Rdtsc { reason::RDTSC } else { reason::RDTSCP };
                self.exit_if(c.proc(proc::RDTSC), why, 0)?;
                return Ok(self.read_tsc());
            }
            Op::Rdpmc => self.exit_if(c.proc(proc::RDPMC), reason::RDPMC, 0)?,
            Op::Wbinvd => {
                self.kernel()?;
                self.exit_if(c.proc2(proc2::WBINVD), reason::WBINVD, 0)?;
            }
            Op::Invd => {
                self.kernel()?;
                self.exit_if(true, reason::INVD, 0)?;
            }
            Op::Monitor => {
                self.kernel()?;
                self.exit_if(c.proc(proc::MONITOR), reason::MONITOR, 0)?;
            }
            Op::Mwait => {
                self.kernel()?;
                self.exit_if(c.proc(proc::MWAIT), reason::MWAIT, 0)?;
            }
            Op::Xsetbv(value) => self.xsetbv(value)?,
            Op::Table(n) => {
                if n >= 4 {
                    self.kernel()?;
                }
                // SIDT, SGDT, SLDT, STR, LIDT, LGDT, LLDT, LTR by number.
                let why = if n & 2 == 0 { reason::GDTR_IDTR } else { reason::LDTR_TR };
                self.exit_if(c.proc2(proc2::TABLES), why, 0)?;
            }
            Op::Invlpg(at) => {
                self.kernel()?;
                self.exit_if(c.proc(proc::INVLPG), reason::INVLPG, at)?;
                let tag = self.tag();
                self.mmu.tlb.invlpg(tag.asid, tag.pcid, at);
            }
            Op::Invpcid(kind, pcid, at) => self.invpcid(kind, pcid, at)?,
            _ => unreachable!("handled before"),
        }
        Ok(0)
    }

    fn xsetbv(&mut self, value: u64) -> Result<(), Trap> {
        if self.state.cr4 & CR4_OSXSAVE == 0 {
            return Err(UD);
        }
        self.kernel()?;
        (self.regs[RCX], self.state.rax, self.regs[RDX]) = (0, value & 0xFFFF_FFFF, value >> 32);
        self.exit_if(true, reason::XSETBV, 0)?;
        if !idt::xcr0_valid(value) {
            return Err(GP);
        }
        self.xcr0 = value;
        Ok(())
    }

    fn invpcid(&mut self, kind: u64, pcid: u16, at: u64) -> Result<(), Trap> {
        let c = self.controls();
        if self.guest.is_some() && !c.proc2(proc2::INVPCID) {
            return Err(UD);
        }
        self.kernel()?;
        self.exit_if(c.proc(proc::INVLPG), reason::INVPCID, 0)?;
        let pcide = self.state.cr4 & CR4_PCIDE != 0;
        if kind > 3 || (kind < 2 && !pcide && pcid != 0) || (kind == 0 && !self.state.canonical(at)) {
            return Err(GP);
        }
        self.mmu.tlb.invpcid(self.tag().asid, kind, pcid, at);
        Ok(())
    }

    fn exec_io(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        match op {
            Op::Cpuid(leaf, sub) => {
                (self.state.rax, self.regs[RCX]) = (u64::from(leaf), u64::from(sub));
                self.exit_if(true, reason::CPUID, 0)?;
                let r = self.cpuid.get(&(leaf, sub)).copied().unwrap_or_default().map(u64::from);
                (self.state.rax, self.regs[RBX], self.regs[RCX], self.regs[RDX]) = (r[0], r[1], r[2], r[3]);
                Ok(r[0])
            }
            Op::Rdmsr(n) => {
                self.kernel()?;
                self.regs[RCX] = u64::from(n);
                self.exit_if(self.msr_exits(mem, n, false), reason::RDMSR, 0)?;
                let value = self.rdmsr(n)?;
                (self.state.rax, self.regs[RDX]) = (value & 0xFFFF_FFFF, value >> 32);
                Ok(value)
            }
            Op::Wrmsr(n, value) => {
                self.kernel()?;
                (self.regs[RCX], self.state.rax, self.regs[RDX]) = (u64::from(n), value & 0xFFFF_FFFF, value >> 32);
                self.exit_if(self.msr_exits(mem, n, true), reason::WRMSR, 0)?;
                self.wrmsr(mem, n, value).map(|()| 0)
            }
            Op::In(port, size) | Op::Out(port, size, _) => {
                self.kernel()?;
                self.regs[RDX] = u64::from(port);
                let keep = if size == 4 { 0 } else { !0u64 << (size * 8) };
                if let Op::Out(_, _, value) = op {
                    self.state.rax = self.state.rax & keep | u64::from(value) & !keep & 0xFFFF_FFFF;
                }
                let input = u64::from(matches!(op, Op::In(..)));
                let qualification = u64::from(size - 1) | input << 3 | u64::from(port) << 16;
                self.exit_if(self.io_exits(mem, port, size), reason::IO, qualification)?;
                if let Op::Out(_, _, value) = op {
                    self.ports.insert(port, value);
                    return Ok(0);
                }
                let value = u64::from(self.ports.get(&port).copied().unwrap_or(u32::MAX)) & !keep & 0xFFFF_FFFF;
                self.state.rax = self.state.rax & keep | value;
                Ok(value)
            }
            _ => unreachable!("not an IO operation"),
        }
    }
}
