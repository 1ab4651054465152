//! The shadow EPT on the machine model: L2 on an L0 that shadows L1's tables behaves as L2 on a processor that walks
//! L1's tables itself.
//!
//! Two machines with the same guest. On one, L1 is the only hypervisor and physical memory is L1's. On the other,
//! L1's memory is somewhere in the host's, the processor walks the shadow tables, and each EPT violation goes through
//! `nvmx::ept`. Every access ends at the same place with the same memory type or in the same exit with the same
//! qualification, and leaves the same accessed and dirty flags in L2's and L1's tables.

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping, PagePool, PageRecord, PageSize as Size, ShadowPage};
use nvmx::ept::{EptFormat, EptOutcome, EptShadow};
use tests::model::mem::PhysMem;
use tests::model::rng::Rng;
use tests::model::tables::{Format, Tables, flag};
use tests::model::tlb::PageSize;
use tests::model::walk::{Access, Context, Ept, Fault, Hit, Kind, Linear, Mode, Second, Vendor, translate};

/// L1's memory: this much, from here on in the host's.
const L1_BYTES: u64 = 0x60_0000;
const HOST: u64 = 0x80_0000;
/// The shadow pages, in the host's memory.
const POOL: u64 = 0x10_0000;
const POOL_PAGES: usize = 20;

const L1_ROOT: u64 = 0x1000;
/// L2's tables and data, by L1 GPA; its GPAs are lower by `SHIFT`.
const SHIFT: u64 = 0x20_0000;
const L2_TABLES: u64 = 0x20_0000;
const L2_DATA: u64 = 0x28_0000;

struct L1Memory<'a>(&'a PhysMem);

impl L1Memory<'_> {
    fn at(gpa: L1Gpa, bytes: u64) -> Result<u64, MemoryError> {
        if gpa.raw() + bytes <= L1_BYTES { Ok(HOST + gpa.raw()) } else { Err(MemoryError) }
    }
}

impl GuestMemory for L1Memory<'_> {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read_bytes(Self::at(gpa, buf.len() as u64)?, buf);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.0.write_bytes(Self::at(gpa, buf.len() as u64)?, buf);
        Ok(())
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let result = self.0.cmpxchg(Self::at(gpa, 1)?, 1, current.into(), new.into());
        Ok(result.map(|()| current).map_err(|seen| seen as u8))
    }
    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        let result = self.0.cmpxchg(Self::at(gpa, 4)?, 4, current.into(), new.into());
        Ok(result.map(|()| current).map_err(|seen| seen as u32))
    }
    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        Ok(self.0.cmpxchg(Self::at(gpa, 8)?, 8, current, new).map(|()| current))
    }
}

/// The host maps L1's memory in large pages here and small ones there.
struct HostMap;

impl L1Map for HostMap {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        let size = if gpa.raw() & 0x20_0000 != 0 { Size::Size2M } else { Size::Size4K };
        let hpa = Hpa::new(HOST + (gpa.raw() & !size.offset_mask()));
        (gpa.raw() < L1_BYTES).then_some(Mapping { hpa, size, writable: true, executable: true, memory_type: 6 })
    }
}

/// What both machines have, and what the library is told.
#[derive(Clone, Copy, Debug)]
struct World {
    /// L1's EPT has accessed and dirty flags.
    flags: bool,
    exec_only: bool,
    pages_1g: bool,
    l2: Format,
    /// The library is told of the opposite of `flags`: a control.
    mistaken: bool,
}

impl World {
    fn eptp(self) -> u64 {
        L1_ROOT | 0x1E | u64::from(self.flags) << 6
    }

    fn ept(self) -> Ept {
        Ept {
            eptp: self.eptp(),
            exec_only: self.exec_only,
            pages_1g: self.pages_1g,
            maxphyaddr: 40,
            ..Ept::new(L1_ROOT)
        }
    }

    fn library(self) -> EptFormat {
        EptFormat {
            execute_only: self.exec_only,
            pages_2m: true,
            pages_1g: self.pages_1g,
            physical_bits: 40,
            hardware_flags: true,
        }
    }

    fn linear(self) -> Linear {
        let mode = match self.l2 {
            Format::Bits32 => Mode::Bits32,
            Format::Level5 => Mode::Level5,
            _ => Mode::Level4,
        };
        Linear { mode, pse: true, ..Linear::long(Vendor::Intel, L2_TABLES - SHIFT) }
    }
}

