//! Direct flushes on VT-x; [`crate::hyperv`] has what both vendors share.

use hvcore::addr::{L1Gpa, Level};
use hvcore::direct::{self, DirectFlush, Reason};
use hvcore::hypercall::{CallerMode, Outcome, Width};
use hvcore::memory::{GuestMemory, L1Caller, L2Caller};
use hvcore::partition::VpInterface;
use nvmx::ept::Pml;
use nvmx::evmcs::Enlightenments;
use nvmx::field::Field;
use nvmx::{Fault, NestedVmx, Vmcs, step};
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;

use crate::counters::Counters;
use crate::fatal::Failure;
use crate::hyperv::{Call, HyperV};
use crate::memory::L1Memory;
use crate::trace;
use crate::vmx::nested::{second_stage, settle};
use crate::vmx::registers::Gprs;
use crate::vmx::vp::Vp;
use crate::vmx::{exits, vmcs::HwVmcs};

/// The mode of the guest in `vmcs`.
#[inline]
pub fn mode(vmcs: &HwVmcs) -> CallerMode {
    let efer = vmcs.read(Field::GuestEfer);
    CallerMode::new(efer, vmcs.read(Field::GuestCr0), step::in_64bit_code(vmcs), step::cpl(vmcs))
}

/// Whether L0 takes the hypercall of the L2 in `vmcs`.
#[inline]
pub fn takes(
    hyperv: &HyperV,
    vp: &VpInterface,
    memory: &L1Memory,
    enlightenments: &Enlightenments,
    vmcs: &HwVmcs,
    gprs: &Gprs,
    counters: &Counters,
) -> bool {
    let g = &gprs.0.gprs;
    let input = match mode(vmcs).width {
        Width::Bits64 => g.rcx,
        Width::Bits32 => g.rdx << 32 | g.rax & 0xffff_ffff,
    };
    let call = HypercallInput(input).call_code();
    let in_context = enlightenments.control.nested_flush_virtual_hypercall();
    match direct::authorise(&hyperv.interface, vp, in_context, call, memory) {
        DirectFlush::Allowed => true,
        DirectFlush::Reflect(Reason::OtherCall) => false,
        DirectFlush::Reflect(_) => {
            counters.reflected_flushes.add(1);
            false
        }
    }
}

/// A direct flush: L2's hypercall, done by L0.
pub fn direct_flush(vp: &mut Vp) -> Result<(), Failure> {
    let enlightenments = vp.nested.enlightenments();
    let (vm_id, assist) = (enlightenments.vm_id, enlightenments.partition_assist_page);
    let memory = &vp.shared.memory;
    vp.counters.direct_flushes.add(1);
    let call = Call { level: Level::L2, mode: mode(vp.m.vmcs02), vm_id, slot: None };
    let (shared, counters, gprs) = (vp.shared, vp.counters, &mut *vp.m.gprs);
    let outcome = match second_stage(&vp.nested, &vp.shadow, memory) {
        Some(walk) => vp.hyperv.perform(shared, counters, &call, gprs, &L2Caller { memory, second_stage: &walk }),
        None => vp.hyperv.perform(shared, counters, &call, gprs, &L1Caller(memory)),
    };
    match outcome {
        Outcome::Complete(result) => {
            step::complete_instruction(vp.m.vmcs02);
            if !result.status().is_success() {
                return Ok(());
            }
            // TlbLockCount is the first word of the partition assist page.
            let locked = (assist & 0xfff == 0).then(|| memory.read_u32(L1Gpa::new(assist)).ok()).flatten();
            match locked {
                Some(0) => Ok(()),
                Some(_) => {
                    vp.counters.synthetic_exits.add(1);
                    if shared.trace {
                        trace::record(vp.id, trace::Event::Synthetic);
                    }
                    let outcome = vp.nested.synthetic_exit(&mut vp.m);
                    settle(vp, outcome)
                }
                None => {
                    refuse(vp.m.gprs, call.mode.width, result);
                    Ok(())
                }
            }
        }
        Outcome::Retry | Outcome::Suspend => Ok(()),
        Outcome::InjectUd => {
            exits::raise(vp, Fault::UD);
            Ok(())
        }
    }
}

/// The flush is done, but its partition assist page is not there: HV_STATUS_INVALID_HYPERCALL_INPUT.
fn refuse(gprs: &mut Gprs, width: Width, done: HypercallResult) {
    let result = HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, done.reps_completed()).raw();
    let g = &mut gprs.0.gprs;
    match width {
        Width::Bits64 => g.rax = result,
        Width::Bits32 => {
            g.rax = result & 0xffff_ffff;
            g.rdx = result >> 32;
        }
    }
}

/// L1's page-modification log, while L2 runs with one.
pub fn pml(nested: &NestedVmx) -> Option<Pml> {
    let vmcs12 = nested.vmcs12();
    let on = vmcs12.get32(Field::SecondaryControls) & nvmx::controls::secondary::PML != 0;
    on.then(|| Pml { address: L1Gpa::new(vmcs12.get(Field::PmlAddress)), index: vmcs12.get(Field::PmlIndex) as u16 })
}
