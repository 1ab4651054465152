use nsvm::msr::{EFER, IGNNE, SMM_CTL, SVM_KEY, VM_CR, VM_HSAVE_PA};
use nsvm::vmcb::bits::efer;
use nsvm::{L1Exit, exit_code};

use crate::rig::Rig;

const GP: u64 = 1 << 31 | 1 << 11 | 3 << 8 | 13;

fn accepted(rig: &mut Rig, index: u32, value: u64) {
    let rip = rig.vmcb01.save.rip;
    assert_eq!(rig.wrmsr(index, value), L1Exit::Resume);
    assert_eq!((rig.vmcb01.control.event_inj, rig.vmcb01.save.rip), (0, rip + 2), "{index:#x} {value:#x}");
}

fn rejected(rig: &mut Rig, index: u32, value: u64) {
    let rip = rig.vmcb01.save.rip;
    assert_eq!(rig.wrmsr(index, value), L1Exit::Resume);
    assert_eq!((rig.vmcb01.control.event_inj, rig.vmcb01.save.rip), (GP, rip), "{index:#x} {value:#x}");
}

#[test]
fn efer_shows_l1_its_own_svme() {
    let mut rig = Rig::new();
    let long = efer::LME | efer::LMA;
    assert_eq!(rig.rdmsr(EFER), (L1Exit::Resume, long));
    accepted(&mut rig, EFER, long | efer::SVME);
    assert_eq!(rig.rdmsr(EFER).1, long | efer::SVME);
    accepted(&mut rig, EFER, long | efer::NXE);
    assert_eq!(rig.rdmsr(EFER).1, long | efer::NXE);
    assert_eq!(rig.vmcb01.save.efer & efer::SVME, efer::SVME, "the processor needs it");
    // LMA is the processor's.
    accepted(&mut rig, EFER, efer::LME);
    assert_eq!(rig.rdmsr(EFER).1, long);
    rejected(&mut rig, EFER, long | 1 << 1);
    rejected(&mut rig, EFER, 0);
    rig.vmcb01.save.cr0 &= 0x7FFF_FFFF;
    accepted(&mut rig, EFER, 0);
}

#[test]
fn a_change_of_nxe_drops_l1s_translations() {
    let mut rig = Rig::new();
    rig.prepare();
    let asid = rig.vmcb01.control.asid;
    accepted(&mut rig, EFER, efer::LME | efer::SCE);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.asid, asid);
    accepted(&mut rig, EFER, efer::LME | efer::NXE);
    rig.prepare();
    assert_ne!(rig.vmcb01.control.asid, asid);
}

#[test]
fn vm_cr_locks() {
    let mut rig = Rig::new();
    assert_eq!(rig.rdmsr(VM_CR), (L1Exit::Resume, 0));
    rejected(&mut rig, VM_CR, 1 << 5);
    accepted(&mut rig, VM_CR, 1 << 4);
    rejected(&mut rig, EFER, efer::LME | efer::SVME);
    accepted(&mut rig, VM_CR, 0);
    rig.enable();
    rejected(&mut rig, VM_CR, 1 << 4);
    accepted(&mut rig, VM_CR, 1 << 3);
    accepted(&mut rig, VM_CR, 1 << 4);
    assert_eq!(rig.rdmsr(VM_CR).1, 1 << 3, "locked");
}

#[test]
fn the_other_svm_msrs() {
    let mut rig = Rig::new();
    accepted(&mut rig, VM_HSAVE_PA, 0x1234_5000);
    assert_eq!(rig.rdmsr(VM_HSAVE_PA).1, 0x1234_5000);
    rejected(&mut rig, VM_HSAVE_PA, 0x1234_5008);
    rejected(&mut rig, VM_HSAVE_PA, 1 << 40);
    accepted(&mut rig, IGNNE, 1);
    rejected(&mut rig, IGNNE, 2);
    accepted(&mut rig, SMM_CTL, 0x1F);
    rejected(&mut rig, SMM_CTL, 0x20);
    rejected(&mut rig, SVM_KEY, 0);
    let rip = rig.vmcb01.save.rip;
    rig.rdmsr(SVM_KEY);
    assert_eq!((rig.vmcb01.control.event_inj, rig.vmcb01.save.rip), (GP, rip));
    // The processor clears EVENTINJ; so does the next exit.
    rig.regs.rcx = 0x10;
    assert_eq!(rig.l1(exit_code::MSR, &[]), L1Exit::NotMine);
    assert_eq!(rig.vmcb01.control.event_inj, 0);
}

#[test]
fn svm_off_sets_gif() {
    let mut rig = Rig::ready();
    rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]);
    accepted(&mut rig, EFER, efer::LME);
    assert!(rig.nested.gif());
}
