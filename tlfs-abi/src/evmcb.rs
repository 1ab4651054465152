//! The enlightened fields of the VMCB (TLFS, data type HV_SVM_ENLIGHTENED_VMCB_FIELDS).
//!
//! Used by `nsvm` on both sides; uses nothing.

bits! {
    /// HV_SVM_ENLIGHTENED_VMCB_FIELDS.EnlightenmentsControl, 32 bits.
    pub struct VmcbEnlightenmentsControl(u32);
    /// Bit 0, NestedFlushVirtualHypercall: direct flush for this VMCB.
    pub nested_flush_virtual_hypercall, set_nested_flush_virtual_hypercall: 0;
    /// Bit 1, MsrBitmap: L0 need not watch the MSR permission map; L1 clears clean bit 31 after a change.
    pub msr_bitmap, set_msr_bitmap: 1;
    /// Bit 2, EnlightenedNptTlb: ASID flushes spare what derives from the nested page table.
    pub enlightened_npt_tlb, set_enlightened_npt_tlb: 2;
}

abi_struct! {
    /// HV_SVM_ENLIGHTENED_VMCB_FIELDS: the last 32 bytes of the VMCB's control area.
    pub struct EnlightenedVmcbFields, 32 {
        /// Which enlightenments L1 turns on.
        0x00 enlightenments_control: VmcbEnlightenmentsControl,
        /// VP index of the L2 VP in its VM.
        0x04 vp_id: u32,
        /// Which VM of L1 the L2 VP belongs to.
        0x08 vm_id: u64,
        /// L1 GPA of the VM's partition assist page.
        0x10 partition_assist_page: u64,
        /// Zero.
        0x18 reserved_18: u64,
    }
}

/// Byte offset of [`EnlightenedVmcbFields`] in the VMCB.
pub const ENLIGHTENED_VMCB_OFFSET: u64 = 0x3E0;
/// The bit of the VMCB clean field (VMCB offset 0xC0) that covers [`EnlightenedVmcbFields`].
pub const VMCB_CLEAN_ENLIGHTENMENTS: u32 = 1 << 31;

static_assertions::const_assert_eq!(0x400 - ENLIGHTENED_VMCB_OFFSET, size_of::<EnlightenedVmcbFields>() as u64);
