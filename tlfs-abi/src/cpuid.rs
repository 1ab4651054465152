//! The hypervisor CPUID leaves 0x40000000 to 0x4000000A (TLFS, "Feature and Interface Discovery").
//!
//! Used by the partition interface and the client; uses nothing. One type for each register that has named bits.

/// The four registers of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct CpuidLeaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Maximum leaf and vendor signature.
pub const LEAF_RANGE: u32 = 0x4000_0000;
/// Interface signature.
pub const LEAF_INTERFACE: u32 = 0x4000_0001;
/// Version of the hypervisor.
pub const LEAF_VERSION: u32 = 0x4000_0002;
/// Privileges and features.
pub const LEAF_FEATURES: u32 = 0x4000_0003;
/// Recommendations.
pub const LEAF_RECOMMENDATIONS: u32 = 0x4000_0004;
/// Limits.
pub const LEAF_LIMITS: u32 = 0x4000_0005;
/// Hardware features in use.
pub const LEAF_HARDWARE: u32 = 0x4000_0006;
/// CPU management features, for a root partition. All zero in a guest.
pub const LEAF_CPU_MANAGEMENT: u32 = 0x4000_0007;
/// Shared virtual memory features. All zero in a guest.
pub const LEAF_SVM: u32 = 0x4000_0008;
/// What a nested hypervisor may use of its L0's interface.
pub const LEAF_NESTED_FEATURES: u32 = 0x4000_0009;
/// Nested virtualization optimizations.
pub const LEAF_NESTED_OPTIMIZATIONS: u32 = 0x4000_000A;

/// "Microsoft Hv" in EBX, ECX, EDX of leaf 0x40000000.
pub const VENDOR_MICROSOFT: [u32; 3] = [0x7263_694D, 0x666F_736F, 0x7648_2074];
/// "Hv#1" in EAX of leaf 0x40000001.
pub const INTERFACE_HV1: u32 = 0x3123_7648;
/// CPUID leaf 1 ECX bit 31: a hypervisor is present.
pub const LEAF1_ECX_HYPERVISOR_PRESENT: u32 = 1 << 31;

bits! {
    /// Leaf 0x40000002 EBX: major and minor version. EAX is the build number.
    pub struct VersionEbx(u32);
    u16;
    /// Bits 15:0: minor version.
    pub minor, set_minor: 15, 0;
    /// Bits 31:16: major version.
    pub major, set_major: 31, 16;
}

bits! {
    /// Leaf 0x40000002 EDX: service branch and number. ECX is the service pack.
    pub struct VersionEdx(u32);
    u32;
    /// Bits 23:0: service number.
    pub service_number, set_service_number: 23, 0;
    /// Bits 31:24: service branch.
    pub service_branch, set_service_branch: 31, 24;
}

