//! The shadow trees by themselves, in a format that is not a vendor's: nothing leaks, nothing is shared, every loop
//! ends.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::shadow::{
    EntryFormat, L1Change, Leaf, PagePool, PageRecord, PageSize, Rights, ShadowError, ShadowPage, Tables, TagFlush,
};

/// Read, write and execute in bits 2:0, a large page in bit 7: as EPT has it.
struct Toy;

impl EntryFormat for Toy {
    fn table(table: Hpa) -> u64 {
        table.raw() | 7
    }
    fn leaf(page: Hpa, size: PageSize, rights: Rights) -> u64 {
        page.raw()
            | u64::from(rights.read)
            | u64::from(rights.write) << 1
            | u64::from(rights.execute) << 2
            | u64::from(size != PageSize::Size4K) << 7
    }
    fn read_only(leaf: u64) -> u64 {
        leaf & !2
    }
    fn keeps(old: u64, new: u64) -> bool {
        old & !7 == new & !7 && old & 7 & !new == 0
    }
}

type Toys = Tables<'static, Toy, u32, 3>;

const RWX: Rights = Rights { read: true, write: true, execute: true, memory_type: 0 };

fn pool(pages: usize) -> (&'static [ShadowPage], PagePool<'static>) {
    let storage: &'static [ShadowPage] = Vec::leak((0..pages).map(|_| ShadowPage::new()).collect());
    let records = Vec::leak((0..pages).map(|_| PageRecord::new()).collect());
    (storage, PagePool::new(storage, records, |n| Hpa::new((n as u64) << 12)).unwrap())
}

fn leaf(l2: u64, l1: u64, size: PageSize) -> Leaf {
    Leaf {
        l2: L2Gpa::new(l2),
        l1: L1Gpa::new(l1),
        hpa: Hpa::new(l1 + (1 << 40)),
        size,
        rights: RWX,
        sources: [None; 5],
    }
}

/// Walks the storage as hardware would, from the top table's address: the entry and its level.
fn hardware(storage: &[ShadowPage], top: Hpa, levels: u32, l2: u64) -> Option<(u64, u32)> {
    let mut table = top.raw();
    for level in (1..=levels).rev() {
        let entry = storage[(table >> 12) as usize].entry((l2 >> (12 + 9 * (level - 1)) & 511) as usize);
        if entry & 7 == 0 {
            return None;
        }
        if level == 1 || entry & 0x80 != 0 {
            return Some((entry, level));
        }
        table = entry & !0xFFF;
    }
    None
}

#[test]
fn hardware_finds_what_was_installed() {
    for levels in [4, 5] {
        let (storage, pool) = pool(32);
        let mut tables = Toys::new(pool, levels).unwrap();
        let top = tables.activate(1);
        for (l2, size, level) in [
            (0x1234_5000, PageSize::Size4K, 1),
            (0x8060_0000, PageSize::Size2M, 2),
            (0xFF_C000_0000, PageSize::Size1G, 3),
            ((1 << (12 + 9 * levels)) - 0x1000, PageSize::Size4K, 1),
        ] {
            let l1 = l2 & 0xF_FFFF_FFFF;
            assert_eq!(hardware(storage, top, levels.into(), l2), None);
            assert!(tables.install(&leaf(l2, l1, size)));
            let (entry, at) = hardware(storage, top, levels.into(), l2).unwrap();
            assert_eq!((entry & !0xFFF, at), (l1 + (1 << 40), level));
            assert_eq!(tables.lookup(L2Gpa::new(l2)), Some((entry, size)));
        }
        assert!(!tables.install(&leaf(1 << (12 + 9 * levels), 0, PageSize::Size4K)), "wider than the tables");
        tables.deactivate();
        assert!(!tables.install(&leaf(0, 0, PageSize::Size4K)), "no root");
    }
}

#[test]
fn offsets_in_a_large_page_do_not_matter() {
    let (_, pool) = pool(16);
    let mut tables = Toys::new(pool, 4).unwrap();
    tables.activate(1);
    assert!(tables.install(&leaf(0x4_0012_3456, 0x8_0012_3456, PageSize::Size2M)));
    assert_eq!(tables.lookup(L2Gpa::new(0x4_0000_0000)), Some(((1 << 40) + 0x8_0000_0087, PageSize::Size2M)));
}

/// After any sequence, emptying everything gives every page back, cleared.
#[test]
fn no_page_leaks_and_none_is_used_twice() {
    let (storage, pool) = pool(24);
    let mut tables = Toys::new(pool, 4).unwrap();
    assert_eq!(tables.free_pages(), 21);
    let mut x = 1u64;
    let mut next = move |n: u64| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) % n
    };
    let mut top = tables.activate(0);
    for _ in 0..20_000 {
        let address = next(6) << 39 | next(3) << 30 | next(3) << 21 | next(8) << 12;
        match next(12) {
            0 => top = tables.activate(next(5) as u32),
            1 => {
                tables.invalidate_l2(|_| true, L2Gpa::new(address), next(1 << 24));
            }
            2 => {
                tables.l1_gpa_changed(L1Gpa::new(address), next(1 << 24), L1Change::Unmap);
            }
            3 => {
                let key = next(5) as u32;
                let active = tables.active_key() == Some(key);
                let flush = tables.invalidate(|k| *k == key);
                assert_eq!(flush == TagFlush::Needed, active);
            }
            _ => {
                let size = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G][next(3) as usize];
                let page = address & !size.offset_mask();
                assert!(tables.install(&leaf(page, page, size)));
                // The address as it is, in this root: pages of other roots or lists would show another.
                let (entry, level) = hardware(storage, top, 4, page).unwrap();
                let within = (1u64 << (12 + 9 * (level - 1))) - 1;
                assert_eq!(entry & !0xFFF, (page & !within) + (1 << 40));
            }
        }
    }
    tables.deactivate();
    tables.invalidate(|_| true);
    assert_eq!(tables.free_pages(), 21);
    for key in 0..3 {
        let top = tables.activate(key);
        assert!((0..512).all(|slot| storage[(top.raw() >> 12) as usize].entry(slot) == 0));
    }
}

#[test]
fn used_storage_is_cleared_for_a_new_pool() {
    let storage: &'static [ShadowPage] = Vec::leak((0..8).map(|_| ShadowPage::new()).collect());
    let mut records: Vec<PageRecord> = (0..8).map(|_| PageRecord::new()).collect();
    for _ in 0..2 {
        let pool = PagePool::new(storage, &mut records, |n| Hpa::new((n as u64) << 12)).unwrap();
        let mut tables = Tables::<Toy, u32, 3>::new(pool, 4).unwrap();
        assert_eq!(tables.free_pages(), 5);
        let top = tables.activate(1);
        assert_eq!(hardware(storage, top, 4, 0x5000), None);
        tables.install(&leaf(0x5000, 0x5000, PageSize::Size4K));
        assert!(hardware(storage, top, 4, 0x5000).is_some());
    }
}

#[test]
fn pages_and_records_pair_up() {
    let storage: &'static [ShadowPage] = Vec::leak((0..8).map(|_| ShadowPage::new()).collect());
    let mut records: Vec<PageRecord> = (0..5).map(|_| PageRecord::new()).collect();
    let pool = PagePool::new(storage, &mut records, |n| Hpa::new((n as u64) << 12)).unwrap();
    assert_eq!(pool.free(), 5);
    assert_eq!(Tables::<Toy, u32, 3>::new(pool, 4).err(), Some(ShadowError::TooFewPages { needed: 6 }));
}
