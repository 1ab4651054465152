//! The Hyper-V TLFS as types: hypercalls, VP sets, leaves, MSRs, assist pages, enlightened VMCS and VMCB.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]
