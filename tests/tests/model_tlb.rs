//! The model's memory and TLB against the manuals: what each invalidation drops, and what it leaves.

use tests::model::mem::PhysMem;
use tests::model::rng::Rng;
use tests::model::tlb::{Entry, Kind, PageSize, Tag, Tlb};

const VA: u64 = 0x7F00_0020_3000;
const ROOT: u64 = 0x1000;
const OTHER_ROOT: u64 = 0x2000;

fn physical(asid: u32, root: u64) -> Tag {
    Tag { kind: Kind::Physical, asid, root, pcid: 0 }
}

/// Names and tags of one entry of each sort on VT-x, all for `VA`.
fn intel_tags() -> [(&'static str, Tag, bool); 9] {
    [
        ("linear 5", Tag::intel(5, None), false),
        ("linear 5 pcid 9", Tag::intel(5, None).with_pcid(9), false),
        ("linear 6", Tag::intel(6, None), false),
        ("linear 0", Tag::intel(0, None), false),
        ("combined 5", Tag::intel(5, Some(ROOT)), false),
        ("combined 5 global", Tag::intel(5, Some(OTHER_ROOT)), true),
        ("combined 6", Tag::intel(6, Some(ROOT)), false),
        ("physical", physical(0, ROOT), false),
        ("physical other", physical(0, OTHER_ROOT), false),
    ]
}

/// One entry of each sort on AMD-V.
fn amd_tags() -> [(&'static str, Tag, bool); 8] {
    [
        ("host", Tag::amd(0, false), false),
        ("host global", Tag::amd(0, false).with_pcid(1), true),
        ("plain 3", Tag::amd(3, false), false),
        ("nested 5", Tag::amd(5, true), false),
        ("nested 5 pcid 9", Tag::amd(5, true).with_pcid(9), false),
        ("nested 4 global", Tag::amd(4, true), true),
        ("physical 5", physical(5, 0), false),
        ("physical 4", physical(4, 0), false),
    ]
}

/// Fills a TLB, runs `op`, and returns the names of the entries that are gone.
fn gone(tags: &[(&'static str, Tag, bool)], op: impl FnOnce(&mut Tlb<&'static str>) -> usize) -> Vec<&'static str> {
    let mut tlb = Tlb::new(64, 1);
    for (name, tag, global) in tags {
        tlb.insert(*tag, VA, Entry { global: *global, ..Entry::plain(0x5000, *name) });
    }
    assert_eq!(tlb.len(), tags.len());
    let dropped = op(&mut tlb);
    let left: Vec<_> = tlb.iter().map(|(_, _, e)| e.origin).collect();
    assert_eq!(left.len() + dropped, tags.len());
    for (name, tag, _) in tags {
        // The index agrees with the list.
        let hit = tlb.lookup(*tag, VA).is_some_and(|e| e.origin == *name);
        assert_eq!(hit, left.contains(name), "{name}");
    }
    tags.iter().map(|t| t.0).filter(|n| !left.contains(n)).collect()
}

#[test]
fn invvpid_drops_by_type() {
    let t = &intel_tags();
    let five = ["linear 5", "linear 5 pcid 9", "combined 5", "combined 5 global"];
    assert_eq!(gone(t, |c| c.invvpid(0, 5, VA + 0xFFF)), five);
    assert!(gone(t, |c| c.invvpid(0, 5, VA + 0x1000)).is_empty(), "one page further");
    assert!(gone(t, |c| c.invvpid(0, 7, VA)).is_empty(), "another VPID");
    assert_eq!(gone(t, |c| c.invvpid(1, 5, 0)), five);
    let all = ["linear 5", "linear 5 pcid 9", "linear 6", "combined 5", "combined 5 global", "combined 6"];
    assert_eq!(gone(t, |c| c.invvpid(2, 0, 0)), all, "all contexts but VPID 0");
    assert_eq!(gone(t, |c| c.invvpid(3, 5, 0)), &five[..3], "global entries stay");
}

#[test]
fn invept_drops_physical_and_combined() {
    let t = &intel_tags();
    assert_eq!(gone(t, |c| c.invept_single(ROOT)), ["combined 5", "combined 6", "physical"]);
    assert!(gone(t, |c| c.invept_single(0x9000)).is_empty());
    let all = ["combined 5", "combined 5 global", "combined 6", "physical", "physical other"];
    assert_eq!(gone(t, |c| c.invept_all()), all);
}

#[test]
fn guest_instructions_stay_in_their_tag() {
    let t = &intel_tags();
    assert_eq!(gone(t, |c| c.invlpg(5, 0, VA)), ["linear 5", "combined 5", "combined 5 global"]);
    assert_eq!(gone(t, |c| c.invlpg(5, 9, VA)), ["linear 5 pcid 9", "combined 5 global"]);
    assert_eq!(gone(t, |c| c.mov_cr3(5, 0)), ["linear 5", "combined 5"]);
    assert_eq!(gone(t, |c| c.mov_cr3(5, 9)), ["linear 5 pcid 9"]);
    let five = ["linear 5", "linear 5 pcid 9", "combined 5", "combined 5 global"];
    assert_eq!(gone(t, |c| c.flush_linear(5)), five);
    assert_eq!(gone(t, |c| c.invpcid(5, 0, 9, VA)), ["linear 5 pcid 9"]);
    assert!(gone(t, |c| c.invpcid(5, 0, 9, VA + 4096)).is_empty());
    assert_eq!(gone(t, |c| c.invpcid(5, 1, 0, 0)), ["linear 5", "combined 5"]);
    assert_eq!(gone(t, |c| c.invpcid(5, 2, 0, 0)), five);
    assert_eq!(gone(t, |c| c.invpcid(5, 3, 0, 0)), &five[..3]);
}

#[test]
fn tlb_control_and_invlpga() {
    let t = &amd_tags();
    assert_eq!(gone(t, |c| c.flush_all()).len(), t.len(), "TLB_CONTROL 1");
    assert_eq!(gone(t, |c| c.flush_asid(5)), ["nested 5", "nested 5 pcid 9", "physical 5"]);
    assert_eq!(gone(t, |c| c.flush_asid(4)), ["nested 4 global", "physical 4"]);
    assert_eq!(gone(t, |c| c.flush_asid_non_global(4)), ["physical 4"]);
    assert_eq!(gone(t, |c| c.invlpga(5, VA)), ["nested 5", "nested 5 pcid 9"], "nested translations stay");
    assert_eq!(gone(t, |c| c.invlpga(4, VA)), ["nested 4 global"]);
    assert!(gone(t, |c| c.invlpga(4, VA - 1)).is_empty(), "one byte below the page");
    assert_eq!(gone(t, |c| c.mov_cr3(0, 0)), ["host"]);
}

#[test]
fn a_large_page_goes_in_all_its_pieces() {
    let mut tlb = Tlb::new(4096, 1);
    let tag = Tag::amd(1, true);
    let base = PageSize::M2.base(VA);
    // The guest has a 2 MiB page, its hypervisor 4 KiB pages.
    for n in 0..513 {
        let piece = Entry { linear_size: PageSize::M2, ..Entry::plain(n << 12, ()) };
        tlb.insert(tag, base + (n << 12), piece);
    }
    // The last of them lies in the next page.
    assert_eq!(tlb.invlpga(1, base + 0x1F_FFFF), 512);
    assert_eq!(tlb.len(), 1);
    // The other way round: one entry of 2 MiB.
    let whole = Entry { size: PageSize::M2, linear_size: PageSize::M2, ..Entry::plain(0, ()) };
    tlb.insert(tag, base, whole);
    assert!(tlb.lookup(tag, base + 0x1F_FFFF).is_some());
    assert_eq!(tlb.invlpg(1, 0, base + 0x1000), 1);
    assert!(tlb.lookup(tag, base + 0x1F_FFFF).is_none());
}

#[test]
fn global_entries_match_every_pcid_of_their_asid() {
    let mut tlb = Tlb::new(64, 1);
    let tag = Tag::amd(1, false).with_pcid(3);
    tlb.insert(tag, VA, Entry { global: true, ..Entry::plain(0x5000, ()) });
    assert!(tlb.lookup(tag.with_pcid(4), VA).is_some());
    assert!(tlb.lookup(Tag::amd(2, false), VA).is_none(), "another ASID");
    tlb.insert(tag, VA + 0x1000, Entry::plain(0x6000, ()));
    assert!(tlb.lookup(tag.with_pcid(4), VA + 0x1000).is_none(), "not global");
}

#[test]
fn entries_survive_until_evicted_and_eviction_follows_the_seed() {
    let run = |seed| {
        let mut tlb = Tlb::new(8, seed);
        (0..100u64).for_each(|n| tlb.insert(Tag::amd(1, true), n << 12, Entry::plain(n << 12, n)));
        assert_eq!(tlb.len(), 8);
        let mut left: Vec<u64> = tlb.iter().map(|(_, _, e)| e.origin).collect();
        left.sort_unstable();
        left
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let mut forever = Tlb::new(usize::MAX, 1);
    (0..10_000u64).for_each(|n| forever.insert(Tag::amd(1, true), n << 12, Entry::plain(n << 12, n)));
    assert_eq!(forever.len(), 10_000);
}

/// A random mix against a plain list of entries.
#[test]
fn agrees_with_a_list() {
    let mut rng = Rng::new(42);
    let mut tlb = Tlb::new(usize::MAX, 1);
    let mut list: Vec<(u32, u16, u64, bool, u64)> = Vec::new();
    for step in 0..200_000u64 {
        let (asid, pcid, page) = (rng.below(3) as u32, rng.below(3) as u16, rng.below(16) << 12);
        let tag = Tag::amd(asid, true).with_pcid(pcid);
        match rng.below(8) {
            0..4 => {
                let global = rng.chance(256);
                list.retain(|e| !(e.0 == asid && e.2 == page && (e.3 == global && (global || e.1 == pcid))));
                list.push((asid, pcid, page, global, step));
                tlb.insert(tag, page, Entry { global, ..Entry::plain(page, step) });
            }
            4 => {
                list.retain(|e| !(e.0 == asid && e.2 == page && (e.3 || e.1 == pcid)));
                tlb.invlpg(asid, pcid, page);
            }
            5 if rng.chance(64) => {
                list.retain(|e| e.0 != asid);
                tlb.flush_asid(asid);
            }
            6 if rng.chance(64) => {
                list.retain(|e| e.0 != asid || e.3);
                tlb.flush_asid_non_global(asid);
            }
            _ => {
                let hit = tlb.lookup(tag, page).map(|e| e.origin);
                let want = |e: &&(u32, u16, u64, bool, u64)| e.0 == asid && e.2 == page && (e.3 || e.1 == pcid);
                match hit {
                    None => assert!(!list.iter().any(|e| want(&e))),
                    Some(step) => assert!(list.iter().filter(want).any(|e| e.4 == step)),
                }
            }
        }
        assert_eq!(tlb.len(), list.len());
    }
}

#[test]
fn memory_is_little_endian_and_crosses_words_and_pages() {
    let mem = PhysMem::new(0x3000);
    mem.write(0x0FFD, 8, 0x8877_6655_4433_2211);
    assert_eq!(mem.read(0x0FFD, 8), 0x8877_6655_4433_2211);
    assert_eq!(mem.read(0x0FFF, 2), 0x4433);
    assert_eq!(mem.read(0x1000, 1), 0x44);
    mem.write(0x1001, 2, 0xFFFF_ABCD);
    assert_eq!(mem.read(0x1000, 4), 0x77AB_CD44);
    let mut bytes = [0; 13];
    mem.read_bytes(0x0FFB, &mut bytes);
    assert_eq!(bytes, [0, 0, 0x11, 0x22, 0x33, 0x44, 0xCD, 0xAB, 0x77, 0x88, 0, 0, 0]);
    mem.write_bytes(0x2FF0, &bytes);
    assert_eq!(mem.read(0x2FF2, 8), 0x8877_ABCD_4433_2211);
}

#[test]
fn exchanges_touch_their_bytes_only() {
    let mem = PhysMem::new(0x1000);
    mem.write(0, 8, u64::MAX);
    assert_eq!(mem.cmpxchg(4, 4, 0xFFFF_FFFF, 0x1234), Ok(()));
    assert_eq!(mem.read(0, 8), 0x0000_1234_FFFF_FFFF);
    assert_eq!(mem.cmpxchg(4, 4, 0xFFFF_FFFF, 1), Err(0x1234));
    assert_eq!(mem.cmpxchg(1, 1, 0xFF, 0), Ok(()));
    assert_eq!(mem.read(0, 4), 0xFFFF_00FF);
    assert_eq!(mem.cmpxchg(8, 8, 0, 7), Ok(()));
    assert_eq!(mem.read(8, 8), 7);
}

#[test]
fn an_empty_bus_reads_ones_and_is_counted() {
    let mut mem = PhysMem::new(0x1000);
    assert_eq!((mem.read(0xFF8, 8), mem.strays()), (0, 0));
    assert_eq!(mem.read(0x1000, 4), 0xFFFF_FFFF);
    mem.write(u64::MAX, 1, 0);
    assert_eq!(mem.cmpxchg(0x1000, 8, 0, 1), Err(u64::MAX));
    assert_eq!(mem.strays(), 3);
    mem.write(0, 8, 5);
    mem.clear();
    assert_eq!((mem.read(0, 8), mem.strays()), (0, 0));
}

#[test]
fn memory_goes_back_to_what_was_kept() {
    let mut mem = PhysMem::new(0x4000);
    mem.write(0, 8, 1);
    mem.write(0x1008, 8, 2);
    mem.keep();
    mem.write(0, 1, 3);
    mem.write_bytes(0x2FF8, &[4; 16]);
    assert_eq!(mem.cmpxchg(0x1008, 4, 2, 5), Ok(()));
    mem.read(0x5000, 8);
    mem.rewind();
    let words = [0, 0x1008, 0x2FF8, 0x3000].map(|at| mem.read(at, 8));
    assert_eq!((words, mem.strays()), ([1, 2, 0, 0], 0));
    // And again: what was rewound counts as unwritten, what comes after does not.
    mem.write(0, 8, 6);
    assert_eq!(mem.read(0, 8), 6);
    mem.rewind();
    assert_eq!(mem.read(0, 8), 1);
}

#[test]
fn threads_lose_no_byte() {
    let mem = PhysMem::new(0x1000);
    std::thread::scope(|s| {
        for lane in 0..4u64 {
            let mem = &mem;
            s.spawn(move || (0..20_000).for_each(|n| mem.write(lane, 1, n)));
        }
        s.spawn(|| (0..20_000u64).for_each(|n| mem.cmpxchg(4, 4, n, n + 1).expect("only this thread writes there")));
    });
    assert_eq!(mem.read(4, 4), 20_000);
    assert_eq!(mem.read(0, 4), 0x0101_0101 * (19_999 & 0xFF));
}
