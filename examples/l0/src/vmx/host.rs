//! What all VPs share of VT-x: the controls of VMCS01, L1's bitmaps, and what the processor demands of CR0 and CR4.
//! Built once, at boot.

use hvcore::partition::{EvmcsVersions, NestedCapabilities};
use hw::vmx_host::{Allowed, Capabilities};
use hw::{cpu, msr, vmx};
use nvmx::caps::{Config, Host};
use nvmx::controls::{entry, exit, pin, primary, secondary};

use crate::fatal::give_up;
use crate::permissions::PORTS;
use crate::relocate::phys_of;

/// Controls of a VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// VM-exit.
    pub exit: u32,
    /// VM-entry.
    pub entry: u32,
}

/// A page of bits.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Bitmap<const WORDS: usize>(pub [u64; WORDS]);

impl Bitmap<512> {
    /// An MSR bitmap: RDMSR of `msr` exits from now on, or WRMSR. Those outside the two ranges exit whatever it says.
    const fn intercept(&mut self, msr: u32, write: bool) {
        let (range, index) = match msr {
            0..=0x1fff => (0, msr),
            0xc000_0000..=0xc000_1fff => (1, msr & 0x1fff),
            _ => return,
        };
        let quarter = range + if write { 2 } else { 0 };
        self.0[quarter * 128 + index as usize / 64] |= 1 << (index % 64);
    }
}

/// MSRs of L1 that exit: what L0 or the library answers itself.
pub static MSR_BITMAP01: Bitmap<512> = {
    let mut map = Bitmap([0; 512]);
    let mut both = 0;
    while both < 2 {
        let write = both == 1;
        map.intercept(msr::APIC_BASE, write);
        map.intercept(msr::FEATURE_CONTROL, write);
        let mut capability = msr::VMX_BASIC;
        while capability <= VMX_LAST {
            map.intercept(capability, write);
            capability += 1;
        }
        both += 1;
    }
    map.intercept(msr::X2APIC_ICR, true);
    map
};

/// The last VMX capability MSR.
pub const VMX_LAST: u32 = 0x493;

/// Ports of L1 that exit: L0's own, and those by which L1 ends the machine. A, then B.
pub static IO_BITMAPS01: Bitmap<1024> = {
    let mut map = Bitmap([0; 1024]);
    let mut i = 0;
    while i < PORTS.len() {
        map.0[PORTS[i] as usize / 64] |= 1 << (PORTS[i] % 64);
        i += 1;
    }
    map
};

/// MSRs outside the VMCS that L1's MSR areas may name: those of system calls and KernelGSBase, TSC_AUX. L0 uses none of
/// them.
pub const fn is_shared_msr(index: u32) -> bool {
    matches!(index, 0xc000_0081..=0xc000_0084 | 0xc000_0102 | 0xc000_0103)
}

/// True when WRMSR of `value` to `index`, one that [`is_shared_msr`], does not fault.
pub const fn msr_takes(index: u32, value: u64) -> bool {
    match index {
        // Addresses must be canonical: with 57 bits of them, those of 48 are.
        0xc000_0082 | 0xc000_0083 | 0xc000_0102 => value as i64 == (value << 16) as i64 >> 16,
        0xc000_0084 | 0xc000_0103 => value >> 32 == 0,
        _ => true,
    }
}

/// VT-x of this machine.
#[derive(Debug)]
pub struct VmxHost {
    /// Of VMCS01.
    pub controls: Controls,
    /// CR0 bits that are 1 in the guest, whatever it thinks: NE.
    pub cr0_fixed: u64,
    /// CR4 bits that are 1 in the guest, whatever it thinks: VMXE.
    pub cr4_fixed: u64,
    /// CR4 bits that a guest may set.
    pub cr4_allowed: u64,
    /// What L1 is offered.
    pub config: Config,
    /// Physical address of [`MSR_BITMAP01`].
    pub msr_bitmap01: u64,
    /// Physical address of [`IO_BITMAPS01`].
    pub io_bitmaps01: u64,
}

const CR0_PE_PG: u64 = 1 | 1 << 31;

/// IA32_VMX_EPT_VPID_CAP: 4-level walks, write-back tables, 2 MiB pages; INVEPT and INVVPID of a single context.
const EPT_NEEDED: u64 = 1 << 6 | 1 << 14 | 1 << 16 | 1 << 20 | 1 << 25 | 1 << 32 | 1 << 41;

