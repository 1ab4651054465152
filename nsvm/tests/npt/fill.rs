//! What a fault fills in: addresses, page sizes, rights, dirty tracking, the pool's bounds.

use hvcore::addr::{Hpa, L2Gpa};
use hvcore::memory::{Access, SecondStage};
use hvcore::shadow::{PagePool, PageRecord, PageSize, ShadowError, ShadowPage};
use nsvm::npt::{CachedWalk, Cause, L1Access, NptFormat, NptOutcome, NptShadow, NptWalk};

use crate::machine::*;

const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

#[test]
fn a_read_fills_a_page_that_l1_marked_dirty_writable() {
    let (machine, mut shadow) = start(LONG);
    machine.largest.set(Some(PageSize::Size4K));
    let at = machine.map(LONG, 0x20_3000, 0x7_5000, 1, ALL | D);
    assert_eq!(lookup(&shadow, 0x20_3000), None);
    assert_eq!(fault(&mut shadow, &machine, 0x20_3123, READ | FINAL), NptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | ALL | A | D, PageSize::Size4K)));
    assert_eq!(machine.get(at), 0x7_5000 | ALL | A | D);
    assert!(!shadow.tag_stale(), "a new entry makes nothing stale");
}

#[test]
fn a_clean_page_becomes_writable_with_the_write_that_dirties_it() {
    for format in [LONG, LONG5, PAE, LEGACY] {
        let (machine, mut shadow) = start(format);
        machine.largest.set(Some(PageSize::Size4K));
        let at = machine.map(format, 0x20_3000, 0x7_5000, 1, ALL);
        assert_eq!(fault(&mut shadow, &machine, 0x20_3123, READ | FINAL), NptOutcome::Resume);
        assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | P | U | A, PageSize::Size4K)));
        assert_eq!(machine.get_entry(format, at), 0x7_5000 | ALL | A, "a read does not dirty: {format:?}");
        assert_eq!(fault(&mut shadow, &machine, 0x20_3123, WRITE | FINAL), NptOutcome::Resume);
        assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | ALL | A | D, PageSize::Size4K)));
        assert_eq!(machine.get_entry(format, at), 0x7_5000 | ALL | A | D, "{format:?}");
        assert!(!shadow.tag_stale(), "more rights make nothing stale");
    }
}

#[test]
fn accessed_bits_are_set_at_every_level_but_the_pdpte() {
    for format in [LONG, LONG5, PAE, LEGACY] {
        let (machine, mut shadow) = start(format);
        machine.map(format, 0x4020_3000, 0x7_5000, 1, ALL);
        assert_eq!(fault(&mut shadow, &machine, 0x4020_3000, FETCH | FINAL), NptOutcome::Resume);
        let mut table = TOP;
        for level in (1..=format.levels()).rev() {
            let entry = machine.get_entry(format, slot(format, table, level, 0x4020_3000));
            let pdpte = format == PAE && level == 3;
            assert_eq!(entry & A != 0, !pdpte, "{format:?} level {level}");
            assert_eq!(entry & D, 0, "{format:?} level {level}");
            table = entry & ADDRESS;
        }
    }
}

/// L1's page size, the embedder's, and the shadow's.
#[test]
fn the_shadow_page_is_the_smaller_of_both() {
    use PageSize::{Size1G, Size2M, Size4K};
    let cases: [(NptFormat, u8, PageSize, PageSize); 12] = [
        (LONG, 3, Size1G, Size1G),
        (LONG, 3, Size2M, Size2M),
        (LONG, 3, Size4K, Size4K),
        (LONG, 2, Size1G, Size2M),
        (LONG, 2, Size2M, Size2M),
        (LONG, 2, Size4K, Size4K),
        (LONG, 1, Size1G, Size4K),
        (PAE, 2, Size1G, Size2M),
        (PAE, 2, Size4K, Size4K),
        (LEGACY, 2, Size1G, Size2M),
        (LEGACY, 2, Size4K, Size4K),
        (LEGACY, 1, Size1G, Size4K),
    ];
    for (format, level, largest, expected) in cases {
        let (machine, mut shadow) = start(format);
        machine.largest.set(Some(largest));
        // Odd multiples, so that every address bit is seen to come from the right stage.
        let (l2, l1) = (0x4060_7000, 0xC0A0_3000);
        let in_page = match (format.mode, level) {
            (_, 1) => 0,
            (nsvm::npt::PagingMode::Legacy, _) => 0x3F_F000,
            (_, 2) => 0x1F_F000,
            _ => 0x3FFF_F000,
        };
        machine.map(format, l2 & !in_page, l1 & !in_page, level, ALL | D);
        assert_eq!(fault(&mut shadow, &machine, l2, WRITE | FINAL), NptOutcome::Resume);
        let (entry, size) = lookup(&shadow, l2).unwrap();
        assert_eq!(size, expected, "{format:?} {level}");
        let at = (entry & ADDRESS) + (l2 & size.offset_mask());
        assert_eq!(at, HOST + (l1 & !in_page) + (l2 & in_page), "{format:?} {level} {largest:?}");
        assert_eq!(entry & PS != 0, expected != Size4K);
    }
}

