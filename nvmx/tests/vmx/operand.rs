//! Memory operands, seen through VMPTRST, which writes, and VMPTRLD, which reads.

use nvmx::exit_reason::{VMPTRLD, VMPTRST};
use nvmx::field::Field;

use crate::rig::{End, GP, OPERAND, Rig, SS};

/// Instruction information: no registers.
const NONE: u64 = 1 << 22 | 1 << 27;
const SIZE_16: u64 = 0;
const SIZE_32: u64 = 1 << 7;
const SIZE_64: u64 = 2 << 7;
const SEG_SS: u64 = 2 << 15;
const SEG_DS: u64 = 3 << 15;
const SEG_FS: u64 = 4 << 15;
const SEG_CS: u64 = 1 << 15;

fn base(n: u64) -> u64 {
    n << 23
}

fn index(n: u64, scaling: u64) -> u64 {
    n << 18 | scaling
}

/// Where VMPTRST with this operand writes: the marker of the current-VMCS pointer is looked for.
fn stores_at(rig: &mut Rig, info: u64, displacement: u64, at: u64) -> End {
    rig.vmcs01.poke(Field::ExitInstructionInfo, info);
    rig.vmcs01.poke(Field::ExitQualification, displacement);
    rig.write(at, &[0x77; 8]);
    let end = rig.end(VMPTRST);
    let pointer: [u8; 8] = rig.read(at);
    assert_eq!(pointer == [0xFF; 8], end == End::Succeed, "{info:#x} {displacement:#x}");
    end
}

#[test]
fn addresses_in_64_bit_code() {
    let mut rig = Rig::ready();
    for (n, gpr) in rig.regs.gprs.iter_mut().enumerate() {
        *gpr = 0x100 * n as u64;
    }
    rig.vmcs01.poke(Field::GuestRsp, 0x7000);
    rig.vmcs01.poke(Field::GuestFsBase, 0x1000);
    rig.vmcs01.poke(Field::GuestDsBase, 0x2000);
    for (info, displacement, at) in [
        (SIZE_64 | SEG_DS | NONE, OPERAND, OPERAND),
        (SIZE_64 | SEG_DS | base(15) | 1 << 22, OPERAND, OPERAND + 0xF00),
        (SIZE_64 | SEG_DS | base(3) | index(2, 3), OPERAND, OPERAND + 0x300 + 0x200 * 8),
        (SIZE_64 | SEG_DS | index(8, 1) | 1 << 27, OPERAND, OPERAND + 0x800 * 2),
        (SIZE_64 | SEG_SS | base(4) | 1 << 22, 0x10, 0x7010),
        (SIZE_64 | SEG_DS | base(1) | 1 << 22, (-0x80i64) as u64, 0x80),
        (SIZE_64 | SEG_FS | NONE, OPERAND, OPERAND + 0x1000),
        // What is beyond the address size does not count; the base of FS comes after.
        (SIZE_32 | SEG_DS | NONE, OPERAND | 1 << 33, OPERAND),
        (SIZE_32 | SEG_FS | NONE, OPERAND | 1 << 33, OPERAND + 0x1000),
    ] {
        assert_eq!(stores_at(&mut rig, info, displacement, at), End::Succeed);
    }
}

#[test]
fn canonical_addresses() {
    let top = 0x7FFF_FFFF_FFF8u64;
    for (info, displacement, end) in [
        (SIZE_64 | SEG_DS | NONE, top, End::Succeed),
        (SIZE_64 | SEG_DS | NONE, top + 1, GP),
        (SIZE_64 | SEG_SS | NONE, top + 1, SS),
        (SIZE_64 | SEG_DS | NONE, 1 << 47, GP),
        (SIZE_64 | SEG_DS | NONE, 0xFFFF_7FFF_FFFF_FFFF, GP),
        (SIZE_64 | SEG_DS | NONE, 0xFFFF_8000_0000_0000, End::Succeed),
        (SIZE_64 | SEG_FS | NONE, top, GP),
    ] {
        let mut rig = Rig::ready();
        rig.vmcs01.poke(Field::GuestFsBase, 1);
        rig.vmcs01.poke(Field::ExitInstructionInfo, info);
        rig.vmcs01.poke(Field::ExitQualification, displacement);
        assert_eq!(rig.end(VMPTRST), end, "{displacement:#x}");
    }
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::GuestCr4, 0x2020 | 1 << 12);
    rig.vmcs01.poke(Field::ExitInstructionInfo, SIZE_64 | SEG_DS | NONE);
    rig.vmcs01.poke(Field::ExitQualification, 1 << 47);
    assert_eq!(rig.end(VMPTRST), End::Succeed, "57-bit addresses");
}

