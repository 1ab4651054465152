//! L0's backend for VT-x: as [`crate::vp`], [`crate::exits`] and [`crate::nested`] are for AMD-V.
//!
//! The way of one exit: [`vp::Vp::run`] → [`exits`] → the library (`nvmx`, `hvcore`) → back to the run loop.
//! [`host`] is what all VPs share. There is no GIF: [`kick`] says how no kick is lost.

pub mod exits;
pub mod guest;
pub mod host;
pub mod hyperv;
pub mod kick;
pub mod linear;
pub mod memory;
pub mod nested;
pub mod pages;
pub mod registers;
pub mod report;
pub mod vcr;
pub mod vmcs;
pub mod vp;
