//! A timeline of every processor: which level ran when, why it left, and what flushes did meanwhile.
//!
//! The word `trace` on the command line turns it on. Each processor writes records to a ring of its own, and when the
//! machine ends L0 prints the rings, from which `cargo xtask` makes a timeline. Callers are the run loop and the flush
//! paths; where they are hot they ask [`Shared::observed`](crate::shared::Shared::observed) or are rare already.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use hvcore::addr::Level;
use spin::Once;

use crate::ipi::MAX_CPUS;
use crate::say;

/// Records that a processor keeps: the last ones.
pub const RECORDS: usize = 1 << 14;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest of this level is about to run.
    Enter(Level),
    /// The guest of this level left.
    Exit {
        /// Its level.
        level: Level,
        /// SVM's exit code.
        code: u32,
        /// At a hypercall its call code.
        call: u16,
    },
    /// The same on VT-x.
    VmxExit {
        /// Its level.
        level: Level,
        /// The exit reason; all ones when the entry failed.
        reason: u32,
        /// At a hypercall its call code.
        call: u16,
    },
    /// This processor kicks another one.
    Kick(usize),
    /// A flush waits for its targets.
    WaitBegins,
    /// They have all left their guests, or flushed.
    WaitEnds,
    /// What others asked this processor to flush of a level has been drained, for the entry that follows.
    Drained(Level),
    /// An exit of L2 to L1 is made up, after a direct flush.
    Synthetic,
}

impl Event {
    /// The kind in bits 63:56, the rest below.
    const fn word(self) -> u64 {
        const fn level(level: Level) -> u64 {
            match level {
                Level::L1 => 1,
                Level::L2 => 2,
            }
        }
        const fn exit(kind: u64, l: Level, code: u32, call: u16) -> u64 {
            kind << 56 | (call as u64) << 40 | (code as u64) << 8 | level(l)
        }
        match self {
            Event::Enter(l) => 1 << 56 | level(l),
            Event::Exit { level, code, call } => exit(2, level, code, call),
            Event::VmxExit { level, reason, call } => exit(8, level, reason, call),
            Event::Kick(to) => 3 << 56 | to as u64,
            Event::WaitBegins => 4 << 56,
            Event::WaitEnds => 5 << 56,
            Event::Drained(l) => 6 << 56 | level(l),
            Event::Synthetic => 7 << 56,
        }
    }
}

/// When, and what.
#[derive(Debug)]
struct Record {
    tsc: AtomicU64,
    word: AtomicU64,
}

/// What one processor recorded.
#[derive(Debug)]
struct Ring {
    records: &'static [Record],
    /// Records ever written. The owner alone writes. Release: who reads it finds the records below it whole.
    written: AtomicUsize,
}

static RINGS: [Once<Ring>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// Set while records are taken. Relaxed: a record more or less at the end does not matter, but see [`print`].
static ON: AtomicBool = AtomicBool::new(false);

/// Makes rings for `cpus` processors and starts; `false` when there is no memory for them.
pub fn start(cpus: usize) -> bool {
    for ring in RINGS.iter().take(cpus) {
        // SAFETY: zero is a valid record.
        let Some(records) = (unsafe { rt::frames::allocate_slice::<Record>(RECORDS, 64) }) else { return false };
        ring.call_once(|| Ring { records, written: AtomicUsize::new(0) });
    }
    ON.store(true, Ordering::Relaxed);
    true
}

/// Records `event` of processor `cpu`, which calls this.
#[cold]
pub fn record(cpu: usize, event: Event) {
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    let Some(ring) = RINGS.get(cpu).and_then(Once::get) else { return };
    let written = ring.written.load(Ordering::Relaxed);
    let Some(record) = ring.records.get(written % RECORDS) else { return };
    record.tsc.store(hw::cpu::rdtsc(), Ordering::Relaxed);
    record.word.store(event.word(), Ordering::Relaxed);
    ring.written.store(written + 1, Ordering::Release);
}

/// Stops, and prints everything: a line `l0: trace CPU TSC WORD` for each record.
pub fn print() {
    if !ON.swap(false, Ordering::Relaxed) {
        return;
    }
    for (cpu, ring) in RINGS.iter().enumerate().filter_map(|(cpu, ring)| Some((cpu, ring.get()?))) {
        let written = ring.written.load(Ordering::Acquire);
        // Another processor may be about to write one more record, over the oldest: that one is left out.
        let first = (written + 1).saturating_sub(RECORDS);
        for at in first..written {
            let Some(record) = ring.records.get(at % RECORDS) else { continue };
            let (tsc, word) = (record.tsc.load(Ordering::Relaxed), record.word.load(Ordering::Relaxed));
            say!("l0: trace {cpu} {tsc:x} {word:x}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_tell_events_apart() {
        let exit = Event::Exit { level: Level::L2, code: 0x81, call: 3 };
        assert_eq!(exit.word(), 0x0200_0300_0000_8102);
        let refused = Event::Exit { level: Level::L1, code: u32::MAX, call: u16::MAX };
        assert_eq!(refused.word(), 0x02ff_ffff_ffff_ff01);
        assert_eq!(Event::Kick(3).word(), 0x0300_0000_0000_0003);
    }
}
