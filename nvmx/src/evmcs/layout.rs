//! The fields of the page and where they lie, as code: made of the one list in `tlfs_abi::evmcs` and of the field table.
//!
//! Used by L0's half. Every function here is straight-line code over the fields that its constants choose.

use tlfs_abi::evmcs::{CleanFields, EnlightenedVmcs, EvmcsUse, FIELDS};

use crate::field::{Encoding, Field};
use crate::vmcs12::Vmcs12;

/// Number of clean-field groups.
pub(super) const GROUPS: usize = 16;

/// The words of 8 bytes that hold the fields of each group, as bits: bit 0 is offset 0.
pub(super) static GROUP_WORDS: [u128; GROUPS] = {
    let mut all = [0; GROUPS];
    let mut left: &mut [u128] = &mut all;
    let mut group = 1u32;
    while let [words, others @ ..] = left {
        let mut rest = FIELDS;
        while let [field, tail @ ..] = rest {
            rest = tail;
            if let EvmcsUse::Group(of) = field.used
                && of == group
                && let Some(encoding) = field.encoding
                && Field::from_encoding(Encoding(encoding)).is_some()
            {
                *words |= 1u128.wrapping_shl((field.offset >> 3) as u32);
            }
        }
        group = group.wrapping_shl(1);
        left = others;
    }
    all
};

macro_rules! take {
    ($group:ident, $image:ident, $vmcs12:ident, $field:ident, -) => {};
    ($group:ident, $image:ident, $vmcs12:ident, $field:ident, $encoding:literal READ_ONLY) => {};
    ($group:ident, $image:ident, $vmcs12:ident, $field:ident, $encoding:literal $of:ident) => {
        if let Some(field) = const { Field::from_encoding(Encoding($encoding)) }
            && $group == CleanFields::$of
        {
            $vmcs12.set(field, u64::from($image.$field));
        }
    };
}

macro_rules! put {
    ($from:ident, $to:ident, $differ:ident, $image:ident, $vmcs12:ident, $offset:literal, $field:ident, -) => {};
    (
        $from:ident, $to:ident, $differ:ident, $image:ident, $vmcs12:ident,
        $offset:literal, $field:ident, $encoding:literal $of:ident
    ) => {
        if let Some(field) = const { Field::from_encoding(Encoding($encoding)) }
            && $from <= $offset
            && $offset < $to
        {
            let value = $vmcs12.get(field);
            $differ |= u64::from($image.$field) ^ value;
            // Nothing is cut: the VMCS12 holds a field's own width.
            $image.$field = value as _;
        }
    };
}

macro_rules! transfers {
    ($($offset:literal $field:ident: $ty:ty, $name:ident, $encoding:tt $($group:ident)?;)*) => {
        /// Copies the fields of the group with the mask `GROUP` (0: those that are always live) to the VMCS12.
        #[inline]
        pub(super) fn take<const GROUP: u32>(image: &EnlightenedVmcs, vmcs12: &mut Vmcs12) {
            $(take!(GROUP, image, vmcs12, $field, $encoding $($group)?);)*
        }

        /// Copies the fields at offsets from `FROM` to below `TO` from the VMCS12. True when one was another there.
        #[inline]
        pub(super) fn put<const FROM: usize, const TO: usize>(image: &mut EnlightenedVmcs, vmcs12: &Vmcs12) -> bool {
            let mut differ = 0;
            $(put!(FROM, TO, differ, image, vmcs12, $offset, $field, $encoding $($group)?);)*
            differ != 0
        }
    };
}

tlfs_abi::each_evmcs_field!(transfers);

/// [`take`] for the groups in `changed`.
#[inline]
pub(super) fn take_groups(image: &EnlightenedVmcs, changed: u32, vmcs12: &mut Vmcs12) {
    macro_rules! each {
        ($($group:ident)*) => {
            $(if changed & CleanFields::$group != 0 {
                take::<{ CleanFields::$group }>(image, vmcs12);
            })*
        };
    }
    each!(IO_BITMAP MSR_BITMAP CONTROL_GRP2 CONTROL_GRP1 CONTROL_PROC CONTROL_EVENT CONTROL_ENTRY CONTROL_EXCPN);
    each!(CRDR CONTROL_XLAT GUEST_BASIC GUEST_GRP1 GUEST_GRP2 HOST_POINTER HOST_GRP1);
}
