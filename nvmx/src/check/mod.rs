//! The checks of VM entries (SDM volume 3, chapter "VM Entries"): controls, host state, guest state, MSR-load areas.
//!
//! Pure functions over a VMCS12 and what L1 is offered, called by VMLAUNCH and VMRESUME in this order: [`controls`]
//! (VMfailValid 7), [`host`] (VMfailValid 8), [`guest`] (exit reason 0x8000_0021), then [`msr_load`] for each entry of
//! the VM-entry MSR-load area (exit reason 0x8000_0022). Each refusal names its check.
//!
//! Guest memory is read in three places, each at most once: VTPR, the revision of the VMCS that the link pointer names,
//! PDPTEs. Memory that is not there reads as all ones, as a bus with nothing on it does.
//!
//! Not checked, because it cannot be wrong here: that 16- and 32-bit fields have no further bits, and the reserved bits
//! 11:8 and 31:17 of access rights; VMWRITE drops both ([`Field::mask`](crate::field::Field::mask)).

mod controls;
mod event;
mod guest;
mod host;
mod msr;
mod segments;

pub(crate) use controls::eptp_is_valid;
pub use controls::{Controls, controls};
pub(crate) use event::check as event;
pub(crate) use guest::pdptes_at;
pub use guest::{Guest, guest};
pub use host::{Host, host};
pub use msr::{MSR_LIST_MAX, MsrEntry, MsrRefusal, msr_load, msr_store};

use crate::caps::Config;
use crate::controls::{primary, secondary};
use crate::field::Field;
use crate::vmcs12::Vmcs12;
use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

/// What the checks need of L1's own state at VMLAUNCH or VMRESUME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// IA32_EFER.LMA of L1.
    pub long_mode: bool,
    /// The current-VMCS pointer, or the address of the enlightened VMCS.
    pub current: L1Gpa,
}

/// Which check refused an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// VMfailValid 7: controls.
    Controls(Controls),
    /// VMfailValid 8: host state.
    Host(Host),
    /// Exit reason 0x8000_0021: guest state.
    Guest(Guest),
    /// Exit reason 0x8000_0022: this entry of the MSR-load area, counted from 1.
    Msr(u32, MsrRefusal),
}

/// The secondary controls in force: none unless they are activated.
#[inline]
pub(crate) fn secondary_controls(vmcs: &Vmcs12) -> u32 {
    let active = vmcs.get32(Field::PrimaryControls) & primary::SECONDARY_CONTROLS != 0;
    if active { vmcs.get32(Field::SecondaryControls) } else { 0 }
}

#[inline]
fn unrestricted(vmcs: &Vmcs12) -> bool {
    secondary_controls(vmcs) & secondary::UNRESTRICTED_GUEST != 0
}

/// `Err(refusal)` unless `ok`.
#[inline(always)]
fn ensure<E>(ok: bool, refusal: E) -> Result<(), E> {
    if ok { Ok(()) } else { Err(refusal) }
}

/// True when `address` is a multiple of `align`, a power of two, and within the physical addresses.
#[inline(always)]
fn address(config: &Config, address: u64, align: u64) -> bool {
    address & align.wrapping_sub(1) == 0 && config.legal_gpa(address)
}

/// True when each of the eight entries is a defined memory type: 0, 1, 4, 5, 6 or 7.
#[inline]
pub(crate) const fn pat_is_valid(pat: u64) -> bool {
    // Bits 7:3 of every entry are zero; of 2:0, the values 2 and 3 (bit 1 without bit 2) are undefined.
    let reserved = pat & 0xF8F8_F8F8_F8F8_F8F8;
    let undefined = pat & 0x0202_0202_0202_0202 & !((pat & 0x0404_0404_0404_0404) >> 1);
    reserved | undefined == 0
}

/// A word of memory, or all ones where there is none.
#[inline]
fn word<M: GuestMemory + ?Sized>(memory: &M, at: u64) -> u32 {
    memory.read_u32(L1Gpa::new(at)).unwrap_or(u32::MAX)
}
