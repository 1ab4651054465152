//! The synthetic MSRs: what RDMSR and WRMSR give, and when they fault.
//!
//! Called by the embedder on exits for the MSRs from 0x40000000 on. One match decides; a capability that is not
//! registered makes its MSRs #GP, as do reserved bits that the TLFS calls RsvdZ. Bits that it calls RsvdP are kept.

use super::interface::{Interface, VpInterface};
use super::overlay::{Overlay, OverlayChange};
use super::sync::{AtomicU64, Ordering};
use crate::addr::L1Gpa;
use tlfs_abi::msr::{self, CrashControl, PageMsr, ReenlightenmentControl, TSC_EMULATION_BIT};

/// The first MSR of the synthetic range.
const FIRST: u32 = 0x4000_0000;
/// The last one: beyond the nested MSRs.
const LAST: u32 = 0x4000_1FFF;

/// What RDMSR gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrRead {
    /// This value.
    Value(u64),
    /// #GP(0).
    Fault,
    /// Not a synthetic MSR.
    NotMine,
    /// What the embedder reads there.
    Embedder(EmbedderRead),
}

/// A register of the embedder's local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbedderRead {
    /// The interrupt command register, high half in bits 63:32.
    Icr,
    /// The task priority, in bits 7:0.
    Tpr,
}

/// What WRMSR does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrWrite {
    /// Done.
    Done,
    /// #GP(0); nothing changed.
    Fault,
    /// Not a synthetic MSR.
    NotMine,
    /// Done when the embedder has performed this.
    Embedder(Action),
}

/// What an embedder performs before the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Move an overlay page in L1's second stage. Writes of several VPs may race: under its own mapping lock the
    /// embedder makes the second stage agree with [`Interface::overlay`] as of then.
    Overlay(OverlayChange),
    /// Write the APIC's EOI register.
    Eoi(u32),
    /// Write the APIC's ICR: high half in bits 63:32.
    Icr(u64),
    /// Write the APIC's TPR.
    Tpr(u8),
    /// Log [`Interface::crash_parameters`], and the message if there is one.
    Crash(Option<CrashMessage>),
    /// Reset the partition.
    Reset,
    /// Stop emulating TSC accesses.
    StopTscEmulation,
}

/// Where a crashing guest put a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashMessage {
    /// Its first byte.
    pub gpa: L1Gpa,
    /// Its length in bytes, at most 4,096.
    pub length: u16,
}

impl Interface {
    /// RDMSR of `msr` by `vp`; `now` is the partition's reference time in 100 ns.
    pub fn msr_read(&self, vp: &VpInterface, msr: u32, now: u64) -> MsrRead {
        let config = &self.config;
        let load = |register: &AtomicU64| register.load(Ordering::Relaxed);
        let value = match msr {
            msr::GUEST_OS_ID => Some(self.guest_os_id.load(Ordering::Relaxed)),
            msr::HYPERCALL => Some(self.read_hypercall().raw()),
            msr::VP_INDEX => Some(u64::from(vp.vp_index())),
            msr::RESET if config.reset => Some(0),
            msr::TIME_REF_COUNT if config.reference_counter => Some(self.strictly_later(now)),
            msr::REFERENCE_TSC if config.reference_tsc.is_some() => Some(load(&self.reference_tsc)),
            msr::TSC_FREQUENCY => config.frequencies.map(|(tsc, _)| tsc),
            msr::APIC_FREQUENCY => config.frequencies.map(|(_, apic)| apic),
            msr::ICR if config.apic_msrs => return MsrRead::Embedder(EmbedderRead::Icr),
            msr::TPR if config.apic_msrs => return MsrRead::Embedder(EmbedderRead::Tpr),
            msr::VP_ASSIST_PAGE if config.apic_msrs => Some(load(&vp.assist)),
            msr::CRASH_P0..=msr::CRASH_P4 if config.crash.is_some() => self.crash_parameter(msr).map(load),
            msr::CRASH_CTL => config.crash.map(supported_crash_actions),
            msr::REENLIGHTENMENT_CONTROL if config.reenlightenment => Some(load(&self.reenlightenment)),
            msr::TSC_EMULATION_CONTROL if config.reenlightenment => Some(load(&self.tsc_emulation_control)),
            msr::TSC_EMULATION_STATUS if config.reenlightenment => Some(load(&self.tsc_emulation_status)),
            msr::NESTED_VP_INDEX if config.nested_root => Some(u64::from(vp.vp_index())),
            _ if (FIRST..=LAST).contains(&msr) => None,
            _ => return MsrRead::NotMine,
        };
        value.map_or(MsrRead::Fault, MsrRead::Value)
    }

