//! Events that wait for L1: NMI, INIT and, for embedders that take physical interrupts themselves, an interrupt.
//!
//! An event that L1 intercepts makes L2 exit and stays pending, as it does on the processor: L1 takes it after STGI.
//! NMI blocking is kept here, because the embedder intercepts NMIs: it ends when an IRET has been executed, which is
//! found by the IRET intercept and one single step.

use hvcore::addr::Level;
use hvcore::memory::{GuestMemory, MemoryError};

use crate::exit_code;
use crate::machine::Machine;
use crate::state::{NestedSvm, Settled};
use crate::vmcb::Vmcb;
use crate::vmcb::bits::{DR6_BS, Event, int_ctl, int_state, misc1, rflags};
use crate::vmexit::Exit;

/// Vector of #DB.
const DB: u8 = 1;
/// Vector of #SX, raised with error code 1 by an INIT that VM_CR.R_INIT redirects.
const SX: u8 = 30;
/// VM_CR.R_INIT.
const VM_CR_R_INIT: u64 = 1 << 1;

/// Progress from an injected NMI to the end of its blocking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Blocking {
    /// NMIs are not blocked.
    #[default]
    Off,
    /// Blocked; IRET is intercepted.
    On,
    /// At an IRET, about to be executed under a single step; blocked until it has been.
    AtIret(u64),
}

/// A single step of the library's own, and what was there before it.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// The guest's own RFLAGS.TF.
    tf: bool,
    /// #DB was intercepted anyway.
    intercepted: bool,
}

/// Pending events of one VP.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Events {
    /// An NMI waits; further ones merge with it.
    nmi: bool,
    init: bool,
    interrupt: Option<u8>,
    blocking: Blocking,
    /// A single step of the library's own is under way.
    step: Option<Step>,
    /// VMCB01's IRET intercept is the library's.
    iret01: bool,
    /// L1's VMCB was gone when an event made L2 exit.
    shutdown: bool,
    /// L2 is at an IRET that unmasks virtual NMIs, at this RIP.
    pub(crate) vnmi_iret: Option<u64>,
    /// The V_IRQ of the VMCB in use is a window of the library's own.
    window: bool,
    /// Whether anything above wants attention before an entry: kept so that most entries test one byte.
    active: bool,
}

impl Events {
    const fn any(&self) -> bool {
        self.nmi || self.init || self.interrupt.is_some() || self.watches_iret() || self.shutdown
    }

    /// Parts that a saved state holds: pending NMI, pending INIT, pending interrupt, NMIs blocked.
    pub(crate) const fn parts(&self) -> (bool, bool, Option<u8>, bool) {
        (self.nmi, self.init, self.interrupt, !matches!(self.blocking, Blocking::Off))
    }

    /// From the parts of a saved state.
    pub(crate) const fn from_parts(nmi: bool, init: bool, interrupt: Option<u8>, blocked: bool) -> Self {
        let blocking = if blocked { Blocking::On } else { Blocking::Off };
        Self { nmi, init, interrupt, blocking, active: true, ..Self::NONE }
    }

    const NONE: Self = Self {
        nmi: false,
        init: false,
        interrupt: None,
        blocking: Blocking::Off,
        step: None,
        iret01: false,
        shutdown: false,
        vnmi_iret: None,
        window: false,
        active: false,
    };

    /// Something else wants attention before the next entry.
    pub(crate) const fn attend(&mut self, something: bool) {
        self.active |= something;
    }

    const fn watches_iret(&self) -> bool {
        matches!(self.blocking, Blocking::On)
    }

    /// Intercepts of vector 3 that VMCB01 has for the library's sake.
    #[inline]
    pub(crate) const fn watched_misc1(&self) -> u32 {
        if self.iret01 { misc1::IRET } else { 0 }
    }
}

/// What becomes of pending events before an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Go on; `soon` when something waits behind the event that is being injected.
    Run { soon: bool },
    /// INIT reaches L1.
    Init,
    /// L1's VMCB is gone.
    Shutdown,
}