const VA: u64 = 0x1234_5000;
const PAGES: u64 = 2;

/// Writes the guest: L2's tables, and L1's tables that map all of L2's memory, in `mem`.
fn build(mem: &PhysMem, world: World, rng: &mut Rng) {
    let mut l1 = Tables::new(mem, L1_ROOT);
    let root = l1.frame();
    assert_eq!(root, L1_ROOT);
    let bits = flag::RWX | flag::WB;
    if rng.chance(300) {
        l1.map(Format::Ept, root, L2_TABLES - SHIFT, L2_TABLES, PageSize::M2, bits);
    } else {
        for page in (L2_TABLES..L2_TABLES + 0x1_0000).chain(L2_DATA..L2_DATA + PAGES * 0x1000).step_by(0x1000) {
            l1.map(Format::Ept, root, page - SHIFT, page, PageSize::K4, bits);
        }
    }
    // L2's tables hold L2 GPAs: built by hand, from the top down.
    let bits = flag::P | flag::W | flag::U;
    let (levels, index_bits, bytes) = match world.l2 {
        Format::Bits32 => (2, 10, 4),
        Format::Level5 => (5, 9, 8),
        _ => (4, 9, 8),
    };
    let mut table = L2_TABLES;
    for level in (1..=levels).rev() {
        let index = |va: u64| va >> (12 + index_bits * (level - 1)) & ((1 << index_bits) - 1);
        if level == 1 {
            for n in 0..PAGES {
                let entry = L2_DATA - SHIFT + n * 0x1000;
                mem.write(table + index(VA + n * 0x1000) * bytes, bytes, entry | bits);
            }
        } else {
            mem.write(table + index(VA) * bytes, bytes, (table + 0x1000 - SHIFT) | bits);
            table += 0x1000;
        }
    }
}

/// Flips a few bits in entries of L1's and L2's tables: any entry that is in use, those of data pages more often, any
/// bit, the low ones more often.
fn mutate(mem: &PhysMem, rng: &mut Rng) {
    let entries: Vec<u64> = (L1_ROOT..L1_ROOT + 0x8000)
        .chain(L2_TABLES..L2_TABLES + 0x5000)
        .step_by(8)
        .filter(|&at| mem.read(at, 8) != 0)
        .flat_map(|at| {
            let leads = mem.read(at, 8) & 0xFFFF_F000;
            let data = leads & !(SHIFT - 1) == SHIFT && leads >= L2_DATA;
            std::iter::repeat_n(at, if data { 8 } else { 1 })
        })
        .collect();
    for _ in 0..rng.below(4) {
        let at = entries[rng.below(entries.len() as u64) as usize];
        let bit = if rng.below(3) == 0 { rng.below(64) } else { rng.below(10) };
        mem.write(at, 8, mem.read(at, 8) ^ 1 << bit);
    }
}

fn copy_shadow(pages: &[ShadowPage], mem: &PhysMem) {
    for (n, page) in pages.iter().enumerate() {
        for slot in 0..512 {
            let at = POOL + n as u64 * 4096 + slot as u64 * 8;
            if mem.read(at, 8) != page.entry(slot) {
                mem.write(at, 8, page.entry(slot));
            }
        }
    }
}

fn same_place(bare: &Hit, nested: &Hit) -> bool {
    bare.gpa == nested.gpa && bare.hpa.wrapping_add(HOST) == nested.hpa && bare.second_type == nested.second_type
}

#[derive(Default)]
struct Counts {
    hits: usize,
    violations: usize,
    misconfigurations: usize,
}

