//! The walk of x86 page tables: 32-bit, PAE, 4-level and 5-level.

use super::{Access, Fault, Kind, Purpose, Second, Vendor, Walker};
use crate::model::tlb::{PageSize, Rights, Table};

/// The paging mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// CR0.PG = 0.
    Off,
    /// 32-bit paging.
    Bits32,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    Level4,
    /// 5-level paging.
    Level5,
}

impl Mode {
    /// The highest address that the mode can translate.
    pub const fn reach(self) -> u64 {
        match self {
            Self::Bits32 | Self::Pae => 0xFFFF_FFFF,
            Self::Level4 => 0xFFFF_FFFF_FFFF,
            Self::Level5 => 0x1FF_FFFF_FFFF_FFFF,
            Self::Off => u64::MAX,
        }
    }
}

/// Everything that first-stage paging depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Paging mode.
    pub mode: Mode,
    /// Whose reserved bits.
    pub vendor: Vendor,
    /// CR3 (nCR3 for nested paging), PCID bits included.
    pub cr3: u64,
    /// PDPTE registers of PAE paging; `None`: read from memory at each walk.
    pub pdptes: Option<[u64; 4]>,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.PSE (32-bit paging only).
    pub pse: bool,
    /// CR4.PGE.
    pub pge: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// EFER.NXE.
    pub nxe: bool,
    /// The CPU has 1 GiB pages.
    pub pages_1g: bool,
    /// Physical-address width in bits (at most 52).
    pub maxphyaddr: u8,
}

impl Linear {
    /// No paging.
    pub const fn off(vendor: Vendor) -> Self {
        Self {
            mode: Mode::Off,
            vendor,
            cr3: 0,
            pdptes: None,
            wp: false,
            pse: false,
            pge: false,
            smep: false,
            smap: false,
            nxe: false,
            pages_1g: true,
            maxphyaddr: 48,
        }
    }

    /// 4-level paging as a 64-bit kernel has it: WP, PGE and NXE on.
    pub const fn long(vendor: Vendor, cr3: u64) -> Self {
        Self { mode: Mode::Level4, cr3, wp: true, pge: true, nxe: true, ..Self::off(vendor) }
    }

    /// The first stage's rule for `access` to a page with these rights.
    pub(crate) fn permits(&self, r: &Rights, access: Access) -> bool {
        if self.mode == Mode::Off {
            return true;
        }
        match (access.user, access.kind) {
            (true, Kind::Read) => r.user,
            (true, Kind::Write) => r.user && r.write,
            (true, Kind::Fetch) => r.user && r.exec,
            (false, Kind::Fetch) => r.exec && !(self.smep && r.user),
            (false, kind) => {
                let smap = self.smap && r.user && !access.ac;
                !smap && (kind == Kind::Read || r.write || !self.wp)
            }
        }
    }

    /// Bits of `entry` that must be 0 in any present entry: beyond the physical-address width, and NX when it is off.
    fn reserved(&self) -> u64 {
        let high = (1u64 << 52) - (1u64 << self.maxphyaddr.min(52));
        high | if self.nxe { 0 } else { 1 << 63 }
    }
}

impl Access {
    /// The error code of a fault on a page that is not present.
    pub(crate) fn code(self, cx: &Linear) -> u32 {
        let fetch = self.kind == Kind::Fetch && ((cx.nxe && cx.mode != Mode::Bits32) || cx.smep);
        (u32::from(self.kind == Kind::Write) << 1) | (u32::from(self.user) << 2) | (u32::from(fetch) << 4)
    }
}

/// Bits of an entry.
const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// What the first stage yields.
pub(crate) struct Leaf {
    pub gpa: u64,
    pub size: PageSize,
    pub rights: Rights,
    pub global: bool,
    pub pat: u8,
}

/// One entry that the walk used, for its accessed and dirty flags.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    hpa: u64,
    entry: u64,
}

struct Walk<'a, 'b> {
    cx: &'a Linear,
    walker: &'a mut Walker<'b>,
    access: Access,
    used: [Used; 5],
    depth: usize,
    rights: Rights,
    /// Tables below the root that the walk went through.
    tables: [Option<Table>; 4],
}

