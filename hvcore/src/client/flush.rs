//! Flushing GVA translations on other processors: which of the four calls, which convention, how the ranges pack.

use super::{
    Banks, Convention, HostOffer, HypercallPort, INPUT_WORDS, InputWords, TargetSet, Targets, UseNative, issue,
};
use tlfs_abi::flush::{FlushFlags, GvaRange, GvaSpan};
use tlfs_abi::hypercall::{CallCode, HypercallInput};
use tlfs_abi::vp_set::VpSetFormat;

/// What is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushScope<'a> {
    /// The whole address space.
    Space {
        /// Keep mappings that are marked global.
        non_global_only: bool,
    },
    /// These spans of pages, of any page size; the host flushes a large page whole when any byte of it is named.
    Spans(&'a [GvaSpan]),
}

/// Flushes `scope` of `address_space` on `targets`.
///
/// `address_space` is CR3 without its PCID, or `None` for all address spaces. When this returns `Ok`, no target uses
/// a translation of the scope that was cached before the call. With no targets at all there is nothing to do, and
/// nothing is done.
pub fn flush<P, I>(
    port: &mut P,
    offer: &HostOffer,
    address_space: Option<u64>,
    targets: Targets<I>,
    scope: FlushScope<'_>,
) -> Result<(), UseNative>
where
    P: HypercallPort + ?Sized,
    I: Iterator<Item = Option<u32>>,
{
    if !offer.remote_flush {
        return Err(UseNative::NotOffered);
    }
    let mut banks = Banks::new();
    let Some(set) = TargetSet::collect(targets, offer.ex_sets, &mut banks)? else { return Ok(()) };
    let (space, mut flags) = match address_space {
        Some(space) => (space, 0),
        None => (0, FlushFlags::ALL_VIRTUAL_ADDRESS_SPACES),
    };
    let header_words = match &set {
        TargetSet::All => {
            flags |= FlushFlags::ALL_PROCESSORS;
            3
        }
        TargetSet::Mask(_) => 3,
        TargetSet::Sparse(banks) => banks.len().wrapping_add(4),
    };
    let entries = match scope {
        FlushScope::Spans(spans) => count_entries(spans, INPUT_WORDS.wrapping_sub(header_words)),
        FlushScope::Space { .. } => None,
    };
    match entries {
        Some(0) => return Ok(()),
        Some(_) => {}
        None => {
            if let FlushScope::Space { non_global_only: true } = scope {
                flags |= FlushFlags::NON_GLOBAL_ONLY;
            }
        }
    }
    let input = call(&set, entries);
    let words = header_words.wrapping_add(entries.unwrap_or(0));
    issue(port, Convention::for_words(offer, words), input, |out| {
        out.push(space);
        out.push(flags);
        match &set {
            TargetSet::All => out.push(0),
            TargetSet::Mask(mask) => out.push(*mask),
            TargetSet::Sparse(banks) => {
                out.push(VpSetFormat::SPARSE_4K.0);
                out.push(banks.mask);
                banks.words().for_each(|word| out.push(word));
            }
        }
        if let (Some(_), FlushScope::Spans(spans)) = (entries, scope) {
            push_entries(spans, out);
        }
    })
}

/// The input value: the call code, the variable header and the reps.
fn call(set: &TargetSet<'_>, entries: Option<usize>) -> HypercallInput {
    let (code, banks) = match (set, entries) {
        (TargetSet::Sparse(banks), None) => (CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX, banks.len()),
        (TargetSet::Sparse(banks), Some(_)) => (CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX, banks.len()),
        (_, None) => (CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE, 0),
        (_, Some(_)) => (CallCode::FLUSH_VIRTUAL_ADDRESS_LIST, 0),
    };
    HypercallInput::new(code).with_variable_header_size(banks as u16).with_reps(entries.unwrap_or(0) as u16, 0)
}

/// The 4 KiB pages that a span covers: first byte and number.
fn small_pages(span: &GvaSpan) -> (u64, u64) {
    (span.start & !0xFFF, span.pages.saturating_mul(span.page_size >> 12))
}

/// List entries that the spans need; `None` when they are more than `capacity` and the space is flushed instead.
fn count_entries(spans: &[GvaSpan], capacity: usize) -> Option<usize> {
    let mut entries = 0u64;
    for span in spans {
        let (_, pages) = small_pages(span);
        entries = entries.saturating_add(pages.div_ceil(GvaRange::MAX_PAGES));
        if entries > capacity as u64 {
            return None;
        }
    }
    Some(entries as usize)
}

/// Writes the entries that `count_entries` counted.
fn push_entries(spans: &[GvaSpan], out: &mut InputWords<'_>) {
    for span in spans {
        let (mut start, mut pages) = small_pages(span);
        while pages > 0 {
            let now = pages.min(GvaRange::MAX_PAGES);
            out.push(GvaRange::new(start, now).raw());
            start = start.wrapping_add(now << 12);
            pages = pages.saturating_sub(now);
        }
    }
}
