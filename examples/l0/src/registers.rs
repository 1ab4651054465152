//! The registers of a guest, as the library asks for them: those that a VMCB does not hold, and a hypercall's.

use hvcore::hypercall::{Gpr, Registers, Xmm};
use hw::decode::Mode;
use hw::fpu;
use nsvm::Fault;
use nsvm::vmcb::Vmcb;

use crate::exits;
use crate::mmio::Storer;
use crate::shared::Shared;
use crate::vp::Vp;

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

impl Gprs {
    /// The slot of register `number`, 0 to 15 by encoding.
    pub fn slot(&mut self, number: u8) -> &mut u64 {
        let g = &mut self.0;
        match number & 15 {
            0 => &mut g.rax,
            1 => &mut g.rcx,
            2 => &mut g.rdx,
            3 => &mut g.rbx,
            4 => &mut g.rsp,
            5 => &mut g.rbp,
            6 => &mut g.rsi,
            7 => &mut g.rdi,
            8 => &mut g.r8,
            9 => &mut g.r9,
            10 => &mut g.r10,
            11 => &mut g.r11,
            12 => &mut g.r12,
            13 => &mut g.r13,
            14 => &mut g.r14,
            _ => &mut g.r15,
        }
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

pub(crate) const fn xmm_number(register: Xmm) -> u8 {
    match register {
        Xmm::Xmm0 => 0,
        Xmm::Xmm1 => 1,
        Xmm::Xmm2 => 2,
        Xmm::Xmm3 => 3,
        Xmm::Xmm4 => 4,
        Xmm::Xmm5 => 5,
    }
}

impl Storer for Vp {
    fn shared(&self) -> &'static Shared {
        self.shared
    }

    fn id(&self) -> usize {
        self.id
    }

    fn code(&mut self) -> ([u8; 15], usize) {
        self.instruction()
    }

    fn mode(&mut self) -> Mode {
        let v = self.vmcb();
        if v.in_64bit_code() {
            Mode::Bits64
        } else if v.save.cs.attrib & 1 << 10 != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        }
    }

    fn register(&mut self, number: u8) -> u64 {
        match number {
            0 => self.vmcb().save.rax,
            4 => self.vmcb().save.rsp,
            n => *self.m.gprs.slot(n),
        }
    }

    fn set_register(&mut self, number: u8, value: u64) {
        match number {
            0 => self.vmcb().save.rax = value,
            4 => self.vmcb().save.rsp = value,
            n => *self.m.gprs.slot(n) = value,
        }
    }

    fn goes_down(&mut self) -> bool {
        self.vmcb().save.rflags & 1 << 10 != 0
    }

    fn pass(&mut self, length: u64) {
        self.advance(length);
    }

    fn raise_gp(&mut self) {
        exits::raise(self, Fault::GP);
    }

    fn raise_ud(&mut self) {
        exits::raise(self, Fault::UD);
    }
}
