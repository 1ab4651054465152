//! The model's page walks against cases computed by hand from the SDM and the APM: each rule fires, and just short of
//! it nothing happens.

use tests::model::mem::PhysMem;
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::PageSize;
use tests::model::walk::{Access, Context, Fault, Hit, Kind, Linear, Mode, Second, Vendor, translate};

use Kind::{Fetch, Read, Write};
use flag::{A, D, G, NX, P, U, W};

const VA: u64 = 0x1234_5678;

/// Memory, a guest tree at `root` with one 4 KiB page at `VA` (leaf at `leaf`), to be broken by a test.
struct Bench {
    mem: PhysMem,
    root: u64,
    leaf: u64,
    linear: Linear,
}

fn bench(format: Format, size: PageSize, flags: u64) -> Bench {
    let mem = PhysMem::new(0x40_0000);
    let mut t = Tables::new(&mem, 0x1000);
    let root = t.frame();
    let leaf = t.map(format, root, VA, 0x20_0000, size, flags);
    let mode = match format {
        Format::Bits32 => Mode::Bits32,
        Format::Pae => Mode::Pae,
        Format::Level5 => Mode::Level5,
        _ => Mode::Level4,
    };
    let linear = Linear { mode, pse: true, ..Linear::long(Vendor::Intel, root) };
    Bench { mem, root, leaf, linear }
}

impl Bench {
    fn at(&self, addr: u64, access: Access) -> Result<Hit, Fault> {
        translate(&Context { linear: self.linear, second: Second::Off }, &self.mem, addr, access, true)
    }
    fn go(&self, access: Access) -> Result<Hit, Fault> {
        self.at(VA, access)
    }
    fn code(&self, access: Access) -> u32 {
        match self.go(access) {
            Err(Fault::Page { code }) => code,
            other => panic!("expected #PF, got {other:?}"),
        }
    }
    fn set(&self, at: u64, value: u64) {
        self.mem.write(at, 8, value);
    }
}

#[test]
fn every_mode_and_page_size_translates() {
    let cases = [
        (Format::Bits32, PageSize::K4, 0x678),
        (Format::Bits32, PageSize::M4, 0x34_5678),
        (Format::Pae, PageSize::K4, 0x678),
        (Format::Pae, PageSize::M2, 0x14_5678),
        (Format::Level4, PageSize::K4, 0x678),
        (Format::Level4, PageSize::M2, 0x14_5678),
        (Format::Level4, PageSize::G1, 0x1234_5678),
        (Format::Level5, PageSize::K4, 0x678),
        (Format::Level5, PageSize::G1, 0x1234_5678),
    ];
    for (format, size, offset) in cases {
        let b = bench(format, size, P | W | U);
        let hit = b.go(Access::user(Read)).expect("mapped");
        assert_eq!(hit.hpa, size.base(0x20_0000) + offset, "{format:?} {size:?}");
        assert_eq!((hit.size, hit.linear_size), (size, size));
        // The neighbour page is not there.
        assert_eq!(b.at(VA + size.bytes(), Access::user(Read)), Err(Fault::Page { code: 4 }));
    }
}

#[test]
fn protection_follows_user_write_and_nx() {
    // Flags, access, WP, error code (None: allowed).
    let s = Access::system;
    let u = Access::user;
    let cases = [
        (P | W | U, u(Write), true, None),
        (P | U, u(Read), true, None),
        (P | U, u(Write), true, Some(7)),
        (P | U, u(Write), false, Some(7)),
        (P | W, u(Read), true, Some(5)),
        (P | W, u(Fetch), true, Some(0x15)),
        (P, s(Write), true, Some(3)),
        (P, s(Write), false, None),
        (P, s(Read), true, None),
        (P | NX, s(Fetch), true, Some(0x11)),
        (P | NX, s(Read), true, None),
        (P | U | NX, u(Fetch), true, Some(0x15)),
        (0, s(Read), true, Some(0)),
        (0, u(Write), true, Some(6)),
        (0, s(Fetch), true, Some(0x10)),
    ];
    for (flags, access, wp, want) in cases {
        let mut b = bench(Format::Level4, PageSize::K4, flags);
        b.linear.wp = wp;
        let got = b.go(access);
        match want {
            None => assert!(got.is_ok(), "{flags:#x} {access:?}"),
            Some(code) => assert_eq!(got, Err(Fault::Page { code }), "{flags:#x} {access:?}"),
        }
    }
}

