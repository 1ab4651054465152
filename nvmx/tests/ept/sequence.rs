//! Long random sequences against an independent walk and a TLB that never forgets by itself.
//!
//! L1 edits its tables and executes INVEPT, the embedder moves and write-protects memory and says so, L1 changes EPT
//! pointers, and L2 accesses memory through the TLB model, which keeps translations by root as the processor does.
//! Whenever L2 is entered, each translation that the TLB or the shadow tables hold is one that the tables of L1 and the
//! embedder give now.

use std::collections::BTreeMap;

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::shadow::{L1Change, L1Map, PageSize};
use nvmx::ept::{EptOutcome, EptShadow};

use crate::machine::*;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A translation of one 4 KiB page: where to, and the rights as in an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    hpa: u64,
    rights: u64,
}

/// The naive walk: what L1's tables and the embedder's mapping say together, written without the library's help.
fn oracle(machine: &Machine, eptp: u64, gpa: u64) -> Option<Page> {
    let mut table = eptp & ADDRESS;
    let mut rights = RWX;
    for shift in [39, 30, 21, 12] {
        let entry = machine.get(table + (gpa >> shift & 0x1FF) * 8);
        if entry & 7 == 0 {
            return None;
        }
        rights &= entry;
        table = entry & ADDRESS;
        if shift == 12 || entry & 0x80 != 0 {
            if eptp & 0x40 != 0 && entry & 0x200 == 0 {
                rights &= !2;
            }
            let offset = (1u64 << shift) - 1;
            let l1 = table & !offset | gpa & offset;
            let mapping = L1Map::map(machine, L1Gpa::new(l1))?;
            rights &= 5 | if mapping.writable { 2 } else { 0 };
            rights &= 3 | if mapping.executable { 4 } else { 0 };
            return Some(Page { hpa: mapping.hpa.raw() + (l1 & (mapping.size.bytes() - 1) & !0xFFF), rights });
        }
    }
    None
}

/// What the run leaves out, to show that the check can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    NoInvept,
    L1sInveptIgnored,
    ChangeNotPosted,
}

struct World {
    machine: Machine,
    shadow: EptShadow<'static>,
    random: Random,
    /// By root, and L2 GPA.
    tlb: BTreeMap<(u64, u64), Page>,
    /// The pointers in use name the same tables below different tops, with flags and without.
    eptp: u64,
    fault: Fault,
    /// L1 edited its tables and has not flushed yet.
    edited: bool,
    written: usize,
}

/// L2 pages that are used: two clusters, so that tables are shared and are not.
fn l2_page(n: u64) -> u64 {
    (n & 7) * 0x1000 + (n >> 3 & 1) * 0x20_0000 + (n >> 4 & 1) * 0x8000_0000
}

fn l1_page(n: u64) -> u64 {
    0x4000_0000 + (n & 7) * 0x1000 + (n >> 3 & 1) * 0x20_0000
}

/// Other tops with the same tables below.
fn tops() -> [u64; 5] {
    [TOP, 0x90_0000, 0x91_0000, 0x92_0000, 0x93_0000]
}

impl World {
    fn new(seed: u64, pages: usize, fault: Fault) -> Self {
        let machine = Machine::new();
        // The two entries of the top that are in use stay what they are from here on.
        for page in [0, 0x8000_0000] {
            machine.map(PLAIN, page, 0, 1, 0);
        }
        for top in tops() {
            machine.back(top);
            machine.set(top, machine.get(TOP));
        }
        Self {
            machine,
            shadow: shadow(pages),
            random: Random(seed),
            tlb: BTreeMap::new(),
            eptp: PLAIN,
            fault,
            edited: false,
            written: 0,
        }
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(10) {
            0..=1 => self.edit(),
            2 => self.invept(),
            3 => self.embedder_moves(),
            4 => {
                let top = tops()[self.random.below(5) as usize];
                self.eptp = top | if self.random.below(2) == 0 { 0x1E } else { 0x5E };
            }
            _ => return self.access(),
        }
        Ok(())
    }

    fn edit(&mut self) {
        let r = &mut self.random;
        let l2 = l2_page(r.next());
        let l1 = l1_page(r.next());
        let rights = [0, R, R | W, R | X, RWX, RWX, RWX, X][r.below(8) as usize];
        let bits = rights | WB | (r.next() & (A | D));
        if r.below(5) == 0 {
            self.machine.map(PLAIN, l2 & !0x1F_FFFF, l1 & !0x1F_FFFF, 2, bits);
        } else {
            let at = self.machine.entry(PLAIN, l2, 2);
            if self.machine.get(at) & PS != 0 {
                self.machine.set(at, 0);
            }
            self.machine.map(PLAIN, l2, l1, 1, bits);
        }
        self.edited = true;
    }

    fn invept(&mut self) {
        self.edited = false;
        if self.fault == Fault::L1sInveptIgnored {
            return;
        }
        match self.random.below(3) {
            0 => {
                self.shadow.flush_everything();
            }
            1 => {
                for top in tops() {
                    self.shadow.flush_context(top | 0x1E);
                }
            }
            _ => {
                // Both parts of the L2 pages in use.
                for top in tops() {
                    self.shadow.flush_gpa_range(top, L2Gpa::new(0), 0x8000_0000);
                    self.shadow.flush_gpa_range(top, L2Gpa::new(0x8000_0000), 0x40_8000);
                }
            }
        }
    }

