//! Nested NPT against hand-made tables: what L1 and the embedder observe, and what the shadow tables hold.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod faults;
mod fill;
mod invalidate;
mod machine;
mod property;
mod sequence;
