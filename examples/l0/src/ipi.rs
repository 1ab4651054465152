//! The inter-processor interrupts that L0 must carry out itself: INIT, SIPI and NMI, in every destination mode and
//! shorthand, and L0's own kicks.
//!
//! [`Ipis`] is shared by all processors. A VP's exit handler hands it what L1 wrote to ICR; it says whether the command
//! may go to the real APIC or was carried out here. A kick is an NMI on the wire: the receiving processor's NMI handler
//! calls [`Ipis::nmi_arrived`], which tells L0's from L1's.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Most processors that L0 runs on.
pub const MAX_CPUS: usize = 16;

/// Pending: an INIT.
const PENDING_INIT: u32 = 1;
/// Pending: an NMI for L1.
const PENDING_NMI: u32 = 2;
/// Pending: a SIPI, its vector in bits 15:8.
const PENDING_SIPI: u32 = 4;

/// ICR delivery modes, bits 10:8.
mod delivery {
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 5;
    pub const SIPI: u32 = 6;
}

/// What a processor's APIC answers to, as L1 programmed it, and what waits for its VP.
#[derive(Debug)]
struct Slot {
    apic_id: AtomicU32,
    /// Logical destination register, all 32 bits.
    ldr: AtomicU32,
    /// Destination format register.
    dfr: AtomicU32,
    x2apic: AtomicBool,
    present: AtomicBool,
    pending: AtomicU32,
    kicked: AtomicBool,
}

/// Events taken from a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// An INIT arrived.
    pub init: bool,
    /// An NMI for L1 arrived.
    pub nmi: bool,
    /// A SIPI arrived after the INIT, if there was one: its vector.
    pub sipi: Option<u8>,
}

/// What to do with an ICR write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Icr {
    /// Write it to the real APIC.
    PassThrough,
    /// Carried out; the real ICR is not written. Bit n: processor n must be kicked.
    Kick(u32),
}

/// The table of all processors.
#[derive(Debug)]
pub struct Ipis {
    slots: [Slot; MAX_CPUS],
}

impl Default for Ipis {
    fn default() -> Self {
        Self::new()
    }
}

impl Ipis {
    /// No processor is present yet.
    pub const fn new() -> Self {
        Self {
            slots: [const {
                Slot {
                    apic_id: AtomicU32::new(0),
                    ldr: AtomicU32::new(0),
                    dfr: AtomicU32::new(u32::MAX),
                    x2apic: AtomicBool::new(false),
                    present: AtomicBool::new(false),
                    pending: AtomicU32::new(0),
                    kicked: AtomicBool::new(false),
                }
            }; MAX_CPUS],
        }
    }

