//! The hypercalls that this library knows: one type each, and the handler traits behind them.
//!
//! Listed by embedders with `offer_hypercalls!`; used by `request`; uses `tlfs_abi` for the inputs.

mod flush;
mod ipi;
mod port;
mod spin;
mod vp;

pub use flush::{
    FlushGuestPhysical, FlushGuestPhysicalAddressList, FlushGuestPhysicalAddressSpace, FlushTarget, FlushVirtual,
    FlushVirtualAddressList, FlushVirtualAddressListEx, FlushVirtualAddressSpace, FlushVirtualAddressSpaceEx,
    GvaRanges,
};
pub use ipi::{ClusterIpi, SendSyntheticClusterIpi, SendSyntheticClusterIpiEx};
pub use port::{Events, ExtQueryCapabilities, ExtendedCalls, Messages, PostMessage, SignalEvent};
pub use spin::{LongSpinWait, NotifyLongSpinWait};
pub use vp::{
    ApicIds, GetVpIndexFromApicId, GetVpRegisters, NamedVp, SetVpRegisters, StartVirtualProcessor, StartVp, VpRegisters,
};

use super::Answer;
use tlfs_abi::inputs::InputVtl;
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::{SparseVpSet, VpSet, VpSetFormat, VpSetHeader};

/// An early end of a call, as a result of checking its parameters.
type Checked<T> = Result<T, Answer>;

const INVALID_PARAMETER: Answer = Answer::Failed { status: HvStatus::INVALID_PARAMETER, completed: 0 };
const INVALID_INPUT: Answer = Answer::Failed { status: HvStatus::INVALID_HYPERCALL_INPUT, completed: 0 };

/// "Use the target VTL" with target VTL 0.
const ONLY_VTL: InputVtl = InputVtl::new(1 << 4);

/// The banks of an HV_VP_SET: there must be one for each bit of the mask, whatever the format.
#[inline]
fn vp_set<'a>(header: &VpSetHeader, banks: &'a [u64]) -> Checked<SparseVpSet<'a>> {
    SparseVpSet::new(header.valid_bank_mask, banks).ok_or(INVALID_INPUT)
}

/// The VPs that a set of this format names: format 1 is all of them, with the banks ignored.
#[inline]
fn vps_of_format<'a>(format: VpSetFormat, sparse: SparseVpSet<'a>) -> Checked<VpSet<'a>> {
    match format {
        VpSetFormat::SPARSE_4K => Ok(VpSet::Sparse(sparse)),
        VpSetFormat::ALL => Ok(VpSet::All),
        _ => Err(INVALID_PARAMETER),
    }
}

/// There is one virtual trust level: a call names none, or level 0 outright.
#[inline]
fn check_vtl(vtl: InputVtl) -> Checked<()> {
    if vtl == InputVtl::default() || vtl == ONLY_VTL { Ok(()) } else { Err(INVALID_PARAMETER) }
}
