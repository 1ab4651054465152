//! Shadow second-stage tables: L2 GPA to host physical address, composed of L1's tables and the embedder's own.
//!
//! Used by `nsvm` (nested NPT) and `nvmx` (nested EPT), which walk L1's tables and hand in finished leaves; uses the
//! addresses and the page pool only. It knows no entry format but through [`EntryFormat`], and never reads guest
//! memory.
//!
//! A set of tables belongs to one VP and only that VP touches it: a change that another VP wants travels as a request
//! through the flush protocol and is carried out by the owner before its next entry. Nothing allocates: pages come
//! from a [`PagePool`] that the embedder fills; when it runs dry, the least recently used root is given up, and at
//! last the tables of the running root itself.
//!
//! One hardware tag (ASID, VPID with EP4TA) per VP stands for the *active* root. Whatever makes translations cached
//! under that tag wrong sets [`Tables::tag_stale`], which stays set until the owner has a fresh or flushed tag and
//! says so with [`Tables::tag_retired`]. Pages freed meanwhile may be reused at once: the owner is not in its guest
//! and cannot enter it again under the stale tag.

mod pool;
mod tables;

pub use pool::{ENTRIES, PagePool, PageRecord, ShadowPage};
pub use tables::{Leaf, Tables};

use crate::addr::{Hpa, L1Gpa};

/// Size of a page in the host's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB, mapped by an entry of level 1.
    Size4K = 1,
    /// 2 MiB, mapped by an entry of level 2.
    Size2M = 2,
    /// 1 GiB, mapped by an entry of level 3.
    Size1G = 3,
}

impl PageSize {
    /// Level of the table whose entries map pages of this size: 1 for 4 KiB.
    #[inline]
    pub const fn level(self) -> u8 {
        self as u8
    }

    /// The page size that entries of `level` map; levels above 3 cannot map pages and give 1 GiB.
    #[inline]
    pub const fn of_level(level: u8) -> Self {
        match level {
            0 | 1 => Self::Size4K,
            2 => Self::Size2M,
            _ => Self::Size1G,
        }
    }

    /// Base-2 logarithm of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }

    /// Size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => 1 << 12,
            Self::Size2M => 1 << 21,
            Self::Size1G => 1 << 30,
        }
    }

    /// Mask of the offset bits in a page of this size.
    #[inline]
    pub const fn offset_mask(self) -> u64 {
        match self {
            Self::Size4K => (1 << 12) - 1,
            Self::Size2M => (1 << 21) - 1,
            Self::Size1G => (1 << 30) - 1,
        }
    }
}

/// How the embedder maps one page of L1's memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Host physical address of the start of the page of `size` that holds the asked L1 GPA. The L1 GPA and the host
    /// address have the same offset in a page of `size`.
    pub hpa: Hpa,
    /// Size of the embedder's page. Shadow pages are never larger: an embedder that logs dirty pages, or whose
    /// hardware lacks 1 GiB pages, says so here.
    pub size: PageSize,
    /// L1 may write. False while the embedder logs, write-protects or emulates writes to the page.
    pub writable: bool,
    /// L1 may fetch instructions.
    pub executable: bool,
    /// Memory type as the host's entry format has it, bits 2:0: the PAT index for NPT (bit 0 PWT, bit 1 PCD, bit 2
    /// PAT), the EPT memory type for EPT (6 is write-back).
    pub memory_type: u8,
}

/// The embedder's translation of L1 GPAs, as it stands now.
///
/// An embedder that changes a mapping changes it here first and then posts the change to every VP (see
/// [`Tables::l1_gpa_changed`]): a fill that still saw the old mapping is undone by the request before the next entry.
pub trait L1Map {
    /// The mapping of `gpa`, or `None` when L1's accesses to it are not mapped: emulated devices, holes, memory that
    /// the embedder keeps or has to page in.
    fn map(&self, gpa: L1Gpa) -> Option<Mapping>;
}

impl<T: L1Map + ?Sized> L1Map for &T {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        (**self).map(gpa)
    }
}

/// What a shadow leaf lets L2 do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Data reads. NPT cannot withhold them; EPT can.
    pub read: bool,
    /// Data writes.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
    /// Memory type, bits 2:0, as in [`Mapping::memory_type`]; in bit 3 ignore-PAT, where the format has it.
    pub memory_type: u8,
}

/// The host's second-stage entry format.
pub trait EntryFormat {
    /// An entry that refers to the table at `table`, with all rights.
    fn table(table: Hpa) -> u64;

    /// An entry that maps the page of `size` at `page`, which is aligned to it.
    fn leaf(page: Hpa, size: PageSize, rights: Rights) -> u64;

    /// `leaf` without the right to write.
    fn read_only(leaf: u64) -> u64;

    /// True when every access that `old` allowed ends at the same place under `new`, so that a translation cached
    /// from `old` does no harm.
    fn keeps(old: u64, new: u64) -> bool;
}

/// What the embedder did to a range of L1's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Change {
    /// The range is no longer mapped, or mapped elsewhere: forget every translation to it and from tables in it.
    Unmap,
    /// The range may no longer be written, dirty logging for instance: take the write right away.
    WriteProtect,
}

/// What an invalidation means for the hardware tag of the active root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagFlush {
    /// Nothing cached under the tag became wrong by this.
    NotNeeded,
    /// The tag must be flushed or retired before the next entry.
    Needed,
}

/// The embedder gave storage that cannot serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowError {
    /// Fewer pages or records than one page per root and one per lower level.
    TooFewPages {
        /// The least number of pages that serves.
        needed: usize,
    },
    /// A pool page's host physical address is not a multiple of 4 KiB.
    UnalignedPage {
        /// Index of the page in the slice.
        index: usize,
    },
    /// The host's tables have neither 4 nor 5 levels.
    Levels(u8),
}
