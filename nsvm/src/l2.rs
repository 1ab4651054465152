//! Exits of L2: what L0 keeps, then what L1 wants, then what is left for the embedder.

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::memory::{Access, GuestMemory};

use crate::exit_code;
use crate::fault::Fault;
use crate::insn::Kind;
use crate::l1::{address, step, vmload, vmsave};
use crate::machine::{Code, Gprs, Machine};
use crate::maps::Bits;
use crate::msr::MsrAccess;
use crate::npt::{self, NptFormat, WalkFault};
use crate::state::{NestedSvm, Settled};
use crate::vmcb::bits::{Event, int_ctl, misc1, np};
use crate::vmcb::{EnlightenedVmcbFields, Vmcb};
use crate::vmexit::Exit;

/// What the embedder does after an exit of L2.
// The plainest layout: what is told apart at every exit is one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum L2Exit {
    /// Dealt with: L2 goes on. Call [`NestedSvm::prepare_entry`].
    Resume,
    /// L1's VMCB tells of the exit, VMCB01 holds L1's state, GIF is clear: L1 goes on.
    ToL1,
    /// The embedder's own exit, in VMCB02: its interrupt or NMI, an intercept of its own.
    Embedder,
    /// A nested page fault in L1's nested paging: ask the shadow page tables. The answer is to resume,
    /// [`NestedSvm::exit_to_l1`] with [`exit_code::NPF`], or the embedder's own fault on an L1 GPA.
    NestedPageFault {
        /// The faulting address.
        gpa: L2Gpa,
        /// EXITINFO1.
        error_code: u64,
    },
    /// L1 uses no nested paging, so L2's physical addresses are L1's: a fault of the embedder's own second stage.
    L1PageFault {
        /// The faulting address.
        gpa: L1Gpa,
        /// EXITINFO1.
        error_code: u64,
    },
    /// A hypercall that L0 takes. Run it, put its result in the registers, then step L2 over it with
    /// [`Vmcb::complete_instruction`] and, if the TLB is locked, call [`NestedSvm::synthetic_exit`].
    DirectFlush {
        /// RIP past the VMMCALL.
        next_rip: u64,
    },
    /// L2 executed INVLPGA for `asid` and L1 does not intercept it: as [`crate::L1Exit::InvalidateAsid`].
    InvalidateAsid {
        /// L1's ASID, not 0.
        asid: u32,
    },
    /// L1 shuts down: its VMCB is gone.
    Shutdown,
}

/// What the processor changes in the interrupt control.
const CHANGEABLE: u64 = int_ctl::V_TPR | int_ctl::V_IRQ | int_ctl::V_GIF | int_ctl::V_NMI | int_ctl::V_NMI_MASK;

