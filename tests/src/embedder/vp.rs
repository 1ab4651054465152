//! One virtual processor: what the library needs for it, and how it is put in the model's memory and taken out.

use std::sync::Arc;

use hvcore::addr::Hpa;
use hvcore::flush::{LocalFlush, Shootdown};
use hvcore::hypercall::Scratch;
use hvcore::partition::VpInterface;
use hvcore::shadow::{PagePool, PageRecord, ShadowPage};
use nsvm::asid::AsidPool;
use nsvm::npt::{NptFormat, NptShadow};
use nsvm::vmcb::Vmcb;
use nsvm::vmcb::bits::{DR7_RESET, Intercepts, efer};
use nsvm::{Code, EntryPlan, Gprs, IoMap, Machine, MergedMap, MsrMap, NestedSvm};
use zerocopy::{FromZeros, IntoBytes};

use super::layout::{self, VpPlaces};
use super::memory::L1View;
use crate::model::cpu::Op;
use crate::model::mem::{Lent, PhysMem};

/// Shadow roots per VP.
pub const ROOTS: usize = 2;
/// Pages of shadow tables per VP.
pub const SHADOW_PAGES: usize = 8;

/// Added to L1's TSC.
pub const OWN_TSC_OFFSET: u64 = 0x1_0000_0000;

/// What exits of L1.
pub const INTERCEPTS: Intercepts = Intercepts::OF_EMBEDDER;

/// General registers but RAX and RSP, numbered as instructions do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Regs(pub [u64; 16]);

impl Gprs for Regs {
    fn rcx(&self) -> u64 {
        self.0[1]
    }
    fn rdx(&self) -> u64 {
        self.0[2]
    }
    fn set_rdx(&mut self, value: u64) {
        self.0[2] = value;
    }
}

/// The instruction that exited, as bytes: what the guest's program is at.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub Op);

impl Code for Bytes {
    fn fetch(&self, _: hvcore::addr::Level, _: &Vmcb, bytes: &mut [u8; 15]) -> usize {
        bytes.fill(0x90);
        let code = self.0.encode();
        bytes[..code.bytes().len()].copy_from_slice(code.bytes());
        15
    }
}

/// The embedder's own permission maps.
pub struct OwnMaps {
    /// All MSRs but SYSENTER_CS exit.
    pub msr: Box<MsrMap>,
    /// Port 0xE0 exits.
    pub io: Box<IoMap>,
}

impl Default for OwnMaps {
    fn default() -> Self {
        let mut maps = Self { msr: Box::new([u64::MAX; 1024]), io: Box::new([0; 1536]) };
        maps.msr[0x174 >> 5] &= !(3 << ((0x174 & 31) * 2));
        maps.io[0xE0 >> 6] |= 1 << (0xE0 & 63);
        maps
    }
}

/// The pages of a VP that the processor reads.
pub struct Hw {
    /// Runs L1.
    pub vmcb01: Box<Vmcb>,
    /// Runs L2.
    pub vmcb02: Box<Vmcb>,
    /// MSR map of L2.
    pub msrpm02: Box<MsrMap>,
    /// IO map of L2.
    pub iopm02: Box<IoMap>,
    /// The other registers.
    pub regs: Regs,
    /// Where all that is.
    pub at: VpPlaces,
}

/// A virtual processor.
pub struct Vp<'a> {
    /// What the processor reads.
    pub hw: &'a mut Hw,
    /// The library's state machine.
    pub nested: NestedSvm,
    /// The shadow of L1's nested tables.
    pub shadow: NptShadow<'a, ROOTS>,
    /// What others may ask it to flush.
    pub flush: LocalFlush<'a>,
    /// Its synthetic MSRs.
    pub msrs: VpInterface,
    /// Targets of its last flush.
    pub shootdown: Shootdown,
    /// Input of its hypercalls.
    pub scratch: Scratch,
    /// L1's nested tables for the L2 that runs.
    pub walk: Option<(NptFormat, u64)>,
    /// How it was entered last.
    pub plan: Option<EntryPlan>,
    /// The processor that it is on.
    pub on: Option<usize>,
    /// The instruction that its guest is at.
    pub op: Op,
    /// Why it has been reset since its L1 was booted.
    pub fell: Option<&'static str>,
    /// What is in the model's memory of both maps.
    maps: &'a mut [u64; 1024 + 1536],
}

