//! A VT-x CPU that honours a VMCS as the Intel SDM, volume 3, says.
//!
//! Used like the AMD-V CPU: operations are fed to [`Cpu::step`]; in root operation the test plays the hypervisor and
//! may call [`Cpu::vmxon`], [`Cpu::vmptrld`], [`Cpu::vmread`] and the like directly. `Op::Vmlaunch` and `Op::Vmresume`
//! enter the guest; [`Step::Exit`] carries the exit reason (bit 31 set for a failed entry), and `Cpu::why` names the check
//! that refused. An active VMCS lives in the CPU: memory has its fields only after VMCLEAR, so a VMCS that moves to
//! another CPU without VMCLEAR arrives with old contents.
//!
//! Memory operands of VMX instructions in a guest are reported as DS:\[RAX\] with displacement 0; register operands as
//! RAX (value) and RCX (encoding or type).
//!
//! Modelled: every check on controls, host and guest state for the controls in [`Caps`], MSR-load and -store areas,
//! injection, exits of every operation in [`Op`], windows, preemption timer, MTF, virtual NMIs, activity states, EPT and
//! VPID. Not modelled: APIC virtualization beyond the TPR shadow, VMFUNC, VMCS shadowing, PML, posted interrupts, SMM,
//! debug traps, task switches.

pub mod caps;
mod check;
mod check_guest;
mod cr;
mod entry;
mod event;
pub mod fields;
mod ops;
mod root;
mod run;

use std::collections::HashMap;
use std::sync::Arc;

use super::cpu::idt::Core;
use super::cpu::state::{State, bit};
pub use super::cpu::{Event, Lines, Op, Step};
use super::cpu::{GP, LINE, Trap, UD};
use super::mem::PhysMem;
use super::mmu::Mmu;
use super::tlb::Tag;
use super::walk::{Access, Context, Ept, Fault, Kind, Mode, Second, Vendor};
pub use caps::Caps;
use check::Controls;
use fields::Vmcs;
pub use root::{Status, write_minimal};

/// Basic exit reasons.
#[allow(missing_docs)]
pub mod reason {
    pub const EXCEPTION: u64 = 0;
    pub const EXTERNAL: u64 = 1;
    pub const TRIPLE_FAULT: u64 = 2;
    pub const INIT: u64 = 3;
    pub const SIPI: u64 = 4;
    pub const INTERRUPT_WINDOW: u64 = 7;
    pub const NMI_WINDOW: u64 = 8;
    pub const CPUID: u64 = 10;
    pub const HLT: u64 = 12;
    pub const INVD: u64 = 13;
    pub const INVLPG: u64 = 14;
    pub const RDPMC: u64 = 15;
    pub const RDTSC: u64 = 16;
    pub const VMCALL: u64 = 18;
    pub const VMCLEAR: u64 = 19;
    pub const VMLAUNCH: u64 = 20;
    pub const VMPTRLD: u64 = 21;
    pub const VMPTRST: u64 = 22;
    pub const VMREAD: u64 = 23;
    pub const VMRESUME: u64 = 24;
    pub const VMWRITE: u64 = 25;
    pub const VMXOFF: u64 = 26;
    pub const VMXON: u64 = 27;
    pub const CR: u64 = 28;
    pub const DR: u64 = 29;
    pub const IO: u64 = 30;
    pub const RDMSR: u64 = 31;
    pub const WRMSR: u64 = 32;
    pub const GUEST_STATE: u64 = 33 | 1 << 31;
    pub const MSR_LOADING: u64 = 34 | 1 << 31;
    pub const MWAIT: u64 = 36;
    pub const MTF: u64 = 37;
    pub const MONITOR: u64 = 39;
    pub const PAUSE: u64 = 40;
    pub const TPR: u64 = 43;
    pub const GDTR_IDTR: u64 = 46;
    pub const LDTR_TR: u64 = 47;
    pub const EPT_VIOLATION: u64 = 48;
    pub const EPT_MISCONFIG: u64 = 49;
    pub const INVEPT: u64 = 50;
    pub const RDTSCP: u64 = 51;
    pub const TIMER: u64 = 52;
    pub const INVVPID: u64 = 53;
    pub const WBINVD: u64 = 54;
    pub const XSETBV: u64 = 55;
    pub const INVPCID: u64 = 58;
    pub const VMFUNC: u64 = 59;
}

/// What non-root operation needs at hand.
#[derive(Clone, Debug)]
struct Guest {
    c: Controls,
    ept: Option<Ept>,
    vpid: u16,
    /// Virtual-NMI blocking.
    nmi_block: bool,
    timer: u64,
    mtf: bool,
}

