//! Exits to L1: L1's host state, MSR areas, VMX aborts; entries that fail late; the hypercall that L0 takes.

use hvcore::addr::Level;
use nvmx::bits::{cr0, cr4};
use nvmx::controls::{entry, exit, secondary};
use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::vmexit::abort;
use nvmx::{Entry, Exit, L1Exit, L2Exit};

use crate::rig::{EVMCS, Rig, VMCS12};

const STORE: u64 = 0x2_A000;
const LOAD: u64 = 0x2_B000;
const ENTRY_LOAD: u64 = 0x2_C000;
const STAR: u32 = 0xC000_0081;
const PAT: u32 = 0x277;

fn l1(rig: &mut Rig, field: Field, bits: u32) {
    let fields = rig.plus(field, bits.into());
    rig.set(&[fields]);
}

fn launch(rig: &mut Rig) {
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    rig.run();
}

#[test]
fn host_state_becomes_l1s() {
    let mut rig = Rig::filled();
    l1(&mut rig, Field::ExitControls, exit::LOAD_PAT);
    rig.set(&[
        (Field::HostCr3, 0x7_3000),
        (Field::HostPat, 0x0505_0505_0505_0505),
        (Field::HostSysenterCs, 0x33),
        (Field::HostSysenterEsp, 0x3300),
        (Field::HostSysenterEip, 0x3301),
        (Field::HostFsSelector, 0x28),
        (Field::HostFsBase, 0x4400),
        (Field::HostGsSelector, 0),
        (Field::HostGsBase, 0x5500),
        (Field::HostDsSelector, 0),
    ]);
    launch(&mut rig);
    for (field, value) in [(Field::GuestRflags, 0x202), (Field::GuestDr7, 0x455), (Field::GuestInterruptibility, 1)] {
        rig.vmcs01.poke(field, value);
    }
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    for (field, value) in [
        (Field::GuestCr0, 0x8000_0031),
        (Field::GuestCr3, 0x7_3000),
        (Field::GuestCr4, cr4::PAE | cr4::VMXE),
        (Field::Cr4ReadShadow, cr4::PAE | cr4::VMXE),
        (Field::GuestEfer, 0xD00),
        (Field::GuestPat, 0x0505_0505_0505_0505),
        (Field::GuestRip, 0xB000),
        (Field::GuestRsp, 0xC000),
        (Field::GuestRflags, 2),
        (Field::GuestDr7, 0x400),
        (Field::GuestDebugctl, 0),
        (Field::GuestSysenterCs, 0x33),
        (Field::GuestSysenterEsp, 0x3300),
        (Field::GuestSysenterEip, 0x3301),
        (Field::GuestCsSelector, 8),
        (Field::GuestCsBase, 0),
        (Field::GuestCsLimit, 0xFFFF_FFFF),
        (Field::GuestCsAccessRights, 0xA09B),
        (Field::GuestSsSelector, 0x10),
        (Field::GuestSsAccessRights, 0xC093),
        (Field::GuestDsSelector, 0),
        (Field::GuestDsAccessRights, 0x1_C093),
        (Field::GuestFsSelector, 0x28),
        (Field::GuestFsBase, 0x4400),
        (Field::GuestGsBase, 0x5500),
        (Field::GuestGsAccessRights, 0x1_C093),
        (Field::GuestTrSelector, 0x18),
        (Field::GuestTrBase, 0x1234_0000),
        (Field::GuestTrLimit, 0x67),
        (Field::GuestTrAccessRights, 0x8B),
        (Field::GuestLdtrSelector, 0),
        (Field::GuestLdtrAccessRights, 0x1_0000),
        (Field::GuestGdtrBase, 0x1235_0000),
        (Field::GuestGdtrLimit, 0xFFFF),
        (Field::GuestIdtrBase, 0x1236_0000),
        (Field::GuestIdtrLimit, 0xFFFF),
    ] {
        assert_eq!(rig.vmcs01.peek(field), value, "{field:?}");
    }
}