    fn embedder_moves(&mut self) {
        let page = l1_page(self.random.next());
        let (mapping, change) = match self.random.below(4) {
            0 => (None, L1Change::Unmap),
            1 => (small(HOST + 0x10_0000_0000 + page, true, true), L1Change::Unmap),
            2 => {
                let now =
                    L1Map::map(&self.machine, L1Gpa::new(page)).map(|m| m.hpa.raw() + (page & m.size.offset_mask()));
                (now.and_then(|hpa| small(hpa, false, true)), L1Change::WriteProtect)
            }
            _ => {
                self.machine.special.borrow_mut().remove(&page);
                (Some(L1Map::map(&self.machine, L1Gpa::new(page)).unwrap()), L1Change::Unmap)
            }
        };
        if mapping.is_none_or(|mapping| mapping.size == PageSize::Size4K) {
            self.machine.protect(page, mapping);
        }
        if self.fault != Fault::ChangeNotPosted {
            self.shadow.l1_gpa_changed(L1Gpa::new(page), 0x1000, change);
        }
    }

    /// VM entry, the check, one access of L2.
    fn access(&mut self) -> Result<(), String> {
        if self.edited {
            self.invept();
        }
        let root = self.shadow.activate(self.eptp) & ADDRESS;
        for _ in 0..8 {
            if self.shadow.tag_stale() && self.fault != Fault::NoInvept {
                // INVEPT of the single context.
                self.tlb.retain(|(of, _), _| *of != root);
                self.shadow.tag_retired();
            }
            self.check(root)?;
            self.try_access(root)?;
        }
        Ok(())
    }

    /// One access of L2: done, refused, or left for the next entry.
    fn try_access(&mut self, root: u64) -> Result<(), String> {
        let gpa = l2_page(self.random.next());
        let tried = [READ, WRITE, FETCH][self.random.below(3) as usize];
        let allows = |page: &Page| page.rights & tried != 0;
        let cached = self.tlb.get(&(root, gpa)).copied().or_else(|| self.hold(gpa));
        if let Some(page) = cached.filter(allows) {
            self.tlb.insert((root, gpa), page);
            self.written += usize::from(tried == WRITE);
            return Ok(());
        }
        // A violation drops the translation that caused it.
        self.tlb.remove(&(root, gpa));
        let before = oracle(&self.machine, self.eptp, gpa);
        let outcome = fault(&mut self.shadow, &self.machine, gpa, tried | FINAL);
        let now = oracle(&self.machine, self.eptp, gpa);
        match outcome {
            EptOutcome::Resume if self.hold(gpa).is_some_and(|page| allows(&page)) => Ok(()),
            EptOutcome::Resume => Err(format!("{gpa:#x}: resumed without a translation, {now:x?}")),
            EptOutcome::Reflect { .. } | EptOutcome::Embedder(_) if now.is_some_and(|page| allows(&page)) => {
                Err(format!("{gpa:#x}: {outcome:x?}, but {before:x?} became {now:x?}"))
            }
            EptOutcome::Reflect { .. } | EptOutcome::Embedder(_) => Ok(()),
        }
    }

    /// What the shadow tables say.
    fn hold(&self, gpa: u64) -> Option<Page> {
        let (entry, size) = lookup(&self.shadow, gpa)?;
        let hpa = (entry & ADDRESS & !size.offset_mask()) + (gpa & size.offset_mask());
        Some(Page { hpa, rights: entry & RWX })
    }

    fn check(&self, root: u64) -> Result<(), String> {
        for n in 0..32 {
            let gpa = l2_page(n);
            let now = oracle(&self.machine, self.eptp, gpa);
            for (who, held) in [("TLB", self.tlb.get(&(root, gpa)).copied()), ("shadow", self.hold(gpa))] {
                let Some(held) = held else { continue };
                if !now.is_some_and(|now| held.hpa == now.hpa && held.rights & !now.rights == 0) {
                    return Err(format!("{who} holds {held:x?} for {gpa:#x}, which is {now:x?}"));
                }
            }
        }
        Ok(())
    }
}

fn run(seed: u64, pages: usize, fault: Fault) -> Result<usize, String> {
    let mut world = World::new(seed, pages, fault);
    for n in 0..400 {
        world.step().map_err(|why| format!("seed {seed}, step {n}: {why}"))?;
    }
    Ok(world.written)
}

#[test]
fn no_stale_translation_is_ever_entered_with() {
    let mut written = 0;
    for pages in [7, 9, 12, 64] {
        for seed in 0..50 {
            written += run(seed, pages, Fault::None).unwrap_or_else(|why| panic!("{why}"));
        }
    }
    assert!(written > 2_000, "the sequences reach memory: {written}");
}

#[test]
fn the_check_finds_each_missing_invalidation() {
    for fault in [Fault::NoInvept, Fault::L1sInveptIgnored, Fault::ChangeNotPosted] {
        assert!((0..20).any(|seed| run(seed, 64, fault).is_err()), "{fault:?} was not found");
    }
}
