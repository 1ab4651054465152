use hvcore::addr::Level;
use nsvm::asid::{AsidPool, Tag};
use nsvm::vmcb::bits::{Event, int_ctl, misc1, rflags, tlb};
use nsvm::{EntryPlan, L1Exit, L2Exit, exit_code};

use crate::rig::Rig;

fn plan(level: Level, host_if: bool, sync_tpr: bool) -> EntryPlan {
    EntryPlan { level, host_if, sync_tpr, exit_soon: false }
}

fn masks(int_ctl: u64) -> bool {
    int_ctl & int_ctl::V_INTR_MASKING != 0
}

#[test]
fn physical_interrupts_passed_through() {
    let mut rig = Rig::ready();
    // L1 with GIF set: its own RFLAGS.IF decides.
    assert_eq!(rig.prepare(), plan(Level::L1, true, false));
    assert!(!masks(rig.vmcb01.control.int_ctl));
    // GIF clear: held by the embedder's.
    rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]);
    assert_eq!(rig.prepare(), plan(Level::L1, false, true));
    assert!(masks(rig.vmcb01.control.int_ctl));
    rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]);
    assert_eq!(rig.prepare(), plan(Level::L1, true, false));
    assert!(!masks(rig.vmcb01.control.int_ctl));
    // L2: by L1's IF at VMRUN if L1 masks, else by L2's own.
    for (l1_if, l1_masks) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut rig = Rig::ready();
        rig.vmcb01.save.rflags = if l1_if { rflags::IF | 2 } else { 2 };
        rig.vmcb12.control.int_ctl = if l1_masks { int_ctl::V_INTR_MASKING } else { 0 };
        rig.enter();
        assert_eq!(rig.prepare(), plan(Level::L2, l1_if, false));
        assert_eq!(masks(rig.vmcb02.control.int_ctl), l1_masks);
    }
}

#[test]
fn physical_interrupts_taken_by_the_embedder() {
    let mut rig = Rig::ready();
    rig.vmcb01.control.intercepts.misc1 |= misc1::INTR;
    rig.vmcb01.control.int_ctl = int_ctl::V_INTR_MASKING | 5;
    rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]);
    assert_eq!(rig.prepare(), plan(Level::L1, true, false));
    rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]);
    rig.enter();
    assert_eq!(rig.prepare(), plan(Level::L2, true, false));
    assert!(masks(rig.vmcb02.control.int_ctl));
    // L1 does not mask: L2's CR8 is L1's.
    assert_eq!(rig.vmcb02.control.int_ctl & 0xFF, 5);
    rig.vmcb02.control.int_ctl += 2;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    assert_eq!(rig.vmcb01.control.int_ctl & 0xFF, 7);
    assert_eq!(rig.nested.vmcb12_control().int_ctl & 0xFF, 0);
}

#[test]
fn l1_and_l2_have_asids_of_their_own_and_a_round_trip_flushes_nothing() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.prepare();
    assert_eq!(rig.vmcb01.control.tlb_control, tlb::ALL, "nothing is known of the TLB");
    for _ in 0..40 {
        rig.enter();
        rig.prepare();
        assert_eq!((rig.vmcb02.control.asid, rig.vmcb02.control.tlb_control), (2, tlb::NONE));
        rig.l2_to_l1(exit_code::HLT);
        rig.prepare();
        assert_eq!((rig.vmcb01.control.asid, rig.vmcb01.control.tlb_control), (1, tlb::NONE));
    }
}

#[test]
fn a_flush_is_asked_for_until_an_entry_happened() {
    let mut rig = Rig::ready();
    rig.enter();
    rig.prepare();
    assert_eq!(rig.vmcb02.control.tlb_control, tlb::ALL);
    // The VMRUN failed: L1 is told, and the flush is still to come.
    assert_eq!(rig.l2(exit_code::INVALID_32), L2Exit::ToL1);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.tlb_control, tlb::ALL);
    rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.tlb_control, tlb::NONE);
}

#[test]
fn retired_tags() {
    let mut rig = Rig::ready();
    rig.enter();
    rig.prepare();
    let asid = rig.vmcb02.control.asid;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.asid, asid);
    rig.nested.retire_tag(Level::L2);
    rig.prepare();
    assert_ne!(rig.vmcb02.control.asid, asid);
}

