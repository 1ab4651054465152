//! L1's MSR-load and MSR-store areas (SDM volume 3, "Loading MSRs", "Saving MSRs").
//!
//! MSRs that a VMCS holds for the guest are read and written there; the others are the processor's, which the embedder
//! reads and writes as RDMSR and WRMSR of L1 would.

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::{FromZeros, IntoBytes};

use crate::bits::efer;
use crate::caps::Config;
use crate::check::{self, MSR_LIST_MAX, MsrEntry, pat_is_valid};
use crate::controls::entry as entry_controls;
use crate::field::Field;
use crate::machine::{Machine, Vmcs};
use crate::state::NestedVmx;

/// The model-specific registers of the VP that no VMCS field holds. L1 and L2 share them, as on the processor.
pub trait Msrs {
    /// RDMSR of `index` as L1 would execute it at CPL 0; `None` for #GP.
    fn read_msr(&mut self, index: u32) -> Option<u64>;

    /// WRMSR of `value` to `index` as L1 would execute it at CPL 0; `false` for #GP.
    fn write_msr(&mut self, index: u32, value: u64) -> bool;
}

/// IA32_PERF_GLOBAL_CTRL.
pub(crate) const PERF_GLOBAL_CTRL: u32 = 0x38F;
/// IA32_BNDCFGS.
pub(crate) const BNDCFGS: u32 = 0xD90;

/// Entry `index` of the MSR area at `base`.
pub(crate) fn entry<M: GuestMemory + ?Sized>(memory: &M, base: u64, index: u32) -> Result<MsrEntry, MemoryError> {
    let mut entry = MsrEntry::new_zeroed();
    memory.read(L1Gpa::new(at(base, index)), entry.as_mut_bytes())?;
    Ok(entry)
}

const fn at(base: u64, index: u32) -> u64 {
    base.wrapping_add((index as u64) << 4)
}

/// The guest-state field that holds an MSR, with these VM-entry controls.
pub(crate) const fn guest_field(msr: u32, controls: u32) -> Option<Field> {
    Some(match msr {
        0x174 => Field::GuestSysenterCs,
        0x175 => Field::GuestSysenterEsp,
        0x176 => Field::GuestSysenterEip,
        0x1D9 => Field::GuestDebugctl,
        0x277 => Field::GuestPat,
        PERF_GLOBAL_CTRL if controls & entry_controls::LOAD_PERF_GLOBAL_CTRL != 0 => Field::GuestPerfGlobalCtrl,
        BNDCFGS if controls & entry_controls::LOAD_BNDCFGS != 0 => Field::GuestBndcfgs,
        0xC000_0080 => Field::GuestEfer,
        _ => return None,
    })
}

/// What WRMSR of `value` leaves in the MSR that `field` holds; `None` where it would fault. `efer` is the guest's EFER,
/// `paging` its CR0.PG.
pub(crate) fn guest_value(config: &Config, field: Field, value: u64, efer: u64, paging: bool) -> Option<u64> {
    let legal = match field {
        Field::GuestSysenterCs => true,
        Field::GuestSysenterEsp | Field::GuestSysenterEip => config.canonical(value),
        Field::GuestDebugctl => value & !config.host.debugctl == 0,
        Field::GuestPat => pat_is_valid(value),
        Field::GuestPerfGlobalCtrl => value & !config.host.perf_global_ctrl == 0,
        Field::GuestBndcfgs => value & 0xFFC == 0 && config.canonical(value & !0xFFF),
        _ => {
            // LMA is read-only, LME while paging is on.
            let changed = (value ^ efer) & efer::LME;
            let legal = value & !(config.host.efer | efer::LMA) == 0 && !(paging && changed != 0);
            return legal.then_some(value & !efer::LMA | efer & efer::LMA);
        }
    };
    legal.then_some(value & field.mask())
}

impl NestedVmx {
    /// The VM-exit MSR-store area. `Err` for a VMX abort.
    pub(crate) fn store_exit_msrs<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Result<(), ()>
    where
        V: Vmcs + ?Sized,
        G: Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let count = self.vmcs12.get32(Field::ExitMsrStoreCount);
        let base = self.vmcs12.get(Field::ExitMsrStoreAddress);
        let controls = self.l2.cache.known(Field::EntryControls).unwrap_or_default() as u32;
        for index in 0..count {
            if index >= MSR_LIST_MAX {
                return Err(());
            }
            let entry = entry(m.memory, base, index).map_err(|_| ())?;
            check::msr_store(&entry).map_err(|_| ())?;
            let value = match guest_field(entry.index, controls) {
                Some(field) => self.l2.cache.read(m.vmcs02, field),
                None => m.gprs.read_msr(entry.index).ok_or(())?,
            };
            m.memory.write_u64(L1Gpa::new(at(base, index).wrapping_add(8)), value).map_err(|_| ())?;
        }
        Ok(())
    }

    /// The VM-exit MSR-load area. `efer` and `paging` are L1's, as the exit has loaded them. `Err` for a VMX abort.
    pub(crate) fn load_exit_msrs<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        efer: u64,
        paging: bool,
    ) -> Result<(), ()>
    where
        V: Vmcs + ?Sized,
        G: Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let count = self.vmcs12.get32(Field::ExitMsrLoadCount);
        let base = self.vmcs12.get(Field::ExitMsrLoadAddress);
        let controls = self.own_known().entry;
        for index in 0..count {
            if index >= MSR_LIST_MAX {
                return Err(());
            }
            let entry = entry(m.memory, base, index).map_err(|_| ())?;
            check::msr_load(&entry).map_err(|_| ())?;
            let loaded = match guest_field(entry.index, controls) {
                Some(field) => {
                    let value = guest_value(&self.config, field, entry.value, efer, paging).ok_or(())?;
                    m.vmcs01.write(field, value);
                    true
                }
                None => m.gprs.write_msr(entry.index, entry.value),
            };
            if !loaded {
                return Err(());
            }
        }
        Ok(())
    }
}
