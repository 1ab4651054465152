use hvcore::addr::Level;
use nsvm::vmcb::bits::{int_ctl, int_state, misc1, rflags};
use nsvm::{Entry, L1Exit, L2Exit, exit_code};

use crate::rig::{L1_RIP, L2_RIP, Rig, VMCB12};

const NMI: u64 = 1 << 31 | 2 << 8 | 2;
const DB: u64 = 0x41;

fn stgi(rig: &mut Rig) {
    assert_eq!(rig.l1(exit_code::STGI, &[0x0F, 0x01, 0xDC]), L1Exit::Resume);
}

fn clgi(rig: &mut Rig) {
    assert_eq!(rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]), L1Exit::Resume);
}

/// L2 runs; L1 intercepts `misc1`.
fn entered(misc1: u32, change: impl Fn(&mut Rig)) -> Rig {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1;
    change(&mut rig);
    rig.enter();
    rig.prepare();
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig
}

#[test]
fn an_nmi_waits_for_gif() {
    let mut rig = Rig::ready();
    clgi(&mut rig);
    rig.nested.pend_nmi();
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    stgi(&mut rig);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
}

#[test]
fn nmis_are_blocked_until_iret_is_done() {
    let mut rig = Rig::ready();
    rig.nested.pend_nmi();
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
    assert_ne!(rig.vmcb01.control.intercepts.misc1 & misc1::IRET, 0);
    rig.l1(exit_code::CPUID, &[]);
    // A second one in the handler.
    rig.nested.pend_nmi();
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    // IRET: still blocked, one step.
    assert_eq!(rig.l1(exit_code::IRET, &[0xCF]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    assert_eq!(rig.vmcb01.control.intercepts.misc1 & misc1::IRET, 0);
    assert_ne!(rig.vmcb01.save.rflags & rflags::TF, 0);
    assert_ne!(rig.vmcb01.control.intercepts.exceptions & 2, 0);
    // IRET is done and popped RFLAGS.
    rig.vmcb01.save.rip = 0x8800;
    rig.vmcb01.save.rflags = 2;
    assert_eq!(rig.l1(DB, &[]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
    assert_eq!(rig.vmcb01.control.intercepts.exceptions & 2, 0);
    assert_eq!(rig.vmcb01.save.rflags, 2);
}

#[test]
fn an_iret_without_a_second_nmi_costs_no_step() {
    let mut rig = Rig::ready();
    rig.nested.pend_nmi();
    rig.prepare();
    assert_eq!(rig.l1(exit_code::IRET, &[0xCF]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.save.rflags & rflags::TF, 0);
    // The next one is injected once RIP has moved.
    rig.vmcb01.save.rip = 0x8800;
    rig.l1(exit_code::CPUID, &[]);
    rig.nested.pend_nmi();
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
}

#[test]
fn an_nmi_waits_for_the_end_of_an_interrupt_shadow() {
    let mut rig = Rig::ready();
    rig.nested.pend_nmi();
    rig.vmcb01.control.int_state = int_state::SHADOW;
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    assert_ne!(rig.vmcb01.save.rflags & rflags::TF, 0);
    rig.vmcb01.control.int_state = 0;
    rig.vmcb01.save.rip += 1;
    rig.vmcb01.save.dr6 |= 1 << 14;
    assert_eq!(rig.l1(DB, &[]), L1Exit::Resume);
    assert_eq!(rig.vmcb01.save.dr6 & 1 << 14, 0);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
    assert_eq!(rig.vmcb01.save.rflags & rflags::TF, 0);
}

#[test]
fn a_guest_that_steps_itself_keeps_its_trap() {
    let mut rig = Rig::ready();
    rig.nested.pend_nmi();
    rig.vmcb01.control.int_state = int_state::SHADOW;
    rig.vmcb01.save.rflags |= rflags::TF;
    rig.prepare();
    rig.vmcb01.control.int_state = 0;
    assert_eq!(rig.l1(DB, &[]), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 3 << 8 | 1);
    assert_ne!(rig.vmcb01.save.rflags & rflags::TF, 0);
    assert!(rig.prepare().exit_soon, "the NMI waits behind the #DB");
}

#[test]
fn an_nmi_makes_l2_exit_and_stays_pending_until_stgi() {
    let mut rig = entered(misc1::NMI, |_| ());
    rig.nested.pend_nmi();
    assert_eq!(rig.prepare().level, Level::L1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_code, exit_code::NMI);
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    stgi(&mut rig);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, NMI);
}

#[test]
fn an_nmi_that_l1_does_not_intercept_is_l2s() {
    let mut rig = entered(0, |_| ());
    rig.nested.pend_nmi();
    assert_eq!(rig.prepare().level, Level::L2);
    assert_eq!(rig.vmcb02.control.event_inj, NMI);
}

#[test]
fn an_event_before_the_first_instruction_reports_what_l1_injected() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::NMI;
    rig.vmcb12.control.event_inj = 1 << 31 | 0x66;
    rig.nested.pend_nmi();
    rig.l1(exit_code::CLGI, &[0x0F, 0x01, 0xDD]);
    rig.enter();
    assert_eq!(rig.prepare().level, Level::L1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_code, exit_code::NMI);
    assert_eq!(rig.vmcb12.control.exit_int_info, 1 << 31 | 0x66);
    assert_eq!(rig.vmcb12.save.rip, L2_RIP);
}

#[test]
fn init() {
    // Not intercepted by L1, or L1 runs: it resets.
    let mut rig = Rig::ready();
    clgi(&mut rig);
    rig.nested.pend_init();
    rig.prepare();
    stgi(&mut rig);
    assert_eq!(rig.call(|n, m| n.prepare_entry(m)), Entry::Init);
    rig.nested.reset();
    rig.prepare();
    let mut rig = entered(0, |_| ());
    rig.nested.pend_init();
    assert_eq!(rig.call(|n, m| n.prepare_entry(m)), Entry::Init);
    // Intercepted: an exit, and L1 takes it after STGI.
    let mut rig = entered(misc1::INIT | misc1::NMI, |_| ());
    rig.nested.pend_nmi();
    rig.nested.pend_init();
    assert_eq!(rig.prepare().level, Level::L1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_code, exit_code::INIT, "before the NMI");
    stgi(&mut rig);
    assert_eq!(rig.call(|n, m| n.prepare_entry(m)), Entry::Init);
}

#[test]
fn init_redirected_to_sx() {
    let mut rig = Rig::ready();
    rig.wrmsr(nsvm::msr::VM_CR, 1 << 1);
    rig.nested.pend_init();
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 1 << 11 | 3 << 8 | 30 | 1 << 32);
}

/// The embedder takes physical interrupts itself.
fn masking(rig: &mut Rig) {
    rig.vmcb01.control.intercepts.misc1 |= misc1::INTR;
    rig.vmcb01.control.int_ctl = int_ctl::V_INTR_MASKING;
}

#[test]
fn an_interrupt_for_l1_waits_for_its_window() {
    let mut rig = Rig::ready();
    masking(&mut rig);
    rig.nested.pend_interrupt(Some(0x40));
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    assert_ne!(rig.vmcb01.control.int_ctl & int_ctl::V_IRQ, 0);
    assert_ne!(rig.vmcb01.control.intercepts.misc1 & misc1::VINTR, 0);
    rig.vmcb01.save.rflags |= rflags::IF;
    assert_eq!(rig.l1(exit_code::VINTR, &[]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.event_inj, 1 << 31 | 0x40);
    assert_eq!(rig.vmcb01.control.int_ctl & int_ctl::V_IRQ, 0);
    assert_eq!(rig.vmcb01.control.intercepts.misc1 & misc1::VINTR, 0);
    assert_eq!(rig.nested.pending_interrupt(), None);
}

#[test]
fn an_interrupt_makes_l2_exit_by_the_if_that_masks() {
    for (l1_masks, l1_if, l2_if, exits) in
        [(true, true, false, true), (true, false, true, false), (false, false, true, true), (false, true, false, false)]
    {
        let mut rig = entered(misc1::INTR, |r| {
            masking(r);
            r.vmcb01.save.rflags = if l1_if { rflags::IF | 2 } else { 2 };
            r.vmcb12.save.rflags = if l2_if { rflags::IF | 2 } else { 2 };
            r.vmcb12.control.int_ctl = if l1_masks { int_ctl::V_INTR_MASKING } else { 0 };
        });
        rig.nested.pend_interrupt(Some(0x40));
        let level = rig.prepare().level;
        assert_eq!(level == Level::L1, exits, "{l1_masks} {l1_if} {l2_if}");
        assert_eq!(rig.nested.pending_interrupt(), Some(0x40));
        if exits {
            rig.get();
            assert_eq!(rig.vmcb12.control.exit_code, exit_code::INTR);
        }
    }
}

#[test]
fn an_interrupt_that_l1_does_not_intercept_is_l2s() {
    let mut rig = entered(misc1::VINTR, |r| {
        masking(r);
        r.vmcb12.control.int_ctl = int_ctl::V_IRQ | 0x99 << 32;
    });
    rig.nested.pend_interrupt(Some(0x40));
    rig.prepare();
    // L2 has interrupts off: a window, and L1's virtual interrupt waits.
    assert_eq!(rig.vmcb02.control.int_ctl & int_ctl::V_INTR_PRIO, int_ctl::V_INTR_PRIO);
    rig.vmcb02.save.rflags |= rflags::IF;
    assert_eq!(rig.l2(exit_code::VINTR), L2Exit::Resume, "L0's window, not L1's intercept");
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 1 << 31 | 0x40);
    // L1's own is back.
    assert_eq!(rig.vmcb02.control.int_ctl & (0xFF << 32 | int_ctl::V_IRQ), int_ctl::V_IRQ | 0x99 << 32);
    assert_eq!(rig.l2(exit_code::VINTR), L2Exit::ToL1);
    rig.get();
    assert_eq!(rig.vmcb12.control.int_ctl, int_ctl::V_IRQ | 0x99 << 32);
    assert_eq!((rig.vmcb01.save.rax, rig.vmcb01.save.rip), (VMCB12, L1_RIP + 5));
}

#[test]
fn the_iret_watch_follows_the_level_and_leaves_l1s_intercept_alone() {
    // Injected into L2, which exits before its IRET: L1's IRET ends the blocking.
    let mut rig = entered(misc1::HLT, |_| ());
    rig.nested.pend_nmi();
    rig.prepare();
    assert_ne!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0);
    rig.l2_to_l1(exit_code::HLT);
    stgi(&mut rig);
    rig.prepare();
    assert_ne!(rig.vmcb01.control.intercepts.misc1 & misc1::IRET, 0);
    // L2's IRET ends it, too, and VMCB01's watch goes at its next IRET.
    rig.enter();
    rig.prepare();
    assert_ne!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0);
    assert_eq!(rig.l2(exit_code::IRET), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0);
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    stgi(&mut rig);
    assert_eq!(rig.l1(exit_code::IRET, &[]), L1Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb01.control.intercepts.misc1 & misc1::IRET, 0);
    assert_eq!(rig.l1(exit_code::IRET, &[]), L1Exit::NotMine, "the embedder's, if it is anyone's");
    // L1 intercepts IRET: it sees it.
    let mut rig = entered(misc1::IRET, |_| ());
    rig.nested.pend_nmi();
    rig.prepare();
    rig.l2_to_l1(exit_code::IRET);
    rig.nested.pend_nmi();
    rig.enter();
    rig.vmcb02.save.rip += 2;
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, NMI, "L1 did the IRET for L2");
}