bits! {
    /// HV_PARTITION_PRIVILEGE_MASK: leaf 0x40000003 EBX:EAX, 64 bits.
    pub struct PartitionPrivileges(u64);
    /// Bit 0: HV_X64_MSR_VP_RUNTIME.
    pub access_vp_run_time_reg, set_access_vp_run_time_reg: 0;
    /// Bit 1: HV_X64_MSR_TIME_REF_COUNT.
    pub access_partition_reference_counter, set_access_partition_reference_counter: 1;
    /// Bit 2: the SynIC MSRs.
    pub access_synic_regs, set_access_synic_regs: 2;
    /// Bit 3: the synthetic timer MSRs.
    pub access_synthetic_timer_regs, set_access_synthetic_timer_regs: 3;
    /// Bit 4: HV_X64_MSR_EOI, ICR, TPR and VP_ASSIST_PAGE.
    pub access_intr_ctrl_regs, set_access_intr_ctrl_regs: 4;
    /// Bit 5: HV_X64_MSR_GUEST_OS_ID and HYPERCALL.
    pub access_hypercall_msrs, set_access_hypercall_msrs: 5;
    /// Bit 6: HV_X64_MSR_VP_INDEX.
    pub access_vp_index, set_access_vp_index: 6;
    /// Bit 7: HV_X64_MSR_RESET.
    pub access_reset_reg, set_access_reset_reg: 7;
    /// Bit 8: the statistics page MSRs.
    pub access_stats_reg, set_access_stats_reg: 8;
    /// Bit 9: HV_X64_MSR_REFERENCE_TSC.
    pub access_partition_reference_tsc, set_access_partition_reference_tsc: 9;
    /// Bit 10: HV_X64_MSR_GUEST_IDLE.
    pub access_guest_idle_reg, set_access_guest_idle_reg: 10;
    /// Bit 11: HV_X64_MSR_TSC_FREQUENCY and APIC_FREQUENCY.
    pub access_frequency_regs, set_access_frequency_regs: 11;
    /// Bit 12: the debug MSRs.
    pub access_debug_regs, set_access_debug_regs: 12;
    /// Bit 13: the re-enlightenment and TSC emulation MSRs.
    pub access_reenlightenment_controls, set_access_reenlightenment_controls: 13;
    /// Bit 32: HvCallCreatePartition and calls on children.
    pub create_partitions, set_create_partitions: 32;
    /// Bit 33: HvCallGetPartitionId.
    pub access_partition_id, set_access_partition_id: 33;
    /// Bit 34: the memory pool calls.
    pub access_memory_pool, set_access_memory_pool: 34;
    /// Bit 36: HvCallPostMessage.
    pub post_messages, set_post_messages: 36;
    /// Bit 37: HvCallSignalEvent.
    pub signal_events, set_signal_events: 37;
    /// Bit 38: HvCallCreatePort.
    pub create_port, set_create_port: 38;
    /// Bit 39: HvCallConnectPort.
    pub connect_port, set_connect_port: 39;
    /// Bit 40: HvCallMapStatsPage and HvCallUnmapStatsPage.
    pub access_stats, set_access_stats: 40;
    /// Bit 43: the debug calls.
    pub debugging, set_debugging: 43;
    /// Bit 44: CPU management calls.
    pub cpu_management, set_cpu_management: 44;
    /// Bit 48: virtual secure mode.
    pub access_vsm, set_access_vsm: 48;
    /// Bit 49: HvCallGetVpRegisters and HvCallSetVpRegisters.
    pub access_vp_registers, set_access_vp_registers: 49;
    /// Bit 52: the calls at 0x8000 and above.
    pub enable_extended_hypercalls, set_enable_extended_hypercalls: 52;
    /// Bit 53: HvCallStartVirtualProcessor.
    pub start_virtual_processor, set_start_virtual_processor: 53;
}

bits! {
    /// Leaf 0x40000003 EDX: features of the interface.
    pub struct FeaturesEdx(u32);
    /// Bit 0: deprecated, was MWAIT.
    pub mwait_deprecated, set_mwait_deprecated: 0;
    /// Bit 1: guest debugging.
    pub guest_debugging, set_guest_debugging: 1;
    /// Bit 2: performance monitor.
    pub performance_monitor, set_performance_monitor: 2;
    /// Bit 3: physical CPU dynamic partitioning events.
    pub cpu_dynamic_partitioning, set_cpu_dynamic_partitioning: 3;
    /// Bit 4: hypercall input in XMM registers.
    pub xmm_hypercall_input, set_xmm_hypercall_input: 4;
    /// Bit 5: a virtual guest idle state.
    pub guest_idle_state, set_guest_idle_state: 5;
    /// Bit 6: the hypervisor sleep state.
    pub hypervisor_sleep_state, set_hypervisor_sleep_state: 6;
    /// Bit 7: NUMA distances can be queried.
    pub numa_distances, set_numa_distances: 7;
    /// Bit 8: timer frequencies can be determined.
    pub timer_frequencies, set_timer_frequencies: 8;
    /// Bit 9: synthetic machine checks can be injected.
    pub synthetic_machine_checks, set_synthetic_machine_checks: 9;
    /// Bit 10: the guest crash MSRs.
    pub guest_crash_msrs, set_guest_crash_msrs: 10;
    /// Bit 11: the debug MSRs.
    pub debug_msrs, set_debug_msrs: 11;
    /// Bit 12: NPIEP.
    pub npiep, set_npiep: 12;
    /// Bit 13: the hypervisor can be disabled.
    pub disable_hypervisor, set_disable_hypervisor: 13;
    /// Bit 14: extended GVA ranges in flush lists.
    pub extended_gva_ranges, set_extended_gva_ranges: 14;
    /// Bit 15: hypercall output in XMM registers.
    pub xmm_hypercall_output, set_xmm_hypercall_output: 15;
    /// Bit 17: SINT polling mode.
    pub sint_polling_mode, set_sint_polling_mode: 17;
    /// Bit 18: the lock bit of HV_X64_MSR_HYPERCALL.
    pub hypercall_msr_lock, set_hypercall_msr_lock: 18;
    /// Bit 19: direct synthetic timers.
    pub direct_synthetic_timers, set_direct_synthetic_timers: 19;
    /// Bit 20: the PAT register for VSM.
    pub vsm_pat, set_vsm_pat: 20;
    /// Bit 21: the BNDCFGS register for VSM.
    pub vsm_bndcfgs, set_vsm_bndcfgs: 21;
    /// Bit 23: the synthetic time-unhalted timer.
    pub synthetic_time_unhalted_timer, set_synthetic_time_unhalted_timer: 23;
    /// Bit 26: Intel's last branch records.
    pub lbr, set_lbr: 26;
}

