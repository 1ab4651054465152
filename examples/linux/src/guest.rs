//! L2: its memory map, its page tables and its programs.
//!
//! The programs run at ring 0 in long mode without interrupts. They are position-independent and are copied to
//! [`CODE`]. Each starts with RDI = the processor's number and ends with HLT.

use std::arch::global_asm;
use std::sync::atomic::AtomicU64;

/// Processors that the memory map has room for.
pub const MAX_PROCESSORS: u32 = 8;
/// L2's memory in bytes.
pub const MEMORY: usize = 4 << 20;

/// Page tables: the first 4 MiB one to one, and one page table for the pages from [`WINDOW`] on.
pub const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD_LOW: u64 = 0x3000;
const PD_WINDOW: u64 = 0x4000;
const PT_WINDOW: u64 = 0x5000;
/// [`Shared`].
pub const SHARED: u64 = 0x6000;
/// Input page of hypercalls.
pub const INPUT: u64 = 0x7000;
/// Where the programs are.
pub const CODE: u64 = 0x8000;
/// Two pages for each processor, which take turns behind its page of the window.
const PAGES: u64 = 0x2_0000;
/// Linear address of the pages that are remapped: page N belongs to processor N.
pub const WINDOW: u64 = 0x4000_0000;

/// Present, writable, accessed, dirty.
const ENTRY: u64 = 0x63;
/// Page size bit of a 2 MiB entry.
const LARGE: u64 = 0x80;

/// Port on which the plain program reports: the low byte of its round.
pub const PORT_ROUND: u16 = 0x10;
/// Port on which a program gives its verdict.
pub const PORT_VERDICT: u16 = 0x11;
/// The verdicts.
pub const GOOD: u8 = b'k';
/// What was read was not what was written, or a hypercall failed.
pub const BAD: u8 = b'f';
/// A processor that should read does not go on.
pub const STUCK: u8 = b's';

/// Rounds between two exits of the plain program.
pub const ROUNDS_PER_EXIT: u64 = 64;

/// What the launcher and the programs share, and the programs among themselves.
#[repr(C)]
pub struct Shared {
    /// Every read after now must see at least this generation.
    pub epoch: AtomicU64,
    /// Not zero: readers stop.
    pub stop: AtomicU64,
    /// Rounds to do.
    pub rounds: AtomicU64,
    /// Processors of this guest.
    pub processors: AtomicU64,
    /// Not zero: flush, with RCX, RDX, R8 and the low half of XMM0 as below.
    pub flush: AtomicU64,
    /// The hypercall's input value.
    pub rcx: AtomicU64,
    /// Its second register.
    pub rdx: AtomicU64,
    /// Its third register.
    pub r8: AtomicU64,
    /// Its fourth word.
    pub xmm0: AtomicU64,
    /// Result of the last hypercall that failed.
    pub result: AtomicU64,
    /// Hypercalls that were made.
    pub calls: AtomicU64,
    _pad: [u64; 5],
    /// For each processor that reads: how often, and how often it saw an old generation.
    pub readers: [Reader; MAX_PROCESSORS as usize],
}

/// A reader's counters, on a cache line of their own.
#[repr(C, align(64))]
pub struct Reader {
    /// Reads.
    pub reads: AtomicU64,
    /// Stale reads.
    pub stale: AtomicU64,
}

const _: () = assert!(std::mem::offset_of!(Shared, readers) == 128 && size_of::<Reader>() == 64);

/// Writes the page tables. `put(address, value)` writes 8 bytes of L2's memory.
pub fn page_tables(mut put: impl FnMut(u64, u64)) {
    put(PML4, PDPT | ENTRY);
    put(PDPT, PD_LOW | ENTRY);
    put(PDPT + 8, PD_WINDOW | ENTRY);
    for n in 0..2 {
        put(PD_LOW + 8 * n, n << 21 | ENTRY | LARGE);
    }
    put(PD_WINDOW, PT_WINDOW | ENTRY);
    for n in 0..u64::from(MAX_PROCESSORS) {
        put(PT_WINDOW + 8 * n, (PAGES + n * 0x2000) | ENTRY);
    }
}

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Remaps its own page, invalidates it with INVLPG and reads it, with CPUID and port I/O in between.
    Plain,
    /// Remaps page 0 of the window and flushes it as [`Shared`] says, while the others read it.
    Initiate,
    /// Reads page 0 of the window until told to stop.
    Read,
}

unsafe extern "C" {
    static l2_start: u8;
    static l2_plain: u8;
    static l2_initiate: u8;
    static l2_read: u8;
    static l2_end: u8;
}

/// The programs' bytes.
pub fn code() -> Vec<u8> {
    // SAFETY: both symbols are of the same object, below.
    let code = unsafe {
        std::slice::from_raw_parts(&raw const l2_start, &raw const l2_end as usize - &raw const l2_start as usize)
    };
    let mut code = code.to_vec();
    if !is_amd() {
        let at = code.windows(3).position(|bytes| bytes == VMMCALL).expect("the hypercall");
        code[at..at + 3].copy_from_slice(&VMCALL);
    }
    code
}

const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];

/// True on AMD's processors: hypercalls are VMMCALL, on others VMCALL.
fn is_amd() -> bool {
    // Safe in newer compilers than the oldest that is supported.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
    // "AuthenticAMD"
    leaf.ebx == u32::from_le_bytes(*b"Auth")
}

/// Where `program` starts in L2.
pub fn entry(program: Program) -> u64 {
    let start = match program {
        Program::Plain => &raw const l2_plain,
        Program::Initiate => &raw const l2_initiate,
        Program::Read => &raw const l2_read,
    };
    CODE + (start as u64 - &raw const l2_start as u64)
}

