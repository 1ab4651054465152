//! Control registers, CPUID, interrupt flag, time stamp.

use core::arch::asm;
pub use core::arch::x86_64::CpuidResult;

/// CPUID of `leaf` and `subleaf`.
#[inline]
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    // Safe in newer compilers than the oldest that is supported.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID, and it only writes its result registers.
    unsafe {
        core::arch::x86_64::__cpuid_count(leaf, subleaf)
    }
}

/// The time stamp counter.
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC reads a counter; kernels of ours never set CR4.TSD.
    unsafe { core::arch::x86_64::_rdtsc() }
}

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline]
        pub fn $read() -> u64 {
            let value: u64;
            // SAFETY: ring 0 code may read control registers; no memory is touched.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        /// The value is legal and leaves the program's code, stack and data mapped.
        #[inline]
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller vouches for the value.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    };
}

control_register!(cr0, write_cr0, "cr0");
control_register!(cr2, write_cr2, "cr2");
control_register!(cr3, write_cr3, "cr3");
control_register!(cr4, write_cr4, "cr4");
control_register!(cr8, write_cr8, "cr8");
control_register!(dr6, write_dr6, "dr6");

/// Clears RFLAGS.IF.
#[inline]
pub fn cli() {
    // SAFETY: holding interrupts is always allowed in ring 0.
    unsafe { asm!("cli", options(nostack)) };
}

/// Sets RFLAGS.IF.
///
/// # Safety
/// An interrupt table is loaded, or GIF is clear.
#[inline]
pub unsafe fn sti() {
    // SAFETY: the caller vouches for the interrupt table.
    unsafe { asm!("sti", options(nostack)) };
}

/// A hint that this is a spin loop.
#[inline]
pub fn pause() {
    core::hint::spin_loop();
}

/// XSETBV: writes extended control register `xcr`.
///
/// # Safety
/// CR4.OSXSAVE is set and the value is one that the processor takes.
#[inline]
pub unsafe fn xsetbv(xcr: u32, value: u64) {
    // SAFETY: the caller vouches for the register and the value.
    unsafe {
        asm!("xsetbv", in("ecx") xcr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// WBINVD: writes back and empties all caches.
///
/// # Safety
/// Slow, and that is all: ring 0 only.
#[inline]
pub unsafe fn wbinvd() {
    // SAFETY: caches are coherent with memory before and after.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}

macro_rules! selector {
    ($name:ident, $instruction:literal, $what:literal) => {
        #[doc = concat!("The ", $what, " selector.")]
        #[inline]
        pub fn $name() -> u16 {
            let value: u16;
            // SAFETY: reading a selector changes nothing.
            unsafe { asm!($instruction, out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
    };
}

selector!(cs, "mov {0:x}, cs", "code segment");
selector!(ss, "mov {0:x}, ss", "stack segment");
selector!(ds, "mov {0:x}, ds", "DS");
selector!(es, "mov {0:x}, es", "ES");
selector!(fs, "mov {0:x}, fs", "FS");
selector!(gs, "mov {0:x}, gs", "GS");
selector!(tr, "str {0:x}", "task register's");

macro_rules! table_register {
    ($name:ident, $instruction:literal) => {
        #[doc = concat!("Base and limit, as ", $instruction, " stores them.")]
        #[inline]
        pub fn $name() -> (u64, u16) {
            let mut image = [0u16; 5];
            // SAFETY: the instruction stores ten bytes where it is told to, and that is what it is given.
            unsafe { asm!(concat!($instruction, " [{}]"), in(reg) image.as_mut_ptr(), options(nostack, preserves_flags)) };
            let [limit, b0, b1, b2, b3] = image.map(u64::from);
            (b0 | b1 << 16 | b2 << 32 | b3 << 48, limit as u16)
        }
    };
}

table_register!(sgdt, "sgdt");
table_register!(sidt, "sidt");

/// HLT: waits for an interrupt or NMI.
#[inline]
pub fn halt() {
    // SAFETY: the processor goes on at the next event; nothing else happens.
    unsafe { asm!("hlt", options(nostack, preserves_flags)) };
}
