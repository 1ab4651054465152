//! SVM instructions and the world switch (APM volume 2, chapter 15).

use core::arch::{asm, naked_asm};
use core::mem::offset_of;

pub use crate::gprs::Gprs;
use crate::{cpu, msr};

/// A world switch: RBX, RBP, then RCX, RDX and RDI (from the top: `[rsp + 16]`, `[rsp + 8]`, `[rsp]`) on the stack; what
/// comes `before`; the guest's registers and VMRUN; the guest's registers stored; what comes `after`, when only RAX may
/// be used. In place, so that the caller saves only what it still needs.
macro_rules! world_switch {
    (before: [$($before:literal),*], after: [$($after:literal),*], $($operand:tt)*) => {
        asm!(
            "push rbx",
            "push rbp",
            "push rcx",
            "push rdx",
            "push rdi",
            $($before,)*
            "mov rax, rsi",
            "mov rcx, [rdi + {rcx}]",
            "mov rdx, [rdi + {rdx}]",
            "mov rbx, [rdi + {rbx}]",
            "mov rbp, [rdi + {rbp}]",
            "mov rsi, [rdi + {rsi}]",
            "mov r8, [rdi + {r8}]",
            "mov r9, [rdi + {r9}]",
            "mov r10, [rdi + {r10}]",
            "mov r11, [rdi + {r11}]",
            "mov r12, [rdi + {r12}]",
            "mov r13, [rdi + {r13}]",
            "mov r14, [rdi + {r14}]",
            "mov r15, [rdi + {r15}]",
            "mov rdi, [rdi + {rdi}]",
            "vmrun rax",
            // RAX and RSP are the host's again; all else is the guest's.
            "mov rax, [rsp]",
            "mov [rax + {rcx}], rcx",
            "mov [rax + {rdx}], rdx",
            "mov [rax + {rbx}], rbx",
            "mov [rax + {rbp}], rbp",
            "mov [rax + {rsi}], rsi",
            "mov [rax + {rdi}], rdi",
            "mov [rax + {r8}], r8",
            "mov [rax + {r9}], r9",
            "mov [rax + {r10}], r10",
            "mov [rax + {r11}], r11",
            "mov [rax + {r12}], r12",
            "mov [rax + {r13}], r13",
            "mov [rax + {r14}], r14",
            "mov [rax + {r15}], r15",
            $($after,)*
            "add rsp, 24",
            "pop rbp",
            "pop rbx",
            rcx = const offset_of!(Gprs, rcx),
            rdx = const offset_of!(Gprs, rdx),
            rbx = const offset_of!(Gprs, rbx),
            rbp = const offset_of!(Gprs, rbp),
            rsi = const offset_of!(Gprs, rsi),
            rdi = const offset_of!(Gprs, rdi),
            r8 = const offset_of!(Gprs, r8),
            r9 = const offset_of!(Gprs, r9),
            r10 = const offset_of!(Gprs, r10),
            r11 = const offset_of!(Gprs, r11),
            r12 = const offset_of!(Gprs, r12),
            r13 = const offset_of!(Gprs, r13),
            r14 = const offset_of!(Gprs, r14),
            r15 = const offset_of!(Gprs, r15),
            out("rax") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            $($operand)*
        )
    };
}

/// Runs the guest of the VMCB at `vmcb` until its #VMEXIT.
///
/// Around it the state that VMRUN leaves alone is switched: `guest_state` and `host_state` are physical addresses of
/// VMCBs for VMLOAD and VMSAVE (FS, GS, TR, LDTR, KernelGsBase, STAR, LSTAR, CSTAR, SFMASK, SYSENTER_*). On return the
/// host's are loaded, so exceptions and, once GIF is set, NMIs find the host's TSS.
///
/// # Safety
/// GIF is clear and EFER.SVME set. `gprs` is the program's to change; the three addresses are of pages that live on and
/// are this processor's; the VMCB's guest is confined to memory that is not the program's. x87, SSE and AVX registers
/// are the guest's before and after: the program does not use them.
#[inline(always)]
pub unsafe fn run(gprs: *mut Gprs, vmcb: u64, guest_state: u64, host_state: u64) {
    // SAFETY: the caller vouches for the addresses; every register that the guest changes is restored or given up.
    unsafe {
        world_switch!(
            before: ["mov rax, rdx", "vmload rax"],
            after: ["mov rax, [rsp + 8]", "vmsave rax", "mov rax, [rsp + 16]", "vmload rax"],
            inout("rdi") gprs => _, inout("rsi") vmcb => _, inout("rdx") guest_state => _, inout("rcx") host_state => _
        );
    }
}

/// As [`run`], for a guest that shares the state of VMLOAD and VMSAVE with the program.
///
/// # Safety
/// As [`run`]; and the guest leaves that state as it is.
#[inline(always)]
pub unsafe fn run_sharing_state(gprs: *mut Gprs, vmcb: u64) {
    // SAFETY: as for `run`.
    unsafe {
        world_switch!(
            before: [],
            after: [],
            inout("rdi") gprs => _, inout("rsi") vmcb => _, out("rdx") _, out("rcx") _
        );
    }
}

