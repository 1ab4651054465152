//! The walk of extended page tables (SDM volume 3, "The extended page-table mechanism (EPT)").

use super::{Fault, GpaCache, Kind, Purpose, Stage2};
use crate::model::mem::PhysMem;
use crate::model::tlb::{PageSize, Rights, Table};

/// An EPT and what the CPU offers for it (IA32_VMX_EPT_VPID_CAP).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ept {
    /// EPTP: memory type 2:0, walk length - 1 in 5:3, accessed and dirty flags in bit 6, table in 51:12.
    pub eptp: u64,
    /// Execute-only translations (capability bit 0).
    pub exec_only: bool,
    /// 2 MiB pages (capability bit 16).
    pub pages_2m: bool,
    /// 1 GiB pages (capability bit 17).
    pub pages_1g: bool,
    /// Physical-address width in bits.
    pub maxphyaddr: u8,
}

const R: u64 = 1;
const W: u64 = 1 << 1;
const X: u64 = 1 << 2;
const PS: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const TABLE: u64 = 0x000F_FFFF_FFFF_F000;

/// Exit qualification: the guest linear-address field is valid.
const LINEAR: u64 = 1 << 7;
/// Exit qualification: the access was to the translation of the linear address, not to a paging structure.
const FINAL: u64 = 1 << 8;

impl Ept {
    /// Write-back, 4 levels, no accessed and dirty flags, every page size, execute-only allowed.
    pub const fn new(root: u64) -> Self {
        Self { eptp: root | 0x1E, exec_only: true, pages_2m: true, pages_1g: true, maxphyaddr: 48 }
    }

    /// The same with accessed and dirty flags.
    pub const fn with_ad(self) -> Self {
        Self { eptp: self.eptp | 1 << 6, ..self }
    }

    /// EP4TA, the tag of the entries of this root.
    pub const fn ep4ta(&self) -> u64 {
        self.eptp & TABLE
    }

    const fn ad(&self) -> bool {
        self.eptp & (1 << 6) != 0
    }

    pub(super) fn resolve(
        &self,
        mem: &PhysMem,
        gpa: u64,
        why: Purpose,
        commit: bool,
        cache: &mut dyn GpaCache,
    ) -> Result<Stage2, Fault> {
        if let Some(table) = cache.table(gpa) {
            // A fault found from a cached table proves nothing: the tables decide.
            if let Ok(found) = self.attempt(mem, gpa, why, commit, cache, table) {
                return Ok(found);
            }
        }
        let level = ((self.eptp >> 3) & 7) as u8 + 1;
        if gpa >> (12 + 9 * level) != 0 {
            return Err(Fault::EptViolation { qualification: self.qualify(why, 0), gpa });
        }
        self.attempt(mem, gpa, why, commit, cache, Table { level, base: self.ep4ta(), rights: Rights::ALL })
    }

    /// One walk, from the root or from a cached table.
    fn attempt(
        &self,
        mem: &PhysMem,
        gpa: u64,
        why: Purpose,
        commit: bool,
        cache: &mut dyn GpaCache,
        start: Table,
    ) -> Result<Stage2, Fault> {
        let need = self.need(why);
        loop {
            let mut used = [(0u64, 0u64); 5];
            let mut depth = 0;
            let mut rights = bits(&start.rights);
            let (mut table, mut level) = (start.base, u32::from(start.level));
            let mut tables = [None; 4];
            let refused = |rights: u64| Fault::EptViolation { qualification: self.qualify(why, rights), gpa };
            let (leaf, size) = loop {
                let at = table + ((gpa >> (12 + 9 * (level - 1))) & 511) * 8;
                let entry = mem.read(at, 8);
                if entry & (R | W | X) == 0 {
                    return Err(refused(0));
                }
                let size = self.leaf_size(entry, level);
                if self.misconfigured(entry, level, size) {
                    return Err(Fault::EptMisconfig { gpa });
                }
                rights &= entry;
                used[depth] = (at, entry);
                depth += 1;
                match size {
                    Some(size) => break (entry, size),
                    None => (table, level) = (entry & TABLE, level - 1),
                }
                tables[level as usize - 1] = Some(Table { level: level as u8, base: table, rights: named(rights) });
            };
            if need & !rights != 0 {
                return Err(refused(rights));
            }
            let write = need & W != 0;
            if commit && self.ad() && !set_flags(mem, &used[..depth], write) {
                continue;
            }
            for table in tables.iter().flatten().filter(|_| commit) {
                cache.put_table(gpa, *table);
            }
            let dirty = !self.ad() || leaf & D != 0 || (commit && write);
            let hpa = size.base(leaf & TABLE) | (gpa & (size.bytes() - 1));
            let rights = Rights { dirty, ..named(rights) };
            return Ok(Stage2 { hpa, size, rights, memory_type: ((leaf >> 3) & 15) as u8 });
        }
    }

