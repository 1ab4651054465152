//! Both levels' exits: what L0 does with the library's nested state machine and the shadow of L1's EPT.
//!
//! Called by the run loop; [`crate::vmx::exits`] has the exits that are L0's own.

use arrayvec::ArrayVec;
use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::flush::{EntryFlush, GvaFlush, NestedContext, NestedIds, SecondStageFlush, SecondStageItem};
use hvcore::memory::{Access, GuestMemory, MemoryError, SecondStage};
use nvmx::controls::{primary, secondary};
use nvmx::ept::{CachedWalk, Cause, EptOutcome, EptShadow, EptWalk, L1Access};
use nvmx::field::Field;
use nvmx::{InvEpt, L1Exit, L2Exit, NestedVmx, Vmcs};

use crate::counters::Counters;
use crate::fatal::Failure;
use crate::fetch::{MAX_LENGTH, Paging};
use crate::memory::L1Memory;
use crate::mmio;
use crate::npt01::Kind;
use crate::vmx::vp::Vp;
use crate::vmx::{exits, hyperv};

/// Carries out the exit that VMCS01 tells.
#[inline]
pub fn l1(vp: &mut Vp) -> Result<(), Failure> {
    match vp.nested.l1_exit(&mut vp.m) {
        L1Exit::Resume => Ok(()),
        L1Exit::EnterL2 => {
            enter_l2(vp);
            Ok(())
        }
        L1Exit::InvEpt(InvEpt::Context { eptp }) => {
            vp.shadow.flush_context(eptp);
            Ok(())
        }
        L1Exit::InvEpt(InvEpt::Global) => {
            vp.shadow.flush_everything();
            Ok(())
        }
        L1Exit::NotMine { reason } => exits::shared(vp, reason),
        L1Exit::Shutdown => exits::reset_machine(vp),
    }
}

/// L1 executed VMLAUNCH or VMRESUME.
fn enter_l2(vp: &mut Vp) {
    vp.counters.l2_entries.add(1);
    let ids = {
        let e = vp.nested.enlightenments();
        vp.shared.enlighten.then_some(NestedIds { vm_id: e.vm_id, vp_id: e.vp_id })
    };
    let context = vp.nested.context();
    let context = NestedContext { ids, tag: u64::from(context.vpid), root: context.eptp.unwrap_or(0) };
    // What `Retire` asks for comes back from the next `LocalFlush::enter`.
    let _ = vp.flush.set_context(context);
    load_second_stage(vp);
}

/// Puts in VMCS02 what only L0 knows of L1's memory.
pub fn load_second_stage(vp: &mut Vp) {
    load_shadow(vp);
    load_apic_pages(vp);
}

/// Tells VMCS02 where L1's virtual-APIC page and APIC-access page are, if L2 uses them. The processor writes the first:
/// it is L1's RAM, or a page that nobody reads.
fn load_apic_pages(vp: &mut Vp) {
    let vmcs12 = vp.nested.vmcs12();
    if vmcs12.get32(Field::PrimaryControls) & primary::TPR_SHADOW != 0 {
        let gpa = vmcs12.get(Field::VirtualApicAddress);
        let page = if vp.shared.memory.is_ram(gpa) { gpa } else { vp.spare };
        if page != vp.virtual_apic {
            vp.virtual_apic = page;
            vp.m.vmcs02.write(Field::VirtualApicAddress, page);
        }
    }
    let vmcs12 = vp.nested.vmcs12();
    if vmcs12.get32(Field::SecondaryControls) & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
        let page = vmcs12.get(Field::ApicAccessAddress);
        if page != vp.apic_access {
            vp.apic_access = page;
            vp.m.vmcs02.write(Field::ApicAccessAddress, page);
        }
    }
}

/// Puts the shadow of the tables that L2 runs on in VMCS02.
fn load_shadow(vp: &mut Vp) {
    let eptp = match vp.nested.context().eptp {
        Some(eptp) => vp.shadow.activate(eptp),
        None => {
            vp.shadow.deactivate();
            vp.host.eptp(vp.shared.root01)
        }
    };
    if eptp != vp.eptp02 {
        vp.eptp02 = eptp;
        vp.m.vmcs02.write(Field::EptPointer, eptp);
    }
}

/// L1's EPT as a second stage, with the shadow's translations at hand; `None` when L1 uses none.
pub fn second_stage<'v>(
    nested: &NestedVmx,
    shadow: &'v EptShadow<'static>,
    memory: &'v L1Memory,
) -> Option<CachedWalk<'v, 'static, L1Memory, 4>> {
    let eptp = nested.context().eptp?;
    let logged = nested.vmcs12().get32(Field::SecondaryControls) & secondary::PML != 0;
    Some(CachedWalk { shadow, walk: EptWalk { memory, format: *shadow.format(), eptp, logged } })
}

/// Carries out the exit that VMCS02 tells.
#[inline]
pub fn l2(vp: &mut Vp) -> Result<(), Failure> {
    let (shared, msrs, counters) = (vp.shared, &vp.hyperv.msrs, vp.counters);
    let outcome = vp.nested.l2_exit(&mut vp.m, |enlightenments, vmcs, gprs| {
        hyperv::takes(&shared.hyperv, msrs, &shared.memory, enlightenments, vmcs, gprs, counters)
    });
    settle(vp, outcome)
}

