//! Lengths of the instructions that SVM intercepts, prefixes included, from their bytes.
//!
//! For processors that do not save the next RIP. It knows exactly the instructions a hypervisor has to step over; it
//! is not a general decoder, and says `None` to everything else.

/// Code size of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit code.
    Bits16,
    /// 32-bit code.
    Bits32,
    /// 64-bit code.
    Bits64,
}

/// An instruction that was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// Length in bytes, 1 to 15.
    pub len: u8,
    /// An address-size prefix (0x67) was there.
    pub address_size: bool,
    /// Which instruction.
    pub kind: Kind,
}

/// The instructions that are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// PAUSE.
    Pause,
    /// ICEBP (INT1).
    Icebp,
    /// INVD.
    Invd,
    /// WBINVD or WBNOINVD.
    Wbinvd,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// RDPMC.
    Rdpmc,
    /// CLTS.
    Clts,
    /// MOV to or from a control register.
    MovCr,
    /// MOV to or from a debug register.
    MovDr,
    /// LMSW.
    Lmsw,
    /// INVLPG.
    Invlpg,
    /// VMCALL.
    Vmcall,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    Mwait,
    /// XSETBV.
    Xsetbv,
    /// RDPRU.
    Rdpru,
    /// VMRUN.
    Vmrun,
    /// VMMCALL.
    Vmmcall,
    /// VMLOAD.
    Vmload,
    /// VMSAVE.
    Vmsave,
    /// STGI.
    Stgi,
    /// CLGI.
    Clgi,
    /// SKINIT.
    Skinit,
    /// INVLPGA.
    Invlpga,
}

impl Kind {
    /// The instruction's bytes without a prefix, from the low byte up, and how many; for those that have no operand.
    pub(crate) const fn plain(self) -> Option<(u32, u8)> {
        Some(match self {
            Self::Cpuid => (0xA2_0F, 2),
            Self::Rdmsr => (0x32_0F, 2),
            Self::Wrmsr => (0x30_0F, 2),
            Self::Vmrun => (0xD8_01_0F, 3),
            Self::Vmmcall => (0xD9_01_0F, 3),
            Self::Vmload => (0xDA_01_0F, 3),
            Self::Vmsave => (0xDB_01_0F, 3),
            Self::Stgi => (0xDC_01_0F, 3),
            Self::Clgi => (0xDD_01_0F, 3),
            _ => return None,
        })
    }
}

/// The prefixes before an opcode.
#[derive(Clone, Copy, Default)]
struct Prefixes {
    address_size: bool,
    rep: bool,
}

/// Recognises the instruction at the start of `bytes`; `None` when it is another, cut short or longer than 15 bytes.
pub fn decode(bytes: &[u8], mode: Mode) -> Option<Insn> {
    let bytes = bytes.get(..bytes.len().min(15))?;
    let mut prefixes = Prefixes::default();
    let mut at = 0usize;
    loop {
        match *bytes.get(at)? {
            0x67 => prefixes.address_size = true,
            0xF3 => prefixes.rep = true,
            0x66 | 0xF2 | 0x2E | 0x36 | 0x3E | 0x26 | 0x64 | 0x65 | 0xF0 => {}
            0x40..=0x4F if mode == Mode::Bits64 => {}
            _ => break,
        }
        at = at.wrapping_add(1);
    }
    let rest = bytes.get(at..)?;
    let (kind, len) = opcode(rest, mode, prefixes)?;
    let len = at.checked_add(len)?;
    if len > bytes.len() {
        return None;
    }
    Some(Insn { len: u8::try_from(len).ok()?, address_size: prefixes.address_size, kind })
}

fn opcode(rest: &[u8], mode: Mode, prefixes: Prefixes) -> Option<(Kind, usize)> {
    match *rest {
        [0xF4, ..] => Some((Kind::Hlt, 1)),
        [0xF1, ..] => Some((Kind::Icebp, 1)),
        [0x90, ..] if prefixes.rep => Some((Kind::Pause, 1)),
        [0x0F, second, ..] => match second {
            0xA2 => Some((Kind::Cpuid, 2)),
            0x06 => Some((Kind::Clts, 2)),
            0x08 => Some((Kind::Invd, 2)),
            0x09 => Some((Kind::Wbinvd, 2)),
            0x30 => Some((Kind::Wrmsr, 2)),
            0x31 => Some((Kind::Rdtsc, 2)),
            0x32 => Some((Kind::Rdmsr, 2)),
            0x33 => Some((Kind::Rdpmc, 2)),
            // MOV to and from CR and DR are register forms whatever ModRM.mod says.
            0x20 | 0x22 => Some((Kind::MovCr, 3)),
            0x21 | 0x23 => Some((Kind::MovDr, 3)),
            0x01 => group7(rest, mode, prefixes),
            _ => None,
        },
        _ => None,
    }
}

const fn group7_reg(modrm: u8) -> Option<Kind> {
    Some(match modrm {
        0xC1 => Kind::Vmcall,
        0xC8 => Kind::Monitor,
        0xC9 => Kind::Mwait,
        0xD1 => Kind::Xsetbv,
        0xD8 => Kind::Vmrun,
        0xD9 => Kind::Vmmcall,
        0xDA => Kind::Vmload,
        0xDB => Kind::Vmsave,
        0xDC => Kind::Stgi,
        0xDD => Kind::Clgi,
        0xDE => Kind::Skinit,
        0xDF => Kind::Invlpga,
        0xF0..=0xF7 => Kind::Lmsw,
        0xF9 => Kind::Rdtscp,
        0xFD => Kind::Rdpru,
        _ => return None,
    })
}

fn group7(rest: &[u8], mode: Mode, prefixes: Prefixes) -> Option<(Kind, usize)> {
    let modrm = *rest.get(2)?;
    if modrm >> 6 == 3 {
        return Some((group7_reg(modrm)?, 3));
    }
    let kind = match (modrm >> 3) & 7 {
        6 => Kind::Lmsw,
        7 => Kind::Invlpg,
        _ => return None,
    };
    Some((kind, memory_operand(rest, modrm, mode, prefixes)?))
}

/// Length of a two-byte opcode with a memory operand: opcode, ModRM, SIB and displacement.
fn memory_operand(rest: &[u8], modrm: u8, mode: Mode, prefixes: Prefixes) -> Option<usize> {
    let (mod_, rm) = (modrm >> 6, modrm & 7);
    let sixteen = match mode {
        Mode::Bits16 => !prefixes.address_size,
        Mode::Bits32 => prefixes.address_size,
        Mode::Bits64 => false,
    };
    if sixteen {
        return Some(match (mod_, rm) {
            (0, 6) | (2, _) => 5,
            (0, _) => 3,
            _ => 4,
        });
    }
    let sib = rm == 4;
    let base = if sib { *rest.get(3)? & 7 } else { rm };
    let displacement: usize = match mod_ {
        0 if base == 5 => 4,
        0 => 0,
        1 => 1,
        _ => 4,
    };
    displacement.checked_add(if sib { 4 } else { 3 })
}
