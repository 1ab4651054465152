//! L0's own messages: a debug port that L1 cannot see (QEMU's isa-debugcon, Bochs's port 0xE9 hack).

use core::fmt::{self, Write};

use hw::port;
use spin::Mutex;

/// The port. Its accesses by L1 exit: reads give ones, writes vanish.
pub const PORT: u16 = 0xe9;

struct DebugPort;

static LOCK: Mutex<()> = Mutex::new(());

impl Write for DebugPort {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            // SAFETY: a write to the debug port prints a character, or goes nowhere.
            unsafe { port::outb(PORT, b) };
        }
        Ok(())
    }
}

/// Prints a line. Used by [`crate::say`].
pub fn print(args: fmt::Arguments<'_>) {
    // No interrupt or NMI handler prints, so the lock cannot be held by the code that was interrupted.
    let _lock = LOCK.lock();
    let _ = DebugPort.write_fmt(args);
    let _ = DebugPort.write_char('\n');
}

/// Prints a line although another processor may hold the lock for good: the last words.
pub fn print_dying(args: fmt::Arguments<'_>) {
    let mut lock = None;
    for _ in 0..1_000_000 {
        lock = LOCK.try_lock();
        if lock.is_some() {
            break;
        }
        core::hint::spin_loop();
    }
    let _ = DebugPort.write_fmt(args);
    let _ = DebugPort.write_char('\n');
    drop(lock);
}

/// True when no processor prints for good: what comes after the last words may still be printed.
pub fn is_free() -> bool {
    (0..1_000_000).any(|_| {
        core::hint::spin_loop();
        LOCK.try_lock().is_some()
    })
}

/// Prints a line on L0's debug port.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::debug::print(format_args!($($arg)*)) };
}
