//! One request under way: whom to kick, for whom to wait. Held by the initiator; used by `domain.rs`.

use super::sync::Ordering;
use super::vp::VpFlush;
use super::word;
use tlfs_abi::vp_set::MAX_BANKS;

/// What is left to do after a request was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Posted {
    /// Nothing: no target runs the guest that was flushed. The call is complete.
    Done,
    /// Kick every slot of [`Shootdown::kicks`], then poll until [`Shootdown::poll`] is true. Then the call is complete.
    Wait,
    /// A target inhibits flushes: kick every slot of [`Shootdown::kicks`], then suspend the calling VP until a target's
    /// [`VpFlush::uninhibit`] says that somebody waits; the call is then issued again from its beginning. The embedder
    /// makes sure that an `uninhibit` between this answer and the suspension wakes the VP too.
    Suspend,
}

/// Scratch of one initiator, about 1.6 KiB: the targets of its last request. One for each VP (or thread) that makes
/// requests; never cleared as a whole.
#[derive(Debug)]
pub struct Shootdown {
    /// Targets to kick, by slot.
    kick: [u64; MAX_BANKS],
    /// Targets to wait for: at first those that somebody else kicks, after the first poll all.
    wait: [u64; MAX_BANKS],
    /// Lowest bit of the target's epoch at the first poll.
    epoch: [u64; MAX_BANKS],
    /// Bit n: word n of the arrays holds something; the words of clear bits are meaningless.
    used: u64,
    polled: bool,
    suspended: bool,
    /// The caller's own VP is a target.
    flushes_caller: bool,
    /// The slot of the caller's own VP, or [`NOBODY`].
    caller: u16,
    mode: u64,
    ipi: u64,
}

/// No VP's slot.
const NOBODY: u16 = u16::MAX;

impl Default for Shootdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shootdown {
    /// Scratch with no request.
    pub const fn new() -> Self {
        Self {
            kick: [0; MAX_BANKS],
            wait: [0; MAX_BANKS],
            epoch: [0; MAX_BANKS],
            used: 0,
            polled: false,
            suspended: false,
            flushes_caller: false,
            caller: NOBODY,
            mode: word::MODE_L1,
            ipi: word::IPI_L1,
        }
    }

    #[inline]
    pub(super) fn begin(&mut self, mode: u64, ipi: u64, caller: Option<u16>) {
        (self.used, self.polled, self.suspended) = (0, false, false);
        (self.flushes_caller, self.caller) = (false, caller.unwrap_or(NOBODY));
        (self.mode, self.ipi) = (mode, ipi);
    }

    /// The slot of the caller's own VP; one that nobody has when that is to be posted to as others are.
    #[inline]
    pub(super) const fn caller(&self) -> usize {
        self.caller as usize
    }

    /// True when the caller's own VP is to be spared.
    #[inline]
    pub(super) const fn has_caller(&self) -> bool {
        self.caller != NOBODY
    }

    /// True when `slot` is the caller's own.
    #[inline]
    pub(super) const fn is_caller(&self, slot: usize) -> bool {
        self.caller() == slot
    }

    /// The caller's own bit in word `at` of a bitmap of slots, if it is there.
    #[inline]
    pub(super) const fn caller_bit(&self, at: usize) -> u64 {
        if self.caller() >> 6 == at { 1 << (self.caller & 63) } else { 0 }
    }

    /// The caller's own VP is a target, and flushes itself.
    #[inline]
    pub(super) const fn flush_caller(&mut self) {
        self.flushes_caller = true;
    }

    /// See [`FlushCalls::flushes_caller`](super::FlushCalls::flushes_caller).
    #[inline]
    pub(super) const fn flushes_caller(&self) -> bool {
        self.flushes_caller
    }

