//! Exits that an instruction of L2 causes: CPUID, MSRs, I/O ports, HLT, control and debug registers, exceptions.

use super::Outcome;
use crate::vmcb::{exit, misc1};
use crate::{bitmaps, check, cpu_guest};
use core::arch::naked_asm;

/// Two leaves that the hypervisor answers, one after the other; the guest adds up what it saw in RSI.
#[unsafe(naked)]
unsafe extern "C" fn program_cpuid() {
    naked_asm!(
        "mov eax, 0x40000000",
        "xor ecx, ecx",
        "cpuid",
        "mov rsi, rax",
        "mov eax, 7",
        "mov ecx, 3",
        "cpuid",
        "add rsi, rbx",
        "hlt",
    )
}

pub fn cpuid() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_cpuid, 0);
    guest.expect(exit::CPUID)?;
    check("leaf", guest.gprs.rax, 0x4000_0000)?;
    guest.gprs.rax = 0x1_0000_0005;
    guest.skip(2);
    guest.expect(exit::CPUID)?;
    check("leaf", guest.gprs.rax, 7)?;
    check("subleaf", guest.gprs.rcx, 3)?;
    guest.gprs.rbx = 0x20;
    guest.skip(2);
    guest.expect(exit::HLT)?;
    check("what L2 saw", guest.gprs.rsi, 0x1_0000_0025)
}

crate::hypercall_program!(program_hlt, ["mov r15, 1", "hlt", "mov r15, 2", "hlt", "mov r15, 3"], ["hlt"]);

pub fn hlt() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_hlt(), 0);
    let start = guest.vmcb.rip();
    guest.expect(exit::HLT)?;
    check("r15", guest.gprs.r15, 1)?;
    check("rip at the first HLT", guest.vmcb.rip(), start + 7)?;
    guest.skip(1);
    guest.expect(exit::HLT)?;
    check("r15", guest.gprs.r15, 2)?;
    guest.skip(1);
    guest.expect(exit::VMMCALL)?;
    check("r15", guest.gprs.r15, 3)?;
    guest.skip(3);
    guest.expect(exit::HLT).map(drop)
}

/// VMMCALL with prefixes: six bytes, nine bytes, and one that ends at the last legal length.
#[unsafe(naked)]
unsafe extern "C" fn program_prefixed() {
    naked_asm!(
        ".byte 0x66, 0x2e, 0x48, 0x0f, 0x01, 0xd9",
        "inc r15",
        ".byte 0x66, 0x66, 0x66, 0x2e, 0x3e, 0x64, 0x0f, 0x01, 0xd9",
        "inc r15",
        "hlt",
    )
}

pub fn prefixed_vmmcall() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_prefixed, 0);
    let start = guest.vmcb.rip();
    guest.expect(exit::VMMCALL)?;
    check("rip stays on the prefixed VMMCALL", guest.vmcb.rip(), start)?;
    guest.skip(6);
    guest.expect(exit::VMMCALL)?;
    check("rip of the second", guest.vmcb.rip(), start + 9)?;
    guest.skip(9);
    guest.expect(exit::HLT)?;
    check("instructions between", guest.gprs.r15, 2)
}

const LSTAR: u64 = 0xC000_0082;
const SYSENTER_EIP: u64 = 0x176;

#[unsafe(naked)]
unsafe extern "C" fn program_msr() {
    naked_asm!(
        "mov ecx, 0x176",
        "rdmsr",
        "mov r8, rax",
        "mov ecx, 0xC0000082",
        "rdmsr",
        "mov r9, rax",
        "mov ecx, 0x176",
        "mov eax, 0x1234",
        "mov edx, 0x5678",
        "wrmsr",
        "mov ecx, 0x40000000",
        "rdmsr",
        "hlt",
    )
}

