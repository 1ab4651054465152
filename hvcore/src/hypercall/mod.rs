//! Hypercall intake and dispatch: from a caller's registers to a typed request, and from a handler's answer back to
//! the registers (TLFS, "Hypercall Interface").
//!
//! Called by the embedder on an exit for VMCALL or VMMCALL, for calls of L1 and for the flushes of L2 that L0 may take.
//! Calls the handlers that the embedder offers, and guest memory.
//!
//! Each hypercall is declared once, as a type in [`calls`] that implements [`Declaration`] (code, shape, privileges)
//! and [`Hypercall`] (parsing, and which handler trait serves it). An embedder implements handler traits and lists
//! what it offers with [`offer_hypercalls!`](crate::offer_hypercalls): that list is dispatcher and allow-list at once.
//!
//! # Order of checks
//!
//! 1. interface enabled, CPL 0, protected mode: else #UD
//! 2. reserved bits of the input value: HV_STATUS_INVALID_HYPERCALL_INPUT
//! 3. the code is in the list: else HV_STATUS_INVALID_HYPERCALL_CODE
//! 4. privileges: else HV_STATUS_ACCESS_DENIED
//! 5. shape (variable header, rep count, rep start): else HV_STATUS_INVALID_HYPERCALL_INPUT
//! 6. placement: XMM registers without the feature #UD; a fast call whose input or output does not fit 112 bytes
//!    HV_STATUS_INVALID_HYPERCALL_INPUT; memory parameters misaligned, crossing a page or overlapping
//!    HV_STATUS_INVALID_ALIGNMENT; not translatable, readable or writable HV_STATUS_INVALID_HYPERCALL_INPUT
//! 7. the call's parameters
//!
//! A call that fails in steps 2 to 6 reports zero reps completed; one that fails later reports the total, which
//! includes the reps before its start index.
//!
//! Bit 31 of the input value, "for the L0 hypervisor", is a reserved bit unless the partition has
//! [`Privileges::NESTED_CALLS`] and the caller is in L1: such a call from L2 is for L1 to pass on. The TLFS answers a
//! GPA outside the GPA space with HV_STATUS_INVALID_ALIGNMENT; guest memory does not tell such a GPA from one that is
//! merely not backed, so both are HV_STATUS_INVALID_HYPERCALL_INPUT here.
//!
//! # Example
//!
//! ```
//! use hvcore::hypercall::{Answer, calls::{LongSpinWait, NotifyLongSpinWait}};
//!
//! struct Host { spins: u32 }
//!
//! impl LongSpinWait for Host {
//!     fn notify_long_spin_wait(&mut self, spins: u32) -> Answer {
//!         self.spins = spins;
//!         Answer::Done
//!     }
//! }
//!
//! hvcore::offer_hypercalls!(impl for Host { NotifyLongSpinWait });
//! ```

pub mod calls;
mod declare;
mod output;
mod privileges;
mod registers;
mod request;

pub use declare::{Declaration, Hypercall, Offer};
pub use output::Output;
pub use privileges::{PrivilegeLeaves, Privileges};
pub use registers::{CallerMode, Gpr, Registers, Width, Xmm};
pub use request::{Input, Request, Scratch};

use crate::addr::Level;
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;

/// Who calls, and what its partition may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The caller's processor mode.
    pub mode: CallerMode,
    /// Whose code the call comes from.
    pub level: Level,
    /// The partition shows the interface "Hv#1" and its GUEST_OS_ID is not zero. Otherwise every call is #UD.
    pub enabled: bool,
    /// What the partition may call.
    pub privileges: Privileges,
}

/// What the embedder does after a hypercall instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The result is in the registers: advance RIP past the instruction.
    Complete(HypercallResult),
    /// Continuation: the call made progress and is not finished. RIP stays, so the caller issues it again; for a rep
    /// call the start index in the registers is advanced.
    Retry,
    /// A target inhibits TLB flushes: suspend the caller's VP with RIP at the instruction, so that the call is issued
    /// again when it resumes. No register is changed.
    Suspend,
    /// Inject #UD; RIP stays and no register is changed.
    InjectUd,
}

/// What a handler says about its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Answer {
    /// Success; for a rep call, of all elements.
    Done,
    /// Failure.
    Failed {
        /// What the caller sees; not HV_STATUS_SUCCESS.
        status: HvStatus,
        /// Elements of the given list that were done before the failure; 0 for a simple call.
        completed: u16,
    },
    /// Not finished: let the caller issue the call again.
    Retry {
        /// Elements of the given list that are done; 0 for a simple call.
        completed: u16,
    },
    /// A target inhibits TLB flushes: the caller is suspended and issues the same call again later.
    Suspend,
}

impl From<HvStatus> for Answer {
    #[inline]
    fn from(status: HvStatus) -> Self {
        if status.is_success() { Self::Done } else { Self::Failed { status, completed: 0 } }
    }
}

/// How a call ends, in total reps: what dispatch hands back to [`handle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Reply {
    /// Finished with a status and the total of reps completed.
    Complete {
        /// The status.
        status: HvStatus,
        /// Reps completed in total, the ones before the start index included.
        reps: u16,
    },
    /// To be issued again with this start index (0 for a simple call).
    Retry {
        /// The new rep start index.
        start: u16,
    },
    /// To be issued again, unchanged.
    Suspend,
    /// #UD.
    InjectUd,
}

impl Reply {
    /// Finished with `status` before any rep.
    #[inline]
    pub const fn status(status: HvStatus) -> Self {
        Self::Complete { status, reps: 0 }
    }
}

/// Performs the hypercall that `registers` describe, on a `host` that offers some.
///
/// `scratch` belongs to the calling VP; only calls with long input in memory use it. Its contents do not matter.
#[inline]
pub fn handle<H, R, C>(host: &mut H, caller: &Caller, registers: &mut R, memory: &C, scratch: &mut Scratch) -> Outcome
where
    H: Offer + ?Sized,
    R: Registers,
    C: CallerMemory + ?Sized,
{
    if !caller.enabled || !caller.mode.allows_hypercalls() {
        return Outcome::InjectUd;
    }
    let width = caller.mode.width;
    let input = registers::input_value(registers, width);
    let reply = if refused(input, caller) {
        Reply::status(HvStatus::INVALID_HYPERCALL_INPUT)
    } else {
        host.dispatch(Request::new(input, caller, registers, memory, scratch))
    };
    match reply {
        Reply::Complete { status, reps } => {
            let result = HypercallResult::new(status, reps);
            registers::write_result(registers, width, result);
            Outcome::Complete(result)
        }
        Reply::Retry { start } => {
            if input.rep_count() != 0 {
                registers::write_input(registers, width, input.with_reps(input.rep_count(), start));
            }
            Outcome::Retry
        }
        Reply::Suspend => Outcome::Suspend,
        Reply::InjectUd => Outcome::InjectUd,
    }
}

/// Reserved bits. Bit 31, "for the L0 of a nested environment", is one of them unless L1 may use it; L2's calls with
/// it are for L1 to pass on.
#[inline]
fn refused(input: HypercallInput, caller: &Caller) -> bool {
    let nested = input.raw() & HypercallInput::NESTED != 0;
    let allowed = caller.level == Level::L1 && caller.privileges.contains(Privileges::NESTED_CALLS);
    input.has_reserved() || nested && !allowed
}
