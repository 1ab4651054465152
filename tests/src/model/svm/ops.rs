//! What the instructions do, with their intercepts, in the order of APM volume 2, table 15-7: faults of privilege and
//! mode first, then the intercept, then everything else.

use super::state::bit::*;
use super::vmcb::{exit, misc1, misc2, vintr};
use super::{Cpu, Event, GP, Op, Trap, UD};
use crate::model::cpu::idt::{self, Core};
use crate::model::cpu::op::{RBX, RCX, RDX};
use crate::model::mem::PhysMem;

impl Cpu {
    pub(super) fn exec(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        match op {
            Op::Nop => {}
            Op::Jump(to) => self.state.rip = self.wrap(to),
            Op::Fetch(at) => {
                self.translate(mem, at, crate::model::walk::Kind::Fetch, self.state.cpl == 3)?;
            }
            Op::Read(at, size) => {
                self.state.rax = self.load(mem, at, u64::from(size), self.state.cpl == 3)?;
                return Ok(self.state.rax);
            }
            Op::Write(at, size, value) => {
                self.state.rax = value;
                self.store(mem, at, u64::from(size), value, self.state.cpl == 3)?;
            }
            Op::Cpuid(..) | Op::Rdmsr(_) | Op::Wrmsr(..) | Op::In(..) | Op::Out(..) => return self.exec_io(mem, op),
            Op::MovToCr(..) | Op::MovFromCr(_) | Op::Lmsw(_) | Op::Clts | Op::MovToDr(..) | Op::MovFromDr(_) => {
                return self.exec_cr(op);
            }
            Op::Vmrun(_) | Op::Vmload(_) | Op::Vmsave(_) | Op::Stgi | Op::Clgi | Op::Skinit | Op::Invlpga(..) => {
                return self.exec_svm(mem, op);
            }
            Op::Vmmcall => {
                self.check(1, misc2::VMMCALL)?;
                return Err(UD);
            }
            Op::Ud2 => return Err(UD),
            Op::Raise(v, code) => return Err(Trap::Exception(v, code, 0)),
            Op::Int3 => return Err(Trap::Exception(3, None, 0)),
            Op::Intn(v) => {
                self.check(0, misc1::SOFTINT)?;
                return Err(Trap::Soft(Event::Soft(v)));
            }
            Op::Iret => {
                self.check(0, misc1::IRET)?;
                idt::iret(self, mem)?;
                self.nmi_mask = false;
                self.change_vintr(|v| v & !vintr::NMI_MASK);
            }
            _ => return self.exec_misc(mem, op),
        }
        Ok(0)
    }

    pub(super) fn kernel(&self) -> Result<(), Trap> {
        if self.state.cpl == 0 { Ok(()) } else { Err(GP) }
    }

    pub(super) fn assist(&self, info: u64) -> u64 {
        if self.features.decode_assists { info } else { 0 }
    }

