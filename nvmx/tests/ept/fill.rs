//! What a violation fills in: addresses, page sizes, rights, memory types, dirty tracking, the pool's bounds.

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{Access, SecondStage};
use hvcore::shadow::{PagePool, PageRecord, PageSize, ShadowError, ShadowPage};
use nvmx::ept::{CachedWalk, Cause, EptOutcome, EptShadow, EptWalk, L1Access};

use crate::machine::*;

#[test]
fn without_flags_a_writable_page_is_filled_writable() {
    for q in [READ, WRITE, FETCH] {
        let (machine, mut shadow) = start(PLAIN);
        machine.largest.set(Some(PageSize::Size4K));
        let at = machine.map(PLAIN, 0x20_3000, 0x7_5000, 1, ALL);
        assert_eq!(lookup(&shadow, 0x20_3000), None);
        assert_eq!(fault(&mut shadow, &machine, 0x20_3123, q | FINAL), EptOutcome::Resume);
        assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | ALL | A | D, PageSize::Size4K)));
        assert_eq!(machine.get(at), 0x7_5000 | ALL, "L1 asked for no flags");
        assert!(!shadow.tag_stale(), "a new entry makes nothing stale");
    }
}

#[test]
fn a_clean_page_becomes_writable_with_the_write_that_dirties_it() {
    for eptp in [FLAGS] {
        for write in [WRITE | FINAL, READ | WRITE | TABLE] {
            let (machine, mut shadow) = start(eptp);
            machine.largest.set(Some(PageSize::Size4K));
            let at = machine.map(eptp, 0x20_3000, 0x7_5000, 1, ALL);
            assert_eq!(fault(&mut shadow, &machine, 0x20_3123, READ | FINAL), EptOutcome::Resume);
            assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | R | X | WB | A, PageSize::Size4K)));
            assert_eq!(machine.get(at), 0x7_5000 | ALL | A, "a read does not dirty");
            assert_eq!(fault(&mut shadow, &machine, 0x20_3123, write), EptOutcome::Resume);
            assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | ALL | A | D, PageSize::Size4K)));
            assert_eq!(machine.get(at), 0x7_5000 | ALL | A | D);
            assert!(!shadow.tag_stale(), "more rights make nothing stale");
        }
    }
}

#[test]
fn accessed_flags_are_set_at_every_level() {
    for (eptp, flags) in [(FLAGS, true), (PLAIN, false)] {
        let (machine, mut shadow) = start(eptp);
        machine.map(eptp, 0x4020_3000, 0x7_5000, 1, ALL);
        assert_eq!(fault(&mut shadow, &machine, 0x4020_3000, FETCH | FINAL), EptOutcome::Resume);
        for level in 1..=4 {
            let entry = machine.get(machine.entry(eptp, 0x4020_3000, level));
            assert_eq!(entry & (A | D), if flags { A } else { 0 }, "{eptp:#x} level {level}");
        }
    }
}

/// L1's page size, the embedder's, and the shadow's.
#[test]
fn the_shadow_page_is_the_smaller_of_both() {
    use PageSize::{Size1G, Size2M, Size4K};
    for (level, largest, expected) in [
        (3, Size1G, Size1G),
        (3, Size2M, Size2M),
        (3, Size4K, Size4K),
        (2, Size1G, Size2M),
        (2, Size2M, Size2M),
        (2, Size4K, Size4K),
        (1, Size1G, Size4K),
    ] {
        let (machine, mut shadow) = start(PLAIN);
        machine.largest.set(Some(largest));
        // Odd multiples, so that every address bit is seen to come from the right stage.
        let (l2, l1) = (0x4060_7000, 0xC0A0_3000);
        let in_page = [0, 0x1F_F000, 0x3FFF_F000][usize::from(level) - 1];
        machine.map(PLAIN, l2 & !in_page, l1 & !in_page, level, ALL);
        assert_eq!(fault(&mut shadow, &machine, l2, WRITE | FINAL), EptOutcome::Resume);
        let (entry, size) = lookup(&shadow, l2).unwrap();
        assert_eq!(size, expected, "{level}");
        let at = (entry & ADDRESS) + (l2 & size.offset_mask());
        assert_eq!(at, HOST + (l1 & !in_page) + (l2 & in_page), "{level} {largest:?}");
        assert_eq!(entry & PS != 0, expected != Size4K);
    }
}

#[test]
fn rights_are_those_that_both_stages_give() {
    for (l1_bits, writable, executable, expected) in [
        (RWX, true, true, RWX | D),
        (RWX, false, true, R | X),
        (RWX, true, false, R | W | D),
        (R, true, true, R),
        (R | W, true, true, R | W | D),
        (R | X, false, false, R),
    ] {
        let (machine, mut shadow) = start(PLAIN);
        machine.map(PLAIN, 0x20_3000, 0x7_5000, 1, l1_bits | WB);
        machine.protect(0x7_5000, small(HOST + 0x7_5000, writable, executable));
        assert_eq!(fault(&mut shadow, &machine, 0x20_3000, READ | FINAL), EptOutcome::Resume);
        let entry = (HOST + 0x7_5000) | WB | A | expected;
        assert_eq!(lookup(&shadow, 0x20_3000), Some((entry, PageSize::Size4K)), "{l1_bits:#x}");
    }
}

