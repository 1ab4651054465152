//! One virtual processor of L1 on its physical processor: state, entry, and the run loop.
//!
//! Interrupts are off in L0 and L1's own in the guest. NMIs come at any time; see [`crate::vmx::kick`].

use core::sync::atomic::{AtomicU8, AtomicU64};

use hvcore::addr::Level;
use hvcore::flush::LocalFlush;
use hw::vmx::{self, Entered, InvEpt, InvVpid};
use hw::{apic, cpu, msr, vmx_host};
use nvmx::ept::{EptFormat, EptShadow};
use nvmx::evmcs::{ActivePage, ActivePages};
use nvmx::exit_reason;
use nvmx::field::Field;
use nvmx::vpid::{self, Flush, VpidPool};
use nvmx::{Entry, EntryPlan, Machine, MergedMap, NestedVmx, Vmcs, step};

use crate::audit;
use crate::counters::{self, Counters};
use crate::fatal::Failure;
use crate::fetch::{MAX_LENGTH, Paging};
use crate::hyperv::VpHyperV;
use crate::ipi::MAX_CPUS;
use crate::lapic;
use crate::mutant::Mutant;
use crate::pages::{keep, shadow_pool};
use crate::shared::Shared;
use crate::trace;
use crate::vmx::host::{IO_BITMAPS01, MSR_BITMAP01, VmxHost};
use crate::vmx::linear::L1Linear;
use crate::vmx::memory::VpMemory;
use crate::vmx::pages::{Pages, PagesPa};
use crate::vmx::registers::Gprs;
use crate::vmx::vmcs::{Current, HwVmcs};
use crate::vmx::{exits, guest, kick, nested, vcr};

/// CR4.OSXSAVE: L0 executes XSETBV for L1.
const OSXSAVE: u64 = 1 << 18;
/// The enlightened VMCS that is active on each VP.
static ACTIVE_EVMCS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// A virtual processor of L1.
pub struct Vp {
    /// Which processor.
    pub id: usize,
    /// The whole machine.
    pub shared: &'static Shared,
    /// What the machine has of VT-x.
    pub host: &'static VmxHost,
    /// What the library works on: VMCSs, registers, bitmaps, VPIDs, memory.
    pub m: Machine<'static, HwVmcs, Gprs, VpMemory, L1Linear>,
    /// The nested state.
    pub nested: NestedVmx,
    /// The shadow of L1's EPT.
    pub shadow: EptShadow<'static>,
    /// APIC_BASE as L1 sees it.
    pub apic_base: u64,
    /// Waits for a SIPI.
    pub waiting: bool,
    /// What others may ask it to flush.
    pub flush: LocalFlush<'static>,
    /// Its part of the Hyper-V interface.
    pub hyperv: VpHyperV,
    /// What it counts.
    pub counters: &'static Counters,
    /// An NMI arrived: the entry must not happen before that has been looked at.
    kicked: &'static AtomicU8,
    /// An INIT for L1 is on its way through the library.
    init_held: bool,
    /// The vector of a SIPI that came behind it.
    held_sipi: Option<u8>,
    /// All that was cached of L0's tables is to be flushed before the next entry.
    flush_physical: bool,
    /// The EPT pointer of VMCS02.
    pub eptp02: u64,
    /// The virtual-APIC address of VMCS02.
    pub virtual_apic: u64,
    /// The APIC-access address of VMCS02.
    pub apic_access: u64,
    /// Physical address of a page that nobody reads.
    pub spare: u64,
    /// Turns of the run loop, where the nested state is churned.
    turns: u64,
    /// What this entry was told to forget, for the auditor.
    invept: bool,
    /// When the guest left last, where instructions are counted.
    left_at: u64,
}

