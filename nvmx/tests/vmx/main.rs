//! The state machine of nested VMX on a processor that is a few lines of test code: a hardware VMCS is an array, memory
//! is a byte array, the guest "runs" when a test sets the fields of a VM exit.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod access;
mod bitmaps;
mod cr;
mod economy;
mod entry;
mod equivalence;
mod evmcs;
mod exceptions;
mod invalidate;
mod l2;
mod launch;
mod merge;
mod msrs;
mod operand;
mod pending;
mod region;
mod rig;
mod routing;
mod save;
mod vmexit;
mod vmxon;
mod vpid;
