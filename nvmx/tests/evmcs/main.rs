//! The enlightened VMCS: L0's half and the client's.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::panic,
    missing_docs
)]

mod active;
mod client;
mod host;
mod memory;
mod property;
