//! Nested SVM: VMRUN checks, VMCB02, exit routing, nested NPT, enlightened VMCB.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod exit_code;
pub mod npt;
pub mod vmcb;
