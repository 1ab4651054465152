//! VMCS02: what comes from L1, what from the embedder, what from both.

use nvmx::bits::{cr0, cr4, efer};
use nvmx::caps::Config;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit};

use crate::rig::{End, Rig, host};

fn launch(rig: &mut Rig) {
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    rig.run();
}

fn has(rig: &Rig, field: Field, bit: u32) -> bool {
    rig.vmcs02.peek(field) & u64::from(bit) != 0
}

/// VMCS01's field with `bits` set.
fn own(rig: &mut Rig, field: Field, bits: u32) {
    let value = rig.vmcs01.peek(field) | u64::from(bits);
    rig.vmcs01.poke(field, value);
}

fn l1(rig: &mut Rig, field: Field, bits: u32) {
    let fields = rig.plus(field, bits.into());
    rig.set(&[fields]);
}

#[test]
fn controls_that_either_wants() {
    let (first, second) = (Field::PrimaryControls, Field::SecondaryControls);
    for (field, bit) in [
        (Field::PinBasedControls, pin::EXTERNAL_INTERRUPT_EXITING),
        (first, primary::HLT_EXITING),
        (first, primary::RDTSC_EXITING),
        (first, primary::MOV_DR_EXITING),
        (first, primary::CR8_LOAD_EXITING),
        (second, secondary::WBINVD_EXITING),
        (second, secondary::DESCRIPTOR_TABLE_EXITING),
        (second, secondary::RDRAND_EXITING),
        (second, secondary::RDSEED_EXITING),
        (second, secondary::PAUSE_LOOP_EXITING),
        (second, secondary::TSC_SCALING),
    ] {
        let clear = Rig::filled().nested.vmcs12().get(field) & !u64::from(bit);
        for (of_l1, of_embedder) in [(true, false), (false, true), (false, false)] {
            let mut rig = Rig::filled();
            rig.set(&[(field, clear), (Field::TscMultiplier, 1 << 48)]);
            if of_l1 {
                l1(&mut rig, field, bit);
            }
            if of_embedder {
                own(&mut rig, field, bit);
            }
            launch(&mut rig);
            assert_eq!(has(&rig, field, bit), of_l1 || of_embedder, "{field:?} {bit:#x}");
        }
    }
}

#[test]
fn controls_that_l1_alone_decides() {
    let second = Field::SecondaryControls;
    for bit in [secondary::UNRESTRICTED_GUEST, secondary::RDTSCP, secondary::INVPCID, secondary::XSAVES] {
        for of_l1 in [true, false] {
            let mut rig = Rig::filled();
            own(&mut rig, second, bit);
            if of_l1 {
                l1(&mut rig, second, bit);
            }
            launch(&mut rig);
            assert_eq!(has(&rig, second, bit), of_l1, "{bit:#x}");
        }
    }
}

#[test]
fn windows_of_the_embedder_are_none_of_l2s() {
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING);
    launch(&mut rig);
    assert!(!has(&rig, Field::PrimaryControls, primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING));
}

#[test]
fn nmis_are_virtual_once_they_exit() {
    let mut rig = Rig::running(&[]);
    assert!(has(&rig, Field::PinBasedControls, pin::NMI_EXITING));
    assert!(has(&rig, Field::PinBasedControls, pin::VIRTUAL_NMIS));
    rig = Rig::filled();
    rig.vmcs01.poke(Field::PinBasedControls, 0x16);
    launch(&mut rig);
    assert!(!has(&rig, Field::PinBasedControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS));
}

#[test]
fn acknowledging_interrupts() {
    let interrupts = pin::EXTERNAL_INTERRUPT_EXITING;
    for (owner, of_l1, of_embedder, expected) in
        [(false, true, false, true), (false, false, true, false), (true, true, false, false), (true, false, true, true)]
    {
        let mut rig = Rig::filled();
        l1(&mut rig, Field::PinBasedControls, interrupts);
        if owner {
            own(&mut rig, Field::PinBasedControls, interrupts);
        }
        if of_l1 {
            l1(&mut rig, Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT);
        }
        if of_embedder {
            own(&mut rig, Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT);
        }
        launch(&mut rig);
        assert_eq!(has(&rig, Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT), expected, "{owner} {of_l1}");
    }
}

