//! The first XMM registers, for a program that is compiled without SSE and runs guests that have it.

use core::arch::asm;

macro_rules! each {
    ($number:expr, $register:ident => $body:expr, $($n:literal $name:literal),*) => {
        match $number { $($n => { macro_rules! $register { () => { $name }; } $body })* _ => {} }
    };
}

/// XMM register `number` (0 to 5; 0 for others), low quadword in bits 63:0.
#[inline]
pub fn xmm(number: u8) -> u128 {
    let mut value = core::mem::MaybeUninit::<u128>::uninit();
    let to = value.as_mut_ptr();
    if number > 5 {
        return 0;
    }
    each!(number, register => {
        // SAFETY: stores 16 bytes to a local variable of 16 bytes.
        unsafe { asm!(concat!("movdqu [{}], ", register!()), in(reg) to, options(nostack, preserves_flags)) }
    }, 0 "xmm0", 1 "xmm1", 2 "xmm2", 3 "xmm3", 4 "xmm4", 5 "xmm5");
    // SAFETY: one of the registers was stored.
    unsafe { value.assume_init() }
}

/// Sets XMM register `number` (0 to 5; others are left alone).
///
/// # Safety
/// The program itself keeps nothing in the register.
#[inline]
pub unsafe fn set_xmm(number: u8, value: u128) {
    let from = &raw const value;
    each!(number, register => {
        // SAFETY: loads 16 bytes of a local variable; the caller vouches for the register.
        unsafe { asm!(concat!("movdqu ", register!(), ", [{}]"), in(reg) from, options(nostack, preserves_flags, readonly)) }
    }, 0 "xmm0", 1 "xmm1", 2 "xmm2", 3 "xmm3", 4 "xmm4", 5 "xmm5");
}