#[test]
fn what_l1_does_not_load_stays_as_l2_left_it() {
    let mut rig = Rig::filled();
    let exits = rig.nested.vmcs12().get(Field::ExitControls) & !u64::from(exit::LOAD_EFER);
    rig.set(&[(Field::ExitControls, exits)]);
    launch(&mut rig);
    rig.vmcs02.poke(Field::GuestPat, 0x0101_0101_0101_0101);
    rig.vmcs02.poke(Field::GuestEfer, 0xD01);
    rig.vmcs02.poke(Field::GuestCr0, 0x8000_0031 | cr0::CD);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.vmcs01.peek(Field::GuestPat), 0x0101_0101_0101_0101);
    assert_eq!(rig.vmcs01.peek(Field::GuestEfer), 0xD01);
    assert_eq!(rig.vmcs01.peek(Field::GuestCr0), 0x8000_0031 | cr0::CD, "caching is not switched");
}

#[test]
fn registers_that_the_embedder_does_not_switch_are_written() {
    let perf = 0x38F;
    let bndcfgs = 0xD90;
    for embedder_switches in [true, false] {
        let mut host = crate::rig::host();
        host.perf_global_ctrl = 0xF;
        let mut rig = Rig::filled_with(nvmx::caps::Config::all(host, false, false).unwrap());
        l1(&mut rig, Field::ExitControls, exit::LOAD_PERF_GLOBAL_CTRL | exit::CLEAR_BNDCFGS);
        rig.set(&[(Field::HostPerfGlobalCtrl, 3)]);
        if embedder_switches {
            let controls = entry::LOAD_PERF_GLOBAL_CTRL | entry::LOAD_BNDCFGS;
            rig.vmcs01.poke(Field::EntryControls, rig.vmcs01.peek(Field::EntryControls) | u64::from(controls));
        }
        rig.vmcs01.poke(Field::GuestBndcfgs, 1);
        rig.regs.msrs = vec![(perf, 7), (bndcfgs, 1)];
        launch(&mut rig);
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        let in_msrs = (rig.regs.msrs[0].1, rig.regs.msrs[1].1);
        let in_vmcs = (rig.vmcs01.peek(Field::GuestPerfGlobalCtrl), rig.vmcs01.peek(Field::GuestBndcfgs));
        let expected = if embedder_switches { ((7, 1), (3, 0)) } else { ((3, 0), (0, 1)) };
        assert_eq!((in_msrs, in_vmcs), expected);
    }
}

/// An MSR area at `at`.
fn area(rig: &Rig, at: u64, entries: &[(u32, u64)]) {
    for (i, (msr, value)) in entries.iter().enumerate() {
        rig.write(at + 16 * i as u64, &u64::from(*msr).to_le_bytes());
        rig.write(at + 16 * i as u64 + 8, &value.to_le_bytes());
    }
}

fn value_at(rig: &Rig, at: u64) -> u64 {
    u64::from_le_bytes(rig.read(at + 8))
}

#[test]
fn msr_areas() {
    let mut rig = Rig::filled();
    rig.regs.msrs = vec![(STAR, 1)];
    rig.set(&[
        (Field::EntryMsrLoadCount, 2),
        (Field::EntryMsrLoadAddress, ENTRY_LOAD),
        (Field::ExitMsrStoreCount, 2),
        (Field::ExitMsrStoreAddress, STORE),
        (Field::ExitMsrLoadCount, 2),
        (Field::ExitMsrLoadAddress, LOAD),
    ]);
    area(&rig, ENTRY_LOAD, &[(STAR, 2), (PAT, 0x0404_0404_0404_0404)]);
    area(&rig, STORE, &[(STAR, 0), (PAT, 0)]);
    area(&rig, LOAD, &[(STAR, 3), (PAT, 0x0606_0606_0606_0606)]);
    launch(&mut rig);
    assert_eq!(rig.regs.msrs, [(STAR, 2)]);
    assert_eq!(rig.vmcs02.peek(Field::GuestPat), 0x0404_0404_0404_0404);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!((value_at(&rig, STORE), value_at(&rig, STORE + 16)), (2, 0x0404_0404_0404_0404));
    assert_eq!(rig.regs.msrs, [(STAR, 3)]);
    assert_eq!(rig.vmcs01.peek(Field::GuestPat), 0x0606_0606_0606_0606);
    // A second time: L1's own PAT again, then the area's.
    rig.vmcs01.poke(Field::GuestPat, 0x0707_0707_0707_0707);
    rig.set(&[(Field::EntryMsrLoadCount, 0)]);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.vmcs02.peek(Field::GuestPat), 0x0707_0707_0707_0707);
}