#[test]
fn upper_levels_restrict() {
    let b = bench(Format::Level4, PageSize::K4, P | W | U);
    let top = b.mem.read(b.root, 8);
    for (entry, access, code) in [
        (top & !W, Access::user(Write), 7),
        (top & !U, Access::user(Read), 5),
        (top | NX, Access::user(Fetch), 0x15),
        (top & !P, Access::user(Read), 4),
    ] {
        b.set(b.root, top);
        assert!(b.go(access).is_ok());
        b.set(b.root, entry);
        assert_eq!(b.code(access), code);
    }
}

#[test]
fn smep_and_smap() {
    let mut b = bench(Format::Level4, PageSize::K4, P | W | U);
    let ac = Access { ac: true, ..Access::system(Read) };
    assert!(b.go(Access::system(Fetch)).is_ok() && b.go(Access::system(Read)).is_ok());
    b.linear.smep = true;
    assert_eq!(b.code(Access::system(Fetch)), 0x11);
    assert!(b.go(Access::user(Fetch)).is_ok() && b.go(Access::system(Read)).is_ok());
    b.linear.smap = true;
    assert_eq!(b.code(Access::system(Read)), 1);
    assert!(b.go(ac).is_ok() && b.go(Access::user(Read)).is_ok());
    // Without NXE, the I bit of the code comes from SMEP alone.
    b.linear.nxe = false;
    assert_eq!(b.code(Access::system(Fetch)), 0x11);
    b.set(b.leaf, 0);
    assert_eq!(b.code(Access::system(Fetch)), 0x10);
    b.linear.smep = false;
    assert_eq!(b.code(Access::system(Fetch)), 0);
}

#[test]
fn reserved_bits_fault_with_p_and_rsvd() {
    // Size, level of the entry that gets the bit (0 = leaf, 3 = PML4E), bit, vendor; NXE on.
    use PageSize::{G1, K4, M2};
    let fires = [
        (Format::Level4, K4, 0, 48, Vendor::Intel),
        (Format::Level4, K4, 0, 51, Vendor::Intel),
        (Format::Level4, M2, 0, 13, Vendor::Intel),
        (Format::Level4, M2, 0, 20, Vendor::Intel),
        (Format::Level4, G1, 0, 29, Vendor::Amd),
        (Format::Level4, K4, 3, 7, Vendor::Intel),
        (Format::Level4, K4, 3, 8, Vendor::Amd),
        (Format::Level4, K4, 3, 48, Vendor::Intel),
        (Format::Pae, K4, 0, 52, Vendor::Intel),
        (Format::Pae, K4, 0, 62, Vendor::Intel),
        (Format::Bits32, PageSize::M4, 0, 21, Vendor::Intel),
    ];
    let short = [
        (Format::Level4, K4, 0, 47, Vendor::Intel),
        (Format::Level4, K4, 0, 52, Vendor::Intel),
        (Format::Level4, K4, 0, 9, Vendor::Intel),
        (Format::Level4, M2, 0, 12, Vendor::Intel),
        (Format::Level4, M2, 0, 21, Vendor::Intel),
        (Format::Level4, G1, 0, 30, Vendor::Amd),
        (Format::Level4, K4, 3, 8, Vendor::Intel),
        (Format::Level4, K4, 3, 62, Vendor::Amd),
        (Format::Pae, K4, 0, 47, Vendor::Intel),
        (Format::Bits32, PageSize::M4, 0, 20, Vendor::Intel),
    ];
    let run = |(format, size, level, bit, vendor): (Format, PageSize, u32, u32, Vendor)| {
        let mut b = bench(format, size, P | W | U);
        b.linear.vendor = vendor;
        let at = if level == 0 { b.leaf } else { b.root };
        b.set(at, b.mem.read(at, 8) | 1 << bit);
        b.go(Access::user(Write)).err()
    };
    for case in fires {
        assert_eq!(run(case), Some(Fault::Page { code: 0xF }), "{case:?}");
    }
    for case in short {
        assert_eq!(run(case), None, "{case:?}");
    }
    // NX is reserved while NXE is off, and 1 GiB pages are where the CPU has none.
    let mut b = bench(Format::Level4, K4, P | W | NX);
    assert!(b.go(Access::system(Read)).is_ok());
    b.linear.nxe = false;
    assert_eq!(b.code(Access::system(Read)), 9);
    let mut b = bench(Format::Level4, G1, P | W);
    b.linear.pages_1g = false;
    assert_eq!(b.code(Access::system(Read)), 9);
    // A narrower CPU.
    let mut b = bench(Format::Level4, K4, P | W | 1 << 40);
    assert!(b.go(Access::system(Read)).is_ok());
    b.linear.maxphyaddr = 40;
    assert_eq!(b.code(Access::system(Read)), 9);
}

