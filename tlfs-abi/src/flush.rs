//! Flush flags, GVA and GPA ranges, and the fixed inputs of the flush hypercalls (TLFS, "Virtual MMU").
//!
//! Used by the intake, the flush engine and the client; uses nothing.

use bitfield::bitfield;
use static_assertions::{const_assert, const_assert_eq};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

bitfield! {
    /// HV_FLUSH_FLAGS, 64 bits.
    #[derive(Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(transparent)]
    pub struct FlushFlags(u64);
    impl Debug;
    /// Bit 0: all processors; the mask or set is ignored.
    pub all_processors, set_all_processors: 0;
    /// Bit 1: all virtual address spaces; the address space is ignored.
    pub all_virtual_address_spaces, set_all_virtual_address_spaces: 1;
    /// Bit 2: only non-global mappings. Invalid for a list.
    pub non_global_only, set_non_global_only: 2;
    /// Bit 3: the list's entries are [`ExtendedGvaRange`]s.
    pub extended_range_format, set_extended_range_format: 3;
}

impl FlushFlags {
    /// Bit 0 as a mask.
    pub const ALL_PROCESSORS: u64 = 1 << 0;
    /// Bit 1 as a mask.
    pub const ALL_VIRTUAL_ADDRESS_SPACES: u64 = 1 << 1;
    /// Bit 2 as a mask.
    pub const NON_GLOBAL_ONLY: u64 = 1 << 2;
    /// Bit 3 as a mask.
    pub const EXTENDED_RANGE_FORMAT: u64 = 1 << 3;
    /// Bits 63:4: must be zero.
    pub const RESERVED: u64 = !0xF;

    /// The raw value as flags.
    #[inline]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw value.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

/// How the entries of a flush list are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeFormat {
    /// HV_GVA_RANGE: bits 63:12 page, bits 11:0 additional 4 KiB pages.
    Normal,
    /// HV_GVA_RANGE_EXTENDED: bits 10:0 additional pages, bit 11 large.
    Extended,
}

bitfield! {
    /// HV_GVA_RANGE: one list entry, 1 to 4,096 pages of 4 KiB.
    #[derive(Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(transparent)]
    pub struct GvaRange(u64);
    impl Debug;
    u64;
    /// Bits 11:0: pages beyond the first.
    pub additional_pages, set_additional_pages: 11, 0;
    /// Bits 63:12: the first page's number.
    pub page_number, set_page_number: 63, 12;
}

bitfield! {
    /// HV_GVA_RANGE_EXTENDED: one list entry, 1 to 2,048 pages of 4 KiB, 2 MiB or 1 GiB.
    #[derive(Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(transparent)]
    pub struct ExtendedGvaRange(u64);
    impl Debug;
    u64;
    /// Bits 10:0: pages of the entry's size beyond the first.
    pub additional_pages, set_additional_pages: 10, 0;
    /// Bit 11: the pages are larger than 4 KiB.
    pub large_page, set_large_page: 11;
    /// Bits 63:12, when bit 11 is clear: the first page's number.
    pub page_number, set_page_number: 63, 12;
    /// Bit 12, when bit 11 is set: 1 for 1 GiB, 0 for 2 MiB.
    pub page_size_1g, set_page_size_1g: 12;
    /// Bits 20:13, when bit 11 is set: reserved.
    pub reserved, set_reserved: 20, 13;
    /// Bits 63:21, when bit 11 is set: the first page's number in units of 2 MiB.
    pub large_page_number, set_large_page_number: 63, 21;
}

/// What a list entry covers: `pages` pages of `page_size` bytes from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GvaSpan {
    /// First byte. Not checked to be canonical.
    pub start: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// Bytes in a page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
}

impl GvaRange {
    /// Pages that one entry can cover.
    pub const MAX_PAGES: u64 = 4096;

    /// The entry for `pages` pages (1 to 4,096; the low 12 bits of `pages - 1` are kept) from the page of `start` on.
    #[inline]
    pub const fn new(start: u64, pages: u64) -> Self {
        Self(start & !0xFFF | pages.wrapping_sub(1) & 0xFFF)
    }

    /// The raw entry.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A raw entry.
    #[inline]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// What the entry covers.
    #[inline]
    pub const fn span(self) -> GvaSpan {
        GvaSpan { start: self.0 & !0xFFF, pages: (self.0 & 0xFFF).wrapping_add(1), page_size: 4096 }
    }
}

