//! One virtual processor of L1 on its physical processor: state, entry, and the run loop.
//!
//! GIF is clear from [`Vp::run`] on, but for the guest itself and [`svm::take_held_events`]: a kick (an NMI) that comes
//! between the last look at pending events and VMRUN is held by the processor, arrives right after VMRUN has set GIF,
//! and exits. So no kick is lost, and no look-and-enter needs a lock.

use hw::svm;
use hw::{apic, cpu, msr};

use hvcore::addr::{Hpa, Level};
use nsvm::asid::AsidPool;
use nsvm::npt::NptShadow;
use nsvm::{Entry, EntryPlan, Machine, MergedMap, NestedSvm, exit_code};
use zerocopy::IntoBytes;

use crate::audit;
use crate::counters::{self, Counters};
use crate::exits;
use crate::fatal::Failure;
use crate::fetch::Fetch;
use crate::hyperv::{self, VpHyperV};

use crate::ipi::Inbox;
use crate::lapic;
use crate::memory::L1Memory;
use crate::mutant::Mutant;
use crate::nested;
use crate::pages::{Pages, PagesPa, keep, shadow_tables};
use crate::permissions::{IOPM01, MSRPM01};
use crate::registers::Gprs;
use crate::shared::Shared;
use crate::svm::SvmHost;
use crate::trace;
use hvcore::flush::LocalFlush;
use nsvm::vmcb::bits::{DR7_RESET, Intercepts, efer, int_ctl};
use nsvm::vmcb::{Segment, Vmcb};

/// What exits of L1. Interrupts are passed through; so is HLT, which an NMI of L0 ends.
const INTERCEPTS: Intercepts = Intercepts::OF_EMBEDDER;

/// A segment of a VMCB.
const fn segment(selector: u16, attrib: u16, limit: u32, base: u64) -> Segment {
    Segment { selector, attrib, limit, base }
}

/// A virtual processor of L1.
pub struct Vp {
    /// Which processor.
    pub id: usize,
    /// The whole machine.
    pub shared: &'static Shared,
    /// What the machine has of SVM.
    pub svm: &'static SvmHost,
    /// What the library works on: VMCBs, registers, maps, ASIDs, memory.
    pub m: Machine<'static, Gprs, L1Memory, Fetch>,
    /// Where the pages are.
    pub pa: PagesPa,
    /// APIC_BASE as L1 sees it.
    pub apic_base: u64,
    /// Waits for a SIPI.
    pub waiting: bool,
    /// The nested state.
    pub nested: NestedSvm,
    /// The shadow of L1's nested tables.
    pub shadow: NptShadow<'static>,
    /// What others may ask it to flush.
    pub flush: LocalFlush<'static>,
    /// Its part of the Hyper-V interface.
    pub hyperv: VpHyperV,
    /// An INIT for L1 is on its way through the library.
    init_held: bool,
    /// The vector of a SIPI that came behind it.
    held_sipi: Option<u8>,
    /// What it counts.
    pub counters: &'static Counters,
    /// Turns of the run loop, where the nested state is churned.
    turns: u64,
    /// When the guest left last, where instructions are counted.
    left_at: u64,
    /// What L0's own port reads as.
    pub latched: u32,
    /// What others sent this processor.
    inbox: Inbox<'static>,
    /// The nested state is churned.
    churned: bool,
    /// Entries and exits are counted or audited.
    observed: bool,
}

