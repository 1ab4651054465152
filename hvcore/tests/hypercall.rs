//! The intake: conventions, order of checks, the decisions on bad input, and the registers that calls may change.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod hypercall_support;

use hypercall_support::host::*;
use hypercall_support::*;

#[test]
fn flushes_parse_in_every_convention() {
    everywhere(|caller, fast| {
        let level = caller.level;
        let seen = served(caller, SPACE | fast, &[0xA000, 4, 0b101]);
        assert_eq!(seen, [Seen { level, space: 0xA000, flags: 4, vps: Some(vec![0, 2]), ranges: None }]);

        let seen = served(caller, LIST | fast | reps(2, 0), &[0xA000, 8, 1 << 63, 0x1000, 0x2FFF]);
        let ranges = Some((RangeFormat::Extended, vec![0x1000, 0x2FFF]));
        assert_eq!(seen, [Seen { level, space: 0xA000, flags: 8, vps: Some(vec![63]), ranges }]);

        let seen = served(caller, SPACE_EX | fast | var(2), &[0xA000, 2, 0, 5, 0x21, 4]);
        assert_eq!(seen, [Seen { level, space: 0xA000, flags: 2, vps: Some(vec![0, 5, 130]), ranges: None }]);

        let words = [0xA000, 0, 0, 1 << 63, 1 << 63, 0x7000];
        let seen = served(caller, LIST_EX | fast | var(1) | reps(1, 0), &words);
        let ranges = Some((RangeFormat::Normal, vec![0x7000]));
        assert_eq!(seen, [Seen { level, space: 0xA000, flags: 0, vps: Some(vec![4095]), ranges }]);

        let seen = served(caller, GPA_SPACE | fast, &[0xA01E, 0]);
        assert_eq!(seen, [Seen { level: Level::L1, space: 0xA01E, flags: 0, vps: None, ranges: None }]);

        let seen = served(caller, GPA_LIST | fast | reps(2, 0), &[0xA01E, 0, 0x3000, 0x4801]);
        let ranges = Some((RangeFormat::Normal, vec![0x3000, 0x4801]));
        assert_eq!(seen, [Seen { level: Level::L1, space: 0xA01E, flags: 0, vps: None, ranges }]);
    });
}

#[test]
fn outside_ring_0_or_protected_mode_is_ud() {
    let words = [0, 1, 0];
    for cpl in 1..=3 {
        let mode = CallerMode { cpl, ..CALLER64.mode };
        undefined(&Caller { mode, ..CALLER64 }, SPACE | FAST, &words);
    }
    let mode = CallerMode { protected: false, ..CALLER32.mode };
    undefined(&Caller { mode, ..CALLER32 }, SPACE | FAST, &words);
    undefined(&Caller { enabled: false, ..CALLER64 }, SPACE | FAST, &words);
    // Control: the same call is served in ring 0, and before the mode nothing else counts.
    served(&CALLER64, SPACE | FAST, &words);
    let mode = CallerMode { cpl: 3, ..CALLER64.mode };
    undefined(&Caller { mode, ..CALLER64 }, 0xFFFF_FFFF_FFFF_FFFF, &words);
}

#[test]
fn modes_follow_the_control_registers() {
    let lma = 1 << 10;
    assert_eq!(CallerMode::new(lma, 1, true, 0).width, Width::Bits64);
    assert_eq!(CallerMode::new(lma, 1, false, 0).width, Width::Bits32);
    assert_eq!(CallerMode::new(1 << 8, 1, true, 0).width, Width::Bits32);
    assert!(CallerMode::new(lma, 1, true, 0).allows_hypercalls());
    assert!(!CallerMode::new(lma, 1, true, 1).allows_hypercalls());
    assert!(!CallerMode::new(0, !1, false, 0).allows_hypercalls());
}

#[test]
fn reserved_bits_come_before_the_code() {
    everywhere(|caller, fast| {
        for bit in (27..32).chain(44..48).chain(60..64) {
            refused(caller, SPACE | fast | 1 << bit, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_INPUT);
            refused(caller, 0x7FFF | fast | 1 << bit, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_INPUT);
        }
        refused(caller, 0x7FFF | fast, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_CODE);
        refused(caller, fast, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_CODE);
    });
}

#[test]
fn the_nested_bit_needs_the_feature_and_l1() {
    let offered = Caller { privileges: Privileges::ALL, ..CALLER64 };
    let input = SPACE | FAST | HypercallInput::NESTED;
    assert_eq!(served(&offered, input, &[0, 1, 0]).len(), 1);
    refused(&Caller { level: Level::L2, ..offered }, input, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_INPUT);
    refused(&CALLER64, input, &[0, 1, 0], HvStatus::INVALID_HYPERCALL_INPUT);
}

