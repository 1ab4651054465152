//! An AMD-V CPU that honours a VMCB as the AMD APM, volume 2, chapter 15 says.
//!
//! The CPU does not decode machine code: a program is a sequence of [`Op`]s that the test feeds to [`Cpu::step`], one
//! instruction or one event per step. In host mode the test plays the hypervisor: it feeds `Op::Vmrun(vmcb)` and
//! from then on the guest's operations, until a step answers [`Step::Exit`]. Registers other than RAX, RSP and RIP are
//! in `regs` and cross the world switch untouched, as on hardware.
//!
//! An operation that did not complete (an exit, a fault, an interrupt taken instead) is fed again if the guest gets
//! back to it. Interrupt lines are atomics ([`Lines`]): any thread may raise them between two steps.
//!
//! Modelled: all consistency checks of VMRUN, the host save area, every intercept of the operations in [`Op`], event
//! injection and EXITINTINFO, virtual interrupts, V_TPR, GIF, V_GIF, V_NMI, interrupt shadow, TLB control and ASIDs,
//! nested paging, clean bits (a clean group may come from the CPU's copy of an earlier run), NRIP and decode assists as
//! features. Not modelled: SEV, AVIC, shadow stacks, task switches, segment limits, debug traps, machine checks.
//!
//! In host mode, faults and interrupts are reported, not delivered: the host is the test.

mod cr;
mod entry;
mod event;
mod msr;
mod ops;
mod save;
pub mod vmcb;

use std::collections::HashMap;
use std::sync::Arc;

use super::mem::PhysMem;
use super::mmu::Mmu;
use super::tlb::Tag;
use super::walk::{Access, Context, Fault, Kind, Npt, Second, Vendor};

use super::cpu::idt::Core;
pub use super::cpu::state;
pub use super::cpu::{Event, Lines, Op, Step};
use super::cpu::{GP, LINE, Trap, UD};
use state::{State, bit};

/// What the CPU can do beyond plain SVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Features {
    pub nested_paging: bool,
    pub nrip_save: bool,
    pub decode_assists: bool,
    pub flush_by_asid: bool,
    pub clean_bits: bool,
    pub lbr_virt: bool,
    pub tsc_ratio: bool,
    pub pause_filter: bool,
    pub vgif: bool,
    pub vnmi: bool,
    pub virtual_vmload: bool,
    /// Number of ASIDs; valid ones are below.
    pub asids: u32,
    pub maxphyaddr: u8,
    pub pages_1g: bool,
    /// CR4 bits that may be 1.
    pub cr4: u64,
}

impl Features {
    /// A recent server CPU.
    pub const FULL: Self = Self {
        nested_paging: true,
        nrip_save: true,
        decode_assists: true,
        flush_by_asid: true,
        clean_bits: true,
        lbr_virt: true,
        tsc_ratio: true,
        pause_filter: true,
        vgif: true,
        vnmi: true,
        virtual_vmload: true,
        asids: 32768,
        maxphyaddr: 48,
        pages_1g: true,
        cr4: 0x37_1FFF,
    };

    /// QEMU's TCG: nested paging, V_GIF and 16 ASIDs, nothing else.
    pub const TCG: Self = Self {
        nrip_save: false,
        decode_assists: false,
        flush_by_asid: false,
        clean_bits: false,
        lbr_virt: false,
        tsc_ratio: false,
        pause_filter: false,
        vnmi: false,
        virtual_vmload: false,
        asids: 16,
        maxphyaddr: 40,
        ..Self::FULL
    };
}

/// The control area as VMRUN loaded it.
#[derive(Clone, Debug)]
struct Control {
    vmcb: u64,
    cr: u32,
    dr: u32,
    exceptions: u32,
    misc: [u32; 3],
    iopm: u64,
    msrpm: u64,
    tsc_offset: u64,
    asid: u32,
    vintr: u64,
    npt: Option<Npt>,
    virt_ext: u64,
    pause_count: u16,
    pause_left: u16,
    lbr: bool,
    inject: u64,
    nrip: u64,
}

struct Guest {
    ctl: Control,
    host: State,
    /// Host RFLAGS.IF at VMRUN.
    host_if: bool,
}

/// One AMD-V CPU.
pub struct Cpu {
    /// What it can do.
    pub features: Features,
    /// The registers that a VMCB saves; of the guest while one runs.
    pub state: State,
    /// RCX is 1, RDX 2, RBX 3, RBP 5 and so on; 0 and 4 are unused (RAX and RSP are in `state`).
    pub regs: [u64; 16],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// CR8.
    pub cr8: u64,
    /// XCR0.
    pub xcr0: u64,
    /// VM_CR, VM_HSAVE_PA, TSC_RATIO.
    pub vm_cr: u64,
    /// VM_HSAVE_PA.
    pub hsave: u64,
    /// TSC ratio, 8.32 fixed point.
    pub tsc_ratio: u64,
    /// Time stamp: one tick per step.
    pub tsc: u64,
    /// MSRs that nothing else models.
    pub msrs: HashMap<u32, u64>,
    /// CPUID leaves, by leaf and subleaf; others read 0.
    pub cpuid: HashMap<(u32, u32), [u32; 4]>,
    /// IO ports: last value written.
    pub ports: HashMap<u16, u32>,
    /// Global interrupt flag.
    pub gif: bool,
    /// The instruction before blocks interrupts.
    pub shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_mask: bool,
    /// In HLT.
    pub halted: bool,
    /// Fetch each instruction's first byte through the translation, so that fetches fault.
    pub fetch: bool,
    /// Bytes of prefixes that stand before each instruction.
    pub prefixes: u8,
    /// TLB and walker.
    pub mmu: Mmu,
    /// Input lines.
    pub lines: Arc<Lines>,
    guest: Option<Guest>,
    cache: vmcb::Cache,
}

