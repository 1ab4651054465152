//! The generic functions of `nvmx`, and those that return an iterator.

use crate::embedder::{Fields, Memory, Regs, word};
use crate::keep_named;
use core::hint::black_box;
use hvcore::memory::MemoryError;
use nvmx::caps::Host;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::evmcs::EvmcsCache;
use nvmx::{Fault, NestedVmx, PageFault, Vmcs};

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
    nested();
}

fn host() -> Host {
    Host::from_msrs(word() as u8, word() as u8, |msr| word() ^ u64::from(msr))
}

fn nested() {
    keep_named! {
        "nvmx::NestedVmx::l1_cr0": NestedVmx::l1_cr0::<Fields>;
        "nvmx::NestedVmx::l1_cr4": NestedVmx::l1_cr4::<Fields>;
        "nvmx::NestedVmx::l1_exit": NestedVmx::l1_exit::<Fields, Regs, Memory, Memory>;
        "nvmx::Fault as From": <Fault as From<PageFault>>::from;
        "nvmx::PageFault as From": <Fault as From<PageFault>>::from;
        "nvmx::Vmcs::read32": <Fields as Vmcs>::read32;
        "nvmx::caps::Host::from_msrs": host;
        "nvmx::check::controls": nvmx::check::controls::<Memory>;
        "nvmx::check::guest": nvmx::check::guest::<Memory>;
        "nvmx::step::complete_instruction": nvmx::step::complete_instruction::<Fields>;
        "nvmx::step::cpl": nvmx::step::cpl::<Fields>;
        "nvmx::step::in_64bit_code": nvmx::step::in_64bit_code::<Fields>;
        "nvmx::step::inject_fault": nvmx::step::inject_fault::<Fields, Regs>;
        "nvmx::vmcs12::Vmcs12::clear_launch_state": nvmx::vmcs12::Vmcs12::clear_launch_state::<Memory>;
    }
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
