//! Ports that L0 watches: its own, and those by which L1 ends the machine.
//!
//! Called by the exit handlers of both vendors.

use hw::port;

use crate::counters;
use crate::permissions::DEBUG_EXIT;
use crate::shared::Shared;

/// L1 writes the low `size` bytes of `value` to a port that may end the machine.
pub fn end(shared: &Shared, number: u16, value: u32, size: u64) {
    if number == DEBUG_EXIT || value & 1 << 13 != 0 {
        counters::print(shared.ipis.count());
    }
    // SAFETY: L1 owns the port, and would have done this itself.
    unsafe {
        match size {
            1 => port::outb(number, value as u8),
            2 => port::outw(number, value as u16),
            _ => port::outl(number, value),
        }
    }
}