global_asm!(
    ".pushsection .rodata.l2, \"a\"",
    ".balign 16",
    ".globl l2_start, l2_plain, l2_initiate, l2_read, l2_end",
    "l2_start:",
    //
    // RBX = round, R8 = the page's entry, R9 = its linear address, R10 = the page that is mapped now.
    "l2_plain:",
    "mov rsi, rdi",
    "shl rsi, 12",
    "lea r9, [rsi + {window}]",
    "lea r10, [rsi * 2 + {pages}]",
    "lea r8, [rdi * 8 + {pt_window}]",
    "mov rbx, [{shared} + {rounds}]",
    "2:",
    "xor r10, 0x1000",
    "mov [r10], rbx",
    "lea rax, [r10 + {entry}]",
    "mov [r8], rax",
    "invlpg [r9]",
    "cmp rbx, [r9]",
    "jne 4f",
    "test bl, {exit_mask}",
    "jnz 3f",
    "mov eax, ebx",
    "out {port_round}, al",
    "mov r11, rbx",
    "xor eax, eax",
    "xor ecx, ecx",
    "cpuid",
    "mov rbx, r11",
    "3:",
    "dec rbx",
    "jnz 2b",
    "mov al, {good}",
    "jmp 5f",
    "4:",
    "mov al, {bad}",
    "5:",
    "out {port_verdict}, al",
    "hlt",
    "jmp 5b",
    //
    // RSI = its counters. The epoch is read before the page: a read after the epoch was raised must see the new page.
    "l2_read:",
    "shl rdi, 6",
    "lea rsi, [rdi + {shared} + {readers}]",
    "2:",
    "mov rdx, [{shared} + {epoch}]",
    "mov rax, [{window}]",
    "inc qword ptr [rsi + {reads}]",
    "cmp rax, rdx",
    "jae 3f",
    "inc qword ptr [rsi + {stale}]",
    "3:",
    "cmp qword ptr [{shared} + {stop}], 0",
    "je 2b",
    "mov al, {good}",
    "4:",
    "out {port_verdict}, al",
    "hlt",
    "jmp 4b",
    //
    // RBX = generation, R10 = the page that is mapped now, R14 = verdict.
    "l2_initiate:",
    "mov r14d, {good}",
    "mov r10d, {pages}",
    "xor ebx, ebx",
    "2:",
    "call 7f",
    "inc rbx",
    "cmp rbx, [{shared} + {rounds}]",
    "ja 5f",
    "xor r10, 0x1000",
    "mov [r10], rbx",
    "lea rax, [r10 + {entry}]",
    "mov [{pt_window}], rax",
    "cmp qword ptr [{shared} + {flush}], 0",
    "je 3f",
    "mov rcx, [{shared} + {rcx}]",
    "mov rdx, [{shared} + {rdx}]",
    "mov r8, [{shared} + {r8}]",
    "movq xmm0, [{shared} + {xmm0}]",
    // As every caller does: writes its input. Only then is the page in L1's nested tables.
    "mov rax, [{input}]",
    "mov [{input}], rax",
    "inc qword ptr [{shared} + {calls}]",
    "vmmcall",
    "test ax, ax",
    "jnz 4f",
    "3:",
    "mov rax, rbx",
    "xchg [{shared} + {epoch}], rax",
    "jmp 2b",
    "4:",
    "mov [{shared} + {result}], rax",
    "mov r14d, {bad}",
    "5:",
    "mov eax, 1",
    "xchg [{shared} + {stop}], rax",
    "mov eax, r14d",
    "6:",
    "out {port_verdict}, al",
    "hlt",
    "jmp 6b",
    // Waits until every other processor has read some more. R12 = its counters, R13 = what to reach, R15 = patience.
    "7:",
    "mov r11, [{shared} + {processors}]",
    "dec r11",
    "jz 10f",
    "8:",
    "mov r12, r11",
    "shl r12, 6",
    "add r12, {shared} + {readers}",
    "mov r13, [r12 + {reads}]",
    "add r13, 20",
    "mov r15, 2000000000",
    "9:",
    "pause",
    "dec r15",
    "jz 11f",
    "cmp r13, [r12 + {reads}]",
    "ja 9b",
    "dec r11",
    "jnz 8b",
    "10:",
    "ret",
    "11:",
    "mov r14d, {stuck}",
    "jmp 5b",
    "l2_end:",
    ".popsection",
    window = const WINDOW,
    pages = const PAGES,
    pt_window = const PT_WINDOW,
    shared = const SHARED,
    input = const INPUT,
    entry = const ENTRY,
    exit_mask = const ROUNDS_PER_EXIT - 1,
    port_round = const PORT_ROUND,
    port_verdict = const PORT_VERDICT,
    good = const GOOD,
    bad = const BAD,
    stuck = const STUCK,
    epoch = const std::mem::offset_of!(Shared, epoch),
    stop = const std::mem::offset_of!(Shared, stop),
    rounds = const std::mem::offset_of!(Shared, rounds),
    processors = const std::mem::offset_of!(Shared, processors),
    flush = const std::mem::offset_of!(Shared, flush),
    rcx = const std::mem::offset_of!(Shared, rcx),
    rdx = const std::mem::offset_of!(Shared, rdx),
    r8 = const std::mem::offset_of!(Shared, r8),
    xmm0 = const std::mem::offset_of!(Shared, xmm0),
    result = const std::mem::offset_of!(Shared, result),
    calls = const std::mem::offset_of!(Shared, calls),
    readers = const std::mem::offset_of!(Shared, readers),
    reads = const std::mem::offset_of!(Reader, reads),
    stale = const std::mem::offset_of!(Reader, stale),
);
