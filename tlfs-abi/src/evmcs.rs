//! The enlightened VMCS, version 1 (TLFS, data type HV_VMX_ENLIGHTENED_VMCS): the structure, and the same list as data.
//!
//! Used by `nvmx` on both sides; uses nothing. The one list below yields the structure, its offset assertions and
//! [`FIELDS`]: for each field its offset, size, VMCS encoding (SDM volume 3, appendix B) and clean-field group.

bits! {
    /// HV_VMX_ENLIGHTENED_CLEAN_FIELD: a clear bit makes L0 reload the group at the next VM entry.
    pub struct CleanFields(u32);
    /// Bit 0: the I/O bitmap addresses.
    pub io_bitmap, set_io_bitmap: 0;
    /// Bit 1: the MSR bitmap's address; with the enlightened MSR bitmap also its contents.
    pub msr_bitmap, set_msr_bitmap: 1;
    /// Bit 2: TSC offset and multiplier, virtual APIC page, XSS and ENCLS bitmaps.
    pub control_grp2, set_control_grp2: 2;
    /// Bit 3: pin-based, exit, secondary and tertiary controls.
    pub control_grp1, set_control_grp1: 3;
    /// Bit 4: primary processor-based controls.
    pub control_proc, set_control_proc: 4;
    /// Bit 5: event injection.
    pub control_event, set_control_event: 5;
    /// Bit 6: entry controls.
    pub control_entry, set_control_entry: 6;
    /// Bit 7: the exception bitmap.
    pub control_excpn, set_control_excpn: 7;
    /// Bit 8: control registers with masks and shadows, and DR7.
    pub crdr, set_crdr: 8;
    /// Bit 9: EPT root and VPID.
    pub control_xlat, set_control_xlat: 9;
    /// Bit 10: RSP, RFLAGS, interruptibility, SSP.
    pub guest_basic, set_guest_basic: 10;
    /// Bit 11: the guest's MSRs, PDPTEs, activity state and VMCS link pointer.
    pub guest_grp1, set_guest_grp1: 11;
    /// Bit 12: the guest's segments and descriptor tables.
    pub guest_grp2, set_guest_grp2: 12;
    /// Bit 13: the host's bases and RSP.
    pub host_pointer, set_host_pointer: 13;
    /// Bit 14: the rest of the host's state.
    pub host_grp1, set_host_grp1: 14;
    /// Bit 15: the synthetic fields VpId, VmId and PartitionAssistPage.
    pub enlightenments_control, set_enlightenments_control: 15;
}

impl CleanFields {
    /// No group: the field is read at every entry.
    pub const NONE: u32 = 0;
    /// Bit 0 as a mask.
    pub const IO_BITMAP: u32 = 1 << 0;
    /// Bit 1 as a mask.
    pub const MSR_BITMAP: u32 = 1 << 1;
    /// Bit 2 as a mask.
    pub const CONTROL_GRP2: u32 = 1 << 2;
    /// Bit 3 as a mask.
    pub const CONTROL_GRP1: u32 = 1 << 3;
    /// Bit 4 as a mask.
    pub const CONTROL_PROC: u32 = 1 << 4;
    /// Bit 5 as a mask.
    pub const CONTROL_EVENT: u32 = 1 << 5;
    /// Bit 6 as a mask.
    pub const CONTROL_ENTRY: u32 = 1 << 6;
    /// Bit 7 as a mask.
    pub const CONTROL_EXCPN: u32 = 1 << 7;
    /// Bit 8 as a mask.
    pub const CRDR: u32 = 1 << 8;
    /// Bit 9 as a mask.
    pub const CONTROL_XLAT: u32 = 1 << 9;
    /// Bit 10 as a mask.
    pub const GUEST_BASIC: u32 = 1 << 10;
    /// Bit 11 as a mask.
    pub const GUEST_GRP1: u32 = 1 << 11;
    /// Bit 12 as a mask.
    pub const GUEST_GRP2: u32 = 1 << 12;
    /// Bit 13 as a mask.
    pub const HOST_POINTER: u32 = 1 << 13;
    /// Bit 14 as a mask.
    pub const HOST_GRP1: u32 = 1 << 14;
    /// Bit 15 as a mask.
    pub const ENLIGHTENMENTSCONTROL: u32 = 1 << 15;
    /// All sixteen groups.
    pub const ALL: u32 = 0xFFFF;

