//! The Hyper-V Top Level Functional Specification (TLFS) as types: data only.
//!
//! Every structure has the size and the field offsets of the TLFS, checked at compile time; every bit that the TLFS
//! names has a name here. The crate depends on nothing of the workspace and does nothing: `hvcore` gives it behaviour.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[macro_use]
mod macros;

pub mod assist;
pub mod cpuid;
pub mod evmcb;
pub mod evmcs;
pub mod flush;
pub mod hypercall;
pub mod inputs;
pub mod msr;
pub mod status;
pub mod vp_set;
