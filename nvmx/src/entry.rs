//! VM entries: that of L1's VMLAUNCH or VMRESUME into L2, and the last step before each of the embedder's own.

use hvcore::addr::Level;
use hvcore::memory::GuestMemory;

use crate::bits::{activity, cr0, interruptibility, interruption};
use crate::check::{self, MSR_LIST_MAX, MsrRefusal, Refusal, Root};
use crate::controls::{pin, secondary};
use crate::events::Injection;
use crate::exit::Exit;
use crate::exit_reason;
use crate::field::Field;
use crate::groups::{self, Groups};
use crate::l1::L1Exit;
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr_list::{self, Msrs};
use crate::state::{Context, NestedVmx};
use crate::vpid::Flush;
use tlfs_abi::evmcs::CleanFields;

/// How to run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPlan {
    /// Which VMCS: VMCS01 for L1, VMCS02 for L2. VMLAUNCH or VMRESUME: as its launch state is, which the embedder knows.
    pub level: Level,
    /// The VPID that the VMCS holds; 0 where the processor has none.
    pub vpid: u16,
    /// What to flush with INVVPID first.
    pub flush: Flush,
    /// L1's preemption timer, where software keeps it: be back after so many ticks at most, and report the ticks that
    /// passed with [`NestedVmx::timer_elapsed`].
    pub timer: Option<u32>,
    /// Something waits behind the event that this entry injects, and the processor has no preemption timer to say so:
    /// be back right after the entry.
    pub exit_soon: bool,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Run the guest so.
    Run(EntryPlan),
    /// L2 waits for a start-up IPI, or is shut down: run nobody. Call again after the next `pend_*`.
    Wait,
    /// INIT reaches L1: put VMCS01 in the reset state, call [`NestedVmx::reset`] and wait for SIPI.
    Init,
    /// L1 shuts down: a VMX abort.
    Shutdown,
}

/// Groups whose change makes the guest-state checks necessary. The others the processor checks as well: VMCS02 has the
/// same values.
const CHECKED: Groups =
    CleanFields::CONTROL_ENTRY | CleanFields::CRDR | CleanFields::GUEST_GRP1 | CleanFields::GUEST_GRP2;