#[test]
fn a_4_mib_page_reaches_above_4_gib() {
    let (machine, mut shadow) = start(LEGACY);
    machine.map(LEGACY, 0x40_0000, 0xAB_0080_0000, 2, ALL | D);
    assert_eq!(fault(&mut shadow, &machine, 0x7F_F123, READ | FINAL), NptOutcome::Resume);
    let (entry, size) = lookup(&shadow, 0x7F_F000).unwrap();
    assert_eq!((entry & ADDRESS, size), (HOST + 0xAB_00A0_0000, PageSize::Size2M));
}

#[test]
fn without_pse_bit_7_of_a_legacy_pde_means_nothing() {
    let format = NptFormat { mode: nsvm::npt::PagingMode::Legacy, ..LONG };
    let (machine, mut shadow) = start(format);
    machine.map(format, 0x40_0000, 0x7_5000, 1, ALL | D);
    let pde = slot(format, TOP, 2, 0x40_0000);
    machine.set_entry(format, pde, machine.get_entry(format, pde) | PS);
    assert_eq!(fault(&mut shadow, &machine, 0x40_0000, READ | FINAL), NptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x40_0000).unwrap().0 & ADDRESS, HOST + 0x7_5000);
}

#[test]
fn rights_are_those_that_both_stages_give() {
    for (l1_bits, writable, executable, expected) in [
        (ALL | D, true, true, ALL | A | D),
        (ALL | D, false, true, P | U | A),
        (ALL | D, true, false, ALL | A | D | NX),
        (P | U | D, true, true, P | U | A),
        (ALL | D | NX, true, true, ALL | A | D | NX),
        (P | U | NX, false, false, P | U | A | NX),
    ] {
        let (machine, mut shadow) = start(LONG);
        machine.map(LONG, 0x20_3000, 0x7_5000, 1, l1_bits);
        machine.protect(0x7_5000, small(HOST + 0x7_5000, writable, executable));
        assert_eq!(fault(&mut shadow, &machine, 0x20_3000, READ | FINAL), NptOutcome::Resume);
        assert_eq!(lookup(&shadow, 0x20_3000), Some(((HOST + 0x7_5000) | expected, PageSize::Size4K)), "{l1_bits:#x}");
    }
}

#[test]
fn memory_types_of_both_stages_meet_in_the_leaf() {
    for (level, pat) in [(1, PS), (2, 1 << 12)] {
        let (machine, mut shadow) = start(LONG);
        machine.map(LONG, 0x20_0000, 0x40_0000, level, ALL | D | PWT);
        let size = if level == 1 { PageSize::Size4K } else { PageSize::Size2M };
        let mut mapping = small(HOST + 0x40_0000, true, true).unwrap();
        mapping.size = size;
        mapping.memory_type = 6;
        machine.protect(0x40_0000, Some(mapping));
        assert_eq!(fault(&mut shadow, &machine, 0x20_0000, READ | FINAL), NptOutcome::Resume);
        let large = if level == 1 { 0 } else { PS };
        let expected = (HOST + 0x40_0000) | ALL | A | D | PWT | PCD | pat | large;
        assert_eq!(lookup(&shadow, 0x20_0000), Some((expected, size)));
    }
}

#[test]
fn what_the_embedder_withholds_goes_to_the_embedder() {
    let (machine, mut shadow) = start(LONG);
    for (n, mapping) in [None, small(HOST, false, true), small(HOST, true, false)].into_iter().enumerate() {
        let page = 0x7_5000 + n as u64 * 0x1000;
        machine.map(LONG, page, page, 1, ALL);
        machine.protect(page, mapping);
    }
    let asks = |gpa, access, table_walk, cause| {
        NptOutcome::Embedder(L1Access {
            l1: hvcore::addr::L1Gpa::new(gpa),
            l2: L2Gpa::new(gpa),
            access,
            table_walk,
            cause,
        })
    };
    let mut go = |gpa, error| fault(&mut shadow, &machine, gpa, error);
    assert_eq!(go(0x7_5008, READ | FINAL), asks(0x7_5008, Access::Read, false, Cause::NotMapped));
    assert_eq!(go(0x7_5008, WRITE | TABLE), asks(0x7_5008, Access::Write, true, Cause::NotMapped));
    assert_eq!(go(0x7_6010, WRITE | FINAL), asks(0x7_6010, Access::Write, false, Cause::WriteProtected));
    assert_eq!(go(0x7_6010, READ | FINAL), NptOutcome::Resume);
    assert_eq!(go(0x7_7010, FETCH | FINAL), asks(0x7_7010, Access::Execute, false, Cause::NotExecutable));
    assert_eq!(go(0x7_7010, WRITE | FINAL), NptOutcome::Resume);
    // The write was allowed by L1's tables: it is dirty there although the embedder carries it out.
    assert_eq!(machine.get(machine.map(LONG, 0x9_0000, 0, 1, 0) & !0xFFF | (0x76 * 8)) & D, D);
}

