//! Control registers of L2: masks and read shadows of two hypervisors in one, and whose an access is.

use nvmx::bits::{cr0, cr4};
use nvmx::controls::primary;
use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit};

use crate::rig::Rig;

const EMBEDDER: L2Exit = L2Exit::Embedder { reason: r::CR_ACCESS };

/// L1 masks PE, NE and TS in CR0 and nothing in CR4; the embedder masks VMXE in CR4 and NE and CD in CR0.
fn rig(fields: &[(Field, u64)]) -> Rig {
    let mut rig = Rig::filled();
    rig.set(&[
        (Field::Cr0Mask, cr0::PE | cr0::NE | cr0::TS),
        (Field::Cr0ReadShadow, cr0::TS),
        (Field::Cr4Mask, 0),
        (Field::GuestCr0, 0x8000_0031 | cr0::CD),
    ]);
    rig.set(fields);
    rig.vmcs01.poke(Field::Cr0Mask, cr0::NE | cr0::CD);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    rig.run();
    rig
}

fn access(rig: &mut Rig, qualification: u64, rax: u64) -> L2Exit {
    rig.regs.gprs[0] = rax;
    rig.vmcs02.poke(Field::ExitQualification, qualification);
    rig.l2(r::CR_ACCESS)
}

/// MOV to CR`n` from RAX.
fn write(rig: &mut Rig, n: u64, value: u64) -> L2Exit {
    access(rig, n, value)
}

#[test]
fn what_l2_reads_and_what_the_processor_has() {
    let rig = rig(&[]);
    assert_eq!(rig.vmcs02.peek(Field::Cr0Mask), cr0::PE | cr0::NE | cr0::TS | cr0::CD);
    // CD is the embedder's, which keeps it clear; L2 reads what L1 gave it. PE, NE and TS read as L1's shadow has them.
    assert_eq!(rig.vmcs02.peek(Field::GuestCr0), 0x8000_0031);
    assert_eq!(rig.vmcs02.peek(Field::Cr0ReadShadow), cr0::CD | cr0::TS);
    assert_eq!(rig.vmcs02.peek(Field::Cr4Mask), cr4::VMXE);
    assert_eq!(rig.vmcs02.peek(Field::Cr4ReadShadow), cr4::VMXE);
}

#[test]
fn an_exit_tells_l1_what_it_believes() {
    let mut rig = rig(&[]);
    // L2 sets MP by itself; CD and NE stay what L1 made them.
    rig.vmcs02.poke(Field::GuestCr0, 0x8000_0031 | cr0::MP);
    rig.vmcs02.poke(Field::GuestCr4, cr4::PAE | cr4::VMXE | cr4::PGE);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestCr0), 0x8000_0031 | cr0::CD | cr0::MP);
    assert_eq!(rig.told(Field::GuestCr4), cr4::PAE | cr4::VMXE | cr4::PGE);
    assert_eq!(rig.told(Field::Cr0ReadShadow), cr0::TS, "L1's own");
    // L1's CR0: its host state, CD as it was.
    assert_eq!(rig.vmcs01.peek(Field::GuestCr0), 0x8000_0031);
}

#[test]
fn writes_that_change_a_bit_of_l1s_mask() {
    let base = 0x8000_0010 | cr0::CD | cr0::TS;
    for bit in [cr0::PE, cr0::NE, cr0::TS] {
        assert_eq!(write(&mut rig(&[]), 0, base ^ bit), L2Exit::ToL1);
    }
    // A bit of the embedder's alone: done at once.
    let mut rig = rig(&[]);
    assert_eq!(write(&mut rig, 0, base & !cr0::CD), L2Exit::Resume);
    assert_eq!(rig.vmcs02.peek(Field::GuestCr0), 0x8000_0031);
    assert_eq!(rig.vmcs02.peek(Field::Cr0ReadShadow), cr0::TS);
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9002);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestCr0), 0x8000_0031);
}

