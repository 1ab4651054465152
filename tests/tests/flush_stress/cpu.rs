//! A physical CPU that runs one VP: its TLB, its guest, and the embedder's side of the engine.

use crate::world::{self, Context, GLOBAL, PAGES, ROOTS, VMS, VP_IDS, World, address, vm_id};
use hvcore::addr::{L1Gpa, Level};
use hvcore::flush::{
    EntryFlush, GvaFlush, GvaScope, GvaWidth, LocalFlush, Posted, SecondStageFlush, SecondStageItem, SecondStageScope,
    Shootdown,
};
use std::ops::Range;
use std::sync::atomic::Ordering;
use tests::model::rng::Rng;
use tests::model::tlb::{Entry, Tag, Tlb};
use tlfs_abi::flush::{ExtendedGvaRange, GvaRange, GvaSpan, RangeFormat};
use tlfs_abi::vp_set::{SparseVpSet, VpSet};

/// Where a translation came from: the table entries it was made of, and whose they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    context: Option<Context>,
    first: u64,
    second: u64,
}

const ASIDS: u32 = 6;

pub struct Cpu<'w> {
    world: &'w World,
    local: LocalFlush<'static, 16>,
    scratch: Shootdown,
    rng: Rng,
    tlb: Tlb<Origin>,
    /// ASIDs of L1 and L2. A retired one is replaced by the next; when there is none, everything is flushed.
    asid: [u32; 2],
    next_asid: u32,
    context: Context,
}

/// A request's pages, and the flush that covers them.
struct Flush {
    pages: Range<usize>,
    entries: Vec<u64>,
    format: RangeFormat,
    whole: Whole,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Whole {
    No,
    NonGlobal,
    Everything,
}

impl Flush {
    fn scope(&self) -> GvaScope<'_> {
        match self.whole {
            Whole::No => GvaScope::Ranges { format: self.format, entries: &self.entries },
            Whole::NonGlobal => GvaScope::EverythingNonGlobal,
            Whole::Everything => GvaScope::Everything,
        }
    }
}

