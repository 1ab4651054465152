//! L0's second-stage tables for L1, nested page tables or EPT: the identity, except the hole where L0 lives and the local APIC's page.
//!
//! 2 MiB pages; 4 KiB pages where something must differ. The hole maps every page to one page of ones, read-only, so
//! that L1 reads all ones; its writes fault and are dropped by the exit handler. The APIC page is read-only: writes
//! fault and are carried out. Addresses above 4 GiB that are not RAM are mapped when they are first touched (device
//! windows). Written by the boot processor before any guest runs, and later only by [`Npt01::map_gib`] under its lock.

use core::sync::atomic::{AtomicU64, Ordering};

use hw::apic;

use crate::memory::{FOUR_GIB, Range};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// EPT entries: readable, writable, executable; memory type write-back in bits 5:3.
const EPT_RWX: u64 = PRESENT | WRITE | 1 << 2;
const EPT_WRITE_BACK: u64 = 6 << 3;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The page of ones, by its place in the pool.
const ONES: usize = 2;
/// The page table of the hole, by its place in the pool.
const HOLE_TABLE: usize = 3;

const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const MIB1: u64 = 1 << 20;
/// Where the legacy video memory and ROMs begin; they end at 1 MiB.
const LEGACY: u64 = 0xa_0000;

/// How entries are written. Present and writable are bits 0 and 1 in both formats, a large page is bit 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Refers to a table.
    table: u64,
    /// Maps RAM.
    leaf: u64,
    /// Maps devices.
    device: u64,
}

impl Format {
    /// AMD's nested page tables. Nested walks are user accesses; A and D are set so that the walker need not. Memory
    /// types are L1's, by its PAT, and the machine's, by the MTRRs.
    pub const NPT: Self = {
        let table = PRESENT | WRITE | USER | ACCESSED;
        Self { table, leaf: table | DIRTY, device: table | DIRTY }
    };
    /// Intel's EPT without accessed and dirty bits. MTRRs have no say: RAM is write-back, devices are uncached, and
    /// L1's PAT may weaken it.
    pub const EPT: Self = Self { table: EPT_RWX, leaf: EPT_RWX | EPT_WRITE_BACK, device: EPT_RWX };
}

/// Pages that the tables need at most: PML4, PDPT, four page directories, the APIC's and the hole's page tables, the
/// ones, page tables for overlays, and page directories for memory and devices above 4 GiB.
pub const POOL_PAGES: usize = 9 + 8 + 128;

/// One page table page.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct TablePage([AtomicU64; 512]);

impl TablePage {
    /// An empty page.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    /// Entry `index`, below 512.
    pub fn entry(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Relaxed)
    }

    /// Sets entry `index`, below 512, of a table that no processor walks.
    pub fn set(&self, index: usize, entry: u64) {
        self.0[index].store(entry, Ordering::Relaxed);
    }
}

impl Default for TablePage {
    fn default() -> Self {
        Self::new()
    }
}

/// The pages of the tables are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfPages;

/// How L1 may use a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RAM or a device: as it is.
    Plain,
    /// The local APIC: reads pass, writes are L0's to carry out.
    Apic,
    /// L0's own memory: reads as ones, writes vanish.
    Hole,
    /// A page of the Hyper-V interface that lies over L1's memory: writes are #GP.
    Overlay,
}

/// The tables.
#[derive(Debug)]
pub struct Npt01<'a> {
    pages: &'a [TablePage],
    /// Physical address of `pages[0]`.
    base: u64,
    format: Format,
    /// RAM.
    ram: [Range; 3],
    used: usize,
    /// The page table of the first 2 MiB, where they are not all of one kind.
    low: Option<usize>,
    hole: Range,
    address_bits: u32,
}

impl<'a> Npt01<'a> {
    /// Tables in `pages`, which start at physical address `base` (a multiple of 4096), are zero, and live on;
    /// `hole` is a multiple of 2 MiB at both ends and below 4 GiB; RAM ends at `ends` below 4 GiB and above it (4 GiB
    /// when there is none); `address_bits` is the processor's MAXPHYADDR.
    pub fn new(
        pages: &'a [TablePage],
        base: u64,
        format: Format,
        hole: Range,
        ends: (u64, u64),
        address_bits: u32,
    ) -> Result<Self, OutOfPages> {
        let ram = [(0, LEGACY), (MIB1, ends.0), (FOUR_GIB, ends.1)].map(|(start, end)| Range { start, end });
        let mut npt = Self { pages, base, format, ram, used: 0, low: None, hole, address_bits: address_bits.min(48) };
        let pml4 = npt.page()?;
        let pdpt = npt.page()?;
        npt.set(pml4, 0, npt.pa(pdpt) | format.table);
        let ones = npt.page()?;
        for e in &npt.table(ones)?.0 {
            e.store(u64::MAX, Ordering::Relaxed);
        }
        let hole_table = npt.page()?;
        for i in 0..512 {
            npt.set(hole_table, i, npt.pa(ones) | format.leaf & !WRITE);
        }
        if format.leaf != format.device {
            let low = npt.page()?;
            for i in 0..512 {
                npt.set(low, i, npt.leaf(i as u64 * 4096, 4096));
            }
            npt.low = Some(low);
        }
        let apic_table = npt.page()?;
        let apic_region = apic::DEFAULT_BASE & !(MIB2 - 1);
        for i in 0..512 {
            let pa = apic_region + i as u64 * 4096;
            npt.set(apic_table, i, npt.plain(pa));
        }
        for gib in 0..FOUR_GIB / GIB {
            let pd = npt.page()?;
            npt.set(pdpt, gib as usize, npt.pa(pd) | format.table);
            for i in 0..512 {
                let pa = gib * GIB + i as u64 * MIB2;
                let entry = if hole.contains(pa) {
                    npt.pa(hole_table) | format.table
                } else if pa == apic_region {
                    npt.pa(apic_table) | format.table
                } else if let (0, Some(low)) = (pa, npt.low) {
                    npt.pa(low) | format.table
                } else {
                    npt.leaf(pa, MIB2) | LARGE
                };
                npt.set(pd, i, entry);
            }
        }
        Ok(npt)
    }