#[test]
fn pae_pdptes_come_from_registers_or_memory() {
    let mut b = bench(Format::Pae, PageSize::K4, P | W);
    let pdpte = b.mem.read(b.root, 8);
    b.linear.pdptes = Some([pdpte, 0, 0, 0]);
    b.set(b.root, 0);
    assert!(b.go(Access::system(Read)).is_ok(), "the register still has it");
    assert_eq!(b.at(VA + (1 << 30), Access::system(Read)), Err(Fault::Page { code: 0 }));
    b.linear.pdptes = None;
    assert_eq!(b.code(Access::system(Read)), 0);
    b.set(b.root, pdpte | W);
    assert_eq!(b.code(Access::system(Read)), 9, "bit 1 of a PDPTE is reserved");
    b.set(b.root, pdpte | 1 << 9);
    assert!(b.go(Access::system(Read)).is_ok());
}

#[test]
fn pse36_reaches_40_bits() {
    let mut b = bench(Format::Bits32, PageSize::M4, P | W);
    b.mem.write(b.leaf, 4, P | W | flag::PS | 0x0040_0000 | 0x81 << 13);
    assert_eq!(b.go(Access::system(Read)).expect("mapped").hpa, 0x81_0040_0000 + (VA & 0x3F_FFFF));
    b.linear.maxphyaddr = 39;
    assert_eq!(b.code(Access::system(Read)), 9);
    b.linear.pse = false;
    b.mem.write(b.leaf, 4, P | W | flag::PS | 0x3000);
    assert!(b.go(Access::system(Read)).is_err(), "without PSE the entry names a table");
}

#[test]
fn accessed_and_dirty_are_set_when_the_access_succeeds() {
    let b = bench(Format::Level4, PageSize::K4, P | U | G);
    assert!(b.go(Access::user(Write)).is_err());
    assert_eq!(b.mem.read(b.leaf, 8) & (A | D), 0, "a refused access leaves no trace");
    assert!(b.go(Access::user(Read)).expect("readable").global);
    assert_eq!(b.mem.read(b.leaf, 8) & (A | D), A);
    assert_eq!(b.mem.read(b.root, 8) & (A | D), A);
    b.set(b.leaf, b.mem.read(b.leaf, 8) | W);
    assert!(b.go(Access::user(Write)).expect("writable").first.dirty);
    assert_eq!(b.mem.read(b.leaf, 8) & (A | D), A | D);
    assert_eq!(b.mem.read(b.root, 8) & (A | D), A, "D only in the leaf");
}

#[test]
fn racing_walks_set_flags_and_lose_nothing() {
    let b = bench(Format::Level4, PageSize::K4, P | W | U);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| (0..20_000).for_each(|_| assert!(b.go(Access::user(Write)).is_ok())));
        }
        s.spawn(|| {
            for n in 0..20_000u64 {
                // Software clears the flags and counts in the available bits.
                loop {
                    let old = b.mem.read(b.leaf, 8);
                    let new = (old & !(A | D | 0x7FF << 52)) | (n & 0x7FF) << 52;
                    if b.mem.cmpxchg(b.leaf, 8, old, new).is_ok() {
                        break;
                    }
                }
            }
        });
    });
    assert_eq!(b.mem.read(b.leaf, 8) >> 52, 19_999 & 0x7FF);
}