fn one(world: World, rng: &mut Rng, pages: &[ShadowPage], records: &mut [PageRecord], counts: &mut Counts) {
    let bare = PhysMem::new(L1_BYTES);
    build(&bare, world, rng);
    mutate(&bare, rng);
    let host = PhysMem::new(HOST + L1_BYTES);
    for at in (L1_ROOT..L1_ROOT + 0x1_0000).chain(L2_TABLES..L2_TABLES + 0x6000).step_by(8) {
        let word = bare.read(at, 8);
        if word != 0 {
            host.write(HOST + at, 8, word);
        }
    }
    let pool = PagePool::new(pages, records, |n| Hpa::new(POOL + n as u64 * 4096)).unwrap();
    let mut shadow = EptShadow::<4>::new(pool, 4, world.library()).unwrap();
    let eptp = shadow.activate(world.eptp() ^ u64::from(world.mistaken) << 6);
    let on_bare = Context { linear: world.linear(), second: Second::Ept(world.ept()) };
    let on_host = Context { linear: world.linear(), second: Second::Ept(Ept { eptp, ..Ept::new(0) }) };
    for _ in 0..4 {
        let kind = [Kind::Read, Kind::Write, Kind::Fetch][rng.below(3) as usize];
        let access = if rng.chance(512) { Access::user(kind) } else { Access::system(kind) };
        let va = VA + rng.below(PAGES) * 0x1000 + 0x123;
        let expected = translate(&on_bare, &bare, va, access, true);
        let mut tries = 0;
        let found = loop {
            tries += 1;
            assert!(tries < 20, "{world:?}: no progress");
            copy_shadow(pages, &host);
            match translate(&on_host, &host, va, access, true) {
                Err(Fault::EptViolation { qualification, gpa }) => {
                    match shadow.fault(&L1Memory(&host), &HostMap, L2Gpa::new(gpa), qualification, None) {
                        EptOutcome::Resume => {}
                        EptOutcome::Reflect { reason: 48, qualification } => {
                            break Err(Fault::EptViolation { qualification, gpa });
                        }
                        EptOutcome::Reflect { .. } => break Err(Fault::EptMisconfig { gpa }),
                        // Outside L1's memory: nothing answers on either machine.
                        EptOutcome::Embedder(access) => {
                            assert!(access.l1.raw() >= L1_BYTES);
                            return;
                        }
                    }
                }
                Err(Fault::EptMisconfig { gpa }) => panic!("{world:?}: the shadow is misconfigured at {gpa:#x}"),
                other => break other,
            }
        };
        match (&expected, &found) {
            (Ok(bare), Ok(nested)) => {
                assert!(same_place(bare, nested), "{world:?}: {bare:x?} {nested:x?}");
                counts.hits += 1;
            }
            _ => {
                assert_eq!(expected, found, "{world:?} {va:#x} {access:?}");
                counts.violations += usize::from(matches!(found, Err(Fault::EptViolation { .. })));
                counts.misconfigurations += usize::from(matches!(found, Err(Fault::EptMisconfig { .. })));
                // What is marked on the way to a fault is left to the processor: both start afresh.
                shadow.flush_everything();
            }
        }
        compare_tables(&bare, &host, expected.is_ok(), world);
    }
}

/// L1's memory is the same on both machines, after a fault but for accessed and dirty flags.
fn compare_tables(bare: &PhysMem, host: &PhysMem, exact: bool, world: World) {
    for at in (L1_ROOT..L1_ROOT + 0x1_0000).chain(L2_TABLES..L2_TABLES + 0x6000).step_by(8) {
        let (a, b) = (bare.read(at, 8), host.read(HOST + at, 8));
        if exact {
            assert_eq!(a, b, "{world:?}: the entry at {at:#x}");
        } else {
            let marks = if at >= L2_TABLES { (flag::A | flag::D) * 0x1_0000_0001 } else { 3 << 8 };
            assert_eq!(a & !marks, b & !marks, "{world:?}: the entry at {at:#x}");
            // From here on both have the same.
            host.write(HOST + at, 8, a);
        }
    }
}

fn run(flags: bool, l2: Format, mistaken: bool) -> Counts {
    let mut rng = Rng::new(11);
    let pages: Vec<ShadowPage> = (0..POOL_PAGES).map(|_| ShadowPage::new()).collect();
    let mut records: Vec<PageRecord> = (0..POOL_PAGES).map(|_| PageRecord::new()).collect();
    let mut counts = Counts::default();
    for n in 0..150 {
        let world = World { flags, exec_only: n % 3 != 0, pages_1g: n % 2 != 0, l2, mistaken };
        one(world, &mut rng, &pages, &mut records, &mut counts);
    }
    counts
}

#[test]
fn l2_cannot_tell_a_shadow_from_l1s_own_tables() {
    for flags in [false, true] {
        for l2 in [Format::Level4, Format::Level5, Format::Bits32] {
            let Counts { hits, violations, misconfigurations } = run(flags, l2, false);
            let seen = hits > 50 && violations > 10 && misconfigurations > 10;
            assert!(seen, "{flags} {l2:?}: {hits} {violations} {misconfigurations}");
        }
    }
}

#[test]
#[should_panic(expected = "left == right")]
fn a_mistaken_pointer_is_told_apart() {
    run(true, Format::Level4, true);
}
