//! Bit positions and layouts against numbers of the TLFS, independent of the setters' own declarations.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::expect_used, clippy::panic, missing_docs)]

use tlfs_abi::assist::{NestedFeatures, VpAssistPage, vp_assist_offset};
use tlfs_abi::cpuid::*;
use tlfs_abi::evmcb::{EnlightenedVmcbFields, VmcbEnlightenmentsControl};
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::inputs::*;
use tlfs_abi::msr::{self, *};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Sets each named bit alone and compares with its position.
macro_rules! positions {
    ($ty:ident: $($bit:literal $setter:ident)*) => {{
        let mut seen = 0u64;
        $({
            let mut register = $ty::new(0);
            register.$setter(true);
            assert_eq!(u64::from(register.raw()), 1u64 << $bit, stringify!($setter));
            seen |= 1u64 << $bit;
        })*
        seen
    }};
}

#[test]
fn privileges() {
    let seen = positions!(PartitionPrivileges:
        0 set_access_vp_run_time_reg 1 set_access_partition_reference_counter 2 set_access_synic_regs
        3 set_access_synthetic_timer_regs 4 set_access_intr_ctrl_regs 5 set_access_hypercall_msrs 6 set_access_vp_index
        7 set_access_reset_reg 8 set_access_stats_reg 9 set_access_partition_reference_tsc 10 set_access_guest_idle_reg
        11 set_access_frequency_regs 12 set_access_debug_regs 13 set_access_reenlightenment_controls
        32 set_create_partitions 33 set_access_partition_id 34 set_access_memory_pool 36 set_post_messages
        37 set_signal_events 38 set_create_port 39 set_connect_port 40 set_access_stats 43 set_debugging
        44 set_cpu_management 48 set_access_vsm 49 set_access_vp_registers 52 set_enable_extended_hypercalls
        53 set_start_virtual_processor);
    assert_eq!(seen, 0x0033_19F7_0000_3FFF);
}

#[test]
fn features_and_recommendations() {
    let seen = positions!(FeaturesEdx:
        0 set_mwait_deprecated 1 set_guest_debugging 2 set_performance_monitor 3 set_cpu_dynamic_partitioning
        4 set_xmm_hypercall_input 5 set_guest_idle_state 6 set_hypervisor_sleep_state 7 set_numa_distances
        8 set_timer_frequencies 9 set_synthetic_machine_checks 10 set_guest_crash_msrs 11 set_debug_msrs 12 set_npiep
        13 set_disable_hypervisor 14 set_extended_gva_ranges 15 set_xmm_hypercall_output 17 set_sint_polling_mode
        18 set_hypercall_msr_lock 19 set_direct_synthetic_timers 20 set_vsm_pat 21 set_vsm_bndcfgs
        23 set_synthetic_time_unhalted_timer 26 set_lbr);
    assert_eq!(seen, 0x04BE_FFFF);
    let seen = positions!(RecommendationsEax:
        0 set_hypercall_for_address_switch 1 set_hypercall_for_local_flush 2 set_hypercall_for_remote_flush
        3 set_msrs_for_apic 4 set_msr_for_reset 5 set_relaxed_timing 6 set_dma_remapping 7 set_interrupt_remapping
        8 set_x2apic_msrs 9 set_deprecate_auto_eoi 10 set_synthetic_cluster_ipi 11 set_ex_processor_masks
        12 set_nested_in_hyperv 13 set_int_for_mbec_system_calls 14 set_enlightened_vmcs 15 set_synced_timeline
        17 set_direct_local_flush_entire 18 set_no_nonarchitectural_core_sharing);
    assert_eq!(seen, 0x6_FFFF);
    let seen = positions!(HardwareEax:
        0 set_apic_overlay_assist 1 set_msr_bitmaps 2 set_performance_counters 3 set_second_level_translation
        4 set_dma_remapping 5 set_interrupt_remapping 6 set_memory_patrol_scrubber 7 set_dma_protection
        8 set_hpet_requested 9 set_volatile_synthetic_timers);
    assert_eq!(seen, 0x3FF);
    let mut hardware = HardwareEax::new(0);
    hardware.set_nesting_level(15);
    assert_eq!(hardware.raw(), 0x3C00);
}

