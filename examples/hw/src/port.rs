//! Port I/O.

use core::arch::asm;

macro_rules! port {
    ($in:ident, $out:ident, $ty:ty, $reg:tt, $width:literal) => {
        #[doc = concat!("Reads ", $width, " bits from `port`.")]
        ///
        /// # Safety
        /// Reading a port may change a device's state: the caller knows the device.
        #[inline]
        pub unsafe fn $in(port: u16) -> $ty {
            let value: $ty;
            // SAFETY: IN touches no memory of the program; the device is the caller's affair.
            unsafe { asm!(concat!("in ", $reg, ", dx"), out($reg) value, in("dx") port, options(nomem, nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes ", $width, " bits to `port`.")]
        ///
        /// # Safety
        /// A device may do anything on a write, DMA included: the caller knows the device.
        #[inline]
        pub unsafe fn $out(port: u16, value: $ty) {
            // SAFETY: OUT touches no memory of the program; the device is the caller's affair.
            unsafe { asm!(concat!("out dx, ", $reg), in("dx") port, in($reg) value, options(nomem, nostack, preserves_flags)) };
        }
    };
}

port!(inb, outb, u8, "al", "8");
port!(inw, outw, u16, "ax", "16");
port!(inl, outl, u32, "eax", "32");
