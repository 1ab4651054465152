//! A translation look-aside buffer: entries survive everything except an architectural invalidation and (if a
//! capacity is set) seeded random eviction.
//!
//! One `Tlb` belongs to one physical CPU and is used with `&mut self` by the thread that is that CPU. It knows
//! nothing of page tables: the caller inserts what its walk found, with an `origin` of the caller's choice (where the
//! entry came from), and gets it back on every hit. A hit after the tables changed is not yet a bug, it is what
//! hardware does; a hit after the invalidation that should have removed it is.
//!
//! # Tags
//!
//! | field | AMD-V | VT-x |
//! |---|---|---|
//! | `asid` | ASID (host: 0) | VPID (root operation, or VPIDs off: 0) |
//! | `root` | always 0: nCR3 is **not** part of the tag | EP4TA for guest-physical and combined entries, else 0 |
//! | `pcid` | CR3\[11:0\] with CR4.PCIDE, else 0 | the same |
//!
//! A global entry matches every PCID of its `asid` (and `root`). A guest-physical entry has PCID 0 and, on VT-x, VPID
//! 0: it belongs to its root alone (SDM volume 3, "Caching translation information"). On AMD-V the nested
//! translations belong to the ASID.
//!
//! Pointers to second-stage tables (paging-structure caches) live under the tags of guest-physical entries and go with
//! them.
//!
//! Invalidations drop exactly what the manuals promise and never more: whatever may survive does survive here.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::rng::Rng;

/// What a cached translation maps from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Linear address to physical address, no second stage in use.
    Linear,
    /// Guest-physical address to physical address (EPT or nested paging).
    Physical,
    /// Linear address of a guest all the way to the physical address.
    Combined,
}

/// What a lookup must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// See the module's table.
    pub kind: Kind,
    /// ASID or VPID.
    pub asid: u32,
    /// EP4TA (bits 51:12 of the EPTP) or 0.
    pub root: u64,
    /// PCID or 0.
    pub pcid: u16,
}

impl Tag {
    /// A tag of AMD-V: translations of `asid`, through both stages if `nested`.
    pub const fn amd(asid: u32, nested: bool) -> Self {
        let kind = if nested { Kind::Combined } else { Kind::Linear };
        Self { kind, asid, root: 0, pcid: 0 }
    }

    /// A tag of VT-x: translations of `vpid`, through the second stage `ep4ta` if there is one.
    pub const fn intel(vpid: u16, ep4ta: Option<u64>) -> Self {
        match ep4ta {
            Some(root) => Self { kind: Kind::Combined, asid: vpid as u32, root, pcid: 0 },
            None => Self { kind: Kind::Linear, asid: vpid as u32, root: 0, pcid: 0 },
        }
    }

    /// The same with a PCID.
    pub const fn with_pcid(self, pcid: u16) -> Self {
        Self { pcid, ..self }
    }
}

/// A power of two that a page can have as size: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB.
    K4 = 12,
    /// 2 MiB.
    M2 = 21,
    /// 4 MiB (32-bit paging only).
    M4 = 22,
    /// 1 GiB.
    G1 = 30,
}

impl PageSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 4] = [Self::K4, Self::M2, Self::M4, Self::G1];

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self as u8
    }

    /// The first address of the page around `addr`.
    pub const fn base(self, addr: u64) -> u64 {
        addr & !(self.bytes() - 1)
    }
}

/// One cached translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<O> {
    /// Physical address of the first byte of the page.
    pub base: u64,
    /// The size that this entry covers: the smaller of both stages' pages.
    pub size: PageSize,
    /// The size of the page as the guest's own tables have it. INVLPG of any address in that page drops every entry
    /// of it, however small the pieces are that the second stage cuts it into.
    pub linear_size: PageSize,
    /// Rights of the first stage (all, for a guest-physical entry).
    pub first: Rights,
    /// Rights of the second stage (all, for a linear entry).
    pub second: Rights,
    /// The G bit of the first stage's leaf, with CR4.PGE.
    pub global: bool,
    /// Where the entry came from.
    pub origin: O,
}

/// What a stage of translation allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Readable (false only in EPT).
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub exec: bool,
    /// A user-mode page (first stage only).
    pub user: bool,
    /// The dirty flag was set, or this stage has none: a write need not walk again.
    pub dirty: bool,
}

