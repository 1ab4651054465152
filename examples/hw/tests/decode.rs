//! The store decoder against instruction bytes written by hand from the manuals.

use hw::decode::{Mode, Operation, Source, Store, store};

fn decoded(length: u8, size: u8, source: Source, operation: Operation) -> Option<Store> {
    Some(Store { length, size, source, operation })
}

#[test]
fn register_stores() {
    // mov [rbx+0x300], eax
    assert_eq!(store(&[0x89, 0x83, 0, 3, 0, 0], Mode::Bits64), decoded(6, 4, Source::Register(0), Operation::Store));
    // mov [r8+rcx*4+8], r10
    assert_eq!(
        store(&[0x4d, 0x89, 0x54, 0x88, 8], Mode::Bits64),
        decoded(5, 8, Source::Register(10), Operation::Store)
    );
    // mov [rip+4], cx
    assert_eq!(
        store(&[0x66, 0x89, 0x0d, 4, 0, 0, 0], Mode::Bits64),
        decoded(7, 2, Source::Register(1), Operation::Store)
    );
    // mov [rax], ah ; with REX it is SPL
    assert_eq!(store(&[0x88, 0x20], Mode::Bits64), decoded(2, 1, Source::HighByte(0), Operation::Store));
    assert_eq!(store(&[0x40, 0x88, 0x20], Mode::Bits64), decoded(3, 1, Source::Register(4), Operation::Store));
    // 32-bit: mov [0xfee00300], eax by the accumulator form; 16-bit: mov [di+2], ax
    assert_eq!(store(&[0xa3, 0, 3, 0xe0, 0xfe], Mode::Bits32), decoded(5, 4, Source::Register(0), Operation::Store));
    assert_eq!(store(&[0x89, 0x45, 2], Mode::Bits16), decoded(3, 2, Source::Register(0), Operation::Store));
    assert_eq!(
        store(&[0x66, 0x67, 0x89, 0x04, 0x25, 0, 3, 0xe0, 0xfe], Mode::Bits16),
        decoded(9, 4, Source::Register(0), Operation::Store)
    );
}

#[test]
fn immediate_stores() {
    // mov dword [rdi+0xb0], 0
    assert_eq!(
        store(&[0xc7, 0x87, 0xb0, 0, 0, 0, 0, 0, 0, 0], Mode::Bits64),
        decoded(10, 4, Source::Immediate(0), Operation::Store)
    );
    // mov qword [rsp], -1
    assert_eq!(
        store(&[0x48, 0xc7, 0x04, 0x24, 0xff, 0xff, 0xff, 0xff], Mode::Bits64),
        decoded(8, 8, Source::Immediate(u64::MAX), Operation::Store)
    );
    // Group 11 with another reg field is not MOV.
    assert_eq!(store(&[0xc7, 0x88, 0, 0, 0, 0, 0, 0, 0, 0], Mode::Bits64), None);
}

#[test]
fn read_modify_writes() {
    // or dword [rax], 0x100 ; lock and [rax], ecx ; xchg [rax], edx ; sub byte [rax], 1
    assert_eq!(store(&[0x81, 0x08, 0, 1, 0, 0], Mode::Bits64), decoded(6, 4, Source::Immediate(0x100), Operation::Or));
    assert_eq!(store(&[0xf0, 0x21, 0x08], Mode::Bits64), decoded(3, 4, Source::Register(1), Operation::And));
    assert_eq!(store(&[0x87, 0x10], Mode::Bits64), decoded(2, 4, Source::Register(2), Operation::Exchange));
    assert_eq!(store(&[0x80, 0x28, 1], Mode::Bits64), decoded(3, 1, Source::Immediate(1), Operation::Sub));
    assert_eq!(Operation::Sub.apply(5, 7), 5u64.wrapping_sub(7));
    assert_eq!(Operation::And.apply(0b1100, 0b0110), 0b0100);
    // CMP does not write.
    assert_eq!(store(&[0x39, 0x08], Mode::Bits64), None);
}

#[test]
fn strings_prefixes_and_cut_off_bytes() {
    assert_eq!(
        store(&[0xf3, 0xab], Mode::Bits32),
        decoded(2, 4, Source::Register(0), Operation::StoreString { repeat: true })
    );
    // A REX that another prefix follows is void: mov [rax], cx with a stray REX.W.
    assert_eq!(store(&[0x48, 0x66, 0x89, 0x08], Mode::Bits64), decoded(4, 2, Source::Register(1), Operation::Store));
    let whole = [0x81, 0x84, 0x24, 0, 1, 0, 0, 1, 2, 3, 4];
    assert!(store(&whole, Mode::Bits64).is_some());
    for n in 0..whole.len() {
        assert_eq!(store(&whole[..n], Mode::Bits64), None, "{n} bytes");
    }
    // Register operands are no stores to memory; sixteen prefixes are no instruction.
    assert_eq!(store(&[0x89, 0xc0], Mode::Bits64), None);
    assert_eq!(store(&[0x66; 16], Mode::Bits64), None);
}
