//! VP sets as lists of numbers.

/// The members of a sparse set: bit b of `mask` says that a word for indexes 64 b to 64 b + 63 follows. `None` when the
/// number of words is another than that of the bits.
pub fn members(mask: u64, words: &[u64]) -> Option<Vec<u32>> {
    let mut members = Vec::new();
    let mut next = 0;
    for bank in 0..64 {
        if mask & (1 << bank) == 0 {
            continue;
        }
        let word = *words.get(next)?;
        next += 1;
        for bit in 0..64 {
            if word & (1 << bit) != 0 {
                members.push(bank * 64 + bit);
            }
        }
    }
    if next == words.len() { Some(members) } else { None }
}
