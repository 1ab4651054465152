//! Exits that belong to L1, with the qualification that hardware gives them.

use hvcore::shadow::PageSize;
use nvmx::ept::{EptFormat, EptOutcome};

use crate::machine::*;

const GPA: u64 = 0x20_3ABC;

/// Each right, withheld at each level.
#[test]
fn rights_count_at_every_level() {
    for eptp in [PLAIN, FLAGS] {
        for level in 1..=4 {
            for (left, tried, expected) in [
                (R | X, WRITE | FINAL, 0x1AA),
                (R | X, READ | WRITE | TABLE, 0xAB),
                (R | X, WRITE, 0x2A),
                (R | W, FETCH | FINAL, 0x19C),
                (R, FETCH | FINAL, 0x18C),
                (R, WRITE | FINAL, 0x18A),
                (X, READ | FINAL, 0x1A1),
                (X, WRITE | FINAL, 0x1A2),
                (0, READ | FINAL, 0x181),
                (0, WRITE | FINAL, 0x182),
                (0, FETCH | FINAL, 0x184),
                (0, READ | WRITE | TABLE, 0x83),
            ] {
                let (machine, mut shadow) = start(eptp);
                machine.map(eptp, GPA & !0xFFF, 0x7_5000, 1, ALL);
                let at = machine.entry(eptp, GPA, level);
                // A control: the same access goes through while nothing is withheld.
                assert_eq!(fault(&mut shadow, &machine, GPA, tried), EptOutcome::Resume);
                machine.set(at, machine.get(at) & !(RWX | A | D) | left);
                let got = violated(fault(&mut shadow, &machine, GPA, tried));
                assert_eq!(got, expected, "{eptp:#x} level {level} {left:#x} {tried:#x}");
                assert_eq!(machine.get(at) & (A | D), 0, "a refused access marks nothing");
            }
        }
    }
}

/// What the entries of different levels withhold adds up.
#[test]
fn the_rights_told_are_those_of_all_entries_together() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, R | W | WB);
    let at = machine.entry(PLAIN, GPA, 3);
    machine.set(at, machine.get(at) & !W);
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, WRITE | FINAL)), 0x18A);
    assert_eq!(fault(&mut shadow, &machine, GPA, READ | FINAL), EptOutcome::Resume);
}

/// Bits 6:3 that hardware gave are the shadow's and say nothing about L1's tables; the others are L1's to know.
#[test]
fn other_bits_are_hardwares() {
    let (machine, mut shadow) = start(PLAIN);
    let rest = 0xF80 | 1 << 12;
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, READ | rest | 0x78)), READ | rest);
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, FETCH | 1 << 12)), FETCH | 1 << 12);
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, 0)), 0);
}

#[test]
fn tables_outside_l1s_memory_are_misconfigured() {
    for level in 2..=4 {
        let (machine, mut shadow) = start(PLAIN);
        machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, ALL);
        machine.set(machine.entry(PLAIN, GPA, level), 0x77_0000 | RWX);
        assert_eq!(fault(&mut shadow, &machine, GPA, READ | FINAL), MISCONFIGURED);
    }
    // Even where every address bit is legal.
    let (machine, mut shadow) = start_with(PLAIN, EptFormat { physical_bits: 52, ..FORMAT });
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, ALL);
    machine.set(machine.entry(PLAIN, GPA, 2), 0x77_0000 | RWX);
    assert_eq!(fault(&mut shadow, &machine, GPA, READ | FINAL), MISCONFIGURED);
}

#[test]
fn addresses_wider_than_the_tables_are_violations() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, 0x3000, 0x7_5000, 1, ALL);
    assert_eq!(fault(&mut shadow, &machine, 0x3000, READ | FINAL), EptOutcome::Resume);
    assert_eq!(violated(fault(&mut shadow, &machine, 0x3000 | 1 << 48, READ | FINAL)), 0x181);
}

/// With the flags on, every access to a paging structure is told as a read and a write, also where hardware says less.
#[test]
fn accesses_to_paging_structures_are_reads_and_writes_where_there_are_flags() {
    for (eptp, tried, expected) in [
        (FLAGS, WRITE | TABLE, 0xAB),
        (FLAGS, READ | TABLE, 0xAB),
        (FLAGS, WRITE | FINAL, 0x1AA),
        (PLAIN, WRITE | TABLE, 0xAA),
    ] {
        let (machine, mut shadow) = start(eptp);
        machine.map(eptp, GPA & !0xFFF, 0x7_5000, 1, R | X | WB);
        assert_eq!(violated(fault(&mut shadow, &machine, GPA, tried)), expected, "{eptp:#x} {tried:#x}");
    }
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, R | X | WB);
    assert_eq!(fault(&mut shadow, &machine, GPA, READ | TABLE), EptOutcome::Resume);
}

