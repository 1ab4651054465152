//! The registers of a guest, as the library asks for them: those that a VMCB does not hold, and a hypercall's.

use hvcore::hypercall::{Gpr, Registers, Xmm};
use hw::fpu;
use nsvm::vmcb::Vmcb;

/// General-purpose registers.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub struct Gprs(pub hw::svm::Gprs);

impl core::ops::Deref for Gprs {
    type Target = hw::svm::Gprs;

    #[inline]
    fn deref(&self) -> &hw::svm::Gprs {
        &self.0
    }
}

impl core::ops::DerefMut for Gprs {
    #[inline]
    fn deref_mut(&mut self) -> &mut hw::svm::Gprs {
        &mut self.0
    }
}

impl nsvm::Gprs for Gprs {
    #[inline]
    fn rcx(&self) -> u64 {
        self.0.rcx
    }

    #[inline]
    fn rdx(&self) -> u64 {
        self.0.rdx
    }

    #[inline]
    fn set_rdx(&mut self, value: u64) {
        self.0.rdx = value;
    }
}

/// The caller's registers: RAX in its VMCB, XMM0 to XMM5 in the processor, the rest saved at the exit.
pub struct CallRegisters<'r> {
    /// The caller's VMCB.
    pub vmcb: &'r mut Vmcb,
    /// Its other registers.
    pub gprs: &'r mut Gprs,
}

impl Registers for CallRegisters<'_> {
    #[inline]
    fn gpr(&self, register: Gpr) -> u64 {
        match register {
            Gpr::Rax => self.vmcb.save.rax,
            Gpr::Rbx => self.gprs.rbx,
            Gpr::Rcx => self.gprs.rcx,
            Gpr::Rdx => self.gprs.rdx,
            Gpr::Rsi => self.gprs.rsi,
            Gpr::Rdi => self.gprs.rdi,
            Gpr::R8 => self.gprs.r8,
        }
    }

    #[inline]
    fn set_gpr(&mut self, register: Gpr, value: u64) {
        match register {
            Gpr::Rax => self.vmcb.save.rax = value,
            Gpr::Rbx => self.gprs.rbx = value,
            Gpr::Rcx => self.gprs.rcx = value,
            Gpr::Rdx => self.gprs.rdx = value,
            Gpr::Rsi => self.gprs.rsi = value,
            Gpr::Rdi => self.gprs.rdi = value,
            Gpr::R8 => self.gprs.r8 = value,
        }
    }

    fn xmm(&self, register: Xmm) -> u128 {
        fpu::xmm(xmm_number(register))
    }

    fn set_xmm(&mut self, register: Xmm, value: u128) {
        // SAFETY: the registers are the guest's, whose call this is; L0 uses none.
        unsafe { fpu::set_xmm(xmm_number(register), value) };
    }
}

const fn xmm_number(register: Xmm) -> u8 {
    match register {
        Xmm::Xmm0 => 0,
        Xmm::Xmm1 => 1,
        Xmm::Xmm2 => 2,
        Xmm::Xmm3 => 3,
        Xmm::Xmm4 => 4,
        Xmm::Xmm5 => 5,
    }
}
