//! Mutated tables against a naive walk that knows reserved bits, accessed and dirty bits and error codes.

use nsvm::npt::{NptFormat, NptOutcome, NptShadow, PagingMode};

use crate::machine::*;
use crate::sequence::Random;

const GPA: u64 = 0x4060_7ABC;

const fn range(high: u32, low: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// What the naive walk says: where the access ends and what it marks, or EXITINFO1 bits 3 and 0.
struct Answer {
    ends: Result<u64, u64>,
    marks: Vec<(u64, u64)>,
}

/// Reserved bits by format, level and page size bit, and whether the entry maps a page.
fn kind(format: NptFormat, level: u8, entry: u64) -> (u64, bool) {
    let large = entry & PS != 0;
    let high = if format.phys_bits > 51 { 0 } else { range(51, u32::from(format.phys_bits)) };
    let nx = if format.nxe { 0 } else { NX };
    match (format.mode, level) {
        (PagingMode::Legacy, 1) => (0, true),
        (PagingMode::Legacy, _) if large && format.pse => {
            let above = if format.phys_bits >= 40 { 0 } else { range(20, u32::from(format.phys_bits) - 19) };
            (1 << 21 | above, true)
        }
        (PagingMode::Legacy, _) => (0, false),
        (PagingMode::Pae, 3) => (high | range(63, 52) | range(8, 5) | range(2, 1), false),
        (PagingMode::Pae, 2) => (high | range(62, 52) | nx | if large { range(20, 13) } else { 0 }, large),
        (PagingMode::Pae, _) => (high | range(62, 52) | nx, true),
        (_, 1) => (high | nx, true),
        (_, 2) => (high | nx | if large { range(20, 13) } else { 0 }, large),
        (_, 3) if large && format.gib_pages => (high | nx | range(29, 13), true),
        (_, 3) => (high | nx | range(8, 7), false),
        _ => (high | nx | range(8, 7), false),
    }
}

fn naive(machine: &Machine, format: NptFormat, error: u64) -> Answer {
    let legacy = format.entry_bytes() == 4;
    let index_bits = if legacy { 10 } else { 9 };
    let mut table = TOP;
    let (mut user, mut write, mut execute) = (true, true, true);
    let mut passed = Vec::new();
    for level in (1..=format.levels()).rev() {
        let shift = 12 + index_bits * (u32::from(level) - 1);
        let at = slot(format, table, level, GPA);
        let backed = machine.pages.borrow().contains_key(&(at & !0xFFF));
        let ones = if legacy { 0xFFFF_FFFF } else { u64::MAX };
        let entry = if backed { machine.get_entry(format, at) } else { ones };
        let (reserved, leaf) = kind(format, level, entry);
        if entry & P == 0 {
            return Answer { ends: Err(0), marks: vec![] };
        }
        if entry & reserved != 0 {
            return Answer { ends: Err(9), marks: vec![] };
        }
        if format.mode != PagingMode::Pae || level != 3 {
            user &= entry & U != 0;
            write &= entry & W != 0;
            execute &= legacy || entry & NX == 0;
            if backed {
                passed.push((at, A));
            }
        }
        let address = if legacy { entry & 0xFFFF_F000 } else { entry & range(51, 12) };
        if !leaf {
            table = address;
            continue;
        }
        let refused = !user || (error & 2 != 0 && !write) || (error & 0x10 != 0 && !execute);
        if refused {
            return Answer { ends: Err(1), marks: vec![] };
        }
        if error & 2 != 0 && backed {
            passed.last_mut().unwrap().1 |= D;
        }
        let start = if legacy && level == 2 { (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32 } else { address };
        let offset = (1 << shift) - 1;
        return Answer { ends: Ok((start & !offset) | (GPA & offset)), marks: passed };
    }
    unreachable!("level 1 is a leaf")
}

fn one(format: NptFormat, random: &mut Random, shadow: &mut NptShadow<'_>) -> bool {
    let machine = Machine::new();
    shadow.flush_everything();
    shadow.activate(context(format));
    machine.largest.set(Some(hvcore::shadow::PageSize::Size4K));
    let large = if format.gib_pages && format.levels() > 3 { 3 } else { 2 };
    let level = 1 + random.below(large) as u8;
    machine.map(format, GPA & !0xFFF, 0x8000_0000, level, ALL | D);
    // Up to three bits somewhere on the way; bits of the entries' flags more often than others.
    for _ in 0..random.below(4) {
        let mut table = TOP;
        let target = level + random.below(u64::from(format.levels() - level) + 1) as u8;
        for above in (target + 1..=format.levels()).rev() {
            table = machine.get_entry(format, slot(format, table, above, GPA)) & range(51, 12);
            if !machine.pages.borrow().contains_key(&table) {
                return false;
            }
        }
        let at = slot(format, table, target, GPA);
        let bit = if random.below(2) == 0 { random.below(9) } else { random.below(format.entry_bytes() * 8) };
        machine.set_entry(format, at, machine.get_entry(format, at) ^ 1 << bit);
    }
    let error = [READ, WRITE, FETCH][random.below(3) as usize] | [FINAL, TABLE][random.below(2) as usize];
    let before = machine.pages.borrow().clone();
    let answer = naive(&machine, format, error);
    let outcome = fault(shadow, &machine, GPA, error);
    match answer.ends {
        Ok(l1) => {
            assert_eq!(outcome, NptOutcome::Resume, "{format:?} {error:#x}");
            let (entry, _) = lookup(shadow, GPA).unwrap();
            assert_eq!(entry & range(51, 12), (HOST + l1) & range(51, 12), "{format:?} {error:#x}");
        }
        Err(found) => {
            let fetch = if format.nxe && format.entry_bytes() == 8 { 0x10 } else { 0 };
            let info1 = (error & (FINAL | TABLE | 2 | fetch)) | 4 | found;
            assert_eq!(outcome, NptOutcome::Reflect { info1, info2: GPA }, "{format:?} {error:#x}");
        }
    }
    // Exactly those bits are set that the processor sets, and nothing else is written.
    let after = machine.pages.borrow().clone();
    machine.pages.replace(before);
    for (at, bits) in answer.marks {
        machine.set_entry(format, at, machine.get_entry(format, at) | bits);
    }
    assert!(*machine.pages.borrow() == after, "{format:?} {error:#x}: other bits were marked");
    answer.ends.is_ok()
}

#[test]
fn mutated_tables_behave_as_the_naive_walk_says() {
    let mut random = Random(7);
    let mut shadow = shadow(8);
    for base in [LONG, LONG5, PAE, LEGACY, NptFormat { mode: PagingMode::Legacy, ..LONG }] {
        let mut passed = 0;
        for n in 0..4_000 {
            let format =
                NptFormat { nxe: n & 1 == 0, gib_pages: n & 2 == 0, phys_bits: [36, 40, 48, 52][n >> 2 & 3], ..base };
            passed += usize::from(one(format, &mut random, &mut shadow));
        }
        assert!((500..3_500).contains(&passed), "{base:?}: both outcomes are seen, {passed}");
    }
}
