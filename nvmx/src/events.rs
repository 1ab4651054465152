//! Events that wait: INIT, SIPI and NMI for L1 and, for embedders that take physical interrupts themselves, an
//! interrupt; and the event that the next VM entry of L2 injects.
//!
//! An event that L1 wants to see makes L2 exit, by the priorities of the SDM (volume 3, "Event Blocking", "Priority
//! Among Simultaneous Exceptions and Interrupts"): INIT, SIPI, preemption timer, NMI, interrupt window, interrupt. While
//! an event is being injected the exit comes right after its delivery. What L1 does not want is delivered to the level
//! that runs, as soon as its window opens.

use hvcore::addr::Level;
use hvcore::memory::GuestMemory;

use crate::bits::{activity, interruptibility, interruption, rflags};
use crate::controls::{pin, primary};
use crate::exit::Exit;
use crate::exit_reason;
use crate::field::Field;
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr_list::Msrs;
use crate::state::NestedVmx;

/// An event to inject, or one whose delivery an exit cut short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Injection {
    /// VM-entry interruption information, valid bit set.
    pub(crate) info: u32,
    pub(crate) error_code: u32,
    /// Instruction length, for software events.
    pub(crate) length: u32,
}

impl Injection {
    /// True for INT n, INT1, INT3 and INTO, whose instruction has a length.
    pub(crate) const fn is_software(info: u32) -> bool {
        matches!(
            info & interruption::TYPE,
            interruption::SOFTWARE_INTERRUPT
                | interruption::PRIVILEGED_SOFTWARE_EXCEPTION
                | interruption::SOFTWARE_EXCEPTION
        )
    }

    /// The event that `vmcs` says the last exit cut short.
    pub(crate) fn interrupted<V: Vmcs + ?Sized>(vmcs: &V) -> Option<Self> {
        let info = vmcs.read32(Field::IdtVectoringInfo);
        if info & interruption::VALID == 0 {
            return None;
        }
        let read_if = |condition: bool, field| if condition { vmcs.read32(field) } else { 0 };
        Some(Self {
            // Bit 12 is undefined here.
            info: info & !interruption::NMI_UNBLOCKING,
            error_code: read_if(info & interruption::ERROR_CODE != 0, Field::IdtVectoringErrorCode),
            length: read_if(Self::is_software(info), Field::ExitInstructionLength),
        })
    }

    const fn nmi() -> Self {
        Self { info: interruption::VALID | interruption::NMI | 2, error_code: 0, length: 0 }
    }

    const fn interrupt(vector: u8) -> Self {
        Self { info: interruption::VALID | interruption::EXTERNAL | vector as u32, error_code: 0, length: 0 }
    }

    fn write<V: Vmcs + ?Sized>(&self, vmcs: &mut V) {
        vmcs.write(Field::EntryInterruptionInfo, self.info.into());
        if self.info & interruption::ERROR_CODE != 0 {
            vmcs.write(Field::EntryExceptionErrorCode, self.error_code.into());
        }
        if Self::is_software(self.info) {
            vmcs.write(Field::EntryInstructionLength, self.length.into());
        }
    }
}

/// Exits that may come in the middle of an event's delivery.
pub(crate) const fn may_interrupt_delivery(basic: u32) -> bool {
    matches!(
        basic,
        exit_reason::EXCEPTION_OR_NMI
            | exit_reason::TASK_SWITCH
            | exit_reason::APIC_ACCESS
            | exit_reason::EPT_VIOLATION
            | exit_reason::EPT_MISCONFIGURATION
            | exit_reason::PML_FULL
    )
}

/// An exit of L1 for the embedder: the event that it cut short is injected again.
pub(crate) fn reinject<V: Vmcs + ?Sized>(vmcs01: &mut V, reason: u32) {
    if may_interrupt_delivery(reason)
        && let Some(event) = Injection::interrupted(vmcs01)
    {
        event.write(vmcs01);
    }
}

/// Pending events of one VP.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Events {
    /// An NMI waits; further ones merge with it.
    nmi: bool,
    init: bool,
    sipi: Option<u8>,
    interrupt: Option<u8>,
    /// L1 executed VMLAUNCH or VMRESUME and L2 has not run since.
    pub(crate) run_pending: bool,
    /// What the next entry of L2 injects.
    pub(crate) injection: Option<Injection>,
    /// L2's IRET ended NMI blocking and then faulted: if L0 deals with the fault, the blocking is back.
    pub(crate) nmi_unblocked: bool,
    /// L1 is gone: a VMX abort.
    pub(crate) shutdown: bool,
    /// VMCS01 has a window open for the library.
    window01: bool,
    /// The windows that VMCS02 is to have open for the library.
    windows02: u32,
    /// Whether anything above wants attention before an entry: kept so that most entries test one byte.
    active: bool,
}