const fn range(high: u32, low: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// Which bits of an entry are reserved, from the figures of SDM volume 3, "EPT Translation Mechanism".
#[test]
fn each_reserved_bit_misconfigures_and_no_other_does() {
    let high = range(51, 40);
    let no_1g = EptFormat { pages_1g: false, ..FORMAT };
    let no_2m = EptFormat { pages_2m: false, ..FORMAT };
    let wide = EptFormat { physical_bits: 52, ..FORMAT };
    for (format, eptp, level, large, reserved) in [
        (FORMAT, PLAIN, 4, false, high | range(7, 3)),
        (FORMAT, PLAIN, 3, false, high | range(6, 3)),
        (no_1g, PLAIN, 3, false, high | range(7, 3)),
        (FORMAT, PLAIN, 3, true, high | range(29, 12)),
        (FORMAT, PLAIN, 2, false, high | range(6, 3)),
        (no_2m, PLAIN, 2, false, high | range(7, 3)),
        (FORMAT, PLAIN, 2, true, high | range(20, 12)),
        (FORMAT, PLAIN, 1, false, high),
        (wide, PLAIN, 4, false, range(7, 3)),
        (wide, PLAIN, 1, false, 0),
    ] {
        for bit in 3..64 {
            // The page size bit changes the kind of the entry where it is not reserved; memory types have their own test.
            let leaf = large || level == 1;
            if (bit == 7 && reserved >> 7 & 1 == 0 && level > 1) || (leaf && bit < 6) {
                continue;
            }
            let (machine, mut shadow) = start_with(eptp, format);
            machine.map(eptp, GPA & !0xFFF, 0, if large { level } else { 1 }, ALL);
            let at = machine.entry(eptp, GPA, level);
            assert_eq!(fault(&mut shadow, &machine, GPA, READ | FINAL), EptOutcome::Resume);
            machine.set(at, machine.get(at) | 1 << bit);
            // Where an address bit leads to: memory, so that no entry there is all ones.
            machine.back(machine.get(at) & ADDRESS);
            let outcome = fault(&mut shadow, &machine, GPA, READ | FINAL);
            let expected = reserved >> bit & 1 != 0;
            assert_eq!(outcome == MISCONFIGURED, expected, "level {level} {large} bit {bit}: {outcome:?}");
        }
    }
}

#[test]
fn memory_types_2_3_and_7_are_misconfigured_in_leaves() {
    for level in 1..=3 {
        for kind in 0..8 {
            let (machine, mut shadow) = start(PLAIN);
            machine.map(PLAIN, 0x4000_0000, 0, level, RWX | kind << 3);
            let outcome = fault(&mut shadow, &machine, 0x4000_0000, READ | FINAL);
            assert_eq!(outcome == MISCONFIGURED, matches!(kind, 2 | 3 | 7), "{level} {kind}");
        }
    }
}

#[test]
fn unreadable_entries_are_misconfigured_but_for_execute_only_where_offered() {
    let without = EptFormat { execute_only: false, ..FORMAT };
    for (format, good) in [(FORMAT, &[R, R | W, R | X, RWX, X][..]), (without, &[R, R | W, R | X, RWX][..])] {
        for level in 1..=4 {
            for rights in 1..8 {
                let (machine, mut shadow) = start_with(PLAIN, format);
                machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, ALL);
                let at = machine.entry(PLAIN, GPA, level);
                machine.set(at, machine.get(at) & !RWX | rights);
                let outcome = fault(&mut shadow, &machine, GPA, FETCH | FINAL);
                assert_eq!(outcome != MISCONFIGURED, good.contains(&rights), "{level} {rights}: {outcome:?}");
            }
        }
    }
}

/// A misconfiguration wins over missing rights of the same entry and of those above, not over absence above.
#[test]
fn misconfigurations_win_over_rights() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, R | WB | 1 << 45);
    let at = machine.entry(PLAIN, GPA, 3);
    machine.set(at, machine.get(at) & !W);
    assert_eq!(fault(&mut shadow, &machine, GPA, WRITE | FINAL), MISCONFIGURED);
    machine.set(at, machine.get(at) & !RWX);
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, WRITE | FINAL)), 0x182);
    // Not present is not misconfigured, whatever the other bits are.
    machine.set(at, !RWX);
    assert_eq!(violated(fault(&mut shadow, &machine, GPA, WRITE | FINAL)), 0x182);
}

/// An exit leaves what was there: nothing is mapped for L2 by an access that L1 refuses.
#[test]
fn a_refused_access_fills_nothing() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, GPA & !0xFFF, 0x7_5000, 1, R | WB);
    fault(&mut shadow, &machine, GPA, WRITE | FINAL);
    assert_eq!(lookup(&shadow, GPA), None);
    fault(&mut shadow, &machine, GPA, READ | FINAL);
    assert_eq!(lookup(&shadow, GPA).unwrap().1, PageSize::Size4K);
}
