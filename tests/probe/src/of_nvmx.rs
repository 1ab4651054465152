//! The generic functions of `nvmx`, and those that return an iterator.

use crate::embedder::Memory;
use crate::keep_named;
use core::hint::black_box;
use hvcore::memory::MemoryError;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::evmcs::EvmcsCache;

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
    evmcs();
}

fn evmcs() {
    keep_named! {
        "nvmx::evmcs::LoadError as From": <nvmx::evmcs::LoadError as From<MemoryError>>::from;
        "nvmx::evmcs::EvmcsCache::entered": EvmcsCache::entered::<Memory>;
        "nvmx::evmcs::EvmcsCache::load": EvmcsCache::load::<Memory>;
        "nvmx::evmcs::EvmcsCache::store": EvmcsCache::store::<Memory>;
        "nvmx::evmcs::EvmcsCache::store_error": EvmcsCache::store_error::<Memory>;
        "nvmx::evmcs::current_evmcs": nvmx::evmcs::current_evmcs::<Memory>;
    }
}
