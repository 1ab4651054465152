//! What L1 is offered where the processor has it: TSC ratio, virtual NMI, LBR virtualization, virtual VMLOAD and VMSAVE,
//! PAUSE filter, next RIP. Each with what fires it and what comes just short.

use nsvm::caps::{Config, ConfigError, Features};
use nsvm::check::Refusal;
use nsvm::msr::TSC_RATIO;
use nsvm::vmcb::bits::{cr0, cr4, int_ctl, misc1, misc2, np, rflags, virt_ext};
use nsvm::{L1Exit, L2Exit, exit_code};

use crate::rig::{L2_RIP, Rig, VMCB12, host};

const GP: u64 = 1 << 31 | 1 << 11 | 3 << 8 | 13;
/// EXITCODE of PAUSE.
const PAUSE: u64 = 0x77;

fn rig(features: Features) -> Rig {
    let host = host(Features::NP.union(features));
    let offered = Config::all(host, 8, true).unwrap().features().union(features.intersection(Features::TSC_RATE));
    let mut rig = Rig::with(Config::new(host, offered, 8, true).unwrap());
    rig.enable();
    rig
}

/// VMRUN ends with exit code -1, for this reason.
fn refused(rig: &mut Rig, why: Refusal) {
    assert_eq!(rig.vmrun(), L1Exit::Resume);
    rig.get();
    assert_eq!((rig.vmcb12.control.exit_code, rig.nested.last_refusal()), (exit_code::INVALID, Some(why)));
}

/// An instruction of L2 exits with `code`.
fn l2_at(rig: &mut Rig, code: u64, insn: &[u8]) -> L2Exit {
    rig.prepare();
    rig.write(rig.vmcb02.save.rip, insn);
    rig.l2(code)
}

#[test]
fn only_what_there_is_is_offered() {
    let plain = host(Features::NP);
    for feature in [Features::TSC_RATE, Features::LBR, Features::NRIPS, Features::PAUSE_FILTER] {
        let without = Config::new(plain, feature, 8, true).err();
        assert_eq!(without, Some(ConfigError::Unsupported(feature.edx())));
        assert!(Config::new(host(Features::NP.union(feature)), feature, 8, true).is_ok());
    }
    for software in [Features::V_VMSAVE_VMLOAD, Features::VNMI, Features::VGIF] {
        assert!(Config::new(plain, software, 8, true).is_ok());
    }
    let rate = host(Features::NP.union(Features::TSC_RATE));
    assert!(!Config::all(rate, 8, true).unwrap().features().has(Features::TSC_RATE), "it needs the embedder");
    // AVIC (13), x2AVIC (18), SSS check (19) and the like: not even where the processor has them.
    for bit in [2, 13, 17, 18, 19, 20] {
        let feature = Features::from_edx(1 << bit);
        let offered = Config::new(host(Features::NP.union(feature)), feature, 8, true).err();
        assert_eq!(offered, Some(ConfigError::Unsupported(1 << bit)));
    }
}

#[test]
fn avic_does_not_reach_the_processor() {
    let mut rig = rig(Features::from_edx(u32::MAX));
    rig.vmcb12.control.int_ctl = int_ctl::AVIC | int_ctl::X2AVIC | int_ctl::V_TPR;
    rig.vmcb12.control.avic_bar = 0xFEE0_0000;
    rig.enter();
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & (int_ctl::AVIC | int_ctl::X2AVIC), 0);
    assert_eq!(rig.vmcb02.control.avic_bar, 0);
    assert_eq!(rig.nested.vmcb12_control().int_ctl, int_ctl::V_TPR);
}