impl Cpu {
    /// A CPU in host mode with GIF set, 64-bit, SVM enabled; all chance follows `seed`.
    pub fn new(features: Features, seed: u64) -> Self {
        Self {
            features,
            state: State::host(),
            regs: [0; 16],
            dr: [0; 4],
            cr8: 0,
            xcr0: 1,
            vm_cr: 0,
            hsave: 0,
            tsc_ratio: 1 << 32,
            tsc: 0,
            msrs: HashMap::new(),
            cpuid: HashMap::new(),
            ports: HashMap::new(),
            gif: true,
            shadow: false,
            nmi_mask: false,
            halted: false,
            fetch: false,
            prefixes: 0,
            mmu: Mmu::new(1024, seed),
            lines: Arc::default(),
            guest: None,
            cache: vmcb::Cache::new(seed ^ 0x5EED),
        }
    }

    /// The VMCB of the guest that runs.
    pub fn guest(&self) -> Option<u64> {
        self.guest.as_ref().map(|g| g.ctl.vmcb)
    }

    /// How often, of 1,024, a clean group of a VMCB comes from the CPU's copy instead of memory. 512 at first.
    pub fn use_clean_copies(&mut self, per_1024: u32) {
        self.cache.use_copy = per_1024;
    }

    /// The tag of the current context's translations.
    pub fn tag(&self) -> Tag {
        let (asid, nested) = self.guest.as_ref().map_or((0, false), |g| (g.ctl.asid, g.ctl.npt.is_some()));
        Tag::amd(asid, nested).with_pcid(self.pcid())
    }

    fn pcid(&self) -> u16 {
        if self.state.cr4 & bit::CR4_PCIDE != 0 { (self.state.cr3 & 0xFFF) as u16 } else { 0 }
    }

    /// The current context's translation.
    pub fn context(&self) -> Context {
        let linear = self.state.linear(Vendor::Amd, self.features.maxphyaddr, self.features.pages_1g);
        let npt = self.guest.as_ref().and_then(|g| g.ctl.npt);
        Context { linear, second: npt.map_or(Second::Off, Second::Npt) }
    }

    /// One instruction, or one event in its place.
    pub fn step(&mut self, mem: &PhysMem, op: Op) -> Step {
        self.tsc = self.tsc.wrapping_add(1);
        if let Some(step) = self.poll(mem) {
            return step;
        }
        if self.halted {
            return Step::Idle;
        }
        let fetched = if self.fetch { self.fetch(mem) } else { Ok(()) };
        let shadow = std::mem::take(&mut self.shadow);
        let done = fetched.and_then(|()| self.exec(mem, op));
        match done {
            Ok(_) if matches!(op, Op::Vmrun(_)) => self.entered(mem),
            Ok(value) => {
                if !matches!(op, Op::Iret | Op::Jump(_)) {
                    self.state.rip = self.wrap(self.state.rip.wrapping_add(self.length(op)));
                }
                Step::Done(value)
            }
            Err(trap) => {
                // An instruction that did not complete is still in the shadow of the one before.
                self.shadow = shadow;
                self.trap(mem, trap, op)
            }
        }
    }

    /// The length of an instruction with its prefixes.
    pub(super) fn length(&self, op: Op) -> u64 {
        op.len() + u64::from(self.prefixes)
    }

    /// RIP has 64 bits in 64-bit mode only.
    fn wrap(&self, rip: u64) -> u64 {
        if self.state.bits64() { rip } else { rip & 0xFFFF_FFFF }
    }

    /// Whether the guest's hypervisor intercepts bit `n` of vector `v` (0: 0x60, 1: 0x80, 2: 0xA0).
    fn intercepts(&self, v: usize, n: u32) -> bool {
        self.guest.as_ref().is_some_and(|g| g.ctl.misc[v] & (1 << n) != 0)
    }

    /// Exits if that bit is set.
    fn check(&self, v: usize, n: u32) -> Result<(), Trap> {
        let code = [vmcb::exit::MISC1, vmcb::exit::MISC2, 0xA0][v] + u64::from(n);
        if self.intercepts(v, n) { Err(Trap::Exit(code, 0, 0)) } else { Ok(()) }
    }
}

impl Core for Cpu {
    fn state(&mut self) -> &mut State {
        &mut self.state
    }

    fn translate(&mut self, mem: &PhysMem, addr: u64, kind: Kind, user: bool) -> Result<u64, Trap> {
        if !self.state.canonical(addr) {
            return Err(GP);
        }
        let access = Access { kind, user, ac: self.state.rflags & bit::FLAG_AC != 0 };
        let (cx, tag) = (self.context(), self.tag());
        self.mmu.access(mem, &cx, tag, addr, access).map_err(|fault| match fault {
            Fault::Page { code } => Trap::Exception(14, Some(code), addr),
            Fault::Npf { info1, gpa } => Trap::Exit(vmcb::exit::NPF, info1, gpa),
            Fault::EptViolation { .. } | Fault::EptMisconfig { .. } => unreachable!("no EPT here"),
        })
    }
}
