use nvmx::check::{Controls, Refusal};
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::field::Field::*;
use samples::{Profile, page};

use crate::rig::{LAYOUT, ROOT, Sets, config, judge, table, with, without};

const PIN: u64 = 0x16;
const PROC: u64 = 0x0400_6172;
const SECONDARY: u64 = PROC | primary::SECONDARY_CONTROLS as u64;
const EXIT: u64 = 0x3_6FFB;
const ENTRY: u64 = 0x13FB;
const TOP: u64 = 1 << 46;

fn controls(base: Sets<'_>, rows: &[(Controls, Sets<'_>, Sets<'_>)]) {
    table(Profile::Long, base, Refusal::Controls, rows);
}

#[test]
fn every_profile_enters() {
    let config = config();
    for profile in Profile::ALL {
        let got = judge(&with(&config, profile, &[]), &config, ROOT).map(|pdptes| pdptes.is_some());
        assert_eq!(got, Ok(profile == Profile::Pae), "{profile:?}");
    }
}

#[test]
fn reserved_bits() {
    controls(
        &[],
        &[
            (Controls::Pin, &[(PinBasedControls, 0x12)], &[(PinBasedControls, 0x17)]),
            (
                Controls::Pin,
                &[(PinBasedControls, PIN | pin::POSTED_INTERRUPTS as u64)],
                &[(PinBasedControls, PIN | pin::PREEMPTION_TIMER as u64)],
            ),
            (Controls::Primary, &[(PrimaryControls, PROC & !2)], &[(PrimaryControls, PROC | 4)]),
            (Controls::Primary, &[(PrimaryControls, PROC | 1 << 17)], &[(PrimaryControls, PROC | 1 << 16)]),
            (
                Controls::Secondary,
                &[(PrimaryControls, SECONDARY), (SecondaryControls, secondary::ENCLS_EXITING as u64)],
                // Without activation they do not count.
                &[(PrimaryControls, PROC), (SecondaryControls, secondary::ENCLS_EXITING as u64)],
            ),
            (Controls::Exit, &[(ExitControls, EXIT & !1)], &[(ExitControls, EXIT | 4)]),
            (Controls::Exit, &[(ExitControls, EXIT | 1 << 31)], &[(ExitControls, EXIT | 1 << 15)]),
            (Controls::Entry, &[(EntryControls, ENTRY & !2)], &[(EntryControls, ENTRY | 4)]),
            (Controls::Entry, &[(EntryControls, ENTRY | 1 << 31)], &[(EntryControls, ENTRY | 1 << 14)]),
            (Controls::Smm, &[(EntryControls, ENTRY | entry::ENTRY_TO_SMM as u64)], &[]),
            (Controls::Smm, &[(EntryControls, ENTRY | entry::DEACTIVATE_DUAL_MONITOR as u64)], &[]),
        ],
    );
}

#[test]
fn addresses() {
    const IO: u64 = PROC | primary::IO_BITMAPS as u64;
    const MSR: u64 = PROC | primary::MSR_BITMAPS as u64;
    controls(
        &[],
        &[
            (Controls::IoBitmap, &[(PrimaryControls, IO), (IoBitmapA, 1)], &[(IoBitmapA, 1)]),
            (
                Controls::IoBitmap,
                &[(PrimaryControls, IO), (IoBitmapB, TOP)],
                &[(PrimaryControls, IO), (IoBitmapB, TOP / 2)],
            ),
            (Controls::IoBitmap, &[(PrimaryControls, IO), (IoBitmapB, 0x800)], &[(IoBitmapB, 0x800)]),
            (
                Controls::MsrBitmap,
                &[(PrimaryControls, MSR), (MsrBitmap, 0x800)],
                &[(PrimaryControls, MSR), (MsrBitmap, 0x1000)],
            ),
            (Controls::MsrBitmap, &[(PrimaryControls, MSR), (MsrBitmap, TOP)], &[(MsrBitmap, TOP)]),
            (Controls::ExitMsrStore, &[(ExitMsrStoreCount, 1), (ExitMsrStoreAddress, 8)], &[(ExitMsrStoreAddress, 8)]),
            (
                Controls::ExitMsrLoad,
                &[(ExitMsrLoadCount, 2), (ExitMsrLoadAddress, TOP - 16)],
                &[(ExitMsrLoadCount, 1), (ExitMsrLoadAddress, TOP - 16)],
            ),
            (
                Controls::ExitMsrLoad,
                &[(ExitMsrLoadCount, 0xFFFF_FFFF), (ExitMsrLoadAddress, TOP - (0xFFFF_FFFE << 4))],
                &[(ExitMsrLoadCount, 0xFFFF_FFFF), (ExitMsrLoadAddress, TOP - (0xFFFF_FFFF << 4))],
            ),
            (
                Controls::EntryMsrLoad,
                &[(EntryMsrLoadCount, 1), (EntryMsrLoadAddress, u64::MAX - 15)],
                &[(EntryMsrLoadAddress, u64::MAX - 15)],
            ),
            (Controls::EntryMsrLoad, &[(EntryMsrLoadCount, 1), (EntryMsrLoadAddress, 4)], &[]),
        ],
    );
}