impl Rights {
    /// Everything allowed, nothing left to set.
    pub const ALL: Self = Self { read: true, write: true, exec: true, user: true, dirty: true };
}

/// A cached pointer into a tree of second-stage tables: the table to read next, and the rights of all entries above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Level of the table: 1 holds 4 KiB leaves.
    pub level: u8,
    /// Physical address of the table.
    pub base: u64,
    /// Rights that the entries above it leave.
    pub rights: Rights,
}

impl<O> Entry<O> {
    /// A 4 KiB entry with all rights, for tests that have no page tables.
    pub const fn plain(base: u64, origin: O) -> Self {
        Self {
            base,
            size: PageSize::K4,
            linear_size: PageSize::K4,
            first: Rights::ALL,
            second: Rights::ALL,
            global: false,
            origin,
        }
    }
}

/// PCID of global entries in the key: beyond all real ones.
const ANY_PCID: u16 = u16::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    tag: Tag,
    /// First address of the page.
    addr: u64,
    size: PageSize,
}

/// A fast hash with no chance in it.
#[derive(Default, Clone)]
pub(crate) struct FxHasher(u64);

/// A map that hashes fast and iterates in the same order in every run.
pub(crate) type FxMap<K, V> = HashMap<K, V, BuildHasherDefault<FxHasher>>;

impl Hasher for FxHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }
    fn write_u16(&mut self, n: u16) {
        self.write_u64(u64::from(n));
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
    fn write_isize(&mut self, n: isize) {
        self.write_u64(n as u64);
    }
}

/// The TLB of one CPU. `O` is what an entry remembers about its origin.
#[derive(Clone)]
pub struct Tlb<O> {
    index: FxMap<Key, u32>,
    keys: Vec<Key>,
    entries: Vec<Entry<O>>,
    /// Live entries by size, to skip lookups that cannot hit.
    by_size: [u32; 4],
    capacity: usize,
    rng: Rng,
    /// Paging-structure caches of second-stage walks: tag, first address that the table translates.
    tables: Vec<(Tag, u64, Table)>,
    table_capacity: usize,
}

impl<O> Tlb<O> {
    /// A TLB that holds up to `capacity` entries and then evicts one at random by `seed`. `usize::MAX` never forgets.
    pub fn new(capacity: usize, seed: u64) -> Self {
        assert!(capacity > 0, "a TLB without entries");
        Self {
            index: HashMap::default(),
            keys: Vec::new(),
            entries: Vec::new(),
            by_size: [0; 4],
            capacity,
            rng: Rng::new(seed),
            tables: Vec::new(),
            table_capacity: 16,
        }
    }

    /// How many pointers to second-stage tables are cached; 16 at first, 0 for none. A table page that is used for
    /// something else before its tag is flushed is then walked as what it was.
    pub fn cache_tables(&mut self, capacity: usize) {
        self.table_capacity = capacity;
        self.tables.truncate(capacity);
    }

    /// The lowest cached table on the way to `addr`.
    pub fn table(&self, tag: Tag, addr: u64) -> Option<Table> {
        let on_the_way =
            |(t, first, table): &&(Tag, u64, Table)| *t == tag && first_address(addr, table.level) == *first;
        self.tables.iter().filter(on_the_way).map(|e| e.2).min_by_key(|t| t.level)
    }

    /// Caches a table on the way to `addr`.
    pub fn put_table(&mut self, tag: Tag, addr: u64, table: Table) {
        if self.table_capacity == 0 {
            return;
        }
        let entry = (tag, first_address(addr, table.level), table);
        let same = self.tables.iter_mut().find(|e| e.0 == tag && e.1 == entry.1 && e.2.level == table.level);
        if let Some(same) = same {
            *same = entry;
        } else if self.tables.len() < self.table_capacity {
            self.tables.push(entry);
        } else {
            let slot = self.rng.below(self.tables.len() as u64) as usize;
            self.tables[slot] = entry;
        }
    }

