//! The Hyper-V interface: hypercalls of L1 and direct flushes of L2, synthetic MSRs, overlay pages.
//!
//! Called by the exit handlers. The library decides; here are the registers, the kicks, the mappings.

use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::direct::{self, DirectFlush, Reason};
use hvcore::flush::{
    EntryFlush, FlushCalls, FlushDomain, GvaFlush, GvaScope, NestedContext, NestedIds, Posted, SecondStageFlush,
    SecondStageItem, SecondStageScope, Shootdown, TargetIndex, VpFlush,
};
use hvcore::hypercall::calls::{
    ClusterIpi, FlushGuestPhysical, FlushGuestPhysicalAddressList, FlushGuestPhysicalAddressSpace, FlushTarget,
    FlushVirtual, FlushVirtualAddressList, FlushVirtualAddressListEx, FlushVirtualAddressSpace,
    FlushVirtualAddressSpaceEx, GvaRanges, LongSpinWait, NotifyLongSpinWait, SendSyntheticClusterIpi,
    SendSyntheticClusterIpiEx,
};
use hvcore::hypercall::{Answer, CallerMode, Outcome, Registers, Scratch, Width, handle};
use hvcore::memory::{CallerMemory, GuestMemory, L1Caller, L2Caller};
use hvcore::partition::{
    Action, CrashMessage, EmbedderRead, Interface, MsrRead, MsrWrite, NestedCapabilities, Overlay, PartitionConfig,
    Vendor, VpInterface,
};
use hvcore::vp_index::{VpIndexMap, VpSlot};
use hw::apic::reg;
use nsvm::insn::Kind;
use nsvm::vmcb::Vmcb;
use nsvm::{Fault, L2Exit};
use tlfs_abi::evmcb::EnlightenedVmcbFields;
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::VpSet;

use crate::audit;
use crate::counters::Counters;
use crate::exits;
use crate::fatal::{Failure, give_up};
use crate::fetch::Fetch;
use crate::ipi::MAX_CPUS;
use crate::memory::Overlays;
use crate::mmio;
use crate::mutant::Mutant;
use crate::registers::{CallRegisters, Gprs};
use crate::relocate::phys_of;
use crate::say;
use crate::shared::Shared;
use crate::time::Clocks;
use crate::trace;
use crate::vp::Vp;

static FLUSH: [VpFlush; MAX_CPUS] = [const { VpFlush::new() }; MAX_CPUS];
static BUCKETS: [AtomicU64; 2 * MAX_CPUS] = [const { AtomicU64::new(0) }; 2 * MAX_CPUS];
const GROUP: usize = TargetIndex::group_words(MAX_CPUS);
static GROUPS: [AtomicU64; 9 * GROUP] = [const { AtomicU64::new(0) }; 9 * GROUP];
static MAP: [AtomicU16; MAX_CPUS] = [const { AtomicU16::new(0) }; MAX_CPUS];
static KNOWN: [AtomicU64; 1] = [const { AtomicU64::new(0) }; 1];

/// A page that overlays L1's memory.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct OverlayPage([AtomicU64; 512]);

static OVERLAY_PAGES: [OverlayPage; 2] = [const { OverlayPage([const { AtomicU64::new(0) }; 512]) }; 2];
/// Where L1 has its overlay pages.
pub static OVERLAYS: Overlays = Overlays::new();

/// The partition: what all VPs share.
#[derive(Debug)]
pub struct HyperV {
    /// Leaves, privileges, MSRs.
    pub interface: Interface,
    /// VP indexes.
    pub map: VpIndexMap<'static>,
    /// Who may hold which translations.
    pub domain: FlushDomain<'static>,
}

/// One VP's part of it.
#[derive(Debug)]
pub struct VpHyperV {
    /// Its MSRs.
    pub msrs: VpInterface,
    /// Targets of its last flush.
    shootdown: Shootdown,
    /// The last call concerns its own VP: all GVA translations of the caller's level are to be flushed.
    pub flushes_caller: bool,
    /// Input of its hypercalls.
    scratch: Scratch,
}

