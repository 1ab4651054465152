use nvmx::exit_reason::{RDMSR, WRMSR};
use nvmx::field::Field;
use nvmx::msr::{self, feature_control};
use nvmx::{L1Exit, NestedVmx};

use crate::rig::{End, GP, Rig};

fn rdmsr(rig: &mut Rig, index: u32) -> (End, u64) {
    rig.regs.gprs = [0xAAAA_AAAA_5555_5555; 16];
    rig.regs.gprs[1] = index.into();
    let (rip, flags) = (rig.vmcs01.peek(Field::GuestRip), rig.vmcs01.peek(Field::GuestRflags));
    assert_eq!(rig.l1(RDMSR), L1Exit::Resume);
    let value = rig.regs.gprs[2] << 32 | rig.regs.gprs[0];
    (rig.ended(rip, flags), value)
}

fn wrmsr(rig: &mut Rig, index: u32, value: u64) -> End {
    rig.regs.gprs[0] = value & 0xFFFF_FFFF | 0xDEAD << 32;
    rig.regs.gprs[1] = index.into();
    rig.regs.gprs[2] = value >> 32;
    let (rip, flags) = (rig.vmcs01.peek(Field::GuestRip), rig.vmcs01.peek(Field::GuestRflags));
    assert_eq!(rig.l1(WRMSR), L1Exit::Resume);
    rig.ended(rip, flags)
}

#[test]
fn capability_msrs_read_as_the_configuration_says() {
    let mut rig = Rig::new();
    for index in msr::VMX_BASIC..=msr::VMX_EXIT_CTLS2 {
        match rig.nested.config().read(index) {
            Some(value) => assert_eq!(rdmsr(&mut rig, index), (End::Succeed, value), "{index:#x}"),
            None => assert_eq!(rdmsr(&mut rig, index).0, GP, "{index:#x}"),
        }
    }
    assert_eq!(rdmsr(&mut rig, msr::VMX_EXIT_CTLS2).0, GP, "one that is not there");
}

#[test]
fn capability_msrs_are_not_written() {
    let mut rig = Rig::new();
    for index in msr::VMX_BASIC..=msr::VMX_EXIT_CTLS2 {
        let value = rig.nested.config().read(index).unwrap_or(0);
        assert_eq!(wrmsr(&mut rig, index, value), GP, "{index:#x}");
    }
}

#[test]
fn feature_control() {
    let mut rig = Rig::new();
    assert_eq!(rdmsr(&mut rig, feature_control::MSR), (End::Succeed, 5));
    assert_eq!(wrmsr(&mut rig, feature_control::MSR, 5), GP, "locked");
    rig.nested.set_feature_control(0);
    for (value, end) in
        [(0, End::Succeed), (4, End::Succeed), (2, GP), (8, GP), (1 << 32, GP), (5, End::Succeed), (5, GP)]
    {
        assert_eq!(wrmsr(&mut rig, feature_control::MSR, value), end, "{value:#x}");
    }
    assert_eq!(rdmsr(&mut rig, feature_control::MSR), (End::Succeed, 5));
}

#[test]
fn other_msrs_are_the_embedders() {
    let mut rig = Rig::new();
    for index in [0x39, 0x3B, 0x47F, 0x494, 0xC000_0080] {
        assert!(!msr::is_ours(index));
        rig.regs.gprs[1] = index.into();
        for reason in [RDMSR, WRMSR] {
            assert_eq!(rig.l1(reason), L1Exit::NotMine { reason });
        }
    }
    assert!(msr::is_ours(0x3A) && msr::is_ours(0x480) && msr::is_ours(0x493));
    assert_eq!(NestedVmx::l1_cr4(&rig.vmcs01) >> 13 & 1, 1);
}
