//! VMCLEAR, VMPTRLD and VMPTRST: which VMCS is current, and its way from and to L1's memory.

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::{FromZeros, IntoBytes};

use super::{Done, Outcome, error};
use crate::controls::secondary;
use crate::evmcs::current_evmcs;
use crate::groups;
use crate::l1::Fault;
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::operand::{self, Info};
use crate::state::{Current, NestedVmx};
use crate::vmcs12::{LaunchState, REVISION, SHADOW_INDICATOR, Vmcs12};

impl NestedVmx {
    /// VMCLEAR.
    pub(crate) fn vmclear<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        let address = Self::address_operand(m)?;
        if !self.legal_region(address) {
            return Ok(Done::Fail(error::VMCLEAR_ADDRESS));
        }
        let gpa = L1Gpa::new(address);
        if self.vmxon == Some(gpa) {
            return Ok(Done::Fail(error::VMCLEAR_VMXON));
        }
        if self.current == Current::Plain(gpa) {
            self.vmcs12.set_launch_state(LaunchState::Clear);
            // The processor does not say when a region is memory that takes no writes.
            let _ = self.write_back(m);
            self.current = Current::None;
        } else if self.current == Current::Enlightened(gpa) {
            self.evmcs.release();
            self.current = Current::None;
            self.changed = groups::ALL;
        } else if !self.config.enlightened() || current_evmcs(m.memory, m.assist_page).is_none() {
            // An enlightened VMCS has no launch state, and other fields in its place.
            let _ = Vmcs12::clear_launch_state(m.memory, gpa);
        }
        Ok(Done::Succeed)
    }

    /// VMPTRLD.
    pub(crate) fn vmptrld<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        let address = Self::address_operand(m)?;
        if !self.legal_region(address) {
            return Ok(Done::Fail(error::VMPTRLD_ADDRESS));
        }
        let gpa = L1Gpa::new(address);
        if self.vmxon == Some(gpa) {
            return Ok(Done::Fail(error::VMPTRLD_VMXON));
        }
        if let Current::Enlightened(_) = self.current {
            if current_evmcs(m.memory, m.assist_page).is_some() {
                // The TLFS leaves no room for both kinds at once: first VMCLEAR of the enlightened one.
                return Ok(Done::FailInvalid);
            }
            self.evmcs.release();
            self.current = Current::None;
        }
        if self.current == Current::Plain(gpa) {
            return Ok(Done::Succeed);
        }
        let Some(loaded) = self.region_at(m.memory, gpa) else {
            return Ok(Done::Fail(error::VMPTRLD_REVISION));
        };
        let _ = self.write_back(m);
        self.vmcs12 = loaded;
        self.current = Current::Plain(gpa);
        self.changed = groups::ALL;
        Ok(Done::Succeed)
    }

    /// The region at `gpa`, copied once; `None` when its revision identifier is not one that VMPTRLD takes.
    fn region_at<M: GuestMemory + ?Sized>(&self, memory: &M, gpa: L1Gpa) -> Option<Vmcs12> {
        let mut region = Vmcs12::new_zeroed();
        memory.read(gpa, region.as_mut_bytes()).ok()?;
        let shadows = self.config.secondary().allowed & secondary::VMCS_SHADOWING != 0;
        let indicator = if shadows { SHADOW_INDICATOR } else { 0 };
        if region.revision & !indicator != REVISION {
            return None;
        }
        region.sanitize();
        Some(region)
    }

    /// Writes the current plain VMCS to L1's memory.
    pub(crate) fn write_back<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Result<(), MemoryError>
    where
        V: Vmcs + ?Sized,
        G: ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let Current::Plain(gpa) = self.current else { return Ok(()) };
        self.fetch_all(m.vmcs02);
        self.changed = groups::ALL;
        m.memory.write(gpa, self.vmcs12.as_bytes())
    }

    /// VMPTRST: the current-VMCS pointer, all ones when there is none or it is enlightened.
    pub(crate) fn vmptrst<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        let pointer = match self.current {
            Current::Plain(gpa) => gpa.raw(),
            Current::None | Current::Enlightened(_) => u64::MAX,
        };
        let info = Info::of(m.vmcs01);
        operand::write(m.vmcs01, m.gprs, m.linear, info, &pointer.to_le_bytes())?;
        Ok::<_, Fault>(Done::Succeed)
    }
}
