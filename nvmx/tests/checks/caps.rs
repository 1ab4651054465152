use nvmx::caps::{Allowed, Config, ConfigError, Group, Host, Offer, ept_vpid};
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::vmcs12::REVISION;

use crate::rig::{config, host, without};

fn offer() -> Offer {
    Offer::all(&host(), false, true)
}

fn refused(change: impl Fn(&mut Offer)) -> ConfigError {
    let mut offer = offer();
    change(&mut offer);
    Config::new(host(), offer).unwrap_err()
}

#[test]
fn the_capability_msrs() {
    let c = config();
    let required = |msr| c.read(msr).map(|value| value as u32);
    let allowed = |msr| c.read(msr).map(|value| (value >> 32) as u32);
    assert_eq!(c.read(0x480), Some(u64::from(REVISION) | 4096 << 32 | 6 << 50 | 1 << 54 | 1 << 55));
    assert_eq!((required(0x481), required(0x48D)), (Some(0x16), Some(0x16)));
    assert_eq!((required(0x482), required(0x48E)), (Some(0x0401_E172), Some(0x0400_6172)));
    assert_eq!((required(0x483), required(0x48F)), (Some(0x3_6DFF), Some(0x3_6DFB)));
    assert_eq!((required(0x484), required(0x490)), (Some(0x11FF), Some(0x11FB)));
    for (old, new) in [(0x481, 0x48D), (0x482, 0x48E), (0x483, 0x48F), (0x484, 0x490)] {
        assert_eq!(allowed(old), allowed(new));
    }
    assert_eq!(allowed(0x481), Some(0x16 | (pin::KNOWN & !pin::POSTED_INTERRUPTS)));
    assert_eq!(allowed(0x482), Some(0x0400_6172 | primary::KNOWN));
    assert_eq!(required(0x48B), Some(0));
    assert_eq!(c.read(0x485), Some(0x4004_01E7 | 1 << 29));
    for (has, gets) in [(0, 0), (3, 3), (4, 4), (16, 4)] {
        let host = Host { misc: has << 16, ..host() };
        assert_eq!(Config::new(host, offer()).unwrap().cr3_targets(), gets);
    }
    assert_eq!((c.read(0x486), c.read(0x487)), (Some(0x8000_0021), Some(0xFFFF_FFFF)));
    assert_eq!((c.read(0x488), c.read(0x489)), (Some(0x2000), Some(0x00F7_2FFF)));
    assert_eq!(c.read(0x48A), Some(0x19 << 1));
    assert_eq!((c.read(0x48C), c.read(0x491)), (Some(0x0F01_0673_4141), Some(1)));
    assert_eq!((c.read(0x492), c.read(0x493), c.read(0x47F)), (None, None, None));
}

/// What L1 has not it cannot read.
#[test]
fn msrs_that_are_not_there() {
    let no_functions = without(|o| (o.secondary, o.vmfunc) = (o.secondary & !secondary::VM_FUNCTIONS, 0));
    assert_eq!((no_functions.read(0x491), no_functions.read(0x48C)), (None, Some(0x0F01_0673_4141)));
    let no_ept = without(|o| (o.secondary, o.vmfunc) = (secondary::VPID, 0));
    assert_eq!(no_ept.read(0x48C), Some(ept_vpid::OF_VPID));
    let no_vpid = without(|o| o.secondary &= !secondary::VPID);
    assert_eq!(no_vpid.read(0x48C), Some(0x0673_4141));
    let neither = without(|o| (o.secondary, o.vmfunc) = (secondary::RDTSCP, 0));
    assert_eq!((neither.read(0x48B), neither.read(0x48C)), (Some(u64::from(secondary::RDTSCP) << 32), None));
    let none = without(|o| {
        (o.secondary, o.vmfunc, o.primary) = (0, 0, o.primary & !primary::SECONDARY_CONTROLS);
    });
    assert_eq!((none.read(0x48B), none.read(0x482).is_some()), (None, true));
}