    /// WRMSR of `value` to `msr` by `vp`.
    pub fn msr_write(&self, vp: &VpInterface, msr: u32, value: u64) -> MsrWrite {
        let config = &self.config;
        match msr {
            msr::GUEST_OS_ID => self.write_guest_os_id(value),
            msr::HYPERCALL => self.write_hypercall(value),
            msr::RESET if config.reset => match value {
                0 => MsrWrite::Done,
                1 => MsrWrite::Embedder(Action::Reset),
                _ => MsrWrite::Fault,
            },
            msr::REFERENCE_TSC if config.reference_tsc.is_some() => self.write_reference_tsc(value),
            msr::EOI if config.apic_msrs => narrow(value, |eoi: u32| Action::Eoi(eoi)),
            msr::ICR if config.apic_msrs => MsrWrite::Embedder(Action::Icr(value)),
            msr::TPR if config.apic_msrs => narrow(value, |tpr: u8| Action::Tpr(tpr)),
            msr::VP_ASSIST_PAGE if config.apic_msrs => self.write_vp_assist_page(vp, value),
            msr::CRASH_P0..=msr::CRASH_P4 if config.crash.is_some() => match self.crash_parameter(msr) {
                Some(parameter) => store(parameter, value),
                None => MsrWrite::Fault,
            },
            msr::CRASH_CTL => config.crash.map_or(MsrWrite::Fault, |messages| self.write_crash_ctl(value, messages)),
            msr::REENLIGHTENMENT_CONTROL if config.reenlightenment => self.write_reenlightenment(value),
            msr::TSC_EMULATION_CONTROL if config.reenlightenment => {
                if value & !TSC_EMULATION_BIT != 0 {
                    MsrWrite::Fault
                } else {
                    store(&self.tsc_emulation_control, value)
                }
            }
            msr::TSC_EMULATION_STATUS if config.reenlightenment => self.write_tsc_emulation_status(value),
            _ if (FIRST..=LAST).contains(&msr) => MsrWrite::Fault,
            _ => MsrWrite::NotMine,
        }
    }

    /// HYPERCALL as a guest reads it: not enabled while there is no OS id.
    fn read_hypercall(&self) -> PageMsr {
        let value = self.hypercall.load(Ordering::Relaxed);
        let enabled = self.hypercalls_enabled();
        PageMsr::new(if enabled { value } else { value & !PageMsr::ENABLE })
    }

    /// L1 GPA of the hypercall page, while it is there.
    pub(super) fn hypercall_page(&self) -> Option<L1Gpa> {
        let msr = self.read_hypercall();
        if msr.enable() { Some(L1Gpa::new(msr.gpa())) } else { None }
    }

    /// L1 GPA of the reference TSC page, while it is there.
    pub(super) fn reference_tsc_page(&self) -> Option<L1Gpa> {
        self.reference_tsc_place(PageMsr::new(self.reference_tsc.load(Ordering::Relaxed)))
    }

    /// Beyond the end of the GPA space the page is not accessible (TLFS, "Partition Reference Time Enlightenment").
    fn reference_tsc_place(&self, msr: PageMsr) -> Option<L1Gpa> {
        if msr.enable() && self.in_gpa_space(msr.gpa()) { Some(L1Gpa::new(msr.gpa())) } else { None }
    }

    /// Zero takes the hypercall page away, even a locked one: it stays locked, and disabled until reset.
    fn write_guest_os_id(&self, value: u64) -> MsrWrite {
        self.guest_os_id.store(value, Ordering::Relaxed);
        if value != 0 {
            return MsrWrite::Done;
        }
        // Release: a VP whose exchange comes later sees the zero id. See `write_hypercall`.
        let old = PageMsr::new(self.hypercall.fetch_and(!PageMsr::ENABLE, Ordering::AcqRel));
        let from = if old.enable() { Some(L1Gpa::new(old.gpa())) } else { None };
        overlay_change(Overlay::HypercallPage, from, None)
    }

