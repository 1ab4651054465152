//! Reference models, the machine model, and the harnesses that compare the library with them.

pub mod harness;
pub mod model;
pub mod reference;
