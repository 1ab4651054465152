//! An embedder of `nvmx` on the machine model: VPs of hostile L1s that take turns on one processor.
//!
//! Every VP is an L1 of its own, with its own memory; they share the processor and its VPIDs. The processor forgets
//! nothing by itself.
//!
//! | module | what it is |
//! |---|---|
//! | [`layout`] | addresses, and the memory at first |
//! | [`vp`] | a VP's state, its two VMCSs in the model, and its pages |
//! | [`run`] | entry, exit, what L0 does itself: the embedder proper |
//! | [`actions`] | sequences of everything from bytes, for the fuzzer |
//!
//! Rules that are checked at each entry and exit, whatever the guests do (the first broken one is in
//! [`World::broken`]):
//!
//! 1. VMCS02 has every control of VMCS01 that L0 needs;
//! 2. its bitmaps let through nothing that the embedder's own do not;
//! 3. its second stage is a root of the VP's shadow, or the embedder's own table;
//! 4. no VPID is 0, and none is entered with translations that another context left under it;
//! 5. nothing that the library writes to L1's memory, and no register of L1, is a host address;
//! 6. the processor accepts every VMCS that it is entered with, or L1 is told that its own is bad;
//! 7. a state that was saved can be restored.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use hvcore::addr::Level;
use hvcore::shadow::{PageRecord, ShadowPage};
use nvmx::caps::{Config, Host};
use nvmx::vpid::{Support, VpidPool};

pub mod actions;
pub mod layout;
pub mod run;
pub mod vp;

pub use crate::embedder::{HOST, L1_BYTES, is_host};
use crate::model::mem::PhysMem;
use crate::model::vmx::{self, Caps};
use layout::Places;
use vp::{Hardware, OwnMaps, Vp};

/// Pages of shadow tables per VP.
pub const SHADOW_PAGES: usize = 8;

/// A mistake for the embedder to make, to show that the checks find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// INVVPID is never executed.
    NoInvvpid,
    /// All VPs share VPID 1.
    OneVpid,
    /// VMCS02 lacks NMI exiting.
    NoControl,
    /// VMCS02 uses the embedder's second stage under L1's EPT.
    WrongRoot,
    /// VMCS02 has a control field that the processor refuses.
    BadField,
    /// A host address in L1's memory.
    Leak,
}

/// Storage of a machine.
pub struct Storage {
    mem: Rc<PhysMem>,
    own: OwnMaps,
    vps: Vec<(Arc<[ShadowPage]>, Vec<PageRecord>)>,
    laid_out: bool,
}

impl Storage {
    /// For `vps` VPs.
    pub fn new(vps: usize) -> Self {
        let pages = |_| {
            let pages: Arc<[ShadowPage]> = (0..SHADOW_PAGES).map(|_| ShadowPage::new()).collect();
            (pages, (0..SHADOW_PAGES).map(|_| PageRecord::new()).collect())
        };
        Self {
            mem: Rc::new(PhysMem::starting_at(HOST, Places::BYTES * (vps as u64 + 1))),
            own: OwnMaps::default(),
            vps: (0..vps).map(pages).collect(),
            laid_out: false,
        }
    }

    fn reset(&mut self) {
        let mem = Rc::get_mut(&mut self.mem).expect("the world before is gone");
        if self.laid_out {
            mem.rewind();
            return;
        }
        self.laid_out = true;
        for (n, (pages, _)) in self.vps.iter().enumerate() {
            layout::lay_out(mem, Places::of(n), &self.own);
            mem.lend(Places::of(n).pool, Arc::new(vp::Pool(Arc::clone(pages))));
        }
        mem.keep();
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries of L1.
    pub l1: u64,
    /// Entries of L2.
    pub l2: u64,
    /// VM entries of L1 that entered L2.
    pub entered: u64,
    /// Exits that L1 was told of.
    pub reflected: u64,
    /// Entries that only the processor refused.
    pub late: u64,
    /// Saves and restores.
    pub churned: u64,
    /// Resets of VPs.
    pub resets: u64,
}

/// What a VPID may stand for: VP, level, nested context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    vp: usize,
    level: Level,
    context: nvmx::Context,
}

