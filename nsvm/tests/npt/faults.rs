//! Faults that belong to L1, with EXITINFO1 and EXITINFO2 as hardware gives them.

use hvcore::shadow::PageSize;
use nsvm::npt::{NptFormat, NptOutcome};

use crate::machine::*;

const GPA: u64 = 0x20_3ABC;

fn reflected(outcome: NptOutcome) -> u64 {
    match outcome {
        NptOutcome::Reflect { info1, info2 } => {
            assert_eq!(info2, GPA);
            info1
        }
        other => panic!("{other:?}"),
    }
}

/// Each right, withheld at each level that has it.
#[test]
fn rights_count_at_every_level() {
    for format in [LONG, LONG5, PAE, LEGACY] {
        for level in 1..=format.levels() {
            if format == PAE && level == 3 {
                continue;
            }
            for (withheld, error, expected) in [
                (W, WRITE | FINAL, 0x1_0000_0007),
                (W, WRITE | TABLE, 0x2_0000_0007),
                (U, READ | FINAL, 0x1_0000_0005),
                (U, WRITE | FINAL, 0x1_0000_0007),
                (U, FETCH | FINAL, 0x1_0000_0015),
                (NX, FETCH | FINAL, 0x1_0000_0015),
                (P, READ | FINAL, 0x1_0000_0004),
                (P, WRITE | FINAL, 0x1_0000_0006),
                (P, WRITE | TABLE, 0x2_0000_0006),
                (P, FETCH | FINAL, 0x1_0000_0014),
            ] {
                if withheld == NX && format == LEGACY {
                    continue;
                }
                let (machine, mut shadow) = start(format);
                machine.map(format, GPA & !0xFFF, 0x7_5000, 1, ALL);
                let mut table = TOP;
                for above in (level + 1..=format.levels()).rev() {
                    table = machine.get_entry(format, slot(format, table, above, GPA)) & 0x000F_FFFF_FFFF_F000;
                }
                let at = slot(format, table, level, GPA);
                // A control: the same access goes through while nothing is withheld.
                assert_eq!(fault(&mut shadow, &machine, GPA, error), NptOutcome::Resume);
                machine.set_entry(format, at, (machine.get_entry(format, at) ^ withheld) & !(A | D));
                let info1 = reflected(fault(&mut shadow, &machine, GPA, error));
                // Legacy paging knows no no-execute, so fetches show as reads.
                let expected = if format == LEGACY { expected & !0x10 } else { expected };
                assert_eq!(info1, expected, "{format:?} level {level} {withheld:#x} {error:#x}");
                assert_eq!(machine.get_entry(format, at) & (A | D), 0, "a refused access marks nothing");
            }
        }
    }
}

#[test]
fn fetches_show_only_while_no_execute_is_enabled() {
    for format in [LONG, LONG5, PAE] {
        let format = NptFormat { nxe: false, ..format };
        let (machine, mut shadow) = start(format);
        assert_eq!(reflected(fault(&mut shadow, &machine, GPA, FETCH | FINAL)), 0x1_0000_0004);
    }
}

/// The present bit that hardware saw is the shadow's and says nothing about L1's tables.
#[test]
fn the_present_bit_is_l1s() {
    let (machine, mut shadow) = start(LONG);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, READ | FINAL | 1)), 0x1_0000_0004);
    machine.map(LONG, GPA & !0xFFF, 0x7_5000, 1, P | U);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, WRITE | FINAL)), 0x1_0000_0007);
}

/// Nobody answers there, so all bits of the entry are set, reserved ones among them.
#[test]
fn tables_outside_l1s_memory_read_as_all_ones() {
    for (format, table) in [(LONG, 0x77_0000 | ALL), (PAE, 0x77_0000 | P), (LEGACY, 0x77_0000 | ALL)] {
        let (machine, mut shadow) = start(format);
        machine.set_entry(format, slot(format, TOP, format.levels(), GPA), table);
        let outcome = fault(&mut shadow, &machine, GPA, READ | FINAL);
        if format == LEGACY {
            // No bit of a 4-byte entry of the last level is reserved.
            assert!(matches!(outcome, NptOutcome::Resume), "{outcome:?}");
            assert_eq!(lookup(&shadow, GPA).unwrap().0 & 0x000F_FFFF_FFFF_F000, HOST + 0xFFFF_F000);
        } else {
            assert_eq!(reflected(outcome), 0x1_0000_000D);
        }
    }
}

#[test]
fn addresses_wider_than_the_tables_are_not_present() {
    for (format, width) in [(LONG, 48), (LONG5, 57), (PAE, 32), (LEGACY, 32)] {
        let (machine, mut shadow) = start(format);
        machine.map(format, 0x3000, 0x7_5000, 1, ALL);
        assert_eq!(fault(&mut shadow, &machine, 0x3000, READ | FINAL), NptOutcome::Resume);
        let outcome = fault(&mut shadow, &machine, 0x3000 | 1 << width, READ | FINAL);
        assert_eq!(outcome, NptOutcome::Reflect { info1: 0x1_0000_0004, info2: 0x3000 | 1 << width }, "{format:?}");
    }
}