    fn exec_misc(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        match op {
            Op::Hlt => {
                self.kernel()?;
                self.check(0, misc1::HLT)?;
                self.halted = true;
            }
            Op::Pause => self.pause()?,
            Op::Sti => {
                self.kernel()?;
                self.shadow = self.state.rflags & FLAG_IF == 0;
                self.state.rflags |= FLAG_IF;
            }
            Op::Cli => {
                self.kernel()?;
                self.state.rflags &= !FLAG_IF;
            }
            Op::Pushf => {
                self.check(0, misc1::PUSHF)?;
                self.pushf(mem)?;
            }
            Op::Popf => {
                self.check(0, misc1::POPF)?;
                self.popf(mem)?;
            }
            Op::Rdtsc | Op::Rdtscp => {
                if self.state.cr4 & CR4_TSD != 0 {
                    self.kernel()?;
                }
                if op == Op::Rdtsc {
                    self.check(0, misc1::RDTSC)?
                } else {
                    self.check(1, misc2::RDTSCP)?
                }
                return Ok(self.read_tsc());
            }
            Op::Rdpmc => self.check(0, misc1::RDPMC)?,
            Op::Wbinvd => {
                self.kernel()?;
                self.check(1, misc2::WBINVD)?;
            }
            Op::Invd => {
                self.kernel()?;
                self.check(0, misc1::INVD)?;
            }
            Op::Monitor => {
                self.kernel()?;
                self.check(1, misc2::MONITOR)?;
            }
            Op::Mwait => {
                self.kernel()?;
                self.check(1, misc2::MWAIT)?;
            }
            Op::Xsetbv(value) => {
                if self.state.cr4 & CR4_OSXSAVE == 0 {
                    return Err(UD);
                }
                self.kernel()?;
                (self.regs[RCX], self.state.rax, self.regs[RDX]) = (0, value & 0xFFFF_FFFF, value >> 32);
                self.check(1, misc2::XSETBV)?;
                if !idt::xcr0_valid(value) {
                    return Err(GP);
                }
                self.xcr0 = value;
            }
            Op::Table(n) => {
                if n >= 4 {
                    self.kernel()?;
                }
                self.check(0, misc1::IDTR_READ + u32::from(n & 7))?;
            }
            Op::Invlpg(at) => {
                self.kernel()?;
                if self.intercepts(0, misc1::INVLPG) {
                    return Err(Trap::Exit(exit::MISC1 + u64::from(misc1::INVLPG), self.assist(at), 0));
                }
                let tag = self.tag();
                self.mmu.tlb.invlpg(tag.asid, tag.pcid, at);
            }
            Op::Invpcid(kind, pcid, at) => {
                self.kernel()?;
                self.check(2, 2)?;
                let pcide = self.state.cr4 & CR4_PCIDE != 0;
                if kind > 3 || (kind < 2 && !pcide && pcid != 0) || (kind == 0 && !self.state.canonical(at)) {
                    return Err(GP);
                }
                self.mmu.tlb.invpcid(self.tag().asid, kind, pcid, at);
            }
            // VT-x.
            _ => return Err(UD),
        }
        Ok(0)
    }

    /// PAUSE: with a filter, the exit comes when the count runs out.
    fn pause(&mut self) -> Result<(), Trap> {
        if !self.intercepts(0, misc1::PAUSE) {
            return Ok(());
        }
        let Some(g) = &mut self.guest else { return Ok(()) };
        if g.ctl.pause_left > 1 {
            g.ctl.pause_left -= 1;
            return Ok(());
        }
        g.ctl.pause_left = g.ctl.pause_count;
        self.check(0, misc1::PAUSE)
    }

