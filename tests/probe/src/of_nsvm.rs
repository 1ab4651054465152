//! The generic functions of `nsvm`, with an embedder's types chosen.

use crate::embedder::{Bytes, Memory, Regs, yes};
use crate::keep_named;
use hvcore::memory::SecondStage;
use hvcore::shadow::EntryFormat;
use nsvm::npt::{CachedWalk, NptEntry, NptShadow, NptWalk};
use nsvm::{L2Exit, NestedSvm};

type Machine<'a> = nsvm::Machine<'a, Regs, Memory, Bytes>;

fn l2_exit(nested: &mut NestedSvm, machine: &mut Machine<'_>) -> L2Exit {
    nested.l2_exit(machine, |_, _, _| yes())
}

/// Keeps them all.
pub fn keep_all() {
    nested();
    npt();
}

fn nested() {
    keep_named! {
        "nsvm::Code::begins_with": <Bytes as nsvm::Code>::begins_with;
        "nsvm::NestedSvm::exit_to_l1": NestedSvm::exit_to_l1::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::l1_exit": NestedSvm::l1_exit::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::l2_exit": l2_exit;
        "nsvm::NestedSvm::prepare_entry": NestedSvm::prepare_entry::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::raise_in_l2": NestedSvm::raise_in_l2::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::reflect": NestedSvm::reflect::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::may_repeat": NestedSvm::may_repeat::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::repeat_entry": NestedSvm::repeat_entry::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::restore": NestedSvm::restore::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::route_events": NestedSvm::route_events::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::step_over": NestedSvm::step_over::<Regs, Memory, Bytes>;
        "nsvm::NestedSvm::synthetic_exit": NestedSvm::synthetic_exit::<Regs, Memory, Bytes>;
    }
}

fn npt() {
    keep_named! {
        "nsvm::npt::NptShadow::activate": NptShadow::<4>::activate;
        "nsvm::npt::NptShadow::cached": NptShadow::<4>::cached;
        "nsvm::npt::NptShadow::context": NptShadow::<4>::context;
        "nsvm::npt::NptShadow::deactivate": NptShadow::<4>::deactivate;
        "nsvm::npt::NptShadow::fault": NptShadow::<4>::fault::<Memory, Memory>;
        "nsvm::npt::NptShadow::flush_address_space": NptShadow::<4>::flush_address_space;
        "nsvm::npt::NptShadow::flush_all_asids": NptShadow::<4>::flush_all_asids;
        "nsvm::npt::NptShadow::flush_asid": NptShadow::<4>::flush_asid;
        "nsvm::npt::NptShadow::flush_everything": NptShadow::<4>::flush_everything;
        "nsvm::npt::NptShadow::flush_gpa_range": NptShadow::<4>::flush_gpa_range;
        "nsvm::npt::NptShadow::free_pages": NptShadow::<4>::free_pages;
        "nsvm::npt::NptShadow::l1_gpa_changed": NptShadow::<4>::l1_gpa_changed;
        "nsvm::npt::NptShadow::lookup": NptShadow::<4>::lookup;
        "nsvm::npt::NptShadow::new": NptShadow::<4>::new;
        "nsvm::npt::NptShadow::tag_retired": NptShadow::<4>::tag_retired;
        "nsvm::npt::NptShadow::tag_stale": NptShadow::<4>::tag_stale;
        "nsvm::npt::CachedWalk as SecondStage": <CachedWalk<'_, '_, Memory, 4> as SecondStage>::walk;
        "nsvm::npt::NptEntry as EntryFormat": <NptEntry as EntryFormat>::table;
        "nsvm::npt::NptEntry as EntryFormat": <NptEntry as EntryFormat>::leaf;
        "nsvm::npt::NptEntry as EntryFormat": <NptEntry as EntryFormat>::read_only;
        "nsvm::npt::NptEntry as EntryFormat": <NptEntry as EntryFormat>::keeps;
        "nsvm::npt::NptWalk as SecondStage": <NptWalk<'_, Memory> as SecondStage>::walk;
        "nsvm::npt::walk": nsvm::npt::walk::<Memory>;
    }
}
