//! Reference models, the machine model, and the harnesses that compare the library with them.

pub mod conformance;
pub mod embedder;
pub mod harness;
pub mod model;
pub mod reference;
pub mod vmx_embedder;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
