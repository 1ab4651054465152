//! Timelines: what L0 recorded of its processors becomes Chrome trace-event JSON, which Perfetto opens.
//!
//! L0 prints a line `l0: trace CPU TSC WORD` for each record (`examples/l0/src/trace.rs` says what a word holds). A
//! processor is a process of the JSON, a level a thread of it: L1 and L2 have a span for each time they ran, L0 one for
//! each exit that it handled. A tick of the time stamp counter is shown as a nanosecond.

use crate::ctx::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Something that L0 recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest of this level (1 or 2) is about to run.
    Enter(u8),
    /// The guest of this level left.
    Exit {
        /// Its level.
        level: u8,
        /// SVM's exit code, or VMX's exit reason.
        code: Code,
        /// The call code, at a hypercall.
        call: u16,
    },
    /// It kicks this processor.
    Kick(usize),
    /// It begins to wait for the targets of a flush.
    WaitBegins,
    /// It need wait no more.
    WaitEnds,
    /// What others asked it to flush of this level is drained.
    Drained(u8),
    /// It makes up an exit of L2 to L1.
    Synthetic,
}

/// Why a guest left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// SVM's exit code.
    Svm(u32),
    /// VMX's exit reason, all ones when the entry failed.
    Vmx(u32),
}

/// An event of one processor, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The processor.
    pub cpu: usize,
    /// Ticks of the time stamp counter.
    pub tsc: u64,
    /// What happened.
    pub event: Event,
}

/// The record in a line of L0's.
pub fn record(line: &str) -> Option<Record> {
    let mut words = line.trim().strip_prefix("l0: trace ")?.split_ascii_whitespace();
    let cpu = words.next()?.parse().ok()?;
    let mut hexadecimal = || u64::from_str_radix(words.next()?, 16).ok();
    let (tsc, word) = (hexadecimal()?, hexadecimal()?);
    let level = word as u8;
    let event = match (word >> 56, level) {
        (1, 1 | 2) => Event::Enter(level),
        (2, 1 | 2) => Event::Exit { level, code: Code::Svm((word >> 8) as u32), call: (word >> 40) as u16 },
        (8, 1 | 2) => Event::Exit { level, code: Code::Vmx((word >> 8) as u32), call: (word >> 40) as u16 },
        (3, _) => Event::Kick(word as u32 as usize),
        (4, _) => Event::WaitBegins,
        (5, _) => Event::WaitEnds,
        (6, 1 | 2) => Event::Drained(level),
        (7, _) => Event::Synthetic,
        _ => return None,
    };
    Some(Record { cpu, tsc, event })
}

/// The records in what L0 said.
pub fn records(said: &str) -> Vec<Record> {
    said.lines().filter_map(record).collect()
}

/// A stretch of time in which a processor was at one level, or waited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The processor.
    pub cpu: usize,
    /// The level: 0 is L0.
    pub level: u8,
    /// Its first tick.
    pub start: u64,
    /// One past its last.
    pub end: u64,
    /// What it did.
    pub name: String,
}

/// A moment of a processor in L0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The processor.
    pub cpu: usize,
    /// When.
    pub at: u64,
    /// What happened.
    pub event: Event,
}

/// All that a timeline shows. Ticks count from its first record.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Number of processors.
    pub cpus: usize,
    /// Of each processor in turn, in order of time; a wait comes behind the span that it is in.
    pub spans: Vec<Span>,
    /// Kicks, drained queues, synthetic exits.
    pub marks: Vec<Mark>,
}

impl Timeline {
    /// Puts the records in order.
    pub fn new(records: &[Record]) -> Timeline {
        let first = records.iter().map(|r| r.tsc).min().unwrap_or(0);
        let last = records.iter().map(|r| r.tsc).max().unwrap_or(0);
        let mut of_cpu: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        for record in records {
            of_cpu.entry(record.cpu).or_default().push(Record { tsc: record.tsc - first, ..*record });
        }
        let mut timeline = Timeline { cpus: of_cpu.keys().max().map_or(0, |cpu| cpu + 1), ..Timeline::default() };
        for (cpu, records) in of_cpu {
            timeline.add(cpu, &records, last - first);
        }
        timeline
    }

