//! The checks of VM entries: each fires, and just short of it the entry happens. What L1 is offered, and by which MSRs.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod caps;
mod controls;
mod document;
mod events;
mod guest;
mod host;
mod msr;
mod rig;
mod segments;
