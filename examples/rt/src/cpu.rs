//! Per-processor state: GDT, TSS, the stacks of the interrupt stack table, and the index that `gs` leads to.

use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::AtomicBool;

/// Most processors an image runs on.
pub const MAX_CPUS: usize = 16;

/// The kernel's 64-bit code segment.
pub const CODE: u16 = 0x08;
/// The kernel's data segment.
pub const DATA: u16 = 0x10;
const TASK: u16 = 0x18;
/// A 32-bit code segment over the low 4 GiB, for code that runs in compatibility mode.
pub const CODE32: u16 = 0x28;

/// The five stacks that exceptions and interrupts run on, by their number in the interrupt stack table.
///
/// Compiled code may keep data below its stack pointer (the red zone), so every vector switches stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ist {
    /// Exceptions that have no stack of their own.
    Exception = 1,
    /// Double faults.
    DoubleFault = 2,
    /// Non-maskable interrupts.
    Nmi = 3,
    /// Machine checks.
    MachineCheck = 4,
    /// Vectors 32 and up.
    Interrupt = 5,
}

const STACKS: usize = 5;
const STACK_BYTES: usize = 16 << 10;

#[repr(C, align(16))]
struct Stack([u8; STACK_BYTES]);

/// 64-bit task state segment (SDM volume 3, 9.7; APM volume 2, 12.2.5), in words of 32 bits as its fields are unaligned.
#[repr(C)]
struct Tss([u32; 26]);

/// One processor.
#[repr(C)]
pub struct Cpu {
    /// Its own address: `gs` points here.
    this: *const Cpu,
    /// 0 for the processor that booted, then in the order of start-up.
    pub index: u32,
    /// Its local APIC's identifier.
    pub apic_id: u32,
    /// Which interrupt stacks hold a frame.
    pub(crate) busy: [AtomicBool; STACKS + 1],
    gdt: [u64; 6],
    tss: Tss,
    stacks: [Stack; STACKS],
}

impl Cpu {
    /// A processor's state before [`load`](Self::load). All zero, so that it costs no space in an image.
    pub const fn new() -> Cpu {
        Cpu {
            this: core::ptr::null(),
            index: 0,
            apic_id: 0,
            busy: [const { AtomicBool::new(false) }; STACKS + 1],
            gdt: [0; 6],
            tss: Tss([0; 26]),
            stacks: [const { Stack([0; STACK_BYTES]) }; STACKS],
        }
    }

    /// Makes `cpu` the state of the processor this runs on: GDT, TSS, data segments, `gs`.
    ///
    /// # Safety
    /// `cpu` is this processor's alone, for good, and zero or from [`new`](Self::new). The code runs in ring 0 with
    /// interrupts off.
    pub unsafe fn load(cpu: *mut Cpu, index: u32, apic_id: u32) {
        // SAFETY: exclusive by this function's contract; the reference ends before the tables are loaded.
        let state = unsafe { &mut *cpu };
        state.this = cpu;
        state.index = index;
        state.apic_id = apic_id;
        for (i, stack) in state.stacks.iter().enumerate() {
            let top = core::ptr::from_ref(stack) as u64 + STACK_BYTES as u64;
            // IST 1 is at byte 36 of the TSS; each is two words.
            state.tss.0[9 + 2 * i] = top as u32;
            state.tss.0[10 + 2 * i] = (top >> 32) as u32;
        }
        // No I/O permission map: its offset lies behind the segment's limit.
        state.tss.0[25] = 104 << 16;
        let tss = cpu as u64 + offset_of!(Cpu, tss) as u64;
        let low = 103 | (tss & 0xFF_FFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56;
        state.gdt = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, low, tss >> 32, 0x00CF_9B00_0000_FFFF];
        let pointer = TablePointer::new(state.gdt.as_ptr() as u64, size_of_val(&state.gdt));
        // SAFETY: the descriptors describe flat segments and a TSS that live as long as the image; `gs` is loaded with
        // the null selector first, then its base through the MSR.
        unsafe {
            asm!(
                "lgdt [{pointer}]",
                "push {code}",
                "lea {scratch}, [rip + 2f]",
                "push {scratch}",
                "retfq",
                "2:",
                "mov ds, {data:e}",
                "mov es, {data:e}",
                "mov ss, {data:e}",
                "xor {scratch:e}, {scratch:e}",
                "mov fs, {scratch:e}",
                "mov gs, {scratch:e}",
                "ltr {task:x}",
                pointer = in(reg) &raw const pointer,
                code = in(reg) u64::from(CODE),
                data = in(reg) u32::from(DATA),
                task = in(reg) TASK,
                scratch = out(reg) _,
            );
            x86::msr::wrmsr(x86::msr::IA32_GS_BASE, cpu as u64);
        }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// The operand of LGDT and LIDT.
#[repr(C, packed)]
pub(crate) struct TablePointer {
    limit: u16,
    base: u64,
}

impl TablePointer {
    pub(crate) const fn new(base: u64, bytes: usize) -> Self {
        TablePointer { limit: (bytes - 1) as u16, base }
    }
}

/// The processor this runs on.
pub fn current() -> &'static Cpu {
    let cpu: *const Cpu;
    // SAFETY: `gs` points to this processor's `Cpu`, whose first field is its own address, from `Cpu::load` on, which
    // comes before any code that calls this.
    unsafe { asm!("mov {}, gs:[0]", out(reg) cpu, options(nostack, readonly, preserves_flags)) };
    // SAFETY: see above; after `load` nobody writes the plain fields.
    unsafe { &*cpu }
}

/// Lets `f` run with no interrupts coming in; does not hold back NMIs.
pub fn without_interrupts<R>(f: impl FnOnce() -> R) -> R {
    let flags: u64;
    // SAFETY: reading RFLAGS and clearing IF in ring 0.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    let result = f();
    if flags & (1 << 9) != 0 {
        // SAFETY: interrupts were on before.
        unsafe { asm!("sti") };
    }
    result
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC has no effect beyond its result; ring 0 may always execute it.
    unsafe { x86::time::rdtsc() }
}
