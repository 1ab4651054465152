//! VM-entry checks on control fields and host state (SDM volume 3, "Checks on VMX controls and host-state area").
//!
//! Every check has a name, which `Cpu::why` reports when it refuses an entry.

use super::Caps;
use super::caps::{Allowed, entryc, exitc, pin, proc, proc2};
use super::fields::{self as f, Vmcs};
use crate::model::cpu::state::{bit::*, sign_extend};
use crate::model::mem::PhysMem;

/// The name of the check that failed.
pub(super) type Check = Result<(), &'static str>;

pub(super) fn ensure(ok: bool, what: &'static str) -> Check {
    if ok { Ok(()) } else { Err(what) }
}

/// The controls of a VMCS, read once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Controls {
    pub pin: u32,
    pub proc: u32,
    pub proc2: u32,
    pub exit: u32,
    pub entry: u32,
}

impl Controls {
    pub(super) fn read(v: &Vmcs) -> Self {
        let get = |field| v.get(field) as u32;
        let proc = get(f::PROC);
        let proc2 = if proc & proc::SECONDARY != 0 { get(f::PROC2) } else { 0 };
        Self { pin: get(f::PIN), proc, proc2, exit: get(f::EXIT), entry: get(f::ENTRY) }
    }

    pub(super) fn pin(&self, bit: u32) -> bool {
        self.pin & bit != 0
    }
    pub(super) fn proc(&self, bit: u32) -> bool {
        self.proc & bit != 0
    }
    pub(super) fn proc2(&self, bit: u32) -> bool {
        self.proc2 & bit != 0
    }
    pub(super) fn exit(&self, bit: u32) -> bool {
        self.exit & bit != 0
    }
    pub(super) fn entry(&self, bit: u32) -> bool {
        self.entry & bit != 0
    }
}

fn allowed(value: u32, (must, may): Allowed) -> bool {
    value & must == must && value & !may == 0
}

/// What the checks look at.
pub(super) struct Checks<'a> {
    pub v: &'a Vmcs,
    pub c: Controls,
    pub caps: &'a Caps,
    pub mem: &'a PhysMem,
    /// The CPU's own mode at entry.
    pub host_long: bool,
    /// The current-VMCS pointer.
    pub current: u64,
}

