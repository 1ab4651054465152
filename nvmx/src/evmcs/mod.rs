//! The enlightened VMCS, version 1 (TLFS, "Nested Virtualization"): the page of L1's memory that stands for a VMCS.
//!
//! `host` is L0's half: VMLAUNCH and VMRESUME read L1's page into the VMCS12 with it, and exits write back. `layout` is
//! what both halves know of the page, made of the one list of `tlfs-abi` and the field table.

mod host;
pub mod layout;

pub use host::{Enlightenments, EvmcsCache, LoadError, Loaded, current_evmcs};
