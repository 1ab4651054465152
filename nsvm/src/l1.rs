//! Exits of L1: the SVM instructions and MSRs.

use hvcore::addr::Level;
use hvcore::memory::{GuestMemory, MemoryError};

use crate::exit_code;
use crate::fault::Fault;
use crate::insn::{self, Kind, Mode};
use crate::machine::{Code, Gprs, Machine};
use crate::msr::MsrAccess;
use crate::state::{NestedSvm, Settled};
use crate::view::View;
use crate::vmcb::bits::{cr0, rflags, seg};
use crate::vmcb::{Save, Vmcb};
use crate::vmrun::{Failure, Invalidate};

/// What the embedder does after an exit of L1.
// The plainest layout: what is told apart at every exit is one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum L1Exit {
    /// Dealt with. Go on with [`NestedSvm::prepare_entry`].
    Resume,
    /// L2 runs next. With nested paging ([`NestedSvm::nested_paging`]) put the root of the shadow page table in
    /// VMCB02's nCR3; do first what `Invalidate` says to the shadow page tables. Hardware tags are taken care of.
    EnterL2(Invalidate),
    /// L1 executed INVLPGA for `asid`: translations that derive from its nested page tables go.
    InvalidateAsid {
        /// L1's ASID, not 0.
        asid: u32,
    },
    /// Not an SVM matter: the embedder's own exit, in VMCB01.
    NotMine,
    /// L1 shuts down: its VMCB is gone.
    Shutdown,
}

/// An intercepted instruction, stepped over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stepped {
    next_rip: u64,
    /// In 64-bit code.
    wide: bool,
    address_size: bool,
}

/// RIP past the instruction of kind `kind` at CS:RIP of `vmcb`; `None` when the bytes are another instruction by now
/// or cannot be had, and the guest had better execute them itself.
///
/// `nrips` says that the processor saved the next RIP.
#[inline(always)]
pub(crate) fn step<C: Code + ?Sized>(code: &C, level: Level, vmcb: &Vmcb, kind: Kind, nrips: bool) -> Option<Stepped> {
    let (rip, wide) = (vmcb.save.rip, vmcb.in_64bit_code());
    if nrips && vmcb.control.next_rip.wrapping_sub(rip) <= 3 {
        // Too short for a prefix that matters.
        return Some(Stepped { next_rip: vmcb.control.next_rip, wide, address_size: false });
    }
    // The usual case: no prefix. Two bytes are compared as two, three as three.
    if let Some((plain, len)) = kind.plain()
        && code.begins_with(level, vmcb, plain, if len == 2 { 0xFFFF } else { 0xFF_FFFF })
    {
        let next_rip = rip.wrapping_add(u64::from(len));
        let next_rip = if wide { next_rip } else { next_rip & 0xFFFF_FFFF };
        return Some(Stepped { next_rip, wide, address_size: false });
    }
    step_any(code, level, vmcb, kind)
}

#[cold]
#[inline(never)]
fn step_any<C: Code + ?Sized>(code: &C, level: Level, vmcb: &Vmcb, kind: Kind) -> Option<Stepped> {
    let mut bytes = [0; 15];
    let got = code.fetch(level, vmcb, &mut bytes);
    let bytes = bytes.get(..got.min(15)).unwrap_or_default();
    let mode = if vmcb.in_64bit_code() {
        Mode::Bits64
    } else if vmcb.save.cs.attrib & seg::DB != 0 && vmcb.save.cr0 & cr0::PE != 0 {
        Mode::Bits32
    } else {
        Mode::Bits16
    };
    let insn = insn::decode(bytes, mode).filter(|insn| insn.kind == kind)?;
    let mut next_rip = vmcb.save.rip.wrapping_add(u64::from(insn.len));
    if mode != Mode::Bits64 {
        next_rip &= 0xFFFF_FFFF;
    }
    Some(Stepped { next_rip, wide: mode == Mode::Bits64, address_size: insn.address_size })
}

/// Physical address in RAX, cut to the instruction's address size.
#[inline(always)]
pub(crate) fn address(vmcb: &Vmcb, stepped: &Stepped) -> u64 {
    let rax = vmcb.save.rax;
    if stepped.wide && !stepped.address_size {
        return rax;
    }
    let big = vmcb.save.cs.attrib & seg::DB != 0;
    // An address-size prefix makes it the other one; in 64-bit code, 32 bits.
    if stepped.wide || big != stepped.address_size { rax & 0xFFFF_FFFF } else { rax & 0xFFFF }
}