impl Vp {
    /// Makes this processor a host with a VP in the state after INIT.
    ///
    /// # Safety
    /// Called on processor `id`, once. Its descriptor tables, TSS and NMI handler are L0's.
    pub unsafe fn new(id: usize, shared: &'static Shared, host: &'static VmxHost) -> Result<Self, Failure> {
        let counters = counters::of(id);
        let pages = Pages::allocate()?;
        let pa = PagesPa::of(pages);
        if cpu::cpuid(1, 0).ecx & 1 << 26 != 0 {
            // SAFETY: the processor has XSAVE.
            unsafe { cpu::write_cr4(cpu::cr4() | OSXSAVE) };
        }
        // SAFETY: the page is this VP's alone; VMX is there (checked at boot), and this processor was not in it.
        unsafe { vmx::enable(&raw mut pages.vmxon, pa.vmxon) }.map_err(|_| Failure::VmxDisabled)?;
        let current = keep(Current::new(counters))?;
        // SAFETY: VMX operation; the pages are this VP's alone.
        let vmcs01 = unsafe { HwVmcs::new(&mut pages.vmcs01, pa.vmcs01, current) };
        let vmcs01 = keep(vmcs01.map_err(|_| Failure::VmxDisabled)?)?;
        // SAFETY: as above.
        let vmcs02 = unsafe { HwVmcs::new(&mut pages.vmcs02, pa.vmcs02, current) };
        let vmcs02 = keep(vmcs02.map_err(|_| Failure::VmxDisabled)?)?;
        let kicked = kick::flag(id);
        let gprs = keep(Gprs(vmx::World::new(kicked)))?;
        // SAFETY: every processor with VMX has APIC_BASE.
        let apic_base = unsafe { msr::rdmsr(msr::APIC_BASE) };
        let hyperv = shared.hyperv.vp(id).ok_or(Failure::TooManyCpus)?;
        let flush = shared.hyperv.domain.local(id as u16).ok_or(Failure::TooManyCpus)?;
        // As many as the auditor models.
        let last_vpid = if shared.audit { 15 } else { u16::MAX };
        let mut m = Machine {
            vmcs01,
            vmcs02,
            gprs,
            msr_bitmap02: MergedMap { words: &mut pages.msr_bitmap02, base: pa.msr_bitmap02 },
            io_bitmaps02: MergedMap { words: &mut pages.io_bitmaps02, base: pa.io_bitmaps02 },
            msr_bitmap01: &MSR_BITMAP01.0,
            io_bitmaps01: &IO_BITMAPS01.0,
            vpids: keep(VpidPool::new(id as u32, last_vpid, vpid::Support::SingleContext))?,
            assist_page: None,
            active_evmcs: Some(ActivePage { pages: ActivePages::new(&ACTIVE_EVMCS), vp: id }),
            memory: keep(VpMemory::new(&shared.memory, shared.count_bytes.then_some(counters)))?,
            linear: keep(L1Linear::new(&shared.memory, shared.address_bits))?,
        };
        let nested = NestedVmx::new(host.config, &mut m.msr_bitmap02, &mut m.io_bitmaps02);
        let shadow = EptShadow::new(shadow_pool()?, 4, EptFormat::of(&host.config)).map_err(|_| Failure::OutOfPages)?;
        let mut vp = Self {
            id,
            shared,
            host,
            m,
            nested,
            shadow,
            apic_base,
            waiting: apic_base & apic::BASE_BSP == 0,
            flush,
            hyperv,
            counters,
            kicked,
            init_held: false,
            held_sipi: None,
            flush_physical: true,
            turns: 0,
            invept: false,
            eptp02: 0,
            virtual_apic: u64::MAX,
            apic_access: u64::MAX,
            spare: pa.spare,
            left_at: cpu::rdtsc(),
        };
        vp.set_host_state();
        vp.set_controls();
        shared.ipis.add(id, shared.apic.id());
        vp.init();
        Ok(vp)
    }

    /// Where exits lead, in both VMCSs, and zero for all else.
    fn set_host_state(&mut self) {
        for vmcs in [&mut *self.m.vmcs02, &mut *self.m.vmcs01] {
            vmcs.zero();
            // SAFETY: the VMCS is current; the processor runs L0 with its own tables; the registers never move.
            unsafe {
                vmx_host::write_host_state();
                self.m.gprs.0.bind();
            }
        }
    }

    /// L0's own controls for L1.
    fn set_controls(&mut self) {
        let (host, c) = (self.host, &self.host.controls);
        let fields = [
            (Field::PinBasedControls, c.pin.into()),
            (Field::PrimaryControls, c.primary.into()),
            (Field::SecondaryControls, c.secondary.into()),
            (Field::ExitControls, c.exit.into()),
            (Field::EntryControls, c.entry.into()),
            (Field::ExceptionBitmap, 0),
            (Field::PageFaultErrorCodeMask, 0),
            (Field::PageFaultErrorCodeMatch, 0),
            (Field::Cr3TargetCount, 0),
            (Field::ExitMsrStoreCount, 0),
            (Field::ExitMsrLoadCount, 0),
            (Field::EntryMsrLoadCount, 0),
            (Field::IoBitmapA, host.io_bitmaps01),
            (Field::IoBitmapB, host.io_bitmaps01 + 4096),
            (Field::MsrBitmap, host.msr_bitmap01),
            (Field::XssExitingBitmap, 0),
            (Field::EptPointer, host.eptp(self.shared.root01)),
            (Field::VmcsLinkPointer, u64::MAX),
            (Field::Cr0Mask, host.cr0_fixed),
            (Field::Cr4Mask, host.cr4_fixed | vcr::VMXE),
        ];
        for (field, value) in fields {
            self.m.vmcs01.write(field, value);
        }
    }

