//! What each invalidation drops, what it leaves, and when it asks for a fresh hardware tag.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::shadow::{L1Change, PageSize, TagFlush};
use nsvm::npt::{NptContext, NptOutcome, NptShadow};

use crate::machine::*;

const PAGE: u64 = 0x20_3000;

/// Three contexts: ASIDs 1 and 2 on the same tables, and the enlightened NPT TLB's on them. ASID 1 is active.
fn three() -> (Machine, NptShadow<'static>) {
    let (machine, mut shadow) = start(LONG);
    machine.largest.set(Some(PageSize::Size4K));
    machine.map(LONG, PAGE, 0x7_5000, 1, ALL | D);
    machine.map(LONG, PAGE + 0x1000, 0x7_6000, 1, ALL | D);
    for asid in [0, 2, 1] {
        shadow.activate(with_asid(asid));
        for page in [PAGE, PAGE + 0x1000] {
            assert_eq!(fault(&mut shadow, &machine, page, READ | FINAL), NptOutcome::Resume);
        }
    }
    shadow.tag_retired();
    (machine, shadow)
}

fn with_asid(asid: u32) -> NptContext {
    NptContext { asid, ..context(LONG) }
}

/// Which of the contexts with ASIDs 1, 2 and 0 still map `page`.
fn left(shadow: &mut NptShadow<'_>, page: u64) -> [bool; 3] {
    [1, 2, 0].map(|asid| {
        shadow.activate(with_asid(asid));
        lookup(shadow, page).is_some()
    })
}

#[test]
fn contexts_are_cached_and_each_switch_retires_the_tag() {
    let (_, mut shadow) = three();
    let first = shadow.activate(with_asid(1));
    assert!(!shadow.tag_stale(), "the active context again");
    let second = shadow.activate(with_asid(2));
    assert!(shadow.tag_stale());
    assert_ne!(first, second);
    shadow.tag_retired();
    assert_eq!(shadow.activate(with_asid(1)), first);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [true; 3]);
}

#[test]
fn every_part_of_the_context_counts() {
    let (_, mut shadow) = three();
    for other in [
        with_asid(3),
        NptContext { ncr3: TOP + 0x1000, ..with_asid(1) },
        NptContext { format: PAE, ..with_asid(1) },
        NptContext { format: nsvm::npt::NptFormat { nxe: false, ..LONG }, ..with_asid(1) },
    ] {
        shadow.activate(with_asid(1));
        shadow.tag_retired();
        shadow.activate(other);
        assert!(shadow.tag_stale(), "{other:?}");
        assert_eq!(lookup(&shadow, PAGE), None, "{other:?}");
    }
}

#[test]
fn the_least_recently_used_context_makes_way() {
    for (asid, kept) in [(0, true), (1, true), (2, false)] {
        let (_, mut shadow) = three();
        shadow.activate(with_asid(0));
        // The fourth place is free; the fifth context displaces ASID 2.
        shadow.activate(with_asid(4));
        shadow.activate(with_asid(5));
        shadow.activate(with_asid(asid));
        assert_eq!(lookup(&shadow, PAGE).is_some(), kept, "ASID {asid}");
    }
}

#[test]
fn leaving_nested_paging_retires_the_tag_and_keeps_the_tables() {
    let (_, mut shadow) = three();
    shadow.deactivate();
    assert!(shadow.tag_stale());
    assert_eq!(shadow.context(), None);
    shadow.tag_retired();
    shadow.deactivate();
    assert!(!shadow.tag_stale(), "there was no context to leave");
    assert_eq!(left(&mut shadow, PAGE), [true; 3]);
}

#[test]
fn asid_flushes_drop_what_the_asid_derived() {
    for (asid, flush, expected) in [
        (1, TagFlush::Needed, [false, true, true]),
        (2, TagFlush::NotNeeded, [true, false, true]),
        // The enlightened contexts have no ASID; L1 cannot name ASID 0, and it must not reach them.
        (0, TagFlush::NotNeeded, [true; 3]),
        (9, TagFlush::NotNeeded, [true; 3]),
    ] {
        let (_, mut shadow) = three();
        assert_eq!(shadow.flush_asid(asid), flush);
        assert_eq!(shadow.tag_stale(), flush == TagFlush::Needed);
        assert_eq!(left(&mut shadow, PAGE), expected, "ASID {asid}");
    }
}

#[test]
fn flushing_all_asids_leaves_the_enlightened_contexts() {
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_all_asids(), TagFlush::Needed);
    assert_eq!(left(&mut shadow, PAGE), [false, false, true]);
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_everything(), TagFlush::Needed);
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
}

