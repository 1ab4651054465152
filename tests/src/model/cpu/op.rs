//! The instructions that programs of the model are made of, of both vendors: one that the CPU lacks raises #UD.

/// An instruction. Operands that the machine keeps in registers are put there before it executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Nop,
    /// A jump inside the code segment: sets RIP.
    Jump(u64),
    /// CPUID of the leaf and subleaf; results in EAX, EBX, ECX, EDX.
    Cpuid(u32, u32),
    Rdmsr(u32),
    Wrmsr(u32, u64),
    /// IN: port and size.
    In(u16, u8),
    /// OUT: port, size, value.
    Out(u16, u8, u32),
    Hlt,
    Pause,
    /// Data read and write of 1, 2, 4 or 8 bytes at CPL.
    Read(u64, u8),
    Write(u64, u8, u64),
    /// A fetch from another address, as a jump would make it; changes nothing.
    Fetch(u64),
    MovToCr(u8, u64),
    MovFromCr(u8),
    Lmsw(u16),
    Clts,
    MovToDr(u8, u64),
    MovFromDr(u8),
    Invlpg(u64),
    Invlpga(u64, u32),
    /// INVPCID: type, PCID, address.
    Invpcid(u64, u16, u64),
    Vmrun(u64),
    Vmmcall,
    Vmload(u64),
    Vmsave(u64),
    Stgi,
    Clgi,
    Skinit,
    Int3,
    Intn(u8),
    Ud2,
    Iret,
    Sti,
    Cli,
    Pushf,
    Popf,
    Rdtsc,
    Rdtscp,
    Rdpmc,
    Wbinvd,
    Invd,
    Monitor,
    Mwait,
    Xsetbv(u64),
    /// SIDT, SGDT, SLDT, STR, LIDT, LGDT, LLDT, LTR by number; only the intercept is modelled.
    Table(u8),
    /// VMXON, VMCLEAR, VMPTRLD, VMPTRST: linear address of the 8-byte operand.
    Vmxon(u64),
    Vmclear(u64),
    Vmptrld(u64),
    Vmptrst(u64),
    Vmxoff,
    Vmlaunch,
    Vmresume,
    Vmcall,
    /// VMREAD and VMWRITE with register operands: the encoding in RCX, the value in RAX.
    Vmread(u32),
    Vmwrite(u32, u64),
    /// INVEPT and INVVPID: type, linear address of the 16-byte descriptor.
    Invept(u64, u64),
    Invvpid(u64, u64),
    Vmfunc(u32),
    /// An instruction that raises this exception; its bytes are UD2's.
    Raise(u8, Option<u32>),
}

/// Machine code of one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    bytes: [u8; 16],
    len: u8,
}

impl Code {
    fn new(bytes: &[u8]) -> Self {
        let mut code = Self { bytes: [0; 16], len: bytes.len() as u8 };
        code.bytes[..bytes.len()].copy_from_slice(bytes);
        code
    }

