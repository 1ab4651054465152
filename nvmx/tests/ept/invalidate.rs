//! What each invalidation drops, what it leaves, and when it asks for INVEPT.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::shadow::{L1Change, PageSize, TagFlush};
use nvmx::ept::{EptOutcome, EptShadow};

use crate::machine::*;

const PAGE: u64 = 0x20_3000;
const OTHER: u64 = 0x50_0000;
/// Two pointers to the same tables, one to others.
const POINTERS: [u64; 3] = [PLAIN, FLAGS, OTHER | 0x1E];

/// Roots for all three pointers; the first is active.
fn three() -> (Machine, EptShadow<'static>) {
    let (machine, mut shadow) = start(PLAIN);
    machine.largest.set(Some(PageSize::Size4K));
    machine.back(OTHER);
    for (eptp, page) in [(PLAIN, 0), (PLAIN, 0x1000), (POINTERS[2], 0), (POINTERS[2], 0x1000)] {
        machine.map(eptp, PAGE + page, 0x7_5000 + page, 1, ALL | D);
    }
    for eptp in POINTERS.into_iter().rev() {
        shadow.activate(eptp);
        for page in [PAGE, PAGE + 0x1000] {
            assert_eq!(fault(&mut shadow, &machine, page, READ | FINAL), EptOutcome::Resume);
        }
    }
    shadow.tag_retired();
    (machine, shadow)
}

/// Which of the pointers' roots still map `page`.
fn left(shadow: &mut EptShadow<'_>, page: u64) -> [bool; 3] {
    POINTERS.map(|eptp| {
        shadow.activate(eptp);
        lookup(shadow, page).is_some()
    })
}

#[test]
fn roots_are_cached_and_each_switch_asks_for_invept() {
    let (_, mut shadow) = three();
    let first = shadow.activate(PLAIN);
    assert!(!shadow.tag_stale(), "the active root again");
    let second = shadow.activate(FLAGS);
    assert!(shadow.tag_stale());
    assert_ne!(first & ADDRESS, second & ADDRESS);
    shadow.tag_retired();
    assert_eq!(shadow.activate(PLAIN), first);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [true; 3]);
}

#[test]
fn the_least_recently_used_root_makes_way() {
    for (kept, eptp) in [(true, POINTERS[2]), (true, PLAIN), (false, FLAGS)] {
        let (_, mut shadow) = three();
        shadow.activate(POINTERS[2]);
        shadow.activate(PLAIN);
        // The fourth place is free; the fifth root displaces that of FLAGS.
        shadow.activate(0x60_001E);
        shadow.activate(0x70_001E);
        shadow.activate(eptp);
        assert_eq!(lookup(&shadow, PAGE).is_some(), kept, "{eptp:#x}");
    }
}

#[test]
fn leaving_ept_asks_for_invept_and_keeps_the_tables() {
    let (machine, mut shadow) = three();
    shadow.deactivate();
    assert!(shadow.tag_stale());
    assert_eq!(shadow.active(), None);
    assert_eq!(violated(fault(&mut shadow, &machine, PAGE, READ | FINAL)), 0x181, "no root to fill");
    shadow.tag_retired();
    shadow.deactivate();
    assert!(!shadow.tag_stale(), "there was no root to leave");
    assert_eq!(left(&mut shadow, PAGE), [true; 3]);
}

#[test]
fn invept_of_a_context_goes_by_ep4ta() {
    for (eptp, flush, expected) in [
        (PLAIN, TagFlush::Needed, [false, false, true]),
        // Memory type, walk length and the flags are no part of the tag.
        (TOP, TagFlush::Needed, [false, false, true]),
        (FLAGS, TagFlush::Needed, [false, false, true]),
        (OTHER | 0x5E, TagFlush::NotNeeded, [true, true, false]),
        (0x60_001E, TagFlush::NotNeeded, [true; 3]),
    ] {
        let (_, mut shadow) = three();
        assert_eq!(shadow.flush_context(eptp), flush, "{eptp:#x}");
        assert_eq!(shadow.tag_stale(), flush == TagFlush::Needed);
        assert_eq!(left(&mut shadow, PAGE), expected, "{eptp:#x}");
    }
}

#[test]
fn invept_of_all_contexts_drops_all() {
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_everything(), TagFlush::Needed);
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
}

