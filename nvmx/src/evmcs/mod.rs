//! The enlightened VMCS, version 1 (TLFS, "Nested Virtualization"): the page of L1's memory that stands for a VMCS.
//!
//! `host` is L0's half: VMLAUNCH and VMRESUME read L1's page into the VMCS12 with it, and exits write back. `client` is
//! L1's half, for a hypervisor that runs on a host with the enlightenment. `layout` is the page as code, made of the one
//! list of `tlfs-abi` and the field table.

mod active;
pub mod client;
mod host;
mod layout;

pub use active::{ActivePage, ActivePages, Claim};
pub use host::{Enlightenments, EvmcsCache, LoadError, Loaded, current_evmcs};
