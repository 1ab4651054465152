use nsvm::vmcb::Vmcb;
use nsvm::vmcb::bits::{int_state, misc1, rflags};
use nsvm::{L1Exit, L2Exit, exit_code};
use zerocopy::{FromZeros, IntoBytes};

use crate::rig::{Rig, VMCB12};

#[test]
fn stgi_and_clgi() {
    let mut rig = Rig::ready();
    assert!(rig.nested.gif());
    assert_eq!(rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]), L1Exit::Resume);
    assert!(!rig.nested.gif());
    assert_eq!(rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]), L1Exit::Resume);
    assert!(rig.nested.gif());
    assert_eq!(rig.vmcb01.control.event_inj, 0);
}

#[test]
fn skinit_does_not_exist() {
    let mut rig = Rig::ready();
    assert_eq!(rig.l1(exit_code::SKINIT, &[0x0F, 0x01, 0xDE]), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 3 << 8 | 6);
}

#[test]
fn an_instruction_ends_the_interrupt_shadow_and_traps_when_stepped() {
    let mut rig = Rig::ready();
    rig.vmcb01.control.int_state = int_state::SHADOW;
    rig.vmcb01.save.rflags |= rflags::TF;
    let rip = rig.vmcb01.save.rip;
    rig.l1(exit_code::STGI, &[0x66, 0x0F, 0x01, 0xDC]);
    assert_eq!(rig.vmcb01.save.rip, rip + 4);
    assert_eq!(rig.vmcb01.control.int_state, 0);
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 3 << 8 | 1);
}

/// A VMCB whose every byte differs from its neighbours.
fn patterned() -> Box<Vmcb> {
    let mut vmcb = Box::new(Vmcb::new_zeroed());
    for (i, byte) in vmcb.as_mut_bytes().iter_mut().enumerate() {
        *byte = (i * 7 + i / 256) as u8 | 1;
    }
    vmcb
}

#[test]
fn vmload_loads_its_fields_and_no_other() {
    let mut rig = Rig::ready();
    let pattern = patterned();
    rig.write(VMCB12, pattern.as_bytes());
    rig.vmcb01.save.rax = VMCB12;
    let mut expected = rig.vmcb01.save;
    assert_eq!(rig.l1(exit_code::VMLOAD, &[0x0F, 0x01, 0xDA]), L1Exit::Resume);
    let from = &pattern.save;
    (expected.fs, expected.gs, expected.ldtr, expected.tr) = (from.fs, from.gs, from.ldtr, from.tr);
    (expected.star, expected.lstar, expected.cstar) = (from.star, from.lstar, from.cstar);
    (expected.sfmask, expected.kernel_gs_base) = (from.sfmask, from.kernel_gs_base);
    (expected.sysenter_cs, expected.sysenter_esp) = (from.sysenter_cs, from.sysenter_esp);
    expected.sysenter_eip = from.sysenter_eip;
    expected.rip += 3;
    assert_eq!(rig.vmcb01.save, expected);
}

#[test]
fn vmsave_stores_its_fields_and_no_other() {
    let mut rig = Rig::ready();
    let pattern = patterned();
    rig.write(VMCB12, pattern.as_bytes());
    let save = &mut rig.vmcb01.save;
    save.fs.base = 1;
    save.gs.base = 2;
    save.ldtr.base = 3;
    save.tr.base = 4;
    (save.star, save.lstar, save.cstar, save.sfmask) = (5, 6, 7, 8);
    (save.kernel_gs_base, save.sysenter_cs, save.sysenter_esp, save.sysenter_eip) = (9, 10, 11, 12);
    save.rax = VMCB12;
    assert_eq!(rig.l1(exit_code::VMSAVE, &[0x0F, 0x01, 0xDB]), L1Exit::Resume);
    let mut expected = pattern;
    let (to, from) = (&mut expected.save, &rig.vmcb01.save);
    (to.fs, to.gs, to.ldtr, to.tr) = (from.fs, from.gs, from.ldtr, from.tr);
    (to.star, to.lstar, to.cstar, to.sfmask) = (from.star, from.lstar, from.cstar, from.sfmask);
    (to.kernel_gs_base, to.sysenter_cs) = (from.kernel_gs_base, from.sysenter_cs);
    (to.sysenter_esp, to.sysenter_eip) = (from.sysenter_esp, from.sysenter_eip);
    assert_eq!(&rig.read::<4096>(VMCB12)[..], expected.as_bytes());
}

#[test]
fn invlpga_concerns_the_asid_it_names() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.enter();
    rig.prepare();
    let l2_asid = rig.vmcb02.control.asid;
    rig.l2_to_l1(exit_code::HLT);
    rig.prepare();
    let l1_asid = rig.vmcb01.control.asid;
    let mut invlpga = |asid: u64| {
        rig.regs.rcx = asid;
        let exit = rig.l1(exit_code::INVLPGA, &[0x0F, 0x01, 0xDF]);
        rig.prepare();
        let l1 = rig.vmcb01.control.asid;
        rig.enter();
        rig.prepare();
        let l2 = rig.vmcb02.control.asid;
        assert_eq!(rig.l2(exit_code::HLT), L2Exit::ToL1);
        rig.prepare();
        (exit, l1, l2)
    };
    assert_eq!(invlpga(5), (L1Exit::InvalidateAsid { asid: 5 }, l1_asid, l2_asid), "another ASID");
    let (exit, l1, l2) = invlpga(1);
    assert_eq!((exit, l1), (L1Exit::InvalidateAsid { asid: 1 }, l1_asid));
    assert_ne!(l2, l2_asid);
    let (exit, l1, again) = invlpga(0);
    assert_eq!((exit, again), (L1Exit::Resume, l2));
    assert_ne!(l1, l1_asid);
}

#[test]
fn other_exits_are_the_embedders() {
    let mut rig = Rig::ready();
    for code in [exit_code::CPUID, exit_code::NMI, exit_code::NPF, exit_code::VMMCALL, exit_code::VINTR] {
        assert_eq!(rig.l1(code, &[]), L1Exit::NotMine);
    }
}
