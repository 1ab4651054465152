//! Fixed inputs, list elements and outputs of the hypercalls that are not flushes (TLFS, "Hypercall Reference").
//!
//! Used by the intake, its handlers and the client; uses `vp_set`.

use crate::vp_set::VpSetHeader;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// HV_PARTITION_ID_SELF: the caller's own partition.
pub const PARTITION_ID_SELF: u64 = u64::MAX;
/// HV_ANY_VP: any VP.
pub const VP_INDEX_ANY: u32 = 0xFFFF_FFFF;
/// HV_VP_INDEX_SELF: the calling VP.
pub const VP_INDEX_SELF: u32 = 0xFFFF_FFFE;
/// Lowest vector that a synthetic cluster IPI may send; the highest is 0xFF.
pub const IPI_VECTOR_MIN: u32 = 0x10;
/// Largest payload of a message in bytes.
pub const MESSAGE_PAYLOAD_MAX: u32 = 240;

bits! {
    /// HV_INPUT_VTL, 8 bits.
    pub struct InputVtl(u8);
    u8;
    /// Bits 3:0: the VTL, when bit 4 is set.
    pub target_vtl, set_target_vtl: 3, 0;
    /// Bit 4: use bits 3:0; otherwise the caller's own VTL is meant.
    pub use_target_vtl, set_use_target_vtl: 4;
}

abi_struct! {
    /// Input of HvCallNotifyLongSpinWait.
    pub struct NotifyLongSpinWait, 8 {
        /// How often the guest has spun so far.
        0 spin_count: u32,
        /// Zero.
        4 reserved: u32,
    }
}

abi_struct! {
    /// Input of HvCallSendSyntheticClusterIpi.
    pub struct SendSyntheticClusterIpi, 16 {
        /// 0x10 to 0xFF.
        0 vector: u32,
        /// Which VTL of the targets.
        4 target_vtl: InputVtl,
        /// Padding.
        5 padding: [u8; 3],
        /// Bit n: the VP with index n.
        8 processor_mask: u64,
    }
}

abi_struct! {
    /// Fixed input of HvCallSendSyntheticClusterIpiEx; the set's banks follow as the variable header.
    pub struct SendSyntheticClusterIpiEx, 24 {
        /// 0x10 to 0xFF.
        0 vector: u32,
        /// Which VTL of the targets.
        4 target_vtl: InputVtl,
        /// Padding.
        5 padding: [u8; 3],
        /// HV_VP_SET, its fixed part.
        8 vp_set: VpSetHeader,
    }
}

abi_struct! {
    /// Input of HvCallPostMessage.
    pub struct PostMessage, 256 {
        /// Which connection.
        0 connection_id: u32,
        /// Zero.
        4 reserved: u32,
        /// Not zero, most significant bit clear.
        8 message_type: u32,
        /// Bytes of the message, at most 240.
        12 payload_size: u32,
        /// The message.
        16 message: [u8; 240],
    }
}

abi_struct! {
    /// Input of HvCallSignalEvent.
    pub struct SignalEvent, 8 {
        /// Which connection.
        0 connection_id: u32,
        /// Relative to the port's base flag.
        4 flag_number: u16,
        /// Zero.
        6 reserved: u16,
    }
}

abi_struct! {
    /// Fixed input of HvCallGetVpIndexFromApicId; APIC ids of 4 bytes follow, and the output is VP indexes of 4 bytes.
    pub struct GetVpIndexFromApicId, 16 {
        /// The partition, or [`PARTITION_ID_SELF`].
        0 partition_id: u64,
        /// Which VTL.
        8 target_vtl: InputVtl,
        /// Padding.
        9 padding: [u8; 7],
    }
}

/// List element of HvCallGetVpIndexFromApicId: an APIC id. Packed, as Hyper-V itself has it.
pub type ApicId = u32;
/// Output element of HvCallGetVpIndexFromApicId: a VP index. Packed.
pub type VpIndex = u32;

abi_struct! {
    /// Fixed input of HvCallGetVpRegisters and HvCallSetVpRegisters; [`RegisterName`]s or [`RegisterAssociation`]s
    /// follow, and the output of the former is [`RegisterValue`]s.
    pub struct VpRegisters, 16 {
        /// The partition, or [`PARTITION_ID_SELF`].
        0 partition_id: u64,
        /// The VP, or [`VP_INDEX_SELF`].
        8 vp_index: u32,
        /// Which VTL.
        12 target_vtl: InputVtl,
        /// Zero.
        13 reserved: [u8; 3],
    }
}

/// HV_REGISTER_NAME: an open set; the ones that concern the Hyper-V interface have names here.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct RegisterName(pub u32);

