//! The synthetic cluster IPIs (TLFS, "Virtual Interrupt Hypercalls").

use super::super::{Answer, Declaration, Hypercall, Input, Output, Privileges};
use super::{Checked, INVALID_PARAMETER, check_vtl, vp_set, vps_of_format};
use crate::addr::Level;
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::inputs::{self, InputVtl};
use tlfs_abi::vp_set::{MAX_BANKS, SparseVpSet, VpSet};

/// Serves HvCallSendSyntheticClusterIpi and its Ex form.
pub trait ClusterIpi {
    /// Sends the fixed interrupt `vector` (0x10 to 0xFF) to the VPs of `vps`, on behalf of a caller of `level`. A VP
    /// that does not exist, or whose local APIC is disabled, is left out.
    fn send_ipi(&mut self, level: Level, vector: u8, vps: &VpSet<'_>) -> Answer;
}

/// HvCallSendSyntheticClusterIpi, 0x000B. A mask of zero names nobody.
#[derive(Clone, Copy, Debug)]
pub struct SendSyntheticClusterIpi;

/// HvCallSendSyntheticClusterIpiEx, 0x0015. The vector is checked also when the set is empty.
#[derive(Clone, Copy, Debug)]
pub struct SendSyntheticClusterIpiEx;

impl Declaration for SendSyntheticClusterIpi {
    const CODE: CallCode = CallCode::SEND_SYNTHETIC_CLUSTER_IPI;
    const NEEDS: Privileges = Privileges::CLUSTER_IPI;
    type Header = inputs::SendSyntheticClusterIpi;
    type Element = u64;
}

impl Declaration for SendSyntheticClusterIpiEx {
    const CODE: CallCode = CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX;
    const NEEDS: Privileges = Privileges::CLUSTER_IPI.with(Privileges::EX_PROCESSOR_MASKS);
    const MAX_VARIABLE_HEADER: u16 = MAX_BANKS as u16;
    type Header = inputs::SendSyntheticClusterIpiEx;
    type Element = u64;
}

#[inline]
fn check_vector(vector: u32, vtl: InputVtl) -> Checked<u8> {
    check_vtl(vtl)?;
    match u8::try_from(vector) {
        Ok(byte) if vector >= inputs::IPI_VECTOR_MIN => Ok(byte),
        _ => Err(INVALID_PARAMETER),
    }
}

impl<H: ClusterIpi + ?Sized> Hypercall<H> for SendSyntheticClusterIpi {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        match check_vector(header.vector, header.target_vtl) {
            Ok(_) if header.processor_mask == 0 => Answer::Done,
            Ok(vector) => {
                let vps = VpSet::Sparse(SparseVpSet::from_mask(&header.processor_mask));
                host.send_ipi(input.level(), vector, &vps)
            }
            Err(answer) => answer,
        }
    }
}

#[inline]
fn parse_ex<'a>(input: &Input<'a, SendSyntheticClusterIpiEx>) -> Checked<(u8, VpSet<'a>)> {
    let header = input.header();
    let sparse = vp_set(&header.vp_set, input.variable())?;
    let vector = check_vector(header.vector, header.target_vtl)?;
    Ok((vector, vps_of_format(header.vp_set.format, sparse)?))
}

impl<H: ClusterIpi + ?Sized> Hypercall<H> for SendSyntheticClusterIpiEx {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        match parse_ex(input) {
            Ok((_, VpSet::Sparse(set))) if set.valid_bank_mask() == 0 => Answer::Done,
            Ok((vector, vps)) => host.send_ipi(input.level(), vector, &vps),
            Err(answer) => answer,
        }
    }
}
