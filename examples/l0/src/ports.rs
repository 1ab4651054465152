//! Ports that L0 watches: its own, and those by which L1 ends the machine.
//!
//! Called by the exit handlers of both vendors. Bochs has no device that ends it with a status: L0 says on its own port
//! how L1 ended the machine, in a line that `cargo xtask` knows, and ends it in Bochs's way.

use hw::port;

use crate::counters;
use crate::permissions::{DEBUG_EXIT, KEYBOARD, POWER, RESET};
use crate::shared::Shared;
use crate::trace;

/// Bochs ends when "Shutdown" is written here, a byte at a time.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// L1 writes the low `size` bytes of `value` to a port that may end the machine.
pub fn end(shared: &Shared, number: u16, value: u32, size: u64) {
    let way = ends(number, value, size);
    if way != End::Not {
        counters::print(shared.ipis.count());
        trace::print();
    }
    match way {
        End::Not => {}
        End::Value => crate::say!("l0: end: value {value:#x}"),
        End::PowerOff => crate::say!("l0: end: power off"),
        End::Reset => reset(),
    }
    // SAFETY: L1 owns the port, and would have done this itself.
    unsafe {
        match size {
            1 => port::outb(number, value as u8),
            2 => port::outw(number, value as u16),
            _ => port::outl(number, value),
        }
    }
    if way == End::Value {
        // No such device, or it would have ended here.
        bochs_shutdown();
    }
}

/// How a write ends the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It does not.
    Not,
    /// With this value as its status.
    Value,
    PowerOff,
    Reset,
}

/// What a write of the low `size` bytes of `value` to port `number` does.
fn ends(number: u16, value: u32, size: u64) -> End {
    // PCI's address port, four bytes wide, has the port of resets in its middle: that is another port.
    match (number, size) {
        (DEBUG_EXIT, _) => End::Value,
        _ if POWER.contains(&number) && value & 1 << 13 != 0 => End::PowerOff,
        (RESET, 1) if value & 1 << 2 != 0 => End::Reset,
        (KEYBOARD, 1) if value as u8 == 0xfe => End::Reset,
        _ => End::Not,
    }
}

/// Resets the machine; Bochs, which would start anew, ends.
pub fn reset() -> ! {
    trace::print();
    crate::say!("l0: end: reset");
    bochs_shutdown();
    // SAFETY: the reset port of PC chipsets, then the keyboard controller's: the machine restarts.
    unsafe {
        port::outb(RESET, 0x02);
        port::outb(RESET, 0x06);
        port::outb(KEYBOARD, 0xfe);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_the_machine_is_told_from_what_does_not() {
        assert_eq!(ends(DEBUG_EXIT, 0, 4), End::Value);
        assert_eq!((ends(POWER[0], 0x2000, 2), ends(POWER[0], 0x1fff, 2)), (End::PowerOff, End::Not));
        assert_eq!((ends(RESET, 6, 1), ends(RESET, 2, 1)), (End::Reset, End::Not));
        assert_eq!((ends(KEYBOARD, 0xfe, 1), ends(KEYBOARD, 0xff, 1)), (End::Reset, End::Not));
        // A PCI configuration address, in which the other bits mean something else.
        assert_eq!(ends(RESET - 1, 0x8000_2604, 4), End::Not);
    }
}