    /// The state of L1's processor after INIT.
    pub fn init(&mut self) {
        let v = &mut *self.m.vmcs01;
        v.write(Field::EntryControls, self.host.controls.entry.into());
        guest::init(v, self.host);
        self.m.gprs.0.gprs = vmx::Gprs { rdx: u64::from(cpu::cpuid(1, 0).eax), ..Default::default() };
        self.flush_l1();
        // SAFETY: L0 uses neither page faults nor breakpoints.
        unsafe {
            cpu::write_cr2(0);
            cpu::write_dr6(0xffff_0ff0);
        }
    }

    /// The state in which a multiboot kernel starts: 32-bit flat segments, no paging.
    pub fn start_multiboot(&mut self, entry: &crate::loader::Entry) {
        self.init();
        self.waiting = false;
        guest::start_flat(&mut *self.m.vmcs01, self.host, entry.eip, 8, 0x10);
        self.m.gprs.0.gprs.rax = u64::from(crate::loader::BOOT_MAGIC);
        self.m.gprs.0.gprs.rbx = u64::from(entry.info);
    }

    /// The state in which a Linux kernel starts.
    pub fn start_linux(&mut self, entry: &crate::linux::Entry) {
        self.init();
        self.waiting = false;
        guest::start_flat(&mut *self.m.vmcs01, self.host, entry.eip, 0x10, 0x18);
        guest::set_gdt(&mut *self.m.vmcs01, entry.gdt, 31);
        self.m.gprs.0.gprs = vmx::Gprs { rsi: u64::from(entry.params), ..Default::default() };
    }

    /// Runs L1 and its guests for good, or until L0 cannot go on.
    pub fn run(&mut self) -> Failure {
        loop {
            if let Err(failure) = self.turn() {
                return failure;
            }
        }
    }

    /// One entry and its exit.
    fn turn(&mut self) -> Result<(), Failure> {
        kick::rearm(self.kicked);
        if self.waiting || self.shared.ipis.has_events(self.id) {
            self.events();
        }
        if self.shared.churn != 0 {
            self.count_turn()?;
        }
        let level = self.nested.route_events(&mut self.m);
        if let Some(due) = self.flush.enter(level) {
            let mutant = self.shared.mutant == Some(Mutant::DrainSkipped);
            let flushed = !mutant && nested::apply(&mut self.nested, &mut self.shadow, level, &due, self.counters);
            self.flush_physical |= flushed;
        }
        let plan = match self.nested.prepare_entry(&mut self.m) {
            Entry::Run(plan) => plan,
            Entry::Wait => {
                self.flush.entry_failed();
                // SAFETY: interrupts are off; L0's NMI handler sets the flag and calls `redirect`.
                unsafe { vmx::wait_for_nmi(self.kicked) };
                return Ok(());
            }
            Entry::Init => {
                self.flush.entry_failed();
                self.reset();
                return Ok(());
            }
            Entry::Shutdown => return exits::reset_machine(self),
        };
        self.flush_now(&plan);
        match self.enter(&plan) {
            Entered::Exited => {}
            Entered::Kicked => {
                self.flush.entry_failed();
                return Ok(());
            }
            Entered::Failed(_) => {
                self.flush.entry_failed();
                return self.refused(plan.level);
            }
        }
        // What was to be flushed before the entry has been flushed, even where the entry failed late.
        self.flush.exit();
        match plan.level {
            Level::L1 => {
                self.counters.l1_exits.add(1);
                nested::l1(self)
            }
            Level::L2 => {
                self.counters.l2_exits.add(1);
                nested::l2(self)
            }
        }
    }