#[test]
fn nested_leaves() {
    let seen = positions!(NestedFeaturesEax:
        2 set_access_synic_regs 4 set_access_intr_ctrl_regs 5 set_access_hypercall_msrs 6 set_access_vp_index
        12 set_access_reenlightenment_controls);
    assert_eq!(seen, 0x1074);
    let seen =
        positions!(NestedFeaturesEdx: 4 set_xmm_hypercall_input 15 set_xmm_hypercall_output 17 set_sint_polling_mode);
    assert_eq!(seen, 0x2_8010);
    let seen = positions!(NestedOptimizationsEax:
        17 set_direct_virtual_flush 18 set_flush_guest_physical_address 19 set_enlightened_msr_bitmap
        20 set_virtualization_exception_in_page_fault 21 set_nonzero_guest_debug_ctl 22 set_enlightened_npt_tlb);
    assert_eq!(seen, 0x7E_0000);
    let mut eax = NestedOptimizationsEax::new(0);
    eax.set_evmcs_version_low(1);
    eax.set_evmcs_version_high(2);
    assert_eq!(eax.raw(), 0x201);
    assert_eq!(positions!(NestedOptimizationsEbx: 0 set_perf_global_ctrl), 1);
}

#[test]
fn signatures_spell_their_names() {
    assert_eq!(VENDOR_MICROSOFT.as_bytes(), b"Microsoft Hv");
    assert_eq!(INTERFACE_HV1.as_bytes(), b"Hv#1");
    let mut version = VersionEbx::new(0);
    version.set_major(10);
    version.set_minor(3);
    assert_eq!(version.raw(), 0x000A_0003);
    let mut service = VersionEdx::new(0);
    service.set_service_branch(0x12);
    service.set_service_number(0x34_5678);
    assert_eq!(service.raw(), 0x1234_5678);
    assert_eq!(RecommendationsEcx::new(0xFFFF_FFB4).implemented_physical_address_bits(), 52);
}

#[test]
fn msr_layouts() {
    let page = PageMsr::new(0xABCD_E003);
    assert!(page.enable() && page.locked());
    assert_eq!((page.page_number(), page.gpa()), (0xABCDE, 0xABCD_E000));
    let mut reenlightenment = ReenlightenmentControl::new(0);
    reenlightenment.set_vector(0xEE);
    reenlightenment.set_enabled(true);
    reenlightenment.set_target_vp(3);
    assert_eq!(reenlightenment.raw(), 0x3_0001_00EE);
    assert_eq!(reenlightenment.raw() & ReenlightenmentControl::RESERVED, 0);
    assert_eq!(ReenlightenmentControl::RESERVED | 0xFFFF_FFFF_0001_00FF, u64::MAX);
    assert_eq!(positions!(CrashControl: 62 set_crash_message 63 set_crash_notify), 3 << 62);
    assert_eq!(positions!(SintMsr: 16 set_masked 17 set_auto_eoi 18 set_polling), 7 << 16);
    let mut stimer = StimerConfig::new(0);
    stimer.set_apic_vector(0xFF);
    stimer.set_sintx(0xF);
    assert_eq!(stimer.raw(), 0xF_0FF0);
    assert_eq!(
        positions!(StimerConfig: 0 set_enabled 1 set_periodic 2 set_lazy 3 set_auto_enable 12 set_direct_mode),
        0x100F
    );
    let mut linux = OpenSourceOsId::new(0);
    linux.set_open_source(true);
    linux.set_os_type(1);
    linux.set_version(0x0006_0C01);
    assert_eq!(linux.raw(), 0x8100_0006_0C01_0000);
    let windows = ProprietaryOsId::new(0x0001_040A_0000_4A65);
    assert_eq!((windows.vendor(), windows.os_id(), windows.major(), windows.build()), (1, 4, 10, 0x4A65));
}