impl NestedSvm {
    /// Deals with an exit of L1. VMCB01 has just run.
    #[inline(always)]
    pub fn l1_exit<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let code = m.vmcb01.control.exit_code;
        m.vmcb01.control.event_inj = 0;
        if m.asids.is_prepared() && !exit_code::is_invalid(code) {
            self.entered(m.asids);
        }
        match code {
            exit_code::VMRUN => self.l1_vmrun(m),
            exit_code::VMLOAD => self.l1_vmload(m),
            exit_code::VMSAVE => self.l1_vmsave(m),
            exit_code::STGI => self.l1_gif(m, true),
            exit_code::CLGI => self.l1_gif(m, false),
            exit_code::INVLPGA => self.l1_invlpga(m),
            exit_code::SKINIT => raise(m.vmcb01, Fault::UD),
            exit_code::MSR => self.l1_msr(m),
            _ if self.own_exit(m.vmcb01, code) => L1Exit::Resume,
            _ => L1Exit::NotMine,
        }
    }

    /// The rules that all SVM instructions share (APM volume 3): #UD without SVM or protected mode, #GP outside CPL 0.
    #[inline(always)]
    pub(crate) fn permit(&self, vmcb: &Vmcb) -> Result<(), Fault> {
        if !self.svme || vmcb.save.cr0 & cr0::PE == 0 || vmcb.save.rflags & rflags::VM != 0 {
            return Err(Fault::UD);
        }
        if vmcb.save.cpl != 0 { Err(Fault::GP) } else { Ok(()) }
    }

    /// The address of a VMCB: page aligned and within the physical addresses, else #GP.
    pub(crate) const fn vmcb_address(&self, address: u64) -> Result<u64, Fault> {
        if address & 0xFFF != 0 || !self.config.legal_gpa(address) { Err(Fault::GP) } else { Ok(address) }
    }

    pub(crate) const fn nrips(&self) -> bool {
        self.config.host.features.has(crate::caps::Features::NRIPS)
    }

    fn l1_vmrun<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        if let Err(fault) = self.permit(m.vmcb01) {
            return raise(m.vmcb01, fault);
        }
        let Some(stepped) = step(m.code, Level::L1, m.vmcb01, Kind::Vmrun, self.nrips()) else {
            return L1Exit::Resume;
        };
        let gpa = match self.vmcb_address(address(m.vmcb01, &stepped)) {
            Ok(gpa) => gpa,
            Err(fault) => return raise(m.vmcb01, fault),
        };
        self.cancel_step(m.vmcb01);
        self.close_window();
        match self.vmrun(m, gpa) {
            Ok(invalidate) => {
                m.vmcb01.save.rip = stepped.next_rip;
                m.vmcb01.control.int_state = 0;
                L1Exit::EnterL2(invalidate)
            }
            // There is nothing at the address; what the processor does then the APM leaves open.
            Err(Failure::Memory) => raise(m.vmcb01, Fault::GP),
            Err(Failure::Refused(refusal)) => {
                self.last_refusal = Some(refusal);
                m.vmcb01.save.rip = stepped.next_rip;
                match self.refuse(m, gpa) {
                    Ok(()) => L1Exit::Resume,
                    Err(MemoryError) => L1Exit::Shutdown,
                }
            }
        }
    }

    /// An instruction of L1 that is permitted, carried out by `act`, which is given the memory, the registers and the
    /// address in RAX.
    #[inline(always)]
    fn l1_instruction<G, M, C>(
        &mut self,
        m: &mut Machine<'_, G, M, C>,
        kind: Kind,
        act: impl FnOnce(&mut Self, &M, &mut Save, u64) -> Result<(), Fault>,
    ) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        if let Err(fault) = self.permit(m.vmcb01) {
            return raise(m.vmcb01, fault);
        }
        let Some(stepped) = step(m.code, Level::L1, m.vmcb01, kind, self.nrips()) else {
            return L1Exit::Resume;
        };
        let address = address(m.vmcb01, &stepped);
        match act(self, m.memory, &mut m.vmcb01.save, address) {
            Ok(()) => {
                m.vmcb01.complete_instruction(stepped.next_rip);
                L1Exit::Resume
            }
            Err(fault) => raise(m.vmcb01, fault),
        }
    }

    #[inline(never)]
    fn l1_vmload<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        self.l1_instruction(m, Kind::Vmload, |nested, memory, save, address| {
            vmload(memory, nested.vmcb_address(address)?, save).map_err(|MemoryError| Fault::GP)
        })
    }

    #[inline(never)]
    fn l1_vmsave<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        self.l1_instruction(m, Kind::Vmsave, |nested, memory, save, address| {
            vmsave(memory, nested.vmcb_address(address)?, save).map_err(|MemoryError| Fault::GP)
        })
    }

    /// STGI and CLGI of L1.
    #[inline]
    fn l1_gif<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>, set: bool) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        self.l1_instruction(m, if set { Kind::Stgi } else { Kind::Clgi }, |nested, _, _, _| {
            nested.settled = Settled::No;
            nested.gif = set;
            Ok(())
        })
    }

    fn l1_invlpga<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        if let Err(fault) = self.permit(m.vmcb01) {
            return raise(m.vmcb01, fault);
        }
        let Some(stepped) = step(m.code, Level::L1, m.vmcb01, Kind::Invlpga, self.nrips()) else {
            return L1Exit::Resume;
        };
        m.vmcb01.complete_instruction(stepped.next_rip);
        match self.invlpga(m.gprs.rcx() as u32) {
            Some(asid) => L1Exit::InvalidateAsid { asid },
            None => L1Exit::Resume,
        }
    }

    /// Drops what INVLPGA for L1's `asid` may concern; more than one page is always right. The ASID whose derived
    /// translations go too, if it is one of L2.
    pub(crate) fn invlpga(&mut self, asid: u32) -> Option<u32> {
        if asid == 0 {
            self.tag1.invalidate();
            return None;
        }
        if asid == self.context.asid {
            self.tag2.invalidate();
        }
        Some(asid)
    }

    fn l1_msr<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>) -> L1Exit
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let write = m.vmcb01.control.exit_info_1 & 1 != 0;
        let index = m.gprs.rcx() as u32;
        if !MsrAccess::is_ours(&self.config, index) {
            return L1Exit::NotMine;
        }
        let kind = if write { Kind::Wrmsr } else { Kind::Rdmsr };
        let Some(stepped) = step(m.code, Level::L1, m.vmcb01, kind, self.nrips()) else {
            return L1Exit::Resume;
        };
        match self.access_msr(m.vmcb01, m.gprs, index, write) {
            Ok(()) => {
                m.vmcb01.complete_instruction(stepped.next_rip);
                L1Exit::Resume
            }
            Err(fault) => raise(m.vmcb01, fault),
        }
    }

    /// Steps the level that runs over the instruction that exited, if it is still `kind`; `false` when the guest had
    /// better execute it again. For exits that the embedder emulates.
    #[inline(always)]
    pub fn step_over<G, M, C>(&mut self, m: &mut Machine<'_, G, M, C>, kind: Kind) -> bool
    where
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        C: Code + ?Sized,
    {
        let level = self.level;
        let vmcb = match level {
            Level::L1 => &mut *m.vmcb01,
            Level::L2 => &mut *m.vmcb02,
        };
        match step(m.code, level, vmcb, kind, self.nrips()) {
            Some(stepped) => {
                vmcb.complete_instruction(stepped.next_rip);
                true
            }
            None => false,
        }
    }
}