#[test]
fn an_entry_whose_msrs_cannot_be_loaded() {
    const EFER: u32 = 0xC000_0080;
    for (bad, failing) in [
        ((0xC000_0100, 0), 2),
        ((0x802, 0), 2),
        ((STAR + 1, 0), 2),
        ((PAT, 2), 2),
        ((0x175, 1 << 63), 2),
        ((0x1D9, 1 << 5), 2),
        ((0x1D9, 1), 0),
        ((EFER, 0), 2),
        ((EFER, 0xD00), 0),
        ((EFER, 0x1_0000_0D00), 2),
        ((STAR, 9), 0),
        ((PAT, 6), 0),
        ((0x175, 1), 0),
    ] {
        let mut rig = Rig::filled();
        rig.regs.msrs = vec![(STAR, 1)];
        rig.set(&[(Field::EntryMsrLoadCount, 2), (Field::EntryMsrLoadAddress, ENTRY_LOAD)]);
        area(&rig, ENTRY_LOAD, &[(STAR, 5), bad]);
        if failing == 0 {
            launch(&mut rig);
            continue;
        }
        assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::Resume, "{bad:x?}");
        assert_eq!(rig.told(Field::ExitReason), 0x8000_0022);
        assert_eq!(rig.told(Field::ExitQualification), failing);
        assert_eq!(rig.regs.msrs, [(STAR, 5)], "what came before it is loaded");
        // L1 mends it: not launched so far.
        rig.set(&[(Field::EntryMsrLoadCount, 1)]);
        launch(&mut rig);
    }
    // Reserved bits of an entry, and an area without memory.
    let mut rig = Rig::filled();
    rig.regs.msrs = vec![(STAR, 1)];
    rig.set(&[(Field::EntryMsrLoadCount, 1), (Field::EntryMsrLoadAddress, ENTRY_LOAD)]);
    rig.write(ENTRY_LOAD, &(u64::from(STAR) | 1 << 32).to_le_bytes());
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::Resume);
    assert_eq!(rig.told(Field::ExitQualification), 1);
    rig.set(&[(Field::EntryMsrLoadAddress, 0xF000_0000)]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::Resume);
    assert_eq!(rig.told(Field::ExitReason), 0x8000_0022);
}

#[test]
fn an_area_of_more_than_512_entries() {
    for (count, fails) in [(512, false), (513, true)] {
        let mut rig = Rig::filled();
        rig.regs.msrs = vec![(STAR, 1)];
        area(&rig, 0x8_0000, &vec![(STAR, 5); 513]);
        rig.set(&[(Field::EntryMsrLoadCount, count), (Field::EntryMsrLoadAddress, 0x8_0000)]);
        match fails {
            false => launch(&mut rig),
            true => {
                assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::Resume);
                assert_eq!(rig.told(Field::ExitQualification), 513);
            }
        }
    }
}

fn aborted(rig: &mut Rig, indicator: u32) {
    assert_eq!(rig.l2(r::CPUID), L2Exit::Shutdown);
    assert_eq!(u32::from_le_bytes(rig.read(VMCS12 + 4)), indicator);
    assert_eq!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Shutdown);
    // INIT brings the processor back.
    rig.nested.reset();
    assert!(matches!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Run(_)));
}

#[test]
fn vmx_aborts() {
    let rig_with = |count, address, bad: (u32, u64)| {
        let mut rig = Rig::filled();
        rig.regs.msrs = vec![(STAR, 1)];
        rig.set(&[(count, 1), (address, STORE)]);
        area(&rig, STORE, &[bad]);
        launch(&mut rig);
        rig
    };
    let store = |bad| rig_with(Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress, bad);
    let load = |bad| rig_with(Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress, bad);
    aborted(&mut store((STAR + 1, 0)), abort::SAVING_MSRS);
    aborted(&mut store((0x802, 0)), abort::SAVING_MSRS);
    assert_eq!(store((STAR, 0)).l2(r::CPUID), L2Exit::ToL1);
    aborted(&mut load((STAR + 1, 0)), abort::LOADING_MSRS);
    aborted(&mut load((0xC000_0101, 0)), abort::LOADING_MSRS);
    aborted(&mut load((PAT, 2)), abort::LOADING_MSRS);
    assert_eq!(load((PAT, 6)).l2(r::CPUID), L2Exit::ToL1);
}