#[test]
fn privileges_come_before_the_shape() {
    let cases = [
        (SPACE, Privileges::REMOTE_FLUSH),
        (LIST, Privileges::REMOTE_FLUSH),
        (SPACE_EX, Privileges::REMOTE_FLUSH),
        (LIST_EX, Privileges::REMOTE_FLUSH),
        (SPACE_EX, Privileges::EX_PROCESSOR_MASKS),
        (LIST_EX, Privileges::EX_PROCESSOR_MASKS),
        (GPA_SPACE, Privileges::GUEST_PHYSICAL_FLUSH),
        (GPA_LIST, Privileges::GUEST_PHYSICAL_FLUSH),
    ];
    for (code, needed) in cases {
        let caller = Caller { privileges: CALLER64.privileges.without(needed), ..CALLER64 };
        let bad_shape = code | reps(1, 1);
        refused(&caller, bad_shape, &[], HvStatus::ACCESS_DENIED);
        refused(&CALLER64, bad_shape, &[], HvStatus::INVALID_HYPERCALL_INPUT);
        let only = Privileges::REMOTE_FLUSH | Privileges::EX_PROCESSOR_MASKS | Privileges::GUEST_PHYSICAL_FLUSH;
        let caller = Caller { privileges: only, ..CALLER64 };
        refused(&caller, bad_shape, &[], HvStatus::INVALID_HYPERCALL_INPUT);
    }
}

#[test]
fn shapes_are_checked() {
    use HvStatus as S;
    everywhere(|caller, fast| {
        for simple in [SPACE, SPACE_EX, GPA_SPACE] {
            refused(caller, simple | fast | reps(1, 0), &[0; 4], S::INVALID_HYPERCALL_INPUT);
            refused(caller, simple | fast | reps(0, 1), &[0; 4], S::INVALID_HYPERCALL_INPUT);
        }
        for list in [LIST, LIST_EX, GPA_LIST] {
            refused(caller, list | fast, &[0; 4], S::INVALID_HYPERCALL_INPUT);
            refused(caller, list | fast | reps(1, 1), &[0; 4], S::INVALID_HYPERCALL_INPUT);
            refused(caller, list | fast | reps(1, 2), &[0; 4], S::INVALID_HYPERCALL_INPUT);
        }
        for fixed in [SPACE, LIST | reps(1, 0), GPA_SPACE, GPA_LIST | reps(1, 0)] {
            refused(caller, fixed | fast | var(1), &[0; 4], S::INVALID_HYPERCALL_INPUT);
        }
    });
    // More banks than a set can have is a wrong shape, not a placement.
    refused(&CALLER64, SPACE_EX | var(65), &[0, 0, 0, u64::MAX], S::INVALID_HYPERCALL_INPUT);
    refused(&CALLER64, SPACE_EX | var(1023), &[0, 0, 0, u64::MAX], S::INVALID_HYPERCALL_INPUT);
    assert_eq!(served(&CALLER64, SPACE_EX | var(64), &[0, 0, 0, u64::MAX]).len(), 1);
}

#[test]
fn variable_header_must_match_the_bank_count() {
    everywhere(|caller, fast| {
        for (banks, mask) in [(0, 1), (1, 0), (1, 3), (2, 1)] {
            for format in [0, 1, 7] {
                let input = SPACE_EX | fast | var(banks);
                refused(caller, input, &[0, 0, format, mask, 1, 1], HvStatus::INVALID_HYPERCALL_INPUT);
                let input = LIST_EX | fast | var(banks) | reps(1, 0);
                refused(caller, input, &[0, 0, format, mask, 1, 1], HvStatus::INVALID_HYPERCALL_INPUT);
            }
        }
        assert_eq!(served(caller, SPACE_EX | fast | var(1), &[0, 0, 0, 2, 1])[0].vps, Some(vec![64]));
    });
}

#[test]
fn a_zero_mask_is_all_processors_in_the_normal_form() {
    everywhere(|caller, fast| {
        assert_eq!(served(caller, SPACE | fast, &[0, 0, 0])[0].vps, None);
        assert_eq!(served(caller, LIST | fast | reps(1, 0), &[0, 0, 0, 0x1000])[0].vps, None);
        // ALL_PROCESSORS ignores the mask; one bit names one.
        assert_eq!(served(caller, SPACE | fast, &[0, 1, 2])[0].vps, None);
        assert_eq!(served(caller, SPACE | fast, &[0, 0, 2])[0].vps, Some(vec![1]));
    });
}

