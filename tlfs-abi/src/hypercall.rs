//! The hypercall input value, the result value and the call codes (TLFS, "Hypercall Interface").
//!
//! Used by the intake in `hvcore` (host side) and by its client half (guest side); uses `status`.

use crate::status::HvStatus;
use bitfield::bitfield;

bitfield! {
    /// The hypercall input value: RCX for a 64-bit caller, EDX:EAX for a 32-bit one.
    #[derive(Clone, Copy, PartialEq, Eq, Default)]
    pub struct HypercallInput(u64);
    impl Debug;
    u16;
    /// Bits 15:0: which call.
    pub code, set_code: 15, 0;
    /// Bit 16: the parameters are in registers, not in memory.
    pub fast, set_fast: 16;
    /// Bits 26:17: size of the variable header in 8-byte units.
    pub variable_header_size, set_variable_header_size: 26, 17;
    /// Bit 31: the call is for the L0 hypervisor of a nested environment.
    pub nested, set_nested: 31;
    /// Bits 43:32: number of reps in total; zero for a simple call.
    pub rep_count, set_rep_count: 43, 32;
    /// Bits 59:48: the rep to start with; zero for a simple call.
    pub rep_start, set_rep_start: 59, 48;
}

impl HypercallInput {
    /// Bits 30:27, 47:44 and 63:60: must be zero.
    pub const RESERVED: u64 = 0xF000_F000_7800_0000;

    /// Bit 31, the "is nested" bit, as a mask.
    pub const NESTED: u64 = 1 << 31;

    /// The value with only the call code set.
    #[inline]
    pub const fn new(code: CallCode) -> Self {
        Self(code.0 as u64)
    }

    /// The raw register value.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The call code as a type.
    #[inline]
    pub const fn call_code(self) -> CallCode {
        CallCode(self.0 as u16)
    }

    /// True when a reserved bit is set: HV_STATUS_INVALID_HYPERCALL_INPUT.
    #[inline]
    pub const fn has_reserved(self) -> bool {
        self.0 & Self::RESERVED != 0
    }

    /// With the fast bit.
    #[inline]
    pub const fn with_fast(self) -> Self {
        Self(self.0 | 1 << 16)
    }

    /// With a variable header of `qwords` 8-byte units (10 bits are kept).
    #[inline]
    pub const fn with_variable_header_size(self, qwords: u16) -> Self {
        Self(self.0 & !(0x3FF << 17) | (qwords as u64 & 0x3FF) << 17)
    }

    /// With `count` reps in total, beginning at `start` (12 bits each are kept).
    #[inline]
    pub const fn with_reps(self, count: u16, start: u16) -> Self {
        let cleared = self.0 & !(0xFFF << 32) & !(0xFFF << 48);
        Self(cleared | (count as u64 & 0xFFF) << 32 | (start as u64 & 0xFFF) << 48)
    }
}

bitfield! {
    /// The hypercall result value: RAX for a 64-bit caller, EDX:EAX for a 32-bit one.
    #[derive(Clone, Copy, PartialEq, Eq, Default)]
    pub struct HypercallResult(u64);
    impl Debug;
    u16;
    /// Bits 15:0: the status as a number.
    pub status_code, set_status_code: 15, 0;
    /// Bits 43:32: reps completed in total, the ones before the start index included.
    pub reps_completed, set_reps_completed: 43, 32;
}

impl HypercallResult {
    /// A result of `status` with `reps` reps completed (12 bits are kept).
    #[inline]
    pub const fn new(status: HvStatus, reps: u16) -> Self {
        Self(status.0 as u64 | (reps as u64 & 0xFFF) << 32)
    }

    /// The raw register value.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The status.
    #[inline]
    pub const fn status(self) -> HvStatus {
        HvStatus(self.0 as u16)
    }
}

/// Which hypercall: an open set, the TLFS defines more than this library serves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallCode(pub u16);

macro_rules! call_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        impl CallCode {
            $($(#[$doc])* pub const $name: Self = Self($code);)*

            /// The TLFS's name of the call, when this crate knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($code => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

call_codes! {
    /// Flush a virtual address space on VPs named by a 64-bit mask. Simple.
    FLUSH_VIRTUAL_ADDRESS_SPACE = 0x0002, "HvCallFlushVirtualAddressSpace";
    /// Flush GVA ranges on VPs named by a 64-bit mask. Rep.
    FLUSH_VIRTUAL_ADDRESS_LIST = 0x0003, "HvCallFlushVirtualAddressList";
    /// The caller spins for long: others may run. Simple.
    NOTIFY_LONG_SPIN_WAIT = 0x0008, "HvCallNotifyLongSpinWait";
    /// Send a fixed interrupt to VPs named by a 64-bit mask. Simple.
    SEND_SYNTHETIC_CLUSTER_IPI = 0x000B, "HvCallSendSyntheticClusterIpi";
    /// As 0x0002 for a VP set. Simple, variable header.
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x0013, "HvCallFlushVirtualAddressSpaceEx";
    /// As 0x0003 for a VP set. Rep, variable header.
    FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x0014, "HvCallFlushVirtualAddressListEx";
    /// As 0x000B for a VP set. Simple, variable header.
    SEND_SYNTHETIC_CLUSTER_IPI_EX = 0x0015, "HvCallSendSyntheticClusterIpiEx";
    /// Read registers of a VP. Rep, with output.
    GET_VP_REGISTERS = 0x0050, "HvCallGetVpRegisters";
    /// Write registers of a VP. Rep.
    SET_VP_REGISTERS = 0x0051, "HvCallSetVpRegisters";
    /// Post a message to a port. Simple.
    POST_MESSAGE = 0x005C, "HvCallPostMessage";
    /// Signal an event of a port. Simple.
    SIGNAL_EVENT = 0x005D, "HvCallSignalEvent";
    /// Start a VP in a given state. Simple.
    START_VIRTUAL_PROCESSOR = 0x0099, "HvCallStartVirtualProcessor";
    /// VP indexes of APIC ids. Rep, with output.
    GET_VP_INDEX_FROM_APIC_ID = 0x009A, "HvCallGetVpIndexFromApicId";
    /// Drop all translations that derive from a second-level address space. Simple.
    FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE = 0x00AF, "HvCallFlushGuestPhysicalAddressSpace";
    /// Drop translations of GPA ranges of a second-level address space. Rep.
    FLUSH_GUEST_PHYSICAL_ADDRESS_LIST = 0x00B0, "HvCallFlushGuestPhysicalAddressList";
    /// Which extended hypercalls exist. Simple, with output.
    EXT_QUERY_CAPABILITIES = 0x8001, "HvExtCallQueryCapabilities";
}

impl core::fmt::Debug for CallCode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "CallCode({:#06x})", self.0),
        }
    }
}
