//! Nested EPT against hand-made tables: what L1 and the embedder observe, and what the shadow tables hold.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic, missing_docs)]

mod eptp;
mod faults;
mod fill;
mod invalidate;
mod log;
mod machine;
mod property;
mod sequence;
