//! The permission maps of L1: which ports and MSRs exit to L0.

/// MSR permission map: two bits per MSR (read, write), 2 KiB for each of three ranges.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct MsrMap([u8; 8192]);

/// IO permission map: one bit per port, and three more bytes for accesses that run past the last port.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct IoMap([u8; 12288]);

/// Which accesses to an MSR exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// RDMSR only.
    Read = 1,
    /// WRMSR only.
    Write = 2,
    /// Both.
    Both = 3,
}

impl MsrMap {
    /// Nothing exits but MSRs outside the three ranges, which exit whatever the map says.
    pub const fn new() -> Self {
        Self([0; 8192])
    }

    /// `access` to `msr` exits from now on. MSRs outside the ranges are left as they are.
    pub const fn intercept(&mut self, msr: u32, access: Access) {
        let (range, index) = match msr {
            0..=0x1fff => (0, msr),
            0xc000_0000..=0xc000_1fff => (1, msr & 0x1fff),
            0xc001_0000..=0xc001_1fff => (2, msr & 0x1fff),
            _ => return,
        };
        let bit = index as usize * 2;
        self.0[range * 2048 + bit / 8] |= (access as u8) << (bit % 8);
    }
}

impl Default for MsrMap {
    fn default() -> Self {
        Self::new()
    }
}

impl IoMap {
    /// No port exits.
    pub const fn new() -> Self {
        Self([0; 12288])
    }

    /// Accesses that touch `port` exit from now on.
    pub const fn intercept(&mut self, port: u16) {
        self.0[port as usize / 8] |= 1 << (port % 8);
    }
}

impl Default for IoMap {
    fn default() -> Self {
        Self::new()
    }
}
