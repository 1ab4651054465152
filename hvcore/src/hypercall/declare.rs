//! How a hypercall is declared and how an embedder lists the ones it offers.
//!
//! Used by `calls` and by embedders with calls of their own; uses `request` and `output`.

use super::registers::Registers;
use super::{Answer, Input, Output, Privileges, Reply, Request};
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::CallCode;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// A hypercall's code, shape and needs.
pub trait Declaration: Sized {
    /// The call code.
    const CODE: CallCode;
    /// The call code as a number, for patterns.
    const RAW_CODE: u16 = Self::CODE.0;
    /// The privileges without which the call is HV_STATUS_ACCESS_DENIED.
    const NEEDS: Privileges;
    /// Largest variable header, in 8-byte units; 0 when the call takes none.
    const MAX_VARIABLE_HEADER: u16 = 0;
    /// True for a rep call.
    const REP: bool = false;
    /// Bytes of output before the output list; a multiple of 8.
    const OUTPUT: usize = 0;
    /// Bytes of one element of the output list; 0 when the call has none.
    const OUTPUT_ELEMENT: usize = 0;
    /// The fixed input; its size is a multiple of 8.
    type Header: FromBytes + Immutable + Copy;
    /// An element of the input list of a rep call; not zero-sized, aligned to at most 8.
    type Element: FromBytes + Immutable + KnownLayout;
}

/// A hypercall that a host `H` can serve: checks the parameters and calls the handler.
pub trait Hypercall<H: ?Sized>: Declaration {
    /// Serves the call. `input` is a private copy.
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, output: &mut Output<'_, C>) -> Answer;
}

/// The hypercalls that a host offers, written with [`offer_hypercalls!`](crate::offer_hypercalls).
pub trait Offer {
    /// The codes in the list, in its order.
    const CODES: &'static [CallCode];

    /// Serves the call if its code is in the list.
    fn dispatch<R: Registers, C: CallerMemory + ?Sized>(&mut self, request: Request<'_, R, C>) -> Reply;
}

/// Lists the hypercalls that a host offers: dispatcher and allow-list at once.
///
/// `offer_hypercalls!(impl for Host { CallA, CallB })`, or with parameters
/// `offer_hypercalls!(impl ['a, M: GuestMemory] for Host<'a, M> { CallA, CallB })`. Each call is a type that implements
/// [`Hypercall<Host>`](crate::hypercall::Hypercall). The list becomes one `match`; a call listed twice does not compile.
#[macro_export]
macro_rules! offer_hypercalls {
    (impl for $host:ty { $($call:path),* $(,)? }) => {
        $crate::offer_hypercalls!(impl [] for $host { $($call),* });
    };
    (impl [$($generics:tt)*] for $host:ty { $($call:path),* $(,)? }) => {
        impl<$($generics)*> $crate::hypercall::Offer for $host {
            const CODES: &'static [$crate::tlfs_abi::hypercall::CallCode] =
                &[$(<$call as $crate::hypercall::Declaration>::CODE),*];

            #[inline]
            fn dispatch<Registers, Memory>(
                &mut self,
                request: $crate::hypercall::Request<'_, Registers, Memory>,
            ) -> $crate::hypercall::Reply
            where
                Registers: $crate::hypercall::Registers,
                Memory: $crate::memory::CallerMemory + ?Sized,
            {
                #[deny(unreachable_patterns)]
                match request.code().0 {
                    $(<$call as $crate::hypercall::Declaration>::RAW_CODE => request.serve::<$call, Self>(self),)*
                    _ => $crate::hypercall::Reply::status(
                        $crate::tlfs_abi::status::HvStatus::INVALID_HYPERCALL_CODE,
                    ),
                }
            }
        }
    };
}
