//! Kicks on VT-x. A kick is an NMI, and nothing holds NMIs while L0 runs: they are taken wherever they come.
//!
//! Each processor has a flag. Its run loop clears the flag, then looks what others ask of it, publishes that it runs
//! its guest, and enters. The NMI handler sets the flag. An NMI before the entry's last look at the flag is found by
//! that look; one behind it moves RIP out of the entry ([`hw::vmx::enter`]); one in the guest is an exit. So whoever
//! published a request before its kick is heard: the run loop looks again before the guest runs, or has looked after the
//! request was published.

use core::sync::atomic::{AtomicU8, Ordering, compiler_fence};

use hw::vmx;

use crate::ipi::MAX_CPUS;

/// A flag with a cache line of its own.
#[repr(align(64))]
struct Flag(AtomicU8);

static KICKED: [Flag; MAX_CPUS] = [const { Flag(AtomicU8::new(0)) }; MAX_CPUS];

/// The flag of processor `id`, below [`MAX_CPUS`].
pub fn flag(id: usize) -> &'static AtomicU8 {
    &KICKED[id % MAX_CPUS].0
}

/// Before this processor looks what is asked of it: from now on an NMI stops the next entry.
#[inline]
pub fn rearm(flag: &AtomicU8) {
    // Relaxed, and a fence for the compiler alone: the flag is written and read by one processor and its own NMI
    // handler. What a kicker published is ordered by the kick itself (`Ipis::start_kick`, `Ipis::nmi_arrived`).
    flag.store(0, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
}

/// For the NMI handler of processor `id`: where to go on instead of at `rip`.
pub fn nmi(id: usize, rip: u64) -> u64 {
    // Relaxed: see `rearm`.
    flag(id).store(1, Ordering::Relaxed);
    vmx::redirect(rip)
}
