//! Checks on the VM-execution, VM-exit and VM-entry control fields (SDM volume 3, "Checks on VMX Controls").

use super::{address, ensure, event, secondary_controls, word};
use crate::caps::{Config, ept_vpid};
use crate::controls::{entry, exit, pin, primary, secondary};
use crate::field::Field;
use crate::vmcs12::Vmcs12;
use hvcore::memory::GuestMemory;

/// Which check on the controls failed: VMfailValid 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controls {
    /// Pin-based controls that must be 1 or are not offered.
    Pin,
    /// Primary processor-based controls, likewise.
    Primary,
    /// Secondary processor-based controls, likewise.
    Secondary,
    /// More CR3-target values than there are.
    Cr3TargetCount,
    /// The address of an I/O bitmap.
    IoBitmap,
    /// The address of the MSR bitmaps.
    MsrBitmap,
    /// The virtual-APIC address.
    VirtualApicAddress,
    /// TPR threshold bits 31:4.
    TprThreshold,
    /// The TPR threshold is above VTPR.
    TprThresholdAboveVtpr,
    /// x2APIC mode, APIC-register virtualization or virtual-interrupt delivery without "use TPR shadow".
    NoTprShadow,
    /// "Virtual NMIs" without "NMI exiting".
    VirtualNmis,
    /// "NMI-window exiting" without "virtual NMIs".
    NmiWindow,
    /// The APIC-access address.
    ApicAccessAddress,
    /// "Virtualize x2APIC mode" with "virtualize APIC accesses".
    X2apicMode,
    /// "Virtual-interrupt delivery" without "external-interrupt exiting".
    VirtualInterruptDelivery,
    /// VPID 0.
    Vpid,
    /// The EPT pointer.
    EptPointer,
    /// "Enable PML" without EPT, or its address.
    Pml,
    /// "Unrestricted guest" without EPT.
    UnrestrictedGuest,
    /// VM-function controls, or EPTP switching without EPT.
    VmFunctions,
    /// The EPTP-list address.
    EptpList,
    /// TSC multiplier 0.
    TscMultiplier,
    /// VM-exit controls that must be 1 or are not offered.
    Exit,
    /// "Save VMX-preemption timer value" without the timer.
    SaveTimer,
    /// The VM-exit MSR-store area.
    ExitMsrStore,
    /// The VM-exit MSR-load area.
    ExitMsrLoad,
    /// VM-entry controls that must be 1 or are not offered.
    Entry,
    /// "Entry to SMM" or "deactivate dual-monitor treatment" outside SMM.
    Smm,
    /// The VM-entry MSR-load area.
    EntryMsrLoad,
    /// The type of the event to inject.
    EventType,
    /// Its vector.
    EventVector,
    /// Its deliver-error-code bit.
    EventErrorCodeBit,
    /// Reserved bits of the interruption information.
    EventReserved,
    /// Bits 31:16 of its error code.
    EventErrorCode,
    /// Its instruction length.
    EventLength,
}

/// Checks all control fields.
///
/// # Errors
/// The first check that fails; VMfailValid 7.
pub fn controls<M: GuestMemory + ?Sized>(vmcs: &Vmcs12, config: &Config, memory: &M) -> Result<(), Controls> {
    let (pins, primaries) = (vmcs.get32(Field::PinBasedControls), vmcs.get32(Field::PrimaryControls));
    let secondaries = secondary_controls(vmcs);
    ensure(config.pin.permits(pins), Controls::Pin)?;
    ensure(config.primary.permits(primaries), Controls::Primary)?;
    ensure(config.secondary.permits(secondaries), Controls::Secondary)?;
    ensure(vmcs.get(Field::Cr3TargetCount) <= config.cr3_targets(), Controls::Cr3TargetCount)?;
    bitmaps(vmcs, config, primaries)?;
    apic(vmcs, config, memory, (pins, primaries, secondaries))?;
    ensure(pins & (pin::VIRTUAL_NMIS | pin::NMI_EXITING) != pin::VIRTUAL_NMIS, Controls::VirtualNmis)?;
    let window = primaries & primary::NMI_WINDOW_EXITING != 0;
    ensure(!window || pins & pin::VIRTUAL_NMIS != 0, Controls::NmiWindow)?;
    if secondaries != 0 {
        translation(vmcs, config, secondaries)?;
    }
    exits(vmcs, config, pins)?;
    entries(vmcs, config)?;
    event::check(vmcs, config)
}

fn bitmaps(vmcs: &Vmcs12, config: &Config, primaries: u32) -> Result<(), Controls> {
    if primaries & primary::IO_BITMAPS != 0 {
        let both = vmcs.get(Field::IoBitmapA) | vmcs.get(Field::IoBitmapB);
        ensure(address(config, both, 4096), Controls::IoBitmap)?;
    }
    let maps = primaries & primary::MSR_BITMAPS != 0;
    ensure(!maps || address(config, vmcs.get(Field::MsrBitmap), 4096), Controls::MsrBitmap)
}

