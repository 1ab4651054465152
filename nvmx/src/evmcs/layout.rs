//! The page's layout as tables: which fields a clean-field group has and where, made of `tlfs_abi::evmcs::FIELDS` and
//! the field table at compile time.
//!
//! Used by both halves of this module; uses `field`.

use tlfs_abi::evmcs::{CleanFields, EvmcsUse, FIELDS};

use crate::field::{Encoding, Field};

/// Number of clean-field groups.
pub const GROUPS: usize = 16;

/// A field of the VMCS12 and its place in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The field.
    pub field: Field,
    /// Byte offset in the page, a multiple of `size`.
    pub offset: u16,
    /// Size in bytes: 2, 4 or 8.
    pub size: u8,
}

/// How many fields of the layout the field table knows with this use; a mask of zero asks for any group.
const fn count(used: EvmcsUse) -> usize {
    let mut number = 0usize;
    let mut rest = FIELDS;
    while let [field, tail @ ..] = rest {
        rest = tail;
        if is(field.used, used) && known(field.encoding).is_some() {
            number = number.wrapping_add(1);
        }
    }
    number
}

const fn is(used: EvmcsUse, asked: EvmcsUse) -> bool {
    match (used, asked) {
        (EvmcsUse::Group(group), EvmcsUse::Group(asked)) => group == asked,
        (EvmcsUse::ReadOnly, EvmcsUse::ReadOnly) => true,
        _ => false,
    }
}

const fn known(encoding: Option<u32>) -> Option<Field> {
    match encoding {
        Some(encoding) => Field::from_encoding(Encoding(encoding)),
        None => None,
    }
}

/// The places of all fields with this use, in the order of offsets.
const fn places<const N: usize>(used: EvmcsUse) -> [Place; N] {
    let mut places = [Place { field: Field::GuestRip, offset: 0, size: 8 }; N];
    let mut left: &mut [Place] = &mut places;
    let mut rest = FIELDS;
    while let [field, tail @ ..] = rest {
        rest = tail;
        if !is(field.used, used) {
            continue;
        }
        if let Some(known) = known(field.encoding)
            && let [place, others @ ..] = left
        {
            *place = Place { field: known, offset: field.offset, size: field.size };
            left = others;
        }
    }
    places
}

macro_rules! groups {
    ($($name:ident),*) => {
        /// The fields of each group, by the number of its clean bit. The last (ENLIGHTENMENTSCONTROL) has none that is a
        /// VMCS field.
        pub static GROUP_FIELDS: [&[Place]; GROUPS] = [$({
            const USED: EvmcsUse = EvmcsUse::Group(CleanFields::$name);
            const N: usize = count(USED);
            const PLACES: [Place; N] = places(USED);
            &PLACES
        }),*];
    };
}

groups!(
    IO_BITMAP,
    MSR_BITMAP,
    CONTROL_GRP2,
    CONTROL_GRP1,
    CONTROL_PROC,
    CONTROL_EVENT,
    CONTROL_ENTRY,
    CONTROL_EXCPN,
    CRDR,
    CONTROL_XLAT,
    GUEST_BASIC,
    GUEST_GRP1,
    GUEST_GRP2,
    HOST_POINTER,
    HOST_GRP1,
    ENLIGHTENMENTSCONTROL
);

/// The fields that are read at every entry.
pub static LIVE_FIELDS: [Place; count(EvmcsUse::Group(CleanFields::NONE))] = places(EvmcsUse::Group(CleanFields::NONE));

/// Exit information: the fields that L0 writes and never reads.
pub static EXIT_FIELDS: [Place; count(EvmcsUse::ReadOnly)] = places(EvmcsUse::ReadOnly);

/// The words of 8 bytes that a place touches, as bits of a number: bit 0 is offset 0.
const fn word(offset: u16) -> u128 {
    1u128.wrapping_shl((offset >> 3) as u32)
}

/// The words of 8 bytes that hold the fields of each group.
pub(super) static GROUP_WORDS: [u128; GROUPS] = {
    let mut all = [0; GROUPS];
    let mut left: &mut [u128] = &mut all;
    let mut group = 1u32;
    while let [words, others @ ..] = left {
        let mut rest = FIELDS;
        while let [field, tail @ ..] = rest {
            rest = tail;
            if is(field.used, EvmcsUse::Group(group)) && known(field.encoding).is_some() {
                *words |= word(field.offset);
            }
        }
        group = group.wrapping_shl(1);
        left = others;
    }
    all
};

/// What an exit writes: the ranges of the page, byte-exact, and the fields in each. Between them lies what is L1's alone.
pub(super) struct StoreRange {
    /// First byte.
    pub(super) start: u16,
    /// The byte after the last.
    pub(super) end: u16,
    /// The fields there.
    pub(super) fields: &'static [Place],
    /// Exit information is among them, which is never read: what memory has is not known.
    pub(super) always: bool,
}

const fn count_in(start: u16, end: u16) -> usize {
    let mut number = 0usize;
    let mut rest = FIELDS;
    while let [field, tail @ ..] = rest {
        rest = tail;
        if start <= field.offset && field.offset < end && known(field.encoding).is_some() {
            number = number.wrapping_add(1);
        }
    }
    number
}

const fn places_in<const N: usize>(start: u16, end: u16) -> [Place; N] {
    let mut places = [Place { field: Field::GuestRip, offset: 0, size: 8 }; N];
    let mut left: &mut [Place] = &mut places;
    let mut rest = FIELDS;
    while let [field, tail @ ..] = rest {
        rest = tail;
        if !(start <= field.offset && field.offset < end) {
            continue;
        }
        if let Some(known) = known(field.encoding)
            && let [place, others @ ..] = left
        {
            *place = Place { field: known, offset: field.offset, size: field.size };
            left = others;
        }
    }
    places
}

macro_rules! store_ranges {
    ($($start:literal..$end:literal $($always:ident)?,)*) => {
        pub(super) static STORE_RANGES: &[StoreRange] = &[$({
            const PLACES: [Place; count_in($start, $end)] = places_in($start, $end);
            StoreRange { start: $start, end: $end, fields: &PLACES, always: stringify!($($always)?).len() > 0 }
        }),*];
    };
}

store_ranges! {
    // Segments and descriptor tables.
    0x080..0x128,
    // DEBUGCTL to SYSENTER_CS.
    0x1A8..0x200,
    // CR0, CR3, CR4, DR7.
    0x220..0x240,
    // Exit information, RSP, RFLAGS, interruptibility.
    0x2A8..0x314 always,
    // Entry controls (IA-32e mode guest follows EFER.LMA) and the event, which is no longer valid.
    0x31C..0x324,
    // RIP.
    0x330..0x338,
    // BNDCFGS.
    0x380..0x388,
}
