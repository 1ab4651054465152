//! The TLB flush engine: a request from L1 or from L2 reaches the VPs that may hold what it flushes, is never lost,
//! and waits only for those that run.
//!
//! - [`VpFlush`]: the shared half of a VP: one atomic word and three queues (L1's GVA ranges, L2's, L2's second stage).
//! - [`LocalFlush`]: the owner's half; the embedder calls it around every entry of a guest.
//! - [`FlushDomain`]: the VPs of a partition; takes requests.
//! - [`Shootdown`]: what a request leaves to do: whom to kick, and a poll for "all have acknowledged".
//! - [`TargetIndex`]: finds the VPs of a nested context.
//!
//! **Guarantee.** When a request is [`Posted::Done`], or its poll is true, no VP uses a translation that the request
//! covers and that was cached before the call: each target has flushed it, will flush it before its guest's next
//! instruction, or has given up the tag that it was cached under. `docs/flush.md` has the argument, step by step.
//!
//! **Contexts.** A VP holds translations of one nested context at most: another (VM_ID, VP_ID), another tag of L1's, or
//! another second-stage root retires what was there ([`LocalFlush::set_context`]). So "last entered" is all there is to
//! look for.
//!
//! May be called by hypercall handlers, `nvmx`, `nsvm` and the embedder; uses `tlfs-abi`, [`crate::addr`] and [`crate::vp_index`].
//! It never sleeps, spins or sends a kick itself.

mod calls;
mod domain;
mod index;
#[doc(hidden)]
pub mod mutant;
mod pending;
mod post;
mod queue;
mod range;
mod shootdown;
mod sync;
mod vp;
mod word;

pub use calls::FlushCalls;
pub use domain::{FlushDomain, GvaScope, SecondStageScope};
pub use index::{IndexError, NestedContext, NestedIds, TargetIndex};

pub use range::{GvaWidth, SecondStageItem};
pub use shootdown::{Posted, Shootdown};
#[doc(hidden)]
pub use sync::AtomicU64;
pub use vp::{ContextChange, EntryFlush, GvaFlush, LocalFlush, Ranges, SecondStageFlush, VpFlush};
