//! Bits of control registers, MSRs and small VMCS fields that the state machine looks at.
//!
//! Every module of this crate uses it; it uses nothing.

/// CR0.
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Emulation.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type; always one.
    pub const ET: u64 = 1 << 4;
    /// Numeric error.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4.
pub mod cr4 {
    /// Page-size extensions.
    pub const PSE: u64 = 1 << 4;
    /// Physical-address extension.
    pub const PAE: u64 = 1 << 5;
    /// Page global enable.
    pub const PGE: u64 = 1 << 7;
    /// 57-bit linear addresses.
    pub const LA57: u64 = 1 << 12;
    /// VMX enable.
    pub const VMXE: u64 = 1 << 13;
    /// SMX enable.
    pub const SMXE: u64 = 1 << 14;
    /// PCID enable.
    pub const PCIDE: u64 = 1 << 17;
    /// Control-flow enforcement.
    pub const CET: u64 = 1 << 23;
}

/// RFLAGS.
pub mod rflags {
    /// Bit 1: always one.
    pub const FIXED: u64 = 1 << 1;
    /// Carry.
    pub const CF: u64 = 1;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// CF, PF, AF, ZF, SF and OF.
    pub const ARITHMETIC: u64 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11;
    /// Trap flag.
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
    /// Resume flag.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
}

/// IA32_EFER.
pub mod efer {
    /// SYSCALL enable.
    pub const SCE: u64 = 1;
    /// Long mode enable.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute enable.
    pub const NXE: u64 = 1 << 11;
}

/// Guest interruptibility state (SDM volume 3, "Guest Non-Register State").
pub mod interruptibility {
    /// Blocking by STI.
    pub const STI: u32 = 1;
    /// Blocking by MOV SS.
    pub const MOV_SS: u32 = 1 << 1;
    /// Blocking by SMI.
    pub const SMI: u32 = 1 << 2;
    /// Blocking by NMI.
    pub const NMI: u32 = 1 << 3;
}

/// Guest activity state (SDM volume 3, "Guest Non-Register State").
pub mod activity {
    /// Active.
    pub const ACTIVE: u32 = 0;
    /// HLT.
    pub const HLT: u32 = 1;
    /// Shutdown.
    pub const SHUTDOWN: u32 = 2;
    /// Wait for SIPI.
    pub const WAIT_FOR_SIPI: u32 = 3;
}

/// VM-entry and VM-exit interruption information, IDT-vectoring information (SDM volume 3, "Information for VM Exits
/// Due to Vectored Events").
pub mod interruption {
    /// Bits 7:0: the vector.
    pub const VECTOR: u32 = 0xFF;
    /// Bits 10:8: the type.
    pub const TYPE: u32 = 7 << 8;
    /// Type 0: external interrupt.
    pub const EXTERNAL: u32 = 0;
    /// Type 2: NMI.
    pub const NMI: u32 = 2 << 8;
    /// Type 3: hardware exception.
    pub const HARDWARE_EXCEPTION: u32 = 3 << 8;
    /// Type 4: software interrupt.
    pub const SOFTWARE_INTERRUPT: u32 = 4 << 8;
    /// Type 5: privileged software exception (INT1).
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5 << 8;
    /// Type 6: software exception (INT3, INTO).
    pub const SOFTWARE_EXCEPTION: u32 = 6 << 8;
    /// Type 7: other event (a pending MTF exit).
    pub const OTHER: u32 = 7 << 8;
    /// Bit 11: deliver the error code; the error code is valid.
    pub const ERROR_CODE: u32 = 1 << 11;
    /// Bit 12: NMI unblocking due to IRET (exits only).
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    /// Bit 31: valid.
    pub const VALID: u32 = 1 << 31;
}

/// Segment access rights as VMCS fields hold them.
pub mod access_rights {
    /// Bits 3:0: the type.
    pub const TYPE: u32 = 0xF;
    /// Type bit 1: writable (data) or readable (code).
    pub const WRITABLE: u32 = 1 << 1;
    /// Type bit 2: expand-down (data) or conforming (code).
    pub const EXPAND_DOWN: u32 = 1 << 2;
    /// Type bit 3: code.
    pub const CODE: u32 = 1 << 3;
    /// Bit 4: code or data, not a system segment.
    pub const S: u32 = 1 << 4;
    /// Bits 6:5: the DPL; of SS, the CPL.
    pub const DPL_SHIFT: u32 = 5;
    /// Bit 7: present.
    pub const P: u32 = 1 << 7;
    /// Bit 13: 64-bit code.
    pub const L: u32 = 1 << 13;
    /// Bit 14: default size 32.
    pub const DB: u32 = 1 << 14;
    /// Bit 15: granularity.
    pub const G: u32 = 1 << 15;
    /// Bit 16: unusable.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Pending debug exceptions.
pub mod pending_debug {
    /// Bit 14: a single-step trap.
    pub const BS: u64 = 1 << 14;
}
