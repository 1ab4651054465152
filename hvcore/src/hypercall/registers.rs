//! The caller's register file and mode, and the register conventions built on them (TLFS, "Hypercall Inputs").
//!
//! Implemented by the embedder; used by the intake only, so that handlers never see a register.

use super::Reply;
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};

/// A general-purpose register that the hypercall conventions name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Gpr {
    /// RAX or EAX.
    Rax,
    /// RBX or EBX.
    Rbx,
    /// RCX or ECX.
    Rcx,
    /// RDX or EDX.
    Rdx,
    /// RSI or ESI.
    Rsi,
    /// RDI or EDI.
    Rdi,
    /// R8, for 64-bit callers.
    R8,
}

/// An XMM register that the hypercall conventions name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Xmm {
    /// XMM0.
    Xmm0,
    /// XMM1.
    Xmm1,
    /// XMM2.
    Xmm2,
    /// XMM3.
    Xmm3,
    /// XMM4.
    Xmm4,
    /// XMM5.
    Xmm5,
}

impl Xmm {
    /// All of them, in the order of the register block.
    pub const ALL: [Self; 6] = [Self::Xmm0, Self::Xmm1, Self::Xmm2, Self::Xmm3, Self::Xmm4, Self::Xmm5];
}

/// The caller's registers. The intake reads the ones that the call's convention names and writes only those that the
/// TLFS lets a call change.
pub trait Registers {
    /// All 64 bits of `register`; the intake drops the high half for a 32-bit caller.
    fn gpr(&self, register: Gpr) -> u64;
    /// Replaces all 64 bits of `register`; for a 32-bit caller the high half is zero.
    fn set_gpr(&mut self, register: Gpr, value: u64);
    /// `register`, its low quadword in bits 63:0.
    fn xmm(&self, register: Xmm) -> u128;
    /// Replaces `register`.
    fn set_xmm(&mut self, register: Xmm, value: u128);
}

impl<R: Registers + ?Sized> Registers for &mut R {
    fn gpr(&self, register: Gpr) -> u64 {
        (**self).gpr(register)
    }
    fn set_gpr(&mut self, register: Gpr, value: u64) {
        (**self).set_gpr(register, value);
    }
    fn xmm(&self, register: Xmm) -> u128 {
        (**self).xmm(register)
    }
    fn set_xmm(&mut self, register: Xmm, value: u128) {
        (**self).set_xmm(register, value);
    }
}

/// Which registers carry a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// EDX:EAX, EBX:ECX, EDI:ESI.
    Bits32,
    /// RCX, RDX, R8; result in RAX.
    Bits64,
}

/// The processor mode of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerMode {
    /// Which registers carry the call: 64-bit when EFER.LMA and CS.L are both set.
    pub width: Width,
    /// CR0.PE.
    pub protected: bool,
    /// The current privilege level, 0 to 3; 3 in virtual-8086 mode.
    pub cpl: u8,
}

impl CallerMode {
    /// The mode that EFER, CR0, CS.L and the CPL say.
    #[inline]
    pub const fn new(efer: u64, cr0: u64, cs_l: bool, cpl: u8) -> Self {
        let long = efer >> 10 & 1 != 0;
        Self { width: if long && cs_l { Width::Bits64 } else { Width::Bits32 }, protected: cr0 & 1 != 0, cpl }
    }

    /// True where hypercalls are legal: protected or long mode, CPL 0. Elsewhere the instruction is #UD.
    #[inline]
    pub const fn allows_hypercalls(self) -> bool {
        self.protected && self.cpl == 0
    }
}

/// Quadwords in the register block: RDX, R8 and XMM0 to XMM5, 112 bytes.
pub(super) const BLOCK: usize = 14;
/// Quadwords of the block that need no XMM register.
pub(super) const BLOCK_GPRS: usize = 2;

const LOW: u64 = 0xFFFF_FFFF;

