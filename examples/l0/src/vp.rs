//! One virtual processor of L1 on its physical processor: state, entry, and the run loop.
//!
//! GIF is clear from [`Vp::run`] on, but for the guest itself and [`svm::take_held_events`]: a kick (an NMI) that comes
//! between the last look at pending events and VMRUN is held by the processor, arrives right after VMRUN has set GIF,
//! and exits. So no kick is lost, and no look-and-enter needs a lock.

use hw::svm::{self, Gprs};
use hw::{apic, cpu, msr};

use crate::exits;
use crate::fatal::Failure;
use crate::fetch::{self, Paging};
use crate::shared::Shared;
use nsvm::vmcb::bits::{DR7_RESET, Event, EventKind, Intercepts, efer, misc1, misc2};
use nsvm::vmcb::{Segment, Vmcb};

/// What exits of L1. Interrupts are passed through; so is HLT, which an NMI of L0 ends.
const INTERCEPTS: Intercepts = Intercepts {
    cr: 0,
    dr: 0,
    exceptions: 0,
    misc1: misc1::NMI
        | misc1::INIT
        | misc1::CPUID
        | misc1::INVLPGA
        | misc1::IOIO_PROT
        | misc1::MSR_PROT
        | misc1::SHUTDOWN,
    misc2: misc2::VMRUN | misc2::VMMCALL | misc2::VMLOAD | misc2::VMSAVE | misc2::STGI | misc2::CLGI | misc2::SKINIT,
    misc3: 0,
};

/// A segment of a VMCB.
const fn segment(selector: u16, attrib: u16, limit: u32, base: u64) -> Segment {
    Segment { selector, attrib, limit, base }
}

/// An NMI, as EVENTINJ takes it.
const NMI_EVENT: u64 = Event::VALID | (EventKind::Nmi as u64) << 8 | 2;

/// The pages of one VP that the hardware reads and writes.
#[repr(C, align(4096))]
pub struct Pages {
    /// Runs L1; also holds the VMLOAD state of whatever guest runs.
    pub vmcb01: Vmcb,
    /// Runs L2.
    pub vmcb02: Vmcb,
    /// L0's own VMLOAD state.
    pub host_state: Vmcb,
    /// VM_HSAVE_PA.
    pub host_save: Vmcb,
}

impl Pages {}

/// Physical addresses of [`Pages`].
#[derive(Clone, Copy, Debug)]
pub struct PagesPa {
    /// Of `vmcb01`.
    pub vmcb01: u64,
    /// Of `vmcb02`.
    pub vmcb02: u64,
    /// Of `host_state`.
    pub host_state: u64,
    /// Of `host_save`.
    pub host_save: u64,
}

impl PagesPa {
    /// The addresses of pages that start at physical address `base`.
    pub const fn at(base: u64) -> Self {
        Self { vmcb01: base, vmcb02: base + 0x1000, host_state: base + 0x2000, host_save: base + 0x3000 }
    }
}

/// A virtual processor of L1.
pub struct Vp {
    /// Which processor.
    pub id: usize,
    /// The whole machine.
    pub shared: &'static Shared,
    /// Its pages.
    pub pages: &'static mut Pages,
    /// Where they are.
    pub pa: PagesPa,
    /// The guest's registers that are not in the VMCB.
    pub gprs: Gprs,
    /// APIC_BASE as L1 sees it.
    pub apic_base: u64,
    /// Waits for a SIPI.
    pub waiting: bool,
    /// L1 is in its NMI handler: until IRET no further NMI is injected.
    pub nmi_masked: bool,
    /// An NMI for L1 is held.
    pub nmi_pending: bool,
    /// Exits so far.
    pub exits: u64,
}

