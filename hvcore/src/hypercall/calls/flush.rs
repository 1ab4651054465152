//! The flush hypercalls (TLFS, "Virtual MMU Hypercalls"): four of virtual addresses, two of guest physical addresses.
//!
//! The normal and the Ex forms parse to the same request, so a handler does not know which was used.

use super::super::{Answer, Declaration, Hypercall, Input, Output, Privileges};
use super::{Checked, INVALID_PARAMETER, vp_set, vps_of_format};
use crate::addr::Level;
use crate::memory::CallerMemory;
use tlfs_abi::flush::{
    FlushFlags, FlushGuestPhysicalAddress, FlushVirtualAddress, FlushVirtualAddressEx, GvaSpan, RangeFormat,
};
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::vp_set::{MAX_BANKS, SparseVpSet, VpSet};

/// Whose translations a flush of virtual addresses drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushTarget<'a> {
    /// Whose code called: [`Level::L2`] for a direct flush, which concerns translations of L2 only.
    pub level: Level,
    /// CR3 of the address space; means nothing when `flags` has ALL_VIRTUAL_ADDRESS_SPACES.
    pub address_space: u64,
    /// Checked: no reserved bit.
    pub flags: FlushFlags,
    /// The processors: of the partition for [`Level::L1`], of the caller's VM for [`Level::L2`].
    pub vps: VpSet<'a>,
}

/// The list of a flush: entries as the caller wrote them, in the format it named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GvaRanges<'a> {
    /// How the entries are encoded.
    pub format: RangeFormat,
    /// The entries. Not empty.
    pub raw: &'a [u64],
}

impl GvaRanges<'_> {
    /// What the entries cover, in order. Addresses are not checked to be canonical.
    #[inline]
    pub fn spans(&self) -> impl Iterator<Item = GvaSpan> + '_ {
        self.raw.iter().map(|raw| self.format.span(*raw))
    }
}

/// Serves HvCallFlushVirtualAddressSpace, HvCallFlushVirtualAddressList and their Ex forms.
pub trait FlushVirtual {
    /// Drops all translations of the target's address space, or only the non-global ones when the flags say so.
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer;

    /// Drops the translations of `ranges`.
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer;
}

/// Serves HvCallFlushGuestPhysicalAddressSpace and HvCallFlushGuestPhysicalAddressList, on all processors.
pub trait FlushGuestPhysical {
    /// Drops all translations that derive from the second-level tables that `address_space` names (EPT pointer or
    /// nCR3).
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer;

    /// Drops those of the GPA ranges in `ranges`, entries as the caller wrote them.
    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer;
}

/// HvCallFlushVirtualAddressSpace, 0x0002.
#[derive(Clone, Copy, Debug)]
pub struct FlushVirtualAddressSpace;

/// HvCallFlushVirtualAddressList, 0x0003.
#[derive(Clone, Copy, Debug)]
pub struct FlushVirtualAddressList;

/// HvCallFlushVirtualAddressSpaceEx, 0x0013.
#[derive(Clone, Copy, Debug)]
pub struct FlushVirtualAddressSpaceEx;

/// HvCallFlushVirtualAddressListEx, 0x0014.
#[derive(Clone, Copy, Debug)]
pub struct FlushVirtualAddressListEx;

/// HvCallFlushGuestPhysicalAddressSpace, 0x00AF.
#[derive(Clone, Copy, Debug)]
pub struct FlushGuestPhysicalAddressSpace;

/// HvCallFlushGuestPhysicalAddressList, 0x00B0.
#[derive(Clone, Copy, Debug)]
pub struct FlushGuestPhysicalAddressList;

impl Declaration for FlushVirtualAddressSpace {
    const CODE: CallCode = CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE;
    const NEEDS: Privileges = Privileges::REMOTE_FLUSH;
    type Header = FlushVirtualAddress;
    type Element = u64;
}

impl Declaration for FlushVirtualAddressList {
    const CODE: CallCode = CallCode::FLUSH_VIRTUAL_ADDRESS_LIST;
    const NEEDS: Privileges = Privileges::REMOTE_FLUSH;
    const REP: bool = true;
    type Header = FlushVirtualAddress;
    type Element = u64;
}

impl Declaration for FlushVirtualAddressSpaceEx {
    const CODE: CallCode = CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX;
    const NEEDS: Privileges = Privileges::REMOTE_FLUSH.with(Privileges::EX_PROCESSOR_MASKS);
    const MAX_VARIABLE_HEADER: u16 = MAX_BANKS as u16;
    type Header = FlushVirtualAddressEx;
    type Element = u64;
}

impl Declaration for FlushVirtualAddressListEx {
    const CODE: CallCode = CallCode::FLUSH_VIRTUAL_ADDRESS_LIST_EX;
    const NEEDS: Privileges = Privileges::REMOTE_FLUSH.with(Privileges::EX_PROCESSOR_MASKS);
    const MAX_VARIABLE_HEADER: u16 = MAX_BANKS as u16;
    const REP: bool = true;
    type Header = FlushVirtualAddressEx;
    type Element = u64;
}

