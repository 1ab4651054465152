//! The model's two-dimensional walks (nested paging, EPT) and the unit that caches them, against cases computed by
//! hand from the APM and the SDM.

use tests::model::mem::PhysMem;
use tests::model::mmu::Mmu;
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::{PageSize, Tag};
use tests::model::walk::{
    Access, Context, Ept, Fault, Hit, Kind, Linear, Mode, Second, Vendor, Verdict, translate, translate_gpa,
};

use Kind::{Fetch, Read, Write};
use flag::{A, D, NX, P, RWX, U, W, WB};

const VA: u64 = 0x1234_5678;

/// A guest tree in guest-physical memory at 1 MiB, mapped one to one plus 2 MiB by a second stage in 4 KiB pages.
struct Nested {
    mem: PhysMem,
    cx: Context,
    root2: u64,
    format2: Format,
    guest_root: u64,
}

const SHIFT: u64 = 0x20_0000;
const PAGE: u64 = 0x18_0000;

fn nested(format2: Format, flags: u64) -> Nested {
    let mem = PhysMem::new(0x80_0000);
    let (root2, guest_root) = {
        let mut t = Tables::new(&mem, 0x1000);
        let root2 = t.frame();
        t.map_range(format2, root2, 0x10_0000, 0x10_0000 + SHIFT, 0x10_0000, PageSize::K4, flags);
        // The guest's tables are built where they are in physical memory, with guest-physical addresses inside.
        let mut g = Tables::new(&mem, 0x10_0000 + SHIFT);
        let root = g.frame();
        let names = [root, g.frame(), g.frame(), g.frame()];
        for (level, pair) in names.windows(2).enumerate() {
            let index = (VA >> (39 - 9 * level)) & 511;
            mem.write(pair[0] + index * 8, 8, (pair[1] - SHIFT) | P | W | U);
        }
        mem.write(names[3] + ((VA >> 12) & 511) * 8, 8, PAGE | P | W | U);
        (root2, root - SHIFT)
    };
    let second = match format2 {
        Format::Ept => Second::Ept(Ept::new(root2)),
        Format::Bits32 => Second::Npt(Linear { mode: Mode::Bits32, ..Linear::long(Vendor::Amd, root2) }),
        Format::Pae => Second::Npt(Linear { mode: Mode::Pae, ..Linear::long(Vendor::Amd, root2) }),
        _ => Second::Npt(Linear::long(Vendor::Amd, root2)),
    };
    let vendor = if format2 == Format::Ept { Vendor::Intel } else { Vendor::Amd };
    let cx = Context { linear: Linear::long(vendor, guest_root), second };
    Nested { mem, cx, root2, format2, guest_root }
}

impl Nested {
    fn go(&self, access: Access) -> Result<Hit, Fault> {
        translate(&self.cx, &self.mem, VA, access, true)
    }
    /// The second stage's leaf for `gpa`.
    fn leaf2(&self, gpa: u64) -> u64 {
        Tables::new(&self.mem, 0x70_0000).slot(self.format2, self.root2, gpa, PageSize::K4)
    }
    fn edit(&self, gpa: u64, change: impl Fn(u64) -> u64) {
        let (at, bytes) = (self.leaf2(gpa), if self.format2 == Format::Bits32 { 4 } else { 8 });
        self.mem.write(at, bytes, change(self.mem.read(at, bytes)));
    }
    fn table_entry(&self) -> u64 {
        // The guest's top entry for VA is entry 0.
        self.guest_root
    }
}

#[test]
fn nested_paging_translates_in_every_host_format() {
    for format in [Format::Level4, Format::Level5, Format::Pae, Format::Bits32] {
        let mut n = nested(format, P | W | U);
        if format == Format::Level5 {
            let Second::Npt(npt) = &mut n.cx.second else { unreachable!() };
            npt.mode = Mode::Level5;
        }
        let hit = n.go(Access::user(Write)).expect("mapped");
        assert_eq!((hit.gpa, hit.hpa), (PAGE + 0x678, PAGE + SHIFT + 0x678), "{format:?}");
        // Guest tables are written to as far as nested D is concerned, the target too.
        for gpa in [n.guest_root, PAGE] {
            assert_eq!(n.mem.read(n.leaf2(gpa), 4) & (A | D), A | D);
        }
    }
}