#[test]
fn the_processor_limits_the_offer() {
    let mut less = host();
    less.primary.allowed &= !(primary::MONITOR_TRAP_FLAG | primary::TPR_SHADOW);
    less.secondary &= !(secondary::TSC_SCALING | secondary::PML);
    less.pin.allowed &= !pin::PREEMPTION_TIMER;
    less.exit.allowed &= !(exit::SAVE_PREEMPTION_TIMER | exit::CLEAR_BNDCFGS);
    less.entry.allowed &= !entry::LOAD_BNDCFGS;
    less.ept_vpid &= !(ept_vpid::EXECUTE_ONLY | ept_vpid::ACCESSED_DIRTY | ept_vpid::PAGES_1G);
    let offer = Offer::all(&less, false, true);
    assert_eq!(offer.primary & (primary::MONITOR_TRAP_FLAG | primary::TPR_SHADOW), 0);
    assert_eq!(offer.secondary & secondary::TSC_SCALING, 0);
    assert_eq!((offer.exit & exit::CLEAR_BNDCFGS, offer.entry & entry::LOAD_BNDCFGS), (0, 0));
    assert_eq!(offer.ept_vpid & ept_vpid::EXECUTE_ONLY, 0);
    // Emulated all the same.
    assert_ne!(offer.secondary & secondary::PML, 0);
    assert_ne!(offer.pin & pin::PREEMPTION_TIMER, 0);
    assert_ne!(offer.exit & exit::SAVE_PREEMPTION_TIMER, 0);
    assert_eq!(offer.ept_vpid & ept_vpid::EMULATED_EPT, ept_vpid::EMULATED_EPT);
    // APIC virtualization needs the TPR shadow.
    let of_shadow = secondary::VIRTUALIZE_X2APIC_MODE
        | secondary::APIC_REGISTER_VIRTUALIZATION
        | secondary::VIRTUAL_INTERRUPT_DELIVERY;
    let error = Config::new(less, offer).unwrap_err();
    assert!(matches!(error, ConfigError::Needs((Group::Secondary, bit), _) if bit & of_shadow != 0), "{error:?}");
    let config = Config::new(less, Offer { secondary: offer.secondary & !of_shadow, ..offer }).unwrap();
    // A timer in software counts every 32 ticks.
    assert_eq!(config.misc() & 0x1F, 5);
    assert_eq!(crate::rig::config().misc() & 0x1F, 7);
}

#[test]
fn impossible_offers() {
    let posted = |o: &mut Offer| o.pin |= pin::POSTED_INTERRUPTS;
    assert_eq!(refused(posted), ConfigError::NotPossible(Group::Pin, pin::POSTED_INTERRUPTS));
    assert_eq!(refused(|o| o.primary |= 1 << 17), ConfigError::NotPossible(Group::Primary, 1 << 17));
    let ve = |o: &mut Offer| o.secondary |= secondary::EPT_VIOLATION_VE;
    assert_eq!(refused(ve), ConfigError::NotPossible(Group::Secondary, secondary::EPT_VIOLATION_VE));
    assert_eq!(refused(|o| o.exit |= 1 << 31), ConfigError::NotPossible(Group::Exit, 1 << 31));
    let smm = |o: &mut Offer| o.entry |= entry::ENTRY_TO_SMM;
    assert_eq!(refused(smm), ConfigError::NotPossible(Group::Entry, entry::ENTRY_TO_SMM));
    assert_eq!(refused(|o| o.ept_vpid |= 1 << 7), ConfigError::EptVpid(1 << 7));
    assert_eq!(refused(|o| o.vmfunc |= 2), ConfigError::VmFunctions);
    assert_eq!(refused(|o| o.vmfunc = 0), ConfigError::VmFunctions);
    assert_eq!(refused(|o| o.secondary &= !secondary::VM_FUNCTIONS), ConfigError::VmFunctions);
}