#[test]
fn counts_and_pairs() {
    const VIRTUAL: u64 = PIN | pin::NMI_EXITING as u64 | pin::VIRTUAL_NMIS as u64;
    const WINDOW: u64 = PROC | primary::NMI_WINDOW_EXITING as u64;
    const SAVE: u64 = EXIT | exit::SAVE_PREEMPTION_TIMER as u64;
    controls(
        &[],
        &[
            (Controls::Cr3TargetCount, &[(Cr3TargetCount, 5)], &[(Cr3TargetCount, 4)]),
            (
                Controls::VirtualNmis,
                &[(PinBasedControls, PIN | pin::VIRTUAL_NMIS as u64)],
                &[(PinBasedControls, VIRTUAL)],
            ),
            (
                Controls::NmiWindow,
                &[(PinBasedControls, PIN | pin::NMI_EXITING as u64), (PrimaryControls, WINDOW)],
                &[(PinBasedControls, VIRTUAL), (PrimaryControls, WINDOW)],
            ),
            (
                Controls::SaveTimer,
                &[(ExitControls, SAVE)],
                &[(ExitControls, SAVE), (PinBasedControls, PIN | pin::PREEMPTION_TIMER as u64)],
            ),
        ],
    );
}

#[test]
fn virtual_apic() {
    const SHADOW: u64 = PROC | primary::TPR_SHADOW as u64;
    const BOTH: u64 = SHADOW | primary::SECONDARY_CONTROLS as u64;
    const ACCESSES: u64 = secondary::VIRTUALIZE_APIC_ACCESSES as u64;
    const INTERRUPTS: u64 = secondary::VIRTUAL_INTERRUPT_DELIVERY as u64;
    const X2APIC: u64 = secondary::VIRTUALIZE_X2APIC_MODE as u64;
    const REGISTERS: u64 = secondary::APIC_REGISTER_VIRTUALIZATION as u64;
    let external: (_, u64) = (PinBasedControls, PIN | 1);
    controls(
        &[(PrimaryControls, SHADOW)],
        &[
            (
                Controls::VirtualApicAddress,
                &[(VirtualApicAddress, 8)],
                &[(PrimaryControls, PROC), (VirtualApicAddress, 8)],
            ),
            (Controls::VirtualApicAddress, &[(VirtualApicAddress, TOP)], &[]),
            (Controls::TprThreshold, &[(TprThreshold, 16)], &[(PrimaryControls, PROC), (TprThreshold, 16)]),
            (
                Controls::TprThreshold,
                &[(TprThreshold, 16)],
                &[(PrimaryControls, BOTH), (SecondaryControls, INTERRUPTS), external, (TprThreshold, 16)],
            ),
            // VTPR is 0x50.
            (Controls::TprThresholdAboveVtpr, &[(TprThreshold, 6)], &[(TprThreshold, 5)]),
            (
                Controls::TprThresholdAboveVtpr,
                &[(TprThreshold, 15)],
                &[(PrimaryControls, BOTH), (SecondaryControls, ACCESSES), (TprThreshold, 15)],
            ),
            // Where there is no memory VTPR is all ones.
            (
                Controls::TprThresholdAboveVtpr,
                &[(VirtualApicAddress, LAYOUT.page(page::EMPTY)), (TprThreshold, 1)],
                &[(VirtualApicAddress, 0x50_0000), (TprThreshold, 15)],
            ),
            (
                Controls::ApicAccessAddress,
                &[(PrimaryControls, BOTH), (SecondaryControls, ACCESSES), (ApicAccessAddress, 4)],
                &[(PrimaryControls, BOTH), (ApicAccessAddress, 4)],
            ),
            (
                Controls::ApicAccessAddress,
                &[(PrimaryControls, BOTH), (SecondaryControls, ACCESSES), (ApicAccessAddress, TOP)],
                &[],
            ),
            (
                Controls::X2apicMode,
                &[(PrimaryControls, BOTH), (SecondaryControls, ACCESSES | X2APIC)],
                &[(PrimaryControls, BOTH), (SecondaryControls, X2APIC)],
            ),
            (
                Controls::VirtualInterruptDelivery,
                &[(PrimaryControls, BOTH), (SecondaryControls, INTERRUPTS)],
                &[(PrimaryControls, BOTH), (SecondaryControls, INTERRUPTS), external],
            ),
            (
                Controls::NoTprShadow,
                &[(PrimaryControls, SECONDARY), (SecondaryControls, REGISTERS)],
                &[(PrimaryControls, BOTH), (SecondaryControls, REGISTERS)],
            ),
            (
                Controls::NoTprShadow,
                &[(PrimaryControls, SECONDARY), (SecondaryControls, X2APIC)],
                &[(PrimaryControls, SECONDARY), (SecondaryControls, ACCESSES)],
            ),
            (Controls::NoTprShadow, &[(PrimaryControls, SECONDARY), (SecondaryControls, INTERRUPTS), external], &[]),
        ],
    );
}

