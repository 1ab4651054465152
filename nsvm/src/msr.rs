//! The MSRs that SVM defines, and EFER, as L1 sees them (APM volume 2, section 15.30).

use crate::caps::{Config, Features};
use crate::fault::Fault;
use crate::machine::Gprs;
use crate::state::{NestedSvm, Settled};
use crate::vmcb::Vmcb;
use crate::vmcb::bits::{cr0, efer};

/// EFER.
pub const EFER: u32 = 0xC000_0080;
/// TSC_RATIO: by how much L1's guests' TSC is faster than L1's, 8.32 fixed point.
pub const TSC_RATIO: u32 = 0xC000_0104;
/// VM_CR.
pub const VM_CR: u32 = 0xC001_0114;
/// IGNNE.
pub const IGNNE: u32 = 0xC001_0115;
/// SMM_CTL.
pub const SMM_CTL: u32 = 0xC001_0116;
/// VM_HSAVE_PA.
pub const VM_HSAVE_PA: u32 = 0xC001_0117;
/// SVM_KEY.
pub const SVM_KEY: u32 = 0xC001_0118;

/// VM_CR.LOCK: LOCK and SVMDIS cannot change.
const LOCK: u64 = 1 << 3;
/// VM_CR.SVMDIS: EFER.SVME cannot be set.
const SVMDIS: u64 = 1 << 4;
/// Bits of VM_CR: DPD, R_INIT, DIS_A20M, LOCK, SVMDIS.
const VM_CR_DEFINED: u64 = 0x1F;
/// Bits of TSC_RATIO that must be zero.
pub(crate) const TSC_RATIO_RESERVED: u64 = 0xFFFF_FF00_0000_0000;

/// Which MSRs the library answers.
pub(crate) struct MsrAccess;

impl MsrAccess {
    /// True for the MSRs that [`NestedSvm::access_msr`] knows.
    #[inline]
    pub(crate) const fn is_ours(config: &Config, index: u32) -> bool {
        match index {
            TSC_RATIO => config.offered.has(Features::TSC_RATE),
            _ => matches!(index, EFER | VM_CR..=SVM_KEY),
        }
    }
}

impl NestedSvm {
    /// RDMSR or WRMSR of `index` by the guest of `vmcb`.
    pub(crate) fn access_msr<G: Gprs + ?Sized>(
        &mut self,
        vmcb: &mut Vmcb,
        gprs: &mut G,
        index: u32,
        write: bool,
    ) -> Result<(), Fault> {
        if write {
            let value = gprs.rdx() << 32 | vmcb.save.rax & 0xFFFF_FFFF;
            return self.write_msr(vmcb, index, value);
        }
        let value = match index {
            EFER if self.level == hvcore::addr::Level::L1 && !self.svme => vmcb.save.efer & !efer::SVME,
            EFER => vmcb.save.efer,
            VM_CR => self.vm_cr,
            VM_HSAVE_PA => self.hsave_pa,
            TSC_RATIO => self.tsc_ratio,
            IGNNE | SMM_CTL => 0,
            // SVM_KEY is write-only, and not offered: no SVM lock.
            _ => return Err(Fault::GP),
        };
        vmcb.save.rax = value & 0xFFFF_FFFF;
        gprs.set_rdx(value >> 32);
        Ok(())
    }

    fn write_msr(&mut self, vmcb: &mut Vmcb, index: u32, value: u64) -> Result<(), Fault> {
        match index {
            EFER => self.write_efer(vmcb, value),
            VM_CR => self.write_vm_cr(value),
            VM_HSAVE_PA => {
                self.hsave_pa = self.vmcb_address(value)?;
                Ok(())
            }
            TSC_RATIO if value & TSC_RATIO_RESERVED == 0 => {
                self.tsc_ratio = value;
                self.settled = Settled::No;
                Ok(())
            }
            IGNNE if value & !1 == 0 => Ok(()),
            SMM_CTL if value & !0x1F == 0 => Ok(()),
            _ => Err(Fault::GP),
        }
    }

    fn write_vm_cr(&mut self, value: u64) -> Result<(), Fault> {
        if value & !VM_CR_DEFINED != 0 {
            return Err(Fault::GP);
        }
        let fixed = if self.vm_cr & LOCK != 0 { LOCK | SVMDIS } else { 0 };
        let value = value & !fixed | self.vm_cr & fixed;
        if value & SVMDIS != 0 && self.svme {
            return Err(Fault::GP);
        }
        self.vm_cr = value;
        Ok(())
    }

    fn write_efer(&mut self, vmcb: &mut Vmcb, value: u64) -> Result<(), Fault> {
        self.settled = Settled::No;
        let old = vmcb.save.efer;
        // LMA is read-only: what is written there does not matter.
        if value & !(self.config.host.efer_valid | efer::LMA) != 0 {
            return Err(Fault::GP);
        }
        if (value ^ old) & efer::LME != 0 && vmcb.save.cr0 & cr0::PG != 0 {
            return Err(Fault::GP);
        }
        if value & efer::SVME != 0 && self.vm_cr & SVMDIS != 0 {
            return Err(Fault::GP);
        }
        // L1's SVME, seen from L2, only says that SVM is on.
        if self.level == hvcore::addr::Level::L1 {
            self.svme = value & efer::SVME != 0;
            if !self.svme {
                self.gif = true;
            }
        }
        if (value ^ old) & efer::NXE != 0 {
            self.retire_tag(self.level);
        }
        vmcb.save.efer = value & !efer::LMA | old & efer::LMA | efer::SVME;
        Ok(())
    }
}
