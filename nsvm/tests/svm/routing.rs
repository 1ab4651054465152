use hvcore::addr::{L1Gpa, L2Gpa, Level};
use nsvm::vmcb::bits::{int_ctl, misc1, misc2};
use nsvm::{Exit, Fault, L2Exit, exit_code};
use tlfs_abi::evmcb::VmcbEnlightenmentsControl;

use crate::rig::{L2_RIP, Rig, VMCB12};

/// L2 runs, with `change` made to L1's VMCB before VMRUN.
fn entered(change: impl Fn(&mut Rig)) -> Rig {
    let mut rig = Rig::ready();
    change(&mut rig);
    rig.enter();
    rig.prepare();
    rig
}

/// Sets the intercept that `code` stands for, in L1's VMCB.
fn intercept(rig: &mut Rig, code: u64) {
    let wants = &mut rig.vmcb12.control.intercepts;
    let vector = match code {
        0x00..=0x1F => &mut wants.cr,
        0x20..=0x3F => &mut wants.dr,
        0x40..=0x5F => &mut wants.exceptions,
        0x60..=0x7F => &mut wants.misc1,
        0x80..=0x9F => &mut wants.misc2,
        _ => &mut wants.misc3,
    };
    *vector |= 1 << (code & 31);
}

/// Codes that more than an intercept bit decides on.
const SPECIAL: [u64; 5] = [exit_code::NMI, exit_code::INIT, exit_code::MSR, exit_code::IOIO, 0x7E];

#[test]
fn what_l1_intercepts_goes_to_l1_and_nothing_else() {
    let codes = (0..0x8E).chain([0xA2]).filter(|code| !SPECIAL.contains(code) && *code != 0x8E);
    for code in codes {
        let mut rig = entered(|r| intercept(r, code));
        assert_eq!(rig.l2_with(code, 1, 2), L2Exit::ToL1, "{code:#x}");
        rig.get();
        let control = &rig.vmcb12.control;
        assert_eq!((control.exit_code, control.exit_info_1, control.exit_info_2), (code, 1, 2));
        if code == exit_code::VMRUN {
            continue;
        }
        // All but this one.
        let mut rig = entered(|r| {
            (0..0xA7).filter(|other| *other != code).for_each(|other| intercept(r, other));
            // An exception raised instead would go to L1.
            r.vmcb12.control.intercepts.exceptions = 0;
        });
        assert_ne!(rig.l2(code), L2Exit::ToL1, "{code:#x}");
        assert_eq!(rig.nested.level(), Level::L2);
    }
}

#[test]
fn what_nobody_wants_is_the_embedders() {
    for code in [exit_code::CPUID, exit_code::HLT, exit_code::SHUTDOWN, exit_code::TASK_SWITCH, 0x10] {
        assert_eq!(entered(|_| ()).l2(code), L2Exit::Embedder);
    }
}

#[test]
fn events_of_the_embedder_come_first() {
    let all = |r: &mut Rig| r.vmcb12.control.intercepts.misc1 = misc1::INTR | misc1::NMI | misc1::INIT;
    for code in [exit_code::NMI, exit_code::INIT] {
        assert_eq!(entered(all).l2(code), L2Exit::Embedder);
    }
    // Physical interrupts are L1's unless the embedder intercepts them.
    assert_eq!(entered(all).l2(exit_code::INTR), L2Exit::ToL1);
    let mut rig = entered(all);
    rig.vmcb01.control.intercepts.misc1 |= misc1::INTR;
    assert_eq!(rig.l2(exit_code::INTR), L2Exit::Embedder);
    // The embedder intercepts neither: NMI and INIT are L1's.
    for code in [exit_code::NMI, exit_code::INIT] {
        let mut rig = entered(all);
        rig.vmcb01.control.intercepts.misc1 = 0;
        assert_eq!(rig.l2(code), L2Exit::ToL1);
    }
}