impl Vp {
    /// Makes this processor a host and `pages` (at `pa`) its VP's, in the state after INIT.
    ///
    /// # Safety
    /// Called on processor `id`, once. Its descriptor tables, TSS and NMI handler are L0's.
    pub unsafe fn new(
        id: usize,
        shared: &'static Shared,
        pages: &'static mut Pages,
        pa: PagesPa,
    ) -> Result<Self, Failure> {
        // SAFETY: the host save page and the state page are this VP's alone; SVM is there (checked at boot).
        unsafe {
            if !svm::enable(pa.host_save) {
                return Err(Failure::SvmDisabled);
            }
            svm::clgi();
            svm::vmsave(pa.host_state);
        }
        // SAFETY: every processor with SVM has APIC_BASE.
        let apic_base = unsafe { msr::rdmsr(msr::APIC_BASE) };
        let mut vp = Self {
            id,
            shared,
            pages,
            pa,
            gprs: Gprs::default(),
            apic_base,
            waiting: apic_base & apic::BASE_BSP == 0,
            nmi_masked: false,
            nmi_pending: false,
            exits: 0,
        };
        shared.ipis.add(id, shared.apic.id());
        vp.init();
        Ok(vp)
    }

    /// The state of L1's processor after INIT.
    pub fn init(&mut self) {
        let v = &mut self.pages.vmcb01;
        v.control.intercepts = INTERCEPTS;
        v.control.iopm_base = self.shared.iopm01;
        v.control.msrpm_base = self.shared.msrpm01;
        v.control.np_control = 1;
        v.control.n_cr3 = self.shared.ncr3;
        v.control.asid = 1;
        v.control.tlb_control = 1;
        v.control.int_ctl = 0;
        v.control.int_state = 0;
        v.control.event_inj = 0;
        v.control.clean = 0;
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
        self.gprs = Gprs { rdx: u64::from(cpu::cpuid(1, 0).eax), ..Gprs::default() };
        self.nmi_masked = false;
        self.nmi_pending = false;
    }

    /// The state in which a multiboot kernel starts: 32-bit flat segments, no paging.
    pub fn start_multiboot(&mut self, entry: &crate::loader::Entry) {
        self.start_flat(entry.eip);
        self.pages.vmcb01.save.rax = u64::from(crate::loader::BOOT_MAGIC);
        self.gprs.rbx = u64::from(entry.info);
    }

    /// The state in which a Linux kernel starts.
    pub fn start_linux(&mut self, entry: &crate::linux::Entry) {
        self.start_flat(entry.eip);
        let v = &mut self.pages.vmcb01;
        v.save.cs.selector = 0x10;
        data_segments(v, segment(0x18, 0xc93, u32::MAX, 0));
        v.save.gdtr = segment(0, 0, 31, u64::from(entry.gdt));
        self.gprs = Gprs { rsi: u64::from(entry.params), ..Gprs::default() };
    }

    /// 32-bit protected mode at `eip`, flat segments with selectors 8 (code) and 0x10 (data).
    fn start_flat(&mut self, eip: u32) {
        self.init();
        self.waiting = false;
        let v = &mut self.pages.vmcb01;
        v.save.cs = segment(8, 0xc9b, u32::MAX, 0);
        data_segments(v, segment(0x10, 0xc93, u32::MAX, 0));
        v.save.cr0 = 0x11;
        v.save.rip = u64::from(eip);
    }

    /// A SIPI: real mode at page `vector`.
    fn start_up(&mut self, vector: u8) {
        self.waiting = false;
        let v = &mut self.pages.vmcb01;
        v.save.cs = segment(u16::from(vector) << 8, 0x9b, 0xffff, u64::from(vector) << 12);
        v.save.rip = 0;
    }

    /// Runs L1 for good, or until L0 cannot go on.
    pub fn run(&mut self) -> Failure {
        loop {
            if (self.waiting || self.shared.ipis.has_events(self.id))
                && let Err(failure) = self.events()
            {
                return failure;
            }
            if self.nmi_pending {
                self.inject_nmi();
            }
            // SAFETY: GIF is clear since `new`; the addresses are of this VP's own pages; the guest is confined by
            // nested paging to memory that is not L0's.
            unsafe { svm::run(&mut self.gprs, self.pa.vmcb01, self.pa.vmcb01, self.pa.host_state) };
            self.exits += 1;
            self.pages.vmcb01.control.tlb_control = 0;
            self.pages.vmcb01.control.event_inj = 0;
            if let Err(failure) = exits::l1(self) {
                return failure;
            }
        }
    }

