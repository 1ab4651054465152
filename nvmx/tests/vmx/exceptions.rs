//! Exceptions of L2: bitmap, mask and match of L1 and of the embedder, double faults, interrupted deliveries.

use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::{Fault, L1Exit, L2Exit};

use crate::rig::Rig;

const PF: u64 = 1 << 14;
const VALID: u64 = 1 << 31;
const CODE: u64 = 1 << 11;
const HARDWARE: u64 = 3 << 8;

/// L2 runs; L1 wants `fields`, the embedder `own`.
fn rig(fields: &[(Field, u64)], own: &[(Field, u64)]) -> Rig {
    let mut rig = Rig::filled();
    rig.set(fields);
    for (field, value) in own {
        rig.vmcs01.poke(*field, *value);
    }
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.run();
    rig
}

fn page_fault(rig: &mut Rig, code: u64) -> L2Exit {
    rig.vmcs02.poke(Field::ExitInterruptionInfo, VALID | CODE | HARDWARE | 14);
    rig.vmcs02.poke(Field::ExitInterruptionErrorCode, code);
    rig.vmcs02.poke(Field::ExitQualification, 0xFA01_7000);
    rig.l2(r::EXCEPTION_OR_NMI)
}

const EMBEDDER: L2Exit = L2Exit::Embedder { reason: r::EXCEPTION_OR_NMI };

#[test]
fn bitmaps_are_merged_and_told_apart() {
    let mut rig = rig(&[(Field::ExceptionBitmap, 1 << 6)], &[(Field::ExceptionBitmap, 1 << 3 | 1 << 18)]);
    assert_eq!(rig.vmcs02.peek(Field::ExceptionBitmap), 1 << 3 | 1 << 6 | 1 << 18);
    rig.vmcs02.poke(Field::ExitInterruptionInfo, VALID | 6 << 8 | 3);
    assert_eq!(rig.l2(r::EXCEPTION_OR_NMI), EMBEDDER);
    rig.vmcs02.poke(Field::ExitInterruptionInfo, VALID | HARDWARE | 6);
    assert_eq!(rig.l2(r::EXCEPTION_OR_NMI), L2Exit::ToL1);
}

#[test]
fn page_faults_by_mask_and_match_are_the_processors_to_choose() {
    let rig = rig(
        &[(Field::ExceptionBitmap, PF), (Field::PageFaultErrorCodeMask, 5), (Field::PageFaultErrorCodeMatch, 4)],
        &[],
    );
    assert_eq!(rig.vmcs02.peek(Field::ExceptionBitmap), PF);
    assert_eq!(rig.vmcs02.peek(Field::PageFaultErrorCodeMask), 5);
    assert_eq!(rig.vmcs02.peek(Field::PageFaultErrorCodeMatch), 4);
}

#[test]
fn page_faults_that_the_embedder_wants_too_all_exit() {
    // L1 wants those with bit 0 set, the embedder those with bit 2 set.
    let l1 = [(Field::ExceptionBitmap, PF), (Field::PageFaultErrorCodeMask, 1), (Field::PageFaultErrorCodeMatch, 1)];
    let own = [(Field::ExceptionBitmap, PF), (Field::PageFaultErrorCodeMask, 4), (Field::PageFaultErrorCodeMatch, 4)];
    let make = || rig(&l1, &own);
    let rig = make();
    let controls = [Field::ExceptionBitmap, Field::PageFaultErrorCodeMask, Field::PageFaultErrorCodeMatch];
    assert_eq!(controls.map(|field| rig.vmcs02.peek(field)), [PF, 0, 0]);
    assert_eq!(page_fault(&mut make(), 4), EMBEDDER);
    assert_eq!(page_fault(&mut make(), 5), EMBEDDER);
    let mut rig = make();
    assert_eq!(page_fault(&mut rig, 1), L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitQualification), 0xFA01_7000);
    assert_eq!(rig.told(Field::ExitInterruptionErrorCode), 1);
    // Nobody's: L2 takes it, with CR2, which the exit did not set.
    let mut rig = make();
    assert_eq!(page_fault(&mut rig, 2), L2Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), VALID | CODE | HARDWARE | 14);
    assert_eq!(rig.vmcs02.peek(Field::EntryExceptionErrorCode), 2);
    assert_eq!(rig.regs.cr2, 0xFA01_7000);
}

