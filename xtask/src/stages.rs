//! What `cargo xtask test` does, in order: one line of [`STAGES`] per stage.
//!
//! A stage is a function that writes its output to a [`Log`] and says how it went. A stage that belongs to another
//! command (a short fuzz run, the emulated machines) is a function in that command's file, named here.

use crate::ctx::{Ctx, Log, Outcome, Result};
use crate::images::{self, Freestanding, Target};
use crate::{fuzz, probe, qemu_test, setup, statuses};
use std::time::Duration;
use xshell::cmd;

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
    Stage { name: "msrv", budget: minutes(2), run: msrv },
    Stage { name: "other-targets", budget: minutes(1), run: other_targets },
    Stage { name: "loom", budget: minutes(3), run: loom },
    Stage { name: "flush-mutants", budget: minutes(4), run: flush_mutants },
    Stage { name: "miri", budget: minutes(2), run: miri },
    Stage { name: "no-panic", budget: minutes(2), run: no_panic },
    Stage { name: "fuzz", budget: minutes(3), run: fuzz::stage },
    Stage { name: "qemu-test", budget: minutes(15), run: qemu_tests },
    Stage { name: "exit-statuses", budget: minutes(3), run: statuses::stage },
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

/// The `rust-version` of the workspace.
fn stated_msrv(ctx: &Ctx) -> Result<String> {
    let manifest = ctx.sh.read_file("Cargo.toml")?;
    let version = manifest.lines().find_map(|l| l.strip_prefix("rust-version = \"")?.strip_suffix('"'));
    Ok(version.ok_or("Cargo.toml has no rust-version")?.to_string())
}

fn msrv(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let version = stated_msrv(ctx)?;
    if !setup::rust_toolchain(ctx, &version)? {
        let note = format!("no toolchain {version} to be had: clippy's incompatible_msrv stands in");
        return Ok(Outcome::Skipped(note));
    }
    let sh = &ctx.sh;
    log.run(cmd!(sh, "rustup run {version} cargo check --workspace --target-dir target/msrv"))?;
    Ok(Outcome::PassedWith(format!("Rust {version}")))
}

/// The library crates need no x86 host.
fn other_targets(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    const TARGET: &str = "aarch64-unknown-none";
    if !setup::rust_target(ctx, TARGET)? {
        return Ok(Outcome::Skipped(format!("no target {TARGET} to be had")));
    }
    let sh = &ctx.sh;
    let packages = probe::CRATES.iter().flat_map(|name| ["-p", name]);
    log.run(cmd!(sh, "cargo check --target {TARGET} {packages...}"))?;
    Ok(Outcome::PassedWith(TARGET.into()))
}

/// Every protocol on atomics is a `tests/loom*.rs` of the crate that has it.
fn loom(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    let is_model = |path: &std::path::PathBuf| {
        path.extension().is_some_and(|e| e == "rs")
            && path.file_stem().is_some_and(|n| n.to_string_lossy().starts_with("loom"))
    };
    let mut models = 0;
    for package in probe::CRATES {
        let here = sh.read_dir(format!("{package}/tests")).unwrap_or_default().into_iter().filter(is_model).count();
        if here > 0 {
            let command = cmd!(sh, "cargo test -p {package} --release --target-dir target/loom --test loom*");
            log.run(command.env("CARGO_ENCODED_RUSTFLAGS", "--cfg\x1floom"))?;
        }
        models += here;
    }
    match models {
        0 => Ok(Outcome::Skipped("no models".into())),
        n => Ok(Outcome::PassedWith(format!("{n} files of models"))),
    }
}

/// The stress test of the flush engine catches each of its deliberate defects.
fn flush_mutants(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    let command = cmd!(sh, "cargo test -p tests --target-dir target/mutants --test flush_stress -- --nocapture");
    log.run(command.env("CARGO_ENCODED_RUSTFLAGS", "--cfg\x1fflush_mutants"))?;
    Ok(Outcome::Passed)
}

/// What of the tests is quick enough in Miri: the TLFS's types, whose layouts everything casts, and the client's calls.
fn miri(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    let sh = &ctx.sh;
    if cmd!(sh, "rustup run nightly cargo miri --version").quiet().ignore_stderr().read().is_err() {
        return Ok(Outcome::Skipped("no nightly toolchain with Miri".into()));
    }
    for tests in [["-p", "tlfs-abi", "--tests"].as_slice(), &["-p", "hvcore", "--test", "client"]] {
        let command = cmd!(sh, "rustup run nightly cargo miri test --target-dir target/miri {tests...}");
        // Some tests read a table from a file; some make shared memory out of leaked boxes.
        log.run(command.env("MIRIFLAGS", "-Zmiri-disable-isolation -Zmiri-ignore-leaks"))?;
    }
    Ok(Outcome::Passed)
}

fn no_panic(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    probe::stage(ctx, log).map(Outcome::PassedWith)
}

fn qemu_tests(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    qemu_test::stage(ctx, log, Freestanding::Auto).map(Outcome::PassedWith)
}

/// The images built for the fallback target, which nothing else would run where the bare-metal target is there.
fn qemu_tests_on_the_host_target(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    qemu_test::stage(ctx, log, Freestanding::Host).map(Outcome::PassedWith)
}
