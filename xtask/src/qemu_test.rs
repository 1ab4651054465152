//! `cargo xtask qemu-test`: builds the images, runs the scenarios on emulated machines, prints a table.

use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding, Images};
use crate::linux::{self, Prepared};
use crate::machine::{self, Accel, Ended, Loaded, Run};
use crate::scenarios::{Content, Expect, Machine, SCENARIOS, Scenario};
use crate::setup;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `cargo xtask qemu-test`.
#[derive(clap::Args)]
pub struct Args {
    /// Print the scenarios and what they run on, and run nothing
    #[arg(long)]
    list: bool,
    /// Run this scenario alone (may be repeated)
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(SCENARIOS.iter().map(|s| s.name)))]
    scenario: Vec<String>,
    /// Also run the scenarios that take minutes
    #[arg(long)]
    all: bool,
    /// Write one JSON object per run to FILE
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Seconds that a run may take, instead of the scenario's own limit
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
    /// Which compiler target makes the images
    #[arg(long, value_enum, default_value = "auto")]
    freestanding: Freestanding,
}

/// Runs the chosen scenarios; fails when one of them fails.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    if args.list {
        for s in SCENARIOS {
            println!("{:<24} {:<20} {:>2} cpus  {} {}", s.name, s.machine.cpu(), s.cpus, s.image, s.args);
        }
        return Ok(());
    }
    let by_name = |s: &Scenario| args.scenario.iter().any(|name| name == s.name);
    let chosen = |s: &&Scenario| by_name(s) || args.scenario.is_empty() && (args.all || !s.slow);
    let options = Options {
        accel: args.accel,
        timeout: args.timeout,
        smp: args.smp,
        churn: args.churn,
        freestanding: args.freestanding,
    };
    let mut log = Log::create(ctx, "qemu-test")?;
    let results = run_scenarios(ctx, &mut log, &options, SCENARIOS.iter().filter(chosen), |line| println!("{line}"));
    let results = results.map_err(|e| format!("{e} (details: {})", log.path().display()))?;
    if let Some(path) = &args.report {
        write_report(path, &results)?;
    }
    let failed = results.iter().filter(|r| matches!(r.verdict, Verdict::Fail(_))).count();
    let passed = results.iter().filter(|r| matches!(r.verdict, Verdict::Pass)).count();
    println!("{passed} passed, {failed} failed");
    if failed == 0 { Ok(()) } else { Err("".into()) }
}

/// How scenarios are run.
pub struct Options {
    accel: Accel,
    timeout: Option<u64>,
    smp: Option<u32>,
    churn: Option<u32>,
    freestanding: Freestanding,
}

/// One run's result.
pub struct RunResult {
    scenario: &'static Scenario,
    seconds: f64,
    exits: Option<u64>,
    l0_instructions: Option<u64>,
    verdict: Verdict,
}

/// What came of a run.
enum Verdict {
    Pass,
    /// It did not end as it must: what to show.
    Fail(String),
    /// It did not run: why.
    Skip(String),
}

impl Verdict {
    const fn word(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail(_) => "fail",
            Verdict::Skip(_) => "skip",
        }
    }
}

/// What scenarios are made of.
struct Ingredients {
    images: Images,
    /// When a scenario needs it.
    linux: Option<Prepared>,
}

/// For a stage of `cargo xtask test`: everything, or what the runtime itself needs, with the table in the log.
pub fn stage(ctx: &Ctx, log: &mut Log, freestanding: Freestanding) -> Result<String> {
    let options = Options { accel: Accel::Tcg, timeout: None, smp: None, churn: None, freestanding };
    // The second target shows that the runtime works there: the nested scenarios need not run twice.
    let chosen = SCENARIOS.iter().filter(|s| !s.slow && (freestanding != Freestanding::Host || s.image == "selftest"));
    let mut lines = Vec::new();
    let results = run_scenarios(ctx, log, &options, chosen, |line| lines.push(line.to_string()))?;
    for line in &lines {
        log.line(line)?;
    }
    let failed = results.iter().filter(|r| matches!(r.verdict, Verdict::Fail(_))).count();
    match failed {
        0 => Ok(format!("{} runs", results.len())),
        _ => Err(format!("{failed} of {} runs failed", results.len()).into()),
    }
}

