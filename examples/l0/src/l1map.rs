//! How L0 maps L1's memory, for the library's shadow of L1's nested page tables: the same answer that
//! [`crate::npt01`] gives the hardware.

use hvcore::addr::{Hpa, L1Gpa};
use hvcore::shadow::{L1Map, Mapping, PageSize};
use hw::apic;

use crate::memory::{Overlays, Range};

const MIB2: u64 = 2 << 20;

/// L0's mapping: the identity, but for the local APIC (writes are L0's) and the hole (reads as ones).
#[derive(Clone, Copy, Debug)]
pub struct IdentityMap {
    /// Where L0 lives.
    pub hole: Range,
    /// Host physical address of the page of ones.
    pub ones: u64,
    /// The processor's MAXPHYADDR.
    pub address_bits: u32,
    /// Pages that lie over L1's memory.
    pub overlays: &'static Overlays,
}

impl L1Map for IdentityMap {
    #[inline]
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        let raw = gpa.raw();
        if raw >> self.address_bits != 0 {
            return None;
        }
        let whole = Mapping {
            hpa: Hpa::new(raw & !(MIB2 - 1)),
            size: PageSize::Size2M,
            writable: true,
            executable: true,
            memory_type: 0,
        };
        if let Some(page) = self.overlays.at(raw) {
            return Some(Mapping { hpa: Hpa::new(page), size: PageSize::Size4K, writable: false, ..whole });
        }
        if self.hole.contains(raw) {
            return Some(Mapping { hpa: Hpa::new(self.ones), size: PageSize::Size4K, writable: false, ..whole });
        }
        if raw & !(MIB2 - 1) == apic::DEFAULT_BASE & !(MIB2 - 1) {
            let writable = raw & !0xfff != apic::DEFAULT_BASE;
            return Some(Mapping { hpa: Hpa::new(raw & !0xfff), size: PageSize::Size4K, writable, ..whole });
        }
        if self.overlays.near(raw) {
            // A large page would show what lies under the overlay.
            return Some(Mapping { hpa: Hpa::new(raw & !0xfff), size: PageSize::Size4K, ..whole });
        }
        Some(whole)
    }
}