#[test]
fn a_clear_bit_turns_the_match_round() {
    let l1 = [(Field::ExceptionBitmap, 0), (Field::PageFaultErrorCodeMask, 1), (Field::PageFaultErrorCodeMatch, 1)];
    let own = [(Field::ExceptionBitmap, PF), (Field::PageFaultErrorCodeMask, 8), (Field::PageFaultErrorCodeMatch, 8)];
    assert_eq!(page_fault(&mut rig(&l1, &own), 0), L2Exit::ToL1);
    assert_eq!(page_fault(&mut rig(&l1, &own), 1), L2Exit::Resume);
}

#[test]
fn raised_exceptions_ask_l1_first() {
    let mut with = rig(&[(Field::ExceptionBitmap, 1 << 13)], &[]);
    let outcome = with.call(|nested, m| nested.raise_in_l2(m, Fault::GP));
    assert_eq!(outcome, L2Exit::ToL1);
    assert_eq!(with.told(Field::ExitReason), 0);
    assert_eq!(with.told(Field::ExitInterruptionInfo), VALID | CODE | HARDWARE | 13);
    let mut without = rig(&[(Field::ExceptionBitmap, 1 << 12)], &[]);
    let outcome = without.call(|nested, m| nested.raise_in_l2(m, Fault::GP));
    assert_eq!(outcome, L2Exit::Resume);
    without.run();
    assert_eq!(without.vmcs02.peek(Field::EntryInterruptionInfo), VALID | CODE | HARDWARE | 13);
    assert_eq!(without.vmcs02.peek(Field::EntryExceptionErrorCode), 0);
}

#[test]
fn raised_page_faults_bring_their_address() {
    let fault = Fault { vector: 14, error_code: Some(3), cr2: Some(0x1234) };
    let mut with = rig(&[(Field::ExceptionBitmap, PF)], &[]);
    assert_eq!(with.call(|nested, m| nested.raise_in_l2(m, fault)), L2Exit::ToL1);
    assert_eq!(with.told(Field::ExitQualification), 0x1234);
    assert_eq!(with.told(Field::ExitInterruptionErrorCode), 3);
    assert_eq!(with.regs.cr2, 0, "an exit leaves CR2");
    let mut without = rig(&[], &[]);
    assert_eq!(without.call(|nested, m| nested.raise_in_l2(m, fault)), L2Exit::Resume);
    assert_eq!(without.regs.cr2, 0x1234);
}

/// L2's delivery of `vector` met an EPT violation.
fn interrupted(rig: &mut Rig, info: u64, code: u64) {
    rig.vmcs02.poke(Field::IdtVectoringInfo, info);
    rig.vmcs02.poke(Field::IdtVectoringErrorCode, code);
    assert!(matches!(rig.l2(r::EPT_VIOLATION), L2Exit::EptViolation { .. }));
}

#[test]
fn an_interrupted_delivery_is_repeated() {
    let mut rig = rig(&[], &[]);
    interrupted(&mut rig, VALID | CODE | HARDWARE | 14, 7);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), VALID | CODE | HARDWARE | 14);
    assert_eq!(rig.vmcs02.peek(Field::EntryExceptionErrorCode), 7);
    // It succeeds; nothing is injected twice.
    assert_eq!(rig.l2(r::PAUSE), L2Exit::Embedder { reason: r::PAUSE });
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) & VALID, 0);
}

#[test]
fn a_software_interrupt_is_repeated_with_its_length() {
    let mut rig = rig(&[], &[]);
    interrupted(&mut rig, VALID | 4 << 8 | 0x80, 0);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), VALID | 4 << 8 | 0x80);
    assert_eq!(rig.vmcs02.peek(Field::EntryInstructionLength), 2);
}

