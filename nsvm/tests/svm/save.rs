use hvcore::addr::Level;
use nsvm::caps::{Config, Features};
use nsvm::check::Refusal;
use nsvm::save::{RestoreError, SavedState};
use nsvm::vmcb::bits::{cr0, int_ctl, misc1, tlb};
use nsvm::{L1Exit, L2Exit, NestedSvm, exit_code};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::rig::{Rig, host, plain};

fn config() -> Config {
    Config::all(plain(), 8, true).unwrap()
}

fn save(rig: &mut Rig) -> SavedState {
    rig.call(|nested, m| nested.save(m.vmcb01, m.vmcb02))
}

/// Restores in place, after everything outside L1's memory and VMCB01's controls was wiped.
fn restore(rig: &mut Rig, saved: &SavedState) -> Result<(), RestoreError> {
    rig.vmcb02.zero();
    rig.vmcb01.save.zero();
    (rig.vmcb01.control.event_inj, rig.vmcb01.control.int_state) = (0, 0);
    let restored = rig.call(|_, m| NestedSvm::restore(config(), saved, m))?;
    rig.nested = restored;
    Ok(())
}

fn in_l2() -> Rig {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT | misc1::MSR_PROT;
    rig.vmcb12.control.int_ctl = int_ctl::V_INTR_MASKING | int_ctl::V_IRQ | 0x50 << 32;
    rig.vmcb12.enlightenments.vm_id = 0x77;
    rig.vmcb12.enlightenments.vp_id = 3;
    rig.enter();
    rig.prepare();
    rig.vmcb02.save.rax = 0x1234;
    rig.vmcb02.save.cs.base = 0x5678;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig
}

#[test]
fn l2_goes_on_after_a_restore() {
    let mut rig = in_l2();
    rig.vmcb02.control.exit_int_info = 1 << 31 | 0x44;
    rig.prepare();
    let before = rig.vmcb02.clone();
    let asid = before.control.asid;
    rig.vmcb02.control.event_inj = 0;
    rig.vmcb02.control.exit_int_info = 1 << 31 | 0x44;
    let saved = save(&mut rig);
    restore(&mut rig, &saved).unwrap();
    assert_eq!(rig.nested.level(), Level::L2);
    assert_eq!(rig.nested.enlightenments().vm_id, 0x77);
    let plan = rig.prepare();
    assert_eq!(plan.level, Level::L2);
    assert_ne!(rig.vmcb02.control.asid, asid, "whatever flush was pending is done");
    rig.vmcb02.control.asid = asid;
    assert_eq!(rig.vmcb02.control.tlb_control, tlb::NONE);
    assert_eq!(rig.vmcb02.control, before.control);
    assert_eq!(rig.vmcb02.save, before.save);
    // Its exit tells L1 everything.
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!((rig.vmcb12.save.rax, rig.vmcb12.save.cs.base), (0x1234, 0x5678));
    assert_eq!(rig.vmcb01.save.rip, crate::rig::L1_RIP + 5);
}

#[test]
fn a_restored_exit_writes_groups_that_the_copies_do_not_know() {
    let mut rig = in_l2();
    let saved = save(&mut rig);
    // Nothing differs from the VMCB that was entered, except that memory is another one by now.
    let mut vmcb = rig.vmcb12.clone();
    vmcb.save.zero();
    rig.write(crate::rig::VMCB12, vmcb.as_bytes());
    restore(&mut rig, &saved).unwrap();
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    let (got, now) = (&rig.vmcb12.save, &saved.l2.save);
    assert_eq!((got.es, got.cs, got.ss, got.ds), (now.es, now.cs, now.ss, now.ds));
    assert_eq!((got.gdtr, got.idtr, got.efer, got.cr2), (now.gdtr, now.idtr, now.efer, now.cr2));
    assert_eq!((got.rsp, got.rax, got.cr0, got.rip), (now.rsp, now.rax, now.cr0, now.rip));
}

#[test]
fn l1_with_gif_clear_and_events_pending() {
    let mut rig = Rig::ready();
    rig.wrmsr(nsvm::msr::VM_HSAVE_PA, 0x7000);
    rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]);
    rig.nested.pend_nmi();
    rig.nested.pend_interrupt(Some(0x99));
    let saved = save(&mut rig);
    restore(&mut rig, &saved).unwrap();
    assert!(!rig.nested.gif() && rig.nested.svm_enabled());
    assert_eq!(rig.nested.pending_interrupt(), Some(0x99));
    assert_eq!(rig.rdmsr(nsvm::msr::VM_HSAVE_PA).1, 0x7000);
    assert_eq!(rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 2 << 8 | 2);
}

#[test]
fn nmis_stay_blocked_until_iret_and_no_longer() {
    const NMI: u64 = 1 << 31 | 2 << 8 | 2;
    for executed in [false, true] {
        let mut rig = Rig::ready();
        rig.nested.pend_nmi();
        rig.prepare();
        assert_eq!(rig.l1(exit_code::IRET, &[0xCF]), L1Exit::Resume);
        if executed {
            rig.vmcb01.save.rip = 0x8800;
        }
        let saved = save(&mut rig);
        restore(&mut rig, &saved).unwrap();
        rig.nested.pend_nmi();
        rig.prepare();
        assert_eq!(rig.vmcb01.control.event_inj, if executed { NMI } else { 0 });
    }
}

#[test]
fn an_exit_that_is_not_dealt_with_yet() {
    let mut rig = in_l2();
    rig.prepare();
    (rig.vmcb02.control.exit_code, rig.vmcb02.control.exit_info_1) = (exit_code::HLT, 9);
    let saved = save(&mut rig);
    restore(&mut rig, &saved).unwrap();
    assert_eq!(rig.call(|n, m| n.l2_exit(m, |_, _, _| false)), L2Exit::ToL1);
    rig.get();
    assert_eq!((rig.vmcb12.control.exit_code, rig.vmcb12.control.exit_info_1), (exit_code::HLT, 9));
}

