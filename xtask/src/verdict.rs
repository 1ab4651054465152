//! Whether a run on an emulated machine ended as its scenario says. Used by `qemu_run.rs`.

use crate::machine::Ended;
use crate::scenarios::Expect;

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
pub fn verdict(expect: Expect, cpus: u32, ended: &Ended) -> std::result::Result<(), String> {
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
    let there = ended.stat("exits").is_some() || counted.is_empty() && not_counted.is_empty();
    there && !counted.iter().any(is_zero) && not_counted.iter().all(is_zero)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    last.iter().map(|l| format!("    | {l}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn ended(output: &str, timed_out: bool) -> Ended {
        Ended {
            output: output.into(),
            emulator: String::new(),
            status: Some(0),
            timed_out,
            fault: None,
            time: Duration::ZERO,
        }
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
