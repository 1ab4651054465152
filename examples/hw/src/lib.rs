//! The x86 hardware layer of the example hypervisors: every privileged instruction that they execute is here.
//!
//! The bare-metal images call it; it calls nothing. Functions are thin: they name an instruction, state what it
//! does to the machine, and leave policy to the caller. [`decode`] is the exception: it is pure and decodes the
//! few instructions that write device memory, for processors without decode assists.

#![no_std]

pub mod apic;
pub mod cpu;
pub mod decode;
pub mod fpu;
pub mod gprs;
pub mod msr;
pub mod port;
pub mod svm;
pub mod vmx;
pub mod vmx_host;