#[test]
fn the_top_table_stays_where_it_is_while_its_root_is_active() {
    let (machine, mut shadow) = three();
    let eptp02 = shadow.activate(PLAIN);
    shadow.flush_context(PLAIN);
    assert_eq!(shadow.activate(PLAIN), eptp02);
    assert_eq!(fault(&mut shadow, &machine, PAGE, READ | FINAL), EptOutcome::Resume);
    assert!(lookup(&shadow, PAGE).is_some());
}

#[test]
fn gpa_list_flushes_drop_the_range_and_nothing_else() {
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_gpa_range(PLAIN, L2Gpa::new(PAGE), 0x1000), TagFlush::Needed);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [false, false, true]);
    assert_eq!(left(&mut shadow, PAGE + 0x1000), [true; 3]);
    shadow.activate(PLAIN);
    assert_eq!(shadow.flush_gpa_range(POINTERS[2], L2Gpa::new(PAGE + 0x1000), 0x1000), TagFlush::NotNeeded);
    assert_eq!(left(&mut shadow, PAGE + 0x1000), [true, true, false]);
}

#[test]
fn gpa_ranges_of_every_shape_are_bounded_work() {
    for (start, bytes, expected) in [
        (0, u64::MAX, false),
        (PAGE, u64::MAX, false),
        (PAGE + 0xFFF, 1, false),
        (PAGE - 1, 2, false),
        (PAGE - 1, 1, true),
        (PAGE, 0, true),
        (PAGE + 0x1000, u64::MAX, true),
        (1 << 48, u64::MAX, true),
        (u64::MAX, u64::MAX, true),
    ] {
        let (_, mut shadow) = three();
        shadow.flush_gpa_range(PLAIN, L2Gpa::new(start), bytes);
        assert_eq!(left(&mut shadow, PAGE), [expected, expected, true], "{start:#x} {bytes:#x}");
    }
}

#[test]
fn unmapping_l1_memory_drops_its_leaves_in_every_root() {
    let (_, mut shadow) = three();
    for miss in [(0x7_4000, 0x1000), (0x7_7000, u64::MAX), (0, 0x7_5000), (0x7_5000, 0)] {
        assert_eq!(shadow.l1_gpa_changed(L1Gpa::new(miss.0), miss.1, L1Change::WriteProtect), TagFlush::NotNeeded);
    }
    assert!(!shadow.tag_stale());
    assert_eq!(shadow.l1_gpa_changed(L1Gpa::new(0x7_5FFF), 1, L1Change::Unmap), TagFlush::Needed);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
    assert_eq!(left(&mut shadow, PAGE + 0x1000), [true; 3]);
}

#[test]
fn write_protection_takes_the_write_right_only() {
    for level in [1, 2, 3] {
        let (machine, mut shadow) = start(FLAGS);
        let at = machine.map(FLAGS, 0x4000_0000, 0x8000_0000, level, ALL | D);
        assert_eq!(fault(&mut shadow, &machine, 0x4000_0000, WRITE | FINAL), EptOutcome::Resume);
        let (entry, size) = lookup(&shadow, 0x4000_0000).unwrap();
        let last = 0x8000_0000 + size.bytes() - 1;
        assert_eq!(shadow.l1_gpa_changed(L1Gpa::new(last), 1, L1Change::WriteProtect), TagFlush::Needed);
        assert_eq!(lookup(&shadow, 0x4000_0000), Some((entry & !(W | D), size)));
        // L1's own dirty flag is L1's: the embedder's log has no say in it.
        assert_ne!(machine.get(at) & D, 0);
    }
}

