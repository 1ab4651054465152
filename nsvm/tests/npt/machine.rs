//! L1's memory, the embedder's mapping of it, and hand-made nested page tables.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping, PagePool, PageRecord, PageSize, ShadowPage};
use nsvm::npt::{NptContext, NptFormat, NptOutcome, NptShadow, PagingMode};

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const PWT: u64 = 8;
pub const PCD: u64 = 16;
pub const A: u64 = 32;
pub const D: u64 = 64;
pub const PS: u64 = 128;
pub const NX: u64 = 1 << 63;
pub const ALL: u64 = P | W | U;

pub const READ: u64 = 4;
pub const WRITE: u64 = 6;
pub const FETCH: u64 = 0x14;
pub const FINAL: u64 = 1 << 32;
pub const TABLE: u64 = 1 << 33;

/// L1's memory begins here in the host's.
pub const HOST: u64 = 0x40_0000_0000;
pub const TOP: u64 = 0x1000;

type BeforeExchange = Box<dyn Fn(&Machine, u64)>;

/// Sparse memory of L1, byte order little-endian, and the host's mapping of it.
#[derive(Default)]
pub struct Machine {
    pub pages: RefCell<BTreeMap<u64, [u8; 4096]>>,
    /// Pages that the embedder maps otherwise than `HOST + gpa`.
    pub special: RefCell<BTreeMap<u64, Option<Mapping>>>,
    pub next_table: Cell<u64>,
    pub exchanges: Cell<usize>,
    /// Runs before each exchange: another processor of L1.
    pub before_exchange: RefCell<Option<BeforeExchange>>,
    pub largest: Cell<Option<PageSize>>,
}

impl Machine {
    pub fn new() -> Self {
        let machine = Self { next_table: Cell::new(TOP + 0x1000), ..Self::default() };
        machine.back(TOP);
        machine
    }

    pub fn back(&self, page: u64) {
        self.pages.borrow_mut().entry(page & !0xFFF).or_insert([0; 4096]);
    }

    pub fn get(&self, gpa: u64) -> u64 {
        self.read_u64(L1Gpa::new(gpa)).unwrap()
    }

    pub fn set(&self, gpa: u64, value: u64) {
        self.write_u64(L1Gpa::new(gpa), value).unwrap();
    }

    pub fn get_entry(&self, format: NptFormat, at: u64) -> u64 {
        let value = self.get(at & !7);
        match (format.entry_bytes(), at & 4) {
            (8, _) => value,
            (_, 0) => value & 0xFFFF_FFFF,
            _ => value >> 32,
        }
    }

    pub fn set_entry(&self, format: NptFormat, at: u64, entry: u64) {
        let bytes = usize::try_from(format.entry_bytes()).unwrap();
        self.write(L1Gpa::new(at), &entry.to_le_bytes()[..bytes]).unwrap();
    }

    /// Maps the page of `level` at `l2` to `l1`, making the tables that are missing with all rights, and returns the
    /// address of the leaf entry. `bits` is the leaf without address and page size bit.
    pub fn map(&self, format: NptFormat, l2: u64, l1: u64, level: u8, bits: u64) -> u64 {
        let mut table = TOP;
        let mut at_level = format.levels();
        loop {
            let at = slot(format, table, at_level, l2);
            if at_level == level {
                let size = if level > 1 { PS } else { 0 };
                let address = if matches!(format.mode, PagingMode::Legacy) && level == 2 {
                    (l1 & 0xFFC0_0000) | ((l1 >> 32 & 0xFF) << 13)
                } else {
                    l1
                };
                self.set_entry(format, at, address | size | bits);
                return at;
            }
            let mut entry = self.get_entry(format, at);
            if entry & P == 0 {
                let page = self.next_table.get();
                self.next_table.set(page + 0x1000);
                self.back(page);
                let rights = if format.mode == PagingMode::Pae && at_level == 3 { P } else { ALL };
                entry = page | rights;
                self.set_entry(format, at, entry);
            }
            table = entry & 0x000F_FFFF_FFFF_F000;
            at_level -= 1;
        }
    }

    pub fn protect(&self, page: u64, mapping: Option<Mapping>) {
        self.special.borrow_mut().insert(page & !0xFFF, mapping);
    }
}

/// Address of the entry for `l2` in the table of `level` at `table`.
pub fn slot(format: NptFormat, table: u64, level: u8, l2: u64) -> u64 {
    let bits = if matches!(format.mode, PagingMode::Legacy) { 10 } else { 9 };
    let shift = 12 + bits * (u32::from(level) - 1);
    table + (l2 >> shift & ((1 << bits) - 1)) * format.entry_bytes()
}

