//! Saving, destroying and restoring a VP, and hostile states.

use hvcore::addr::Level;
use nvmx::caps::Config;
use nvmx::check::Refusal;
use nvmx::field::Field;
use nvmx::save::{RestoreError, SavedEvent, SavedState, flag};
use nvmx::{L1Exit, L2Exit, NestedVmx, exit_reason};
use zerocopy::{FromZeros, IntoBytes};

use crate::rig::{End, Rig, VMCS12, VMXON, host};

fn save(rig: &mut Rig) -> SavedState {
    rig.call(|nested, m| nested.save(m))
}

fn restore(rig: &mut Rig, saved: &SavedState) -> Result<(), RestoreError> {
    let config = *rig.nested.config();
    let restored = rig.call(|_, m| NestedVmx::restore(config, saved, m))?;
    rig.nested = restored;
    Ok(())
}

/// Another machine with the same memory: its VMCS01 is as after power-up, its VMCS02 is full of rubbish.
fn moved(from: &mut Rig, saved: &SavedState) -> Rig {
    let mut rig = Rig::with(*from.nested.config());
    std::mem::swap(&mut rig.memory.words, &mut from.memory.words);
    (rig.regs, rig.assist_page) = (from.regs.clone(), from.assist_page);
    for field in Field::ALL {
        rig.vmcs02.poke(*field, 0xA5A5_A5A5_A5A5_A5A5);
    }
    for field in nvmx::save::GUEST {
        rig.vmcs01.poke(field, 0x5A5A);
    }
    // What the embedder sets up: its masks and what it needs in them.
    rig.vmcs01.poke(Field::GuestCr4, 0x2000);
    restore(&mut rig, saved).unwrap();
    rig
}

#[test]
fn a_vp_outside_vmx_operation() {
    let mut rig = Rig::new();
    rig.nested.set_feature_control(1);
    rig.vmcs01.poke(Field::GuestRsp, 0x1234);
    let saved = save(&mut rig);
    assert_eq!(saved.flags, 0);
    let mut rig = moved(&mut rig, &saved);
    assert_eq!(rig.nested.feature_control(), 1);
    assert_eq!(rig.vmcs01.peek(Field::GuestRsp), 0x1234);
    assert_eq!(save(&mut rig), saved);
}

#[test]
fn a_vp_with_a_current_vmcs() {
    let mut rig = Rig::filled();
    let saved = save(&mut rig);
    assert_eq!(saved.flags, flag::VMXON | flag::CURRENT);
    let mut rig = moved(&mut rig, &saved);
    assert_eq!(rig.vmptrst(), (End::Succeed, VMCS12));
    assert_eq!(rig.vmread(Field::HostRip.encoding()), (End::Succeed, 0xB000));
    assert_eq!(rig.end(exit_reason::VMRESUME), End::FailValid(5), "it is not launched");
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
}

#[test]
fn a_vp_that_runs_l2() {
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::GuestRip, 0x9123);
    rig.vmcs02.poke(Field::GuestRsp, 0xA123);
    rig.vmcs02.poke(Field::GuestCr3, 0x7_2000);
    rig.vmcs02.poke(Field::GuestDr7, 0x401);
    rig.vmcs02.poke(Field::GuestFsBase, 0x1111_2222);
    assert_eq!(rig.l2(exit_reason::MWAIT), L2Exit::Embedder { reason: exit_reason::MWAIT });
    let saved = save(&mut rig);
    assert_eq!(saved.flags, flag::VMXON | flag::CURRENT | flag::IN_L2);
    let before = rig.vmcs02.fields;
    let mut rig = moved(&mut rig, &saved);
    assert_eq!(rig.nested.level(), Level::L2);
    let context = *rig.nested.context();
    assert_eq!((context.vpid, context.eptp), (7, Some(0x6_0000 | 3 << 3 | 6)));
    assert_eq!(save(&mut rig), saved);
    rig.vmcs02.poke(Field::EptPointer, before[Field::EptPointer.slot()]);
    let plan = rig.run();
    assert_eq!(plan.level, Level::L2);
    assert_eq!(plan.flush, nvmx::vpid::Flush::All, "a fresh tag");
    // VMCS02 is what it was, but for the tag, what only exits write, and fields that no control of it uses.
    let unused = [Field::VirtualProcessorId, Field::PreemptionTimer, Field::PmlIndex, Field::GuestSmbase];
    for field in nvmx::save::GUEST.into_iter().chain([
        Field::PinBasedControls,
        Field::PrimaryControls,
        Field::SecondaryControls,
        Field::ExitControls,
        Field::EntryControls,
        Field::ExceptionBitmap,
        Field::Cr0Mask,
        Field::Cr4Mask,
        Field::Cr0ReadShadow,
        Field::Cr4ReadShadow,
        Field::MsrBitmap,
    ]) {
        if !unused.contains(&field) {
            assert_eq!(rig.vmcs02.peek(field), before[field.slot()], "{field:?}");
        }
    }
    assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
    assert_eq!(rig.vmcs01.peek(Field::GuestRip), 0xB000);
    for (field, value) in [
        (Field::GuestRip, 0x9123),
        (Field::GuestRsp, 0xA123),
        (Field::GuestCr3, 0x7_2000),
        (Field::GuestFsBase, 0x1111_2222),
        (Field::ExitReason, exit_reason::CPUID.into()),
    ] {
        assert_eq!(rig.told(field), value, "{field:?}");
    }
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2);
}

