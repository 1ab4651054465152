//! Telling the host that second-level tables changed: the GPA flush calls, for a hypervisor's own EPT or NPT.

use super::{Convention, HostOffer, HypercallPort, INPUT_WORDS, UseNative, issue};
use tlfs_abi::hypercall::{CallCode, HypercallInput};

/// Pages that one entry of the list can cover, in the layout that hosts read both ways.
const MAX_PAGES: u64 = 2048;
/// Words before the list.
const HEADER_WORDS: usize = 2;

/// Guest pages whose second-level mapping changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaSpan {
    /// First byte; bits 11:0 are ignored.
    pub start: u64,
    /// Number of 4 KiB pages.
    pub pages: u64,
}

/// Flushes what processors hold of the second-level address space `root`: only `spans`, or all of it when there are
/// more than fit in one call (`None` asks for all).
///
/// `root` is the address of the root table without its low bits. The call reaches every processor.
pub fn flush_guest_physical<P: HypercallPort + ?Sized>(
    port: &mut P,
    offer: &HostOffer,
    root: u64,
    spans: Option<&[GpaSpan]>,
) -> Result<(), UseNative> {
    if !offer.guest_physical_flush {
        return Err(UseNative::NotOffered);
    }
    let Some((spans, entries)) = spans.and_then(|spans| Some((spans, count_entries(spans)?))) else {
        let input = HypercallInput::new(CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE);
        return issue(port, Convention::Fast, input, |out| out.push(root));
    };
    if entries == 0 {
        return Ok(());
    }
    let input = HypercallInput::new(CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST).with_reps(entries as u16, 0);
    issue(port, Convention::Memory, input, |out| {
        out.push(root);
        out.push(0);
        for span in spans {
            let mut start = span.start & !0xFFF;
            let mut pages = span.pages;
            while pages > 0 {
                let now = pages.min(MAX_PAGES);
                out.push(start | now.wrapping_sub(1));
                start = start.wrapping_add(now << 12);
                pages = pages.saturating_sub(now);
            }
        }
    })
}

fn count_entries(spans: &[GpaSpan]) -> Option<usize> {
    let entries = spans.iter().fold(0u64, |n, span| n.saturating_add(span.pages.div_ceil(MAX_PAGES)));
    (entries <= INPUT_WORDS.wrapping_sub(HEADER_WORDS) as u64).then_some(entries as usize)
}
