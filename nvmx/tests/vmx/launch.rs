//! VMLAUNCH and VMRESUME up to the entry.

use hvcore::addr::Level;
use nvmx::check::{Controls, Host, Refusal};
use nvmx::exit_reason::{VMLAUNCH, VMRESUME};
use nvmx::field::Field;
use nvmx::vmcs12::{LaunchState, REVISION};
use nvmx::{L1Exit, exit_reason};

use crate::rig::{End, GP, OTHER, Rig, UD, VMCS12, VMXON};

#[test]
fn permission() {
    for reason in [VMLAUNCH, VMRESUME] {
        let mut rig = Rig::new();
        assert_eq!(rig.end(reason), UD);
        assert_eq!(rig.vmxon(VMXON), End::Succeed);
        rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3);
        assert_eq!(rig.end(reason), GP);
        rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC093);
        assert_eq!(rig.end(reason), End::FailInvalid, "no current VMCS");
    }
}

#[test]
fn launch_states() {
    let mut rig = Rig::filled();
    assert_eq!(rig.end(VMRESUME), End::FailValid(5));
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(rig.nested.vmcs12().launch_state(), LaunchState::Launched);
    assert_eq!(rig.nested.level(), Level::L2);
    back(&mut rig);
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(4));
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2);
    back(&mut rig);
    // The launch state goes to memory and back with the VMCS; VMCLEAR resets it, current or not.
    rig.region(OTHER, REVISION);
    assert_eq!(rig.vmptrld(OTHER), End::Succeed);
    assert_eq!(rig.stored(VMCS12).launch_state(), LaunchState::Launched);
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(4));
    assert_eq!(rig.vmptrld(OTHER), End::Succeed);
    assert_eq!(rig.vmclear(VMCS12), End::Succeed);
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.end(VMRESUME), End::FailValid(5));
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
}

/// L2 executes CPUID.
fn back(rig: &mut Rig) {
    rig.l2(exit_reason::CPUID);
    assert_eq!(rig.nested.level(), Level::L1);
}

#[test]
fn events_blocked_by_mov_ss() {
    for (blocking, end) in [(2, Some(End::FailValid(26))), (1, None), (8, None)] {
        let mut rig = Rig::filled();
        rig.vmcs01.poke(Field::GuestInterruptibility, blocking);
        match end {
            Some(end) => assert_eq!(rig.end(VMLAUNCH), end),
            None => assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2),
        }
    }
}

/// What is wrong, the error it ends in, and what is wrong besides and comes later.
#[test]
fn errors_come_in_the_order_of_the_manual() {
    let mut rig = Rig::filled();
    let controls = rig.nested.vmcs12().get(Field::PinBasedControls);
    // Everything is wrong.
    rig.set(&[(Field::PinBasedControls, u64::MAX), (Field::HostCr3, u64::MAX), (Field::GuestRflags, 0)]);
    rig.vmcs01.poke(Field::GuestInterruptibility, 2);
    assert_eq!(rig.end(VMRESUME), End::FailValid(26));
    assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), 0, "the shadow ended with the instruction");
    assert_eq!(rig.end(VMRESUME), End::FailValid(5));
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(7));
    assert_eq!(rig.nested.last_refusal(), Some(Refusal::Controls(Controls::Pin)));
    rig.set(&[(Field::PinBasedControls, controls)]);
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(8));
    assert_eq!(rig.nested.last_refusal(), Some(Refusal::Host(Host::Cr3)));
    rig.set(&[(Field::HostCr3, 0x7_1000)]);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::Resume);
    assert!(matches!(rig.nested.last_refusal(), Some(Refusal::Guest(_))));
    assert_eq!(rig.nested.vmcs12().get(Field::ExitReason), 0x8000_0021);
    rig.vmcs01.poke(Field::GuestRip, 0x8000);
    rig.set(&[(Field::GuestRflags, 2)]);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
}

/// A failed check costs the launch state nothing.
#[test]
fn a_refused_launch_does_not_launch() {
    for (field, bad, good) in
        [(Field::PinBasedControls, 0, None), (Field::HostCr3, u64::MAX, None), (Field::GuestRflags, 0, Some(2))]
    {
        let mut rig = Rig::filled();
        let good = good.unwrap_or(rig.nested.vmcs12().get(field));
        rig.set(&[(field, bad)]);
        assert_eq!(rig.l1(VMLAUNCH), L1Exit::Resume);
        assert_eq!(rig.nested.vmcs12().launch_state(), LaunchState::Clear, "{field:?}");
        rig.set(&[(field, good)]);
        assert_eq!(rig.end(VMRESUME), End::FailValid(5), "{field:?}");
        assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2, "{field:?}");
    }
}

/// The address-space size of the host is L1's at the time.
#[test]
fn a_64_bit_host_needs_a_64_bit_l1() {
    let mut rig = Rig::filled();
    rig.vmcs01.poke(Field::GuestEfer, 0);
    rig.vmcs01.poke(Field::GuestCsAccessRights, 0xC09B);
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(8));
    rig.vmcs01.poke(Field::GuestEfer, 0xD00);
    rig.vmcs01.poke(Field::GuestCsAccessRights, 0xA09B);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
}
