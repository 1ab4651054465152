//! Starting the other processors: INIT, SIPI, a trampoline below 1 MiB, and then a Rust function each.

use crate::cpu::{self, Cpu, MAX_CPUS};
use crate::{apic, frames, idt};
use core::arch::global_asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Where the trampoline is copied to. Free RAM: what the boot loader left there has been copied out by now.
const TRAMPOLINE: u64 = 0x8000;
const MAILBOX: u64 = TRAMPOLINE + 0x800;
const STACK_BYTES: u64 = 64 << 10;

// Real mode to long mode in one step. The addresses are literal: the 64-bit part is at offset 0x100, the mailbox at
// offset 0x800 of the page at TRAMPOLINE. Each processor draws an index; those beyond the limit halt.
global_asm!(
    ".section .rodata.rt_trampoline, \"a\"",
    ".balign 16",
    "rt_trampoline:",
    ".code16",
    "cli",
    "xorw %ax, %ax",
    "movw %ax, %ds",
    "lgdtl 0x8800",
    "movl $0x620, %eax", // CR4: PAE, OSFXSR, OSXMMEXCPT
    "movl %eax, %cr4",
    "movl 0x8808, %eax",
    "movl %eax, %cr3",
    "movl $0xC0000080, %ecx", // EFER: LME
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl $0x80000033, %eax", // CR0: PE, MP, ET, NE, PG
    "movl %eax, %cr0",
    "ljmpl $0x08, $0x8100",
    ".org rt_trampoline + 0x100",
    ".code64",
    "movl $0x10, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movl $1, %eax",
    "lock xaddl %eax, 0x8810",
    "cmpl 0x8814, %eax",
    "jae 2f",
    "movq 0x8840(, %rax, 8), %rsp",
    "movl %eax, %edi",
    "xorl %ebp, %ebp",
    "callq *0x8818",
    "2:",
    "cli",
    "hlt",
    "jmp 2b",
    "rt_trampoline_end:",
    ".text",
    options(att_syntax),
);

unsafe extern "C" {
    static rt_trampoline: u8;
    static rt_trampoline_end: u8;
}

/// What the trampoline reads, at [`MAILBOX`].
#[repr(C)]
struct Mailbox {
    gdt_limit: u16,
    gdt_base: [u16; 2],
    unused: u16,
    cr3: u64,
    /// The next index to draw: the first other processor has index 1.
    next: u32,
    /// Draws from here on halt.
    limit: u32,
    entry: extern "C" fn(u32) -> !,
    gdt: [u64; 4],
    /// Initial stack pointers, by index.
    stacks: [u64; MAX_CPUS],
}

const _: () = assert!(core::mem::offset_of!(Mailbox, next) == 0x10 && core::mem::offset_of!(Mailbox, stacks) == 0x40);

/// What the other processors run.
pub type Main = fn(&'static Cpu);

// Written before the processors start. Release and Acquire carry the memory behind the pointer.
static CPUS: [AtomicPtr<Cpu>; MAX_CPUS] = [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CPUS];
static MAIN: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Processors that run, this one included. AcqRel: a processor that is counted has finished its set-up.
static ONLINE: AtomicU32 = AtomicU32::new(1);

/// Fewer processors came than were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// How many run, this one included.
    pub online: u32,
}

/// The local APIC identifier of the processor with `index`, once it has started.
pub fn apic_id(index: u32) -> Option<u32> {
    let cpu = CPUS.get(index as usize)?.load(Ordering::Acquire);
    // SAFETY: pointers in the table lead to states that live for good; `start` waits until their fields are set.
    (!cpu.is_null()).then(|| unsafe { (*cpu).apic_id })
}

/// Starts other processors until `count` run, this one included; each runs `main`, then halts. Once per image.
pub fn start(count: u32, main: Main) -> Result<(), Missing> {
    let count = count.clamp(1, MAX_CPUS as u32);
    CPUS[0].store(core::ptr::from_ref(cpu::current()).cast_mut(), Ordering::Release);
    if count == 1 {
        return Ok(());
    }
    MAIN.store(main as *mut (), Ordering::Release);
    let mut stacks = [0; MAX_CPUS];
    for (slot, stack) in CPUS.iter().zip(&mut stacks).take(count as usize).skip(1) {
        let memory = frames::allocate(size_of::<Cpu>() as u64, 64).zip(frames::allocate(STACK_BYTES, 64));
        let Some((state, bottom)) = memory else { return Err(Missing { online: 1 }) };
        slot.store(state.cast(), Ordering::Release);
        *stack = bottom as u64 + STACK_BYTES;
    }
    // SAFETY: reading CR3 in ring 0.
    let cr3 = unsafe { x86::controlregs::cr3() };
    let gdt_base = MAILBOX + core::mem::offset_of!(Mailbox, gdt) as u64;
    let mailbox = Mailbox {
        gdt_limit: 4 * 8 - 1,
        gdt_base: [gdt_base as u16, 0],
        unused: 0,
        cr3,
        next: 1,
        limit: count,
        entry: enter,
        gdt: [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0],
        stacks,
    };
    // SAFETY: TRAMPOLINE is a page of RAM below 1 MiB that nothing else uses, mapped to itself; the code is shorter
    // than the 0x800 bytes before the mailbox, and the mailbox shorter than the rest of the page.
    unsafe {
        let bytes = (&raw const rt_trampoline_end) as usize - (&raw const rt_trampoline) as usize;
        core::ptr::copy_nonoverlapping(&raw const rt_trampoline, TRAMPOLINE as *mut u8, bytes);
        (MAILBOX as *mut Mailbox).write_volatile(mailbox);
    }
    apic::send_init_to_others();
    wait(1_000_000, || false);
    apic::send_start_up_to_others((TRAMPOLINE >> 12) as u8);
    wait(1_000_000_000, || ONLINE.load(Ordering::Acquire) >= count);
    match ONLINE.load(Ordering::Acquire) {
        online if online >= count => Ok(()),
        online => Err(Missing { online }),
    }
}

/// Waits for `done`, at most about `ticks` of the time stamp counter.
pub fn wait(ticks: u64, mut done: impl FnMut() -> bool) {
    let start = cpu::tsc();
    while !done() && cpu::tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

extern "C" fn enter(index: u32) -> ! {
    let state = CPUS[index as usize].load(Ordering::Acquire);
    // SAFETY: the index was drawn once, so the state is this processor's alone; it is zeroed memory; the trampoline
    // runs in ring 0 with interrupts off.
    unsafe { Cpu::load(state, index, apic::id()) };
    idt::load();
    apic::enable();
    let main = MAIN.load(Ordering::Acquire);
    // SAFETY: `start` stored a `Main` there before this processor ran.
    let main = unsafe { core::mem::transmute::<*mut (), Main>(main) };
    ONLINE.fetch_add(1, Ordering::AcqRel);
    main(cpu::current());
    loop {
        // SAFETY: nothing is left to do; an interrupt only comes back here.
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}
