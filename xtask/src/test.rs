//! `cargo xtask test`: runs the stages of `stages.rs`, a line each, and prints the verdict as the last line.

use crate::ctx::Outcome;
use crate::ctx::{Ctx, Log, Result};
use crate::stages::{STAGES, Stage};
use std::time::{Duration, Instant};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Run this stage alone (may be repeated)
    #[arg(long, value_name = "STAGE", value_parser = clap::builder::PossibleValuesParser::new(STAGES.iter().map(|s| s.name)))]
    only: Vec<String>,
    /// Print the stages and their time budgets, and run nothing
    #[arg(long)]
    list: bool,
}

/// Runs the chosen stages; fails when one of them fails.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    if args.list {
        for stage in STAGES {
            println!("{:<16} {:>4} s", stage.name, stage.budget.as_secs());
        }
        return Ok(());
    }
    let chosen = STAGES.iter().filter(|s| args.only.is_empty() || args.only.iter().any(|o| o == s.name));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut overran = Vec::new();
    for stage in chosen {
        let start = Instant::now();
        let outcome = run_stage(ctx, stage);
        let seconds = start.elapsed();
        let (word, note) = match outcome {
            Ok(Outcome::Passed) => ("ok", String::new()),
            Ok(Outcome::PassedWith(note)) => ("ok", note),
            Ok(Outcome::Skipped(why)) => ("skipped", why),
            Err(ref why) => ("FAILED", why.to_string()),
        };
        match word {
            "ok" => passed += 1,
            "FAILED" => failed += 1,
            _ => skipped += 1,
        }
        println!("{:<16} {:<8} {:>7.1} s  {}", stage.name, word, seconds.as_secs_f64(), note);
        if seconds > stage.budget {
            overran.push((stage, seconds));
        }
    }
    summary(&overran, skipped);
    println!("{passed} passed, {failed} failed");
    if failed == 0 { Ok(()) } else { Err("".into()) }
}

fn run_stage(ctx: &Ctx, stage: &Stage) -> Result<Outcome> {
    let mut log = Log::create(ctx, stage.name)?;
    let outcome = (stage.run)(ctx, &mut log);
    if outcome.is_err() {
        println!("---- {}: end of {}", stage.name, log.path().display());
        println!("{}", log.tail(60));
        println!("----");
    }
    outcome
}

fn summary(overran: &[(&Stage, Duration)], skipped: usize) {
    for (stage, seconds) in overran {
        let (took, budget) = (seconds.as_secs(), stage.budget.as_secs());
        println!("over budget: {} took {took} s of {budget} s", stage.name);
    }
    if skipped > 0 {
        println!("{skipped} skipped");
    }
}