#[test]
fn set_formats() {
    everywhere(|caller, fast| {
        // 1 is all; its banks are skipped and the list follows them.
        let words = [0, 0, 1, 1, 0xBAD, 0x5000];
        let seen = served(caller, LIST_EX | fast | var(1) | reps(1, 0), &words);
        assert_eq!(seen[0].vps, None);
        assert_eq!(seen[0].ranges, Some((RangeFormat::Normal, vec![0x5000])));
        assert_eq!(served(caller, SPACE_EX | fast, &[0, 0, 1, 0])[0].vps, None);
        for format in [2, 1 << 32, u64::MAX] {
            refused(caller, SPACE_EX | fast, &[0, 0, format, 0], HvStatus::INVALID_PARAMETER);
            refused(caller, LIST_EX | fast | reps(1, 0), &[0, 0, format, 0, 0], HvStatus::INVALID_PARAMETER);
            // ALL_PROCESSORS ignores the set.
            assert_eq!(served(caller, SPACE_EX | fast, &[0, 1, format, 0])[0].vps, None);
        }
    });
}

#[test]
fn an_empty_sparse_set_succeeds_and_does_nothing() {
    everywhere(|caller, fast| {
        assert_eq!(served(caller, SPACE_EX | fast, &[0, 0, 0, 0]), []);
        assert_eq!(served(caller, LIST_EX | fast | reps(3, 1), &[0, 0, 0, 0, 1, 2, 3]), []);
        // A listed bank may be empty: that set goes to the handler.
        assert_eq!(served(caller, SPACE_EX | fast | var(1), &[0, 0, 0, 1, 0])[0].vps, Some(vec![]));
        // Flags are checked also for an empty set.
        refused(caller, SPACE_EX | fast, &[0, 16, 0, 0], HvStatus::INVALID_PARAMETER);
    });
}

#[test]
fn flags_are_checked() {
    everywhere(|caller, fast| {
        for bit in 4..64 {
            let flags = 1 << bit;
            refused(caller, SPACE | fast, &[0, flags, 1], HvStatus::INVALID_PARAMETER);
            refused(caller, LIST | fast | reps(1, 0), &[0, flags, 1, 0], HvStatus::INVALID_PARAMETER);
            refused(caller, SPACE_EX | fast, &[0, flags, 1, 0], HvStatus::INVALID_PARAMETER);
            refused(caller, LIST_EX | fast | reps(1, 0), &[0, flags, 1, 0, 0], HvStatus::INVALID_PARAMETER);
        }
        refused(caller, LIST | fast | reps(1, 0), &[0, 4, 1, 0], HvStatus::INVALID_PARAMETER);
        refused(caller, LIST_EX | fast | reps(1, 0), &[0, 4, 1, 0, 0], HvStatus::INVALID_PARAMETER);
        for flags in 0..16 {
            served(caller, SPACE | fast, &[0, flags, 1]);
            served(caller, SPACE_EX | fast, &[0, flags, 1, 0]);
            if flags & 4 == 0 {
                served(caller, LIST | fast | reps(1, 0), &[0, flags, 1, 0]);
                served(caller, LIST_EX | fast | reps(1, 0), &[0, flags, 1, 0, 0]);
            }
        }
        let plain = Caller { privileges: caller.privileges.without(Privileges::EXTENDED_GVA_RANGES), ..*caller };
        refused(&plain, LIST | fast | reps(1, 0), &[0, 8, 1, 0], HvStatus::INVALID_PARAMETER);
        refused(&plain, SPACE | fast, &[0, 8, 1], HvStatus::INVALID_PARAMETER);
        for bit in 0..64 {
            refused(caller, GPA_SPACE | fast, &[0, 1 << bit], HvStatus::INVALID_PARAMETER);
            refused(caller, GPA_LIST | fast | reps(1, 0), &[0, 1 << bit, 0], HvStatus::INVALID_PARAMETER);
        }
    });
}

