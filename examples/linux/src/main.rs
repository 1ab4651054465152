//! A small virtual machine monitor for a Linux L1: runs tiny L2 guests through KVM's interface and checks what they saw.
//!
//! `launcher plain` needs nothing of Hyper-V: port I/O, CPUID, HLT and page-table work on every processor.
//! `launcher flush` offers L2 the Hyper-V flush hypercalls, with direct flush where KVM has it: one processor remaps a
//! page and flushes, the others read the page all the time and must never see the old one after the flush. Its control
//! does the same without the flush and must see it. A line for each case, `launcher: passed` or `launcher: FAILED` at
//! the end.

mod cases;
mod guest;
mod trace;
mod vm;

use std::process::ExitCode;

/// Anything that goes wrong, as text.
pub type Result<T> = std::result::Result<T, String>;

/// What to do, from the command line: `launcher plain|flush [processors] [rounds]`.
struct Orders {
    what: String,
    processors: u32,
    rounds: u64,
}

fn orders() -> Result<Orders> {
    let mut words = std::env::args().skip(1);
    let what = words.next().ok_or("usage: launcher plain|flush [processors] [rounds]")?;
    let mut number = |default: u64| match words.next() {
        None => Ok(default),
        Some(word) => word.parse().map_err(|e| format!("{word}: {e}")),
    };
    let processors = number(2)?;
    let rounds = number(1000)?;
    if !(1..=u64::from(guest::MAX_PROCESSORS)).contains(&processors) || rounds == 0 {
        return Err(format!("1 to {} processors and at least one round", guest::MAX_PROCESSORS));
    }
    Ok(Orders { what, processors: processors as u32, rounds })
}

fn run() -> Result<()> {
    let Orders { what, processors, rounds } = orders()?;
    match what.as_str() {
        "plain" => cases::plain(processors, rounds),
        "flush" => cases::flush(processors, rounds),
        other => Err(format!("no such case: {other}")),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("launcher: passed");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("launcher: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