#[inline]
fn pair<R: Registers + ?Sized>(registers: &R, high: Gpr, low: Gpr) -> u64 {
    registers.gpr(high) << 32 | registers.gpr(low) & LOW
}

/// The hypercall input value.
#[inline]
pub(super) fn input_value<R: Registers + ?Sized>(registers: &R, width: Width) -> HypercallInput {
    HypercallInput(match width {
        Width::Bits64 => registers.gpr(Gpr::Rcx),
        Width::Bits32 => pair(registers, Gpr::Rdx, Gpr::Rax),
    })
}

/// The first quadword of the register block; the input GPA of a slow call.
#[inline]
pub(super) fn first<R: Registers + ?Sized>(registers: &R, width: Width) -> u64 {
    match width {
        Width::Bits64 => registers.gpr(Gpr::Rdx),
        Width::Bits32 => pair(registers, Gpr::Rbx, Gpr::Rcx),
    }
}

/// The second quadword of the register block; the output GPA of a slow call.
#[inline]
pub(super) fn second<R: Registers + ?Sized>(registers: &R, width: Width) -> u64 {
    match width {
        Width::Bits64 => registers.gpr(Gpr::R8),
        Width::Bits32 => pair(registers, Gpr::Rdi, Gpr::Rsi),
    }
}

/// Reads the first `quadwords` of the register block; the rest of `block` keeps its contents.
#[inline]
pub(super) fn read_block<R: Registers + ?Sized>(
    registers: &R,
    width: Width,
    block: &mut [u64; BLOCK],
    quadwords: usize,
) {
    let [a, b, rest @ ..] = block;
    *a = first(registers, width);
    *b = second(registers, width);
    let xmms = quadwords.saturating_sub(BLOCK_GPRS).div_ceil(2);
    for (half, register) in rest.chunks_exact_mut(2).zip(Xmm::ALL).take(xmms) {
        if let [low, high] = half {
            let value = registers.xmm(register);
            *low = value as u64;
            *high = (value >> 64) as u64;
        }
    }
}

/// Writes the quadwords `from..to` of the register block of a 64-bit caller, and no other.
pub(super) fn write_block<R: Registers + ?Sized>(registers: &mut R, block: &[u64; BLOCK], from: usize, to: usize) {
    let wanted = |i: usize| from <= i && i < to;
    let [a, b, rest @ ..] = block;
    if wanted(0) {
        registers.set_gpr(Gpr::Rdx, *a);
    }
    if wanted(1) {
        registers.set_gpr(Gpr::R8, *b);
    }
    for ((half, register), i) in rest.chunks_exact(2).zip(Xmm::ALL).zip((BLOCK_GPRS..).step_by(2)) {
        if let [low, high] = half
            && (wanted(i) || wanted(i.wrapping_add(1)))
        {
            registers.set_xmm(register, u128::from(*high) << 64 | u128::from(*low));
        }
    }
}

/// Writes the hypercall result value.
#[inline]
pub(super) fn write_result<R: Registers + ?Sized>(registers: &mut R, width: Width, result: HypercallResult) {
    match width {
        Width::Bits64 => registers.set_gpr(Gpr::Rax, result.raw()),
        Width::Bits32 => {
            registers.set_gpr(Gpr::Rdx, result.raw() >> 32);
            registers.set_gpr(Gpr::Rax, result.raw() & LOW);
        }
    }
}

/// Writes the input value of a rep call that will be issued again.
pub(super) fn write_input<R: Registers + ?Sized>(registers: &mut R, width: Width, input: HypercallInput) {
    match width {
        Width::Bits64 => registers.set_gpr(Gpr::Rcx, input.raw()),
        Width::Bits32 => {
            registers.set_gpr(Gpr::Rdx, input.raw() >> 32);
            registers.set_gpr(Gpr::Rax, input.raw() & LOW);
        }
    }
}

/// An early end of a call, as a result of the steps before the handler.
pub(super) type Step<T> = Result<T, Reply>;