#[test]
fn the_exit_saves_what_l0_needs() {
    let rig = Rig::running(&[]);
    for bit in [exit::SAVE_DEBUG_CONTROLS, exit::SAVE_EFER, exit::SAVE_PAT, exit::HOST_ADDRESS_SPACE_SIZE] {
        assert!(has(&rig, Field::ExitControls, bit), "{bit:#x}");
    }
    assert!(has(&rig, Field::EntryControls, entry::LOAD_DEBUG_CONTROLS | entry::IA32E_MODE_GUEST));
    assert_eq!(rig.vmcs02.peek(Field::VmcsLinkPointer), u64::MAX);
}

#[test]
fn time_is_added_and_multiplied() {
    const HALF: u64 = 1 << 47;
    let offset = -1000i64 as u64;
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::TSC_OFFSETTING);
    rig.vmcs01.poke(Field::TscOffset, offset);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::TscOffset), offset);
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::TSC_OFFSETTING);
    rig.vmcs01.poke(Field::TscOffset, offset);
    l1(&mut rig, Field::PrimaryControls, primary::TSC_OFFSETTING);
    rig.set(&[(Field::TscOffset, 30)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::TscOffset), -970i64 as u64);
    // Scaled by both.
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::TSC_OFFSETTING);
    own(&mut rig, Field::SecondaryControls, secondary::TSC_SCALING);
    rig.vmcs01.poke(Field::TscOffset, offset);
    rig.vmcs01.poke(Field::TscMultiplier, 3 << 48);
    l1(&mut rig, Field::PrimaryControls, primary::TSC_OFFSETTING);
    l1(&mut rig, Field::SecondaryControls, secondary::TSC_SCALING);
    rig.set(&[(Field::TscOffset, 30), (Field::TscMultiplier, HALF)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::TscOffset), -470i64 as u64);
    assert_eq!(rig.vmcs02.peek(Field::TscMultiplier), 3 << 47);
}

#[test]
fn efer_pat_and_debug_registers_that_l1_does_not_load_are_l1s() {
    let mut rig = Rig::filled();
    let without = rig.nested.vmcs12().get(Field::EntryControls)
        & !u64::from(entry::LOAD_EFER | entry::LOAD_PAT | entry::LOAD_DEBUG_CONTROLS);
    rig.set(&[(Field::EntryControls, without), (Field::GuestEfer, 0), (Field::GuestDr7, 0x455)]);
    for (field, value) in [
        (Field::GuestEfer, 0xD01),
        (Field::GuestPat, 0x0606_0606_0606_0606),
        (Field::GuestDr7, 0x701),
        (Field::GuestDebugctl, 2),
    ] {
        rig.vmcs01.poke(field, value);
    }
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::GuestEfer), 0xD01);
    assert_eq!(rig.vmcs02.peek(Field::GuestPat), 0x0606_0606_0606_0606);
    assert_eq!(rig.vmcs02.peek(Field::GuestDr7), 0x701);
    assert_eq!(rig.vmcs02.peek(Field::GuestDebugctl), 2);
    // With the controls they are VMCS12's.
    let mut rig = Rig::filled();
    l1(&mut rig, Field::EntryControls, entry::LOAD_PAT | entry::LOAD_DEBUG_CONTROLS);
    rig.set(&[(Field::GuestPat, 0x0101_0101_0101_0101), (Field::GuestDr7, 0x455), (Field::GuestDebugctl, 1)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::GuestPat), 0x0101_0101_0101_0101);
    assert_eq!(rig.vmcs02.peek(Field::GuestDr7), 0x455);
    assert_eq!(rig.vmcs02.peek(Field::GuestDebugctl), 1);
}

