//! The state machine of nested SVM on a processor that is a few lines of test code: memory is a byte array, the guest
//! "runs" when a test sets the fields of a #VMEXIT.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod asid;
mod checks;
mod entry;
mod events;
mod extensions;
mod insn;
mod instructions;
mod maps;
mod msrs;
mod rig;
mod routing;
mod save;
mod vmexit;
mod vmrun;