    fn add(&mut self, cpu: usize, records: &[Record], last: u64) {
        let span = |level, start, end, name: String| Span { cpu, level, start, end, name };
        let (mut guest, mut exit, mut wait) = (None, None, None);
        let mut waits = Vec::new();
        for Record { tsc, event, .. } in records.iter().copied() {
            match event {
                Event::Enter(level) => {
                    if let Some((start, name)) = exit.take() {
                        self.spans.push(span(0, start, tsc, name));
                        self.spans.append(&mut waits);
                    }
                    guest = Some((tsc, level));
                }
                Event::Exit { level, code, call } => {
                    if let Some((start, of)) = guest.take() {
                        self.spans.push(span(of, start, tsc, format!("L{of}")));
                    }
                    exit = Some((tsc, exit_name(level, code, call)));
                }
                Event::WaitBegins => wait = Some(tsc),
                Event::WaitEnds => waits.extend(wait.take().map(|start| span(0, start, tsc, "wait".into()))),
                Event::Kick(_) | Event::Drained(_) | Event::Synthetic => self.marks.push(Mark { cpu, at: tsc, event }),
            }
            if exit.is_none() {
                // A wait in an exit whose beginning was not kept.
                waits.clear();
            }
        }
        // What the processor was at when the machine ended.
        if let Some((start, level)) = guest {
            self.spans.push(span(level, start, last, format!("L{level}")));
        }
        if let Some((start, name)) = exit {
            self.spans.push(span(0, start, last, name));
            self.spans.append(&mut waits);
        }
    }

    /// Where a kick at `at` made its target leave its guest: the beginning of the span of L0 that it caused.
    pub fn arrival(&self, target: usize, at: u64) -> Option<u64> {
        let nmi = |s: &&Span| s.cpu == target && s.level == 0 && s.name.ends_with("NMI") && s.start >= at;
        self.spans.iter().filter(nmi).map(|s| s.start).min()
    }

    /// As Chrome trace events.
    pub fn json(&self) -> Value {
        let us = |ticks: u64| ticks as f64 / 1000.0;
        let mut events = Vec::new();
        for cpu in 0..self.cpus {
            let named = |name: &str, tid: u8, what: String| json!({"ph": "M", "name": name, "pid": cpu, "tid": tid, "args": {"name": what}});
            events.push(named("process_name", 0, format!("CPU {cpu}")));
            events.extend((0..3).map(|level| named("thread_name", level, format!("L{level}"))));
        }
        for s in &self.spans {
            events.push(json!({
                "ph": "X", "name": s.name, "cat": format!("L{}", s.level), "pid": s.cpu, "tid": s.level,
                "ts": us(s.start), "dur": us(s.end - s.start),
            }));
        }
        for (id, mark) in self.marks.iter().enumerate() {
            let name = match mark.event {
                Event::Kick(to) => format!("kick CPU {to}"),
                Event::Drained(level) => format!("drained L{level}"),
                _ => "synthetic exit".to_string(),
            };
            let at = json!({"pid": mark.cpu, "tid": 0, "ts": us(mark.at)});
            let with = |at: &Value, more: Value| {
                let mut event = at.clone();
                if let (Some(event), Some(more)) = (event.as_object_mut(), more.as_object()) {
                    event.extend(more.clone());
                }
                event
            };
            events.push(with(&at, json!({"ph": "i", "s": "t", "name": name, "cat": "flush"})));
            // An arrow from the kick to the exit that it caused.
            if let Event::Kick(to) = mark.event
                && let Some(arrival) = self.arrival(to, mark.at)
            {
                let to = json!({"pid": to, "tid": 0, "ts": us(arrival)});
                events.push(with(&at, json!({"ph": "s", "name": "kick", "cat": "kick", "id": id})));
                events.push(with(&to, json!({"ph": "f", "bp": "e", "name": "kick", "cat": "kick", "id": id})));
            }
        }
        json!({"displayTimeUnit": "ns", "traceEvents": events})
    }

    /// The direct flush with the most kicks, the shortest of those: its span of L0.
    pub fn best_flush(&self) -> Option<&Span> {
        let is_flush = |s: &&Span| s.level == 0 && s.name.starts_with("L2") && s.name.contains("CALL flush");
        let kicks = |s: &Span| self.marks.iter().filter(|m| self.is_kick_of(m, s)).count();
        self.spans.iter().filter(is_flush).max_by_key(|s| (kicks(s), u64::MAX - (s.end - s.start)))
    }

    /// True when `mark` is a kick that was sent in `span`.
    pub fn is_kick_of(&self, mark: &Mark, span: &Span) -> bool {
        let inside = mark.cpu == span.cpu && (span.start..span.end).contains(&mark.at);
        inside && matches!(mark.event, Event::Kick(_))
    }
}

