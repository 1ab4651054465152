//! The scenarios: each builds guests, runs them and checks what this hypervisor and its guests observed.
//!
//! A scenario is a function and a line in [`SCENARIOS`]; the kernel command line names it (`scenario=NAME`). They run on bare
//! hardware as well as on the L0 hypervisor, so bare hardware is the control for each.

mod events;
mod exits;
mod flush;
mod flush_rules;
pub mod hostile;
mod interrupts;
mod modes;
mod paging;

use crate::Failure;

pub type Outcome = Result<(), Failure>;

/// A scenario by name.
pub struct Scenario {
    pub name: &'static str,
    pub run: fn() -> Outcome,
}

macro_rules! scenarios {
    ($($name:literal => $function:path;)*) => {
        pub const SCENARIOS: &[Scenario] = &[$(Scenario { name: $name, run: $function },)*];
    };
}

scenarios! {
    "cpuid" => exits::cpuid;
    "hlt" => exits::hlt;
    "prefixed-vmmcall" => exits::prefixed_vmmcall;
    "msr" => exits::msr;
    "msr-map-change" => exits::msr_map_change;
    "io" => exits::io;
    "cr-dr" => exits::cr_dr;
    "cr0-selective" => exits::cr0_selective;
    "exceptions" => exits::exceptions;
    "shutdown" => exits::shutdown;
    "registers" => exits::registers;
    "injection" => events::injection;
    "interrupted-delivery" => events::interrupted_delivery;
    "virtual-interrupt" => events::virtual_interrupt;
    "interrupt-window" => events::interrupt_window;
    "refusals" => events::refusals;
    "npf-read" => paging::npf_read;
    "npf-write" => paging::npf_write;
    "npf-execute" => paging::npf_execute;
    "npf-supervisor" => paging::npf_supervisor;
    "npf-reserved" => paging::npf_reserved;
    "npf-walk" => paging::npf_walk;
    "npt-accessed-dirty" => paging::npt_accessed_dirty;
    "asids" => paging::asids;
    "asid-reuse" => paging::asid_reuse;
    "real-mode" => modes::real_mode;
    "protected-mode" => modes::protected_mode;
    "32-bit-paging" => modes::paging_32;
    "pae" => modes::pae;
    "every-processor" => modes::every_processor;
    "pending-interrupt" => interrupts::pending_interrupt;
    "masked-interrupt" => interrupts::masked_interrupt;
    "interrupt-while-running" => interrupts::interrupt_while_running;
    "nmi-while-running" => interrupts::nmi_while_running;
    "nmi-and-gif" => interrupts::nmi_and_gif;
    "interrupt-and-gif" => interrupts::interrupt_and_gif;
    "hostile-vmcbs" => hostile::vmcbs;
    "flush-control" => flush::control;
    "flush-direct" => flush::direct;
    "flush-preconditions" => flush_rules::preconditions;
    "flush-other-calls" => flush_rules::other_calls;
    "flush-refused-input" => flush_rules::refused_input;
    "flush-synthetic-exit" => flush_rules::synthetic_exit;
    "flush-unreadable-partition-assist" => flush_rules::unreadable_partition_assist;
}
