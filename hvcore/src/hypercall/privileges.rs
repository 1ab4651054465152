//! What a partition may call: the privileges and features that hypercalls depend on.
//!
//! Produced by `hvcore::partition` (or an embedder) from the CPUID leaves it shows; used by the intake.

use core::ops::BitOr;

/// A set of privileges and features. Each call of the intake declares the ones it needs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Privileges(u32);

impl Privileges {
    /// None.
    pub const NONE: Self = Self(0);
    /// HvCallPostMessage: leaf 0x40000003 EBX bit 4.
    pub const POST_MESSAGES: Self = Self(1 << 0);
    /// HvCallSignalEvent: leaf 0x40000003 EBX bit 5.
    pub const SIGNAL_EVENTS: Self = Self(1 << 1);
    /// HvCallGetVpRegisters and HvCallSetVpRegisters: leaf 0x40000003 EBX bit 17.
    pub const ACCESS_VP_REGISTERS: Self = Self(1 << 2);
    /// The calls 0x8000 and above: leaf 0x40000003 EBX bit 20.
    pub const EXTENDED_HYPERCALLS: Self = Self(1 << 3);
    /// HvCallStartVirtualProcessor and HvCallGetVpIndexFromApicId: leaf 0x40000003 EBX bit 21.
    pub const START_VIRTUAL_PROCESSOR: Self = Self(1 << 4);
    /// The flushes of virtual addresses: leaf 0x40000004 EAX bit 2.
    pub const REMOTE_FLUSH: Self = Self(1 << 5);
    /// The cluster IPIs: leaf 0x40000004 EAX bit 10.
    pub const CLUSTER_IPI: Self = Self(1 << 6);
    /// The Ex forms of flushes and IPIs: leaf 0x40000004 EAX bit 11.
    pub const EX_PROCESSOR_MASKS: Self = Self(1 << 7);
    /// HvCallNotifyLongSpinWait: leaf 0x40000004 EBX is neither 0 nor 0xFFFFFFFF.
    pub const LONG_SPIN_WAIT: Self = Self(1 << 8);
    /// The flushes of guest physical addresses: leaf 0x4000000A EAX bit 18 (Intel) or 22 (AMD).
    pub const GUEST_PHYSICAL_FLUSH: Self = Self(1 << 9);
    /// Fast input beyond 16 bytes: leaf 0x40000003 EDX bit 4.
    pub const XMM_INPUT: Self = Self(1 << 10);
    /// Fast output: leaf 0x40000003 EDX bit 15.
    pub const XMM_OUTPUT: Self = Self(1 << 11);
    /// Flush flag bit 3: leaf 0x40000003 EDX bit 14.
    pub const EXTENDED_GVA_RANGES: Self = Self(1 << 12);
    /// Bit 31 of the input value, from L1: leaf 0x40000009 EAX bit 5.
    pub const NESTED_CALLS: Self = Self(1 << 13);
    /// All of them.
    pub const ALL: Self = Self((1 << 14) - 1);

    /// True when every privilege of `needed` is here.
    #[inline]
    pub const fn contains(self, needed: Self) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// Both sets together.
    #[inline]
    pub const fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// This set without `fewer`.
    #[inline]
    pub const fn without(self, fewer: Self) -> Self {
        Self(self.0 & !fewer.0)
    }

    /// The privileges that the leaves shown to the partition grant.
    pub const fn from_leaves(leaves: &PrivilegeLeaves) -> Self {
        let mut set = 0;
        set |= Self::POST_MESSAGES.when(leaves.features_ebx >> 4 & 1 != 0);
        set |= Self::SIGNAL_EVENTS.when(leaves.features_ebx >> 5 & 1 != 0);
        set |= Self::ACCESS_VP_REGISTERS.when(leaves.features_ebx >> 17 & 1 != 0);
        set |= Self::EXTENDED_HYPERCALLS.when(leaves.features_ebx >> 20 & 1 != 0);
        set |= Self::START_VIRTUAL_PROCESSOR.when(leaves.features_ebx >> 21 & 1 != 0);
        set |= Self::XMM_INPUT.when(leaves.features_edx >> 4 & 1 != 0);
        set |= Self::EXTENDED_GVA_RANGES.when(leaves.features_edx >> 14 & 1 != 0);
        set |= Self::XMM_OUTPUT.when(leaves.features_edx >> 15 & 1 != 0);
        set |= Self::REMOTE_FLUSH.when(leaves.recommendations_eax >> 2 & 1 != 0);
        set |= Self::CLUSTER_IPI.when(leaves.recommendations_eax >> 10 & 1 != 0);
        set |= Self::EX_PROCESSOR_MASKS.when(leaves.recommendations_eax >> 11 & 1 != 0);
        set |= Self::LONG_SPIN_WAIT.when(!matches!(leaves.recommendations_ebx, 0 | u32::MAX));
        set |= Self::NESTED_CALLS.when(leaves.nested_features_eax >> 5 & 1 != 0);
        set |= Self::GUEST_PHYSICAL_FLUSH.when(leaves.nested_optimizations_eax & (1 << 18 | 1 << 22) != 0);
        Self(set)
    }

    const fn when(self, granted: bool) -> u32 {
        if granted { self.0 } else { 0 }
    }
}

impl BitOr for Privileges {
    type Output = Self;
    #[inline]
    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}

impl core::fmt::Debug for Privileges {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Privileges({:#x})", self.0)
    }
}

/// The registers of the CPUID leaves that grant privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PrivilegeLeaves {
    /// Leaf 0x40000003 EBX.
    pub features_ebx: u32,
    /// Leaf 0x40000003 EDX.
    pub features_edx: u32,
    /// Leaf 0x40000004 EAX.
    pub recommendations_eax: u32,
    /// Leaf 0x40000004 EBX.
    pub recommendations_ebx: u32,
    /// Leaf 0x40000009 EAX.
    pub nested_features_eax: u32,
    /// Leaf 0x4000000A EAX.
    pub nested_optimizations_eax: u32,
}
