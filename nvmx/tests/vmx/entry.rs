//! The way into L2 and back, whole.

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit, exit_reason};

use crate::rig::{End, Rig};

#[test]
fn a_round_trip_by_cpuid() {
    let mut rig = Rig::running(&[]);
    assert_eq!(rig.nested.level(), Level::L2);
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9000);
    assert_eq!(rig.vmcs02.peek(Field::GuestCr3), 0x7_0000);
    rig.vmcs02.poke(Field::GuestRip, 0x9010);
    assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
    assert_eq!(rig.nested.level(), Level::L1);
    assert_eq!(rig.vmcs01.peek(Field::GuestRip), 0xB000);
    assert_eq!(rig.vmcs01.peek(Field::GuestRsp), 0xC000);
    assert_eq!(rig.run().level, Level::L1);
    assert_eq!(rig.told(Field::ExitReason), u64::from(exit_reason::CPUID));
    assert_eq!(rig.told(Field::ExitInstructionLength), 2);
    assert_eq!(rig.told(Field::GuestRip), 0x9010);
    rig.set(&[(Field::GuestRip, 0x9012)]);
    assert_eq!(rig.end(exit_reason::VMLAUNCH), End::FailValid(4));
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9012);
}

#[test]
fn a_bad_guest_state_is_an_exit() {
    let mut rig = Rig::filled();
    rig.set(&[(Field::GuestRflags, 0)]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::Resume);
    assert_eq!(rig.nested.level(), Level::L1);
    assert_eq!(rig.vmcs01.peek(Field::GuestRip), 0xB000);
    assert_eq!(rig.told(Field::ExitReason), 0x8000_0021);
    // It was not launched by that.
    rig.set(&[(Field::GuestRflags, 2)]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
}

#[test]
fn an_ept_violation_is_for_the_shadow_tables() {
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::ExitQualification, 0x182);
    rig.vmcs02.poke(Field::GuestPhysicalAddress, 0x1234_5678);
    rig.vmcs02.poke(Field::GuestLinearAddress, 0x4444);
    let gpa = L2Gpa::new(0x1234_5678);
    assert_eq!(rig.l2(exit_reason::EPT_VIOLATION), L2Exit::EptViolation { gpa, qualification: 0x182 });
    assert_eq!(rig.nested.level(), Level::L2);
    let outcome = rig.call(|nested, m| nested.reflect_ept(m, 48, 0x18A));
    assert_eq!(outcome, L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitReason), 48);
    assert_eq!(rig.told(Field::ExitQualification), 0x18A);
    assert_eq!(rig.told(Field::GuestPhysicalAddress), 0x1234_5678);
    assert_eq!(rig.told(Field::GuestLinearAddress), 0x4444);
}

#[test]
fn without_ept_of_its_own_l2_runs_on_the_embedders() {
    let mut rig = Rig::filled();
    let controls = rig.nested.vmcs12().get(Field::SecondaryControls) & !2;
    rig.set(&[(Field::SecondaryControls, controls)]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EptPointer), rig.vmcs01.peek(Field::EptPointer));
    rig.vmcs02.poke(Field::GuestPhysicalAddress, 0x5000);
    rig.vmcs02.poke(Field::ExitQualification, 1);
    let gpa = L1Gpa::new(0x5000);
    assert_eq!(rig.l2(exit_reason::EPT_VIOLATION), L2Exit::L1EptViolation { gpa, qualification: 1 });
    assert_eq!(rig.l2(exit_reason::EPT_MISCONFIGURATION), L2Exit::L1EptMisconfiguration { gpa });
}

#[test]
fn what_l1_does_not_want_is_the_embedders() {
    let hlt = 1 << 7;
    let mut rig = Rig::filled();
    let without = rig.nested.vmcs12().get(Field::PrimaryControls) & !hlt;
    rig.set(&[(Field::PrimaryControls, without)]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.l2(exit_reason::HLT), L2Exit::Embedder { reason: exit_reason::HLT });
    assert_eq!(rig.l2(exit_reason::VMCALL), L2Exit::ToL1);
    let with = rig.plus(Field::PrimaryControls, hlt);
    rig.set(&[with]);
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.l2(exit_reason::HLT), L2Exit::ToL1);
}