impl VmxHost {
    /// What L1 is offered for its guests.
    pub const ENLIGHTENMENTS: NestedCapabilities = NestedCapabilities {
        evmcs: Some(EvmcsVersions { low: 1, high: 1 }),
        direct_flush: true,
        msr_bitmap: true,
        ..NestedCapabilities::NONE
    };

    /// `None` without VMX; gives up when something of it is missing that L0 cannot do without.
    pub fn new(address_bits: u32, enlighten: bool) -> Option<Self> {
        if !vmx::supported() {
            return None;
        }
        // SAFETY: there is VMX; the EPT and VPID capabilities are read when those controls are there.
        let (capabilities, cr0_fixed, cr4_fixed, cr4_allowed) = unsafe {
            (
                Capabilities::read(),
                msr::rdmsr(msr::VMX_CR0_FIXED0),
                msr::rdmsr(msr::VMX_CR4_FIXED0),
                msr::rdmsr(msr::VMX_CR4_FIXED1),
            )
        };
        let controls = controls(&capabilities);
        // SAFETY: EPT and VPID are there.
        let ept_vpid = unsafe { msr::rdmsr(0x48c) };
        if ept_vpid & EPT_NEEDED != EPT_NEEDED {
            give_up(format_args!("this processor's EPT or VPID lacks something: {ept_vpid:#x}"));
        }
        Some(Self {
            controls,
            cr0_fixed: cr0_fixed & !CR0_PE_PG,
            cr4_fixed,
            cr4_allowed,
            config: offer(address_bits, enlighten),
            msr_bitmap01: phys_of(&raw const MSR_BITMAP01),
            io_bitmaps01: phys_of(&raw const IO_BITMAPS01),
        })
    }

    /// EPT pointer for tables with their root at `root`: write-back, four levels, no accessed and dirty bits.
    pub const fn eptp(&self, root: u64) -> u64 {
        root | 3 << 3 | 6
    }
}

/// All that this processor and the library can offer to L1.
fn offer(address_bits: u32, enlighten: bool) -> Config {
    let linear_bits = cpu::cpuid(0x8000_0008, 0).eax >> 8 & 0xff;
    // SAFETY: the library asks only for those that are there.
    let mut host = Host::from_msrs(address_bits as u8, linear_bits as u8, |number| unsafe { msr::rdmsr(number) });
    host.rtm = cpu::cpuid(7, 0).ebx & 1 << 11 != 0;
    let counters = cpu::cpuid(0xa, 0);
    host.perf_global_ctrl = Host::perf_global_ctrl_of(counters.eax, counters.edx);
    match Config::all(host, enlighten, false) {
        Ok(config) => config,
        Err(error) => give_up(format_args!("VMX cannot be offered to L1: {error:?}")),
    }
}

/// The controls of VMCS01: interrupts are L1's, NMIs are L0's.
fn controls(has: &Capabilities) -> Controls {
    let choose = |what: &str, allowed: Allowed, needed, wanted| match allowed.choose(needed, wanted) {
        Some(controls) => controls,
        None => give_up(format_args!("this processor lacks {what} controls: {needed:#x} of {:#x}", allowed.may)),
    };
    Controls {
        pin: choose("pin-based", has.pin, pin::NMI_EXITING | pin::VIRTUAL_NMIS, 0),
        primary: choose(
            "primary",
            has.primary,
            primary::IO_BITMAPS | primary::MSR_BITMAPS | primary::NMI_WINDOW_EXITING | primary::SECONDARY_CONTROLS,
            0,
        ) & !primary::NMI_WINDOW_EXITING,
        secondary: choose(
            "secondary",
            has.secondary,
            secondary::EPT | secondary::VPID | secondary::UNRESTRICTED_GUEST,
            secondary::RDTSCP | secondary::INVPCID | secondary::XSAVES | secondary::USER_WAIT_PAUSE,
        ),
        exit: choose(
            "exit",
            has.exit,
            exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_EFER | exit::LOAD_EFER | exit::SAVE_PAT | exit::LOAD_PAT,
            exit::SAVE_DEBUG_CONTROLS,
        ),
        entry: choose("entry", has.entry, entry::LOAD_EFER | entry::LOAD_PAT, entry::LOAD_DEBUG_CONTROLS),
    }
}