/// An L1 without long mode, with PAE paging.
fn pae_l1(pdpte: u64) -> Rig {
    let mut rig = Rig::filled();
    rig.vmcs01.poke(Field::GuestEfer, 0);
    let exits =
        rig.nested.vmcs12().get(Field::ExitControls) & !u64::from(exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER);
    let entries =
        rig.nested.vmcs12().get(Field::EntryControls) & !u64::from(entry::LOAD_EFER | entry::IA32E_MODE_GUEST);
    rig.set(&[
        (Field::ExitControls, exits),
        (Field::EntryControls, entries),
        (Field::GuestCsAccessRights, 0xC09B),
        (Field::GuestCr4, cr4::VMXE),
    ]);
    rig.write(0x7_1008, &pdpte.to_le_bytes());
    launch(&mut rig);
    rig
}

#[test]
fn pdptes_of_a_pae_l1() {
    let mut rig = pae_l1(0x5001);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.vmcs01.peek(Field::GuestPdpte1), 0x5001);
    assert_eq!(rig.vmcs01.peek(Field::GuestCsAccessRights), 0xC09B);
    assert_eq!(rig.vmcs01.peek(Field::GuestEfer), 0);
    aborted(&mut pae_l1(0x5003), abort::PDPTES);
}

#[test]
fn the_processor_refuses_late() {
    let mut rig = Rig::launched(&[]);
    rig.run();
    rig.vmcs02.poke(Field::ExitQualification, 3);
    assert_eq!(rig.l2(r::INVALID_GUEST_STATE | r::ENTRY_FAILURE), L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitReason), 0x8000_0021);
    assert_eq!(rig.told(Field::ExitQualification), 3);
    assert_eq!(rig.told(Field::GuestRip), 0x9000);
    // Still to be launched.
    launch(&mut rig);
    // Of an L2 that ran before it is the embedder's.
    assert_eq!(rig.l2(r::EPT_MISCONFIGURATION), L2Exit::EptMisconfiguration { gpa: hvcore::addr::L2Gpa::new(0) });
    rig.run();
    let refused = L2Exit::Refused { reason: 0x8000_0021, qualification: 3 };
    assert_eq!(rig.l2(r::INVALID_GUEST_STATE | r::ENTRY_FAILURE), refused);
}

#[test]
fn the_processor_fails_the_instruction() {
    let mut rig = Rig::launched(&[]);
    rig.run();
    let rip = rig.vmcs01.peek(Field::GuestRip);
    assert!(!rig.call(|nested, m| nested.entry_failed(m, 8)), "host state is the embedder's");
    assert!(rig.call(|nested, m| nested.entry_failed(m, 7)));
    assert_eq!(rig.nested.level(), Level::L1);
    assert_eq!(rig.vmcs01.peek(Field::GuestRip), rip + 4);
    assert_eq!(rig.vmcs01.peek(Field::GuestRflags), 0x42, "VMfailValid");
    assert_eq!(rig.told(Field::InstructionError), 7);
    launch(&mut rig);
    assert_eq!(rig.l2(r::EPT_MISCONFIGURATION), L2Exit::EptMisconfiguration { gpa: hvcore::addr::L2Gpa::new(0) });
    rig.run();
    assert!(!rig.call(|nested, m| nested.entry_failed(m, 7)), "L2 ran before");
}

#[test]
fn an_injected_event_is_not_injected_twice() {
    let mut rig = Rig::launched(&[(Field::EntryInterruptionInfo, 0x8000_0306)]);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0306);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::EntryInterruptionInfo), 0x306);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) >> 31, 0);
}