impl NestedSvm {
    /// An NMI for L1. Held while GIF is clear or NMIs are blocked; further ones merge with it.
    #[inline]
    pub const fn pend_nmi(&mut self) {
        self.settled = Settled::No;
        self.events.nmi = true;
        self.events.active = true;
    }

    /// An INIT for L1. Held while GIF is clear; makes an L2 exit if L1 intercepts it.
    #[inline]
    pub const fn pend_init(&mut self) {
        self.settled = Settled::No;
        self.events.init = true;
        self.events.active = true;
    }

    /// Interrupt `vector` for L1, or `None` to withdraw it. For embedders that intercept physical interrupts; it
    /// replaces what was pending. [`pending_interrupt`](Self::pending_interrupt) tells when it
    /// went.
    #[inline]
    pub const fn pend_interrupt(&mut self, vector: Option<u8>) {
        self.settled = Settled::No;
        self.events.interrupt = vector;
        self.events.active = true;
    }

    /// The interrupt that still waits; `None` once it was injected.
    #[inline]
    pub const fn pending_interrupt(&self) -> Option<u8> {
        self.events.interrupt
    }

    /// True while L1's virtual interrupt is kept from L2: behind a window of the library's own, or GIF is clear.
    #[inline]
    pub(crate) fn withholds_virq(&self) -> bool {
        self.events.window || self.withholds_vnmi()
    }

    /// True while L1's virtual NMI is kept from L2: GIF is clear, the virtual one where software keeps it.
    #[inline]
    pub(crate) fn withholds_vnmi(&self) -> bool {
        let soft_gif_clear = self.control.int_ctl & int_ctl::V_GIF_ENABLE != 0
            && !self.hardware_vgif()
            && self.control.int_ctl & int_ctl::V_GIF == 0;
        soft_gif_clear || !self.gif
    }

    /// Routes what is pending.
    #[inline]
    pub(crate) fn deliver<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> Delivery {
        if !self.events.active {
            return Delivery::Run { soon: false };
        }
        let delivery = self.deliver_pending(m);
        let in_l2 = self.level == Level::L2;
        self.events.active = self.events.any() || (in_l2 && self.attends_vnmi());
        if in_l2 && self.watches_vnmi_iret() {
            m.vmcb02.control.intercepts.misc1 |= misc1::IRET;
        }
        if self.events.watches_iret() {
            self.events.iret01 |= self.level == Level::L1;
            current(self.level, m).control.intercepts.misc1 |= misc1::IRET;
        }
        delivery
    }

    #[cold]
    fn deliver_pending<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> Delivery {
        if self.events.shutdown || self.exit_for_event(m).is_err() {
            return Delivery::Shutdown;
        }
        if !self.gif {
            return Delivery::Run { soon: false };
        }
        if self.events.init {
            if self.vm_cr & VM_CR_R_INIT == 0 {
                self.events.init = false;
                return Delivery::Init;
            }
            let vmcb = current(self.level, m);
            if vmcb.control.event_inj & Event::VALID == 0 {
                self.events.init = false;
                vmcb.inject_exception(SX, Some(1));
            }
        }
        let behind = self.level == Level::L2 && self.deliver_vnmi(m.vmcb02);
        match self.inject_pending(m) {
            Delivery::Run { soon } => Delivery::Run { soon: soon || behind },
            other => other,
        }
    }

    /// Lets pending events end L2's run before it goes on; the level that [`prepare_entry`](Self::prepare_entry)
    /// enters then. For embedders that do something for a level before its entry, such as draining its flush queue.
    #[inline]
    pub fn route_events<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> Level {
        if self.events.active && self.exit_for_event(m).is_err() {
            self.events.shutdown = true;
        }
        self.level
    }

    fn exit_for_event<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> Result<(), MemoryError> {
        let Some(code) = self.wanted_exit(m) else { return Ok(()) };
        self.cancel_step(m.vmcb02);
        self.close_window();
        self.vmexit(m, Exit::simple(code))
    }

