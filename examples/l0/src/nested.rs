//! L2: what L0 does at its exits, with the library's nested state machine and shadow of L1's nested tables.
//!
//! Called by the run loop; [`crate::exits`] has the exits that both levels share.

use hvcore::addr::L2Gpa;
use hvcore::memory::Access;
use nsvm::npt::{Cause, L1Access, NptContext, NptFormat, NptOutcome};
use nsvm::{Exit, Invalidate, L2Exit, exit_code as code};

use crate::exits;
use crate::fatal::Failure;
use crate::fetch::Nested;
use crate::hyperv;
use crate::mmio;
use crate::npt01::Kind;
use crate::vp::Vp;

/// L1 executed VMRUN: puts the shadow tables in VMCB02.
pub fn enter_l2(vp: &mut Vp, invalidate: Invalidate) {
    match invalidate {
        Invalidate::None => {}
        Invalidate::Asid(asid) => invalidate_asid(vp, asid),
        Invalidate::All => {
            vp.m.code.forget_nested();
            vp.shadow.flush_all_asids();
        }
    }
    vp.counters.l2_entries.add(1);
    hyperv::set_context(vp);
    load_shadow(vp);
}

/// L1 drops what it cached under `asid`.
pub fn invalidate_asid(vp: &mut Vp, asid: u32) {
    vp.m.code.forget_nested();
    vp.shadow.flush_asid(asid);
}

/// Puts the shadow of the tables that L2 runs on in VMCB02.
pub fn load_shadow(vp: &mut Vp) {
    match context(vp) {
        Some(context) => {
            vp.m.vmcb02.control.n_cr3 = vp.shadow.activate(context).raw();
            vp.m.code.set_nested(Some(Nested { format: context.format, ncr3: context.ncr3 }));
        }
        None => {
            vp.shadow.deactivate();
            vp.m.code.set_nested(None);
        }
    }
}

/// The nested context of the L2 that L1 runs, when L1 uses nested paging.
fn context(vp: &Vp) -> Option<NptContext> {
    let paging = vp.nested.nested_paging(vp.m.vmcb01)?;
    let shared = vp.shared;
    let format =
        NptFormat::from_registers(paging.cr0, paging.cr4, paging.efer, shared.address_bits as u8, shared.gib_pages)?;
    let asid = if paging.enlightened_tlb { 0 } else { paging.asid };
    Some(NptContext { ncr3: paging.n_cr3.raw(), asid, format })
}

/// Carries out the exit that VMCB02 tells.
pub fn l2(vp: &mut Vp) -> Result<(), Failure> {
    let (shared, msrs, counters) = (vp.shared, &vp.hyperv.msrs, vp.counters);
    let outcome = vp.nested.l2_exit(&mut vp.m, |enlightenments, vmcb, gprs| {
        hyperv::takes(&shared.hyperv, msrs, &shared.memory, enlightenments, vmcb, gprs, counters)
    });
    settle(vp, outcome)
}

/// What the library said about an exit of L2.
fn settle(vp: &mut Vp, outcome: L2Exit) -> Result<(), Failure> {
    match outcome {
        L2Exit::Resume | L2Exit::ToL1 => Ok(()),
        L2Exit::NestedPageFault { gpa, error_code } => page_fault(vp, gpa, error_code),
        L2Exit::L1PageFault { gpa, error_code } => exits::npf(vp, gpa.raw(), error_code),
        L2Exit::InvalidateAsid { asid } => {
            invalidate_asid(vp, asid);
            Ok(())
        }
        L2Exit::Embedder => exits::shared(vp),
        L2Exit::DirectFlush { next_rip } => hyperv::direct_flush(vp, next_rip),
        L2Exit::Shutdown => exits::reset_machine(vp),
    }
}

/// A nested page fault of L2 in L1's nested paging.
fn page_fault(vp: &mut Vp, gpa: L2Gpa, error: u64) -> Result<(), Failure> {
    let map = vp.shared.l1map;
    match vp.shadow.fault(&vp.shared.memory, &map, gpa, error) {
        NptOutcome::Resume => {
            vp.counters.shadow_fills.add(1);
            Ok(())
        }
        NptOutcome::Reflect { info1, info2 } => reflect_npf(vp, info1, info2),
        NptOutcome::Embedder(L1Access {
            l1,
            access: Access::Write,
            table_walk: false,
            cause: Cause::WriteProtected,
            ..
        }) => {
            let kind = vp.shared.kind(l1.raw());
            if kind == Kind::Plain {
                return Err(Failure::UnexpectedFault);
            }
            mmio::write(vp, l1.raw(), kind);
            Ok(())
        }
        // L2's own page tables on a page that L0 keeps, or an address that the processor does not have: L1 sees the
        // fault as it came, which it can act on.
        NptOutcome::Embedder(_) => reflect_npf(vp, error, gpa.raw()),
    }
}

fn reflect_npf(vp: &mut Vp, info_1: u64, info_2: u64) -> Result<(), Failure> {
    let outcome = vp.nested.exit_to_l1(&mut vp.m, Exit { code: code::NPF, info_1, info_2 });
    match outcome {
        L2Exit::Shutdown => exits::reset_machine(vp),
        _ => Ok(()),
    }
}
