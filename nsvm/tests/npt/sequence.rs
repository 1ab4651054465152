//! Long random sequences against an independent walk and a TLB that never forgets by itself.
//!
//! L1 edits its tables and flushes, the embedder moves and write-protects memory and says so, contexts are switched,
//! and L2 accesses memory through the TLB model. Whenever L2 is entered, each translation that the TLB or the shadow
//! tables hold is one that the tables of L1 and the embedder give now.

use std::collections::BTreeMap;

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::shadow::{L1Change, L1Map, PageSize};
use nsvm::npt::{NptContext, NptFormat, NptOutcome, NptShadow, PagingMode};

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

/// A translation of one 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    hpa: u64,
    write: bool,
    execute: bool,
}

/// The naive walk: what L1's tables and the embedder's mapping say together, written without the library's help.
fn oracle(machine: &Machine, format: NptFormat, ncr3: u64, gpa: u64) -> Option<Page> {
    let (l1, write, execute) = match format.mode {
        PagingMode::Legacy => oracle_legacy(machine, ncr3, gpa, format.pse)?,
        _ => oracle_wide(machine, format, ncr3, gpa)?,
    };
    let mapping = L1Map::map(machine, L1Gpa::new(l1))?;
    Some(Page {
        hpa: mapping.hpa.raw() + (l1 & (mapping.size.bytes() - 1) & !0xFFF),
        write: write && mapping.writable,
        execute: execute && mapping.executable,
    })
}

fn oracle_legacy(machine: &Machine, ncr3: u64, gpa: u64, pse: bool) -> Option<(u64, bool, bool)> {
    let read = |at: u64| {
        let word = machine.get(at & !7);
        if at & 4 == 0 { word & 0xFFFF_FFFF } else { word >> 32 }
    };
    let pde = read((ncr3 & 0xFFFF_F000) + (gpa >> 22) * 4);
    if pde & 5 != 5 {
        return None;
    }
    if pse && pde & 0x80 != 0 {
        let high = pde >> 13 & 0xFF;
        return Some((pde & 0xFFC0_0000 | high << 32 | gpa & 0x3F_FFFF, pde & 0x42 == 0x42, true));
    }
    let pte = read((pde & 0xFFFF_F000) + (gpa >> 12 & 0x3FF) * 4);
    (pte & 5 == 5).then_some((pte & 0xFFFF_F000 | gpa & 0xFFF, pde & pte & 2 != 0 && pte & 0x40 != 0, true))
}

fn oracle_wide(machine: &Machine, format: NptFormat, ncr3: u64, gpa: u64) -> Option<(u64, bool, bool)> {
    let shifts: &[u32] = match format.mode {
        PagingMode::Pae => &[30, 21, 12],
        PagingMode::Long4 => &[39, 30, 21, 12],
        _ => &[48, 39, 30, 21, 12],
    };
    let (mut table, mut write, mut execute) = (ncr3 & !0x1F, true, true);
    for &shift in shifts {
        let entry = machine.get(table + (gpa >> shift & 0x1FF) * 8);
        if entry & 1 == 0 {
            return None;
        }
        if format.mode != PagingMode::Pae || shift != 30 {
            if entry & 4 == 0 {
                return None;
            }
            write &= entry & 2 != 0;
            execute &= entry >> 63 == 0;
        }
        table = entry & 0xF_FFFF_FFFF_F000;
        if shift == 12 || (shift < 39 && entry & 0x80 != 0) {
            let offset = (1u64 << shift) - 1;
            return Some((table & !offset | gpa & offset, write && entry & 0x40 != 0, execute));
        }
    }
    None
}

/// What the run leaves out, to show that the check can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    TagNotRetired,
    AsidNotFlushed,
    ChangeNotPosted,
}

struct World {
    machine: Machine,
    shadow: NptShadow<'static>,
    format: NptFormat,
    random: Random,
    tlb: BTreeMap<u64, Page>,
    asid: u32,
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

impl World {
    fn new(seed: u64, format: NptFormat, pages: usize, fault: Fault) -> Self {
        let mut shadow = shadow(pages);
        let machine = Machine::new();
        shadow.activate(context(format));
        Self {
            machine,
            shadow,
            format,
            random: Random(seed),
            tlb: BTreeMap::new(),
            asid: 1,
            fault,
            edited: false,
            written: 0,
        }
    }

    fn context(&self) -> NptContext {
        NptContext { asid: self.asid, ..context(self.format) }
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(10) {
            0..=1 => self.edit(),
            2 => self.flush(),
            3 => self.embedder_moves(),
            4 => self.switch(),
            _ => return self.access(),
        }
        Ok(())
    }

    fn edit(&mut self) {
        let r = &mut self.random;
        let l2 = l2_page(r.next());
        let l1 = l1_page(r.next());
        let bits =
            (r.next() & (W | D)) | (r.next() & (W | D)) | if r.below(4) == 0 { r.next() & NX } else { 0 } | P | U;
        let legacy = self.format.entry_bytes() == 4;
        let bits = if legacy { bits & 0xFFF } else { bits };
        if r.below(5) == 0 {
            let mask = if legacy { 0x3F_FFFF } else { 0x1F_FFFF };
            self.machine.map(self.format, l2 & !mask, l1 & !mask, 2, bits);
        } else {
            self.unlarge(l2);
            self.machine.map(self.format, l2, l1, 1, bits);
        }
        self.edited = true;
    }

