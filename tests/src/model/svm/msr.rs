//! MSRs of the model, and the MSR and IO permission maps (APM volume 2, 15.10 and 15.11).

use super::state::{bit::*, seg, sign_extend};
use super::{Cpu, GP, Trap};
use crate::model::mem::PhysMem;

/// MSR numbers.
#[allow(missing_docs)]
pub mod nr {
    pub const TSC: u32 = 0x10;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const PAT: u32 = 0x277;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_RATIO: u32 = 0xC000_0104;
    pub const VM_CR: u32 = 0xC001_0114;
    pub const VM_HSAVE_PA: u32 = 0xC001_0117;
}

/// VM_CR: SVM is disabled.
const SVMDIS: u64 = 1 << 4;
/// VM_CR: SVMDIS is locked.
const LOCK: u64 = 1 << 3;

impl Cpu {
    pub(super) fn rdmsr(&self, n: u32) -> Result<u64, Trap> {
        let s = &self.state;
        Ok(match n {
            nr::TSC => self.read_tsc(),
            nr::SYSENTER_CS..=0x176 => s.sys[5 + (n - nr::SYSENTER_CS) as usize],
            nr::DEBUGCTL => s.lbr[0],
            nr::PAT => s.pat,
            nr::EFER => s.efer,
            nr::STAR..=nr::SFMASK => s.sys[(n - nr::STAR) as usize],
            nr::FS_BASE => s.seg[seg::FS].base,
            nr::GS_BASE => s.seg[seg::GS].base,
            nr::KERNEL_GS_BASE => s.sys[4],
            nr::TSC_RATIO if self.features.tsc_ratio => self.tsc_ratio,
            nr::VM_CR => self.vm_cr,
            nr::VM_HSAVE_PA => self.hsave,
            _ => *self.msrs.get(&n).ok_or(GP)?,
        })
    }

    pub(super) fn wrmsr(&mut self, n: u32, value: u64) -> Result<(), Trap> {
        let canonical = sign_extend(value, 48) == value;
        let s = &mut self.state;
        match n {
            nr::TSC => self.tsc = value,
            nr::SYSENTER_CS..=0x176 => s.sys[5 + (n - nr::SYSENTER_CS) as usize] = value,
            nr::DEBUGCTL => s.lbr[0] = value,
            nr::PAT if value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) => s.pat = value,
            nr::EFER => return self.write_efer(value),
            nr::STAR | nr::SFMASK => s.sys[(n - nr::STAR) as usize] = value,
            0xC000_0082 | 0xC000_0083 if canonical => s.sys[(n - nr::STAR) as usize] = value,
            nr::FS_BASE if canonical => s.seg[seg::FS].base = value,
            nr::GS_BASE if canonical => s.seg[seg::GS].base = value,
            nr::KERNEL_GS_BASE if canonical => s.sys[4] = value,
            nr::TSC_RATIO if self.features.tsc_ratio && value >> 40 == 0 => self.tsc_ratio = value,
            nr::VM_CR => {
                let locked = self.vm_cr & LOCK != 0;
                // SVMDIS may not be set while EFER.SVME is.
                if value & SVMDIS != 0 && self.state.efer & EFER_SVME != 0 {
                    return Err(GP);
                }
                self.vm_cr = if locked { self.vm_cr } else { value & 0x1F };
            }
            nr::VM_HSAVE_PA if value & 0xFFF == 0 && value >> self.features.maxphyaddr == 0 => self.hsave = value,
            _ => *self.msrs.get_mut(&n).ok_or(GP)? = value,
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.state.efer;
        let paging = self.state.cr0 & CR0_PG != 0;
        let refused = value & !super::entry::EFER_KNOWN != 0
            || (paging && (value ^ old) & EFER_LME != 0)
            || (value & EFER_SVME != 0 && self.vm_cr & SVMDIS != 0);
        if refused {
            return Err(GP);
        }
        self.state.efer = value & !EFER_LMA | old & EFER_LMA;
        Ok(())
    }

    pub(super) fn read_tsc(&self) -> u64 {
        let Some(g) = &self.guest else { return self.tsc };
        let scaled = if self.features.tsc_ratio {
            ((u128::from(self.tsc) * u128::from(self.tsc_ratio)) >> 32) as u64
        } else {
            self.tsc
        };
        scaled.wrapping_add(g.ctl.tsc_offset)
    }

    /// Whether the MSR permission map intercepts this access; what it does not cover is always intercepted.
    pub(super) fn msr_intercepted(&self, mem: &PhysMem, n: u32, write: bool) -> bool {
        let Some(g) = &self.guest else { return false };
        if g.ctl.misc[0] & (1 << super::vmcb::misc1::MSR) == 0 {
            return false;
        }
        let base = match n >> 13 {
            0 => 0,
            0x6_0000 => 0x800,
            0x6_0008 => 0x1000,
            _ => return true,
        };
        let bit = u64::from(n & 0x1FFF) * 2 + u64::from(write);
        mem.read(g.ctl.msrpm + base + bit / 8, 1) >> (bit % 8) & 1 != 0
    }

    /// Whether the IO permission map intercepts any of the `size` ports from `port` on.
    pub(super) fn io_intercepted(&self, mem: &PhysMem, port: u16, size: u8) -> bool {
        let Some(g) = &self.guest else { return false };
        g.ctl.misc[0] & (1 << super::vmcb::misc1::IOIO) != 0
            && (0..u64::from(size)).any(|n| {
                // Ports beyond 0xFFFF have their bits in the third page.
                let bit = u64::from(port) + n;
                mem.read(g.ctl.iopm + bit / 8, 1) >> (bit % 8) & 1 != 0
            })
    }
}