bits! {
    /// Leaf 0x40000004 EAX: what the guest should do.
    pub struct RecommendationsEax(u32);
    /// Bit 0: a hypercall for address space switches.
    pub hypercall_for_address_switch, set_hypercall_for_address_switch: 0;
    /// Bit 1: a hypercall for local flushes.
    pub hypercall_for_local_flush, set_hypercall_for_local_flush: 1;
    /// Bit 2: a hypercall for remote flushes.
    pub hypercall_for_remote_flush, set_hypercall_for_remote_flush: 2;
    /// Bit 3: MSRs for EOI, ICR and TPR.
    pub msrs_for_apic, set_msrs_for_apic: 3;
    /// Bit 4: the MSR for reset.
    pub msr_for_reset, set_msr_for_reset: 4;
    /// Bit 5: relaxed timing.
    pub relaxed_timing, set_relaxed_timing: 5;
    /// Bit 6: DMA remapping.
    pub dma_remapping, set_dma_remapping: 6;
    /// Bit 7: interrupt remapping.
    pub interrupt_remapping, set_interrupt_remapping: 7;
    /// Bit 8: the x2APIC MSRs. Reserved in later editions.
    pub x2apic_msrs, set_x2apic_msrs: 8;
    /// Bit 9: no AutoEOI.
    pub deprecate_auto_eoi, set_deprecate_auto_eoi: 9;
    /// Bit 10: HvCallSendSyntheticClusterIpi.
    pub synthetic_cluster_ipi, set_synthetic_cluster_ipi: 10;
    /// Bit 11: the Ex forms with VP sets.
    pub ex_processor_masks, set_ex_processor_masks: 11;
    /// Bit 12: the hypervisor is itself nested in a Hyper-V partition.
    pub nested_in_hyperv, set_nested_in_hyperv: 12;
    /// Bit 13: INT for MBEC system calls.
    pub int_for_mbec_system_calls, set_int_for_mbec_system_calls: 13;
    /// Bit 14: the enlightened VMCS; leaf 0x4000000A may hold more.
    pub enlightened_vmcs, set_enlightened_vmcs: 14;
    /// Bit 15: the root's bias of QueryPerformanceCounter.
    pub synced_timeline, set_synced_timeline: 15;
    /// Bit 17: toggle CR4.PGE for a whole local flush.
    pub direct_local_flush_entire, set_direct_local_flush_entire: 17;
    /// Bit 18: cores are shared only by SMT siblings.
    pub no_nonarchitectural_core_sharing, set_no_nonarchitectural_core_sharing: 18;
}

/// Leaf 0x40000004 EBX: never notify of long spin waits.
pub const SPIN_RETRIES_NEVER: u32 = 0xFFFF_FFFF;

bits! {
    /// Leaf 0x40000004 ECX.
    pub struct RecommendationsEcx(u32);
    u8;
    /// Bits 6:0: physical address width in bits; 0 when not reported.
    pub implemented_physical_address_bits, set_implemented_physical_address_bits: 6, 0;
}

