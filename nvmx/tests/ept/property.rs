//! Mutated tables against a naive walk that knows misconfigurations, accessed and dirty flags and qualifications.

use hvcore::shadow::PageSize;
use nvmx::ept::{EptFormat, EptOutcome, EptShadow};

use crate::machine::*;
use crate::sequence::Random;

const GPA: u64 = 0x4060_7ABC;

const fn range(high: u32, low: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// What the naive walk says: where the access ends and what it marks, or the exit.
enum Answer {
    Ends { l1: u64, leaf: u64, rights: u64, marks: Vec<(u64, u64)> },
    Exit(EptOutcome),
}

/// Reserved bits by level and page size bit, and whether the entry maps a page.
fn kind(format: &EptFormat, level: u8, entry: u64) -> (u64, bool) {
    let large = entry & PS != 0;
    let high = if format.physical_bits > 51 { 0 } else { range(51, u32::from(format.physical_bits)) };
    match level {
        1 => (high, true),
        2 if large && format.pages_2m => (high | range(20, 12), true),
        3 if large && format.pages_1g => (high | range(29, 12), true),
        2 | 3 => (high | range(7, 3), false),
        _ => (high | range(7, 3), false),
    }
}

fn naive(machine: &Machine, format: &EptFormat, eptp: u64, tried: u64) -> Answer {
    let violation = |rights: u64| EptOutcome::Reflect { reason: 48, qualification: tried | rights << 3 };
    let mut table = eptp & ADDRESS;
    let mut rights = RWX;
    let mut marks = Vec::new();
    for level in (1..=4).rev() {
        let at = slot(table, level, GPA);
        let backed = machine.pages.borrow().contains_key(&(at & !0xFFF));
        let entry = if backed { machine.get(at) } else { u64::MAX };
        if entry & RWX == 0 {
            return Answer::Exit(violation(0));
        }
        let (reserved, leaf) = kind(format, level, entry);
        let bad_rights = entry & (R | W) == W || (entry & RWX == X && !format.execute_only);
        let bad_type = leaf && [2, 3, 7].contains(&(entry >> 3 & 7));
        if entry & reserved != 0 || bad_rights || bad_type {
            return Answer::Exit(MISCONFIGURED);
        }
        rights &= entry;
        marks.push((at, A));
        if !leaf {
            table = entry & ADDRESS;
            continue;
        }
        if tried & RWX & !rights != 0 {
            return Answer::Exit(violation(rights));
        }
        if tried & WRITE != 0 {
            marks.last_mut().unwrap().1 |= D;
        }
        if eptp & 0x40 == 0 {
            marks.clear();
        }
        let offset = (1 << (12 + 9 * (level - 1))) - 1;
        let l1 = (entry & ADDRESS & !offset) | (GPA & offset);
        return Answer::Ends { l1, leaf: entry, rights, marks };
    }
    unreachable!("level 1 is a leaf")
}

fn one(eptp: u64, n: u64, random: &mut Random, shadows: &mut [EptShadow<'_>]) -> bool {
    let machine = Machine::new();
    let shadow = &mut shadows[(n % 24) as usize];
    let format = *shadow.format();
    shadow.flush_everything();
    shadow.activate(eptp);
    machine.largest.set(Some(PageSize::Size4K));
    let large = if !format.pages_2m {
        1
    } else if format.pages_1g {
        3
    } else {
        2
    };
    let level = 1 + random.below(large) as u8;
    machine.map(eptp, GPA & !0xFFF & !((1 << (12 + 9 * (level - 1))) - 1), 0x8000_0000, level, ALL | D);
    // Up to three bits somewhere on the way; the low bits of the entries more often than others.
    for _ in 0..random.below(4) {
        let mut table = TOP;
        let target = level + random.below(u64::from(4 - level) + 1) as u8;
        for above in (target + 1..=4).rev() {
            table = machine.get(slot(table, above, GPA)) & ADDRESS;
            if !machine.pages.borrow().contains_key(&table) {
                return false;
            }
        }
        let at = slot(table, target, GPA);
        let bit = if random.below(2) == 0 { random.below(10) } else { random.below(64) };
        machine.set(at, machine.get(at) ^ 1 << bit);
    }
    let flags = eptp & 0x40 != 0;
    let tried = [READ | FINAL, WRITE | FINAL, FETCH | FINAL, READ | TABLE | if flags { WRITE } else { 0 }]
        [random.below(4) as usize];
    let before = machine.pages.borrow().clone();
    let answer = naive(&machine, &format, eptp, tried);
    let outcome = fault(shadow, &machine, GPA, tried);
    let (passed, marks) = match answer {
        Answer::Ends { l1, leaf, rights, marks } => {
            assert_eq!(outcome, EptOutcome::Resume, "{format:?} {tried:#x}");
            let (entry, _) = lookup(shadow, GPA).unwrap();
            assert_eq!(entry & ADDRESS, (HOST + l1) & ADDRESS, "{format:?} {tried:#x}");
            let clean = flags && tried & WRITE == 0 && leaf & D == 0;
            assert_eq!(entry & RWX, if clean { rights & !W } else { rights }, "{format:?} {tried:#x}");
            assert_eq!(entry >> 3 & 15, leaf >> 3 & 15, "the memory type of L1 where the host's is write-back");
            (true, marks)
        }
        Answer::Exit(exit) => {
            assert_eq!(outcome, exit, "{format:?} {tried:#x}");
            (false, vec![])
        }
    };
    // Exactly those bits are set that the processor sets, and nothing else is written.
    let after = machine.pages.borrow().clone();
    machine.pages.replace(before);
    for (at, bits) in marks {
        machine.set(at, machine.get(at) | bits);
    }
    assert!(*machine.pages.borrow() == after, "{format:?} {tried:#x}: other bits were marked");
    passed
}

#[test]
fn mutated_tables_behave_as_the_naive_walk_says() {
    let mut random = Random(7);
    let mut shadows: Vec<_> = (0..24)
        .map(|n| {
            let format = EptFormat {
                execute_only: n & 1 == 0,
                pages_1g: n & 2 == 0,
                pages_2m: n % 24 < 20,
                physical_bits: [36, 40, 48, 52][n >> 2 & 3],
                ..FORMAT
            };
            EptShadow::new(pool(8), 4, format).unwrap()
        })
        .collect();
    for eptp in [PLAIN, FLAGS] {
        let mut passed = 0;
        for n in 0..6_000 {
            passed += usize::from(one(eptp, n, &mut random, &mut shadows));
        }
        assert!((1_000..5_000).contains(&passed), "{eptp:#x}: both outcomes are seen, {passed}");
    }
}