#[test]
fn l2_in_another_mode_than_it_was_entered_in() {
    let mut rig = Rig::running(&[]);
    // L2 left long mode; the processor keeps the entry control up to date.
    rig.vmcs02.poke(Field::GuestEfer, 0);
    rig.vmcs02.poke(Field::GuestCr0, 0x31);
    rig.vmcs02.poke(Field::GuestCr4, 0x2000);
    rig.vmcs02.poke(Field::GuestCsAccessRights, 0xC09B);
    let entries = rig.vmcs02.peek(Field::EntryControls) & !(1 << 9);
    rig.vmcs02.poke(Field::EntryControls, entries);
    assert_eq!(rig.l2(exit_reason::MWAIT), L2Exit::Embedder { reason: exit_reason::MWAIT });
    let saved = save(&mut rig);
    // L1 did not ask for an unrestricted guest, so such an L2 cannot be.
    assert!(matches!(restore(&mut Rig::new(), &saved), Err(RestoreError::L2(Refusal::Guest(_)))));
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::GuestCsAccessRights, 0xC09B);
    rig.vmcs02.poke(Field::GuestEfer, 0);
    rig.vmcs02.poke(Field::GuestCr4, 0x2000);
    assert_eq!(rig.l2(exit_reason::MWAIT), L2Exit::Embedder { reason: exit_reason::MWAIT });
    let saved = save(&mut rig);
    let mut rig = moved(&mut rig, &saved);
    assert_eq!(rig.vmcs02.peek(Field::EntryControls) >> 9 & 1, 0);
    rig.run();
}

#[test]
fn an_event_on_its_way_into_l2() {
    const INFO: u64 = 1 << 31 | 3 << 8 | 1 << 11 | 13;
    let mut rig = Rig::launched(&[(Field::EntryInterruptionInfo, INFO), (Field::EntryExceptionErrorCode, 0x18)]);
    let saved = save(&mut rig);
    assert_eq!(saved.flags, flag::VMXON | flag::CURRENT | flag::IN_L2 | flag::RUN_PENDING | flag::LAUNCHING);
    assert_eq!(saved.event2, SavedEvent { info: INFO as u32, error_code: 0x18, length: 0 });
    let mut rig = moved(&mut rig, &saved);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), INFO);
    assert_eq!(rig.vmcs02.peek(Field::EntryExceptionErrorCode), 0x18);
}

#[test]
fn an_event_on_its_way_into_l1() {
    let mut rig = Rig::ready();
    assert_eq!(rig.end(exit_reason::VMFUNC), crate::rig::UD);
    let saved = save(&mut rig);
    assert_eq!(saved.event1.info, 1 << 31 | 3 << 8 | 6);
    let rig = moved(&mut rig, &saved);
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), 1 << 31 | 3 << 8 | 6);
}

#[test]
fn pending_events() {
    let mut rig = Rig::ready();
    rig.nested.pend_nmi();
    rig.nested.pend_init();
    rig.nested.pend_sipi(0x9A);
    rig.nested.pend_interrupt(Some(0x31));
    let saved = save(&mut rig);
    assert_eq!(saved.flags, flag::VMXON | flag::NMI | flag::INIT | flag::SIPI | flag::INTERRUPT);
    assert_eq!(saved.vectors, 0x319A);
    let mut rig = moved(&mut rig, &saved);
    assert_eq!(rig.nested.pending_interrupt(), Some(0x31));
    assert_eq!(save(&mut rig), saved);
}

