//! The first serial port: [`print!`](crate::print) and [`println!`](crate::println).
//!
//! On Bochs a copy of the output goes to port 0xE9 when [`also_to_port_e9`] is called: it is not buffered there.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;
use uart_16550::SerialPort;

/// I/O address of the first serial port.
const COM1: u16 = 0x3F8;

// SAFETY: a PC's first serial port is at this address, and every access goes through the lock.
static PORT: Mutex<SerialPort> = Mutex::new(unsafe { SerialPort::new(COM1) });

// Relaxed: set once before other processors start, and only redirects text.
static PORT_E9: AtomicBool = AtomicBool::new(false);

/// Sets the port up: 8 data bits, FIFO on.
pub fn init() {
    PORT.lock().init();
}

/// From now on text also goes to port 0xE9.
pub fn also_to_port_e9() {
    PORT_E9.store(true, Ordering::Relaxed);
}

struct Writer<'a>(&'a mut SerialPort);

impl Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let e9 = PORT_E9.load(Ordering::Relaxed);
        for byte in text.bytes() {
            self.0.send_raw(byte);
            if e9 {
                // SAFETY: port 0xE9 is Bochs's debug output; without it the write goes nowhere.
                unsafe { x86::io::outb(0xE9, byte) };
            }
        }
        Ok(())
    }
}

/// Prints `args` in one piece: lines of several processors do not mix.
#[doc(hidden)]
pub fn print(args: fmt::Arguments<'_>) {
    // Sending to the port cannot fail; a `Display` that does is not worth ending the run for.
    let _ = Writer(&mut PORT.lock()).write_fmt(args);
}

/// Prints `args` even when this or another processor died while it held the port.
pub fn print_dying(args: fmt::Arguments<'_>) {
    for _ in 0..1_000_000 {
        if let Some(mut port) = PORT.try_lock() {
            let _ = Writer(&mut port).write_fmt(args);
            return;
        }
        core::hint::spin_loop();
    }
    // SAFETY: whoever holds the lock has had time for thousands of characters: it is dead, or this processor itself.
    // At worst two lines mix.
    let mut port = unsafe { SerialPort::new(COM1) };
    let _ = Writer(&mut port).write_fmt(args);
}

/// Waits until the transmitter is empty, for a bounded time.
pub fn drain() {
    const LINE_STATUS: u16 = COM1 + 5;
    const TRANSMITTER_EMPTY: u8 = 1 << 6;
    for _ in 0..1_000_000 {
        // SAFETY: reading the line status of the serial port clears error bits only.
        if unsafe { x86::io::inb(LINE_STATUS) } & TRANSMITTER_EMPTY != 0 {
            return;
        }
    }
}

/// Prints to the serial port.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::serial::print(format_args!($($arg)*)) };
}

/// Prints a line to the serial port.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::serial::print(format_args!("{}\n", format_args!($($arg)*))) };
}