    /// Takes a large page away so that a small one can take its place.
    fn unlarge(&mut self, l2: u64) {
        let mut table = TOP;
        for level in (2..=self.format.levels()).rev() {
            let at = slot(self.format, table, level, l2);
            let entry = self.machine.get_entry(self.format, at);
            if entry & P == 0 {
                return;
            }
            if entry & PS != 0 {
                self.machine.set_entry(self.format, at, 0);
                return;
            }
            table = entry & 0xF_FFFF_FFFF_F000;
        }
    }

    fn flush(&mut self) {
        if self.fault == Fault::AsidNotFlushed {
            self.edited = false;
            return;
        }
        match self.random.below(3) {
            0 => {
                self.shadow.flush_all_asids();
            }
            1 => {
                self.shadow.flush_address_space(TOP);
            }
            _ => {
                // Both parts of the L2 pages in use.
                self.shadow.flush_gpa_range(TOP, L2Gpa::new(0), 0x8000_0000);
                self.shadow.flush_gpa_range(TOP, L2Gpa::new(0x8000_0000), 0x40_8000);
            }
        }
        self.edited = false;
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

    fn switch(&mut self) {
        self.asid = 1 + self.random.below(6) as u32;
    }

    /// VM entry, the check, one access of L2.
    fn access(&mut self) -> Result<(), String> {
        if self.edited {
            self.flush();
        }
        self.shadow.activate(self.context());
        for _ in 0..8 {
            if self.shadow.tag_stale() && self.fault != Fault::TagNotRetired {
                self.tlb.clear();
                self.shadow.tag_retired();
            }
            self.check()?;
            self.try_access()?;
        }
        Ok(())
    }

    /// One access of L2: done, refused, or left for the next entry.
    fn try_access(&mut self) -> Result<(), String> {
        let gpa = l2_page(self.random.next());
        let error = [READ, WRITE, FETCH][self.random.below(3) as usize];
        let allows = |page: Page| match error {
            WRITE => page.write,
            FETCH => page.execute,
            _ => true,
        };
        let cached = self.tlb.get(&gpa).copied().or_else(|| self.hold(gpa));
        if let Some(page) = cached.filter(|page| allows(*page)) {
            self.tlb.insert(gpa, page);
            self.written += usize::from(error == WRITE);
            return Ok(());
        }
        // A fault drops the translation that caused it.
        self.tlb.remove(&gpa);
        let now = oracle(&self.machine, self.format, TOP, gpa);
        match fault(&mut self.shadow, &self.machine, gpa, error | FINAL) {
            NptOutcome::Resume => match self.hold(gpa).filter(|page| allows(*page)) {
                Some(_) => Ok(()),
                None => Err(format!("{gpa:#x}: resumed without a translation, {now:x?}")),
            },
            NptOutcome::Reflect { info1, .. } => {
                let refused = match error {
                    WRITE => now.is_none_or(|page| !page.write),
                    FETCH => now.is_none_or(|page| !page.execute),
                    _ => now.is_none(),
                };
                if refused { Ok(()) } else { Err(format!("{gpa:#x}: reflected {info1:#x}, but {now:x?}")) }
            }
            NptOutcome::Embedder(_) if now.is_some_and(allows) => Err(format!("{gpa:#x}: given away, {now:x?}")),
            NptOutcome::Embedder(_) => Ok(()),
        }
    }

    /// What the shadow tables say.
    fn hold(&self, gpa: u64) -> Option<Page> {
        let (entry, size) = lookup(&self.shadow, gpa)?;
        let frame = (entry & 0xF_FFFF_FFFF_F000 & !size.offset_mask()) + (gpa & size.offset_mask());
        Some(Page { hpa: frame, write: entry & W != 0, execute: entry & NX == 0 })
    }

    fn check(&self) -> Result<(), String> {
        for n in 0..32 {
            let gpa = l2_page(n);
            let now = oracle(&self.machine, self.format, TOP, gpa);
            for (who, held) in [("TLB", self.tlb.get(&gpa).copied()), ("shadow", self.hold(gpa))] {
                let Some(held) = held else { continue };
                let sound = now.is_some_and(|now| {
                    held.hpa == now.hpa && (!held.write || now.write) && (!held.execute || now.execute)
                });
                if !sound {
                    return Err(format!("{who} holds {held:x?} for {gpa:#x}, which is {now:x?}"));
                }
            }
        }
        Ok(())
    }
}

fn run(seed: u64, format: NptFormat, pages: usize, fault: Fault) -> Result<usize, String> {
    let mut world = World::new(seed, format, pages, fault);
    for n in 0..400 {
        world.step().map_err(|why| format!("seed {seed}, step {n}: {why}"))?;
    }
    Ok(world.written)
}

#[test]
fn no_stale_translation_is_ever_entered_with() {
    let mut written = 0;
    for format in [LONG, LONG5, PAE, LEGACY] {
        for pages in [7, 9, 12, 64] {
            for seed in 0..25 {
                written += run(seed, format, pages, Fault::None).unwrap_or_else(|why| panic!("{format:?}: {why}"));
            }
        }
    }
    assert!(written > 5_000, "the sequences reach memory: {written}");
}

#[test]
fn the_check_finds_each_missing_invalidation() {
    for fault in [Fault::TagNotRetired, Fault::AsidNotFlushed, Fault::ChangeNotPosted] {
        assert!((0..10).any(|seed| run(seed, LONG, 64, fault).is_err()), "{fault:?} was not found");
    }
}