#[test]
fn efer_follows_the_mode_of_l2() {
    // A 32-bit L2 without "load IA32_EFER": LMA goes, LME with paging on.
    for (guest_cr0, expected) in [(0x8000_0031, 0x801), (0x21, 0x901)] {
        let mut rig = Rig::filled();
        l1(&mut rig, Field::SecondaryControls, secondary::UNRESTRICTED_GUEST);
        let entries =
            rig.nested.vmcs12().get(Field::EntryControls) & !u64::from(entry::LOAD_EFER | entry::IA32E_MODE_GUEST);
        rig.set(&[
            (Field::EntryControls, entries),
            (Field::GuestCr0, guest_cr0),
            (Field::GuestCr4, cr4::VMXE),
            (Field::GuestCsAccessRights, 0xC09B),
        ]);
        rig.vmcs01.poke(Field::GuestEfer, 0xD01);
        launch(&mut rig);
        assert_eq!(rig.vmcs02.peek(Field::GuestEfer), expected, "CR0 {guest_cr0:#x}");
        assert!(!has(&rig, Field::EntryControls, entry::IA32E_MODE_GUEST));
    }
}

#[test]
fn pdptes_come_from_the_vmcs_with_ept_and_from_memory_without() {
    for with_ept in [true, false] {
        let mut rig = Rig::filled();
        let entries =
            rig.nested.vmcs12().get(Field::EntryControls) & !u64::from(entry::LOAD_EFER | entry::IA32E_MODE_GUEST);
        rig.set(&[
            (Field::EntryControls, entries),
            (Field::GuestCr4, cr4::PAE | cr4::VMXE),
            (Field::GuestCsAccessRights, 0xC09B),
            (Field::GuestPdpte0, 0x1001),
            (Field::GuestPdpte3, 0x4001),
        ]);
        if !with_ept {
            let controls = rig.nested.vmcs12().get(Field::SecondaryControls) & !u64::from(secondary::EPT);
            rig.set(&[(Field::SecondaryControls, controls)]);
        }
        rig.write(0x7_0000, &0xA001u64.to_le_bytes());
        rig.write(0x7_0018, &0xD001u64.to_le_bytes());
        launch(&mut rig);
        let expected = if with_ept { (0x1001, 0x4001) } else { (0xA001, 0xD001) };
        assert_eq!((rig.vmcs02.peek(Field::GuestPdpte0), rig.vmcs02.peek(Field::GuestPdpte3)), expected);
        // L2's own are told only where L1 has a use for them.
        rig.vmcs02.poke(Field::GuestPdpte0, 0x9001);
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        assert_eq!(rig.told(Field::GuestPdpte0), if with_ept { 0x9001 } else { 0x1001 });
    }
}

#[test]
fn the_tpr_shadow_and_the_embedders() {
    let shadow = primary::TPR_SHADOW;
    let cr8 = primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING;
    // L1 has one: the embedder's wish to see CR8 does not concern L2.
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, cr8);
    l1(&mut rig, Field::PrimaryControls, shadow);
    rig.set(&[(Field::TprThreshold, 0), (Field::VirtualApicAddress, 0x3000)]);
    launch(&mut rig);
    assert!(has(&rig, Field::PrimaryControls, shadow) && !has(&rig, Field::PrimaryControls, cr8));
    // A threshold that L1 changes without telling more.
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    rig.write(0x3080, &[0xF0]);
    rig.set(&[(Field::TprThreshold, 5)]);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::TprThreshold), 5);
    // The embedder has one for L1, and L2's CR8 is L1's.
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, shadow);
    rig.vmcs01.poke(Field::VirtualApicAddress, 0x77_0000);
    rig.vmcs01.poke(Field::TprThreshold, 3);
    launch(&mut rig);
    assert!(has(&rig, Field::PrimaryControls, shadow));
    assert_eq!(rig.vmcs02.peek(Field::VirtualApicAddress), 0x77_0000);
    assert_eq!(rig.vmcs02.peek(Field::TprThreshold), 3);
}

