//! Control and debug registers: masks, shadows, targets, exits, checks, and what a write drops from the TLB.

use super::caps::{proc, proc2};
use super::fields as f;
use super::{Cpu, GP, Op, Trap, UD, reason};
use crate::model::cpu::state::bit::*;
use crate::model::mem::PhysMem;
use crate::model::walk::{Kind, Linear, Mode, Vendor, pdpte_reserved, translate_gpa};

impl Cpu {
    pub(super) fn exec_cr(&mut self, mem: &PhysMem, op: Op) -> Result<u64, Trap> {
        self.kernel()?;
        match op {
            Op::MovFromCr(n) => self.mov_from_cr(n),
            Op::MovToCr(n, value) => self.mov_to_cr(mem, n, value).map(|()| 0),
            Op::Lmsw(value) => self.lmsw(mem, value).map(|()| 0),
            Op::Clts => self.clts().map(|()| 0),
            Op::MovToDr(n, value) => {
                self.state.rax = value;
                self.exit_if(self.controls().proc(proc::MOV_DR), reason::DR, u64::from(n & 7))?;
                match n {
                    0..=3 => self.dr[usize::from(n)] = value,
                    _ if value >> 32 != 0 => return Err(GP),
                    4 | 6 => self.state.dr6 = value & 0xE00F | 0xFFFF_0FF0,
                    _ => self.state.dr7 = value & !0xD800 | 0x400,
                }
                Ok(0)
            }
            Op::MovFromDr(n) => {
                self.exit_if(self.controls().proc(proc::MOV_DR), reason::DR, u64::from(n & 7) | 1 << 4)?;
                self.state.rax = match n {
                    0..=3 => self.dr[usize::from(n)],
                    4 | 6 => self.state.dr6,
                    _ => self.state.dr7,
                };
                Ok(self.state.rax)
            }
            _ => unreachable!("not a register move"),
        }
    }

    /// A masked register as the guest reads it: masked bits come from the shadow.
    fn shadowed(&self, value: u64, mask: u32, shadow: u32) -> u64 {
        if self.guest.is_none() {
            return value;
        }
        let mask = self.field(mask);
        value & !mask | self.field(shadow) & mask
    }

    fn mov_from_cr(&mut self, n: u8) -> Result<u64, Trap> {
        let c = self.controls();
        let qualification = u64::from(n) | 1 << 4;
        let value = match n {
            0 => self.shadowed(self.state.cr0, f::CR0_MASK, f::CR0_SHADOW),
            2 => self.state.cr2,
            3 => {
                self.exit_if(c.proc(proc::CR3_STORE), reason::CR, qualification)?;
                self.state.cr3
            }
            4 => self.shadowed(self.state.cr4, f::CR4_MASK, f::CR4_SHADOW),
            8 => {
                self.exit_if(c.proc(proc::CR8_STORE), reason::CR, qualification)?;
                self.cr8
            }
            _ => return Err(UD),
        };
        self.state.rax = value;
        Ok(value)
    }

    fn mov_to_cr(&mut self, mem: &PhysMem, n: u8, value: u64) -> Result<(), Trap> {
        self.state.rax = value;
        let c = self.controls();
        match n {
            0 => {
                self.guarded(value, f::CR0_MASK, f::CR0_SHADOW, 0)?;
                let mask = self.host_mask(f::CR0_MASK);
                self.write_cr0(mem, value & !mask | self.state.cr0 & mask)
            }
            2 => {
                self.state.cr2 = value;
                Ok(())
            }
            3 => {
                let targets = self.field(f::CR3_TARGETS).min(4) as u32;
                let listed = (0..targets).any(|n| self.field(f::CR3_TARGET0 + n * 2) == value);
                self.exit_if(c.proc(proc::CR3_LOAD) && !listed, reason::CR, 3)?;
                self.write_cr3(mem, value)
            }
            4 => {
                self.guarded(value, f::CR4_MASK, f::CR4_SHADOW, 4)?;
                let mask = self.host_mask(f::CR4_MASK);
                self.write_cr4(mem, value & !mask | self.state.cr4 & mask)
            }
            8 => {
                self.exit_if(c.proc(proc::CR8_LOAD), reason::CR, 8)?;
                if value > 15 {
                    return Err(GP);
                }
                self.cr8 = value;
                Ok(())
            }
            _ => Err(UD),
        }
    }

    fn host_mask(&self, field: u32) -> u64 {
        if self.guest.is_some() { self.field(field) } else { 0 }
    }

    /// A write of CR0 or CR4 exits if it changes a masked bit against the shadow.
    fn guarded(&self, value: u64, mask: u32, shadow: u32, n: u64) -> Result<(), Trap> {
        let differs = (value ^ self.field(shadow)) & self.host_mask(mask) != 0;
        self.exit_if(differs, reason::CR, n)
    }

    fn clts(&mut self) -> Result<(), Trap> {
        let (mask, shadow) = (self.host_mask(f::CR0_MASK), self.field(f::CR0_SHADOW));
        if mask & CR0_TS != 0 {
            // With the shadow's bit clear the instruction does nothing.
            return self.exit_if(shadow & CR0_TS != 0, reason::CR, 2 << 4);
        }
        self.state.cr0 &= !CR0_TS;
        Ok(())
    }

