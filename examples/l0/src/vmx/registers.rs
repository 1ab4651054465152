//! The registers of a guest, as the library and the shared parts of L0 ask for them.

use hvcore::hypercall::{Gpr, Registers, Xmm};
use hw::decode::Mode;
use hw::{cpu, fpu, msr, vmx};
use nvmx::field::Field;
use nvmx::{Fault, Vmcs};

use crate::mmio::Storer;
use crate::registers::xmm_number;
use crate::shared::Shared;
use crate::vmx::vp::Vp;
use crate::vmx::{exits, host};

/// A guest's registers outside its VMCS.
#[derive(Debug)]
pub struct Gprs(pub vmx::World);

impl Gprs {
    /// The slot of register `number`, 0 to 15 by encoding; that of RSP is not used.
    #[inline]
    pub const fn slot(&mut self, number: u8) -> &mut u64 {
        let g = &mut self.0.gprs;
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

impl nvmx::Gprs for Gprs {
    #[inline]
    fn get(&self, n: u8) -> u64 {
        let g = &self.0.gprs;
        match n & 15 {
            0 => g.rax,
            1 => g.rcx,
            2 => g.rdx,
            3 => g.rbx,
            4 => g.rsp,
            5 => g.rbp,
            6 => g.rsi,
            7 => g.rdi,
            8 => g.r8,
            9 => g.r9,
            10 => g.r10,
            11 => g.r11,
            12 => g.r12,
            13 => g.r13,
            14 => g.r14,
            _ => g.r15,
        }
    }

    #[inline]
    fn set(&mut self, n: u8, value: u64) {
        *self.slot(n) = value;
    }

    fn set_cr2(&mut self, value: u64) {
        // SAFETY: L0 takes no page faults: CR2 is its guest's.
        unsafe { cpu::write_cr2(value) };
    }
}

impl nvmx::Msrs for Gprs {
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        if !host::is_shared_msr(index) {
            return None;
        }
        // SAFETY: every processor with VMX and 64-bit mode has these.
        Some(unsafe { msr::rdmsr(index) })
    }

    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let legal = host::is_shared_msr(index) && host::msr_takes(index, value);
        if legal {
            // SAFETY: the MSR is there and takes the value; L0 uses none of these.
            unsafe { msr::wrmsr(index, value) };
        }
        legal
    }
}

impl Registers for Gprs {
    #[inline]
    fn gpr(&self, register: Gpr) -> u64 {
        let g = &self.0.gprs;
        match register {
            Gpr::Rax => g.rax,
            Gpr::Rbx => g.rbx,
            Gpr::Rcx => g.rcx,
            Gpr::Rdx => g.rdx,
            Gpr::Rsi => g.rsi,
            Gpr::Rdi => g.rdi,
            Gpr::R8 => g.r8,
        }
    }

    #[inline]
    fn set_gpr(&mut self, register: Gpr, value: u64) {
        let g = &mut self.0.gprs;
        match register {
            Gpr::Rax => g.rax = value,
            Gpr::Rbx => g.rbx = value,
            Gpr::Rcx => g.rcx = value,
            Gpr::Rdx => g.rdx = value,
            Gpr::Rsi => g.rsi = value,
            Gpr::Rdi => g.rdi = value,
            Gpr::R8 => g.r8 = value,
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
        let rights = self.vmcs().read(Field::GuestCsAccessRights);
        if self.vmcs().read(Field::GuestEfer) & 1 << 10 != 0 && rights & 1 << 13 != 0 {
            Mode::Bits64
        } else if rights & 1 << 14 != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        }
    }

    fn register(&mut self, number: u8) -> u64 {
        match number {
            4 => self.vmcs().read(Field::GuestRsp),
            n => *self.m.gprs.slot(n),
        }
    }

    fn set_register(&mut self, number: u8, value: u64) {
        match number {
            4 => self.vmcs().write(Field::GuestRsp, value),
            n => *self.m.gprs.slot(n) = value,
        }
    }

    fn goes_down(&mut self) -> bool {
        self.vmcs().read(Field::GuestRflags) & 1 << 10 != 0
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
