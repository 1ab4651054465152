//! Ports that L0 watches: its own, and those by which L1 ends the machine.
//!
//! Called by the exit handlers of both vendors. Bochs has no device that ends it with a status: L0 says on its own port
//! how L1 ended the machine, in a line that `cargo xtask` knows, and ends it in Bochs's way.

use hw::port;

use crate::counters;
use crate::permissions::DEBUG_EXIT;
use crate::shared::Shared;
use crate::trace;

/// Bochs ends when "Shutdown" is written here, a byte at a time.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// L1 writes the low `size` bytes of `value` to a port that may end the machine.
pub fn end(shared: &Shared, number: u16, value: u32, size: u64) {
    let power_off = value & 1 << 13 != 0;
    if number == DEBUG_EXIT || power_off {
        counters::print(shared.ipis.count());
        trace::print();
        if number == DEBUG_EXIT {
            crate::say!("l0: end: value {value:#x}");
        } else {
            crate::say!("l0: end: power off");
        }
    }
    // SAFETY: L1 owns the port, and would have done this itself.
    unsafe {
        match size {
            1 => port::outb(number, value as u8),
            2 => port::outw(number, value as u16),
            _ => port::outl(number, value),
        }
    }
    if number == DEBUG_EXIT {
        // No such device, or it would have ended here.
        bochs_shutdown();
    }
}

/// Resets the machine.
pub fn reset() -> ! {
    trace::print();
    crate::say!("l0: end: reset");
    // SAFETY: the reset port of PC chipsets, then the keyboard controller's: the machine restarts.
    unsafe {
        port::outb(0xcf9, 0x02);
        port::outb(0xcf9, 0x06);
        port::outb(0x64, 0xfe);
    }
    loop {
        hw::cpu::halt();
    }
}

/// Ends Bochs; no effect elsewhere.
pub fn bochs_shutdown() {
    for byte in *b"Shutdown" {
        // SAFETY: Bochs's own port; elsewhere the writes go nowhere.
        unsafe { port::outb(BOCHS_SHUTDOWN, byte) };
    }
}