    /// The exit that a pending event makes L2 take, by priority: INIT, NMI, interrupt.
    fn wanted_exit<G: ?Sized, M: ?Sized, C: ?Sized>(&self, m: &Machine<'_, G, M, C>) -> Option<u64> {
        if self.level == Level::L1 || !self.gif {
            return None;
        }
        let wants = self.control.intercepts.misc1;
        if self.events.init && wants & misc1::INIT != 0 {
            return Some(exit_code::INIT);
        }
        if self.nmi_ready(m.vmcb02) && wants & misc1::NMI != 0 {
            return Some(exit_code::NMI);
        }
        let open = self.interrupts_open(m.vmcb01, m.vmcb02);
        (self.events.interrupt.is_some() && wants & misc1::INTR != 0 && open).then_some(exit_code::INTR)
    }

    /// True when a physical interrupt for L1 would be recognised in the level that runs.
    fn interrupts_open(&self, vmcb01: &Vmcb, vmcb02: &Vmcb) -> bool {
        match self.level {
            Level::L2 if self.control.int_ctl & int_ctl::V_INTR_MASKING != 0 => Self::l1_if(vmcb01),
            Level::L2 => if_open(vmcb02),
            Level::L1 => if_open(vmcb01),
        }
    }

    const fn nmi_ready(&self, vmcb: &Vmcb) -> bool {
        let unblocked = match self.events.blocking {
            Blocking::Off => true,
            Blocking::On => false,
            Blocking::AtIret(rip) => vmcb.save.rip != rip,
        };
        self.events.nmi && unblocked
    }

    /// An IRET that has been executed since its exit has ended the blocking of NMIs: from here on that is so whatever
    /// RIP becomes.
    pub(crate) fn settle_blocking(&mut self, vmcb: &Vmcb) {
        if let Blocking::AtIret(rip) = self.events.blocking
            && vmcb.save.rip != rip
        {
            self.events.blocking = Blocking::Off;
        }
    }