#[test]
fn a_db_intercept_survives_the_librarys_step() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.exceptions = 2;
    rig.vmcb12.control.int_state = 1;
    rig.enter();
    rig.nested.pend_nmi();
    rig.prepare();
    assert_ne!(rig.vmcb02.save.rflags & rflags::TF, 0);
    rig.vmcb02.control.int_state = 0;
    assert_eq!(rig.l2(DB), L2Exit::Resume, "the library's own");
    assert_eq!(rig.vmcb02.control.intercepts.exceptions, 2);
    assert_eq!(rig.vmcb02.save.rflags & rflags::TF, 0);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, NMI);
    assert_eq!(rig.l2(DB), L2Exit::ToL1);
}

#[test]
fn an_exit_takes_the_librarys_step_out_of_l2() {
    let mut rig = Rig::ready();
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.vmcb12.control.int_state = 1;
    rig.enter();
    rig.nested.pend_nmi();
    rig.prepare();
    assert_ne!(rig.vmcb02.save.rflags & rflags::TF, 0);
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!(rig.vmcb12.save.rflags & rflags::TF, 0);
}

#[test]
fn the_level_can_be_known_before_the_entry_is_prepared() {
    let mut rig = entered(misc1::NMI, |_| ());
    assert_eq!(rig.call(|n, m| n.route_events(m)), Level::L2);
    rig.nested.pend_nmi();
    assert_eq!(rig.call(|n, m| n.route_events(m)), Level::L1);
    assert_eq!(rig.prepare().level, Level::L1);
    rig.get();
    assert_eq!(rig.vmcb12.control.exit_code, exit_code::NMI);
    let mut rig = entered(misc1::NMI, |_| ());
    rig.nested.pend_nmi();
    rig.memory.read_only.set(true);
    rig.call(|n, m| n.route_events(m));
    assert_eq!(rig.call(|n, m| n.prepare_entry(m)), Entry::Shutdown);
}
