//! The generic functions of `nvmx`, and those that return an iterator.

use crate::keep_named;
use core::hint::black_box;
use nvmx::controls::{entry, exit, pin, primary, secondary};

macro_rules! names {
    ($($module:ident),*) => { $( fn $module(value: u64) {
        $module::names(value as _).for_each(|name| _ = black_box(name));
    } )* };
}

names!(entry, exit, pin, primary, secondary);

/// Keeps them all.
pub fn keep_all() {
    keep_named! {
        "nvmx::controls::entry::names": entry;
        "nvmx::controls::exit::names": exit;
        "nvmx::controls::pin::names": pin;
        "nvmx::controls::primary::names": primary;
        "nvmx::controls::secondary::names": secondary;
    }
}
