use hvcore::addr::Level;
use nsvm::caps::{Config, Features};
use nsvm::vmcb::Segment;
use nsvm::vmcb::bits::{clean, cr0, efer, int_ctl, misc1, misc2, misc3, rflags, seg, tlb};
use nsvm::{Invalidate, L1Exit, exit_code};

use crate::rig::{IOPM02, MSRPM02, Rig, VMCB12, plain};

const VMRUN: &[u8] = &[0x0F, 0x01, 0xD8];

fn ud() -> u64 {
    1 << 31 | 3 << 8 | 6
}

fn gp() -> u64 {
    1 << 31 | 1 << 11 | 3 << 8 | 13
}

#[test]
fn l2_gets_l1s_state_and_merged_controls() {
    let mut rig = Rig::ready();
    let save = &mut rig.vmcb12.save;
    save.es = Segment { selector: 1, attrib: 2, limit: 3, base: 4 };
    save.ss = Segment { selector: 5, attrib: 6, limit: 7, base: 8 };
    save.ds = Segment { selector: 9, attrib: 10, limit: 11, base: 12 };
    save.gdtr.base = 0x1111;
    save.idtr.base = 0x2222;
    save.rflags = rflags::IF;
    (save.rax, save.cr2, save.dr6) = (0x3333, 0x4444, 0x5555);
    save.fs.base = 0x6666;
    rig.vmcb12.control.intercepts.exceptions = 1 << 14;
    rig.vmcb12.control.intercepts.misc1 = misc1::CPUID | misc1::INTR;
    rig.vmcb12.control.int_state = 3;
    rig.vmcb12.control.event_inj = 1 << 31 | 0x30 | 0x7F << 12;
    rig.enter();
    assert_eq!(rig.nested.level(), Level::L2);
    let (to, from) = (&rig.vmcb02.save, &rig.vmcb12.save);
    assert_eq!((to.es, to.cs, to.ss, to.ds), (from.es, from.cs, from.ss, from.ds));
    assert_eq!((to.gdtr, to.idtr, to.cpl, to.efer), (from.gdtr, from.idtr, from.cpl, from.efer));
    assert_eq!((to.cr0, to.cr2, to.cr3, to.cr4), (from.cr0, from.cr2, from.cr3, from.cr4));
    assert_eq!((to.dr6, to.dr7, to.rip, to.rsp, to.rax), (from.dr6, from.dr7, from.rip, from.rsp, from.rax));
    assert_eq!(to.rflags, rflags::IF | rflags::FIXED);
    assert_eq!(to.fs, Segment::default(), "VMRUN does not load FS");
    let control = &rig.vmcb02.control;
    assert_eq!(control.intercepts.exceptions, 1 << 14);
    let own = rig.vmcb01.control.intercepts;
    assert_eq!(control.intercepts.misc1 & own.misc1, own.misc1);
    assert_eq!(control.intercepts.misc1 & misc1::CPUID, misc1::CPUID);
    assert_eq!(control.tsc_offset, 1020);
    assert_eq!(control.int_state, 1);
    assert_eq!(control.event_inj, 1 << 31 | 0x30);
    assert_eq!(control.np_control, 1);
    assert_eq!(control.n_cr3, 0xCC_0000, "without nested paging L2's physical memory is L1's");
    assert_eq!(rig.nested.nested_paging(&rig.vmcb01), None);
    assert_eq!(to.g_pat, rig.vmcb01.save.g_pat);
}

#[test]
fn nested_paging_is_described_for_the_shadow_tables() {
    let mut rig = Rig::ready();
    (rig.vmcb12.control.np_control, rig.vmcb12.control.n_cr3, rig.vmcb12.control.asid) = (1, 0x7_7000, 5);
    rig.vmcb12.save.g_pat = 0x0606_0606_0606_0606;
    rig.enter();
    let paging = rig.nested.nested_paging(&rig.vmcb01).unwrap();
    assert_eq!((paging.n_cr3.raw(), paging.asid), (0x7_7000, 5));
    assert_eq!((paging.cr0, paging.cr4, paging.efer), (rig.vmcb01.save.cr0, rig.vmcb01.save.cr4, rig.vmcb01.save.efer));
    assert_eq!(rig.vmcb02.save.g_pat, 0x0606_0606_0606_0606);
}

