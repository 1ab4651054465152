//! The permission maps of L1: which ports and MSRs exit to L0.

use hw::msr;

/// MSR permission map: two bits per MSR (read, write), 2 KiB for each of three ranges.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct MsrMap(pub nsvm::MsrMap);

/// IO permission map: one bit per port, and three more bytes for accesses that run past the last port.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct IoMap(pub nsvm::IoMap);

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
        Self([0; 1024])
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
        self.0[range * 256 + bit / 64] |= (access as u64) << (bit % 64);
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
        Self([0; 1536])
    }

    /// Accesses that touch `port` exit from now on.
    pub const fn intercept(&mut self, port: u16) {
        self.0[port as usize / 64] |= 1 << (port % 64);
    }
}

impl Default for IoMap {
    fn default() -> Self {
        Self::new()
    }
}

/// MSRs that exit: what L0 or the library answers itself.
pub static MSRPM01: MsrMap = {
    let mut map = MsrMap::new();
    map.intercept(msr::EFER, Access::Both);
    map.intercept(msr::VM_CR, Access::Both);
    map.intercept(msr::VM_HSAVE_PA, Access::Both);
    map.intercept(msr::PAT, Access::Both);
    map.intercept(msr::APIC_BASE, Access::Both);
    map.intercept(msr::X2APIC_ICR, Access::Write);
    map
};

/// The emulator's debug-exit port: a write ends the machine.
pub const DEBUG_EXIT: u16 = 0xf4;
/// Power management control of QEMU's chipsets (PIIX4 and ICH9) as its firmware places it: a write with bit 13 set
/// powers the machine off.
pub const POWER: [u16; 2] = [0x604, 0xb004];

/// Reset control of PC chipsets: a write with bit 2 set resets the machine.
pub const RESET: u16 = 0xcf9;
/// The keyboard controller's command port: 0xFE resets the machine.
pub const KEYBOARD: u16 = 0x64;

/// Ports that exit: L0's own, and those by which L1 ends the machine, so that L0 prints its counters before.
pub const PORTS: [u16; 6] = [crate::debug::PORT, DEBUG_EXIT, POWER[0], POWER[1], RESET, KEYBOARD];

/// [`PORTS`] as the hardware wants them.
pub static IOPM01: IoMap = {
    let mut map = IoMap::new();
    let mut i = 0;
    while i < PORTS.len() {
        map.intercept(PORTS[i]);
        i += 1;
    }
    map
};
