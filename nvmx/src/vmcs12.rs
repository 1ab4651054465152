//! The VMCS12: what L1 believes to be its VMCS, in a layout of this library.
//!
//! VMREAD and VMWRITE of L1 read and write it, the entry checks judge it, VMCS02 is made of it. Uses `field`.
//!
//! # Layout in L1's memory, version 1
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0x000 | 4 | revision identifier ([`REVISION`]); bit 31: shadow VMCS |
//! | 0x004 | 4 | VMX-abort indicator |
//! | 0x008 | 4 | launch state: 0 clear, 1 launched |
//! | 0x00C | 4 | zero |
//! | 0x010 | 8 each | the fields in slot order, little-endian, unused upper bits zero |
//!
//! Software may rely only on the first two (SDM volume 3, "Format of the VMCS Region"); the rest is read when the VMCS
//! becomes current and written when it ceases to be.

use crate::field::{Encoding, Field};
use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The revision identifier, IA32_VMX_BASIC bits 30:0. It changes with the layout.
pub const REVISION: u32 = 0x6E76_0001;

/// Size of a VMCS region in bytes, IA32_VMX_BASIC bits 44:32.
pub const REGION_SIZE: u32 = 4096;

/// Bit 31 of the revision identifier: the region is a shadow VMCS.
pub const SHADOW_INDICATOR: u32 = 1 << 31;

/// Launch state of a VMCS (SDM volume 3, "VMCS Launch State").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchState {
    /// VMLAUNCH is the instruction that enters.
    Clear,
    /// VMRESUME is the instruction that enters.
    Launched,
}

/// The cached copy of a VMCS12.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Vmcs12 {
    /// Revision identifier and shadow indicator.
    pub revision: u32,
    /// VMX-abort indicator.
    pub abort: u32,
    launch_state: u32,
    reserved: u32,
    fields: [u64; Field::COUNT],
}

static_assertions::const_assert_eq!(core::mem::offset_of!(Vmcs12, revision), 0);
static_assertions::const_assert_eq!(core::mem::offset_of!(Vmcs12, abort), 4);
static_assertions::const_assert_eq!(core::mem::offset_of!(Vmcs12, launch_state), 8);
static_assertions::const_assert_eq!(core::mem::offset_of!(Vmcs12, reserved), 12);
static_assertions::const_assert_eq!(core::mem::offset_of!(Vmcs12, fields), 16);
static_assertions::const_assert!(size_of::<Vmcs12>() <= REGION_SIZE as usize);

impl Default for Vmcs12 {
    fn default() -> Self {
        Self { revision: REVISION, abort: 0, launch_state: 0, reserved: 0, fields: [0; Field::COUNT] }
    }
}

/// Why VMREAD or VMWRITE of a field fails: VM-instruction error 12 or 13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// The encoding names no supported field (12).
    Unsupported,
    /// VMWRITE to a read-only field where IA32_VMX_MISC bit 29 is clear (13).
    ReadOnly,
}

impl Vmcs12 {
    /// The launch state; any value but 1 counts as clear.
    #[inline]
    pub const fn launch_state(&self) -> LaunchState {
        if self.launch_state == 1 { LaunchState::Launched } else { LaunchState::Clear }
    }

    /// True when the launch state in memory is one that this library writes.
    #[inline]
    pub(crate) const fn launch_state_is_defined(&self) -> bool {
        self.launch_state <= 1
    }

    /// Sets the launch state.
    #[inline]
    pub const fn set_launch_state(&mut self, state: LaunchState) {
        self.launch_state = match state {
            LaunchState::Clear => 0,
            LaunchState::Launched => 1,
        };
    }

    /// VMCLEAR of the region at `gpa`, which is not current: its launch state becomes clear.
    ///
    /// # Errors
    /// There is no memory at `gpa`.
    pub fn clear_launch_state<M: GuestMemory + ?Sized>(memory: &M, gpa: L1Gpa) -> Result<(), MemoryError> {
        const OFFSET: u64 = core::mem::offset_of!(Vmcs12, launch_state) as u64;
        memory.write(gpa.checked_add(OFFSET).ok_or(MemoryError)?, &0u32.to_le_bytes())
    }

    /// The value of a field.
    #[inline]
    pub fn get(&self, field: Field) -> u64 {
        self.fields.get(field.slot()).copied().unwrap_or(0)
    }

    /// The value of a field of at most 32 bits.
    #[inline]
    pub fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// Sets a field; bits beyond its width are dropped.
    #[inline]
    pub fn set(&mut self, field: Field, value: u64) {
        if let Some(slot) = self.fields.get_mut(field.slot()) {
            *slot = value & field.mask();
        }
    }

    /// What VMREAD of `encoding` yields (SDM volume 3, "VMREAD"): the high encoding of a 64-bit field its upper half.
    pub fn vmread(&self, encoding: Encoding) -> Result<u64, AccessError> {
        let field = supported(encoding)?;
        let value = self.get(field);
        Ok(if encoding.is_high() { value >> 32 } else { value })
    }

    /// VMWRITE of `value` to `encoding` (SDM volume 3, "VMWRITE"). `any_field` is IA32_VMX_MISC bit 29.
    pub fn vmwrite(&mut self, encoding: Encoding, value: u64, any_field: bool) -> Result<(), AccessError> {
        let field = supported(encoding)?;
        if matches!(field.area(), crate::field::Area::ExitInformation) && !any_field {
            return Err(AccessError::ReadOnly);
        }
        let value = if encoding.is_high() { self.get(field) & 0xFFFF_FFFF | value << 32 } else { value };
        self.set(field, value);
        Ok(())
    }

    /// Makes a copy from L1's memory legal: bits beyond a field's width, and reserved words, are dropped.
    pub fn sanitize(&mut self) {
        self.reserved = 0;
        for (slot, field) in self.fields.iter_mut().zip(Field::ALL) {
            *slot &= field.mask();
        }
    }
}

fn supported(encoding: Encoding) -> Result<Field, AccessError> {
    if encoding.0 & Encoding::RESERVED != 0 {
        return Err(AccessError::Unsupported);
    }
    Field::from_encoding(encoding).ok_or(AccessError::Unsupported)
}