impl Events {
    /// None pending. VMCS01 may have a window open from before: the next entry closes it.
    pub(crate) fn fresh() -> Self {
        Self { window01: true, active: true, ..Self::default() }
    }

    const fn any(&self) -> bool {
        self.nmi || self.init || self.sipi.is_some() || self.interrupt.is_some() || self.shutdown
    }

    /// Parts that a saved state holds: pending NMI, INIT, SIPI and interrupt.
    pub(crate) const fn parts(&self) -> (bool, bool, Option<u8>, Option<u8>) {
        (self.nmi, self.init, self.sipi, self.interrupt)
    }

    /// Sets the parts of a saved state.
    pub(crate) const fn set_parts(&mut self, nmi: bool, init: bool, sipi: Option<u8>, interrupt: Option<u8>) {
        (self.nmi, self.init, self.sipi, self.interrupt) = (nmi, init, sipi, interrupt);
        // VMCS01 may have a window open: the next entry closes it.
        (self.window01, self.active) = (true, true);
    }

    /// Something is to be looked at before the next entry.
    pub(crate) const fn wake(&mut self) {
        self.active = true;
    }
}

impl NestedVmx {
    /// An NMI for L1. Held while NMIs are blocked; further ones merge with it. Without virtual NMIs in the processor it
    /// goes in at the first entry that finds them open.
    #[inline]
    pub const fn pend_nmi(&mut self) {
        self.l2.events.nmi = true;
        self.l2.events.active = true;
    }

    /// An INIT for L1. Held while L1 is in VMX root operation; makes L2 exit.
    #[inline]
    pub const fn pend_init(&mut self) {
        self.l2.events.init = true;
        self.l2.events.active = true;
    }

    /// A start-up IPI with `vector` for L1. It is lost unless L2 is in the wait-for-SIPI state; L1's own wait for one is
    /// the embedder's.
    #[inline]
    pub const fn pend_sipi(&mut self, vector: u8) {
        self.l2.events.sipi = Some(vector);
        self.l2.events.active = true;
    }

    /// Interrupt `vector` for L1, or `None` to withdraw it. For embedders that have external interrupts exit; it
    /// replaces what was pending. [`pending_interrupt`](Self::pending_interrupt) tells when it went.
    #[inline]
    pub const fn pend_interrupt(&mut self, vector: Option<u8>) {
        self.l2.events.interrupt = vector;
        self.l2.events.active = true;
    }

    /// The interrupt that still waits; `None` once it was injected or acknowledged.
    #[inline]
    pub const fn pending_interrupt(&self) -> Option<u8> {
        self.l2.events.interrupt
    }