    /// Physical address of the root.
    pub fn root(&self) -> u64 {
        self.base
    }

    /// Maps the GiB that holds `gpa`, above 4 GiB. `Ok(false)`: the processor has no such address, or it is mapped.
    pub fn map_gib(&mut self, gpa: u64) -> Result<bool, OutOfPages> {
        if gpa < FOUR_GIB || gpa >> self.address_bits != 0 {
            return Ok(false);
        }
        let pml4_index = (gpa >> 39) as usize & 511;
        let pml4e = self.get(0, pml4_index);
        let pdpt = if pml4e & PRESENT == 0 {
            let page = self.page()?;
            self.set(0, pml4_index, self.pa(page) | self.format.table);
            page
        } else {
            ((pml4e & ADDRESS) - self.base) as usize >> 12
        };
        let index = (gpa >> 30) as usize & 511;
        if self.get(pdpt, index) & PRESENT != 0 {
            return Ok(false);
        }
        let pd = self.page()?;
        for i in 0..512 {
            let pa = (gpa & !(GIB - 1)) + i as u64 * MIB2;
            self.set(pd, i, self.leaf(pa, MIB2) | LARGE);
        }
        // Last, so that a walk on another processor sees the directory empty or whole.
        self.set(pdpt, index, self.pa(pd) | self.format.table);
        Ok(true)
    }

    /// Shows the page at physical address `page` at `gpa`, read-only; `None` shows what is there without it. The caller
    /// has every processor flush what it cached of it.
    pub fn set_overlay(&mut self, gpa: u64, page: Option<u64>) -> Result<(), OutOfPages> {
        if gpa >= FOUR_GIB {
            self.map_gib(gpa)?;
        }
        let (pml4_index, pdpt_index) = ((gpa >> 39) as usize & 511, (gpa >> 30) as usize & 511);
        let (pd_index, pt_index) = ((gpa >> 21) as usize & 511, (gpa >> 12) as usize & 511);
        let Some(pdpt) = self.next(0, pml4_index) else { return Ok(()) };
        let Some(pd) = self.next(pdpt, pdpt_index) else { return Ok(()) };
        let entry = self.get(pd, pd_index);
        let shared = entry & LARGE != 0 || entry & ADDRESS == self.pa(HOLE_TABLE);
        let pt = if shared {
            if page.is_none() {
                return Ok(());
            }
            let pt = self.page()?;
            for i in 0..512 {
                let base = gpa & !(MIB2 - 1);
                self.set(pt, i, self.plain(base + i as u64 * 4096));
            }
            // Last, so that a walk on another processor sees the large page or the whole table.
            self.set(pd, pd_index, self.pa(pt) | self.format.table);
            pt
        } else {
            ((entry & ADDRESS) - self.base) as usize >> 12
        };
        let entry = page.map_or(self.plain(gpa & !0xfff), |page| page | self.format.leaf & !WRITE);
        self.set(pt, pt_index, entry);
        Ok(())
    }

    /// The 4 KiB entry for `gpa` without overlays.
    fn plain(&self, gpa: u64) -> u64 {
        if self.hole.contains(gpa) {
            self.ones() | self.format.leaf & !WRITE
        } else if gpa == apic::DEFAULT_BASE {
            gpa | self.format.device & !WRITE
        } else {
            self.leaf(gpa, 4096)
        }
    }

    /// Maps the `size` bytes at `pa` to themselves.
    fn leaf(&self, pa: u64, size: u64) -> u64 {
        let cached = self.ram.iter().any(|ram| ram.start <= pa && pa + size <= ram.end);
        pa | if cached { self.format.leaf } else { self.format.device }
    }

    /// The table behind a present entry.
    fn next(&self, page: usize, index: usize) -> Option<usize> {
        let entry = self.get(page, index);
        (entry & PRESENT != 0).then(|| ((entry & ADDRESS) - self.base) as usize >> 12)
    }

    /// Physical address of the page of ones.
    pub fn ones(&self) -> u64 {
        self.pa(ONES)
    }

    fn page(&mut self) -> Result<usize, OutOfPages> {
        let page = self.used;
        self.table(page)?;
        self.used += 1;
        Ok(page)
    }

    fn pa(&self, page: usize) -> u64 {
        self.base + page as u64 * 4096
    }

    fn table(&self, page: usize) -> Result<&TablePage, OutOfPages> {
        self.pages.get(page).ok_or(OutOfPages)
    }

    fn get(&self, page: usize, index: usize) -> u64 {
        self.pages[page].0[index].load(Ordering::Relaxed)
    }

    fn set(&self, page: usize, index: usize, entry: u64) {
        // Release: a processor that walks through this entry sees the table below it whole.
        self.pages[page].0[index].store(entry, Ordering::Release);
    }
}

/// Entries of L0's own page tables.
pub mod bits {
    use super::{ACCESSED, DIRTY, LARGE, PRESENT, WRITE};

    /// Refers to a table.
    pub const HOST_TABLE: u64 = PRESENT | WRITE | ACCESSED;
    /// Maps 2 MiB.
    pub const HOST_LARGE: u64 = HOST_TABLE | DIRTY | LARGE;
    /// Not cached.
    pub const UNCACHED: u64 = 1 << 4 | 1 << 3;
}
