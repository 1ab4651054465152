//! VMX instructions in root operation (SDM volume 3, "VMX instruction reference").

use super::fields::{self as f, REVISION, Vmcs};
use super::{Cpu, GP, Op, Trap, UD};
use crate::model::cpu::idt::Core;
use crate::model::cpu::state::bit::*;
use crate::model::mem::PhysMem;

/// How a VMX instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// VMsucceed.
    Ok,
    /// VMfailInvalid (CF).
    Invalid,
    /// VMfailValid (ZF) with this error number.
    Fail(u64),
}

impl Cpu {
    fn page(&self, pa: u64) -> bool {
        pa & 0xFFF == 0 && pa >> self.caps.maxphyaddr == 0
    }

    /// VMfail with a number if there is a current VMCS to hold it.
    pub(super) fn fail(&mut self, number: u64) -> Status {
        if self.current.is_none() {
            return Status::Invalid;
        }
        self.set_field(f::INSTRUCTION_ERROR, number);
        Status::Fail(number)
    }

    /// Sets RFLAGS as the status says.
    pub(super) fn flags(&mut self, status: Status) {
        let bits = match status {
            Status::Ok => 0,
            Status::Invalid => 1,
            Status::Fail(_) => 1 << 6,
        };
        self.state.rflags = self.state.rflags & !0x8D5 | bits;
    }

    /// VMXON with this region.
    pub fn vmxon(&mut self, mem: &PhysMem, pa: u64) -> Status {
        if self.vmxon.is_some() {
            return self.fail(15);
        }
        if !self.page(pa) || mem.read(pa, 4) != u64::from(REVISION) {
            return Status::Invalid;
        }
        self.vmxon = Some(pa);
        Status::Ok
    }

    /// VMXOFF. Active VMCSs stay in the CPU, as the SDM warns.
    pub fn vmxoff(&mut self) -> Status {
        self.vmxon = None;
        self.park();
        Status::Ok
    }

    /// VMCLEAR: writes the VMCS back, not launched, no longer current.
    pub fn vmclear(&mut self, mem: &PhysMem, pa: u64) -> Status {
        if !self.page(pa) {
            return self.fail(2);
        }
        if self.vmxon == Some(pa) {
            return self.fail(3);
        }
        if self.current() == Some(pa) {
            self.park();
        }
        let mut vmcs = self.active.remove(&pa).unwrap_or_else(|| Vmcs::load(mem, pa));
        vmcs.launched = false;
        vmcs.save(mem, pa);
        Status::Ok
    }

    /// VMPTRLD. A VMCS that is active here keeps the CPU's contents, whatever memory says.
    pub fn vmptrld(&mut self, mem: &PhysMem, pa: u64) -> Status {
        if !self.page(pa) {
            return self.fail(9);
        }
        if self.vmxon == Some(pa) {
            return self.fail(10);
        }
        if mem.read(pa, 4) != u64::from(REVISION) {
            return self.fail(11);
        }
        self.park();
        self.current = Some((pa, self.active.remove(&pa).unwrap_or_else(|| Vmcs::load(mem, pa))));
        Status::Ok
    }

    /// No VMCS is current; the one that was stays active.
    fn park(&mut self) {
        if let Some((pa, vmcs)) = self.current.take() {
            self.active.insert(pa, vmcs);
        }
    }

    /// VMREAD; a failure is the error.
    pub fn vmread(&mut self, field: u32) -> Result<u64, Status> {
        let Some((_, vmcs)) = &self.current else { return Err(Status::Invalid) };
        vmcs.read(field).ok_or(()).map_err(|()| self.fail(12))
    }

    /// VMWRITE.
    pub fn vmwrite(&mut self, field: u32, value: u64) -> Status {
        let known = self.vmread(field);
        match known {
            Err(status) => status,
            Ok(_) if f::read_only(field) && !self.caps.write_all => self.fail(13),
            Ok(_) => {
                if let Some((_, v)) = &mut self.current {
                    v.write(field, value);
                }
                Status::Ok
            }
        }
    }

    /// INVEPT by type, with the EPTP of the descriptor.
    pub fn invept(&mut self, kind: u64, eptp: u64) -> Status {
        match kind {
            1 if matches!(eptp & 7, 0 | 6) && (eptp >> 3) & 7 == 3 && eptp >> self.caps.maxphyaddr == 0 => {
                self.mmu.tlb.invept_single(eptp & 0x000F_FFFF_FFFF_F000);
            }
            2 => {
                self.mmu.tlb.invept_all();
            }
            _ => return self.fail(28),
        }
        Status::Ok
    }