/// A 4 KiB mapping of the embedder's.
pub fn small(hpa: u64, writable: bool, executable: bool) -> Option<Mapping> {
    Some(Mapping { hpa: Hpa::new(hpa), size: PageSize::Size4K, writable, executable, memory_type: 0 })
}

impl L1Map for Machine {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        let special = self.special.borrow();
        if let Some(mapping) = special.get(&gpa.page().raw()) {
            return *mapping;
        }
        for size in [PageSize::Size1G, PageSize::Size2M, PageSize::Size4K] {
            let start = gpa.raw() & !size.offset_mask();
            let last = start + size.offset_mask();
            if self.largest.get().is_none_or(|largest| size <= largest) && special.range(start..=last).next().is_none()
            {
                return Some(Mapping {
                    hpa: Hpa::new(HOST + start),
                    size,
                    writable: true,
                    executable: true,
                    memory_type: 0,
                });
            }
        }
        None
    }
}

impl GuestMemory for Machine {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let pages = self.pages.borrow();
        let page = pages.get(&gpa.page().raw()).ok_or(MemoryError)?;
        let offset = gpa.page_offset() as usize;
        buf.copy_from_slice(&page[offset..offset + buf.len()]);
        Ok(())
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let mut pages = self.pages.borrow_mut();
        let page = pages.get_mut(&gpa.page().raw()).ok_or(MemoryError)?;
        let offset = gpa.page_offset() as usize;
        page[offset..offset + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let mut seen = [0];
        self.read(gpa, &mut seen)?;
        if seen[0] != current {
            return Ok(Err(seen[0]));
        }
        self.write(gpa, &[new])?;
        Ok(Ok(current))
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        self.exchange(gpa);
        let seen = self.read_u32(gpa)?;
        if seen != current {
            return Ok(Err(seen));
        }
        self.write(gpa, &new.to_le_bytes())?;
        Ok(Ok(current))
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        self.exchange(gpa);
        let seen = self.read_u64(gpa)?;
        if seen != current {
            return Ok(Err(seen));
        }
        self.write_u64(gpa, new)?;
        Ok(Ok(current))
    }
}

impl Machine {
    fn exchange(&self, gpa: L1Gpa) {
        self.exchanges.set(self.exchanges.get() + 1);
        if let Some(before) = &*self.before_exchange.borrow() {
            before(self, gpa.raw());
        }
    }
}

pub const LONG: NptFormat =
    NptFormat { mode: PagingMode::Long4, pse: false, nxe: true, phys_bits: 40, gib_pages: true };
pub const LONG5: NptFormat = NptFormat { mode: PagingMode::Long5, ..LONG };
pub const PAE: NptFormat = NptFormat { mode: PagingMode::Pae, ..LONG };
pub const LEGACY: NptFormat = NptFormat { mode: PagingMode::Legacy, pse: true, ..LONG };

pub fn context(format: NptFormat) -> NptContext {
    NptContext { ncr3: TOP, asid: 1, format }
}

/// Shadow tables of `pages` pages, leaked: a test ends soon enough. Page `n` is at `0x10_0000 + n * 4096`.
pub fn shadow(pages: usize) -> NptShadow<'static> {
    NptShadow::new(pool(pages), 4).unwrap()
}

pub fn pool(pages: usize) -> PagePool<'static> {
    let storage: Vec<ShadowPage> = (0..pages).map(|_| ShadowPage::new()).collect();
    let records: Vec<PageRecord> = (0..pages).map(|_| PageRecord::new()).collect();
    PagePool::new(storage.leak(), records.leak(), |n| Hpa::new(0x10_0000 + n as u64 * 4096)).unwrap()
}

/// A machine and shadow tables with `context(format)` active and the tag fresh.
pub fn start(format: NptFormat) -> (Machine, NptShadow<'static>) {
    let mut shadow = shadow(16);
    shadow.activate(context(format));
    shadow.tag_retired();
    (Machine::new(), shadow)
}

pub fn fault(shadow: &mut NptShadow<'_>, machine: &Machine, gpa: u64, error: u64) -> NptOutcome {
    shadow.fault(machine, machine, L2Gpa::new(gpa), error)
}

pub fn lookup(shadow: &NptShadow<'_>, gpa: u64) -> Option<(u64, PageSize)> {
    shadow.lookup(L2Gpa::new(gpa))
}
