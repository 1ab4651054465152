//! Saving and restoring the interface as plain, versioned structures.
//!
//! Called by the embedder while no VP runs. What is restored comes from outside and is checked like a guest's own
//! writes: a state that no sequence of writes could have made is refused, and then nothing is changed.

use super::config::Vendor;
use super::interface::{Interface, VpInterface};
use super::sync::Ordering;
use static_assertions::const_assert_eq;
use tlfs_abi::msr::{PageMsr, ReenlightenmentControl, TSC_EMULATION_BIT};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The version of both structures.
pub const SAVED_VERSION: u32 = 1;

/// The partition's MSRs, 112 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedPartition {
    /// [`SAVED_VERSION`].
    pub version: u32,
    /// 0 Intel, 1 AMD: decides what the hypercall page holds.
    pub vendor: u32,
    /// GUEST_OS_ID.
    pub guest_os_id: u64,
    /// HYPERCALL.
    pub hypercall: u64,
    /// REFERENCE_TSC.
    pub reference_tsc: u64,
    /// CRASH_P0 to CRASH_P4.
    pub crash: [u64; 5],
    /// REENLIGHTENMENT_CONTROL.
    pub reenlightenment: u64,
    /// TSC_EMULATION_CONTROL.
    pub tsc_emulation_control: u64,
    /// TSC_EMULATION_STATUS.
    pub tsc_emulation_status: u64,
    /// The latest reference time that a VP has seen, in 100 ns.
    pub reference_time: u64,
    /// TscSequence of the reference TSC page. Its parameters are the host's and not saved.
    pub tsc_sequence: u32,
    /// Zero.
    pub reserved: u32,
}

/// A VP's MSRs, 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SavedVp {
    /// [`SAVED_VERSION`].
    pub version: u32,
    /// The VP's index.
    pub vp_index: u32,
    /// VP_ASSIST_PAGE.
    pub vp_assist_page: u64,
}

const_assert_eq!(size_of::<SavedPartition>(), 112);
const_assert_eq!(core::mem::offset_of!(SavedPartition, guest_os_id), 8);
const_assert_eq!(core::mem::offset_of!(SavedPartition, crash), 32);
const_assert_eq!(core::mem::offset_of!(SavedPartition, tsc_sequence), 104);
const_assert_eq!(size_of::<SavedVp>(), 16);
const_assert_eq!(core::mem::offset_of!(SavedVp, vp_assist_page), 8);

/// Why a saved state is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// Another version.
    Version,
    /// Another vendor's virtualization extensions.
    Vendor,
    /// A reserved field or bit is set.
    Reserved,
    /// State of a capability that this partition is not offered.
    NotOffered,
    /// Values that no guest could have written.
    Impossible,
    /// Another VP's state.
    VpIndex,
}

const fn vendor_number(vendor: Vendor) -> u32 {
    match vendor {
        Vendor::Intel => 0,
        Vendor::Amd => 1,
    }
}

impl Interface {
    /// The partition's state.
    pub fn save(&self) -> SavedPartition {
        SavedPartition {
            version: SAVED_VERSION,
            vendor: vendor_number(self.vendor()),
            guest_os_id: self.guest_os_id.load(Ordering::Relaxed),
            hypercall: self.hypercall.load(Ordering::Relaxed),
            reference_tsc: self.reference_tsc.load(Ordering::Relaxed),
            crash: self.crash_parameters(),
            reenlightenment: self.reenlightenment.load(Ordering::Relaxed),
            tsc_emulation_control: self.tsc_emulation_control.load(Ordering::Relaxed),
            tsc_emulation_status: self.tsc_emulation_status.load(Ordering::Relaxed),
            reference_time: self.last_time.load(Ordering::Relaxed),
            tsc_sequence: self.tsc_sequence.load(Ordering::Relaxed),
            reserved: 0,
        }
    }

    /// Puts a saved state in force. Then the embedder maps the overlays as [`overlay`](Self::overlay) says, and on
    /// another host calls [`migrated`](Self::migrated).
    pub fn restore(&self, saved: &SavedPartition) -> Result<(), RestoreError> {
        self.check(saved)?;
        self.guest_os_id.store(saved.guest_os_id, Ordering::Relaxed);
        self.hypercall.store(saved.hypercall, Ordering::Relaxed);
        self.reference_tsc.store(saved.reference_tsc, Ordering::Relaxed);
        for (parameter, value) in self.crash.iter().zip(saved.crash) {
            parameter.store(value, Ordering::Relaxed);
        }
        self.reenlightenment.store(saved.reenlightenment, Ordering::Relaxed);
        self.tsc_emulation_control.store(saved.tsc_emulation_control, Ordering::Relaxed);
        self.tsc_emulation_status.store(saved.tsc_emulation_status, Ordering::Relaxed);
        self.last_time.store(saved.reference_time, Ordering::Relaxed);
        self.tsc_sequence.store(saved.tsc_sequence, Ordering::Relaxed);
        // This host's parameters are not those that the guest has read.
        self.advance_tsc_sequence();
        Ok(())
    }

    fn check(&self, saved: &SavedPartition) -> Result<(), RestoreError> {
        let config = &self.config;
        if saved.version != SAVED_VERSION {
            return Err(RestoreError::Version);
        }
        if saved.vendor != vendor_number(config.vendor) {
            return Err(RestoreError::Vendor);
        }
        let control = ReenlightenmentControl::new(saved.reenlightenment);
        let emulation = saved.tsc_emulation_control | saved.tsc_emulation_status;
        let reserved = saved.reenlightenment & ReenlightenmentControl::RESERVED | emulation & !TSC_EMULATION_BIT;
        if saved.reserved != 0 || reserved != 0 {
            return Err(RestoreError::Reserved);
        }
        let migration = saved.reenlightenment | emulation;
        if saved.reference_tsc != 0 && config.reference_tsc.is_none()
            || saved.crash != [0; 5] && config.crash.is_none()
            || migration != 0 && !config.reenlightenment
        {
            return Err(RestoreError::NotOffered);
        }
        let hypercall = PageMsr::new(saved.hypercall);
        let undeliverable = control.vector() < 16 || control.target_vp() >= config.max_vps;
        if hypercall.enable() && saved.guest_os_id == 0
            || !self.in_gpa_space(hypercall.gpa())
            || control.enabled() && undeliverable
            || saved.tsc_sequence == 0
        {
            return Err(RestoreError::Impossible);
        }
        Ok(())
    }

    /// Puts a VP's saved state in force.
    pub fn restore_vp(&self, vp: &VpInterface, saved: &SavedVp) -> Result<(), RestoreError> {
        if saved.version != SAVED_VERSION {
            return Err(RestoreError::Version);
        }
        if saved.vp_index != vp.vp_index() {
            return Err(RestoreError::VpIndex);
        }
        let page = PageMsr::new(saved.vp_assist_page);
        if saved.vp_assist_page != 0 && !self.config.apic_msrs {
            return Err(RestoreError::NotOffered);
        }
        if page.enable() && !self.in_gpa_space(page.gpa()) {
            return Err(RestoreError::Impossible);
        }
        vp.assist.store(saved.vp_assist_page, Ordering::Relaxed);
        Ok(())
    }
}

impl VpInterface {
    /// The VP's state.
    pub fn save(&self) -> SavedVp {
        SavedVp {
            version: SAVED_VERSION,
            vp_index: self.vp_index(),
            vp_assist_page: self.assist.load(Ordering::Relaxed),
        }
    }
}
