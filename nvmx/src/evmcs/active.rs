//! On which VP each enlightened VMCS is active: one page on one VP (TLFS, "Nested Virtualization": an enlightened VMCS
//! must not be active on two processors).
//!
//! Shared by the VPs of a partition, through [`crate::Machine`]; claimed at VMLAUNCH and VMRESUME, left when L1 runs
//! again. No locks: each VP writes its own word, and takes the idle claim of another away by compare-exchange.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering, fence};

use hvcore::addr::L1Gpa;

/// Bit 0 of a word: L2 runs on the page.
const RUNNING: u64 = 1;
/// Bit 1 of a word: there is a page, with its address in the bits above.
const ACTIVE: u64 = 2;

/// What a claim came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The page was this VP's since its last entry: what it has of it is good.
    Kept,
    /// The page is this VP's now: everything is to be read.
    Taken,
    /// L2 runs on the page on another VP, or another VP claims it at the same moment.
    Refused,
}

/// The active page of each VP of a partition.
#[derive(Clone, Copy, Debug)]
pub struct ActivePages<'a> {
    words: &'a [AtomicU64],
}

impl<'a> ActivePages<'a> {
    /// A table over one word for each VP, all zero at first. A VP beyond it claims whatever it wants.
    pub const fn new(words: &'a [AtomicU64]) -> Self {
        Self { words }
    }

    /// VP `vp` is going to run L2 on `page`, which is page aligned.
    #[inline]
    pub fn claim(&self, vp: usize, page: L1Gpa) -> Claim {
        let idle = page.raw() | ACTIVE;
        let Some(own) = self.words.get(vp) else { return Claim::Taken };
        // Relaxed: the word of this VP, and nothing is read by its leave. On failure another VP has the page, or this VP
        // another one.
        match own.compare_exchange(idle, idle | RUNNING, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => Claim::Kept,
            Err(_) => self.take(vp, own, idle),
        }
    }

    #[cold]
    fn take(&self, vp: usize, own: &AtomicU64, idle: u64) -> Claim {
        // Release: who finds that this VP went on to another page sees what was written to the one before.
        own.store(idle | RUNNING, Ordering::Release);
        // SeqCst, between the own word and the others': of two VPs that claim one page at the same time, at least one sees
        // the other.
        fence(Ordering::SeqCst);
        let others = self.words.iter().enumerate().filter(|(other, _)| *other != vp).map(|(_, word)| word);
        for other in others {
            // Acquire: with the release above, and with that of `leave`.
            let seen = other.load(Ordering::Acquire);
            if seen & !RUNNING != idle {
                continue;
            }
            // Acquire: what the other VP's L0 wrote to the page before it left is seen by what is read of it now.
            let stolen =
                seen & RUNNING == 0 && other.compare_exchange(idle, 0, Ordering::Acquire, Ordering::Relaxed).is_ok();
            // It runs there, or it went on to run there, or to another page: that one may have been a claim as well.
            if !stolen && other.load(Ordering::Acquire) & !RUNNING == idle {
                // Release: for whoever takes the word's place next; nothing of this VP's is to be seen.
                own.store(0, Ordering::Release);
                return Claim::Refused;
            }
        }
        Claim::Taken
    }

    /// L1 runs again on VP `vp`: its page may be taken over.
    #[inline]
    pub fn leave(&self, vp: usize) {
        if let Some(own) = self.words.get(vp) {
            // Release: what was written to the page is seen by the VP that takes it.
            own.fetch_and(!RUNNING, Ordering::Release);
        }
    }

    /// VP `vp` has no page active any more: it was reset, or its state restored.
    pub fn forget(&self, vp: usize) {
        if let Some(own) = self.words.get(vp) {
            // Release: as for `leave`.
            own.store(0, Ordering::Release);
        }
    }
}

/// One VP's place in the table.
#[derive(Clone, Copy, Debug)]
pub struct ActivePage<'a> {
    /// The partition's table.
    pub pages: ActivePages<'a>,
    /// The VP's word.
    pub vp: usize,
}