impl ExtendedGvaRange {
    /// The raw entry.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A raw entry.
    #[inline]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// What the entry covers. Reserved bits are ignored; the start of 1 GiB pages is rounded down to 1 GiB.
    #[inline]
    pub const fn span(self) -> GvaSpan {
        let pages = (self.0 & 0x7FF).wrapping_add(1);
        if self.0 & 1 << 11 == 0 {
            GvaSpan { start: self.0 & !0xFFF, pages, page_size: 4096 }
        } else if self.0 & 1 << 12 == 0 {
            GvaSpan { start: self.0 & !0x1F_FFFF, pages, page_size: 1 << 21 }
        } else {
            GvaSpan { start: self.0 & !0x3FFF_FFFF, pages, page_size: 1 << 30 }
        }
    }
}

impl RangeFormat {
    /// What the raw list entry `raw` covers in this format.
    #[inline]
    pub const fn span(self, raw: u64) -> GvaSpan {
        match self {
            Self::Normal => GvaRange(raw).span(),
            Self::Extended => ExtendedGvaRange(raw).span(),
        }
    }
}

/// What a list entry of HvCallFlushGuestPhysicalAddressList covers: `pages` pages of `page_size` bytes from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaSpan {
    /// First byte.
    pub start: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// Bytes in a page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
}

/// One list entry of HvCallFlushGuestPhysicalAddressList.
///
/// The TLFS gives bits 11:0 to the count of additional 4 KiB pages; callers in the field use the layout of
/// [`ExtendedGvaRange`]. The two agree while bit 11 is clear. When it is set, who flushes what both readings name has
/// flushed what the caller meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct FlushGpaRange(pub u64);

impl FlushGpaRange {
    /// Pages that one entry can cover in both readings alike.
    pub const MAX_PAGES: u64 = 2048;

    /// The entry for `pages` 4 KiB pages (1 to 2,048; the low 11 bits of `pages - 1` are kept) from the page of `start`
    /// on. Both readings agree on it.
    #[inline]
    pub const fn new(start: u64, pages: u64) -> Self {
        Self(start & !0xFFF | pages.wrapping_sub(1) & 0x7FF)
    }

    /// True when the two readings differ.
    #[inline]
    pub const fn is_ambiguous(self) -> bool {
        self.0 & 1 << 11 != 0
    }

    /// The TLFS's reading: bits 11:0 additional 4 KiB pages.
    #[inline]
    pub const fn tlfs_span(self) -> GpaSpan {
        let GvaSpan { start, pages, page_size } = GvaRange(self.0).span();
        GpaSpan { start, pages, page_size }
    }

    /// The extended reading: bits 10:0 additional pages, bit 11 large pages.
    #[inline]
    pub const fn extended_span(self) -> GpaSpan {
        let GvaSpan { start, pages, page_size } = ExtendedGvaRange(self.0).span();
        GpaSpan { start, pages, page_size }
    }
}

/// Fixed input of HvCallFlushVirtualAddressSpace and HvCallFlushVirtualAddressList; the list's GVA ranges follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushVirtualAddress {
    /// The address space: CR3 as the caller's processors hold it.
    pub address_space: u64,
    /// Which processors, spaces and mappings.
    pub flags: FlushFlags,
    /// Bit n: the VP with index n.
    pub processor_mask: u64,
}

/// Fixed input of HvCallFlushVirtualAddressSpaceEx and HvCallFlushVirtualAddressListEx; the set's banks follow as the
/// variable header, then the list's GVA ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushVirtualAddressEx {
    /// The address space: CR3 as the caller's processors hold it.
    pub address_space: u64,
    /// Which processors, spaces and mappings.
    pub flags: FlushFlags,
    /// HV_VP_SET, its fixed part.
    pub vp_set: crate::vp_set::VpSetHeader,
}

/// Fixed input of HvCallFlushGuestPhysicalAddressSpace and HvCallFlushGuestPhysicalAddressList; the list's GPA ranges
/// follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushGuestPhysicalAddress {
    /// The second-level address space: the EPT pointer on Intel, nCR3 on AMD.
    pub address_space: u64,
    /// Must be zero.
    pub flags: u64,
}

const_assert_eq!(size_of::<FlushVirtualAddress>(), 24);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddress, address_space), 0);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddress, flags), 8);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddress, processor_mask), 16);
const_assert_eq!(size_of::<FlushVirtualAddressEx>(), 32);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddressEx, address_space), 0);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddressEx, flags), 8);
const_assert_eq!(core::mem::offset_of!(FlushVirtualAddressEx, vp_set), 16);
const_assert_eq!(size_of::<FlushGuestPhysicalAddress>(), 16);
const_assert_eq!(core::mem::offset_of!(FlushGuestPhysicalAddress, address_space), 0);
const_assert_eq!(core::mem::offset_of!(FlushGuestPhysicalAddress, flags), 8);
const_assert!(size_of::<FlushGpaRange>() == 8);
const_assert!(size_of::<GvaRange>() == 8 && size_of::<ExtendedGvaRange>() == 8);