    /// True when every group in `mask` is clean: its cached copy may be used.
    #[inline]
    pub const fn all_clean(self, mask: u32) -> bool {
        self.0 & mask == mask
    }
}

bits! {
    /// EnlightenmentsControl of the enlightened VMCS, 32 bits at offset 0x344.
    pub struct EvmcsEnlightenmentsControl(u32);
    /// Bit 0, NestedFlushVirtualHypercall: direct flush for this VMCS.
    pub nested_flush_virtual_hypercall, set_nested_flush_virtual_hypercall: 0;
    /// Bit 1, MsrBitmap: L0 need not watch the MSR bitmap; L1 clears clean bit 1 after a change.
    pub msr_bitmap, set_msr_bitmap: 1;
}

/// VersionNumber of the only version that the TLFS defines.
pub const EVMCS_VERSION: u32 = 1;

/// When L0 reads or writes a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvmcsUse {
    /// Read at a VM entry if the clean-field group with this mask is not clean; a zero mask: at every entry.
    Group(u32),
    /// Exit information: written by L0 on every exit, never read.
    ReadOnly,
    /// No VMCS field of version 1: synthetic, reserved, or not honoured by L0.
    Unmapped,
}

/// One field of the enlightened VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvmcsField {
    /// The TLFS's name; "Padding" where the TLFS leaves a gap.
    pub name: &'static str,
    /// Byte offset in the page.
    pub offset: u16,
    /// Size in bytes.
    pub size: u8,
    /// The VMCS encoding of the field, when it has one.
    pub encoding: Option<u32>,
    /// When L0 reads or writes it.
    pub used: EvmcsUse,
}

/// The field with this VMCS encoding. Linear in the table: for building tables, not for exit paths.
pub const fn field(encoding: u32) -> Option<EvmcsField> {
    let mut rest: &[EvmcsField] = FIELDS;
    while let [first, tail @ ..] = rest {
        if let Some(found) = first.encoding
            && found == encoding
        {
            return Some(*first);
        }
        rest = tail;
    }
    None
}

macro_rules! evmcs_encoding {
    (-) => {
        None
    };
    ($encoding:literal) => {
        Some($encoding)
    };
}

macro_rules! evmcs_use {
    (-) => {
        EvmcsUse::Unmapped
    };
    ($encoding:literal READ_ONLY) => {
        EvmcsUse::ReadOnly
    };
    ($encoding:literal $group:ident) => {
        EvmcsUse::Group(CleanFields::$group)
    };
}

macro_rules! evmcs {
    ($($offset:literal $field:ident: $ty:ty, $name:ident, $encoding:tt $($group:ident)?;)*) => {
        abi_struct! {
            /// HV_VMX_ENLIGHTENED_VMCS: the used kilobyte of the page, in the TLFS's order.
            pub struct EnlightenedVmcs, 1024 {
                $(
                    #[doc = concat!(
                        "`", stringify!($name), "` at ", stringify!($offset), ": `", stringify!($encoding $($group)?),
                        "` (VMCS encoding and clean-field group).",
                    )]
                    $offset $field: $ty,
                )*
            }
        }

        /// Every field of [`EnlightenedVmcs`] in the order of offsets.
        pub const FIELDS: &[EvmcsField] = &[$(EvmcsField {
            name: stringify!($name),
            offset: $offset,
            size: size_of::<$ty>() as u8,
            encoding: evmcs_encoding!($encoding),
            used: evmcs_use!($encoding $($group)?),
        }),*];
    };
}

