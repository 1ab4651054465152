//! One virtual processor of L1 on its physical processor: state, entry, and the run loop.
//!
//! Interrupts are off in L0 and L1's own in the guest. NMIs come at any time; see [`crate::vmx::kick`].

use core::sync::atomic::AtomicU8;

use hvcore::addr::Level;
use hvcore::flush::{EntryFlush, GvaFlush, LocalFlush};
use hw::vmx::{self, Entered, InvEpt, InvVpid};
use hw::{apic, cpu, msr, vmx_host};
use nvmx::Vmcs;
use nvmx::controls::primary;
use nvmx::exit_reason;
use nvmx::field::Field;

use crate::counters::{self, Counters};
use crate::fatal::Failure;
use crate::fetch::{MAX_LENGTH, Paging};
use crate::hyperv::VpHyperV;
use crate::lapic;
use crate::pages::keep;
use crate::shared::Shared;
use crate::trace;
use crate::vmx::host::VmxHost;
use crate::vmx::pages::{Pages, PagesPa};
use crate::vmx::registers::Gprs;
use crate::vmx::vmcs::{Current, HwVmcs};
use crate::vmx::{exits, guest, kick, vcr};
use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};

/// CR4.OSXSAVE: L0 executes XSETBV for L1.
const OSXSAVE: u64 = 1 << 18;
/// The VPID of L1.
const VPID01: u16 = 1;

/// What the library works on.
#[derive(Debug)]
pub struct Machine {
    /// L1's VMCS.
    pub vmcs01: &'static mut HwVmcs,
    /// L1's registers.
    pub gprs: &'static mut Gprs,
}

