//! The VP assist page and the partition assist page (TLFS, "Virtual Processor Properties" and "Nested
//! Virtualization"; data types HV_VP_ASSIST_PAGE, HV_NESTED_ENLIGHTENMENTS_CONTROL).
//!
//! Used by the partition interface, the direct flush and the client; uses nothing.

bits! {
    /// HV_VIRTUAL_APIC_ASSIST, 32 bits at offset 0 of the VP assist page.
    pub struct ApicAssist(u32);
    /// Bit 0: the guest need not write an EOI for the interrupt in service.
    pub no_eoi_required, set_no_eoi_required: 0;
}

bits! {
    /// HV_NESTED_ENLIGHTENMENTS_CONTROL.Features, 32 bits: what L1 grants its guest.
    pub struct NestedFeatures(u32);
    /// Bit 0: L2's flush hypercalls go to L0 ("direct hypercall").
    pub direct_hypercall, set_direct_hypercall: 0;
    /// Bit 1: virtualization exceptions of L2 arrive as page faults.
    pub virtualization_exception, set_virtualization_exception: 1;
}

bits! {
    /// HV_NESTED_ENLIGHTENMENTS_CONTROL.HypercallControls, 32 bits.
    pub struct NestedHypercallControls(u32);
    /// Bit 0: the nested guest may post messages and signal events to others.
    pub inter_partition_communication, set_inter_partition_communication: 0;
}

abi_struct! {
    /// HV_NESTED_ENLIGHTENMENTS_CONTROL: L1 to L0, which enlightenments the current nested guest gets.
    pub struct NestedEnlightenmentsControl, 8 {
        /// Granted features.
        0x00 features: NestedFeatures,
        /// Granted hypercalls.
        0x04 hypercall_controls: NestedHypercallControls,
    }
}

abi_struct! {
    /// HV_VP_VTL_CONTROL: why a VTL was entered, and what to restore on return from it.
    pub struct VpVtlControl, 24 {
        /// HV_VTL_ENTRY_REASON: 1 a VTL call, 2 an interrupt.
        0x00 entry_reason: u32,
        /// Bit 0: the VINA line is asserted.
        0x04 vina_status: u8,
        /// Zero.
        0x05 reserved_05: u8,
        /// Zero.
        0x06 reserved_06: u16,
        /// RAX on return from a 64-bit VTL; EAX and ECX of a 32-bit one.
        0x08 vtl_return_x64_rax: u64,
        /// RCX on return from a 64-bit VTL; EDX of a 32-bit one.
        0x10 vtl_return_x64_rcx: u64,
    }
}

abi_struct! {
    /// HV_VIRTUALIZATION_FAULT_INFORMATION: the current virtualization fault, 16-byte aligned in the assist page.
    pub struct VirtualizationFaultInformation, 16 {
        /// First parameter.
        0x00 parameter0: u16,
        /// Zero.
        0x02 reserved_02: u16,
        /// Fault code.
        0x04 code: u32,
        /// Second parameter.
        0x08 parameter1: u64,
    }
}

abi_struct! {
    /// HV_VP_ASSIST_PAGE: the defined head of the page; the rest of its 4,096 bytes is zero.
    pub struct VpAssistPage, 80 {
        /// EOI assist.
        0x00 apic_assist: ApicAssist,
        /// Zero.
        0x04 reserved_04: u32,
        /// VTL control.
        0x08 vtl_control: VpVtlControl,
        /// What L1 grants its guest.
        0x20 nested_enlightenments_control: NestedEnlightenmentsControl,
        /// BOOLEAN: 1 when VM entries use the enlightened VMCS.
        0x28 enlighten_vm_entry: u8,
        /// Zero.
        0x29 reserved_29: [u8; 7],
        /// L1 GPA of the enlightened VMCS that the next VM entry uses.
        0x30 current_nested_vmcs: u64,
        /// BOOLEAN: the synthetic time-unhalted timer expired.
        0x38 synthetic_time_unhalted_timer_expired: u8,
        /// Zero.
        0x39 reserved_39: [u8; 7],
        /// The current virtualization fault.
        0x40 virtualization_fault_information: VirtualizationFaultInformation,
    }
}

/// Byte offsets in the VP assist page of what L0 reads on its own.
pub mod vp_assist_offset {
    use super::VpAssistPage;
    use core::mem::offset_of;

    /// Of HV_VIRTUAL_APIC_ASSIST, 4 bytes.
    pub const APIC_ASSIST: u64 = offset_of!(VpAssistPage, apic_assist) as u64;
    /// Of NestedEnlightenmentsControl.Features, 4 bytes.
    pub const NESTED_FEATURES: u64 = offset_of!(VpAssistPage, nested_enlightenments_control.features) as u64;
    /// Of EnlightenVmEntry, 1 byte.
    pub const ENLIGHTEN_VM_ENTRY: u64 = offset_of!(VpAssistPage, enlighten_vm_entry) as u64;
    /// Of CurrentNestedVmcs, 8 bytes.
    pub const CURRENT_NESTED_VMCS: u64 = offset_of!(VpAssistPage, current_nested_vmcs) as u64;
}

abi_struct! {
    /// The partition assist page: the defined head of a zeroed, page-aligned page that L1 shares with L0 for each VM.
    pub struct PartitionAssistPage, 4 {
        /// TlbLockCount: when it is not zero after a direct flush, L1 gets the synthetic exit.
        0x00 tlb_lock_count: u32,
    }
}

/// VMX exit reason of the synthetic exit after a direct flush: basic reason 0x31 with bit 28 set.
pub const VMX_EXIT_REASON_TRAP_AFTER_FLUSH: u32 = 0x1000_0031;
/// HV_SVM_EXITCODE_ENL: the exit code of the synthetic exits on AMD.
pub const SVM_EXITCODE_ENL: u64 = 0xF000_0000;
/// EXITINFO1 of [`SVM_EXITCODE_ENL`] after a direct flush.
pub const SVM_ENL_TRAP_AFTER_FLUSH: u64 = 1;
