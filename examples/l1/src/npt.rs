//! Nested page tables of this hypervisor: identity maps of the first 4 GiB with 2 MiB pages, and 4 KiB pages where a
//! scenario wants one to differ. Tables come from the runtime's page frames and are never given back.

use crate::frames;

pub const PRESENT: u64 = 1;
pub const WRITE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
pub const NO_EXECUTE: u64 = 1 << 63;
pub const ALL: u64 = PRESENT | WRITE | USER;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// A four-level table, nested or guest: the format is one and the same.
#[derive(Clone, Copy)]
pub struct Table {
    root: u64,
}

/// What a leaf needs beside its rights: write-back memory in EPT's format. In guest tables on VT-x the same bits say
/// that a page was accessed and is not cached, which does no harm.
fn leaf() -> u64 {
    if crate::vmx::is_on() { 6 << 3 } else { 0 }
}

type Page = [u64; 512];

fn page(address: u64) -> &'static mut Page {
    // SAFETY: tables are page frames of this table's owner, mapped one to one; one processor edits at a time.
    unsafe { &mut *((address & ADDRESS) as *mut Page) }
}

impl Table {
    /// Maps the first `gib` GiB one to one.
    pub fn identity(gib: u64) -> Self {
        let root = frames::page();
        let table = Self { root };
        for n in 0..gib * 512 {
            *table.entry(n << 21, 1) = n << 21 | LARGE | ALL | leaf();
        }
        table
    }

    /// The root's address: nCR3 or CR3.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The entry that maps `address` at `level` (0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB), tables above made as needed; a
    /// large page on the way is split.
    pub fn entry(&self, address: u64, level: u32) -> &'static mut u64 {
        let mut at = self.root;
        for upper in (level + 1..=3).rev() {
            let entry = &mut page(at)[(address >> (12 + 9 * upper)) as usize & 511];
            if *entry & PRESENT == 0 {
                *entry = frames::page() | ALL;
            } else if *entry & LARGE != 0 && upper < 3 {
                *entry = split(*entry, upper) | ALL;
            }
            at = *entry;
        }
        &mut page(at)[(address >> (12 + 9 * level)) as usize & 511]
    }

    /// Maps the 4 KiB page of `address` to `target` with `flags`.
    pub fn map(&self, address: u64, target: u64, flags: u64) {
        *self.entry(address, 0) = target & ADDRESS | flags | leaf();
    }
}

/// A table of smaller pages that maps what the large page `entry` of `level` maps.
fn split(entry: u64, level: u32) -> u64 {
    let table = frames::page();
    let size = 1u64 << (12 + 9 * (level - 1));
    let large = if level > 1 { LARGE } else { 0 };
    for (n, slot) in page(table).iter_mut().enumerate() {
        let target = (entry & ADDRESS) + n as u64 * size;
        *slot = target | entry & (ALL | NO_EXECUTE) | large | leaf();
    }
    table
}
