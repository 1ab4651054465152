//! The other processors: each waits for a job, runs it, and waits for the next. Used by scenarios with several.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use rt::cpu::{Cpu, MAX_CPUS};

/// What a processor is given to do.
pub type Job = fn(usize);

/// A processor's mailbox. `job` is 0 while it is idle; Release and Acquire on it carry `argument` over, and what the
/// job wrote back.
struct Slot {
    job: AtomicUsize,
    argument: AtomicUsize,
}

static SLOTS: [Slot; MAX_CPUS] = [const { Slot { job: AtomicUsize::new(0), argument: AtomicUsize::new(0) } }; MAX_CPUS];

static COUNT: AtomicU32 = AtomicU32::new(1);

/// Starts `count - 1` other processors. `false` when fewer came.
pub fn start(count: u32) -> bool {
    COUNT.store(count, Ordering::Relaxed);
    rt::smp::start(count, wait_for_jobs).is_ok()
}

/// Processors that run, this one included.
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed) as usize
}

fn wait_for_jobs(cpu: &'static Cpu) {
    if !crate::enable() {
        return;
    }
    let slot = &SLOTS[cpu.index as usize];
    loop {
        let job = slot.job.load(Ordering::Acquire);
        if job == 0 {
            core::hint::spin_loop();
            continue;
        }
        // SAFETY: only `spawn` stores here, and it stores a `Job`.
        let job = unsafe { core::mem::transmute::<usize, Job>(job) };
        job(slot.argument.load(Ordering::Relaxed));
        slot.job.store(0, Ordering::Release);
    }
}

/// Gives the idle processor `index` a job.
pub fn spawn(index: usize, job: Job, argument: usize) {
    let slot = &SLOTS[index];
    slot.argument.store(argument, Ordering::Relaxed);
    slot.job.store(job as usize, Ordering::Release);
}

/// Waits until the processor `index` has done its job.
pub fn join(index: usize) {
    while SLOTS[index].job.load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
}