#[test]
fn the_ratio_scales_what_l2_adds_to() {
    let mut rig = rig(Features::TSC_RATE);
    assert_eq!(rig.rdmsr(TSC_RATIO), (L1Exit::Resume, 1 << 32));
    rig.enter();
    assert_eq!((rig.vmcb02.control.tsc_offset, rig.nested.hardware_tsc_ratio(3 << 31)), (1020, 3 << 31));
    rig.l2(exit_code::VMRUN);
    // Twice as fast: L1's own offset counts twice.
    assert_eq!(rig.wrmsr(TSC_RATIO, 2 << 32), L1Exit::Resume);
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    assert_eq!(rig.nested.hardware_tsc_ratio(3 << 31), 3 << 31, "L1 runs");
    rig.enter();
    assert_eq!((rig.vmcb02.control.tsc_offset, rig.nested.hardware_tsc_ratio(3 << 31)), (2020, 3 << 32));
    rig.l2(exit_code::VMRUN);
    // Half as fast, L1's offset negative.
    rig.wrmsr(TSC_RATIO, 1 << 31);
    rig.vmcb01.control.tsc_offset = 0u64.wrapping_sub(1000);
    rig.enter();
    assert_eq!(rig.vmcb02.control.tsc_offset, 20u64.wrapping_sub(500));
    // L2 may write it, too, where L1 lets it.
    (rig.regs.rcx, rig.regs.rdx, rig.vmcb02.save.rax) = (TSC_RATIO.into(), 2, 0);
    rig.vmcb02.control.exit_info_1 = 1;
    rig.prepare();
    rig.write(L2_RIP, &[0x0F, 0x30]);
    assert_eq!(rig.l2_with(exit_code::MSR, 1, 0), L2Exit::Resume);
    assert_eq!(rig.vmcb02.control.tsc_offset, 20u64.wrapping_sub(2000));
    assert_eq!(rig.nested.hardware_tsc_ratio(1 << 32), 2 << 32);
}

#[test]
fn the_ratio_has_reserved_bits() {
    let mut rig = rig(Features::TSC_RATE);
    rig.wrmsr(TSC_RATIO, (1 << 40) - 1);
    assert_eq!(rig.vmcb01.control.event_inj, 0);
    assert_eq!(rig.rdmsr(TSC_RATIO).1, (1 << 40) - 1);
    rig.wrmsr(TSC_RATIO, 1 << 40);
    assert_eq!(rig.vmcb01.control.event_inj, GP);
    assert_eq!(rig.rdmsr(TSC_RATIO).1, (1 << 40) - 1);
    // Without the feature the MSR is none of the library's.
    let mut without = self::rig(Features::default());
    assert_eq!(without.rdmsr(TSC_RATIO).0, L1Exit::NotMine);
}

#[test]
fn virtual_nmis_are_the_processors() {
    let enabled = int_ctl::V_NMI_ENABLE | int_ctl::V_NMI;
    let mut rig = rig(Features::VNMI);
    rig.vmcb12.control.int_ctl = enabled;
    refused(&mut rig, Refusal::VirtualNmi);
    rig.vmcb12.control.intercepts.misc1 = misc1::NMI | misc1::HLT;
    rig.enter();
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl, enabled);
    // Delivered, its handler not at its end yet.
    rig.vmcb02.control.int_ctl = int_ctl::V_NMI_ENABLE | int_ctl::V_NMI_MASK;
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!(rig.vmcb12.control.int_ctl, int_ctl::V_NMI_ENABLE | int_ctl::V_NMI_MASK);
    // Not offered, there are no such bits, and so no rule.
    let mut without = Rig::with(Config::new(host(Features::NP), Features::NP, 8, true).unwrap());
    without.enable();
    without.vmcb12.control.int_ctl = enabled;
    without.enter();
    without.prepare();
    assert_eq!(without.vmcb02.control.int_ctl, 0);
}

#[test]
fn a_virtual_nmi_waits_for_gif() {
    let enabled = int_ctl::V_NMI_ENABLE | int_ctl::V_NMI;
    let mut rig = rig(Features::VNMI);
    rig.vmcb12.control.int_ctl = enabled;
    rig.vmcb12.control.intercepts.misc1 = misc1::NMI | misc1::HLT;
    rig.enter();
    assert_eq!(l2_at(&mut rig, exit_code::CLGI, &[0x0F, 0x01, 0xDD]), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & enabled, int_ctl::V_NMI_ENABLE);
    assert_eq!(l2_at(&mut rig, exit_code::STGI, &[0x0F, 0x01, 0xDC]), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.int_ctl & enabled, enabled);
    // An exit meanwhile shows L1 that it is still pending.
    assert_eq!(l2_at(&mut rig, exit_code::CLGI, &[0x0F, 0x01, 0xDD]), L2Exit::Resume);
    rig.prepare();
    rig.l2_to_l1(exit_code::HLT);
    assert_eq!(rig.vmcb12.control.int_ctl, enabled);
}

