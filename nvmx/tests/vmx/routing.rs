//! Whose an exit of L2 is: for each basic exit reason, with L1's control and without.

use hvcore::addr::Level;
use nvmx::controls::{pin, primary, secondary};
use nvmx::exit_reason::{self as r, name};
use nvmx::field::Field;
use nvmx::{L1Exit, L2Exit};

use crate::rig::Rig;

/// A rig whose L2 runs with these bits set in and cleared from L1's controls.
fn with_controls(set: &[(Field, u32)], clear: &[(Field, u32)]) -> Rig {
    let mut rig = Rig::filled();
    for (field, bits) in clear {
        let value = rig.nested.vmcs12().get(*field) & !u64::from(*bits);
        rig.set(&[(*field, value)]);
    }
    for (field, bits) in set {
        let fields = rig.plus(*field, u64::from(*bits));
        rig.set(&[fields]);
    }
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    rig.run();
    rig
}

fn reflected(rig: &mut Rig, reason: u32) {
    assert_eq!(rig.l2(reason), L2Exit::ToL1, "{:?}", name(reason));
    assert_eq!(rig.told(Field::ExitReason), reason.into());
    assert_eq!(rig.nested.level(), Level::L1);
}

fn embedders(rig: &mut Rig, reason: u32) {
    assert_eq!(rig.l2(reason), L2Exit::Embedder { reason }, "{:?}", name(reason));
    assert_eq!(rig.nested.level(), Level::L2);
}

#[test]
fn unconditional_exits_are_l1s() {
    for reason in [
        r::TRIPLE_FAULT,
        r::TASK_SWITCH,
        r::CPUID,
        r::GETSEC,
        r::INVD,
        r::VMCALL,
        r::VMCLEAR,
        r::VMLAUNCH,
        r::VMPTRLD,
        r::VMPTRST,
        r::VMREAD,
        r::VMRESUME,
        r::VMWRITE,
        r::VMXOFF,
        r::VMXON,
        r::INVEPT,
        r::INVVPID,
        r::XSETBV,
    ] {
        reflected(&mut Rig::running(&[]), reason);
    }
}

#[test]
fn exits_that_only_the_embedder_can_cause() {
    for reason in [r::INIT, r::SIPI, r::IO_SMI, r::OTHER_SMI, r::PML_FULL, r::ENCLS, r::UMWAIT, r::TPAUSE, 99] {
        embedders(&mut Rig::running(&[]), reason);
    }
}

#[test]
fn exits_by_one_control() {
    let first = Field::PrimaryControls;
    let second = Field::SecondaryControls;
    let virtual_nmis = [(Field::PinBasedControls, pin::NMI_EXITING | pin::VIRTUAL_NMIS)];
    for (reason, field, bit, with) in [
        (r::INTERRUPT_WINDOW, first, primary::INTERRUPT_WINDOW_EXITING, &[][..]),
        (r::NMI_WINDOW, first, primary::NMI_WINDOW_EXITING, &virtual_nmis),
        (r::HLT, first, primary::HLT_EXITING, &[]),
        (r::INVLPG, first, primary::INVLPG_EXITING, &[]),
        (r::RDPMC, first, primary::RDPMC_EXITING, &[]),
        (r::RDTSC, first, primary::RDTSC_EXITING, &[]),
        (r::RDTSCP, first, primary::RDTSC_EXITING, &[(second, secondary::RDTSCP)]),
        (r::MOV_DR, first, primary::MOV_DR_EXITING, &[]),
        (r::MWAIT, first, primary::MWAIT_EXITING, &[]),
        (r::MONITOR, first, primary::MONITOR_EXITING, &[]),
        (r::PAUSE, first, primary::PAUSE_EXITING, &[]),
        (r::PAUSE, second, secondary::PAUSE_LOOP_EXITING, &[]),
        (r::GDTR_IDTR_ACCESS, second, secondary::DESCRIPTOR_TABLE_EXITING, &[]),
        (r::LDTR_TR_ACCESS, second, secondary::DESCRIPTOR_TABLE_EXITING, &[]),
        (r::WBINVD, second, secondary::WBINVD_EXITING, &[]),
        (r::RDRAND, second, secondary::RDRAND_EXITING, &[]),
        (r::RDSEED, second, secondary::RDSEED_EXITING, &[]),
        (r::INVPCID, first, primary::INVLPG_EXITING, &[(second, secondary::INVPCID)]),
        (r::XSAVES, second, secondary::XSAVES, &[]),
        (r::XRSTORS, second, secondary::XSAVES, &[]),
        (r::EXTERNAL_INTERRUPT, Field::PinBasedControls, pin::EXTERNAL_INTERRUPT_EXITING, &[]),
        (r::TPR_BELOW_THRESHOLD, first, primary::TPR_SHADOW, &[]),
        (r::APIC_ACCESS, second, secondary::VIRTUALIZE_APIC_ACCESSES, &[]),
    ] {
        let set = [with, &[(field, bit)]].concat();
        reflected(&mut with_controls(&set, &[]), reason);
        embedders(&mut with_controls(with, &[(field, bit)]), reason);
    }
}

#[test]
fn invpcid_exits_with_both_its_controls_only() {
    let both = [(Field::PrimaryControls, primary::INVLPG_EXITING), (Field::SecondaryControls, secondary::INVPCID)];
    reflected(&mut with_controls(&both, &[]), r::INVPCID);
    for one in both {
        let other = both.into_iter().filter(|each| *each != one).collect::<Vec<_>>();
        embedders(&mut with_controls(&[one], &other), r::INVPCID);
    }
}

