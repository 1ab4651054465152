//! Random near-valid VMCSs, judged by the library's VM-entry checks and by the processor that this image runs on.
//!
//! The command line: `samples=N` (20,000), `seed=N`, `blind=vpid` makes the library overlook one rule: the control, which
//! must be found out. With `evmcs=yes` the VMCSs are enlightened ones. A disagreement of a class that docs/vmx-checks.md
//! explains is counted; any other is a failure, and with `explain=no` each is: for a processor that has the library's
//! checks itself, the one that the L0 hypervisor shows.
#![cfg_attr(freestanding, no_std, no_main)]
#![cfg_attr(not(freestanding), allow(dead_code, reason = "a hosted build is for lints and documentation"))]

mod explain;
mod machine;
mod verdict;

use explain::Class;
use machine::Machine;
use nvmx::check::{Controls, Refusal};
use nvmx::field::Field;
use rt::{BootInfo, ExitCode, println};
use samples::{Rng, Sample, sample, settle_host};
use verdict::{Outcome, judge, outcome};

rt::entry!(image);

/// Most disagreements that are printed in full.
const SHOWN: u32 = 20;

#[derive(Default)]
struct Tally {
    alike: u32,
    entered: u32,
    not_run: u32,
    explained: [u32; Class::ALL.len()],
    unexplained: u32,
    /// Ticks that the library took over those that entered; on Bochs a tick is an instruction.
    ticks: u64,
}

/// How it is compared.
#[derive(Clone, Copy)]
struct Mode {
    /// The library overlooks a rule.
    blind: bool,
    /// No disagreement is explained.
    strict: bool,
}

fn image(boot: &'static BootInfo) -> ExitCode {
    let number = |name, default| boot.argument(name).and_then(|n| n.parse().ok()).unwrap_or(default);
    let (wanted, seed): (u64, u64) = (number("samples", 20_000), number("seed", 1));
    let mode = Mode { blind: boot.argument("blind") == Some("vpid"), strict: boot.argument("explain") == Some("no") };
    let Some(mut machine) = Machine::start(boot.argument("evmcs") == Some("yes")) else {
        println!("vmxchecks: no VMX here, or no enlightened VMCS");
        return ExitCode::Failure;
    };
    let (mut rng, mut tally) = (Rng::new(seed), Tally::default());
    for n in 0..wanted {
        let mut s = sample(&machine.config, &machine.layout, &mut rng);
        settle_host(&mut s.vmcs, &machine.config, &machine.layout, machine.root, machine::harmless);
        machine::let_time_run(&mut s.vmcs);
        machine.carried(&mut s.vmcs);
        one(&mut machine, &mut tally, &s, n, mode);
    }
    report(&tally, wanted)
}

fn one(machine: &mut Machine, tally: &mut Tally, s: &Sample, n: u64, mode: Mode) {
    let start = hw::cpu::rdtsc();
    let mut verdict = judge(&s.vmcs, machine);
    let ticks = hw::cpu::rdtsc() - start;
    if mode.blind && verdict == Err(Refusal::Controls(Controls::Vpid)) {
        verdict = Ok(());
    }
    if explain::would_hang(&s.vmcs, &verdict, machine) {
        tally.not_run += 1;
        return;
    }
    let (ours, theirs) = (outcome(&verdict), machine.enter(&s.vmcs));
    // Where several checks fail, which one counts is the processor's choice.
    let order =
        matches!((ours, theirs), (Outcome::Fails(_), Outcome::Fails(_)) | (Outcome::Guest(_), Outcome::Guest(_)));
    if ours == theirs || s.changes > 1 && order {
        tally.alike += 1;
        if ours == Outcome::Enters {
            tally.entered += 1;
            tally.ticks += ticks;
        }
    } else if let Some(class) = explain::class(&s.vmcs, &verdict, theirs, s.changes, machine)
        && !mode.strict
    {
        tally.explained[class as usize] += 1;
    } else {
        tally.unexplained += 1;
        if tally.unexplained <= SHOWN {
            show(machine, s, n, &verdict, theirs);
        }
    }
}

fn show(machine: &Machine, s: &Sample, n: u64, verdict: &Result<(), Refusal>, theirs: Outcome) {
    println!(
        "sample {n}, {:?}, {} changes: disagree: {verdict:?}, but the processor: {theirs:x?}",
        s.profile, s.changes
    );
    let base = samples::valid(&machine.config, &machine.layout, s.profile);
    for field in Field::ALL {
        if base.get(*field) != s.vmcs.get(*field) {
            println!("  {field:?}: {:#x}, valid {:#x}", s.vmcs.get(*field), base.get(*field));
        }
    }
}

fn report(tally: &Tally, wanted: u64) -> ExitCode {
    println!("vmxchecks: {wanted} samples: {} alike, {} of them entered", tally.alike, tally.entered);
    println!("vmxchecks: {} not run, {} unexplained", tally.not_run, tally.unexplained);
    println!("vmxchecks: {} ticks for the checks of an entry", tally.ticks / u64::from(tally.entered.max(1)));
    for class in Class::ALL {
        println!("vmxchecks: {:5} {class:?}", tally.explained[class as usize]);
    }
    let entered = u64::from(tally.entered);
    let both = entered > wanted / 5 && entered < wanted * 4 / 5 && u64::from(tally.not_run) < wanted / 20;
    if tally.unexplained == 0 && both { ExitCode::Success } else { ExitCode::Failure }
}
