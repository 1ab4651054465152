//! Shadow NPT and ASIDs on the machine model: VPs that wander between processors whose TLBs forget nothing by
//! themselves never use a translation that L1 or the embedder has taken back.
//!
//! Two VPs of one partition run the same L2 address space on two processors with a handful of ASIDs. L1 edits its
//! tables and flushes, the embedder moves L1's memory and tells every VP. Each access of L2 is compared with a walk of
//! what memory says at that moment.

use std::cell::RefCell;
use std::collections::BTreeMap;

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Change, L1Map, Mapping, PagePool, PageRecord, PageSize, ShadowPage};
use nsvm::asid::{AsidPool, Tag as Lease};
use nsvm::npt::{NptContext, NptFormat, NptOutcome, NptShadow, PagingMode};
use nsvm::vmcb::bits::tlb;
use tests::model::mem::PhysMem;
use tests::model::mmu::Mmu;
use tests::model::rng::Rng;
use tests::model::tables::flag;
use tests::model::tlb::Tag;
use tests::model::walk::{Access, Context, Fault, Kind, Linear, Second, Vendor, translate_gpa};

const L1_BYTES: u64 = 0x10_0000;
const HOST: u64 = 0x10_0000;
const POOLS: u64 = 0x40_0000;
const POOL_PAGES: usize = 12;
const ROOT: u64 = 0x1000;
const BITS: u64 = flag::P | flag::W | flag::U | flag::A;
const PAGES: u64 = 6;

struct L1Memory<'a>(&'a PhysMem);

impl L1Memory<'_> {
    fn at(gpa: L1Gpa) -> Result<u64, MemoryError> {
        if gpa.raw() < L1_BYTES { Ok(HOST + gpa.raw()) } else { Err(MemoryError) }
    }
}

impl GuestMemory for L1Memory<'_> {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read_bytes(Self::at(gpa)?, buf);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.0.write_bytes(Self::at(gpa)?, buf);
        Ok(())
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let result = self.0.cmpxchg(Self::at(gpa)?, 1, current.into(), new.into());
        Ok(result.map(|()| current).map_err(|seen| seen as u8))
    }
    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        let result = self.0.cmpxchg(Self::at(gpa)?, 4, current.into(), new.into());
        Ok(result.map(|()| current).map_err(|seen| seen as u32))
    }
    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        Ok(self.0.cmpxchg(Self::at(gpa)?, 8, current, new).map(|()| current))
    }
}

/// Where the embedder keeps L1's data pages: moved ones elsewhere, or nowhere.
#[derive(Default)]
struct HostMap(RefCell<BTreeMap<u64, Option<u64>>>);

impl L1Map for HostMap {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        let page = gpa.page().raw();
        let hpa = self.0.borrow().get(&page).copied().unwrap_or(Some(HOST + page))?;
        Some(Mapping { hpa: Hpa::new(hpa), size: PageSize::Size4K, writable: true, executable: true, memory_type: 0 })
    }
}

/// What the run leaves out, to show that the check can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    Nothing,
    TagRetirement,
    ChangeRequest,
    L1Flush,
    GenerationFlush,
}

struct Vp<'a> {
    shadow: NptShadow<'a, 2>,
    pages: &'a [ShadowPage],
    base: u64,
    lease: Lease,
}

struct Cpu {
    mmu: Mmu,
    asids: AsidPool,
}

struct World<'a> {
    mem: PhysMem,
    map: HostMap,
    vps: Vec<Vp<'a>>,
    cpus: Vec<Cpu>,
    rng: Rng,
    skip: Skip,
}