#[test]
fn execute_only_pages_stay_so() {
    let (machine, mut shadow) = start(PLAIN);
    machine.map(PLAIN, 0x20_3000, 0x7_5000, 1, X | WB);
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, FETCH | FINAL), EptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000).unwrap().0 & RWX, X);
    assert_eq!(shadow.cached(L2Gpa::new(0x20_3000), Access::Read), None);
    assert_eq!(shadow.cached(L2Gpa::new(0x20_3ABC), Access::Execute), Some(L1Gpa::new(0x7_5ABC)));
    assert_eq!(violated(fault(&mut shadow, &machine, 0x20_3000, READ | FINAL)), 0x1A1);
}

#[test]
fn memory_types_of_both_stages_meet_in_the_leaf() {
    // Write-back 6, write-protected 5, write-through 4, write-combining 1, uncacheable 0.
    for (l1, host, expected) in
        [(6, 6, 6), (6, 0, 0), (0, 6, 0), (1, 6, 1), (6, 1, 1), (4, 4, 4), (5, 5, 5), (1, 4, 0), (4, 5, 0), (0, 0, 0)]
    {
        for (level, ignore_pat) in [(1, 0), (2, IPAT)] {
            let (machine, mut shadow) = start(PLAIN);
            machine.map(PLAIN, 0x20_0000, 0x40_0000, level, RWX | l1 << 3 | ignore_pat);
            let mut mapping = small(HOST + 0x40_0000, true, true).unwrap();
            mapping.size = if level == 1 { PageSize::Size4K } else { PageSize::Size2M };
            mapping.memory_type = host;
            machine.protect(0x40_0000, Some(mapping));
            assert_eq!(fault(&mut shadow, &machine, 0x20_0000, READ | FINAL), EptOutcome::Resume);
            let large = if level == 1 { 0 } else { PS };
            let entry = (HOST + 0x40_0000) | RWX | A | D | expected << 3 | ignore_pat | large;
            assert_eq!(lookup(&shadow, 0x20_0000), Some((entry, mapping.size)), "{l1} {host}");
        }
    }
}

#[test]
fn what_the_embedder_withholds_goes_to_the_embedder() {
    let (machine, mut shadow) = start(FLAGS);
    for (n, mapping) in [None, small(HOST, false, true), small(HOST, true, false)].into_iter().enumerate() {
        let page = 0x7_5000 + n as u64 * 0x1000;
        machine.map(FLAGS, page, page, 1, ALL);
        machine.protect(page, mapping);
    }
    let asks = |gpa, access, table_walk, cause| {
        EptOutcome::Embedder(L1Access { l1: L1Gpa::new(gpa), l2: L2Gpa::new(gpa), access, table_walk, cause })
    };
    let mut go = |gpa, q| fault(&mut shadow, &machine, gpa, q);
    assert_eq!(go(0x7_5008, READ | FINAL), asks(0x7_5008, Access::Read, false, Cause::NotMapped));
    assert_eq!(go(0x7_5008, READ | WRITE | TABLE), asks(0x7_5008, Access::Write, true, Cause::NotMapped));
    assert_eq!(go(0x7_5008, READ), asks(0x7_5008, Access::Read, false, Cause::NotMapped));
    assert_eq!(go(0x7_6010, WRITE | FINAL), asks(0x7_6010, Access::Write, false, Cause::WriteProtected));
    assert_eq!(go(0x7_6010, READ | FINAL), EptOutcome::Resume);
    assert_eq!(go(0x7_7010, FETCH | FINAL), asks(0x7_7010, Access::Execute, false, Cause::NotExecutable));
    assert_eq!(go(0x7_7010, WRITE | FINAL), EptOutcome::Resume);
    // The write was allowed by L1's tables: it is dirty there although the embedder carries it out.
    assert_ne!(machine.get(machine.entry(FLAGS, 0x7_6000, 1)) & D, 0);
}

#[test]
fn entries_that_change_under_the_walk_are_walked_again() {
    let (machine, mut shadow) = start(FLAGS);
    machine.largest.set(Some(PageSize::Size4K));
    let at = machine.map(FLAGS, 0x20_3000, 0x7_5000, 1, ALL);
    // Another processor moves the page just before its dirty flag is set.
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at && machine.get(at) & ADDRESS == 0x7_5000 {
            machine.set(at, 0x8_8000 | ALL);
        }
    }));
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, WRITE | FINAL), EptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000).unwrap().0 & ADDRESS, HOST + 0x8_8000);
    assert_eq!(machine.get(at), 0x8_8000 | ALL | A | D);
}

