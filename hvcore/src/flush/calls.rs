//! The flush hypercalls on the engine: from the intake's parsed calls to requests. An embedder's host forwards its
//! handler traits to [`FlushCalls`]; uses `domain`.

use super::domain::{FlushDomain, GvaScope, SecondStageScope};
use super::shootdown::{Posted, Shootdown};
use crate::addr::{L1Gpa, Level};
use crate::hypercall::Answer;
use crate::hypercall::calls::{FlushGuestPhysical, FlushTarget, FlushVirtual, GvaRanges};
use crate::vp_index::VpIndexMap;

/// Serves the six flush calls for one caller.
///
/// A call that is [`Answer::Done`] is complete only when what [`posted`](Self::posted) asks for has been done: the
/// embedder kicks and polls after the intake has returned and before the caller's guest runs again. A call that is
/// [`Answer::Suspend`] needs the kicks, too.
#[derive(Debug)]
pub struct FlushCalls<'h, 'a, const DEPTH: usize = 16> {
    domain: &'h FlushDomain<'a, DEPTH>,
    map: &'h VpIndexMap<'h>,
    vm_id: u64,
    caller: Option<u16>,
    flushes_caller: bool,
    scratch: &'h mut Shootdown,
    posted: Posted,
}

impl<'h, 'a, const DEPTH: usize> FlushCalls<'h, 'a, DEPTH> {
    /// For a caller of `domain`'s partition. `vm_id` is that of the nested context that the caller runs in: used only
    /// for a call from L2.
    pub const fn new(
        domain: &'h FlushDomain<'a, DEPTH>,
        map: &'h VpIndexMap<'h>,
        vm_id: u64,
        scratch: &'h mut Shootdown,
    ) -> Self {
        Self { domain, map, vm_id, caller: None, flushes_caller: false, scratch, posted: Posted::Done }
    }

    /// The caller is the VP in `slot`, outside its guest: a flush of virtual addresses does not post to it, but says
    /// by [`flushes_caller`](Self::flushes_caller) that it is a target.
    #[must_use]
    #[inline]
    pub const fn called_by(mut self, slot: u16) -> Self {
        self.caller = Some(slot);
        self
    }

    /// True when the last call concerns the caller's own VP: before its guest's next instruction, it flushes all GVA
    /// translations of the level that called. By [`LocalFlush::flush_gva`](super::LocalFlush::flush_gva), or, when it
    /// retires the level's hardware tag at once, by that alone.
    #[inline]
    pub const fn flushes_caller(&self) -> bool {
        self.flushes_caller
    }

    /// What is left to do for the last call, with the scratch given to [`new`](Self::new).
    pub const fn posted(&self) -> Posted {
        self.posted
    }

    #[inline(always)]
    fn flush(&mut self, target: &FlushTarget<'_>, scope: GvaScope<'_>) -> Answer {
        self.posted = match target.level {
            Level::L1 => self.domain.flush_l1_for(self.caller, self.map, target.vps, scope, self.scratch),
            Level::L2 => self.domain.flush_l2_for(self.caller, self.vm_id, target.vps, scope, self.scratch),
        };
        self.flushes_caller = self.scratch.flushes_caller();
        self.answer()
    }

    fn answer(&self) -> Answer {
        match self.posted {
            Posted::Done | Posted::Wait => Answer::Done,
            Posted::Suspend => Answer::Suspend,
        }
    }
}

impl<const DEPTH: usize> FlushVirtual for FlushCalls<'_, '_, DEPTH> {
    #[inline(always)]
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        let scope = if target.flags.non_global_only() { GvaScope::EverythingNonGlobal } else { GvaScope::Everything };
        self.flush(target, scope)
    }

    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.flush(target, GvaScope::Ranges { format: ranges.format, entries: ranges.raw })
    }
}

impl<const DEPTH: usize> FlushGuestPhysical for FlushCalls<'_, '_, DEPTH> {
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer {
        let scope = SecondStageScope::Root(L1Gpa::new(address_space));
        self.posted = self.domain.flush_second_stage(scope, self.scratch);
        self.flushes_caller = false;
        self.answer()
    }

    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        let scope = SecondStageScope::Ranges { root: L1Gpa::new(address_space), entries: ranges };
        self.posted = self.domain.flush_second_stage(scope, self.scratch);
        self.flushes_caller = false;
        self.answer()
    }
}
