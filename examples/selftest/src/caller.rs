//! Executes an interrupt with chosen values in real registers, in 64-bit or in compatibility mode, and reads them back.

/// The vector that stands for VMCALL and VMMCALL, which need a hypervisor below.
pub const VECTOR: u8 = 0x40;

/// Length of the `int` instruction.
pub const INSTRUCTION: u64 = 2;

/// The registers that a hypercall's conventions name, and some that they do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    /// R9 to R14 and RBP: no call changes them.
    pub others: [u64; 7],
    pub xmm: [[u64; 2]; 6],
    /// XMM6 and XMM15: no call changes them.
    pub other_xmm: [[u64; 2]; 2],
}

impl Registers {
    /// A different value in each register, none of which is zero.
    pub fn distinct() -> Registers {
        let value = |n: u64| 0xA5A5_0000_0000_0000 | n << 32 | 0x5A00 | n;
        let pair = |n: u64| [value(n), value(n + 1)];
        Registers {
            rax: value(1),
            rbx: value(2),
            rcx: value(3),
            rdx: value(4),
            rsi: value(5),
            rdi: value(6),
            r8: value(7),
            others: core::array::from_fn(|i| value(10 + i as u64)),
            xmm: core::array::from_fn(|i| pair(20 + 2 * i as u64)),
            other_xmm: [pair(40), pair(42)],
        }
    }
}

/// Which code segment executes the interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode: a 32-bit caller as far as the processor is concerned.
    Compatibility,
}

impl Mode {
    /// Both.
    pub const ALL: [Mode; 2] = [Mode::Long, Mode::Compatibility];
}

#[cfg(freestanding)]
core::arch::global_asm!(
    ".macro selftest_load",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov r15, rdi",
    "mov rax, [r15]",
    "mov rbx, [r15 + 8]",
    "mov rcx, [r15 + 16]",
    "mov rdx, [r15 + 24]",
    "mov rsi, [r15 + 32]",
    "mov rdi, [r15 + 40]",
    "mov r8, [r15 + 48]",
    "mov r9, [r15 + 56]",
    "mov r10, [r15 + 64]",
    "mov r11, [r15 + 72]",
    "mov r12, [r15 + 80]",
    "mov r13, [r15 + 88]",
    "mov r14, [r15 + 96]",
    "mov rbp, [r15 + 104]",
    "movdqu xmm0, [r15 + 112]",
    "movdqu xmm1, [r15 + 128]",
    "movdqu xmm2, [r15 + 144]",
    "movdqu xmm3, [r15 + 160]",
    "movdqu xmm4, [r15 + 176]",
    "movdqu xmm5, [r15 + 192]",
    "movdqu xmm6, [r15 + 208]",
    "movdqu xmm15, [r15 + 224]",
    ".endm",
    ".macro selftest_store",
    "mov [r15], rax",
    "mov [r15 + 8], rbx",
    "mov [r15 + 16], rcx",
    "mov [r15 + 24], rdx",
    "mov [r15 + 32], rsi",
    "mov [r15 + 40], rdi",
    "mov [r15 + 48], r8",
    "mov [r15 + 56], r9",
    "mov [r15 + 64], r10",
    "mov [r15 + 72], r11",
    "mov [r15 + 80], r12",
    "mov [r15 + 88], r13",
    "mov [r15 + 96], r14",
    "mov [r15 + 104], rbp",
    "movdqu [r15 + 112], xmm0",
    "movdqu [r15 + 128], xmm1",
    "movdqu [r15 + 144], xmm2",
    "movdqu [r15 + 160], xmm3",
    "movdqu [r15 + 176], xmm4",
    "movdqu [r15 + 192], xmm5",
    "movdqu [r15 + 208], xmm6",
    "movdqu [r15 + 224], xmm15",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".endm",
    ".text",
    "selftest_call_long:",
    "selftest_load",
    "int 0x40",
    "selftest_store",
    // Far returns to the 32-bit segment and back change no register.
    "selftest_call_compatibility:",
    "selftest_load",
    "push 0x28",
    "push offset selftest_in_32_bits",
    "retfq",
    ".code32",
    "selftest_in_32_bits:",
    "int 0x40",
    "push 0x08",
    ".byte 0x68", // push imm32: the assembler would choose 16 bits
    ".long selftest_in_64_bits",
    "retf",
    ".code64",
    "selftest_in_64_bits:",
    "selftest_store",
);

#[cfg(freestanding)]
unsafe extern "C" {
    fn selftest_call_long(registers: *mut Registers);
    fn selftest_call_compatibility(registers: *mut Registers);
}

const _: () = assert!(rt::cpu::CODE32 == 0x28 && rt::cpu::CODE == 0x08 && VECTOR == 0x40);
const _: () = assert!(core::mem::offset_of!(Registers, xmm) == 112 && size_of::<Registers>() == 240);

/// Executes `int` with `registers` loaded, and leaves there what they hold afterwards.
#[cfg(freestanding)]
pub fn interrupt(mode: Mode, registers: &mut Registers) {
    // SAFETY: the functions save what the C convention says, use the stack alone besides `registers`, and a handler for
    // the vector is in place: without one the run would end.
    unsafe {
        match mode {
            Mode::Long => selftest_call_long(registers),
            Mode::Compatibility => selftest_call_compatibility(registers),
        }
    }
}

/// A hosted build runs no test.
#[cfg(not(freestanding))]
pub fn interrupt(_: Mode, _: &mut Registers) {
    unreachable!("a hosted build runs no test");
}
