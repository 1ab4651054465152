use nsvm::check::Refusal;
use nsvm::vmcb::Vmcb;
use nsvm::vmcb::bits::{cr0, cr4, efer, misc2, seg};
use nsvm::{L1Exit, exit_code};

use crate::rig::{L1_RIP, Rig, VMCB12};

/// VMRUN with `change` applied is refused for `refusal`; L1 sees -1 and is past its VMRUN with GIF clear.
fn refused(refusal: Refusal, change: impl Fn(&mut Vmcb)) {
    let mut rig = Rig::ready();
    let rip = rig.vmcb01.save.rip;
    rig.vmcb12.control.exit_info_1 = 77;
    rig.vmcb12.control.exit_int_info = 77;
    change(&mut rig.vmcb12);
    assert_eq!(rig.vmrun(), L1Exit::Resume, "{refusal:?}");
    assert_eq!(rig.nested.last_refusal(), Some(refusal));
    rig.get();
    let control = &rig.vmcb12.control;
    assert_eq!(control.exit_code, exit_code::INVALID);
    assert_eq!((control.exit_info_1, control.exit_info_2, control.exit_int_info), (0, 0, 0));
    assert_eq!(control.event_inj, 0);
    assert!(!rig.nested.gif());
    assert_eq!(rig.vmcb01.save.rip, rip + 3);
    assert_eq!(rig.vmcb01.save.rax, VMCB12);
    assert_eq!(rig.vmcb01.save.dr7, 0x400);
}

/// The same just short of it enters.
fn enters(change: impl Fn(&mut Vmcb)) {
    let mut rig = Rig::ready();
    change(&mut rig.vmcb12);
    rig.enter();
    assert!(rig.nested.gif());
    assert_eq!(rig.vmcb01.save.rip, L1_RIP + 2 + 3);
}

#[test]
fn control_area() {
    refused(Refusal::VmrunIntercept, |v| v.control.intercepts.misc2 &= !misc2::VMRUN);
    refused(Refusal::Asid, |v| v.control.asid = 0);
    enters(|v| v.control.asid = 7);
    // Physical addresses have 40 bits.
    refused(Refusal::PermissionMap, |v| v.control.msrpm_base = (1 << 40) - 0x1000);
    enters(|v| v.control.msrpm_base = (1 << 40) - 0x2000);
    refused(Refusal::PermissionMap, |v| v.control.iopm_base = (1 << 40) - 0x2000);
    enters(|v| v.control.iopm_base = (1 << 40) - 0x3000);
    refused(Refusal::PermissionMap, |v| v.control.iopm_base = u64::MAX);
    enters(|v| v.control.iopm_base += 0xFFF);
}

#[test]
fn event_injection() {
    let valid = 1 << 31;
    for kind in [1, 5, 6, 7] {
        refused(Refusal::EventInjection, |v| v.control.event_inj = valid | kind << 8 | 20);
        enters(|v| v.control.event_inj = kind << 8 | 20);
    }
    refused(Refusal::EventInjection, |v| v.control.event_inj = valid | 3 << 8 | 2);
    refused(Refusal::EventInjection, |v| v.control.event_inj = valid | 3 << 8 | 32);
    enters(|v| v.control.event_inj = valid | 3 << 8 | 31);
    enters(|v| v.control.event_inj = valid | 3 << 8 | 13 | 1 << 11);
    enters(|v| v.control.event_inj = valid | 32);
    enters(|v| v.control.event_inj = valid | 2 << 8 | 99);
    enters(|v| v.control.event_inj = valid | 4 << 8 | 0x80);
}

#[test]
fn nested_paging() {
    enters(|v| v.control.np_control = 1);
    refused(Refusal::NestedPaging, |v| (v.control.np_control, v.control.n_cr3) = (1, 1 << 40));
    enters(|v| (v.control.np_control, v.control.n_cr3) = (0, 1 << 40));
    for bad in [2, 3, 8, 0x80] {
        refused(Refusal::GuestPat, |v| (v.control.np_control, v.save.g_pat) = (1, bad << 24));
        enters(|v| (v.control.np_control, v.save.g_pat) = (0, bad << 24));
    }
    for good in [0, 1, 4, 5, 6, 7] {
        enters(|v| (v.control.np_control, v.save.g_pat) = (1, good << 56));
    }
    // L1 itself must page.
    let mut rig = Rig::ready();
    rig.vmcb01.save.cr0 &= !cr0::PG;
    rig.vmcb12.control.np_control = 1;
    assert_eq!(rig.vmrun(), L1Exit::Resume);
    assert_eq!(rig.nested.last_refusal(), Some(Refusal::NestedPaging));
}

#[test]
fn state_save_area() {
    refused(Refusal::Svme, |v| v.save.efer &= !efer::SVME);
    refused(Refusal::Efer, |v| v.save.efer |= 1 << 1);
    refused(Refusal::Efer, |v| v.save.efer |= 1 << 63);
    enters(|v| v.save.efer |= efer::NXE | efer::SCE);
    refused(Refusal::Cr0, |v| v.save.cr0 |= cr0::NW);
    enters(|v| v.save.cr0 |= cr0::NW | cr0::CD);
    enters(|v| v.save.cr0 |= cr0::CD);
    refused(Refusal::Cr0, |v| v.save.cr0 |= 1 << 32);
    refused(Refusal::Cr3, |v| v.save.cr3 |= 1 << 40);
    enters(|v| v.save.cr3 |= 1 << 39);
    refused(Refusal::Cr4, |v| v.save.cr4 |= 1 << 15);
    refused(Refusal::Cr4, |v| v.save.cr4 |= 1 << 32);
    refused(Refusal::Dr, |v| v.save.dr6 |= 1 << 32);
    refused(Refusal::Dr, |v| v.save.dr7 |= 1 << 63);
    enters(|v| v.save.dr7 |= 1 << 31);
}

#[test]
fn long_mode() {
    refused(Refusal::LongMode, |v| v.save.cr4 &= !cr4::PAE);
    refused(Refusal::LongMode, |v| v.save.cr0 &= !cr0::PE);
    refused(Refusal::LongMode, |v| v.save.cs.attrib |= seg::DB);
    // Each is legal without one of LME and PG.
    enters(|v| (v.save.cr4, v.save.cr0) = (0, cr0::PE));
    enters(|v| v.save.cr0 = 0);
    enters(|v| (v.save.cs.attrib, v.save.efer) = (0x9B | seg::L | seg::DB, efer::SVME));
    enters(|v| v.save.cs.attrib = 0x9B | seg::DB);
}

#[test]
fn control_flow_enforcement() {
    let mut host = crate::rig::plain();
    host.cr4_valid |= cr4::CET;
    for (cr0, refusal) in [(0x8000_0011, Some(Refusal::Cet)), (0x8001_0011, None)] {
        let mut rig = Rig::with(nsvm::caps::Config::all(host, 8, false).unwrap());
        rig.enable();
        rig.vmcb12.save.cr4 |= cr4::CET;
        rig.vmcb12.save.cr0 = cr0;
        rig.vmrun();
        assert_eq!(rig.nested.last_refusal(), refusal);
    }
}

#[test]
fn a_vmcb_that_cannot_be_told_is_a_shutdown() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.asid = 0;
    rig.memory.read_only.set(true);
    assert_eq!(rig.vmrun(), L1Exit::Shutdown);
}
