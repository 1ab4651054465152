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
    domain: FlushDomain<'a, DEPTH>,
    map: &'h VpIndexMap<'h>,
    vm_id: u64,
    scratch: &'h mut Shootdown,
    posted: Posted,
}

impl<'h, 'a, const DEPTH: usize> FlushCalls<'h, 'a, DEPTH> {
    /// For a caller of `domain`'s partition. `vm_id` is that of the nested context that the caller runs in: used only
    /// for a call from L2.
    pub const fn new(
        domain: FlushDomain<'a, DEPTH>,
        map: &'h VpIndexMap<'h>,
        vm_id: u64,
        scratch: &'h mut Shootdown,
    ) -> Self {
        Self { domain, map, vm_id, scratch, posted: Posted::Done }
    }

    /// What is left to do for the last call, with the scratch given to [`new`](Self::new).
    pub const fn posted(&self) -> Posted {
        self.posted
    }

    fn flush(&mut self, target: &FlushTarget<'_>, scope: GvaScope<'_>) -> Answer {
        self.posted = match target.level {
            Level::L1 => self.domain.flush_l1(self.map, target.vps, scope, self.scratch),
            Level::L2 => self.domain.flush_l2(self.vm_id, target.vps, scope, self.scratch),
        };
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
        self.answer()
    }

    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        let scope = SecondStageScope::Ranges { root: L1Gpa::new(address_space), entries: ranges };
        self.posted = self.domain.flush_second_stage(scope, self.scratch);
        self.answer()
    }
}
