//! `cargo xtask bench`: instruction counts by gungraun on valgrind, as a table and as JSON lines.
//!
//! Runs every file of `tests/bench/benches` and makes the stable names as `tests/bench/lib.rs` says. A count that
//! something else produces (an emulated machine) is a [`Count`] added to the list in [`run`].

use crate::count::Count;
use crate::ctx::{Ctx, Log, Result};
use crate::nested_bench::{self, Extension};
use crate::setup;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use xshell::cmd;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Also write the counts to FILE, one JSON object a line: {"name","value","unit"}
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure nested guests on the L0 hypervisor instead of the library alone
    #[arg(long, value_enum, value_name = "EXTENSION")]
    nested: Option<Extension>,
    /// Only names that begin with PREFIX
    #[arg(value_name = "PREFIX")]
    prefix: Option<String>,
    /// Fail when a count is above its limit
    #[arg(long)]
    check: bool,
}

/// What counts should not exceed.
const LIMITS: &[(&str, u64)] = &[
    ("hypercall.flush_space.fast", 150),
    ("hypercall.flush_list.xmm.1", 200),
    ("hypercall.flush_list.xmm.11", 250),
    ("hypercall.flush_list_ex.memory.64banks.444ranges", 2500),
    // 25 a target; a set that names some of many, 4,000 more.
    ("flush.l1.64", 25 * 64),
    ("flush.l1.512", 25 * 512),
    ("flush.l1.4096", 25 * 4096),
    ("flush.l2.64", 25 * 64),
    ("flush.l2.512", 25 * 512),
    ("flush.l2.4096", 25 * 4096),
    ("flush.l2.1of4096", 2000),
    ("flush.l2.64of4096", 25 * 64 + 4000),
    ("evmcs.load.clean", 150),
    ("evmcs.store.cpuid", 600),
    ("nested.svm.l1_cpuid", 400),
    ("nested.svm.l2_cpuid_roundtrip", 2000),
    ("nested.svm.l1_vmload", 300),
    ("flush.svm.direct.running.0.instructions", 600),
    ("flush.svm.direct.running.1.instructions", 900),
    // A target that does not run costs no kick, which would be an exit of its own, and no wait.
    ("flush.svm.direct.descheduled.1.instructions", 900),
    ("flush.svm.direct.descheduled.1.wait", 0),
    ("flush.svm.direct.descheduled.1.l0_exits", 1),
    ("flush.svm.direct.descheduled.3.wait", 0),
    ("flush.svm.direct.descheduled.3.l0_exits", 1),
    ("flush.svm.direct.running.3.l1_exits", 0),
    ("flush.svm.synthetic.0.instructions", 2500),
    ("flush.svm.l1.0.instructions", 500),
];

/// Counts that should be less than half of another.
const HALVES: &[(&str, &str)] =
    &[("flush.svm.direct.running.0.instructions", "flush.svm.reflected.running.0.instructions")];

/// Measures, prints, writes.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    let mut log = Log::create(ctx, "bench")?;
    let mut counts = match args.nested {
        Some(extension) => nested_bench::run(ctx, &mut log, extension)?,
        None => {
            setup::need(ctx, setup::VALGRIND)?;
            let runner = runner(ctx, &mut log)?;
            library(ctx, &mut log, &runner)?
        }
    };
    if let Some(prefix) = &args.prefix {
        counts.retain(|count| count.name.starts_with(prefix));
    }
    let over = table(&counts);
    if let Some(path) = &args.json {
        write_json(&counts, path)?;
    }
    if counts.is_empty() {
        return Err("no benchmark has such a name: run `cargo xtask bench` for all of them".into());
    }
    if args.check && over > 0 { Err(format!("{over} counts above their limits").into()) } else { Ok(()) }
}

fn table(counts: &[Count]) -> usize {
    let width = counts.iter().map(|count| count.name.len()).max().unwrap_or(0);
    let mut over = 0;
    for Count { name, value, unit } in counts {
        let limit = LIMITS.iter().find(|(limited, _)| limited == name).map(|(_, limit)| *limit);
        let limit = limit.into_iter().chain(half(counts, name)).min();
        let note = match limit {
            Some(limit) if *value > limit => {
                over += 1;
                format!("ABOVE the limit of {limit}")
            }
            Some(limit) => format!("limit {limit}"),
            None => String::new(),
        };
        println!("{}", format!("{name:width$}  {value:>9} {unit}  {note}").trim_end());
    }
    over
}