    fn drop_tables(&mut self, gone: impl Fn(Tag) -> bool) {
        self.tables.retain(|e| !gone(e.0));
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// No entry at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every entry with its tag and the first address of its page; a global one has PCID 0xFFFF.
    pub fn iter(&self) -> impl Iterator<Item = (Tag, u64, &Entry<O>)> {
        self.keys.iter().zip(&self.entries).map(|(k, e)| (k.tag, k.addr, e))
    }

    /// The entry that translates `addr` under `tag`, if any. A global entry of another PCID counts.
    pub fn lookup(&self, tag: Tag, addr: u64) -> Option<&Entry<O>> {
        self.find(tag, addr).map(|slot| &self.entries[slot])
    }

    fn find(&self, tag: Tag, addr: u64) -> Option<usize> {
        for (size, live) in PageSize::ALL.into_iter().zip(self.by_size) {
            if live == 0 {
                continue;
            }
            for pcid in [tag.pcid, ANY_PCID] {
                let key = Key { tag: Tag { pcid, ..tag }, addr: size.base(addr), size };
                if let Some(slot) = self.index.get(&key) {
                    return Some(*slot as usize);
                }
            }
        }
        None
    }

    /// Caches `entry` for the page around `addr`, in place of what the same page had before.
    pub fn insert(&mut self, tag: Tag, addr: u64, entry: Entry<O>) {
        let pcid = if entry.global { ANY_PCID } else { tag.pcid };
        let size = entry.size;
        let key = Key { tag: Tag { pcid, ..tag }, addr: size.base(addr), size };
        if let Some(slot) = self.index.get(&key) {
            self.entries[*slot as usize] = entry;
            return;
        }
        if self.entries.len() >= self.capacity {
            self.evict();
        }
        self.index.insert(key, self.entries.len() as u32);
        self.keys.push(key);
        self.entries.push(entry);
        self.by_size[size_slot(size)] += 1;
    }

    /// Evicts one entry at random, as hardware may at any time.
    pub fn evict(&mut self) {
        if !self.entries.is_empty() {
            let slot = self.rng.below(self.entries.len() as u64) as usize;
            self.remove(slot);
        }
    }

    fn remove(&mut self, slot: usize) {
        let key = self.keys.swap_remove(slot);
        self.entries.swap_remove(slot);
        self.index.remove(&key);
        self.by_size[size_slot(key.size)] -= 1;
        if let Some(moved) = self.keys.get(slot) {
            self.index.insert(*moved, slot as u32);
        }
    }

    /// Drops what `gone` selects by tag, first address and entry, and returns how many those were. The building
    /// block of everything below.
    pub fn drop_if(&mut self, mut gone: impl FnMut(Tag, u64, &Entry<O>) -> bool) -> usize {
        let before = self.entries.len();
        for slot in (0..before).rev() {
            let key = self.keys[slot];
            if gone(key.tag, key.addr, &self.entries[slot]) {
                self.remove(slot);
            }
        }
        before - self.entries.len()
    }

    /// Everything: reset, or TLB_CONTROL 1 (all entries of all ASIDs, global ones included).
    pub fn flush_all(&mut self) -> usize {
        let n = self.entries.len();
        self.index.clear();
        self.keys.clear();
        self.entries.clear();
        self.by_size = [0; 4];
        self.tables.clear();
        n
    }

    // ---- what software does to its own translations; `asid` is the current ASID or VPID ----

    /// INVLPG: the page around `addr` for `asid` and `pcid`, global entries included, whatever the root. The whole of a
    /// large page goes, in all its pieces. Guest-physical entries stay.
    pub fn invlpg(&mut self, asid: u32, pcid: u16, addr: u64) -> usize {
        self.drop_if(|t, base, e| {
            virt(t) && t.asid == asid && (t.pcid == pcid || t.pcid == ANY_PCID) && covers(base, e, addr)
        })
    }

    /// MOV to CR3 with CR4.PCIDE = 0 (`pcid` 0), or with CR4.PCIDE = 1 and bit 63 clear: the non-global entries of
    /// `pcid`.
    pub fn mov_cr3(&mut self, asid: u32, pcid: u16) -> usize {
        self.drop_if(|t, _, _| virt(t) && t.asid == asid && t.pcid == pcid)
    }

    /// A change of CR4.PGE, of CR0.PG, or of CR4.PCIDE to 0: everything of `asid` for all PCIDs, global entries included.
    pub fn flush_linear(&mut self, asid: u32) -> usize {
        self.drop_if(|t, _, _| virt(t) && t.asid == asid)
    }

    /// INVPCID by type: 0 address of a PCID (global entries stay), 1 a PCID (global entries stay), 2 all with global,
    /// 3 all but global.
    pub fn invpcid(&mut self, asid: u32, kind: u64, pcid: u16, addr: u64) -> usize {
        self.drop_if(|t, base, e| {
            virt(t)
                && t.asid == asid
                && match kind {
                    0 => t.pcid == pcid && covers(base, e, addr),
                    1 => t.pcid == pcid,
                    2 => true,
                    _ => t.pcid != ANY_PCID,
                }
        })
    }

    // ---- AMD-V (APM volume 2, 15.16) ----

    /// INVLPGA: the page around `addr` for `asid`, all PCIDs, global or not. Cached nested translations stay: a change of
    /// nested tables needs TLB_CONTROL.
    pub fn invlpga(&mut self, asid: u32, addr: u64) -> usize {
        self.drop_if(|t, base, e| virt(t) && t.asid == asid && covers(base, e, addr))
    }

    /// TLB_CONTROL 3: everything of `asid`.
    pub fn flush_asid(&mut self, asid: u32) -> usize {
        self.drop_tables(|t| t.asid == asid);
        self.drop_if(|t, _, _| t.asid == asid)
    }

    /// TLB_CONTROL 7: everything of `asid` but global entries.
    pub fn flush_asid_non_global(&mut self, asid: u32) -> usize {
        self.drop_tables(|t| t.asid == asid);
        self.drop_if(|t, _, _| t.asid == asid && t.pcid != ANY_PCID)
    }

    // ---- VT-x (SDM volume 3, "Operations that invalidate cached mappings") ----

    /// INVVPID by type: 0 address, 1 single context, 2 all contexts but VPID 0, 3 single context but global entries.
    /// Linear and combined entries go, whatever their PCID and root; guest-physical ones stay.
    pub fn invvpid(&mut self, kind: u64, vpid: u16, addr: u64) -> usize {
        let vpid = u32::from(vpid);
        self.drop_if(|t, base, e| {
            virt(t)
                && match kind {
                    0 => t.asid == vpid && covers(base, e, addr),
                    1 => t.asid == vpid,
                    2 => t.asid != 0,
                    _ => t.asid == vpid && t.pcid != ANY_PCID,
                }
        })
    }

    /// INVEPT type 1: guest-physical and combined entries of `ep4ta`, for all VPIDs. Linear entries stay.
    pub fn invept_single(&mut self, ep4ta: u64) -> usize {
        self.drop_tables(|t| t.root == ep4ta);
        self.drop_if(|t, _, _| t.kind != Kind::Linear && t.root == ep4ta)
    }

    /// INVEPT type 2: guest-physical and combined entries of every root.
    pub fn invept_all(&mut self) -> usize {
        self.drop_tables(|_| true);
        self.drop_if(|t, _, _| t.kind != Kind::Linear)
    }

    /// An EPT violation or page fault drops what would translate the faulting addresses in the current context.
    pub fn drop_faulting(&mut self, tag: Tag, addr: u64) -> usize {
        self.tables.retain(|e| e.0 != tag || e.1 != first_address(addr, e.2.level));
        let mut n = 0;
        while let Some(slot) = self.find(tag, addr) {
            self.remove(slot);
            n += 1;
        }
        n
    }
}

/// First address that the table of `level` on the way to `addr` translates.
fn first_address(addr: u64, level: u8) -> u64 {
    let above = 12 + 9 * u32::from(level);
    if above < 64 { addr >> above << above } else { 0 }
}

/// Entries that translate linear addresses.
fn virt(tag: Tag) -> bool {
    tag.kind != Kind::Physical
}

/// Whether `addr` lies in the guest's page that the entry is (a piece) of.
fn covers<O>(base: u64, entry: &Entry<O>, addr: u64) -> bool {
    let page = entry.linear_size.max(entry.size);
    page.base(base) == page.base(addr)
}

fn size_slot(size: PageSize) -> usize {
    match size {
        PageSize::K4 => 0,
        PageSize::M2 => 1,
        PageSize::M4 => 2,
        PageSize::G1 => 3,
    }
}
