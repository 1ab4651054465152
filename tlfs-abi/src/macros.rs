//! Macros that keep one truth in one place: registers of bits, and structures with their offsets.
//!
//! Used by the modules of this crate only.

/// A `bitfield!` register with the derives, `new` and `raw` that every register of this crate has.
macro_rules! bits {
    ($(#[$meta:meta])* pub struct $name:ident($raw:ty); $($fields:tt)*) => {
        bitfield::bitfield! {
            $(#[$meta])*
            #[derive(
                Clone, Copy, PartialEq, Eq, Default,
                zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
            )]
            #[repr(transparent)]
            pub struct $name($raw);
            impl Debug;
            $($fields)*
        }

        impl $name {
            /// The raw value as named bits.
            #[inline]
            pub const fn new(raw: $raw) -> Self {
                Self(raw)
            }

            /// The raw value.
            #[inline]
            pub const fn raw(self) -> $raw {
                self.0
            }
        }
    };
}

/// A structure of the TLFS: fields with the offsets that the TLFS gives them, checked at compile time.
macro_rules! abi_struct {
    (
        $(#[$meta:meta])*
        pub struct $name:ident, $size:literal {
            $($(#[$doc:meta])* $offset:literal $field:ident: $ty:ty,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$doc])* pub $field: $ty,)*
        }

        impl $name {
            /// The structure with every byte zero.
            pub const ZERO: Self = zerocopy::transmute!([0u8; $size]);
        }

        impl Default for $name {
            fn default() -> Self {
                Self::ZERO
            }
        }

        static_assertions::const_assert_eq!(size_of::<$name>(), $size);
        $(static_assertions::const_assert_eq!(core::mem::offset_of!($name, $field), $offset);)*
    };
}