#[test]
fn equal_writes_are_skipped_and_changes_are_not() {
    let mut rig = Rig::running(&[]);
    for (field, value, written) in [
        (Field::GuestRflags, 2, false),
        (Field::GuestRflags, 0x202, true),
        (Field::ExceptionBitmap, 0, false),
        (Field::ExceptionBitmap, 1 << 6, true),
        (Field::GuestFsBase, 0x5000, true),
        (Field::Cr4ReadShadow, cr4::VMXE, true),
        (Field::GuestSysenterEip, 0x6000, true),
    ] {
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        rig.set(&[(field, value)]);
        rig.spent();
        assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
        rig.run();
        let spent = rig.spent();
        assert_eq!(spent.writes[1].contains(&field), written, "{field:?}: {:?}", spent.writes[1]);
        if field != Field::Cr4ReadShadow {
            assert_eq!(rig.vmcs02.peek(field), value, "{field:?}");
        }
    }
}

#[test]
fn a_field_is_read_when_l1_asks_and_kept_when_it_does_not() {
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::GuestFsBase, 0x1111);
    rig.vmcs02.poke(Field::GuestGsBase, 0x2222);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert!(!rig.spent().reads[1].contains(&Field::GuestFsBase));
    assert_eq!(rig.told(Field::GuestFsBase), 0x1111);
    assert!(rig.spent().reads[1].contains(&Field::GuestFsBase));
    // Written without having been read: the others of its group stay L2's.
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
    rig.vmcs02.poke(Field::GuestGsBase, 0x3333);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    rig.set(&[(Field::GuestFsBase, 0x4444)]);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::GuestFsBase), 0x4444);
    assert_eq!(rig.vmcs02.peek(Field::GuestGsBase), 0x3333);
    // Half of a field keeps the other half.
    rig.run();
    rig.vmcs02.poke(Field::GuestPat, 0x0007_0406_0007_0406);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
}

#[test]
fn vmclear_finds_everything() {
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::GuestGsBase, 0x2222);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.vmclear(crate::rig::VMCS12), End::Succeed);
    assert_eq!(rig.stored(crate::rig::VMCS12).get(Field::GuestGsBase), 0x2222);
}

#[test]
fn a_saved_field_survives_what_vmcs02_gets_instead() {
    // L1 has DR7 saved but not loaded: VMCS02 gets L1's own DR7 at the next entry, VMCS12 keeps L2's.
    let mut rig = Rig::filled();
    l1(&mut rig, Field::ExitControls, exit::SAVE_DEBUG_CONTROLS);
    let entries = rig.nested.vmcs12().get(Field::EntryControls) & !u64::from(entry::LOAD_DEBUG_CONTROLS);
    rig.set(&[(Field::EntryControls, entries)]);
    launch(&mut rig);
    rig.vmcs02.poke(Field::GuestDr7, 0x455);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::GuestDr7), 0x400);
    assert_eq!(rig.nested.vmcs12().get(Field::GuestDr7), 0x455);
}

#[test]
fn the_embedders_controls_are_read_once() {
    let mut rig = Rig::running(&[]);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    own(&mut rig, Field::PrimaryControls, primary::RDTSC_EXITING);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert!(!has(&rig, Field::PrimaryControls, primary::RDTSC_EXITING));
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    rig.nested.own_controls_changed();
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert!(has(&rig, Field::PrimaryControls, primary::RDTSC_EXITING));
}

#[test]
fn a_context_of_another_name_gets_fresh_tags() {
    let mut rig = Rig::filled();
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    let first = rig.run();
    assert_eq!(rig.vmcs02.peek(Field::VirtualProcessorId), first.vpid.into());
    let again = |rig: &mut Rig, fields: &[(Field, u64)]| {
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        rig.run();
        rig.set(fields);
        assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
        rig.run().flush
    };
    use nvmx::vpid::Flush;
    assert_eq!(again(&mut rig, &[]), Flush::None);
    assert_eq!(again(&mut rig, &[(Field::VirtualProcessorId, 8)]), Flush::Single);
    assert_eq!(again(&mut rig, &[(Field::EptPointer, 0x8_0000 | 0x1E)]), Flush::Single);
    assert_eq!(again(&mut rig, &[]), Flush::None);
    // Without VPIDs of its own L1 expects both ways to flush.
    let controls = rig.nested.vmcs12().get(Field::SecondaryControls) & !u64::from(secondary::VPID);
    assert_eq!(again(&mut rig, &[(Field::SecondaryControls, controls)]), Flush::Single);
    assert_eq!(again(&mut rig, &[]), Flush::Single);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.run().flush, Flush::Single, "L1's");
}

