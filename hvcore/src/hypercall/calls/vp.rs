//! Calls about VPs: registers, APIC ids, start (TLFS, "Virtual Processor Management").
//!
//! They concern the caller's own partition and its only trust level: another partition id is
//! HV_STATUS_INVALID_PARTITION_ID, another VTL HV_STATUS_INVALID_PARAMETER.

use super::super::{Answer, Declaration, Hypercall, Input, Output, Privileges};
use super::{Checked, check_vtl};
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::inputs::{
    self, ApicId, InitialVpContext, InputVtl, PARTITION_ID_SELF, RegisterAssociation, RegisterName, RegisterValue,
    VP_INDEX_SELF, VpIndex,
};
use tlfs_abi::status::HvStatus;

/// Which VP a call names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedVp {
    /// The caller.
    Caller,
    /// The VP with this index, if there is one: the handler answers HV_STATUS_INVALID_VP_INDEX if not.
    Index(u32),
}

impl NamedVp {
    #[inline]
    const fn new(vp_index: u32) -> Self {
        if vp_index == VP_INDEX_SELF { Self::Caller } else { Self::Index(vp_index) }
    }
}

/// Serves HvCallGetVpRegisters and HvCallSetVpRegisters, register by register. The first failure ends the call.
pub trait VpRegisters {
    /// Reads a register of `vp`.
    fn get_vp_register(&mut self, vp: NamedVp, name: RegisterName) -> Result<RegisterValue, HvStatus>;

    /// Writes a register of `vp`.
    fn set_vp_register(&mut self, vp: NamedVp, name: RegisterName, value: RegisterValue) -> Result<(), HvStatus>;
}

/// Serves HvCallGetVpIndexFromApicId, id by id. The first failure ends the call.
pub trait ApicIds {
    /// The VP index of the VP with this APIC id.
    fn vp_index_of(&mut self, apic_id: ApicId) -> Result<VpIndex, HvStatus>;
}

/// Serves HvCallStartVirtualProcessor.
pub trait StartVp {
    /// Starts the VP with this index in the state of `context`, which is not checked.
    fn start_vp(&mut self, vp_index: u32, context: &InitialVpContext) -> Answer;
}

/// HvCallGetVpRegisters, 0x0050.
#[derive(Clone, Copy, Debug)]
pub struct GetVpRegisters;

/// HvCallSetVpRegisters, 0x0051.
#[derive(Clone, Copy, Debug)]
pub struct SetVpRegisters;

/// HvCallStartVirtualProcessor, 0x0099. Too long for a fast call.
#[derive(Clone, Copy, Debug)]
pub struct StartVirtualProcessor;

/// HvCallGetVpIndexFromApicId, 0x009A.
#[derive(Clone, Copy, Debug)]
pub struct GetVpIndexFromApicId;

impl Declaration for GetVpRegisters {
    const CODE: CallCode = CallCode::GET_VP_REGISTERS;
    const NEEDS: Privileges = Privileges::ACCESS_VP_REGISTERS;
    const REP: bool = true;
    const OUTPUT_ELEMENT: usize = size_of::<RegisterValue>();
    type Header = inputs::VpRegisters;
    type Element = RegisterName;
}

impl Declaration for SetVpRegisters {
    const CODE: CallCode = CallCode::SET_VP_REGISTERS;
    const NEEDS: Privileges = Privileges::ACCESS_VP_REGISTERS;
    const REP: bool = true;
    type Header = inputs::VpRegisters;
    type Element = RegisterAssociation;
}

impl Declaration for StartVirtualProcessor {
    const CODE: CallCode = CallCode::START_VIRTUAL_PROCESSOR;
    const NEEDS: Privileges = Privileges::START_VIRTUAL_PROCESSOR;
    type Header = inputs::StartVirtualProcessor;
    type Element = u64;
}

impl Declaration for GetVpIndexFromApicId {
    const CODE: CallCode = CallCode::GET_VP_INDEX_FROM_APIC_ID;
    const NEEDS: Privileges = Privileges::START_VIRTUAL_PROCESSOR;
    const REP: bool = true;
    const OUTPUT_ELEMENT: usize = size_of::<VpIndex>();
    type Header = inputs::GetVpIndexFromApicId;
    type Element = ApicId;
}

/// Own partition, own VTL.
fn check_target(partition_id: u64, vtl: InputVtl) -> Checked<()> {
    if partition_id != PARTITION_ID_SELF {
        return Err(HvStatus::INVALID_PARTITION_ID.into());
    }
    check_vtl(vtl)
}

/// Does each element in turn, up to the first failure.
fn each<T>(elements: &[T], mut one: impl FnMut(&T) -> Result<(), HvStatus>) -> Answer {
    for (element, completed) in elements.iter().zip(0u16..) {
        if let Err(status) = one(element) {
            return Answer::Failed { status, completed };
        }
    }
    Answer::Done
}

impl<H: VpRegisters + ?Sized> Hypercall<H> for GetVpRegisters {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, output: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        if let Err(answer) = check_target(header.partition_id, header.target_vtl) {
            return answer;
        }
        let vp = NamedVp::new(header.vp_index);
        each(input.elements(), |name| output.push(&host.get_vp_register(vp, *name)?))
    }
}

impl<H: VpRegisters + ?Sized> Hypercall<H> for SetVpRegisters {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        if let Err(answer) = check_target(header.partition_id, header.target_vtl) {
            return answer;
        }
        let vp = NamedVp::new(header.vp_index);
        each(input.elements(), |element| host.set_vp_register(vp, element.name, element.value))
    }
}

impl<H: StartVp + ?Sized> Hypercall<H> for StartVirtualProcessor {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        match check_target(header.partition_id, header.target_vtl) {
            Ok(()) => host.start_vp(header.vp_index, &header.vp_context),
            Err(answer) => answer,
        }
    }
}

impl<H: ApicIds + ?Sized> Hypercall<H> for GetVpIndexFromApicId {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, output: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        if let Err(answer) = check_target(header.partition_id, header.target_vtl) {
            return answer;
        }
        each(input.elements(), |apic_id| output.push(&host.vp_index_of(*apic_id)?))
    }
}
