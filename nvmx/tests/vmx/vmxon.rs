use hvcore::addr::L1Gpa;
use nvmx::bits::{cr0, cr4};
use nvmx::field::Field;
use nvmx::msr::feature_control;
use nvmx::vmcs12::{REVISION, SHADOW_INDICATOR};
use nvmx::{Current, L1Exit, exit_reason};

use crate::rig::{End, GP, OPERAND, Rig, UD, VMCS12, VMXON};

#[test]
fn vmxon_enters_vmx_operation() {
    let mut rig = Rig::new();
    assert_eq!(rig.nested.vmxon_pointer(), None);
    assert_eq!(rig.vmxon(VMXON), End::Succeed);
    assert_eq!(rig.nested.vmxon_pointer(), Some(L1Gpa::new(VMXON)));
    assert_eq!(rig.nested.current(), Current::None);
}

#[test]
fn vmxon_faults() {
    type Spoil = fn(&mut Rig);
    let cases: [(&str, Spoil, End); 8] = [
        ("CR4.VMXE clear for L1", |r| r.vmcs01.poke(Field::Cr4ReadShadow, 0), UD),
        ("CPL 3", |r| r.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3), GP),
        ("CR0.NE clear", |r| r.vmcs01.poke(Field::GuestCr0, 0x8000_0011), GP),
        ("CR0.PG clear", |r| r.vmcs01.poke(Field::GuestCr0, 0x31), GP),
        ("CR4 with a bit that VMX forbids", |r| r.vmcs01.poke(Field::GuestCr4, 0x2020 | 1 << 22), GP),
        ("IA32_FEATURE_CONTROL not locked", |r| r.nested.set_feature_control(4), GP),
        ("IA32_FEATURE_CONTROL without VMX", |r| r.nested.set_feature_control(1), GP),
        ("the operand's page is not there", |r| r.memory.fault.set(Some((OPERAND, 2))), End::Fault(14, Some(2))),
    ];
    for (what, spoil, end) in cases {
        let mut rig = Rig::new();
        spoil(&mut rig);
        assert_eq!(rig.vmxon(VMXON), end, "{what}");
        assert_eq!(rig.nested.vmxon_pointer(), None, "{what}");
    }
}

#[test]
fn what_comes_just_short_of_a_vmxon_fault() {
    type Vary = fn(&mut Rig);
    let cases: [(&str, Vary); 3] = [
        ("VMXE only in the read shadow", |r| r.vmcs01.poke(Field::GuestCr4, cr4::PAE)),
        ("CR0 with all that may be set", |r| r.vmcs01.poke(Field::GuestCr0, 0xE005_003F)),
        ("locked and enabled", |r| r.nested.set_feature_control(feature_control::ENABLED)),
    ];
    for (what, vary) in cases {
        let mut rig = Rig::new();
        vary(&mut rig);
        assert_eq!(rig.vmxon(VMXON), End::Succeed, "{what}");
    }
    assert_eq!(0xE005_003F & cr0::NE, cr0::NE);
}

#[test]
fn vmxon_regions() {
    for (gpa, revision, end) in [
        (VMXON, REVISION, End::Succeed),
        (0xF_F000, REVISION, End::Succeed),
        (VMXON + 8, REVISION, End::FailInvalid),
        (VMXON, REVISION ^ 1, End::FailInvalid),
        (VMXON, REVISION | SHADOW_INDICATOR, End::FailInvalid),
        // Beyond L1's memory, then beyond its physical addresses.
        (0xFF_FFFF_F000, REVISION, End::FailInvalid),
        (0x100_0000_0000, REVISION, End::FailInvalid),
    ] {
        let mut rig = Rig::new();
        if gpa & 0xFFF == 0 && gpa < 0x10_0000 {
            rig.region(gpa, revision);
        }
        assert_eq!(rig.with_pointer(exit_reason::VMXON, gpa), end, "{gpa:#x} {revision:#x}");
        assert_eq!(rig.nested.vmxon_pointer().is_some(), end == End::Succeed);
    }
}

#[test]
fn vmxon_in_vmx_operation() {
    let mut rig = Rig::ready();
    assert_eq!(rig.vmxon(VMXON), End::FailInvalid, "no current VMCS to hold the number");
    let mut rig = Rig::loaded();
    assert_eq!(rig.vmxon(VMXON), End::FailValid(15));
    rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3);
    assert_eq!(rig.vmxon(VMXON), GP);
    rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC093);
    rig.memory.fault.set(Some((OPERAND, 0)));
    assert_eq!(rig.end(exit_reason::VMXON), End::FailValid(15), "the operand is not read");
}

#[test]
fn vmxoff() {
    let mut rig = Rig::loaded();
    assert_eq!(rig.end(exit_reason::VMXOFF), End::Succeed);
    assert_eq!((rig.nested.vmxon_pointer(), rig.nested.current()), (None, Current::None));
    assert_eq!(rig.end(exit_reason::VMXOFF), UD);
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3);
    assert_eq!(rig.end(exit_reason::VMXOFF), GP);
}