/// A rig in 32-bit code.
fn protected() -> Rig {
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::GuestCsAccessRights, 0xC09B);
    rig
}

#[test]
fn addresses_in_32_bit_code() {
    let mut rig = protected();
    rig.regs.gprs[3] = 0xFFFF_0100;
    rig.vmcs01.poke(Field::GuestDsBase, 0x1000);
    for (info, displacement, at) in [
        (SIZE_32 | SEG_DS | NONE, OPERAND, OPERAND + 0x1000),
        (SIZE_16 | SEG_DS | NONE, 0x1_2340, 0x3340),
        (SIZE_16 | SEG_DS | base(3) | 1 << 22, 0, 0x1100),
        // Base and offset wrap at 4 GiB.
        (SIZE_32 | SEG_DS | base(3) | 1 << 22, 0x1_0000, 0x1100),
    ] {
        assert_eq!(stores_at(&mut rig, info, displacement, at), End::Succeed);
    }
    rig.vmcs01.poke(Field::GuestDsBase, 0xFFFF_F000);
    assert_eq!(stores_at(&mut rig, SIZE_32 | SEG_DS | NONE, 0x1100, 0x100), End::Succeed);
}

#[test]
fn segments_of_32_bit_code() {
    const DATA: u64 = 0xC093;
    const READ_ONLY: u64 = 0xC091;
    const DOWN: u64 = 0xC097;
    const DOWN_16: u64 = 0x8097;
    const CODE: u64 = 0xC09B;
    const EXECUTE_ONLY: u64 = 0xC099;
    const UNUSABLE: u64 = 1 << 16;
    for (rights, limit, offset, writes, reads) in [
        (DATA, 0xFFFF_FFFF, 0x6000, true, true),
        (DATA, 0x6007, 0x6000, true, true),
        (DATA, 0x6006, 0x6000, false, false),
        (DATA, 0xFFFF_FFFF, 0xFFFF_FFF9, false, false),
        (DATA, 0xFFFF_FFFF, 0xFFFF_FFF8, true, true),
        (READ_ONLY, 0xFFFF_FFFF, 0x6000, false, true),
        (DOWN, 0x5FFF, 0x6000, true, true),
        (DOWN, 0x6000, 0x6000, false, false),
        (DOWN, 0x5FFF, 0xFFFF_FFF8, true, true),
        (DOWN, 0x5FFF, 0xFFFF_FFF9, false, false),
        (DOWN_16, 0x5FFF, 0xFFF8, true, true),
        (DOWN_16, 0x5FFF, 0xFFF9, false, false),
        (CODE, 0xFFFF_FFFF, 0x6000, false, true),
        (EXECUTE_ONLY, 0xFFFF_FFFF, 0x6000, false, false),
        (UNUSABLE, 0xFFFF_FFFF, 0x6000, false, false),
    ] {
        for (reason, allowed) in [(VMPTRST, writes), (VMPTRLD, reads)] {
            for (segment, number, fault) in
                [(Field::GuestDsAccessRights, SEG_DS, GP), (Field::GuestSsAccessRights, SEG_SS, SS)]
            {
                let mut rig = protected();
                let limit_of = if number == SEG_DS { Field::GuestDsLimit } else { Field::GuestSsLimit };
                rig.vmcs01.poke(segment, rights);
                rig.vmcs01.poke(limit_of, limit);
                rig.vmcs01.poke(Field::ExitInstructionInfo, SIZE_32 | number | NONE);
                rig.vmcs01.poke(Field::ExitQualification, offset);
                let end = rig.end(reason);
                let faulted = matches!(end, End::Fault(..));
                assert_eq!(faulted, !allowed, "{rights:#x} {limit:#x} {offset:#x} {reason}: {end:?}");
                assert!(!faulted || end == fault, "{end:?}");
            }
        }
    }
    // A segment override to CS.
    let mut rig = protected();
    rig.vmcs01.poke(Field::ExitInstructionInfo, SIZE_32 | SEG_CS | NONE);
    rig.vmcs01.poke(Field::ExitQualification, OPERAND);
    assert_eq!(rig.end(VMPTRST), GP, "code is not written");
}

#[test]
fn segments_do_not_matter_in_64_bit_code() {
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::GuestDsAccessRights, 1 << 16);
    rig.vmcs01.poke(Field::GuestDsLimit, 0);
    rig.vmcs01.poke(Field::GuestDsBase, 0x1000);
    assert_eq!(stores_at(&mut rig, SIZE_64 | SEG_DS | NONE, OPERAND, OPERAND), End::Succeed);
}