#[test]
fn bytes_go_there_and_back() {
    let saved = save(&mut in_l2());
    assert_eq!(SavedState::read_from_bytes(saved.as_bytes()).unwrap(), saved);
}

fn rejected(error: RestoreError, change: impl Fn(&mut SavedState)) {
    let mut rig = in_l2();
    let mut saved = save(&mut rig);
    restore(&mut rig, &saved).unwrap(); // the control
    change(&mut saved);
    assert_eq!(restore(&mut rig, &saved), Err(error));
}

#[test]
fn what_cannot_be_is_not_restored() {
    rejected(RestoreError::Version, |s| s.version = 1);
    rejected(RestoreError::Flags, |s| s.flags |= 1 << 7);
    rejected(RestoreError::Flags, |s| s.flags &= !1);
    rejected(RestoreError::Flags, |s| s.reserved = 1);
    rejected(RestoreError::Flags, |s| s.vector = 256);
    rejected(RestoreError::Msr, |s| s.vm_cr = 1 << 5);
    rejected(RestoreError::Msr, |s| s.hsave_pa = 8);
    rejected(RestoreError::Msr, |s| s.hsave_pa = 1 << 40);
    rejected(RestoreError::Msr, |s| s.tsc_ratio = 2 << 32);
    rejected(RestoreError::VmcbAddress, |s| s.vmcb12 |= 1);
    rejected(RestoreError::VmcbAddress, |s| s.vmcb12 = 1 << 40);
    rejected(RestoreError::VmcbAddress, |s| s.flags &= !4);
    rejected(RestoreError::Controls, |s| s.control.int_ctl |= int_ctl::AVIC);
    rejected(RestoreError::Controls, |s| s.control.np_control = 2);
    rejected(RestoreError::Controls, |s| s.control.virt_ext = 1);
    rejected(RestoreError::Controls, |s| s.l2.int_state = 2);
    rejected(RestoreError::Controls, |s| s.l1.tpr = 256);
    rejected(RestoreError::L2(Refusal::Asid), |s| s.control.asid = 0);
    rejected(RestoreError::L2(Refusal::VmrunIntercept), |s| s.control.intercepts.misc2 = 0);
    rejected(RestoreError::L2(Refusal::Cr0), |s| s.l2.save.cr0 = cr0::NW);
    rejected(RestoreError::L1(Refusal::Cr4), |s| s.l1.save.cr4 |= 1 << 63);
    rejected(RestoreError::L1(Refusal::Svme), |s| s.l1.save.efer = 0);
    rejected(RestoreError::L1(Refusal::GuestPat), |s| s.l1.save.g_pat = 2);
    rejected(RestoreError::L2(Refusal::GuestPat), |s| s.l2.save.g_pat = 3 << 8);
    rejected(RestoreError::Event, |s| s.l1.event_inj = 1 << 31 | 3 << 8 | 5);
    rejected(RestoreError::Event, |s| s.l2.event_inj = 1 << 31 | 1 << 8);
    rejected(RestoreError::Event, |s| s.l1.exit_int_info = 1 << 31 | 7 << 8);
    let mut rig = in_l2();
    let mut saved = save(&mut rig);
    // Where the ratio is offered it may be anything that WRMSR takes.
    let host = host(Features::NP.union(Features::TSC_RATE));
    let rate = Config::new(host, config().features().union(Features::TSC_RATE), 8, true).unwrap();
    for (ratio, error) in [(1 << 40, Some(RestoreError::Msr)), (2 << 32, None)] {
        saved.tsc_ratio = ratio;
        let restored = rig.call(|_, m| NestedSvm::restore(rate, &saved, m));
        assert_eq!(restored.as_ref().err(), error.as_ref());
        if let Ok(nested) = restored {
            assert_eq!(nested.hardware_tsc_ratio(1 << 32), 2 << 32);
        }
    }
    saved.tsc_ratio = 1 << 32;
    let plain = Config::new(plain(), Features::NP, 8, false).unwrap();
    let error = rig.call(|_, m| NestedSvm::restore(plain, &saved, m).err());
    assert_eq!(error, Some(RestoreError::Enlightenments));
}

/// L1 handles an NMI, and its IRET is watched: a state that is saved then, in L1 or in an L2 that the handler runs,
/// leaves nothing in VMCB01 that nobody knows of once it is restored.
#[test]
fn saving_takes_the_watch_on_iret_out() {
    for enters in [false, true] {
        let mut rig = Rig::ready();
        rig.nested.pend_nmi();
        rig.prepare();
        let iret = |rig: &Rig| rig.vmcb01.control.intercepts.misc1 & misc1::IRET != 0;
        assert!(iret(&rig), "the control");
        rig.vmcb01.control.exit_code = exit_code::NMI;
        assert_eq!(rig.call(|nested, m| nested.l1_exit(m)), L1Exit::NotMine);
        if enters {
            rig.enter();
        }
        let saved = save(&mut rig);
        assert!(!iret(&rig));
        let restored = rig.call(|_, m| NestedSvm::restore(config(), &saved, m)).unwrap();
        rig.nested = restored;
        rig.prepare();
        assert_eq!(iret(&rig), !enters);
        if enters {
            // L2's IRET ends the blocking; L1's is its own affair then.
            assert_ne!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0);
            assert_eq!(rig.l2(exit_code::IRET), L2Exit::Resume);
            rig.vmcb02.save.rip += 2;
            assert_eq!(rig.l2(exit_code::VMRUN), L2Exit::ToL1);
            rig.prepare();
            assert!(!iret(&rig));
        }
    }
}