impl HyperV {
    /// The interface of a machine with physical addresses of `address_bits` bits, offering `nested` enlightenments.
    pub fn new(address_bits: u32, vendor: Vendor, nested: NestedCapabilities, clocks: Option<Clocks>) -> Self {
        let mut config = PartitionConfig::new(vendor, MAX_CPUS as u32, address_bits as u8)
            .offer::<Calls<'_>>()
            .xmm_input()
            .apic_msrs()
            .crash(true)
            .nested(nested);
        if let Some(clocks) = clocks {
            config = config.reference_counter().frequencies(clocks.tsc, clocks.apic);
            if clocks.constant {
                config = config.reference_tsc(clocks.page);
            }
        }
        let interface = match config.build() {
            Ok(interface) => interface,
            Err(error) => give_up(format_args!("impossible Hyper-V interface: {error:?}")),
        };
        let (Ok(map), Ok(index)) = (VpIndexMap::new(&MAP, &KNOWN), TargetIndex::new(MAX_CPUS, &BUCKETS, &GROUPS))
        else {
            give_up(format_args!("wrong sizes of the VP tables"));
        };
        for (page, which) in OVERLAY_PAGES.iter().zip(Overlay::ALL) {
            let mut contents = [0; 4096];
            interface.overlay_contents(which, 0, &mut contents);
            for (word, bytes) in page.0.iter().zip(contents.as_chunks::<8>().0) {
                word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
            }
        }
        Self { interface, map, domain: FlushDomain::new(&FLUSH, index) }
    }

    /// The part of VP `id`, which is online from now on.
    pub fn vp(&self, id: usize) -> Option<VpHyperV> {
        let msrs = self.interface.vp(id as u32)?;
        self.map.assign(id as u32, VpSlot::new(id as u32)?).ok()?;
        Some(VpHyperV { msrs, shootdown: Shootdown::new(), flushes_caller: false, scratch: Scratch::new() })
    }

    /// Physical address of the page behind an overlay.
    pub fn overlay_page(which: Overlay) -> u64 {
        let at = Overlay::ALL.iter().position(|w| *w == which).unwrap_or(0);
        phys_of(&raw const OVERLAY_PAGES[at])
    }
}

/// Serves the hypercalls of one caller.
pub struct Calls<'c> {
    flush: FlushCalls<'c, 'static>,
    shared: &'static Shared,
    counters: &'static Counters,
    vm_id: u64,
    /// What the auditor was told.
    audited: Option<audit::Request>,
}

impl Calls<'_> {
    #[cold]
    fn audit(&mut self, target: &FlushTarget<'_>) {
        self.audited = audit::request(target.level, self.vm_id, |index| target.vps.contains(index));
    }
}

impl FlushVirtual for Calls<'_> {
    #[inline(always)]
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        if self.shared.audit {
            self.audit(target);
        }
        self.counters.flush_spaces.add(1);
        self.flush.flush_space(target)
    }

    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        if self.shared.audit {
            self.audit(target);
        }
        self.counters.flush_ranges.add(ranges.raw.len() as u64);
        self.flush.flush_list(target, ranges)
    }
}

impl FlushGuestPhysical for Calls<'_> {
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer {
        self.flush.flush_guest_physical_space(address_space)
    }

    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        self.flush.flush_guest_physical_list(address_space, ranges)
    }
}

impl ClusterIpi for Calls<'_> {
    fn send_ipi(&mut self, _level: Level, vector: u8, vps: &VpSet<'_>) -> Answer {
        let apic = self.shared.apic;
        for slot in self.shared.hyperv.map.slots(vps) {
            let Some(apic_id) = self.shared.ipis.apic_id(slot.number()) else { continue };
            // SAFETY: a fixed interrupt for L1, as L1 could send it itself.
            unsafe { apic.send_preserving_icr(apic_id, hw::apic::ICR_ASSERT | u32::from(vector)) };
        }
        Answer::Done
    }
}

impl LongSpinWait for Calls<'_> {
    fn notify_long_spin_wait(&mut self, _spins: u32) -> Answer {
        // Each VP has its own processor: there is nobody to let run.
        Answer::Done
    }
}