#[test]
fn the_preemption_timer() {
    let timer = 1 << 6;
    let mut rig = Rig::loaded();
    rig.vmwrite_valid();
    let pins = rig.plus(Field::PinBasedControls, timer);
    rig.set(&[pins, (Field::PreemptionTimer, 1000)]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    rig.vmcs02.poke(Field::PreemptionTimer, 400);
    assert_eq!(rig.l2(exit_reason::MWAIT), L2Exit::Embedder { reason: exit_reason::MWAIT });
    let saved = save(&mut rig);
    assert_eq!((saved.flags & flag::TIMER, saved.timer), (flag::TIMER, 400));
    let mut rig = moved(&mut rig, &saved);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 400);
}

/// What a hostile or broken file could hold, and the error; each from a good state by one change.
#[test]
fn restoring_checks_everything() {
    type Spoil = fn(&mut SavedState);
    let cases: &[(&str, Spoil, RestoreError)] = &[
        ("version", |s| s.version = 2, RestoreError::Version),
        ("an undefined flag", |s| s.flags |= 1 << 12, RestoreError::Flags),
        ("a launch that is not pending", |s| s.flags &= !flag::RUN_PENDING, RestoreError::Flags),
        ("both kinds of VMCS", |s| s.flags |= flag::ENLIGHTENED, RestoreError::Flags),
        ("a VMCS outside VMX operation", |s| (s.flags, s.vmxon) = (flag::CURRENT, 0), RestoreError::Flags),
        ("L2 without a VMCS", |s| (s.flags, s.current) = (flag::VMXON | flag::IN_L2, 0), RestoreError::Flags),
        ("an address without a VMCS", |s| s.flags = flag::VMXON, RestoreError::Flags),
        ("L2's event while L1 runs", |s| s.flags &= !flag::IN_L2, RestoreError::Flags),
        ("identity without an enlightened VMCS", |s| s.vm_id = 1, RestoreError::Flags),
        ("a vector without its flag", |s| s.vectors = 1, RestoreError::Flags),
        ("another vector without its flag", |s| s.vectors = 1 << 8, RestoreError::Flags),
        ("more vectors", |s| s.vectors = 1 << 16, RestoreError::Flags),
        ("a timer that is off", |s| s.timer = 1, RestoreError::Flags),
        ("VMX operation without permission", |s| s.feature_control = 1, RestoreError::FeatureControl),
        ("a bit of IA32_FEATURE_CONTROL", |s| s.feature_control |= 2, RestoreError::FeatureControl),
        ("VMXON pointer not aligned", |s| s.vmxon += 8, RestoreError::VmxonPointer),
        ("VMXON pointer too wide", |s| s.vmxon = 1 << 40, RestoreError::VmxonPointer),
        ("VMCS not aligned", |s| s.current += 8, RestoreError::CurrentPointer),
        ("VMCS too wide", |s| s.current = 1 << 40, RestoreError::CurrentPointer),
        ("VMCS is the VMXON region", |s| s.current = s.vmxon, RestoreError::CurrentPointer),
        ("an enlightened VMCS", |s| s.flags = s.flags & !flag::CURRENT | flag::ENLIGHTENED, RestoreError::Enlightened),
        ("revision", |s| s.vmcs12.revision ^= 1, RestoreError::Vmcs12),
        ("L1's event", |s| s.event1.info = 1 << 31 | 1 << 8, RestoreError::Event),
        ("L2's event", |s| s.event2.info = 1 << 31 | 1 << 8, RestoreError::Event),
    ];
    let mut good = Rig::launched(&[(Field::EntryInterruptionInfo, 1 << 31 | 3 << 8 | 6)]);
    let saved = save(&mut good);
    assert_ne!(saved.event2, SavedEvent::default());
    for (what, spoil, error) in cases {
        let mut bad = saved.clone();
        spoil(&mut bad);
        let mut rig = Rig::new();
        let (one, two) = (rig.vmcs01.fields, rig.vmcs02.fields);
        assert_eq!(restore(&mut rig, &bad), Err(*error), "{what}");
        assert!(rig.vmcs01.fields == one && rig.vmcs02.fields == two, "{what}: nothing was touched");
    }
    assert_eq!(restore(&mut Rig::new(), &saved), Ok(()));
}

