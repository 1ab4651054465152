//! Deliberate defects, so that the models and the stress test show that they can fail.
//!
//! Only builds with `--cfg loom` or `--cfg flush_mutants` can switch one on; in every other build [`active`] is the
//! constant `false` and the defects are not in the code. Used by this folder and by tests.

/// A defect of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mutant {
    /// None: the engine as it is.
    None = 0,
    /// An entry takes the should-flush marks off but does not look into the queues.
    SkipDrain,
    /// A request for one of L2's queues lands in L1's, and the reverse: the wrong tag is flushed.
    WrongTag,
    /// A drained range is one page short.
    OnePageShort,
    /// Leaving the guest takes the should-flush marks along with IPI-pending.
    DropShouldFlush,
    /// The mark (and so the kick) comes before the queue entry.
    KickBeforePublish,
    /// A failed entry counts as one that happened.
    ConsumeOnFailure,
    /// A context change does not retire the tag of the context before.
    KeepOldTag,
    /// Neither side of the context index has its fence.
    NoIndexFence,
    /// Marks are made without ordering.
    RelaxedMark,
    /// An entry looks at its marks first and publishes that it runs only then.
    CheckBeforePublish,
}

#[cfg(any(loom, flush_mutants))]
mod switch {
    use super::Mutant;
    // Not one of the engine's atomics: loom must not see it.
    use core::sync::atomic::{AtomicU8, Ordering};

    static ACTIVE: AtomicU8 = AtomicU8::new(0);

    /// Switches `mutant` on for the whole process, and every other one off.
    pub fn set(mutant: Mutant) {
        ACTIVE.store(mutant as u8, Ordering::SeqCst);
    }

    /// True when `mutant` is on.
    #[inline]
    pub fn active(mutant: Mutant) -> bool {
        ACTIVE.load(Ordering::Relaxed) == mutant as u8
    }
}

#[cfg(any(loom, flush_mutants))]
pub use switch::{active, set};

/// True when `mutant` is on: never, in this build.
#[cfg(not(any(loom, flush_mutants)))]
#[inline(always)]
pub const fn active(_mutant: Mutant) -> bool {
    false
}