pub fn msr() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_msr, 0);
    // LSTAR passes through; the guest sees the hypervisor's own.
    // SAFETY: LSTAR exists on every processor with long mode, and nothing here uses SYSCALL.
    unsafe { hw::msr::wrmsr(LSTAR as u32, 0x7777_1111) };
    let map = bitmaps::msrpm();
    map.clear();
    map.intercept(SYSENTER_EIP as u32, true, true);
    guest.vmcb.set_msrpm_base(map.address());
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::MSR_PROT);
    let read = guest.expect(exit::MSR)?;
    check("info1 of RDMSR", read.info1, 0)?;
    check("ecx", guest.gprs.rcx, SYSENTER_EIP)?;
    guest.gprs.rax = 0xAB;
    guest.gprs.rdx = 0;
    guest.skip(2);
    let write = guest.expect(exit::MSR)?;
    check("info1 of WRMSR", write.info1, 1)?;
    check("what L2 read of the intercepted MSR", guest.gprs.r8, 0xAB)?;
    check("what L2 read of the passed-through MSR", guest.gprs.r9, 0x7777_1111)?;
    check("eax", guest.gprs.rax & 0xFFFF_FFFF, 0x1234)?;
    check("edx", guest.gprs.rdx & 0xFFFF_FFFF, 0x5678)?;
    guest.skip(2);
    guest.expect(exit::MSR)?;
    check("an MSR outside the map exits", guest.gprs.rcx, 0x4000_0000)?;
    guest.skip(2);
    guest.expect(exit::HLT).map(drop)
}

/// The same MSR read twice with the map changed in between: the hypervisor does not touch a clean bit, which covers
/// only the map's address.
pub fn msr_map_change() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_msr, 0);
    let map = bitmaps::msrpm();
    map.clear();
    map.intercept(SYSENTER_EIP as u32, true, false);
    guest.vmcb.set_msrpm_base(map.address());
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::MSR_PROT);
    guest.expect(exit::MSR)?;
    map.clear();
    map.intercept(LSTAR as u32, true, false);
    guest.vmcb.set_clean(u32::MAX);
    guest.skip(2);
    guest.expect(exit::MSR)?;
    check("the MSR that the changed map names", guest.gprs.rcx, LSTAR)
}

#[unsafe(naked)]
unsafe extern "C" fn program_io() {
    naked_asm!(
        "mov dx, 0x80",
        "mov eax, 0x5A",
        "out dx, al",
        "in ax, 0x84",
        "mov r8, rax",
        "mov dx, 0x7F",
        "out dx, eax",
        "mov dx, 0x90",
        "out dx, al",
        "hlt",
    )
}

pub fn io() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_io, 0);
    let map = bitmaps::iopm();
    map.clear();
    map.intercept(0x80);
    map.intercept(0x85);
    guest.vmcb.set_iopm_base(map.address());
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::IOIO_PROT);

    let out = guest.expect(exit::IOIO)?;
    check("port", out.info1 >> 16 & 0xFFFF, 0x80)?;
    check("out, 8 bits", out.info1 & 0x7F, 1 << 4)?;
    check("next rip", out.info2, guest.vmcb.rip() + 1)?;
    guest.vmcb.set_rip(out.info2);

    let input = guest.expect(exit::IOIO)?;
    check("port", input.info1 >> 16 & 0xFFFF, 0x84)?;
    check("in, 16 bits: the second byte's port is intercepted", input.info1 & 0x7F, 1 << 5 | 1)?;
    guest.gprs.rax = 0xBEEF;
    guest.vmcb.set_rip(input.info2);

    let wide = guest.expect(exit::IOIO)?;
    check("port", wide.info1 >> 16 & 0xFFFF, 0x7F)?;
    check("out, 32 bits", wide.info1 & 0x7F, 1 << 6)?;
    check("what L2 read", guest.gprs.r8 & 0xFFFF, 0xBEEF)?;
    guest.vmcb.set_rip(wide.info2);

    guest.expect(exit::HLT).map(drop)
}

#[unsafe(naked)]
unsafe extern "C" fn program_cr_dr() {
    naked_asm!(
        "mov rax, cr3",
        "mov cr3, rax",
        "mov rax, cr0",
        "mov cr0, rax",
        "mov rbx, 0x400",
        "mov dr7, rbx",
        "mov r8, 1",
        "hlt",
    )
}