    fn exec_io(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        match op {
            Op::Cpuid(leaf, sub) => {
                (self.state.rax, self.regs[RCX]) = (u64::from(leaf), u64::from(sub));
                self.check(0, misc1::CPUID)?;
                let r = self.cpuid.get(&(leaf, sub)).copied().unwrap_or_default().map(u64::from);
                (self.state.rax, self.regs[RBX], self.regs[RCX], self.regs[RDX]) = (r[0], r[1], r[2], r[3]);
                Ok(r[0])
            }
            Op::Rdmsr(n) => {
                self.kernel()?;
                self.regs[RCX] = u64::from(n);
                if self.msr_intercepted(mem, n, false) {
                    return Err(Trap::Exit(exit::MISC1 + u64::from(misc1::MSR), 0, 0));
                }
                let value = self.rdmsr(n)?;
                (self.state.rax, self.regs[RDX]) = (value & 0xFFFF_FFFF, value >> 32);
                Ok(value)
            }
            Op::Wrmsr(n, value) => {
                self.kernel()?;
                (self.regs[RCX], self.state.rax, self.regs[RDX]) = (u64::from(n), value & 0xFFFF_FFFF, value >> 32);
                if self.msr_intercepted(mem, n, true) {
                    return Err(Trap::Exit(exit::MISC1 + u64::from(misc1::MSR), 1, 0));
                }
                self.wrmsr(n, value).map(|()| 0)
            }
            Op::In(port, size) | Op::Out(port, size, _) => {
                self.kernel()?;
                self.regs[RDX] = u64::from(port);
                let keep = if size == 4 { 0 } else { !0u64 << (size * 8) };
                if let Op::Out(_, _, value) = op {
                    self.state.rax = self.state.rax & keep | u64::from(value) & !keep & 0xFFFF_FFFF;
                }
                if self.io_intercepted(mem, port, size) {
                    return Err(self.io_exit(op, port, size));
                }
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

    /// EXITINFO1 of IOIO: port, address size, operand size, direction; EXITINFO2: the next RIP (15.10.2).
    fn io_exit(&self, op: Op, port: u16, size: u8) -> Trap {
        let address = if self.state.bits64() { 1 << 9 } else { 1 << 8 };
        let input = u64::from(matches!(op, Op::In(..)));
        let info = u64::from(port) << 16 | address | u64::from(size) << 4 | input;
        Trap::Exit(exit::MISC1 + u64::from(misc1::IOIO), info, self.wrap(self.state.rip.wrapping_add(self.length(op))))
    }

    fn exec_svm(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        let enabled = self.state.efer & EFER_SVME != 0 && self.state.cr0 & CR0_PE != 0;
        if !enabled {
            return Err(UD);
        }
        self.kernel()?;
        match op {
            Op::Vmrun(pa) => {
                self.state.rax = pa;
                self.check(1, misc2::VMRUN)?;
                return self.vmrun(mem, pa);
            }
            Op::Vmload(pa) | Op::Vmsave(pa) => {
                self.state.rax = pa;
                let load = matches!(op, Op::Vmload(_));
                self.check(1, if load { misc2::VMLOAD } else { misc2::VMSAVE })?;
                let pa = self.virtual_vmcb(mem, pa, load)?;
                if load { self.vmload(mem, pa) } else { self.vmsave(mem, pa) }
            }
            Op::Stgi => {
                self.check(1, misc2::STGI)?;
                self.set_gif(true);
            }
            Op::Clgi => {
                self.check(1, misc2::CLGI)?;
                self.set_gif(false);
            }
            Op::Invlpga(at, asid) => {
                (self.state.rax, self.regs[RCX]) = (at, u64::from(asid));
                self.check(0, misc1::INVLPGA)?;
                self.mmu.tlb.invlpga(asid, at);
            }
            _ => {
                self.check(1, misc2::SKINIT)?;
                return Err(UD);
            }
        }
        Ok(0)
    }

    /// The address that VMLOAD or VMSAVE uses: physical, also in a guest, unless virtual VMLOAD and VMSAVE is on.
    fn virtual_vmcb(&mut self, mem: &PhysMem, pa: u64, load: bool) -> Result<u64, Trap> {
        if pa & 0xFFF != 0 || pa >> self.features.maxphyaddr != 0 {
            return Err(GP);
        }
        let Some(g) = &self.guest else { return Ok(pa) };
        let Some(npt) = g.ctl.npt.filter(|_| self.features.virtual_vmload && g.ctl.virt_ext & 2 != 0) else {
            return Ok(pa);
        };
        use crate::model::walk::{Fault, Kind, Second, translate_gpa};
        let kind = if load { Kind::Read } else { Kind::Write };
        translate_gpa(&Second::Npt(npt), mem, pa, kind, true).map_err(|fault| match fault {
            Fault::Npf { info1, gpa } => Trap::Exit(exit::NPF, info1, gpa),
            _ => unreachable!("nested paging faults only so"),
        })
    }

    fn set_gif(&mut self, on: bool) {
        let virtual_gif =
            self.features.vgif && self.guest.as_ref().is_some_and(|g| g.ctl.vintr & vintr::GIF_ENABLE != 0);
        if virtual_gif {
            self.change_vintr(|v| if on { v | vintr::GIF } else { v & !vintr::GIF });
        } else {
            self.gif = on;
        }
    }
}
