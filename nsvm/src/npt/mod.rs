//! Nested NPT: L1's nested page tables, and the shadow of them that hardware runs L2 on (APM volume 2, 15.25).
//!
//! The VMRUN path makes a [`NptContext`] of L1's nCR3, ASID and paging mode and activates it in the VP's
//! [`NptShadow`], whose top table becomes nCR3 of VMCB02. A nested page fault of L2 goes to [`NptShadow::fault`]; L1's
//! invalidations, the two GPA flush hypercalls and the embedder's own changes go to the `flush_*` methods and
//! [`NptShadow::l1_gpa_changed`]. [`NptWalk`] translates the GPAs of a hypercall from L2.
//!
//! Uses `hvcore::shadow` for the tables themselves and [`GuestMemory`](hvcore::memory::GuestMemory) to read L1's. The
//! host runs with EFER.NXE = 1 and four or five levels of its own.

mod format;
mod shadow;
mod walk;

pub use format::{NptFormat, PagingMode};
pub use shadow::{CachedWalk, Cause, L1Access, NptContext, NptEntry, NptOutcome, NptShadow};
pub use walk::{NptWalk, WalkFault, walk};

/// EXITINFO1 of a nested page fault (APM volume 2, 15.25.6): bits 4:0 are those of a page-fault error code.
pub mod info1 {
    /// Bit 0: the nested tables had a translation; clear when an entry on the way was not present.
    pub const PRESENT: u64 = 1 << 0;
    /// Bit 1: the access was a write. Accesses to L2's own page tables are writes.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: the access was a user access. Always set: the nested tables see every access as one.
    pub const USER: u64 = 1 << 2;
    /// Bit 3: an entry on the way had a reserved bit set.
    pub const RESERVED: u64 = 1 << 3;
    /// Bit 4: the access was an instruction fetch, and no-execute is enabled for the nested tables.
    pub const FETCH: u64 = 1 << 4;
    /// Bit 32: the fault was on L2's final physical address.
    pub const FINAL: u64 = 1 << 32;
    /// Bit 33: the fault was on the walk of L2's own page tables.
    pub const TABLE: u64 = 1 << 33;
}
