//! The client and the host together: whatever L1 writes in its own way, L0 has at the next entry, and the reverse.
//!
//! Two VPs of L1 and three pages. L1 writes fields through the client, enters with VMLAUNCH or VMRESUME, moves a page
//! to the other VP after VMCLEAR, and L0 changes what exits change.

use hvcore::addr::L1Gpa;
use nvmx::evmcs::EvmcsCache;
use nvmx::evmcs::client::Evmcs;
use nvmx::field::{Area, Field};
use nvmx::vmcs12::Vmcs12;
use tlfs_abi::evmcs::EvmcsUse;

use crate::memory::*;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What one side leaves out, to show that the check can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Defect {
    None,
    /// L1 writes one field behind the client's back.
    WrittenPastTheClient,
    /// L1 moves a page without VMCLEAR.
    NotCleared,
    /// L0 forgets to write an exit back.
    NotStored,
}

const PAGES: [u64; 3] = [0x4000, 0x5000, 0x6000];

struct Vp {
    cache: EvmcsCache,
    vmcs12: Vmcs12,
}

struct World<'a> {
    memory: &'a Memory,
    random: Random,
    vps: [Vp; 2],
    pages: [Evmcs<'a>; 3],
    /// The VP where each page is active.
    active: [Option<usize>; 3],
    defect: Defect,
}

fn read_by_l0(field: Field) -> bool {
    matches!(field.evmcs(), Some(place) if place.usage != EvmcsUse::ReadOnly)
}

/// Guest state that exits save, and exit information.
fn written_by_l0(field: Field) -> bool {
    match field.area() {
        Area::ExitInformation => field.evmcs().is_some(),
        Area::Guest => field.evmcs().is_some() && !matches!(field, Field::VmcsLinkPointer | Field::GuestPerfGlobalCtrl),
        _ => matches!(field, Field::EntryControls | Field::EntryInterruptionInfo),
    }
}

impl World<'_> {
    fn write(&mut self, page: usize) {
        for _ in 0..self.random.below(6) {
            let field = Field::ALL[self.random.below(Field::COUNT as u64) as usize];
            // Small values repeat, so that writes of the same value occur.
            let value = if self.random.below(2) == 0 { self.random.below(4) } else { self.random.next() };
            assert_eq!(self.pages[page].write(field, value).is_ok(), field.evmcs().is_some(), "{field:?}");
        }
        if self.random.below(8) == 0 {
            let (vm, vp, assist) = (self.random.below(3), self.random.below(3) as u32, self.random.below(3) << 12);
            self.pages[page].set_context(vm, vp, L1Gpa::new(assist));
        }
        if self.defect == Defect::WrittenPastTheClient && self.random.below(4) == 0 {
            self.memory.set_field(PAGES[page], Field::GuestCr3, self.random.next());
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let page = self.random.below(3) as usize;
        let vp = self.random.below(2) as usize;
        self.write(page);
        // One page is active on one VP only; VMCLEAR there before the other.
        if let Some(old) = self.active[page].filter(|old| *old != vp)
            && self.defect != Defect::NotCleared
        {
            let cache = &mut self.vps[old].cache;
            if cache.active() == Some(L1Gpa::new(PAGES[page])) {
                cache.release();
            }
            self.pages[page].reload();
        }
        self.active[page] = Some(vp);
        let launch = self.random.below(8) == 0;
        let Vp { cache, vmcs12 } = &mut self.vps[vp];
        cache.load(self.memory, L1Gpa::new(PAGES[page]), launch, vmcs12).map_err(|error| format!("{error:?}"))?;
        self.compare(vp, page, read_by_l0, "at entry")?;
        let Vp { cache, vmcs12 } = &mut self.vps[vp];
        cache.entered(self.memory).map_err(|error| format!("{error:?}"))?;
        for _ in 0..self.random.below(8) {
            let field = Field::ALL[self.random.below(Field::COUNT as u64) as usize];
            if written_by_l0(field) {
                vmcs12.set(field, self.random.next());
            }
        }
        if self.defect != Defect::NotStored || self.random.below(4) != 0 {
            cache.store(self.memory, vmcs12).map_err(|error| format!("{error:?}"))?;
        }
        self.compare(vp, page, written_by_l0, "after the exit")
    }

    fn compare(&self, vp: usize, page: usize, which: fn(Field) -> bool, when: &str) -> Result<(), String> {
        let Vp { cache, vmcs12 } = &self.vps[vp];
        let client = &self.pages[page];
        for field in Field::ALL.iter().copied().filter(|field| which(*field)) {
            let (host, client) = (vmcs12.get(field), client.read(field));
            if client != Ok(host) {
                return Err(format!("{when}: {field:?} is {client:x?} for L1 and {host:#x} for L0"));
            }
        }
        let ids = cache.enlightenments();
        let memory = (
            self.memory.get(PAGES[page], 0x348, 4),
            self.memory.get(PAGES[page], 0x350, 8),
            self.memory.get(PAGES[page], 0x358, 8),
        );
        if (u64::from(ids.vp_id), ids.vm_id, ids.partition_assist_page) != memory {
            return Err(format!("{when}: {ids:x?} for L0, {memory:x?} for L1"));
        }
        Ok(())
    }
}

fn run(seed: u64, defect: Defect) -> Result<(), String> {
    let memory = if seed & 1 == 0 { Memory::new() } else { Memory::lending() };
    let vp = || Vp { cache: EvmcsCache::new(), vmcs12: Vmcs12::default() };
    let mut world = World {
        memory: &memory,
        random: Random(seed),
        vps: [vp(), vp()],
        pages: PAGES.map(|page| Evmcs::new(memory.shared(page), L1Gpa::new(page))),
        active: [None; 3],
        defect,
    };
    for n in 0..200 {
        memory.rest();
        world.step().map_err(|why| format!("seed {seed}, step {n}: {why}"))?;
        if !memory.reads_are_disjoint() {
            return Err(format!("seed {seed}, step {n}: a byte was read twice"));
        }
    }
    Ok(())
}

#[test]
fn l0_and_l1_agree_at_every_entry_and_after_every_exit() {
    for seed in 0..200 {
        run(seed, Defect::None).unwrap();
    }
}

#[test]
fn the_comparison_finds_each_defect() {
    for defect in [Defect::WrittenPastTheClient, Defect::NotCleared, Defect::NotStored] {
        assert!((0..20).any(|seed| run(seed, defect).is_err()), "{defect:?} was not found");
    }
}
