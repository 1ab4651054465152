//! Flush calls of L2 whose targets are on other processors: what they cost, and whom they disturb.
//!
//! The other processors of the VM either run it, in a loop of PAUSE, or have been descheduled: this hypervisor runs there
//! instead. By the direct path L0 flushes them; by the reflected one this hypervisor does, as one without enlightenments
//! would: an interrupt to those that run, a mark for the others.
//!
//! What a call waits for others is not its cost: L0 counts the ticks from before its first poll to after its last, and
//! tells them by its test hooks; this hypervisor counts its own. Exits are those of all processors, less those of the
//! same loop without the call.

use super::{FLAGS, FLUSH, SAMPLES, Samples, report};
use crate::guest::{Exit, Guest};
use crate::npt::Table;
use crate::vmcb::{exit, misc1};
use crate::{Failure, check, cpu_guest, hyperv, smp};
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use hw::cpu::rdtsc;
use rt::cpu::MAX_CPUS;
use rt::idt::Frame;

/// The vector by which a processor is asked to flush.
const VECTOR: u8 = 0x61;
const VM_ID: u64 = 0x44;
const V_INTR_MASKING: u64 = 1 << 24;

/// L0's test hooks: a letter written to its port chooses what the port reads as.
#[derive(Clone, Copy)]
enum Hook {
    /// Ticks that flushes of this processor waited.
    Wait = b'w' as isize,
    /// Exits of all processors.
    Exits = b'e' as isize,
    /// VMRUNs of all processors that entered L2.
    Entries = b'v' as isize,
}

fn ask(hook: Hook) -> u32 {
    // SAFETY: L0's own port; it has no effect on anything else.
    unsafe {
        hw::port::outb(0xE9, hook as u8);
        hw::port::inl(0xE9)
    }
}

/// A processor of the VM other than the caller's.
struct Target {
    /// The program in L2 is to end.
    stop: AtomicU32,
    /// It has begun: 1. It has ended, and this hypervisor runs: 2.
    ready: AtomicU32,
    /// Runs L2, as far as this hypervisor can tell.
    runs: AtomicBool,
    /// Is to flush before it runs L2 again.
    marked: AtomicBool,
    apic_id: AtomicU32,
}

static TARGETS: [Target; MAX_CPUS] = [const {
    Target {
        stop: AtomicU32::new(0),
        ready: AtomicU32::new(0),
        runs: AtomicBool::new(false),
        marked: AtomicBool::new(false),
        apic_id: AtomicU32::new(0),
    }
}; MAX_CPUS];
/// The VM's nested page table, and its partition assist page.
static ROOT: AtomicU64 = AtomicU64::new(0);
static ASSIST: AtomicU64 = AtomicU64::new(0);

/// Who serves L2's flush calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Direct,
    Reflected,
}

/// What the targets do meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Descheduled,
}

/// Measures all that this machine has the processors for.
pub fn run(samples: &mut Samples) -> Result<(), Failure> {
    let waits = super::buffer();
    ROOT.store(Table::identity(4).root(), Ordering::Relaxed);
    ASSIST.store(hyperv::partition_assist(), Ordering::Relaxed);
    rt::apic::enable();
    rt::idt::on(VECTOR, on_request);
    for (by, path) in [(By::Direct, "direct"), (By::Reflected, "reflected")] {
        for (state, word) in [(State::Running, "running"), (State::Descheduled, "descheduled")] {
            // Without targets only where nobody else is there to take turns.
            let counts: &[usize] = if smp::count() == 1 { &[0] } else { &[1, 3] };
            for &targets in counts.iter().filter(|targets| **targets < smp::count()) {
                let cost = measure(by, state, targets, samples, waits)?;
                let line = |what| Name { path, word, targets, what };
                // Without targets the bench of one processor has it, with an L1 that does less.
                if targets != 0 {
                    report(line("instructions"), samples);
                }
                report(line("wait"), waits);
                rt::println!("BENCH {} {}", line("l0_exits"), cost.l0_exits);
                rt::println!("BENCH {} {}", line("l1_exits"), cost.l1_exits);
            }
        }
    }
    rt::idt::off(VECTOR);
    Ok(())
}

