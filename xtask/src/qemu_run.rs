//! Runs scenarios on emulated machines, one run of an emulator after the other. Used by `qemu_test.rs`.

use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding, Images};
use crate::linux::{self, Prepared};
use crate::machine::{self, Accel, Ended, Loaded, Run};
use crate::results::{self, ResultLine, Verdict};
use crate::scenarios::{BARE_LINUX, Chosen, Content, Machine, SCENARIOS, Scenario};
use crate::setup;
use crate::trace;
use crate::verdict::verdict;
use crate::watch::{Progress, Watch};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a run is repeated that failed for a fault of the emulator's.
const RERUNS: usize = 2;

/// How scenarios are run.
#[derive(Clone)]
pub struct Options {
    /// How QEMU executes guest code.
    pub accel: Accel,
    /// Seconds, instead of the scenario's own.
    pub timeout: Option<u64>,
    /// Processors, instead of the scenario's own.
    pub smp: Option<u32>,
    /// L0 saves and restores nested state every so many exits.
    pub churn: Option<u32>,
    /// Runs on one processor count instructions.
    pub icount: bool,
    /// Where the timelines go; `true`: of several runs, each to a file beside it.
    pub trace: Option<(PathBuf, bool)>,
}

/// What scenarios are made of.
pub struct Ingredients {
    /// The images.
    pub images: Images,
    /// When a scenario needs it.
    linux: Option<Prepared>,
}

impl Ingredients {
    /// Builds, and finds, what `chosen` needs.
    pub fn prepare(ctx: &Ctx, log: &mut Log, chosen: &[Chosen], freestanding: Freestanding) -> Result<Ingredients> {
        let any = |test: fn(&Scenario) -> bool| chosen.iter().any(|c| test(c.scenario));
        if any(|s| matches!(s.machine, Machine::Qemu(_))) {
            setup::need(ctx, setup::QEMU)?;
        }
        if any(|s| matches!(s.machine, Machine::Bochs(_))) {
            setup::need(ctx, setup::BOCHS)?;
            setup::need(ctx, setup::GRUB)?;
        }
        let target = images::choose(ctx, freestanding)?;
        let with_qemu = any(Scenario::has_qemu_inside);
        let linux = any(Scenario::is_linux).then(|| linux::prepare(ctx, log, with_qemu)).transpose()?;
        Ok(Ingredients { images: images::build(ctx, log, target)?, linux })
    }

    fn linux(&self) -> Result<&linux::Linux> {
        let prepared = self.linux.as_ref().and_then(|prepared| prepared.as_ref().ok());
        prepared.ok_or_else(|| "no Linux was prepared".into())
    }
}

/// Runs all of `chosen` and shows the table while it grows.
pub fn run_all(
    ctx: &Ctx,
    options: &Options,
    ingredients: &Ingredients,
    chosen: &[Chosen],
    mut show: impl FnMut(&str),
) -> Result<Vec<ResultLine>> {
    let mut lines = Vec::new();
    let total = chosen.iter().map(Chosen::results).sum();
    for one in chosen {
        let progress = Progress { done: lines.len(), total, what: String::new() };
        for line in run_one(ctx, options, ingredients, one, progress)? {
            show(&line.shown());
            lines.push(line);
        }
    }
    Ok(lines)
}

