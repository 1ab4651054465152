//! Ending the run: QEMU's isa-debug-exit device, or Bochs's shutdown port, with the verdict on the serial port too.

use crate::serial;

/// How the image ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// Everything as it should be.
    Success,
    /// A check failed.
    Failure,
}

impl ExitCode {
    /// What is written to isa-debug-exit. QEMU ends with `value * 2 + 1`: 33 and 35, which QEMU itself never uses.
    const fn value(self) -> u32 {
        match self {
            ExitCode::Success => 0x10,
            ExitCode::Failure => 0x11,
        }
    }
}

/// I/O address that the isa-debug-exit device is given on QEMU's command line.
const DEBUG_EXIT: u16 = 0xF4;
/// Bochs ends when "Shutdown" is written here, a byte at a time.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// Prints the verdict and ends the machine; where nothing ends it, halts for good.
pub fn exit(code: ExitCode) -> ! {
    // Two line ends: Bochs loses what is in the port's buffer when it stops.
    serial::print_dying(format_args!("[exit {}]\n\n", code.value()));
    serial::drain();
    // SAFETY: both devices exist to end the machine; where they are missing, the writes go nowhere.
    unsafe {
        x86::io::outl(DEBUG_EXIT, code.value());
        for byte in *b"Shutdown" {
            x86::io::outb(BOCHS_SHUTDOWN, byte);
        }
    }
    loop {
        // SAFETY: with interrupts off a halted processor stays halted, which is what is wanted.
        unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
