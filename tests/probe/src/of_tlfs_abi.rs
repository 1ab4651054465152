//! The generic functions of `tlfs-abi`.

use crate::keep_named;
use tlfs_abi::vp_set::{BankIter, SparseVpSet, VpSetIter};

/// Keeps them all.
pub fn keep_all() {
    keep_named! {
        "tlfs_abi::vp_set::BankIter as Iterator": <BankIter as Iterator>::next;
        "tlfs_abi::vp_set::SparseVpSet as IntoIterator": <SparseVpSet as IntoIterator>::into_iter;
        "tlfs_abi::vp_set::VpSetIter as Iterator": <VpSetIter as Iterator>::next;
    }
}
