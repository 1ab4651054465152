//! What L1 is offered.
//!
//! Built once by the embedder; read by the state machine.

/// The VMX that L1 is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// L1's physical-address width in bits, at most 52.
    pub physical_bits: u8,
    /// The enlightened VMCS is offered.
    pub enlightened: bool,
}

impl Config {
    /// True when `gpa` has no bit beyond L1's physical addresses.
    #[inline]
    pub const fn legal_gpa(&self, gpa: u64) -> bool {
        match gpa.checked_shr(self.physical_bits as u32) {
            Some(beyond) => beyond == 0,
            None => true,
        }
    }
}
