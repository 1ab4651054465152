//! The scenarios: each builds guests, runs them and checks what this hypervisor and its guests observed.
//!
//! A scenario is a function and a line in `list.rs`; the kernel command line names it (`scenario=NAME`). They run on
//! bare hardware as well as on the L0 hypervisor, so bare hardware is the control for each.

mod events;
mod exits;
mod flush;
mod flush_rules;
pub mod hostile;
mod interrupts;
mod modes;
mod other_vm;
mod paging;
pub mod storm;
mod time;
mod vmx_controls;
mod vmx_ept;
mod vmx_evmcs;
mod vmx_instructions;

use crate::Failure;

pub type Outcome = Result<(), Failure>;

/// A scenario by name.
pub struct Scenario {
    pub name: &'static str,
    pub run: fn() -> Outcome,
    /// `svm`, `vmx` or `both`; `alone` runs when it is named, and not with `all`.
    on: &'static str,
}

impl Scenario {
    /// True when it is for the extension that this processor has.
    pub fn fits(&self) -> bool {
        self.on != if crate::vmx::is_on() { "svm" } else { "vmx" }
    }
}

macro_rules! scenarios {
    ($($on:ident $name:literal => $function:path;)*) => {
        pub const SCENARIOS: &[Scenario] = &[$(Scenario { name: $name, run: $function, on: stringify!($on) },)*];
    };
}

include!("list.rs");

/// True when `wanted`, of the command line, names the scenario: a list with commas, or `all`.
pub fn is_wanted(scenario: &Scenario, wanted: &str) -> bool {
    wanted == "all" && scenario.on != "alone" || wanted.split(',').any(|name| name == scenario.name)
}