/// The pages of a VP's shadow, as the model's memory has them.
struct Pool(Arc<[ShadowPage]>);

impl Lent for Pool {
    fn bytes(&self) -> u64 {
        self.0.len() as u64 * 4096
    }
    fn word(&self, offset: u64) -> u64 {
        self.0[(offset >> 12) as usize].entry((offset & 4095) as usize >> 3)
    }
}

/// Storage of a VP.
pub struct VpStorage {
    pages: Arc<[ShadowPage]>,
    records: Vec<PageRecord>,
    hw: Hw,
    maps: Box<[u64; 1024 + 1536]>,
}

impl Default for VpStorage {
    fn default() -> Self {
        Self {
            pages: (0..SHADOW_PAGES).map(|_| ShadowPage::new()).collect(),
            records: (0..SHADOW_PAGES).map(|_| PageRecord::new()).collect(),
            hw: Hw {
                vmcb01: Box::new(Vmcb::new_zeroed()),
                vmcb02: Box::new(Vmcb::new_zeroed()),
                msrpm02: Box::new([0; 1024]),
                iopm02: Box::new([0; 1536]),
                regs: Regs::default(),
                at: VpPlaces::of(0, 0),
            },
            maps: Box::new([0; 1024 + 1536]),
        }
    }
}

impl VpStorage {
    /// For the next VP. What [`Vp::new`] and the library fill themselves stays.
    pub fn reset(&mut self) {
        for vmcb in [&mut self.hw.vmcb01, &mut self.hw.vmcb02] {
            vmcb.zero();
        }
        // As laid out.
        self.maps.fill(u64::MAX);
    }

    /// Lends the shadow's pages to the memory, as those of the VP at `at`.
    pub fn lend(&self, mem: &mut PhysMem, at: VpPlaces) {
        mem.lend(at.pool, Arc::new(Pool(Arc::clone(&self.pages))));
    }
}

/// The library's machine, lent by the VP, the processor and the partition.
pub fn machine<'m>(
    hw: &'m mut Hw,
    asids: &'m mut AsidPool,
    own: &'m OwnMaps,
    memory: &'m L1View,
    code: &'m Bytes,
) -> Machine<'m, Regs, L1View, Bytes> {
    Machine {
        vmcb01: &mut hw.vmcb01,
        vmcb02: &mut hw.vmcb02,
        gprs: &mut hw.regs,
        msrpm02: MergedMap { words: &mut hw.msrpm02, base: Hpa::new(hw.at.msrpm02) },
        iopm02: MergedMap { words: &mut hw.iopm02, base: Hpa::new(hw.at.iopm02) },
        msrpm01: &own.msr,
        iopm01: &own.io,
        asids,
        memory,
        code,
    }
}

impl<'a> Vp<'a> {
    /// The VP that `hw` is for, after reset.
    pub fn new(
        config: nsvm::caps::Config,
        at: VpPlaces,
        storage: &'a mut VpStorage,
        flush: LocalFlush<'a>,
        msrs: VpInterface,
    ) -> Self {
        let VpStorage { pages, records, hw, maps } = storage;
        hw.at = at;
        let mut msr = MergedMap { words: &mut hw.msrpm02, base: Hpa::new(at.msrpm02) };
        let mut io = MergedMap { words: &mut hw.iopm02, base: Hpa::new(at.iopm02) };
        let nested = NestedSvm::new(config, &mut msr, &mut io);
        let pages = &pages[..];
        let pool = PagePool::new(pages, records, |n| Hpa::new(at.pool + n as u64 * 4096)).expect("a pool");
        let mut vp = Self {
            hw,
            nested,
            shadow: NptShadow::new(pool, 4).expect("enough pages"),
            flush,
            msrs,
            shootdown: Shootdown::new(),
            scratch: Scratch::new(),
            walk: None,
            plan: None,
            on: None,
            op: Op::Nop,
            fell: None,
            maps,
        };
        vp.init();
        vp
    }