impl Checks<'_> {
    pub(super) fn get(&self, field: u32) -> u64 {
        self.v.get(field)
    }

    /// Zero outside the physical-address width and in the low `bits` bits.
    pub(super) fn address(&self, addr: u64, bits: u32) -> bool {
        addr & ((1 << bits) - 1) == 0 && addr >> self.caps.maxphyaddr == 0
    }

    pub(super) fn canonical(addr: u64) -> bool {
        sign_extend(addr, 48) == addr
    }

    pub(super) fn pat(value: u64) -> bool {
        value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
    }

    /// Failing VMfailValid(7).
    pub(super) fn controls(&self) -> Check {
        let c = &self.c;
        ensure(allowed(c.pin, self.caps.pin), "pin-based reserved bits")?;
        ensure(allowed(c.proc, self.caps.proc), "processor-based reserved bits")?;
        ensure(!c.proc(proc::SECONDARY) || allowed(c.proc2, self.caps.proc2), "secondary reserved bits")?;
        ensure(self.get(f::CR3_TARGETS) <= 4, "CR3-target count")?;
        self.bitmaps()?;
        self.tpr()?;
        ensure(c.pin(pin::NMI) || !c.pin(pin::VIRTUAL_NMIS), "virtual NMIs without NMI exiting")?;
        ensure(c.pin(pin::VIRTUAL_NMIS) || !c.proc(proc::NMI_WINDOW), "NMI window without virtual NMIs")?;
        ensure(!c.proc2(proc2::VPID) || self.get(f::VPID) != 0, "VPID 0")?;
        ensure(!c.proc2(proc2::EPT) || self.eptp(self.get(f::EPTP)), "EPTP")?;
        ensure(!c.proc2(proc2::UNRESTRICTED) || c.proc2(proc2::EPT), "unrestricted guest without EPT")?;
        ensure(!c.proc2(proc2::TSC_SCALING) || self.get(f::TSC_MULTIPLIER) != 0, "TSC multiplier 0")?;
        self.exit_controls()?;
        self.entry_controls()
    }

    fn bitmaps(&self) -> Check {
        let c = &self.c;
        let io = self.address(self.get(f::IO_BITMAP_A), 12) && self.address(self.get(f::IO_BITMAP_B), 12);
        ensure(!c.proc(proc::IO_BITMAPS) || io, "IO bitmap address")?;
        ensure(!c.proc(proc::MSR_BITMAPS) || self.address(self.get(f::MSR_BITMAP), 12), "MSR bitmap address")
    }

    fn tpr(&self) -> Check {
        let c = &self.c;
        if !c.proc(proc::TPR_SHADOW) {
            let needs = proc2::X2APIC | proc2::APIC_REGISTERS | proc2::VIRTUAL_INTERRUPTS;
            return ensure(!c.proc2(needs), "virtual APIC without TPR shadow");
        }
        let page = self.get(f::VIRTUAL_APIC);
        ensure(self.address(page, 12), "virtual-APIC address")?;
        let threshold = self.get(f::TPR_THRESHOLD);
        ensure(threshold >> 4 == 0, "TPR threshold reserved bits")?;
        ensure(threshold <= (self.mem.read(page + 0x80, 4) >> 4) & 0xF, "TPR threshold above VTPR")
    }

    pub(super) fn eptp(&self, eptp: u64) -> bool {
        matches!(eptp & 7, 0 | 6)
            && (eptp >> 3) & 7 == 3
            && (self.caps.ept_ad || eptp & (1 << 6) == 0)
            && eptp & 0xF80 == 0
            && eptp >> self.caps.maxphyaddr == 0
    }

    fn msr_area(&self, count: u32, address: u32) -> bool {
        let (n, at) = (self.get(count), self.get(address));
        n == 0 || (self.address(at, 4) && (at + n * 16 - 1) >> self.caps.maxphyaddr == 0)
    }

    fn exit_controls(&self) -> Check {
        let c = &self.c;
        ensure(allowed(c.exit, self.caps.exit), "exit reserved bits")?;
        ensure(c.pin(pin::TIMER) || !c.exit(exitc::SAVE_TIMER), "save timer without timer")?;
        ensure(self.msr_area(f::EXIT_MSR_STORE_COUNT, f::EXIT_MSR_STORE), "exit MSR-store area")?;
        ensure(self.msr_area(f::EXIT_MSR_LOAD_COUNT, f::EXIT_MSR_LOAD), "exit MSR-load area")
    }

    fn entry_controls(&self) -> Check {
        ensure(allowed(self.c.entry, self.caps.entry), "entry reserved bits")?;
        ensure(!self.c.entry(entryc::SMM | entryc::DUAL), "SMM")?;
        ensure(self.msr_area(f::ENTRY_MSR_LOAD_COUNT, f::ENTRY_MSR_LOAD), "entry MSR-load area")?;
        self.injection()
    }

    fn injection(&self) -> Check {
        let info = self.get(f::ENTRY_INFO);
        if info >> 31 & 1 == 0 {
            return Ok(());
        }
        let (kind, vector, deliver) = ((info >> 8) & 7, info & 0xFF, info & (1 << 11) != 0);
        ensure(kind != 1, "injection type 1")?;
        ensure(kind != 7 || self.caps.proc.1 & proc::MTF != 0, "injection type 7")?;
        let vector_ok = match kind {
            2 => vector == 2,
            3 => vector <= 31,
            7 => vector == 0,
            _ => true,
        };
        ensure(vector_ok, "injection vector")?;
        // In real mode of an unrestricted guest no exception has an error code.
        let real = self.c.proc2(proc2::UNRESTRICTED) && self.get(f::GUEST_CR0) & CR0_PE == 0;
        let has_code = !real && kind == 3 && matches!(vector, 8 | 10..=14 | 17);
        ensure(deliver == has_code, "injection error-code bit")?;
        ensure(info & 0x7FFF_F000 == 0, "injection reserved bits")?;
        ensure(!deliver || self.get(f::ENTRY_ERROR) >> 16 == 0, "injection error code")?;
        let length = self.get(f::ENTRY_LENGTH);
        ensure(!matches!(kind, 4..=6) || (1..=15).contains(&length), "injection instruction length")
    }

    /// Failing VMfailValid(8).
    pub(super) fn host(&self) -> Check {
        let (cr0, cr4) = (self.get(f::HOST_CR0), self.get(f::HOST_CR4));
        let fixed0 = self.caps.cr0_fixed0;
        ensure(cr0 & fixed0 == fixed0 && cr0 >> 32 == 0, "host CR0")?;
        ensure(cr4 & CR4_VMXE != 0 && cr4 & !self.caps.cr4 == 0, "host CR4")?;
        ensure(self.get(f::HOST_CR3) >> self.caps.maxphyaddr == 0, "host CR3")?;
        for field in [f::HOST_SYSENTER_ESP, f::HOST_SYSENTER_EIP] {
            ensure(Self::canonical(self.get(field)), "host SYSENTER")?;
        }
        ensure(!self.c.exit(exitc::LOAD_PAT) || Self::pat(self.get(f::HOST_PAT)), "host PAT")?;
        let host64 = self.c.exit(exitc::HOST64);
        if self.c.exit(exitc::LOAD_EFER) {
            let efer = self.get(f::HOST_EFER);
            let long = if host64 { EFER_LMA | EFER_LME } else { 0 };
            ensure(efer & !EFER_INTEL == 0 && efer & (EFER_LMA | EFER_LME) == long, "host EFER")?;
        }
        self.host_segments(host64)?;
        ensure(self.host_long == host64, "host address-space size")?;
        if !host64 {
            ensure(!self.c.entry(entryc::IA32E) && cr4 & CR4_PCIDE == 0, "32-bit host")?;
            return ensure(self.get(f::HOST_RIP) >> 32 == 0, "host RIP");
        }
        ensure(cr4 & CR4_PAE != 0, "64-bit host without PAE")?;
        ensure(Self::canonical(self.get(f::HOST_RIP)), "host RIP")
    }

    fn host_segments(&self, host64: bool) -> Check {
        use f::*;
        for field in [HOST_ES, HOST_CS, HOST_SS, HOST_DS, HOST_FS, HOST_GS, HOST_TR] {
            ensure(self.get(field) & 7 == 0, "host selector")?;
        }
        ensure(self.get(HOST_CS) != 0 && self.get(HOST_TR) != 0, "host CS or TR null")?;
        ensure(host64 || self.get(HOST_SS) != 0, "host SS null")?;
        for field in [HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE] {
            ensure(Self::canonical(self.get(field)), "host base")?;
        }
        Ok(())
    }
}

/// EFER bits of VT-x CPUs: SCE, LME, LMA, NXE.
pub(super) const EFER_INTEL: u64 = 1 | EFER_LME | EFER_LMA | EFER_NXE;
