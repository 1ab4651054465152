//! What a round trip costs L0: L2's CPUID to L1 and back. The numbers are a promise; `docs/nested-vmx.md` says what each
//! access is for.

use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit, exit_reason};

use crate::l2::Spent;
use crate::rig::Rig;

/// One round trip: `advance` is what L1 does to L2's RIP.
fn round_trip(rig: &mut Rig, advance: impl FnOnce(&mut Rig)) -> Spent {
    rig.spent();
    assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
    rig.run();
    let there = rig.spent();
    advance(rig);
    rig.spent();
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::EnterL2);
    rig.run();
    let back = rig.spent();
    let join = |a: &[Vec<Field>; 2], b: &[Vec<Field>; 2]| [0, 1].map(|i| [&a[i][..], &b[i][..]].concat());
    Spent {
        reads: join(&there.reads, &back.reads),
        writes: join(&there.writes, &back.writes),
        bytes: there.bytes + back.bytes,
        vmptrlds: there.vmptrlds + back.vmptrlds,
    }
}

#[test]
fn with_the_enlightened_vmcs() {
    let mut rig = Rig::announced();
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    round_trip(&mut rig, |rig| rig.set_evmcs(Field::GuestRip, 0x9002));
    let spent = round_trip(&mut rig, |rig| rig.set_evmcs(Field::GuestRip, 0x9004));
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9004);
    println!("{} VMREADs, {} VMWRITEs: {spent:?}", spent.vmreads(), spent.vmwrites());
    assert_eq!((spent.vmreads(), spent.vmwrites(), spent.vmptrlds, spent.bytes), (58, 51, 2, 80));
    assert_eq!(rig.evmcs(Field::ExitReason), u64::from(exit_reason::CPUID));
    assert_eq!(rig.evmcs(Field::GuestTrLimit), 0x67);
}

#[test]
fn with_a_plain_vmcs() {
    let mut rig = Rig::running(&[]);
    round_trip(&mut rig, |rig| rig.set(&[(Field::GuestRip, 0x9002)]));
    let spent = round_trip(&mut rig, |rig| rig.set(&[(Field::GuestRip, 0x9004)]));
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9004);
    println!("{} VMREADs, {} VMWRITEs: {spent:?}", spent.vmreads(), spent.vmwrites());
    assert_eq!((spent.vmreads(), spent.vmwrites(), spent.vmptrlds), (20, 51, 2));
}

/// Faults that L0 settles by itself cost what they must: the reason, the fault, what it interrupted.
#[test]
fn an_ept_violation_that_l0_settles() {
    let mut rig = Rig::running(&[]);
    rig.spent();
    assert!(matches!(rig.l2(exit_reason::EPT_VIOLATION), L2Exit::EptViolation { .. }));
    rig.run();
    let spent = rig.spent();
    assert_eq!((spent.vmreads(), spent.vmwrites(), spent.vmptrlds), (4, 0, 0), "{spent:?}");
}

/// What L1 changes at every entry does not make L0 read and check all of L2's state; what can make that state bad does.
#[test]
fn guest_state_is_checked_again_when_it_matters() {
    use nvmx::controls::{pin, primary, secondary};
    for (field, bit, checked) in [
        (Field::PinBasedControls, pin::PREEMPTION_TIMER, false),
        (Field::PrimaryControls, primary::INTERRUPT_WINDOW_EXITING, false),
        (Field::PinBasedControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS, true),
        (Field::SecondaryControls, secondary::UNRESTRICTED_GUEST, true),
        (Field::GuestCr3, 0x10, true),
    ] {
        let mut rig = Rig::running(&[]);
        let spent = round_trip(&mut rig, |rig| {
            let fields = rig.plus(field, bit.into());
            rig.set(&[fields]);
        });
        assert_eq!(spent.reads[1].contains(&Field::GuestFsBase), checked, "{field:?}");
    }
    // Without the unrestricted guest an L2 in real mode is no more.
    let mut rig = Rig::filled();
    let unrestricted = rig.plus(Field::SecondaryControls, secondary::UNRESTRICTED_GUEST.into());
    rig.set(&[unrestricted]);
    assert_eq!(rig.l1(exit_reason::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    rig.vmcs02.poke(Field::GuestCr0, 0x21);
    rig.vmcs02.poke(Field::GuestEfer, 0);
    assert_eq!(rig.l2(exit_reason::CPUID), L2Exit::ToL1);
    let restricted = unrestricted.1 & !u64::from(secondary::UNRESTRICTED_GUEST);
    rig.set(&[(Field::SecondaryControls, restricted)]);
    assert_eq!(rig.l1(exit_reason::VMRESUME), L1Exit::Resume);
    assert_eq!(rig.told(Field::ExitReason), 0x8000_0021);
}
