//! Ways to end the machine other than the runtime's: the controls of what `cargo xtask run-l1` says of a run.

use core::arch::asm;
use rt::ExitCode;

/// A control register of power management and the value that switches the machine off: QEMU's, and Bochs's.
const POWER_OFF: [(u16, u16); 2] = [(0x604, 0x2000), (0xB004, 0x2000)];

/// Ticks of the time stamp counter within which the machine is off.
const POWER_OFF_TICKS: u64 = 2_000_000_000;

/// Switches the machine off.
pub fn power_off() -> ExitCode {
    for (port, value) in POWER_OFF {
        // SAFETY: the machine ends, or nothing is there.
        unsafe { asm!("out dx, ax", in("dx") port, in("ax") value) };
        // An emulator ends a little later: the processor goes on until then.
        rt::smp::wait(POWER_OFF_TICKS, || false);
    }
    ExitCode::Failure
}

/// Resets the machine by the port of PC chipsets.
pub fn reset() -> ExitCode {
    // SAFETY: the machine restarts.
    unsafe {
        asm!("out dx, al", in("dx") 0xCF9_u16, in("al") 2_u8);
        asm!("out dx, al", in("dx") 0xCF9_u16, in("al") 6_u8);
    }
    hang()
}

/// An exception without an interrupt table, and so a triple fault.
pub fn triple_fault() -> ExitCode {
    let nothing = [0_u16; 5];
    // SAFETY: nothing runs on.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const nothing) };
    ExitCode::Failure
}

/// Does not end.
pub fn hang() -> ! {
    loop {
        // SAFETY: interrupts stay off: nothing happens.
        unsafe { asm!("cli", "hlt") };
    }
}