/// L2 runs with a pending virtual NMI, on a processor that knows of none.
fn soft_vnmi(int_ctl: u64) -> Rig {
    let mut rig = rig(Features::default());
    rig.vmcb12.control.int_ctl = int_ctl::V_NMI_ENABLE | int_ctl;
    rig.vmcb12.control.intercepts.misc1 = misc1::NMI | misc1::HLT;
    rig.enter();
    rig
}

const NMI: u64 = 1 << 31 | 2 << 8 | 2;

/// V_NMI and V_NMI_MASK as an exit shows them to L1.
fn shown(rig: &mut Rig) -> u64 {
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.control.int_ctl & (int_ctl::V_NMI | int_ctl::V_NMI_MASK)
}

#[test]
fn software_injects_virtual_nmis() {
    let mut rig = soft_vnmi(int_ctl::V_NMI);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, NMI);
    assert_eq!(rig.vmcb02.control.int_ctl & (int_ctl::V_NMI | int_ctl::V_NMI_MASK | int_ctl::V_NMI_ENABLE), 0);
    assert_ne!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0);
    assert_eq!(shown(&mut rig), int_ctl::V_NMI_MASK);
    // Nothing pending, nothing done.
    let mut rig = soft_vnmi(0);
    rig.prepare();
    assert_eq!((rig.vmcb02.control.event_inj, rig.vmcb02.control.intercepts.misc1 & misc1::IRET), (0, 0));
    assert_eq!(shown(&mut rig), 0);
    // Masked, it waits; L1's own event goes first; in an interrupt shadow it comes one instruction later.
    let mut rig = soft_vnmi(int_ctl::V_NMI | int_ctl::V_NMI_MASK);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 0);
    assert_eq!(shown(&mut rig), int_ctl::V_NMI | int_ctl::V_NMI_MASK);
    for (event, state) in [(1 << 31 | 0x50, 0), (0, 1)] {
        (rig.vmcb12.control.event_inj, rig.vmcb12.control.int_state) = (event, state);
        rig.vmcb12.control.int_ctl = int_ctl::V_NMI_ENABLE | int_ctl::V_NMI;
        rig.enter();
        let plan = rig.prepare();
        assert_eq!((rig.vmcb02.control.event_inj, plan.exit_soon), (event, event != 0));
        assert_eq!(rig.vmcb02.save.rflags & rflags::TF != 0, state != 0, "a single step over the shadow");
        rig.vmcb02.control.int_state = 0;
        rig.vmcb02.control.event_inj = 0;
        let stepped = if state != 0 { rig.l2(exit_code::EXCEPTION | 1) } else { rig.l2(exit_code::NMI) };
        assert_eq!(stepped, if state != 0 { L2Exit::Resume } else { L2Exit::Embedder });
        rig.prepare();
        assert_eq!((rig.vmcb02.control.event_inj, rig.vmcb02.save.rflags & rflags::TF), (NMI, 0));
        assert_eq!(shown(&mut rig), int_ctl::V_NMI_MASK);
    }
}

#[test]
fn software_unmasks_virtual_nmis_after_iret() {
    for pending in [0, int_ctl::V_NMI] {
        let mut rig = soft_vnmi(int_ctl::V_NMI_MASK | pending);
        rig.prepare();
        assert_eq!(rig.l2(exit_code::IRET), L2Exit::Resume);
        rig.prepare();
        assert_eq!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET, 0, "it is to be executed");
        assert_eq!(rig.vmcb02.save.rflags & rflags::TF != 0, pending != 0, "with another pending, one step");
        // Not executed yet: something of L0's came first.
        assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
        rig.prepare();
        assert_eq!(rig.vmcb02.control.event_inj, 0);
        // Now it is.
        rig.vmcb02.save.rip += 0x100;
        rig.vmcb02.save.rflags &= !rflags::TF;
        if pending != 0 {
            assert_eq!(rig.l2(exit_code::EXCEPTION | 1), L2Exit::Resume);
            rig.prepare();
            assert_eq!(rig.vmcb02.control.event_inj, NMI);
        }
        assert_eq!(shown(&mut rig), if pending != 0 { int_ctl::V_NMI_MASK } else { 0 });
    }
    // L1 intercepts IRET: the exit is L1's, and the mask stays as long as RIP does.
    let mut rig = soft_vnmi(int_ctl::V_NMI_MASK);
    rig.l2_to_l1(exit_code::HLT);
    rig.vmcb12.control.intercepts.misc1 |= misc1::IRET;
    rig.enter();
    rig.prepare();
    rig.l2_to_l1(exit_code::IRET);
    assert_eq!(rig.vmcb12.control.int_ctl & int_ctl::V_NMI_MASK, int_ctl::V_NMI_MASK);
}