#[test]
fn the_top_table_stays_where_it_is_while_its_context_is_active() {
    let (machine, mut shadow) = three();
    let top = shadow.activate(with_asid(1));
    shadow.flush_asid(1);
    assert_eq!(shadow.activate(with_asid(1)), top);
    assert_eq!(fault(&mut shadow, &machine, PAGE, READ | FINAL), NptOutcome::Resume);
    assert!(lookup(&shadow, PAGE).is_some());
}

#[test]
fn address_space_flushes_go_by_ncr3_for_every_asid() {
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_address_space(TOP + 0x1000), TagFlush::NotNeeded);
    assert_eq!(left(&mut shadow, PAGE), [true; 3]);
    shadow.activate(with_asid(1));
    shadow.tag_retired();
    // Bits that the format ignores do not hide the address space.
    assert_eq!(shadow.flush_address_space(TOP | 0x18), TagFlush::Needed);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
}

#[test]
fn gpa_list_flushes_drop_the_range_and_nothing_else() {
    let (_, mut shadow) = three();
    assert_eq!(shadow.flush_gpa_range(TOP, L2Gpa::new(PAGE), 0x1000), TagFlush::Needed);
    assert!(shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
    assert_eq!(left(&mut shadow, PAGE + 0x1000), [true; 3]);
    assert_eq!(shadow.flush_gpa_range(TOP + 0x1000, L2Gpa::new(PAGE + 0x1000), 0x1000), TagFlush::NotNeeded);
    assert_eq!(left(&mut shadow, PAGE + 0x1000), [true; 3]);
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
        (0x20_0000, 0x20_0000, false),
        (0x40_0000, 0x20_0000, true),
    ] {
        let (_, mut shadow) = three();
        shadow.flush_gpa_range(TOP, L2Gpa::new(start), bytes);
        assert_eq!(left(&mut shadow, PAGE), [expected; 3], "{start:#x} {bytes:#x}");
    }
}

#[test]
fn a_range_that_touches_a_large_page_drops_it_whole() {
    for (level, size) in [(2, PageSize::Size2M), (3, PageSize::Size1G)] {
        let (machine, mut shadow) = start(LONG);
        machine.map(LONG, 0x4000_0000, 0x8000_0000, level, ALL | D);
        fault(&mut shadow, &machine, 0x4000_0000, READ | FINAL);
        assert_eq!(lookup(&shadow, 0x4000_0000).unwrap().1, size);
        shadow.flush_gpa_range(TOP, L2Gpa::new(0x4000_0000 + size.bytes()), 0x1000);
        assert!(lookup(&shadow, 0x4000_0000).is_some());
        shadow.flush_gpa_range(TOP, L2Gpa::new(0x4000_5000), 0x1000);
        assert_eq!(lookup(&shadow, 0x4000_0000), None);
    }
}

