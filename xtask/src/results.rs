//! What came of the scenarios: one [`ResultLine`] for each and each machine, in the table and in the report.

use crate::ctx::Result;
use crate::machine::Ended;
use crate::scenarios::Chosen;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// What came of a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ended as it must.
    Pass,
    /// It did not: what to show.
    Fail(String),
    /// It did not, and the emulator is to blame, again and again: why.
    Emulator(String),
    /// It did not run, or what it is about is not there: why.
    Skip(String),
}

impl Verdict {
    /// The word in the report.
    const fn word(&self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail(_) => "fail",
            Verdict::Emulator(_) => "emulator",
            Verdict::Skip(_) => "skip",
        }
    }

    /// What there is to say.
    fn why(&self) -> Option<&str> {
        match self {
            Verdict::Pass => None,
            Verdict::Fail(why) | Verdict::Emulator(why) | Verdict::Skip(why) => Some(why),
        }
    }
}

/// One scenario on one machine.
#[derive(Clone, Debug)]
pub struct ResultLine {
    /// The machine.
    pub cpu: String,
    /// The scenario.
    pub scenario: String,
    /// What came of it.
    pub verdict: Verdict,
    /// How long it took.
    pub seconds: f64,
    /// Exits of all guests meanwhile, when L0 counted them.
    pub exits: Option<u64>,
    /// Instructions of L0 meanwhile, when they were counted.
    pub l0_instructions: Option<u64>,
    /// What the scenario counted itself.
    pub counts: BTreeMap<String, u64>,
    /// L0's counters, by how much they went up meanwhile.
    pub l0: BTreeMap<String, u64>,
}

impl ResultLine {
    /// True when it failed, whoever is to blame.
    pub fn failed(&self) -> bool {
        matches!(self.verdict, Verdict::Fail(_) | Verdict::Emulator(_))
    }

    /// The table's line, and below it what there is to say.
    pub fn shown(&self) -> String {
        let number = |n: Option<u64>| n.map_or("-".to_string(), |n| n.to_string());
        let mut line = format!(
            "{:<44} {:<18} {:<8} {:>8.2} {:>10} {:>15}",
            self.scenario,
            self.cpu,
            self.verdict.word(),
            self.seconds,
            number(self.exits),
            number(self.l0_instructions)
        );
        for (name, count) in &self.counts {
            line += &format!("  {name}={count}");
        }
        if let Some(why) = self.verdict.why() {
            line += &format!("\n  {}", why.trim_start());
        }
        line
    }

    /// The report's line.
    fn json(&self, run: Option<u32>) -> Result<String> {
        #[derive(serde::Serialize)]
        struct Line<'a> {
            cpu: &'a str,
            scenario: &'a str,
            result: &'a str,
            seconds: f64,
            exits: Option<u64>,
            l0_instructions: Option<u64>,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            counts: &'a BTreeMap<String, u64>,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            l0: &'a BTreeMap<String, u64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            run: Option<u32>,
        }
        let line = Line {
            cpu: &self.cpu,
            scenario: &self.scenario,
            result: self.verdict.word(),
            seconds: (self.seconds * 1000.0).round() / 1000.0,
            exits: self.exits,
            l0_instructions: self.l0_instructions,
            counts: &self.counts,
            l0: &self.l0,
            run,
        };
        Ok(serde_json::to_string(&line)?)
    }
}

/// The table's first line.
pub fn heading() -> String {
    format!(
        "{:<44} {:<18} {:<8} {:>8} {:>10} {:>15}",
        "scenario", "cpu", "result", "seconds", "exits", "l0_instructions"
    )
}

/// Writes one JSON object per line to `path`: those of each run, numbered when there are several.
pub fn write_report(path: &Path, runs: &[Vec<ResultLine>]) -> Result<()> {
    let mut file = fs::File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    for (run, lines) in (1..).zip(runs) {
        for line in lines {
            writeln!(file, "{}", line.json((runs.len() > 1).then_some(run))?)?;
        }
    }
    Ok(())
}