    fn lmsw(&mut self, mem: &PhysMem, value: u16) -> Result<(), Trap> {
        self.state.rax = u64::from(value);
        let (mask, shadow) = (self.host_mask(f::CR0_MASK), self.field(f::CR0_SHADOW));
        let v = u64::from(value);
        // PE counts only when it is being set; MP, EM and TS when they change.
        let differs = (v & !shadow & mask & CR0_PE) | ((v ^ shadow) & mask & 0xE) != 0;
        self.exit_if(differs, reason::CR, 3 << 4 | v << 16)?;
        let low = v & 0xF & !mask;
        let new = self.state.cr0 & !(0xE & !mask) | low;
        self.write_cr0(mem, new)
    }

    fn write_cr0(&mut self, mem: &PhysMem, value: u64) -> Result<(), Trap> {
        let value = value | CR0_ET;
        let paging = value & CR0_PG != 0;
        let s = &self.state;
        let free = if self.controls().proc2(proc2::UNRESTRICTED) { CR0_PE | CR0_PG } else { 0 };
        let fixed = if self.vmxon.is_some() { self.caps.cr0_fixed0 & !free } else { 0 };
        let refused = value >> 32 != 0
            || value & fixed != fixed
            || (paging && value & CR0_PE == 0)
            || (value & CR0_NW != 0 && value & CR0_CD == 0)
            || (paging && s.cr0 & CR0_PG == 0 && s.efer & EFER_LME != 0 && s.cr4 & CR4_PAE == 0)
            || (!paging && s.bits64());
        if refused {
            return Err(GP);
        }
        let changed = s.cr0 ^ value;
        let lma = s.efer & EFER_LME != 0 && paging;
        if paging && changed & CR0_PG != 0 && !lma && s.cr4 & CR4_PAE != 0 {
            self.load_pdptes(mem, s.cr3)?;
        }
        self.state.cr0 = value;
        self.state.efer = self.state.efer & !EFER_LMA | if lma { EFER_LMA } else { 0 };
        if changed & CR0_PG != 0 {
            self.mmu.tlb.flush_linear(self.tag().asid);
        }
        Ok(())
    }

    fn write_cr3(&mut self, mem: &PhysMem, value: u64) -> Result<(), Trap> {
        let long = self.state.long_mode();
        let pcide = self.state.cr4 & CR4_PCIDE != 0;
        let keep = pcide && value >> 63 != 0;
        let value = if pcide { value & !(1 << 63) } else { value };
        if long && value >> self.caps.maxphyaddr != 0 {
            return Err(GP);
        }
        let value = if long { value } else { value & 0xFFFF_FFFF };
        if self.context().linear.mode == Mode::Pae {
            self.load_pdptes(mem, value)?;
        }
        self.state.cr3 = value;
        let tag = self.tag();
        if !keep {
            self.mmu.tlb.mov_cr3(tag.asid, tag.pcid);
        }
        Ok(())
    }

    fn write_cr4(&mut self, mem: &PhysMem, value: u64) -> Result<(), Trap> {
        let s = &self.state;
        let changed = s.cr4 ^ value;
        let pcid_on = changed & value & CR4_PCIDE != 0;
        let refused = value & !self.caps.cr4 != 0
            || (self.vmxon.is_some() && value & CR4_VMXE == 0)
            || (s.long_mode() && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0))
            || (pcid_on && (!s.long_mode() || s.cr3 & 0xFFF != 0));
        if refused {
            return Err(GP);
        }
        let pae = value & CR4_PAE != 0 && s.cr0 & CR0_PG != 0 && !s.long_mode();
        if pae && changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0 {
            self.load_pdptes(mem, s.cr3)?;
        }
        self.state.cr4 = value;
        if changed & (CR4_PGE | CR4_PAE) != 0 || changed & !value & CR4_PCIDE != 0 {
            self.mmu.tlb.flush_linear(self.tag().asid);
        }
        Ok(())
    }

    /// Loads the PDPTE registers from memory, through the EPT if there is one.
    fn load_pdptes(&mut self, mem: &PhysMem, cr3: u64) -> Result<(), Trap> {
        let second = self.context().second;
        let at = cr3 & 0xFFFF_FFE0;
        let linear = Linear { mode: Mode::Pae, maxphyaddr: self.caps.maxphyaddr, ..Linear::off(Vendor::Intel) };
        let mut new = [0; 4];
        for (n, entry) in (0..).zip(&mut new) {
            use crate::model::walk::Fault;
            let pa = translate_gpa(&second, mem, at + n * 8, Kind::Read, true).map_err(|fault| match fault {
                Fault::EptViolation { qualification, gpa } => Trap::Exit(reason::EPT_VIOLATION, qualification, gpa),
                Fault::EptMisconfig { gpa } => Trap::Exit(reason::EPT_MISCONFIG, 0, gpa),
                _ => GP,
            })?;
            *entry = mem.read(pa, 8);
            if *entry & 1 != 0 && *entry & pdpte_reserved(&linear) != 0 {
                return Err(GP);
            }
        }
        self.pdptes = new;
        Ok(())
    }
}