/// The name of a measurement.
struct Name {
    path: &'static str,
    word: &'static str,
    targets: usize,
    what: &'static str,
}

impl core::fmt::Display for Name {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "flush.svm.{}.{}.{}.{}", self.path, self.word, self.targets, self.what)
    }
}

/// Exits that a call causes.
struct Cost {
    l0_exits: u64,
    l1_exits: u64,
}

fn measure(by: By, state: State, targets: usize, samples: &mut Samples, waits: &mut Samples) -> Result<Cost, Failure> {
    for (index, target) in TARGETS.iter().enumerate().skip(1).take(targets) {
        for flag in [&target.stop, &target.ready] {
            flag.store(0, Ordering::Relaxed);
        }
        let job = if state == State::Running { run_target } else { deschedule_target };
        smp::spawn(index, job, usize::from(by == By::Direct));
    }
    let ready = if state == State::Running { 1 } else { 2 };
    for target in TARGETS.iter().skip(1).take(targets) {
        while target.ready.load(Ordering::Acquire) != ready {
            core::hint::spin_loop();
        }
    }
    let without = count(by, program_without_calls, targets, samples, waits)?;
    let with = count(by, program_of_calls, targets, samples, waits)?;
    for target in TARGETS.iter().skip(1).take(targets) {
        target.stop.store(1, Ordering::Release);
    }
    for index in 1..=targets {
        smp::join(index);
    }
    let each = |with: u32, without: u32| (u64::from(with.wrapping_sub(without)) + SAMPLES as u64 / 2) / SAMPLES as u64;
    Ok(Cost { l0_exits: each(with.0, without.0), l1_exits: each(with.1, without.1) })
}

/// Runs the caller with `program`; the exits to L0 and those to this hypervisor meanwhile.
fn count(
    by: By,
    program: unsafe extern "C" fn(),
    targets: usize,
    samples: &mut Samples,
    waits: &mut Samples,
) -> Result<(u32, u32), Failure> {
    let guest = cpu_guest();
    describe(guest, program, samples.as_mut_ptr() as u64, 0, by == By::Direct);
    let before = (ask(Hook::Exits), ask(Hook::Entries));
    let end = serve(guest, targets, samples, waits);
    let after = (ask(Hook::Exits), ask(Hook::Entries));
    check("the exit that ended the loop", end.code, exit::HLT)?;
    Ok((after.0.wrapping_sub(before.0), after.1.wrapping_sub(before.1)))
}

/// Makes `guest` VP `vp_id` of the VM.
fn describe(guest: &mut Guest, program: unsafe extern "C" fn(), argument: u64, vp_id: u32, direct: bool) {
    guest.long_mode(program, argument);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(ROOT.load(Ordering::Relaxed));
    guest.vmcb.set_tlb_control(1);
    guest.vmcb.set_misc1(misc1::CPUID | misc1::HLT | misc1::SHUTDOWN | misc1::INTR);
    guest.vmcb.set_int_ctl(V_INTR_MASKING);
    hyperv::enable();
    hyperv::describe(&mut guest.vmcb, VM_ID, vp_id, ASSIST.load(Ordering::Relaxed));
    if !direct {
        guest.vmcb.set_hv_control(0);
    }
}

/// Runs the caller to its end. After each sample it executes CPUID: the wait is taken off the sample then.
fn serve(guest: &mut Guest, targets: usize, samples: &mut Samples, waits: &mut Samples) -> Exit {
    let (mut own, mut of_l0, mut at) = (0, ask(Hook::Wait), 0);
    loop {
        let seen = guest.run();
        guest.vmcb.set_tlb_control(0);
        match seen.code {
            exit::CPUID => {
                let now = ask(Hook::Wait);
                let wait = own + u64::from(now.wrapping_sub(of_l0));
                (own, of_l0) = (0, now);
                if let (Some(sample), Some(slot)) = (samples.get_mut(at), waits.get_mut(at)) {
                    *sample = sample.wrapping_sub(wait);
                    *slot = wait;
                }
                at += 1;
                guest.skip(2);
            }
            exit::VMMCALL => {
                own += flush_targets(targets);
                guest.vmcb.set_tlb_control(1);
                guest.gprs.rax = 0;
                guest.skip(3);
            }
            _ => return seen,
        }
    }
}