#[test]
fn a_table_that_never_rests_costs_a_bounded_number_of_tries() {
    let (machine, mut shadow) = start(FLAGS);
    let at = machine.map(FLAGS, 0x20_3000, 0x7_5000, 1, ALL);
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at {
            machine.set(at, machine.get(at) + 0x1000);
        }
    }));
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, WRITE | FINAL), EptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000), None);
    assert!(machine.exchanges.get() < 64, "{}", machine.exchanges.get());
}

#[test]
fn a_pool_of_the_least_size_serves_any_number_of_violations() {
    let mut shadow: EptShadow<'_> = EptShadow::new(pool(7), 4, FORMAT).unwrap();
    let machine = Machine::new();
    shadow.activate(PLAIN);
    shadow.tag_retired();
    let pages: Vec<u64> = (0..8).map(|n| (n << 39) + (n << 30) + (n << 21) + (n << 12)).collect();
    for &page in &pages {
        machine.map(PLAIN, page, 0x9_0000, 1, ALL);
    }
    for round in 0..3 {
        for (n, &page) in pages.iter().enumerate() {
            assert_eq!(fault(&mut shadow, &machine, page, READ | FINAL), EptOutcome::Resume);
            assert_eq!(lookup(&shadow, page).unwrap().0 & ADDRESS, HOST + 0x9_0000);
            // The first path fits; each later one displaces its predecessor.
            assert_eq!(shadow.tag_stale(), (round, n) != (0, 0));
            shadow.tag_retired();
        }
    }
}

#[test]
fn a_pool_that_cannot_serve_is_refused() {
    let needed = |needed| Some(ShadowError::TooFewPages { needed });
    assert_eq!(EptShadow::<4>::new(pool(6), 4, FORMAT).err(), needed(7));
    assert_eq!(EptShadow::<4>::new(pool(7), 5, FORMAT).err(), needed(8));
    let pages = [const { ShadowPage::new() }; 2];
    let mut records = [const { PageRecord::new() }; 2];
    let refused = PagePool::new(&pages, &mut records, |n| Hpa::new(n as u64 * 0x800));
    assert_eq!(refused.err(), Some(ShadowError::UnalignedPage { index: 1 }));
}

#[test]
fn a_hypercall_s_walk_answers_and_marks_as_an_access_does() {
    let (machine, _) = start(FLAGS);
    let at = machine.map(FLAGS, 0x20_3000, 0x7_5000, 1, R | WB);
    let walk = EptWalk { memory: &machine, format: FORMAT, eptp: FLAGS, logged: false };
    let go = |gpa, access| walk.walk(L2Gpa::new(gpa), access).ok().map(L1Gpa::raw);
    assert_eq!(go(0x20_3ABC, Access::Write), None);
    assert_eq!(go(0x20_3ABC, Access::Execute), None);
    assert_eq!(machine.get(at) & (A | D), 0, "a refused access marks nothing");
    assert_eq!(go(0x20_3ABC, Access::Read), Some(0x7_5ABC));
    assert_eq!(machine.get(at) & (A | D), A);
    machine.set(at, 0x7_5000 | ALL);
    assert_eq!(go(0x20_3ABC, Access::Write), Some(0x7_5ABC));
    assert_eq!(go(0x20_3ABC, Access::Execute), Some(0x7_5ABC));
    assert_eq!(machine.get(at) & (A | D), A | D);
    assert_eq!(go(0x20_4ABC, Access::Read), None);
}

/// The shadow answers for what L2 may do without a violation; everything else is a walk.
#[test]
fn a_cached_walk_reads_tables_only_for_what_is_not_at_hand() {
    let (machine, mut shadow) = start(FLAGS);
    let at = machine.map(FLAGS, 0x20_0000, 0x40_0000, 2, ALL);
    fault(&mut shadow, &machine, 0x20_0000, FETCH | FINAL);
    let go = |shadow: &EptShadow<'_>, access| {
        let walk = EptWalk { memory: &machine, format: FORMAT, eptp: FLAGS, logged: false };
        CachedWalk { shadow, walk }.walk(L2Gpa::new(0x21_2ABC), access).ok().map(L1Gpa::raw)
    };
    let exchanges = machine.exchanges.get();
    for access in [Access::Read, Access::Execute] {
        assert_eq!(go(&shadow, access), Some(0x41_2ABC));
    }
    assert_eq!(machine.exchanges.get(), exchanges, "no entry was touched");
    // Clean in L1's tables, so not writable in the shadow: the walk sets the dirty flag.
    assert_eq!(go(&shadow, Access::Write), Some(0x41_2ABC));
    assert_ne!(machine.get(at) & D, 0);
    fault(&mut shadow, &machine, 0x20_0000, WRITE | FINAL);
    // As in a TLB, what is at hand is used until it is flushed.
    machine.set(at, 0);
    assert_eq!(go(&shadow, Access::Write), Some(0x41_2ABC));
    shadow.flush_context(FLAGS);
    assert_eq!(go(&shadow, Access::Read), None);
}
