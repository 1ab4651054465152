use nvmx::field::Field;
use nvmx::{InvEpt, L1Exit, exit_reason};

use crate::rig::{End, OPERAND, Rig, UD, host};
use nvmx::caps::{Config, Offer};
use nvmx::controls::secondary;

/// INVEPT or INVVPID of type `kind` with this descriptor: the request and how it ended.
fn invalidate(rig: &mut Rig, reason: u32, kind: u64, descriptor: u128) -> (L1Exit, End) {
    rig.at_operand();
    rig.vmcs01.poke(Field::ExitInstructionInfo, 2 << 28 | 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
    rig.regs.gprs[2] = kind;
    rig.write(OPERAND, &descriptor.to_le_bytes());
    let (rip, flags) = (rig.vmcs01.peek(Field::GuestRip), rig.vmcs01.peek(Field::GuestRflags));
    let exit = rig.l1(reason);
    (exit, rig.ended(rip, flags))
}

const EPTP: u64 = 0x6_0000 | 3 << 3 | 6;

#[test]
fn invept() {
    const OK: End = End::Succeed;
    const FAIL: End = End::FailValid(28);
    for (kind, eptp, reserved, end, request) in [
        (1, EPTP, 0, OK, Some(InvEpt::Context { eptp: EPTP })),
        (1, EPTP | 1 << 6, 0, OK, Some(InvEpt::Context { eptp: EPTP | 1 << 6 })),
        (2, 0, 0, OK, Some(InvEpt::Global)),
        (0, EPTP, 0, FAIL, None),
        (3, EPTP, 0, FAIL, None),
        (1 << 32 | 1, EPTP, 0, FAIL, None),
        (1, EPTP, 1, FAIL, None),
        // Memory type, walk length, reserved bit, address width.
        (1, EPTP & !7 | 1, 0, FAIL, None),
        (1, EPTP & !0x38 | 2 << 3, 0, FAIL, None),
        (1, EPTP | 1 << 7, 0, FAIL, None),
        (1, EPTP | 1 << 40, 0, FAIL, None),
    ] {
        let mut rig = Rig::loaded();
        let got = invalidate(&mut rig, exit_reason::INVEPT, kind, u128::from(eptp) | u128::from(reserved as u64) << 64);
        assert_eq!(got, (request.map_or(L1Exit::Resume, L1Exit::InvEpt), end), "{kind} {eptp:#x} {reserved}");
    }
}

#[test]
fn invvpid() {
    const OK: End = End::Succeed;
    const FAIL: End = End::FailValid(28);
    let bad: u128 = 1 << 47;
    for (kind, low, address, end) in [
        (0, 7, 0x1000, OK),
        (0, 7, bad, FAIL),
        (0, 0, 0x1000, FAIL),
        (1, 7, bad, OK),
        (1, 0, 0, FAIL),
        (1, 7 | 1 << 16, 0, FAIL),
        (2, 0, bad, OK),
        (2, 1 << 63, 0, FAIL),
        (3, 7, bad, OK),
        (3, 0, 0, FAIL),
        (4, 7, 0, FAIL),
        (1 << 32, 7, 0, FAIL),
    ] {
        let mut rig = Rig::loaded();
        let got = invalidate(&mut rig, exit_reason::INVVPID, kind, low | address << 64);
        assert_eq!(got, (L1Exit::Resume, end), "{kind} {low:#x} {address:#x}");
    }
}

#[test]
fn without_a_current_vmcs_the_number_has_no_place() {
    let mut rig = Rig::ready();
    assert_eq!(invalidate(&mut rig, exit_reason::INVEPT, 0, 0).1, End::FailInvalid);
    assert_eq!(invalidate(&mut rig, exit_reason::INVVPID, 4, 0).1, End::FailInvalid);
    // A type that exists needs its descriptor, one that does not exist never reads it.
    rig.memory.fault.set(Some((OPERAND, 1)));
    assert_eq!(invalidate(&mut rig, exit_reason::INVEPT, 0, 0).1, End::FailInvalid);
    assert_eq!(invalidate(&mut rig, exit_reason::INVEPT, 2, 0).1, End::Fault(14, Some(1)));
    assert_eq!(invalidate(&mut rig, exit_reason::INVVPID, 2, 0).1, End::Fault(14, Some(1)));
}

#[test]
fn the_type_has_32_bits_outside_64_bit_code() {
    let mut rig = Rig::loaded();
    rig.vmcs01.poke(Field::GuestCsAccessRights, 0xC09B);
    assert_eq!(invalidate(&mut rig, exit_reason::INVVPID, 1 << 32 | 2, 0).1, End::Succeed);
}

#[test]
fn what_is_not_offered_does_not_exist() {
    let host = host();
    let without = |controls: u32| {
        let mut offer = Offer::all(&host, false, false);
        offer.secondary &= !controls;
        offer.vmfunc = if offer.secondary & secondary::VM_FUNCTIONS != 0 { offer.vmfunc } else { 0 };
        let mut rig = Rig::with(Config::new(host, offer).unwrap());
        assert_eq!(rig.vmxon(crate::rig::VMXON), End::Succeed);
        rig
    };
    let mut rig = without(secondary::VPID);
    assert_eq!(invalidate(&mut rig, exit_reason::INVVPID, 2, 0).1, UD);
    assert_eq!(invalidate(&mut rig, exit_reason::INVEPT, 2, 0).1, End::Succeed);
    let ept = secondary::EPT | secondary::UNRESTRICTED_GUEST | secondary::VM_FUNCTIONS | secondary::PML;
    let mut rig = without(ept);
    assert_eq!(invalidate(&mut rig, exit_reason::INVEPT, 2, 0).1, UD);
    assert_eq!(invalidate(&mut rig, exit_reason::INVVPID, 2, 0).1, End::Succeed);
}