#[test]
fn l1_is_told_of_an_interrupted_delivery() {
    let mut rig = rig(&[], &[]);
    interrupted(&mut rig, VALID | 4 << 8 | 0x80, 0);
    assert_eq!(rig.call(|nested, m| nested.reflect_ept(m, 48, 1)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::IdtVectoringInfo), VALID | 4 << 8 | 0x80);
    assert_eq!(rig.told(Field::ExitInstructionLength), 2);
    // Not so of one that was not.
    let mut rig = self::rig(&[], &[]);
    interrupted(&mut rig, 4 << 8 | 0x80, 0);
    assert_eq!(rig.call(|nested, m| nested.reflect_ept(m, 48, 1)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::IdtVectoringInfo), 0);
}

#[test]
fn two_faults_in_a_row() {
    const PAGE_FAULT: u64 = CODE | HARDWARE | 14;
    for (first, second, result) in [
        (PAGE_FAULT, 14, Some(8)),
        (PAGE_FAULT, 13, Some(8)),
        (CODE | HARDWARE | 13, 13, Some(8)),
        (HARDWARE, 11, Some(8)),
        (CODE | HARDWARE | 13, 14, Some(14)),
        (HARDWARE | 6, 13, Some(13)),
        (PAGE_FAULT, 6, Some(6)),
        (0x80, 13, Some(13)),
        (CODE | HARDWARE | 8, 13, None),
        (CODE | HARDWARE | 8, 14, None),
        (CODE | HARDWARE | 8, 6, Some(6)),
    ] {
        let mut rig = rig(&[], &[]);
        interrupted(&mut rig, VALID | first, 0);
        let error_code = matches!(second, 8 | 10..=14).then_some(0);
        let fault = Fault { vector: second, error_code, cr2: None };
        let outcome = rig.call(|nested, m| nested.raise_in_l2(m, fault));
        match result {
            Some(vector) => {
                assert_eq!(outcome, L2Exit::Resume);
                rig.run();
                assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) & 0xFF, vector, "{first:#x} {second}");
            }
            None => {
                assert_eq!(outcome, L2Exit::ToL1);
                assert_eq!(rig.told(Field::ExitReason), r::TRIPLE_FAULT.into());
            }
        }
    }
}

#[test]
fn l1_wants_the_double_fault() {
    for (bitmap, to_l1) in [(1 << 8, true), (1 << 9, false)] {
        let mut rig = rig(&[(Field::ExceptionBitmap, bitmap)], &[]);
        interrupted(&mut rig, VALID | CODE | HARDWARE | 13, 0);
        let outcome = rig.call(|nested, m| nested.raise_in_l2(m, Fault::GP));
        assert_eq!(outcome == L2Exit::ToL1, to_l1);
        if to_l1 {
            assert_eq!(rig.told(Field::ExitInterruptionInfo), VALID | CODE | HARDWARE | 8);
            assert_eq!(rig.told(Field::IdtVectoringInfo), 0, "it is the event itself that exits");
        }
    }
    // The second fault exits by itself before it can become one.
    let mut rig = rig(&[(Field::ExceptionBitmap, 1 << 13)], &[]);
    interrupted(&mut rig, VALID | HARDWARE | 6, 0);
    assert_eq!(rig.call(|nested, m| nested.raise_in_l2(m, Fault::GP)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::IdtVectoringInfo), VALID | HARDWARE | 6);
}

#[test]
fn the_end_of_nmi_blocking_is_taken_back() {
    for (qualification, info, blocked) in [(1 << 12, 0, true), (1, 0, false), (1 << 12, VALID | HARDWARE | 6, false)] {
        let mut rig = rig(&[], &[]);
        rig.vmcs02.poke(Field::ExitQualification, qualification);
        interrupted(&mut rig, info, 0);
        rig.run();
        assert_eq!(rig.vmcs02.peek(Field::GuestInterruptibility) & 8 != 0, blocked, "{qualification:#x} {info:#x}");
    }
    // L1's business, if L1 is told.
    let mut rig = rig(&[], &[]);
    rig.vmcs02.poke(Field::ExitQualification, 1 << 12);
    interrupted(&mut rig, 0, 0);
    assert_eq!(rig.call(|nested, m| nested.reflect_ept(m, 48, 1 << 12 | 1)), L2Exit::ToL1);
    assert_eq!(rig.told(Field::GuestInterruptibility), 0);
    assert_eq!(rig.told(Field::ExitQualification), 1 << 12 | 1);
}