fn run_scenarios(
    ctx: &Ctx,
    log: &mut Log,
    options: &Options,
    chosen: impl Iterator<Item = &'static Scenario> + Clone,
    mut show: impl FnMut(&str),
) -> Result<Vec<RunResult>> {
    if chosen.clone().any(|s| matches!(s.machine, Machine::Qemu(_))) {
        setup::need(ctx, setup::QEMU)?;
    }
    if chosen.clone().any(|s| matches!(s.machine, Machine::Bochs(_))) {
        setup::need(ctx, setup::BOCHS)?;
        setup::need(ctx, setup::GRUB)?;
    }
    let target = images::choose(ctx, options.freestanding)?;
    let with_qemu = chosen.clone().any(|s| s.has_qemu_inside());
    let linux = chosen.clone().any(|s| s.is_linux()).then(|| linux::prepare(ctx, log, with_qemu)).transpose()?;
    let ingredients = Ingredients { images: images::build(ctx, log, target)?, linux };
    show(&format!("images for {:?}", ingredients.images.target));
    show(&format!("{:<24} {:<20} {:<8} {:>8}", "scenario", "cpu", "result", "seconds"));
    let mut results = Vec::new();
    for scenario in chosen {
        let result = run_one(ctx, options, &ingredients, scenario)?;
        let (word, why) = match &result.verdict {
            Verdict::Pass => ("ok", None),
            Verdict::Fail(why) => ("FAILED", Some(why)),
            Verdict::Skip(why) => ("skipped", Some(why)),
        };
        show(&format!("{:<24} {:<20} {word:<8} {:>8.2}", scenario.name, scenario.machine.cpu(), result.seconds));
        if let Some(why) = why {
            show(why);
        }
        results.push(result);
    }
    Ok(results)
}

fn run_one(ctx: &Ctx, options: &Options, ingredients: &Ingredients, scenario: &'static Scenario) -> Result<RunResult> {
    let (seconds, exits, l0_instructions) = (0.0, None, None);
    if let (true, Some(Err(why))) = (scenario.is_linux(), &ingredients.linux) {
        return Ok(RunResult { scenario, seconds, exits, l0_instructions, verdict: Verdict::Skip(format!("  {why}")) });
    }
    let directory = ctx.work_dir(&format!("run/{}-{}", scenario.name, scenario.machine.cpu()))?;
    // What an earlier run left could pass for output of this one.
    fs::remove_dir_all(&directory)?;
    fs::create_dir_all(&directory)?;
    let cpus = options.smp.unwrap_or(scenario.cpus);
    let mut args = with_cpus(scenario.args, cpus);
    if let ("l0", Some(churn)) = (scenario.image, options.churn) {
        args += &format!(" churn={churn}");
    }
    let run = Run {
        image: &ingredients.images.path(scenario.image),
        args: &args,
        modules: &modules(ingredients, scenario, cpus, &directory)?,
        cpu: scenario.machine.cpu(),
        cpus,
        memory: scenario.memory,
        icount: false,
        typed: scenario.typed,
        timeout: Duration::from_secs(options.timeout.unwrap_or(scenario.timeout)),
        directory: &directory,
    };
    let ended = match scenario.machine {
        Machine::Qemu(_) => machine::qemu(&run, options.accel)?,
        Machine::Bochs(_) => machine::bochs(&run)?,
    };
    Ok(RunResult {
        scenario,
        seconds: ended.time.as_secs_f64(),
        exits: ended.stat("exits"),
        l0_instructions: ended.stat("l0_instructions"),
        verdict: verdict(scenario.expect, cpus, &ended).map_or_else(Verdict::Fail, |()| Verdict::Pass),
    })
}

/// The command line of an image on `cpus` processors.
fn with_cpus(args: &str, cpus: u32) -> String {
    if cpus > 1 { format!("{args} cpus={cpus}") } else { args.to_string() }
}

fn modules(ingredients: &Ingredients, scenario: &Scenario, cpus: u32, directory: &Path) -> Result<Vec<Loaded>> {
    let mut loaded = Vec::new();
    for (i, module) in scenario.modules.iter().enumerate() {
        let mut args = module.args.to_string();
        let path = match module.content {
            Content::Image(name) => {
                args = with_cpus(module.args, cpus);
                ingredients.images.path(name)
            }
            Content::LinuxKernel => linux(ingredients)?.kernel.clone(),
            Content::LinuxInitrd => linux(ingredients)?.initrd.clone(),
            Content::LinuxQemuInitrd => linux(ingredients)?.qemu_initrd.clone().ok_or("no QEMU was prepared")?,
            Content::Text(text) => {
                let path = directory.join(format!("module{i}"));
                fs::write(&path, text)?;
                path
            }
        };
        loaded.push(Loaded { path, args });
    }
    Ok(loaded)
}

fn linux(ingredients: &Ingredients) -> Result<&linux::Linux> {
    let prepared = ingredients.linux.as_ref().and_then(|prepared| prepared.as_ref().ok());
    prepared.ok_or_else(|| "no Linux was prepared".into())
}

/// The exit codes of the images' runtime.
const SUCCESS: u32 = 16;
const FAILURE: u32 = 17;

/// What Linux prints when something is wrong with it, or with the machine.
const WARNINGS: &[&str] = &[
    "WARNING: ",
    "BUG: ",
    "Oops: ",
    "general protection",
    "Call Trace:",
    "Kernel panic",
    "rcu: INFO:",
    "soft lockup",
    "unchecked MSR",
];

