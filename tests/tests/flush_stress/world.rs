//! What the CPUs share: page tables, and what must not be used any more.
//!
//! A page table entry is a number, larger for each change. When a flush has completed, the number that was written
//! before it becomes a floor: nobody who was flushed may use a smaller one.

use hvcore::flush::{FlushDomain, NestedContext, NestedIds, TargetIndex, VpFlush};
use hvcore::vp_index::{VpIndexMap, VpSlot};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Pages in each address space; they lie within 2 MiB.
pub const PAGES: usize = 48;
/// Pages from here on are global.
pub const GLOBAL: usize = 40;
pub const FIRST_PAGE: u64 = 0x7F00_0020_0000;
pub const VMS: usize = 2;
/// VP_IDs of L2 that are used; the last cannot be named by a set.
pub const VP_IDS: [u32; 4] = [0, 3, 64, 5000];
pub const ROOTS: usize = 2;

pub type Table = [AtomicU64; PAGES];

fn table() -> Table {
    std::array::from_fn(|_| AtomicU64::new(0))
}

/// The address of a page.
pub fn address(page: usize) -> u64 {
    FIRST_PAGE + page as u64 * 4096
}

/// The root's L1 GPA; the pages it maps are the L1 pages `PAGES * root` on.
pub fn root_gpa(root: usize) -> u64 {
    0x10_0000 * (root as u64 + 1)
}

pub struct World {
    pub domain: FlushDomain<'static, 16>,
    pub map: VpIndexMap<'static>,
    pub kicks: Vec<AtomicBool>,
    /// L1's page table; each VM's; each root's second stage.
    pub l1: Table,
    pub l2: [Table; VMS],
    pub second: [Table; ROOTS],
    /// Floors: by VP for L1; by VM and VP_ID for L2; by root.
    pub l1_floor: Vec<Table>,
    pub l2_floor: [[Table; VP_IDS.len()]; VMS],
    pub second_floor: [Table; ROOTS],
    /// Serializes changes of one table, so that numbers grow.
    pub writing: Mutex<()>,
    pub next: AtomicU64,
    pub finding: Mutex<Option<String>>,
    pub stop: AtomicBool,
    pub stopped: AtomicU64,
    ops: u64,
    claimed: AtomicU64,
    pub seed: u64,
}

impl World {
    pub fn new(cpus: usize, ops: u64, seed: u64) -> Self {
        let zeros = |n: usize| -> &'static [AtomicU64] { Vec::leak((0..n).map(|_| AtomicU64::new(0)).collect()) };
        let vps: &'static [_] = Vec::leak((0..cpus).map(|_| VpFlush::new()).collect());
        // Two buckets: there are collisions.
        let index = TargetIndex::new(cpus, zeros(2), zeros(2 * TargetIndex::group_words(cpus))).unwrap();
        let entries = Vec::leak((0..cpus).map(|_| Default::default()).collect());
        let map = VpIndexMap::new(entries, zeros(1)).unwrap();
        for slot in 0..cpus as u32 {
            // VP indexes run backwards.
            map.assign(cpus as u32 - 1 - slot, VpSlot::new(slot).unwrap()).unwrap();
        }
        Self {
            domain: FlushDomain::new(vps, index),
            map,
            kicks: (0..cpus).map(|_| AtomicBool::new(false)).collect(),
            l1: table(),
            l2: std::array::from_fn(|_| table()),
            second: std::array::from_fn(|_| table()),
            l1_floor: (0..cpus).map(|_| table()).collect(),
            l2_floor: std::array::from_fn(|_| std::array::from_fn(|_| table())),
            second_floor: std::array::from_fn(|_| table()),
            writing: Mutex::new(()),
            next: AtomicU64::new(1),
            finding: Mutex::new(None),
            stop: AtomicBool::new(false),
            stopped: AtomicU64::new(0),
            ops,
            claimed: AtomicU64::new(0),
            seed,
        }
    }

    pub fn claim_op(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && self.claimed.fetch_add(1, Ordering::Relaxed) < self.ops
    }

    pub fn done(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed)
    }

    pub fn report(&self, finding: String) {
        self.finding.lock().unwrap().get_or_insert(finding);
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Gives the pages of a table new entries; the smallest of them.
    pub fn change(&self, table: &Table, pages: impl Iterator<Item = usize>) -> u64 {
        let _guard = self.writing.lock().unwrap();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        for page in pages {
            // Relaxed: as a guest's store. What makes it visible in time is the flush.
            table[page].store(number, Ordering::Relaxed);
        }
        number
    }
}

/// A nested context: VM, VP_ID by number, L1's tag, root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub vm: usize,
    pub vp: usize,
    pub tag: u64,
    pub root: usize,
}

pub fn vm_id(vm: usize) -> u64 {
    0xFFFF_8880_0000_0000 + 0x1000 * vm as u64
}

impl From<Context> for NestedContext {
    fn from(context: Context) -> Self {
        let ids = NestedIds { vm_id: vm_id(context.vm), vp_id: VP_IDS[context.vp] };
        Self { ids: Some(ids), tag: context.tag, root: root_gpa(context.root) }
    }
}
