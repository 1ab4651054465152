//! Harnesses that run the library and a reference model on the same input and compare them. Property tests and fuzz
//! targets feed them.

pub mod decode;
pub mod evmcs;
pub mod hypercall;
pub mod lists;
