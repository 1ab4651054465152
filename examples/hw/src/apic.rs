//! The local APIC, in xAPIC (memory) and x2APIC (MSR) mode: what a hypervisor that passes it through needs.

use crate::{cpu, msr};

/// Physical address of the xAPIC page after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// APIC_BASE: enable.
pub const BASE_ENABLE: u64 = 1 << 11;
/// APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// APIC_BASE: bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;

/// Register offsets in the xAPIC page.
pub mod reg {
    /// APIC id, bits 31:24.
    pub const ID: u64 = 0x20;
    /// Task priority, bits 7:0.
    pub const TPR: u64 = 0x80;
    /// End of interrupt.
    pub const EOI: u64 = 0xb0;
    /// Logical destination, bits 31:24.
    pub const LDR: u64 = 0xd0;
    /// Destination format, bits 31:28: 0xF flat, 0 cluster.
    pub const DFR: u64 = 0xe0;
    /// Spurious vector.
    pub const SPURIOUS: u64 = 0xf0;
    /// Interrupt command, low half: a write sends.
    pub const ICR_LOW: u64 = 0x300;
    /// Interrupt command, high half: destination in bits 31:24.
    pub const ICR_HIGH: u64 = 0x310;
}

/// ICR: delivery pending (xAPIC).
pub const ICR_PENDING: u32 = 1 << 12;
/// ICR: level assert.
pub const ICR_ASSERT: u32 = 1 << 14;
/// ICR delivery mode NMI.
pub const ICR_NMI: u32 = 4 << 8;

/// An access to this processor's own local APIC.
#[derive(Clone, Copy, Debug)]
pub struct LocalApic {
    page: *mut u32,
}

// SAFETY: the page is the same address on every processor and each reaches its own registers through it.
unsafe impl Send for LocalApic {}
// SAFETY: as above.
unsafe impl Sync for LocalApic {}

impl LocalApic {
    /// The APIC whose registers are mapped, uncached, at virtual address `page`.
    ///
    /// # Safety
    /// The mapping is there for as long as the value is used in xAPIC mode.
    pub const unsafe fn new(page: *mut u32) -> Self {
        Self { page }
    }

    /// True when this processor's APIC is in x2APIC mode.
    pub fn is_x2apic(self) -> bool {
        // SAFETY: every processor with a local APIC has APIC_BASE.
        unsafe { msr::rdmsr(msr::APIC_BASE) & BASE_X2APIC != 0 }
    }

    /// Reads the xAPIC register at byte offset `offset`, a multiple of 16 below 4096.
    pub fn read(self, offset: u64) -> u32 {
        // SAFETY: the constructor vouches for the page; the offset is masked into it.
        unsafe { self.page.byte_add((offset & 0xff0) as usize).read_volatile() }
    }

    /// Writes the xAPIC register at byte offset `offset`, a multiple of 16 below 4096.
    ///
    /// # Safety
    /// The register may send interrupts or reset processors: the caller checked the value.
    pub unsafe fn write(self, offset: u64, value: u32) {
        // SAFETY: as for `read`; the caller vouches for the value.
        unsafe { self.page.byte_add((offset & 0xff0) as usize).write_volatile(value) }
    }

    /// This processor's APIC id.
    pub fn id(self) -> u32 {
        if self.is_x2apic() {
            // SAFETY: x2APIC mode is on.
            return unsafe { msr::rdmsr(0x802) as u32 };
        }
        self.read(reg::ID) >> 24
    }

    /// Sends the interrupt of ICR low word `low` to physical APIC id `destination`, and leaves ICR as it was:
    /// whoever reads it back (a guest that owns the APIC) sees its own last command.
    ///
    /// # Safety
    /// The command is one that the target processor can take.
    pub unsafe fn send_preserving_icr(self, destination: u32, low: u32) {
        if self.is_x2apic() {
            // The x2APIC ICR is write-to-send and has no separate destination register; it reads back as last
            // written, so the guest's value is not restored by hardware: who shows ICR to a guest keeps a copy.
            // SAFETY: x2APIC mode is on; the caller vouches for the command.
            unsafe { msr::wrmsr(msr::X2APIC_ICR, u64::from(destination) << 32 | u64::from(low)) };
            return;
        }
        // The low half cannot be restored without sending again; the high half can, and it is the half that a guest
        // writes in a separate access before it sends.
        // SAFETY: the caller vouches for the command.
        unsafe {
            let high = self.read(reg::ICR_HIGH);
            while self.read(reg::ICR_LOW) & ICR_PENDING != 0 {
                cpu::pause();
            }
            self.write(reg::ICR_HIGH, destination << 24);
            self.write(reg::ICR_LOW, low);
            while self.read(reg::ICR_LOW) & ICR_PENDING != 0 {
                cpu::pause();
            }
            self.write(reg::ICR_HIGH, high);
        }
    }
}
