//! Nested SVM: an embedder (a hypervisor) offers AMD-V to its guest L1, which runs guests L2 of its own.
//!
//! The crate is sans-I/O. The embedder runs the CPU and asks, around every VMRUN of its own:
//!
//! 1. [`NestedSvm::prepare_entry`]: which VMCB, how;
//! 2. after the #VMEXIT, [`NestedSvm::l1_exit`] or [`NestedSvm::l2_exit`] by the level that ran: what to do.
//!
//! Each works on a [`Machine`]: the VP's two VMCBs, its registers, its permission maps, the CPU's ASIDs, L1's memory.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod asid;
pub mod caps;
pub mod check;
mod entry;
mod events;
pub mod exit_code;
mod fault;
pub mod insn;
mod l1;
mod l2;
mod machine;
mod maps;
pub mod msr;
pub mod npt;
pub mod save;
mod state;
mod view;
pub mod vmcb;
mod vmexit;
mod vmrun;
mod vnmi;

pub use entry::{Entry, EntryPlan};
pub use fault::Fault;
pub use l1::L1Exit;
pub use l2::L2Exit;
pub use machine::{Code, Gprs, IoMap, Machine, MergedMap, MsrMap};
pub use state::{Context, NestedPaging, NestedSvm};
pub use vmexit::Exit;
pub use vmrun::Invalidate;