/// What the processor offers of SVM: CPUID leaf 0x8000_000A, or `None` without SVM (0x8000_0001 ECX bit 2).
pub fn capabilities() -> Option<cpu::CpuidResult> {
    if cpu::cpuid(0x8000_0000, 0).eax < 0x8000_000a || cpu::cpuid(0x8000_0001, 0).ecx & 1 << 2 == 0 {
        return None;
    }
    Some(cpu::cpuid(0x8000_000a, 0))
}

/// Sets EFER.SVME and the host save area of this processor. `false` when VM_CR.SVMDIS forbids it.
///
/// # Safety
/// [`capabilities`] is `Some`; the 4 KiB page at physical address `host_save` is the processor's from now on.
pub unsafe fn enable(host_save: u64) -> bool {
    // SAFETY: SVM processors have these MSRs; the page is the caller's gift.
    unsafe {
        if msr::rdmsr(msr::VM_CR) & 1 << 4 != 0 {
            return false;
        }
        msr::wrmsr(msr::EFER, msr::rdmsr(msr::EFER) | msr::EFER_SVME);
        msr::wrmsr(msr::VM_HSAVE_PA, host_save);
    }
    true
}

/// VMSAVE to the VMCB at physical address `vmcb`.
///
/// # Safety
/// EFER.SVME is set and the page is the caller's to write.
#[inline]
pub unsafe fn vmsave(vmcb: u64) {
    // SAFETY: the caller vouches for the page.
    unsafe { asm!("vmsave rax", in("rax") vmcb, options(nostack, preserves_flags)) };
}

/// VMLOAD from the VMCB at physical address `vmcb`.
///
/// # Safety
/// EFER.SVME is set and the page holds state that the program can run with.
#[inline]
pub unsafe fn vmload(vmcb: u64) {
    // SAFETY: the caller vouches for the state.
    unsafe { asm!("vmload rax", in("rax") vmcb, options(nostack, preserves_flags)) };
}

/// CLGI: holds interrupts, NMIs, SMIs and INITs.
///
/// # Safety
/// EFER.SVME is set.
#[inline]
pub unsafe fn clgi() {
    // SAFETY: holding events harms nothing that the caller did not ask for.
    unsafe { asm!("clgi", options(nostack, preserves_flags)) };
}

/// STGI, one NOP for held events to arrive, CLGI.
///
/// # Safety
/// EFER.SVME is set; interrupt table, TSS and stacks are the program's, so that an NMI can be taken here.
#[inline]
pub unsafe fn take_held_events() {
    // SAFETY: the caller vouches for the interrupt table.
    unsafe { asm!("stgi", "nop", "clgi", options(nostack)) };
}

/// INVLPGA: drops the translation of `address` tagged with `asid`.
///
/// # Safety
/// EFER.SVME is set. Dropping a translation is harmless.
#[inline]
pub unsafe fn invlpga(address: u64, asid: u32) {
    // SAFETY: only cached translations are dropped.
    unsafe { asm!("invlpga rax, ecx", in("rax") address, in("ecx") asid, options(nostack, preserves_flags)) };
}

/// STGI: lets held interrupts, NMIs, SMIs and INITs in.
///
/// # Safety
/// EFER.SVME is set; an interrupt table is loaded that can take what was held.
#[inline]
pub unsafe fn stgi() {
    // SAFETY: the caller vouches for the interrupt table.
    unsafe { asm!("stgi", options(nostack)) };
}

/// Sets GIF, halts until an NMI has been taken, and clears GIF again.
///
/// An NMI that comes between STGI and HLT must not be slept through: its handler calls [`skip_wait`].
///
/// # Safety
/// GIF is clear, EFER.SVME set, RFLAGS.IF clear; an NMI handler is in place.
#[unsafe(naked)]
#[allow(named_asm_labels, reason = "a naked function is assembled once; only older compilers warn")]
pub unsafe extern "C" fn wait_for_nmi() {
    naked_asm!(
        ".globl hw_svm_wait_start",
        ".globl hw_svm_wait_end",
        "stgi",
        "hw_svm_wait_start:",
        "hlt",
        "hw_svm_wait_end:",
        "clgi",
        "ret",
    )
}

unsafe extern "C" {
    static hw_svm_wait_start: u8;
    static hw_svm_wait_end: u8;
}

/// Where code goes on that an NMI interrupted at `rip`: behind the HLT of [`wait_for_nmi`] if it was about to halt.
pub fn skip_wait(rip: u64) -> u64 {
    if rip == (&raw const hw_svm_wait_start) as u64 { (&raw const hw_svm_wait_end) as u64 } else { rip }
}
