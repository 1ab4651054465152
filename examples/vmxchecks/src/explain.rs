//! Disagreements that are understood: docs/vmx-checks.md has the reason of each class.

use crate::machine::Machine;
use crate::verdict::Outcome;
use nvmx::bits::{access_rights, activity, cr0, rflags};
use nvmx::check::{Controls, Guest, Host, MsrRefusal, Refusal};
use nvmx::controls::{entry, primary};
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;

macro_rules! classes {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Why library and processor may differ.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Class {
            $($(#[$doc])* $name,)*
        }

        impl Class {
            /// All classes.
            pub const ALL: [Class; [$(stringify!($name)),*].len()] = [$(Class::$name),*];
        }
    };
}

classes! {
    /// Secondary controls that the processor has and the library refuses.
    RefusedControls,
    /// "Entry to SMM" outside SMM: found as guest state.
    EntryToSmm,
    /// Reserved bits of IA32_DEBUGCTL.
    Debugctl,
    /// Reserved bits of IA32_PERF_GLOBAL_CTRL.
    PerfGlobalCtrl,
    /// Pending debug exceptions, bits 63:32.
    PendingDebugHigh,
    /// Pending debug exceptions: BS against RFLAGS.TF.
    PendingSingleStep,
    /// DPL of CS: against its RPL instead of the DPL of SS.
    CodePrivilege,
    /// RIP that is not canonical.
    Rip,
    /// Events injected into HLT and shutdown.
    ActivityEvent,
    /// An NMI injected in the shadow of STI: the qualification.
    NmiInStiShadow,
    /// An NMI injected while virtual NMIs are blocked.
    NmiBlocked,
    /// MSRs of microcode updates and of SMM.
    Msr,
}

/// The class of a disagreement.
pub fn class(
    vmcs: &Vmcs12,
    verdict: &Result<(), Refusal>,
    theirs: Outcome,
    changes: u32,
    of: &Machine,
) -> Option<Class> {
    if bochs_refuses_cs(vmcs) && theirs == Outcome::Guest(0) && !is_early(verdict) {
        return Some(Class::CodePrivilege);
    }
    if *verdict == Err(Refusal::Guest(Guest::NmiInStiShadow)) && theirs == Outcome::Guest(0) {
        return Some(Class::NmiInStiShadow);
    }
    if *verdict == Err(Refusal::Controls(Controls::Smm)) && matches!(theirs, Outcome::Guest(_)) {
        let smm = vmcs.get32(Field::EntryControls) & entry::ENTRY_TO_SMM != 0;
        return smm.then_some(Class::EntryToSmm);
    }
    // What the processor overlooks: it enters, or finds another fault.
    if theirs != Outcome::Enters && changes < 2 {
        return None;
    }
    let Err(refusal) = verdict else { return None };
    overlooked(vmcs, *refusal, of)
}

fn overlooked(vmcs: &Vmcs12, refusal: Refusal, of: &Machine) -> Option<Class> {
    let class = match refusal {
        Refusal::Controls(Controls::Secondary) => {
            let unknown = vmcs.get32(Field::SecondaryControls) & !of.config.host().secondary;
            return (unknown == 0).then_some(Class::RefusedControls);
        }
        Refusal::Host(Host::PerfGlobalCtrl) | Refusal::Guest(Guest::PerfGlobalCtrl) => Class::PerfGlobalCtrl,
        Refusal::Guest(Guest::Debugctl) => Class::Debugctl,
        Refusal::Guest(Guest::PendingDebug) => {
            let low = vmcs.get32(Field::GuestPendingDebugExceptions);
            return (low & !0x500F == 0).then_some(Class::PendingDebugHigh);
        }
        Refusal::Guest(Guest::PendingSingleStep) => Class::PendingSingleStep,
        Refusal::Guest(Guest::CsDpl) => Class::CodePrivilege,
        Refusal::Guest(Guest::Rip) if vmcs.get32(Field::GuestCsAccessRights) & access_rights::L != 0 => Class::Rip,
        Refusal::Guest(Guest::ActivityEvent) => Class::ActivityEvent,
        Refusal::Guest(Guest::NmiBlocked) => Class::NmiBlocked,
        Refusal::Msr(_, MsrRefusal::Microcode | MsrRefusal::Smm) => Class::Msr,
        _ => return None,
    };
    Some(class)
}

/// Bochs's own rule on CS: non-conforming code has a DPL of its RPL, conforming code one of at most that.
fn bochs_refuses_cs(vmcs: &Vmcs12) -> bool {
    let rights = vmcs.get32(Field::GuestCsAccessRights);
    let (dpl, rpl) = (rights >> access_rights::DPL_SHIFT & 3, vmcs.get32(Field::GuestCsSelector) & 3);
    let wrong = match rights & access_rights::TYPE {
        9 | 11 => dpl != rpl,
        13 | 15 => dpl > rpl,
        _ => false,
    };
    wrong && vmcs.get(Field::GuestRflags) & rflags::VM == 0
}

/// Refused before guest state is looked at.
fn is_early(verdict: &Result<(), Refusal>) -> bool {
    matches!(verdict, Err(Refusal::Controls(_) | Refusal::Host(_)))
}

/// True for what the emulated processor would not return from, or would not survive.
pub fn would_hang(vmcs: &Vmcs12, verdict: &Result<(), Refusal>, of: &Machine) -> bool {
    // What it overlooks is as good as no refusal.
    let ignored = matches!(verdict, Err(refusal) if overlooked(vmcs, *refusal, of).is_some());
    let refused_early = is_early(verdict) && !ignored;
    let for_inactivity = matches!(verdict, Err(Refusal::Guest(Guest::Activity | Guest::InactiveInShadow)));
    // Nothing ends these.
    let state = vmcs.get32(Field::GuestActivity);
    let asleep = matches!(state, activity::SHUTDOWN | activity::WAIT_FOR_SIPI) && !refused_early && !for_inactivity;
    // IA-32e mode without paging: Bochs has no name for such a mode, and stops.
    let long = vmcs.get32(Field::EntryControls) & entry::IA32E_MODE_GUEST != 0;
    let no_paging = long && vmcs.get(Field::GuestCr0) & cr0::PG == 0 && !refused_early;
    // A pending MTF exit on a processor without the monitor trap flag: it tries to inject an event of that type.
    let mtf = of.config.primary().allowed & primary::MONITOR_TRAP_FLAG != 0;
    let pending = vmcs.get32(Field::EntryInterruptionInfo) >> 8 & 7 == 7;
    asleep || no_paging || pending && !mtf
}