#[test]
fn translation() {
    const EPT: u64 = secondary::EPT as u64;
    const VPID: u64 = secondary::VPID as u64;
    const PML: u64 = secondary::PML as u64;
    const FUNCTIONS: u64 = secondary::VM_FUNCTIONS as u64;
    const UNRESTRICTED: u64 = secondary::UNRESTRICTED_GUEST as u64;
    const SCALING: u64 = secondary::TSC_SCALING as u64;
    let two = |value| (SecondaryControls, value);
    controls(
        &[(PrimaryControls, SECONDARY)],
        &[
            (Controls::Vpid, &[two(VPID), (VirtualProcessorId, 0)], &[(VirtualProcessorId, 0)]),
            (Controls::Vpid, &[two(VPID), (VirtualProcessorId, 0)], &[two(VPID), (VirtualProcessorId, 0xFFFF)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x1D)], &[two(EPT), (EptPointer, 0x1E)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x1D)], &[(EptPointer, 0x1D)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x16)], &[two(EPT), (EptPointer, 0x18)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x26)], &[]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x9E)], &[two(EPT), (EptPointer, 0x5E)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, 0x81E)], &[two(EPT), (EptPointer, 0x101E)]),
            (Controls::EptPointer, &[two(EPT), (EptPointer, TOP | 0x1E)], &[two(EPT), (EptPointer, (TOP / 2) | 0x1E)]),
            (Controls::Pml, &[two(PML)], &[two(EPT | PML)]),
            (Controls::Pml, &[two(EPT | PML), (PmlAddress, 8)], &[two(EPT), (PmlAddress, 8)]),
            (Controls::Pml, &[two(EPT | PML), (PmlAddress, TOP)], &[]),
            (Controls::UnrestrictedGuest, &[two(UNRESTRICTED)], &[two(EPT | UNRESTRICTED)]),
            (
                Controls::VmFunctions,
                &[two(EPT | FUNCTIONS), (VmFunctionControls, 2)],
                &[two(EPT | FUNCTIONS), (VmFunctionControls, 1)],
            ),
            (
                Controls::VmFunctions,
                &[two(FUNCTIONS), (VmFunctionControls, 1)],
                &[two(FUNCTIONS), (VmFunctionControls, 0)],
            ),
            (
                Controls::EptpList,
                &[two(EPT | FUNCTIONS), (VmFunctionControls, 1), (EptpListAddress, 8)],
                &[two(EPT | FUNCTIONS), (VmFunctionControls, 0), (EptpListAddress, 8)],
            ),
            (Controls::EptpList, &[two(EPT | FUNCTIONS), (VmFunctionControls, 1), (EptpListAddress, TOP)], &[]),
            (Controls::TscMultiplier, &[two(SCALING), (TscMultiplier, 0)], &[two(SCALING), (TscMultiplier, 1)]),
            (Controls::TscMultiplier, &[two(SCALING), (TscMultiplier, 0)], &[(TscMultiplier, 0)]),
        ],
    );
}

/// What one L1 is not offered is refused it, and only it.
#[test]
fn a_restriction_counts() {
    use nvmx::caps::ept_vpid::{ACCESSED_DIRTY, UC};
    let ept = |pointer| {
        let sets: Sets<'_> = &[(PrimaryControls, SECONDARY), (SecondaryControls, secondary::EPT as u64)];
        [sets[0], sets[1], (EptPointer, pointer)]
    };
    let got = |config, sets: Sets<'_>| judge(&with(&config, Profile::Long, &[sets]), &config, ROOT).map(|_| ());
    let refused = |name| Err(Refusal::Controls(name));
    let no_flags = || {
        without(|offer| {
            (offer.ept_vpid, offer.secondary) = (offer.ept_vpid & !ACCESSED_DIRTY, offer.secondary & !secondary::PML)
        })
    };
    assert_eq!(got(no_flags(), &ept(0x5E)), refused(Controls::EptPointer));
    assert_eq!(got(no_flags(), &ept(0x1E)), Ok(()));
    let no_uc = || without(|offer| offer.ept_vpid &= !UC);
    assert_eq!(got(no_uc(), &ept(0x18)), refused(Controls::EptPointer));
    assert_eq!(got(no_uc(), &ept(0x1E)), Ok(()));
    let no_shadow = || without(|offer| offer.primary &= !primary::MONITOR_TRAP_FLAG);
    let trap = [(PrimaryControls, PROC | primary::MONITOR_TRAP_FLAG as u64)];
    assert_eq!(got(no_shadow(), &trap), refused(Controls::Primary));
    assert_eq!(got(config(), &trap), Ok(()));
}