#[test]
fn a_control_without_what_it_needs() {
    use Group::{Exit, Pin, Primary, Secondary};
    let needs = |a, b| ConfigError::Needs(a, b);
    assert_eq!(refused(|o| o.pin &= !pin::NMI_EXITING), needs((Pin, pin::VIRTUAL_NMIS), (Pin, pin::NMI_EXITING)));
    assert_eq!(
        refused(|o| o.pin &= !pin::VIRTUAL_NMIS),
        needs((Primary, primary::NMI_WINDOW_EXITING), (Pin, pin::VIRTUAL_NMIS))
    );
    assert_eq!(
        refused(|o| o.primary &= !primary::SECONDARY_CONTROLS),
        needs((Secondary, u32::MAX), (Primary, primary::SECONDARY_CONTROLS))
    );
    assert_eq!(
        refused(|o| o.secondary &= !secondary::EPT),
        needs((Secondary, secondary::UNRESTRICTED_GUEST), (Secondary, secondary::EPT))
    );
    assert_eq!(
        refused(|o| o.pin &= !pin::EXTERNAL_INTERRUPT_EXITING),
        needs((Secondary, secondary::VIRTUAL_INTERRUPT_DELIVERY), (Pin, pin::EXTERNAL_INTERRUPT_EXITING))
    );
    assert_eq!(
        refused(|o| o.pin &= !pin::PREEMPTION_TIMER),
        needs((Exit, exit::SAVE_PREEMPTION_TIMER), (Pin, pin::PREEMPTION_TIMER))
    );
    for bit in [ept_vpid::WALK_4, ept_vpid::WB, ept_vpid::INVEPT, ept_vpid::INVVPID, ept_vpid::ACCESSED_DIRTY] {
        assert_eq!(refused(|o| o.ept_vpid &= !bit), ConfigError::NeedsEptVpid(bit));
    }
    // Without the control the bit is not missed.
    let no_pml = without(|o| {
        (o.secondary, o.ept_vpid) = (o.secondary & !secondary::PML, o.ept_vpid & !ept_vpid::ACCESSED_DIRTY);
    });
    assert_eq!(no_pml.ept_vpid() & ept_vpid::ACCESSED_DIRTY, 0);
}

#[test]
fn impossible_processors() {
    let error = |change: fn(&mut Host)| {
        let mut host = host();
        change(&mut host);
        Config::new(host, offer()).unwrap_err()
    };
    assert_eq!(error(|h| h.primary.allowed &= !primary::SECONDARY_CONTROLS), ConfigError::TooOld);
    assert_eq!(error(|h| h.primary.allowed &= !primary::MSR_BITMAPS), ConfigError::TooOld);
    assert_eq!(error(|h| h.secondary &= !secondary::EPT), ConfigError::NoEpt);
    assert_eq!(error(|h| h.ept_vpid &= !ept_vpid::WALK_4), ConfigError::NoEpt);
    assert_eq!(error(|h| h.ept_vpid &= !ept_vpid::WB), ConfigError::NoEpt);
    for bits in [31, 53] {
        let host = Host { phys_bits: bits, ..host() };
        assert_eq!(Config::new(host, offer()).unwrap_err(), ConfigError::AddressWidth);
    }
    assert_eq!(error(|h| h.linear_bits = 50), ConfigError::AddressWidth);
    assert_eq!(error(|h| h.cr4_fixed1 &= !(1 << 13)), ConfigError::NoVmxe);
    assert_eq!(error(|h| h.pin.required |= 1 << 8), ConfigError::Required(Group::Pin, 1 << 8));
    for (phys_bits, linear_bits) in [(32, 48), (52, 57)] {
        assert!(Config::new(Host { phys_bits, linear_bits, ..host() }, offer()).is_ok());
    }
    // A control that the processor requires is required of L1.
    let mut host = host();
    host.primary.required |= primary::CR3_LOAD_EXITING;
    assert_eq!(Config::new(host, offer()).unwrap().primary().required, 0x0400_E172);
}

