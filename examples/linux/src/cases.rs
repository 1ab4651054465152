//! The cases: what runs in L2, and what must have come of it.

use crate::Result;
use crate::guest::{BAD, GOOD, INPUT, PML4, Program, ROUNDS_PER_EXIT, STUCK, WINDOW};
use crate::trace::{self, Counts};
use crate::vm::{Seen, Vm};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;
use tlfs_abi::flush::{FlushFlags, GvaRange};
use tlfs_abi::hypercall::{CallCode, HypercallInput};

/// Every processor does page-table work with exits in between.
pub fn plain(processors: u32, rounds: u64) -> Result<()> {
    let vm = Vm::new(processors, false)?;
    vm.shared().rounds.store(rounds, SeqCst);
    let (start, before) = (Instant::now(), Counts::now());
    let seen = vm.run(Program::Plain, Program::Plain, false)?;
    let after = Counts::now();
    let expected: Vec<u8> = (1..=rounds).rev().filter(|n| n % ROUNDS_PER_EXIT == 0).map(|n| n as u8).collect();
    for (n, seen) in seen.iter().enumerate() {
        check(seen).map_err(|why| format!("processor {n}: {why}"))?;
        if seen.rounds != expected {
            return Err(format!("processor {n} reported {} rounds of {}", seen.rounds.len(), expected.len()));
        }
    }
    report("plain", start, before, after, &format!("{processors} processors, {rounds} rounds each"));
    Ok(())
}

/// A flush hypercall.
struct Call {
    name: &'static str,
    code: CallCode,
    /// Input by registers, XMM0 among them.
    fast: bool,
    /// All processors by the flag; else by mask or set.
    all: bool,
    /// Ranges, of which the last is the changed page; 0 for a whole address space.
    ranges: u16,
}

const CALLS: &[Call] = &[
    Call { name: "space, all", code: CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE, fast: false, all: true, ranges: 0 },
    Call { name: "space, mask", code: CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE, fast: false, all: false, ranges: 0 },
    Call { name: "space, all, XMM", code: CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE, fast: true, all: true, ranges: 0 },
    Call { name: "space, set", code: CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX, fast: false, all: false, ranges: 0 },
    Call { name: "1 range, mask", code: CallCode::FLUSH_VIRTUAL_ADDRESS_LIST, fast: false, all: false, ranges: 1 },
    Call { name: "1 range, set", code: CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX, fast: false, all: false, ranges: 1 },
    Call {
        name: "300 ranges, set",
        code: CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX,
        fast: false,
        all: false,
        ranges: 300,
    },
];

impl Call {
    fn is_ex(&self) -> bool {
        matches!(self.code, CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX | CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX)
    }

    /// Tells the program in L2 how to make this call for `processors` processors.
    fn prepare(&self, vm: &Vm, processors: u32) {
        let flags = if self.all { FlushFlags::ALL_PROCESSORS } else { 0 };
        let mask = (1 << processors) - 1;
        let mut input = HypercallInput::new(self.code);
        let mut words = vec![PML4, flags];
        if self.is_ex() {
            // A sparse set of one bank.
            words.extend([0, 1, mask]);
            input = input.with_variable_header_size(1);
        } else {
            words.push(if self.all { 0 } else { mask });
        }
        if self.ranges > 0 {
            input = input.with_reps(self.ranges, 0);
            // Pages that nobody reads, and the changed one.
            let others = (1..u64::from(self.ranges)).map(|n| GvaRange::new(WINDOW + (n << 13), 1).raw());
            words.extend(others);
            words.push(GvaRange::new(WINDOW, 1).raw());
        }
        let shared = vm.shared();
        if self.fast {
            input = input.with_fast();
            shared.rdx.store(words[0], SeqCst);
            shared.r8.store(words[1], SeqCst);
            shared.xmm0.store(words[2], SeqCst);
        } else {
            vm.put_input(&words);
            shared.rdx.store(INPUT, SeqCst);
        }
        shared.rcx.store(input.raw(), SeqCst);
        shared.flush.store(1, SeqCst);
    }
}

/// One processor remaps and flushes, the others read.
pub fn flush(processors: u32, rounds: u64) -> Result<()> {
    trace::start();
    // Kept to the end: with its first machine KVM turns virtualization on and patches the scheduler's text, and with its
    // last one both back; for every case that would be a test of the emulator.
    let first = Vm::new(1, true)?;
    let direct = first.has_direct_flush();
    println!("launcher: KVM offers direct flush: {}", if direct { "yes" } else { "no" });
    let stale = flush_case(None, processors, rounds, direct)?;
    if processors > 1 && stale == 0 {
        return Err("the control saw no stale translation: the check cannot fail".into());
    }
    for call in CALLS {
        let stale = flush_case(Some(call), processors, rounds, direct)?;
        if stale > 0 {
            return Err(format!("{}: {stale} stale reads", call.name));
        }
    }
    Ok(())
}

/// Runs one call, or the control without any; how many stale reads there were.
fn flush_case(call: Option<&Call>, processors: u32, rounds: u64, direct: bool) -> Result<u64> {
    let vm = Vm::new(processors, true)?;
    let shared = vm.shared();
    shared.rounds.store(rounds, SeqCst);
    shared.processors.store(u64::from(processors), SeqCst);
    let name = call.map_or("no flush (control)", |call| call.name);
    if let Some(call) = call {
        call.prepare(&vm, processors);
    }
    let (start, before) = (Instant::now(), Counts::now());
    let seen = vm.run(Program::Initiate, Program::Read, direct)?;
    let after = Counts::now();
    for (n, seen) in seen.iter().enumerate() {
        let result = shared.result.load(SeqCst);
        check(seen).map_err(|why| format!("{name}: processor {n}: {why}, hypercall result {result:#x}"))?;
    }
    let calls = shared.calls.load(SeqCst);
    let sum = |of: fn(&crate::guest::Reader) -> u64| shared.readers.iter().map(of).sum::<u64>();
    let (reads, stale) = (sum(|r| r.reads.load(SeqCst)), sum(|r| r.stale.load(SeqCst)));
    if call.is_some() && calls != rounds {
        return Err(format!("{name}: {calls} calls in {rounds} rounds"));
    }
    report(name, start, before, after, &format!("{calls} flushes, {reads} reads, {stale} stale"));
    let reflected = before.hypercalls.zip(after.hypercalls).map(|(before, after)| after - before);
    match (direct, reflected) {
        (true, Some(1..)) => Err(format!("{name}: hypercalls reached L1 although direct flush is on")),
        (false, Some(n)) if n != calls => Err(format!("{name}: L1 saw {n} hypercalls of {calls}")),
        _ => Ok(stale),
    }
}

fn check(seen: &Seen) -> Result<()> {
    match seen.verdict {
        Some(GOOD) => Ok(()),
        Some(BAD) => Err("it read something else, or its hypercall failed".into()),
        Some(STUCK) => Err("another processor does not go on".into()),
        other => Err(format!("verdict {other:?}")),
    }
}

fn report(name: &str, start: Instant, before: Counts, after: Counts, what: &str) {
    let since = |before: Option<u64>, after: Option<u64>| match before.zip(after) {
        Some((before, after)) => after.wrapping_sub(before).to_string(),
        None => "unknown".to_string(),
    };
    let exits = since(before.exits, after.exits);
    let hypercalls = since(before.hypercalls, after.hypercalls);
    let milliseconds = start.elapsed().as_millis();
    println!("launcher: {name}: {what}; {milliseconds} ms, exits to L1 {exits}, hypercalls to L1 {hypercalls}");
}