bits! {
    /// Leaf 0x40000006 EAX: hardware features in use.
    pub struct HardwareEax(u32);
    /// Bit 0: APIC overlay assist.
    pub apic_overlay_assist, set_apic_overlay_assist: 0;
    /// Bit 1: MSR bitmaps.
    pub msr_bitmaps, set_msr_bitmaps: 1;
    /// Bit 2: architectural performance counters.
    pub performance_counters, set_performance_counters: 2;
    /// Bit 3: second-level address translation.
    pub second_level_translation, set_second_level_translation: 3;
    /// Bit 4: DMA remapping.
    pub dma_remapping, set_dma_remapping: 4;
    /// Bit 5: interrupt remapping.
    pub interrupt_remapping, set_interrupt_remapping: 5;
    /// Bit 6: a memory patrol scrubber.
    pub memory_patrol_scrubber, set_memory_patrol_scrubber: 6;
    /// Bit 7: DMA protection.
    pub dma_protection, set_dma_protection: 7;
    /// Bit 8: the HPET is requested.
    pub hpet_requested, set_hpet_requested: 8;
    /// Bit 9: synthetic timers are volatile.
    pub volatile_synthetic_timers, set_volatile_synthetic_timers: 9;
    u8;
    /// Bits 13:10: nesting level of the guest.
    pub nesting_level, set_nesting_level: 13, 10;
}

bits! {
    /// Leaf 0x40000009 EAX: MSRs that a nested hypervisor's root may use of its L0.
    pub struct NestedFeaturesEax(u32);
    /// Bit 2: the nested SynIC MSRs.
    pub access_synic_regs, set_access_synic_regs: 2;
    /// Bit 4: the APIC MSRs.
    pub access_intr_ctrl_regs, set_access_intr_ctrl_regs: 4;
    /// Bit 5: the hypercall MSRs, and bit 31 of the hypercall input value.
    pub access_hypercall_msrs, set_access_hypercall_msrs: 5;
    /// Bit 6: HV_X64_MSR_NESTED_VP_INDEX.
    pub access_vp_index, set_access_vp_index: 6;
    /// Bit 12: the re-enlightenment MSRs (bit 13 in [`PartitionPrivileges`]).
    pub access_reenlightenment_controls, set_access_reenlightenment_controls: 12;
}

bits! {
    /// Leaf 0x40000009 EDX: hypercall features of the L0.
    pub struct NestedFeaturesEdx(u32);
    /// Bit 4: hypercall input in XMM registers.
    pub xmm_hypercall_input, set_xmm_hypercall_input: 4;
    /// Bit 15: hypercall output in XMM registers.
    pub xmm_hypercall_output, set_xmm_hypercall_output: 15;
    /// Bit 17: SINT polling mode.
    pub sint_polling_mode, set_sint_polling_mode: 17;
}

bits! {
    /// Leaf 0x4000000A EAX: nested virtualization optimizations.
    pub struct NestedOptimizationsEax(u32);
    u8;
    /// Bits 7:0: lowest version of the enlightened VMCS.
    pub evmcs_version_low, set_evmcs_version_low: 7, 0;
    /// Bits 15:8: highest version of the enlightened VMCS.
    pub evmcs_version_high, set_evmcs_version_high: 15, 8;
    /// Bit 17: direct virtual flush.
    pub direct_virtual_flush, set_direct_virtual_flush: 17;
    /// Bit 18: HvCallFlushGuestPhysicalAddressSpace and List (Intel).
    pub flush_guest_physical_address, set_flush_guest_physical_address: 18;
    /// Bit 19: the enlightened MSR bitmap.
    pub enlightened_msr_bitmap, set_enlightened_msr_bitmap: 19;
    /// Bit 20: virtualization exceptions are combined into page faults.
    pub virtualization_exception_in_page_fault, set_virtualization_exception_in_page_fault: 20;
    /// Bit 21: GuestIa32DebugCtl of the enlightened VMCS may be non-zero.
    pub nonzero_guest_debug_ctl, set_nonzero_guest_debug_ctl: 21;
    /// Bit 22: enlightened TLB on AMD, with the two GPA flush calls.
    pub enlightened_npt_tlb, set_enlightened_npt_tlb: 22;
}

bits! {
    /// Leaf 0x4000000A EBX.
    pub struct NestedOptimizationsEbx(u32);
    /// Bit 0: GuestPerfGlobalCtrl and HostPerfGlobalCtrl of the enlightened VMCS.
    pub perf_global_ctrl, set_perf_global_ctrl: 0;
}