/// One VT-x CPU.
pub struct Cpu {
    /// What it can do.
    pub caps: Caps,
    /// The registers; of the guest in non-root operation.
    pub state: State,
    /// RCX is 1, RDX 2, RBX 3, RBP 5 and so on; 0 and 4 are unused (RAX and RSP are in `state`).
    pub regs: [u64; 16],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// CR8.
    pub cr8: u64,
    /// XCR0.
    pub xcr0: u64,
    /// Time stamp: one tick per step.
    pub tsc: u64,
    /// MSRs that nothing else models.
    pub msrs: HashMap<u32, u64>,
    /// CPUID leaves, by leaf and subleaf; others read 0.
    pub cpuid: HashMap<(u32, u32), [u32; 4]>,
    /// IO ports: last value written.
    pub ports: HashMap<u16, u32>,
    /// The STI shadow.
    pub shadow: bool,
    /// The MOV SS shadow.
    pub shadow_ss: bool,
    /// NMIs are blocked.
    pub nmi_mask: bool,
    /// 0 active, 1 HLT, 2 shutdown, 3 wait-for-SIPI.
    pub activity: u64,
    /// PDPTE registers of PAE paging.
    pub pdptes: [u64; 4],
    /// Fetch each instruction's first byte through the translation, so that fetches fault.
    pub fetch: bool,
    /// The check that refused the last entry.
    pub why: &'static str,
    /// A VMX abort happened: every further step is a shutdown.
    pub aborted: bool,
    /// Bytes of prefixes that stand before each instruction.
    pub prefixes: u8,
    /// TLB and walker.
    pub mmu: Mmu,
    /// Input lines.
    pub lines: Arc<Lines>,
    /// VMXON region.
    vmxon: Option<u64>,
    current: Option<(u64, Vmcs)>,
    /// Active VMCSs that are not current.
    active: HashMap<u64, Vmcs>,
    guest: Option<Guest>,
    /// The event whose delivery is being interrupted, and how it was injected (or 0).
    vectoring: Option<(Event, u32)>,
    /// Linear address of the access that faulted in the second stage.
    fault_linear: u64,
}

impl Cpu {
    /// A CPU in 64-bit mode, CR4.VMXE set, outside VMX operation; all chance follows `seed`.
    pub fn new(caps: Caps, seed: u64) -> Self {
        let mut state = State::host();
        state.efer &= !bit::EFER_SVME;
        state.cr0 |= 1 << 5;
        state.cr4 |= bit::CR4_VMXE;
        Self {
            caps,
            state,
            regs: [0; 16],
            dr: [0; 4],
            cr8: 0,
            xcr0: 1,
            tsc: 0,
            msrs: HashMap::new(),
            cpuid: HashMap::new(),
            ports: HashMap::new(),
            shadow: false,
            shadow_ss: false,
            nmi_mask: false,
            activity: 0,
            pdptes: [0; 4],
            fetch: false,
            prefixes: 0,
            why: "",
            aborted: false,
            mmu: Mmu::new(1024, seed),
            lines: Arc::default(),
            vmxon: None,
            current: None,
            active: HashMap::new(),
            guest: None,
            vectoring: None,
            fault_linear: 0,
        }
    }

    /// In non-root operation.
    pub fn in_guest(&self) -> bool {
        self.guest.is_some()
    }

    /// The current VMCS.
    pub fn current(&self) -> Option<u64> {
        self.current.as_ref().map(|c| c.0)
    }

    /// The tag of the current context's translations.
    pub fn tag(&self) -> Tag {
        let pcid = if self.state.cr4 & bit::CR4_PCIDE != 0 { (self.state.cr3 & 0xFFF) as u16 } else { 0 };
        let (vpid, root) = self.guest.as_ref().map_or((0, None), |g| (g.vpid, g.ept.map(|e| e.ep4ta())));
        Tag::intel(vpid, root).with_pcid(pcid)
    }

    /// The current context's translation.
    pub fn context(&self) -> Context {
        let mut linear = self.state.linear(Vendor::Intel, self.caps.maxphyaddr, self.caps.pages_1g);
        if linear.mode == Mode::Pae {
            linear.pdptes = Some(self.pdptes);
        }
        let ept = self.guest.as_ref().and_then(|g| g.ept);
        Context { linear, second: ept.map_or(Second::Off, Second::Ept) }
    }

    /// A field of the current VMCS, 0 without one.
    fn field(&self, field: u32) -> u64 {
        self.current.as_ref().map_or(0, |(_, v)| v.get(field))
    }

    fn set_field(&mut self, field: u32, value: u64) {
        if let Some((_, v)) = &mut self.current {
            v.set(field, value);
        }
    }

    /// The controls of the guest that runs; all zero in root operation.
    fn controls(&self) -> Controls {
        self.guest.as_ref().map_or_else(Controls::default, |g| g.c)
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
        self.fault_linear = addr;
        self.mmu.access(mem, &cx, tag, addr, access).map_err(|fault| match fault {
            Fault::Page { code } => Trap::Exception(14, Some(code), addr),
            Fault::EptViolation { qualification, gpa } => Trap::Exit(reason::EPT_VIOLATION, qualification, gpa),
            Fault::EptMisconfig { gpa } => Trap::Exit(reason::EPT_MISCONFIG, 0, gpa),
            Fault::Npf { .. } => unreachable!("no nested paging of AMD-V here"),
        })
    }
}