    /// Injects an NMI or interrupt into the level that runs, or arranges to be back as soon as that is possible.
    fn inject_pending<G: ?Sized, M: ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>) -> Delivery {
        let open = self.interrupts_open(m.vmcb01, m.vmcb02);
        let vmcb = current(self.level, m);
        if vmcb.control.event_inj & Event::VALID != 0 {
            // Behind an event that goes first: be back right after it.
            let soon = self.events.nmi || self.events.interrupt.is_some();
            return Delivery::Run { soon };
        }
        if self.events.nmi {
            let shadow = vmcb.control.int_state & int_state::SHADOW != 0;
            if self.nmi_ready(vmcb) && !shadow {
                self.cancel_step(vmcb);
                self.events.nmi = false;
                self.events.blocking = Blocking::On;
                vmcb.control.event_inj = Event::nmi().raw();
                return Delivery::Run { soon: self.events.interrupt.is_some() };
            }
            if !self.events.watches_iret() {
                self.start_step(vmcb);
            }
        }
        if let Some(vector) = self.events.interrupt {
            if open {
                self.events.interrupt = None;
                vmcb.control.event_inj = Event::interrupt(vector).raw();
                return Delivery::Run { soon: false };
            }
            // With V_INTR_MASKING it waits for L1's own RFLAGS.IF, not for L2's.
            self.events.window = self.level == Level::L1 || self.control.int_ctl & int_ctl::V_INTR_MASKING == 0;
        }
        Delivery::Run { soon: false }
    }

    /// True when something waits that is to be looked at before every entry.
    pub(crate) const fn attends(&self) -> bool {
        self.events.active || self.events.window
    }

    /// True when a window for an interrupt is to be open in the VMCB that runs next.
    #[inline]
    pub(crate) const fn window(&self) -> bool {
        self.events.window
    }

    /// The window did its work, or its level stopped running.
    #[inline]
    pub(crate) const fn close_window(&mut self) {
        self.events.window = false;
    }

    pub(crate) fn start_step(&mut self, vmcb: &mut Vmcb) {
        if self.events.step.is_none() {
            self.events.step = Some(Step {
                tf: vmcb.save.rflags & rflags::TF != 0,
                intercepted: vmcb.control.intercepts.exceptions & 1 << DB != 0,
            });
            vmcb.save.rflags |= rflags::TF;
            vmcb.control.intercepts.exceptions |= 1 << DB;
        }
    }

    /// Takes the library's own single step out of `vmcb`, which stops running or has done it.
    pub(crate) const fn cancel_step(&mut self, vmcb: &mut Vmcb) {
        if let Some(step) = self.events.step.take() {
            if !step.tf {
                vmcb.save.rflags &= !rflags::TF;
            }
            if !step.intercepted {
                vmcb.control.intercepts.exceptions &= !(1 << DB);
            }
        }
    }

    /// Takes the library's own intercept out of VMCB01; the next entry puts it back where it is needed.
    pub(crate) const fn unwatch_l1(&mut self, vmcb01: &mut Vmcb) {
        self.settled = Settled::No;
        if self.events.iret01 {
            self.events.iret01 = false;
            vmcb01.control.intercepts.misc1 &= !misc1::IRET;
        }
    }

    /// An exit that the library caused for its own ends: IRET watch, single step, interrupt window. `true` when it was
    /// and nobody else has a use for it.
    #[inline]
    pub(crate) fn own_exit(&mut self, vmcb: &mut Vmcb, code: u64) -> bool {
        match code {
            exit_code::IRET if self.events.watches_iret() || self.events.iret01 || self.in_l2_watching_iret() => {
                self.iret_reached(vmcb)
            }
            exit_code::VINTR if self.events.window => {
                self.settled = Settled::No;
                self.events.window = false;
                true
            }
            DB_EXIT if self.events.step.is_some() => self.step_done(vmcb),
            _ => false,
        }
    }

    fn in_l2_watching_iret(&self) -> bool {
        self.level == Level::L2 && self.watches_vnmi_iret()
    }

    /// The guest is about to execute IRET, which ends the blocking of NMIs.
    #[cold]
    fn iret_reached(&mut self, vmcb: &mut Vmcb) -> bool {
        self.settled = Settled::No;
        if self.events.watches_iret() {
            self.events.blocking = Blocking::AtIret(vmcb.save.rip);
        }
        if self.level == Level::L2 {
            self.vnmi_iret_reached(vmcb.save.rip);
        }
        let l1_wants = self.level == Level::L2 && self.control.intercepts.misc1 & misc1::IRET != 0;
        if !l1_wants {
            vmcb.control.intercepts.misc1 &= !misc1::IRET;
        }
        if self.level == Level::L1 {
            self.events.iret01 = false;
        }
        !l1_wants
    }

    #[cold]
    fn step_done(&mut self, vmcb: &mut Vmcb) -> bool {
        self.settled = Settled::No;
        let Some(step) = self.events.step else { return false };
        if self.events.vnmi_iret.is_some() || matches!(self.events.blocking, Blocking::AtIret(_)) {
            // IRET loaded RFLAGS: TF is the guest's.
            self.events.step = Some(Step { tf: true, ..step });
            self.settle_vnmi(vmcb);
            self.events.blocking = match self.events.blocking {
                Blocking::AtIret(_) => Blocking::Off,
                other => other,
            };
        }
        self.cancel_step(vmcb);
        if !step.tf {
            vmcb.save.dr6 &= !DR6_BS;
            return true;
        }
        // The guest steps itself: this trap is its own, or belongs to whoever intercepts #DB.
        if !step.intercepted {
            vmcb.inject_exception(DB, None);
        }
        !step.intercepted
    }
}

const DB_EXIT: u64 = exit_code::EXCEPTION | DB as u64;

const fn if_open(vmcb: &Vmcb) -> bool {
    vmcb.save.rflags & rflags::IF != 0 && vmcb.control.int_state & int_state::SHADOW == 0
}

/// The VMCB of the level that runs.
fn current<'a, G: ?Sized, M: ?Sized, C: ?Sized>(level: Level, m: &'a mut Machine<'_, G, M, C>) -> &'a mut Vmcb {
    match level {
        Level::L1 => m.vmcb01,
        Level::L2 => m.vmcb02,
    }
}
