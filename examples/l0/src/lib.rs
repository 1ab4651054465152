//! L0: a bare-metal hypervisor on AMD-V for one guest, a hypervisor.
//!
//! It takes the machine at boot, gives L1 the devices and nearly all memory, and keeps what nesting and the Hyper-V
//! interface need: its own memory, the local APICs' command registers, and the intercepts in [`vp`].
//!
//! The way of one exit: [`vp::Vp::run`] → [`exits`] → the library (`nsvm`, `hvcore`) → back to the run loop.
//! [`boot`] sets everything up, once. [`fatal`] ends a run that cannot go on.
#![cfg_attr(not(test), no_std)]

pub mod audit;
pub mod boot;
pub mod counters;
pub mod cpuid;
pub mod debug;
pub mod exits;
pub mod fatal;
pub mod fetch;
pub mod hyperv;
pub mod ipi;
pub mod l1map;
pub mod lapic;
pub mod linux;
pub mod loader;
pub mod memory;
pub mod mmio;
pub mod mutant;
pub mod nested;
pub mod npt01;
pub mod pages;
pub mod permissions;
pub mod ports;
pub mod registers;
pub mod relocate;
pub mod shared;
pub mod svm;
pub mod time;
pub mod trace;
pub mod vmx;
pub mod vp;