#[test]
fn writes_that_vmx_operation_forbids() {
    // L1 masks nothing in CR4; VMXE must stay set while L2 runs.
    let mut rig = rig(&[]);
    assert_eq!(write(&mut rig, 4, cr4::PAE), L2Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0B0D);
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9000);
    let mut rig = self::rig(&[]);
    assert_eq!(write(&mut rig, 4, cr4::PAE | cr4::VMXE | 1), L2Exit::Resume);
    assert_eq!(rig.vmcs02.peek(Field::GuestCr4), cr4::PAE | cr4::VMXE | 1);
    // What changes the paging mode takes an embedder.
    assert_eq!(write(&mut self::rig(&[]), 4, cr4::VMXE), EMBEDDER);
}

#[test]
fn clts_and_lmsw() {
    const CLTS: u64 = 2 << 4;
    const LMSW: u64 = 3 << 4;
    assert_eq!(access(&mut rig(&[]), CLTS, 0), L2Exit::ToL1);
    assert_eq!(access(&mut rig(&[(Field::Cr0ReadShadow, 0)]), CLTS, 0), L2Exit::Resume);
    // Sets TS as the shadow has it: no exit; clears it: exit. PE: LMSW can set it only.
    let pe_shown = [(Field::Cr0ReadShadow, cr0::PE | cr0::TS)];
    assert_eq!(access(&mut rig(&[]), LMSW | 8 << 16, 0), L2Exit::Resume);
    assert_eq!(access(&mut rig(&[]), LMSW, 0), L2Exit::ToL1);
    assert_eq!(access(&mut rig(&[]), LMSW | 9 << 16, 0), L2Exit::ToL1);
    assert_eq!(access(&mut rig(&pe_shown), LMSW | 8 << 16, 0), L2Exit::Resume);
}

#[test]
fn cr3_and_its_targets() {
    let load = |fields: &[(Field, u64)]| {
        let mut fields = fields.to_vec();
        let base = Rig::filled().nested.vmcs12().get(Field::PrimaryControls);
        fields.push((Field::PrimaryControls, base | u64::from(primary::CR3_LOAD_EXITING)));
        rig(&fields)
    };
    assert_eq!(write(&mut rig(&[]), 3, 0x5000), EMBEDDER);
    assert_eq!(write(&mut load(&[]), 3, 0x5000), L2Exit::ToL1);
    let targets = [(Field::Cr3TargetCount, 2), (Field::Cr3Target1, 0x5000), (Field::Cr3Target2, 0x6000)];
    let mut rig = load(&targets);
    assert_eq!(rig.vmcs02.peek(Field::Cr3TargetCount), 2);
    assert_eq!(rig.vmcs02.peek(Field::Cr3Target1), 0x5000);
    assert_eq!(write(&mut rig, 3, 0x5000), EMBEDDER);
    assert_eq!(write(&mut load(&targets), 3, 0x6000), L2Exit::ToL1, "the third of two");
}

#[test]
fn reads_of_cr3_and_cr8() {
    const READ: u64 = 1 << 4;
    for (n, bit) in [(3, primary::CR3_STORE_EXITING), (8, primary::CR8_STORE_EXITING)] {
        let base = Rig::filled().nested.vmcs12().get(Field::PrimaryControls);
        let with = [(Field::PrimaryControls, base | u64::from(bit))];
        assert_eq!(access(&mut rig(&with), READ | n, 0), L2Exit::ToL1);
        assert_eq!(access(&mut rig(&[]), READ | n, 0), EMBEDDER);
    }
    let base = Rig::filled().nested.vmcs12().get(Field::PrimaryControls);
    let with = [(Field::PrimaryControls, base | u64::from(primary::CR8_LOAD_EXITING))];
    assert_eq!(write(&mut rig(&with), 8, 3), L2Exit::ToL1);
    assert_eq!(write(&mut rig(&[]), 8, 3), EMBEDDER);
}

#[test]
fn registers_of_32_bit_code_have_32_bits() {
    // The upper half of RAX is left over; it would be a change under L1's mask, and no legal CR0.
    let mask = [(Field::Cr0Mask, 1 << 32 | cr0::TS)];
    let value = 1 << 32 | cr0::TS | 0x8000_0031;
    assert_eq!(write(&mut rig(&mask), 0, value), L2Exit::ToL1);
    let mut rig = rig(&mask);
    rig.vmcs02.poke(Field::GuestCsAccessRights, 0xC09B);
    assert_eq!(write(&mut rig, 0, value), L2Exit::Resume);
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9002);
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) >> 31, 0);
}
