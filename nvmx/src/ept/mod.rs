//! Nested EPT: L1's extended page tables, and the shadow of them that hardware runs L2 on (SDM volume 3, "The extended
//! page-table mechanism (EPT)").
//!
//! Before L2 runs, the embedder activates L1's EPT pointer in the VP's [`EptShadow`] and puts the EPT pointer that it
//! gets into VMCS02. An EPT violation of L2 goes to [`EptShadow::fault`]; L1's INVEPT, the two GPA flush hypercalls and
//! the embedder's own changes go to the `flush_*` methods and [`EptShadow::l1_gpa_changed`]. [`EptWalk`] translates the
//! GPAs of a hypercall from L2; [`switch_eptp`] is VM function 0.
//!
//! Uses `hvcore::shadow` for the tables themselves and [`GuestMemory`](hvcore::memory::GuestMemory) to read L1's.

mod format;
mod pml;
mod shadow;
mod walk;

pub use format::EptFormat;
pub use pml::Pml;
pub use shadow::{CachedWalk, Cause, EptEntry, EptOutcome, EptShadow, L1Access, same_ep4ta};
pub use walk::{EptWalk, WalkFault, switch_eptp, walk};

/// Exit qualification of an EPT violation (SDM volume 3, "Exit Qualification for EPT Violations").
pub mod qualification {
    /// Bit 0: the access was a data read. Set together with bit 1 for an access to L2's paging structures while the
    /// accessed and dirty flags of the EPT are on.
    pub const READ: u64 = 1 << 0;
    /// Bit 1: the access was a data write.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: the access was an instruction fetch.
    pub const FETCH: u64 = 1 << 2;
    /// Bits 2:0.
    pub const ACCESS: u64 = 7;
    /// Shift of bits 5:3: readable, writable and executable by the entries that were used.
    pub const RIGHTS_SHIFT: u32 = 3;
    /// Bits 6:3: what L1's tables allow, in place of what the shadow does.
    pub const RIGHTS: u64 = 0xF << RIGHTS_SHIFT;
    /// Bit 7: the guest-linear address field is valid.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// Bit 8: the access was to the translation of the linear address, not to a paging structure. Only with bit 7.
    pub const FINAL: u64 = 1 << 8;
    /// Bit 12: IRET had unblocked NMIs. Also of a page-modification log-full exit.
    pub const NMI_UNBLOCKED: u64 = 1 << 12;
}
