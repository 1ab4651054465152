//! HV_VP_SET: sets of VP indexes below 4,096 (TLFS, "Processor Sets").
//!
//! Used by the intake, the flush engine and the client; uses nothing.

use static_assertions::const_assert_eq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// VPs that one bank names.
pub const VPS_PER_BANK: u32 = 64;
/// Banks that a set can name.
pub const MAX_BANKS: usize = 64;
/// VP indexes at or above this one cannot be named by a set.
pub const MAX_VP_INDEX: u32 = 4096;

/// The format of a VP set: an open set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct VpSetFormat(pub u64);

impl VpSetFormat {
    /// HvGenericSetSparse4k: a mask of banks, then one word for each bank in it.
    pub const SPARSE_4K: Self = Self(0);
    /// HvGenericSetAll: all VPs of the partition.
    pub const ALL: Self = Self(1);
}

/// The fixed part of HV_VP_SET; one `u64` for each bit of `valid_bank_mask` follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VpSetHeader {
    /// How the set is encoded.
    pub format: VpSetFormat,
    /// Bit n: bank n (VP indexes 64n to 64n + 63) follows.
    pub valid_bank_mask: u64,
}

const_assert_eq!(size_of::<VpSetHeader>(), 16);
const_assert_eq!(core::mem::offset_of!(VpSetHeader, format), 0);
const_assert_eq!(core::mem::offset_of!(VpSetHeader, valid_bank_mask), 8);

/// A sparse set: a mask of banks and the banks' words in ascending order, borrowed.
///
/// A bank whose word is missing reads as empty, so a value of this type is always a legal set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseVpSet<'a> {
    valid_bank_mask: u64,
    banks: &'a [u64],
}

impl<'a> SparseVpSet<'a> {
    /// The set of `banks`, one for each bit of `valid_bank_mask`; `None` when their number differs.
    #[inline]
    pub const fn new(valid_bank_mask: u64, banks: &'a [u64]) -> Option<Self> {
        if valid_bank_mask.count_ones() as usize == banks.len() { Some(Self { valid_bank_mask, banks }) } else { None }
    }

    /// The set of the VP indexes 0 to 63 whose bits are set in `mask`.
    #[inline]
    pub const fn from_mask(mask: &'a u64) -> Self {
        Self { valid_bank_mask: 1, banks: core::slice::from_ref(mask) }
    }

    /// The empty set.
    pub const EMPTY: SparseVpSet<'static> = SparseVpSet { valid_bank_mask: 0, banks: &[] };

    /// The mask of banks that are listed; a listed bank may be empty.
    #[inline]
    pub const fn valid_bank_mask(&self) -> u64 {
        self.valid_bank_mask
    }

    /// The listed words.
    #[inline]
    pub const fn banks(&self) -> &'a [u64] {
        self.banks
    }

    /// True when the set names the VP index.
    #[inline]
    pub fn contains(&self, vp_index: u32) -> bool {
        let bank = vp_index / VPS_PER_BANK;
        if vp_index >= MAX_VP_INDEX || self.valid_bank_mask >> bank & 1 == 0 {
            return false;
        }
        let below = self.valid_bank_mask & (1u64 << bank).wrapping_sub(1);
        match self.banks.get(below.count_ones() as usize) {
            Some(word) => word >> (vp_index % VPS_PER_BANK) & 1 != 0,
            None => false,
        }
    }

    /// The number of VP indexes in the set.
    #[inline]
    pub fn count(&self) -> u32 {
        self.banks.iter().fold(0u32, |n, word| n.wrapping_add(word.count_ones()))
    }

    /// Bank number and word of each listed bank, ascending.
    #[inline]
    pub fn iter_banks(&self) -> BankIter<'a> {
        BankIter { mask: self.valid_bank_mask, banks: self.banks.iter() }
    }

    /// The VP indexes in the set, ascending, in time proportional to the listed banks and the indexes.
    #[inline]
    pub fn iter(&self) -> VpSetIter<'a> {
        VpSetIter { banks: self.iter_banks(), base: 0, word: 0 }
    }
}

impl<'a> IntoIterator for SparseVpSet<'a> {
    type Item = u32;
    type IntoIter = VpSetIter<'a>;
    fn into_iter(self) -> VpSetIter<'a> {
        self.iter()
    }
}

/// Iterator over listed banks: `(bank number, word)`.
#[derive(Clone, Debug)]
pub struct BankIter<'a> {
    mask: u64,
    banks: core::slice::Iter<'a, u64>,
}

impl Iterator for BankIter<'_> {
    type Item = (u32, u64);

    #[inline]
    fn next(&mut self) -> Option<(u32, u64)> {
        let word = *self.banks.next()?;
        let bank = self.mask.trailing_zeros();
        self.mask &= self.mask.wrapping_sub(1);
        Some((bank, word))
    }
}

/// Iterator over the VP indexes of a sparse set.
#[derive(Clone, Debug)]
pub struct VpSetIter<'a> {
    banks: BankIter<'a>,
    base: u32,
    word: u64,
}

impl Iterator for VpSetIter<'_> {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        while self.word == 0 {
            let (bank, word) = self.banks.next()?;
            self.base = bank.wrapping_mul(VPS_PER_BANK);
            self.word = word;
        }
        let bit = self.word.trailing_zeros();
        self.word &= self.word.wrapping_sub(1);
        Some(self.base.wrapping_add(bit))
    }
}

/// Which VPs a call names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VpSet<'a> {
    /// All VPs of the partition (of the caller's VM, for a call from L2).
    All,
    /// The VPs of a sparse set.
    Sparse(SparseVpSet<'a>),
}

impl VpSet<'_> {
    /// True when the set names the VP index; [`VpSet::All`] names every one, also those at or above 4,096.
    #[inline]
    pub fn contains(&self, vp_index: u32) -> bool {
        match self {
            Self::All => true,
            Self::Sparse(set) => set.contains(vp_index),
        }
    }
}
