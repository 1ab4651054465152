//! An L2 guest: its VMCB, its registers and the world switch.
//!
//! The scenarios build guests and run them; uses `vmcb`, the hardware layer, and on VT-x `vmx`. A guest runs code of this image in
//! ring 0 with this image's page tables unless a scenario says otherwise, so a guest program is a function here.

use crate::vmcb::{Segment, Vmcb, exit, misc1, misc2};
use crate::vmx;
use hw::vmx::Gprs;
use hw::{cpu, msr};

/// Bytes of a guest's stack.
const STACK: usize = 8192;

/// A guest with all that it needs; placed in memory that is mapped one to one.
#[repr(C, align(4096))]
pub struct Guest {
    pub vmcb: Vmcb,
    stack: [u8; STACK],
    pub gprs: Gprs,
    /// What it has on VT-x.
    side: vmx::Side,
}

/// What ended a run of the guest, as far as the scenarios tell exits apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub code: u64,
    pub info1: u64,
    pub info2: u64,
}

impl Guest {
    pub const fn new() -> Self {
        Self { vmcb: Vmcb::new(), stack: [0; STACK], gprs: GPRS_ZERO, side: vmx::Side::new() }
    }

    /// Makes this a guest in long mode that calls `program` with `argument`.
    ///
    /// It shares the page tables, the GDT and the IDT of the caller; it leaves by CPUID, HLT, VMMCALL and SHUTDOWN.
    pub fn long_mode(&mut self, program: unsafe extern "C" fn(), argument: u64) -> &mut Self {
        let (gdt_base, gdt_limit) = cpu::sgdt();
        let (idt_base, idt_limit) = cpu::sidt();
        *self.vmcb.bytes_mut() = [0; 4096];
        self.gprs = Gprs { rdi: argument, ..GPRS_ZERO };
        let top = (&raw const self.stack) as u64 + STACK as u64 - 64;
        let vmcb = &mut self.vmcb;
        vmcb.set_misc1(misc1::CPUID | misc1::HLT | misc1::SHUTDOWN);
        vmcb.set_misc2(misc2::VMRUN | misc2::VMMCALL);
        vmcb.set_asid(1);
        for segment in [Segment::Es, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs] {
            vmcb.set_segment(segment, 0x10, 0xC93, u32::MAX, 0);
        }
        vmcb.set_segment(Segment::Cs, 0x08, 0xA9B, u32::MAX, 0);
        vmcb.set_segment(Segment::Tr, 0, 0x08B, 0xFFFF, 0);
        vmcb.set_segment(Segment::Ldtr, 0, 0x082, 0, 0);
        vmcb.set_gdtr_base(gdt_base);
        vmcb.set_gdtr_limit(u32::from(gdt_limit));
        vmcb.set_idtr_base(idt_base);
        vmcb.set_idtr_limit(u32::from(idt_limit));
        vmcb.set_cr0(cpu::cr0());
        vmcb.set_cr3(cpu::cr3());
        vmcb.set_cr4(cpu::cr4());
        // SAFETY: every processor with SVM has EFER and PAT.
        unsafe {
            vmcb.set_efer(msr::rdmsr(msr::EFER));
            vmcb.set_g_pat(msr::rdmsr(msr::PAT));
        }
        vmcb.set_dr6(0xFFFF_0FF0);
        vmcb.set_dr7(0x400);
        vmcb.set_rflags(2);
        vmcb.set_rip(program as usize as u64);
        vmcb.set_rsp(top);
        self
    }

    /// Runs the guest until its next exit.
    pub fn run(&mut self) -> Exit {
        if vmx::is_on() {
            return self.run_closed();
        }
        // SAFETY: EFER.SVME is set on every processor before a scenario runs.
        unsafe { hw::svm::clgi() };
        let exit = self.run_closed();
        // SAFETY: as above.
        unsafe { hw::svm::stgi() };
        exit
    }

    /// Runs the guest until its next exit; GIF is clear before and after.
    pub fn run_closed(&mut self) -> Exit {
        if vmx::is_on() {
            return self.side.run(&mut self.gprs, &mut self.vmcb, true, |_| ());
        }
        let vmcb = (&raw mut self.vmcb) as u64;
        self.vmcb.set_rax(self.gprs.rax);
        // SAFETY: GIF is clear; the guest's code is this image's own, or sees only what its nested page table maps.
        unsafe { hw::svm::run_sharing_state(&mut self.gprs, vmcb) };
        self.gprs.rax = self.vmcb.rax();
        Exit { code: self.vmcb.exit_code(), info1: self.vmcb.exit_info1(), info2: self.vmcb.exit_info2() }
    }

    /// On VT-x: runs the guest with `change` made to its VMCS.
    pub fn run_changed(&mut self, change: impl FnOnce(&mut vmx::Fields<'_>)) -> Exit {
        self.side.run(&mut self.gprs, &mut self.vmcb, true, change)
    }

    /// On VT-x: runs the guest with its VMCS as the last run left it, but for `change`.
    pub fn run_again(&mut self, change: impl FnOnce(&mut vmx::Fields<'_>)) -> Exit {
        self.side.run(&mut self.gprs, &mut self.vmcb, false, change)
    }

    /// On VT-x: what it has beside its VMCB.
    pub fn side(&mut self) -> &mut vmx::Side {
        &mut self.side
    }

    /// Moves RIP past an instruction of `length` bytes.
    pub fn skip(&mut self, length: u64) {
        self.vmcb.set_rip(self.vmcb.rip() + length);
    }

    /// Runs the guest and demands an exit with `code`.
    pub fn expect(&mut self, code: u64) -> Result<Exit, crate::Failure> {
        let seen = self.run();
        crate::check("exit code", exit_code(seen.code), code)?;
        Ok(seen)
    }
}

/// QEMU's TCG writes the exit code of a refused VMRUN in 32 bits where the APM says 64.
fn exit_code(code: u64) -> u64 {
    if code == 0xFFFF_FFFF { exit::INVALID } else { code }
}

const GPRS_ZERO: Gprs = Gprs {
    rax: 0,
    rcx: 0,
    rdx: 0,
    rbx: 0,
    rsp: 0,
    rbp: 0,
    rsi: 0,
    rdi: 0,
    r8: 0,
    r9: 0,
    r10: 0,
    r11: 0,
    r12: 0,
    r13: 0,
    r14: 0,
    r15: 0,
};
