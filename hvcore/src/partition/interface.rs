//! The state of a partition's interface and of each VP's part of it.
//!
//! Used by the embedder, the direct flush and the engines; the MSR rules are in `msr`, the overlays in `overlay`.

use super::config::{ConfigError, PartitionConfig, ReferenceTsc, Vendor};
use super::leaves::{LEAVES, leaves};
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::addr::{L1Gpa, Level};
use crate::hypercall::{Caller, CallerMode, PrivilegeLeaves, Privileges};
use tlfs_abi::cpuid::{CpuidLeaf, LEAF_RANGE};
use tlfs_abi::msr::{PageMsr, ReenlightenmentControl, TSC_EMULATION_BIT};

/// The Hyper-V interface of one partition, shared by its VPs.
///
/// # Orderings
///
/// Each MSR is one atomic, and what a guest reads or writes is that one value. The VPs of a guest order their MSR
/// accesses among themselves by means of guest memory, which the embedder's exits and entries keep in order, so relaxed
/// accesses suffice, with two exceptions. GUEST_OS_ID and HYPERCALL bear on each other: HYPERCALL is changed by
/// read-modify-writes that release and acquire. The sequence of the reference TSC page is stored with release after its
/// parameters and loaded with acquire before them.
#[derive(Debug)]
pub struct Interface {
    pub(super) config: PartitionConfig,
    leaves: [CpuidLeaf; LEAVES],
    privileges: Privileges,
    pub(super) guest_os_id: AtomicU64,
    pub(super) hypercall: AtomicU64,
    pub(super) reference_tsc: AtomicU64,
    pub(super) crash: [AtomicU64; 5],
    pub(super) reenlightenment: AtomicU64,
    pub(super) tsc_emulation_control: AtomicU64,
    pub(super) tsc_emulation_status: AtomicU64,
    /// The latest reference time that a VP has seen, in 100 ns.
    pub(super) last_time: AtomicU64,
    /// TscSequence; 0 is "invalid" and skipped.
    pub(super) tsc_sequence: AtomicU32,
    pub(super) tsc_scale: AtomicU64,
    pub(super) tsc_offset: AtomicU64,
}

/// A VP's part of the interface.
///
/// Its MSR is written by exits of the VP itself and read on the same path: relaxed accesses suffice.
#[derive(Debug)]
pub struct VpInterface {
    vp_index: u32,
    pub(super) assist: AtomicU64,
}

/// The interrupt that tells a guest of its migration: a fixed interrupt for the embedder to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReenlightenmentInterrupt {
    /// Vector, 16 to 255.
    pub vector: u8,
    /// Index of the target VP.
    pub vp_index: u32,
}

impl PartitionConfig {
    /// Checks the set and derives the interface.
    pub fn build(self) -> Result<Interface, ConfigError> {
        self.check()?;
        Ok(Interface::new(self))
    }
}

impl Interface {
    pub(super) fn new(config: PartitionConfig) -> Self {
        let leaves = leaves(&config);
        let [_, _, _, features, recommendations, _, _, _, _, nested_features, nested_optimizations] = leaves;
        let privileges = Privileges::from_leaves(&PrivilegeLeaves {
            features_ebx: features.ebx,
            features_edx: features.edx,
            recommendations_eax: recommendations.eax,
            recommendations_ebx: recommendations.ebx,
            nested_features_eax: nested_features.eax,
            nested_optimizations_eax: nested_optimizations.eax,
        });
        let tsc = config.reference_tsc.unwrap_or(ReferenceTsc { scale: 0, offset: 0 });
        Self {
            config,
            leaves,
            privileges,
            guest_os_id: AtomicU64::new(0),
            hypercall: AtomicU64::new(0),
            reference_tsc: AtomicU64::new(0),
            crash: [const { 0 }; 5].map(AtomicU64::new),
            reenlightenment: AtomicU64::new(0),
            tsc_emulation_control: AtomicU64::new(0),
            tsc_emulation_status: AtomicU64::new(0),
            last_time: AtomicU64::new(0),
            tsc_sequence: AtomicU32::new(1),
            tsc_scale: AtomicU64::new(tsc.scale),
            tsc_offset: AtomicU64::new(tsc.offset as u64),
        }
    }

    /// The state of the VP with this index; `None` when the partition can have no such VP.
    pub fn vp(&self, vp_index: u32) -> Option<VpInterface> {
        if vp_index < self.config.max_vps { Some(VpInterface { vp_index, assist: AtomicU64::new(0) }) } else { None }
    }

    /// The leaf's registers; `None` when it is not one of the interface's.
    #[inline]
    pub fn cpuid(&self, leaf: u32) -> Option<CpuidLeaf> {
        self.leaves.get(leaf.wrapping_sub(LEAF_RANGE) as usize).copied()
    }

    /// Whose virtualization extensions the partition sees.
    #[inline]
    pub const fn vendor(&self) -> Vendor {
        self.config.vendor
    }

    /// What the partition may call.
    #[inline]
    pub const fn privileges(&self) -> Privileges {
        self.privileges
    }

    /// True when the guest has told its identity, so that VMCALL and VMMCALL are Hyper-V hypercalls.
    #[inline]
    pub fn hypercalls_enabled(&self) -> bool {
        self.guest_os_id.load(Ordering::Relaxed) != 0
    }

