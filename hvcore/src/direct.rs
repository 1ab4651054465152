//! Who serves a flush hypercall of L2: L0 itself, or L1 (TLFS, "Nested Virtualization", direct virtual flush).
//!
//! Called by `nsvm` and `nvmx` when L2 executes VMCALL or VMMCALL; calls guest memory for four bytes at most. Nothing is
//! cached: what L1 withdraws is withdrawn at the next hypercall.

use crate::memory::GuestMemory;
use crate::partition::{Interface, VpInterface};
use tlfs_abi::assist::{NestedFeatures, vp_assist_offset};
use tlfs_abi::hypercall::CallCode;

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum DirectFlush {
    /// L0 serves the call.
    Allowed,
    /// The exit goes to L1 as without direct flush.
    Reflect(Reason),
}

/// Why a hypercall of L2 goes to L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Not one of the four flushes of virtual addresses.
    OtherCall,
    /// The partition is not offered direct flush.
    NotOffered,
    /// The enlightened VMCS or VMCB has NestedFlushVirtualHypercall clear, or L2 runs on a plain VMCS.
    NotInContext,
    /// L1's GUEST_OS_ID is zero.
    NoOsId,
    /// L1's VP assist page is disabled.
    NoAssistPage,
    /// The VP assist page cannot be read.
    AssistPageUnreadable,
    /// DirectHypercall is clear in the VP assist page.
    NotGranted,
}

/// Whether L0 serves L2's hypercall `call` on `vp`. `nested_flush_virtual_hypercall` is the bit of the enlightened VMCS
/// or VMCB that L2 runs on; `memory` is L1's.
#[inline]
pub fn authorise<M: GuestMemory + ?Sized>(
    interface: &Interface,
    vp: &VpInterface,
    nested_flush_virtual_hypercall: bool,
    call: CallCode,
    memory: &M,
) -> DirectFlush {
    match refusal(interface, vp, nested_flush_virtual_hypercall, call, memory) {
        None => DirectFlush::Allowed,
        Some(reason) => DirectFlush::Reflect(reason),
    }
}

/// The cheap tests first; the assist page is read only when all else agrees.
#[inline]
fn refusal<M: GuestMemory + ?Sized>(
    interface: &Interface,
    vp: &VpInterface,
    in_context: bool,
    call: CallCode,
    memory: &M,
) -> Option<Reason> {
    if !is_direct(call) {
        return Some(Reason::OtherCall);
    }
    if !interface.offers_direct_flush() {
        return Some(Reason::NotOffered);
    }
    if !in_context {
        return Some(Reason::NotInContext);
    }
    if !interface.hypercalls_enabled() {
        return Some(Reason::NoOsId);
    }
    let Some(page) = vp.vp_assist_gpa() else {
        return Some(Reason::NoAssistPage);
    };
    let features = page.checked_add(vp_assist_offset::NESTED_FEATURES).and_then(|gpa| memory.read_u32(gpa).ok());
    match features.map(NestedFeatures::new) {
        None => Some(Reason::AssistPageUnreadable),
        Some(features) if !features.direct_hypercall() => Some(Reason::NotGranted),
        Some(_) => None,
    }
}

/// True for the four calls that L0 serves for L2.
#[inline]
pub const fn is_direct(call: CallCode) -> bool {
    matches!(
        call,
        CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE
            | CallCode::FLUSH_VIRTUAL_ADDRESS_LIST
            | CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX
            | CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX
    )
}