impl<'w> Cpu<'w> {
    pub fn new(world: &'w World, slot: u16) -> Self {
        let seed = world.seed * 1000 + u64::from(slot);
        let mut cpu = Self {
            world,
            local: world.domain.local(slot).unwrap(),
            scratch: Shootdown::new(),
            rng: Rng::new(seed),
            tlb: Tlb::new(256, seed),
            asid: [1, 2],
            next_asid: 3,
            context: Context { vm: 0, vp: 0, tag: 0, root: 0 },
        };
        let _ = cpu.local.set_context(cpu.context.into());
        cpu
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n as u64) as usize
    }

    /// One step of the host.
    pub fn operation(&mut self) {
        match self.below(16) {
            0..=4 => self.run(Level::L1),
            5..=9 => self.run(Level::L2),
            10 => self.switch_context(),
            11 => self.fail(),
            12 => self.software(),
            13 => self.flush_l1(),
            14 => self.flush_l2(),
            _ => self.flush_second_stage(),
        }
    }

    pub fn leave(&mut self) {
        self.local.exit();
    }

    // Running guests.

    fn run(&mut self, level: Level) {
        self.prepare(level);
        let accesses = 1 + self.below(12);
        for _ in 0..accesses {
            if self.kick().load(Ordering::Acquire) || self.world.stop.load(Ordering::Relaxed) {
                break;
            }
            self.access(level);
        }
        // Sometimes only a kick brings it out, if one comes soon.
        if self.rng.chance(64) {
            for _ in 0..200 {
                if self.kick().load(Ordering::Acquire) {
                    break;
                }
                std::thread::yield_now();
                self.access(level);
            }
        }
        self.local.exit();
    }

    fn fail(&mut self) {
        let level = if self.rng.chance(512) { Level::L1 } else { Level::L2 };
        self.kick().store(false, Ordering::Relaxed);
        let _ = self.local.enter(level);
        self.local.entry_failed();
    }

    fn kick(&self) -> &'w std::sync::atomic::AtomicBool {
        &self.world.kicks[usize::from(self.local.slot())]
    }

    fn prepare(&mut self, level: Level) {
        // Kicks up to here find the host. Later ones are held until the guest runs.
        self.kick().store(false, Ordering::Relaxed);
        let mut retire = false;
        let mut non_global = false;
        let mut spans = Vec::new();
        if let Some(EntryFlush { gva, second_stage }) = self.local.enter(level) {
            match gva {
                GvaFlush::None => (),
                GvaFlush::Ranges(ranges) => match ranges.spans(GvaWidth::Bits48) {
                    Some(list) => spans.extend(list),
                    None => retire = true,
                },
                GvaFlush::EverythingNonGlobal => non_global = true,
                GvaFlush::Everything => retire = true,
            }
            retire |= match second_stage {
                SecondStageFlush::None => false,
                SecondStageFlush::Everything => true,
                SecondStageFlush::Items(items) => items.iter().any(|item| match item {
                    // Another root's translations went with its context.
                    SecondStageItem::Root(root) | SecondStageItem::RootRange { root, .. } => {
                        *root == world::root_gpa(self.context.root)
                    }
                    SecondStageItem::L1Range { .. } => true,
                }),
            };
        }
        let asid = self.asid[level as usize];
        spans.iter().for_each(|span| self.invalidate(asid, span));
        if non_global {
            self.tlb.flush_asid_non_global(asid);
        }
        if retire {
            self.retire(level);
        }
        if self.rng.chance(8) {
            self.tlb.evict();
        }
    }

    fn invalidate(&mut self, asid: u32, span: &GvaSpan) {
        let end = span.start + span.pages * span.page_size;
        for page in 0..PAGES {
            if (span.start..end).contains(&address(page)) {
                self.tlb.invlpga(asid, address(page));
            }
        }
    }

    fn retire(&mut self, level: Level) {
        if self.next_asid > ASIDS {
            self.tlb.flush_all();
            self.asid = [1, 2];
            self.next_asid = 3;
        } else {
            self.asid[level as usize] = self.next_asid;
            self.next_asid += 1;
        }
    }

    fn walk(&self, level: Level, page: usize) -> Origin {
        match level {
            Level::L1 => Origin { context: None, first: self.world.l1[page].load(Ordering::Relaxed), second: 0 },
            Level::L2 => Origin {
                context: Some(self.context),
                first: self.world.l2[self.context.vm][page].load(Ordering::Relaxed),
                second: self.world.second[self.context.root][page].load(Ordering::Relaxed),
            },
        }
    }

    /// What a translation must be at least as new as.
    fn floors(&self, level: Level, page: usize) -> (u64, u64) {
        // Acquire: who sees the floor is behind the flush, and so are its walks.
        match level {
            Level::L1 => {
                let floor = &self.world.l1_floor[usize::from(self.local.slot())];
                (floor[page].load(Ordering::Acquire), 0)
            }
            Level::L2 => {
                let Context { vm, vp, root, .. } = self.context;
                let first = self.world.l2_floor[vm][vp][page].load(Ordering::Acquire);
                (first, self.world.second_floor[root][page].load(Ordering::Acquire))
            }
        }
    }

    /// A guest instruction that uses a page.
    fn access(&mut self, level: Level) {
        let page = self.below(PAGES);
        let floors = self.floors(level, page);
        let tag = Tag::amd(self.asid[level as usize], level == Level::L2);
        let used = match self.tlb.lookup(tag, address(page)) {
            Some(entry) => entry.origin,
            None => {
                let origin = self.walk(level, page);
                let entry = Entry { global: page >= GLOBAL, ..Entry::plain(0, origin) };
                self.tlb.insert(tag, address(page), entry);
                origin
            }
        };
        self.check("guest", level, page, used, floors);
    }

    fn check(&self, who: &str, level: Level, page: usize, used: Origin, floors: (u64, u64)) {
        // L1's tag for the context is no part of what the tables say.
        let same = |a: Option<Context>, b: Option<Context>| a.map(|c| (c.vm, c.root)) == b.map(|c| (c.vm, c.root));
        let context = (level == Level::L2).then_some(self.context);
        if used.first < floors.0 || used.second < floors.1 || !same(used.context, context) {
            let slot = self.local.slot();
            self.world.report(format!("{who} of VP {slot}, {level:?}, {context:?}, page {page}: {used:?} {floors:?}"));
        }
    }

    /// A translation in software, used for a while under inhibition.
    fn software(&mut self) {
        let level = if self.rng.chance(512) { Level::L1 } else { Level::L2 };
        let page = self.below(PAGES);
        self.local.shared().inhibit();
        let used = self.walk(level, page);
        if self.rng.chance(256) {
            std::thread::yield_now();
        }
        self.check("software", level, page, used, self.floors(level, page));
        // Suspended callers poll in this test; waking them is the embedder's.
        let _ = self.local.shared().uninhibit();
    }

    fn switch_context(&mut self) {
        let tag = self.below(2) as u64;
        let context = Context { vm: self.below(VMS), vp: self.below(VP_IDS.len()), tag, root: self.below(ROOTS) };
        self.context = context;
        if self.rng.chance(64) {
            self.local.forget_context();
        }
        let _ = self.local.set_context(context.into());
    }

    // Requests.

    /// Pages to change, and a list or a whole flush that covers them.
    fn choose(&mut self) -> Flush {
        let first = self.below(PAGES);
        let pages = first..PAGES.min(first + 1 + self.below(4));
        let mut flush = Flush { pages, entries: Vec::new(), format: RangeFormat::Normal, whole: Whole::No };
        let len = flush.pages.len() as u64;
        match self.below(10) {
            0 => flush.whole = Whole::Everything,
            1 => {
                flush.whole = Whole::NonGlobal;
                // Global pages are not covered.
                flush.pages = flush.pages.start.min(GLOBAL - 1)..flush.pages.end.min(GLOBAL);
            }
            2 | 3 => flush.entries = flush.pages.clone().map(|page| GvaRange::new(address(page), 1).0).collect(),
            4 => {
                // More than a queue holds.
                flush.entries = (0..17).map(|_| GvaRange::new(address(first), len).0).collect();
            }
            5 => {
                flush.format = RangeFormat::Extended;
                // The 2 MiB around them, and something without a canonical byte.
                let large = ExtendedGvaRange(address(0) & !0x1F_FFFF | 1 << 11);
                flush.entries = vec![1 << 60, large.0];
            }
            _ => flush.entries = vec![GvaRange::new(address(first), len).0],
        }
        flush
    }

    /// Kicks, waits, and says whether the request is complete (else a target inhibits: issue it again).
    fn finish(&mut self, posted: Posted) -> bool {
        for slot in self.scratch.kicks() {
            self.world.kicks[usize::from(slot)].store(true, Ordering::Release);
        }
        match posted {
            Posted::Done => true,
            Posted::Suspend => {
                std::thread::yield_now();
                false
            }
            Posted::Wait => {
                while !self.scratch.poll(self.world.domain.vps()) {
                    std::thread::yield_now();
                }
                true
            }
        }
    }

    fn flush_l1(&mut self) {
        let world = self.world;
        let flush = self.choose();
        let number = world.change(&world.l1, flush.pages.clone());
        let mask = 1 + self.rng.below((1 << world.kicks.len()) - 1);
        let all = self.rng.chance(256);
        loop {
            let set = if all { VpSet::All } else { VpSet::Sparse(SparseVpSet::from_mask(&mask)) };
            let posted = world.domain.flush_l1(&world.map, set, flush.scope(), &mut self.scratch);
            if self.finish(posted) {
                break;
            }
        }
        for (slot, floor) in world.l1_floor.iter().enumerate() {
            let index = world.l1_floor.len() - 1 - slot;
            if all || mask >> index & 1 != 0 {
                flush.pages.clone().for_each(|page| {
                    floor[page].fetch_max(number, Ordering::Release);
                });
            }
        }
    }

    fn flush_l2(&mut self) {
        let world = self.world;
        let flush = self.choose();
        let vm = self.below(VMS);
        let number = world.change(&world.l2[vm], flush.pages.clone());
        // VP_IDs 0, 3 and 64, by name; sometimes far more than there are.
        let chosen: Vec<bool> = (0..3).map(|_| self.rng.chance(512)).collect();
        let (mut low, mut high) = (u64::from(chosen[0]) | u64::from(chosen[1]) << 3, u64::from(chosen[2]));
        if self.rng.chance(128) {
            (low, high) = (low | !0b1001, high | !1);
        }
        let all = self.rng.chance(256);
        let banks = [low, high];
        loop {
            let set = if all { VpSet::All } else { VpSet::Sparse(SparseVpSet::new(0b11, &banks).unwrap()) };
            let posted = world.domain.flush_l2(vm_id(vm), set, flush.scope(), &mut self.scratch);
            if self.finish(posted) {
                break;
            }
        }
        for (vp, floor) in world.l2_floor[vm].iter().enumerate() {
            if all || chosen.get(vp).copied().unwrap_or(false) {
                flush.pages.clone().for_each(|page| {
                    floor[page].fetch_max(number, Ordering::Release);
                });
            }
        }
    }

    fn flush_second_stage(&mut self) {
        let world = self.world;
        let root = self.below(ROOTS);
        let first = self.below(PAGES);
        let pages = first..PAGES.min(first + 1 + self.below(4));
        let number = world.change(&world.second[root], pages.clone());
        let gpa = L1Gpa::new(world::root_gpa(root) | 0x1E);
        let entries = [address(first) | (pages.len() as u64 - 1)];
        let kind = self.below(5);
        loop {
            let scope = match kind {
                0 => SecondStageScope::Everything,
                1 => SecondStageScope::Root(gpa),
                2 => SecondStageScope::L1Pages { first: L1Gpa::new(address(first)), pages: pages.len() as u64 },
                _ => SecondStageScope::Ranges { root: gpa, entries: &entries },
            };
            let posted = world.domain.flush_second_stage(scope, &mut self.scratch);
            if self.finish(posted) {
                break;
            }
        }
        pages.for_each(|page| {
            world.second_floor[root][page].fetch_max(number, Ordering::Release);
        });
    }
}