impl NestedVmx {
    /// VMLAUNCH or VMRESUME, once the launch state, the controls and the host state are found good: checks the guest
    /// state, makes VMCS02 and loads L1's MSRs. A refusal is an exit, which L1 then sees.
    pub(crate) fn enter<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, root: Root) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let own = self.own(m.vmcs01);
        self.l2.events.injection = None;
        // L1's registers first, VMCS02 after: one switch of the current VMCS.
        let inherited = self.inherit(m.vmcs01);
        // Of the pin-based controls the checks know virtual NMIs only; others L1 may change at every entry.
        let judged = Some((self.vmcs12.get32(Field::PinBasedControls) & pin::VIRTUAL_NMIS, self.secondary12()));
        let anew = self.changed & CHECKED != 0 || self.l2.touched || self.l2.judged != judged;
        let pdptes = if anew || self.pae_paging12() {
            self.l2.judged = None;
            // The checks look at all of the guest state together.
            self.fetch_all(m.vmcs02);
            match check::guest(&self.vmcs12, &self.config, root, m.memory) {
                Ok(pdptes) => {
                    self.l2.judged = judged;
                    pdptes
                }
                Err(refusal) => {
                    self.last_refusal = Some(Refusal::Guest(refusal));
                    return self.refuse(m, exit_reason::INVALID_GUEST_STATE, refusal.qualification());
                }
            }
        } else {
            None
        };
        self.switch_context();
        self.load_vmcs02(m, &own, &inherited);
        if let Some(pdptes) = pdptes {
            self.load_pdptes(m.vmcs02, pdptes);
        }
        self.start_timer(m.vmcs02);
        if let Err((index, refusal)) = self.load_entry_msrs(m) {
            self.last_refusal = Some(Refusal::Msr(index, refusal));
            self.changed = groups::ALL;
            return self.refuse(m, exit_reason::MSR_LOADING, index.into());
        }
        self.take_injection();
        self.level = Level::L2;
        self.l2.events.run_pending = true;
        if self.vmcs12.get32(Field::GuestActivity) != activity::ACTIVE {
            self.l2.events.wake();
        }
        L1Exit::EnterL2
    }

    /// The entry fails after the host state was found good: L1 sees an exit.
    #[cold]
    pub(crate) fn refuse<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        basic: u32,
        qualification: u64,
    ) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        self.vmexit(m, Exit::simple(basic | exit_reason::ENTRY_FAILURE, qualification));
        if self.l2.events.shutdown { L1Exit::Shutdown } else { L1Exit::Resume }
    }

    /// Retires the L2 tag if it stands for another context. Without VPIDs of L1's, its VM entries flush L2's.
    fn switch_context(&mut self) {
        let hv = self.evmcs.enlightenments();
        let vpid = if self.has12(secondary::VPID) { self.vmcs12.get(Field::VirtualProcessorId) as u16 } else { 0 };
        let context = Context {
            vpid,
            eptp: self.has12(secondary::EPT).then(|| self.vmcs12.get(Field::EptPointer)),
            vm_id: hv.vm_id,
            vp_id: hv.vp_id,
        };
        if context != self.context {
            self.context = context;
            self.tag2.invalidate();
        }
        if vpid == 0 {
            self.tag2.invalidate();
        }
    }

    /// The event that L1's VM entry injects.
    fn take_injection(&mut self) {
        let info = self.vmcs12.get32(Field::EntryInterruptionInfo);
        if info & interruption::VALID != 0 {
            self.l2.events.injection = Some(Injection {
                info,
                error_code: self.vmcs12.get32(Field::EntryExceptionErrorCode),
                length: self.vmcs12.get32(Field::EntryInstructionLength),
            });
        }
    }

    /// Starts L1's preemption timer.
    fn start_timer<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) {
        let active = self.pin12(pin::PREEMPTION_TIMER);
        let value = self.vmcs12.get32(Field::PreemptionTimer);
        self.l2.timer.start(active.then_some(value));
        if active && self.l2.timer.in_hardware() {
            self.l2.cache.write(vmcs02, Field::PreemptionTimer, value.into());
        }
    }

    /// The VM-entry MSR-load area (SDM volume 3, "Loading MSRs"). On error the entry that cannot be loaded, from 1.
    fn load_entry_msrs<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Result<(), (u32, MsrRefusal)>
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let count = self.vmcs12.get32(Field::EntryMsrLoadCount);
        let base = self.vmcs12.get(Field::EntryMsrLoadAddress);
        let paging = self.vmcs12.get(Field::GuestCr0) & cr0::PG != 0;
        let loaded = self.l2.cache.known(Field::EntryControls).unwrap_or_default() as u32;
        for index in 0..count {
            let failed = |refusal| (index.wrapping_add(1), refusal);
            if index >= MSR_LIST_MAX {
                return Err(failed(MsrRefusal::TooMany));
            }
            let entry = msr_list::entry(m.memory, base, index).map_err(|_| failed(MsrRefusal::Memory))?;
            check::msr_load(&entry).map_err(failed)?;
            let loaded = match msr_list::guest_field(entry.index, loaded) {
                Some(field) => {
                    let efer = self.l2.cache.read(m.vmcs02, Field::GuestEfer);
                    let value = msr_list::guest_value(&self.config, field, entry.value, efer, paging);
                    if let Some(value) = value {
                        self.put(m.vmcs02, field, value);
                    }
                    value.is_some()
                }
                None => m.gprs.write_msr(entry.index, entry.value),
            };
            if !loaded {
                return Err(failed(MsrRefusal::Value));
            }
        }
        Ok(())
    }

    /// Prepares the VMCS that runs next. Call it once before every VM entry, with everything else in place.
    pub fn prepare_entry<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Entry
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let level = self.route_events(m);
        if self.l2.events.shutdown {
            return Entry::Shutdown;
        }
        match level {
            Level::L1 => {
                self.evmcs.leave(m.active_evmcs);
                if self.take_init() {
                    return Entry::Init;
                }
                self.deliver(m);
                let assigned = m.vpids.assign(&mut self.tag1);
                if self.l2.vpid01 != Some(assigned.vpid) {
                    self.l2.vpid01 = Some(assigned.vpid);
                    m.vmcs01.write(Field::VirtualProcessorId, assigned.vpid.into());
                }
                Entry::Run(EntryPlan {
                    level,
                    vpid: assigned.vpid,
                    flush: assigned.flush,
                    timer: None,
                    exit_soon: false,
                })
            }
            Level::L2 if self.sleeping().is_some() => Entry::Wait,
            Level::L2 => Entry::Run(self.prepare_l2(m)),
        }
    }

    fn prepare_l2<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> EntryPlan
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let soon = self.deliver(m);
        if core::mem::take(&mut self.l2.events.nmi_unblocked) {
            let state = m.vmcs02.read32(Field::GuestInterruptibility) | interruptibility::NMI;
            m.vmcs02.write(Field::GuestInterruptibility, state.into());
            self.l2.cache.forget(Field::GuestInterruptibility);
        }
        self.write_injection(m.vmcs02);
        let exit_soon = self.force_exit(m.vmcs02, soon);
        let assigned = m.vpids.assign(&mut self.tag2);
        let primary = self.l2.primary | self.windows02();
        let cache = &mut self.l2.cache;
        cache.write(m.vmcs02, Field::PrimaryControls, primary.into());
        cache.write(m.vmcs02, Field::VirtualProcessorId, assigned.vpid.into());
        let timer = self.l2.timer.left();
        EntryPlan { level: Level::L2, vpid: assigned.vpid, flush: assigned.flush, timer, exit_soon }
    }

    /// Makes the processor exit right after the injection of this entry if `soon`; `true` when it cannot.
    fn force_exit<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, soon: bool) -> bool {
        if !self.l2.timer.in_hardware() {
            return soon;
        }
        let used = self.l2.pin & pin::PREEMPTION_TIMER != 0;
        let cache = &mut self.l2.cache;
        if soon {
            let value = if used { Some(cache.read(vmcs02, Field::PreemptionTimer) as u32) } else { None };
            self.l2.timer.force(value);
            cache.write(vmcs02, Field::PreemptionTimer, 0);
            cache.write(vmcs02, Field::PinBasedControls, (self.l2.pin | pin::PREEMPTION_TIMER).into());
        } else {
            self.release_timer(vmcs02);
            self.l2.cache.write(vmcs02, Field::PinBasedControls, self.l2.pin.into());
        }
        false
    }

    /// Gives L1's timer back what it stood at.
    pub(crate) fn release_timer<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) {
        if self.l2.timer.forced()
            && let Some(value) = self.l2.timer.release()
        {
            self.l2.cache.write(vmcs02, Field::PreemptionTimer, value.into());
        }
    }
}
