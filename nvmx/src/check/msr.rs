//! Entries of the MSR-load and MSR-store areas (SDM volume 3, "Loading MSRs", "Saving MSRs").
//!
//! What an entry may name at all; whether WRMSR of its value would fault is for whoever holds the MSR.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most entries of an area: 512, as IA32_VMX_MISC bits 27:25 are 0.
pub const MSR_LIST_MAX: u32 = 512;

/// One entry of an area, as in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MsrEntry {
    /// The MSR.
    pub index: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Its value.
    pub value: u64,
}

static_assertions::const_assert_eq!(core::mem::offset_of!(MsrEntry, index), 0);
static_assertions::const_assert_eq!(core::mem::offset_of!(MsrEntry, reserved), 4);
static_assertions::const_assert_eq!(core::mem::offset_of!(MsrEntry, value), 8);
static_assertions::const_assert_eq!(size_of::<MsrEntry>(), 16);

/// Why an entry cannot be loaded or stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRefusal {
    /// Bits 63:32 are not 0.
    Reserved,
    /// IA32_FS_BASE or IA32_GS_BASE: they are guest state.
    Base,
    /// An MSR of the x2APIC, 0x800 to 0x8FF.
    X2apic,
    /// An MSR that only SMM may access.
    Smm,
    /// A microcode-update MSR.
    Microcode,
    /// The area has more entries than [`MSR_LIST_MAX`].
    TooMany,
    /// WRMSR of the value, or RDMSR, would fault.
    Value,
    /// The area is in no memory.
    Memory,
}

const BIOS_UPDT_TRIG: u32 = 0x79;
const BIOS_SIGN_ID: u32 = 0x8B;
const SMM_MONITOR_CTL: u32 = 0x9B;
const SMBASE: u32 = 0x9E;
const FS_BASE: u32 = 0xC000_0100;
const GS_BASE: u32 = 0xC000_0101;

/// What an entry of the VM-entry or VM-exit MSR-load area may name.
///
/// # Errors
/// The rule that is broken: exit reason 0x8000_0022 at entry, a VMX abort at exit.
pub const fn msr_load(entry: &MsrEntry) -> Result<(), MsrRefusal> {
    match entry.index {
        FS_BASE | GS_BASE => Err(MsrRefusal::Base),
        SMM_MONITOR_CTL | SMBASE => Err(MsrRefusal::Smm),
        BIOS_UPDT_TRIG | BIOS_SIGN_ID => Err(MsrRefusal::Microcode),
        index if index >> 8 == 8 => Err(MsrRefusal::X2apic),
        _ if entry.reserved != 0 => Err(MsrRefusal::Reserved),
        _ => Ok(()),
    }
}

/// What an entry of the VM-exit MSR-store area may name; its value does not count.
///
/// # Errors
/// The rule that is broken: a VMX abort.
pub const fn msr_store(entry: &MsrEntry) -> Result<(), MsrRefusal> {
    match entry.index {
        SMBASE => Err(MsrRefusal::Smm),
        index if index >> 8 == 8 => Err(MsrRefusal::X2apic),
        _ if entry.reserved != 0 => Err(MsrRefusal::Reserved),
        _ => Ok(()),
    }
}