/// Has the targets flush, as a hypervisor does that must do it itself. The ticks that it waited.
fn flush_targets(targets: usize) -> u64 {
    let mut waits = false;
    for target in TARGETS.iter().skip(1).take(targets) {
        // SeqCst: the mark is before the question; the target asks for marks after it has said that it runs.
        target.marked.store(true, Ordering::SeqCst);
        if target.runs.load(Ordering::SeqCst) {
            waits = true;
            rt::apic::send_interrupt(target.apic_id.load(Ordering::Relaxed), VECTOR);
        }
    }
    if !waits {
        return 0;
    }
    let start = rdtsc();
    for target in TARGETS.iter().skip(1).take(targets) {
        while target.runs.load(Ordering::SeqCst) && target.marked.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }
    rdtsc() - start
}

fn on_request(_: &mut Frame) {
    rt::apic::end_of_interrupt();
}

/// Runs the target's program in L2 until it is told to stop; flushes when asked.
fn run_target(direct: usize) {
    let index = rt::cpu::current().index as usize;
    let target = &TARGETS[index];
    let guest = cpu_guest();
    describe(guest, program_of_target, (&raw const *target) as u64, index as u32, direct != 0);
    rt::apic::enable();
    target.apic_id.store(rt::apic::id(), Ordering::Relaxed);
    target.runs.store(true, Ordering::SeqCst);
    loop {
        if target.marked.swap(false, Ordering::SeqCst) {
            guest.vmcb.set_tlb_control(1);
        }
        // SAFETY: GIF is clear until IF is clear again; the vector that can be pending has a handler.
        let seen = unsafe {
            hw::svm::clgi();
            asm!("sti", "nop");
            let seen = guest.run_closed();
            asm!("cli");
            hw::svm::stgi();
            asm!("sti", "nop", "nop", "cli");
            seen
        };
        guest.vmcb.set_tlb_control(0);
        if seen.code != exit::INTR {
            break;
        }
    }
    target.runs.store(false, Ordering::SeqCst);
}

/// Runs the VM's processor here once, so that it may have left translations, and then something else.
fn deschedule_target(direct: usize) {
    let index = rt::cpu::current().index as usize;
    let target = &TARGETS[index];
    let guest = cpu_guest();
    target.stop.store(1, Ordering::Relaxed);
    describe(guest, program_of_target, (&raw const *target) as u64, index as u32, direct != 0);
    guest.run();
    target.stop.store(0, Ordering::Relaxed);
    target.ready.store(2, Ordering::Release);
    while target.stop.load(Ordering::Acquire) == 0 {
        core::hint::spin_loop();
    }
}

/// Sets `ready` of the target at RDI and spins until `stop` is set.
#[unsafe(naked)]
unsafe extern "C" fn program_of_target() {
    naked_asm!(
        "mov dword ptr [rdi + {ready}], 1",
        "2:",
        "pause",
        "cmp dword ptr [rdi + {stop}], 0",
        "je 2b",
        "hlt",
        ready = const core::mem::offset_of!(Target, ready),
        stop = const core::mem::offset_of!(Target, stop),
    )
}

/// Stores the ticks of `SAMPLES` of what it is given at RDI, with a CPUID after each.
macro_rules! program {
    ($(#[$doc:meta])* $name:ident: $call:literal) => {
        $(#[$doc])*
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!(
                "mov r9, {samples}",
                "2:",
                "mov r8, {flags}",
                "mov rcx, {flush}",
                "rdtsc",
                "mov esi, eax",
                "xor edx, edx",
                $call,
                "rdtsc",
                "sub eax, esi",
                "mov [rdi], rax",
                "add rdi, 8",
                "xor eax, eax",
                "cpuid",
                "dec r9",
                "jnz 2b",
                "hlt",
                samples = const SAMPLES,
                flags = const FLAGS,
                flush = const FLUSH,
            )
        }
    };
}

program!(
    /// Flush calls.
    program_of_calls: "vmmcall"
);
program!(
    /// The same loop without them.
    program_without_calls: "nop"
);