#[test]
fn software_keeps_virtual_nmis_back_while_gif_is_clear() {
    let mut rig = soft_vnmi(int_ctl::V_NMI);
    assert!(rig.nested.gif());
    // L2's own CLGI, before anything was injected.
    rig.write(L2_RIP, &[0x0F, 0x01, 0xDD]);
    assert_eq!(rig.l2(exit_code::CLGI), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 0);
    assert_eq!(l2_at(&mut rig, exit_code::STGI, &[0x0F, 0x01, 0xDC]), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, NMI);
    // With a virtual GIF, kept in software too, that one counts.
    let mut rig = soft_vnmi(int_ctl::V_NMI | int_ctl::V_GIF_ENABLE);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, 0);
    assert_eq!(l2_at(&mut rig, exit_code::STGI, &[0x0F, 0x01, 0xDC]), L2Exit::Resume);
    rig.prepare();
    assert_eq!(rig.vmcb02.control.event_inj, NMI);
}

#[test]
fn a_saved_state_has_virtual_nmis() {
    let mut rig = soft_vnmi(int_ctl::V_NMI_MASK);
    rig.prepare();
    assert_eq!(rig.l2(exit_code::IRET), L2Exit::Resume);
    let at_iret = rig.call(|nested, m| nested.save(m.vmcb01, m.vmcb02));
    assert_ne!(at_iret.control.int_ctl & int_ctl::V_NMI_MASK, 0);
    rig.vmcb02.save.rip += 1;
    let after = rig.call(|nested, m| nested.save(m.vmcb01, m.vmcb02));
    assert_eq!(after.control.int_ctl & int_ctl::V_NMI_MASK, 0);
    for (saved, watched) in [(at_iret, true), (after, false)] {
        let config = *rig.nested.config();
        rig.nested = rig.call(|_, m| nsvm::NestedSvm::restore(config, &saved, m)).unwrap();
        rig.prepare();
        assert_eq!(rig.vmcb02.control.intercepts.misc1 & misc1::IRET != 0, watched);
    }
}

fn branches(rig: &mut Rig, level: u8, first: u64) {
    let save = match level {
        1 => &mut rig.vmcb01.save,
        2 => &mut rig.vmcb02.save,
        _ => &mut rig.vmcb12.save,
    };
    (save.dbgctl, save.br_from, save.br_to) = (first, first + 1, first + 2);
    (save.last_excp_from, save.last_excp_to) = (first + 3, first + 4);
}

#[test]
fn l2_has_branch_records_of_its_own_if_l1_says_so() {
    for (own, l1) in [(0, 1), (1, 1), (1, 0), (0, 0)] {
        let mut rig = rig(Features::LBR);
        rig.vmcb01.control.virt_ext = own;
        rig.vmcb12.control.virt_ext = l1;
        rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
        branches(&mut rig, 1, 10);
        branches(&mut rig, 12, 20);
        rig.enter();
        let save = rig.vmcb02.save;
        assert_eq!(rig.vmcb02.control.virt_ext, own | l1, "what L1 shares with L2 is not L0's");
        let wanted = if l1 != 0 { 20 } else { 10 * own };
        assert_eq!((save.dbgctl, save.last_excp_to), (wanted, if wanted == 0 { 0 } else { wanted + 4 }));
        branches(&mut rig, 2, 30);
        rig.l2_to_l1(exit_code::HLT);
        assert_eq!(rig.vmcb12.save.br_to, if l1 != 0 { 32 } else { 22 });
        assert_eq!(rig.vmcb01.save.br_to, if own != 0 && l1 == 0 { 32 } else { 12 });
    }
}

/// L1's nested tables: L2's page 0x5000 is L1's 0x1_1000, to be read only.
fn nested_tables(rig: &mut Rig) {
    for (at, entry) in [(0x4_0000, 0x4_1007u64), (0x4_1000, 0x4_2007), (0x4_2000, 0x4_3007), (0x4_3028, 0x1_1065)] {
        rig.write(at, &entry.to_le_bytes());
    }
    (rig.vmcb12.control.np_control, rig.vmcb12.control.n_cr3) = (np::ENABLE, 0x4_0000);
}

