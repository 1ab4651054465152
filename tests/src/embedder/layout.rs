//! Where everything is: in host memory, and in the memory of an L1 and its L2s.

use super::{HOST, L1_BYTES};
use crate::model::tables::flag;

/// Host memory per partition.
pub const PARTITION_BYTES: u64 = 0x40_0000;
/// VPs per partition at most.
pub const MAX_VPS: u64 = 4;

/// L1's own page tables: PML4, PDPT, PD, PT; the identity of its memory, and the window.
pub const L1_TABLES: u64 = 0x1000;
/// L1's nested tables for L2, one set after the other.
pub const NPTS: u64 = 0x8000;
/// L2's own page tables.
pub const L2_TABLES: u64 = 0x1_0000;
/// VMCBs of L1, one per VP and nested table.
pub const VMCB12: u64 = 0x2_0000;
/// L1's MSR permission map.
pub const MSRPM12: u64 = 0x3_0000;
/// L1's IO permission map.
pub const IOPM12: u64 = 0x3_2000;
/// VP assist pages.
pub const ASSIST: u64 = 0x3_6000;
/// Partition assist page.
pub const PARTITION_ASSIST: u64 = 0x3_A000;
/// Hypercall input, a page per VP; the identity in L2, too.
pub const INPUT: u64 = 0x3_C000;
/// Top of the stacks.
pub const STACK: u64 = 0x7_F000;
/// L1's data pages.
pub const DATA: u64 = 0x8_0000;
/// How many.
pub const PAGES: usize = 6;
/// L1's window (its GVA) on the data, and L2's GPAs for them.
pub const WINDOW: u64 = 0x18_0000;
/// L2's window (its GVA) on its GPAs.
pub const L2_WINDOW: u64 = 0x1C_0000;

/// Bits of an entry of any of the tables, with accessed and dirty set.
pub const BITS: u64 = flag::P | flag::W | flag::U | flag::A | flag::D;

/// The page table behind `root` (a set of four), and the slot of `address`.
pub const fn slot(root: u64, address: u64) -> u64 {
    root + 0x3000 + ((address >> 12) & 511) * 8
}

/// Where a VP's pages are in host memory.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct VpPlaces {
    pub vmcb01: u64,
    pub vmcb02: u64,
    pub host_state: u64,
    pub msrpm02: u64,
    pub iopm02: u64,
    pub pool: u64,
    pub msrpm01: u64,
    pub iopm01: u64,
    pub npt01: u64,
}

/// Start of partition `p`'s host memory: L1's frames, then spare frames.
pub const fn base(p: usize) -> u64 {
    HOST + p as u64 * PARTITION_BYTES
}

/// A second frame for each page of L1's.
pub const fn spare(p: usize, gpa: u64) -> u64 {
    base(p) + L1_BYTES + gpa
}

impl VpPlaces {
    /// Those of VP `v` of partition `p`.
    pub const fn of(p: usize, v: usize) -> Self {
        let shared = base(p) + 2 * L1_BYTES;
        let own = shared + 0x10_0000 + v as u64 * 0x4_0000;
        Self {
            npt01: shared,
            msrpm01: shared + 0x1_0000,
            iopm01: shared + 0x1_2000,
            vmcb01: own,
            vmcb02: own + 0x1000,
            host_state: own + 0x2000,
            msrpm02: own + 0x4000,
            iopm02: own + 0x6000,
            pool: own + 0x1_0000,
        }
    }
}
