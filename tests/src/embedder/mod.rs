//! A second embedder: several L1 partitions, with more VPs than processors, on the machine model.
//!
//! It differs from the bare-metal example in all that an embedder may choose: its VPs have no processor of their own
//! but are put on any of them after each exit; L1's memory moves, is paged out and is write-protected; several L1s with
//! the same VM_IDs live side by side. Processors forget nothing by themselves.
//!
//! | module | what it is |
//! |---|---|
//! | [`layout`] | addresses, of the host and of the guests |
//! | [`memory`] | L1's memory: `GuestMemory` and `L1Map` |
//! | [`hyperv`] | hypercalls, and flushes before an entry |
//! | [`vp`] | a VP's state, and its pages in the model's memory |
//! | [`run`] | entry, exit, kicks: the embedder proper |
//! | [`calls`] | hypercalls and direct flushes, with their kicks and waits |
//! | [`guests`] | what L1 and L2 do, and what they must see |
//! | [`hostile`] | hostile VMCBs, one world each |
//! | [`actions`] | sequences of everything from bytes, for the fuzzer |
//!
//! Rules that are checked at each entry and exit, whatever the guests do (the first broken one is in
//! [`World::broken`]):
//!
//! 1. VMCB02 has every intercept of VMCB01, and those of the instructions that name host memory;
//! 2. its permission maps let through nothing that the embedder's own do not;
//! 3. its second stage is a root of the VP's shadow, or the embedder's own table;
//! 4. no ASID is 0, and none is entered with translations that another context left under it;
//! 5. nothing that the library writes to L1's memory, and no register of L1, is a host address;
//! 6. what a guest whose tables are in order reads or writes is where its tables say, now;
//! 7. a flush ends: all its targets acknowledge.

use std::rc::Rc;
use std::sync::atomic::AtomicU16;

use hvcore::addr::Level;
use hvcore::flush::{AtomicU64, FlushDomain, TargetIndex, VpFlush};
use hvcore::partition::Interface;
use hvcore::vp_index::{VpIndexMap, VpSlot};
use nsvm::asid::AsidPool;
use nsvm::caps::{Config, Features, Host};
use nsvm::vmcb::bits::efer;

pub mod actions;
pub mod calls;
pub mod guests;
pub mod hostile;
pub mod hyperv;
pub mod layout;
pub mod memory;
pub mod run;
pub mod vp;

use crate::model::mem::PhysMem;
use crate::model::rng::Rng;
use crate::model::svm;
use crate::model::tlb::FxMap;
use guests::Tables;
use layout::VpPlaces;
use memory::L1View;
use vp::{OwnMaps, Vp, VpStorage};

/// First address of host memory: recognisable wherever it turns up, and not like any field of a VMCB (bits 31:24 are
/// neither those of an interrupt control nor of an event).
pub const HOST: u64 = 0xA5_A000_0000;
/// Memory of each L1.
pub const L1_BYTES: u64 = 0x10_0000;

/// True for what looks like a host address.
pub const fn is_host(value: u64) -> bool {
    value >> 24 & 0xFF_FFFF == HOST >> 24
}

/// A mistake for the embedder to make, to show that the checks find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// Targets of a flush are neither kicked nor waited for.
    NoKick,
    /// What [`hvcore::flush::LocalFlush::enter`] returns is not carried out.
    NoDrain,
    /// TLB_CONTROL is never set.
    NoTlbControl,
    /// All VPs of all partitions share ASID 1.
    OneAsid,
    /// A change of L1's memory is not posted.
    NoPost,
    /// The shadow's stale tag is not retired.
    NoRetire,
    /// An entry repeats the last one, flush or not, although another flush is due.
    NoPrepare,
    /// VMCB02 lacks an intercept.
    NoIntercept,
    /// VMCB02's MSR permission map lets through what the embedder's own does not.
    NoMap,
    /// L2 runs on L1's nested table itself.
    NoShadow,
    /// L1 sees the root of the shadow in its VMCB.
    LeakMemory,
    /// L1 sees it in a register.
    LeakRegister,
}

/// Which machine to build.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// L1 partitions.
    pub partitions: usize,
    /// VPs of each.
    pub vps: usize,
    /// Physical processors.
    pub cpus: usize,
    /// Their features.
    pub features: svm::Features,
    /// For all chance.
    pub seed: u64,
    /// What the embedder does wrong.
    pub mistake: Option<Mistake>,
}

/// What partitions share with their VPs' owners, and the memory. Serves one world after the other; a later one starts
/// from what the first one laid out.
pub struct Storage {
    partitions: Vec<PartitionStorage>,
    mem: Rc<PhysMem>,
    own: OwnMaps,
    /// What the memory says to begin with, once it has been laid out.
    tables: Vec<Tables>,
}