    /// Every so many turns the nested state is saved, destroyed and restored: what it forgets, some scenario misses.
    #[cold]
    fn count_turn(&mut self) -> Result<(), Failure> {
        self.turns += 1;
        if !self.turns.is_multiple_of(self.shared.churn) {
            return Ok(());
        }
        let saved = self.nested.save(&mut self.m);
        self.m.vmcs02.destroy();
        self.m.vmcs01.destroy();
        self.set_host_state();
        self.set_controls();
        // What L0 keeps set, the library takes from here.
        vcr::set_cr0(self.m.vmcs01, self.host, 0);
        vcr::set_cr4(self.m.vmcs01, self.host, 0);
        self.shadow.flush_everything();
        (self.eptp02, self.virtual_apic, self.apic_access) = (0, u64::MAX, u64::MAX);
        self.nested = match NestedVmx::restore(self.host.config, &saved, &mut self.m) {
            Ok(nested) => nested,
            Err(error) => return Err(Failure::VmxNotRestored(error)),
        };
        if self.nested.level() == Level::L2 {
            nested::load_second_stage(self);
        }
        Ok(())
    }

    /// VMLAUNCH or VMRESUME failed.
    #[cold]
    fn refused(&mut self, level: Level) -> Result<(), Failure> {
        let error = self.vmcs().read32(Field::InstructionError);
        match level {
            Level::L1 => Err(Failure::Vmcs01Refused),
            Level::L2 if self.nested.entry_failed(&mut self.m, error) => Ok(()),
            Level::L2 => Err(Failure::Vmcs02Refused),
        }
    }

    /// VM entry, and exit.
    fn enter(&mut self, plan: &EntryPlan) -> Entered {
        let level = plan.level;
        if self.shared.observed {
            self.observe_entry(plan);
        }
        let vmcs = match level {
            Level::L1 => &mut *self.m.vmcs01,
            Level::L2 => &mut *self.m.vmcs02,
        };
        // SAFETY: VMX operation since `new`; interrupts are off since boot; both VMCSs were bound to these registers; the
        // guest is confined by EPT to memory that is not L0's.
        let entered = unsafe { vmcs.enter(&mut self.m.gprs.0) };
        if self.shared.observed {
            self.observe_exit(level, &entered);
        }
        entered
    }

    /// What timeline and counter want right before the entry.
    #[cold]
    fn observe_entry(&mut self, plan: &EntryPlan) {
        let level = plan.level;
        if self.shared.audit {
            self.audit_entry(plan);
        }
        if self.shared.trace {
            trace::record(self.id, trace::Event::Enter(level));
        }
        if self.shared.count {
            self.counters.l0_instructions.add(cpu::rdtsc().wrapping_sub(self.left_at));
        }
    }

    /// Commits the fault that was asked for, and tells the auditor what this entry was told to forget.
    fn audit_entry(&mut self, plan: &EntryPlan) {
        let mutant = self.shared.mutant;
        let level = plan.level;
        let nested = match level {
            Level::L1 => (0, 0, 0, 0),
            Level::L2 => {
                let c = self.nested.context();
                (c.vm_id, c.vp_id, u32::from(c.vpid), c.eptp.unwrap_or(0))
            }
        };
        let vpid = if mutant == Some(Mutant::OneAsid) { 1 } else { plan.vpid };
        if mutant == Some(Mutant::OneAsid) {
            self.vmcs().write(Field::VirtualProcessorId, vpid.into());
        }
        let tlb_control = match plan.flush {
            _ if mutant == Some(Mutant::NoTlbControl) => 0,
            Flush::None => 0,
            Flush::Single => 3,
            Flush::All => 1,
        };
        let root = match level {
            Level::L1 => self.shared.root01,
            Level::L2 => self.eptp02 & 0x000f_ffff_ffff_f000,
        };
        let invept = self.invept && mutant != Some(Mutant::NoInvEpt);
        let context = audit::Context { vp: self.id, level, nested, root };
        audit::enter(&audit::Run { cpu: self.id, context, asid: vpid.into(), tlb_control, invept: Some(invept) });
    }

    /// What they want right after it.
    #[cold]
    fn observe_exit(&mut self, level: Level, entered: &Entered) {
        if self.shared.audit {
            audit::leave(self.id, *entered == Entered::Exited);
        }
        if self.shared.count {
            self.left_at = cpu::rdtsc();
        }
        if self.shared.trace {
            let reason = match entered {
                Entered::Exited => self.vmcs().read32(Field::ExitReason),
                _ => u32::MAX,
            };
            let call = if reason == exit_reason::VMCALL { self.m.gprs.0.gprs.rcx as u16 } else { 0 };
            trace::record(self.id, trace::Event::VmxExit { level, reason, call });
        }
    }

    /// L1's translations are gone before it runs again.
    pub fn flush_l1(&mut self) {
        self.nested.retire_tag(Level::L1);
    }