#[test]
fn an_unrestricted_l2_in_real_mode() {
    let mut rig = Rig::filled_with(Config::all(host(), false, false).unwrap());
    l1(&mut rig, Field::SecondaryControls, secondary::UNRESTRICTED_GUEST);
    let entries =
        rig.nested.vmcs12().get(Field::EntryControls) & !u64::from(entry::LOAD_EFER | entry::IA32E_MODE_GUEST);
    rig.set(&[
        (Field::EntryControls, entries),
        (Field::GuestCr0, cr0::NE | cr0::ET),
        (Field::GuestCr4, cr4::VMXE),
        (Field::GuestCsAccessRights, 0x9B),
        (Field::GuestCsLimit, 0xFFFF),
        (Field::GuestCsBase, 0x80),
    ]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::GuestCr0) & (cr0::PE | cr0::PG), 0);
    // It switches to long mode by itself; the exit tells L1 so.
    rig.vmcs02.poke(Field::GuestCr0, 0x8000_0031);
    rig.vmcs02.poke(Field::GuestEfer, efer::LME | efer::LMA);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_ne!(rig.told(Field::EntryControls) & u64::from(entry::IA32E_MODE_GUEST), 0);
    assert_eq!(rig.told(Field::GuestEfer), efer::LME | efer::LMA);
}

#[test]
fn fields_that_go_with_a_control() {
    // Pause loops: L1's parameters if it has the control, else the embedder's.
    for (of_l1, expected) in [(true, (40, 4000)), (false, (7, 70))] {
        let mut rig = Rig::filled();
        own(&mut rig, Field::SecondaryControls, secondary::PAUSE_LOOP_EXITING);
        rig.vmcs01.poke(Field::PleGap, 7);
        rig.vmcs01.poke(Field::PleWindow, 70);
        rig.set(&[(Field::PleGap, 40), (Field::PleWindow, 4000)]);
        if of_l1 {
            l1(&mut rig, Field::SecondaryControls, secondary::PAUSE_LOOP_EXITING);
        }
        launch(&mut rig);
        assert_eq!((rig.vmcs02.peek(Field::PleGap), rig.vmcs02.peek(Field::PleWindow)), expected);
    }
    let mut rig = Rig::filled();
    own(&mut rig, Field::SecondaryControls, secondary::XSAVES);
    rig.vmcs01.poke(Field::XssExitingBitmap, 1 << 8);
    l1(&mut rig, Field::SecondaryControls, secondary::XSAVES);
    rig.set(&[(Field::XssExitingBitmap, 1 << 11)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::XssExitingBitmap), 1 << 8 | 1 << 11);
    // And whose an XSAVES is then depends on the components that it names.
    rig.regs.gprs[0] = 1 << 8;
    assert_eq!(rig.l2(r::XSAVES), L2Exit::Embedder { reason: r::XSAVES });
    rig.regs.gprs[0] = 1 << 11;
    assert_eq!(rig.l2(r::XSAVES), L2Exit::ToL1);
}

#[test]
fn registers_that_go_with_a_control() {
    let mut host = host();
    host.perf_global_ctrl = 0xF;
    let mut rig = Rig::filled_with(Config::all(host, false, false).unwrap());
    l1(&mut rig, Field::EntryControls, entry::LOAD_PERF_GLOBAL_CTRL | entry::LOAD_BNDCFGS);
    rig.set(&[(Field::GuestPerfGlobalCtrl, 3), (Field::GuestBndcfgs, 1)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::GuestPerfGlobalCtrl), 3);
    assert_eq!(rig.vmcs02.peek(Field::GuestBndcfgs), 1);
    rig.vmcs02.poke(Field::GuestPerfGlobalCtrl, 7);
    rig.vmcs02.poke(Field::GuestBndcfgs, 0x1001);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestPerfGlobalCtrl), 3, "exits do not save it");
    assert_eq!(rig.told(Field::GuestBndcfgs), 0x1001);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::GuestPerfGlobalCtrl), 3, "loaded anew");
}

