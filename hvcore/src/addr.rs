//! Level-typed addresses and the two guest levels.
//!
//! An L2 GPA, an L1 GPA, a host physical address and a GVA are different types; only a walk (or an explicit
//! constructor at the edge where a register or a table entry is read) makes one of another. Every module of the
//! workspace may use this one; it uses nothing.
//!
//! An address of one kind is not one of another:
//!
//! ```compile_fail,E0308
//! use hvcore::addr::{L1Gpa, L2Gpa};
//! let of_l1: L1Gpa = L2Gpa::new(0x1000);
//! ```
//!
//! nor does it pass for one, though the bytes would fit:
//!
//! ```compile_fail,E0308
//! use hvcore::addr::{Gva, Hpa};
//! fn map(_: Hpa) {}
//! map(Gva::new(0x1000));
//! ```
//!
//! ```
//! use hvcore::addr::{Gva, Hpa};
//! fn map(_: Hpa) {}
//! map(Hpa::new(Gva::new(0x1000).raw()));
//! ```

/// Whose code or translations are meant: L1, the guest hypervisor, or L2, its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// The guest hypervisor.
    L1,
    /// The guest of the guest hypervisor.
    L2,
}

/// Size of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Takes `raw`, in bytes, as an address of this kind.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The address in bytes.
            #[inline]
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The 4 KiB page that holds the address.
            #[inline]
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// Offset in the 4 KiB page, in bytes.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The address `bytes` further on, or `None` past the end of 64 bits.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// True when the address is a multiple of `align` bytes; `align` is a power of two.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & align.wrapping_sub(1) == 0
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// A guest virtual (linear) address, of L1 or of L2.
    Gva
}
address! {
    /// A guest physical address of L2: what L2's page tables yield, translated by L1's EPT or NPT.
    L2Gpa
}
address! {
    /// A guest physical address of L1: what L1's page tables, EPT or NPT yield, translated by the embedder.
    L1Gpa
}
address! {
    /// A host physical address: what the hardware sees.
    Hpa
}