#[test]
fn no_intercept_of_l0_is_missing_whatever_l1_writes() {
    let mut rig = Rig::ready();
    rig.vmcb01.control.intercepts.cr = 1 << 4;
    rig.vmcb01.control.intercepts.exceptions = 1 << 18;
    rig.vmcb12.control.int_ctl = int_ctl::V_INTR_MASKING | int_ctl::V_GIF_ENABLE;
    rig.enter();
    let (own, merged) = (rig.vmcb01.control.intercepts, rig.vmcb02.control.intercepts);
    assert_eq!(own.intersection(merged), own);
}

#[test]
fn what_was_not_offered_is_ignored() {
    let config = Config::new(plain(), Features::default(), 8, false).unwrap();
    let mut rig = Rig::with(config);
    rig.enable();
    let control = &mut rig.vmcb12.control;
    (control.np_control, control.n_cr3) = (7, u64::MAX);
    control.virt_ext = 3;
    control.intercepts.misc2 |= misc2::RDPRU;
    control.intercepts.misc3 = u32::MAX;
    control.int_ctl = u64::MAX;
    control.clean = u32::MAX;
    control.tlb_control = tlb::ASID;
    rig.vmcb12.enlightenments.vm_id = 9;
    assert_eq!(rig.vmrun(), L1Exit::EnterL2(Invalidate::All));
    let control = &rig.vmcb02.control;
    assert_eq!((control.np_control, control.virt_ext), (1, 0));
    assert_eq!(control.intercepts.misc2 & misc2::RDPRU, 0);
    assert_eq!(control.intercepts.misc3, misc3::INVPCID);
    assert_eq!(rig.nested.vmcb12_control().int_ctl & (int_ctl::AVIC | int_ctl::V_GIF_ENABLE | int_ctl::V_NMI), 0);
    assert_eq!(rig.nested.enlightenments().vm_id, 0);
}

#[test]
fn permission_faults() {
    // SVM off.
    let mut rig = Rig::new();
    assert_eq!(rig.vmrun(), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, ud());
    type Change = fn(&mut Rig);
    let cases: [(u64, Change); 5] = [
        (ud(), |r| r.vmcb01.save.cr0 &= !cr0::PE),
        (ud(), |r| r.vmcb01.save.rflags |= rflags::VM),
        (gp(), |r| r.vmcb01.save.cpl = 3),
        (gp(), |r| r.vmcb01.save.rax = VMCB12 + 8),
        (gp(), |r| r.vmcb01.save.rax = 1 << 40),
    ];
    for (event, change) in cases {
        for (code, modrm) in [(exit_code::VMRUN, 0xD8), (exit_code::VMLOAD, 0xDA), (exit_code::VMSAVE, 0xDB)] {
            let mut rig = Rig::ready();
            rig.put();
            rig.vmcb01.save.rax = VMCB12;
            change(&mut rig);
            let rip = rig.vmcb01.save.rip;
            assert_eq!(rig.l1(code, &[0x0F, 0x01, modrm]), L1Exit::Resume);
            assert_eq!(rig.vmcb01.control.event_inj, event);
            assert_eq!(rig.vmcb01.save.rip, rip, "a fault");
            assert_eq!(rig.nested.level(), Level::L1);
        }
    }
    // The last page below 2^40 is legal, only there is no memory.
    let mut rig = Rig::ready();
    rig.vmcb01.save.rax = (1 << 40) - 0x1000;
    assert_eq!(rig.l1(exit_code::VMRUN, VMRUN), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, gp());
}

