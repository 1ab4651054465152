//! Control and debug registers: their intercepts, their checks, and what a write drops from the TLB (APM volume 2, 3.1,
//! 5.5.2 and 15.8).

use super::state::bit::*;
use super::vmcb::{exit, misc1, vintr};
use super::{Cpu, GP, Op, Trap, UD};

impl Cpu {
    pub(super) fn exec_cr(&mut self, op: Op) -> Result<u64, Trap> {
        self.kernel()?;
        let (cr, dr) = self.guest.as_ref().map_or((0, 0), |g| (g.ctl.cr, g.ctl.dr));
        let access = |bits: u32, base: u64, n: u32| if bits & (1 << n) != 0 { Some(base + u64::from(n)) } else { None };
        let mov = self.assist(1 << 63);
        let leave = |code: Option<u64>, info| code.map_or(Ok(()), |code| Err(Trap::Exit(code, info, 0)));
        match op {
            Op::MovFromCr(n) => {
                if !matches!(n, 0 | 2 | 3 | 4 | 8) {
                    return Err(UD);
                }
                leave(access(cr, 0x00, u32::from(n)), mov)?;
                self.state.rax = self.read_cr(n);
                Ok(self.state.rax)
            }
            Op::MovToCr(n, value) => {
                if !matches!(n, 0 | 2 | 3 | 4 | 8) {
                    return Err(UD);
                }
                self.state.rax = value;
                leave(access(cr, 0x00, u32::from(n) + 16), mov)?;
                if n == 0 {
                    self.selective(value, mov)?;
                }
                self.write_cr(n, value).map(|()| 0)
            }
            Op::Lmsw(value) => {
                self.state.rax = u64::from(value);
                leave(access(cr, 0x00, 16), 0)?;
                // PE can be set, not cleared.
                let new = self.state.cr0 & !0xE | u64::from(value) & 0xF;
                self.selective(new, 0)?;
                self.write_cr(0, new).map(|()| 0)
            }
            Op::Clts => {
                leave(access(cr, 0x00, 16), 0)?;
                self.state.cr0 &= !CR0_TS;
                Ok(0)
            }
            Op::MovToDr(n, value) => {
                self.state.rax = value;
                leave(access(dr, 0x20, u32::from(n & 7) + 16), self.assist(0))?;
                match n {
                    0..=3 => self.dr[usize::from(n)] = value,
                    _ if value >> 32 != 0 => return Err(GP),
                    6 | 4 => self.state.dr6 = value & 0xE00F | 0xFFFF_0FF0,
                    _ => self.state.dr7 = value & !0xD800 | 0x400,
                }
                Ok(0)
            }
            Op::MovFromDr(n) => {
                leave(access(dr, 0x20, u32::from(n & 7)), self.assist(0))?;
                self.state.rax = match n {
                    0..=3 => self.dr[usize::from(n)],
                    6 | 4 => self.state.dr6,
                    _ => self.state.dr7,
                };
                Ok(self.state.rax)
            }
            _ => unreachable!("not a register move"),
        }
    }

    /// The selective CR0 intercept: a write that changes more than TS and MP.
    fn selective(&self, new: u64, info: u64) -> Result<(), Trap> {
        let changed = (self.state.cr0 ^ new) & !(CR0_TS | CR0_MP) != 0;
        if changed && self.intercepts(0, misc1::CR0_SELECTIVE) {
            return Err(Trap::Exit(exit::MISC1 + u64::from(misc1::CR0_SELECTIVE), info, 0));
        }
        Ok(())
    }

    fn virtual_tpr(&self) -> Option<u64> {
        self.guest.as_ref().filter(|g| g.ctl.vintr & vintr::MASKING != 0).map(|g| g.ctl.vintr & 0xF)
    }

    fn read_cr(&self, n: u8) -> u64 {
        match n {
            0 => self.state.cr0,
            2 => self.state.cr2,
            3 => self.state.cr3,
            4 => self.state.cr4,
            _ => self.virtual_tpr().unwrap_or(self.cr8),
        }
    }

    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Trap> {
        let tag = self.tag();
        match n {
            0 => self.write_cr0(value)?,
            2 => self.state.cr2 = value,
            3 => {
                let pcide = self.state.cr4 & CR4_PCIDE != 0;
                let keep = pcide && value >> 63 != 0;
                let value = if pcide { value & !(1 << 63) } else { value };
                if self.state.long_mode() && value >> self.features.maxphyaddr != 0 {
                    return Err(GP);
                }
                self.state.cr3 = if self.state.long_mode() { value } else { value & 0xFFFF_FFFF };
                if !keep {
                    self.mmu.tlb.mov_cr3(tag.asid, self.tag().pcid);
                }
            }
            4 => self.write_cr4(value)?,
            _ if value > 15 => return Err(GP),
            _ if self.virtual_tpr().is_some() => self.change_vintr(|v| v & !0xF | value),
            _ => self.cr8 = value,
        }
        Ok(())
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let s = &mut self.state;
        let value = value | CR0_ET;
        let paging = value & CR0_PG != 0;
        let refused = value >> 32 != 0
            || (paging && value & CR0_PE == 0)
            || (value & CR0_NW != 0 && value & CR0_CD == 0)
            || (paging && s.cr0 & CR0_PG == 0 && s.efer & EFER_LME != 0 && s.cr4 & CR4_PAE == 0)
            || (!paging && s.bits64());
        if refused {
            return Err(GP);
        }
        let changed = s.cr0 ^ value;
        s.cr0 = value;
        let lma = s.efer & EFER_LME != 0 && paging;
        s.efer = s.efer & !EFER_LMA | if lma { EFER_LMA } else { 0 };
        // No promise of the APM for other bits: what they protect is checked at each access.
        if changed & CR0_PG != 0 {
            self.mmu.tlb.flush_linear(self.tag().asid);
        }
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Trap> {
        let s = &mut self.state;
        let changed = s.cr4 ^ value;
        let pcid_on = changed & value & CR4_PCIDE != 0;
        let refused = value & !self.features.cr4 != 0
            || (s.long_mode() && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0))
            || (pcid_on && (!s.long_mode() || s.cr3 & 0xFFF != 0));
        if refused {
            return Err(GP);
        }
        s.cr4 = value;
        let drops = CR4_PGE | CR4_PAE | CR4_PSE;
        if changed & drops != 0 || changed & !value & CR4_PCIDE != 0 {
            self.mmu.tlb.flush_linear(self.tag().asid);
        }
        Ok(())
    }
}