#[test]
fn nested_page_faults_carry_the_right_information() {
    let npf = |n: &Nested, access| match n.go(access) {
        Err(Fault::Npf { info1, gpa }) => (info1, gpa),
        other => panic!("expected a nested page fault, got {other:?}"),
    };
    let (fin, tab) = (1u64 << 32, 1u64 << 33);
    let user = Access::user;
    // Final address: not present; then present without write; NX; not a user page; reserved.
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e & !P);
    assert_eq!(npf(&n, user(Read)), (fin | 4, PAGE + 0x678));
    assert_eq!(npf(&n, user(Write)), (fin | 6, PAGE + 0x678));
    assert_eq!(npf(&n, user(Fetch)), (fin | 0x14, PAGE + 0x678));
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e & !W);
    assert_eq!(npf(&n, Access::system(Write)), (fin | 7, PAGE + 0x678), "US is set for supervisor accesses, too");
    assert!(n.go(user(Read)).is_ok());
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e | NX);
    assert_eq!(npf(&n, user(Fetch)), (fin | 0x15, PAGE + 0x678));
    assert!(n.go(user(Write)).is_ok());
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e & !U);
    assert_eq!(npf(&n, Access::system(Read)), (fin | 5, PAGE + 0x678), "nested walks are user accesses");
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e | 1 << 51);
    assert_eq!(npf(&n, user(Read)), (fin | 0xD, PAGE + 0x678));
    // A guest table: always a data write, even for a fetch; needs W in the nested entry.
    let n = nested(Format::Level4, P | W | U);
    n.edit(n.table_entry(), |e| e & !P);
    assert_eq!(npf(&n, user(Fetch)), (tab | 6, n.guest_root));
    let n = nested(Format::Level4, P | W | U);
    n.edit(n.table_entry(), |e| e & !W);
    assert_eq!(npf(&n, user(Read)), (tab | 7, n.guest_root));
    let n = nested(Format::Level4, P | W | U);
    n.edit(n.table_entry(), |e| e | NX);
    assert!(n.go(user(Fetch)).is_ok(), "tables are not fetched from");
}

#[test]
fn nested_paging_in_32_bits_ends_at_4_gib() {
    for (format, mode) in [(Format::Pae, Mode::Pae), (Format::Bits32, Mode::Bits32)] {
        let n = nested(format, P | W | U);
        let gpa = 0x1_0000_0000 + PAGE;
        let info1 = 1 << 32 | 4;
        assert_eq!(translate_gpa(&n.cx.second, &n.mem, gpa, Read, true), Err(Fault::Npf { info1, gpa }), "{mode:?}");
        assert!(translate_gpa(&n.cx.second, &n.mem, PAGE, Read, true).is_ok());
    }
}

#[test]
fn guest_faults_come_before_the_final_nested_fault() {
    let n = nested(Format::Level4, P | W | U);
    n.edit(PAGE, |e| e & !P);
    let leaf = 0x10_3000 + ((VA >> 12) & 511) * 8 + SHIFT;
    n.mem.write(leaf, 8, PAGE | P | U);
    assert_eq!(n.go(Access::user(Write)), Err(Fault::Page { code: 7 }));
}

