//! The last step before every VMRUN of the embedder: events, ASID, TLB_CONTROL, interrupt control.

use hvcore::addr::Level;
use hvcore::memory::GuestMemory;

use crate::asid::AsidPool;
use crate::events::Delivery;
use crate::machine::Machine;
use crate::state::{NestedSvm, Settled};
use crate::vmcb::Vmcb;
use crate::vmcb::bits::{Event, EventKind, int_ctl, misc1, tlb};

/// How to run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPlan {
    /// Which VMCB: VMCB01 for L1, VMCB02 for L2.
    pub level: Level,
    /// RFLAGS.IF of the embedder at VMRUN (after CLGI): with V_INTR_MASKING it decides whether physical interrupts
    /// are recognised while the guest runs.
    pub host_if: bool,
    /// V_TPR of the VMCB stands for the real CR8 in this run: set it from CR8 before VMRUN, and CR8 from it after.
    pub sync_tpr: bool,
    /// Something waits behind the event that this entry injects: send the CPU an NMI of the embedder's own before
    /// VMRUN (GIF is clear, so it is taken right after the injection).
    pub exit_soon: bool,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Run the guest so.
    Run(EntryPlan),
    /// INIT reaches L1: put VMCB01 in the reset state, call [`NestedSvm::reset`] and wait for SIPI.
    Init,
    /// L1 shuts down: its VMCB is gone.
    Shutdown,
}

impl NestedSvm {
    /// True when the next entry is the last one over again: the guest of `level` has left, nothing has happened since
    /// that an entry depends on (but for its tag), and the plan of the last [`prepare_entry`](Self::prepare_entry)
    /// holds. Then [`repeat_entry`](Self::repeat_entry) may stand for [`route_events`](Self::route_events) and
    /// `prepare_entry`.
    ///
    /// Most exits are so; an embedder that asks need not decide anew what it decided by the plan.
    #[inline(always)]
    pub fn may_repeat<G: ?Sized, M: ?Sized, C: ?Sized>(&self, m: &Machine<'_, G, M, C>, level: Level) -> bool {
        let vmcb = match level {
            Level::L1 => &*m.vmcb01,
            Level::L2 => &*m.vmcb02,
        };
        self.settled == Settled::Yes && vmcb.control.exit_int_info & Event::VALID == 0
    }