#[test]
fn msr_numbers_are_unique_and_named() {
    let mut numbers = msr::ALL.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), msr::ALL.len());
    assert!(msr::ALL.iter().all(|&number| msr::name(number).is_some()));
    assert_eq!(msr::name(0x4000_0005), None);
    assert_eq!(msr::name(0x4000_0073), Some("HV_X64_MSR_VP_ASSIST_PAGE"));
    assert_eq!(msr::name(0x4000_1002), Some("HV_X64_MSR_NESTED_VP_INDEX"));
}

#[test]
fn reference_time_is_a_128_bit_product() {
    let mut page = ReferenceTscPage { tsc_sequence: 1, tsc_scale: 1 << 63, tsc_offset: 5, ..ReferenceTscPage::ZERO };
    assert_eq!(page.time(100), Some(55));
    assert_eq!(page.time(u64::MAX), Some((u64::MAX >> 1) + 5));
    page.tsc_offset = (-10i64) as u64;
    assert_eq!(page.time(100), Some(40));
    page.tsc_sequence = 0;
    assert_eq!(page.time(100), None);
}

#[test]
fn the_assist_page_holds_what_l0_reads() {
    let mut bytes = [0u8; 80];
    bytes[0x20] = 1;
    bytes[0x28] = 1;
    bytes[0x30..0x38].copy_from_slice(&0x1234_5000u64.to_le_bytes());
    let page = VpAssistPage::read_from_bytes(&bytes).expect("80 bytes");
    assert!(page.nested_enlightenments_control.features.direct_hypercall());
    assert_eq!((page.enlighten_vm_entry, page.current_nested_vmcs), (1, 0x1234_5000));
    assert_eq!(
        [
            vp_assist_offset::APIC_ASSIST,
            vp_assist_offset::NESTED_FEATURES,
            vp_assist_offset::ENLIGHTEN_VM_ENTRY,
            vp_assist_offset::CURRENT_NESTED_VMCS
        ],
        [0, 0x20, 0x28, 0x30]
    );
    assert_eq!(positions!(NestedFeatures: 0 set_direct_hypercall 1 set_virtualization_exception), 3);
}

#[test]
fn the_enlightened_vmcb_fields() {
    let mut fields = EnlightenedVmcbFields::new_zeroed();
    fields.vp_id = 7;
    fields.enlightenments_control.set_enlightened_npt_tlb(true);
    assert_eq!(fields.as_bytes()[..8], [4, 0, 0, 0, 7, 0, 0, 0]);
    let seen = positions!(VmcbEnlightenmentsControl:
        0 set_nested_flush_virtual_hypercall 1 set_msr_bitmap 2 set_enlightened_npt_tlb);
    assert_eq!(seen, 7);
}

#[test]
fn hypercall_inputs() {
    let ipi = SendSyntheticClusterIpi { vector: 0x30, processor_mask: 5, ..SendSyntheticClusterIpi::ZERO };
    assert_eq!(ipi.as_bytes(), [0x30, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    let mut vtl = InputVtl::new(0);
    vtl.set_target_vtl(1);
    vtl.set_use_target_vtl(true);
    assert_eq!(vtl.raw(), 0x11);
    let mut attributes = SegmentAttributes::new(0);
    attributes.set_segment_type(0xB);
    attributes.set_non_system(true);
    attributes.set_present(true);
    attributes.set_long(true);
    assert_eq!(attributes.raw(), 0x209B);
    let seen = positions!(ExtendedCapabilities:
        0 set_get_boot_zeroed_memory 1 set_memory_heat_hint 2 set_epf_setup 3 set_scheduler_assist_setup
        4 set_memory_heat_hint_async);
    assert_eq!(seen, 0x1F);
    assert_eq!(CallCode::EXT_QUERY_CAPABILITIES.0 + 1, 0x8002);
}