#[test]
fn the_address_is_cut_to_the_address_size() {
    // 32-bit code: EAX counts.
    let mut rig = Rig::ready();
    rig.vmcb01.save.cs.attrib = 0x9B | seg::DB;
    rig.vmcb01.save.efer = efer::SVME;
    rig.put();
    rig.vmcb01.save.rax = 0xFFFF_FFFF_0000_0000 | VMCB12;
    assert!(matches!(rig.l1(exit_code::VMRUN, VMRUN), L1Exit::EnterL2(_)));
    // 64-bit code with 0x67: the same.
    let mut rig = Rig::ready();
    rig.put();
    rig.vmcb01.save.rax = 0xFFFF_FFFF_0000_0000 | VMCB12;
    assert!(matches!(rig.l1(exit_code::VMRUN, &[0x67, 0x0F, 0x01, 0xD8]), L1Exit::EnterL2(_)));
    assert_eq!(rig.vmcb01.save.rip, crate::rig::L1_RIP + 2 + 4);
    // Without: RAX.
    let mut rig = Rig::ready();
    rig.put();
    rig.vmcb01.save.rax = 0xFFFF_FFFF_0000_0000 | VMCB12;
    assert_eq!(rig.l1(exit_code::VMRUN, VMRUN), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, gp());
}

#[test]
fn other_bytes_at_rip_are_executed_again() {
    let mut rig = Rig::ready();
    rig.put();
    rig.vmcb01.save.rax = VMCB12;
    let rip = rig.vmcb01.save.rip;
    assert_eq!(rig.l1(exit_code::VMRUN, &[0x90]), L1Exit::Resume);
    assert_eq!((rig.vmcb01.save.rip, rig.vmcb01.control.event_inj), (rip, 0));
    assert_eq!(rig.nested.level(), Level::L1);
}

#[test]
fn the_next_rip_of_the_processor_needs_no_bytes() {
    let config = Config::all(crate::rig::host(Features::NP.union(Features::NRIPS)), 8, false).unwrap();
    let mut rig = Rig::with(config);
    rig.vmcb01.control.next_rip = crate::rig::L1_RIP + 2;
    rig.enable();
    rig.put();
    rig.vmcb01.save.rax = VMCB12;
    rig.vmcb01.control.next_rip = rig.vmcb01.save.rip + 3;
    let exit = rig.l1(exit_code::VMRUN, &[0x90]);
    assert!(matches!(exit, L1Exit::EnterL2(_)));
    assert_eq!(rig.vmcb01.save.rip, crate::rig::L1_RIP + 5);
}

/// Enters, exits to L1, and enters again after `change`; true when L2's RSP, GDTR and CS follow L1's VMCB.
fn second_entry(change: impl Fn(&mut Rig)) -> (bool, bool, bool) {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.enter();
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    let save = &mut rig.vmcb12.save;
    save.rsp = 0xABC0;
    save.gdtr.base = 0xABC1;
    save.cs.base = 0xABC2;
    change(&mut rig);
    rig.enter();
    let save = &rig.vmcb02.save;
    (save.rsp == 0xABC0, save.gdtr.base == 0xABC1, save.cs.base == 0xABC2)
}

#[test]
fn clean_bits_count_for_the_same_vmcb_only() {
    assert_eq!(second_entry(|r| r.vmcb12.control.clean = 0), (true, true, true));
    assert_eq!(second_entry(|r| r.vmcb12.control.clean = clean::DT), (true, false, true));
    assert_eq!(second_entry(|r| r.vmcb12.control.clean = clean::SEG), (true, true, false));
    assert_eq!(second_entry(|r| r.vmcb12.control.clean = u32::MAX), (true, false, false));
    // The copies were given up meanwhile.
    let forget = |r: &mut Rig| {
        r.vmcb12.control.clean = u32::MAX;
        r.nested.forget_vmcb12();
    };
    assert_eq!(second_entry(forget), (true, true, true));
    // Another VMCB ran meanwhile.
    let other = |r: &mut Rig| {
        r.write(0x5_0000, zerocopy::IntoBytes::as_bytes(&*r.vmcb12));
        r.vmcb01.save.rax = 0x5_0000;
        assert!(matches!(r.l1(exit_code::VMRUN, VMRUN), L1Exit::EnterL2(_)));
        assert_eq!(r.l2(exit_code::HLT), nsvm::L2Exit::ToL1);
        r.vmcb12.control.clean = u32::MAX;
    };
    assert_eq!(second_entry(other), (true, true, true));
    // A refused VMRUN forgets, too.
    let refused = |r: &mut Rig| {
        let cr4 = std::mem::replace(&mut r.vmcb12.save.cr4, u64::MAX);
        assert_eq!(r.vmrun(), L1Exit::Resume);
        r.vmcb12.save.cr4 = cr4;
        r.vmcb12.control.clean = u32::MAX;
    };
    assert_eq!(second_entry(refused), (true, true, true));
}

