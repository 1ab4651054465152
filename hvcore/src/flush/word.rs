//! The one word that a VP and the initiators of flushes agree on. Used by this folder only; uses nothing.
//!
//! Who may change what: the VP itself changes the mode and the epoch and takes marks off; everyone else only sets
//! marks. Every change is a read-modify-write, so the changes of one word have one order that all agree on, and each
//! sees all changes before it. The protocol's argument (`docs/flush.md`) needs no other order.
//!
//! | bits | name | meaning |
//! |---|---|---|
//! | 1:0 | mode | 0 outside the guest, 1 runs L1, 2 runs L2 |
//! | 2, 3 | IPI-pending | a request for L1's (L2's) translations was marked since the VP last came or went |
//! | 4 | inhibit | the VP uses translations in software: callers must wait |
//! | 5 | waiters | a caller was suspended because of bit 4 |
//! | 6 | nested | the VP has run an L2 at some time |
//! | 8 to 15 | should-flush | per kind: a list is queued, everything, everything but global |
//! | 63:32 | epoch | number of entries |

/// Bits 1:0.
pub const MODE: u64 = 0b11;
/// Mode: runs L1.
pub const MODE_L1: u64 = 1;
/// Mode: runs L2.
pub const MODE_L2: u64 = 2;
/// IPI-pending for L1's translations.
pub const IPI_L1: u64 = 1 << 2;
/// IPI-pending for L2's translations, of either stage.
pub const IPI_L2: u64 = 1 << 3;
/// The VP inhibits flushes.
pub const INHIBIT: u64 = 1 << 4;
/// A caller waits for the end of the inhibition.
pub const WAITERS: u64 = 1 << 5;
/// The VP has run an L2 at some time, so it may hold second-stage translations.
pub const NESTED: u64 = 1 << 6;
/// One more entry.
pub const EPOCH_ONE: u64 = 1 << 32;

/// Marks of one kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Something is in the queue.
    pub list: u64,
    /// Everything is to be flushed.
    pub everything: u64,
    /// Everything that is not global is to be flushed.
    pub non_global: u64,
}

impl Marks {
    /// All three.
    pub const fn all(self) -> u64 {
        self.list | self.everything | self.non_global
    }
}

/// Marks for L1's GVA translations.
pub const L1_GVA: Marks = Marks { list: 1 << 8, everything: 1 << 9, non_global: 1 << 10 };
/// Marks for L2's GVA translations.
pub const L2_GVA: Marks = Marks { list: 1 << 11, everything: 1 << 12, non_global: 1 << 13 };
/// Marks for L2's second stage. There are no global mappings there.
pub const L2_SECOND_STAGE: Marks = Marks { list: 1 << 14, everything: 1 << 15, non_global: 0 };