/// What is injected after an exit that L0 dealt with, when `interrupted` was being delivered and L1 had injected
/// `injected`.
fn reinjected(injected: u64, interrupted: u64) -> u64 {
    let mut rig = Rig::ready();
    rig.vmcb12.control.event_inj = injected;
    rig.enter();
    rig.prepare();
    rig.vmcb02.control.exit_int_info = interrupted;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.prepare();
    let event = rig.vmcb02.control.event_inj;
    // Once only.
    rig.vmcb02.control.event_inj = 0;
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 0);
    event
}

#[test]
fn interrupted_deliveries_are_injected_again() {
    let valid = 1 << 31;
    assert_eq!(reinjected(0, 0), 0);
    assert_eq!(reinjected(0, 0x30), 0, "not valid");
    assert_eq!(reinjected(0, valid | 0x30), valid | 0x30);
    assert_eq!(reinjected(0, valid | 2 << 8 | 2), valid | 2 << 8 | 2);
    let pf = valid | 1 << 11 | 3 << 8 | 14 | 6 << 32;
    assert_eq!(reinjected(0, pf), pf);
    assert_eq!(reinjected(0, valid | 3 << 8 | 0x30), valid | 0x30, "TCG's interrupt");
    // INT 0x80, INT3 and INTO are executed again, unless L1 injected them.
    for software in [valid | 4 << 8 | 0x80, valid | 3 << 8 | 3, valid | 3 << 8 | 4] {
        assert_eq!(reinjected(0, software), 0);
        assert_eq!(reinjected(software, software), software);
    }
}

#[test]
fn an_injected_software_interrupt_is_not_mistaken_for_a_later_one() {
    let mut rig = Rig::ready();
    let software = 1 << 31 | 4 << 8 | 0x80;
    rig.vmcb12.control.event_inj = software;
    rig.enter();
    rig.prepare();
    // It was delivered.
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.prepare();
    // L2's own INT 0x80 is cut short.
    rig.vmcb02.control.exit_int_info = software;
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 0);
}

#[test]
fn l1s_own_interrupted_deliveries_too() {
    let mut rig = Rig::ready();
    rig.vmcb01.control.exit_int_info = 1 << 31 | 0x30;
    rig.l1(exit_code::NPF, &[]);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 0x30);
}

/// Something that happens between an exit and the next entry.
type Change = (&'static str, fn(&mut Rig));

/// An exit of L1 or L2 that leaves nothing behind.
fn plain_exit(rig: &mut Rig) {
    match rig.nested.level() {
        Level::L1 => assert_eq!(rig.l1(exit_code::CPUID, &[0x0F, 0xA2]), L1Exit::NotMine),
        Level::L2 => assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder),
    }
}

#[test]
fn an_entry_is_repeated_after_an_exit_that_leaves_nothing_behind() {
    let mut rig = Rig::ready();
    assert!(!rig.repeats(), "none was prepared");
    rig.prepare();
    assert!(!rig.repeats(), "none has happened");
    plain_exit(&mut rig);
    assert_eq!(rig.vmcb01.control.tlb_control, tlb::ALL);
    assert!(rig.repeats());
    rig.repeat();
    assert_eq!(rig.vmcb01.control.tlb_control, tlb::NONE);
    rig.vmcb01.save.rax = 0x2000;
    assert_eq!(rig.l1(exit_code::VMLOAD, &[0x0F, 0x01, 0xDA]), L1Exit::Resume);
    assert!(rig.repeats());
    rig.enter();
    assert!(!rig.repeats());
    rig.prepare();
    plain_exit(&mut rig);
    assert!(rig.repeats());
    rig.l2_to_l1(exit_code::VMRUN);
    assert!(!rig.repeats());
}

#[test]
fn a_refused_entry_is_not_repeated() {
    let mut rig = Rig::ready();
    rig.prepare();
    assert_eq!(rig.l1(exit_code::INVALID, &[]), L1Exit::NotMine);
    assert!(!rig.repeats());
    assert_eq!((rig.prepare().level, rig.vmcb01.control.tlb_control), (Level::L1, tlb::ALL));
}