    /// INVVPID by type, with VPID and address of the descriptor.
    pub fn invvpid(&mut self, kind: u64, vpid: u16, addr: u64) -> Status {
        let canonical = crate::model::cpu::state::sign_extend(addr, 48) == addr;
        if kind > 3 || (kind != 2 && vpid == 0) || (kind == 0 && !canonical) {
            return self.fail(28);
        }
        self.mmu.tlb.invvpid(kind, vpid, addr);
        Status::Ok
    }

    /// A VMX instruction as an operation, in root operation or outside VMX.
    pub(super) fn exec_root(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        let on = matches!(op, Op::Vmxon(_));
        if self.state.cr4 & CR4_VMXE == 0 || (!on && self.vmxon.is_none()) || self.state.cr0 & CR0_PE == 0 {
            return Err(UD);
        }
        if self.state.cpl != 0 {
            return Err(GP);
        }
        let status = match op {
            Op::Vmxon(at) => {
                let pa = self.load(mem, at, 8, false)?;
                self.vmxon(mem, pa)
            }
            Op::Vmclear(at) => {
                let pa = self.load(mem, at, 8, false)?;
                self.vmclear(mem, pa)
            }
            Op::Vmptrld(at) => {
                let pa = self.load(mem, at, 8, false)?;
                self.vmptrld(mem, pa)
            }
            Op::Vmptrst(at) => {
                self.store(mem, at, 8, self.current().unwrap_or(u64::MAX), false)?;
                Status::Ok
            }
            Op::Vmxoff => self.vmxoff(),
            Op::Vmread(field) => {
                self.regs[1] = u64::from(field);
                match self.vmread(field) {
                    Ok(value) => {
                        self.state.rax = value;
                        Status::Ok
                    }
                    Err(status) => status,
                }
            }
            Op::Vmwrite(field, value) => {
                (self.regs[1], self.state.rax) = (u64::from(field), value);
                self.vmwrite(field, value)
            }
            Op::Invept(kind, at) => {
                let eptp = self.load(mem, at, 8, false)?;
                self.invept(kind, eptp)
            }
            Op::Invvpid(kind, at) => {
                let (low, addr) = (self.load(mem, at, 8, false)?, self.load(mem, at.wrapping_add(8), 8, false)?);
                if low >> 16 != 0 { self.fail(28) } else { self.invvpid(kind, low as u16, addr) }
            }
            Op::Vmcall => self.fail(1),
            _ => return Err(UD),
        };
        self.flags(status);
        Ok(if status == Status::Ok { self.state.rax } else { 0 })
    }
}

/// Writes the fields of a VMCS that enters into the current one: a 64-bit guest at CPL 0 with its tables at `cr3`, no EPT,
/// no VPID, nothing intercepted that need not be; the host resumes at 0xFFFF_8000_0000_1000.
pub fn write_minimal(cpu: &mut Cpu, cr3: u64) {
    use f::*;
    let caps = cpu.caps;
    let mut set = |field, value| assert_eq!(cpu.vmwrite(field, value), Status::Ok, "{field:#x}");
    let low = |allowed: (u32, u32)| u64::from(allowed.0);
    set(PIN, low(caps.pin));
    set(PROC, low(caps.proc));
    set(EXIT, low(caps.exit) | u64::from(super::caps::exitc::HOST64));
    set(ENTRY, low(caps.entry) | u64::from(super::caps::entryc::IA32E));
    set(LINK, u64::MAX);
    for (selector, value) in [(HOST_CS, 8), (HOST_SS, 16), (HOST_TR, 24), (GUEST_CS, 8), (GUEST_TR, 24)] {
        set(selector, value);
    }
    for (cr0, cr3_field, cr4) in [(HOST_CR0, HOST_CR3, HOST_CR4), (GUEST_CR0, GUEST_CR3, GUEST_CR4)] {
        set(cr0, 0x8001_0031);
        set(cr3_field, cr3);
        set(cr4, 0x20A0);
    }
    set(HOST_RIP, 0xFFFF_8000_0000_1000);
    set(HOST_RSP, 0xFFFF_8000_0000_2000);
    for n in (0..16).step_by(2) {
        set(GUEST_ES_LIMIT + n, 0xFFFF_FFFF);
        set(GUEST_ES_AR + n, 0xC093);
    }
    set(GUEST_CS_AR, 0xA09B);
    set(GUEST_LDTR_AR, 1 << 16);
    set(GUEST_TR_LIMIT, 0x67);
    set(GUEST_TR_AR, 0x8B);
    set(GUEST_GDTR_LIMIT, 0xFFFF);
    set(GUEST_IDTR_LIMIT, 0xFFF);
    set(GUEST_RFLAGS, 2);
    set(GUEST_RIP, 0x1000);
    set(GUEST_RSP, 0x8000);
    set(GUEST_DR7, 0x400);
}
