//! `cargo xtask qemu-test`: builds the images, runs the scenarios on emulated machines, prints a table.

use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding, Target};
use crate::machine::Accel;
use crate::qemu_run::{self, Ingredients, Options};
use crate::results::{self, ResultLine, Verdict};
use crate::scenarios::{self, Chosen, SCENARIOS, Scenario};
use std::path::PathBuf;
use std::time::Instant;

/// Options of `cargo xtask qemu-test`.
#[derive(clap::Args)]
pub struct Args {
    /// Print the scenarios and what they run on, and run nothing
    #[arg(long)]
    list: bool,
    /// Run this scenario alone, on every machine it has (may be repeated); a batch by its name runs whole
    #[arg(long, value_name = "NAME", value_parser = known)]
    scenario: Vec<String>,
    /// Also run the scenarios that take minutes
    #[arg(long)]
    all: bool,
    /// Write one JSON object per scenario and machine to FILE
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Run everything N times, and fail when one of the runs fails
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Write the timeline of every processor to FILE, as Chrome trace-event JSON (Perfetto opens it); of several runs to
    /// files beside it, with the runs' names in theirs
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Seconds that a run of an emulator may take, instead of the scenario's own limit
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// How QEMU executes guest code
    #[arg(long, value_enum, default_value = "tcg")]
    accel: Accel,
    /// Processors, instead of the scenario's own number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    smp: Option<u32>,
    /// Make the L0 hypervisor save, destroy and restore nested state every N exits
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    churn: Option<u32>,
    /// Deterministic instruction counting where there is one processor; reports the L0 hypervisor's instructions
    #[arg(long)]
    icount: bool,
    /// Which compiler target makes the images
    #[arg(long, value_enum, default_value = "auto")]
    freestanding: Freestanding,
}

/// Runs the chosen scenarios; fails when one of them fails.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    if args.list {
        list();
        return Ok(());
    }
    let chosen = choose(&args, images::choose(ctx, args.freestanding)?);
    let options = Options {
        accel: args.accel,
        timeout: args.timeout,
        smp: args.smp,
        churn: args.churn,
        icount: args.icount,
        trace: args.trace.clone().map(|path| (path, chosen.len() > 1)),
    };
    let mut log = Log::create(ctx, "qemu-test")?;
    let ingredients = Ingredients::prepare(ctx, &mut log, &chosen, args.freestanding);
    let ingredients = ingredients.map_err(|e| format!("{e} (details: {})", log.path().display()))?;
    println!("images for {:?}", ingredients.images.target);
    let (mut runs, mut seconds) = (Vec::new(), Vec::new());
    for n in 1..=args.repeat {
        if args.repeat > 1 {
            println!("run {n} of {}", args.repeat);
        }
        println!("{}", results::heading());
        let start = Instant::now();
        runs.push(qemu_run::run_all(ctx, &options, &ingredients, &chosen, |line| println!("{line}"))?);
        seconds.push(start.elapsed().as_secs_f64());
        if let Some(path) = &args.report {
            results::write_report(path, &runs)?;
        }
    }
    let mut failed = 0;
    for (n, (run, seconds)) in (1..).zip(runs.iter().zip(&seconds)) {
        failed += run.iter().filter(|l| l.failed()).count();
        let name = if args.repeat > 1 { format!("run {n}: ") } else { String::new() };
        println!("{name}{} in {seconds:.1} s", summary(run));
    }
    if args.repeat > 1 {
        let good = runs.iter().filter(|run| !run.iter().any(ResultLine::failed)).count();
        println!("{good} of {} runs passed", runs.len());
    }
    if failed == 0 { Ok(()) } else { Err("".into()) }
}

/// A name for `--scenario`, if there is one of that name.
fn known(name: &str) -> std::result::Result<String, String> {
    let found = scenarios::names().into_iter().find(|n| n == name);
    found.ok_or_else(|| "no such scenario; --list names them".to_string())
}

fn list() {
    for scenario in SCENARIOS {
        let machine = scenario.machine_name(scenario.cpus);
        let slow = if scenario.slow { "  (with --all)" } else { "" };
        let print = |name: &str| println!("{name:<44} {machine:<18} {} {}{slow}", scenario.image, scenario.args);
        match scenario.parts().as_slice() {
            [] => print(scenario.name),
            parts => parts.iter().for_each(|part| print(&scenario.full_name(part))),
        }
    }
}

/// What the command line names, or all that takes no minutes and is about images for `target`.
fn choose(args: &Args, target: Target) -> Vec<Chosen> {
    let mut chosen: Vec<Chosen> = Vec::new();
    for scenario in SCENARIOS {
        // With one number of processors for all, runs that differ in nothing else are one.
        if args.smp.is_some() && chosen.iter().any(|c| differs_in_cpus_only(c.scenario, scenario)) {
            continue;
        }
        let one = match args.scenario.as_slice() {
            [] => (is_for(scenario, target) && (args.all || !scenario.slow)).then(|| Chosen::whole(scenario)),
            names => Chosen::named(scenario, names),
        };
        chosen.extend(one);
    }
    chosen
}

/// The host's target shows that the runtime works there, and that L0 does not: no scenario need run twice.
fn is_for(scenario: &Scenario, target: Target) -> bool {
    match target {
        Target::Host => scenario.image == "selftest" || scenario.sse,
        Target::None => !scenario.sse,
    }
}

fn differs_in_cpus_only(a: &Scenario, b: &Scenario) -> bool {
    (a.name, a.machine) == (b.name, b.machine)
}

fn summary(lines: &[ResultLine]) -> String {
    let count = |test: fn(&ResultLine) -> bool| lines.iter().filter(|l| test(l)).count();
    let failed = count(ResultLine::failed);
    let skipped = count(|l| matches!(l.verdict, Verdict::Skip(_)));
    let mut text = format!("{} passed, {failed} failed", lines.len() - failed - skipped);
    if skipped > 0 {
        text += &format!(", {skipped} skipped");
    }
    text
}

/// For a stage of `cargo xtask test`: everything, or what the runtime itself needs, with the table in the log.
pub fn stage(ctx: &Ctx, log: &mut Log, freestanding: Freestanding) -> Result<String> {
    let options = Options { accel: Accel::Tcg, timeout: None, smp: None, churn: None, icount: false, trace: None };
    let target = images::choose(ctx, freestanding)?;
    let runs_here = |s: &&Scenario| is_for(s, target) && !s.slow;
    let chosen: Vec<Chosen> = SCENARIOS.iter().filter(runs_here).map(Chosen::whole).collect();
    let ingredients = Ingredients::prepare(ctx, log, &chosen, freestanding)?;
    let mut table = vec![results::heading()];
    let lines = qemu_run::run_all(ctx, &options, &ingredients, &chosen, |line| table.push(line.to_string()))?;
    for line in &table {
        log.line(line)?;
    }
    let text = format!("{} in {} runs", summary(&lines), chosen.len());
    if lines.iter().any(ResultLine::failed) { Err(text.into()) } else { Ok(text) }
}
