//! Kicks at every instruction of the entry window of [`hw::vmx::enter`], and of its wait: none may be lost.
//!
//! First each instruction is reached by single steps, and a kick is made up there: the entry must not happen, and the
//! caller's registers must be as they were. Then, with a second processor, real NMIs come at every instruction: processor
//! 1 publishes a request and sends an NMI; processor 0 looks what is requested and enters a guest that never leaves by
//! itself. A kick that is lost leaves it there, and processor 1 says so. `redirect=no` is the control: an NMI handler that
//! only sets the flag.

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hw::cpu;
use hw::vmx::{self, Entered, World};
use nvmx::controls::pin;
use nvmx::exit_reason;
use nvmx::field::Field;
use rt::cpu::Cpu;
use rt::idt::{self, Frame};
use rt::{BootInfo, ExitCode, apic, println, smp};

use crate::vmx::{Features, KICKED, new_vmcs, read, start, stop, write};

/// The NMI handler moves RIP.
static REDIRECT: AtomicBool = AtomicBool::new(true);

/// The guest never leaves by itself.
#[unsafe(naked)]
extern "C" fn guest() -> ! {
    naked_asm!("2:", "pause", "jmp 2b")
}

/// Instructions of the entry and of the wait, by address; zero: none.
static PLACES: [AtomicU64; MAX_PLACES] = [const { AtomicU64::new(0) }; MAX_PLACES];
/// How many NMIs came at each.
static HITS: [AtomicU32; MAX_PLACES] = [const { AtomicU32::new(0) }; MAX_PLACES];
const MAX_PLACES: usize = 64;

fn place(rip: u64) -> Option<usize> {
    PLACES.iter().position(|p| p.load(Ordering::Relaxed) == rip)
}

/// Notes an instruction of the window that has been stepped through.
fn note(rip: u64) {
    if place(rip).is_none()
        && let Some(free) = place(0)
    {
        PLACES[free].store(rip, Ordering::Relaxed);
    }
}

fn nmi(frame: &mut Frame) {
    KICKED.store(1, Ordering::Relaxed);
    if let Some(hit) = place(frame.rip) {
        HITS[hit].fetch_add(1, Ordering::Relaxed);
    }
    if REDIRECT.load(Ordering::Relaxed) {
        frame.rip = vmx::redirect(frame.rip);
    }
}

/// The step at which the kick is made up; [`NEVER`]: nowhere.
static AT: AtomicU32 = AtomicU32::new(NEVER);
const NEVER: u32 = u32::MAX;
static STEPS: AtomicU32 = AtomicU32::new(0);
/// Where the last step was.
static LAST: AtomicU64 = AtomicU64::new(0);
const TF: u64 = 1 << 8;

/// A single step: notes where, and at step [`AT`] of the window does what the NMI handler does.
fn step(frame: &mut Frame) {
    if !vmx::window().contains(&frame.rip) && !vmx::wait_window().contains(&frame.rip) {
        return;
    }
    note(frame.rip);
    LAST.store(frame.rip, Ordering::Relaxed);
    if STEPS.fetch_add(1, Ordering::Relaxed) == AT.load(Ordering::Relaxed) {
        KICKED.store(1, Ordering::Relaxed);
        frame.rip = vmx::redirect(frame.rip);
        frame.rflags &= !TF;
    }
}

/// Runs `f` in single steps, until something clears TF.
fn stepping<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: the handler of #DB is `step`; TF is cleared below, or by it, or by a VM exit.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
    let result = f();
    // SAFETY: see above.
    unsafe { asm!("pushfq", "and qword ptr [rsp], -0x101", "popfq") };
    result
}

