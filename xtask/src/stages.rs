//! What `cargo xtask test` does, in order: one line of [`STAGES`] per stage.
//!
//! A stage is a function that writes its output to a [`Log`] and says how it went. A stage that belongs to another
//! command (a short fuzz run, the emulated machines) is a function in that command's file, named here.

use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding, Target};
use crate::{qemu_test, setup};
use std::time::Duration;
use xshell::cmd;

/// How a stage ended, when it did not fail.
#[allow(dead_code)]
pub enum Outcome {
    /// Everything checked.
    Passed,
    /// Checked, with something to tell in the stage's line.
    PassedWith(String),
    /// Not checked, and why.
    Skipped(String),
}

/// One check of `cargo xtask test`.
pub struct Stage {
    /// Its name on the screen, in `--only` and of its log.
    pub name: &'static str,
    /// What it may take on two cores from a clean checkout. Beyond that it is reported, not failed.
    pub budget: Duration,
    /// Does it.
    pub run: fn(&Ctx, &mut Log) -> Result<Outcome>,
}

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

/// All stages, in the order in which they run: what fails soonest comes first.
pub const STAGES: &[Stage] = &[
    Stage { name: "fmt", budget: minutes(1), run: fmt },
    Stage { name: "clippy", budget: minutes(3), run: clippy },
    Stage { name: "host-tests", budget: minutes(6), run: host_tests },
    Stage { name: "doc-tests", budget: minutes(2), run: doc_tests },
    Stage { name: "doc", budget: minutes(2), run: doc },
    Stage { name: "qemu-test", budget: minutes(15), run: qemu_tests },
    Stage { name: "qemu-test-host", budget: minutes(2), run: qemu_tests_on_the_host_target },
];

fn fmt(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    if !setup::rust_component(ctx, "rustfmt")? {
        return Err("rustfmt is missing: run `rustup component add rustfmt`".into());
    }
    let sh = &ctx.sh;
    log.run(cmd!(sh, "cargo fmt --all --check"))?;
    Ok(Outcome::Passed)
}

fn clippy(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    if !setup::rust_component(ctx, "clippy")? {
        return Err("clippy is missing: run `rustup component add clippy`".into());
    }
    let sh = &ctx.sh;
    log.run(cmd!(sh, "cargo clippy --workspace --all-targets -- -D warnings"))?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    images::clippy(ctx, log, target)?;
    if target != Target::Host {
        images::clippy(ctx, log, Target::Host)?;
    }
    Ok(Outcome::Passed)
}

fn host_tests(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    if setup::on_path("cargo-nextest") {
        log.run(cmd!(sh, "cargo nextest run --workspace --no-fail-fast --no-tests pass"))?;
    } else {
        log.run(cmd!(sh, "cargo test --workspace --all-targets --no-fail-fast"))?;
    }
    Ok(Outcome::Passed)
}

fn doc_tests(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    log.run(cmd!(sh, "cargo test --workspace --doc"))?;
    Ok(Outcome::Passed)
}

fn doc(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    log.run(cmd!(sh, "cargo doc --workspace --no-deps").env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(Outcome::Passed)
}

fn qemu_tests(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    qemu_test::stage(ctx, log, Freestanding::Auto).map(Outcome::PassedWith)
}

/// The images built for the fallback target, which nothing else would run where the bare-metal target is there.
fn qemu_tests_on_the_host_target(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    qemu_test::stage(ctx, log, Freestanding::Host).map(Outcome::PassedWith)
}
