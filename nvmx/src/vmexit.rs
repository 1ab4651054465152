//! VM exits from L2 to L1: L2's state goes to VMCS12, the host state of VMCS12 becomes L1's (SDM volume 3, chapter
//! "VM Exits").
//!
//! Of a plain VMCS, the guest state that L1 seldom reads stays in VMCS02 until L1 asks for it; an enlightened VMCS gets
//! all of it at once, since L1 reads its page without asking.

use hvcore::addr::{L1Gpa, Level};
use hvcore::memory::GuestMemory;

use crate::bits::{cr0, cr4, efer, interruptibility, interruption, rflags};
use crate::cache::FieldSet;
use crate::check;
use crate::controls::{entry, exit, pin, secondary};
use crate::events::Injection;
use crate::exit::{BETWEEN, Exit};
use crate::exit_reason::{self, ENTRY_FAILURE};
use crate::field::Field;
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr_list::{BNDCFGS, Msrs, PERF_GLOBAL_CTRL};
use crate::own::Own;
use crate::state::{Current, NestedVmx};
use crate::vmcs02::{PDPTES, SEGMENTS};

/// VMX-abort indicators (SDM volume 3, "VMX Aborts").
pub mod abort {
    /// Saving guest MSRs.
    pub const SAVING_MSRS: u32 = 1;
    /// Loading PDPTEs of the host.
    pub const PDPTES: u32 = 2;
    /// Loading host MSRs.
    pub const LOADING_MSRS: u32 = 4;
}

/// Guest state that every exit saves and that stays in VMCS02 until it is needed: segments but for the access rights of CS
/// and SS, which come first in the list, and SYSENTER.
const DEFERRED_SEGMENTS: &[Field] = match SEGMENTS {
    [_, _, rest @ ..] => rest,
    _ => &[],
};
const _: () = assert!(matches!(SEGMENTS, [Field::GuestCsAccessRights, Field::GuestSsAccessRights, ..]));
const SYSENTER: &[Field] = &[Field::GuestSysenterCs, Field::GuestSysenterEsp, Field::GuestSysenterEip];
const DEFERRED: FieldSet = FieldSet::of(DEFERRED_SEGMENTS).union(&FieldSet::of(SYSENTER));

/// Guest state that every exit saves at once.
const EAGER: &[Field] = &[
    Field::GuestRip,
    Field::GuestRsp,
    Field::GuestRflags,
    Field::GuestInterruptibility,
    Field::GuestCr3,
    Field::GuestCsAccessRights,
    Field::GuestSsAccessRights,
];

/// L2's registers at an exit that L1 may inherit.
#[derive(Clone, Copy, Debug, Default)]
struct Left {
    cr0: u64,
    efer: u64,
    nmi_blocked: bool,
}

impl NestedVmx {
    /// Brings `field` of VMCS12 up to date. Called before L1 reads it.
    #[inline]
    pub(crate) fn fetch_field<V: Vmcs + ?Sized>(&mut self, vmcs02: &V, field: Field) {
        if self.l2.stale.contains(field) {
            // L1 reads more of the kind soon, and the VMCS is switched to but once.
            self.fetch_all(vmcs02);
        }
    }

    /// Brings all of VMCS12 up to date.
    #[inline]
    pub(crate) fn fetch_all<V: Vmcs + ?Sized>(&mut self, vmcs02: &V) {
        let mut stale = core::mem::take(&mut self.l2.stale);
        if DEFERRED.without(&stale).is_empty() {
            // The usual case, without a look at each.
            for field in DEFERRED_SEGMENTS.iter().chain(SYSENTER) {
                let value = vmcs02.read(*field);
                self.l2.cache.note(*field, value);
                self.vmcs12.set(*field, value);
            }
            self.l2.cache.noted(&DEFERRED);
            stale = stale.without(&DEFERRED);
        }
        while !stale.is_empty() {
            let Some(field) = stale.pop() else { return };
            let value = self.l2.cache.read(vmcs02, field);
            self.vmcs12.set(field, value);
        }
    }

    /// L1 wrote `field` of its VMCS.
    #[inline]
    pub(crate) fn wrote(&mut self, field: Field) {
        self.l2.wrote(field);
    }

