//! GVA ranges as page numbers, one by one.

/// The 4 KiB page numbers that a list entry covers, wrapping at the end of the address space. Large pages of the
/// extended format are broken up, so an entry can cover millions: see `limit`.
///
/// Gives up with `None` beyond `limit` pages.
pub fn pages(entry: u64, extended: bool, limit: usize) -> Option<Vec<u64>> {
    const TOP: u64 = (1 << 52) - 1;
    let bit = |n: u32| entry >> n & 1 == 1;
    let (first, count, small_per_page) = if !extended {
        (entry / 4096, entry % 4096 + 1, 1)
    } else if !bit(11) {
        (entry / 4096, entry % 2048 + 1, 1)
    } else if !bit(12) {
        (entry / (2 << 20) * 512, entry % 2048 + 1, 512)
    } else {
        (entry / (1 << 30) * 262_144, entry % 2048 + 1, 262_144)
    };
    let total = count * small_per_page;
    if total > limit as u64 {
        return None;
    }
    Some((0..total).map(|n| (first + n) & TOP).collect())
}