#[test]
fn vmload_of_l2_means_l2s_memory_if_l1_says_so() {
    const VMLOAD: [u8; 3] = [0x0F, 0x01, 0xDA];
    for (bit, paging, page) in [(virt_ext::VMLOAD_VMSAVE, true, 0x1_1000), (0, true, 0x5000), (2, false, 0x5000)] {
        let mut rig = rig(Features::default());
        if paging {
            nested_tables(&mut rig);
        }
        rig.vmcb12.control.virt_ext = bit;
        rig.vmcb12.save.rax = 0x5000;
        rig.write(page + 0x448, &0x1234_5678u64.to_le_bytes());
        rig.enter();
        assert_ne!(rig.vmcb02.control.intercepts.misc2 & misc2::VMLOAD, 0);
        assert_eq!(l2_at(&mut rig, exit_code::VMLOAD, &VMLOAD), L2Exit::Resume);
        assert_eq!(rig.vmcb01.save.fs.base, 0x1234_5678, "{bit} {paging}");
    }
}

#[test]
fn vmsave_of_l2_faults_where_l1s_tables_say() {
    const VMSAVE: [u8; 3] = [0x0F, 0x01, 0xDB];
    // Present and user; write, user; not present.
    for (rax, info_1) in [(0x5000, 0x1_0000_0007), (0x6000, 0x1_0000_0006)] {
        let mut rig = rig(Features::default());
        nested_tables(&mut rig);
        rig.vmcb12.control.virt_ext = virt_ext::VMLOAD_VMSAVE;
        rig.vmcb12.save.rax = rax;
        rig.enter();
        assert_eq!(l2_at(&mut rig, exit_code::VMSAVE, &VMSAVE), L2Exit::ToL1);
        rig.get();
        let control = &rig.vmcb12.control;
        assert_eq!((control.exit_code, control.exit_info_1, control.exit_info_2), (exit_code::NPF, info_1, rax));
    }
    // Writable: it is stored.
    let mut rig = rig(Features::default());
    nested_tables(&mut rig);
    rig.write(0x4_3028, &0x1_1067u64.to_le_bytes());
    rig.vmcb12.control.virt_ext = virt_ext::VMLOAD_VMSAVE;
    rig.vmcb12.save.rax = 0x5000;
    rig.vmcb01.save.fs.base = 0x77;
    rig.enter();
    assert_eq!(l2_at(&mut rig, exit_code::VMSAVE, &VMSAVE), L2Exit::Resume);
    assert_eq!(rig.read(0x1_1448), 0x77u64.to_le_bytes());
    assert_eq!(rig.read::<8>(0x4_3028), 0x1_1067u64.to_le_bytes(), "marked already");
}

#[test]
fn the_processor_does_it_where_it_can() {
    for (has, bit, paging, by_hardware) in
        [(true, 2, true, true), (false, 2, true, false), (true, 0, true, false), (true, 2, false, false)]
    {
        let mut rig = rig(if has { Features::V_VMSAVE_VMLOAD } else { Features::default() });
        if paging {
            nested_tables(&mut rig);
        }
        rig.vmcb12.control.virt_ext = bit;
        rig.vmcb12.control.intercepts.misc2 |= misc2::VMSAVE;
        rig.enter();
        let control = &rig.vmcb02.control;
        assert_eq!(control.virt_ext & virt_ext::VMLOAD_VMSAVE != 0, by_hardware);
        assert_eq!(control.intercepts.misc2 & misc2::VMLOAD == 0, by_hardware);
        assert_ne!(control.intercepts.misc2 & misc2::VMSAVE, 0, "L1 intercepts it");
    }
}