    /// Ends L2's run, or L1's attempt to start one, with `exit`. L1 runs next, or shuts down.
    pub(crate) fn vmexit<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, exit: Exit)
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let own = self.own(m.vmcs01);
        let mut left = Left::default();
        if exit.reason & ENTRY_FAILURE != 0 {
            // Nothing of L2 is saved; registers that L1 may inherit are those it came with.
            self.vmcs12.set(Field::ExitReason, exit.reason.into());
            self.vmcs12.set(Field::ExitQualification, exit.qualification);
            left.efer = m.vmcs01.read(Field::GuestEfer);
            left.cr0 = m.vmcs01.read(Field::GuestCr0);
        } else {
            left = self.save_guest(m.vmcs02, &own, &exit);
            self.tell(&exit);
            if self.store_exit_msrs(m).is_err() {
                return self.abort(m.memory, abort::SAVING_MSRS);
            }
        }
        self.l2.events.injection = None;
        self.l2.events.nmi_unblocked = false;
        self.l2.events.run_pending = false;
        self.level = Level::L1;
        let inherited_pat = self.inherited_pat(m.vmcs02, exit.reason);
        let efer = self.load_host(m, &own, &left, inherited_pat);
        self.load_host_pdptes(m, efer);
        let paging = self.vmcs12.get(Field::HostCr0) & cr0::PG != 0;
        if !self.l2.events.shutdown && self.load_exit_msrs(m, efer, paging).is_err() {
            return self.abort(m.memory, abort::LOADING_MSRS);
        }
        if !self.has12(secondary::VPID) {
            self.tag1.invalidate();
        }
        if let Current::Enlightened(_) = self.current {
            // L1 took its page away while it is in use: it learns nothing there.
            let _ = self.evmcs.store(m.memory, &self.vmcs12);
        }
    }

    /// VMX abort: L1's processor shuts down.
    #[cold]
    fn abort<M: GuestMemory + ?Sized>(&mut self, memory: &M, indicator: u32) {
        if let Current::Plain(gpa) | Current::Enlightened(gpa) = self.current {
            let at = L1Gpa::new(gpa.raw().wrapping_add(4));
            // A region that is gone shows nothing.
            let _ = memory.write(at, &indicator.to_le_bytes());
        }
        self.vmcs12.abort = indicator;
        self.level = Level::L1;
        self.l2.events.shutdown = true;
        self.l2.events.wake();
    }

    /// What L1's VMCS says about the exit.
    fn tell(&mut self, exit: &Exit) {
        let event = self.l2.events.injection.filter(|event| event.info & interruption::TYPE != interruption::OTHER);
        let event = event.unwrap_or_default();
        let length =
            if Injection::is_software(event.info) && event.info != 0 { event.length } else { exit.instruction_length };
        for (field, value) in [
            (Field::ExitReason, exit.reason.into()),
            (Field::ExitQualification, exit.qualification),
            (Field::ExitInterruptionInfo, exit.interruption_info.into()),
            (Field::ExitInterruptionErrorCode, exit.error_code.into()),
            (Field::IdtVectoringInfo, event.info.into()),
            (Field::IdtVectoringErrorCode, event.error_code.into()),
            (Field::ExitInstructionLength, length.into()),
            (Field::ExitInstructionInfo, exit.instruction_info.into()),
            (Field::GuestLinearAddress, exit.linear),
            (Field::GuestPhysicalAddress, exit.physical),
        ] {
            self.vmcs12.set(field, value);
        }
        let injected = self.vmcs12.get32(Field::EntryInterruptionInfo) & !interruption::VALID;
        self.vmcs12.set(Field::EntryInterruptionInfo, injected.into());
    }

    /// Saves L2's state in VMCS12.
    fn save_guest<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own, exit: &Exit) -> Left {
        self.release_timer(vmcs02);
        let cache = &mut self.l2.cache;
        for field in EAGER {
            let value = cache.read(vmcs02, *field);
            self.vmcs12.set(*field, value);
        }
        let cr0 = cache.read(vmcs02, Field::GuestCr0);
        let efer = cache.read(vmcs02, Field::GuestEfer);
        self.save_cr(vmcs02, own);
        self.save_between(vmcs02, exit.reason & exit_reason::BASIC);
        self.l2.stale = DEFERRED;
        self.save_conditional(vmcs02, efer);
        if let Current::Enlightened(_) = self.current {
            self.fetch_all(vmcs02);
        }
        let blocked = self.vmcs12.get32(Field::GuestInterruptibility) & interruptibility::NMI != 0;
        let nmi = exit.reason & exit_reason::BASIC == exit_reason::EXCEPTION_OR_NMI
            && exit.interruption_info & interruption::TYPE == interruption::NMI;
        Left { cr0, efer, nmi_blocked: nmi || (blocked && !self.pin12(pin::VIRTUAL_NMIS)) }
    }

    /// CR0 and CR4 as L1 believes L2 to have them. Bits that the embedder alone masks are those of the read shadow.
    fn save_cr<V: Vmcs + ?Sized>(&mut self, vmcs02: &V, own: &Own) {
        for (real, mask, shadow, own) in [
            (Field::GuestCr0, Field::Cr0Mask, Field::Cr0ReadShadow, own.cr0_mask),
            (Field::GuestCr4, Field::Cr4Mask, Field::Cr4ReadShadow, own.cr4_mask),
        ] {
            let now = self.l2.cache.read(vmcs02, real);
            let mask12 = self.vmcs12.get(mask);
            let shown = if own & !mask12 != 0 { self.l2.cache.read(vmcs02, shadow) } else { 0 };
            let value = now & !own | shown & own & !mask12 | self.vmcs12.get(real) & own & mask12;
            self.vmcs12.set(real, value);
        }
    }

    /// Activity state and pending debug exceptions, which are zero after the exits of instructions.
    fn save_between<V: Vmcs + ?Sized>(&mut self, vmcs02: &V, basic: u32) {
        let between = basic >= 128 || BETWEEN >> (basic & 127) & 1 != 0;
        let mov_ss = self.vmcs12.get32(Field::GuestInterruptibility) & interruptibility::MOV_SS != 0;
        let cache = &mut self.l2.cache;
        for (field, read) in [(Field::GuestActivity, between), (Field::GuestPendingDebugExceptions, between || mov_ss)]
        {
            if !read {
                cache.learn(field, 0);
            }
            let value = cache.read(vmcs02, field);
            self.vmcs12.set(field, value);
        }
    }

    /// What is saved if L1 says so, or if the processor has it.
    fn save_conditional<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, efer: u64) {
        let exit12 = self.vmcs12.get32(Field::ExitControls);
        if exit12 & exit::SAVE_EFER != 0 {
            self.vmcs12.set(Field::GuestEfer, efer);
        }
        if self.config.misc() & crate::caps::misc::STORES_LMA != 0 {
            let long = if efer & efer::LMA != 0 { entry::IA32E_MODE_GUEST } else { 0 };
            let entry12 = self.vmcs12.get32(Field::EntryControls) & !entry::IA32E_MODE_GUEST | long;
            self.vmcs12.set(Field::EntryControls, entry12.into());
            // The processor has done the same to VMCS02.
            if let Some(entry02) = self.l2.cache.known(Field::EntryControls) {
                let entry02 = entry02 & !u64::from(entry::IA32E_MODE_GUEST) | u64::from(long);
                self.l2.cache.learn(Field::EntryControls, entry02);
            }
        }
        let deferred = &mut self.l2.stale;
        if exit12 & exit::SAVE_DEBUG_CONTROLS != 0 {
            deferred.insert(Field::GuestDr7);
            deferred.insert(Field::GuestDebugctl);
        }
        if exit12 & exit::SAVE_PAT != 0 {
            deferred.insert(Field::GuestPat);
        }
        if self.config.entry().allowed & entry::LOAD_BNDCFGS != 0 {
            deferred.insert(Field::GuestBndcfgs);
        }
        if self.has12(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
            self.l2.stale.insert(Field::GuestInterruptStatus);
        }
        if self.has12(secondary::EPT) && self.pae_paging12() {
            for field in PDPTES {
                self.l2.stale.insert(field);
            }
        }
        if self.pin12(pin::PREEMPTION_TIMER) && exit12 & exit::SAVE_PREEMPTION_TIMER != 0 {
            let value = match self.l2.timer.left() {
                Some(left) => left.into(),
                None => self.l2.cache.read(vmcs02, Field::PreemptionTimer),
            };
            self.vmcs12.set(Field::PreemptionTimer, value);
        }
    }

    /// L2's PAT, where L1 keeps it after the exit.
    fn inherited_pat<V: Vmcs + ?Sized>(&mut self, vmcs02: &V, reason: u32) -> Option<u64> {
        let kept = self.vmcs12.get32(Field::ExitControls) & exit::LOAD_PAT == 0 && reason & ENTRY_FAILURE == 0;
        kept.then(|| self.l2.cache.read(vmcs02, Field::GuestPat))
    }

    /// Loads L1's state (SDM volume 3, "Loading Host State"). L1's EFER.
    fn load_host<V, G, M: ?Sized, L: ?Sized>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        own: &Own,
        left: &Left,
        pat: Option<u64>,
    ) -> u64
    where
        V: Vmcs + ?Sized,
        G: Msrs + ?Sized,
    {
        let exit12 = self.vmcs12.get32(Field::ExitControls);
        let wide = exit12 & exit::HOST_ADDRESS_SPACE_SIZE != 0;
        self.load_host_cr(m.vmcs01, own, left, wide);
        let efer = if exit12 & exit::LOAD_EFER != 0 {
            self.vmcs12.get(Field::HostEfer)
        } else {
            left.efer & !(efer::LMA | efer::LME) | if wide { efer::LMA | efer::LME } else { 0 }
        };
        let vmcs01 = &mut *m.vmcs01;
        vmcs01.write(Field::GuestEfer, efer);
        let pat = if exit12 & exit::LOAD_PAT != 0 { Some(self.vmcs12.get(Field::HostPat)) } else { pat };
        if let Some(pat) = pat {
            vmcs01.write(Field::GuestPat, pat);
        }
        let blocking = if left.nmi_blocked { interruptibility::NMI } else { 0 };
        for (field, value) in [
            (Field::GuestRip, self.vmcs12.get(Field::HostRip)),
            (Field::GuestRsp, self.vmcs12.get(Field::HostRsp)),
            (Field::GuestRflags, rflags::FIXED),
            (Field::GuestDr7, DR7_RESET),
            (Field::GuestDebugctl, 0),
            (Field::GuestSysenterCs, self.vmcs12.get(Field::HostSysenterCs)),
            (Field::GuestSysenterEsp, self.vmcs12.get(Field::HostSysenterEsp)),
            (Field::GuestSysenterEip, self.vmcs12.get(Field::HostSysenterEip)),
        ] {
            vmcs01.write(field, value);
        }
        // Activity and pending debug exceptions are as VMLAUNCH or VMRESUME left them: none.
        if self.l2.blocking01.take() != Some(blocking) {
            vmcs01.write(Field::GuestInterruptibility, blocking.into());
        }
        self.load_host_segments(vmcs01, wide);
        self.load_host_msrs(m, own, exit12);
        efer
    }

    fn load_host_cr<V: Vmcs + ?Sized>(&self, vmcs01: &mut V, own: &Own, left: &Left, wide: bool) {
        const KEPT: u64 = cr0::CD | cr0::NW;
        let cr0 = self.vmcs12.get(Field::HostCr0) & !KEPT | left.cr0 & KEPT | cr0::ET;
        let cr4 = self.vmcs12.get(Field::HostCr4);
        let cr4 = if wide { cr4 | cr4::PAE } else { cr4 & !cr4::PCIDE };
        for (real, shadow, value, mask, own) in [
            (Field::GuestCr0, Field::Cr0ReadShadow, cr0, own.cr0_mask, own.cr0),
            (Field::GuestCr4, Field::Cr4ReadShadow, cr4, own.cr4_mask, own.cr4),
        ] {
            vmcs01.write(real, value & !mask | own);
            if mask != 0 {
                vmcs01.write(shadow, value);
            }
        }
        vmcs01.write(Field::GuestCr3, self.vmcs12.get(Field::HostCr3));
    }

    fn load_host_segments<V: Vmcs + ?Sized>(&self, vmcs01: &mut V, wide: bool) {
        let host = |field| self.vmcs12.get(field);
        for (segment, selector, base) in [
            (&ES, host(Field::HostEsSelector), 0),
            (&CS, host(Field::HostCsSelector), 0),
            (&SS, host(Field::HostSsSelector), 0),
            (&DS, host(Field::HostDsSelector), 0),
            (&FS, host(Field::HostFsSelector), host(Field::HostFsBase)),
            (&GS, host(Field::HostGsSelector), host(Field::HostGsBase)),
            (&TR, host(Field::HostTrSelector), host(Field::HostTrBase)),
        ] {
            let (limit, rights) = match segment.selector {
                Field::GuestCsSelector => (u32::MAX, if wide { CODE_64 } else { CODE_32 }),
                Field::GuestTrSelector => (TSS_LIMIT, TSS_BUSY),
                _ if selector == 0 => (u32::MAX, DATA | crate::bits::access_rights::UNUSABLE),
                _ => (u32::MAX, DATA),
            };
            vmcs01.write(segment.selector, selector);
            vmcs01.write(segment.base, base);
            vmcs01.write(segment.limit, limit.into());
            vmcs01.write(segment.rights, rights.into());
        }
        vmcs01.write(Field::GuestLdtrSelector, 0);
        vmcs01.write(Field::GuestLdtrAccessRights, crate::bits::access_rights::UNUSABLE.into());
        for (base, limit, value) in [
            (Field::GuestGdtrBase, Field::GuestGdtrLimit, host(Field::HostGdtrBase)),
            (Field::GuestIdtrBase, Field::GuestIdtrLimit, host(Field::HostIdtrBase)),
        ] {
            vmcs01.write(base, value);
            vmcs01.write(limit, 0xFFFF);
        }
    }

    /// MSRs that the exit controls switch and that VMCS01 holds only if the embedder switches them as well.
    fn load_host_msrs<V, G, M: ?Sized, L: ?Sized>(&self, m: &mut Machine<'_, V, G, M, L>, own: &Own, exit12: u32)
    where
        V: Vmcs + ?Sized,
        G: Msrs + ?Sized,
    {
        let perf = self.vmcs12.get(Field::HostPerfGlobalCtrl);
        for (wanted, held, field, msr, value) in [
            (
                exit::LOAD_PERF_GLOBAL_CTRL,
                entry::LOAD_PERF_GLOBAL_CTRL,
                Field::GuestPerfGlobalCtrl,
                PERF_GLOBAL_CTRL,
                perf,
            ),
            (exit::CLEAR_BNDCFGS, entry::LOAD_BNDCFGS, Field::GuestBndcfgs, BNDCFGS, 0),
        ] {
            if exit12 & wanted == 0 {
                continue;
            }
            if own.entry & held != 0 {
                m.vmcs01.write(field, value);
            } else {
                // The entry checks found the value good.
                m.gprs.write_msr(msr, value);
            }
        }
    }

    /// PDPTEs of an L1 with PAE paging: from its memory, as the processor with the embedder's EPT takes them from VMCS01.
    fn load_host_pdptes<V, G: ?Sized, M, L: ?Sized>(&mut self, m: &mut Machine<'_, V, G, M, L>, efer: u64)
    where
        V: Vmcs + ?Sized,
        M: GuestMemory + ?Sized,
    {
        let (paging, pae) = (self.vmcs12.get(Field::HostCr0) & cr0::PG, self.vmcs12.get(Field::HostCr4) & cr4::PAE);
        if paging == 0 || pae == 0 || efer & efer::LMA != 0 {
            return;
        }
        match check::pdptes_at(&self.config, self.vmcs12.get(Field::HostCr3), m.memory) {
            Some(values) => {
                for (field, value) in PDPTES.into_iter().zip(values) {
                    m.vmcs01.write(field, value);
                }
            }
            None => self.abort(m.memory, abort::PDPTES),
        }
    }
}

/// DR7 after an exit.
const DR7_RESET: u64 = 0x400;
/// Access rights of a 64-bit code segment: type 11, code, present, DPL 0, G, L.
const CODE_64: u32 = 0xA09B;
/// The same with D in place of L.
const CODE_32: u32 = 0xC09B;
/// Access rights of a data segment: type 3, present, DPL 0, G, B.
const DATA: u32 = 0xC093;
/// Access rights of a busy TSS.
const TSS_BUSY: u32 = 0x8B;
/// Limit of TR after an exit.
const TSS_LIMIT: u32 = 0x67;

/// The guest-state fields of one segment register.
struct Segment {
    selector: Field,
    base: Field,
    limit: Field,
    rights: Field,
}

macro_rules! segment {
    ($name:ident, $selector:ident, $base:ident, $limit:ident, $rights:ident) => {
        const $name: Segment =
            Segment { selector: Field::$selector, base: Field::$base, limit: Field::$limit, rights: Field::$rights };
    };
}

segment!(ES, GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsAccessRights);
segment!(CS, GuestCsSelector, GuestCsBase, GuestCsLimit, GuestCsAccessRights);
segment!(SS, GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsAccessRights);
segment!(DS, GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsAccessRights);
segment!(FS, GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsAccessRights);
segment!(GS, GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsAccessRights);
segment!(TR, GuestTrSelector, GuestTrBase, GuestTrLimit, GuestTrAccessRights);
