//! Decodes the instructions that compilers and kernels use to write device registers, for a hypervisor on a
//! processor without decode assists: the write's size, what it stores, and how long the instruction is.
//!
//! Pure: bytes and registers in, a value out. The address is not computed: the nested page fault told it.

/// How the processor executes the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit code segment, or real mode.
    Bits16,
    /// 32-bit code segment.
    Bits32,
    /// 64-bit code segment.
    Bits64,
}

/// What is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// General-purpose register by encoding number (0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, ...).
    Register(u8),
    /// AH, CH, DH, BH: bits 15:8 of register 0 to 3.
    HighByte(u8),
    /// An immediate operand, sign-extended.
    Immediate(u64),
}

/// What happens to the memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Stored as it is.
    Store,
    /// Stored; the register named in the source receives the old value.
    Exchange,
    /// Old value combined with the source: OR, AND, XOR, ADD or SUB.
    Or,
    /// See [`Operation::Or`].
    And,
    /// See [`Operation::Or`].
    Xor,
    /// See [`Operation::Or`].
    Add,
    /// See [`Operation::Or`].
    Sub,
    /// STOS: RAX is stored and RDI moves; `repeat` when it has a REP prefix.
    StoreString {
        /// REP prefix: RCX counts.
        repeat: bool,
    },
}

/// One decoded store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Bytes of the whole instruction.
    pub length: u8,
    /// Bytes written: 1, 2, 4 or 8.
    pub size: u8,
    /// The other operand.
    pub source: Source,
    /// What is done with it.
    pub operation: Operation,
}

struct Prefixes {
    operand16: bool,
    address_flipped: bool,
    repeat: bool,
    rex: u8,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn skip(&mut self, n: usize) -> Option<()> {
        self.at += n;
        (self.at <= self.bytes.len()).then_some(())
    }

    /// A little-endian sign-extended immediate of `n` bytes.
    fn immediate(&mut self, n: usize) -> Option<u64> {
        let mut value = 0u64;
        for i in 0..n {
            value |= u64::from(self.next()?) << (8 * i);
        }
        let unused = 64 - 8 * n as u32;
        Some((((value << unused) as i64) >> unused) as u64)
    }
}

/// Decodes a store at the start of `bytes` (up to 15 are looked at). `None`: not a form that is known here.
pub fn store(bytes: &[u8], mode: Mode) -> Option<Store> {
    let mut r = Reader { bytes: bytes.get(..15).unwrap_or(bytes), at: 0 };
    let (prefixes, opcode) = prefixes(&mut r, mode)?;
    let wide = operand_size(&prefixes, mode);
    let byte_or = |bit: u8| if bit & 1 == 0 { 1 } else { wide };
    let (size, source, operation) = match opcode {
        0x88 | 0x89 => {
            let size = byte_or(opcode);
            (size, register(modrm(&mut r, &prefixes, mode)?.0, size, &prefixes), Operation::Store)
        }
        0x86 | 0x87 => {
            let size = byte_or(opcode);
            (size, register(modrm(&mut r, &prefixes, mode)?.0, size, &prefixes), Operation::Exchange)
        }
        0xc6 | 0xc7 => {
            let size = byte_or(opcode);
            if modrm(&mut r, &prefixes, mode)?.0 & 7 != 0 {
                return None;
            }
            (size, Source::Immediate(r.immediate(usize::from(size.min(4)))?), Operation::Store)
        }
        0x00 | 0x01 | 0x08 | 0x09 | 0x20 | 0x21 | 0x28 | 0x29 | 0x30 | 0x31 => {
            let size = byte_or(opcode);
            let reg = modrm(&mut r, &prefixes, mode)?.0;
            (size, register(reg, size, &prefixes), arithmetic(opcode >> 3)?)
        }
        0x80 | 0x81 | 0x83 => {
            let size = byte_or(opcode);
            let operation = arithmetic(modrm(&mut r, &prefixes, mode)?.0 & 7)?;
            let n = if opcode == 0x81 { usize::from(size.min(4)) } else { 1 };
            (size, Source::Immediate(r.immediate(n)?), operation)
        }
        0xa2 | 0xa3 => {
            r.skip(address_size(&prefixes, mode))?;
            (byte_or(opcode), Source::Register(0), Operation::Store)
        }
        0xaa | 0xab => (byte_or(opcode), Source::Register(0), Operation::StoreString { repeat: prefixes.repeat }),
        _ => return None,
    };
    Some(Store { length: r.at as u8, size, source, operation })
}