impl Vp {
    /// Makes this processor a host and `pages` (at `pa`) its VP's, in the state after INIT.
    ///
    /// # Safety
    /// Called on processor `id`, once. Its descriptor tables, TSS and NMI handler are L0's.
    pub unsafe fn new(
        id: usize,
        shared: &'static Shared,
        svm: &'static SvmHost,
        pages: &'static mut Pages,
        pa: PagesPa,
    ) -> Result<Self, Failure> {
        // SAFETY: the host save page and the state page are this VP's alone; SVM is there (checked at boot).
        unsafe {
            if !hw::svm::enable(pa.host_save) {
                return Err(Failure::SvmDisabled);
            }
            hw::svm::clgi();
            hw::svm::vmsave(pa.host_state);
        }
        // SAFETY: every processor with SVM has APIC_BASE.
        let apic_base = unsafe { msr::rdmsr(msr::APIC_BASE) };
        let by_asid = svm.leaf.edx & 1 << 6 != 0;
        let asids = AsidPool::new(id as u32, svm.leaf.ebx, by_asid).ok_or(Failure::TooFewAsids)?;
        let Pages { vmcb01, vmcb02, msrpm02, iopm02, .. } = pages;
        let mut m = Machine {
            vmcb01,
            vmcb02,
            gprs: keep(Gprs::default())?,
            msrpm02: MergedMap { words: msrpm02, base: Hpa::new(pa.msrpm02) },
            iopm02: MergedMap { words: iopm02, base: Hpa::new(pa.iopm02) },
            msrpm01: &MSRPM01.0,
            iopm01: &IOPM01.0,
            asids: keep(asids)?,
            memory: &shared.memory,
            code: keep(Fetch::new(&shared.memory))?,
        };
        let nested = NestedSvm::new(svm.config, &mut m.msrpm02, &mut m.iopm02);
        let shadow = shadow_tables()?;
        let hyperv = shared.hyperv.vp(id).ok_or(Failure::TooManyCpus)?;
        let flush = shared.hyperv.domain.local(id as u16).ok_or(Failure::TooManyCpus)?;
        let inbox = shared.ipis.inbox(id).ok_or(Failure::TooManyCpus)?;
        let mut vp = Self {
            id,
            shared,
            svm,
            m,
            pa,
            apic_base,
            waiting: apic_base & apic::BASE_BSP == 0,
            nested,
            shadow,
            flush,
            hyperv,
            init_held: false,
            held_sipi: None,
            counters: counters::of(id),
            turns: 0,
            left_at: cpu::rdtsc(),
            latched: u32::MAX,
            inbox,
            churned: shared.churn != 0,
            observed: shared.observed,
        };
        shared.ipis.add(id, shared.apic.id());
        vp.init();
        Ok(vp)
    }

    /// L0's own controls for L1.
    fn set_controls(&mut self) {
        let v = &mut *self.m.vmcb01;
        v.control.intercepts = INTERCEPTS;
        v.control.iopm_base = self.svm.iopm01;
        v.control.msrpm_base = self.svm.msrpm01;
        v.control.np_control = 1;
        v.control.n_cr3 = self.shared.root01;
        v.control.asid = 1;
        v.control.tlb_control = 1;
        v.control.int_ctl = 0;
        v.control.int_state = 0;
        v.control.event_inj = 0;
        v.control.clean = 0;
    }

    /// The state of L1's processor after INIT.
    pub fn init(&mut self) {
        self.set_controls();
        let v = &mut *self.m.vmcb01;
        data_segments(v, segment(0, 0x93, 0xffff, 0));
        v.save.cs = segment(0xf000, 0x9b, 0xffff, 0xffff_0000);
        v.save.gdtr = segment(0, 0, 0xffff, 0);
        v.save.idtr = segment(0, 0, 0xffff, 0);
        v.save.ldtr = segment(0, 0x82, 0xffff, 0);
        v.save.tr = segment(0, 0x8b, 0xffff, 0);
        v.save.cpl = 0;
        v.save.efer = efer::SVME;
        v.save.cr0 = 0x6000_0010;
        v.save.cr2 = 0;
        v.save.cr3 = 0;
        v.save.cr4 = 0;
        v.save.dr6 = 0xffff_0ff0;
        v.save.dr7 = DR7_RESET;
        v.save.rflags = 2;
        v.save.rip = 0xfff0;
        v.save.rsp = 0;
        v.save.rax = 0;
        v.save.g_pat = 0x0007_0406_0007_0406;
        *self.m.gprs = Gprs(svm::Gprs { rdx: u64::from(cpu::cpuid(1, 0).eax), ..Default::default() });
    }