    /// Without an OS id the enable bit stays zero whatever is written.
    ///
    /// A VP that enables the page exchanges HYPERCALL and then loads GUEST_OS_ID; a VP that clears the id stores
    /// GUEST_OS_ID and then clears the bit in HYPERCALL. Both change HYPERCALL by an atomic read-modify-write, and one
    /// comes first. If the exchange does, the other VP clears its bit. If the clearing does, the exchange reads from it,
    /// and as one is a release and the other an acquire the load sees the zero id and the bit is taken back. The page
    /// never outlives the id.
    fn write_hypercall(&self, value: u64) -> MsrWrite {
        let old = PageMsr::new(self.hypercall.load(Ordering::Relaxed));
        let mut new = PageMsr::new(value);
        if old.locked() || !self.in_gpa_space(new.gpa()) {
            return MsrWrite::Fault;
        }
        new.set_enable(new.enable() && self.hypercalls_enabled());
        let exchanged = self.hypercall.compare_exchange(old.raw(), new.raw(), Ordering::AcqRel, Ordering::Relaxed);
        if exchanged.is_err() {
            // Another VP wrote after the load: its write came last, and this one left no trace.
            return MsrWrite::Done;
        }
        if new.enable() && !self.hypercalls_enabled() {
            let _ = self.hypercall.fetch_and(!PageMsr::ENABLE, Ordering::AcqRel);
            new.set_enable(false);
        }
        let place = |msr: PageMsr| if msr.enable() { Some(L1Gpa::new(msr.gpa())) } else { None };
        overlay_change(Overlay::HypercallPage, place(old), place(new))
    }

    fn write_reference_tsc(&self, value: u64) -> MsrWrite {
        let old = self.reference_tsc.swap(value, Ordering::Relaxed);
        let place = |raw| self.reference_tsc_place(PageMsr::new(raw));
        overlay_change(Overlay::ReferenceTscPage, place(old), place(value))
    }

    fn write_vp_assist_page(&self, vp: &VpInterface, value: u64) -> MsrWrite {
        let msr = PageMsr::new(value);
        if msr.enable() && !self.in_gpa_space(msr.gpa()) { MsrWrite::Fault } else { store(&vp.assist, value) }
    }

    fn crash_parameter(&self, msr: u32) -> Option<&AtomicU64> {
        self.crash.get(msr.wrapping_sub(msr::CRASH_P0) as usize)
    }

    /// Unsupported actions and reserved bits fault; a message is one only together with the notification.
    fn write_crash_ctl(&self, value: u64, messages: bool) -> MsrWrite {
        if value & !supported_crash_actions(messages) != 0 {
            return MsrWrite::Fault;
        }
        let control = CrashControl::new(value);
        if !control.crash_notify() {
            return MsrWrite::Done;
        }
        let [.., gpa, length] = self.crash_parameters();
        let length = length.min(4096) as u16;
        let message = control.crash_message().then_some(CrashMessage { gpa: L1Gpa::new(gpa), length });
        MsrWrite::Embedder(Action::Crash(message))
    }

    fn write_reenlightenment(&self, value: u64) -> MsrWrite {
        let control = ReenlightenmentControl::new(value);
        let undeliverable = control.vector() < 16 || control.target_vp() >= self.config.max_vps;
        if value & ReenlightenmentControl::RESERVED != 0 || control.enabled() && undeliverable {
            return MsrWrite::Fault;
        }
        store(&self.reenlightenment, value)
    }

    /// A guest may only end the emulation.
    fn write_tsc_emulation_status(&self, value: u64) -> MsrWrite {
        if value != 0 {
            return MsrWrite::Fault;
        }
        match self.tsc_emulation_status.swap(0, Ordering::Relaxed) {
            0 => MsrWrite::Done,
            _ => MsrWrite::Embedder(Action::StopTscEmulation),
        }
    }
}

/// CRASH_CTL as a guest reads it.
fn supported_crash_actions(messages: bool) -> u64 {
    let mut control = CrashControl::new(0);
    control.set_crash_notify(true);
    control.set_crash_message(messages);
    control.raw()
}

fn store(register: &AtomicU64, value: u64) -> MsrWrite {
    register.store(value, Ordering::Relaxed);
    MsrWrite::Done
}

/// Bits above the register's width are RsvdZ.
fn narrow<T: TryFrom<u64>>(value: u64, action: impl FnOnce(T) -> Action) -> MsrWrite {
    T::try_from(value).map_or(MsrWrite::Fault, |value| MsrWrite::Embedder(action(value)))
}

fn overlay_change(which: Overlay, from: Option<L1Gpa>, to: Option<L1Gpa>) -> MsrWrite {
    if from == to { MsrWrite::Done } else { MsrWrite::Embedder(Action::Overlay(OverlayChange { which, from, to })) }
}