/// The checks: with `cpus=2`, real NMIs as well.
pub fn run(boot: &'static BootInfo) -> ExitCode {
    let cpus: u32 = boot.argument("cpus").and_then(|n| n.parse().ok()).unwrap_or(1);
    REDIRECT.store(boot.argument("redirect") != Some("no"), Ordering::Relaxed);
    let me = apic::id();
    idt::on(1, step);
    idt::on(2, nmi);
    if cpus > 1 && smp::start(cpus, other).is_err() {
        println!("kick: the second processor did not come");
        return ExitCode::Failure;
    }
    start();
    // With virtual NMIs: without them Bochs saves "blocking by NMI" at an NMI exit, and the next entry blocks NMIs.
    let (world, vmcs) = new_vmcs(Features { ept: false, vpid: false }, guest, pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    // Twice: a launch, and a resumption.
    let mut launched = false;
    for _ in 0..2 {
        every_step(world, launched);
        entered_by_nmi(world, launched, me);
        launched = true;
    }
    every_step_of_wait();
    let found = PLACES.iter().filter(|p| p.load(Ordering::Relaxed) != 0).count();
    println!("kick: {found} instructions, each with a kick made up");
    assert_eq!(found, 21 + 3, "instructions of the entry, and of the wait");
    if cpus > 1 {
        real_kicks(world, vmcs, me);
    }
    stop();
    ExitCode::Success
}

/// A kick made up at each step of the entry: it does not happen.
fn every_step(world: &mut World, launched: bool) {
    // CMP, JNE, TEST, 15 loads, JZ, and VMLAUNCH or VMRESUME.
    const ENTRY_STEPS: u32 = 20;
    for at in 0..ENTRY_STEPS {
        KICKED.store(0, Ordering::Relaxed);
        STEPS.store(0, Ordering::Relaxed);
        AT.store(at, Ordering::Relaxed);
        world.gprs.rcx = 0xc0;
        // SAFETY: the VMCS was bound to this world; the guest only spins, and it is not entered.
        let entered = stepping(|| unsafe { enter_checked(world, launched) });
        assert_eq!(entered, Entered::Kicked, "a kick at step {at} of the window");
        assert_eq!((world.gprs.rcx, STEPS.load(Ordering::Relaxed)), (0xc0, at + 1));
    }
    AT.store(NEVER, Ordering::Relaxed);
    // VMLAUNCH, of 3 bytes, ends the window; VMRESUME, of 3, comes before it and a jump of 2.
    let last = vmx::window().end - if launched { 8 } else { 3 };
    assert_eq!(LAST.load(Ordering::Relaxed), last, "the last step was not the entry itself");
}

/// [`vmx::enter`], with a check of the registers that a function must preserve.
///
/// # Safety
/// As for [`vmx::enter`].
unsafe fn enter_checked(world: &mut World, launched: bool) -> Entered {
    let (r12, r13, r14, r15): (u64, u64, u64, u64);
    let entered: u64;
    // SAFETY: a call of a function that preserves rbx, rbp and r12 to r15, with its clobbers declared; the stack is
    // aligned for it.
    unsafe {
        asm!(
            "push rbp",
            "mov rbp, rsp",
            "and rsp, -16",
            "mov r12, 12",
            "mov r13, 13",
            "mov r14, 14",
            "mov r15, 15",
            "call {enter}",
            "mov rsp, rbp",
            "pop rbp",
            enter = sym enter_raw,
            in("rdi") &raw mut *world, in("rsi") u64::from(launched),
            lateout("rax") entered, lateout("r12") r12, lateout("r13") r13, lateout("r14") r14, lateout("r15") r15,
            clobber_abi("C"),
        );
    }
    assert_eq!((r12, r13, r14, r15), (12, 13, 14, 15));
    match entered {
        0 => Entered::Exited,
        1 => Entered::Kicked,
        _ => Entered::Failed(vmx::Fail::Valid),
    }
}

unsafe extern "C" fn enter_raw(world: *mut World, launched: u64) -> u64 {
    // SAFETY: `enter_checked`'s promise; it made the pointer of its own reference.
    match unsafe { vmx::enter(&mut *world, launched != 0) } {
        Entered::Exited => 0,
        Entered::Kicked => 1,
        Entered::Failed(_) => 2,
    }
}

/// Without a kick before it the entry happens, and an NMI in the guest is an exit.
fn entered_by_nmi(world: &mut World, launched: bool, me: u32) {
    KICKED.store(0, Ordering::Relaxed);
    // The NMI comes right after its command: one instruction later at most on this emulator. It is taken here, so that
    // its handler sets the flag, and the entry is refused.
    apic::send_nmi(me);
    // SAFETY: as above.
    let entered = unsafe { vmx::enter(world, launched) };
    assert_eq!(entered, Entered::Kicked, "an NMI before the entry");
    KICKED.store(0, Ordering::Relaxed);
    set_timer(true);
    // SAFETY: as above; the guest leaves when the preemption timer has counted down.
    let entered = unsafe { vmx::enter(world, launched) };
    assert_eq!(entered, Entered::Exited, "error {}", read(Field::InstructionError));
    assert_eq!(read(Field::ExitReason), u64::from(exit_reason::PREEMPTION_TIMER));
    set_timer(false);
}

fn set_timer(on: bool) {
    let controls = read(Field::PinBasedControls);
    let timer = u64::from(pin::PREEMPTION_TIMER);
    write(Field::PinBasedControls, if on { controls | timer } else { controls & !timer });
    write(Field::PreemptionTimer, 1000);
}

/// A kick made up at each step of the wait: it ends.
fn every_step_of_wait() {
    // CMP, JNE, HLT.
    for at in 0..3 {
        KICKED.store(0, Ordering::Relaxed);
        STEPS.store(0, Ordering::Relaxed);
        AT.store(at, Ordering::Relaxed);
        // SAFETY: interrupts are off; the kick that `step` makes up ends the wait.
        stepping(|| unsafe { vmx::wait_for_nmi(&raw const KICKED) });
        assert_eq!(STEPS.load(Ordering::Relaxed), at + 1);
    }
    AT.store(NEVER, Ordering::Relaxed);
}

/// What processor 1 asks for; processor 0 answers with the same number.
static REQUEST: AtomicU64 = AtomicU64::new(0);
static ANSWER: AtomicU64 = AtomicU64::new(0);
/// Processor 0 is about to look and enter, for the time of this number; how long processor 1 is to wait before its kick.
static READY: AtomicU64 = AtomicU64::new(0);
static DELAY: AtomicU64 = AtomicU64::new(0);
static TARGET: AtomicU32 = AtomicU32::new(0);
/// A kick was lost.
static LOST: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

/// Longer than an entry, an exit and a look take.
const PATIENCE: u64 = 200_000;

/// Processor 1: a request and a kick each time that processor 0 is ready.
fn other(_: &'static Cpu) {
    let mut served = 0;
    while !DONE.load(Ordering::Acquire) {
        // Acquire: the delay and the target are of this time.
        let ready = READY.load(Ordering::Acquire);
        if ready == served {
            cpu::pause();
            continue;
        }
        for _ in 0..DELAY.load(Ordering::Relaxed) {
            // SAFETY: an instruction without effect.
            unsafe { asm!("nop", options(nomem, nostack, preserves_flags)) };
        }
        // Release, before the kick: whoever is kicked sees it.
        REQUEST.store(ready, Ordering::Release);
        apic::send_nmi(TARGET.load(Ordering::Relaxed));
        let start = cpu::rdtsc();
        while ANSWER.load(Ordering::Acquire) != ready && !DONE.load(Ordering::Acquire) {
            if cpu::rdtsc().wrapping_sub(start) > PATIENCE {
                LOST.fetch_add(1, Ordering::Relaxed);
                apic::send_nmi(TARGET.load(Ordering::Relaxed));
                break;
            }
            cpu::pause();
        }
        while ANSWER.load(Ordering::Acquire) != ready && !DONE.load(Ordering::Acquire) {
            cpu::pause();
        }
        served = ready;
    }
}

/// How processor 0 waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Launch,
    Resume,
    Wait,
}

