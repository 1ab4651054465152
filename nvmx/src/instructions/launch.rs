//! VMLAUNCH and VMRESUME up to the checks of guest state, which end in an exit and are the entry's own.

use hvcore::memory::GuestMemory;

use super::{Done, error};
use crate::bits::{efer, interruptibility};
use crate::check::{self, Refusal, Root};
use crate::evmcs::{LoadError, current_evmcs};
use crate::field::Field;
use crate::groups;
use crate::l1::{Fault, L1Exit};
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::msr_list::Msrs;
use crate::state::{Current, NestedVmx};
use crate::vmcs12::{LaunchState, SHADOW_INDICATOR};

impl NestedVmx {
    /// VMLAUNCH (`launch`) or VMRESUME.
    pub(crate) fn vm_entry<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, launch: bool) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        let root = match self.may_enter(m, launch) {
            Ok(Ok(root)) => root,
            Ok(Err(done)) => return self.finish(m, Ok(done)),
            Err(fault) => return self.finish(m, Err(fault)),
        };
        let exit = self.enter(m, root);
        if exit == L1Exit::EnterL2 {
            match self.current {
                Current::Enlightened(_) => {
                    // L1 took its page away while it is in use: it finds its clean bits as it left them.
                    let _ = self.evmcs.entered(m.memory);
                }
                _ => self.vmcs12.set_launch_state(LaunchState::Launched),
            }
        }
        exit
    }

    /// All that ends in a fault or a VMfail, in the order of the SDM.
    fn may_enter<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        launch: bool,
    ) -> Result<Result<Root, Done>, Fault>
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        self.permit(m.vmcs01)?;
        if self.config.enlightened()
            && let Err(error) = self.load_enlightened(m, launch)
        {
            return match error {
                LoadError::Unreadable => Err(Fault::UD),
                LoadError::Revision | LoadError::Busy => Ok(Err(Done::FailInvalid)),
            };
        }
        let (current, launched) = match self.current {
            Current::None => return Ok(Err(Done::FailInvalid)),
            Current::Plain(_) if self.vmcs12.revision & SHADOW_INDICATOR != 0 => return Ok(Err(Done::FailInvalid)),
            Current::Plain(gpa) => (gpa, self.vmcs12.launch_state() == LaunchState::Launched),
            // An enlightened VMCS has no launch state.
            Current::Enlightened(gpa) => (gpa, !launch),
        };
        let blocking = m.vmcs01.read32(Field::GuestInterruptibility);
        self.l2.blocking01 = Some(blocking);
        if blocking & interruptibility::MOV_SS != 0 {
            return Ok(Err(Done::Fail(error::MOV_SS)));
        }
        if launch == launched {
            let number = if launch { error::VMLAUNCH_LAUNCHED } else { error::VMRESUME_CLEAR };
            return Ok(Err(Done::Fail(number)));
        }
        let root = Root { long_mode: m.vmcs01.read(Field::GuestEfer) & efer::LMA != 0, current };
        if let Err(refusal) = check::controls(&self.vmcs12, &self.config, m.memory) {
            self.last_refusal = Some(Refusal::Controls(refusal));
            return Ok(Err(Done::Fail(error::CONTROLS)));
        }
        if let Err(refusal) = check::host(&self.vmcs12, &self.config, root) {
            self.last_refusal = Some(Refusal::Host(refusal));
            return Ok(Err(Done::Fail(error::HOST_STATE)));
        }
        Ok(Ok(root))
    }

    /// Makes the enlightened VMCS that the VP assist page announces current and reads it; without one, one that was
    /// active is no more.
    fn load_enlightened<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, launch: bool) -> Result<(), LoadError>
    where
        V: Vmcs + ?Sized,
        G: ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let Some(gpa) = current_evmcs(m.memory, m.assist_page) else {
            if let Current::Enlightened(_) = self.current {
                self.evmcs.release();
                self.current = Current::None;
                self.changed = groups::ALL;
            }
            return Ok(());
        };
        if let Current::Plain(_) = self.current {
            // What cannot be written is lost, as with VMPTRLD.
            let _ = self.write_back(m);
        }
        self.current = Current::None;
        let loaded = self.evmcs.enter(m.memory, m.active_evmcs, gpa, launch, &mut self.vmcs12).inspect_err(|_| {
            self.changed = groups::ALL;
        })?;
        self.changed |= loaded.changed;
        self.current = Current::Enlightened(gpa);
        Ok(())
    }
}
