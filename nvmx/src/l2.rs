//! Exits of L2: what L0 keeps, then what L1 wants, then what is left for the embedder.

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::memory::GuestMemory;

use crate::bits::interruption;
use crate::controls::{pin, primary, secondary};
use crate::ept::Pml;
use crate::events::{Injection, may_interrupt_delivery};
use crate::evmcs::Enlightenments;
use crate::exit::Exit;
use crate::exit_reason::{self as r, ENTRY_FAILURE};
use crate::field::Field;
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr_list::Msrs;
use crate::state::{Current, NestedVmx};
use crate::vmcs12::LaunchState;

/// What the embedder does after an exit of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Exit {
    /// Dealt with: L2 goes on. Call [`NestedVmx::prepare_entry`].
    Resume,
    /// L1's VMCS tells of the exit, VMCS01 holds L1's host state: L1 goes on.
    ToL1,
    /// The embedder's own exit, with this exit reason, in VMCS02: its interrupt or NMI, a control of its own. If it
    /// turns out to be none of its own, [`NestedVmx::reflect`] gives it to L1.
    Embedder {
        /// The exit-reason field.
        reason: u32,
    },
    /// An EPT violation under L1's EPT: ask the shadow page tables. The answer is to resume,
    /// [`NestedVmx::reflect_ept`], or the embedder's own fault on an L1 GPA.
    EptViolation {
        /// The faulting address.
        gpa: L2Gpa,
        /// The exit qualification.
        qualification: u64,
    },
    /// An EPT misconfiguration under L1's EPT: as [`L2Exit::EptViolation`].
    EptMisconfiguration {
        /// The faulting address.
        gpa: L2Gpa,
    },
    /// L1 uses no EPT, so L2's physical addresses are L1's: a violation of the embedder's own second stage.
    L1EptViolation {
        /// The faulting address.
        gpa: L1Gpa,
        /// The exit qualification.
        qualification: u64,
    },
    /// The same for a misconfiguration.
    L1EptMisconfiguration {
        /// The faulting address.
        gpa: L1Gpa,
    },
    /// A hypercall that L0 takes. Run it, put its result in the registers, then step L2 over it with
    /// [`crate::step::complete_instruction`] and, if the TLB is locked, call [`NestedVmx::synthetic_exit`].
    DirectFlush,
    /// L2 switched to another EPT pointer of L1's list: put the root of its shadow in VMCS02, as after
    /// [`crate::L1Exit::EnterL2`].
    EptpSwitched,
    /// The processor refused to go on with an L2 that it ran before: something of the embedder's is wrong.
    Refused {
        /// The exit-reason field.
        reason: u32,
        /// The exit qualification.
        qualification: u64,
    },
    /// L1 shuts down: a VMX abort.
    Shutdown,
}