/// The whole machine.
pub struct World<'a> {
    /// Physical memory.
    pub mem: Rc<PhysMem>,
    /// The processor.
    pub hw: Rc<Hardware>,
    /// Its VPIDs.
    pub vpids: VpidPool,
    /// The VPs.
    pub vps: Vec<Vp<'a>>,
    /// The one whose guest runs.
    pub running: Option<usize>,
    /// The first rule that was broken.
    pub broken: Option<String>,
    /// What the embedder does wrong.
    pub mistake: Option<Mistake>,
    /// Counters.
    pub counts: Counts,
    owners: HashMap<u16, Owner>,
    own: &'a OwnMaps,
}

/// The processor: everything that the model has, accessed and dirty flags for EPT aside (the shadow's pages are lent); its
/// physical addresses are as wide as L1 is shown.
pub const CAPS: Caps = Caps { ept_ad: false, maxphyaddr: 40, ..Caps::FULL };

/// Its capability MSRs.
pub fn capability(msr: u32) -> u64 {
    let pair = |(required, allowed): (u32, u32)| u64::from(required) | u64::from(allowed) << 32;
    match msr {
        0x480 => u64::from(vmx::fields::REVISION) | 4096 << 32 | 6 << 50 | 1 << 55,
        0x481 | 0x48D => pair(CAPS.pin),
        0x482 | 0x48E => pair(CAPS.proc),
        0x483 | 0x48F => pair(CAPS.exit),
        0x484 | 0x490 => pair(CAPS.entry),
        0x485 => u64::from(CAPS.timer_shift) | 1 << 5 | 7 << 6 | 4 << 16,
        0x486 => CAPS.cr0_fixed0,
        0x487 => 0xFFFF_FFFF,
        0x488 => 0x2000,
        0x489 => CAPS.cr4,
        0x48B => pair(CAPS.proc2),
        0x48C => 1 | 1 << 6 | 1 << 14 | 3 << 16 | 1 << 20 | 3 << 25 | 1 << 32 | 0xF << 40,
        _ => 0,
    }
}

/// What L1s are offered.
pub fn config(enlightened: bool) -> Config {
    Config::all(Host::from_msrs(40, 48, capability), enlightened, false).expect("a possible offer")
}

impl<'a> World<'a> {
    /// A machine whose L1s have just started.
    pub fn new(storage: &'a mut Storage, enlightened: bool, seed: u64, mistake: Option<Mistake>) -> Self {
        storage.reset();
        let Storage { mem, own, vps, .. } = storage;
        let (mem, own) = (Rc::clone(mem), &*own);
        let hw = Rc::new(Hardware::new(Rc::clone(&mem), Places::of(vps.len()).vmxon, seed));
        let config = config(enlightened);
        let vps = vps.iter_mut().enumerate();
        let vps = vps.map(|(n, (pages, records))| Vp::new(config, Places::of(n), pages, records, &hw, &mem));
        Self {
            vps: vps.collect(),
            vpids: VpidPool::new(0, 5, Support::SingleContext),
            mem,
            hw,
            running: None,
            broken: None,
            mistake,
            counts: Counts::default(),
            owners: HashMap::new(),
            own,
        }
    }

    /// Notes a broken rule; the first counts.
    pub fn violated(&mut self, why: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(why());
        }
    }

    /// `Err` once a rule was broken.
    pub fn verdict(&self) -> Result<(), String> {
        match &self.broken {
            Some(why) => Err(why.clone()),
            None if self.vps.iter().any(|vp| vp.memory.leaks() > 0) => Err("a host address in L1's memory".into()),
            None if self.mem.strays() > 0 => Err("an access outside all memory".into()),
            None => Ok(()),
        }
    }
}