    /// The state in which a multiboot kernel starts: 32-bit flat segments, no paging.
    pub fn start_multiboot(&mut self, entry: &crate::loader::Entry) {
        self.start_flat(entry.eip);
        self.m.vmcb01.save.rax = u64::from(crate::loader::BOOT_MAGIC);
        self.m.gprs.rbx = u64::from(entry.info);
    }

    /// The state in which a Linux kernel starts.
    pub fn start_linux(&mut self, entry: &crate::linux::Entry) {
        self.start_flat(entry.eip);
        let v = &mut *self.m.vmcb01;
        v.save.cs.selector = 0x10;
        data_segments(v, segment(0x18, 0xc93, u32::MAX, 0));
        v.save.gdtr = segment(0, 0, 31, u64::from(entry.gdt));
        *self.m.gprs = Gprs(svm::Gprs { rsi: u64::from(entry.params), ..Default::default() });
    }

    /// 32-bit protected mode at `eip`, flat segments with selectors 8 (code) and 0x10 (data).
    fn start_flat(&mut self, eip: u32) {
        self.init();
        self.waiting = false;
        let v = &mut *self.m.vmcb01;
        v.save.cs = segment(8, 0xc9b, u32::MAX, 0);
        data_segments(v, segment(0x10, 0xc93, u32::MAX, 0));
        v.save.cr0 = 0x11;
        v.save.rip = u64::from(eip);
    }

    /// A SIPI: real mode at page `vector`.
    fn start_up(&mut self, vector: u8) {
        self.waiting = false;
        let v = &mut *self.m.vmcb01;
        v.save.cs = segment(u16::from(vector) << 8, 0x9b, 0xffff, u64::from(vector) << 12);
        v.save.rip = 0;
    }

    /// Runs L1 and its guests for good, or until L0 cannot go on.
    pub fn run(&mut self) -> Failure {
        loop {
            if let Err(failure) = self.turn() {
                return failure;
            }
        }
    }

    /// Enters the guest of the level whose turn it is, and deals with its exit; again and again as long as the next
    /// entry is the last one over again.
    #[inline]
    fn turn(&mut self) -> Result<(), Failure> {
        if self.is_disturbed() {
            self.before_turn()?;
        }
        match self.nested.route_events(&mut self.m) {
            Level::L1 => self.turn_of(Level::L1, self.pa.vmcb01, exits::l1),
            Level::L2 => self.turn_of(Level::L2, self.pa.vmcb02, nested::l2),
        }
    }

