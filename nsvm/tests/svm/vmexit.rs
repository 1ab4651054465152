use hvcore::addr::Level;
use nsvm::caps::{Config, Features};
use nsvm::vmcb::Segment;
use nsvm::vmcb::bits::{int_ctl, misc1, rflags};
use nsvm::{Exit, L1Exit, L2Exit, exit_code};
use zerocopy::IntoBytes;

use crate::rig::{L1_RIP, L2_RIP, Rig, VMCB12, host};

fn entered() -> Rig {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.enter();
    rig.prepare();
    rig
}

#[test]
fn l1_sees_every_field_and_has_its_state_back() {
    let mut rig = entered();
    let l1 = rig.vmcb01.save;
    let save = &mut rig.vmcb02.save;
    save.es = Segment { selector: 21, attrib: 22, limit: 23, base: 24 };
    save.cs.base = 25;
    save.ss.base = 26;
    save.ds.base = 27;
    save.gdtr.limit = 28;
    save.idtr.limit = 29;
    save.cpl = 3;
    save.efer |= 1;
    (save.cr0, save.cr2, save.cr3, save.cr4) = (31, 32, 33, 34);
    (save.dr6, save.dr7, save.rflags) = (35, 36, 37);
    (save.rip, save.rsp, save.rax) = (38, 39, 40);
    let expected = *save;
    rig.vmcb02.control.int_state = 1;
    rig.vmcb02.control.exit_int_info = 1 << 31 | 1 << 11 | 3 << 8 | 14 | 5 << 32;
    assert_eq!(rig.l2_with(exit_code::HLT, 11, 12), L2Exit::ToL1);
    rig.get();
    let (got, control) = (&rig.vmcb12.save, &rig.vmcb12.control);
    assert_eq!((got.es, got.cs, got.ss, got.ds), (expected.es, expected.cs, expected.ss, expected.ds));
    assert_eq!((got.gdtr, got.idtr, got.cpl, got.efer), (expected.gdtr, expected.idtr, expected.cpl, expected.efer));
    assert_eq!((got.cr0, got.cr2, got.cr3, got.cr4), (31, 32, 33, 34));
    assert_eq!((got.dr6, got.dr7, got.rflags, got.rip, got.rsp, got.rax), (35, 36, 37, 38, 39, 40));
    assert_eq!((control.exit_code, control.exit_info_1, control.exit_info_2), (exit_code::HLT, 11, 12));
    assert_eq!(control.exit_int_info, 1 << 31 | 1 << 11 | 3 << 8 | 14 | 5 << 32);
    assert_eq!(control.int_state, 1);
    // L1 goes on after its VMRUN.
    assert_eq!(rig.nested.level(), Level::L1);
    assert!(!rig.nested.gif());
    let now = &rig.vmcb01.save;
    assert_eq!((now.rip, now.rsp, now.rax), (L1_RIP + 5, l1.rsp, VMCB12));
    assert_eq!((now.cr0, now.cr3, now.cr4, now.efer, now.rflags), (l1.cr0, l1.cr3, l1.cr4, l1.efer, l1.rflags));
    assert_eq!((now.cs, now.ss, now.gdtr, now.idtr), (l1.cs, l1.ss, l1.gdtr, l1.idtr));
    assert_eq!((now.dr7, now.cpl), (0x400, 0));
    assert_eq!((now.cr2, now.dr6), (32, 35), "neither VMRUN nor #VMEXIT switches them back");
}

#[test]
fn nothing_else_of_l1s_vmcb_changes() {
    let mut rig = entered();
    let mut before = rig.read::<4096>(VMCB12);
    rig.l2_to_l1(exit_code::HLT);
    let after = rig.read::<4096>(VMCB12);
    before[0x70..0x78].copy_from_slice(&exit_code::HLT.to_le_bytes());
    assert_eq!(before, after);
}

#[test]
fn no_host_address_reaches_l1() {
    let config = Config::all(host(Features::NP.union(Features::NRIPS)), 8, true).unwrap();
    let mut rig = Rig::with(config);
    rig.vmcb01.control.next_rip = L1_RIP + 2;
    rig.enable();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT | misc1::MSR_PROT | misc1::IOIO_PROT;
    rig.vmcb12.control.np_control = 1;
    rig.put();
    rig.vmcb01.save.rax = VMCB12;
    rig.vmcb01.control.next_rip = L1_RIP + 5;
    assert!(matches!(rig.l1(exit_code::VMRUN, &[]), L1Exit::EnterL2(_)));
    rig.vmcb02.control.n_cr3 = 0x1234_5000;
    rig.vmcb02.control.next_rip = 0x4242;
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    let control = &rig.vmcb12.control;
    assert_eq!((control.n_cr3, control.msrpm_base), (0, crate::rig::MSRPM12));
    assert_eq!((control.iopm_base, control.asid, control.tsc_offset), (crate::rig::IOPM12, 1, 20));
    assert_eq!(control.next_rip, 0x4242, "offered with the processor's next RIP");
}