/// Every instruction but VMXON: #UD before VMXON whatever the CPL, then #GP outside CPL 0, then not.
#[test]
fn permission_comes_first() {
    use exit_reason::{INVEPT, INVVPID, VMCLEAR, VMPTRLD, VMPTRST, VMREAD, VMWRITE, VMXOFF};
    for reason in [VMCLEAR, VMPTRLD, VMPTRST, VMREAD, VMWRITE, VMXOFF, INVEPT, INVVPID] {
        let mut rig = Rig::new();
        rig.at_operand();
        assert_eq!(rig.end(reason), UD, "{reason}");
        rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3);
        assert_eq!(rig.end(reason), UD, "{reason}");
        let mut rig = Rig::ready();
        rig.at_operand();
        rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC0F3);
        assert_eq!(rig.end(reason), GP, "{reason}");
        rig.vmcs01.poke(Field::GuestSsAccessRights, 0xC093);
        assert!(!matches!(rig.end(reason), End::Fault(..)), "{reason}");
    }
}

#[test]
fn vmfunc_does_not_exist_in_root_operation() {
    assert_eq!(Rig::ready().end(exit_reason::VMFUNC), UD);
}

#[test]
fn other_exits_are_the_embedders() {
    let mut rig = Rig::ready();
    for reason in [exit_reason::VMCALL, exit_reason::CPUID, exit_reason::EPT_VIOLATION, exit_reason::CR_ACCESS] {
        assert_eq!(rig.l1(reason), L1Exit::NotMine { reason });
    }
    let failed = exit_reason::ENTRY_FAILURE | exit_reason::INVALID_GUEST_STATE;
    assert_eq!(rig.l1(failed), L1Exit::NotMine { reason: failed });
}

#[test]
fn an_instruction_ends_the_interrupt_shadow_and_traps_when_stepped() {
    let mut rig = Rig::ready();
    rig.region(VMCS12, REVISION);
    rig.vmcs01.poke(Field::GuestInterruptibility, 1 | 1 << 3);
    rig.vmcs01.poke(Field::GuestRflags, 2 | 1 << 8);
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), 1 << 3);
    assert_eq!(rig.vmcs01.peek(Field::GuestPendingDebugExceptions), 1 << 14);
    // Not with branch stepping, and not when the instruction faults.
    for (debugctl, reason) in [(2, exit_reason::VMXOFF), (0, exit_reason::VMFUNC)] {
        rig.vmcs01.poke(Field::GuestPendingDebugExceptions, 0);
        rig.vmcs01.poke(Field::GuestDebugctl, debugctl);
        rig.end(reason);
        assert_eq!(rig.vmcs01.peek(Field::GuestPendingDebugExceptions), 0);
    }
}

#[test]
fn a_32_bit_instruction_pointer_wraps() {
    for (rights, rip, next) in [(0xC09B, 0xFFFF_FFFE, 2), (0xA09B, 0xFFFF_FFFE, 0x1_0000_0002)] {
        let mut rig = Rig::ready();
        rig.vmcs01.poke(Field::GuestCsAccessRights, rights);
        rig.vmcs01.poke(Field::GuestRip, rip);
        assert_eq!(rig.l1(exit_reason::VMXOFF), L1Exit::Resume);
        assert_eq!(rig.vmcs01.peek(Field::GuestRip), next);
    }
}

#[test]
fn cr_bits_are_fixed_in_vmx_operation_only() {
    let mut rig = Rig::new();
    assert!(rig.nested.allows_cr0(0x11) && rig.nested.allows_cr4(0x20));
    assert_eq!(rig.vmxon(VMXON), End::Succeed);
    for (value, allowed) in [(0x8000_0031, true), (0x8000_0011, false), (0x31, false), (0x8000_0030, false)] {
        assert_eq!(rig.nested.allows_cr0(value), allowed, "{value:#x}");
    }
    for (value, allowed) in [(0x2020, true), (0x20, false), (0x2020 | 1 << 22, false)] {
        assert_eq!(rig.nested.allows_cr4(value), allowed, "{value:#x}");
    }
    assert_eq!(rig.end(exit_reason::VMXOFF), End::Succeed);
    assert!(rig.nested.allows_cr4(0x20));
}

#[test]
fn init_ends_vmx_operation() {
    let mut rig = Rig::loaded();
    rig.nested.reset();
    assert_eq!((rig.nested.vmxon_pointer(), rig.nested.current()), (None, Current::None));
    assert_eq!(rig.nested.feature_control(), feature_control::ENABLED, "it stays locked");
}

#[test]
fn an_instruction_clears_the_resume_flag_and_a_fault_does_not() {
    let resume = 1 << 16;
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::GuestRflags, 2 | resume);
    assert_eq!(rig.end(exit_reason::VMFUNC), UD);
    assert_eq!(rig.vmcs01.peek(Field::GuestRflags), 2 | resume);
    assert_eq!(rig.l1(exit_reason::VMXOFF), L1Exit::Resume);
    assert_eq!(rig.vmcs01.peek(Field::GuestRflags), 2);
    rig.vmcs01.poke(Field::GuestRflags, 2 | resume);
    nvmx::step::complete_instruction(&mut rig.vmcs01);
    assert_eq!(rig.vmcs01.peek(Field::GuestRflags), 2);
}