/// Dirty logging: each page is reported once per round, by the first write, and by nothing else.
#[test]
fn dirty_logging_sees_each_written_page_once_per_round() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, 0x4000_0000, 0x8000_0000, 2, ALL);
    let page = |n: u64| 0x8000_0000 + n * 0x1000;
    for _ in 0..3 {
        // A new round: the embedder write-protects by 4 KiB pages.
        for n in 0..4 {
            machine.protect(page(n), small(HOST + page(n), false, true));
        }
        shadow.l1_gpa_changed(L1Gpa::new(page(0)), 0x4000, L1Change::WriteProtect);
        let mut logged = Vec::new();
        for (n, tried) in [(0, READ), (1, WRITE), (1, WRITE), (2, FETCH), (3, READ), (3, WRITE), (0, READ)] {
            let gpa = 0x4000_0000 + n * 0x1000;
            // L2 runs until the access is allowed by the shadow; a violation of another kind would not end.
            for _ in 0..3 {
                if lookup(&shadow, gpa).is_some_and(|(entry, _)| entry & tried != 0) {
                    break;
                }
                if let EptOutcome::Embedder(access) = fault(&mut shadow, &machine, gpa, tried | FINAL) {
                    logged.push(access.l1.raw());
                    machine.protect(access.l1.raw(), small(HOST + access.l1.page().raw(), true, true));
                }
            }
            assert!(lookup(&shadow, gpa).is_some_and(|(entry, _)| entry & tried != 0));
        }
        assert_eq!(logged, [page(1), page(3)]);
    }
}

#[test]
fn unmapping_memory_that_holds_l1s_tables_drops_the_root() {
    for eptp in [PLAIN, FLAGS] {
        for level in 1..=4 {
            let (machine, mut shadow) = start(eptp);
            machine.map(eptp, PAGE, 0x7_5000, 1, ALL);
            fault(&mut shadow, &machine, PAGE, READ | FINAL);
            let table = L1Gpa::new(machine.entry(eptp, PAGE, level) & !0xFFF);
            assert_eq!(shadow.l1_gpa_changed(table, 0x1000, L1Change::WriteProtect), TagFlush::NotNeeded);
            assert!(lookup(&shadow, PAGE).is_some(), "its contents are what they were");
            assert_eq!(shadow.l1_gpa_changed(table, 0x1000, L1Change::Unmap), TagFlush::Needed, "{eptp:#x} {level}");
            assert_eq!(lookup(&shadow, PAGE), None);
        }
    }
}

/// An entry that maps elsewhere than a cached one makes the tag stale; one that only adds rights does not.
#[test]
fn a_moved_page_makes_the_tag_stale() {
    let (machine, mut shadow) = start(PLAIN);
    machine.largest.set(Some(PageSize::Size4K));
    let at = machine.map(PLAIN, PAGE, 0x7_5000, 1, R | WB);
    let mut go = |entry: u64, tried| {
        machine.set(at, entry);
        shadow.tag_retired();
        assert_eq!(fault(&mut shadow, &machine, PAGE, tried | FINAL), EptOutcome::Resume);
        shadow.tag_stale()
    };
    assert!(!go(0x7_5000 | R | WB, READ), "new");
    assert!(!go(0x7_5000 | R | WB, READ), "the same");
    assert!(!go(0x7_5000 | R | W | WB, WRITE), "writable now");
    assert!(!go(0x7_5000 | ALL, FETCH), "executable now");
    assert!(go(0x7_5000 | R | W | WB, READ), "no longer executable");
    assert!(go(0x7_5000 | R | X | WB, READ), "no longer writable");
    assert!(go(0x7_5000 | X | WB, FETCH), "no longer readable");
    assert!(!go(0x7_5000 | R | X | WB, READ), "readable now");
    assert!(go(0x7_6000 | R | X | WB, READ), "moved");
    assert!(go(0x7_6000 | R | X, READ), "cached otherwise");
    assert!(go(0x7_6000 | R | X | IPAT, READ), "without the PAT");
}

/// A large page whose middle becomes a small one of the embedder's is split, and the tag with it.
#[test]
fn a_large_page_is_split_when_the_embedder_splits_it() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, 0x4000_0000, 0x8000_0000, 3, ALL);
    fault(&mut shadow, &machine, 0x4000_0000, READ | FINAL);
    assert_eq!(lookup(&shadow, 0x4000_0000).unwrap().1, PageSize::Size1G);
    machine.protect(0x8000_5000, small(HOST + 0x8000_5000, false, true));
    fault(&mut shadow, &machine, 0x4000_5000, READ | FINAL);
    assert!(shadow.tag_stale());
    assert_eq!(lookup(&shadow, 0x4000_5000), Some(((HOST + 0x8000_5000) | R | X | WB | A, PageSize::Size4K)));
    assert_eq!(lookup(&shadow, 0x4000_4000), None);
}