    /// Processor `cpu` runs, with APIC id `apic_id`.
    pub fn add(&self, cpu: usize, apic_id: u32) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.apic_id.store(apic_id, Ordering::Relaxed);
            // Release: whoever sees the processor present sees its id.
            slot.present.store(true, Ordering::Release);
        }
    }

    /// Number of processors present.
    pub fn count(&self) -> usize {
        self.slots.iter().filter(|s| s.present.load(Ordering::Acquire)).count()
    }

    /// APIC id of processor `cpu`, to send it a kick.
    pub fn apic_id(&self, cpu: usize) -> Option<u32> {
        let slot = self.slots.get(cpu)?;
        slot.present.load(Ordering::Acquire).then(|| slot.apic_id.load(Ordering::Relaxed))
    }

    /// L1 wrote processor `cpu`'s logical destination register.
    pub fn set_ldr(&self, cpu: usize, value: u32) {
        // Relaxed (all three): an IPI that races with its target's reprogramming may use either value, as on hardware.
        if let Some(slot) = self.slots.get(cpu) {
            slot.ldr.store(value, Ordering::Relaxed);
        }
    }

    /// L1 wrote processor `cpu`'s destination format register.
    pub fn set_dfr(&self, cpu: usize, value: u32) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.dfr.store(value, Ordering::Relaxed);
        }
    }

    /// L1 switched processor `cpu` into or out of x2APIC mode.
    pub fn set_x2apic(&self, cpu: usize, on: bool) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.x2apic.store(on, Ordering::Relaxed);
        }
    }

    /// VP `source` writes ICR: destination field `destination` (8 bits in xAPIC mode, 32 in x2APIC mode), low word `low`.
    pub fn icr(&self, source: usize, destination: u32, low: u32) -> Icr {
        let mode = low >> 8 & 7;
        if !matches!(mode, delivery::NMI | delivery::INIT | delivery::SIPI) {
            return Icr::PassThrough;
        }
        // INIT level de-assert (level-triggered, level 0) synchronises arbitration ids on old parts: nothing to do.
        if mode == delivery::INIT && low & (1 << 15) != 0 && low & (1 << 14) == 0 {
            return Icr::Kick(0);
        }
        let mut kicks = 0;
        for (cpu, slot) in self.slots.iter().enumerate() {
            if !slot.present.load(Ordering::Acquire) || !self.matches(source, cpu, slot, destination, low) {
                continue;
            }
            slot.post(mode, low as u8);
            if cpu != source {
                kicks |= 1 << cpu;
            }
        }
        Icr::Kick(kicks)
    }

    fn matches(&self, source: usize, cpu: usize, slot: &Slot, destination: u32, low: u32) -> bool {
        let x2apic = slot.x2apic.load(Ordering::Relaxed);
        match low >> 18 & 3 {
            1 => return cpu == source,
            2 => return true,
            3 => return cpu != source,
            _ => {}
        }
        let id = slot.apic_id.load(Ordering::Relaxed);
        if low & (1 << 11) == 0 {
            let broadcast = if x2apic { u32::MAX } else { 0xff };
            return destination == broadcast || destination == id;
        }
        if x2apic {
            // Logical x2APIC id: cluster = id[19:4] in bits 31:16, one bit of 16 for id[3:0].
            return destination == u32::MAX || (destination >> 16 == id >> 4 && destination & 1 << (id & 15) != 0);
        }
        let (ldr, mda) = (slot.ldr.load(Ordering::Relaxed) >> 24, destination & 0xff);
        if mda == 0xff {
            return true;
        }
        if slot.dfr.load(Ordering::Relaxed) >> 28 == 0xf {
            return ldr & mda != 0;
        }
        ldr >> 4 == mda >> 4 && ldr & mda & 0xf != 0
    }

    /// True when `cpu` has anything pending.
    #[inline]
    pub fn has_events(&self, cpu: usize) -> bool {
        self.inbox(cpu).is_some_and(|inbox| inbox.has_events())
    }

    /// Where what is pending for `cpu` is seen.
    pub fn inbox(&self, cpu: usize) -> Option<Inbox<'_>> {
        self.slots.get(cpu).map(|slot| Inbox(&slot.pending))
    }

    /// Takes what is pending for `cpu`.
    pub fn take(&self, cpu: usize) -> Events {
        let Some(slot) = self.slots.get(cpu) else { return Events::default() };
        // Acquire pairs with the Release of `post`: what the sender wrote before its ICR write is seen after this.
        let p = slot.pending.swap(0, Ordering::Acquire);
        Events {
            init: p & PENDING_INIT != 0,
            nmi: p & PENDING_NMI != 0,
            sipi: (p & PENDING_SIPI != 0).then_some((p >> 8) as u8),
        }
    }

    /// An NMI for L1 itself (from a device or LINT) is pending for `cpu`.
    pub fn post_nmi(&self, cpu: usize) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.pending.fetch_or(PENDING_NMI, Ordering::Release);
        }
    }

    /// About to kick `cpu`: true when an NMI must be sent, false when one is on its way already.
    pub fn start_kick(&self, cpu: usize) -> bool {
        // AcqRel: orders what the kicker published before the flag; the receiver clears the flag (AcqRel) before it
        // looks, so a kicker that found the flag set is covered by that later look.
        self.slots.get(cpu).is_some_and(|s| !s.kicked.swap(true, Ordering::AcqRel))
    }

    /// An NMI arrived on `cpu`: true when it was a kick of L0.
    pub fn nmi_arrived(&self, cpu: usize) -> bool {
        self.slots.get(cpu).is_some_and(|s| s.kicked.swap(false, Ordering::AcqRel))
    }
}

/// What is pending for one processor.
#[derive(Clone, Copy, Debug)]
pub struct Inbox<'a>(&'a AtomicU32);

impl Inbox<'_> {
    /// True when anything is. Cheap: one load.
    #[inline]
    pub fn has_events(&self) -> bool {
        // Relaxed: only a hint whether to call `take`, whose exchange acquires. An event posted after this load comes
        // with a kick, and the kick exits the guest.
        self.0.load(Ordering::Relaxed) != 0
    }
}

impl Slot {
    fn post(&self, mode: u32, vector: u8) {
        // Release pairs with the Acquire of `take`.
        match mode {
            delivery::NMI => {
                self.pending.fetch_or(PENDING_NMI, Ordering::Release);
            }
            delivery::INIT => {
                // An INIT voids a SIPI that came before it and was not yet taken.
                self.pending.store(PENDING_INIT, Ordering::Release);
            }
            _ => {
                // The first SIPI counts: the second of the customary two finds the processor running.
                let new = PENDING_SIPI | u32::from(vector) << 8;
                let _ = self
                    .pending
                    .fetch_update(Ordering::Release, Ordering::Relaxed, |p| (p & PENDING_SIPI == 0).then_some(p | new));
            }
        }
    }
}
