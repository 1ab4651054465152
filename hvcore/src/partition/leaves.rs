//! The CPUID leaves, derived once from the registered capabilities (TLFS, "Feature and Interface Discovery").
//!
//! Used by `interface`; every bit here has its handler in the configuration.

use super::config::{PartitionConfig, Vendor};
use tlfs_abi::cpuid::*;
use tlfs_abi::hypercall::CallCode as C;

/// Leaves 0x40000000 to 0x4000000A.
pub(super) const LEAVES: usize = 11;

/// The table. Leaves that the partition does not have are zero.
pub(super) fn leaves(config: &PartitionConfig) -> [CpuidLeaf; LEAVES] {
    let zero = CpuidLeaf::default();
    let nested_features = nested_features(config);
    let nested_optimizations = nested_optimizations(config);
    let nested = nested_features != zero || nested_optimizations != zero;
    let max = if nested { LEAF_NESTED_OPTIMIZATIONS } else { LEAF_HARDWARE };
    let [ebx, ecx, edx] = VENDOR_MICROSOFT;
    [
        CpuidLeaf { eax: max, ebx, ecx, edx },
        CpuidLeaf { eax: INTERFACE_HV1, ..zero },
        version(config),
        features(config),
        recommendations(config),
        CpuidLeaf { eax: config.max_vps, ebx: config.logical_processors, ..zero },
        CpuidLeaf { eax: config.hardware, ..zero },
        zero,
        zero,
        nested_features,
        nested_optimizations,
    ]
}

fn version(config: &PartitionConfig) -> CpuidLeaf {
    let mut ebx = VersionEbx::new(0);
    ebx.set_major(config.version.major);
    ebx.set_minor(config.version.minor);
    CpuidLeaf { eax: config.version.build, ebx: ebx.raw(), ..CpuidLeaf::default() }
}

fn features(config: &PartitionConfig) -> CpuidLeaf {
    let mut privileges = PartitionPrivileges::new(0);
    privileges.set_access_hypercall_msrs(true);
    privileges.set_access_vp_index(true);
    privileges.set_access_partition_reference_counter(config.reference_counter);
    privileges.set_access_partition_reference_tsc(config.reference_tsc.is_some());
    privileges.set_access_frequency_regs(config.frequencies.is_some());
    privileges.set_access_intr_ctrl_regs(config.apic_msrs);
    privileges.set_access_reset_reg(config.reset);
    privileges.set_access_reenlightenment_controls(config.reenlightenment);
    privileges.set_post_messages(config.has(C::POST_MESSAGE));
    privileges.set_signal_events(config.has(C::SIGNAL_EVENT));
    privileges.set_access_vp_registers(config.has(C::GET_VP_REGISTERS));
    privileges.set_start_virtual_processor(config.has(C::START_VIRTUAL_PROCESSOR));
    privileges.set_enable_extended_hypercalls(config.has(C::EXT_QUERY_CAPABILITIES));
    let mut edx = FeaturesEdx::new(0);
    edx.set_xmm_hypercall_input(config.xmm_input);
    edx.set_xmm_hypercall_output(config.xmm_output);
    edx.set_timer_frequencies(config.frequencies.is_some());
    edx.set_guest_crash_msrs(config.crash.is_some());
    // The intake reads extended ranges of every list that it serves.
    edx.set_extended_gva_ranges(config.has(C::FLUSH_VIRTUAL_ADDRESS_LIST));
    edx.set_hypercall_msr_lock(true);
    CpuidLeaf { eax: privileges.raw() as u32, ebx: (privileges.raw() >> 32) as u32, ecx: 0, edx: edx.raw() }
}

fn recommendations(config: &PartitionConfig) -> CpuidLeaf {
    let mut eax = RecommendationsEax::new(config.recommendations);
    eax.set_hypercall_for_remote_flush(config.has(C::FLUSH_VIRTUAL_ADDRESS_SPACE));
    eax.set_synthetic_cluster_ipi(config.has(C::SEND_SYNTHETIC_CLUSTER_IPI));
    eax.set_ex_processor_masks(config.has_ex_masks());
    eax.set_enlightened_vmcs(config.nested.evmcs.is_some());
    let mut ecx = RecommendationsEcx::new(0);
    ecx.set_implemented_physical_address_bits(config.gpa_bits);
    CpuidLeaf { eax: eax.raw(), ebx: config.spin_retries, ecx: ecx.raw(), edx: 0 }
}

fn nested_features(config: &PartitionConfig) -> CpuidLeaf {
    let mut eax = NestedFeaturesEax::new(0);
    eax.set_access_hypercall_msrs(config.nested_root);
    eax.set_access_vp_index(config.nested_root);
    let mut edx = NestedFeaturesEdx::new(0);
    edx.set_xmm_hypercall_input(config.nested_root && config.xmm_input);
    edx.set_xmm_hypercall_output(config.nested_root && config.xmm_output);
    CpuidLeaf { eax: eax.raw(), ebx: 0, ecx: 0, edx: edx.raw() }
}

fn nested_optimizations(config: &PartitionConfig) -> CpuidLeaf {
    let nested = &config.nested;
    let mut eax = NestedOptimizationsEax::new(0);
    if let Some(versions) = nested.evmcs {
        eax.set_evmcs_version_low(versions.low);
        eax.set_evmcs_version_high(versions.high);
    }
    eax.set_direct_virtual_flush(nested.direct_flush);
    let gpa_flush = config.has(C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE);
    eax.set_flush_guest_physical_address(gpa_flush && config.vendor == Vendor::Intel);
    eax.set_enlightened_msr_bitmap(nested.msr_bitmap);
    eax.set_nonzero_guest_debug_ctl(nested.nonzero_debug_ctl);
    eax.set_enlightened_npt_tlb(nested.npt_tlb);
    let mut ebx = NestedOptimizationsEbx::new(0);
    ebx.set_perf_global_ctrl(nested.perf_global_ctrl);
    CpuidLeaf { eax: eax.raw(), ebx: ebx.raw(), ecx: 0, edx: 0 }
}