/// Walks the first stage for `addr`. Table addresses go through the walker's second stage.
pub(crate) fn walk(cx: &Linear, walker: &mut Walker<'_>, addr: u64, access: Access) -> Result<Leaf, Fault> {
    if cx.mode == Mode::Off {
        let rights = Rights::ALL;
        return Ok(Leaf { gpa: addr, size: PageSize::K4, rights, global: false, pat: 0 });
    }
    if let Some(table) = walker.cache.table(addr).filter(|_| walker.inner) {
        // A fault found from a cached table proves nothing: the tables decide.
        if let Ok(leaf) = attempt(cx, walker, addr, access, Some(table)) {
            return Ok(leaf);
        }
    }
    attempt(cx, walker, addr, access, None)
}

/// One walk, from the root or from a cached table.
fn attempt(
    cx: &Linear,
    walker: &mut Walker<'_>,
    addr: u64,
    access: Access,
    start: Option<Table>,
) -> Result<Leaf, Fault> {
    // A table that changes under the walk makes it start over; each restart means that another CPU made progress.
    loop {
        let commit = walker.commit;
        let rights = start.map_or(Rights::ALL, |t| t.rights);
        let mut w = Walk { cx, walker, access, used: Default::default(), depth: 0, rights, tables: [None; 4] };
        let leaf = match cx.mode {
            Mode::Level4 | Mode::Level5 if start.is_some() => {
                let (base, level) = start.map_or((0, 1), |t| (t.base, u32::from(t.level)));
                w.tree(base, level, addr)?
            }
            Mode::Bits32 => w.bits32(addr)?,
            Mode::Pae => w.pae(addr)?,
            Mode::Level4 => w.tree(cx.cr3 & TABLE, 4, addr)?,
            _ => w.tree(cx.cr3 & TABLE, 5, addr)?,
        };
        if !cx.permits(&leaf.rights, access) {
            return Err(Fault::Page { code: access.code(cx) | 1 });
        }
        if !commit || w.set_flags(if cx.mode == Mode::Bits32 { 4 } else { 8 })? {
            w.offer(addr);
            let dirty = leaf.rights.dirty || (commit && access.kind == Kind::Write);
            return Ok(Leaf { rights: Rights { dirty, ..leaf.rights }, ..leaf });
        }
    }
}

/// Address bits of an 8-byte entry.
const TABLE: u64 = 0x000F_FFFF_FFFF_F000;

impl Walk<'_, '_> {
    fn not_present(&self) -> Fault {
        Fault::Page { code: self.access.code(self.cx) }
    }

    fn reserved(&self) -> Fault {
        Fault::Page { code: self.access.code(self.cx) | P as u32 | 1 << 3 }
    }

    /// Reads the entry at guest-physical `gpa`.
    fn entry(&mut self, gpa: u64, size: u64) -> Result<u64, Fault> {
        let hpa = self.walker.resolve(gpa, Purpose::TableRead { linear: true })?.hpa;
        let entry = self.walker.mem.read(hpa, size);
        if entry & P == 0 {
            return Err(self.not_present());
        }
        self.used[self.depth] = Used { gpa, hpa, entry };
        self.depth += 1;
        Ok(entry)
    }

    fn narrow(&mut self, entry: u64) {
        self.rights.write &= entry & W != 0;
        self.rights.user &= entry & U != 0;
        self.rights.exec &= entry & NX == 0 || !self.cx.nxe;
    }

    fn leaf(&self, base: u64, addr: u64, size: PageSize, entry: u64) -> Leaf {
        let pat_bit = if size == PageSize::K4 { entry >> 7 } else { entry >> 12 } & 1;
        Leaf {
            gpa: base | (addr & (size.bytes() - 1)),
            size,
            rights: Rights { dirty: entry & D != 0, ..self.rights },
            global: entry & G != 0,
            pat: (pat_bit << 2 | (entry >> 3) & 3) as u8,
        }
    }

