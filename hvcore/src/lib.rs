//! Vendor-neutral core of nested virtualization with the Hyper-V enlightenments.
//!
//! The crate is sans-I/O: it takes what a guest did and returns what to do about it. It never runs a CPU, sleeps,
//! sends an interrupt or reads a clock; an embedder (a hypervisor that links it) does, behind small traits.
//! `nvmx` and `nsvm` build on it; it knows neither of them.
#![cfg_attr(not(loom), no_std)]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod addr;
pub mod client;
pub mod direct;
pub mod flush;
pub mod hypercall;
pub mod memory;
pub mod partition;
pub mod pv;
pub mod shadow;
pub mod vp_index;

pub use tlfs_abi;
