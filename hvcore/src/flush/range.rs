//! Ranges on their way through a queue: one word each, and what a VP makes of them. Used by this folder; uses
//! `tlfs-abi`.
//!
//! A queued GVA range is the list entry as the guest wrote it, with the format in bit 62. That bit is free because only
//! ranges whose first byte is canonical for 57 bits are queued, and there bits 62:57 repeat bit 63. Bit 61 is always
//! set, so that no entry is zero, and likewise restored from bit 63.

use super::mutant::{self, Mutant};
use tlfs_abi::flush::{GvaSpan, RangeFormat};

const FORMAT: u64 = 1 << 62;
const PRESENT: u64 = 1 << 61;

/// Width of linear addresses: what counts as canonical.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum GvaWidth {
    /// 4-level paging: bits 63:48 repeat bit 47.
    #[default]
    Bits48,
    /// 5-level paging: bits 63:57 repeat bit 56.
    Bits57,
}

impl GvaWidth {
    /// First address above the lower canonical half.
    const fn hole_start(self) -> u64 {
        match self {
            Self::Bits48 => 1 << 47,
            Self::Bits57 => 1 << 56,
        }
    }

    /// First address of the upper canonical half.
    const fn hole_end(self) -> u64 {
        self.hole_start().wrapping_neg()
    }

    /// True when the address is canonical.
    #[inline]
    pub const fn is_canonical(self, gva: u64) -> bool {
        gva < self.hole_start() || gva >= self.hole_end()
    }
}

/// What a range is worth in an address space of a certain width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clipped {
    /// No byte of it is canonical: the TLFS has it ignored.
    Nothing,
    /// This part of it, all canonical, not past the end of 64 bits.
    Span(GvaSpan),
    /// Too odd for a span: it begins in the hole and reaches out of it, or wraps around. Flush everything.
    Odd,
}

/// `span` in an address space of `width`.
pub(super) fn clip(span: GvaSpan, width: GvaWidth) -> Clipped {
    let Some(bytes) = span.pages.checked_mul(span.page_size) else { return Clipped::Odd };
    // `bytes` is at least a page: the last byte is at `start + bytes - 1`.
    let Some(last) = span.start.checked_add(bytes.wrapping_sub(1)) else { return Clipped::Odd };
    let (start_ok, last_ok) = (width.is_canonical(span.start), width.is_canonical(last));
    let lower = span.start < width.hole_start();
    match (start_ok, last_ok) {
        (true, true) if lower == (last < width.hole_start()) => Clipped::Span(span),
        // From the lower half through the hole into the upper one: no format is that long, but over-flushing is legal.
        (true, true) | (false, true) => Clipped::Odd,
        (true, false) => {
            let room = width.hole_start().wrapping_sub(span.start);
            let pages = room.div_ceil(span.page_size.max(1));
            Clipped::Span(GvaSpan { pages, ..span })
        }
        (false, false) => Clipped::Nothing,
    }
}

/// How a list entry goes into a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packed {
    /// Not at all: no byte of it is canonical.
    Nothing,
    /// As this non-zero word.
    Word(u64),
    /// As "everything".
    Everything,
}

/// Packs the list entry `raw` of `format`.
#[inline]
pub(super) fn pack(raw: u64, format: RangeFormat) -> Packed {
    if GvaWidth::Bits57.is_canonical(raw) {
        let format = if matches!(format, RangeFormat::Extended) { FORMAT } else { 0 };
        return Packed::Word(raw & !FORMAT | format | PRESENT);
    }
    match clip(format.span(raw), GvaWidth::Bits57) {
        Clipped::Nothing => Packed::Nothing,
        _ => Packed::Everything,
    }
}

/// The span that a packed word stands for.
#[inline]
pub(super) fn unpack(word: u64) -> GvaSpan {
    let format = if word & FORMAT != 0 { RangeFormat::Extended } else { RangeFormat::Normal };
    let sign = word & 1 << 63;
    let raw = word & !(FORMAT | PRESENT) | sign >> 1 | sign >> 2;
    let mut span = format.span(raw);
    if mutant::active(Mutant::OnePageShort) {
        span.pages = span.pages.saturating_sub(1);
    }
    span
}

/// What a second-stage request is about: two words in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondStageItem {
    /// All that derives from the second-stage root at this L1 GPA (page-aligned: nCR3 or EPTP without its low bits).
    Root(u64),
    /// What translates the L2 GPAs of the span through this root.
    RootRange {
        /// L1 GPA of the root, page-aligned.
        root: u64,
        /// L2 GPA of the first page, page-aligned.
        first: u64,
        /// Number of 4 KiB pages, at least 1.
        pages: u64,
    },
    /// What ends in these pages of L1's memory, by whatever root: the embedder is about to change them.
    L1Range {
        /// L1 GPA of the first page, page-aligned.
        first: u64,
        /// Number of 4 KiB pages, 1 to 4,096.
        pages: u64,
    },
}

const PAGE_BITS: u64 = 0xFFF;
const KIND_ROOT: u64 = 1;
const KIND_RANGE: u64 = 2;
const KIND_L1: u64 = 3;

impl SecondStageItem {
    /// Two words; the first is page-aligned but for its low two bits, and not zero there.
    #[inline]
    pub(super) const fn pack(self) -> (u64, u64) {
        match self {
            Self::Root(root) => (root & !PAGE_BITS | KIND_ROOT, 0),
            Self::RootRange { root, first, pages } => {
                (root & !PAGE_BITS | KIND_RANGE, first & !PAGE_BITS | pages.wrapping_sub(1) & PAGE_BITS)
            }
            Self::L1Range { first, pages } => (KIND_L1, first & !PAGE_BITS | pages.wrapping_sub(1) & PAGE_BITS),
        }
    }

    /// The item of two packed words.
    #[inline]
    pub(super) const fn unpack(tag: u64, range: u64) -> Self {
        let first = range & !PAGE_BITS;
        let pages = (range & PAGE_BITS).wrapping_add(1);
        match tag & 0b11 {
            KIND_RANGE => Self::RootRange { root: tag & !PAGE_BITS, first, pages },
            KIND_L1 => Self::L1Range { first, pages },
            _ => Self::Root(tag & !PAGE_BITS),
        }
    }
}