pub fn cr_dr() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_cr_dr, 0);
    guest.vmcb.set_cr_intercepts(1 << 3 | 1 << (16 + 3) | 1 << 16);
    guest.vmcb.set_dr_intercepts(1 << (16 + 7));
    guest.expect(exit::CR3_READ)?;
    guest.gprs.rax = guest.vmcb.cr3();
    guest.skip(3);
    guest.expect(exit::CR3_WRITE)?;
    check("rax of the write", guest.gprs.rax, guest.vmcb.cr3())?;
    guest.skip(3);
    guest.expect(exit::CR0_WRITE)?;
    check("CR0 was readable", guest.gprs.rax, guest.vmcb.cr0())?;
    guest.skip(3);
    guest.expect(exit::DR7_WRITE)?;
    guest.skip(3);
    guest.expect(exit::HLT)?;
    check("the end", guest.gprs.r8, 1)
}

/// A write of CR0 that changes only TS and MP does not trigger the selective intercept; one that changes WP does.
#[unsafe(naked)]
unsafe extern "C" fn program_cr0_selective() {
    naked_asm!(
        "mov rax, cr0",
        "xor rax, 8",
        "mov cr0, rax",
        "xor rax, 8",
        "mov cr0, rax",
        "mov r8, 1",
        "xor rax, 0x10000",
        "mov cr0, rax",
        "hlt",
    )
}

pub fn cr0_selective() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_cr0_selective, 0);
    let misc = guest.vmcb.misc1();
    guest.vmcb.set_misc1(misc | misc1::CR0_SEL_WRITE);
    guest.expect(exit::CR0_SEL_WRITE)?;
    check("TS was written before", guest.gprs.r8, 1)?;
    guest.skip(3);
    guest.expect(exit::HLT).map(drop)
}

#[unsafe(naked)]
unsafe extern "C" fn program_exceptions() {
    naked_asm!(
        "ud2",
        "xor edx, edx",
        "xor ecx, ecx",
        "div rcx",
        "mov rax, [rdi]",
        "mov rax, 0x8000000000000000",
        "mov rax, [rax]",
        "hlt",
    )
}

pub fn exceptions() -> Outcome {
    let guest = cpu_guest();
    let unmapped = 0x7F12_3456_7000;
    guest.long_mode(program_exceptions, unmapped);
    // Not #BP: TCG does not intercept what INT3 raises.
    guest.vmcb.set_exception_intercepts(1 | 1 << 6 | 1 << 13 | 1 << 14);
    guest.expect(exit::EXCP_UD)?;
    guest.skip(2);
    guest.expect(exit::EXCP_DE)?;
    guest.skip(3);
    let fault = guest.expect(exit::EXCP_PF)?;
    check("#PF error code", fault.info1, 0)?;
    check("#PF address", fault.info2, unmapped)?;
    guest.skip(3);
    let protection = guest.expect(exit::EXCP_GP)?;
    check("#GP error code", protection.info1, 0)?;
    guest.skip(3);
    guest.expect(exit::HLT).map(drop)
}

/// A guest without an IDT whose exception nobody intercepts shuts down, and only itself.
pub fn shutdown() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_exceptions, 0);
    guest.vmcb.set_idtr_limit(0);
    guest.expect(exit::SHUTDOWN).map(drop)
}

crate::hypercall_program!(
/// The guest's own view of a run that L1 never intercepts: registers, flags and stack survive the world switches.
program_registers, ["push rdi", "mov rcx, 3", "2:"], ["loop 2b", "pop rdi", "hlt"]);

pub fn registers() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(program_registers(), 0x1122_3344_5566_7788);
    for n in 0..3 {
        guest.expect(exit::VMMCALL)?;
        check("rcx", guest.gprs.rcx, 3 - n)?;
        guest.gprs.rbx = guest.gprs.rbx.wrapping_add(0x0101_0101_0101_0101);
        guest.gprs.rdi = 0;
        guest.skip(3);
    }
    guest.expect(exit::HLT)?;
    check("rdi from the stack", guest.gprs.rdi, 0x1122_3344_5566_7788)?;
    check("rbx", guest.gprs.rbx, 0x0303_0303_0303_0303)
}

/// A program that only stops.
#[unsafe(naked)]
pub unsafe extern "C" fn nothing() {
    naked_asm!("hlt")
}