    /// L1's processor as its kernel starts: 64-bit, paging on.
    pub fn init(&mut self) {
        let v = &mut *self.hw.vmcb01;
        let at = &self.hw.at;
        v.control.intercepts = INTERCEPTS;
        (v.control.iopm_base, v.control.msrpm_base) = (at.iopm01, at.msrpm01);
        (v.control.np_control, v.control.n_cr3) = (1, at.npt01);
        v.control.tsc_offset = OWN_TSC_OFFSET;
        (v.control.int_ctl, v.control.int_state, v.control.event_inj) = (0, 0, 0);
        let segment = |attrib| nsvm::vmcb::Segment { selector: 8, attrib, limit: u32::MAX, base: 0 };
        v.save.cs = segment(0x29B);
        (v.save.ds, v.save.es, v.save.ss) = (segment(0xC93), segment(0xC93), segment(0xC93));
        v.save.cpl = 0;
        v.save.efer = efer::SVME | efer::LMA | 1 << 8 | 1 << 11;
        (v.save.cr0, v.save.cr3, v.save.cr4) = (0x8001_0011, layout::L1_TABLES, 0x20);
        (v.save.dr6, v.save.dr7, v.save.rflags) = (0xFFFF_0FF0, DR7_RESET, 2);
        (v.save.rip, v.save.rsp, v.save.g_pat) = (0x6_0000, layout::STACK, 0x0007_0406_0007_0406);
        self.hw.regs = Regs::default();
        self.walk = None;
    }

    /// Resets the VP, as a triple fault of its L1 does.
    pub fn reset(&mut self, why: &'static str) {
        self.init();
        self.nested.reset();
        self.flush.forget_context();
        self.fell = Some(why);
    }

    /// Pages of its shadow tables.
    pub fn pool_pages(&self) -> u64 {
        SHADOW_PAGES as u64
    }

    /// The VMCB of the level that runs.
    pub fn vmcb(&mut self) -> &mut Vmcb {
        match self.nested.level() {
            hvcore::addr::Level::L1 => &mut self.hw.vmcb01,
            hvcore::addr::Level::L2 => &mut self.hw.vmcb02,
        }
    }

    /// Puts what the processor reads in its memory; with `l2` all of it. False if a permission map of L2 lets through
    /// what `own` does not.
    pub fn store(&mut self, mem: &PhysMem, l2: bool, own: &OwnMaps) -> bool {
        put(mem, self.hw.at.vmcb01, &self.hw.vmcb01);
        if !l2 {
            return true;
        }
        put(mem, self.hw.at.vmcb02, &self.hw.vmcb02);
        let mut tight = true;
        let (msr, io) = self.maps.split_at_mut(1024);
        let maps = [
            (self.hw.at.msrpm02, &self.hw.msrpm02[..], &own.msr[..], msr),
            (self.hw.at.iopm02, &self.hw.iopm02[..], &own.io[..], io),
        ];
        for (at, words, own, known) in maps {
            // Most of it never changes: compared in blocks.
            let blocks = words.chunks(64).zip(own.chunks(64)).zip(known.chunks_mut(64));
            for (at, ((words, own), known)) in (at..).step_by(512).zip(blocks) {
                if words == &*known {
                    continue;
                }
                known.copy_from_slice(words);
                for ((at, word), own) in (at..).step_by(8).zip(words).zip(own) {
                    mem.write(at, 8, *word);
                    tight &= own & !word == 0;
                }
            }
        }
        tight
    }

    /// Takes the VMCBs back.
    pub fn load(&mut self, mem: &PhysMem, l2: bool) {
        get(mem, self.hw.at.vmcb01, &mut self.hw.vmcb01);
        if l2 {
            get(mem, self.hw.at.vmcb02, &mut self.hw.vmcb02);
        }
    }
}

/// The parts of a VMCB that the processor knows.
const PARTS: [std::ops::Range<usize>; 2] = [0..0xE0, 0x400..0x698];

fn put(mem: &PhysMem, at: u64, vmcb: &Vmcb) {
    for part in PARTS {
        mem.write_bytes(at + part.start as u64, &vmcb.as_bytes()[part]);
    }
}

fn get(mem: &PhysMem, at: u64, vmcb: &mut Vmcb) {
    for part in PARTS {
        mem.read_bytes(at + part.start as u64, &mut vmcb.as_mut_bytes()[part]);
    }
}
