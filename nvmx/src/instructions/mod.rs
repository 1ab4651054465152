//! The VMX instructions as L1 executes them in VMX root operation (SDM volume 3, chapter "VMX Instruction Reference").
//!
//! Called by `l1`. Each instruction is a method that says how it ended; what that does to RFLAGS and RIP is here once
//! for all. The processor itself raises #UD in real-address, virtual-8086 and compatibility mode, before the exit.

mod access;
mod invalidate;
mod launch;
mod region;

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

use crate::bits::rflags;
use crate::field::Field;
use crate::l1::{Fault, L1Exit};
use crate::machine::{Gprs, Linear, Machine, Vmcs};
use crate::msr::feature_control;
use crate::operand::{self, Info};
use crate::state::{Current, NestedVmx};
use crate::step::{complete_with, cpl, inject_fault};
use crate::vmcs12::REVISION;

/// VM-instruction error numbers (SDM volume 3, "VM Instruction Error Numbers").
pub mod error {
    /// VMCLEAR with invalid physical address.
    pub const VMCLEAR_ADDRESS: u32 = 2;
    /// VMCLEAR with VMXON pointer.
    pub const VMCLEAR_VMXON: u32 = 3;
    /// VMLAUNCH with non-clear VMCS.
    pub const VMLAUNCH_LAUNCHED: u32 = 4;
    /// VMRESUME with non-launched VMCS.
    pub const VMRESUME_CLEAR: u32 = 5;
    /// VM entry with invalid control field(s).
    pub const CONTROLS: u32 = 7;
    /// VM entry with invalid host-state field(s).
    pub const HOST_STATE: u32 = 8;
    /// VMPTRLD with invalid physical address.
    pub const VMPTRLD_ADDRESS: u32 = 9;
    /// VMPTRLD with VMXON pointer.
    pub const VMPTRLD_VMXON: u32 = 10;
    /// VMPTRLD with incorrect VMCS revision identifier.
    pub const VMPTRLD_REVISION: u32 = 11;
    /// VMREAD/VMWRITE from/to unsupported VMCS component.
    pub const UNSUPPORTED_FIELD: u32 = 12;
    /// VMWRITE to read-only VMCS component.
    pub const READ_ONLY_FIELD: u32 = 13;
    /// VMXON executed in VMX root operation.
    pub const VMXON_IN_ROOT: u32 = 15;
    /// VM entry with events blocked by MOV SS.
    pub const MOV_SS: u32 = 26;
    /// Invalid operand to INVEPT/INVVPID.
    pub const INVALIDATE_OPERAND: u32 = 28;
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// VMsucceed.
    Succeed,
    /// VMfailInvalid.
    FailInvalid,
    /// VMfail with this number: VMfailValid if there is a current VMCS, else VMfailInvalid.
    Fail(u32),
}

/// The result of an instruction that does not enter L2.
pub(crate) type Outcome = Result<Done, Fault>;

/// RFLAGS after VMsucceed (`set` is 0) or a VMfail (`set` is CF or ZF); RF is clear after every instruction.
pub(crate) const fn flags(old: u64, set: u64) -> u64 {
    old & !(rflags::ARITHMETIC | rflags::RF) | set
}

impl NestedVmx {
    /// Carries `outcome` out in L1.
    pub(crate) fn finish<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, outcome: Outcome) -> L1Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let set = match outcome {
            Ok(Done::Succeed) => 0,
            Ok(Done::FailInvalid) => rflags::CF,
            Ok(Done::Fail(number)) => self.vm_fail(m.memory, number),
            Err(fault) => {
                inject_fault(m.vmcs01, m.gprs, fault);
                return L1Exit::Resume;
            }
        };
        let old = m.vmcs01.read(Field::GuestRflags);
        let new = flags(old, set);
        if new != old {
            m.vmcs01.write(Field::GuestRflags, new);
        }
        complete_with(m.vmcs01, new);
        L1Exit::Resume
    }

    /// VMfail: notes the error number where there is a current VMCS. The flag to set.
    fn vm_fail<M: GuestMemory + ?Sized>(&mut self, memory: &M, number: u32) -> u64 {
        match self.current {
            Current::None => return rflags::CF,
            Current::Plain(_) => self.vmcs12.set(Field::InstructionError, number.into()),
            Current::Enlightened(_) => {
                self.vmcs12.set(Field::InstructionError, number.into());
                // L1 took its page away while it is in use: it reads no error number there.
                let _ = self.evmcs.store_error(memory, &self.vmcs12);
            }
        }
        rflags::ZF
    }

    /// What all but VMXON share: #UD outside VMX operation, #GP outside CPL 0.
    pub(crate) fn permit<V: Vmcs + ?Sized>(&self, vmcs01: &V) -> Result<(), Fault> {
        if self.vmxon.is_none() {
            return Err(Fault::UD);
        }
        if cpl(vmcs01) != 0 { Err(Fault::GP) } else { Ok(()) }
    }

    /// The physical address in the 8-byte memory operand.
    fn address_operand<V, G, M, L>(m: &Machine<'_, V, G, M, L>) -> Result<u64, Fault>
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: ?Sized,
        L: Linear + ?Sized,
    {
        operand::read(m.vmcs01, m.gprs, m.linear, Info::of(m.vmcs01)).map(u64::from_le_bytes)
    }

    /// A region's address: 4 KiB aligned and within L1's physical addresses.
    const fn legal_region(&self, address: u64) -> bool {
        address & 0xFFF == 0 && self.config.legal_gpa(address)
    }

    /// VMXON.
    pub(crate) fn vmxon<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> Outcome
    where
        V: Vmcs + ?Sized,
        G: Gprs + ?Sized,
        M: GuestMemory + ?Sized,
        L: Linear + ?Sized,
    {
        let cr4 = Self::l1_cr4(m.vmcs01);
        if cr4 & crate::bits::cr4::VMXE == 0 {
            return Err(Fault::UD);
        }
        if cpl(m.vmcs01) != 0 {
            return Err(Fault::GP);
        }
        if self.vmxon.is_some() {
            return Ok(Done::Fail(error::VMXON_IN_ROOT));
        }
        if !self.config.allows_cr0(Self::l1_cr0(m.vmcs01), false)
            || !self.config.allows_cr4(cr4)
            || !feature_control::allows_vmxon(self.feature_control)
        {
            return Err(Fault::GP);
        }
        let address = Self::address_operand(m)?;
        if !self.legal_region(address) {
            return Ok(Done::FailInvalid);
        }
        let gpa = L1Gpa::new(address);
        // A region without memory behind it has no revision identifier.
        if m.memory.read_u32(gpa) != Ok(REVISION) {
            return Ok(Done::FailInvalid);
        }
        self.vmxon = Some(gpa);
        self.current = Current::None;
        Ok(Done::Succeed)
    }

    /// VMXOFF. What L1's memory does not have of the current VMCS is lost, as on the processor.
    pub(crate) fn vmxoff<V: Vmcs + ?Sized>(&mut self, vmcs01: &V) -> Outcome {
        self.permit(vmcs01)?;
        self.leave_vmx();
        Ok(Done::Succeed)
    }
}
