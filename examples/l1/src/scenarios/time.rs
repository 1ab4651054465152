//! The host's clocks and its crash registers, as a Hyper-V-compatible host offers them.

use super::Outcome;
use crate::{Failure, check, frames, hyperv};
use hw::msr::{rdmsr, wrmsr};
use tlfs_abi::msr;
use tlfs_abi::msr::{CrashControl, PageMsr, ReferenceTscPage};

/// Units of the reference time, 100 ns, between two looks at the clocks.
const WHILE: u64 = 50_000;

fn read(number: u32) -> u64 {
    // SAFETY: the host offers the MSR.
    unsafe { rdmsr(number) }
}

fn is_host() -> Outcome {
    let here = hyperv::is_host();
    if here { Ok(()) } else { Err(Failure::Missing("a Hyper-V-compatible host")) }
}

/// The reference counter goes on, agrees with the reference TSC page, and goes as fast as the frequency MSR says that the
/// time stamp counter goes.
pub fn reference_time() -> Outcome {
    is_host()?;
    let page = frames::page();
    // SAFETY: as above, and the page is given to the host until it is taken back below.
    unsafe { wrmsr(msr::REFERENCE_TSC, page | PageMsr::ENABLE) };
    let now = || {
        // SAFETY: the host's page lies over ours, mapped one to one.
        let overlay = unsafe { (page as *const ReferenceTscPage).read_volatile() };
        let before = read(msr::TIME_REF_COUNT);
        let tsc = rt::cpu::tsc();
        (before, tsc, overlay.time(tsc), read(msr::TIME_REF_COUNT))
    };
    let first = now();
    while read(msr::TIME_REF_COUNT) < first.0 + WHILE {
        core::hint::spin_loop();
    }
    let second = now();
    for (before, _, by_page, after) in [first, second] {
        let by_page = by_page.ok_or(Failure::Missing("a reference TSC page that is valid"))?;
        check("the page's time lies between two reads of the MSR", u64::from((before..=after).contains(&by_page)), 1)?;
    }
    // Each look at the time stamp counter lies between two at the reference time, however long they took.
    let (least, most) = (second.0.saturating_sub(first.3), second.3 - first.0);
    let ticks = u128::from(second.1 - first.1);
    let frequency = u128::from(read(msr::TSC_FREQUENCY));
    // Within a fiftieth.
    let slow = ticks * 10_000_000 * 51 < frequency * u128::from(least) * 50;
    let fast = ticks * 10_000_000 * 49 > frequency * u128::from(most) * 50;
    check("the time stamp counter is slower than it says", u64::from(slow), 0)?;
    check("the time stamp counter is faster than it says", u64::from(fast), 0)?;
    check("the APIC timer has a frequency", u64::from(read(msr::APIC_FREQUENCY) > 0), 1)?;
    // SAFETY: as above.
    unsafe { wrmsr(msr::REFERENCE_TSC, 0) };
    // SAFETY: our own page again.
    check("the page below reappears", unsafe { (page as *const u64).read_volatile() }, 0)
}

/// The crash parameters are kept, and a report of a crash is taken.
pub fn crash() -> Outcome {
    is_host()?;
    let mut wanted = CrashControl::new(0);
    wanted.set_crash_notify(true);
    let offered = CrashControl::new(read(msr::CRASH_CTL));
    check("crash reports are offered", u64::from(offered.crash_notify()), 1)?;
    for (number, value) in (msr::CRASH_P0..=msr::CRASH_P4).zip(0xC0DE..) {
        // SAFETY: the host offers the MSR.
        unsafe { wrmsr(number, value) };
        check("crash parameter", read(number), value)?;
    }
    // SAFETY: as above; the host writes a line and goes on.
    unsafe { wrmsr(msr::CRASH_CTL, wanted.raw()) };
    Ok(())
}