    /// Carries out the flushes that this entry needs. What is flushed stays asked for in the library until the entry has
    /// happened.
    #[inline]
    fn flush_now(&mut self, plan: &EntryPlan) {
        let stale = plan.level == Level::L2 && self.shadow.tag_stale();
        self.invept = stale;
        if plan.flush != Flush::None || stale || self.flush_physical {
            self.flush_some(plan, stale);
        }
    }

    #[cold]
    fn flush_some(&mut self, plan: &EntryPlan, stale: bool) {
        // SAFETY: VMX operation; dropping translations is harmless. These types are there (checked at boot).
        let flushed = unsafe {
            let linear = match plan.flush {
                _ if self.shared.mutant == Some(Mutant::NoTlbControl) => Ok(()),
                Flush::None => Ok(()),
                Flush::Single => vmx::invvpid(InvVpid::Single(plan.vpid)),
                Flush::All => vmx::invvpid(InvVpid::All),
            };
            let physical = match (self.flush_physical, stale) {
                _ if self.shared.mutant == Some(Mutant::NoInvEpt) => Ok(()),
                (true, _) => vmx::invept(InvEpt::All),
                (false, true) => vmx::invept(InvEpt::Single(self.eptp02)),
                (false, false) => Ok(()),
            };
            linear.and(physical)
        };
        debug_assert!(flushed.is_ok());
        if stale {
            self.shadow.tag_retired();
        }
        self.flush_physical = false;
    }

    /// Takes what other processors sent; waits while L1's processor waits for SIPI.
    fn events(&mut self) {
        loop {
            let events = self.shared.ipis.take(self.id);
            if self.waiting {
                if let Some(vector) = events.sipi {
                    self.start_up(vector);
                    return;
                }
                // SAFETY: interrupts are off; L0's NMI handler sets the flag and calls `redirect`.
                unsafe { vmx::wait_for_nmi(self.kicked) };
                kick::rearm(self.kicked);
                continue;
            }
            if events.init {
                self.nested.pend_init();
                self.init_held = true;
            }
            if self.init_held {
                // For the time after the INIT, which may be held by VMX root operation.
                self.held_sipi = self.held_sipi.or(events.sipi);
            } else if let Some(vector) = events.sipi {
                self.nested.pend_sipi(vector);
            }
            if events.nmi {
                self.nested.pend_nmi();
            }
            return;
        }
    }

    /// A SIPI for L1.
    fn start_up(&mut self, vector: u8) {
        self.waiting = false;
        guest::start_up(&mut *self.m.vmcs01, vector);
    }

    /// INIT reached L1.
    pub fn reset(&mut self) {
        self.nested.reset();
        self.init();
        self.flush.forget_context();
        self.hyperv.msrs.reset();
        self.m.assist_page = None;
        lapic::reset(self.shared, self.id);
        self.waiting = self.apic_base & apic::BASE_BSP == 0;
        self.init_held = false;
        if let Some(vector) = self.held_sipi.take()
            && self.waiting
        {
            self.start_up(vector);
        }
    }

    /// The VMCS of the level that runs, or has just run.
    #[inline]
    pub fn vmcs(&mut self) -> &mut HwVmcs {
        match self.nested.level() {
            Level::L1 => self.m.vmcs01,
            Level::L2 => self.m.vmcs02,
        }
    }

    /// Instruction bytes of the level that has just run, and how many there are.
    pub fn instruction(&mut self) -> ([u8; MAX_LENGTH], usize) {
        let level = self.nested.level();
        let v = self.vmcs();
        let paging = Paging {
            cr0: v.read(Field::GuestCr0),
            cr3: v.read(Field::GuestCr3),
            cr4: v.read(Field::GuestCr4),
            efer: v.read(Field::GuestEfer),
        };
        let rip = v.read(Field::GuestRip);
        let long = step::in_64bit_code(v);
        let linear = if long { rip } else { v.read(Field::GuestCsBase).wrapping_add(rip) & 0xffff_ffff };
        nested::fetch(self, level, &paging, linear)
    }

    /// Moves the guest past an instruction of `length` bytes that L0 carried out: a store that the exit does not measure.
    pub fn advance(&mut self, length: u64) {
        let told = self.vmcs().read(Field::ExitInstructionLength);
        let v = self.vmcs();
        let rip = v.read(Field::GuestRip);
        // `complete_instruction` adds what the exit told.
        v.write(Field::GuestRip, rip.wrapping_add(length).wrapping_sub(told));
        step::complete_instruction(v);
    }

    /// Moves the guest past the instruction that exited.
    #[inline]
    pub fn step_over(&mut self) {
        step::complete_instruction(self.vmcs());
    }
}