/// Hands the list of the enlightened VMCS's fields to the macro `$callback`: for each field its offset, member name and
/// type in [`EnlightenedVmcs`], the TLFS's name, and `-` or its VMCS encoding and group (a name of [`CleanFields`]'s
/// masks, or `READ_ONLY`), as in `0x220 guest_cr0: u64, GuestCr0, 0x6800 CRDR;`. For code that goes field by field.
#[macro_export]
macro_rules! each_evmcs_field {
    ($callback:ident) => {
        $callback! {
            0x000 version_number: u32, VersionNumber, -;
            0x004 abort_indicator: u32, AbortIndicator, -;
            0x008 host_es_selector: u16, HostEsSelector, 0x0C00 HOST_GRP1;
            0x00A host_cs_selector: u16, HostCsSelector, 0x0C02 HOST_GRP1;
            0x00C host_ss_selector: u16, HostSsSelector, 0x0C04 HOST_GRP1;
            0x00E host_ds_selector: u16, HostDsSelector, 0x0C06 HOST_GRP1;
            0x010 host_fs_selector: u16, HostFsSelector, 0x0C08 HOST_GRP1;
            0x012 host_gs_selector: u16, HostGsSelector, 0x0C0A HOST_GRP1;
            0x014 host_tr_selector: u16, HostTrSelector, 0x0C0C HOST_GRP1;
            0x016 reserved_016: u16, Padding, -;
            0x018 host_pat: u64, HostPat, 0x2C00 HOST_GRP1;
            0x020 host_efer: u64, HostEfer, 0x2C02 HOST_GRP1;
            0x028 host_cr0: u64, HostCr0, 0x6C00 HOST_GRP1;
            0x030 host_cr3: u64, HostCr3, 0x6C02 HOST_GRP1;
            0x038 host_cr4: u64, HostCr4, 0x6C04 HOST_GRP1;
            0x040 host_sysenter_esp_msr: u64, HostSysenterEspMsr, 0x6C10 HOST_GRP1;
            0x048 host_sysenter_eip_msr: u64, HostSysenterEipMsr, 0x6C12 HOST_GRP1;
            0x050 host_rip: u64, HostRip, 0x6C16 HOST_GRP1;
            0x058 host_sysenter_cs_msr: u32, HostSysenterCsMsr, 0x4C00 HOST_GRP1;
            0x05C pin_controls: u32, PinControls, 0x4000 CONTROL_GRP1;
            0x060 exit_controls: u32, ExitControls, 0x400C CONTROL_GRP1;
            0x064 secondary_processor_controls: u32, SecondaryProcessorControls, 0x401E CONTROL_GRP1;
            0x068 io_bitmap_a: u64, IoBitmapA, 0x2000 IO_BITMAP;
            0x070 io_bitmap_b: u64, IoBitmapB, 0x2002 IO_BITMAP;
            0x078 msr_bitmap: u64, MsrBitmap, 0x2004 MSR_BITMAP;
            0x080 guest_es_selector: u16, GuestEsSelector, 0x0800 GUEST_GRP2;
            0x082 guest_cs_selector: u16, GuestCsSelector, 0x0802 GUEST_GRP2;
            0x084 guest_ss_selector: u16, GuestSsSelector, 0x0804 GUEST_GRP2;
            0x086 guest_ds_selector: u16, GuestDsSelector, 0x0806 GUEST_GRP2;
            0x088 guest_fs_selector: u16, GuestFsSelector, 0x0808 GUEST_GRP2;
            0x08A guest_gs_selector: u16, GuestGsSelector, 0x080A GUEST_GRP2;
            0x08C guest_ldtr_selector: u16, GuestLdtrSelector, 0x080C GUEST_GRP2;
            0x08E guest_tr_selector: u16, GuestTrSelector, 0x080E GUEST_GRP2;
            0x090 guest_es_limit: u32, GuestEsLimit, 0x4800 GUEST_GRP2;
            0x094 guest_cs_limit: u32, GuestCsLimit, 0x4802 GUEST_GRP2;
            0x098 guest_ss_limit: u32, GuestSsLimit, 0x4804 GUEST_GRP2;
            0x09C guest_ds_limit: u32, GuestDsLimit, 0x4806 GUEST_GRP2;
            0x0A0 guest_fs_limit: u32, GuestFsLimit, 0x4808 GUEST_GRP2;
            0x0A4 guest_gs_limit: u32, GuestGsLimit, 0x480A GUEST_GRP2;
            0x0A8 guest_ldtr_limit: u32, GuestLdtrLimit, 0x480C GUEST_GRP2;
            0x0AC guest_tr_limit: u32, GuestTrLimit, 0x480E GUEST_GRP2;
            0x0B0 guest_gdtr_limit: u32, GuestGdtrLimit, 0x4810 GUEST_GRP2;
            0x0B4 guest_idtr_limit: u32, GuestIdtrLimit, 0x4812 GUEST_GRP2;
            0x0B8 guest_es_attributes: u32, GuestEsAttributes, 0x4814 GUEST_GRP2;
            0x0BC guest_cs_attributes: u32, GuestCsAttributes, 0x4816 GUEST_GRP2;
            0x0C0 guest_ss_attributes: u32, GuestSsAttributes, 0x4818 GUEST_GRP2;
            0x0C4 guest_ds_attributes: u32, GuestDsAttributes, 0x481A GUEST_GRP2;
            0x0C8 guest_fs_attributes: u32, GuestFsAttributes, 0x481C GUEST_GRP2;
            0x0CC guest_gs_attributes: u32, GuestGsAttributes, 0x481E GUEST_GRP2;
            0x0D0 guest_ldtr_attributes: u32, GuestLdtrAttributes, 0x4820 GUEST_GRP2;
            0x0D4 guest_tr_attributes: u32, GuestTrAttributes, 0x4822 GUEST_GRP2;
            0x0D8 guest_es_base: u64, GuestEsBase, 0x6806 GUEST_GRP2;
            0x0E0 guest_cs_base: u64, GuestCsBase, 0x6808 GUEST_GRP2;
            0x0E8 guest_ss_base: u64, GuestSsBase, 0x680A GUEST_GRP2;
            0x0F0 guest_ds_base: u64, GuestDsBase, 0x680C GUEST_GRP2;
            0x0F8 guest_fs_base: u64, GuestFsBase, 0x680E GUEST_GRP2;
            0x100 guest_gs_base: u64, GuestGsBase, 0x6810 GUEST_GRP2;
            0x108 guest_ldtr_base: u64, GuestLdtrBase, 0x6812 GUEST_GRP2;
            0x110 guest_tr_base: u64, GuestTrBase, 0x6814 GUEST_GRP2;
            0x118 guest_gdtr_base: u64, GuestGdtrBase, 0x6816 GUEST_GRP2;
            0x120 guest_idtr_base: u64, GuestIdtrBase, 0x6818 GUEST_GRP2;
            0x128 reserved_128: [u64; 3], Rsvd1, -;
            0x140 exit_msr_store_address: u64, ExitMsrStoreAddress, -;
            0x148 exit_msr_load_address: u64, ExitMsrLoadAddress, -;
            0x150 entry_msr_load_address: u64, EntryMsrLoadAddress, -;
            0x158 cr3_target0: u64, Cr3Target0, -;
            0x160 cr3_target1: u64, Cr3Target1, -;
            0x168 cr3_target2: u64, Cr3Target2, -;
            0x170 cr3_target3: u64, Cr3Target3, -;
            0x178 pfec_mask: u32, PfecMask, -;
            0x17C pfec_match: u32, PfecMatch, -;
            0x180 cr3_target_count: u32, Cr3TargetCount, -;
            0x184 exit_msr_store_count: u32, ExitMsrStoreCount, -;
            0x188 exit_msr_load_count: u32, ExitMsrLoadCount, -;
            0x18C entry_msr_load_count: u32, EntryMsrLoadCount, -;
            0x190 tsc_offset: u64, TscOffset, 0x2010 CONTROL_GRP2;
            0x198 virtual_apic_page: u64, VirtualApicPage, 0x2012 CONTROL_GRP2;
            0x1A0 guest_working_vmcs_ptr: u64, GuestWorkingVmcsPtr, 0x2800 GUEST_GRP1;
            0x1A8 guest_ia32_debug_ctl: u64, GuestIa32DebugCtl, 0x2802 GUEST_GRP1;
            0x1B0 guest_pat: u64, GuestPat, 0x2804 GUEST_GRP1;
            0x1B8 guest_efer: u64, GuestEfer, 0x2806 GUEST_GRP1;
            0x1C0 guest_pdpte0: u64, GuestPdpte0, 0x280A GUEST_GRP1;
            0x1C8 guest_pdpte1: u64, GuestPdpte1, 0x280C GUEST_GRP1;
            0x1D0 guest_pdpte2: u64, GuestPdpte2, 0x280E GUEST_GRP1;
            0x1D8 guest_pdpte3: u64, GuestPdpte3, 0x2810 GUEST_GRP1;
            0x1E0 guest_pending_debug_exceptions: u64, GuestPendingDebugExceptions, 0x6822 GUEST_GRP1;
            0x1E8 guest_sysenter_esp_msr: u64, GuestSysenterEspMsr, 0x6824 GUEST_GRP1;
            0x1F0 guest_sysenter_eip_msr: u64, GuestSysenterEipMsr, 0x6826 GUEST_GRP1;
            0x1F8 guest_sleep_state: u32, GuestSleepState, 0x4826 GUEST_GRP1;
            0x1FC guest_sysenter_cs_msr: u32, GuestSysenterCsMsr, 0x482A GUEST_GRP1;
            0x200 cr0_guest_host_mask: u64, Cr0GuestHostMask, 0x6000 CRDR;
            0x208 cr4_guest_host_mask: u64, Cr4GuestHostMask, 0x6002 CRDR;
            0x210 cr0_read_shadow: u64, Cr0ReadShadow, 0x6004 CRDR;
            0x218 cr4_read_shadow: u64, Cr4ReadShadow, 0x6006 CRDR;
            0x220 guest_cr0: u64, GuestCr0, 0x6800 CRDR;
            0x228 guest_cr3: u64, GuestCr3, 0x6802 CRDR;
            0x230 guest_cr4: u64, GuestCr4, 0x6804 CRDR;
            0x238 guest_dr7: u64, GuestDr7, 0x681A CRDR;
            0x240 host_fs_base: u64, HostFsBase, 0x6C06 HOST_POINTER;
            0x248 host_gs_base: u64, HostGsBase, 0x6C08 HOST_POINTER;
            0x250 host_tr_base: u64, HostTrBase, 0x6C0A HOST_POINTER;
            0x258 host_gdtr_base: u64, HostGdtrBase, 0x6C0C HOST_POINTER;
            0x260 host_idtr_base: u64, HostIdtrBase, 0x6C0E HOST_POINTER;
            0x268 host_rsp: u64, HostRsp, 0x6C14 HOST_POINTER;
            0x270 ept_root: u64, EptRoot, 0x201A CONTROL_XLAT;
            0x278 vpid: u16, Vpid, 0x0000 CONTROL_XLAT;
            0x27A reserved_27a: [u16; 3], Rsvd2, -;
            0x280 reserved_280: [u64; 5], Rsvd3, -;
            0x2A8 exit_ept_fault_gpa: u64, ExitEptFaultGpa, 0x2400 READ_ONLY;
            0x2B0 exit_instruction_error: u32, ExitInstructionError, 0x4400 READ_ONLY;
            0x2B4 exit_reason: u32, ExitReason, 0x4402 READ_ONLY;
            0x2B8 exit_interruption_info: u32, ExitInterruptionInfo, 0x4404 READ_ONLY;
            0x2BC exit_exception_error_code: u32, ExitExceptionErrorCode, 0x4406 READ_ONLY;
            0x2C0 exit_idt_vectoring_info: u32, ExitIdtVectoringInfo, 0x4408 READ_ONLY;
            0x2C4 exit_idt_vectoring_error_code: u32, ExitIdtVectoringErrorCode, 0x440A READ_ONLY;
            0x2C8 exit_instruction_length: u32, ExitInstructionLength, 0x440C READ_ONLY;
            0x2CC exit_instruction_info: u32, ExitInstructionInfo, 0x440E READ_ONLY;
            0x2D0 exit_qualification: u64, ExitQualification, 0x6400 READ_ONLY;
            0x2D8 exit_io_instruction_ecx: u64, ExitIoInstructionEcx, 0x6402 READ_ONLY;
            0x2E0 exit_io_instruction_esi: u64, ExitIoInstructionEsi, 0x6404 READ_ONLY;
            0x2E8 exit_io_instruction_edi: u64, ExitIoInstructionEdi, 0x6406 READ_ONLY;
            0x2F0 exit_io_instruction_eip: u64, ExitIoInstructionEip, 0x6408 READ_ONLY;
            0x2F8 guest_linear_address: u64, GuestLinearAddress, 0x640A READ_ONLY;
            0x300 guest_rsp: u64, GuestRsp, 0x681C GUEST_BASIC;
            0x308 guest_rflags: u64, GuestRflags, 0x6820 GUEST_BASIC;
            0x310 guest_interruptibility: u32, GuestInterruptibility, 0x4824 GUEST_BASIC;
            0x314 processor_controls: u32, ProcessorControls, 0x4002 CONTROL_PROC;
            0x318 exception_bitmap: u32, ExceptionBitmap, 0x4004 CONTROL_EXCPN;
            0x31C entry_controls: u32, EntryControls, 0x4012 CONTROL_ENTRY;
            0x320 entry_interrupt_info: u32, EntryInterruptInfo, 0x4016 CONTROL_EVENT;
            0x324 entry_exception_error_code: u32, EntryExceptionErrorCode, 0x4018 CONTROL_EVENT;
            0x328 entry_instruction_length: u32, EntryInstructionLength, 0x401A CONTROL_EVENT;
            0x32C tpr_threshold: u32, TprThreshold, 0x401C NONE;
            0x330 guest_rip: u64, GuestRip, 0x681E NONE;
            0x338 clean_fields: CleanFields, CleanFields, -;
            0x33C reserved_33c: u32, Rsvd4, -;
            0x340 synthetic_controls: u32, SyntheticControls, -;
            0x344 enlightenments_control: EvmcsEnlightenmentsControl, EnlightenmentsControl, -;
            0x348 vp_id: u32, VpId, -;
            0x34C reserved_34c: u32, Rsvd5, -;
            0x350 vm_id: u64, VmId, -;
            0x358 partition_assist_page: u64, PartitionAssistPage, -;
            0x360 reserved_360: [u64; 4], Rsvd5, -;
            0x380 guest_bndcfgs: u64, GuestBndcfgs, 0x2812 GUEST_GRP1;
            0x388 guest_perf_global_ctrl: u64, GuestPerfGlobalCtrl, 0x2808 GUEST_GRP1;
            0x390 guest_s_cet: u64, GuestSCet, 0x6828 GUEST_GRP1;
            0x398 guest_ssp: u64, GuestSsp, 0x682A GUEST_BASIC;
            0x3A0 guest_interrupt_ssp_table_addr: u64, GuestInterruptSspTableAddr, 0x682C GUEST_GRP1;
            0x3A8 guest_lbr_ctl: u64, GuestLbrCtl, 0x2816 GUEST_GRP1;
            0x3B0 reserved_3b0: [u64; 2], Rsvd6, -;
            0x3C0 xss_exiting_bitmap: u64, XssExitingBitmap, 0x202C CONTROL_GRP2;
            0x3C8 encls_exiting_bitmap: u64, EnclsExitingBitmap, 0x202E CONTROL_GRP2;
            0x3D0 host_perf_global_ctrl: u64, HostPerfGlobalCtrl, 0x2C04 HOST_GRP1;
            0x3D8 tsc_multiplier: u64, TscMultiplier, 0x2032 CONTROL_GRP2;
            0x3E0 host_s_cet: u64, HostSCet, 0x6C18 HOST_GRP1;
            0x3E8 host_ssp: u64, HostSsp, 0x6C1A HOST_GRP1;
            0x3F0 host_interrupt_ssp_table_addr: u64, HostInterruptSspTableAddr, 0x6C1C HOST_GRP1;
            0x3F8 tertiary_processor_controls: u64, TertiaryProcessorControls, 0x2034 CONTROL_GRP1;
        }
    };
}

each_evmcs_field!(evmcs);
