//! What the CPU allows: controls, fixed bits, EPT and VPID capabilities (SDM volume 3, appendix A).

/// Bits of the control fields.
#[allow(missing_docs)]
pub mod pin {
    pub const EXTERNAL: u32 = 1;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const TIMER: u32 = 1 << 6;
    pub const POSTED: u32 = 1 << 7;
}

/// Primary processor-based controls.
#[allow(missing_docs)]
pub mod proc {
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    pub const TSC_OFFSET: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const INVLPG: u32 = 1 << 9;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const RDTSC: u32 = 1 << 12;
    pub const CR3_LOAD: u32 = 1 << 15;
    pub const CR3_STORE: u32 = 1 << 16;
    pub const CR8_LOAD: u32 = 1 << 19;
    pub const CR8_STORE: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW: u32 = 1 << 22;
    pub const MOV_DR: u32 = 1 << 23;
    pub const IO: u32 = 1 << 24;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const MTF: u32 = 1 << 27;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const PAUSE: u32 = 1 << 30;
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls.
#[allow(missing_docs)]
pub mod proc2 {
    pub const APIC_ACCESSES: u32 = 1;
    pub const EPT: u32 = 1 << 1;
    pub const TABLES: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const X2APIC: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const APIC_REGISTERS: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPTS: u32 = 1 << 9;
    pub const INVPCID: u32 = 1 << 12;
    pub const TSC_SCALING: u32 = 1 << 25;
}

/// VM-exit controls.
#[allow(missing_docs)]
pub mod exitc {
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const HOST64: u32 = 1 << 9;
    pub const ACK: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_TIMER: u32 = 1 << 22;
}

/// VM-entry controls.
#[allow(missing_docs)]
pub mod entryc {
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const IA32E: u32 = 1 << 9;
    pub const SMM: u32 = 1 << 10;
    pub const DUAL: u32 = 1 << 11;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// Bits that must be 1, and bits that may be 1.
pub type Allowed = (u32, u32);

/// The capabilities of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Caps {
    pub pin: Allowed,
    pub proc: Allowed,
    pub proc2: Allowed,
    pub exit: Allowed,
    pub entry: Allowed,
    /// Bits of CR0 that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// Bits of CR4 that may be 1.
    pub cr4: u64,
    pub maxphyaddr: u8,
    pub exec_only: bool,
    pub pages_1g: bool,
    pub ept_ad: bool,
    /// VMWRITE may write exit-information fields.
    pub write_all: bool,
    /// The preemption timer counts at TSC >> this.
    pub timer_shift: u8,
}

impl Caps {
    /// EPT, VPID, unrestricted guest, virtual NMIs, preemption timer, MTF; no virtual APIC beyond the TPR shadow.
    pub const FULL: Self = Self {
        pin: (0x16, 0x7F),
        proc: (0x0400_6172, 0xFFF9_FFFE),
        proc2: (0, 0x0210_10EE),
        exit: (0x3_6DFB, 0x7F_EFFF),
        entry: (0x11FB, 0xD3FF),
        cr0_fixed0: 0x8000_0021,
        cr4: 0x37_3FFF,
        maxphyaddr: 46,
        exec_only: true,
        pages_1g: true,
        ept_ad: true,
        write_all: false,
        timer_shift: 0,
    };
}