#[test]
fn l0s_pause_filter_holds_unless_l1_has_one() {
    for (own, l1) in [(true, false), (false, true), (true, true), (false, false)] {
        let mut rig = rig(Features::PAUSE_FILTER.union(Features::PAUSE_THRESHOLD));
        if own {
            rig.vmcb01.control.intercepts.misc1 |= misc1::PAUSE;
        }
        if l1 {
            rig.vmcb12.control.intercepts.misc1 |= misc1::PAUSE;
        }
        (rig.vmcb01.control.pause_count, rig.vmcb01.control.pause_threshold) = (10, 11);
        (rig.vmcb12.control.pause_count, rig.vmcb12.control.pause_threshold) = (20, 21);
        rig.enter();
        let control = &rig.vmcb02.control;
        assert_eq!(control.intercepts.misc1 & misc1::PAUSE != 0, own || l1);
        assert_eq!((control.pause_count, control.pause_threshold), if l1 { (20, 21) } else { (10, 11) });
        if own || l1 {
            let exit = l2_at(&mut rig, PAUSE, &[0xF3, 0x90]);
            assert_eq!(exit, if l1 { L2Exit::ToL1 } else { L2Exit::Embedder });
        }
    }
    // Not offered: L1's count is nothing, every PAUSE exits.
    let mut rig = rig(Features::default());
    rig.vmcb12.control.intercepts.misc1 |= misc1::PAUSE;
    (rig.vmcb12.control.pause_count, rig.vmcb12.control.pause_threshold) = (20, 21);
    rig.enter();
    assert_eq!((rig.vmcb02.control.pause_count, rig.vmcb02.control.pause_threshold), (0, 0));
}

#[test]
fn an_injected_int_pushes_the_rip_that_l1_gave() {
    let int = 1 << 31 | 4 << 8 | 0x80;
    for (features, wanted) in [(Features::NRIPS, 0x9002), (Features::default(), 0)] {
        let mut rig = rig(features);
        (rig.vmcb12.control.event_inj, rig.vmcb12.control.next_rip) = (int, 0x9002);
        rig.enter();
        rig.prepare();
        assert_eq!((rig.vmcb02.control.event_inj, rig.vmcb02.control.next_rip), (int, wanted));
        // Its delivery is cut short by a fault of L0's: it is injected again, with the same RIP.
        rig.vmcb02.control.exit_int_info = int;
        rig.vmcb02.control.next_rip = 0;
        rig.l2(exit_code::NPF);
        rig.prepare();
        assert_eq!((rig.vmcb02.control.event_inj, rig.vmcb02.control.next_rip), (int, wanted));
    }
}

#[test]
fn an_exit_at_no_instruction_has_no_next_rip() {
    let mut rig = rig(Features::NRIPS.union(Features::DECODE_ASSISTS));
    rig.vmcb12.control.intercepts.misc1 = misc1::NMI | misc1::HLT;
    rig.enter();
    rig.prepare();
    (rig.vmcb02.control.next_rip, rig.vmcb02.control.insn_len, rig.vmcb02.control.insn_bytes[0]) = (0x9002, 2, 0xF4);
    // The exit is L0's own; the NMI that comes then is not that instruction's.
    assert_eq!(rig.l2(exit_code::NMI), L2Exit::Embedder);
    rig.vmcb02.control.exit_code = exit_code::CPUID;
    rig.nested.pend_nmi();
    rig.prepare();
    rig.get();
    let control = &rig.vmcb12.control;
    assert_eq!((control.exit_code, control.next_rip, control.insn_len), (exit_code::NMI, 0, 0));
    assert_eq!(control.insn_bytes, [0; 15]);
    // The instruction's own exit has them.
    rig.vmcb12.control.intercepts.misc1 = misc1::HLT;
    rig.enter();
    rig.prepare();
    (rig.vmcb02.control.next_rip, rig.vmcb02.control.insn_len, rig.vmcb02.control.insn_bytes[0]) = (0x9002, 2, 0xF4);
    rig.l2_to_l1(exit_code::HLT);
    let control = &rig.vmcb12.control;
    assert_eq!((control.next_rip, control.insn_len, control.insn_bytes[0]), (0x9002, 2, 0xF4));
}

#[test]
fn shadow_stacks_have_rules() {
    let mut rig = rig(Features::default());
    rig.vmcb12.save.cr4 |= cr4::CET;
    // Not a CR4 bit of this processor.
    refused(&mut rig, Refusal::Cr4);
    let mut host = host(Features::NP);
    host.cr4_valid |= cr4::CET;
    let mut rig = Rig::with(Config::all(host, 8, true).unwrap());
    rig.enable();
    rig.vmcb12.save.cr4 |= cr4::CET;
    refused(&mut rig, Refusal::Cet);
    rig.vmcb12.save.cr0 |= cr0::WP;
    rig.vmcb12.save.s_cet = 1 << 2;
    refused(&mut rig, Refusal::Cet);
    rig.vmcb12.save.s_cet = 3;
    rig.enter();
    assert_eq!(rig.vmcb02.save.s_cet, 3);
    assert_eq!(rig.vmcb01.save.rax, VMCB12);
}