#[test]
fn an_nmi_may_be_injected_while_they_are_blocked_without_virtual_nmis() {
    use nvmx::controls::pin;
    let blocked = (Field::GuestInterruptibility, 8);
    let event = (Field::EntryInterruptionInfo, 0x8000_0202);
    let mut rig = Rig::launched(&[blocked, event]);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::GuestInterruptibility), 0, "or the processor would refuse");
    let virtual_nmis = rig.plus(Field::PinBasedControls, u64::from(pin::NMI_EXITING | pin::VIRTUAL_NMIS));
    let mut rig = Rig::filled();
    rig.set(&[virtual_nmis, blocked, event]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::Resume, "with them it may not");
    assert_eq!(rig.told(Field::ExitReason), 0x8000_0021);
}

#[test]
fn direct_flush_needs_the_enlightened_grant() {
    let call = |rig: &mut Rig, granted: bool| {
        rig.vmcs02.poke(Field::ExitReason, r::VMCALL.into());
        rig.vmcs02.poke(Field::ExitInstructionLength, 3);
        let mut asked = false;
        let exit = rig.call(|nested, m| {
            nested.l2_exit(m, |enlightenments, _, _| {
                asked = true;
                assert_eq!(enlightenments.vm_id, 0x77);
                granted
            })
        });
        (exit, asked)
    };
    let enlightened = |grant: u8| {
        let mut rig = Rig::announced();
        rig.write(EVMCS + 0x344, &[grant]);
        rig.write(EVMCS + 0x350, &0x77u64.to_le_bytes());
        launch(&mut rig);
        rig
    };
    assert_eq!(call(&mut enlightened(1), true), (L2Exit::DirectFlush, true));
    assert_eq!(call(&mut enlightened(1), false), (L2Exit::ToL1, true));
    assert_eq!(call(&mut enlightened(0), true), (L2Exit::ToL1, false));
    assert_eq!(call(&mut Rig::running(&[]), true), (L2Exit::ToL1, false), "a plain VMCS");
    // Done, and the TLB is locked.
    let mut rig = enlightened(1);
    assert_eq!(call(&mut rig, true).0, L2Exit::DirectFlush);
    rig.call(|_, m| nvmx::step::complete_instruction(m.vmcs02));
    assert_eq!(rig.call(|nested, m| nested.synthetic_exit(m)), L2Exit::ToL1);
    assert_eq!(rig.evmcs(Field::ExitReason), 0x1000_0031);
    assert_eq!(rig.evmcs(Field::GuestRip), 0x9003);
}

#[test]
fn the_state_between_instructions() {
    for (reason, activity, pending) in [(r::CPUID, 0, 0), (r::EXTERNAL_INTERRUPT, 1, 0x4000)] {
        let mut rig = Rig::filled();
        l1(&mut rig, Field::PinBasedControls, nvmx::controls::pin::EXTERNAL_INTERRUPT_EXITING);
        launch(&mut rig);
        rig.vmcs02.poke(Field::GuestActivity, activity);
        rig.vmcs02.poke(Field::GuestPendingDebugExceptions, pending);
        rig.spent();
        assert_eq!(rig.l2(reason), L2Exit::ToL1);
        let read = rig.spent().reads[1].contains(&Field::GuestActivity);
        assert_eq!(read, reason != r::CPUID);
        assert_eq!(rig.told(Field::GuestActivity), activity);
        assert_eq!(rig.told(Field::GuestPendingDebugExceptions), pending);
    }
    // A MOV SS keeps debug exceptions pending across any exit.
    let mut rig = Rig::running(&[]);
    rig.vmcs02.poke(Field::GuestInterruptibility, 2);
    rig.vmcs02.poke(Field::GuestPendingDebugExceptions, 0x4000);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestPendingDebugExceptions), 0x4000);
}

