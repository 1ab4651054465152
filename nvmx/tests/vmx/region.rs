use hvcore::addr::L1Gpa;
use nvmx::field::Field;
use nvmx::vmcs12::{LaunchState, REVISION, SHADOW_INDICATOR};
use nvmx::{Current, exit_reason};
use zerocopy::IntoBytes;

use crate::rig::{End, OPERAND, OTHER, Rig, VMCS12, VMXON};

/// Addresses that no region can have.
const BAD: [u64; 3] = [VMCS12 + 1, VMCS12 + 0x800, 0x100_0000_0000];

#[test]
fn vmptrld() {
    let mut rig = Rig::ready();
    rig.region(VMCS12, REVISION);
    assert_eq!(rig.vmptrst(), (End::Succeed, u64::MAX));
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(VMCS12)));
    assert_eq!(rig.vmptrst(), (End::Succeed, VMCS12));
    for bad in BAD {
        assert_eq!(rig.vmptrld(bad), End::FailValid(9), "{bad:#x}");
    }
    assert_eq!(rig.vmptrld(VMXON), End::FailValid(10));
    assert_eq!(rig.vmptrst(), (End::Succeed, VMCS12), "what failed changed nothing");
    let mut rig = Rig::ready();
    assert_eq!(rig.vmptrld(BAD[0]), End::FailInvalid, "no current VMCS");
}

#[test]
fn vmptrld_revision() {
    for (revision, end) in [
        (REVISION, End::Succeed),
        (REVISION + 1, End::FailInvalid),
        (0, End::FailInvalid),
        (1, End::FailInvalid),
        // VMCS shadowing is not offered.
        (REVISION | SHADOW_INDICATOR, End::FailInvalid),
    ] {
        let mut rig = Rig::ready();
        rig.region(VMCS12, revision);
        assert_eq!(rig.vmptrld(VMCS12), end, "{revision:#x}");
    }
    let mut rig = Rig::loaded();
    rig.region(OTHER, 0);
    assert_eq!(rig.vmptrld(OTHER), End::FailValid(11));
    assert_eq!(rig.vmptrld(0xF0_0000), End::FailValid(11), "no memory there");
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(VMCS12)));
}

#[test]
fn the_vmcs_goes_back_to_memory_when_another_becomes_current() {
    let mut rig = Rig::loaded();
    rig.region(OTHER, REVISION);
    assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), 0x1234), End::Succeed);
    assert_eq!(rig.vmptrld(OTHER), End::Succeed);
    assert_eq!(rig.stored(VMCS12).get(Field::GuestRip), 0x1234);
    assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, 0));
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, 0x1234));
}

#[test]
fn the_current_vmcs_is_not_read_again() {
    let mut rig = Rig::loaded();
    assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), 0x1234), End::Succeed);
    rig.region(VMCS12, 0);
    let read = rig.memory.bytes_read.get();
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.memory.bytes_read.get(), read);
    assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, 0x1234));
}

#[test]
fn a_region_is_read_once_and_made_legal() {
    let mut rig = Rig::ready();
    rig.region(VMCS12, REVISION);
    let field = Field::GuestEsAccessRights;
    rig.write(VMCS12 + 16 + 8 * field.slot() as u64, &u64::MAX.to_le_bytes());
    let read = rig.memory.bytes_read.get();
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.memory.bytes_read.get() - read, rig.nested.vmcs12().as_bytes().len());
    assert_eq!(rig.vmread(field.encoding()), (End::Succeed, 0x1_F0FF));
}

#[test]
fn vmclear() {
    let mut rig = Rig::loaded();
    rig.region(OTHER, REVISION);
    rig.write(OTHER + 8, &1u32.to_le_bytes());
    for bad in BAD {
        assert_eq!(rig.vmclear(bad), End::FailValid(2), "{bad:#x}");
    }
    assert_eq!(rig.vmclear(VMXON), End::FailValid(3));
    assert_eq!(rig.vmclear(OTHER), End::Succeed);
    assert_eq!(rig.stored(OTHER).launch_state(), LaunchState::Clear);
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(VMCS12)), "another is still current");
    assert_eq!(rig.vmwrite(Field::GuestRsp.encoding(), 77), End::Succeed);
    assert_eq!(rig.vmclear(VMCS12), End::Succeed);
    assert_eq!(rig.nested.current(), Current::None);
    assert_eq!(rig.stored(VMCS12).get(Field::GuestRsp), 77);
    assert_eq!(rig.vmclear(VMXON), End::FailInvalid, "no current VMCS");
    assert_eq!(rig.vmptrst(), (End::Succeed, u64::MAX));
}

#[test]
fn vmclear_of_no_memory_is_not_noticed() {
    let mut rig = Rig::ready();
    assert_eq!(rig.vmclear(0xF0_0000), End::Succeed);
    let mut rig = Rig::loaded();
    rig.memory.read_only.set(true);
    assert_eq!(rig.vmclear(VMCS12), End::Succeed);
    assert_eq!(rig.nested.current(), Current::None);
}

#[test]
fn a_number_stays_until_the_next_failure() {
    let mut rig = Rig::loaded();
    assert_eq!(rig.vmptrld(1), End::FailValid(9));
    assert_eq!(rig.vmread(Field::InstructionError.encoding()), (End::Succeed, 9));
    assert_eq!(rig.vmclear(1), End::FailValid(2));
    assert_eq!(rig.vmread(Field::InstructionError.encoding()), (End::Succeed, 2));
}

#[test]
fn operands_that_fault() {
    for reason in [exit_reason::VMPTRLD, exit_reason::VMCLEAR, exit_reason::VMPTRST] {
        let mut rig = Rig::loaded();
        rig.memory.fault.set(Some((OPERAND, 3)));
        assert_eq!(rig.with_pointer(reason, OTHER), End::Fault(14, Some(3)), "{reason}");
        assert_eq!(rig.regs.cr2, OPERAND);
        // In the second page of an operand that lies in two.
        rig.memory.fault.set(Some((OPERAND + 0x1000, 3)));
        rig.at_operand();
        rig.vmcs01.poke(Field::ExitQualification, OPERAND + 0xFFC);
        assert_eq!(rig.end(reason), End::Fault(14, Some(3)), "{reason}");
        assert_eq!(rig.regs.cr2, OPERAND + 0x1000);
        rig.vmcs01.poke(Field::ExitQualification, OPERAND + 0xFF8);
        assert!(!matches!(rig.end(reason), End::Fault(..)), "{reason}: just short of it");
    }
}