#[test]
fn registers_are_checked() {
    let mut good = Rig::running(&[]);
    assert_eq!(good.l2(exit_reason::MWAIT), L2Exit::Embedder { reason: exit_reason::MWAIT });
    let saved = save(&mut good);
    assert_eq!(restore(&mut Rig::new(), &saved), Ok(()));
    let slot = |field| nvmx::save::GUEST.iter().position(|each| *each == field).unwrap();
    for (field, bad) in [
        (Field::GuestRflags, 0),
        (Field::GuestCr0, 0x8000_0030),
        (Field::GuestCr4, 1 << 63),
        (Field::GuestCr3, 1 << 60),
        (Field::GuestRip, 1 << 63),
        (Field::GuestTrAccessRights, 0),
        (Field::GuestActivity, 9),
        (Field::GuestInterruptibility, 3),
        (Field::GuestEfer, 1 << 20),
    ] {
        let mut l1 = saved.clone();
        l1.l1.guest[slot(field)] = bad;
        assert!(matches!(restore(&mut Rig::new(), &l1), Err(RestoreError::L1(_))), "{field:?}");
        let mut l2 = saved.clone();
        l2.l2.guest[slot(field)] = bad;
        assert!(matches!(restore(&mut Rig::new(), &l2), Err(RestoreError::L2(Refusal::Guest(_)))), "{field:?}");
    }
    for (field, bad) in [(Field::PinBasedControls, 0), (Field::EptPointer, 0)] {
        let mut state = saved.clone();
        state.vmcs12.set(field, bad);
        assert!(matches!(restore(&mut Rig::new(), &state), Err(RestoreError::L2(Refusal::Controls(_)))));
    }
    let mut state = saved.clone();
    state.vmcs12.set(Field::HostCr3, u64::MAX);
    assert!(matches!(restore(&mut Rig::new(), &state), Err(RestoreError::L2(Refusal::Host(_)))));
}

/// No pattern of bytes is accepted that is not a state, and none makes the library panic.
#[test]
fn rubbish_is_refused() {
    let mut good = Rig::running(&[]);
    let saved = save(&mut good);
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut state = saved.clone();
        for _ in 0..1 + next() % 3 {
            let at = next() as usize % size_of::<SavedState>();
            state.as_mut_bytes()[at] ^= 1 << (next() % 8);
        }
        let mut rig = Rig::new();
        match restore(&mut rig, &state) {
            Ok(()) => {
                accepted += 1;
                rig.call(|nested, m| nested.prepare_entry(m));
            }
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 100 && refused > 100, "{accepted} {refused}");
    let zero = SavedState::new_zeroed();
    assert_eq!(restore(&mut Rig::new(), &zero), Err(RestoreError::Version));
}

#[test]
fn an_enlightened_vmcs_comes_with_its_identity() {
    let mut rig = crate::evmcs::entered(77, 5);
    let saved = save(&mut rig);
    assert_eq!(saved.flags & (flag::ENLIGHTENED | flag::CURRENT), flag::ENLIGHTENED);
    assert_eq!((saved.vm_id, saved.vp_id), (77, 5));
    let mut rig = moved(&mut rig, &saved);
    assert_eq!((rig.nested.context().vm_id, rig.nested.context().vp_id), (77, 5));
    assert_eq!(rig.nested.enlightenments().vm_id, 77);
    rig.run();
    assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
    assert_eq!(crate::evmcs::told(&rig, Field::ExitReason), exit_reason::CPUID.into());
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2);
    // Not where it is not offered.
    let plain = Config::all(host(), false, false).unwrap();
    let refused = Rig::with(plain).call(|_, m| NestedVmx::restore(plain, &saved, m).map(|_| ()));
    assert_eq!(refused, Err(RestoreError::Enlightened));
    assert_eq!(VMXON, saved.vmxon);
}

/// RIP and RFLAGS are left to the processor at an entry; a state that is saved before the processor has seen them is
/// restored to an L1 that is told of the failure.
#[test]
fn an_entry_that_the_processor_would_refuse() {
    for (reason, launched) in [(exit_reason::VMLAUNCH, false), (exit_reason::VMRESUME, true)] {
        let mut rig = Rig::running(&[]);
        assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
        if !launched {
            assert_eq!(rig.vmclear(VMCS12), End::Succeed);
            assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
        }
        // First one that is good, so that only RIP is new at the next.
        assert_eq!(rig.l1(reason), L1Exit::EnterL2);
        rig.run();
        assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
        rig.set(&[(Field::GuestRip, 1 << 63)]);
        assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2, "the processor is to find it");
        let saved = save(&mut rig);
        assert_eq!(saved.flags & (flag::RUN_PENDING | flag::LAUNCHING), flag::RUN_PENDING);
        let mut rig = moved(&mut rig, &saved);
        assert_eq!(rig.nested.level(), Level::L1);
        assert_eq!(rig.vmcs01.peek(Field::GuestRip), 0xB000);
        assert_eq!(rig.told(Field::ExitReason), 0x8000_0021);
        assert_eq!(rig.told(Field::GuestRip), 1 << 63, "nothing of L2 is saved");
    }
}