#[test]
fn hyper_v_identities_are_read_at_every_entry() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.enter();
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.control.clean = u32::MAX;
    rig.vmcb12.enlightenments.vp_id = 3;
    rig.vmcb12.enlightenments.vm_id = 4;
    rig.vmcb12.enlightenments.partition_assist_page = 0x5000;
    rig.enter();
    let hv = rig.nested.enlightenments();
    assert_eq!((hv.vp_id, hv.vm_id, hv.partition_assist_page), (3, 4, 0x5000));
}

#[test]
fn tlb_control_and_contexts_decide_l2s_tag() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    let mut asid_of = |change: &dyn Fn(&mut Rig)| {
        change(&mut rig);
        let exit = rig.vmrun();
        rig.prepare();
        let asid = rig.vmcb02.control.asid;
        rig.l2_to_l1(exit_code::HLT);
        let L1Exit::EnterL2(invalidate) = exit else { panic!("{exit:?}") };
        (asid, invalidate)
    };
    let (first, invalidate) = asid_of(&|_| ());
    assert_eq!(invalidate, Invalidate::None);
    assert_eq!(asid_of(&|_| ()), (first, Invalidate::None), "the same context keeps its ASID");
    assert_eq!(asid_of(&|r| r.vmcb12.control.tlb_control = tlb::ASID), (first + 1, Invalidate::Asid(1)));
    assert_eq!(asid_of(&|r| r.vmcb12.control.tlb_control = tlb::ASID_NON_GLOBAL), (first + 2, Invalidate::Asid(1)));
    assert_eq!(asid_of(&|r| r.vmcb12.control.tlb_control = tlb::ALL), (first + 3, Invalidate::All));
    assert_eq!(asid_of(&|r| r.vmcb12.control.tlb_control = 2), (first + 4, Invalidate::All), "reserved");
    assert_eq!(asid_of(&|r| r.vmcb12.control.tlb_control = 0), (first + 4, Invalidate::None));
    assert_eq!(asid_of(&|r| r.vmcb12.control.asid = 2), (first + 5, Invalidate::None), "another ASID of L1");
    assert_eq!(asid_of(&|r| r.vmcb12.control.np_control = 1).0, first + 6);
    assert_eq!(asid_of(&|r| r.vmcb12.control.n_cr3 = 0x9000).0, first + 7);
    assert_eq!(asid_of(&|r| r.vmcb12.enlightenments.vm_id = 1).0, first + 8);
    assert_eq!(asid_of(&|r| r.vmcb12.enlightenments.vp_id = 1).0, first + 9);
    assert_eq!(asid_of(&|_| ()).0, first + 9);
}

#[test]
fn permission_maps_are_l1s_only_if_l1_asks() {
    let mut rig = Rig::ready();
    rig.enter();
    assert_eq!((rig.vmcb02.control.msrpm_base, rig.vmcb02.control.iopm_base), (0xDD_0000, 0xEE_0000));
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::MSR_PROT | misc1::IOIO_PROT;
    rig.enter();
    assert_eq!((rig.vmcb02.control.msrpm_base, rig.vmcb02.control.iopm_base), (MSRPM02, IOPM02));
}

#[test]
fn a_refused_vmrun_leaves_the_retained_context_named() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.enlightenments.vm_id = 5;
    rig.enter();
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.enlightenments.vm_id = 6;
    rig.vmcb12.control.asid = 0;
    assert_eq!(rig.vmrun(), L1Exit::Resume);
    assert_eq!((rig.nested.enlightenments().vm_id, rig.nested.context().vm_id), (5, 5));
}