fn run_one(
    ctx: &Ctx,
    options: &Options,
    ingredients: &Ingredients,
    chosen: &Chosen,
    progress: Progress,
) -> Result<Vec<ResultLine>> {
    let scenario = chosen.scenario;
    let cpus = options.smp.unwrap_or(scenario.cpus);
    let machine_name = scenario.machine_name(cpus);
    if let (true, Some(Err(why))) = (scenario.is_linux(), &ingredients.linux) {
        let verdict = Verdict::Skip(why.to_string());
        return Ok(vec![ResultLine {
            cpu: machine_name,
            scenario: scenario.name.to_string(),
            verdict,
            seconds: 0.0,
            exits: None,
            l0_instructions: None,
            counts: BTreeMap::new(),
            l0: BTreeMap::new(),
        }]);
    }
    let progress = Progress { what: format!("{} on {machine_name}", scenario.name), ..progress };
    let counted = options.icount && cpus == 1 && matches!(scenario.machine, Machine::Qemu(_));
    let mut faults = Vec::new();
    loop {
        let (ended, times) = run_once(ctx, options, ingredients, chosen, progress.clone())?;
        let judged = verdict(scenario.expect, cpus, &ended);
        if judged.is_err()
            && let Some(fault) = emulators_fault(ctx, options, ingredients, scenario, &ended, &progress)?
        {
            faults.push(fault);
            if faults.len() <= RERUNS {
                continue;
            }
        }
        let judged = judged.and_then(|()| write_timeline(ctx, options, chosen, cpus, &ended));
        let verdict = match (judged, faults.len() > RERUNS) {
            (Ok(()), _) => Verdict::Pass,
            (Err(_), true) => Verdict::Emulator(faults.join("\n  ")),
            (Err(why), false) => Verdict::Fail(why),
        };
        let mut lines = results::of_run(chosen, &machine_name, &ended, &times, verdict, counted);
        if let (Some(line), false) = (lines.first_mut(), faults.is_empty()) {
            line.counts.insert("emulator_faults".to_string(), faults.len() as u64);
        }
        return Ok(lines);
    }
}

/// What the emulator did wrong in a run that failed: what QEMU was seen to do, or else that the control, the same Linux
/// on the bare emulator, fails as well.
fn emulators_fault(
    ctx: &Ctx,
    options: &Options,
    ingredients: &Ingredients,
    scenario: &Scenario,
    ended: &Ended,
    progress: &Progress,
) -> Result<Option<String>> {
    if ended.fault.is_some() {
        return Ok(ended.fault.clone());
    }
    let Some(control) = SCENARIOS.iter().find(|s| Some(s.name) == scenario.control) else { return Ok(None) };
    let cpus = options.smp.unwrap_or(scenario.cpus);
    let options = Options { smp: Some(cpus), ..options.clone() };
    let progress = Progress { what: format!("{}, the control of {}", control.name, scenario.name), ..progress.clone() };
    let (ended, _) = run_once(ctx, &options, ingredients, &Chosen::whole(control), progress)?;
    let failed = verdict(control.expect, cpus, &ended).is_err();
    Ok(failed.then(|| format!("the control {} fails as well", control.name)))
}

/// One run of an emulator, and when each line of its output came.
fn run_once(
    ctx: &Ctx,
    options: &Options,
    ingredients: &Ingredients,
    chosen: &Chosen,
    progress: Progress,
) -> Result<(Ended, Vec<Duration>)> {
    let scenario = chosen.scenario;
    let cpus = options.smp.unwrap_or(scenario.cpus);
    let directory = ctx.work_dir(&format!("run/{}", run_name(scenario, cpus)))?;
    // What an earlier run left could pass for output of this one.
    fs::remove_dir_all(&directory)?;
    fs::create_dir_all(&directory)?;
    let counted = options.icount && cpus == 1 && matches!(scenario.machine, Machine::Qemu(_));
    let run = Run {
        image: &match scenario.image {
            BARE_LINUX => ingredients.linux()?.kernel.clone(),
            image => ingredients.images.path(image),
        },
        args: &image_args(options, chosen, cpus, counted),
        modules: &modules(ingredients, chosen, cpus, &directory)?,
        cpu: scenario.machine.cpu(),
        cpus,
        memory: scenario.memory,
        icount: counted,
        typed: scenario.typed,
        linux: scenario.is_linux(),
        timeout: Duration::from_secs(options.timeout.unwrap_or(scenario.timeout)),
        directory: &directory,
    };
    let watch = Watch::start(&directory.join("serial.txt"), progress);
    let ended = match scenario.machine {
        Machine::Qemu(_) => machine::qemu(&run, options.accel),
        Machine::Bochs(_) => machine::bochs(&run),
    };
    let times = watch.end();
    Ok((ended?, times))
}