#[test]
fn memory_input_is_aligned_and_within_a_page() {
    for caller in [CALLER64, CALLER32] {
        for (gpa, input, status) in [
            (0x1001, SPACE, HvStatus::INVALID_ALIGNMENT),
            (0x1004, SPACE, HvStatus::INVALID_ALIGNMENT),
            (0x1FE8, SPACE, HvStatus::SUCCESS),
            (0x1FF0, SPACE, HvStatus::INVALID_ALIGNMENT),
            (0x1FF8, SPACE, HvStatus::INVALID_ALIGNMENT),
            (0x1000, LIST | reps(509, 0), HvStatus::SUCCESS),
            (0x1000, LIST | reps(510, 0), HvStatus::INVALID_ALIGNMENT),
            (0x1000, LIST | reps(4095, 0), HvStatus::INVALID_ALIGNMENT),
            (0x1000, LIST | reps(4095, 4094), HvStatus::INVALID_ALIGNMENT),
            (0x1FC8, LIST_EX | var(1) | reps(2, 0), HvStatus::SUCCESS),
            (0x1FD0, LIST_EX | var(1) | reps(2, 0), HvStatus::INVALID_ALIGNMENT),
            (0x8000, SPACE, HvStatus::INVALID_HYPERCALL_INPUT),
            (0xFFFF_FFFF_FFFF_F000, SPACE, HvStatus::INVALID_HYPERCALL_INPUT),
            (0xFFFF_FFFF_FFFF_FFF8, SPACE, HvStatus::INVALID_ALIGNMENT),
        ] {
            let mem = Mem::new(8);
            mem.put(gpa & 0x1FFF & !7, &[0, 1, 0, 1][..if gpa & 0xFFF > 0xFE0 { 1 } else { 4 }]);
            if gpa == 0x1FE8 {
                mem.put(gpa, &[0, 1, 0]);
            }
            let mut regs = registers(caller.mode.width, input, &[gpa, 0]);
            let before = regs.clone();
            let mut host = Host::default();
            let outcome = call(&mut host, &caller, &mut regs, &mem);
            check_registers(&caller, outcome, &before, &regs);
            let value = result(&regs, caller.mode.width);
            assert_eq!(HvStatus(value as u16), status, "{gpa:#x} {input:#x}");
            assert_eq!(host.log.len(), usize::from(status == HvStatus::SUCCESS), "{gpa:#x} {input:#x}");
            if status == HvStatus::INVALID_ALIGNMENT {
                assert!(mem.reads.borrow().is_empty());
            }
            if status == HvStatus::SUCCESS {
                assert_eq!(mem.reads.borrow().len(), 1, "input is read once");
            }
        }
    }
}

#[test]
fn input_from_l2_goes_through_its_tables() {
    let caller = Caller { level: Level::L2, ..CALLER64 };
    let did = run(&caller, SPACE, &[9, 1, 0], None);
    assert_eq!(did.host.log[0].space, 9);
    assert_eq!(*did.mem.reads.borrow(), [(GPA + 4096, 24)]);
    // Unmapped in L1's tables: the status of an unreadable input, and no access.
    let mem = Mem::new(16);
    let mut regs = registers(Width::Bits64, SPACE, &[0x7000, 0]);
    let mut host = Host::default();
    let _ = call(&mut host, &caller, &mut regs, &mem);
    assert_eq!(result(&regs, Width::Bits64), u64::from(HvStatus::INVALID_HYPERCALL_INPUT.0));
    assert!(mem.reads.borrow().is_empty() && host.log.is_empty());
    // Control: the same GPA from L1 is readable.
    let mut regs = registers(Width::Bits64, SPACE, &[0x7000, 0]);
    let _ = call(&mut host, &CALLER64, &mut regs, &mem);
    assert_eq!(result(&regs, Width::Bits64), 0);
}

#[test]
fn fast_input_needs_the_feature_and_112_bytes() {
    everywhere(|caller, fast| {
        if fast == 0 {
            return;
        }
        let none = Caller { privileges: caller.privileges.without(Privileges::XMM_INPUT), ..*caller };
        undefined(&none, SPACE | fast, &[0, 1, 0]);
        undefined(&none, LIST | fast | reps(1, 0), &[0, 1, 0, 0]);
        // 16 bytes are in general-purpose registers.
        assert_eq!(served(&none, GPA_SPACE | fast, &[5, 0]).len(), 1);
        undefined(&none, GPA_LIST | fast | reps(1, 0), &[5, 0, 0]);
        let words: Vec<u64> = [0, 1, 0].into_iter().chain(100..111).collect();
        let seen = served(caller, LIST | fast | reps(11, 0), &words);
        assert_eq!(seen[0].ranges, Some((RangeFormat::Normal, (100..111).collect())));
        refused(caller, LIST | fast | reps(12, 0), &words, HvStatus::INVALID_HYPERCALL_INPUT);
        served(caller, LIST_EX | fast | reps(9, 0) | var(1), &[0, 0, 0, 1, 1]);
        refused(caller, LIST_EX | fast | reps(10, 0) | var(1), &[0, 0, 0, 1, 1], HvStatus::INVALID_HYPERCALL_INPUT);
        refused(caller, SPACE_EX | fast | var(11), &[0, 0, 0, 0x7FF], HvStatus::INVALID_HYPERCALL_INPUT);
    });
}