#[test]
fn entries_that_change_under_the_walk_are_walked_again() {
    let (machine, mut shadow) = start(LONG);
    machine.largest.set(Some(PageSize::Size4K));
    let at = machine.map(LONG, 0x20_3000, 0x7_5000, 1, ALL);
    // Another processor moves the page just before its dirty bit is set.
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at && machine.get(at) & ADDRESS == 0x7_5000 {
            machine.set(at, 0x8_8000 | ALL);
        }
    }));
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, WRITE | FINAL), NptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000).unwrap().0 & ADDRESS, HOST + 0x8_8000);
    assert_eq!(machine.get(at), 0x8_8000 | ALL | A | D);
}

#[test]
fn a_table_that_never_rests_costs_a_bounded_number_of_tries() {
    let (machine, mut shadow) = start(LONG);
    let at = machine.map(LONG, 0x20_3000, 0x7_5000, 1, ALL);
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at {
            machine.set(at, machine.get(at) + 0x1000);
        }
    }));
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, WRITE | FINAL), NptOutcome::Resume);
    assert_eq!(lookup(&shadow, 0x20_3000), None);
    assert!(machine.exchanges.get() < 64, "{}", machine.exchanges.get());
}

#[test]
fn accessed_bits_set_by_others_meanwhile_are_no_change() {
    let (machine, mut shadow) = start(LONG);
    let at = machine.map(LONG, 0x20_3000, 0x7_5000, 1, ALL);
    *machine.before_exchange.borrow_mut() = Some(Box::new(move |machine, gpa| {
        if gpa == at {
            machine.set(at, machine.get(at) | A);
        }
    }));
    assert_eq!(fault(&mut shadow, &machine, 0x20_3000, WRITE | FINAL), NptOutcome::Resume);
    assert_eq!(machine.get(at), 0x7_5000 | ALL | A | D);
    // Three directories, then the leaf that was found changed once.
    assert_eq!(machine.exchanges.get(), 5);
}

#[test]
fn a_pool_of_the_least_size_serves_any_number_of_faults() {
    let mut shadow: NptShadow<'_> = NptShadow::new(pool(7), 4).unwrap();
    let machine = Machine::new();
    shadow.activate(context(LONG));
    shadow.tag_retired();
    let pages: Vec<u64> = (0..8).map(|n| (n << 39) + (n << 30) + (n << 21) + (n << 12)).collect();
    for &page in &pages {
        machine.map(LONG, page, 0x9_0000, 1, ALL);
    }
    for round in 0..3 {
        for (n, &page) in pages.iter().enumerate() {
            assert_eq!(fault(&mut shadow, &machine, page, READ | FINAL), NptOutcome::Resume);
            assert_eq!(lookup(&shadow, page).unwrap().0 & ADDRESS, HOST + 0x9_0000);
            // The first path fits; each later one displaces its predecessor.
            assert_eq!(shadow.tag_stale(), (round, n) != (0, 0));
            shadow.tag_retired();
        }
    }
}

#[test]
fn cached_contexts_are_given_up_before_the_running_one() {
    // Four tops and room for three paths.
    let mut shadow: NptShadow<'_> = NptShadow::new(pool(4 + 9), 4).unwrap();
    let machine = Machine::new();
    for page in [0, 1 << 39] {
        machine.map(LONG, page, 0x9_0000, 1, ALL);
    }
    let of = |asid| nsvm::npt::NptContext { asid, ..context(LONG) };
    for asid in [1, 2] {
        shadow.activate(of(asid));
        fault(&mut shadow, &machine, 0, READ | FINAL);
    }
    shadow.tag_retired();
    fault(&mut shadow, &machine, 1 << 39, READ | FINAL);
    assert_eq!(shadow.free_pages(), 0);
    machine.map(LONG, 2 << 39, 0x9_0000, 1, ALL);
    fault(&mut shadow, &machine, 2 << 39, READ | FINAL);
    assert!(!shadow.tag_stale(), "the pages came from ASID 1, which is not running");
    for page in [0, 1 << 39, 2 << 39] {
        assert!(lookup(&shadow, page).is_some());
    }
    shadow.activate(of(1));
    assert_eq!(lookup(&shadow, 0), None);
}

