//! One step, MSRs, and the MSR and IO bitmaps.

use super::caps::{pin, proc};
use super::fields as f;
use super::{Cpu, GP, Op, Step, Trap};
use crate::model::cpu::idt::Core;
use crate::model::cpu::state::{bit::*, seg, sign_extend};
use crate::model::mem::PhysMem;

impl Cpu {
    /// One instruction, or one event in its place.
    pub fn step(&mut self, mem: &PhysMem, op: Op) -> Step {
        if self.aborted {
            return Step::Shutdown;
        }
        self.tsc = self.tsc.wrapping_add(1);
        if let Some(step) = self.poll(mem) {
            return step;
        }
        self.tick();
        if self.activity != 0 {
            return Step::Idle;
        }
        let root_entry = matches!(op, Op::Vmlaunch | Op::Vmresume) && self.guest.is_none();
        if root_entry && self.state.cpl == 0 {
            return match self.enter(mem, op == Op::Vmlaunch) {
                Ok(step) => step,
                Err(trap) => self.trap(mem, trap, op),
            };
        }
        let fetched = if self.fetch { self.fetch(mem) } else { Ok(()) };
        let shadows = (std::mem::take(&mut self.shadow), std::mem::take(&mut self.shadow_ss));
        match fetched.and_then(|()| self.exec(mem, op)) {
            Ok(value) => {
                if !matches!(op, Op::Iret | Op::Jump(_)) {
                    self.state.rip = self.wrap(self.state.rip.wrapping_add(self.length(op)));
                }
                self.completed();
                Step::Done(value)
            }
            Err(trap) => {
                (self.shadow, self.shadow_ss) = shadows;
                self.trap(mem, trap, op)
            }
        }
    }

    /// The length of an instruction with its prefixes.
    pub(super) fn length(&self, op: Op) -> u64 {
        op.len() + u64::from(self.prefixes)
    }

    pub(super) fn wrap(&self, rip: u64) -> u64 {
        if self.state.bits64() { rip } else { rip & 0xFFFF_FFFF }
    }

    /// The preemption timer counts at its rate of the TSC.
    fn tick(&mut self) {
        let due = self.tsc & ((1 << self.caps.timer_shift) - 1) == 0;
        if let Some(g) = self.guest.as_mut().filter(|g| due && g.c.pin(pin::TIMER)) {
            g.timer = g.timer.saturating_sub(1);
        }
    }

    fn completed(&mut self) {
        if let Some(g) = &mut self.guest {
            g.mtf = g.c.proc(proc::MTF);
        }
    }

    pub(super) fn rdmsr(&self, n: u32) -> Result<u64, Trap> {
        let s = &self.state;
        Ok(match n {
            0x10 => self.read_tsc(),
            0x174..=0x176 => s.sys[5 + (n - 0x174) as usize],
            0x1D9 => s.lbr[0],
            0x277 => s.pat,
            0xC000_0080 => s.efer,
            0xC000_0081..=0xC000_0084 => s.sys[(n - 0xC000_0081) as usize],
            0xC000_0100 => s.seg[seg::FS].base,
            0xC000_0101 => s.seg[seg::GS].base,
            0xC000_0102 => s.sys[4],
            _ => *self.msrs.get(&n).ok_or(GP)?,
        })
    }

    pub(super) fn wrmsr(&mut self, _mem: &PhysMem, n: u32, value: u64) -> Result<(), Trap> {
        let canonical = sign_extend(value, 48) == value;
        let s = &mut self.state;
        match n {
            0x10 => self.tsc = value,
            0x174 => s.sys[5] = value,
            0x175 | 0x176 if canonical => s.sys[5 + (n - 0x174) as usize] = value,
            0x1D9 if value & !0xDFC3 == 0 => s.lbr[0] = value,
            0x277 if value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) => s.pat = value,
            0xC000_0080 => {
                let toggles = s.cr0 & CR0_PG != 0 && (value ^ s.efer) & EFER_LME != 0;
                if value & !super::check::EFER_INTEL != 0 || toggles {
                    return Err(GP);
                }
                s.efer = value & !EFER_LMA | s.efer & EFER_LMA;
            }
            0xC000_0081 | 0xC000_0084 => s.sys[(n - 0xC000_0081) as usize] = value,
            0xC000_0082 | 0xC000_0083 if canonical => s.sys[(n - 0xC000_0081) as usize] = value,
            0xC000_0100 if canonical => s.seg[seg::FS].base = value,
            0xC000_0101 if canonical => s.seg[seg::GS].base = value,
            0xC000_0102 if canonical => s.sys[4] = value,
            _ => *self.msrs.get_mut(&n).ok_or(GP)? = value,
        }
        Ok(())
    }

    /// The time stamp with the guest's offset and multiplier (16.48 fixed point).
    pub(super) fn read_tsc(&self) -> u64 {
        let c = self.controls();
        if !c.proc(proc::TSC_OFFSET) {
            return self.tsc;
        }
        let scaled = if c.proc2(super::caps::proc2::TSC_SCALING) {
            ((u128::from(self.tsc) * u128::from(self.field(f::TSC_MULTIPLIER))) >> 48) as u64
        } else {
            self.tsc
        };
        scaled.wrapping_add(self.field(f::TSC_OFFSET))
    }

    /// Whether RDMSR or WRMSR of `n` exits.
    pub(super) fn msr_exits(&self, mem: &PhysMem, n: u32, write: bool) -> bool {
        if self.guest.is_none() {
            return false;
        }
        if !self.controls().proc(proc::MSR_BITMAPS) {
            return true;
        }
        let quarter = match n {
            0..=0x1FFF => 0,
            0xC000_0000..=0xC000_1FFF => 0x400,
            _ => return true,
        };
        let at = self.field(f::MSR_BITMAP) + quarter + if write { 0x800 } else { 0 };
        let bit = u64::from(n & 0x1FFF);
        mem.read(at + bit / 8, 1) >> (bit % 8) & 1 != 0
    }

    /// Whether an access to `size` ports from `port` on exits.
    pub(super) fn io_exits(&self, mem: &PhysMem, port: u16, size: u8) -> bool {
        let c = self.controls();
        if !c.proc(proc::IO_BITMAPS) {
            return c.proc(proc::IO);
        }
        // A wrap around port 0xFFFF exits.
        let last = u32::from(port) + u32::from(size) - 1;
        last > 0xFFFF
            || (u64::from(port)..=u64::from(last)).any(|p| {
                let map = self.field(if p < 0x8000 { f::IO_BITMAP_A } else { f::IO_BITMAP_B });
                mem.read(map + (p & 0x7FFF) / 8, 1) >> (p % 8) & 1 != 0
            })
    }
}