    /// Carries out what other processors sent; waits while L1's processor waits for SIPI.
    fn events(&mut self) -> Result<(), Failure> {
        loop {
            let events = self.shared.ipis.take(self.id);
            if events.init {
                self.init();
                self.reset_apic();
                self.waiting = self.apic_base & apic::BASE_BSP == 0;
            }
            if let Some(vector) = events.sipi
                && self.waiting
            {
                self.start_up(vector);
            }
            self.nmi_pending |= events.nmi && !self.waiting;
            if !self.waiting {
                return Ok(());
            }
            // SAFETY: L0's tables and TSS are loaded; a kick ends the wait.
            unsafe { svm::wait_for_nmi() };
        }
    }

    fn inject_nmi(&mut self) {
        let v = &mut self.pages.vmcb01;
        if self.nmi_masked || v.control.event_inj & Event::VALID != 0 {
            return;
        }
        v.control.event_inj = NMI_EVENT;
        v.control.intercepts.misc1 |= misc1::IRET;
        self.nmi_masked = true;
        self.nmi_pending = false;
    }

    /// An INIT clears the local APIC but for its id (APM volume 2, 16.3.1): local vectors masked, no timer, no
    /// logical destination, software-disabled.
    fn reset_apic(&mut self) {
        const LVTS: [u64; 6] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
        let a = self.shared.apic;
        if a.is_x2apic() {
            return;
        }
        // SAFETY: none of these sends an interrupt; the APIC is passed through to the guest being reset.
        unsafe {
            for lvt in LVTS {
                a.write(lvt, 1 << 16);
            }
            a.write(0x380, 0);
            a.write(0x3e0, 0);
            a.write(apic::reg::LDR, 0);
            a.write(apic::reg::DFR, u32::MAX);
            a.write(0x80, 0);
            for _ in 0..256 {
                a.write(apic::reg::EOI, 0);
            }
            a.write(apic::reg::SPURIOUS, 0xff);
        }
        self.shared.ipis.set_ldr(self.id, 0);
        self.shared.ipis.set_dfr(self.id, u32::MAX);
    }

    /// Paging registers of the guest in VMCB01.
    #[inline]
    pub fn paging(&self) -> Paging {
        let v = &self.pages.vmcb01;
        Paging { cr0: v.save.cr0, cr3: v.save.cr3, cr4: v.save.cr4, efer: v.save.efer }
    }

    /// L1 runs in a 64-bit code segment.
    #[inline]
    pub fn is_64bit(&self) -> bool {
        self.pages.vmcb01.in_64bit_code()
    }

    /// Linear address of L1's next instruction.
    #[inline]
    pub fn linear_rip(&self) -> u64 {
        let v = &self.pages.vmcb01;
        if self.is_64bit() { v.save.rip } else { v.save.cs.base.wrapping_add(v.save.rip) & 0xffff_ffff }
    }

    /// L1's instruction bytes, and how many there are.
    #[inline]
    pub fn instruction(&self) -> ([u8; 16], usize) {
        let mut bytes = [0; 16];
        let n = fetch::l1_bytes(&self.shared.memory, &self.paging(), self.linear_rip(), &mut bytes);
        (bytes, n)
    }

    /// Moves L1 past an instruction of `length` bytes that L0 carried out.
    #[inline]
    pub fn advance(&mut self, length: u64) {
        let wide = self.is_64bit();
        let v = &mut self.pages.vmcb01;
        let rip = v.save.rip.wrapping_add(length);
        v.complete_instruction(if wide { rip } else { rip & 0xffff_ffff });
    }

    /// Injects exception `vector` into L1, with `error` where it has one.
    pub fn inject(&mut self, vector: u8, error: Option<u32>) {
        self.pages.vmcb01.inject_exception(vector, error);
    }
}

fn data_segments(v: &mut Vmcb, s: Segment) {
    v.save.es = s;
    v.save.ss = s;
    v.save.ds = s;
    v.save.fs = s;
    v.save.gs = s;
}
