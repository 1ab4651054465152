//! Nested VMX: VMCS12, entry checks, VMCS02, exit routing, nested EPT, enlightened VMCS.
//!
//! Today: the one table of VMCS fields, the control bits and the VMCS12 with what VMREAD and VMWRITE do to it.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod controls;
pub mod field;
pub mod vmcs12;