/// A virtual processor of L1.
pub struct Vp {
    /// Which processor.
    pub id: usize,
    /// The whole machine.
    pub shared: &'static Shared,
    /// What the machine has of VT-x.
    pub host: &'static VmxHost,
    /// VMCSs and registers.
    pub m: Machine,
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
    /// An NMI for L1 waits.
    pub nmi: bool,
    /// L1's linear translations are to be flushed before the next entry.
    flush_linear: bool,
    /// All that was cached of L0's tables is to be flushed before the next entry.
    flush_physical: bool,
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
        let pages = keep(Pages::new())?;
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
        let kicked = kick::flag(id);
        let gprs = keep(Gprs(vmx::World::new(kicked)))?;
        // SAFETY: every processor with VMX has APIC_BASE.
        let apic_base = unsafe { msr::rdmsr(msr::APIC_BASE) };
        let hyperv = shared.hyperv.vp(id).ok_or(Failure::TooManyCpus)?;
        let flush = shared.hyperv.domain.local(id as u16).ok_or(Failure::TooManyCpus)?;
        let mut vp = Self {
            id,
            shared,
            host,
            m: Machine { vmcs01, gprs },
            apic_base,
            waiting: apic_base & apic::BASE_BSP == 0,
            flush,
            hyperv,
            counters,
            kicked,
            nmi: false,
            flush_linear: true,
            flush_physical: true,
            left_at: cpu::rdtsc(),
        };
        vp.set_controls();
        // SAFETY: VMCS01 is current; the processor runs L0 with its own tables; the registers never move.
        unsafe {
            vmx_host::write_host_state();
            vp.m.gprs.0.bind();
        }
        shared.ipis.add(id, shared.apic.id());
        vp.init();
        Ok(vp)
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
            (Field::VirtualProcessorId, VPID01.into()),
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
        self.nmi = false;
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
        if self.nmi {
            self.deliver_nmi();
        }
        if let Some(due) = self.flush.enter(Level::L1) {
            apply(&mut self.flush_linear, &mut self.flush_physical, &due, self.counters);
        }
        self.flush_now();
        let launched = self.m.vmcs01.is_launched();
        match self.enter() {
            Entered::Kicked => {
                self.flush.entry_failed();
                Ok(())
            }
            Entered::Failed(_) => {
                self.flush.entry_failed();
                Err(Failure::Vmcs01Refused)
            }
            Entered::Exited => {
                let reason = self.m.vmcs01.read32(Field::ExitReason);
                if reason & exit_reason::ENTRY_FAILURE != 0 {
                    self.m.vmcs01.not_launched(launched);
                    self.flush.entry_failed();
                    return Err(Failure::Vmcs01Refused);
                }
                self.flush.exit();
                self.counters.l1_exits.add(1);
                exits::l1(self, reason & exit_reason::BASIC)
            }
        }
    }

    /// VM entry, and exit.
    fn enter(&mut self) -> Entered {
        if self.shared.observed {
            self.observe_entry(Level::L1);
        }
        // SAFETY: VMX operation since `new`; interrupts are off since boot; the VMCS was bound to these registers; the
        // guest is confined by EPT to memory that is not L0's.
        let entered = unsafe { self.m.vmcs01.enter(&mut self.m.gprs.0) };
        if self.shared.observed {
            self.observe_exit(Level::L1, &entered);
        }
        entered
    }

    /// What timeline and counter want right before the entry.
    #[cold]
    fn observe_entry(&mut self, level: Level) {
        if self.shared.trace {
            trace::record(self.id, trace::Event::Enter(level));
        }
        if self.shared.count {
            self.counters.l0_instructions.add(cpu::rdtsc().wrapping_sub(self.left_at));
        }
    }

    /// What they want right after it.
    #[cold]
    fn observe_exit(&mut self, level: Level, entered: &Entered) {
        if self.shared.count {
            self.left_at = cpu::rdtsc();
        }
        if self.shared.trace {
            let reason = match entered {
                Entered::Exited => self.m.vmcs01.read32(Field::ExitReason),
                _ => u32::MAX,
            };
            let call = if reason == exit_reason::VMCALL { self.m.gprs.0.gprs.rcx as u16 } else { 0 };
            trace::record(self.id, trace::Event::VmxExit { level, reason, call });
        }
    }

    /// L1's translations are gone before it runs again.
    pub fn flush_l1(&mut self) {
        self.flush_linear = true;
    }

    /// Carries out the flushes that were asked for. What is flushed stays asked for in the flush engine until the entry
    /// has happened.
    fn flush_now(&mut self) {
        if !self.flush_linear && !self.flush_physical {
            return;
        }
        // SAFETY: VMX operation; dropping translations is harmless. Both types are there (checked at boot).
        let flushed = unsafe {
            let linear = vmx::invvpid(InvVpid::Single(VPID01));
            let physical = if self.flush_physical {
                vmx::invept(InvEpt::Single(self.host.eptp(self.shared.root01)))
            } else {
                Ok(())
            };
            linear.and(physical)
        };
        debug_assert!(flushed.is_ok());
        (self.flush_linear, self.flush_physical) = (false, false);
    }

    /// Takes what other processors sent; waits while L1's processor waits for SIPI.
    fn events(&mut self) {
        loop {
            let events = self.shared.ipis.take(self.id);
            if events.init {
                self.reset();
            }
            if self.waiting {
                if let Some(vector) = events.sipi {
                    self.waiting = false;
                    guest::start_up(&mut *self.m.vmcs01, vector);
                    return;
                }
                // SAFETY: interrupts are off; L0's NMI handler sets the flag and calls `redirect`.
                unsafe { vmx::wait_for_nmi(self.kicked) };
                kick::rearm(self.kicked);
                continue;
            }
            self.nmi |= events.nmi;
            return;
        }
    }

    /// Injects the NMI that waits, or asks for an exit when L1 can take it.
    fn deliver_nmi(&mut self) {
        const VALID: u64 = 1 << 31;
        const NMI: u64 = VALID | 2 << 8 | 2;
        // Blocking by STI, by MOV SS, by NMI.
        const BLOCKING: u64 = 1 | 1 << 1 | 1 << 3;
        let v = &mut *self.m.vmcs01;
        let free = v.read(Field::EntryInterruptionInfo) & VALID == 0;
        if free && v.read(Field::GuestInterruptibility) & BLOCKING == 0 {
            v.write(Field::EntryInterruptionInfo, NMI);
            self.nmi = false;
        }
        self.set_nmi_window(self.nmi);
    }

    /// Whether L1 exits when it can take an NMI.
    pub fn set_nmi_window(&mut self, on: bool) {
        let v = &mut *self.m.vmcs01;
        let window = u64::from(primary::NMI_WINDOW_EXITING);
        let controls = v.read(Field::PrimaryControls);
        v.write(Field::PrimaryControls, if on { controls | window } else { controls & !window });
    }

    /// INIT reached L1.
    pub fn reset(&mut self) {
        self.init();
        self.set_nmi_window(false);
        self.flush.forget_context();
        self.hyperv.msrs.reset();
        lapic::reset(self.shared, self.id);
        self.waiting = self.apic_base & apic::BASE_BSP == 0;
    }

    /// The VMCS of the level that runs, or has just run.
    #[inline]
    pub fn vmcs(&mut self) -> &mut HwVmcs {
        self.m.vmcs01
    }

    /// Instruction bytes of the level that has just run, and how many there are.
    pub fn instruction(&mut self) -> ([u8; MAX_LENGTH], usize) {
        let v = &*self.m.vmcs01;
        let paging = Paging {
            cr0: v.read(Field::GuestCr0),
            cr3: v.read(Field::GuestCr3),
            cr4: v.read(Field::GuestCr4),
            efer: v.read(Field::GuestEfer),
        };
        let long = paging.efer & 1 << 10 != 0 && v.read(Field::GuestCsAccessRights) & 1 << 13 != 0;
        let rip = v.read(Field::GuestRip);
        let linear = if long { rip } else { v.read(Field::GuestCsBase).wrapping_add(rip) & 0xffff_ffff };
        fetch(self.shared, &paging, linear)
    }

    /// Moves the guest past an instruction of `length` bytes that L0 carried out.
    pub fn advance(&mut self, length: u64) {
        const STI_OR_MOV_SS: u64 = 3;
        const TF: u64 = 1 << 8;
        const SINGLE_STEP: u64 = 1 << 14;
        let v = self.vmcs();
        let rip = v.read(Field::GuestRip).wrapping_add(length);
        let long = v.read(Field::GuestCsAccessRights) & 1 << 13 != 0 && v.read(Field::GuestEfer) & 1 << 10 != 0;
        v.write(Field::GuestRip, if long { rip } else { rip & 0xffff_ffff });
        let blocking = v.read(Field::GuestInterruptibility);
        if blocking & STI_OR_MOV_SS != 0 {
            v.write(Field::GuestInterruptibility, blocking & !STI_OR_MOV_SS);
        }
        if v.read(Field::GuestRflags) & TF != 0 {
            let pending = v.read(Field::GuestPendingDebugExceptions);
            v.write(Field::GuestPendingDebugExceptions, pending | SINGLE_STEP);
        }
    }

    /// Moves the guest past the instruction that exited.
    pub fn step_over(&mut self) {
        let length = self.vmcs().read(Field::ExitInstructionLength);
        self.advance(length);
    }
}

