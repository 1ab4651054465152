//! The image of L0. See the library of this package for what it does.
#![cfg_attr(freestanding, no_std, no_main)]

rt::entry!(l0::boot::main);