impl Stepped {
    pub(crate) const fn next_rip(&self) -> u64 {
        self.next_rip
    }
}

fn raise(vmcb01: &mut Vmcb, fault: Fault) -> L1Exit {
    vmcb01.inject_exception(fault.vector, fault.error_code);
    L1Exit::Resume
}

/// VMLOAD from the VMCB at `gpa`: FS, GS, LDTR, TR and the MSRs of offsets 0x600 to 0x63F.
#[inline(always)]
pub(crate) fn vmload<M: GuestMemory + ?Sized>(memory: &M, gpa: u64, save: &mut Save) -> Result<(), MemoryError> {
    let view = View::new(memory, gpa);
    view.read_save::<0x440, 0x460>(save)?;
    view.read_save::<0x470, 0x480>(save)?;
    view.read_save::<0x490, 0x4A0>(save)?;
    view.read_save::<0x600, 0x640>(save)
}

/// VMSAVE to the VMCB at `gpa`.
#[inline(always)]
pub(crate) fn vmsave<M: GuestMemory + ?Sized>(memory: &M, gpa: u64, save: &mut Save) -> Result<(), MemoryError> {
    let view = View::new(memory, gpa);
    view.write_save::<0x440, 0x460>(save)?;
    view.write_save::<0x470, 0x480>(save)?;
    view.write_save::<0x490, 0x4A0>(save)?;
    view.write_save::<0x600, 0x640>(save)
}
