//! `cargo xtask bench --nested`: instruction counts of nested guests on the L0 hypervisor, by the emulator's own count.
//!
//! L1 reads the time stamp counter around what it measures; with `-icount shift=0` one tick is one instruction at every
//! level. It prints `BENCH name minimum mode` lines, which become counts here.

use crate::count::Count;
use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding};
use crate::machine::{self, Accel, Loaded, Run};
use crate::setup;
use clap::ValueEnum;
use std::time::Duration;

/// Whose virtualization extension is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Extension {
    /// AMD-V, on QEMU
    Svm,
}

/// Runs L1's measurements on L0.
pub fn run(ctx: &Ctx, log: &mut Log, extension: Extension) -> Result<Vec<Count>> {
    let Extension::Svm = extension;
    setup::need(ctx, setup::QEMU)?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    let images = images::build(ctx, log, target)?;
    let directory = ctx.work_dir("run/bench-nested")?;
    let run = Run {
        image: &images.path("l0"),
        args: "cpus=1",
        modules: &[Loaded { path: images.path("l1"), args: "bench=all".into() }],
        cpu: "max",
        cpus: 1,
        memory: 256,
        icount: true,
        typed: None,
        linux: false,
        timeout: Duration::from_secs(120),
        directory: &directory,
    };
    let ended = machine::qemu(&run, Accel::Tcg)?;
    log.line(&ended.output)?;
    let counts: Vec<Count> = ended.output.lines().filter_map(line).flatten().collect();
    if ended.timed_out || ended.exit() != Some(16) || counts.is_empty() {
        return Err(format!("the nested measurements did not end well: see {}", log.path().display()).into());
    }
    Ok(counts)
}

/// The counts of one `BENCH name minimum mode` line.
fn line(line: &str) -> Option<[Count; 2]> {
    let mut words = line.trim().strip_prefix("BENCH ")?.split_ascii_whitespace();
    let name = words.next()?;
    let (minimum, mode) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let count = |name: String, value| Count { name, value, unit: "instructions" };
    Some([count(name.to_string(), minimum), count(format!("{name}.mode"), mode)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_minimum_and_mode() {
        let [minimum, mode] = line("BENCH nested.svm.l1_cpuid 300 301\r").unwrap_or_else(|| panic!("no counts"));
        assert_eq!((minimum.name.as_str(), minimum.value), ("nested.svm.l1_cpuid", 300));
        assert_eq!((mode.name.as_str(), mode.value), ("nested.svm.l1_cpuid.mode", 301));
        assert!(line("BENCH name 1").is_none());
        assert!(line("PASS cpuid").is_none());
    }
}