    /// 4 KiB tables of 512 entries, from `level` (1 is the page table) down.
    fn tree(&mut self, mut table: u64, mut level: u32, addr: u64) -> Result<Leaf, Fault> {
        loop {
            let index = (addr >> (12 + 9 * (level - 1))) & 511;
            let entry = self.entry(table + index * 8, 8)?;
            let size = match level {
                1 => Some(PageSize::K4),
                2 if entry & PS != 0 => Some(PageSize::M2),
                3 if entry & PS != 0 && self.cx.pages_1g => Some(PageSize::G1),
                _ => None,
            };
            let mut reserved = self.cx.reserved();
            match size {
                Some(PageSize::K4) => {}
                // Between the PAT bit (12) and the address.
                Some(size) => reserved |= (size.bytes() - 1) & !0x1FFF,
                None => {
                    reserved |= if level > 2 { PS } else { 0 };
                    reserved |= if level > 2 && self.cx.vendor == Vendor::Amd { G } else { 0 };
                }
            }
            if self.cx.mode == Mode::Pae {
                // No available bits above the address: 62:52 are reserved.
                reserved |= 0x7FF0_0000_0000_0000;
            }
            if entry & reserved != 0 {
                return Err(self.reserved());
            }
            self.narrow(entry);
            if let Some(size) = size {
                return Ok(self.leaf(size.base(entry & TABLE), addr, size, entry));
            }
            table = entry & TABLE;
            level -= 1;
            if let Some(slot) = self.tables.get_mut(level as usize - 1) {
                *slot = Some(Table { level: level as u8, base: table, rights: self.rights });
            }
        }
    }

    /// Offers the tables of a second-stage walk to the cache.
    fn offer(&mut self, addr: u64) {
        let wanted = self.walker.inner && self.walker.commit && matches!(self.cx.mode, Mode::Level4 | Mode::Level5);
        for table in self.tables.iter().flatten().filter(|_| wanted) {
            self.walker.cache.put_table(addr, *table);
        }
    }

    fn pae(&mut self, addr: u64) -> Result<Leaf, Fault> {
        let index = (addr >> 30) & 3;
        let pdpte = match self.cx.pdptes {
            Some(registers) => registers[index as usize],
            None => {
                let gpa = (self.cx.cr3 & 0xFFFF_FFE0) + index * 8;
                let hpa = self.walker.resolve(gpa, Purpose::TableRead { linear: true })?.hpa;
                self.walker.mem.read(hpa, 8)
            }
        };
        if pdpte & P == 0 {
            return Err(self.not_present());
        }
        if pdpte & pdpte_reserved(self.cx) != 0 {
            return Err(self.reserved());
        }
        self.tree(pdpte & TABLE, 2, addr & 0xFFFF_FFFF)
    }

    fn bits32(&mut self, addr: u64) -> Result<Leaf, Fault> {
        let pde = self.entry((self.cx.cr3 & 0xFFFF_F000) + ((addr >> 22) & 1023) * 4, 4)?;
        self.narrow(pde);
        if pde & PS != 0 && self.cx.pse {
            // PSE-36: bits 20:13 are address bits 39:32; those beyond the physical-address width and bit 21 are reserved.
            let wide = u64::from(self.cx.maxphyaddr.min(40)).saturating_sub(32);
            if pde & (1 << 21) != 0 || ((pde >> 13) & 0xFF) >> wide != 0 {
                return Err(self.reserved());
            }
            let base = (pde & 0xFFC0_0000) | ((pde >> 13) & 0xFF) << 32;
            return Ok(self.leaf(base, addr, PageSize::M4, pde));
        }
        let pte = self.entry((pde & 0xFFFF_F000) + ((addr >> 12) & 1023) * 4, 4)?;
        self.narrow(pte);
        Ok(self.leaf(pte & 0xFFFF_F000, addr, PageSize::K4, pte))
    }

    /// Sets A in every entry used and D in the leaf of a write; false if one changed since it was read.
    fn set_flags(&mut self, size: u64) -> Result<bool, Fault> {
        for (n, used) in self.used[..self.depth].iter().enumerate() {
            let leaf = n + 1 == self.depth;
            let dirty = if leaf && self.access.kind == Kind::Write { D } else { 0 };
            let new = used.entry | A | dirty;
            if new == used.entry {
                continue;
            }
            let hpa = match self.walker.second {
                Second::Off => used.hpa,
                _ => self.walker.resolve(used.gpa, Purpose::TableUpdate)?.hpa,
            };
            if self.walker.mem.cmpxchg(hpa, size, used.entry, new).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Bits that must be 0 in a present PDPTE of PAE paging (also what a load into the registers checks).
pub(crate) fn pdpte_reserved(cx: &Linear) -> u64 {
    let beyond = !0u64 << cx.maxphyaddr.min(52);
    beyond | 0x1E6
}