struct PartitionStorage {
    flush: Vec<VpFlush>,
    buckets: Vec<AtomicU64>,
    groups: Vec<AtomicU64>,
    map: Vec<AtomicU16>,
    known: Vec<AtomicU64>,
    vps: Vec<VpStorage>,
}

impl Storage {
    /// For machines of `partitions` partitions with `vps` VPs each.
    pub fn new(partitions: usize, vps: usize) -> Self {
        let words = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        let partition = |_| PartitionStorage {
            flush: (0..vps).map(|_| VpFlush::new()).collect(),
            buckets: words(16),
            groups: words(9 * TargetIndex::group_words(vps)),
            map: (0..vps).map(|_| AtomicU16::new(0)).collect(),
            known: words(1),
            vps: (0..vps).map(|_| VpStorage::default()).collect(),
        };
        Self {
            partitions: (0..partitions).map(partition).collect(),
            mem: Rc::new(PhysMem::starting_at(HOST, layout::PARTITION_BYTES * partitions as u64)),
            own: OwnMaps::default(),
            tables: Vec::new(),
        }
    }

    /// Everything as it was at first.
    fn reset(&mut self) {
        let mem = Rc::get_mut(&mut self.mem).expect("the world before is gone");
        if self.tables.is_empty() {
            let vps = self.partitions.iter().map(|p| p.vps.len());
            self.tables = vps.enumerate().map(|(p, vps)| lay_out(mem, p, vps, &self.own)).collect();
            mem.keep();
            for (p, partition) in self.partitions.iter().enumerate() {
                partition.vps.iter().enumerate().for_each(|(v, vp)| vp.lend(mem, VpPlaces::of(p, v)));
            }
        } else {
            mem.rewind();
        }
        for p in &mut self.partitions {
            p.flush.fill_with(VpFlush::new);
            for words in [&mut p.buckets, &mut p.groups, &mut p.known] {
                words.fill_with(|| AtomicU64::new(0));
            }
            p.map.fill_with(|| AtomicU16::new(0));
            p.vps.iter_mut().for_each(VpStorage::reset);
        }
    }
}

/// Fills the memory of partition `p`; what its guests' tables say.
fn lay_out(mem: &PhysMem, p: usize, vps: usize, own: &OwnMaps) -> Tables {
    let tables = guests::lay_out(mem, p, vps);
    let at = VpPlaces::of(p, 0);
    for (n, word) in (0..).zip(own.msr.iter()) {
        mem.write(at.msrpm01 + n * 8, 8, *word);
    }
    for (n, word) in (0..).zip(own.io.iter()).filter(|(_, word)| **word != 0) {
        mem.write(at.iopm01 + n * 8, 8, *word);
    }
    for at in (0..vps).map(|v| VpPlaces::of(p, v)) {
        // Both merged maps begin as all ones.
        mem.write_bytes(at.msrpm02, &[0xFF; 0x2000]);
        mem.write_bytes(at.iopm02, &[0xFF; 0x3000]);
    }
    tables
}

/// What was counted in a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries that carried a flush out.
    pub flushed: u64,
    /// Entries by the plan of the last one.
    pub repeated: u64,
    /// Kicks that flushes sent.
    pub kicked: u64,
    /// Direct flushes done.
    pub direct: u64,
    /// VMRUNs of L1 that entered L2.
    pub entered: u64,
    /// VMRUNs that were refused.
    pub refused: u64,
    /// Accesses compared with the guests' tables.
    pub checked: u64,
    /// Pages brought back.
    pub paged_in: u64,
    /// First writes to protected pages.
    pub dirtied: u64,
    /// Resets of VPs.
    pub resets: u64,
}

/// An L1 and its VPs.
pub struct Partition<'a> {
    /// The Hyper-V interface.
    pub interface: Interface,
    /// VP indexes.
    pub map: VpIndexMap<'a>,
    /// Who may hold which translations.
    pub domain: FlushDomain<'a>,
    /// Its memory.
    pub memory: L1View,
    /// The VPs.
    pub vps: Vec<Vp<'a>>,
    /// What its page tables say.
    pub tables: Tables,
    /// Counters.
    pub counts: Counts,
}

/// A physical processor.
pub struct Pcpu {
    /// The model's.
    pub hw: svm::Cpu,
    /// Its ASIDs.
    pub asids: AsidPool,
    /// The VP whose guest it runs: partition and VP.
    pub running: Option<(usize, usize)>,
    /// Which context left translations under an ASID.
    owners: FxMap<u32, Owner>,
}

/// What an ASID may stand for: VP, level, nested context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    vp: (usize, usize),
    level: Level,
    context: nsvm::Context,
}