/// `Err` with what to show when the run did not end as it must.
fn verdict(expect: Expect, cpus: u32, ended: &Ended) -> std::result::Result<(), String> {
    let wanted = match expect {
        Expect::Success => ended.exit() == Some(SUCCESS),
        Expect::GaveUp(text) => {
            let said = |line: &str| line.contains("GAVE UP") && line.contains(text);
            ended.exit().is_none() && ended.emulator.lines().any(said)
        }
        Expect::Failure(text) => ended.exit() == Some(FAILURE) && ended.output.contains(text),
        Expect::PowerOff { says, counted, not_counted } => {
            power_off(says, cpus, ended) && counters(counted, not_counted, ended)
        }
    };
    if wanted && !ended.timed_out {
        return Ok(());
    }
    let how = match (ended.timed_out, ended.exit()) {
        (true, _) => "it ran out of time".to_string(),
        (false, Some(code)) => format!("it ended with code {code}"),
        (false, None) if ended.status != Some(0) => format!("the emulator ended with status {:?}", ended.status),
        (false, None) => "it ended without a verdict".to_string(),
    };
    Err(format!(
        "  expected {expect:?}, but {how}; it printed:\n{}\n  the emulator said:\n{}",
        tail(&ended.output, 40),
        tail(&ended.emulator, 10)
    ))
}

/// True when the machine powered off, Linux printed all that it must, and nothing that it must not.
fn power_off(says: &[&str], cpus: u32, ended: &Ended) -> bool {
    let cpus = cpus.to_string();
    let said = |text: &&str| ended.output.contains(&text.replace("{cpus}", &cpus));
    let all = says.iter().chain(&["reboot: Power down"]).all(said);
    all && ended.status == Some(0) && !WARNINGS.iter().any(|text| ended.output.contains(text))
}

/// True when L0 printed its counters, those in `counted` are not zero, and those in `not_counted` are.
fn counters(counted: &[&str], not_counted: &[&str], ended: &Ended) -> bool {
    // L0 leaves out counters that are zero, but not the sum of all exits.
    let is_zero = |name: &&str| ended.stat(name).unwrap_or(0) == 0;
    ended.stat("exits").is_some() && !counted.iter().any(is_zero) && not_counted.iter().all(is_zero)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    last.iter().map(|l| format!("    | {l}")).collect::<Vec<_>>().join("\n")
}

#[derive(serde::Serialize)]
struct ReportLine {
    cpu: &'static str,
    scenario: &'static str,
    result: &'static str,
    seconds: f64,
    exits: Option<u64>,
    l0_instructions: Option<u64>,
}

fn write_report(path: &Path, results: &[RunResult]) -> Result<()> {
    let mut file = fs::File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    for r in results {
        let line = ReportLine {
            cpu: r.scenario.machine.cpu(),
            scenario: r.scenario.name,
            result: r.verdict.word(),
            seconds: (r.seconds * 1000.0).round() / 1000.0,
            exits: r.exits,
            l0_instructions: r.l0_instructions,
        };
        writeln!(file, "{}", serde_json::to_string(&line)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(output: &str, timed_out: bool) -> Ended {
        Ended { output: output.into(), emulator: String::new(), status: Some(0), timed_out, time: Duration::ZERO }
    }

    #[test]
    fn success_needs_the_verdict_in_time() {
        assert!(verdict(Expect::Success, 2, &ended("[exit 16]\n", false)).is_ok());
        assert!(verdict(Expect::Success, 2, &ended("[exit 16]\n", true)).is_err());
        assert!(verdict(Expect::Success, 2, &ended("[exit 17]\n", false)).is_err());
        assert!(verdict(Expect::Success, 2, &ended("", false)).is_err());
    }

    #[test]
    fn linux_must_say_everything_and_warn_of_nothing() {
        let said = |output: &str| power_off(&["shell", "on {cpus}\n"], 2, &ended(output, false));
        assert!(said("shell\non 2\nreboot: Power down\n"));
        assert!(!said("shell\non 2\n"));
        assert!(!said("shell\non 1\nreboot: Power down\n"));
        assert!(!said("reboot: Power down\n"));
        assert!(!said("WARNING: CPU\nshell\non 2\nreboot: Power down\n"));
        let given_up = Ended { status: Some(125), ..ended("shell\non 2\nreboot: Power down\n", false) };
        assert!(!power_off(&["shell"], 2, &given_up));
    }

    #[test]
    fn counters_must_be_there_to_be_zero() {
        let counted = |emulator: &str| {
            let ended = Ended { emulator: emulator.into(), ..ended("", false) };
            counters(&["direct"], &["reflected"], &ended)
        };
        assert!(counted("l0: stats: direct=7 exits=9\n"));
        assert!(!counted("l0: stats: direct=7 reflected=1 exits=9\n"));
        assert!(!counted("l0: stats: exits=9\n"));
        assert!(!counted(""));
    }

    #[test]
    fn a_control_must_fail_for_its_own_reason() {
        let expect = Expect::Failure("boom");
        assert!(verdict(expect, 2, &ended("boom\n[exit 17]\n", false)).is_ok());
        assert!(verdict(expect, 2, &ended("bang\n[exit 17]\n", false)).is_err());
        assert!(verdict(expect, 2, &ended("boom\n[exit 16]\n", false)).is_err());
    }
}
