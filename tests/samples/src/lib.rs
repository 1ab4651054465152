//! VMCS12s for tests: valid ones of every kind of guest, and random ones that are nearly so.
//!
//! Pure and `no_std`: the same samples are judged by the library, by the machine model on the host and by an emulated
//! processor from a bare-metal image. All that a sample points to lies in [`PAGES`] pages, which [`prepare`] fills; a
//! guest's page tables, and its EPT, map nothing, so that a guest that is entered leaves at its first access.
#![no_std]

mod mutate;
mod profile;

pub use mutate::{Sample, sample, settle_host};
pub use profile::{Profile, valid};

use nvmx::caps::Config;

/// Number of 4 KiB pages that a [`Layout`] needs.
pub const PAGES: u64 = 16;

/// What each page is for, by its number.
pub mod page {
    /// Nothing but zeros: page tables and EPT that map nothing, I/O and MSR bitmaps that intercept nothing.
    pub const EMPTY: u64 = 0;
    /// The virtual-APIC page; VTPR is 0x50.
    pub const VIRTUAL_APIC: u64 = 1;
    /// APIC-access page.
    pub const APIC_ACCESS: u64 = 2;
    /// Page-modification log.
    pub const PML: u64 = 3;
    /// Page-directory-pointer tables, 32 bytes each: not present, present, with reserved bits, ...
    pub const PDPT: u64 = 4;
    /// MSR lists, 64 bytes each: see [`super::MSR_LISTS`].
    pub const MSRS: u64 = 5;
    /// A VMCS region with the right revision.
    pub const VMCS: u64 = 6;
    /// One that says it is a shadow VMCS.
    pub const SHADOW_VMCS: u64 = 7;
    /// One with a wrong revision.
    pub const WRONG_VMCS: u64 = 8;
    /// Where MSRs are stored.
    pub const STORE: u64 = 9;
}

/// Where a sample's pages and its host are.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Physical address of the first page.
    pub pages: u64,
    /// The current-VMCS pointer.
    pub current: u64,
    /// The host's state, as VM exits load it.
    pub host: Host,
}

impl Layout {
    /// Address of a page by its number in [`page`].
    pub const fn page(&self, number: u64) -> u64 {
        self.pages + number * 4096
    }

    /// True when `address` lies in one of the pages.
    pub const fn contains(&self, address: u64) -> bool {
        address >= self.pages && address < self.pages + PAGES * 4096
    }
}

/// Host state.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// RSP.
    pub rsp: u64,
    /// RIP.
    pub rip: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// Selectors of CS, SS (and the other data segments) and TR.
    pub selectors: [u16; 3],
    /// Bases of FS, GS, TR, GDTR and IDTR.
    pub bases: [u64; 5],
}

/// Entries in each list of MSRs: two good ones, then what the name says; 0x174 is IA32_SYSENTER_CS.
pub const MSR_LISTS: [[(u64, u64); 2]; 8] = [
    [(0x174, 0x10), (0xC000_0081, 0x10_0000_0000)],
    [(0x174, 0x10), (0xC000_0100, 0)],
    [(0xC000_0101, 0), (0x174, 0)],
    [(0x808, 0), (0x174, 0)],
    [(0x174, 0), (0x8FF, 0)],
    [(0x1_0000_0174, 0), (0x174, 0)],
    [(0x9B, 0), (0x174, 0)],
    [(0x79, 0), (0x8B, 0)],
];

/// PDPTEs by table: each gets all four from one line.
const PDPTS: [[u64; 4]; 8] = [
    [0, 0, 0, 0],
    // Present, to the empty page: bit 0 is replaced by its address.
    [1, 0, 0, 1],
    [1, 1, 1, 1 | 1 << 1],
    [1 | 1 << 5, 0, 0, 0],
    [0, 1 | 1 << 8, 0, 0],
    // Not present: nothing is reserved.
    [0x1E6, 1 << 63, 0, 1 << 51],
    [1 | 1 << 63, 0, 0, 0],
    [1 | 1 << 52, 0, 0, 0],
];

/// Fills the pages through `write` (address, 8 bytes): they must be zero before. `revision` is that of a VMCS.
pub fn prepare(layout: &Layout, revision: u32, mut write: impl FnMut(u64, u64)) {
    write(layout.page(page::VIRTUAL_APIC) + 0x80, 0x50);
    for (i, table) in PDPTS.iter().enumerate() {
        for (n, entry) in table.iter().enumerate() {
            let value = if entry & 1 != 0 { entry | layout.page(page::EMPTY) } else { *entry };
            write(layout.page(page::PDPT) + i as u64 * 32 + n as u64 * 8, value);
        }
    }
    for (i, list) in MSR_LISTS.iter().enumerate() {
        for (n, (index, value)) in list.iter().enumerate() {
            let at = layout.page(page::MSRS) + i as u64 * 64 + n as u64 * 16;
            write(at, *index);
            write(at + 8, *value);
        }
    }
    for n in 0..2 {
        // What a store list names.
        write(layout.page(page::STORE) + n * 16, 0x174);
    }
    write(layout.page(page::VMCS), u64::from(revision));
    write(layout.page(page::SHADOW_VMCS), u64::from(revision | 1 << 31));
    write(layout.page(page::WRONG_VMCS), u64::from(revision ^ 1));
}

/// A random number generator: the same seed gives the same samples everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Seeds it.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits (splitmix64).
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number below `n`, which is not 0.
    pub const fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// True once in `n`.
    pub const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `choices`, which are not empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// The bits of `allowed` that are optional, each set once in `n`; with all required ones.
fn some_of(rng: &mut Rng, allowed: nvmx::caps::Allowed, n: u64) -> u32 {
    let mut bits = allowed.required;
    for bit in 0..32 {
        if allowed.allowed >> bit & 1 != 0 && rng.one_in(n) {
            bits |= 1 << bit;
        }
    }
    bits
}

/// The width of physical addresses.
fn phys_bits(config: &Config) -> u64 {
    u64::from(config.host().phys_bits)
}