impl NestedSvm {
    /// Deals with an exit of L2. VMCB02 has just run.
    ///
    /// `direct` says whether L0 takes the hypercall whose input value it is given, for a caller with these enlightened
    /// fields; it is asked only when NestedFlushVirtualHypercall is set in them.
    pub fn l2_exit<G, M, C>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        direct: impl FnOnce(&EnlightenedVmcbFields, &Vmcb, &G) -> bool,
    ) -> L2Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let code = m.vmcb02.control.exit_code;
        m.vmcb02.control.event_inj = 0;
        if exit_code::is_invalid(code) {
            // A check that the processor has and the library lacks: L1's VMCB is at fault.
            return self.exit_to_l1(m, Exit::simple(exit_code::INVALID));
        }
        if m.asids.is_prepared() {
            self.entered(m.asids);
        }
        self.sync(m.vmcb01, m.vmcb02);
        // The events first, which are L0's or L1's but never L2's; then what needs more than an intercept bit.
        match code {
            exit_code::NPF => self.nested_page_fault(m),
            exit_code::INTR if m.vmcb01.control.intercepts.misc1 & misc1::INTR != 0 => L2Exit::Embedder,
            exit_code::NMI if m.vmcb01.control.intercepts.misc1 & misc1::NMI != 0 => L2Exit::Embedder,
            exit_code::INIT if m.vmcb01.control.intercepts.misc1 & misc1::INIT != 0 => L2Exit::Embedder,
            exit_code::MSR => self.l2_msr(m),
            exit_code::IOIO => self.l2_io(m),
            exit_code::VMMCALL => self.l2_vmmcall(m, direct),
            _ if self.own_exit(m.vmcb02, code) => L2Exit::Resume,
            _ if Self::embedder_keeps(m.vmcb01, code) => L2Exit::Embedder,
            _ if self.l1_wants(code) => self.reflect(m),
            _ => self.l2_unwanted(m, code),
        }
    }

    /// Takes over what the processor changed in VMCB02's interrupt control.
    fn sync(&mut self, vmcb01: &mut Vmcb, vmcb02: &Vmcb) {
        let now = vmcb02.control.int_ctl;
        if vmcb02.control.exit_int_info & Event::VALID == 0 {
            self.injected = 0;
        }
        // What the processor changes there, and L1's V_TPR, most often are what they were.
        if (now ^ self.control.int_ctl) & CHANGEABLE | (now ^ vmcb01.control.int_ctl) & int_ctl::V_TPR == 0 {
            return;
        }
        // V_TPR of VMCB01 is L1's CR8 for an embedder that masks interrupts itself; L2 shares it unless L1 masks.
        self.control.int_ctl = self.int_ctl_for_l1(now);
        if self.control.int_ctl & int_ctl::V_INTR_MASKING == 0 {
            vmcb01.control.int_ctl = vmcb01.control.int_ctl & !int_ctl::V_TPR | now & int_ctl::V_TPR;
        }
    }

    /// Exceptions that the embedder intercepts in L1 are its own in L2 too. If it has no use for one it calls
    /// [`reflect`](Self::reflect).
    fn embedder_keeps(vmcb01: &Vmcb, code: u64) -> bool {
        matches!(code, 0x40..=0x5F) && vmcb01.control.intercepts.exceptions >> (code & 31) & 1 != 0
    }

    /// True when L1's intercepts name `code`.
    pub(crate) const fn l1_wants(&self, code: u64) -> bool {
        let wants = &self.control.intercepts;
        let (vector, bit) = match code {
            0x000..=0x01F => (wants.cr, code),
            0x020..=0x03F => (wants.dr, code),
            0x040..=0x05F => (wants.exceptions, code),
            0x060..=0x07F => (wants.misc1, code),
            0x080..=0x09F => (wants.misc2, code),
            0x0A0..=0x0BF => (wants.misc3, code),
            _ => return false,
        };
        vector >> (bit & 31) & 1 != 0
    }

    /// Tells L1 of the exit in VMCB02 as it stands.
    pub fn reflect<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>) -> L2Exit {
        let control = &m.vmcb02.control;
        let exit = Exit { code: control.exit_code, info_1: control.exit_info_1, info_2: control.exit_info_2 };
        self.exit_to_l1(m, exit)
    }

    /// Ends L2's run: L1 sees `exit`.
    pub fn exit_to_l1<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        exit: Exit,
    ) -> L2Exit {
        self.cancel_step(m.vmcb02);
        self.close_window();
        match self.vmexit(m, exit) {
            Ok(()) => L2Exit::ToL1,
            Err(_) => L2Exit::Shutdown,
        }
    }

    /// The exit that Hyper-V synthesizes after a direct flush while the caller's TLB is locked. RIP is past the call
    /// already.
    pub fn synthetic_exit<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
    ) -> L2Exit {
        self.exit_to_l1(m, Exit { code: exit_code::SYNTHETIC, info_1: exit_code::SYNTHETIC_FLUSH, info_2: 0 })
    }

    /// Raises an exception in L2, which L1 may intercept.
    pub fn raise_in_l2<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        fault: Fault,
    ) -> L2Exit {
        if self.control.intercepts.exceptions >> (fault.vector & 31) & 1 != 0 {
            let code = exit_code::EXCEPTION | u64::from(fault.vector & 31);
            let info_1 = u64::from(fault.error_code.unwrap_or_default());
            return self.exit_to_l1(m, Exit { code, info_1, info_2: 0 });
        }
        m.vmcb02.inject_exception(fault.vector, fault.error_code);
        L2Exit::Resume
    }

    fn nested_page_fault<G: ?Sized, M: ?Sized, C: ?Sized>(&self, m: &Machine<'_, G, M, C>) -> L2Exit {
        let error_code = m.vmcb02.control.exit_info_1;
        let gpa = m.vmcb02.control.exit_info_2;
        if self.control.np_control & np::ENABLE != 0 {
            L2Exit::NestedPageFault { gpa: L2Gpa::new(gpa), error_code }
        } else {
            L2Exit::L1PageFault { gpa: L1Gpa::new(gpa), error_code }
        }
    }

    fn l2_msr<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L2Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let write = m.vmcb02.control.exit_info_1 & 1 != 0;
        let index = m.gprs.rcx() as u32;
        let bits = Bits::of_msr(index, write);
        let base = self.control.msrpm_base & !0xFFF;
        if self.control.intercepts.misc1 & misc1::MSR_PROT != 0
            && bits.is_none_or(|bits| bits.wanted_by_l1(m.memory, base))
        {
            return self.reflect(m);
        }
        if MsrAccess::is_ours(&self.config, index) {
            let kind = if write { Kind::Wrmsr } else { Kind::Rdmsr };
            let Some(stepped) = step(m.code, Level::L2, m.vmcb02, kind, self.nrips()) else {
                return L2Exit::Resume;
            };
            return match self.access_msr(m.vmcb02, m.gprs, index, write) {
                Ok(()) => {
                    // TSC_RATIO may have changed.
                    m.vmcb02.control.tsc_offset = self.tsc_offset(m.vmcb01.control.tsc_offset);
                    m.vmcb02.complete_instruction(stepped.next_rip());
                    L2Exit::Resume
                }
                Err(fault) => self.raise_in_l2(m, fault),
            };
        }
        match bits {
            Some(bits) if !bits.wanted_by(m.msrpm01) && m.vmcb02.control.msrpm_base == m.msrpm02.base.raw() => {
                self.msr_words.admit(m.msrpm02.words, m.msrpm01, m.memory, base, bits.word);
                L2Exit::Resume
            }
            _ => L2Exit::Embedder,
        }
    }

    fn l2_io<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(&mut self, m: &mut Machine<'_, G, M, C>) -> L2Exit {
        let info = m.vmcb02.control.exit_info_1;
        let bits = Bits::of_port((info >> 16) as u16, (info >> 4 & 7) as u8);
        let base = self.control.iopm_base & !0xFFF;
        if self.control.intercepts.misc1 & misc1::IOIO_PROT != 0 && bits.wanted_by_l1(m.memory, base) {
            return self.reflect(m);
        }
        if bits.wanted_by(m.iopm01) || m.vmcb02.control.iopm_base != m.iopm02.base.raw() {
            return L2Exit::Embedder;
        }
        self.io_words.admit(m.iopm02.words, m.iopm01, m.memory, base, bits.word);
        if bits.high != 0 {
            self.io_words.admit(m.iopm02.words, m.iopm01, m.memory, base, bits.word.wrapping_add(1));
        }
        L2Exit::Resume
    }

    fn l2_vmmcall<G, M, C>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        direct: impl FnOnce(&EnlightenedVmcbFields, &Vmcb, &G) -> bool,
    ) -> L2Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        if self.config.enlightened
            && self.enlightenments.enlightenments_control.nested_flush_virtual_hypercall()
            && direct(&self.enlightenments, m.vmcb02, m.gprs)
        {
            return match step(m.code, Level::L2, m.vmcb02, Kind::Vmmcall, self.nrips()) {
                Some(stepped) => L2Exit::DirectFlush { next_rip: stepped.next_rip() },
                None => L2Exit::Resume,
            };
        }
        if self.l1_wants(exit_code::VMMCALL) { self.reflect(m) } else { self.raise_in_l2(m, Fault::UD) }
    }

    /// Exits that L1 does not want: SVM instructions, which L2 then executes as L1 would, and the embedder's own.
    #[cold]
    fn l2_unwanted<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>, code: u64) -> L2Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let kind = match code {
            exit_code::VMLOAD => Kind::Vmload,
            exit_code::VMSAVE => Kind::Vmsave,
            exit_code::STGI => Kind::Stgi,
            exit_code::CLGI => Kind::Clgi,
            exit_code::INVLPGA => Kind::Invlpga,
            exit_code::SKINIT => return self.raise_in_l2(m, Fault::UD),
            _ => return L2Exit::Embedder,
        };
        if let Err(fault) = self.permit(m.vmcb02) {
            return self.raise_in_l2(m, fault);
        }
        let Some(stepped) = step(m.code, Level::L2, m.vmcb02, kind, self.nrips()) else {
            return L2Exit::Resume;
        };
        let done = match kind {
            Kind::Stgi | Kind::Clgi => {
                self.set_l2_gif(kind == Kind::Stgi);
                Ok(())
            }
            Kind::Invlpga => {
                m.vmcb02.complete_instruction(stepped.next_rip());
                return match self.invlpga(m.gprs.rcx() as u32) {
                    Some(asid) => L2Exit::InvalidateAsid { asid },
                    None => L2Exit::Resume,
                };
            }
            _ => match self.vmcb_address(address(m.vmcb02, &stepped)) {
                Ok(gpa) => match self.l2_vmcb(m, gpa, kind) {
                    Ok(gpa) => {
                        // The state is in VMCB01 for both levels.
                        let save = &mut m.vmcb01.save;
                        let moved = if kind == Kind::Vmload {
                            vmload(m.memory, gpa, save)
                        } else {
                            vmsave(m.memory, gpa, save)
                        };
                        moved.map_err(|_| Fault::GP)
                    }
                    Err(WalkFault::Unsettled) => return L2Exit::Resume,
                    Err(fault) => {
                        let access = if kind == Kind::Vmload { Access::Read } else { Access::Write };
                        let info_1 = fault.info1(access);
                        return self.exit_to_l1(m, Exit { code: exit_code::NPF, info_1, info_2: gpa });
                    }
                },
                Err(fault) => Err(fault),
            },
        };
        match done {
            Ok(()) => {
                m.vmcb02.complete_instruction(stepped.next_rip());
                L2Exit::Resume
            }
            Err(fault) => self.raise_in_l2(m, fault),
        }
    }

    /// The L1 GPA that VMLOAD or VMSAVE of L2 means by `gpa`: an address of L2's own where L1 has given it those.
    fn l2_vmcb<G: ?Sized, M: GuestMemory + ?Sized, C: ?Sized>(
        &self,
        m: &Machine<'_, G, M, C>,
        gpa: u64,
        kind: Kind,
    ) -> Result<u64, WalkFault> {
        if !self.virtual_vmload() {
            return Ok(gpa);
        }
        let (save, host) = (&m.vmcb01.save, &self.config.host);
        let format = NptFormat::from_registers(save.cr0, save.cr4, save.efer, host.phys_bits, self.config.gib_pages)
            .ok_or(WalkFault::NotPresent)?;
        let access = if kind == Kind::Vmload { Access::Read } else { Access::Write };
        npt::walk(m.memory, format, self.control.n_cr3, L2Gpa::new(gpa), access).map(L1Gpa::raw)
    }

    /// STGI or CLGI of L2: its virtual GIF if it has one, else the GIF.
    fn set_l2_gif(&mut self, set: bool) {
        self.settled = Settled::No;
        if self.control.int_ctl & int_ctl::V_GIF_ENABLE == 0 {
            self.gif = set;
        } else if set {
            self.control.int_ctl |= int_ctl::V_GIF;
        } else {
            self.control.int_ctl &= !int_ctl::V_GIF;
        }
    }
}