#[test]
fn exits_of_apic_virtualization() {
    let shadow = (Field::PrimaryControls, primary::TPR_SHADOW);
    let interrupts = (Field::PinBasedControls, pin::EXTERNAL_INTERRUPT_EXITING);
    for (reason, bit) in [
        (r::APIC_WRITE, secondary::APIC_REGISTER_VIRTUALIZATION),
        (r::VIRTUALIZED_EOI, secondary::VIRTUAL_INTERRUPT_DELIVERY),
    ] {
        let set = [shadow, interrupts, (Field::SecondaryControls, bit)];
        reflected(&mut with_controls(&set, &[]), reason);
        embedders(&mut with_controls(&set[..2], &[]), reason);
    }
}

#[test]
fn external_interrupts_of_an_embedder_that_takes_them_itself() {
    let mut rig = Rig::filled();
    let fields = rig.plus(Field::PinBasedControls, pin::EXTERNAL_INTERRUPT_EXITING.into());
    rig.set(&[fields]);
    let own = rig.vmcs01.peek(Field::PinBasedControls) | u64::from(pin::EXTERNAL_INTERRUPT_EXITING);
    rig.vmcs01.poke(Field::PinBasedControls, own);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    embedders(&mut rig, r::EXTERNAL_INTERRUPT);
}

#[test]
fn nmis_are_the_embedders_that_wants_them() {
    let nmi = |rig: &mut Rig| rig.vmcs02.poke(Field::ExitInterruptionInfo, 0x8000_0202);
    let wants = [(Field::PinBasedControls, pin::NMI_EXITING)];
    let mut rig = with_controls(&wants, &[]);
    nmi(&mut rig);
    embedders(&mut rig, r::EXCEPTION_OR_NMI);
    // An embedder that lets them through sees L1's wish instead.
    for (controls, to_l1) in [(&wants[..], true), (&[], false)] {
        let mut rig = Rig::filled();
        rig.vmcs01.poke(Field::PinBasedControls, 0x16);
        for (field, bits) in controls {
            let fields = rig.plus(*field, u64::from(*bits));
            rig.set(&[fields]);
        }
        assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
        rig.run();
        nmi(&mut rig);
        match to_l1 {
            true => {
                reflected(&mut rig, r::EXCEPTION_OR_NMI);
                assert_eq!(rig.told(Field::ExitInterruptionInfo), 0x8000_0202);
                assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), 8, "blocked by its NMI");
            }
            false => embedders(&mut rig, r::EXCEPTION_OR_NMI),
        }
    }
}

#[test]
fn the_monitor_trap_flag() {
    // Bochs lacks it; a processor that has it is this one and a bit.
    let mut host = crate::rig::host();
    host.primary.allowed |= primary::MONITOR_TRAP_FLAG;
    let make = || Rig::filled_with(nvmx::caps::Config::all(host, false, false).unwrap());
    let mut rig = make();
    let fields = rig.plus(Field::PrimaryControls, primary::MONITOR_TRAP_FLAG.into());
    rig.set(&[fields]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    reflected(&mut rig, r::MONITOR_TRAP_FLAG);
    // Injected as a pending event, without the control.
    let mut rig = make();
    rig.set(&[(Field::EntryInterruptionInfo, 0x8000_0700)]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0700);
    reflected(&mut rig, r::MONITOR_TRAP_FLAG);
    // Neither.
    let mut rig = make();
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    embedders(&mut rig, r::MONITOR_TRAP_FLAG);
}

#[test]
fn exit_information_is_what_the_reason_defines() {
    let all = |rig: &mut Rig| {
        for (field, value) in [
            (Field::ExitQualification, 0x11),
            (Field::ExitInterruptionInfo, 0x8000_0306),
            (Field::ExitInterruptionErrorCode, 0x22),
            (Field::ExitInstructionInfo, 0x33),
            (Field::GuestLinearAddress, 0x44),
            (Field::GuestPhysicalAddress, 0x55),
        ] {
            rig.vmcs02.poke(field, value);
        }
    };
    let told = |rig: &mut Rig| {
        [
            Field::ExitQualification,
            Field::ExitInterruptionInfo,
            Field::ExitInstructionLength,
            Field::ExitInstructionInfo,
            Field::GuestLinearAddress,
            Field::GuestPhysicalAddress,
        ]
        .map(|field| rig.told(field))
    };
    for (reason, expected) in [
        (r::CPUID, [0, 0, 2, 0, 0, 0]),
        (r::TRIPLE_FAULT, [0, 0, 0, 0, 0, 0]),
        (r::TASK_SWITCH, [0x11, 0, 2, 0, 0, 0]),
        (r::VMREAD, [0x11, 0, 2, 0x33, 0, 0]),
        (r::VMLAUNCH, [0, 0, 2, 0, 0, 0]),
        (r::INVEPT, [0x11, 0, 2, 0x33, 0, 0]),
    ] {
        let mut rig = Rig::running(&[]);
        all(&mut rig);
        reflected(&mut rig, reason);
        assert_eq!(told(&mut rig), expected, "{:?}", name(reason));
    }
    let mut rig = with_controls(&[(Field::PrimaryControls, primary::UNCONDITIONAL_IO_EXITING)], &[]);
    all(&mut rig);
    reflected(&mut rig, r::IO);
    assert_eq!(told(&mut rig), [0x11, 0, 2, 0x33, 0x44, 0]);
    let mut rig = Rig::running(&[(Field::ExceptionBitmap, 1 << 6)]);
    all(&mut rig);
    reflected(&mut rig, r::EXCEPTION_OR_NMI);
    assert_eq!(told(&mut rig), [0x11, 0x8000_0306, 0, 0, 0, 0]);
}
