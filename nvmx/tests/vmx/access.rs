use nvmx::exit_reason;
use nvmx::field::{Area, Encoding, Field, Width};

use crate::rig::{End, OPERAND, Rig, valid};

#[test]
fn there_must_be_a_current_vmcs() {
    let mut rig = Rig::ready();
    assert_eq!(rig.vmread(Field::GuestRip.encoding()).0, End::FailInvalid);
    assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), 1), End::FailInvalid);
    let mut rig = Rig::loaded();
    assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), 1), End::Succeed);
    assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, 1));
}

#[test]
fn every_field_keeps_what_it_can_hold() {
    let mut rig = Rig::loaded();
    for field in Field::ALL {
        let value = 0x1234_5678_9ABC_DEF0 ^ (field.slot() as u64) << 20;
        assert_eq!(rig.vmwrite(field.encoding(), value), End::Succeed, "{field:?}");
        assert_eq!(rig.vmread(field.encoding()), (End::Succeed, value & field.mask()), "{field:?}");
        if field.width() == Width::U64 {
            let high = Encoding(field.encoding().0 | 1);
            assert_eq!(rig.vmread(high), (End::Succeed, value >> 32), "{field:?}");
            assert_eq!(rig.vmwrite(high, 0xFFFF_FFFF_0000_0007), End::Succeed);
            assert_eq!(rig.vmread(field.encoding()), (End::Succeed, 7 << 32 | value & 0xFFFF_FFFF), "{field:?}");
        }
    }
}

#[test]
fn a_field_that_does_not_exist() {
    let mut rig = Rig::loaded();
    // An index without a field, a reserved bit, the high half of a field that has none.
    for encoding in [0x0806 + 0x100, 0x681E | 1 << 12, 0x681F, 0x2C06, 0x1_681E] {
        assert_eq!(rig.vmread(Encoding(encoding)), (End::FailValid(12), 0x5555), "{encoding:#x}");
        assert_eq!(rig.vmwrite(Encoding(encoding), 1), End::FailValid(12), "{encoding:#x}");
    }
}

#[test]
fn bits_of_the_encoding_beyond_32_count_in_64_bit_code_only() {
    for (rights, end) in [(0xA09B, End::FailValid(12)), (0xC09B, End::Succeed)] {
        for reason in [exit_reason::VMREAD, exit_reason::VMWRITE] {
            let mut rig = Rig::loaded();
            rig.vmcs01.poke(Field::GuestCsAccessRights, rights);
            rig.regs.gprs[1] = 1 << 32 | u64::from(Field::GuestRip.encoding().0);
            rig.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 1 << 10 | 3 << 3);
            assert_eq!(rig.end(reason), end);
        }
    }
}

#[test]
fn the_operand_has_4_bytes_outside_64_bit_code() {
    let value = 0x1111_2222_3333_4444;
    for (rights, read, written) in [(0xA09B, value, value), (0xC09B, value & 0xFFFF_FFFF, value & 0xFFFF_FFFF)] {
        let mut rig = Rig::loaded();
        assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), value), End::Succeed);
        rig.vmcs01.poke(Field::GuestCsAccessRights, rights);
        // To a register: all 64 bits of it change.
        assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, read));
        // To memory: what is behind the operand stays.
        rig.at_operand();
        rig.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
        rig.write(OPERAND, &[0xEE; 8]);
        assert_eq!(rig.end(exit_reason::VMREAD), End::Succeed);
        let behind = if rights == 0xC09B { 0xEEEE_EEEE << 32 } else { 0 };
        assert_eq!(u64::from_le_bytes(rig.read(OPERAND)), read | behind);
        // From memory and from a register, into a 64-bit field: its upper half is cleared.
        rig.write(OPERAND, &value.to_le_bytes());
        assert_eq!(rig.end(exit_reason::VMWRITE), End::Succeed);
        assert_eq!(rig.nested.vmcs12().get(Field::GuestRip), written);
        assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), value), End::Succeed);
        assert_eq!(rig.nested.vmcs12().get(Field::GuestRip), written);
    }
}

#[test]
fn rsp_as_an_operand() {
    let mut rig = Rig::loaded();
    // RSP is both the encoding and the value.
    rig.vmcs01.poke(Field::GuestRsp, Field::GuestRip.encoding().0.into());
    rig.vmcs01.poke(Field::ExitInstructionInfo, 4 << 28 | 1 << 10 | 4 << 3);
    assert_eq!(rig.end(exit_reason::VMWRITE), End::Succeed);
    assert_eq!(rig.nested.vmcs12().get(Field::GuestRip), Field::GuestRip.encoding().0.into());
    rig.regs.gprs[1] = Field::HostRip.encoding().0.into();
    rig.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 1 << 10 | 4 << 3);
    assert_eq!(rig.end(exit_reason::VMREAD), End::Succeed);
    assert_eq!(rig.vmcs01.peek(Field::GuestRsp), 0);
}

#[test]
fn operands_that_fault() {
    for reason in [exit_reason::VMREAD, exit_reason::VMWRITE] {
        let mut rig = Rig::loaded();
        rig.memory.fault.set(Some((OPERAND, 7)));
        rig.at_operand();
        rig.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
        rig.regs.gprs[1] = Field::GuestRip.encoding().0.into();
        assert_eq!(rig.end(reason), End::Fault(14, Some(7)));
        assert_eq!(rig.regs.cr2, OPERAND);
    }
}

/// VMREAD of a field that does not exist writes nothing, so its destination cannot fault.
#[test]
fn vmread_fails_before_it_faults() {
    let mut rig = Rig::loaded();
    rig.memory.fault.set(Some((OPERAND, 7)));
    rig.at_operand();
    rig.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
    rig.regs.gprs[1] = 0x2C06;
    assert_eq!(rig.end(exit_reason::VMREAD), End::FailValid(12));
}

#[test]
fn read_only_fields_may_be_written_where_misc_says_so() {
    let mut rig = Rig::loaded();
    let any = rig.nested.config().misc() >> 29 & 1 != 0;
    for field in Field::ALL.iter().filter(|field| field.area() == Area::ExitInformation) {
        let end = if any { End::Succeed } else { End::FailValid(13) };
        assert_eq!(rig.vmwrite(field.encoding(), 1), end, "{field:?}");
    }
}

#[test]
fn what_a_hypervisor_writes() {
    let mut rig = Rig::loaded();
    rig.vmwrite_valid();
    for (field, value) in valid(rig.nested.config()) {
        assert_eq!(rig.vmread(field.encoding()), (End::Succeed, value), "{field:?}");
    }
}

#[test]
fn a_vmread_costs_few_accesses() {
    let mut rig = Rig::loaded();
    rig.vmcs01.reads.borrow_mut().clear();
    rig.vmcs01.writes.clear();
    assert_eq!(rig.vmread(Field::GuestRip.encoding()).0, End::Succeed);
    // Exit reason, CPL, instruction information, CS, EFER, RFLAGS, RIP, length, interruptibility.
    assert_eq!(rig.vmcs01.reads.borrow().len(), 9);
    assert_eq!(rig.vmcs01.writes, [Field::GuestRip]);
    assert_eq!((rig.vmcs02.reads.borrow().len(), rig.vmcs02.writes.len()), (0, 0));
}