/// The result of a single scenario, or of each of a batch's.
///
/// `verdict` is what came of the run as a whole, `times` when each line of its output came, `counted` whether L0 counted
/// its instructions.
pub fn of_run(
    chosen: &Chosen,
    cpu: &str,
    ended: &Ended,
    times: &[Duration],
    verdict: Verdict,
    counted: bool,
) -> Vec<ResultLine> {
    let line = |scenario: String, verdict| ResultLine {
        cpu: cpu.to_string(),
        scenario,
        verdict,
        seconds: 0.0,
        exits: None,
        l0_instructions: None,
        counts: BTreeMap::new(),
        l0: BTreeMap::new(),
    };
    if chosen.parts.is_empty() {
        let mut counts = BTreeMap::new();
        ended.output.lines().for_each(|text| count(text, &mut counts));
        return vec![ResultLine {
            seconds: ended.time.as_secs_f64(),
            exits: ended.stat("exits"),
            l0_instructions: ended.stat("l0_instructions").filter(|_| counted),
            counts,
            l0: ended
                .emulator
                .lines()
                .filter_map(|l| l.trim().strip_prefix("l0: stats:"))
                .next_back()
                .map(counters)
                .unwrap_or_default(),
            ..line(chosen.scenario.name.to_string(), verdict)
        }];
    }
    let said = said(ended, times);
    let mut lines = Vec::new();
    let mut ended_it = verdict.why();
    for part in &chosen.parts {
        let name = chosen.scenario.full_name(part);
        let Some(said) = said.iter().find(|s| s.part == *part) else {
            let verdict = match ended_it.take() {
                Some(why) => Verdict::Fail(why.to_string()),
                None => Verdict::Skip("the run ended before it".to_string()),
            };
            lines.push(line(name, verdict));
            continue;
        };
        lines.push(ResultLine {
            seconds: said.time.as_secs_f64(),
            // Asking for the counters is an exit, too.
            exits: said.stat("exits").map(|exits| exits.saturating_sub(1)),
            l0_instructions: said.stat("l0_instructions").filter(|_| counted),
            counts: said.counts.clone(),
            l0: said.counters(),
            ..line(name, said.verdict.clone())
        });
    }
    if matches!(verdict, Verdict::Fail(_)) && !lines.iter().any(ResultLine::failed) {
        lines.push(line(chosen.scenario.name.to_string(), verdict));
    }
    lines
}

/// What the small hypervisor said of one scenario.
struct Said<'a> {
    part: &'a str,
    verdict: Verdict,
    time: Duration,
    counts: BTreeMap<String, u64>,
    /// L0's counters before and after it.
    stats: Option<(&'a str, &'a str)>,
}

/// `name=value` of a line of L0's counters, but for those that the report has beside them.
fn counters(line: &str) -> BTreeMap<String, u64> {
    let pairs = line.split_ascii_whitespace().filter_map(|word| word.split_once('='));
    let pairs = pairs.filter(|(name, _)| !["exits", "l0_instructions"].contains(name));
    pairs.filter_map(|(name, value)| Some((name.to_string(), value.parse().ok()?))).collect()
}

impl Said<'_> {
    /// By how much L0's counters went up.
    fn counters(&self) -> BTreeMap<String, u64> {
        let Some((before, after)) = self.stats else { return BTreeMap::new() };
        let before = counters(before);
        let up = |(name, value): (String, u64)| {
            let up = value.checked_sub(before.get(&name).copied().unwrap_or(0))?;
            (up > 0).then_some((name, up))
        };
        counters(after).into_iter().filter_map(up).collect()
    }

    /// By how much L0's counter `name` went up; L0 does not print those that are zero.
    fn stat(&self, name: &str) -> Option<u64> {
        let value = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok())
        };
        let (before, after) = self.stats?;
        value(after)?.checked_sub(value(before).unwrap_or(0))
    }
}

fn said<'a>(ended: &'a Ended, times: &[Duration]) -> Vec<Said<'a>> {
    let mut stats = ended.emulator.lines().filter_map(|l| l.trim().strip_prefix("l0: stats:"));
    let (mut before, mut since) = (stats.next(), Duration::ZERO);
    let (mut all, mut counts) = (Vec::new(), BTreeMap::new());
    for (i, text) in ended.output.lines().enumerate() {
        let now = times.get(i).copied().unwrap_or(ended.time);
        let text = text.trim();
        count(text, &mut counts);
        if text.strip_suffix(" scenarios").is_some_and(|n| n.parse::<u32>().is_ok()) {
            since = now;
        }
        let Some((part, verdict)) = result(text) else { continue };
        let after = stats.next();
        let time = now.saturating_sub(since);
        all.push(Said { part, verdict, time, counts: std::mem::take(&mut counts), stats: before.zip(after) });
        (before, since) = (after, now);
    }
    all
}