/// Writes what L0 recorded of the run, if it was told to; a timeline that is not whole fails the run.
fn write_timeline(
    ctx: &Ctx,
    options: &Options,
    chosen: &Chosen,
    cpus: u32,
    ended: &Ended,
) -> std::result::Result<(), String> {
    let name = run_name(chosen.scenario, cpus);
    let path = match &options.trace {
        _ if !image_args(options, chosen, cpus, false).split_ascii_whitespace().any(|word| word == "trace") => {
            return Ok(());
        }
        Some((path, true)) => beside(path, &name),
        Some((path, false)) => path.clone(),
        None => match ctx.work_dir(&format!("run/{name}")) {
            Ok(directory) => directory.join("trace.json"),
            Err(error) => return Err(format!("  {error}")),
        },
    };
    trace::write(&path, &trace::records(&ended.emulator)).map(|_| ()).map_err(|error| format!("  {error}"))
}

/// The name of a run's directory.
fn run_name(scenario: &Scenario, cpus: u32) -> String {
    format!("{}-{}", scenario.name, scenario.machine_name(cpus).replace(' ', "-"))
}

/// `FILE-NAME.json` for `FILE.json`.
fn beside(path: &Path, name: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or(String::new(), |e| format!(".{}", e.to_string_lossy()));
    path.with_file_name(format!("{stem}-{name}{extension}"))
}

/// The command line of the image that boots.
fn image_args(options: &Options, chosen: &Chosen, cpus: u32, counted: bool) -> String {
    let scenario = chosen.scenario;
    if scenario.image == BARE_LINUX {
        return scenario.args.to_string();
    }
    let mut args = with_cpus(scenario.args, cpus);
    if scenario.image == "l1" {
        args += &parts(chosen);
    }
    if scenario.image == "l0" {
        if let Some(churn) = options.churn {
            args += &format!(" churn={churn}");
        }
        if counted {
            // The auditor's instructions are not those that are asked for.
            args =
                args.split_ascii_whitespace().filter(|word| *word != "audit").collect::<Vec<_>>().join(" ") + " count";
        }
        if !chosen.parts.is_empty() {
            args += " test-hooks";
        }
        if options.trace.is_some() {
            args += " trace";
        }
    }
    args
}

/// What tells the small hypervisor which scenarios to run.
fn parts(chosen: &Chosen) -> String {
    match chosen.parts.len() {
        0 => String::new(),
        n if n == chosen.scenario.parts().len() => " scenario=all".to_string(),
        _ => format!(" scenario={}", chosen.parts.join(",")),
    }
}

/// The command line of an image on `cpus` processors.
fn with_cpus(args: &str, cpus: u32) -> String {
    if cpus > 1 { format!("{args} cpus={cpus}") } else { args.to_string() }
}

fn modules(ingredients: &Ingredients, chosen: &Chosen, cpus: u32, directory: &Path) -> Result<Vec<Loaded>> {
    let mut loaded = Vec::new();
    for (i, module) in chosen.scenario.modules.iter().enumerate() {
        let mut args = module.args.to_string();
        let path: PathBuf = match module.content {
            Content::Image(name) => {
                args = with_cpus(module.args, cpus);
                if !chosen.parts.is_empty() {
                    args += &parts(chosen);
                    args += " counters=each";
                }
                ingredients.images.path(name)
            }
            Content::LinuxKernel => ingredients.linux()?.kernel.clone(),
            Content::LinuxInitrd => ingredients.linux()?.initrd.clone(),
            Content::LinuxQemuInitrd => ingredients.linux()?.qemu_initrd.clone().ok_or("no QEMU was prepared")?,
            Content::Text(text) => {
                let path = directory.join(format!("module{i}"));
                fs::write(&path, text)?;
                path
            }
        };
        loaded.push(Loaded { path, args: args.trim_start().to_string() });
    }
    Ok(loaded)
}