    /// `opcode` and a 64-bit absolute address.
    fn absolute(opcode: &[u8], addr: u64) -> Self {
        let mut code = Self::new(opcode);
        let at = opcode.len();
        code.bytes[at..at + 8].copy_from_slice(&addr.to_le_bytes());
        code.len += 8;
        code
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// ModRM with register operands: `reg` and RAX.
const fn modrm(reg: u8) -> u8 {
    0xC0 | (reg & 7) << 3
}

impl Op {
    /// Length in bytes of [`Op::encode`].
    pub fn len(self) -> u64 {
        u64::from(self.encode().len)
    }

    /// Never: every instruction has bytes.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// The instruction in 64-bit machine code. Operands are where the model puts them: in the registers that the
    /// instruction defines, memory operands at \[RAX\], other register operands in RAX and RCX. IN and OUT use DX.
    pub fn encode(self) -> Code {
        let code = Code::new;
        match self {
            Self::Nop => code(&[0x90]),
            Self::Jump(_) => code(&[0xFF, 0xE0]),
            Self::Cpuid(..) => code(&[0x0F, 0xA2]),
            Self::Rdmsr(_) => code(&[0x0F, 0x32]),
            Self::Wrmsr(..) => code(&[0x0F, 0x30]),
            Self::In(_, size) => Self::port(0xEC, size),
            Self::Out(_, size, _) => Self::port(0xEE, size),
            Self::Hlt => code(&[0xF4]),
            Self::Pause => code(&[0xF3, 0x90]),
            Self::Read(at, size) => Self::moffs(0xA0, at, size),
            Self::Write(at, size, _) => Self::moffs(0xA2, at, size),
            Self::Fetch(_) => code(&[0x0F, 0x1F, 0x00]),
            Self::MovToCr(..) | Self::MovFromCr(_) | Self::MovToDr(..) | Self::MovFromDr(_) => self.encode_cr(),
            Self::Lmsw(_) => code(&[0x0F, 0x01, 0xF0]),
            Self::Clts => code(&[0x0F, 0x06]),
            Self::Invlpg(_) => code(&[0x0F, 0x01, 0x38]),
            Self::Invpcid(..) => code(&[0x66, 0x0F, 0x38, 0x82, 0x08]),
            Self::Int3 => code(&[0xCC]),
            Self::Intn(v) => code(&[0xCD, v]),
            Self::Ud2 | Self::Raise(..) => code(&[0x0F, 0x0B]),
            Self::Iret => code(&[0x48, 0xCF]),
            Self::Sti => code(&[0xFB]),
            Self::Cli => code(&[0xFA]),
            Self::Pushf => code(&[0x9C]),
            Self::Popf => code(&[0x9D]),
            Self::Rdtsc => code(&[0x0F, 0x31]),
            Self::Rdpmc => code(&[0x0F, 0x33]),
            Self::Wbinvd => code(&[0x0F, 0x09]),
            Self::Invd => code(&[0x0F, 0x08]),
            Self::Table(n) => Self::table(n),
            _ => self.encode_virtualization(),
        }
    }

    /// IN and OUT with the port in DX.
    fn port(opcode: u8, size: u8) -> Code {
        match size {
            1 => Code::new(&[opcode]),
            2 => Code::new(&[0x66, opcode | 1]),
            _ => Code::new(&[opcode | 1]),
        }
    }

    /// MOV between RAX and an absolute address.
    fn moffs(opcode: u8, at: u64, size: u8) -> Code {
        match size {
            1 => Code::absolute(&[opcode], at),
            2 => Code::absolute(&[0x66, opcode | 1], at),
            8 => Code::absolute(&[0x48, opcode | 1], at),
            _ => Code::absolute(&[opcode | 1], at),
        }
    }

    fn encode_cr(self) -> Code {
        let (opcode, n) = match self {
            Self::MovFromCr(n) => (0x20, n),
            Self::MovFromDr(n) => (0x21, n),
            Self::MovToCr(n, _) => (0x22, n),
            Self::MovToDr(n, _) => (0x23, n),
            _ => unreachable!("not a register move"),
        };
        // CR8 needs REX.R.
        if n >= 8 { Code::new(&[0x44, 0x0F, opcode, modrm(n)]) } else { Code::new(&[0x0F, opcode, modrm(n)]) }
    }

    fn table(n: u8) -> Code {
        let (opcode, last) = [(1, 0x08), (1, 0x00), (0, 0xC0), (0, 0xC8), (1, 0x18), (1, 0x10), (0, 0xD0), (0, 0xD8)]
            [usize::from(n & 7)];
        Code::new(&[0x0F, opcode, last])
    }

    fn encode_virtualization(self) -> Code {
        let last = match self {
            Self::Vmxon(_) => return Code::new(&[0xF3, 0x0F, 0xC7, 0x30]),
            Self::Vmclear(_) => return Code::new(&[0x66, 0x0F, 0xC7, 0x30]),
            Self::Vmptrld(_) => return Code::new(&[0x0F, 0xC7, 0x30]),
            Self::Vmptrst(_) => return Code::new(&[0x0F, 0xC7, 0x38]),
            Self::Vmread(_) => return Code::new(&[0x0F, 0x78, 0xC8]),
            Self::Vmwrite(..) => return Code::new(&[0x0F, 0x79, 0xC8]),
            Self::Invept(..) => return Code::new(&[0x66, 0x0F, 0x38, 0x80, 0x08]),
            Self::Invvpid(..) => return Code::new(&[0x66, 0x0F, 0x38, 0x81, 0x08]),
            Self::Vmcall => 0xC1,
            Self::Vmlaunch => 0xC2,
            Self::Vmresume => 0xC3,
            Self::Vmxoff => 0xC4,
            Self::Monitor => 0xC8,
            Self::Mwait => 0xC9,
            Self::Xsetbv(_) => 0xD1,
            Self::Vmfunc(_) => 0xD4,
            Self::Vmrun(_) => 0xD8,
            Self::Vmmcall => 0xD9,
            Self::Vmload(_) => 0xDA,
            Self::Vmsave(_) => 0xDB,
            Self::Stgi => 0xDC,
            Self::Clgi => 0xDD,
            Self::Skinit => 0xDE,
            Self::Invlpga(..) => 0xDF,
            Self::Rdtscp => 0xF9,
            _ => unreachable!("encoded before"),
        };
        Code::new(&[0x0F, 0x01, last])
    }
}

/// Indexes of `regs`.
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