/// Up to 15 bytes at linear address `la`, and how many could be read.
fn fetch(shared: &Shared, paging: &Paging, la: u64) -> ([u8; MAX_LENGTH], usize) {
    let memory = &shared.memory;
    let entry = |gpa, size| match size {
        8 => memory.read_u64(L1Gpa::new(gpa)),
        _ => memory.read_u32(L1Gpa::new(gpa)).map(u64::from),
    };
    let mut bytes = [0; MAX_LENGTH];
    let (first, rest) = bytes.split_at_mut(((0x1000 - (la & 0xfff)) as usize).min(MAX_LENGTH));
    let read =
        |la, to: &mut [u8]| -> Result<(), MemoryError> { memory.read(L1Gpa::new(paging.translate(la, entry)?), to) };
    let count = match (read(la, first), rest.is_empty()) {
        (Err(_), _) => 0,
        (Ok(()), true) => MAX_LENGTH,
        (Ok(()), false) if read(la.wrapping_add(first.len() as u64), rest).is_ok() => MAX_LENGTH,
        _ => first.len(),
    };
    (bytes, count)
}

/// Notes what is to be flushed before L1 runs.
fn apply(linear: &mut bool, physical: &mut bool, due: &EntryFlush<'_, 16>, counters: &Counters) {
    match due.gva {
        GvaFlush::None => {}
        GvaFlush::Ranges(_) => {
            counters.entry_ranges.add(1);
            *linear = true;
        }
        // A change of L0's own tables asks for this, too.
        GvaFlush::EverythingNonGlobal | GvaFlush::Everything => {
            counters.entry_everything.add(1);
            (*linear, *physical) = (true, true);
        }
    }
}
