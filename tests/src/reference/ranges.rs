//! GVA ranges as page numbers, one by one.

/// Number of the first 4 KiB page that a list entry covers, and how many it covers: large pages of the extended format
/// count as the small ones they hold.
pub fn extent(entry: u64, extended: bool) -> (u64, u64) {
    let bit = |n: u32| entry >> n & 1 == 1;
    if !extended {
        (entry / 4096, entry % 4096 + 1)
    } else if !bit(11) {
        (entry / 4096, entry % 2048 + 1)
    } else if !bit(12) {
        (entry / (2 << 20) * 512, (entry % 2048 + 1) * 512)
    } else {
        (entry / (1 << 30) * 262_144, (entry % 2048 + 1) * 262_144)
    }
}

/// The numbers of the 4 KiB pages that a list entry covers, in order, wrapping at the end of the address space.
pub fn pages(entry: u64, extended: bool) -> Vec<u64> {
    let (mut page, count) = extent(entry, extended);
    let mut pages = Vec::new();
    for _ in 0..count {
        pages.push(page);
        page += 1;
        if page == 1 << 52 {
            page = 0;
        }
    }
    pages
}