#[test]
fn eptp_switching() {
    const LIST: u64 = 0x2_D000;
    const OTHER: u64 = 0x8_0000 | 0x1E;
    let call = |functions: u64, rax: u64, rcx: u64| {
        let mut rig = Rig::filled();
        l1(&mut rig, Field::SecondaryControls, secondary::VM_FUNCTIONS);
        rig.set(&[(Field::VmFunctionControls, functions), (Field::EptpListAddress, LIST)]);
        rig.write(LIST + 8, &OTHER.to_le_bytes());
        rig.write(LIST + 16, &(0x6_0000u64 | 0x1E).to_le_bytes());
        rig.write(LIST + 24, &(OTHER | 0x80).to_le_bytes());
        launch(&mut rig);
        assert_eq!(rig.vmcs02.peek(Field::VmFunctionControls), 0, "each VMFUNC exits");
        (rig.regs.gprs[0], rig.regs.gprs[1]) = (rax, rcx);
        let exit = rig.l2(r::VMFUNC);
        (rig, exit)
    };
    let (mut rig, exit) = call(1, 0, 1);
    assert_eq!(exit, L2Exit::EptpSwitched);
    assert_eq!(rig.nested.context().eptp, Some(OTHER));
    assert_eq!(rig.vmcs02.peek(Field::GuestRip), 0x9002);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::EptPointer), OTHER);
    assert_eq!(call(1, 0, 2).1, L2Exit::Resume, "the same again");
    for (functions, rax, rcx) in [(1, 0, 0), (1, 0, 3), (1, 0, 512), (1, 1, 1), (0, 0, 1)] {
        assert_eq!(call(functions, rax, rcx).1, L2Exit::ToL1, "{functions} {rax} {rcx}");
    }
    let (mut rig, exit) = call(1, 64, 1);
    assert_eq!(exit, L2Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0306);
}

#[test]
fn the_page_modification_log() {
    let mut rig = Rig::filled();
    l1(&mut rig, Field::SecondaryControls, secondary::PML);
    rig.set(&[(Field::PmlAddress, 0x2_E000), (Field::PmlIndex, 511), (Field::EptPointer, 0x6_0000 | 0x5E)]);
    launch(&mut rig);
    assert_eq!(rig.vmcs02.peek(Field::SecondaryControls) & u64::from(secondary::PML), 0);
    let pml = rig.nested.pml().unwrap();
    assert_eq!((pml.address.raw(), pml.index), (0x2_E000, 511));
    rig.nested.set_pml_index(510);
    rig.vmcs02.poke(Field::GuestPhysicalAddress, 0x9999);
    assert_eq!(
        rig.l2(r::EPT_VIOLATION),
        L2Exit::EptViolation { gpa: hvcore::addr::L2Gpa::new(0x9999), qualification: 0 }
    );
    assert_eq!(rig.call(|nested, m| nested.reflect_ept(m, r::PML_FULL, 0)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitReason), r::PML_FULL.into());
    assert_eq!(rig.told(Field::GuestPhysicalAddress), 0);
    assert_eq!(rig.told(Field::PmlIndex), 510);
    assert!(Rig::running(&[]).nested.pml().is_none());
}

#[test]
fn an_exit_of_the_embedders_making() {
    let mut rig = Rig::running(&[]);
    let exit = Exit { instruction_length: 3, ..Exit::simple(r::HLT, 0) };
    assert_eq!(rig.call(|nested, m| nested.exit_to_l1(m, exit)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitReason), r::HLT.into());
    assert_eq!(rig.told(Field::ExitInstructionLength), 3);
}

#[test]
fn what_an_exit_saves_only_when_told_to() {
    for (bit, field, value) in [
        (exit::SAVE_PAT, Field::GuestPat, 0x0101_0101_0101_0101),
        (exit::SAVE_EFER, Field::GuestEfer, 0xD01),
        (exit::SAVE_DEBUG_CONTROLS, Field::GuestDr7, 0x455),
        (exit::SAVE_DEBUG_CONTROLS, Field::GuestDebugctl, 1),
    ] {
        for saves in [true, false] {
            let mut rig = Rig::filled();
            let controls = rig.nested.vmcs12().get(Field::ExitControls) & !u64::from(bit);
            rig.set(&[(Field::ExitControls, controls | if saves { u64::from(bit) } else { 0 })]);
            let before = rig.nested.vmcs12().get(field);
            launch(&mut rig);
            rig.vmcs02.poke(field, value);
            assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
            assert_eq!(rig.told(field), if saves { value } else { before }, "{field:?}");
        }
    }
}