#[test]
fn ept_violations_carry_the_right_qualification() {
    let q = |n: &Nested, access| match n.go(access) {
        Err(Fault::EptViolation { qualification, gpa }) => (qualification, gpa),
        other => panic!("expected an EPT violation, got {other:?}"),
    };
    let gpa = PAGE + 0x678;
    let n = nested(Format::Ept, RWX | WB);
    let hit = n.go(Access::user(Write)).expect("mapped");
    assert_eq!((hit.hpa, hit.second_type), (gpa + SHIFT, 6));
    // Bits 2:0 the access, 5:3 the rights, 7 and 8 linear address and final translation.
    for (rights, access, want) in [
        (0, Read, 0x181),
        (0, Write, 0x182),
        (0, Fetch, 0x184),
        (1, Write, 0x18A),
        (1, Fetch, 0x18C),
        (3, Fetch, 0x19C),
        (5, Write, 0x1AA),
        (4, Read, 0x1A1),
    ] {
        let n = nested(Format::Ept, RWX | WB);
        n.edit(PAGE, |e| e & !RWX | rights);
        assert_eq!(q(&n, Access::user(access)), (want, gpa), "{rights} {access:?}");
    }
    for (rights, access) in [(1, Read), (3, Write), (4, Fetch), (5, Fetch)] {
        let n = nested(Format::Ept, RWX | WB);
        n.edit(PAGE, |e| e & !RWX | rights);
        assert!(n.go(Access::user(access)).is_ok(), "{rights} {access:?}");
    }
    // A guest table: reads without accessed and dirty flags, read and write with them.
    let mut n = nested(Format::Ept, RWX | WB);
    n.edit(n.guest_root, |e| e & !RWX);
    assert_eq!(q(&n, Access::user(Fetch)), (0x81, n.guest_root));
    n.cx.second = Second::Ept(Ept::new(n.root2).with_ad());
    assert_eq!(q(&n, Access::user(Fetch)), (0x83, n.guest_root));
    n.edit(n.guest_root, |e| e | 1);
    assert_eq!(q(&n, Access::user(Fetch)), (0x8B, n.guest_root), "readable is not enough with A/D");
    // Without A/D, readable tables do until a flag must be set.
    n.cx.second = Second::Ept(Ept::new(n.root2));
    assert_eq!(q(&n, Access::user(Read)), (0x8A, n.guest_root));
    n.edit(n.guest_root, |e| e | 3);
    assert!(n.go(Access::user(Read)).is_ok());
    n.edit(n.guest_root, |e| e & !2);
    assert!(n.go(Access::user(Read)).is_ok(), "all flags are set already");
}

#[test]
fn ept_misconfigurations() {
    let run = |entry: u64, exec_only: bool| {
        let mut n = nested(Format::Ept, RWX | WB);
        n.cx.second = Second::Ept(Ept { exec_only, ..Ept::new(n.root2) });
        n.edit(PAGE, |e| e & !0xFFF | entry);
        n.go(Access::user(Fetch)).err()
    };
    let broken = Some(Fault::EptMisconfig { gpa: PAGE + 0x678 });
    assert_eq!(run(2 | WB, true), broken, "writable, not readable");
    assert_eq!(run(6 | WB, true), broken);
    assert_eq!(run(4 | WB, false), broken, "execute-only not supported");
    assert_eq!(run(4 | WB, true), None);
    for (mt, bad) in [(0, false), (1, false), (2, true), (3, true), (4, false), (5, false), (6, false), (7, true)] {
        assert_eq!(run(RWX | mt << 3, true), if bad { broken } else { None }, "memory type {mt}");
    }
    assert_eq!(run(RWX | WB | 1 << 48, true), broken, "beyond the physical-address width");
    assert_eq!(run(RWX | WB | 1 << 52, true), None);
    // Non-leaf entries: bits 6:3; the PML4E also bit 7.
    for (bit, bad) in [(3, true), (6, true), (7, true), (8, false), (11, false)] {
        let n = nested(Format::Ept, RWX | WB);
        let top = n.mem.read(n.root2, 8);
        n.mem.write(n.root2, 8, top | 1 << bit);
        // The first access of the walk is to the guest's root.
        let want = bad.then_some(Fault::EptMisconfig { gpa: n.guest_root });
        assert_eq!(n.go(Access::user(Read)).err(), want, "bit {bit}");
    }
}

