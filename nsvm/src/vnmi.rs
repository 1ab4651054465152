//! L1's virtual NMIs for L2 on a processor that has none of them (APM volume 2, section 15.21.10).
//!
//! V_NMI and V_NMI_MASK are kept in the copy of L1's interrupt control. A pending one is injected as soon as nothing is
//! in its way; the mask goes when L2 has executed IRET, which is found by the IRET intercept and, with another NMI
//! pending, one single step. Called by the entry, by exits and when the state is saved.

use crate::caps::Features;
use crate::state::NestedSvm;
use crate::vmcb::Vmcb;
use crate::vmcb::bits::{Event, int_ctl, int_state};

impl NestedSvm {
    /// True when L1 uses virtual NMIs and the processor keeps them.
    #[inline]
    pub(crate) const fn hardware_vnmi(&self) -> bool {
        self.control.int_ctl & int_ctl::V_NMI_ENABLE != 0 && self.config.host.features.has(Features::VNMI)
    }

    /// V_NMI and V_NMI_MASK as far as software keeps them.
    #[inline]
    const fn soft_vnmi(&self) -> u64 {
        if self.control.int_ctl & int_ctl::V_NMI_ENABLE == 0 || self.config.host.features.has(Features::VNMI) {
            return 0;
        }
        self.control.int_ctl & (int_ctl::V_NMI | int_ctl::V_NMI_MASK)
    }

    /// True when an entry of L2 has virtual NMIs to look after.
    #[inline]
    pub(crate) const fn attends_vnmi(&self) -> bool {
        self.soft_vnmi() != 0
    }

    /// True when L2's next IRET is of interest.
    #[inline]
    pub(crate) const fn watches_vnmi_iret(&self) -> bool {
        self.soft_vnmi() & int_ctl::V_NMI_MASK != 0 && self.events.vnmi_iret.is_none()
    }

    /// L2 is about to execute the IRET at `rip`.
    pub(crate) const fn vnmi_iret_reached(&mut self, rip: u64) {
        if self.watches_vnmi_iret() {
            self.events.vnmi_iret = Some(rip);
        }
    }

    /// An IRET that has been executed since its exit has unmasked virtual NMIs.
    pub(crate) fn settle_vnmi(&mut self, vmcb02: &Vmcb) {
        if self.events.vnmi_iret.is_some_and(|rip| vmcb02.save.rip != rip) {
            self.events.vnmi_iret = None;
            self.control.int_ctl &= !int_ctl::V_NMI_MASK;
        }
    }

    /// Injects a pending virtual NMI, or arranges to be back when that is possible. True to be back right after what is
    /// being injected.
    pub(crate) fn deliver_vnmi(&mut self, vmcb02: &mut Vmcb) -> bool {
        self.settle_vnmi(vmcb02);
        let state = self.soft_vnmi();
        if state & int_ctl::V_NMI == 0 || self.withholds_vnmi() {
            return false;
        }
        if vmcb02.control.event_inj & Event::VALID != 0 {
            return state & int_ctl::V_NMI_MASK == 0;
        }
        let masked = state & int_ctl::V_NMI_MASK != 0;
        if masked || vmcb02.control.int_state & int_state::SHADOW != 0 {
            if !masked || self.events.vnmi_iret.is_some() {
                self.start_step(vmcb02);
            }
            return false;
        }
        self.cancel_step(vmcb02);
        vmcb02.control.event_inj = Event::nmi().raw();
        self.control.int_ctl = self.control.int_ctl & !int_ctl::V_NMI | int_ctl::V_NMI_MASK;
        false
    }
}