impl RegisterName {
    /// HvRegisterHypervisorVersion: CPUID leaf 0x40000002.
    pub const HYPERVISOR_VERSION: Self = Self(0x0000_0100);
    /// HvRegisterPrivilegesAndFeaturesInfo: CPUID leaf 0x40000003.
    pub const PRIVILEGES_AND_FEATURES_INFO: Self = Self(0x0000_0200);
    /// HvRegisterFeaturesInfo: CPUID leaf 0x40000004.
    pub const FEATURES_INFO: Self = Self(0x0000_0201);
    /// HvRegisterImplementationLimitsInfo: CPUID leaf 0x40000005.
    pub const IMPLEMENTATION_LIMITS_INFO: Self = Self(0x0000_0202);
    /// HvRegisterHardwareFeaturesInfo: CPUID leaf 0x40000006.
    pub const HARDWARE_FEATURES_INFO: Self = Self(0x0000_0203);
    /// HvRegisterGuestCrashP0; P1 to P4 follow.
    pub const GUEST_CRASH_P0: Self = Self(0x0000_0210);
    /// HvRegisterGuestCrashCtl.
    pub const GUEST_CRASH_CTL: Self = Self(0x0000_0215);
    /// HvX64RegisterRax; RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15 follow.
    pub const RAX: Self = Self(0x0002_0000);
    /// HvX64RegisterRip.
    pub const RIP: Self = Self(0x0002_0010);
    /// HvX64RegisterRflags.
    pub const RFLAGS: Self = Self(0x0002_0011);
    /// HvX64RegisterXmm0; the others follow.
    pub const XMM0: Self = Self(0x0003_0000);
    /// HvX64RegisterCr0.
    pub const CR0: Self = Self(0x0004_0000);
    /// HvX64RegisterCr2.
    pub const CR2: Self = Self(0x0004_0001);
    /// HvX64RegisterCr3.
    pub const CR3: Self = Self(0x0004_0002);
    /// HvX64RegisterCr4.
    pub const CR4: Self = Self(0x0004_0003);
    /// HvX64RegisterEfer.
    pub const EFER: Self = Self(0x0008_0001);
    /// HvX64RegisterPat.
    pub const PAT: Self = Self(0x0008_0004);
}

abi_struct! {
    /// HV_REGISTER_VALUE, 128 bits, low half first.
    pub struct RegisterValue, 16 {
        /// Bits 63:0.
        0 low: u64,
        /// Bits 127:64.
        8 high: u64,
    }
}

abi_struct! {
    /// List element of HvCallSetVpRegisters.
    pub struct RegisterAssociation, 32 {
        /// Which register.
        0 name: RegisterName,
        /// Zero.
        4 reserved: [u32; 3],
        /// Its new value.
        16 value: RegisterValue,
    }
}

bits! {
    /// Attributes of [`SegmentRegister`], 16 bits.
    pub struct SegmentAttributes(u16);
    u8;
    /// Bits 3:0: type.
    pub segment_type, set_segment_type: 3, 0;
    /// Bit 4: code or data, not system.
    pub non_system, set_non_system: 4;
    /// Bits 6:5: descriptor privilege level.
    pub dpl, set_dpl: 6, 5;
    /// Bit 7: present.
    pub present, set_present: 7;
    /// Bit 12: available to software.
    pub available, set_available: 12;
    /// Bit 13: 64-bit code.
    pub long, set_long: 13;
    /// Bit 14: default operation size.
    pub default_size, set_default_size: 14;
    /// Bit 15: granularity.
    pub granularity, set_granularity: 15;
}

abi_struct! {
    /// HV_X64_SEGMENT_REGISTER.
    pub struct SegmentRegister, 16 {
        /// Base address.
        0 base: u64,
        /// Limit in bytes, expanded.
        8 limit: u32,
        /// Selector.
        12 selector: u16,
        /// Attributes.
        14 attributes: SegmentAttributes,
    }
}

abi_struct! {
    /// HV_X64_TABLE_REGISTER.
    pub struct TableRegister, 16 {
        /// Padding.
        0 padding: [u16; 3],
        /// Limit in bytes.
        6 limit: u16,
        /// Base address.
        8 base: u64,
    }
}

abi_struct! {
    /// HV_INITIAL_VP_CONTEXT: the state in which a VP starts.
    pub struct InitialVpContext, 224 {
        /// RIP.
        0 rip: u64,
        /// RSP.
        8 rsp: u64,
        /// RFLAGS.
        16 rflags: u64,
        /// CS.
        24 cs: SegmentRegister,
        /// DS.
        40 ds: SegmentRegister,
        /// ES.
        56 es: SegmentRegister,
        /// FS.
        72 fs: SegmentRegister,
        /// GS.
        88 gs: SegmentRegister,
        /// SS.
        104 ss: SegmentRegister,
        /// TR.
        120 tr: SegmentRegister,
        /// LDTR.
        136 ldtr: SegmentRegister,
        /// IDTR.
        152 idtr: TableRegister,
        /// GDTR.
        168 gdtr: TableRegister,
        /// EFER.
        184 efer: u64,
        /// CR0.
        192 cr0: u64,
        /// CR3.
        200 cr3: u64,
        /// CR4.
        208 cr4: u64,
        /// The PAT MSR.
        216 msr_cr_pat: u64,
    }
}

abi_struct! {
    /// Input of HvCallStartVirtualProcessor.
    pub struct StartVirtualProcessor, 240 {
        /// The partition, or [`PARTITION_ID_SELF`].
        0 partition_id: u64,
        /// Which VP.
        8 vp_index: u32,
        /// In which VTL.
        12 target_vtl: InputVtl,
        /// Padding.
        13 padding: [u8; 3],
        /// Its first state.
        16 vp_context: InitialVpContext,
    }
}

bits! {
    /// Output of HvExtCallQueryCapabilities: which extended hypercalls exist. Bit n is the call 0x8002 + n.
    pub struct ExtendedCapabilities(u64);
    /// Bit 0: HvExtCallGetBootZeroedMemory.
    pub get_boot_zeroed_memory, set_get_boot_zeroed_memory: 0;
    /// Bit 1: HvExtCallMemoryHeatHint.
    pub memory_heat_hint, set_memory_heat_hint: 1;
    /// Bit 2: HvExtCallEpfSetup.
    pub epf_setup, set_epf_setup: 2;
    /// Bit 3: HvExtCallSchedulerAssistSetup.
    pub scheduler_assist_setup, set_scheduler_assist_setup: 3;
    /// Bit 4: HvExtCallMemoryHeatHintAsync.
    pub memory_heat_hint_async, set_memory_heat_hint_async: 4;
}
