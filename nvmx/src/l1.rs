//! Exits of L1: the VMX instructions and MSRs.

use hvcore::memory::GuestMemory;

use crate::events::reinject;
use crate::exit_reason;
use crate::field::Field;
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::msr::{self, RCX};
use crate::msr_list::Msrs;
use crate::state::NestedVmx;
use crate::step::{complete_instruction, inject_fault};

/// What the embedder does after an exit of L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Exit {
    /// Dealt with. Go on with `NestedVmx::prepare_entry`.
    Resume,
    /// L2 runs next. If L1 uses EPT ([`crate::Context::eptp`]), put the root of the shadow page table in VMCS02's EPT
    /// pointer. VPIDs are taken care of.
    EnterL2,
    /// L1 executed INVEPT: mappings that derive from its EPT go.
    InvEpt(InvEpt),
    /// Not a VMX matter: the embedder's own exit, with this exit reason, in VMCS01.
    NotMine {
        /// The exit-reason field.
        reason: u32,
    },
    /// L1 shuts down: a VMX abort, or its memory is gone.
    Shutdown,
}

/// What INVEPT names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvEpt {
    /// Type 1, single context: mappings of this EPT pointer (as L1 wrote it; bits 51:12 and the A/D flag count).
    Context {
        /// The EPT pointer.
        eptp: u64,
    },
    /// Type 2, global: mappings of all EPT pointers.
    Global,
}

/// An exception to be raised in place of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The vector.
    pub vector: u8,
    /// The error code, where the vector has one.
    pub error_code: Option<u32>,
    /// The new CR2, for a page fault.
    pub cr2: Option<u64>,
}

impl Fault {
    /// #UD.
    pub const UD: Self = Self { vector: 6, error_code: None, cr2: None };
    /// #SS(0).
    pub const SS: Self = Self { vector: 12, error_code: Some(0), cr2: None };
    /// #GP(0).
    pub const GP: Self = Self { vector: 13, error_code: Some(0), cr2: None };
}

impl NestedVmx {
    /// Deals with an exit of L1. VMCS01 has just run.
    pub fn l1_exit<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        let reason = m.vmcs01.read32(Field::ExitReason);
        if reason & exit_reason::ENTRY_FAILURE == 0 {
            m.vpids.entered(&mut self.tag1);
        }
        let outcome = match reason {
            exit_reason::VMRESUME => return self.vm_entry(m, false),
            exit_reason::VMLAUNCH => return self.vm_entry(m, true),
            exit_reason::VMREAD => self.vmread(m),
            exit_reason::VMWRITE => self.vmwrite(m),
            exit_reason::VMPTRLD => self.vmptrld(m),
            exit_reason::VMPTRST => self.vmptrst(m),
            exit_reason::VMCLEAR => self.vmclear(m),
            exit_reason::VMXON => self.vmxon(m),
            exit_reason::VMXOFF => self.vmxoff(m.vmcs01),
            exit_reason::INVVPID => self.invvpid(m),
            exit_reason::INVEPT => return self.l1_invept(m),
            exit_reason::VMFUNC => Err(Fault::UD),
            exit_reason::RDMSR | exit_reason::WRMSR => return self.l1_msr(m, reason),
            _ if self.own_window01(reason) => return L1Exit::Resume,
            _ => {
                reinject(m.vmcs01, reason);
                return L1Exit::NotMine { reason };
            }
        };
        self.finish(m, outcome)
    }

    fn l1_invept<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        let (outcome, request) = self.invept(m);
        let exit = self.finish(m, outcome);
        request.map_or(exit, L1Exit::InvEpt)
    }

    fn l1_msr<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, reason: u32) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: ?Sized,
    {
        let index = m.gprs.get(RCX) as u32;
        if !msr::is_ours(index) {
            return L1Exit::NotMine { reason };
        }
        match self.access_msr(m.gprs, index, reason == exit_reason::WRMSR) {
            Ok(()) => complete_instruction(m.vmcs01),
            Err(fault) => inject_fault(m.vmcs01, m.gprs, fault),
        }
        L1Exit::Resume
    }
}