#[test]
fn a_pool_that_cannot_serve_is_refused() {
    assert_eq!(NptShadow::<4>::new(pool(6), 4).err(), Some(ShadowError::TooFewPages { needed: 7 }));
    assert_eq!(NptShadow::<4>::new(pool(7), 5).err(), Some(ShadowError::TooFewPages { needed: 8 }));
    assert_eq!(NptShadow::<4>::new(pool(64), 3).err(), Some(ShadowError::Levels(3)));
    let pages = [const { ShadowPage::new() }; 2];
    let mut records = [const { PageRecord::new() }; 2];
    let refused = PagePool::new(&pages, &mut records, |n| Hpa::new(n as u64 * 0x800));
    assert_eq!(refused.err(), Some(ShadowError::UnalignedPage { index: 1 }));
}

#[test]
fn a_hypercall_s_walk_answers_and_marks_as_an_access_does() {
    let (machine, _) = start(LONG);
    let at = machine.map(LONG, 0x20_3000, 0x7_5000, 1, P | U | NX);
    let walk = NptWalk { memory: &machine, format: LONG, ncr3: TOP };
    let go = |gpa, access| walk.walk(L2Gpa::new(gpa), access).ok().map(hvcore::addr::L1Gpa::raw);
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

/// The shadow answers for what L2 may do without a fault; everything else is a walk.
#[test]
fn a_cached_walk_reads_tables_only_for_what_is_not_at_hand() {
    let (machine, mut shadow) = start(LONG);
    let at = machine.map(LONG, 0x20_0000, 0x40_0000, 2, ALL);
    fault(&mut shadow, &machine, 0x20_0000, FETCH | FINAL);
    let go = |shadow: &NptShadow<'_>, access| {
        let walk = NptWalk { memory: &machine, format: LONG, ncr3: TOP };
        CachedWalk { shadow, walk }.walk(L2Gpa::new(0x21_2ABC), access).ok().map(hvcore::addr::L1Gpa::raw)
    };
    let exchanges = machine.exchanges.get();
    for access in [Access::Read, Access::Execute] {
        assert_eq!(go(&shadow, access), Some(0x41_2ABC));
    }
    assert_eq!(machine.exchanges.get(), exchanges, "no entry was touched");
    // Clean in L1's tables, so not writable in the shadow: the walk sets the dirty bit.
    assert_eq!(go(&shadow, Access::Write), Some(0x41_2ABC));
    assert_eq!(machine.get(at) & D, D);
    fault(&mut shadow, &machine, 0x20_0000, WRITE | FINAL);
    // As in a TLB, what is at hand is used until it is flushed.
    machine.set(at, 0);
    assert_eq!(go(&shadow, Access::Write), Some(0x41_2ABC));
    shadow.flush_asid(1);
    assert_eq!(go(&shadow, Access::Read), None);
    machine.set(at, 0x40_0000 | PS | P | U | NX);
    fault(&mut shadow, &machine, 0x20_0000, READ | FINAL);
    assert_eq!(shadow.cached(L2Gpa::new(0x20_0000), Access::Execute), None);
    assert_eq!(go(&shadow, Access::Execute), None);
}

#[test]
fn the_format_is_that_of_l1s_paging() {
    use nsvm::npt::PagingMode::{Legacy, Long4, Long5, Pae};
    const PG: u64 = 1 << 31;
    const PSE: u64 = 1 << 4;
    const CR4_PAE: u64 = 1 << 5;
    const LA57: u64 = 1 << 12;
    const LMA: u64 = 1 << 10;
    const NXE: u64 = 1 << 11;
    for (cr4, efer, mode, pse, nxe) in [
        (0, 0, Legacy, false, false),
        (PSE | LA57, NXE, Legacy, true, true),
        (CR4_PAE | PSE, 0, Pae, false, false),
        (CR4_PAE | LA57, NXE, Pae, false, true),
        (CR4_PAE | PSE, LMA | NXE, Long4, false, true),
        (CR4_PAE | LA57, LMA, Long5, false, false),
    ] {
        let format = NptFormat::from_registers(PG | 1, cr4, efer, 39, true).unwrap();
        assert_eq!(format, NptFormat { mode, pse, nxe, phys_bits: 39, gib_pages: true });
        assert_eq!(NptFormat::from_registers(1, cr4, efer, 39, true), None, "L1 without paging");
    }
}
