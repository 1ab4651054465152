//! Everything a person runs: `cargo xtask test`, `cargo xtask qemu-test`, and their smaller relatives.
//!
//! One file per command (`test.rs`, `qemu_test.rs`, ...), each with its clap `Args` and a `run(&Ctx, Args)`.
//! `stages.rs` is the list of what `test` does, `setup.rs` installs what a command needs, `ctx.rs` holds what all share.

mod bench;
mod bochs;
mod count;
mod ctx;
mod diagnose;
mod fuzz;
mod images;
mod initrd;
mod linux;
mod machine;
mod nested_bench;
mod probe;
mod public_items;
mod qemu_run;
mod qemu_test;

mod results;
mod run_l1;
mod scenarios;
mod setup;
mod stages;
mod statuses;
mod test;
mod trace;
mod trace_svg;
mod verdict;
mod watch;

use clap::{Parser, Subcommand};
use ctx::{Ctx, Result};
use std::process::ExitCode;

/// Builds, checks and runs everything in this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 120)]
struct Cli {
    /// Never install anything: a missing tool is an error that names the command to run
    #[arg(long, global = true)]
    no_install: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run every check: format, lints, tests, documentation, emulated machines
    Test(test::Args),
    /// Boot bare-metal images on emulated machines and check what they report
    QemuTest(qemu_test::Args),
    /// Boot the L0 hypervisor with a kernel of your own as L1
    RunL1(run_l1::Args),
    /// Draw a stretch of a timeline
    TraceSvg(trace_svg::Args),
    /// Count instructions of the hot paths, on valgrind
    Bench(bench::Args),
    /// Fuzz one target, or replay the committed seeds where there is no fuzzer
    Fuzz(fuzz::Args),
}

fn run(cli: Cli) -> Result<()> {
    let ctx = Ctx::new(cli.no_install)?;
    match cli.command {
        Command::Test(args) => test::run(&ctx, args),
        Command::QemuTest(args) => qemu_test::run(&ctx, args),
        Command::Bench(args) => bench::run(&ctx, args),
        Command::Fuzz(args) => fuzz::run(&ctx, args),
        Command::TraceSvg(args) => trace_svg::run(&ctx, args),
        Command::RunL1(args) => run_l1::run(&ctx, args),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `test` has already printed its verdict as the last line; an empty error adds nothing to it.
            let text = error.to_string();
            if !text.is_empty() {
                eprintln!("error: {text}");
            }
            ExitCode::FAILURE
        }
    }
}