/// The virtual APIC: TPR shadow, APIC accesses, x2APIC mode, virtual interrupts.
fn apic<M: GuestMemory + ?Sized>(
    vmcs: &Vmcs12,
    config: &Config,
    memory: &M,
    (pins, primaries, secondaries): (u32, u32, u32),
) -> Result<(), Controls> {
    use secondary::{APIC_REGISTER_VIRTUALIZATION, VIRTUALIZE_APIC_ACCESSES};
    use secondary::{VIRTUAL_INTERRUPT_DELIVERY, VIRTUALIZE_X2APIC_MODE};
    let needs_shadow = VIRTUALIZE_X2APIC_MODE | APIC_REGISTER_VIRTUALIZATION | VIRTUAL_INTERRUPT_DELIVERY;
    let (interrupts, accesses) =
        (secondaries & VIRTUAL_INTERRUPT_DELIVERY != 0, secondaries & VIRTUALIZE_APIC_ACCESSES != 0);
    if primaries & primary::TPR_SHADOW == 0 {
        ensure(secondaries & needs_shadow == 0, Controls::NoTprShadow)?;
    } else {
        let page = vmcs.get(Field::VirtualApicAddress);
        ensure(address(config, page, 4096), Controls::VirtualApicAddress)?;
        let threshold = vmcs.get32(Field::TprThreshold);
        ensure(interrupts || threshold >> 4 == 0, Controls::TprThreshold)?;
        if threshold != 0 && !interrupts && !accesses {
            let vtpr = word(memory, page | 0x80) >> 4 & 0xF;
            ensure(threshold <= vtpr, Controls::TprThresholdAboveVtpr)?;
        }
    }
    if accesses {
        ensure(address(config, vmcs.get(Field::ApicAccessAddress), 4096), Controls::ApicAccessAddress)?;
        ensure(secondaries & VIRTUALIZE_X2APIC_MODE == 0, Controls::X2apicMode)?;
    }
    ensure(!interrupts || pins & pin::EXTERNAL_INTERRUPT_EXITING != 0, Controls::VirtualInterruptDelivery)
}

/// VPID, EPT and what builds on them; TSC scaling.
fn translation(vmcs: &Vmcs12, config: &Config, secondaries: u32) -> Result<(), Controls> {
    let has = |control| secondaries & control != 0;
    let ept = has(secondary::EPT);
    ensure(!has(secondary::VPID) || vmcs.get(Field::VirtualProcessorId) != 0, Controls::Vpid)?;
    ensure(!ept || eptp_is_valid(config, vmcs.get(Field::EptPointer)), Controls::EptPointer)?;
    if has(secondary::PML) {
        ensure(ept && address(config, vmcs.get(Field::PmlAddress), 4096), Controls::Pml)?;
    }
    ensure(ept || !has(secondary::UNRESTRICTED_GUEST), Controls::UnrestrictedGuest)?;
    if has(secondary::VM_FUNCTIONS) {
        let functions = vmcs.get(Field::VmFunctionControls);
        ensure(functions & !config.vmfunc == 0, Controls::VmFunctions)?;
        if functions & 1 != 0 {
            ensure(ept, Controls::VmFunctions)?;
            ensure(address(config, vmcs.get(Field::EptpListAddress), 4096), Controls::EptpList)?;
        }
    }
    ensure(!has(secondary::TSC_SCALING) || vmcs.get(Field::TscMultiplier) != 0, Controls::TscMultiplier)
}

/// True for an EPT pointer that VM entry (or EPTP switching) accepts: memory type, walk length, accessed and dirty flags
/// as IA32_VMX_EPT_VPID_CAP offers them, and no reserved bit.
#[inline]
pub(crate) fn eptp_is_valid(config: &Config, eptp: u64) -> bool {
    let memory_type = match eptp & 7 {
        0 => ept_vpid::UC,
        6 => ept_vpid::WB,
        _ => return false,
    };
    let flags = if eptp & 1 << 6 != 0 { ept_vpid::ACCESSED_DIRTY } else { 0 };
    let needed = memory_type | flags | ept_vpid::WALK_4;
    // Bits 5:3 are the walk length less 1; bit 7 is for supervisor shadow stacks, which are not offered.
    config.ept_vpid & needed == needed && eptp & 0xFB8 == 3 << 3 && config.legal_gpa(eptp)
}

/// An MSR area of `count` entries of 16 bytes at `at`.
fn msr_area(vmcs: &Vmcs12, config: &Config, count: Field, at: Field) -> bool {
    let (count, at) = (vmcs.get(count), vmcs.get(at));
    // The count has 32 bits and the address was found to have at most 52: no overflow.
    count == 0 || address(config, at, 16) && config.legal_gpa(at.wrapping_add((count << 4).wrapping_sub(1)))
}

fn exits(vmcs: &Vmcs12, config: &Config, pins: u32) -> Result<(), Controls> {
    let exits = vmcs.get32(Field::ExitControls);
    ensure(config.exit.permits(exits), Controls::Exit)?;
    let saves = exits & exit::SAVE_PREEMPTION_TIMER != 0;
    ensure(!saves || pins & pin::PREEMPTION_TIMER != 0, Controls::SaveTimer)?;
    let store = msr_area(vmcs, config, Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress);
    ensure(store, Controls::ExitMsrStore)?;
    let load = msr_area(vmcs, config, Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress);
    ensure(load, Controls::ExitMsrLoad)
}

fn entries(vmcs: &Vmcs12, config: &Config) -> Result<(), Controls> {
    let entries = vmcs.get32(Field::EntryControls);
    ensure(entries & (entry::ENTRY_TO_SMM | entry::DEACTIVATE_DUAL_MONITOR) == 0, Controls::Smm)?;
    ensure(config.entry.permits(entries), Controls::Entry)?;
    let load = msr_area(vmcs, config, Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress);
    ensure(load, Controls::EntryMsrLoad)
}
