//! Page-modification logging for L1 (SDM volume 3, "Page-Modification Logging").
//!
//! Used by the walk when it sets a dirty flag; writes one entry of L1's log.

use hvcore::addr::{L1Gpa, L2Gpa};
use hvcore::memory::GuestMemory;

/// L1's page-modification log, from the fields of its VMCS. The caller writes `index` back to the PML index field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pml {
    /// The PML address: the page of 512 entries of 8 bytes.
    pub address: L1Gpa,
    /// The PML index: where the next entry goes. Counts down; above 511 the log is full.
    pub index: u16,
}

impl Pml {
    /// True when no entry fits: a flag that has to be set makes an exit instead.
    pub(super) const fn is_full(&self) -> bool {
        self.index > 511
    }

    /// The dirty flag of the page at `gpa` was set. Where L1 has no memory, the entry goes nowhere.
    pub(super) fn log<M: GuestMemory + ?Sized>(&mut self, memory: &M, gpa: L2Gpa) {
        let at = self.address.page().raw() | u64::from(self.index & 511).wrapping_mul(8);
        let _ = memory.write_u64(L1Gpa::new(at), gpa.page().raw());
        self.index = self.index.wrapping_sub(1);
    }
}