impl Declaration for FlushGuestPhysicalAddressSpace {
    const CODE: CallCode = CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE;
    const NEEDS: Privileges = Privileges::GUEST_PHYSICAL_FLUSH;
    type Header = FlushGuestPhysicalAddress;
    type Element = u64;
}

impl Declaration for FlushGuestPhysicalAddressList {
    const CODE: CallCode = CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST;
    const NEEDS: Privileges = Privileges::GUEST_PHYSICAL_FLUSH;
    const REP: bool = true;
    type Header = FlushGuestPhysicalAddress;
    type Element = u64;
}

/// Unknown flags are invalid; so are NON_GLOBAL_ONLY for a list, and the extended format where it is not offered.
#[inline]
fn check_flags(flags: FlushFlags, privileges: Privileges, list: bool) -> Checked<()> {
    let mut invalid = FlushFlags::RESERVED;
    if list {
        invalid |= FlushFlags::NON_GLOBAL_ONLY;
    }
    if !privileges.contains(Privileges::EXTENDED_GVA_RANGES) {
        invalid |= FlushFlags::EXTENDED_RANGE_FORMAT;
    }
    if flags.raw() & invalid != 0 { Err(INVALID_PARAMETER) } else { Ok(()) }
}

/// The target of a normal form. A mask of zero is all processors: Windows Server 2012 flushes so, and flushing more
/// than asked is legal.
#[inline]
fn target<'a, D>(input: &'a Input<'_, D>) -> Checked<FlushTarget<'a>>
where
    D: Declaration<Header = FlushVirtualAddress>,
{
    let header = input.header();
    check_flags(header.flags, input.privileges(), D::REP)?;
    let vps = if header.flags.all_processors() || header.processor_mask == 0 {
        VpSet::All
    } else {
        VpSet::Sparse(SparseVpSet::from_mask(&header.processor_mask))
    };
    Ok(FlushTarget { level: input.level(), address_space: header.address_space, flags: header.flags, vps })
}

/// The target of an Ex form; `None` when its set lists no bank: nothing is to be done. With ALL_PROCESSORS the set is
/// ignored, but for the agreement of its mask with the variable header.
#[inline]
fn target_ex<'a, D>(input: &'a Input<'_, D>) -> Checked<Option<FlushTarget<'a>>>
where
    D: Declaration<Header = FlushVirtualAddressEx>,
{
    let header = input.header();
    let sparse = vp_set(&header.vp_set, input.variable())?;
    check_flags(header.flags, input.privileges(), D::REP)?;
    let vps = if header.flags.all_processors() { VpSet::All } else { vps_of_format(header.vp_set.format, sparse)? };
    if matches!(vps, VpSet::Sparse(set) if set.valid_bank_mask() == 0) {
        return Ok(None);
    }
    Ok(Some(FlushTarget { level: input.level(), address_space: header.address_space, flags: header.flags, vps }))
}

#[inline]
fn ranges<'a>(flags: FlushFlags, raw: &'a [u64]) -> GvaRanges<'a> {
    let format = if flags.extended_range_format() { RangeFormat::Extended } else { RangeFormat::Normal };
    GvaRanges { format, raw }
}

impl<H: FlushVirtual + ?Sized> Hypercall<H> for FlushVirtualAddressSpace {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        match target(input) {
            Ok(target) => host.flush_space(&target),
            Err(answer) => answer,
        }
    }
}

impl<H: FlushVirtual + ?Sized> Hypercall<H> for FlushVirtualAddressList {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        match target(input) {
            Ok(target) => host.flush_list(&target, &ranges(target.flags, input.elements())),
            Err(answer) => answer,
        }
    }
}

impl<H: FlushVirtual + ?Sized> Hypercall<H> for FlushVirtualAddressSpaceEx {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        match target_ex(input) {
            Ok(Some(target)) => host.flush_space(&target),
            Ok(None) => Answer::Done,
            Err(answer) => answer,
        }
    }
}

impl<H: FlushVirtual + ?Sized> Hypercall<H> for FlushVirtualAddressListEx {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        match target_ex(input) {
            Ok(Some(target)) => host.flush_list(&target, &ranges(target.flags, input.elements())),
            Ok(None) => Answer::Done,
            Err(answer) => answer,
        }
    }
}

impl<H: FlushGuestPhysical + ?Sized> Hypercall<H> for FlushGuestPhysicalAddressSpace {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        if input.header().flags != 0 {
            return INVALID_PARAMETER;
        }
        host.flush_guest_physical_space(input.header().address_space)
    }
}

impl<H: FlushGuestPhysical + ?Sized> Hypercall<H> for FlushGuestPhysicalAddressList {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        if input.header().flags != 0 {
            return INVALID_PARAMETER;
        }
        host.flush_guest_physical_list(input.header().address_space, input.elements())
    }
}