    /// The rights that `why` needs, which are also bits 2:0 of the qualification.
    fn need(&self, why: Purpose) -> u64 {
        match why {
            Purpose::Final { kind: Kind::Read, .. } => R,
            Purpose::Final { kind: Kind::Write, .. } => W,
            Purpose::Final { kind: Kind::Fetch, .. } => X,
            // With accessed and dirty flags every access to a guest paging structure counts as a write, too.
            Purpose::TableRead { .. } if self.ad() => R | W,
            Purpose::TableRead { .. } => R,
            Purpose::TableUpdate if self.ad() => R | W,
            Purpose::TableUpdate => W,
        }
    }

    fn qualify(&self, why: Purpose, rights: u64) -> u64 {
        let place = match why {
            Purpose::Final { linear: true, .. } => LINEAR | FINAL,
            Purpose::Final { linear: false, .. } | Purpose::TableRead { linear: false } => 0,
            Purpose::TableRead { linear: true } | Purpose::TableUpdate => LINEAR,
        };
        self.need(why) | rights << 3 | place
    }

    fn leaf_size(&self, entry: u64, level: u32) -> Option<PageSize> {
        match level {
            1 => Some(PageSize::K4),
            2 if entry & PS != 0 && self.pages_2m => Some(PageSize::M2),
            3 if entry & PS != 0 && self.pages_1g => Some(PageSize::G1),
            _ => None,
        }
    }

    /// "EPT misconfigurations": a present entry that breaks a rule.
    fn misconfigured(&self, entry: u64, level: u32, size: Option<PageSize>) -> bool {
        let unreadable = entry & R == 0 && (entry & W != 0 || !self.exec_only);
        let beyond = entry & TABLE & (!0u64 << self.maxphyaddr.min(52)) != 0;
        let reserved = match size {
            Some(PageSize::K4) => false,
            Some(size) => entry & (size.bytes() - 1) & !0xFFF != 0,
            // Bits 6:3, and bit 7 where no large page exists.
            None => entry & (0x78 | if level > 1 { PS } else { 0 }) != 0,
        };
        let memory_type = size.is_some() && matches!((entry >> 3) & 7, 2 | 3 | 7);
        unreadable || beyond || reserved || memory_type
    }
}

/// Bits 2:0 of an entry as rights, and back.
fn named(bits: u64) -> Rights {
    Rights { read: bits & R != 0, write: bits & W != 0, exec: bits & X != 0, ..Rights::ALL }
}
fn bits(rights: &Rights) -> u64 {
    u64::from(rights.read) | u64::from(rights.write) << 1 | u64::from(rights.exec) << 2
}

fn set_flags(mem: &PhysMem, used: &[(u64, u64)], write: bool) -> bool {
    used.iter().enumerate().all(|(n, (at, entry))| {
        let dirty = if write && n + 1 == used.len() { D } else { 0 };
        let new = entry | A | dirty;
        new == *entry || mem.cmpxchg(*at, 8, *entry, new).is_ok()
    })
}