/// L1 with five levels can name what four levels of the host cannot hold.
#[test]
fn addresses_wider_than_the_hosts_tables_are_not_present() {
    let (machine, mut shadow) = start(LONG5);
    machine.map(LONG5, 1 << 48, 0x7_5000, 1, ALL);
    let outcome = fault(&mut shadow, &machine, 1 << 48, READ | FINAL);
    assert_eq!(outcome, NptOutcome::Reflect { info1: 0x1_0000_0004, info2: 1 << 48 });
}

/// Which bits of an entry are reserved, from the figures of APM volume 2, 5.3 and 5.4.
#[derive(Clone, Copy)]
struct Reserved {
    format: NptFormat,
    level: u8,
    large: bool,
    bits: u64,
}

const fn range(high: u32, low: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

const NO_NX: NptFormat = NptFormat { nxe: false, ..LONG };
const PAE_NO_NX: NptFormat = NptFormat { nxe: false, ..PAE };
const NO_GIB: NptFormat = NptFormat { gib_pages: false, ..LONG };
const LEGACY_36: NptFormat = NptFormat { phys_bits: 36, ..LEGACY };
const WIDE: NptFormat = NptFormat { phys_bits: 52, ..LONG };

fn reserved_table() -> Vec<Reserved> {
    let r = |format, level, large, bits| Reserved { format, level, large, bits };
    let high = range(51, 40);
    vec![
        r(LONG5, 5, false, high | range(8, 7)),
        r(LONG, 4, false, high | range(8, 7)),
        r(LONG, 3, false, high | 1 << 8),
        r(LONG, 3, true, high | range(29, 13)),
        r(LONG, 2, false, high),
        r(LONG, 2, true, high | range(20, 13)),
        r(LONG, 1, false, high),
        r(NO_NX, 4, false, high | range(8, 7) | NX),
        r(NO_NX, 2, true, high | range(20, 13) | NX),
        r(NO_NX, 1, false, high | NX),
        r(NO_GIB, 3, false, high | range(8, 7)),
        r(WIDE, 4, false, range(8, 7)),
        r(WIDE, 1, false, 0),
        r(PAE, 3, false, range(63, 40) | range(8, 5) | range(2, 1)),
        r(PAE, 2, false, range(62, 40)),
        r(PAE, 2, true, range(62, 40) | range(20, 13)),
        r(PAE, 1, false, range(62, 40)),
        r(PAE_NO_NX, 1, false, range(63, 40)),
        r(LEGACY, 2, false, 0),
        r(LEGACY, 2, true, 1 << 21),
        r(LEGACY, 1, false, 0),
        r(LEGACY_36, 2, true, range(21, 17)),
    ]
}

/// Every bit of every kind of entry: faults as reserved exactly when the table says so.
#[test]
fn each_reserved_bit_faults_and_no_other_does() {
    for case in reserved_table() {
        for bit in 0..case.format.entry_bytes() as u32 * 8 {
            // Present, and the page size bit where it changes the kind of the entry.
            if bit == 0 || (bit == 7 && case.bits >> 7 & 1 == 0) {
                continue;
            }
            let (machine, mut shadow) = start(case.format);
            let level = if case.large { case.level } else { 1 };
            machine.map(case.format, GPA & !0xFFF, 0, level, ALL);
            let mut table = TOP;
            for above in (case.level + 1..=case.format.levels()).rev() {
                table = machine.get_entry(case.format, slot(case.format, table, above, GPA)) & 0x000F_FFFF_FFFF_F000;
            }
            let at = slot(case.format, table, case.level, GPA);
            assert_eq!(fault(&mut shadow, &machine, GPA, READ | FINAL), NptOutcome::Resume);
            machine.set_entry(case.format, at, machine.get_entry(case.format, at) | 1 << bit);
            // Where an address bit leads to: memory, so that no entry there is all ones.
            machine.back(machine.get_entry(case.format, at) & 0x000F_FFFF_FFFF_F000);
            let outcome = fault(&mut shadow, &machine, GPA, READ | FINAL);
            let faulted = matches!(outcome, NptOutcome::Reflect { info1: 0x1_0000_000D, info2: GPA });
            let expected = case.bits >> bit & 1 != 0;
            assert_eq!(faulted, expected, "{:?} level {} bit {bit}: {outcome:?}", case.format, case.level);
        }
    }
}

/// A reserved bit wins over missing rights, and shows with the access that was tried.
#[test]
fn reserved_bits_win_over_rights() {
    let (machine, mut shadow) = start(LONG);
    machine.map(LONG, GPA & !0xFFF, 0x7_5000, 1, P | 1 << 45 | NX);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, READ | FINAL)), 0x1_0000_000D);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, WRITE | FINAL)), 0x1_0000_000F);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, WRITE | TABLE)), 0x2_0000_000F);
    assert_eq!(reflected(fault(&mut shadow, &machine, GPA, FETCH | FINAL)), 0x1_0000_001D);
}

/// A fault leaves what was there: nothing is mapped for L2 by an access that L1 refuses.
#[test]
fn a_refused_access_fills_nothing() {
    let (machine, mut shadow) = start(LONG);
    machine.map(LONG, GPA & !0xFFF, 0x7_5000, 1, P | U);
    fault(&mut shadow, &machine, GPA, WRITE | FINAL);
    assert_eq!(lookup(&shadow, GPA), None);
    fault(&mut shadow, &machine, GPA, READ | FINAL);
    assert_eq!(lookup(&shadow, GPA).unwrap().1, PageSize::Size4K);
}
