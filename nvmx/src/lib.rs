//! Nested VMX: VMCS12, entry checks, VMCS02, exit routing, nested EPT, enlightened VMCS.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]