fn prefixes(r: &mut Reader<'_>, mode: Mode) -> Option<(Prefixes, u8)> {
    let mut p = Prefixes { operand16: false, address_flipped: false, repeat: false, rex: 0 };
    loop {
        let byte = r.next()?;
        match byte {
            0x66 => p.operand16 = true,
            0x67 => p.address_flipped = true,
            0xf2 | 0xf3 => p.repeat = true,
            0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
            0x40..=0x4f if mode == Mode::Bits64 => {
                p.rex = byte;
                // REX counts only right before the opcode.
                let next = r.next()?;
                if matches!(
                    next,
                    0x66 | 0x67 | 0xf2 | 0xf3 | 0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40..=0x4f
                ) {
                    p.rex = 0;
                    r.at -= 1;
                    continue;
                }
                return Some((p, next));
            }
            _ => return Some((p, byte)),
        }
        // A REX before another prefix is void: handled above by stepping back.
    }
}

fn operand_size(p: &Prefixes, mode: Mode) -> u8 {
    match mode {
        Mode::Bits64 if p.rex & 8 != 0 => 8,
        Mode::Bits16 => 2 + 2 * u8::from(p.operand16),
        _ => 4 - 2 * u8::from(p.operand16),
    }
}

fn address_size(p: &Prefixes, mode: Mode) -> usize {
    match (mode, p.address_flipped) {
        (Mode::Bits64, false) => 8,
        (Mode::Bits64, true) | (Mode::Bits32, false) | (Mode::Bits16, true) => 4,
        (Mode::Bits32, true) | (Mode::Bits16, false) => 2,
    }
}

/// Reads ModRM, SIB and displacement of a memory operand; the reg field with REX.R, and the address size.
fn modrm(r: &mut Reader<'_>, p: &Prefixes, mode: Mode) -> Option<(u8, usize)> {
    let byte = r.next()?;
    let (md, rm) = (byte >> 6, byte & 7);
    if md == 3 {
        return None;
    }
    let address = address_size(p, mode);
    let displacement = if address == 2 {
        match (md, rm) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        }
    } else {
        let base = if rm == 4 { r.next()? & 7 } else { rm };
        match (md, base) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        }
    };
    r.skip(displacement)?;
    Some((byte >> 3 & 7 | (p.rex & 4) << 1, address))
}

fn register(number: u8, size: u8, p: &Prefixes) -> Source {
    if size == 1 && p.rex == 0 && number >= 4 { Source::HighByte(number - 4) } else { Source::Register(number) }
}

fn arithmetic(number: u8) -> Option<Operation> {
    match number {
        0 => Some(Operation::Add),
        1 => Some(Operation::Or),
        4 => Some(Operation::And),
        5 => Some(Operation::Sub),
        6 => Some(Operation::Xor),
        _ => None,
    }
}

impl Operation {
    /// The new memory value, from the old one and the source operand. Wider than `size`: the caller truncates.
    pub fn apply(self, old: u64, source: u64) -> u64 {
        match self {
            Operation::Store | Operation::Exchange | Operation::StoreString { .. } => source,
            Operation::Or => old | source,
            Operation::And => old & source,
            Operation::Xor => old ^ source,
            Operation::Add => old.wrapping_add(source),
            Operation::Sub => old.wrapping_sub(source),
        }
    }
}