    /// Lets pending events end L2's run before it goes on; the level that [`prepare_entry`](Self::prepare_entry)
    /// enters then. For embedders that do something for a level before its entry, such as draining its flush queue.
    #[inline]
    pub fn route_events<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Level
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        if self.level == Level::L2 && (self.l2.events.active || self.l2.timer.expired()) {
            self.exit_for_event(m);
        }
        self.level
    }

    #[cold]
    fn exit_for_event<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>)
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        if self.l2.events.injection.is_some() {
            // The exit comes when the event has been delivered.
            return;
        }
        let Some(exit) = self.wanted_exit(m.vmcs02) else { return };
        match exit.reason {
            exit_reason::SIPI => self.l2.events.sipi = None,
            exit_reason::EXCEPTION_OR_NMI => self.l2.events.nmi = false,
            exit_reason::EXTERNAL_INTERRUPT if exit.interruption_info != 0 => self.l2.events.interrupt = None,
            // The exit is all that becomes of it.
            exit_reason::INIT => self.l2.events.init = false,
            _ => {}
        }
        self.vmexit(m, exit);
    }

    /// The exit that a pending event makes L2 take.
    fn wanted_exit<V: Vmcs + ?Sized>(&self, vmcs02: &V) -> Option<Exit> {
        let events = &self.l2.events;
        let sleeping = self.sleeping();
        if sleeping == Some(activity::WAIT_FOR_SIPI) {
            // All else is blocked.
            return events.sipi.map(|vector| Exit::simple(exit_reason::SIPI, vector.into()));
        }
        if events.init {
            return Some(Exit::simple(exit_reason::INIT, 0));
        }
        if self.l2.timer.expired() && sleeping.is_none() {
            return Some(Exit::simple(exit_reason::PREEMPTION_TIMER, 0));
        }
        if events.nmi && self.pin12(pin::NMI_EXITING) && !self.nmi_blocked(vmcs02) {
            let info = Injection::nmi().info;
            return Some(Exit { interruption_info: info, ..Exit::simple(exit_reason::EXCEPTION_OR_NMI, 0) });
        }
        if sleeping.is_some() {
            return None;
        }
        if self.halted_with_open_window(vmcs02) {
            return Some(Exit::simple(exit_reason::INTERRUPT_WINDOW, 0));
        }
        let vector = events.interrupt.filter(|_| self.pin12(pin::EXTERNAL_INTERRUPT_EXITING))?;
        let acknowledged = self.vmcs12.get32(Field::ExitControls) & crate::controls::exit::ACKNOWLEDGE_INTERRUPT != 0;
        let interruption_info = if acknowledged { Injection::interrupt(vector).info } else { 0 };
        Some(Exit { interruption_info, ..Exit::simple(exit_reason::EXTERNAL_INTERRUPT, 0) })
    }

    /// The activity state that L2 waits in without running.
    pub(crate) fn sleeping(&self) -> Option<u32> {
        let state = self.vmcs12.get32(Field::GuestActivity);
        (self.l2.events.run_pending && self.sleeps()).then_some(state)
    }

    /// True when L1's NMIs are blocked while L2 runs: L2 took one that L1 let through.
    fn nmi_blocked<V: Vmcs + ?Sized>(&self, vmcs02: &V) -> bool {
        !self.pin12(pin::VIRTUAL_NMIS) && vmcs02.read32(Field::GuestInterruptibility) & interruptibility::NMI != 0
    }

    /// L1 enters a halted L2 with an open interrupt window: the exit comes before anything is executed. Told here, since
    /// processors are not to be trusted to notice.
    fn halted_with_open_window<V: Vmcs + ?Sized>(&self, vmcs02: &V) -> bool {
        self.l2.events.run_pending
            && self.primary12(primary::INTERRUPT_WINDOW_EXITING)
            && self.vmcs12.get32(Field::GuestActivity) == activity::HLT
            && interrupts_open(vmcs02)
    }

    /// Delivers what is pending to the level that runs, or opens a window for it. `true` when an exit is wanted right
    /// after the event that this entry injects.
    #[inline]
    pub(crate) fn deliver<V, G: ?Sized, M: ?Sized, L: ?Sized>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> bool
    where
        V: Vmcs + ?Sized,
    {
        if !self.l2.events.active {
            return false;
        }
        let soon = match self.level {
            Level::L1 => self.deliver_to_l1(m.vmcs01),
            Level::L2 => self.deliver_to_l2(m.vmcs02),
        };
        self.l2.events.active = self.l2.events.any() || self.l2.events.window01 || self.l2.events.windows02 != 0;
        soon
    }

    #[cold]
    fn deliver_to_l1<V: Vmcs + ?Sized>(&mut self, vmcs01: &mut V) -> bool {
        // A SIPI for a processor that waits for none is lost.
        self.l2.events.sipi = None;
        let mut windows = 0;
        if self.l2.events.nmi {
            let free = vmcs01.read32(Field::EntryInterruptionInfo) & interruption::VALID == 0;
            if free && nmi_open(vmcs01) {
                self.l2.events.nmi = false;
                Injection::nmi().write(vmcs01);
            } else if vmcs01.read32(Field::PinBasedControls) & pin::VIRTUAL_NMIS != 0 {
                windows |= primary::NMI_WINDOW_EXITING;
            }
        }
        if let Some(vector) = self.l2.events.interrupt {
            let free = vmcs01.read32(Field::EntryInterruptionInfo) & interruption::VALID == 0;
            if free && interrupts_open(vmcs01) {
                self.l2.events.interrupt = None;
                Injection::interrupt(vector).write(vmcs01);
            } else {
                windows |= primary::INTERRUPT_WINDOW_EXITING;
            }
        }
        if windows != 0 || self.l2.events.window01 {
            let all = primary::NMI_WINDOW_EXITING | primary::INTERRUPT_WINDOW_EXITING;
            let controls = vmcs01.read32(Field::PrimaryControls) & !all | windows;
            vmcs01.write(Field::PrimaryControls, controls.into());
            self.l2.events.window01 = windows != 0;
        }
        false
    }

    #[cold]
    fn deliver_to_l2<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) -> bool {
        self.l2.events.sipi = None;
        self.l2.events.windows02 = 0;
        let behind = self.l2.events.injection.is_some();
        if behind && self.wanted_exit(vmcs02).is_some() {
            return true;
        }
        if self.l2.events.nmi {
            if !behind && !self.pin12(pin::NMI_EXITING) && nmi_open(vmcs02) {
                self.l2.events.nmi = false;
                self.l2.events.injection = Some(Injection::nmi());
            } else if self.l2.pin & pin::VIRTUAL_NMIS != 0 {
                self.l2.events.windows02 |= primary::NMI_WINDOW_EXITING;
            }
        }
        if let Some(vector) = self.l2.events.interrupt {
            if self.l2.events.injection.is_none() && interrupts_open(vmcs02) {
                self.l2.events.interrupt = None;
                self.l2.events.injection = Some(Injection::interrupt(vector));
            } else {
                self.l2.events.windows02 |= primary::INTERRUPT_WINDOW_EXITING;
            }
        }
        false
    }

    /// The windows that the library wants open in VMCS02.
    #[inline]
    pub(crate) const fn windows02(&self) -> u32 {
        self.l2.events.windows02
    }

    /// An exit of L1 by a window. `true` when it was the library's.
    pub(crate) fn own_window01(&mut self, reason: u32) -> bool {
        let window = matches!(reason, exit_reason::INTERRUPT_WINDOW | exit_reason::NMI_WINDOW);
        window && self.l2.events.window01
    }

    /// An exit of L2 by a window. `true` when it was the library's.
    pub(crate) fn own_window02(&self, reason: u32) -> bool {
        match reason {
            exit_reason::INTERRUPT_WINDOW => self.l2.events.windows02 & primary::INTERRUPT_WINDOW_EXITING != 0,
            exit_reason::NMI_WINDOW => self.l2.events.windows02 & primary::NMI_WINDOW_EXITING != 0,
            _ => false,
        }
    }

    /// INIT for an L1 outside VMX operation.
    pub(crate) const fn take_init(&mut self) -> bool {
        if self.l2.events.init && self.vmxon.is_none() {
            self.l2.events.init = false;
            return true;
        }
        false
    }

    /// Puts the event that the next entry of L2 injects in VMCS02.
    #[inline]
    pub(crate) fn write_injection<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) {
        let cache = &mut self.l2.cache;
        let Some(event) = self.l2.events.injection else {
            // A valid bit that no exit cleared.
            if cache.known(Field::EntryInterruptionInfo).is_none_or(|info| info as u32 & interruption::VALID != 0) {
                cache.write(vmcs02, Field::EntryInterruptionInfo, 0);
            }
            return;
        };
        cache.write(vmcs02, Field::EntryInterruptionInfo, event.info.into());
        if event.info & interruption::ERROR_CODE != 0 {
            cache.write(vmcs02, Field::EntryExceptionErrorCode, event.error_code.into());
        }
        if Injection::is_software(event.info) {
            cache.write(vmcs02, Field::EntryInstructionLength, event.length.into());
        }
        if event.info & interruption::TYPE == interruption::NMI && !self.pin12(pin::VIRTUAL_NMIS) {
            // The processor would refuse an NMI while virtual NMIs are blocked; L1, without them, may inject one. The
            // blocking is there again after the delivery.
            let state = vmcs02.read32(Field::GuestInterruptibility);
            if state & interruptibility::NMI != 0 {
                self.l2.cache.write(vmcs02, Field::GuestInterruptibility, (state & !interruptibility::NMI).into());
            }
        }
    }
}

/// True when the guest of `vmcs` takes interrupts at its next instruction boundary.
fn interrupts_open<V: Vmcs + ?Sized>(vmcs: &V) -> bool {
    const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;
    vmcs.read(Field::GuestRflags) & rflags::IF != 0 && vmcs.read32(Field::GuestInterruptibility) & SHADOW == 0
}

/// True when the guest of `vmcs` takes an NMI at its next instruction boundary.
fn nmi_open<V: Vmcs + ?Sized>(vmcs: &V) -> bool {
    const BLOCKING: u32 = interruptibility::STI | interruptibility::MOV_SS | interruptibility::NMI;
    vmcs.read32(Field::GuestInterruptibility) & BLOCKING == 0
}