    /// Adds slots `64 * at` to `64 * at + 63`: bitmaps of those to kick and of those to wait for besides.
    #[inline]
    pub(super) fn add(&mut self, at: usize, more_kicks: u64, more_waits: u64) {
        if more_kicks | more_waits == 0 {
            return;
        }
        let (Some(kick), Some(wait)) = (self.kick.get_mut(at), self.wait.get_mut(at)) else { return };
        let word = 1u64 << (at & 63);
        if self.used & word != 0 {
            *kick |= more_kicks;
            *wait |= more_waits;
        } else {
            self.used |= word;
            (*kick, *wait) = (more_kicks, more_waits);
        }
    }

    /// Suspends the caller if `inhibited`.
    #[inline]
    pub(super) fn suspend_if(&mut self, inhibited: bool) {
        self.suspended |= inhibited;
    }

    /// Adds a slot to kick.
    #[inline(always)]
    pub(super) fn add_kick(&mut self, slot: usize) {
        let (at, bit) = (slot >> 6, 1u64 << (slot & 63));
        let (Some(kick), Some(wait)) = (self.kick.get_mut(at), self.wait.get_mut(at)) else { return };
        let word = 1u64 << (at & 63);
        if self.used & word != 0 {
            *kick |= bit;
        } else {
            self.used |= word;
            (*kick, *wait) = (bit, 0);
        }
    }

    pub(super) fn posted(&self) -> Posted {
        match (self.suspended, self.used) {
            (true, _) => Posted::Suspend,
            (false, 0) => Posted::Done,
            (false, _) => Posted::Wait,
        }
    }

    /// The slots to kick, ascending, each once. They are to be kicked also when the caller is suspended: others may
    /// already rely on it.
    ///
    /// A kick makes the physical CPU that runs the VP leave the guest. One that arrives when it has left does nothing.
    pub fn kicks(&self) -> impl Iterator<Item = u16> + '_ {
        Bits(self.used).flat_map(move |at| {
            let word = self.kick.get(usize::from(at)).copied().unwrap_or(0);
            Bits(word).map(move |bit| at.wrapping_mul(64).wrapping_add(bit))
        })
    }

    /// True when every target has acknowledged: it has left the guest since the request. `vps` are the domain's.
    ///
    /// Each call looks at the targets that are still missing, once; the embedder decides how to wait in between.
    pub fn poll<const DEPTH: usize>(&mut self, vps: &[VpFlush<DEPTH>]) -> bool {
        let first = !self.polled;
        self.polled = true;
        for at in Bits(self.used) {
            let at = usize::from(at);
            let (Some(kick), Some(wait), Some(epoch)) =
                (self.kick.get(at), self.wait.get_mut(at), self.epoch.get_mut(at))
            else {
                continue;
            };
            if first {
                (*wait, *epoch) = (*wait | *kick, 0);
            }
            let chunk = vps.chunks(64).nth(at).unwrap_or_default();
            for bit in Bits(*wait) {
                let mask = 1u64 << bit;
                // Acquire: what the target's guest did before it left is before what the caller does next.
                let now = chunk.get(usize::from(bit)).map_or(0, |vp| vp.word.load(Ordering::Acquire));
                let odd = now & word::EPOCH_ONE != 0;
                if first && odd {
                    *epoch |= mask;
                }
                // The mode or the mark is gone: it left, or it has not run since and drains what was queued. Another
                // epoch than at the first poll: it left and came back, and another request marked it anew.
                let left = now & word::MODE != self.mode || now & self.ipi == 0;
                if left || odd != (*epoch & mask != 0) {
                    *wait &= !mask;
                }
            }
            if *wait == 0 {
                self.used &= !(1u64 << (at & 63));
            }
        }
        self.used == 0
    }
}

/// The positions of a word's set bits, ascending.
pub(super) struct Bits(pub(super) u64);

impl Iterator for Bits {
    type Item = u16;

    #[inline]
    fn next(&mut self) -> Option<u16> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as u16;
        self.0 &= self.0.wrapping_sub(1);
        Some(bit)
    }
}