    /// [`turn`](Self::turn) of `level`, with its VMCB and what is done at its exits.
    #[inline(always)]
    fn turn_of(
        &mut self,
        level: Level,
        vmcb: u64,
        exit: impl Fn(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.drain(level);
        let plan = match self.nested.prepare_entry(&mut self.m) {
            Entry::Run(plan) => plan,
            Entry::Init => {
                self.flush.entry_failed();
                self.reset();
                return Ok(());
            }
            Entry::Shutdown => return exits::reset_machine(self),
        };
        debug_assert_eq!(plan.level, level);
        if plan.exit_soon {
            self.shared.kick(self.id);
        }
        loop {
            self.enter(&plan, vmcb);
            self.left(level);
            exit(self)?;
            if self.is_disturbed() || !self.nested.may_repeat(&self.m, level) {
                return Ok(());
            }
            self.drain(level);
            self.nested.repeat_entry(&mut self.m, level);
        }
    }

    /// Publishes that `level` runs, and does what is to be flushed before it does.
    #[inline(always)]
    fn drain(&mut self, level: Level) {
        if let Some(due) = self.flush.enter(level)
            && self.shared.mutant != Some(Mutant::DrainSkipped)
        {
            if self.shared.trace {
                trace::record(self.id, trace::Event::Drained(level));
            }
            hyperv::apply(&mut self.nested, &mut self.shadow, self.m.code, level, &due, self.counters);
        }
        if level == Level::L2 && self.shadow.tag_stale() {
            self.nested.retire_tag(Level::L2);
        }
    }

    /// True when something is to be done before the next entry that seldom is.
    #[inline]
    fn is_disturbed(&self) -> bool {
        self.waiting | self.churned || self.inbox.has_events()
    }

    /// What is seldom to be done before an entry.
    #[cold]
    #[inline(never)]
    fn before_turn(&mut self) -> Result<(), Failure> {
        if self.waiting || self.inbox.has_events() {
            self.events();
        }
        if self.churned { self.count_turn() } else { Ok(()) }
    }

    /// Every so many turns the nested state is saved, destroyed and restored: what it forgets, some scenario misses.
    fn count_turn(&mut self) -> Result<(), Failure> {
        self.turns += 1;
        if !self.turns.is_multiple_of(self.shared.churn) {
            return Ok(());
        }
        let saved = self.nested.save(self.m.vmcb01, self.m.vmcb02);
        for vmcb in [&mut *self.m.vmcb01, &mut *self.m.vmcb02] {
            vmcb.as_mut_bytes().fill(0xa5);
        }
        self.m.vmcb01.control.as_mut_bytes().fill(0);
        self.m.vmcb02.control.as_mut_bytes().fill(0);
        self.set_controls();
        self.shadow.flush_everything();
        self.nested = match NestedSvm::restore(self.svm.config, &saved, &mut self.m) {
            Ok(nested) => nested,
            Err(error) => return Err(Failure::NotRestored(error)),
        };
        if self.nested.level() == Level::L2 {
            nested::load_shadow(self);
        }
        Ok(())
    }

    /// The guest of `level` left, or its entry was refused.
    #[inline(always)]
    fn left(&mut self, level: Level) {
        let (exits, vmcb) = match level {
            Level::L1 => (&self.counters.l1_exits, &*self.m.vmcb01),
            Level::L2 => (&self.counters.l2_exits, &*self.m.vmcb02),
        };
        exits.add(1);
        if exit_code::is_invalid(vmcb.control.exit_code) {
            return self.flush.entry_failed();
        }
        self.flush.exit();
        if level == Level::L2 {
            self.shadow.tag_retired();
        }
    }

    /// VMRUN as `plan` says, of the VMCB at `vmcb`.
    #[inline(always)]
    fn enter(&mut self, plan: &EntryPlan, vmcb: u64) {
        if plan.sync_tpr {
            let vmcb = self.vmcb();
            vmcb.control.int_ctl = vmcb.control.int_ctl & !int_ctl::V_TPR | cpu::cr8();
        }
        if self.observed {
            self.observe_entry(plan.level);
        }
        if plan.host_if {
            // SAFETY: GIF is clear: nothing arrives here.
            unsafe { cpu::sti() };
        } else {
            cpu::cli();
        }
        // SAFETY: GIF is clear since `new`; the addresses are of this VP's own pages; the guest is confined by
        // nested paging to memory that is not L0's.
        unsafe { svm::run(&mut self.m.gprs.0, vmcb, self.pa.vmcb01, self.pa.host_state) };
        if self.observed {
            self.observe_exit(plan.level);
        }
        if plan.sync_tpr {
            let tpr = self.vmcb().control.int_ctl & 0xf;
            // SAFETY: four bits of priority; L0 itself takes no interrupts.
            unsafe { cpu::write_cr8(tpr) };
        }
    }

    /// What auditor, timeline and counter want right before VMRUN.
    #[cold]
    #[inline(never)]
    fn observe_entry(&mut self, level: Level) {
        if self.shared.audit {
            self.audit_entry(level);
        }
        if self.shared.trace {
            trace::record(self.id, trace::Event::Enter(level));
        }
        if self.shared.count {
            self.counters.l0_instructions.add(cpu::rdtsc().wrapping_sub(self.left_at));
        }
    }

    /// What they want right after it.
    #[cold]
    #[inline(never)]
    fn observe_exit(&mut self, level: Level) {
        if self.shared.count {
            self.left_at = cpu::rdtsc();
        }
        let code = self.vmcb().control.exit_code;
        if self.shared.trace {
            // Call codes are in the low half of RCX, or of EAX in 32-bit code.
            let call = if code != exit_code::VMMCALL {
                0
            } else if self.vmcb().in_64bit_code() {
                self.m.gprs.rcx as u16
            } else {
                self.vmcb().save.rax as u16
            };
            trace::record(self.id, trace::Event::Exit { level, code: code as u32, call });
        }
        if self.shared.audit {
            audit::leave(self.id, !exit_code::is_invalid(code));
        }
    }

    /// What L0 did since the guest left is not counted: it was about the counters.
    pub fn count_from_now(&mut self) {
        self.left_at = cpu::rdtsc();
    }

    /// Commits the fault that was asked for, and tells the auditor what VMRUN is about to be told.
    fn audit_entry(&mut self, level: Level) {
        let (mutant, id) = (self.shared.mutant, self.id);
        let nested = self.nested.context();
        let nested = match level {
            Level::L1 => (0, 0, 0, 0),
            Level::L2 => (nested.vm_id, nested.vp_id, nested.asid, nested.n_cr3.unwrap_or(0)),
        };
        let control = &mut self.vmcb().control;
        match mutant {
            Some(Mutant::NoTlbControl) => control.tlb_control = 0,
            Some(Mutant::OneAsid) => control.asid = 1,
            _ => {}
        }
        let context = audit::Context { vp: id, level, nested, root: control.n_cr3 };
        audit::enter(&audit::Run {
            cpu: id,
            context,
            asid: control.asid,
            tlb_control: control.tlb_control,
            invept: None,
        });
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
                // SAFETY: L0's tables and TSS are loaded; a kick ends the wait.
                unsafe { svm::wait_for_nmi() };
                continue;
            }
            if events.init {
                self.nested.pend_init();
                self.init_held = true;
            }
            if self.init_held {
                // For the time after the INIT, which may be held by GIF.
                self.held_sipi = self.held_sipi.or(events.sipi);
            }
            if events.nmi {
                self.nested.pend_nmi();
            }
            return;
        }
    }

    /// INIT reached L1.
    fn reset(&mut self) {
        self.init();
        self.nested.reset();
        self.flush.forget_context();
        self.hyperv.msrs.reset();
        lapic::reset(self.shared, self.id);
        self.waiting = self.apic_base & apic::BASE_BSP == 0;
        self.init_held = false;
        if let Some(vector) = self.held_sipi.take()
            && self.waiting
        {
            self.start_up(vector);
        }
    }

    /// The VMCB of the level that runs, or has just run.
    #[inline]
    pub fn vmcb(&mut self) -> &mut Vmcb {
        match self.nested.level() {
            Level::L1 => self.m.vmcb01,
            Level::L2 => self.m.vmcb02,
        }
    }

    /// Instruction bytes of the level that has just run, and how many there are.
    pub fn instruction(&self) -> ([u8; 15], usize) {
        let (level, code) = (self.nested.level(), self.m.code);
        let vmcb = match level {
            Level::L1 => &*self.m.vmcb01,
            Level::L2 => &*self.m.vmcb02,
        };
        let mut bytes = [0; 15];
        let n = code.bytes(level, vmcb, &mut bytes);
        (bytes, n)
    }

    /// Moves the guest past an instruction of `length` bytes that L0 carried out.
    pub fn advance(&mut self, length: u64) {
        let v = self.vmcb();
        let rip = v.save.rip.wrapping_add(length);
        v.complete_instruction(if v.in_64bit_code() { rip } else { rip & 0xffff_ffff });
    }
}

fn data_segments(v: &mut Vmcb, s: Segment) {
    v.save.es = s;
    v.save.ss = s;
    v.save.ds = s;
    v.save.fs = s;
    v.save.gs = s;
}