impl World<'_> {
    /// L1 edits an entry and flushes its ASIDs on every VP, as it must.
    fn l1_edits(&mut self) {
        let (from, to) = (self.page(), self.page());
        let at = HOST + 0x4000 + (from >> 12) * 8;
        let bits = if self.rng.chance(200) { 0 } else { BITS ^ if self.rng.chance(300) { flag::W } else { 0 } };
        self.mem.write(at, 8, to | bits);
        if self.skip == Skip::L1Flush {
            return;
        }
        for vp in &mut self.vps {
            vp.shadow.flush_all_asids();
            vp.lease.invalidate();
        }
    }

    /// The embedder moves a page of L1's memory, or takes it away, and posts the change.
    fn embedder_moves(&mut self) {
        let page = self.page();
        let place = match self.rng.below(3) {
            0 => None,
            1 => Some(HOST + page),
            _ => Some(0x30_0000 + page),
        };
        self.map.0.borrow_mut().insert(page, place);
        if self.skip != Skip::ChangeRequest {
            for vp in &mut self.vps {
                vp.shadow.l1_gpa_changed(L1Gpa::new(page), 0x1000, L1Change::Unmap);
            }
        }
    }

    /// A page of L1's memory that L2 may have, and of L2's.
    fn page(&mut self) -> u64 {
        0x1_0000 + self.rng.below(PAGES) * 0x1000
    }

    /// What an access of L2 does by what memory says now: the L1 GPA, or `None` for a fault of L1's tables.
    fn expected(&self, gpa: u64, kind: Kind) -> Option<u64> {
        let bare = PhysMem::new(L1_BYTES);
        for at in (ROOT..ROOT + 0x4000).step_by(8) {
            let word = self.mem.read(HOST + at, 8);
            if word != 0 {
                bare.write(at, 8, word);
            }
        }
        let npt = Linear { maxphyaddr: 40, ..Linear::long(Vendor::Amd, ROOT) };
        translate_gpa(&Second::Npt(npt), &bare, gpa, kind, false).ok()
    }

    /// Runs `vp` on `cpu` for one access of L2.
    fn l2_runs(&mut self) -> Result<bool, String> {
        let gpa = self.page() + 0x10;
        let kind = [Kind::Read, Kind::Write, Kind::Fetch][self.rng.below(3) as usize];
        let l1_asid = 1 + self.rng.below(3) as u32;
        let (vp, cpu) = (self.rng.below(2) as usize, self.rng.below(2) as usize);
        let l1 = self.expected(gpa, kind);
        let wanted = l1.and_then(|l1| L1Map::map(&self.map, L1Gpa::new(l1)).map(|m| m.hpa.raw() + (l1 & 0xFFF)));
        let (vp, cpu) = (&mut self.vps[vp], &mut self.cpus[cpu]);
        let format = NptFormat { mode: PagingMode::Long4, pse: false, nxe: true, phys_bits: 40, gib_pages: true };
        for _ in 0..6 {
            let root = vp.shadow.activate(NptContext { ncr3: ROOT, asid: l1_asid, format }).raw();
            if vp.shadow.tag_stale() {
                if self.skip != Skip::TagRetirement {
                    vp.lease.invalidate();
                }
                vp.shadow.tag_retired();
            }
            let assigned = cpu.asids.assign(&mut vp.lease);
            match assigned.tlb_control {
                tlb::NONE => {}
                _ if self.skip == Skip::GenerationFlush => {}
                tlb::ALL => drop(cpu.mmu.tlb.flush_all()),
                _ => drop(cpu.mmu.tlb.flush_asid(assigned.asid)),
            }
            cpu.asids.entered(&mut vp.lease);
            for (n, page) in vp.pages.iter().enumerate() {
                for slot in 0..512 {
                    let at = vp.base + n as u64 * 4096 + slot as u64 * 8;
                    if self.mem.read(at, 8) != page.entry(slot) {
                        self.mem.write(at, 8, page.entry(slot));
                    }
                }
            }
            let second = Second::Npt(Linear::long(Vendor::Amd, root));
            let cx = Context { linear: Linear::off(Vendor::Amd), second };
            let tag = Tag::amd(assigned.asid, true);
            match cpu.mmu.access(&self.mem, &cx, tag, gpa, Access::system(kind)) {
                Ok(hpa) if Some(hpa) == wanted => return Ok(true),
                Ok(hpa) => return Err(format!("{gpa:#x} led to {hpa:#x}, not {wanted:x?}")),
                Err(Fault::Npf { info1, gpa: at }) => {
                    match vp.shadow.fault(&L1Memory(&self.mem), &self.map, L2Gpa::new(at), info1) {
                        NptOutcome::Resume => {}
                        NptOutcome::Reflect { .. } if l1.is_none() => return Ok(false),
                        NptOutcome::Embedder(_) if l1.is_some() && wanted.is_none() => return Ok(false),
                        other => return Err(format!("{gpa:#x}: {other:x?}, not {wanted:x?}")),
                    }
                }
                Err(other) => return Err(format!("{other:?}")),
            }
        }
        Err("no progress".into())
    }
}

fn run(seed: u64, flush_by_asid: bool, skip: Skip) -> Result<u32, String> {
    let storage: Vec<Vec<ShadowPage>> = (0..2).map(|_| (0..POOL_PAGES).map(|_| ShadowPage::new()).collect()).collect();
    let mut records: Vec<Vec<PageRecord>> =
        (0..2).map(|_| (0..POOL_PAGES).map(|_| PageRecord::new()).collect()).collect();
    let mem = PhysMem::new(0x60_0000);
    for level in 0..3 {
        mem.write(HOST + ROOT + level * 0x1000, 8, (ROOT + (level + 1) * 0x1000) | BITS);
    }
    let vps = storage.iter().zip(&mut records).zip([POOLS, POOLS + 0x10_0000]).map(|((pages, records), base)| {
        let pool = PagePool::new(pages, records, |n| Hpa::new(base + n as u64 * 4096)).unwrap();
        Vp { shadow: NptShadow::new(pool, 4).unwrap(), pages, base, lease: Lease::default() }
    });
    let cpus = (0..2).map(|n| Cpu { mmu: Mmu::new(64, seed), asids: AsidPool::new(n, 4, flush_by_asid).unwrap() });
    let mut world =
        World { mem, map: HostMap::default(), vps: vps.collect(), cpus: cpus.collect(), rng: Rng::new(seed), skip };
    for n in 0..PAGES {
        world.mem.write(HOST + 0x4000 + (0x10 + n) * 8, 8, (0x1_0000 + n * 0x1000) | BITS);
    }
    let mut hits = 0;
    for _ in 0..600 {
        match world.rng.below(20) {
            0 => world.l1_edits(),
            1 => world.embedder_moves(),
            _ => hits += u32::from(world.l2_runs()?),
        }
    }
    Ok(hits)
}

#[test]
fn no_processor_uses_a_translation_that_was_taken_back() {
    for seed in 0..6 {
        for flush_by_asid in [false, true] {
            let hits = run(seed, flush_by_asid, Skip::Nothing).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            assert!(hits > 100, "seed {seed}: L2 reaches memory, {hits}");
        }
    }
}

#[test]
fn each_missing_step_is_found() {
    for skip in [Skip::TagRetirement, Skip::ChangeRequest, Skip::L1Flush, Skip::GenerationFlush] {
        assert!((0..6).any(|seed| run(seed, false, skip).is_err()), "{skip:?} was not found");
    }
}