#[test]
fn what_the_enlightened_vmcs_can_carry() {
    let c = Config::all(host(), true, true).unwrap();
    assert!(c.enlightened() && !config().enlightened());
    assert_eq!(c.pin().allowed, 0x16 | pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS);
    assert_eq!(c.exit().allowed & exit::SAVE_PREEMPTION_TIMER, 0);
    for absent in [
        secondary::VIRTUALIZE_APIC_ACCESSES,
        secondary::VIRTUAL_INTERRUPT_DELIVERY,
        secondary::PAUSE_LOOP_EXITING,
        secondary::VM_FUNCTIONS,
        secondary::PML,
    ] {
        assert_eq!(c.secondary().allowed & absent, 0, "{absent:#x}");
        let mut offer = Offer::all(&host(), true, true);
        offer.secondary |= absent;
        assert_eq!(Config::new(host(), offer).unwrap_err(), ConfigError::NotCarried(Group::Secondary, absent));
    }
    for present in [
        secondary::EPT,
        secondary::VPID,
        secondary::UNRESTRICTED_GUEST,
        secondary::TSC_SCALING,
        secondary::XSAVES,
        secondary::VIRTUALIZE_X2APIC_MODE,
    ] {
        assert_ne!(c.secondary().allowed & present, 0, "{present:#x}");
    }
    assert_eq!((c.read(0x491), c.misc() & 0x1FF << 16), (None, 0));
    assert_eq!(c.primary(), config().primary());
    // The IA32_PERF_GLOBAL_CTRL fields are there only when CPUID says so.
    let quiet = Config::all(host(), true, false).unwrap();
    assert_eq!(quiet.entry().allowed, c.entry().allowed & !entry::LOAD_PERF_GLOBAL_CTRL);
    assert_eq!(quiet.exit().allowed, c.exit().allowed & !exit::LOAD_PERF_GLOBAL_CTRL);
    assert_ne!(c.exit().allowed & exit::LOAD_PERF_GLOBAL_CTRL, 0);
}

#[test]
fn a_processor_from_its_msrs() {
    let true_msrs = |msr: u32| match msr {
        0x480 => 1 << 54 | 1 << 55,
        0x48D => host().pin.msr(),
        0x48E => host().primary.msr(),
        0x48F => host().exit.msr(),
        0x490 => host().entry.msr(),
        0x485 => host().misc,
        0x486 => host().cr0_fixed0,
        0x487 => host().cr0_fixed1,
        0x488 => host().cr4_fixed0,
        0x489 => host().cr4_fixed1,
        0x48B => u64::from(host().secondary) << 32,
        0x48C => host().ept_vpid,
        0x491 => 1,
        other => panic!("RDMSR of {other:#x} would fault or be of no use"),
    };
    let read = Host::from_msrs(46, 48, true_msrs);
    let expected = Host { rtm: false, perf_global_ctrl: 0, ..host() };
    assert_eq!(format!("{read:?}"), format!("{expected:?}"));
    // An old processor: no true MSRs, no secondary controls; nothing else is read.
    let old = Host::from_msrs(36, 48, |msr| match msr {
        0x481..=0x484 => 0x16 << 32 | 0x16,
        0x480 | 0x485..=0x489 => 0,
        other => panic!("RDMSR of {other:#x} faults"),
    });
    assert_eq!((old.pin, old.secondary), (Allowed { required: 0x16, allowed: 0x16 }, 0));
}

#[test]
fn small_rules() {
    let allowed = Allowed { required: 0b0011, allowed: 0b0111 };
    assert_eq!([0b0011, 0b0111, 0b0010, 0b1011].map(|v| allowed.permits(v)), [true, true, false, false]);
    assert_eq!(Allowed::from_msr(allowed.msr()), allowed);
    assert_eq!(Host::perf_global_ctrl_of(0x0730_0404, 0x603), 0x7_0000_000F);
    let c = config();
    assert!(c.canonical(0xFFFF_8000_0000_0000) && !c.canonical(0xFFFF_7FFF_FFFF_FFFF) && !c.canonical(1 << 47));
    assert!(c.canonical((1 << 47) - 1) && c.legal_gpa((1 << 46) - 1) && !c.legal_gpa(1 << 46));
    let wide = Config::new(Host { linear_bits: 57, ..host() }, offer()).unwrap();
    assert!(wide.canonical((1 << 56) - 1) && !wide.canonical(1 << 56) && wide.canonical(u64::MAX << 56));
    assert!(c.allows_cr0(0x20, true) && !c.allows_cr0(0x20, false) && !c.allows_cr0(1, true));
}
