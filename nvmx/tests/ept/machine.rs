//! L1's memory, the embedder's mapping of it, and hand-made extended page tables.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use hvcore::addr::{Hpa, L1Gpa, L2Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping, PagePool, PageRecord, PageSize, ShadowPage};
use nvmx::ept::{EptFormat, EptOutcome, EptShadow};

pub const R: u64 = 1;
pub const W: u64 = 2;
pub const X: u64 = 4;
pub const RWX: u64 = 7;
pub const WB: u64 = 6 << 3;
pub const IPAT: u64 = 1 << 6;
pub const PS: u64 = 128;
pub const A: u64 = 256;
pub const D: u64 = 512;
/// All rights, write-back.
pub const ALL: u64 = RWX | WB;

/// Exit qualifications: data read, data write, fetch; of the final address, or of L2's page tables.
pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const FETCH: u64 = 4;
pub const FINAL: u64 = 0x180;
pub const TABLE: u64 = 0x80;

/// L1's memory begins here in the host's.
pub const HOST: u64 = 0x40_0000_0000;
pub const TOP: u64 = 0x1000;
/// Four levels, write-back, without and with accessed and dirty flags.
pub const PLAIN: u64 = TOP | 0x1E;
pub const FLAGS: u64 = TOP | 0x5E;
pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

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

    /// Maps the page of `level` at `l2` to `l1` below `eptp`, making the tables that are missing with all rights, and
    /// returns the address of the leaf entry. `bits` is the leaf without address and page size bit.
    pub fn map(&self, eptp: u64, l2: u64, l1: u64, level: u8, bits: u64) -> u64 {
        let mut table = eptp & ADDRESS;
        let mut at_level = 4;
        loop {
            let at = slot(table, at_level, l2);
            if at_level == level {
                self.set(at, l1 | if level > 1 { PS } else { 0 } | bits);
                return at;
            }
            let mut entry = self.get(at);
            if entry & RWX == 0 {
                let page = self.next_table.get();
                self.next_table.set(page + 0x1000);
                self.back(page);
                entry = page | RWX;
                self.set(at, entry);
            }
            table = entry & ADDRESS;
            at_level -= 1;
        }
    }

    /// The entry of `level` on the way to `l2`.
    pub fn entry(&self, eptp: u64, l2: u64, level: u8) -> u64 {
        let mut table = eptp & ADDRESS;
        for above in (level + 1..=4).rev() {
            table = self.get(slot(table, above, l2)) & ADDRESS;
        }
        slot(table, level, l2)
    }

    pub fn protect(&self, page: u64, mapping: Option<Mapping>) {
        self.special.borrow_mut().insert(page & !0xFFF, mapping);
    }
}

/// Address of the entry for `l2` in the table of `level` at `table`.
pub fn slot(table: u64, level: u8, l2: u64) -> u64 {
    table + (l2 >> (12 + 9 * (u32::from(level) - 1)) & 511) * 8
}

/// A 4 KiB mapping of the embedder's, write-back.
pub fn small(hpa: u64, writable: bool, executable: bool) -> Option<Mapping> {
    Some(Mapping { hpa: Hpa::new(hpa), size: PageSize::Size4K, writable, executable, memory_type: 6 })
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
                    memory_type: 6,
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

pub const FORMAT: EptFormat =
    EptFormat { execute_only: true, pages_2m: true, pages_1g: true, physical_bits: 40, hardware_flags: true };

/// Shadow tables of `pages` pages, leaked: a test ends soon enough. Page `n` is at `0x10_0000 + n * 4096`.
pub fn shadow(pages: usize) -> EptShadow<'static> {
    EptShadow::new(pool(pages), 4, FORMAT).unwrap()
}

pub fn pool(pages: usize) -> PagePool<'static> {
    let storage: Vec<ShadowPage> = (0..pages).map(|_| ShadowPage::new()).collect();
    let records: Vec<PageRecord> = (0..pages).map(|_| PageRecord::new()).collect();
    PagePool::new(storage.leak(), records.leak(), |n| Hpa::new(0x10_0000 + n as u64 * 4096)).unwrap()
}

/// A machine and shadow tables for `format` with `eptp` active and the tag fresh.
pub fn start_with(eptp: u64, format: EptFormat) -> (Machine, EptShadow<'static>) {
    let mut shadow = EptShadow::new(pool(16), 4, format).unwrap();
    shadow.activate(eptp);
    shadow.tag_retired();
    (Machine::new(), shadow)
}

pub fn start(eptp: u64) -> (Machine, EptShadow<'static>) {
    start_with(eptp, FORMAT)
}

pub fn fault(shadow: &mut EptShadow<'_>, machine: &Machine, gpa: u64, qualification: u64) -> EptOutcome {
    shadow.fault(machine, machine, L2Gpa::new(gpa), qualification, None)
}

pub fn lookup(shadow: &EptShadow<'_>, gpa: u64) -> Option<(u64, PageSize)> {
    shadow.lookup(L2Gpa::new(gpa))
}

/// The qualification of an EPT violation that goes to L1.
pub fn violated(outcome: EptOutcome) -> u64 {
    match outcome {
        EptOutcome::Reflect { reason: 48, qualification } => qualification,
        other => panic!("{other:?}"),
    }
}

pub const MISCONFIGURED: EptOutcome = EptOutcome::Reflect { reason: 49, qualification: 0 };
