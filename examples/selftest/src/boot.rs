//! The runtime's own checks: boot information, memory, exceptions, processors.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use rt::cpu::{self, Cpu};
use rt::idt::{self, Frame};
use rt::{BootInfo, ExitCode, apic, frames, println, smp};

/// Checks what the command line announces: `modules=N`, `cpus=N`.
pub fn run(boot: &'static BootInfo) -> ExitCode {
    let number = |name| boot.argument(name).and_then(|n| n.parse().ok());
    let cpus: u32 = number("cpus").unwrap_or(1);
    check_modules(boot, number("modules").unwrap_or(0) as usize);
    check_memory(boot);
    check_exceptions();
    check_processors(cpus);
    println!("boot: {} modules, {} MiB free, {cpus} processors", boot.modules.len(), frames::left() >> 20);
    ExitCode::Success
}

/// Each module announces its own size and first byte on its command line: `bytes=N first=N`.
fn check_modules(boot: &BootInfo, count: usize) {
    assert_eq!(boot.modules.len(), count);
    #[cfg(freestanding)]
    for module in &boot.modules {
        let value = |name: &str| {
            let word = module.command_line.split_ascii_whitespace().find_map(|w| w.strip_prefix(name));
            word.and_then(|v| v.parse::<usize>().ok())
        };
        let bytes = module.bytes();
        assert_eq!(Some(bytes.len()), value("bytes="));
        assert_eq!(bytes.first().map(|b| usize::from(*b)), value("first="));
    }
}

fn check_memory(boot: &BootInfo) {
    assert!(!boot.regions.is_empty(), "no memory map");
    let a = frames::allocate(frames::PAGE, frames::PAGE).expect("a page") as u64;
    let b = frames::allocate(1, 2 << 20).expect("a large page") as u64;
    assert!(a.is_multiple_of(frames::PAGE) && b.is_multiple_of(2 << 20) && b > a);
    for module in &boot.modules {
        assert!(module.end <= a, "memory of a module was handed out");
    }
}

/// Number of times [`skip_ud2`] ran. Relaxed: one processor.
static SKIPPED: AtomicU32 = AtomicU32::new(0);

fn skip_ud2(frame: &mut Frame) {
    assert_eq!((frame.vector, frame.error), (6, 0));
    // What the interrupted code left in its registers is what the handler sees, and the other way round.
    assert_eq!((frame.r12, frame.fx.xmm[3]), (12, 3 << 64 | 33));
    frame.r12 = 21;
    frame.fx.xmm[3] = 44 << 64 | 4;
    // The handler may use SSE and every register.
    // SAFETY: the registers are declared as overwritten.
    unsafe { asm!("pcmpeqd xmm0, xmm0", "pcmpeqd xmm15, xmm15", out("xmm0") _, out("xmm15") _) };
    frame.rip += 2;
    SKIPPED.fetch_add(1, Ordering::Relaxed);
}

/// A real exception, from code with data in its red zone and in every kind of register, which goes on behind it.
fn check_exceptions() {
    idt::on(6, skip_ud2);
    let (red_zone, low, high, zero): (u64, u64, u64, u64);
    let input: [u64; 2] = [33, 3];
    let mut output = [0_u64; 2];
    let r12: u64;
    // SAFETY: the handler skips the UD2; the stack pointer moves past the red zone of the code around, so the word
    // below it is this code's own; all other registers written are declared.
    unsafe {
        asm!(
            "sub rsp, 256",
            "mov qword ptr [rsp - 8], 77",
            "movdqu xmm3, [{input}]",
            "pxor xmm0, xmm0",
            "mov r12, 12",
            "ud2",
            "mov {red_zone}, [rsp - 8]",
            "movdqu [{output}], xmm3",
            "movq {zero}, xmm0",
            "add rsp, 256",
            input = in(reg) &raw const input,
            output = in(reg) &raw mut output,
            red_zone = out(reg) red_zone,
            zero = out(reg) zero,
            out("r12") r12, out("xmm0") _, out("xmm3") _,
        );
    }
    [low, high] = output;
    assert_eq!((red_zone, r12, low, high, zero), (77, 21, 4, 44, 0));
    assert_eq!(SKIPPED.load(Ordering::Relaxed), 1);
    idt::off(6);
}

/// A bit for every processor that has run [`other`], and for each that has answered an NMI.
static RAN: AtomicU64 = AtomicU64::new(0);
static KICKED: AtomicU64 = AtomicU64::new(0);

fn other(cpu: &'static Cpu) {
    // AcqRel: pairs with the load in `check_processors`.
    RAN.fetch_or(1 << cpu.index, Ordering::AcqRel);
    smp::wait(1_000_000_000, || KICKED.load(Ordering::Acquire) & 1 << cpu.index != 0);
}

fn kicked(_: &mut Frame) {
    KICKED.fetch_or(1 << cpu::current().index, Ordering::AcqRel);
}

fn check_processors(count: u32) {
    assert_eq!(cpu::current().index, 0);
    idt::on(2, kicked);
    if let Err(missing) = smp::start(count, other) {
        panic!("{} of {count} processors started", missing.online);
    }
    let others = (1_u64 << count) - 2;
    smp::wait(1_000_000_000, || RAN.load(Ordering::Acquire) == others);
    assert_eq!(RAN.load(Ordering::Acquire), others, "processors that ran");
    for index in 1..count {
        apic::send_nmi(smp::apic_id(index).expect("a processor that ran has an identifier"));
    }
    smp::wait(1_000_000_000, || KICKED.load(Ordering::Acquire) == others);
    assert_eq!(KICKED.load(Ordering::Acquire), others, "processors that took an NMI");
}

/// Ends the run with the report of an exception.
pub fn unhandled_exception() -> ExitCode {
    // SAFETY: the exception never returns.
    unsafe { asm!("ud2") };
    ExitCode::Success
}

/// Ends the run with the report of a fault inside a handler.
pub fn nested_fault() -> ExitCode {
    idt::on(6, |_| {
        // SAFETY: the exception never returns.
        unsafe { asm!("int3") };
    });
    unhandled_exception()
}