/// A line `PASS name`, `SKIP name: why` or `FAIL name: why`.
fn result(line: &str) -> Option<(&str, Verdict)> {
    if let Some(name) = line.strip_prefix("PASS ") {
        return Some((name, Verdict::Pass));
    }
    let (word, rest) = line.split_once(' ')?;
    let (name, why) = rest.split_once(": ")?;
    match word {
        "SKIP" => Some((name, Verdict::Skip(why.to_string()))),
        "FAIL" => Some((name, Verdict::Fail(why.to_string()))),
        _ => None,
    }
}

/// Adds what a line `COUNT name=N name=N` tells.
fn count(line: &str, counts: &mut BTreeMap<String, u64>) {
    let Some(words) = line.trim().strip_prefix("COUNT ") else { return };
    for (name, value) in words.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
        if let Ok(value) = value.parse() {
            counts.insert(name.to_string(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios::SCENARIOS;

    fn ended(output: &str, emulator: &str) -> Ended {
        let time = Duration::from_secs(9);
        Ended {
            output: output.into(),
            emulator: emulator.into(),
            status: Some(33),
            timed_out: false,
            fault: None,
            time,
        }
    }

    fn chosen(parts: &[&'static str]) -> Chosen {
        let scenario = SCENARIOS.iter().find(|s| s.name == "svm").unwrap();
        Chosen { scenario, parts: parts.to_vec() }
    }

    fn times(seconds: &[u64]) -> Vec<Duration> {
        seconds.iter().map(|s| Duration::from_secs(*s)).collect()
    }

    const TWO: &str = "2 scenarios\r\nPASS a\r\nCOUNT tried=5 entered=3\nnoise\nFAIL b: x: 1, wanted 2\n";

    #[test]
    fn each_of_a_batch_has_its_own_result_time_exits_and_counts() {
        let stats = "l0: cpu 0: exits=4\nl0: stats: exits=4\nl0: stats: l1_exits=6 exits=10\nl0: stats: exits=17\n";
        let ended = ended(TWO, stats);
        let fail = Verdict::Fail("code 17".into());
        let lines = of_run(&chosen(&["a", "b"]), "max x2", &ended, &times(&[1, 3, 4, 4, 8]), fail, false);
        let seen: Vec<_> = lines.iter().map(|l| (l.scenario.as_str(), l.verdict.clone(), l.seconds, l.exits)).collect();
        let why = Verdict::Fail("x: 1, wanted 2".into());
        assert_eq!(seen, [("svm/a", Verdict::Pass, 2.0, Some(5)), ("svm/b", why, 5.0, Some(6))]);
        assert_eq!((lines[0].counts.len(), lines[1].counts.get("entered")), (0, Some(&3)));
    }

    #[test]
    fn what_a_run_did_not_reach_has_not_passed() {
        let fail = Verdict::Fail("it ran out of time".into());
        let output = ended("3 scenarios\nPASS a\n", "");
        let lines = of_run(&chosen(&["a", "b", "c"]), "max", &output, &[], fail, false);
        let words: Vec<_> = lines.iter().map(|l| l.verdict.word()).collect();
        assert_eq!(words, ["pass", "fail", "skip"]);
        assert_eq!(lines[1].verdict.why(), Some("it ran out of time"));
    }

    #[test]
    fn a_run_that_fails_behind_its_last_scenario_fails() {
        let fail = Verdict::Fail("L0 gave up".into());
        let lines = of_run(&chosen(&["a"]), "max", &ended("PASS a\n", ""), &[], fail, false);
        let words: Vec<_> = lines.iter().map(|l| (l.scenario.as_str(), l.verdict.word())).collect();
        assert_eq!(words, [("svm/a", "pass"), ("svm", "fail")]);
        // The control.
        let lines = of_run(&chosen(&["a"]), "max", &ended("PASS a\n", ""), &[], Verdict::Pass, false);
        assert_eq!(lines.len(), 1);
    }

    #[test]
    fn the_report_has_null_for_what_was_not_counted() {
        let stats = "l0: stats: l0_instructions=5 exits=4\nl0: stats: l0_instructions=9 exits=10\n";
        let json = |counted| {
            let lines = of_run(&chosen(&["a"]), "max", &ended("PASS a\n", stats), &[], Verdict::Pass, counted);
            lines[0].json(None).unwrap()
        };
        let wanted = |n: &str| {
            format!(
                r#"{{"cpu":"max","scenario":"svm/a","result":"pass","seconds":9.0,"exits":5,"l0_instructions":{n}}}"#
            )
        };
        assert_eq!((json(false), json(true)), (wanted("null"), wanted("4")));
    }
}