    /// The caller of a hypercall, as the intake takes it.
    #[inline]
    pub fn caller(&self, mode: CallerMode, level: Level) -> Caller {
        Caller { mode, level, enabled: self.hypercalls_enabled(), privileges: self.privileges }
    }

    /// True when the partition is offered direct flush.
    #[inline]
    pub const fn offers_direct_flush(&self) -> bool {
        self.config.nested.direct_flush
    }

    /// True when the partition is offered the enlightened VMCS.
    #[inline]
    pub const fn offers_enlightened_vmcs(&self) -> bool {
        self.config.nested.evmcs.is_some()
    }

    /// True when the partition is offered the enlightened MSR bitmap.
    #[inline]
    pub const fn offers_enlightened_msr_bitmap(&self) -> bool {
        self.config.nested.msr_bitmap
    }

    /// True when the partition is offered the enlightened NPT TLB.
    #[inline]
    pub const fn offers_enlightened_npt_tlb(&self) -> bool {
        self.config.nested.npt_tlb
    }

    /// True when `gpa` is below the end of the guest physical address space.
    #[inline]
    pub(super) const fn in_gpa_space(&self, gpa: u64) -> bool {
        gpa.wrapping_shr(self.config.gpa_bits as u32) == 0
    }

    /// The reference time for a reader at `now` (100 ns): never the same twice, never smaller than one read before.
    ///
    /// All operations are on one atomic, whose modification order is the order of the answers: relaxed suffices.
    pub(super) fn strictly_later(&self, now: u64) -> u64 {
        let last = self.last_time.fetch_max(now, Ordering::Relaxed);
        if last < now { now } else { self.last_time.fetch_add(1, Ordering::Relaxed).wrapping_add(1) }
    }

    /// The five crash parameters that the guest wrote.
    pub fn crash_parameters(&self) -> [u64; 5] {
        self.crash.each_ref().map(|parameter| parameter.load(Ordering::Relaxed))
    }

    /// Tells the interface that the partition now runs on another host, or with another TSC: `tsc` are the parameters
    /// of the reference TSC page there. Called while no VP runs.
    ///
    /// Returns the interrupt that the guest asked for. When the guest opted in, its TSC accesses are emulated until it
    /// says otherwise: [`tsc_emulation`](Self::tsc_emulation).
    pub fn migrated(&self, tsc: ReferenceTsc) -> Option<ReenlightenmentInterrupt> {
        self.tsc_scale.store(tsc.scale, Ordering::Relaxed);
        self.tsc_offset.store(tsc.offset as u64, Ordering::Relaxed);
        self.advance_tsc_sequence();
        if !self.config.reenlightenment {
            return None;
        }
        let opted_in = self.tsc_emulation_control.load(Ordering::Relaxed) & TSC_EMULATION_BIT;
        self.tsc_emulation_status.store(opted_in, Ordering::Relaxed);
        let control = ReenlightenmentControl::new(self.reenlightenment.load(Ordering::Relaxed));
        if !control.enabled() {
            return None;
        }
        Some(ReenlightenmentInterrupt { vector: control.vector(), vp_index: control.target_vp() })
    }

    /// True while the embedder emulates the guest's TSC accesses at the old frequency.
    pub fn tsc_emulation(&self) -> bool {
        self.tsc_emulation_status.load(Ordering::Relaxed) != 0
    }

    pub(super) fn advance_tsc_sequence(&self) {
        let next = self.tsc_sequence.load(Ordering::Relaxed).wrapping_add(1).max(1);
        // Release: who sees the sequence sees the parameters stored before.
        self.tsc_sequence.store(next, Ordering::Release);
    }

    /// Returns every MSR of the partition to its state after creation, the lock of HYPERCALL included; the reference
    /// time goes on. Called on a reset of the partition, while no VP runs; the embedder unmaps the overlays.
    pub fn reset(&self) {
        self.guest_os_id.store(0, Ordering::Relaxed);
        self.hypercall.store(0, Ordering::Relaxed);
        let rest =
            [&self.reference_tsc, &self.reenlightenment, &self.tsc_emulation_control, &self.tsc_emulation_status];
        for msr in rest.into_iter().chain(&self.crash) {
            msr.store(0, Ordering::Relaxed);
        }
    }
}

impl VpInterface {
    /// The VP's index.
    #[inline]
    pub const fn vp_index(&self) -> u32 {
        self.vp_index
    }

    /// L1 GPA of the VP assist page, while it is enabled.
    ///
    /// The page is RAM of the partition at that address: an overlay whose contents are those of the RAM beneath is a
    /// legal one, and nothing needs to be mapped. Read it live at each use, and never keep what it said: disabling the
    /// page withdraws at once what hangs on it.
    #[inline]
    pub fn vp_assist_gpa(&self) -> Option<L1Gpa> {
        let msr = PageMsr::new(self.assist.load(Ordering::Relaxed));
        if msr.enable() { Some(L1Gpa::new(msr.gpa())) } else { None }
    }

    /// Returns the VP's MSRs to their state after creation, on a reset or INIT of the VP.
    pub fn reset(&self) {
        self.assist.store(0, Ordering::Relaxed);
    }
}
