//! A small hypervisor for AMD-V and VT-x: L1 when the L0 hypervisor runs it, an ordinary hypervisor on bare hardware.
//!
//! The kernel command line says what it does: `scenario=NAME,NAME` runs these scenarios, nothing or `scenario=all` runs
//! them all, `bench=all` measures. It prints a line for each scenario and ends the machine with the verdict.
//! `counters=each` asks L0 for its counters before the first scenario and after each.
#![cfg_attr(freestanding, no_std, no_main)]

mod bench;
mod bitmaps;
mod global;
mod guest;
mod hyperv;
mod l2;
#[allow(dead_code, reason = "as the VMCB")]
mod npt;
mod scenarios;
mod smp;
#[allow(dead_code, reason = "a table of the architecture: scenarios use what they need of it")]
mod vmcb;
mod vms;
mod vmx;

use core::fmt;
use global::Global;
use guest::Guest;
use rt::cpu::MAX_CPUS;
use rt::{BootInfo, ExitCode};
use scenarios::SCENARIOS;

rt::entry!(run);

/// Why a scenario did not pass.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// A check did not hold.
    Check { what: &'static str, seen: u64, wanted: u64 },
    /// The machine lacks what the scenario is about.
    Missing(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Check { what, seen, wanted } => write!(f, "{what}: {seen:#x}, wanted {wanted:#x}"),
            Self::Missing(what) => f.write_str(what),
        }
    }
}

/// Demands that `seen` is `wanted`.
pub fn check(what: &'static str, seen: u64, wanted: u64) -> Result<(), Failure> {
    if seen == wanted { Ok(()) } else { Err(Failure::Check { what, seen, wanted }) }
}

/// Page frames for tables and test pages.
pub mod frames {
    /// A zeroed page's address, physical and virtual.
    pub fn page() -> u64 {
        match rt::frames::allocate(4096, 4096) {
            Some(page) => page as u64,
            None => panic!("no page frame is left"),
        }
    }
}

static GUESTS: [Global<Guest>; MAX_CPUS] = [const { Global::new(Guest::new()) }; MAX_CPUS];

/// The guest of this processor; a scenario sets it up anew.
pub fn cpu_guest() -> &'static mut Guest {
    GUESTS[rt::cpu::current().index as usize].get()
}

/// Makes this processor one that can run guests, by the extension that it has.
pub fn enable() -> bool {
    if hw::svm::capabilities().is_none() && hw::vmx::supported() { vmx::enable() } else { enable_svm() }
}

fn enable_svm() -> bool {
    if hw::svm::capabilities().is_none() {
        rt::println!("no SVM on this processor");
        return false;
    }
    // SAFETY: SVM is there, and the page frame is given away.
    if !unsafe { hw::svm::enable(frames::page()) } {
        rt::println!("SVM is disabled in VM_CR");
        return false;
    }
    // SAFETY: long mode processors have NX; nested tables use it, and EFER.NXE of the host decides whether they may.
    unsafe { hw::msr::wrmsr(hw::msr::EFER, hw::msr::rdmsr(hw::msr::EFER) | hw::msr::EFER_NXE) };
    true
}

/// Has L0, if it was told to listen, print its counters.
fn ask_for_counters(wanted: bool) {
    if wanted {
        // SAFETY: a port for messages: L0's, or the emulator's own.
        unsafe { hw::port::outb(0xE9, b'S') };
    }
}

fn run(boot: &'static BootInfo) -> ExitCode {
    // SAFETY: masking both 8259s: their BIOS vectors are those of exceptions, and nothing here uses them.
    unsafe {
        hw::port::outb(0x21, 0xFF);
        hw::port::outb(0xA1, 0xFF);
    }
    let cpus = boot.argument("cpus").and_then(|n| n.parse().ok()).unwrap_or(1);
    if !enable() || !smp::start(cpus) {
        rt::println!("not all processors came");
        return ExitCode::Failure;
    }
    if boot.argument("bench").is_some() {
        return match bench::run() {
            Ok(()) => ExitCode::Success,
            Err(failure) => {
                rt::println!("FAIL bench: {failure}");
                ExitCode::Failure
            }
        };
    }
    let wanted = boot.argument("scenario").unwrap_or("all");
    if let Some(tries) = boot.argument("hostile").and_then(|n| n.parse().ok()) {
        scenarios::hostile::set_tries(tries);
    }
    if let Some(flushes) = boot.argument("storm").and_then(|n| n.parse().ok()) {
        scenarios::storm::set_flushes(flushes);
    }
    // `skip=no`: this machine has all that the scenarios want, so a skipped one is a failure.
    let may_skip = boot.argument("skip") != Some("no");
    let counters = boot.argument("counters") == Some("each");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let chosen = SCENARIOS.iter().filter(|s| s.fits() && scenarios::is_wanted(s, wanted));
    rt::println!("{} scenarios", chosen.clone().count());
    ask_for_counters(counters);
    for scenario in chosen {
        let outcome = (scenario.run)();
        ask_for_counters(counters);
        match outcome {
            Ok(()) => {
                passed += 1;
                rt::println!("PASS {}", scenario.name);
            }
            Err(Failure::Missing(what)) if may_skip => {
                skipped += 1;
                rt::println!("SKIP {}: {what}", scenario.name);
            }
            Err(failure) => {
                failed += 1;
                rt::println!("FAIL {}: {failure}", scenario.name);
            }
        }
    }
    rt::println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 && passed + skipped > 0 { ExitCode::Success } else { ExitCode::Failure }
}
