//! What the host's Linux target expects from a C library and an unwinder, when images are built for it.
//!
//! The loops are string instructions: written in Rust, the compiler would turn them into calls of themselves.

use core::arch::asm;

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: both ranges are `count` bytes by the caller's contract; the direction flag is clear in compiled code.
    unsafe {
        asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) count & 7,
             inout("rcx") count / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: going up never overwrites what is still to be read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: both ranges are `count` bytes, at least 1 here; going down never overwrites what is still to be read;
    // the direction flag is clear again at the end.
    unsafe {
        asm!("std", "rep movsb", "cld",
             inout("rcx") count => _, inout("rdi") to.add(count - 1) => _, inout("rsi") from.add(count - 1) => _,
             options(nostack));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    let pattern = u64::from(value as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the range is `count` bytes by the caller's contract; the direction flag is clear in compiled code.
    unsafe {
        asm!("rep stosq", "mov rcx, {rest}", "rep stosb", rest = in(reg) count & 7, in("rax") pattern,
             inout("rcx") count / 8 => _, inout("rdi") to => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for i in 0..count {
        // SAFETY: both ranges are `count` bytes by the caller's contract.
        let (x, y) = unsafe { (a.add(i).read(), b.add(i).read()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, count) }
}

/// Named by the unwind tables of the precompiled `core`. Images abort on panic: it is never called.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