hvcore::offer_hypercalls!(impl['c] for Calls<'c> {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
    SendSyntheticClusterIpi,
    SendSyntheticClusterIpiEx,
    NotifyLongSpinWait,
});

/// The mode of the guest in `vmcb`.
#[inline]
fn mode(vmcb: &Vmcb) -> CallerMode {
    let s = &vmcb.save;
    CallerMode::new(s.efer, s.cr0, vmcb.in_64bit_code(), s.cpl)
}

/// Performs the hypercall of `level`, and everything that its completion needs.
#[inline(always)]
fn perform<C: CallerMemory + ?Sized>(vp: &mut Vp, level: Level, vm_id: u64, memory: &C) -> Outcome {
    let vmcb = match level {
        Level::L1 => &mut *vp.m.vmcb01,
        Level::L2 => &mut *vp.m.vmcb02,
    };
    let call = Call { level, mode: mode(vmcb), vm_id, slot: Some(vp.id as u16) };
    let mut registers = CallRegisters { vmcb, gprs: vp.m.gprs };
    let outcome = vp.hyperv.perform(vp.shared, vp.counters, &call, &mut registers, memory);
    if vp.hyperv.flushes_caller {
        vp.counters.entry_everything.add(1);
        vp.nested.retire_tag(level);
    }
    outcome
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its level.
    pub level: Level,
    /// Its processor's mode.
    pub mode: CallerMode,
    /// Its VM_ID, for L2.
    pub vm_id: u64,
    /// Its VP's slot, when that is flushed after the call as [`VpHyperV::flushes_caller`] says.
    pub slot: Option<u16>,
}

impl VpHyperV {
    /// Performs the hypercall in `registers`, and everything that its completion needs.
    #[inline(always)]
    pub fn perform<R: Registers, C: CallerMemory + ?Sized>(
        &mut self,
        shared: &'static Shared,
        counters: &'static Counters,
        call: &Call,
        registers: &mut R,
        memory: &C,
    ) -> Outcome {
        let hyperv = &shared.hyperv;
        let caller = hyperv.interface.caller(call.mode, call.level);
        let mut flush = FlushCalls::new(&hyperv.domain, &hyperv.map, call.vm_id, &mut self.shootdown);
        if let Some(slot) = call.slot {
            flush = flush.called_by(slot);
        }
        let mut calls = Calls { flush, shared, counters, vm_id: call.vm_id, audited: None };
        let outcome = handle(&mut calls, &caller, registers, memory, &mut self.scratch);
        let posted = calls.flush.posted();
        self.flushes_caller = calls.flush.flushes_caller();
        let audited = if shared.audit { calls.audited } else { None };
        if posted != Posted::Done {
            settle(shared, &mut self.shootdown, posted, counters);
        } else {
            counters.waits_avoided.add(1);
        }
        if let (Some(request), Outcome::Complete(_)) = (audited, &outcome) {
            audit::complete(request);
        }
        outcome
    }
}

/// Kicks the targets of a request and waits for them.
///
/// GIF is clear: a kick to this processor is held meanwhile. No one waits for it, as it has left its guest, which it
/// told before (`LocalFlush::exit`).
fn settle(shared: &Shared, shootdown: &mut Shootdown, posted: Posted, counters: &Counters) {
    if shared.mutant == Some(Mutant::NoKick) {
        return;
    }
    counters.flush_waits.add(u64::from(posted == Posted::Wait));
    for slot in shootdown.kicks() {
        counters.flush_kicks.add(1);
        shared.kick(usize::from(slot));
    }
    if posted == Posted::Wait {
        if shared.trace {
            trace::record(rt::cpu::current().index as usize, trace::Event::WaitBegins);
        }
        let start = hw::cpu::rdtsc();
        while !shootdown.poll(shared.hyperv.domain.vps()) {
            hw::cpu::pause();
        }
        counters.flush_wait_ticks.add(hw::cpu::rdtsc().wrapping_sub(start));
        if shared.trace {
            trace::record(rt::cpu::current().index as usize, trace::Event::WaitEnds);
        }
    }
}

/// VMMCALL of L1.
pub fn l1_call(vp: &mut Vp) {
    if !vp.shared.enlighten {
        return exits::raise(vp, Fault::UD);
    }
    vp.counters.l1_calls.add(1);
    let memory = &vp.shared.memory;
    match perform(vp, Level::L1, 0, &L1Caller(memory)) {
        Outcome::Complete(_) => {
            exits::step_over(vp, Kind::Vmmcall);
        }
        // RIP stays: the call is issued again.
        Outcome::Retry | Outcome::Suspend => {}
        Outcome::InjectUd => exits::raise(vp, Fault::UD),
    }
}

/// Whether L0 takes the hypercall of the L2 in `vmcb`.
#[inline]
pub fn takes(
    hyperv: &HyperV,
    vp: &VpInterface,
    memory: &crate::memory::L1Memory,
    enlightenments: &EnlightenedVmcbFields,
    vmcb: &Vmcb,
    gprs: &Gprs,
    counters: &Counters,
) -> bool {
    let input = match mode(vmcb).width {
        Width::Bits64 => gprs.rcx,
        Width::Bits32 => gprs.rdx << 32 | vmcb.save.rax & 0xffff_ffff,
    };
    let call = HypercallInput(input).call_code();
    let in_context = enlightenments.enlightenments_control.nested_flush_virtual_hypercall();
    match direct::authorise(&hyperv.interface, vp, in_context, call, memory) {
        DirectFlush::Allowed => true,
        DirectFlush::Reflect(Reason::OtherCall) => false,
        DirectFlush::Reflect(_) => {
            counters.reflected_flushes.add(1);
            false
        }
    }
}

/// A direct flush: L2's hypercall, done by L0. `next_rip` is behind the instruction.
pub fn direct_flush(vp: &mut Vp, next_rip: u64) -> Result<(), Failure> {
    let (vm_id, assist) = (vp.nested.enlightenments().vm_id, vp.nested.enlightenments().partition_assist_page);
    let memory = &vp.shared.memory;
    vp.counters.direct_flushes.add(1);
    let outcome = match vp.m.code.second_stage() {
        Some(walk) => perform(vp, Level::L2, vm_id, &L2Caller { memory, second_stage: &walk }),
        None => perform(vp, Level::L2, vm_id, &L1Caller(memory)),
    };
    match outcome {
        Outcome::Complete(result) => {
            vp.m.vmcb02.complete_instruction(next_rip);
            if !result.status().is_success() {
                return Ok(());
            }
            // TlbLockCount is the first word of the partition assist page.
            let locked = (assist & 0xfff == 0).then(|| memory.read_u32(L1Gpa::new(assist)).ok()).flatten();
            match locked {
                Some(0) => Ok(()),
                Some(_) => {
                    vp.counters.synthetic_exits.add(1);
                    if vp.shared.trace {
                        trace::record(vp.id, trace::Event::Synthetic);
                    }
                    synthetic_exit(vp)
                }
                None => {
                    refuse(vp, result);
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

/// L1 locked the TLB: it is told of the flush.
fn synthetic_exit(vp: &mut Vp) -> Result<(), Failure> {
    match vp.nested.synthetic_exit(&mut vp.m) {
        L2Exit::Shutdown => exits::reset_machine(vp),
        _ => Ok(()),
    }
}

/// The flush is done, but its partition assist page is not there: HV_STATUS_INVALID_HYPERCALL_INPUT.
fn refuse(vp: &mut Vp, done: HypercallResult) {
    let result = HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, done.reps_completed()).raw();
    let vmcb = &mut *vp.m.vmcb02;
    match mode(vmcb).width {
        Width::Bits64 => vmcb.save.rax = result,
        Width::Bits32 => {
            vmcb.save.rax = result & 0xffff_ffff;
            vp.m.gprs.rdx = result >> 32;
        }
    }
}

/// Announces the nested context that L2 is about to run in.
pub fn set_context(vp: &mut Vp) {
    let enlightenments = vp.nested.enlightenments();
    let ids = vp.shared.enlighten.then_some(NestedIds { vm_id: enlightenments.vm_id, vp_id: enlightenments.vp_id });
    let context = vp.nested.context();
    let context = NestedContext { ids, tag: u64::from(context.asid), root: context.n_cr3.unwrap_or(0) };
    // What `Retire` asks for comes back from the next `LocalFlush::enter`.
    let _ = vp.flush.set_context(context);
}

/// Carries out what is to be flushed before the guest of `level` runs.
pub fn apply(
    nested: &mut nsvm::NestedSvm,
    shadow: &mut nsvm::npt::NptShadow<'static>,
    code: &Fetch,
    level: Level,
    flush: &EntryFlush<'_, 16>,
    counters: &Counters,
) {
    match flush.gva {
        GvaFlush::None => {}
        GvaFlush::Ranges(_) => {
            counters.entry_ranges.add(1);
            nested.retire_tag(level);
        }
        GvaFlush::EverythingNonGlobal | GvaFlush::Everything => {
            counters.entry_everything.add(1);
            nested.retire_tag(level);
        }
    }
    match flush.second_stage {
        SecondStageFlush::None => return,
        SecondStageFlush::Everything => {
            shadow.flush_everything();
        }
        SecondStageFlush::Items(items) => {
            for item in items {
                match *item {
                    SecondStageItem::Root(root) => shadow.flush_address_space(root),
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
    code.forget_nested();
    nested.retire_tag(Level::L2);
}

/// L1's processor `id` says that its system has crashed, and perhaps in what words.
#[cold]
fn crashed(shared: &Shared, id: usize, message: Option<CrashMessage>) {
    say!("l0: cpu {id}: L1 crashed: {:x?}", shared.hyperv.interface.crash_parameters());
    let Some(CrashMessage { gpa, length }) = message else { return };
    let (mut text, mut at, end) = ([0; 64], gpa.raw(), gpa.raw().saturating_add(u64::from(length)));
    while at < end {
        let part = &mut text[..(end - at).min(64) as usize];
        if shared.memory.read(L1Gpa::new(at), part).is_err() {
            return;
        }
        at += part.len() as u64;
        // Lines of their own: a message may have no printable byte in it.
        say!("l0: cpu {id}: {}", part.escape_ascii());
    }
}

impl VpHyperV {
    /// RDMSR of a synthetic MSR; `None`: #GP.
    pub fn read_msr(&self, shared: &Shared, number: u32) -> Option<u64> {
        if !shared.enlighten {
            return None;
        }
        let now = shared.clocks.map_or(0, |clocks| clocks.now());
        match shared.hyperv.interface.msr_read(&self.msrs, number, now) {
            MsrRead::Value(value) => Some(value),
            MsrRead::Fault | MsrRead::NotMine => None,
            MsrRead::Embedder(EmbedderRead::Icr) => {
                let apic = shared.apic;
                Some(u64::from(apic.read(reg::ICR_HIGH)) << 32 | u64::from(apic.read(reg::ICR_LOW)))
            }
            MsrRead::Embedder(EmbedderRead::Tpr) => Some(u64::from(shared.apic.read(reg::TPR))),
        }
    }

    /// WRMSR of a synthetic MSR by processor `id`, which is this one; `false`: #GP.
    pub fn write_msr(
        &mut self,
        shared: &'static Shared,
        id: usize,
        counters: &Counters,
        number: u32,
        value: u64,
    ) -> bool {
        if !shared.enlighten {
            return false;
        }
        let action = match shared.hyperv.interface.msr_write(&self.msrs, number, value) {
            MsrWrite::Done => return true,
            MsrWrite::Fault | MsrWrite::NotMine => return false,
            MsrWrite::Embedder(action) => action,
        };
        match action {
            Action::Overlay(change) => self.overlay_changed(shared, counters, change.which),
            Action::Eoi(value) => mmio::apic_write(shared, id, reg::EOI, value),
            Action::Icr(value) => {
                mmio::apic_write(shared, id, reg::ICR_HIGH, (value >> 32) as u32);
                mmio::apic_write(shared, id, reg::ICR_LOW, value as u32);
            }
            Action::Tpr(value) => mmio::apic_write(shared, id, reg::TPR, u32::from(value)),
            Action::Crash(message) => crashed(shared, id, message),
            // Not offered.
            Action::Reset | Action::StopTscEmulation => {}
        }
        true
    }

    /// Makes L0's tables and the shadows agree with where L1 has its overlay page now.
    fn overlay_changed(&mut self, shared: &'static Shared, counters: &Counters, which: Overlay) {
        let interface = &shared.hyperv.interface;
        let old = {
            let mut npt = shared.npt01.lock();
            let to = interface.overlay(which).map(L1Gpa::raw);
            let page = HyperV::overlay_page(which);
            let old = OVERLAYS.place(which, to, page);
            if let Some(gpa) = old.filter(|gpa| OVERLAYS.at(*gpa).is_none()) {
                let _ = npt.set_overlay(gpa, None);
            }
            if let Some(gpa) = to
                && npt.set_overlay(gpa, Some(page)).is_err()
            {
                crate::say!("l0: no page to map the overlay at {gpa:#x}");
            }
            old
        };
        // Every VP forgets what it cached of the two places.
        let shootdown = &mut self.shootdown;
        let hyperv = &shared.hyperv;
        let posted = hyperv.domain.flush_l1(&hyperv.map, VpSet::All, GvaScope::Everything, shootdown);
        settle(shared, shootdown, posted, counters);
        for gpa in [old, interface.overlay(which).map(L1Gpa::raw)].into_iter().flatten() {
            let scope = SecondStageScope::L1Pages { first: L1Gpa::new(gpa), pages: 1 };
            let posted = hyperv.domain.flush_second_stage(scope, shootdown);
            settle(shared, shootdown, posted, counters);
        }
    }
}