#[test]
fn exceptions_that_the_embedder_intercepts_are_its_own() {
    let mut rig = entered(|r| {
        r.vmcb01.control.intercepts.exceptions = 1 << 18;
        r.vmcb12.control.intercepts.exceptions = 1 << 18 | 1 << 14;
    });
    assert_eq!(rig.l2(0x40 + 18), L2Exit::Embedder);
    // It has no use for it.
    assert_eq!(rig.call(|n, m| n.reflect(m)), L2Exit::ToL1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_code, 0x40 + 18);
    let mut rig = entered(|r| {
        r.vmcb01.control.intercepts.exceptions = 1 << 18;
        r.vmcb12.control.intercepts.exceptions = 1 << 18 | 1 << 14;
    });
    assert_eq!(rig.l2(0x40 + 14), L2Exit::ToL1);
}

#[test]
fn nested_page_faults() {
    let mut rig = entered(|r| r.vmcb12.control.np_control = 1);
    let fault = L2Exit::NestedPageFault { gpa: L2Gpa::new(0x1234), error_code: 1 << 32 | 6 };
    assert_eq!(rig.l2_with(exit_code::NPF, 1 << 32 | 6, 0x1234), fault);
    assert_eq!(rig.nested.level(), Level::L2);
    let exit = Exit { code: exit_code::NPF, info_1: 1 << 33 | 7, info_2: 0x1238 };
    assert_eq!(rig.call(|n, m| n.exit_to_l1(m, exit)), L2Exit::ToL1);
    rig.get();
    let control = &rig.vmcb12.control;
    assert_eq!((control.exit_code, control.exit_info_1, control.exit_info_2), (0x400, 1 << 33 | 7, 0x1238));
    let mut rig = entered(|_| ());
    let fault = L2Exit::L1PageFault { gpa: L1Gpa::new(0x1234), error_code: 4 };
    assert_eq!(rig.l2_with(exit_code::NPF, 4, 0x1234), fault);
}

#[test]
fn a_hypercall_is_l0s_only_if_enlightened_and_authorised() {
    let call = |control: u32, yes: bool, insn: &[u8]| {
        let mut rig = entered(|r| {
            r.vmcb12.control.intercepts.misc2 |= misc2::VMMCALL;
            r.vmcb12.enlightenments.enlightenments_control = VmcbEnlightenmentsControl::new(control);
            r.vmcb12.enlightenments.vm_id = 7;
        });
        rig.write(L2_RIP, insn);
        rig.regs.rcx = 2;
        rig.vmcb02.control.exit_code = exit_code::VMMCALL;
        let mut asked = false;
        let exit = rig.call(|nested, m| {
            nested.l2_exit(m, |hv, _, gprs| {
                asked = true;
                yes && hv.vm_id == 7 && gprs.rcx == 2
            })
        });
        (exit, asked)
    };
    let plain = &[0x0F, 0x01, 0xD9];
    assert_eq!(call(1, true, plain), (L2Exit::DirectFlush { next_rip: L2_RIP + 3 }, true));
    let prefixed = &[0x66, 0x48, 0x0F, 0x01, 0xD9];
    assert_eq!(call(1, true, prefixed), (L2Exit::DirectFlush { next_rip: L2_RIP + 5 }, true));
    assert_eq!(call(1, false, plain), (L2Exit::ToL1, true));
    assert_eq!(call(6, true, plain), (L2Exit::ToL1, false));
    assert_eq!(call(1, true, &[0x90]), (L2Exit::Resume, true), "other bytes by now");
}

#[test]
fn a_hypercall_that_nobody_takes_is_undefined() {
    let mut rig = entered(|_| ());
    assert_eq!(rig.l2(exit_code::VMMCALL), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.event_inj, 1 << 31 | 3 << 8 | 6);
    let mut rig = entered(|r| r.vmcb12.control.intercepts.exceptions = 1 << 6);
    rig.l2_to_l1(exit_code::VMMCALL);
    assert_eq!(rig.vmcb12.control.exit_code, 0x46);
}

#[test]
fn the_synthetic_exit_is_told_past_the_call() {
    let mut rig = entered(|r| r.vmcb12.enlightenments.enlightenments_control = VmcbEnlightenmentsControl::new(1));
    rig.vmcb02.complete_instruction(L2_RIP + 3);
    rig.vmcb02.save.rax = 0;
    assert_eq!(rig.call(|n, m| n.synthetic_exit(m)), L2Exit::ToL1);
    rig.get();
    let control = &rig.vmcb12.control;
    assert_eq!((control.exit_code, control.exit_info_1, control.exit_info_2), (0xF000_0000, 1, 0));
    assert_eq!(rig.vmcb12.save.rip, L2_RIP + 3);
}