impl NestedVmx {
    /// Deals with an exit of L2. VMCS02 has just run.
    ///
    /// `direct` says whether L0 takes the hypercall in the registers, for a caller with these enlightenments; it is
    /// asked only when NestedFlushVirtualHypercall is set in them.
    pub fn l2_exit<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        direct: impl FnOnce(&Enlightenments, &V, &G) -> bool,
    ) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let reason = m.vmcs02.read32(Field::ExitReason);
        self.l2.cache.forget_guest();
        if reason & ENTRY_FAILURE != 0 {
            return self.late_failure(m, reason);
        }
        m.vpids.entered(&mut self.tag2);
        let injected = self.injection_done();
        if may_interrupt_delivery(reason) {
            self.l2.events.injection = Injection::interrupted(m.vmcs02);
        }
        let exit = self.route(m, reason, injected, direct);
        if exit != L2Exit::ToL1 {
            // The embedder may write L2's registers.
            self.l2.cache.forget_guest();
        }
        exit
    }

    /// The entry happened, so its injection did: what it was.
    fn injection_done(&mut self) -> Option<Injection> {
        self.l2.events.run_pending = false;
        if let Some(info) = self.l2.cache.known(Field::EntryInterruptionInfo) {
            // The exit has cleared the valid bit.
            self.l2.cache.learn(Field::EntryInterruptionInfo, info & !u64::from(interruption::VALID));
        }
        self.l2.events.injection.take()
    }

    #[inline]
    fn route<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        reason: u32,
        injected: Option<Injection>,
        direct: impl FnOnce(&Enlightenments, &V, &G) -> bool,
    ) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        match reason {
            r::EPT_VIOLATION => self.ept_violation(m.vmcs02),
            r::EPT_MISCONFIGURATION => self.ept_misconfiguration(m.vmcs02),
            r::EXCEPTION_OR_NMI => self.l2_exception(m),
            r::EXTERNAL_INTERRUPT if !self.own_known().passes_interrupts() => L2Exit::Embedder { reason },
            // INIT lines and SMIs of the machine, and what the embedder's own controls alone can cause.
            r::INIT | r::SIPI | r::IO_SMI | r::OTHER_SMI | r::MACHINE_CHECK | r::PML_FULL => {
                L2Exit::Embedder { reason }
            }
            r::VMCALL => self.l2_vmcall(m, direct),
            r::RDMSR | r::WRMSR => self.l2_msr(m, reason),
            r::IO => self.l2_io(m),
            r::CR_ACCESS => self.l2_cr_access(m),
            r::VMFUNC => self.l2_vmfunc(m),
            r::PREEMPTION_TIMER => self.l2_timer(m, reason),
            r::MONITOR_TRAP_FLAG if injected.is_some_and(is_pending_mtf) => self.reflect_as(m, reason),
            _ if self.l1_wants(m.gprs, reason) => self.reflect_as(m, reason),
            _ if self.own_window02(reason) => L2Exit::Resume,
            _ => L2Exit::Embedder { reason },
        }
    }

    /// True when L1's controls name the exit; for reasons that need nothing but a control bit.
    fn l1_wants<G: Gprs + ?Sized>(&self, gprs: &G, reason: u32) -> bool {
        let first = |bit| self.primary12(bit);
        let second = |bit| self.has12(bit);
        match reason {
            r::EXTERNAL_INTERRUPT => self.pin12(pin::EXTERNAL_INTERRUPT_EXITING),
            r::INTERRUPT_WINDOW => first(primary::INTERRUPT_WINDOW_EXITING),
            r::NMI_WINDOW => first(primary::NMI_WINDOW_EXITING),
            // Unconditional exits.
            r::TRIPLE_FAULT | r::TASK_SWITCH | r::CPUID | r::GETSEC | r::INVD | r::XSETBV => true,
            r::VMCLEAR..=r::VMXON | r::INVEPT | r::INVVPID => true,
            r::HLT => first(primary::HLT_EXITING),
            r::INVLPG => first(primary::INVLPG_EXITING),
            r::RDPMC => first(primary::RDPMC_EXITING),
            r::RDTSC | r::RDTSCP => first(primary::RDTSC_EXITING),
            r::MOV_DR => first(primary::MOV_DR_EXITING),
            r::MWAIT => first(primary::MWAIT_EXITING),
            r::MONITOR_TRAP_FLAG => first(primary::MONITOR_TRAP_FLAG),
            r::MONITOR => first(primary::MONITOR_EXITING),
            r::PAUSE => first(primary::PAUSE_EXITING) || second(secondary::PAUSE_LOOP_EXITING),
            r::TPR_BELOW_THRESHOLD => first(primary::TPR_SHADOW),
            r::APIC_ACCESS => second(secondary::VIRTUALIZE_APIC_ACCESSES),
            r::VIRTUALIZED_EOI => second(secondary::VIRTUAL_INTERRUPT_DELIVERY),
            r::APIC_WRITE => second(secondary::APIC_REGISTER_VIRTUALIZATION),
            r::GDTR_IDTR_ACCESS | r::LDTR_TR_ACCESS => second(secondary::DESCRIPTOR_TABLE_EXITING),
            r::WBINVD => second(secondary::WBINVD_EXITING),
            r::RDRAND => second(secondary::RDRAND_EXITING),
            r::RDSEED => second(secondary::RDSEED_EXITING),
            r::INVPCID => second(secondary::INVPCID) && first(primary::INVLPG_EXITING),
            r::XSAVES | r::XRSTORS => second(secondary::XSAVES) && self.l1_wants_xss(gprs),
            _ => false,
        }
    }

    /// XSAVES and XRSTORS exit for components in the bitmap that EDX:EAX names, if IA32_XSS has them. Whose bitmap it
    /// was matters only if the embedder has one.
    fn l1_wants_xss<G: Gprs + ?Sized>(&self, gprs: &G) -> bool {
        let named = gprs.get(RDX) << 32 | gprs.get(RAX) & 0xFFFF_FFFF;
        self.vmcs12.get(Field::XssExitingBitmap) & named != 0 || self.own_known().xss_bitmap == 0
    }

    /// Tells L1 of the exit in VMCS02 as it stands.
    pub fn reflect<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let reason = m.vmcs02.read32(Field::ExitReason);
        self.reflect_as(m, reason)
    }

    /// As [`reflect`](Self::reflect), with the exit reason known.
    pub(crate) fn reflect_as<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, reason: u32) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let exit = Exit::of(m.vmcs02, reason);
        self.exit_to_l1(m, exit)
    }

    /// Ends L2's run: L1 sees `exit`.
    pub fn exit_to_l1<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, exit: Exit) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        self.vmexit(m, exit);
        if self.l2.events.shutdown { L2Exit::Shutdown } else { L2Exit::ToL1 }
    }

    /// Tells L1 what its EPT makes of the access that VMCS02's exit shows: `reason` (48 violation, 49 misconfiguration,
    /// 62 page-modification log full) and `qualification` as the shadow tables say, the addresses as the processor says.
    pub fn reflect_ept<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        reason: u32,
        qualification: u64,
    ) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        /// Qualification bit 7: the guest-linear address is valid.
        const LINEAR_VALID: u64 = 1 << 7;
        let mut exit = Exit::simple(reason, qualification);
        if reason != r::PML_FULL {
            exit.physical = m.vmcs02.read(Field::GuestPhysicalAddress);
            exit.instruction_length = m.vmcs02.read32(Field::ExitInstructionLength);
        }
        if reason == r::EPT_VIOLATION && qualification & LINEAR_VALID != 0 {
            exit.linear = m.vmcs02.read(Field::GuestLinearAddress);
        }
        self.exit_to_l1(m, exit)
    }

    /// L1's page-modification log for the L2 that runs, `None` when it keeps none. What the shadow tables log moves its
    /// index: give that to [`set_pml_index`](Self::set_pml_index).
    pub fn pml(&self) -> Option<Pml> {
        self.has12(secondary::PML).then(|| Pml {
            address: L1Gpa::new(self.vmcs12.get(Field::PmlAddress)),
            index: self.vmcs12.get(Field::PmlIndex) as u16,
        })
    }

    /// The exit that Hyper-V synthesizes after a direct flush while the caller's TLB is locked. RIP is past the call
    /// already.
    pub fn synthetic_exit<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        self.exit_to_l1(m, Exit::simple(r::SYNTHETIC, 0))
    }

    fn ept_violation<V: Vmcs + ?Sized>(&mut self, vmcs02: &V) -> L2Exit {
        /// Qualification bit 12: NMI unblocking due to IRET.
        const NMI_UNBLOCKING: u64 = 1 << 12;
        let qualification = vmcs02.read(Field::ExitQualification);
        let gpa = vmcs02.read(Field::GuestPhysicalAddress);
        self.l2.events.nmi_unblocked = qualification & NMI_UNBLOCKING != 0 && self.l2.events.injection.is_none();
        if self.has12(secondary::EPT) {
            L2Exit::EptViolation { gpa: L2Gpa::new(gpa), qualification }
        } else {
            L2Exit::L1EptViolation { gpa: L1Gpa::new(gpa), qualification }
        }
    }

    fn ept_misconfiguration<V: Vmcs + ?Sized>(&self, vmcs02: &V) -> L2Exit {
        let gpa = vmcs02.read(Field::GuestPhysicalAddress);
        if self.has12(secondary::EPT) {
            L2Exit::EptMisconfiguration { gpa: L2Gpa::new(gpa) }
        } else {
            L2Exit::L1EptMisconfiguration { gpa: L1Gpa::new(gpa) }
        }
    }

    fn l2_vmcall<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        direct: impl FnOnce(&Enlightenments, &V, &G) -> bool,
    ) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        // The fields of a plain VMCS have no place for the grant.
        if let Current::Enlightened(_) = self.current {
            let enlightenments = self.evmcs.enlightenments();
            if enlightenments.control.nested_flush_virtual_hypercall() && direct(enlightenments, m.vmcs02, m.gprs) {
                return L2Exit::DirectFlush;
            }
        }
        self.reflect_as(m, r::VMCALL)
    }

    fn l2_timer<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, reason: u32) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        if self.l2.timer.forced() {
            // The library's own: what waited is routed before the next entry.
            return L2Exit::Resume;
        }
        let ours = self.own_known().pin & pin::PREEMPTION_TIMER == 0 && self.pin12(pin::PREEMPTION_TIMER);
        if ours { self.reflect_as(m, reason) } else { L2Exit::Embedder { reason } }
    }

    /// The processor found at the entry itself that L2's state is no good.
    #[cold]
    fn late_failure<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, reason: u32) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        self.l2.cache.forget(Field::EntryInterruptionInfo);
        let qualification = m.vmcs02.read(Field::ExitQualification);
        if !self.l2.events.run_pending || reason & r::BASIC != r::INVALID_GUEST_STATE {
            return L2Exit::Refused { reason, qualification };
        }
        // A check that the processor has and the library leaves to it: L1's VMCS is at fault.
        self.undo_launch(m.vmcs01);
        self.exit_to_l1(m, Exit::simple(reason, qualification))
    }

    /// VMLAUNCH or VMRESUME of the embedder's with VMCS02 ended in VMfailValid with `error`. `false` when that is not
    /// L1's doing: something of the embedder's is wrong.
    #[cold]
    pub fn entry_failed<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, error: u32) -> bool
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let controls = crate::instructions::error::CONTROLS;
        if self.level == Level::L1 || !self.l2.events.run_pending || error != controls {
            return false;
        }
        self.l2.cache.forget(Field::EntryInterruptionInfo);
        self.undo_launch(m.vmcs01);
        self.level = Level::L1;
        self.l2.events.run_pending = false;
        self.l2.events.injection = None;
        self.l2.events.wake();
        self.changed = crate::groups::ALL;
        let _ = self.finish(m, Ok(crate::instructions::Done::Fail(controls)));
        true
    }
}

impl NestedVmx {
    /// The VM entry of L1's failed after all: the VMCS is not launched by it.
    fn undo_launch<V: Vmcs + ?Sized>(&mut self, vmcs01: &V) {
        // VMCS01 has not run since.
        if vmcs01.read32(Field::ExitReason) == r::VMLAUNCH {
            self.vmcs12.set_launch_state(LaunchState::Clear);
        }
    }
}

/// Number of RAX among the general-purpose registers.
pub(crate) const RAX: u8 = 0;
/// Number of RCX.
pub(crate) const RCX: u8 = 1;
/// Number of RDX.
pub(crate) const RDX: u8 = 2;

fn is_pending_mtf(event: Injection) -> bool {
    event.info & interruption::TYPE == interruption::OTHER
}
