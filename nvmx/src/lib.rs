//! Nested VMX: an embedder (a hypervisor) offers VT-x to its guest L1, which runs guests L2 of its own.
//!
//! The crate is sans-I/O. The embedder runs the CPU and asks, around every VM entry of its own:
//!
//! 1. [`NestedVmx::prepare_entry`]: which VMCS, how;
//! 2. after the VM exit, [`NestedVmx::l1_exit`] or [`NestedVmx::l2_exit`] by the level that ran: what to do.
//!
//! Each works on a [`Machine`]: the VP's two hardware VMCSs, its registers, its bitmaps, the CPU's VPIDs, L1's memory.
#![cfg_attr(not(loom), no_std)]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod access;
mod bitmaps;
pub mod bits;
mod cache;
pub mod caps;
pub mod check;
pub mod controls;
mod entry;
pub mod ept;
mod events;
pub mod evmcs;
mod exit;
pub mod exit_reason;
pub mod field;
pub mod groups;
pub mod instructions;
mod l1;
mod l2;
mod machine;
mod merge;
pub mod msr;
mod msr_list;
mod operand;
mod own;
pub mod save;
mod state;
pub mod step;
mod timer;
mod vmcs02;
pub mod vmcs12;
pub mod vmexit;
pub mod vpid;

pub use entry::{Entry, EntryPlan};
pub use exit::Exit;
pub use l1::{Fault, InvEpt, L1Exit};
pub use l2::L2Exit;
pub use machine::{Gprs, IoBitmaps, Linear, Machine, MergedMap, MsrBitmap, PageFault, Vmcs};
pub use msr_list::Msrs;
pub use state::{Context, Current, NestedVmx};