/// What the library said about an exit of L2.
pub fn settle(vp: &mut Vp, outcome: L2Exit) -> Result<(), Failure> {
    match outcome {
        L2Exit::Resume | L2Exit::ToL1 => Ok(()),
        L2Exit::Embedder { reason } => exits::shared(vp, reason),
        L2Exit::EptViolation { gpa, qualification } => ept_violation(vp, gpa, qualification),
        L2Exit::L1EptViolation { gpa, qualification } => exits::ept_violation(vp, gpa.raw(), qualification),
        L2Exit::DirectFlush => hyperv::direct_flush(vp),
        L2Exit::EptpSwitched => {
            enter_l2(vp);
            Ok(())
        }
        // The tables are L0's own, or a shadow that has only legal entries.
        L2Exit::EptMisconfiguration { .. } | L2Exit::L1EptMisconfiguration { .. } => Err(Failure::UnexpectedFault),
        L2Exit::Refused { .. } => Err(Failure::Vmcs02Refused),
        L2Exit::Shutdown => exits::reset_machine(vp),
    }
}

/// An EPT violation of L2 under L1's EPT.
fn ept_violation(vp: &mut Vp, gpa: L2Gpa, qualification: u64) -> Result<(), Failure> {
    let map = vp.shared.l1map;
    let mut pml = hyperv::pml(&vp.nested);
    let before = pml;
    let outcome = vp.shadow.fault(&vp.shared.memory, &map, gpa, qualification, pml.as_mut());
    if let (Some(now), true) = (pml, pml != before) {
        vp.nested.set_pml_index(now.index);
    }
    match outcome {
        EptOutcome::Resume => {
            vp.counters.shadow_fills.add(1);
            Ok(())
        }
        EptOutcome::Reflect { reason, qualification } => reflect(vp, reason, qualification),
        EptOutcome::Embedder(L1Access {
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
        // violation as it came, which it can act on.
        EptOutcome::Embedder(_) => reflect(vp, nvmx::exit_reason::EPT_VIOLATION, qualification),
    }
}

fn reflect(vp: &mut Vp, reason: u32, qualification: u64) -> Result<(), Failure> {
    let outcome = vp.nested.reflect_ept(&mut vp.m, reason, qualification);
    settle(vp, outcome)
}

/// Carries out what is to be flushed before the guest of `level` runs; `true` when L0's own tables may have changed.
pub fn apply(
    nested: &mut NestedVmx,
    shadow: &mut EptShadow<'static>,
    level: Level,
    flush: &EntryFlush<'_, 16>,
    counters: &Counters,
) -> bool {
    let mut physical = false;
    match flush.gva {
        GvaFlush::None => {}
        GvaFlush::Ranges(_) => {
            counters.entry_ranges.add(1);
            nested.retire_tag(level);
        }
        GvaFlush::EverythingNonGlobal | GvaFlush::Everything => {
            counters.entry_everything.add(1);
            nested.retire_tag(level);
            // A change of L0's own tables asks for this, too.
            physical = level == Level::L1;
        }
    }
    match flush.second_stage {
        SecondStageFlush::None => return physical,
        SecondStageFlush::Everything => {
            shadow.flush_everything();
        }
        SecondStageFlush::Items(items) => {
            for item in items {
                match *item {
                    SecondStageItem::Root(root) => shadow.flush_context(root),
                    SecondStageItem::RootRange { root, first, pages } => {
                        shadow.flush_gpa_range(root, L2Gpa::new(first), pages.saturating_mul(4096))
                    }
                    SecondStageItem::L1Range { first, pages } => shadow.l1_gpa_changed(
                        L1Gpa::new(first),
                        pages.saturating_mul(4096),
                        hvcore::shadow::L1Change::Unmap,
                    ),
                };
            }
        }
    }
    // L2 without EPT of L1's runs on L0's own tables.
    true
}

/// Up to 15 bytes at linear address `la` of the guest of `level`, and how many could be read.
pub fn fetch(vp: &Vp, level: Level, paging: &Paging, la: u64) -> ([u8; MAX_LENGTH], usize) {
    let memory = &vp.shared.memory;
    let walk = match level {
        Level::L1 => None,
        Level::L2 => second_stage(&vp.nested, &vp.shadow, memory),
    };
    let place = |gpa: u64, access| match &walk {
        None => Ok(L1Gpa::new(gpa)),
        Some(walk) => walk.walk(L2Gpa::new(gpa), access).map_err(|_| MemoryError),
    };
    let entry = |gpa, size| {
        let at = place(gpa, Access::Read)?;
        if size == 8 { memory.read_u64(at) } else { memory.read_u32(at).map(u64::from) }
    };
    let mut bytes = ArrayVec::<u8, MAX_LENGTH>::new();
    let mut at = la;
    while bytes.len() < MAX_LENGTH {
        let piece = ((0x1000 - (at & 0xfff)) as usize).min(MAX_LENGTH - bytes.len());
        let mut buffer = [0; MAX_LENGTH];
        let Some(buffer) = buffer.get_mut(..piece) else { break };
        let read = paging.translate(at, entry).and_then(|gpa| memory.read(place(gpa, Access::Execute)?, buffer));
        if read.is_err() || bytes.try_extend_from_slice(buffer).is_err() {
            break;
        }
        at = at.wrapping_add(piece as u64);
    }
    let mut all = [0; MAX_LENGTH];
    all[..bytes.len()].copy_from_slice(&bytes);
    (all, bytes.len())
}