#[test]
fn fast_calls_touch_no_memory_and_only_the_registers_they_need() {
    let words: Vec<u64> = [0, 1, 0].into_iter().chain(100..111).collect();
    for (count, xmms) in [(1, 1), (2, 2), (10, 6), (11, 6)] {
        let did = run(&CALLER64, LIST | FAST | reps(count, 0), &words, None);
        assert_eq!(did.regs.xmm_reads.get(), xmms);
        assert!(did.mem.reads.borrow().is_empty());
    }
}

#[test]
fn rep_start_and_continuation() {
    everywhere(|caller, fast| {
        let words = [0, 1, 0, 10, 11, 12, 13, 14];
        let input = LIST | fast | reps(5, 2);
        let seen = served(caller, input, &words);
        assert_eq!(seen[0].ranges, Some((RangeFormat::Normal, vec![12, 13, 14])));

        // The handler does two of the remaining three.
        let did = run(caller, input, &words, Some(Answer::Retry { completed: 2 }));
        assert_eq!(did.outcome, Outcome::Retry);
        let again = match caller.mode.width {
            Width::Bits64 => did.regs.gpr[Gpr::Rcx as usize],
            Width::Bits32 => result(&did.regs, Width::Bits32),
        };
        assert_eq!(again, LIST | fast | reps(5, 4));
        // All done is success, however it is said; no progress is a legal answer too.
        let did = run(caller, input, &words, Some(Answer::Retry { completed: 3 }));
        assert_eq!((did.status, did.reps), (HvStatus::SUCCESS, 5));
        let did = run(caller, input, &words, Some(Answer::Retry { completed: 0 }));
        assert_eq!(did.outcome, Outcome::Retry);
        // A simple call keeps its registers.
        let did = run(caller, SPACE | fast, &words, Some(Answer::Retry { completed: 9 }));
        assert_eq!((did.outcome, did.regs.written), (Outcome::Retry, 0));
    });
}

#[test]
fn failures_and_suspension() {
    everywhere(|caller, fast| {
        let words = [0, 1, 0, 10, 11, 12, 13, 14];
        let failed = |completed| Some(Answer::Failed { status: HvStatus::OPERATION_DENIED, completed });
        let did = run(caller, LIST | fast | reps(5, 2), &words, failed(1));
        assert_eq!((did.status, did.reps), (HvStatus::OPERATION_DENIED, 3));
        let did = run(caller, LIST | fast | reps(5, 2), &words, failed(u16::MAX));
        assert_eq!((did.status, did.reps), (HvStatus::OPERATION_DENIED, 5));
        let did = run(caller, SPACE | fast, &words, failed(1));
        assert_eq!((did.status, did.reps), (HvStatus::OPERATION_DENIED, 0));
        for input in [SPACE | fast, LIST | fast | reps(5, 2)] {
            let did = run(caller, input, &words, Some(Answer::Suspend));
            assert_eq!((did.outcome, did.regs.written), (Outcome::Suspend, 0));
        }
    });
}

#[test]
fn the_offer_is_the_allow_list() {
    struct Little(Host);
    impl FlushVirtual for Little {
        fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
            self.0.flush_space(target)
        }
        fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
            self.0.flush_list(target, ranges)
        }
    }
    hvcore::offer_hypercalls!(impl for Little { FlushVirtualAddressSpace });
    assert_eq!(Little::CODES.len(), 1);
    let mem = Mem::new(1);
    let mut little = Little(Host::default());
    for code in 0..=u16::MAX {
        let mut regs = registers(Width::Bits64, u64::from(code) | FAST, &[0, 1, 0]);
        let _ = call(&mut little, &CALLER64, &mut regs, &mem);
        let status = HvStatus(result(&regs, Width::Bits64) as u16);
        let want = if code == 2 { HvStatus::SUCCESS } else { HvStatus::INVALID_HYPERCALL_CODE };
        assert_eq!(status, want, "{code:#x}");
    }
    assert_eq!(little.0.log.len(), 1);
}
