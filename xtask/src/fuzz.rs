//! `cargo xtask fuzz`: runs a fuzz target with cargo-fuzz on the nightly toolchain, or replays its committed seeds on
//! stable where that is not to be had.

use crate::ctx::{Ctx, Log, Outcome, Result};
use crate::setup;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub struct Args {
    /// The target; without one, the targets are listed
    #[arg(value_name = "TARGET")]
    target: Option<String>,
    /// Stop after S seconds
    #[arg(long, value_name = "S")]
    time: Option<u64>,
    /// Stop after N inputs
    #[arg(long, value_name = "N")]
    runs: Option<u64>,
}

/// Runs one target, or lists them.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    let targets = targets(ctx)?;
    let Some(target) = args.target else {
        targets.iter().for_each(|target| println!("{target}"));
        return Ok(());
    };
    if !targets.contains(&target) {
        return Err(format!("no such target: {target}; there are {}", targets.join(", ")).into());
    }
    if let Some(why) = no_fuzzer() {
        println!("{why}: replaying the committed seeds of all targets on stable instead");
        let passed = replay(ctx).status().is_ok_and(|status| status.success());
        return if passed { Ok(()) } else { Err("a committed seed fails: see the test's output".into()) };
    }
    let corpus = ctx.root.join("fuzz/corpus").join(&target);
    fs::create_dir_all(&corpus)?;
    let mut limits = Vec::new();
    limits.extend(args.time.map(|seconds| format!("-max_total_time={seconds}")));
    limits.extend(args.runs.map(|runs| format!("-runs={runs}")));
    match fuzzer(ctx, &target, &corpus, &limits).status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("{target} failed: the input is in fuzz/artifacts/{target}").into()),
    }
}

/// A stage of `cargo xtask test`: the seeds on stable, then, where there is a fuzzer, a short run of each target.
pub fn stage(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    log.run(replay(ctx))?;
    let targets = targets(ctx)?;
    if let Some(why) = no_fuzzer() {
        return Ok(Outcome::PassedWith(format!("seeds of {} targets; {why}", targets.len())));
    }
    for target in &targets {
        let corpus = ctx.work_dir(&format!("fuzz/{target}"))?;
        let limits = ["-runs=20000", "-max_total_time=20", "-seed=1"].map(String::from);
        log.run(fuzzer(ctx, target, &corpus, &limits))?;
    }
    Ok(Outcome::PassedWith(format!("{} targets", targets.len())))
}

/// The targets, which are the files of `fuzz/fuzz_targets`.
fn targets(ctx: &Ctx) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(ctx.root.join("fuzz/fuzz_targets"))? {
        names.extend(entry?.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Why there is no fuzzer, if there is none.
fn no_fuzzer() -> Option<&'static str> {
    let nightly = Command::new("cargo").args(["+nightly", "--version"]).stderr(Stdio::null()).output();
    if !nightly.is_ok_and(|out| out.status.success()) {
        return Some("no nightly toolchain (`rustup toolchain install nightly`)");
    }
    if !setup::on_path("cargo-fuzz") {
        return Some("no cargo-fuzz (`cargo install cargo-fuzz`)");
    }
    None
}

/// cargo-fuzz on `target`: new inputs go to `corpus`, the committed seeds are only read.
fn fuzzer(ctx: &Ctx, target: &str, corpus: &Path, limits: &[String]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(&ctx.root).args(["+nightly", "fuzz", "run", "--fuzz-dir", "fuzz", "--features", "libfuzzer"]);
    // No target has unsafe code in it, so a sanitizer would find nothing and cost half the speed. Overflow checks and
    // debug assertions are on.
    command.args(["--sanitizer", "none"]);
    if matches!(target, "nsvm_actions" | "nvmx_actions") {
        // Their input is small numbers: tracing comparisons finds nothing there and takes two thirds of the time.
        command.arg("--no-trace-compares");
    }
    command.arg(target).arg(corpus).arg(format!("fuzz/seeds/{target}")).args(["--", "-max_len=4096"]).args(limits);
    command
}

/// The test that replays the committed seeds of all targets, on stable.
fn replay(ctx: &Ctx) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(&ctx.root).args(["test", "--package", "fuzz", "--test", "seeds"]);
    command
}
