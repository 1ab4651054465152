//! The generic functions of `nvmx`, and those that return an iterator.

use crate::embedder::{Fields, Memory, Regs, word, yes};
use crate::keep_named;
use core::hint::black_box;
use hvcore::memory::{MemoryError, SecondStage};
use hvcore::shadow::EntryFormat;
use nvmx::caps::Host;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::ept::{CachedWalk, EptEntry, EptShadow, EptWalk};
use nvmx::evmcs::EvmcsCache;
use nvmx::{Fault, L2Exit, Machine, NestedVmx, PageFault, Vmcs};

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
    ept();
    evmcs();
    nested();
}

fn host() -> Host {
    Host::from_msrs(word() as u8, word() as u8, |msr| word() ^ u64::from(msr))
}

fn l2_exit(nested: &mut NestedVmx, machine: &mut Machine<'_, Fields, Regs, Memory, Memory>) -> L2Exit {
    nested.l2_exit(machine, |_, _, _| yes())
}

fn nested() {
    keep_named! {
        "nvmx::NestedVmx::entry_failed": NestedVmx::entry_failed::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::exit_to_l1": NestedVmx::exit_to_l1::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::l1_cr0": NestedVmx::l1_cr0::<Fields>;
        "nvmx::NestedVmx::l1_cr4": NestedVmx::l1_cr4::<Fields>;
        "nvmx::NestedVmx::l1_exit": NestedVmx::l1_exit::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::l2_exit": l2_exit;
        "nvmx::NestedVmx::own_bitmaps_changed": NestedVmx::own_bitmaps_changed::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::prepare_entry": NestedVmx::prepare_entry::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::raise_in_l2": NestedVmx::raise_in_l2::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::reflect": NestedVmx::reflect::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::reflect_ept": NestedVmx::reflect_ept::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::restore": NestedVmx::restore::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::route_events": NestedVmx::route_events::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::save": NestedVmx::save::<Fields, Regs, Memory, Memory>;
        "nvmx::NestedVmx::synthetic_exit": NestedVmx::synthetic_exit::<Fields, Regs, Memory, Memory>;
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

fn ept() {
    keep_named! {
        "nvmx::ept::CachedWalk as SecondStage": <CachedWalk<'_, '_, Memory, 4> as SecondStage>::walk;
        "nvmx::ept::EptEntry as EntryFormat": <EptEntry as EntryFormat>::table;
        "nvmx::ept::EptEntry as EntryFormat": <EptEntry as EntryFormat>::leaf;
        "nvmx::ept::EptEntry as EntryFormat": <EptEntry as EntryFormat>::read_only;
        "nvmx::ept::EptEntry as EntryFormat": <EptEntry as EntryFormat>::keeps;
        "nvmx::ept::EptShadow::activate": EptShadow::<4>::activate;
        "nvmx::ept::EptShadow::active": EptShadow::<4>::active;
        "nvmx::ept::EptShadow::cached": EptShadow::<4>::cached;
        "nvmx::ept::EptShadow::deactivate": EptShadow::<4>::deactivate;
        "nvmx::ept::EptShadow::fault": EptShadow::<4>::fault::<Memory, Memory>;
        "nvmx::ept::EptShadow::flush_context": EptShadow::<4>::flush_context;
        "nvmx::ept::EptShadow::flush_everything": EptShadow::<4>::flush_everything;
        "nvmx::ept::EptShadow::flush_gpa_range": EptShadow::<4>::flush_gpa_range;
        "nvmx::ept::EptShadow::format": EptShadow::<4>::format;
        "nvmx::ept::EptShadow::free_pages": EptShadow::<4>::free_pages;
        "nvmx::ept::EptShadow::l1_gpa_changed": EptShadow::<4>::l1_gpa_changed;
        "nvmx::ept::EptShadow::lookup": EptShadow::<4>::lookup;
        "nvmx::ept::EptShadow::new": EptShadow::<4>::new;
        "nvmx::ept::EptShadow::tag_retired": EptShadow::<4>::tag_retired;
        "nvmx::ept::EptShadow::tag_stale": EptShadow::<4>::tag_stale;
        "nvmx::ept::EptWalk as SecondStage": <EptWalk<'_, Memory> as SecondStage>::walk;
        "nvmx::ept::switch_eptp": nvmx::ept::switch_eptp::<Memory>;
        "nvmx::ept::walk": nvmx::ept::walk::<Memory>;
    }
}

fn evmcs() {
    keep_named! {
        "nvmx::evmcs::LoadError as From": <nvmx::evmcs::LoadError as From<MemoryError>>::from;
        "nvmx::evmcs::EvmcsCache::enter": EvmcsCache::enter::<Memory>;
        "nvmx::evmcs::EvmcsCache::entered": EvmcsCache::entered::<Memory>;
        "nvmx::evmcs::EvmcsCache::load": EvmcsCache::load::<Memory>;
        "nvmx::evmcs::EvmcsCache::store": EvmcsCache::store::<Memory>;
        "nvmx::evmcs::EvmcsCache::store_error": EvmcsCache::store_error::<Memory>;
        "nvmx::evmcs::current_evmcs": nvmx::evmcs::current_evmcs::<Memory>;
    }
}
