//! What L0 did, counted per processor: for reports, printed when L1 ends the machine or asks for it.
//!
//! Each processor writes its own counters only; a reader may see another processor's a little late.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::ipi::MAX_CPUS;
use crate::say;

/// A number that one processor counts up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`. For the counter's own processor: a load and a store, no locked operation.
    #[inline]
    pub fn add(&self, n: u64) {
        // Relaxed: a statistic; nothing is ordered by it.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one processor.
        #[derive(Debug)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Counters {
            const fn new() -> Self {
                Self { $($name: Counter::new(),)* }
            }

            /// Each counter's name and value.
            fn each(&self, mut f: impl FnMut(&'static str, u64)) {
                $(f(stringify!($name), self.$name.get());)*
            }
        }
    };
}

counters! {
    /// Exits of L1.
    l1_exits,
    /// Exits of L2.
    l2_exits,
    /// VMRUNs of L1 that entered L2.
    l2_entries,
    /// Bytes of L1's memory that L0's library state read (VT-x, when it is told to count them).
    guest_bytes_read,
    /// VMREADs of L0.
    vmreads,
    /// VMWRITEs of L0.
    vmwrites,
    /// VMPTRLDs of L0.
    vmptrlds,
    /// Instructions (ticks of the TSC) spent in L0, when it is told to count them.
    l0_instructions,
    /// Hypercalls of L1.
    l1_calls,
    /// Flush calls of L2 that L0 did.
    direct_flushes,
    /// Flush calls of L2 that went to L1.
    reflected_flushes,
    /// Exits to L1 that L0 synthesized after a direct flush.
    synthetic_exits,
    /// Ranges in the lists of direct flushes.
    flush_ranges,
    /// Direct flushes of whole address spaces.
    flush_spaces,
    /// Flushes (of either level) that had to wait for another processor.
    flush_waits,
    /// Ticks of the TSC that flushes waited, from before the first poll to after the last.
    flush_wait_ticks,
    /// Kicks that flushes sent.
    flush_kicks,
    /// Flushes that nobody had to be waited for.
    waits_avoided,
    /// Entries that had to flush everything of a level.
    entry_everything,
    /// Entries that had to flush ranges.
    entry_ranges,
    /// Nested page faults filled from L1's tables.
    shadow_fills,
}

static TABLE: [Counters; MAX_CPUS] = [const { Counters::new() }; MAX_CPUS];

/// The counters of processor `cpu`.
pub fn of(cpu: usize) -> &'static Counters {
    &TABLE[cpu % MAX_CPUS]
}

/// The sum over all processors of what `of` says.
pub fn sum(of: impl Fn(&Counters) -> u64) -> u64 {
    TABLE.iter().map(of).sum()
}

/// Prints the sums, and one line for each of `cpus` processors.
pub fn print(cpus: usize) {
    struct Line(Option<usize>);
    impl core::fmt::Display for Line {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            let mut result = Ok(());
            let mut exits = 0;
            let mut at = 0;
            TABLE[0].each(|name, _| {
                let mut sum = 0;
                for (cpu, counters) in TABLE.iter().enumerate() {
                    if self.0.is_none_or(|only| only == cpu) {
                        let mut i = 0;
                        counters.each(|_, value| {
                            sum += if i == at { value } else { 0 };
                            i += 1;
                        });
                    }
                }
                if name.ends_with("_exits") && name != "synthetic_exits" {
                    exits += sum;
                }
                at += 1;
                if sum != 0 {
                    result = result.and(write!(f, " {name}={sum}"));
                }
            });
            result.and(write!(f, " exits={exits}"))
        }
    }
    for cpu in 0..cpus {
        say!("l0: cpu {cpu}:{}", Line(Some(cpu)));
    }
    say!("l0: stats:{}", Line(None));
}