/// The largest value that is less than half of the count that `name` is held against.
fn half(counts: &[Count], name: &str) -> Option<u64> {
    let (_, whole) = HALVES.iter().find(|(halved, _)| *halved == name)?;
    let whole = counts.iter().find(|count| count.name == *whole)?;
    Some(whole.value.saturating_sub(1) / 2)
}

fn write_json(counts: &[Count], path: &PathBuf) -> Result<()> {
    let mut file = File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    for count in counts {
        writeln!(file, "{}", serde_json::to_string(count)?)?;
    }
    Ok(())
}

/// The benchmark runner of the version that Cargo.lock names, installed below `target` when it is not there.
fn runner(ctx: &Ctx, log: &mut Log) -> Result<PathBuf> {
    let lock = fs::read_to_string(ctx.root.join("Cargo.lock"))?;
    let version = lock
        .split("[[package]]")
        .find(|package| package.contains("name = \"gungraun\""))
        .and_then(|package| package.split("version = \"").nth(1)?.split('"').next())
        .ok_or("Cargo.lock names no gungraun")?;
    let root = ctx.work_dir("tools")?.join(format!("gungraun-runner-{version}"));
    let program = root.join("bin/gungraun-runner");
    if !program.is_file() {
        let install = format!("cargo install gungraun-runner --version {version} --locked --root {}", root.display());
        if ctx.no_install {
            return Err(format!("gungraun-runner missing, and --no-install given: run `{install}`").into());
        }
        println!("set-up: installing gungraun-runner {version} with cargo install");
        let sh = &ctx.sh;
        log.run(cmd!(sh, "cargo install gungraun-runner --version {version} --locked --root {root}"))?;
    }
    Ok(program)
}

/// All counts of the library benchmarks.
fn library(ctx: &Ctx, log: &mut Log, runner: &PathBuf) -> Result<Vec<Count>> {
    let mut files: Vec<String> = Vec::new();
    for entry in fs::read_dir(ctx.root.join("tests/bench/benches"))? {
        let path = entry?.path();
        files.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    files.sort();
    let mut command = Command::new("cargo");
    command.current_dir(&ctx.root).args(["bench", "--package", "bench"]).env("GUNGRAUN_RUNNER", runner);
    for file in &files {
        command.args(["--bench", file]);
    }
    command.args(["--", "--output-format=json"]);
    log.line(&format!("$ {command:?}"))?;
    let out = command.stdin(Stdio::null()).output().map_err(|e| format!("cannot run cargo: {e}"))?;
    log.line(&String::from_utf8_lossy(&out.stderr))?;
    let text = String::from_utf8_lossy(&out.stdout);
    log.line(&text)?;
    if !out.status.success() {
        return Err(format!("cargo bench failed: see {}", log.path().display()).into());
    }
    text.lines().filter(|line| line.starts_with('{')).map(count).collect()
}

/// The count in one summary of gungraun.
fn count(line: &str) -> Result<Count> {
    let summary: Value = serde_json::from_str(line)?;
    let word = |key: &str| summary[key].as_str().unwrap_or("").to_string();
    let (function, case) = (word("function_name"), word("id"));
    let value = summary
        .pointer("/profiles/0/data/total/metrics/Ir/values/new")
        .or_else(|| summary.pointer("/profiles/0/data/parts/0/metrics/Ir/values/new"))
        .and_then(Value::as_u64)
        .ok_or_else(|| format!("gungraun gives no instruction count for {function} {case}"))?;
    let mut name = function.replace("__", ".");
    if !case.is_empty() {
        name = format!("{name}.{}", case.strip_prefix('_').unwrap_or(&case).replace("__", "."));
    }
    Ok(Count { name, value, unit: "instructions" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_held_against_another() {
        let (halved, whole) = HALVES[0];
        let count = |name: &str, value| Count { name: name.into(), value, unit: "instructions" };
        for (value, over) in [(499, 0), (500, 1)] {
            assert_eq!(table(&[count(halved, value), count(whole, 1000)]), over);
        }
        assert_eq!(half(&[count(halved, 500)], halved), None);
    }
}
