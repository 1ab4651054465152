//! Which processors an operation is for, and the set that names them. Used by the operations of `client`.

use super::UseNative;
use tlfs_abi::vp_set::{MAX_BANKS, MAX_VP_INDEX, VPS_PER_BANK};

/// The processors that an operation is for.
#[derive(Clone, Debug)]
pub enum Targets<I> {
    /// Every processor that is online, the caller's included.
    All,
    /// These VP indexes; `None` where a processor's VP index is not yet known.
    Only(I),
}

/// The targets as the host is told of them.
pub(super) enum TargetSet<'a> {
    /// The all-processors flag, or the set format "all".
    All,
    /// VP indexes 0 to 63 only.
    Mask(u64),
    /// At least one VP index of 64 or above.
    Sparse(&'a Banks),
}

/// A sparse set: the words of the banks in `mask`; the other words are zero.
pub(super) struct Banks {
    pub(super) mask: u64,
    words: [u64; MAX_BANKS],
}

impl Banks {
    pub(super) const fn new() -> Self {
        Self { mask: 0, words: [0; MAX_BANKS] }
    }

    pub(super) fn len(&self) -> usize {
        self.mask.count_ones() as usize
    }

    /// The words of the listed banks, ascending; none is empty.
    pub(super) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().copied().filter(|word| *word != 0)
    }

    fn insert(&mut self, vp_index: u32) {
        let bank = vp_index / VPS_PER_BANK;
        if let Some(word) = self.words.get_mut(bank as usize) {
            *word |= 1u64.wrapping_shl(vp_index % VPS_PER_BANK);
            self.mask |= 1u64.wrapping_shl(bank);
        }
    }
}

impl<'a> TargetSet<'a> {
    /// Collects the targets in `banks`, which is new; `Ok(None)` when they are none at all.
    pub(super) fn collect<I: Iterator<Item = Option<u32>>>(
        targets: Targets<I>,
        ex_sets: bool,
        banks: &'a mut Banks,
    ) -> Result<Option<Self>, UseNative> {
        let Targets::Only(indexes) = targets else { return Ok(Some(Self::All)) };
        let limit = if ex_sets { MAX_VP_INDEX } else { VPS_PER_BANK };
        for index in indexes {
            let index = index.ok_or(UseNative::UnknownVpIndex)?;
            if index >= limit {
                return Err(UseNative::UnnameableVpIndex);
            }
            banks.insert(index);
        }
        Ok(match (banks.mask, banks.words.first()) {
            (0, _) => None,
            (1, Some(mask)) => Some(Self::Mask(*mask)),
            _ => Some(Self::Sparse(banks)),
        })
    }
}