#[test]
fn ept_large_pages_and_their_reserved_bits() {
    let mem = PhysMem::new(0x10_0000);
    let mut t = Tables::new(&mem, 0x1000);
    let root = t.frame();
    let leaf = t.map(Format::Ept, root, 0x4020_0000, 0x60_0000, PageSize::M2, RWX | WB);
    t.map(Format::Ept, root, 0x8000_0000, 0, PageSize::G1, RWX | WB);
    let ept = Ept::new(root);
    let get = |ept: Ept, gpa| translate_gpa(&Second::Ept(ept), &mem, gpa, Read, true);
    assert_eq!(get(ept, 0x403F_FFFF), Ok(0x7F_FFFF));
    assert_eq!(get(ept, 0x8765_4321), Ok(0x765_4321));
    assert!(get(Ept { pages_1g: false, ..ept }, 0x8765_4321).is_err());
    assert!(get(Ept { pages_2m: false, ..ept }, 0x4020_0000).is_err());
    mem.write(leaf, 8, mem.read(leaf, 8) | 1 << 12);
    assert_eq!(get(ept, 0x4020_0000), Err(Fault::EptMisconfig { gpa: 0x4020_0000 }));
    // A guest-physical address wider than the walk.
    let gpa = 1 << 48;
    assert_eq!(get(ept, gpa), Err(Fault::EptViolation { qualification: 1, gpa }), "no linear address here");
    assert!(get(Ept { eptp: ept.eptp + 8, ..ept }, 1 << 57).is_err(), "nor can five levels");
}

#[test]
fn ept_accessed_and_dirty() {
    let mut n = nested(Format::Ept, RWX | WB);
    let (acc, dirty) = (1 << 8, 1 << 9);
    let flags = |n: &Nested, gpa| n.mem.read(n.leaf2(gpa), 8) & (acc | dirty);
    assert!(n.go(Access::user(Write)).is_ok());
    assert_eq!(flags(&n, PAGE), 0, "not enabled");
    n.cx.second = Second::Ept(Ept::new(n.root2).with_ad());
    assert!(n.go(Access::user(Read)).is_ok());
    assert_eq!((flags(&n, PAGE), flags(&n, n.guest_root)), (acc, acc | dirty));
    assert!(n.go(Access::user(Write)).is_ok());
    assert_eq!(flags(&n, PAGE), acc | dirty);
}

#[test]
fn the_unit_serves_stale_hits_and_the_audit_names_them() {
    let n = nested(Format::Level4, P | W | U);
    let mut mmu = Mmu::new(64, 1);
    mmu.audit = true;
    let tag = Tag::amd(5, true);
    let read = |mmu: &mut Mmu| mmu.access(&n.mem, &n.cx, tag, VA, Access::user(Read));
    assert_eq!(read(&mut mmu), Ok(PAGE + SHIFT + 0x678));
    assert_eq!((read(&mut mmu), mmu.stale_count), (Ok(PAGE + SHIFT + 0x678), 0));
    n.edit(PAGE, |e| e & !P);
    assert_eq!(read(&mut mmu), Ok(PAGE + SHIFT + 0x678), "nothing was invalidated");
    assert_eq!(mmu.stale_count, 1);
    assert!(matches!(mmu.stale[0].verdict, Verdict::Refused(Fault::Npf { .. })));
    // INVLPGA leaves the cached nested translation, from which the walk makes the entry anew.
    mmu.tlb.invlpga(5, VA);
    assert_eq!(read(&mut mmu), Ok(PAGE + SHIFT + 0x678));
    // TLB_CONTROL 3 of this ASID drops it, of another does not.
    mmu.tlb.flush_asid(4);
    assert!(read(&mut mmu).is_ok());
    mmu.tlb.flush_asid(5);
    assert!(matches!(read(&mut mmu), Err(Fault::Npf { .. })));
}