#[test]
fn an_entry_is_prepared_anew_after_what_it_depends_on() {
    let changes: [Change; 7] = [
        ("an NMI", |rig| rig.nested.pend_nmi()),
        ("an INIT", |rig| rig.nested.pend_init()),
        ("an interrupt", |rig| rig.nested.pend_interrupt(Some(0x30))),
        ("the embedder's controls", |rig| rig.nested.own_controls_changed()),
        ("an interrupted delivery", |rig| match rig.nested.level() {
            Level::L1 => rig.vmcb01.control.exit_int_info = Event::nmi().raw(),
            Level::L2 => rig.vmcb02.control.exit_int_info = Event::nmi().raw(),
        }),
        ("CLGI", |rig| svm(rig, exit_code::CLGI, 0xDD)),
        ("INIT reached L1", |rig| rig.nested.reset()),
    ];
    for level in [Level::L1, Level::L2] {
        for (what, change) in changes {
            let mut rig = Rig::ready();
            if level == Level::L2 {
                rig.enter();
            }
            rig.prepare();
            plain_exit(&mut rig);
            assert!(rig.repeats());
            change(&mut rig);
            assert!(!rig.repeats(), "{what} in {level:?}");
        }
    }
}

fn svm(rig: &mut Rig, code: u64, last: u8) {
    if rig.nested.level() == Level::L1 {
        assert_ne!(rig.l1(code, &[0x0F, 0x01, last]), L1Exit::NotMine);
    } else {
        let rip = rig.vmcb02.save.rip;
        rig.write(rip, &[0x0F, 0x01, last]);
        assert!(matches!(rig.l2(code), L2Exit::Resume | L2Exit::InvalidateAsid { .. }));
    }
}

#[test]
fn a_repeated_entry_flushes_what_is_to_be_flushed() {
    let changes: [Change; 4] = [
        ("a tag that is retired", |rig| rig.nested.retire_tag(rig.nested.level())),
        ("a flush of the CPU", |rig| rig.asids.flush_all()),
        ("a migration", |rig| rig.asids = AsidPool::new(1, 16, false).unwrap()),
        ("INVLPGA", |rig| {
            rig.regs.rcx = if rig.nested.level() == Level::L1 { 0 } else { 1 };
            svm(rig, exit_code::INVLPGA, 0xDF);
        }),
    ];
    for level in [Level::L1, Level::L2] {
        for (what, change) in changes {
            let mut rig = Rig::ready();
            if level == Level::L2 {
                rig.enter();
            }
            rig.prepare();
            plain_exit(&mut rig);
            rig.repeat();
            plain_exit(&mut rig);
            let control = |rig: &Rig| if level == Level::L1 { rig.vmcb01.control } else { rig.vmcb02.control };
            let asid = control(&rig).asid;
            change(&mut rig);
            assert!(rig.repeats(), "{what} in {level:?}");
            rig.repeat();
            let flushes = |rig: &Rig| control(rig).asid != asid || control(rig).tlb_control == tlb::ALL;
            assert!(flushes(&rig), "{what} in {level:?}");
            assert!(!rig.repeats(), "the entry has not happened");
            rig.prepare();
            assert!(flushes(&rig), "{what} in {level:?}: prepared again");
            plain_exit(&mut rig);
            let asid = control(&rig).asid;
            assert!(rig.repeats());
            rig.repeat();
            assert_eq!((control(&rig).asid, control(&rig).tlb_control), (asid, tlb::NONE));
        }
    }
}

#[test]
fn another_vp_that_uses_up_the_asids_makes_a_repeated_entry_take_a_fresh_one() {
    let mut rig = Rig::ready();
    rig.prepare();
    plain_exit(&mut rig);
    let mut others = [Tag::default(); 15];
    for tag in &mut others[..14] {
        rig.asids.assign(tag);
        rig.asids.entered(tag);
    }
    rig.repeat();
    assert_eq!((rig.vmcb01.control.asid, rig.vmcb01.control.tlb_control), (1, tlb::NONE));
    plain_exit(&mut rig);
    assert_eq!(rig.asids.assign(&mut others[14]).asid, 1);
    rig.asids.entered(&mut others[14]);
    rig.repeat();
    assert_eq!(rig.vmcb01.control.asid, 2, "1 is another VP's by now");
}
