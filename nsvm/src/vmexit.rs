//! #VMEXIT to L1: L2's state goes to L1's VMCB, L1's state comes back.
//!
//! L1's own state is in VMCB01 all the while, as VMRUN left it, so nothing is copied back but what the processor
//! does not restore either.

use hvcore::addr::{L1Gpa, Level};
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::IntoBytes;

use crate::caps::Features;
use crate::exit_code;
use crate::machine::Machine;
use crate::state::{NestedSvm, Settled};
use crate::view::View;
use crate::vmcb::bits::{DR7_RESET, Event, cr4, int_ctl, int_state, np, rflags, virt_ext};
use crate::vmcb::{SAVE_OFFSET, Save, Vmcb};

/// What L1 is told about an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// EXITCODE.
    pub code: u64,
    /// EXITINFO1.
    pub info_1: u64,
    /// EXITINFO2.
    pub info_2: u64,
}

impl Exit {
    /// An exit without information.
    #[inline]
    pub const fn simple(code: u64) -> Self {
        Self { code, info_1: 0, info_2: 0 }
    }
}

impl NestedSvm {
    /// Ends L2's run with `exit`. L1 runs next, with GIF clear.
    ///
    /// # Errors
    /// L1's VMCB is not writable any more. L1's state is back nevertheless; the processor would shut down.
    pub(crate) fn vmexit<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        exit: Exit,
    ) -> Result<(), MemoryError> {
        self.settle_vnmi(m.vmcb02);
        self.events.vnmi_iret = None;
        let stored = self.vmcb12.map_or(Err(MemoryError), |gpa| self.store(m.memory, m.vmcb02, gpa, exit));
        if stored.is_err() {
            self.vmcb12 = None;
        }
        self.back_to_l1(m);
        stored
    }

    /// VMRUN failed: L1 sees exit code -1 and nothing else of L2.
    pub(crate) fn refuse<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        gpa: u64,
    ) -> Result<(), MemoryError> {
        let stored = Self::store_exit(m.memory, gpa, &[exit_code::INVALID, 0, 0, 0])
            .and_then(|()| m.memory.write_u64(L1Gpa::new(gpa.wrapping_add(0xA8)), 0));
        self.vmcb12 = None;
        self.leave(m.vmcb01);
        stored
    }

    fn store_exit<M: GuestMemory + ?Sized>(memory: &M, gpa: u64, exit: &[u64; 4]) -> Result<(), MemoryError> {
        memory.write(L1Gpa::new(gpa.wrapping_add(0x70)), exit.as_bytes())
    }

    /// Writes L2's state and the exit to L1's VMCB.
    fn store<M: GuestMemory + ?Sized>(
        &mut self,
        memory: &M,
        vmcb02: &Vmcb,
        gpa: u64,
        exit: Exit,
    ) -> Result<(), MemoryError> {
        let view = View::new(memory, gpa);
        self.store_save(&view, &vmcb02.save)?;
        let control = &vmcb02.control;
        let head = [
            self.control.int_ctl,
            control.int_state & int_state::SHADOW,
            exit.code,
            exit.info_1,
            exit.info_2,
            Self::interrupted_event(vmcb02),
        ];
        view.write::<0x60>(head.as_bytes())?;
        if self.control.event_inj & Event::VALID != 0 {
            view.write::<0xA8>(&[0; 8])?;
        }
        if self.config.offered.has(Features::NRIPS) {
            // An exit that is not the processor's own came at no instruction.
            let none = [0; 24];
            let own = exit.code == control.exit_code;
            let tail = if own { control.as_bytes().get(0xC8..0xE0).unwrap_or_default() } else { &none };
            let len = if self.config.offered.has(Features::DECODE_ASSISTS) { 24 } else { 8 };
            view.write::<0xC8>(tail.get(..len).unwrap_or_default())?;
        }
        Ok(())
    }

    /// The event whose delivery the exit cut short, or that was to be injected and was not.
    fn interrupted_event(vmcb02: &Vmcb) -> u64 {
        let control = &vmcb02.control;
        if control.event_inj & Event::VALID != 0 {
            return control.event_inj;
        }
        if control.exit_int_info & Event::VALID == 0 {
            return 0;
        }
        Event::from_raw(control.exit_int_info).corrected().raw()
    }

    /// L1's view of the interrupt control: its own bits, with what the processor changes brought up to date.
    pub(crate) fn int_ctl_for_l1(&self, now: u64) -> u64 {
        let mut changed = int_ctl::V_IRQ;
        if self.control.int_ctl & int_ctl::V_INTR_MASKING != 0 {
            changed |= int_ctl::V_TPR;
        }
        if self.hardware_vgif() {
            changed |= int_ctl::V_GIF;
        }
        if self.hardware_vnmi() {
            changed |= int_ctl::V_NMI | int_ctl::V_NMI_MASK;
        }
        if self.withholds_virq() {
            changed &= !int_ctl::V_IRQ;
        }
        if self.withholds_vnmi() {
            changed &= !int_ctl::V_NMI;
        }
        self.control.int_ctl & !changed | now & changed
    }

    /// Writes the groups of the state save area that changed.
    fn store_save<M: GuestMemory + ?Sized>(&mut self, view: &View<'_, M>, from: &Save) -> Result<(), MemoryError> {
        let all = self.memory_stale;
        self.memory_stale = false;
        let to = &mut self.memory_save;
        if all || (to.es, to.cs, to.ss, to.ds) != (from.es, from.cs, from.ss, from.ds) {
            (to.es, to.cs, to.ss, to.ds) = (from.es, from.cs, from.ss, from.ds);
            view.write_save::<0x400, 0x440>(to)?;
        }
        if all || to.gdtr != from.gdtr {
            to.gdtr = from.gdtr;
            view.write_save::<0x460, 0x470>(to)?;
        }
        if all || to.idtr != from.idtr {
            to.idtr = from.idtr;
            view.write_save::<0x480, 0x490>(to)?;
        }
        if all || (to.cpl, to.efer) != (from.cpl, from.efer) {
            (to.cpl, to.efer) = (from.cpl, from.efer);
            view.write_save::<0x4C8, 0x4D8>(to)?;
        }
        (to.cr4, to.cr3, to.cr0) = (from.cr4, from.cr3, from.cr0);
        (to.dr7, to.dr6) = (from.dr7, from.dr6);
        (to.rflags, to.rip) = (from.rflags, from.rip);
        view.write_save::<0x548, 0x580>(to)?;
        if to.cr4 & cr4::CET != 0 {
            (to.s_cet, to.ssp, to.isst_addr) = (from.s_cet, from.ssp, from.isst_addr);
        }
        if all || (to.rsp, to.rax) != (from.rsp, from.rax) || to.cr4 & cr4::CET != 0 {
            (to.rsp, to.rax) = (from.rsp, from.rax);
            view.write_save::<0x5D8, 0x600>(to)?;
        }
        if all || to.cr2 != from.cr2 {
            to.cr2 = from.cr2;
            view.write_save::<0x640, 0x648>(to)?;
        }
        if self.control.np_control & np::ENABLE != 0 && (all || to.g_pat != from.g_pat) {
            to.g_pat = from.g_pat;
            view.write_save::<0x668, 0x670>(to)?;
        }
        if self.control.virt_ext & virt_ext::LBR != 0 {
            to.set_branches(from);
            view.write_save::<0x670, 0x698>(to)?;
        }
        Ok(())
    }

    /// L1's state after a #VMEXIT (APM section 15.6). What VMRUN and #VMEXIT do not switch carries over.
    fn back_to_l1<G: ?Sized, M: ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>) {
        m.vmcb01.save.cr2 = m.vmcb02.save.cr2;
        m.vmcb01.save.dr6 = m.vmcb02.save.dr6;
        if self.control.np_control & np::ENABLE == 0 {
            m.vmcb01.save.g_pat = m.vmcb02.save.g_pat;
        }
        if self.control.virt_ext & virt_ext::LBR == 0 && m.vmcb01.control.virt_ext & virt_ext::LBR != 0 {
            m.vmcb01.save.set_branches(&m.vmcb02.save);
        }
        m.vmcb02.control.event_inj = 0;
        m.vmcb02.control.exit_int_info = 0;
        self.leave(m.vmcb01);
    }

    /// L1 runs next, after its VMRUN, with GIF clear.
    fn leave(&mut self, vmcb01: &mut Vmcb) {
        self.settled = Settled::No;
        self.level = Level::L1;
        self.gif = false;
        self.injected = 0;
        vmcb01.save.dr7 = DR7_RESET;
        vmcb01.save.cpl = 0;
        vmcb01.save.rflags &= !rflags::VM;
        vmcb01.control.event_inj = 0;
        vmcb01.control.exit_int_info = 0;
        // RIP is past the VMRUN since it was executed; a single-step trap of VMRUN comes now.
        vmcb01.complete_instruction(vmcb01.save.rip);
    }
}

const _: () = assert!(SAVE_OFFSET == 0x400);
