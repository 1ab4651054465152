//! `cargo xtask bench --nested`: instruction counts of nested guests on the L0 hypervisor, by the emulator's own count.
//!
//! L1 reads the time stamp counter around what it measures; with `-icount shift=0` one tick is one instruction at every
//! level. It prints `BENCH name minimum mode` lines, which become counts here.

use crate::bochs;
use crate::count::Count;
use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding, Images};
use crate::machine::{self, Accel, Loaded, Run};
use crate::setup;
use clap::ValueEnum;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Whose virtualization extension is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Extension {
    /// AMD-V, on QEMU
    Svm,
    /// VT-x, on Bochs
    Vmx,
}

/// Runs L1's measurements on L0.
pub fn run(ctx: &Ctx, log: &mut Log, extension: Extension) -> Result<Vec<Count>> {
    if extension == Extension::Vmx {
        return vmx(ctx, log);
    }
    setup::need(ctx, setup::QEMU)?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    let images = images::build(ctx, log, target)?;
    let directory = ctx.work_dir("run/bench-nested")?;
    let mut counts = Vec::new();
    // One processor, then enough for three targets of a flush.
    for cpus in [1, 4] {
        counts.extend(run_with(&images, &directory, log, cpus)?);
    }
    Ok(counts)
}

/// The measurements of a machine with `cpus` processors.
fn run_with(images: &Images, directory: &Path, log: &mut Log, cpus: u32) -> Result<Vec<Count>> {
    let args = format!("cpus={cpus}");
    let run = Run {
        image: &images.path("l0"),
        args: &format!("{args} test-hooks"),
        modules: &[Loaded { path: images.path("l1"), args: format!("{args} bench=all") }],
        cpu: "max",
        cpus,
        memory: 256,
        icount: true,
        typed: None,
        linux: false,
        timeout: Duration::from_secs(300),
        directory,
    };
    let ended = machine::qemu(&run, Accel::Tcg)?;
    log.line(&ended.output)?;
    let counts: Vec<Count> = ended.output.lines().filter_map(line).flatten().collect();
    if ended.timed_out || ended.exit() != Some(16) || counts.is_empty() {
        return Err(format!("the nested measurements did not end well: see {}", log.path().display()).into());
    }
    Ok(counts)
}

/// Rounds of CPUID in L2, after some that warm up.
const ROUNDS: u64 = 100;

/// What L0 counts, for each way to run L2: per CPUID of L2, with L1 carrying it out.
fn vmx(ctx: &Ctx, log: &mut Log) -> Result<Vec<Count>> {
    setup::need(ctx, setup::BOCHS)?;
    setup::need(ctx, setup::GRUB)?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    let images = images::build(ctx, log, target)?;
    let mut counts = Vec::new();
    // Bytes in a run of their own: counting them costs instructions.
    for (way, word) in [("plain", "count"), ("plain", "count-bytes"), ("evmcs", "count"), ("evmcs", "count-bytes")] {
        let directory = ctx.work_dir(&format!("run/bench-nested-vmx-{way}"))?;
        fs::remove_dir_all(&directory)?;
        fs::create_dir_all(&directory)?;
        let enlighten = if way == "evmcs" { "on" } else { "off" };
        let run = Run {
            image: &images.path("l0"),
            args: &format!("cpus=1 {word} test-hooks enlighten={enlighten}"),
            modules: &[Loaded { path: images.path("selftest"), args: format!("test=vmx bench={way} rounds={ROUNDS}") }],
            cpu: bochs::MODEL,
            cpus: 1,
            memory: 256,
            icount: false,
            typed: None,
            linux: false,
            timeout: Duration::from_secs(120),
            directory: &directory,
        };
        let ended = machine::bochs(&run)?;
        log.line(&ended.output)?;
        log.line(&ended.emulator)?;
        let found = between(&ended.emulator, way);
        if ended.timed_out || ended.exit() != Some(16) || found.is_empty() {
            return Err(format!("the nested measurements did not end well: see {}", log.path().display()).into());
        }
        let bytes = |count: &Count| count.name.ends_with("_bytes_read");
        counts.extend(found.into_iter().filter(|count| bytes(count) == (word == "count-bytes")));
    }
    Ok(counts)
}

/// The counts per round between the first two times that L0 printed its counters.
fn between(l0: &str, way: &str) -> Vec<Count> {
    const COUNTERS: [(&str, &str, &str); 6] = [
        ("exits", "exits", "exits"),
        ("vmreads", "vmreads", "instructions"),
        ("vmwrites", "vmwrites", "instructions"),
        ("vmptrlds", "vmptrlds", "instructions"),
        ("guest_bytes_read", "guest_bytes_read", "bytes"),
        ("l0_instructions", "instructions", "instructions"),
    ];
    let mut lines = l0.lines().filter_map(|l| l.strip_prefix("l0: stats:"));
    let (Some(before), Some(after)) = (lines.next(), lines.next()) else { return Vec::new() };
    let value = |line: &str, name: &str| -> u64 {
        let word = line.split_ascii_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
        word.and_then(|v| v.parse().ok()).unwrap_or(0)
    };
    let count = |(counter, name, unit)| {
        // The exit that prints is one more in all these rounds.
        let value = (value(after, counter) - value(before, counter)) / ROUNDS;
        Count { name: format!("nested.vmx.roundtrip.{way}.{name}"), value, unit }
    };
    COUNTERS.into_iter().map(count).collect()
}

/// The counts of one `BENCH name minimum mode` line, or of one `BENCH name count` line, which is about exits.
fn line(line: &str) -> Option<Vec<Count>> {
    let words: Vec<&str> = line.trim().strip_prefix("BENCH ")?.split_ascii_whitespace().collect();
    let count = |name: String, value: &str, unit| Some(Count { name, value: value.parse().ok()?, unit });
    match *words {
        [name, minimum, mode] => Some(vec![
            count(name.to_string(), minimum, "instructions")?,
            count(format!("{name}.mode"), mode, "instructions")?,
        ]),
        [name, exits] => Some(vec![count(name.to_string(), exits, "exits")?]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_taken_per_round() {
        let l0 =
            "l0: stats: vmreads=100 exits=10\nl0: cpu 0: x=1\nl0: stats: vmreads=3655 exits=211\nl0: stats: exits=9\n";
        let counts = between(l0, "plain");
        let value = |name: &str| counts.iter().find(|c| c.name == name).map(|c| c.value);
        assert_eq!(value("nested.vmx.roundtrip.plain.vmreads"), Some(35));
        assert_eq!(value("nested.vmx.roundtrip.plain.exits"), Some(2));
        assert!(between("l0: stats: exits=10\n", "plain").is_empty());
    }

    #[test]
    fn a_line_gives_minimum_and_mode() {
        let counts = line("BENCH nested.svm.l1_cpuid 300 301\r").unwrap_or_default();
        let [minimum, mode] = counts.as_slice() else { panic!("not two counts") };
        assert_eq!((minimum.name.as_str(), minimum.value), ("nested.svm.l1_cpuid", 300));
        assert_eq!((mode.name.as_str(), mode.value), ("nested.svm.l1_cpuid.mode", 301));
        let counts = line("BENCH name.l0_exits 2").unwrap_or_default();
        let [exits] = counts.as_slice() else { panic!("not one count") };
        assert_eq!((exits.name.as_str(), exits.value, exits.unit), ("name.l0_exits", 2, "exits"));
        assert!(line("BENCH name 1 x").is_none());
        assert!(line("BENCH name").is_none());
        assert!(line("PASS cpuid").is_none());
    }
}