/// The whole machine.
pub struct World<'a> {
    /// Physical memory.
    pub mem: Rc<PhysMem>,
    /// Processors.
    pub cpus: Vec<Pcpu>,
    /// Partitions.
    pub partitions: Vec<Partition<'a>>,
    /// Chance.
    pub rng: Rng,
    /// The first rule that was broken.
    pub broken: Option<String>,
    /// What the embedder does wrong.
    pub mistake: Option<Mistake>,
    /// The slot of the last action by chance.
    pub hot: usize,
    own: &'a OwnMaps,
}

fn features(f: &svm::Features) -> Features {
    let bits = [
        (f.nested_paging, Features::NP),
        (f.lbr_virt, Features::LBR),
        (f.nrip_save, Features::NRIPS),
        (f.clean_bits, Features::VMCB_CLEAN),
        (f.flush_by_asid, Features::FLUSH_BY_ASID),
        (f.decode_assists, Features::DECODE_ASSISTS),
        (f.pause_filter, Features::PAUSE_FILTER),
        (f.tsc_ratio, Features::TSC_RATE),
        (f.virtual_vmload, Features::V_VMSAVE_VMLOAD),
        (f.vgif, Features::VGIF),
        (f.vnmi, Features::VNMI),
    ];
    bits.iter().filter(|(on, _)| *on).fold(Features::default(), |all, (_, bit)| all.union(*bit))
}

fn config(f: &svm::Features) -> Config {
    let host = Host {
        features: features(f),
        phys_bits: f.maxphyaddr,
        cr4_valid: f.cr4,
        efer_valid: efer::SVME | 0xD01 | 1 << 14,
        intercepts: Host::intercepts_of(true, true, true, false, true),
    };
    let all = Config::all(host, 16, true).expect("a possible offer").features();
    let offered = all.union(host.features.intersection(Features::TSC_RATE));
    Config::new(host, offered, 16, true).expect("a possible offer")
}

impl<'a> World<'a> {
    /// A machine of `shape`, with every L1 booted.
    pub fn new(shape: &Shape, storage: &'a mut Storage) -> Self {
        storage.reset();
        let Storage { partitions, mem, own, tables } = storage;
        let (mem, own) = (Rc::clone(mem), &*own);
        let config = config(&shape.features);
        let cpu = |n: usize| {
            let mut hw = svm::Cpu::new(shape.features, shape.seed.wrapping_add((n as u64) << 32));
            hw.gif = false;
            let asids = AsidPool::new(n as u32, shape.features.asids, shape.features.flush_by_asid).expect("ASIDs");
            Pcpu { hw, asids, running: None, owners: FxMap::default() }
        };
        let partitions = partitions.iter_mut().zip(tables).enumerate();
        let partitions = partitions.map(|(p, (s, tables))| partition(p, s, tables.clone(), &mem, config));
        let mut world = Self {
            partitions: partitions.collect(),
            cpus: (0..shape.cpus).map(cpu).collect(),
            mem,
            rng: Rng::new(shape.seed),
            broken: None,
            mistake: shape.mistake,
            hot: 0,
            own,
        };
        for p in 0..shape.partitions {
            for v in 0..shape.vps {
                world.boot(p, v);
            }
        }
        world
    }

    /// Notes a broken rule; the first counts.
    pub fn violated(&mut self, why: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(why());
        }
    }

    /// `Err` once a rule was broken.
    pub fn verdict(&self) -> Result<(), String> {
        let leaks: u64 = self.partitions.iter().map(|p| p.memory.leaks()).sum();
        match &self.broken {
            Some(why) => Err(why.clone()),
            None if leaks > 0 => Err("a host address in L1's memory".into()),
            None if self.mem.strays() > 0 => Err("an access outside all memory".into()),
            None => Ok(()),
        }
    }
}

fn partition<'a>(
    p: usize,
    storage: &'a mut PartitionStorage,
    tables: Tables,
    mem: &Rc<PhysMem>,
    config: Config,
) -> Partition<'a> {
    let PartitionStorage { flush, buckets, groups, map, known, vps } = storage;
    let interface = hyperv::interface(vps.len() as u32);
    let map = VpIndexMap::new(map, known).expect("a map");
    let index = TargetIndex::new(vps.len(), buckets, groups).expect("an index");
    let domain = FlushDomain::new(&flush[..], index);
    let memory = L1View::new(mem.clone(), layout::base(p));
    let vps = vps.iter_mut().enumerate().map(|(v, storage)| {
        let slot = VpSlot::new(v as u32).expect("a slot");
        map.assign(v as u32, slot).expect("free");
        let (local, msrs) = (domain.local(v as u16).expect("a slot"), interface.vp(v as u32).expect("a VP"));
        Vp::new(config, VpPlaces::of(p, v), storage, local, msrs)
    });
    let vps = vps.collect();
    Partition { interface, map, domain, memory, vps, tables, counts: Counts::default() }
}