#[test]
fn virtual_interrupts() {
    let mut rig = Rig::filled();
    l1(&mut rig, Field::PinBasedControls, pin::EXTERNAL_INTERRUPT_EXITING);
    l1(&mut rig, Field::PrimaryControls, primary::TPR_SHADOW);
    l1(&mut rig, Field::SecondaryControls, secondary::VIRTUAL_INTERRUPT_DELIVERY);
    rig.set(&[(Field::EoiExitBitmap0, 1), (Field::EoiExitBitmap3, 8), (Field::GuestInterruptStatus, 0x3031)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::EoiExitBitmap0), 1);
    assert_eq!(rig.vmcs02.peek(Field::EoiExitBitmap3), 8);
    assert_eq!(rig.vmcs02.peek(Field::GuestInterruptStatus), 0x3031);
    rig.vmcs02.poke(Field::GuestInterruptStatus, 0x4041);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestInterruptStatus), 0x4041);
    rig.set(&[(Field::GuestInterruptStatus, 0x5051)]);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::GuestInterruptStatus), 0x5051);
}

#[test]
fn apic_pages_are_the_embedders_to_translate() {
    let mut rig = Rig::running(&[]);
    assert_eq!((rig.nested.virtual_apic_page(), rig.nested.apic_access_page()), (None, None));
    rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::TPR_SHADOW);
    own(&mut rig, Field::SecondaryControls, secondary::VIRTUALIZE_APIC_ACCESSES);
    rig.vmcs01.poke(Field::VirtualApicAddress, 0x77_0000);
    rig.vmcs01.poke(Field::ApicAccessAddress, 0x78_0000);
    let without =
        [Field::PrimaryControls, Field::SecondaryControls].map(|field| (field, rig.nested.vmcs12().get(field)));
    launch(&mut rig);
    let addresses =
        |rig: &Rig| [Field::VirtualApicAddress, Field::ApicAccessAddress].map(|field| rig.vmcs02.peek(field));
    assert_eq!(addresses(&rig), [0x77_0000, 0x78_0000]);
    // With pages of L1's the embedder writes other addresses; without them again its own are back.
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    l1(&mut rig, Field::PrimaryControls, primary::TPR_SHADOW);
    l1(&mut rig, Field::SecondaryControls, secondary::VIRTUALIZE_APIC_ACCESSES);
    rig.set(&[(Field::VirtualApicAddress, 0x3000), (Field::ApicAccessAddress, 0x4000)]);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    let pages = [rig.nested.virtual_apic_page(), rig.nested.apic_access_page()];
    assert_eq!(pages.map(|page| page.unwrap().raw()), [0x3000, 0x4000]);
    rig.vmcs02.poke(Field::VirtualApicAddress, 0x99_0000);
    rig.vmcs02.poke(Field::ApicAccessAddress, 0x9A_0000);
    rig.run();
    assert_eq!(addresses(&rig), [0x99_0000, 0x9A_0000]);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    rig.set(&without);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(addresses(&rig), [0x77_0000, 0x78_0000]);
}

#[test]
fn the_embedders_io_bitmaps_serve_an_l2_whose_ports_l1_leaves_alone() {
    let mut rig = Rig::filled();
    own(&mut rig, Field::PrimaryControls, primary::IO_BITMAPS);
    rig.vmcs01.poke(Field::IoBitmapA, 0x55_0000);
    rig.vmcs01.poke(Field::IoBitmapB, 0x56_0000);
    launch(&mut rig);
    assert!(has(&rig, Field::PrimaryControls, primary::IO_BITMAPS));
    assert_eq!(rig.vmcs02.peek(Field::IoBitmapA), 0x55_0000);
    assert_eq!(rig.vmcs02.peek(Field::IoBitmapB), 0x56_0000);
}
