//! The host's half of a VMCS, taken from the processor as it is, and the controls that the processor allows.
//!
//! Used when a VMCS is made; [`crate::vmx`] runs it.

use nvmx::field::Field;

use crate::{cpu, msr, vmx};

/// Which values a vector of VM-execution, exit or entry controls may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Bits that must be 1.
    pub must: u32,
    /// Bits that may be 1.
    pub may: u32,
}

impl Allowed {
    /// As a capability MSR states it: allowed 0-settings in bits 31:0, allowed 1-settings in bits 63:32.
    pub const fn from_msr(value: u64) -> Self {
        Self { must: value as u32, may: (value >> 32) as u32 }
    }

    /// The controls with `needed` and as much of `wanted` as there is; `None` when some of `needed` is missing.
    pub const fn choose(self, needed: u32, wanted: u32) -> Option<u32> {
        if needed & !self.may != 0 { None } else { Some((needed | wanted | self.must) & self.may) }
    }
}

/// What the processor allows of each vector of controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Pin-based.
    pub pin: Allowed,
    /// Primary processor-based.
    pub primary: Allowed,
    /// Secondary processor-based.
    pub secondary: Allowed,
    /// VM-exit.
    pub exit: Allowed,
    /// VM-entry.
    pub entry: Allowed,
}

impl Capabilities {
    /// From the "true" capability MSRs, where the processor has them.
    ///
    /// # Safety
    /// [`vmx::supported`].
    pub unsafe fn read() -> Self {
        // SAFETY: processors with VMX have these MSRs; 0x48B is there where its control is.
        unsafe {
            let extra = if msr::rdmsr(msr::VMX_BASIC) & 1 << 55 != 0 { 0x48d - 0x481 } else { 0 };
            let read = |number: u32| Allowed::from_msr(msr::rdmsr(number));
            let primary = read(0x482 + extra);
            let secondary = if primary.may & 1 << 31 != 0 { read(0x48b) } else { Allowed { must: 0, may: 0 } };
            Self { pin: read(0x481 + extra), primary, secondary, exit: read(0x483 + extra), entry: read(0x484 + extra) }
        }
    }
}

/// Writes the host-state area of the current VMCS, all but RSP and RIP ([`vmx::World::bind`]): an exit finds the
/// processor as it is now.
///
/// # Safety
/// In VMX root operation with a current VMCS, in 64-bit mode; selectors and TSS are legal as host state (no RPL, no
/// local table).
pub unsafe fn write_host_state() {
    let (gdt, _) = cpu::sgdt();
    let (idt, _) = cpu::sidt();
    let tr = cpu::tr();
    // SAFETY: the descriptor of the loaded TSS is in the loaded table; the MSRs exist in 64-bit mode; the fields get
    // what the processor runs with.
    unsafe {
        let descriptor = (gdt + u64::from(tr & !7)) as *const u64;
        let (low, high) = (descriptor.read_unaligned(), descriptor.add(1).read_unaligned());
        let tss = low >> 16 & 0xff_ffff | (low >> 56) << 24 | high << 32;
        let msr_fields = [
            (Field::HostFsBase, msr::FS_BASE),
            (Field::HostGsBase, msr::GS_BASE),
            (Field::HostSysenterCs, msr::SYSENTER_CS),
            (Field::HostSysenterEsp, msr::SYSENTER_ESP),
            (Field::HostSysenterEip, msr::SYSENTER_EIP),
            (Field::HostPat, msr::PAT),
            (Field::HostEfer, msr::EFER),
        ];
        for (field, number) in msr_fields {
            vmx::write(field, msr::rdmsr(number));
        }
        let fields = [
            (Field::HostCr0, cpu::cr0()),
            (Field::HostCr3, cpu::cr3()),
            (Field::HostCr4, cpu::cr4()),
            (Field::HostCsSelector, cpu::cs().into()),
            (Field::HostSsSelector, cpu::ss().into()),
            (Field::HostDsSelector, cpu::ds().into()),
            (Field::HostEsSelector, cpu::es().into()),
            (Field::HostFsSelector, cpu::fs().into()),
            (Field::HostGsSelector, cpu::gs().into()),
            (Field::HostTrSelector, tr.into()),
            (Field::HostTrBase, tss),
            (Field::HostGdtrBase, gdt),
            (Field::HostIdtrBase, idt),
        ];
        for (field, value) in fields {
            vmx::write(field, value);
        }
    }
}