    /// Prepares the VMCB of `level` for the entry that [`may_repeat`](Self::may_repeat) was true for: ASID and
    /// TLB_CONTROL. [`retire_tag`](Self::retire_tag) may have been called in between, and nothing else.
    #[inline(always)]
    pub fn repeat_entry<G: ?Sized, M: ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>, level: Level) {
        let (vmcb, tag) = match level {
            Level::L1 => (&mut *m.vmcb01, &self.tag1),
            Level::L2 => (&mut *m.vmcb02, &self.tag2),
        };
        if m.asids.is_good(tag) {
            vmcb.control.tlb_control = tlb::NONE;
        } else {
            self.assign(m.asids, vmcb, level);
            self.settled = Settled::Prepared;
        }
    }

    fn assign(&mut self, asids: &mut AsidPool, vmcb: &mut Vmcb, level: Level) {
        let assigned = asids.assign(match level {
            Level::L1 => &mut self.tag1,
            Level::L2 => &mut self.tag2,
        });
        vmcb.control.asid = assigned.asid;
        vmcb.control.tlb_control = assigned.tlb_control;
    }

    /// Prepares the VMCB that runs next. Call it once before every VMRUN, with everything else in place, unless
    /// [`repeat_entry`](Self::repeat_entry) stands for it.
    pub fn prepare_entry<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> Entry {
        self.settled = Settled::No;
        match self.level {
            Level::L1 => reinject(m.vmcb01, 0, 0),
            Level::L2 => reinject(m.vmcb02, self.injected, self.control.next_rip),
        }
        let exit_soon = match self.deliver(m) {
            Delivery::Run { soon } => soon,
            Delivery::Init => return Entry::Init,
            Delivery::Shutdown => return Entry::Shutdown,
        };
        let passed_through = m.vmcb01.control.intercepts.misc1 & misc1::INTR == 0;
        let mut plan = match self.level {
            Level::L1 => self.enter_l1(m.vmcb01, passed_through),
            Level::L2 => self.enter_l2(m.vmcb01, m.vmcb02, passed_through),
        };
        plan.exit_soon = exit_soon;
        let vmcb = match self.level {
            Level::L1 => &mut *m.vmcb01,
            Level::L2 => &mut *m.vmcb02,
        };
        self.assign(m.asids, vmcb, self.level);
        vmcb.control.clean = 0;
        // An event that waits, or a window for one, is looked at before every entry.
        self.settled = if exit_soon || self.attends() { Settled::No } else { Settled::Prepared };
        Entry::Run(plan)
    }

    /// The guest has left for the first time since an entry was prepared.
    #[inline(never)]
    pub(crate) fn entered(&mut self, asids: &mut AsidPool) {
        asids.entered(match self.level {
            Level::L1 => &mut self.tag1,
            Level::L2 => &mut self.tag2,
        });
        if self.settled == Settled::Prepared {
            self.settled = Settled::Yes;
        }
    }

    fn enter_l1(&self, vmcb01: &mut Vmcb, passed_through: bool) -> EntryPlan {
        let control = &mut vmcb01.control;
        if passed_through {
            // While L1's GIF is clear, physical interrupts are held by the embedder's clear RFLAGS.IF.
            if self.gif {
                control.int_ctl &= !int_ctl::V_INTR_MASKING;
            } else {
                control.int_ctl |= int_ctl::V_INTR_MASKING;
            }
        }
        if self.window() {
            control.int_ctl |= WINDOW;
            control.intercepts.misc1 |= misc1::VINTR;
        } else if control.intercepts.misc1 & misc1::VINTR != 0 {
            control.int_ctl &= !WINDOW;
            control.intercepts.misc1 &= !misc1::VINTR;
        }
        let masked = passed_through && !self.gif;
        EntryPlan { level: Level::L1, host_if: !masked, sync_tpr: masked, exit_soon: false }
    }

    fn enter_l2(&self, vmcb01: &Vmcb, vmcb02: &mut Vmcb, passed_through: bool) -> EntryPlan {
        let l1 = self.control.int_ctl;
        let mut value = l1 & (int_ctl::V_INTR_PRIO | int_ctl::V_IGN_TPR | int_ctl::V_INTR_VECTOR);
        value |= if l1 & int_ctl::V_INTR_MASKING != 0 { l1 } else { vmcb01.control.int_ctl } & int_ctl::V_TPR;
        if self.hardware_vgif() {
            value |= l1 & (int_ctl::V_GIF | int_ctl::V_GIF_ENABLE);
        }
        if !self.withholds_virq() {
            value |= l1 & int_ctl::V_IRQ;
        }
        if self.hardware_vnmi() {
            let pending = if self.withholds_vnmi() { 0 } else { int_ctl::V_NMI };
            value |= l1 & (int_ctl::V_NMI_ENABLE | int_ctl::V_NMI_MASK | pending);
        }
        let control = &mut vmcb02.control;
        control.intercepts.misc1 &= !misc1::VINTR;
        control.intercepts.misc1 |= self.control.intercepts.misc1 & misc1::VINTR;
        if self.window() {
            value |= WINDOW;
            control.intercepts.misc1 |= misc1::VINTR;
        }
        // GIF is clear in L2 only after a CLGI that L1 did not intercept.
        let held = passed_through && !self.gif;
        let masking = !passed_through || held || l1 & int_ctl::V_INTR_MASKING != 0;
        if masking {
            value |= int_ctl::V_INTR_MASKING;
        }
        control.int_ctl = value;
        let host_if = if passed_through { !held && Self::l1_if(vmcb01) } else { true };
        let sync_tpr = held && l1 & int_ctl::V_INTR_MASKING == 0;
        EntryPlan { level: Level::L2, host_if, sync_tpr, exit_soon: false }
    }
}

/// A virtual interrupt of highest priority that is intercepted before it is taken.
const WINDOW: u64 = int_ctl::V_IRQ | int_ctl::V_INTR_PRIO | int_ctl::V_IGN_TPR;

/// Injects again what the last exit kept from being delivered. `injected` is the event of L1's own VMRUN, `next_rip` the
/// RIP that it pushes if it is a software one.
fn reinject(vmcb: &mut Vmcb, injected: u64, next_rip: u64) {
    let control = &mut vmcb.control;
    if control.exit_int_info & Event::VALID == 0 {
        return;
    }
    let event = Event::from_raw(control.exit_int_info).corrected();
    control.exit_int_info = 0;
    // INTn, INT3 and INTO that the guest executed are executed again: RIP is still at the instruction. If they were
    // injected there is no instruction, and they are injected again.
    let software = event.kind() == Some(EventKind::Software)
        || (event.kind() == Some(EventKind::Exception) && matches!(event.vector(), 3 | 4));
    let repeated = software && event.raw() != injected;
    if control.event_inj & Event::VALID == 0 && !repeated {
        control.event_inj = event.raw();
        if software {
            // The exit overwrote it.
            control.next_rip = next_rip;
        }
    }
}