#[test]
fn unmapping_l1_memory_drops_its_leaves_in_every_context() {
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
fn a_change_seen_only_by_cached_contexts_needs_no_flush() {
    let (_, mut shadow) = three();
    shadow.activate(with_asid(7));
    shadow.tag_retired();
    assert_eq!(shadow.l1_gpa_changed(L1Gpa::new(0x7_5000), 0x1000, L1Change::Unmap), TagFlush::NotNeeded);
    assert!(!shadow.tag_stale());
    assert_eq!(left(&mut shadow, PAGE), [false; 3]);
}

#[test]
fn write_protection_takes_the_write_right_only() {
    for level in [1, 2, 3] {
        let (machine, mut shadow) = start(LONG);
        let at = machine.map(LONG, 0x4000_0000, 0x8000_0000, level, ALL | D);
        assert_eq!(fault(&mut shadow, &machine, 0x4000_0000, WRITE | FINAL), NptOutcome::Resume);
        let (entry, size) = lookup(&shadow, 0x4000_0000).unwrap();
        let last = 0x8000_0000 + size.bytes() - 1;
        assert_eq!(shadow.l1_gpa_changed(L1Gpa::new(last), 1, L1Change::WriteProtect), TagFlush::Needed);
        assert_eq!(lookup(&shadow, 0x4000_0000), Some((entry & !(W | D), size)));
        // L1's own dirty bit is L1's: the embedder's log has no say in it.
        assert_ne!(machine.get(at) & D, 0);
    }
}

/// Dirty logging: each page is reported once per round, by the first write, and by nothing else.
#[test]
fn dirty_logging_sees_each_written_page_once_per_round() {
    let (machine, mut shadow) = start(LONG);
    machine.map(LONG, 0x4000_0000, 0x8000_0000, 2, ALL | D);
    let page = |n: u64| 0x8000_0000 + n * 0x1000;
    for _ in 0..3 {
        // A new round: the embedder write-protects by 4 KiB pages.
        for n in 0..4 {
            machine.protect(page(n), small(HOST + page(n), false, true));
        }
        shadow.l1_gpa_changed(L1Gpa::new(page(0)), 0x4000, L1Change::WriteProtect);
        let mut logged = Vec::new();
        for (n, error) in [(0, READ), (1, WRITE), (1, WRITE), (2, FETCH), (3, READ), (3, WRITE), (0, READ)] {
            let gpa = 0x4000_0000 + n * 0x1000;
            let wanted = if error == WRITE { W } else { P };
            // L2 runs until the access is allowed by the shadow; a fault of another kind would not end.
            for _ in 0..3 {
                if lookup(&shadow, gpa).is_some_and(|(entry, _)| entry & wanted != 0) {
                    break;
                }
                if let NptOutcome::Embedder(access) = fault(&mut shadow, &machine, gpa, error | FINAL) {
                    logged.push(access.l1.raw());
                    machine.protect(access.l1.raw(), small(HOST + access.l1.page().raw(), true, true));
                }
            }
            assert!(lookup(&shadow, gpa).is_some_and(|(entry, _)| entry & wanted != 0));
        }
        assert_eq!(logged, [page(1), page(3)]);
    }
}

#[test]
fn unmapping_memory_that_holds_l1s_tables_drops_the_context() {
    for format in [LONG, PAE, LEGACY] {
        for level in 1..=format.levels() {
            let (machine, mut shadow) = start(format);
            machine.map(format, PAGE, 0x7_5000, 1, ALL | D);
            fault(&mut shadow, &machine, PAGE, READ | FINAL);
            let mut table = TOP;
            for above in (level + 1..=format.levels()).rev() {
                table = machine.get_entry(format, slot(format, table, above, PAGE)) & 0x000F_FFFF_FFFF_F000;
            }
            let table = L1Gpa::new(table);
            assert_eq!(shadow.l1_gpa_changed(table, 0x1000, L1Change::WriteProtect), TagFlush::NotNeeded);
            assert!(lookup(&shadow, PAGE).is_some(), "its contents are what they were");
            assert_eq!(shadow.l1_gpa_changed(table, 0x1000, L1Change::Unmap), TagFlush::Needed, "{format:?} {level}");
            assert_eq!(lookup(&shadow, PAGE), None);
        }
    }
}

/// An entry that maps elsewhere than a cached one makes the tag stale; one that only adds rights does not.
#[test]
fn a_moved_page_makes_the_tag_stale() {
    let (machine, mut shadow) = start(LONG);
    machine.largest.set(Some(PageSize::Size4K));
    let at = machine.map(LONG, PAGE, 0x7_5000, 1, P | U | NX);
    let mut go = |entry: u64, error| {
        machine.set(at, entry);
        shadow.tag_retired();
        assert_eq!(fault(&mut shadow, &machine, PAGE, error | FINAL), NptOutcome::Resume);
        shadow.tag_stale()
    };
    assert!(!go(0x7_5000 | P | U | NX, READ), "new");
    assert!(!go(0x7_5000 | P | U | NX, READ), "the same");
    assert!(!go(0x7_5000 | ALL | NX, WRITE), "writable now");
    assert!(!go(0x7_5000 | ALL | D, FETCH), "executable now");
    assert!(go(0x7_5000 | ALL | D | NX, READ), "no longer executable");
    assert!(go(0x7_5000 | P | U | NX, READ), "no longer writable");
    assert!(go(0x7_6000 | P | U | NX, READ), "moved");
    assert!(go(0x7_6000 | P | U | NX | PCD, READ), "cached otherwise");
}

/// A large page whose middle becomes a small one of the embedder's is split, and the tag with it.
#[test]
fn a_large_page_is_split_when_the_embedder_splits_it() {
    let (machine, mut shadow) = start(LONG);
    machine.map(LONG, 0x4000_0000, 0x8000_0000, 3, ALL | D);
    fault(&mut shadow, &machine, 0x4000_0000, READ | FINAL);
    assert_eq!(lookup(&shadow, 0x4000_0000).unwrap().1, PageSize::Size1G);
    machine.protect(0x8000_5000, small(HOST + 0x8000_5000, false, true));
    fault(&mut shadow, &machine, 0x4000_5000, READ | FINAL);
    assert!(shadow.tag_stale());
    assert_eq!(lookup(&shadow, 0x4000_5000), Some(((HOST + 0x8000_5000) | P | U | A, PageSize::Size4K)));
    assert_eq!(lookup(&shadow, 0x4000_4000), None);
    // Whole again: pages stay as small as the tables in place.
    machine.special.borrow_mut().clear();
    shadow.tag_retired();
    fault(&mut shadow, &machine, 0x4000_5000, WRITE | FINAL);
    assert_eq!(lookup(&shadow, 0x4000_5000), Some(((HOST + 0x8000_5000) | ALL | A | D, PageSize::Size4K)));
    fault(&mut shadow, &machine, 0x4020_0000, WRITE | FINAL);
    assert_eq!(lookup(&shadow, 0x4020_0000).unwrap().1, PageSize::Size2M);
}