#[test]
fn exceptions_raised_in_l2_are_l1s_if_it_wants_them() {
    let mut rig = entered(|r| r.vmcb12.control.intercepts.exceptions = 1 << 13);
    assert_eq!(rig.call(|n, m| n.raise_in_l2(m, Fault::GP)), L2Exit::ToL1);
    let mut rig = entered(|r| r.vmcb12.control.intercepts.exceptions = !(1 << 13));
    assert_eq!(rig.call(|n, m| n.raise_in_l2(m, Fault::GP)), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.event_inj, 1 << 31 | 1 << 11 | 3 << 8 | 13);
}

#[test]
fn svm_instructions_of_l2_that_l1_does_not_intercept() {
    // VMSAVE stores the state that both levels share.
    let mut rig = entered(|r| r.vmcb01.save.star = 0x77);
    rig.write(L2_RIP, &[0x0F, 0x01, 0xDB]);
    rig.vmcb02.save.rax = 0x5_0000;
    assert_eq!(rig.l2(exit_code::VMSAVE), L2Exit::Resume);
    assert_eq!(rig.read::<8>(0x5_0600), 0x77u64.to_le_bytes());
    assert_eq!(rig.vmcb02.save.rip, L2_RIP + 3);
    // At CPL 3 it faults.
    let mut rig = entered(|r| r.vmcb12.save.cpl = 3);
    assert_eq!(rig.l2(exit_code::VMSAVE), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.event_inj, 1 << 31 | 1 << 11 | 3 << 8 | 13);
    // INVLPGA.
    let mut rig = entered(|_| ());
    rig.write(L2_RIP, &[0x0F, 0x01, 0xDF]);
    rig.regs.rcx = 1;
    assert_eq!(rig.l2(exit_code::INVLPGA), L2Exit::InvalidateAsid { asid: 1 });
    // SKINIT.
    let mut rig = entered(|_| ());
    assert_eq!(rig.l2(exit_code::SKINIT), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.event_inj, 1 << 31 | 3 << 8 | 6);
}

#[test]
fn clgi_of_l2_without_a_virtual_gif_is_the_gif() {
    let mut rig = entered(|_| ());
    rig.write(L2_RIP, &[0x0F, 0x01, 0xDD, 0x0F, 0x01, 0xDC]);
    assert_eq!(rig.l2(exit_code::CLGI), L2Exit::Resume);
    assert!(!rig.nested.gif());
    let plan = rig.prepare();
    assert!(!plan.host_if && plan.sync_tpr);
    assert_eq!(rig.vmcb02.control.int_ctl & int_ctl::V_INTR_MASKING, int_ctl::V_INTR_MASKING);
    assert_eq!(rig.l2(exit_code::STGI), L2Exit::Resume);
    assert!(rig.nested.gif());
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & int_ctl::V_INTR_MASKING, 0);
}

#[test]
fn a_virtual_gif_in_software() {
    let virq = int_ctl::V_IRQ | 0x55 << 32;
    let mut rig = entered(|r| r.vmcb12.control.int_ctl = int_ctl::V_GIF_ENABLE | int_ctl::V_GIF | virq);
    assert_eq!(rig.vmcb02.control.int_ctl, virq);
    rig.write(L2_RIP, &[0x0F, 0x01, 0xDD, 0x0F, 0x01, 0xDC]);
    assert_eq!(rig.l2(exit_code::CLGI), L2Exit::Resume);
    assert!(rig.nested.gif(), "L2's own, not the GIF");
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & int_ctl::V_IRQ, 0, "held");
    assert_eq!(rig.l2(exit_code::STGI), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & int_ctl::V_IRQ, int_ctl::V_IRQ);
    assert_eq!(rig.call(|n, m| n.exit_to_l1(m, Exit::simple(0x78))), L2Exit::ToL1);
    rig.get();
    assert_eq!(rig.vmcb12.control.int_ctl, int_ctl::V_GIF_ENABLE | int_ctl::V_GIF | virq);
    assert_eq!(rig.vmcb01.save.rax, VMCB12);
}