#[test]
fn rights_that_grew_need_no_invalidation() {
    let n = nested(Format::Level4, P | U);
    // Tables need W; the page does not have it yet.
    (0..4).for_each(|t| n.edit(n.guest_root + t * 4096, |e| e | W));
    let mut mmu = Mmu::new(64, 1);
    mmu.audit = true;
    let go = |mmu: &mut Mmu, kind| mmu.access(&n.mem, &n.cx, Tag::amd(5, true), VA, Access::user(kind));
    assert!(go(&mut mmu, Read).is_ok());
    assert!(matches!(go(&mut mmu, Write), Err(Fault::Npf { .. })));
    n.edit(PAGE, |e| e | W);
    assert!(go(&mut mmu, Write).is_ok());
    assert_eq!(mmu.stale_count, 0);
}

#[test]
fn vtx_tags_guest_physical_entries_by_root_alone() {
    let n = nested(Format::Ept, RWX | WB);
    let mut mmu = Mmu::new(64, 1);
    let tag = |vpid| Tag::intel(vpid, Some(n.root2));
    let mut go = |vpid, inv: &dyn Fn(&mut Mmu) -> usize| {
        inv(&mut mmu);
        mmu.access(&n.mem, &n.cx, tag(vpid), VA, Access::user(Read))
    };
    assert!(go(1, &|_| 0).is_ok());
    n.edit(PAGE, |e| e & !RWX);
    assert!(go(2, &|_| 0).is_ok(), "another VPID walks through the same guest-physical entries");
    assert!(go(1, &|m| m.tlb.invvpid(1, 1, 0)).is_ok(), "INVVPID leaves them");
    assert!(go(1, &|m| m.tlb.invept_single(0x9000)).is_ok(), "another root");
    assert!(matches!(go(1, &|m| m.tlb.invept_single(n.root2)), Err(Fault::EptViolation { .. })));
}

/// A table page is unlinked and used anew: until its tag is flushed, walks still go through it.
#[test]
fn a_cached_table_is_walked_until_its_tag_is_flushed() {
    for format in [Format::Level4, Format::Ept] {
        let amd = format == Format::Level4;
        let n = nested(format, if amd { P | W | U } else { RWX | WB });
        let tag = if amd { Tag::amd(5, true) } else { Tag::intel(5, Some(n.root2)) };
        let run = |tables: usize, flush: bool| {
            let mut mmu = Mmu::new(64, 1);
            mmu.audit = true;
            mmu.tlb.cache_tables(tables);
            let get = |mmu: &mut Mmu| mmu.access(&n.mem, &n.cx, tag, VA, Access::user(Read));
            assert_eq!(get(&mut mmu), Ok(PAGE + SHIFT + 0x678));
            // Unlink the leaf table of the nested tree; every leaf entry leaves the TLB by eviction.
            let top = n.mem.read(n.root2, 8);
            n.mem.write(n.root2, 8, 0);
            while !mmu.tlb.is_empty() {
                mmu.tlb.evict();
            }
            if flush {
                mmu.tlb.flush_asid(5);
                mmu.tlb.invept_single(n.root2);
            }
            let got = get(&mut mmu);
            n.mem.write(n.root2, 8, top);
            (got.is_ok(), mmu.stale_count)
        };
        assert_eq!(run(16, false), (true, 1), "{format:?}: stale through the cached table");
        assert_eq!(run(16, true), (false, 0), "{format:?}: flushed");
        assert_eq!(run(0, false), (false, 0), "{format:?}: no such cache");
    }
}

#[test]
fn a_cached_table_never_makes_a_fault() {
    let n = nested(Format::Level4, P | W | U);
    let mut mmu = Mmu::new(64, 1);
    let go = |mmu: &mut Mmu, kind| mmu.access(&n.mem, &n.cx, Tag::amd(5, true), VA, Access::user(kind));
    // The top entry lacks W: guest tables cannot be touched; then it gets W back, without a flush.
    let top = n.mem.read(n.root2, 8);
    n.mem.write(n.root2, 8, top | NX);
    assert!(go(&mut mmu, Read).is_ok());
    assert!(go(&mut mmu, Fetch).is_err());
    n.mem.write(n.root2, 8, top & !NX);
    assert!(go(&mut mmu, Fetch).is_ok(), "cached rights were less than what memory has now");
}
