//! Exceptions and interrupts: 256 vectors, each on a stack of the interrupt stack table, each able to return.
//!
//! A vector without a handler ends the run with a report. So does a second exception on a stack that still holds the
//! frame of a first: the processor has overwritten that frame, and nothing could return.

use crate::cpu::{self, Ist, TablePointer};
use crate::exit::{ExitCode, exit};
use crate::serial::print_dying;
use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The x87 and SSE state as FXSAVE64 writes it.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct FxState {
    /// FCW to MXCSR_MASK.
    pub control: [u64; 4],
    /// ST0 to ST7.
    pub st: [u128; 8],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// Reserved, and free for software.
    pub rest: [u64; 12],
}

/// All of the interrupted code's registers. What a handler writes here is what the code finds when it goes on.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
#[allow(missing_docs, reason = "each field is the register of its name")]
pub struct Frame {
    pub fx: FxState,
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    /// The vector, 0 to 255.
    pub vector: u64,
    /// The error code that the processor pushed, or 0.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

const _: () = assert!(size_of::<FxState>() == 512 && offset_of!(FxState, xmm) == 160);
const _: () = assert!(size_of::<Frame>() == 688 && offset_of!(Frame, vector) == 512 + 15 * 8);

// One 16-byte stub per vector. Vectors without an error code push a zero in its place; the return address that the
// call pushes tells the vector, and is replaced by it. FXSAVE comes before any compiled code, which may use SSE.
global_asm!(
    ".section .text.rt_vectors, \"ax\"",
    ".macro rt_plain count",
    ".rept \\count",
    ".balign 16",
    "push 0",
    "call rt_common",
    ".endr",
    ".endm",
    ".macro rt_error count",
    ".rept \\count",
    ".balign 16",
    "call rt_common",
    ".endr",
    ".endm",
    ".balign 16",
    "rt_vectors:",
    "rt_plain 8",
    "rt_error 1", // 8: #DF
    "rt_plain 1",
    "rt_error 5", // 10 to 14: #TS #NP #SS #GP #PF
    "rt_plain 2",
    "rt_error 1", // 17: #AC
    "rt_plain 3",
    "rt_error 1", // 21: #CP
    "rt_plain 7",
    "rt_error 2", // 29 and 30: #VC #SX
    "rt_plain 225",
    "rt_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov rax, [rsp + 120]",
    "lea rcx, [rip + rt_vectors]",
    "sub rax, rcx",
    "shr rax, 4",
    "mov [rsp + 120], rax",
    "sub rsp, 512",
    "fxsave64 [rsp]",
    "cld",
    "mov rdi, rsp",
    "call {handle}",
    "fxrstor64 [rsp]",
    "add rsp, 512",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".text",
    handle = sym handle,
);

unsafe extern "C" {
    static rt_vectors: u8;
}

/// What an image does at a vector.
pub type Handler = fn(&mut Frame);

// Written before the vector can fire, by the processor that will see it or before others start: a handler's own data
// is ordered by the Release and Acquire of the pointer.
static HANDLERS: [AtomicPtr<()>; 256] = [const { AtomicPtr::new(core::ptr::null_mut()) }; 256];

// Relaxed: filled by one processor before it loads it or starts another.
static IDT: [[AtomicU64; 2]; 256] = [const { [const { AtomicU64::new(0) }; 2] }; 256];

/// From now on `handler` runs at `vector` instead of the report.
pub fn on(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as *mut (), Ordering::Release);
}

/// From now on `vector` is reported and ends the run, as at boot.
pub fn off(vector: u8) {
    HANDLERS[usize::from(vector)].store(core::ptr::null_mut(), Ordering::Release);
}

const fn stack_of(vector: u64) -> Ist {
    match vector {
        2 => Ist::Nmi,
        8 => Ist::DoubleFault,
        18 => Ist::MachineCheck,
        0..32 => Ist::Exception,
        _ => Ist::Interrupt,
    }
}

/// Fills the table in. Called once, at boot.
#[cfg_attr(not(freestanding), allow(dead_code))]
pub(crate) fn init() {
    for (vector, gate) in (0..).zip(&IDT) {
        let stub = (&raw const rt_vectors) as u64 + vector * 16;
        // Present, interrupt gate.
        let attributes = 0x8E00 | stack_of(vector) as u64;
        let low = stub & 0xFFFF | u64::from(cpu::CODE) << 16 | attributes << 32 | (stub >> 16 & 0xFFFF) << 48;
        gate[0].store(low, Ordering::Relaxed);
        gate[1].store(stub >> 32, Ordering::Relaxed);
    }
}

/// Loads the table on this processor.
pub(crate) fn load() {
    let pointer = TablePointer::new(IDT.as_ptr() as u64, size_of_val(&IDT));
    // SAFETY: `init` has filled the table, which lives as long as the image.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack, preserves_flags)) };
}

extern "C" fn handle(frame: &mut Frame) {
    let cpu = cpu::current();
    let stack = stack_of(frame.vector);
    let busy = &cpu.busy[stack as usize];
    // Relaxed: only this processor touches its own flags.
    if busy.swap(true, Ordering::Relaxed) {
        report(frame, "nested fault on one interrupt stack");
    }
    let handler = HANDLERS[frame.vector as usize & 0xFF].load(Ordering::Acquire);
    if handler.is_null() {
        report(frame, "unhandled");
    }
    // SAFETY: only `on` writes non-null values, and they are handlers.
    let handler = unsafe { core::mem::transmute::<*mut (), Handler>(handler) };
    handler(frame);
    busy.store(false, Ordering::Relaxed);
}

const NAMES: [&str; 32] = [
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF", "15", "#MF",
    "#AC", "#MC", "#XM", "#VE", "#CP", "22", "23", "24", "25", "26", "27", "#HV", "#VC", "#SX", "31",
];

/// Says what happened where, and ends the run.
fn report(f: &Frame, what: &str) -> ! {
    let cpu = cpu::current().index;
    let name = NAMES.get(f.vector as usize).unwrap_or(&"interrupt");
    // SAFETY: reading CR2 and CR3 in ring 0.
    let (cr2, cr3) = unsafe { (x86::controlregs::cr2(), x86::controlregs::cr3()) };
    print_dying(format_args!(
        "\ncpu {cpu}: {what}: {name} (vector {}), error {:#x}, cr2 {cr2:#x}, cr3 {cr3:#x}\n\
         rip {:x}:{:016x} rflags {:08x} rsp {:x}:{:016x}\n\
         rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n\
         rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}\n\
         r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}\n\
         r13 {:016x} r14 {:016x} r15 {:016x}\n",
        f.vector,
        f.error,
        f.cs,
        f.rip,
        f.rflags,
        f.ss,
        f.rsp,
        f.rax,
        f.rbx,
        f.rcx,
        f.rdx,
        f.rsi,
        f.rdi,
        f.rbp,
        f.r8,
        f.r9,
        f.r10,
        f.r11,
        f.r12,
        f.r13,
        f.r14,
        f.r15
    ));
    exit(ExitCode::Failure)
}