#[test]
fn events_that_were_not_delivered_are_reported() {
    // Injected by L1 and cut short before the processor had a chance.
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.control.event_inj = 1 << 31 | 0x44;
    rig.enter();
    assert_eq!(rig.call(|n, m| n.exit_to_l1(m, Exit::simple(exit_code::NMI))), L2Exit::ToL1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_int_info, 1 << 31 | 0x44);
    assert_eq!(rig.vmcb12.control.event_inj, 0);
    // Delivered: nothing is reported, and EVENTINJ is clear in L1's VMCB.
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.control.event_inj = 1 << 31 | 0x44;
    rig.enter();
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!((rig.vmcb12.control.exit_int_info, rig.vmcb12.control.event_inj), (0, 0));
}

#[test]
fn an_exception_above_31_was_an_interrupt() {
    for (reported, seen) in [
        (1 << 31 | 3 << 8 | 0x30, 1 << 31 | 0x30),
        (1 << 31 | 3 << 8 | 0x1F, 1 << 31 | 3 << 8 | 0x1F),
        (3 << 8 | 0x30, 0),
    ] {
        let mut rig = entered();
        rig.vmcb02.control.exit_int_info = reported;
        rig.l2_to_l1(exit_code::HLT);
        assert_eq!(rig.vmcb12.control.exit_int_info, seen);
    }
}

#[test]
fn a_failed_vmrun_of_the_processor_is_minus_one_in_64_bits() {
    for code in [0xFFFF_FFFF, u64::MAX] {
        let mut rig = entered();
        assert_eq!(rig.l2(code), L2Exit::ToL1);
        rig.get();
        assert_eq!(rig.vmcb12.control.exit_code, u64::MAX);
    }
}

#[test]
fn single_stepping_vmrun_traps_after_the_exit() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb01.save.rflags |= rflags::TF;
    rig.enter();
    rig.prepare();
    assert_eq!(rig.vmcb02.save.rflags & rflags::TF, 0);
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 3 << 8 | 1);
    assert_eq!(rig.vmcb01.save.dr6 & 1 << 14, 1 << 14);
}

#[test]
fn the_virtual_interrupt_is_synced_back() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.control.int_ctl = int_ctl::V_INTR_MASKING | int_ctl::V_IRQ | 0x77 << 32 | 9 << 16 | 5;
    rig.enter();
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl, rig.vmcb12.control.int_ctl);
    // The processor took it, and L2 changed its CR8.
    rig.vmcb02.control.int_ctl = int_ctl::V_INTR_MASKING | 0x77 << 32 | 9 << 16 | 8;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl, int_ctl::V_INTR_MASKING | 0x77 << 32 | 9 << 16 | 8);
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!(rig.vmcb12.control.int_ctl, int_ctl::V_INTR_MASKING | 0x77 << 32 | 9 << 16 | 8);
}

#[test]
fn an_unwritable_vmcb_shuts_l1_down() {
    let mut rig = entered();
    rig.memory.read_only.set(true);
    assert_eq!(rig.l2(exit_code::HLT), L2Exit::Shutdown);
    assert_eq!(rig.nested.level(), Level::L1);
}

#[test]
fn a_round_trip_touches_l1s_memory_little() {
    let mut rig = entered();
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.control.clean = u32::MAX;
    rig.write(VMCB12, rig.vmcb12.as_bytes());
    (rig.memory.reads, rig.memory.writes) = Default::default();
    rig.enter();
    rig.prepare();
    rig.vmcb02.save.rip = L2_RIP + 1;
    rig.l2_to_l1(exit_code::HLT);
    assert!(rig.memory.reads.get() <= 4, "{:?} reads", rig.memory.reads);
    assert!(rig.memory.writes.get() <= 2, "{:?} writes", rig.memory.writes);
}

/// What a VMRUN, an exit that changes every group, VMSAVE and VMLOAD leave in L1's memory and in the VMCBs.
fn everything(lends: bool, clean: u32) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let mut rig = Rig::ready();
    rig.memory.lends.set(lends);
    for (i, byte) in rig.vmcb12.control_tail.as_mut_bytes().iter_mut().enumerate() {
        *byte = i as u8;
    }
    let save = &mut rig.vmcb12.save;
    (save.fs.base, save.star, save.sysenter_eip) = (1, 2, 3);
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.control.np_control = 1;
    rig.vmcb12.enlightenments.vm_id = 9;
    rig.vmcb12.control.event_inj = 1 << 31 | 0x33;
    rig.enter();
    rig.prepare();
    let save = &mut rig.vmcb02.save;
    (save.es.base, save.gdtr.base, save.idtr.base, save.cpl) = (1, 2, 3, 1);
    (save.cr2, save.g_pat, save.rsp, save.rip, save.rflags) = (4, 6, 7, 8, 0x202);
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.control.clean = clean;
    rig.enter();
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb01.save.rax = VMCB12;
    rig.l1(exit_code::VMLOAD, &[0x0F, 0x01, 0xDA]);
    rig.vmcb01.save.rax = 0x5_0000;
    rig.l1(exit_code::VMSAVE, &[0x0F, 0x01, 0xDB]);
    assert_eq!(rig.memory.reads.get() + rig.memory.writes.get() == 0, lends);
    let mut memory = vec![0; 1 << 20];
    rig.memory.load(0, &mut memory);
    (memory, rig.vmcb01.as_bytes().to_vec(), rig.vmcb02.as_bytes().to_vec())
}

#[test]
fn lent_pages_and_copies_are_the_same() {
    for clean in [0, u32::MAX] {
        assert!(everything(true, clean) == everything(false, clean));
    }
}
