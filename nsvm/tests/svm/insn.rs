use nsvm::insn::{Insn, Kind, Mode, decode};

fn len(bytes: &[u8], mode: Mode) -> Option<(Kind, u8)> {
    decode(bytes, mode).map(|insn| (insn.kind, insn.len))
}

#[test]
fn plain_instructions() {
    let group7 = [
        (0xD8, Kind::Vmrun),
        (0xD9, Kind::Vmmcall),
        (0xDA, Kind::Vmload),
        (0xDB, Kind::Vmsave),
        (0xDC, Kind::Stgi),
        (0xDD, Kind::Clgi),
        (0xDE, Kind::Skinit),
        (0xDF, Kind::Invlpga),
        (0xC1, Kind::Vmcall),
        (0xC8, Kind::Monitor),
        (0xC9, Kind::Mwait),
        (0xD1, Kind::Xsetbv),
        (0xF9, Kind::Rdtscp),
        (0xFD, Kind::Rdpru),
        (0xF3, Kind::Lmsw),
    ];
    let second = [
        (0xA2, Kind::Cpuid),
        (0x06, Kind::Clts),
        (0x08, Kind::Invd),
        (0x09, Kind::Wbinvd),
        (0x30, Kind::Wrmsr),
        (0x31, Kind::Rdtsc),
        (0x32, Kind::Rdmsr),
        (0x33, Kind::Rdpmc),
    ];
    for mode in [Mode::Bits16, Mode::Bits32, Mode::Bits64] {
        for (modrm, kind) in group7 {
            assert_eq!(len(&[0x0F, 0x01, modrm], mode), Some((kind, 3)));
            assert_eq!(len(&[0x0F, 0x01], mode), None);
        }
        for (opcode, kind) in second {
            assert_eq!(len(&[0x0F, opcode, 0xFF], mode), Some((kind, 2)));
        }
        assert_eq!(len(&[0xF4], mode), Some((Kind::Hlt, 1)));
        assert_eq!(len(&[0xF1], mode), Some((Kind::Icebp, 1)));
        assert_eq!(len(&[0xF3, 0x90], mode), Some((Kind::Pause, 2)));
        assert_eq!(len(&[0x90], mode), None, "NOP is not PAUSE");
        assert_eq!(len(&[0x0F, 0x20, 0xC0], mode), Some((Kind::MovCr, 3)));
        assert_eq!(len(&[0x0F, 0x22, 0x00], mode), Some((Kind::MovCr, 3)), "mod is ignored");
        assert_eq!(len(&[0x0F, 0x23, 0xF8], mode), Some((Kind::MovDr, 3)));
        assert_eq!(len(&[0x0F, 0x20], mode), None);
    }
}

#[test]
fn prefixes_count() {
    assert_eq!(len(&[0x66, 0x0F, 0x01, 0xD9], Mode::Bits32), Some((Kind::Vmmcall, 4)));
    assert_eq!(len(&[0xF2, 0x2E, 0x0F, 0x01, 0xD9], Mode::Bits64), Some((Kind::Vmmcall, 5)));
    assert_eq!(len(&[0x48, 0x0F, 0x01, 0xD9], Mode::Bits64), Some((Kind::Vmmcall, 4)), "REX");
    assert_eq!(len(&[0x48, 0x0F, 0x01, 0xD9], Mode::Bits32), None, "DEC EAX");
    assert_eq!(
        decode(&[0x67, 0x0F, 0x01, 0xD8], Mode::Bits64),
        Some(Insn { len: 4, address_size: true, kind: Kind::Vmrun })
    );
    let mut fifteen = [0x66; 15];
    fifteen[12..].copy_from_slice(&[0x0F, 0x01, 0xD9]);
    assert_eq!(len(&fifteen, Mode::Bits64), Some((Kind::Vmmcall, 15)));
    let mut sixteen = [0x66; 16];
    sixteen[13..].copy_from_slice(&[0x0F, 0x01, 0xD9]);
    assert_eq!(len(&sixteen, Mode::Bits64), None);
}

#[test]
fn memory_operands() {
    let cases: [(&[u8], Mode, u8); 14] = [
        (&[0x0F, 0x01, 0x38], Mode::Bits64, 3),                   // invlpg [rax]
        (&[0x0F, 0x01, 0x78, 0x10], Mode::Bits64, 4),             // invlpg [rax+16]
        (&[0x0F, 0x01, 0xB8, 0, 0, 0, 0], Mode::Bits64, 7),       // invlpg [rax+disp32]
        (&[0x0F, 0x01, 0x3D, 0, 0, 0, 0], Mode::Bits64, 7),       // invlpg [rip+disp32]
        (&[0x0F, 0x01, 0x3C, 0x24], Mode::Bits64, 4),             // invlpg [rsp]
        (&[0x0F, 0x01, 0x3C, 0x25, 0, 0, 0, 0], Mode::Bits64, 8), // invlpg [disp32]
        (&[0x0F, 0x01, 0x7C, 0x24, 8], Mode::Bits64, 5),          // invlpg [rsp+8]
        (&[0x0F, 0x01, 0xBC, 0x24, 0, 0, 0, 0], Mode::Bits32, 8), // invlpg [esp+disp32]
        (&[0x41, 0x0F, 0x01, 0x3C, 0x24], Mode::Bits64, 5),       // invlpg [r12]
        (&[0x0F, 0x01, 0x3F], Mode::Bits16, 3),                   // invlpg [bx]
        (&[0x0F, 0x01, 0x3E, 0, 0], Mode::Bits16, 5),             // invlpg [disp16]
        (&[0x0F, 0x01, 0x7F, 1], Mode::Bits16, 4),                // invlpg [bx+1]
        (&[0x0F, 0x01, 0xBF, 0, 0], Mode::Bits16, 5),             // invlpg [bx+disp16]
        (&[0x67, 0x0F, 0x01, 0x3E, 0, 0], Mode::Bits32, 6),       // 16-bit addressing
    ];
    for (bytes, mode, expected) in cases {
        assert_eq!(len(bytes, mode), Some((Kind::Invlpg, expected)), "{bytes:x?}");
        assert_eq!(len(&bytes[..bytes.len() - 1], mode), None, "{bytes:x?} cut short");
    }
    assert_eq!(len(&[0x0F, 0x01, 0x30], Mode::Bits64), Some((Kind::Lmsw, 3)));
    assert_eq!(len(&[0x0F, 0x01, 0x10], Mode::Bits64), None, "LGDT");
}

#[test]
fn nothing_else_is_recognised() {
    for bytes in [&[][..], &[0x66], &[0xC3], &[0x0F], &[0x0F, 0x05], &[0x66; 15]] {
        assert_eq!(decode(bytes, Mode::Bits64), None);
    }
}