/// What L0 did in the span behind an exit.
fn exit_name(level: u8, code: Code, call: u16) -> String {
    let name = match code {
        Code::Svm(code) => svm_exit(code, call),
        Code::Vmx(reason) => vmx_exit(reason, call),
    };
    format!("L{level} {name}")
}

fn svm_exit(code: u32, call: u16) -> String {
    let name = match code {
        0x40..=0x5f => return format!("exception {}", code - 0x40),
        0x60 => "INTR",
        0x61 => "NMI",
        0x63 => "INIT",
        0x64 => "VINTR",
        0x72 => "CPUID",
        0x78 => "HLT",
        0x7a => "INVLPGA",
        0x7b => "IOIO",
        0x7c => "MSR",
        0x7f => "SHUTDOWN",
        0x80 => "VMRUN",
        0x81 => return format!("VMMCALL {}", call_name(call)),
        0x82 => "VMLOAD",
        0x83 => "VMSAVE",
        0x84 => "STGI",
        0x85 => "CLGI",
        0x400 => "NPF",
        u32::MAX => "refused",
        _ => return format!("exit {code:#x}"),
    };
    name.to_string()
}

fn vmx_exit(reason: u32, call: u16) -> String {
    let name = match reason {
        // Exceptions and NMIs share a reason; L0 takes no exceptions of L1.
        0 => "NMI",
        1 => "INTR",
        2 => "triple fault",
        3 => "INIT",
        4 => "SIPI",
        7 => "interrupt window",
        8 => "NMI window",
        10 => "CPUID",
        12 => "HLT",
        18 => return format!("VMCALL {}", call_name(call)),
        19 => "VMCLEAR",
        20 => "VMLAUNCH",
        21 => "VMPTRLD",
        23 => "VMREAD",
        24 => "VMRESUME",
        25 => "VMWRITE",
        27 => "VMXON",
        28 => "CR access",
        30 => "I/O",
        31 => "RDMSR",
        32 => "WRMSR",
        48 => "EPT violation",
        50 => "INVEPT",
        52 => "preemption timer",
        53 => "INVVPID",
        55 => "XSETBV",
        u32::MAX => "refused",
        _ => return format!("exit {reason}"),
    };
    name.to_string()
}

fn call_name(call: u16) -> String {
    match call {
        2 => "flush space".into(),
        3 => "flush list".into(),
        0x13 => "flush space ex".into(),
        0x14 => "flush list ex".into(),
        0xaf => "flush guest physical space".into(),
        0xb0 => "flush guest physical list".into(),
        _ => format!("call {call:#x}"),
    }
}

/// What a trace holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Spans of all levels.
    pub spans: usize,
    /// Other events.
    pub others: usize,
}

/// Checks a trace as a reader of it would: every event has what its kind needs, no span has a negative length, spans of
/// a thread nest, and a processor is at one level at a time.
pub fn check(text: &str) -> Result<Summary> {
    let trace: Value = serde_json::from_str(text)?;
    let events = trace["traceEvents"].as_array().ok_or("no array traceEvents")?;
    let mut summary = Summary::default();
    let mut of_cpu: BTreeMap<u64, Vec<(f64, f64, u64)>> = BTreeMap::new();
    for event in events {
        let place = event["pid"].as_u64().zip(event["tid"].as_u64());
        let (Some((pid, tid)), Some(_)) = (place, event["name"].as_str()) else {
            return Err(format!("an event without name, pid or tid: {event}").into());
        };
        let time = || event["ts"].as_f64().filter(|ts| *ts >= 0.0);
        match event["ph"].as_str() {
            Some("X") => {
                let (Some(start), Some(length)) = (time(), event["dur"].as_f64().filter(|d| *d >= 0.0)) else {
                    return Err(format!("a span without time, or a negative one: {event}").into());
                };
                of_cpu.entry(pid).or_default().push((start, start + length, tid));
                summary.spans += 1;
            }
            Some("i" | "s" | "f") if time().is_some() => summary.others += 1,
            Some("M") => {}
            _ => return Err(format!("an event of no kind, or without a time: {event}").into()),
        }
    }
    for (cpu, mut spans) in of_cpu {
        // The longer one of those that start together is the outer one.
        spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut open: Vec<(f64, f64, u64)> = Vec::new();
        for span in spans {
            // Ticks are thousandths; sums of them are exact to much less.
            const EXACT: f64 = 1e-4;
            open.retain(|outer| outer.1 > span.0 + EXACT);
            if let Some(outer) = open.last()
                && (outer.1 + EXACT < span.1 || outer.2 != span.2)
            {
                return Err(format!("spans of CPU {cpu} overlap: {outer:?} and {span:?}").into());
            }
            open.push(span);
        }
    }
    Ok(summary)
}

