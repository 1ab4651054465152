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
    /// Data read and write of 1 to 8 bytes at CPL.
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
    /// An instruction that raises this exception.
    Raise(u8, Option<u32>),
}

impl Op {
    /// Length in bytes: that of the plain encoding with operands in registers.
    pub const fn len(self) -> u64 {
        match self {
            Self::Nop | Self::Hlt | Self::Int3 | Self::Sti | Self::Cli | Self::Pushf | Self::Popf => 1,
            Self::In(..) | Self::Out(..) => 1,
            Self::Cpuid(..) | Self::Rdmsr(_) | Self::Wrmsr(..) | Self::Pause | Self::Intn(_) | Self::Ud2 => 2,
            Self::Clts | Self::Rdtsc | Self::Rdpmc | Self::Wbinvd | Self::Invd | Self::Iret | Self::Jump(_) => 2,
            Self::Invpcid(..) | Self::Invept(..) | Self::Invvpid(..) => 5,
            Self::Vmxon(_) | Self::Vmclear(_) => 4,
            _ => 3,
        }
    }

    /// Never: every instruction has bytes.
    pub const fn is_empty(self) -> bool {
        false
    }
}

/// Indexes of `regs`.
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