/// Real NMIs, at many moments, until each instruction was interrupted.
fn real_kicks(world: &mut World, vmcs: u64, me: u32) {
    const ROUNDS: u64 = 30_000;
    TARGET.store(me, Ordering::Relaxed);
    let (mut seed, mut launched) = (1u64, true);
    let mut rounds = 0;
    while rounds < ROUNDS && (rounds < 2_000 || HITS.iter().zip(&PLACES).any(|(h, p)| unhit(h, p))) {
        rounds += 1;
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (delay, pad) = (seed >> 40 & 0x7f, seed >> 52 & 0x3f);
        let how = [How::Launch, How::Resume, How::Wait][(rounds % 3) as usize];
        if how == How::Launch {
            // SAFETY: the VMCS is this one's, and stays so; what it holds is kept in its page.
            unsafe { vmx::vmclear(vmcs).and_then(|()| vmx::vmptrld(vmcs)) }.expect("VMCLEAR and VMPTRLD");
            launched = false;
        }
        one_kick(world, &mut launched, how, rounds, delay, pad);
        let lost = LOST.load(Ordering::Relaxed);
        if lost != 0 {
            DONE.store(true, Ordering::Release);
            panic!("a kick was lost in round {rounds}: {how:?} delay {delay} pad {pad}");
        }
    }
    DONE.store(true, Ordering::Release);
    for (hits, at) in HITS.iter().zip(&PLACES) {
        let at = at.load(Ordering::Relaxed);
        assert!(at == 0 || hits.load(Ordering::Relaxed) != 0, "no NMI came at {at:#x} in {rounds} rounds");
    }
    let least = HITS.iter().zip(&PLACES).filter(|(_, p)| p.load(Ordering::Relaxed) != 0);
    let least = least.map(|(h, _)| h.load(Ordering::Relaxed)).min().unwrap_or(0);
    println!("kick: {rounds} real kicks, at every instruction {least} times or more, none lost");
}

fn unhit(hits: &AtomicU32, place: &AtomicU64) -> bool {
    place.load(Ordering::Relaxed) != 0 && hits.load(Ordering::Relaxed) == 0
}

/// Looks and enters until request `round` has been seen.
fn one_kick(world: &mut World, launched: &mut bool, how: How, round: u64, delay: u64, pad: u64) {
    DELAY.store(delay, Ordering::Relaxed);
    READY.store(round, Ordering::Release);
    loop {
        KICKED.store(0, Ordering::Relaxed);
        // Acquire: after the flag was cleared, so that a request whose kick the handler saw before is seen here.
        if REQUEST.load(Ordering::Acquire) == round {
            break;
        }
        for _ in 0..pad {
            // SAFETY: an instruction without effect.
            unsafe { asm!("nop", options(nomem, nostack, preserves_flags)) };
        }
        if how == How::Wait {
            // SAFETY: interrupts are off; the NMI handler sets the flag.
            unsafe { vmx::wait_for_nmi(&raw const KICKED) };
            continue;
        }
        // SAFETY: the VMCS was bound to this world; the guest only spins.
        match unsafe { vmx::enter(world, *launched) } {
            Entered::Kicked => {}
            Entered::Failed(_) => panic!("VM entry; error {}", read(Field::InstructionError)),
            Entered::Exited => {
                *launched = true;
                assert_eq!(read(Field::ExitReason), u64::from(exit_reason::EXCEPTION_OR_NMI));
                // SAFETY: the handler is `nmi`.
                unsafe { vmx::take_nmi() };
            }
        }
    }
    ANSWER.store(round, Ordering::Release);
}