/// Writes the timeline of `records` to `path`, checked.
pub fn write(path: &Path, records: &[Record]) -> Result<Summary> {
    let text = serde_json::to_string(&Timeline::new(records).json())?;
    fs::write(path, &text).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    let summary = check(&text)?;
    if summary.spans == 0 { Err("the timeline is empty".into()) } else { Ok(summary) }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A direct flush of CPU 0 that kicks CPU 1.
    pub const FLUSH: &str = "\
        l0: trace 0 100 100000000000002\n\
        noise\n\
        l0: trace 0 200 200030000008102\n\
        l0: trace 0 210 300000000000001\n\
        l0: trace 0 220 400000000000000\n\
        l0: trace 0 290 500000000000000\n\
        l0: trace 0 2a0 100000000000002\n\
        l0: trace 1 110 100000000000002\n\
        l0: trace 1 280 200000000006102\n\
        l0: trace 1 2c0 600000000000002\n\
        l0: trace 1 2d0 100000000000002\n\
        l0: trace 1 300 200000000007801\n";

    #[test]
    fn a_flush_becomes_spans_and_marks() {
        let timeline = Timeline::new(&records(FLUSH));
        let spans: Vec<_> = timeline.spans.iter().map(|s| (s.cpu, s.level, s.start, s.end, s.name.as_str())).collect();
        let wanted = [
            (0, 2, 0, 0x100, "L2"),
            (0, 0, 0x100, 0x1a0, "L2 VMMCALL flush list"),
            (0, 0, 0x120, 0x190, "wait"),
            (0, 2, 0x1a0, 0x200, "L2"),
            (1, 2, 0x10, 0x180, "L2"),
            (1, 0, 0x180, 0x1d0, "L2 NMI"),
            (1, 2, 0x1d0, 0x200, "L2"),
            (1, 0, 0x200, 0x200, "L1 HLT"),
        ];
        assert_eq!(spans, wanted);
        assert_eq!((timeline.cpus, timeline.marks.len(), timeline.arrival(1, 0x110)), (2, 2, Some(0x180)));
        assert_eq!(timeline.best_flush().map(|s| s.start), Some(0x100));
        let summary = check(&timeline.json().to_string()).unwrap();
        // Two marks, and two ends of the kick's arrow.
        assert_eq!(summary, Summary { spans: 8, others: 4 });
    }

    #[test]
    fn the_beginning_may_be_missing() {
        let cut: String = FLUSH.lines().skip(3).map(|l| format!("{l}\n")).collect();
        let timeline = Timeline::new(&records(&cut));
        assert_eq!(timeline.spans.first().map(|s| s.name.as_str()), Some("L2"));
        check(&timeline.json().to_string()).unwrap();
    }

    #[test]
    fn what_does_not_nest_is_found() {
        let trace = |second: &str| {
            format!(
                r#"{{"traceEvents":[{{"ph":"X","name":"a","pid":0,"tid":0,"ts":1.0,"dur":2.0}},
                {{"ph":"X","name":"b","pid":0,{second}}}]}}"#
            )
        };
        // Inside, next to it, on another processor's behalf.
        check(&trace(r#""tid":0,"ts":1.5,"dur":1.5"#)).unwrap();
        check(&trace(r#""tid":1,"ts":3.0,"dur":9.0"#)).unwrap();
        // Across its end, at two levels at once, backwards, without a time.
        assert!(check(&trace(r#""tid":0,"ts":2.0,"dur":1.1"#)).is_err());
        assert!(check(&trace(r#""tid":1,"ts":2.0,"dur":0.5"#)).is_err());
        assert!(check(&trace(r#""tid":0,"ts":4.0,"dur":-1.0"#)).is_err());
        assert!(check(&trace(r#""tid":0,"dur":1.0"#)).is_err());
        assert!(check("{").is_err());
    }

    #[test]
    fn both_vendors_exits_have_names() {
        let name = |line: &str| match record(line).map(|r| r.event) {
            Some(Event::Exit { level, code, call }) => exit_name(level, code, call),
            other => format!("{other:?}"),
        };
        assert_eq!(name("l0: trace 0 1 200000000007201"), "L1 CPUID");
        assert_eq!(name("l0: trace 0 1 800000000000a02"), "L2 CPUID");
        assert_eq!(name("l0: trace 0 1 800030000001202"), "L2 VMCALL flush list");
    }
}
