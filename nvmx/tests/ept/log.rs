//! Page-modification logging.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::memory::{Access, SecondStage};
use nvmx::ept::{EptOutcome, EptShadow, EptWalk, Pml, WalkFault, walk};

use crate::machine::*;

const LOG: u64 = 0x9000;
const GPA: u64 = 0x20_3ABC;

fn logging(eptp: u64, index: u16) -> (Machine, EptShadow<'static>, Pml) {
    let (machine, shadow) = start(eptp);
    machine.back(LOG);
    (machine, shadow, Pml { address: L1Gpa::new(LOG), index })
}

#[test]
fn a_dirty_flag_that_is_set_is_logged_once() {
    let (machine, mut shadow, mut pml) = logging(FLAGS, 511);
    machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, ALL);
    let mut go = |q, pml: &mut Pml| shadow.fault(&machine, &machine, L2Gpa::new(GPA), q, Some(pml));
    assert_eq!(go(READ | FINAL, &mut pml), EptOutcome::Resume);
    assert_eq!(pml.index, 511, "accessed flags are not logged");
    assert_eq!(go(WRITE | FINAL, &mut pml), EptOutcome::Resume);
    assert_eq!(pml.index, 510);
    assert_eq!(machine.get(LOG + 511 * 8), GPA & !0xFFF);
    assert_eq!(go(WRITE | FINAL, &mut pml), EptOutcome::Resume);
    assert_eq!(pml.index, 510, "it was dirty");
}

#[test]
fn a_large_page_is_logged_by_the_4_kib_that_were_written() {
    let (machine, mut shadow, mut pml) = logging(FLAGS, 7);
    machine.map(FLAGS, 0x20_0000, 0x40_0000, 2, ALL);
    let outcome = shadow.fault(&machine, &machine, L2Gpa::new(GPA), READ | WRITE | TABLE, Some(&mut pml));
    assert_eq!((outcome, pml.index, machine.get(LOG + 7 * 8)), (EptOutcome::Resume, 6, GPA & !0xFFF));
}

#[test]
fn the_index_wraps_below_zero_and_is_full_there() {
    let (machine, mut shadow, mut pml) = logging(FLAGS, 0);
    for n in 0..3 {
        machine.map(FLAGS, n << 12, 0x7_5000, 1, ALL);
    }
    let mut go = |gpa, q, pml: &mut Pml| shadow.fault(&machine, &machine, L2Gpa::new(gpa), q, Some(pml));
    assert_eq!(go(0, WRITE | FINAL, &mut pml), EptOutcome::Resume);
    assert_eq!(pml.index, 0xFFFF);
    for q in [WRITE, READ, FETCH] {
        let full = EptOutcome::Reflect { reason: 62, qualification: 1 << 12 };
        assert_eq!(go(0x1000, q | FINAL | 1 << 12, &mut pml), full, "a flag would have to be set");
        assert_eq!(machine.get(machine.entry(FLAGS, 0x1000, 1)) & (A | D), 0);
    }
    // Nothing to set, nothing to log: the access goes through.
    assert_eq!(go(0, WRITE | FINAL, &mut pml), EptOutcome::Resume);
    for (index, full) in [(511, false), (512, true), (0x8000, true)] {
        pml.index = index;
        let outcome = go(0x1000 + u64::from(index & 0x1000), READ | FINAL, &mut pml);
        machine.set(machine.entry(FLAGS, 0x1000, 1), 0x7_5000 | ALL);
        assert_eq!(outcome != EptOutcome::Resume, full, "{index}");
    }
}

#[test]
fn without_flags_nothing_is_logged() {
    let (machine, mut shadow, mut pml) = logging(PLAIN, 0xFFFF);
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, ALL);
    let outcome = shadow.fault(&machine, &machine, L2Gpa::new(GPA), WRITE | FINAL, Some(&mut pml));
    assert_eq!((outcome, pml.index), (EptOutcome::Resume, 0xFFFF));
}

#[test]
fn a_refusal_wins_over_a_full_log() {
    let (machine, mut shadow, mut pml) = logging(FLAGS, 0xFFFF);
    machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, R | WB);
    let outcome = shadow.fault(&machine, &machine, L2Gpa::new(GPA), WRITE | FINAL, Some(&mut pml));
    assert_eq!(violated(outcome), 0x18A);
}

#[test]
fn a_log_outside_l1s_memory_swallows_the_entry() {
    let (machine, _, _) = logging(FLAGS, 0);
    machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, ALL);
    let mut pml = Pml { address: L1Gpa::new(0x77_0000), index: 5 };
    let walked = walk(&machine, &FORMAT, FLAGS, L2Gpa::new(GPA), Access::Write, Some(&mut pml));
    assert_eq!((walked, pml.index), (Ok(L1Gpa::new(0x7_5ABC)), 4));
    pml.index = 512;
    assert_eq!(walk(&machine, &FORMAT, FLAGS, L2Gpa::new(GPA), Access::Write, Some(&mut pml)).ok(), walked.ok());
    machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, ALL);
    let walked = walk(&machine, &FORMAT, FLAGS, L2Gpa::new(GPA), Access::Write, Some(&mut pml));
    assert_eq!(walked, Err(WalkFault::LogFull));
}

/// Another processor of L1 dirties the page first: it logs it.
#[test]
fn a_flag_that_another_processor_set_is_not_logged() {
    let (machine, mut shadow, mut pml) = logging(FLAGS, 9);
    let at = machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, ALL);
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at {
            machine.set(at, machine.get(at) | D);
        }
    }));
    let outcome = shadow.fault(&machine, &machine, L2Gpa::new(GPA), WRITE | FINAL, Some(&mut pml));
    assert_eq!((outcome, pml.index), (EptOutcome::Resume, 9));
    assert_eq!(machine.get(at), 0x7_5000 | ALL | A | D);
}

#[test]
fn a_hypercalls_walk_writes_to_logged_pages_that_are_dirty_only() {
    let (machine, _, _) = logging(FLAGS, 0);
    let at = machine.map(FLAGS, GPA & !0xFFF, 0x7_5000, 1, ALL);
    let go = |logged, access| {
        EptWalk { memory: &machine, format: FORMAT, eptp: FLAGS, logged }.walk(L2Gpa::new(GPA), access).is_ok()
    };
    assert!(!go(true, Access::Write));
    assert_eq!(machine.get(at) & (A | D), 0);
    assert!(go(true, Access::Read));
    assert_eq!(machine.get(at) & (A | D), A);
    assert!(go(false, Access::Write));
    assert!(go(true, Access::Write));
}
