//! What is registered decides what is advertised; impossible sets are refused.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod partition_support;

use hvcore::hypercall::Privileges;
use hvcore::partition::{
    ConfigError, EvmcsVersions, NestedCapabilities, PartitionConfig, ReferenceTsc, Vendor, Version,
};
use partition_support::{AMD, EVERY_CALL, INTEL, everything};
use tlfs_abi::cpuid::*;
use tlfs_abi::hypercall::CallCode;

fn leaf(config: PartitionConfig, number: u32) -> CpuidLeaf {
    config.build().unwrap().cpuid(number).unwrap()
}

fn bare(vendor: Vendor) -> PartitionConfig {
    PartitionConfig::new(vendor, 1, 36)
}

#[test]
fn a_bare_partition_shows_what_hv1_implies_and_no_more() {
    let interface = bare(Vendor::Intel).version(Version { major: 10, minor: 2, build: 777 }).build().unwrap();
    let [ebx, ecx, edx] = VENDOR_MICROSOFT;
    assert_eq!(interface.cpuid(0x4000_0000), Some(CpuidLeaf { eax: 0x4000_0006, ebx, ecx, edx }));
    assert_eq!(interface.cpuid(0x4000_0001).unwrap().eax, INTERFACE_HV1);
    assert_eq!(interface.cpuid(0x4000_0002), Some(CpuidLeaf { eax: 777, ebx: 0xA_0002, ecx: 0, edx: 0 }));
    assert_eq!(interface.cpuid(0x4000_0003), Some(CpuidLeaf { eax: 0x60, ebx: 0, ecx: 0, edx: 1 << 18 }));
    assert_eq!(interface.cpuid(0x4000_0004), Some(CpuidLeaf { eax: 0, ebx: u32::MAX, ecx: 36, edx: 0 }));
    assert_eq!(interface.cpuid(0x4000_0005), Some(CpuidLeaf { eax: 1, ..CpuidLeaf::default() }));
    for number in 0x4000_0006..=0x4000_000A {
        assert_eq!(interface.cpuid(number), Some(CpuidLeaf::default()));
    }
    for number in [0, 1, 0x3FFF_FFFF, 0x4000_000B, 0x8000_0000, u32::MAX] {
        assert_eq!(interface.cpuid(number), None, "{number:#x}");
    }
    assert_eq!(interface.privileges(), Privileges::NONE);
}

#[test]
fn everything_shows_every_bit_that_has_a_handler() {
    let intel = everything(Vendor::Intel).build().unwrap();
    assert_eq!(intel.cpuid(LEAF_RANGE).unwrap().eax, 0x4000_000A);
    let features = intel.cpuid(LEAF_FEATURES).unwrap();
    assert_eq!(features, CpuidLeaf { eax: 0x2AF2, ebx: 0x32_0030, ecx: 0, edx: 0x4_C510 });
    assert_eq!(intel.cpuid(LEAF_RECOMMENDATIONS).unwrap(), CpuidLeaf { eax: 0x4C04, ebx: 0xFFF, ecx: 40, edx: 0 });
    assert_eq!(intel.cpuid(LEAF_LIMITS).unwrap(), CpuidLeaf { eax: 16, ebx: 8, ecx: 0, edx: 0 });
    assert_eq!(intel.cpuid(LEAF_NESTED_FEATURES).unwrap(), CpuidLeaf { eax: 0x60, ebx: 0, ecx: 0, edx: 0x8010 });
    let nested = intel.cpuid(LEAF_NESTED_OPTIMIZATIONS).unwrap();
    assert_eq!(nested, CpuidLeaf { eax: 0x2E_0101, ebx: 1, ecx: 0, edx: 0 });
    assert_eq!(intel.privileges(), Privileges::ALL);

    let amd = everything(Vendor::Amd).build().unwrap();
    assert_eq!(amd.cpuid(LEAF_RECOMMENDATIONS).unwrap().eax, 0x0C04, "no enlightened VMCS on AMD");
    assert_eq!(amd.cpuid(LEAF_NESTED_OPTIMIZATIONS).unwrap(), CpuidLeaf { eax: 0x4A_0000, ..CpuidLeaf::default() });
    assert_eq!(amd.privileges(), Privileges::ALL);
}

/// Each registration alone sets its bits and no others.
#[test]
fn each_capability_sets_its_own_bits() {
    let base = bare(Vendor::Intel);
    let changes = |config: PartitionConfig| {
        (0x4000_0003..=0x4000_000A)
            .flat_map(|number| {
                let (was, is) = (leaf(base, number), leaf(config, number));
                [was.eax ^ is.eax, was.ebx ^ is.ebx, was.ecx ^ is.ecx, was.edx ^ is.edx]
                    .into_iter()
                    .enumerate()
                    .filter(|&(_, bits)| bits != 0)
                    .map(move |(register, bits)| (number & 0xF, register, bits))
                    .collect::<Vec<_>>()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(changes(base), vec![]);
    assert_eq!(changes(base.reference_counter()), vec![(3, 0, 1 << 1)]);
    let tsc = ReferenceTsc { scale: 1, offset: 0 };
    assert_eq!(changes(base.reference_counter().reference_tsc(tsc)), vec![(3, 0, 1 << 1 | 1 << 9)]);
    assert_eq!(changes(base.frequencies(1, 1)), vec![(3, 0, 1 << 11), (3, 3, 1 << 8)]);
    assert_eq!(changes(base.apic_msrs()), vec![(3, 0, 1 << 4)]);
    assert_eq!(changes(base.reset()), vec![(3, 0, 1 << 7)]);
    assert_eq!(changes(base.reenlightenment()), vec![(3, 0, 1 << 13)]);
    assert_eq!(changes(base.crash(false)), vec![(3, 3, 1 << 10)]);
    assert_eq!(changes(base.xmm_input()), vec![(3, 3, 1 << 4)]);
    assert_eq!(changes(base.xmm_output()), vec![(3, 3, 1 << 15)]);
    assert_eq!(changes(base.nested_root()), vec![(9, 0, 1 << 5 | 1 << 6)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[..2])), vec![(3, 3, 1 << 14), (4, 0, 1 << 2)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[3..4])), vec![(4, 0, 1 << 10)]);
    const IPIS: &[CallCode] = &[CallCode::SEND_SYNTHETIC_CLUSTER_IPI, CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX];
    assert_eq!(changes(base.hypercalls(IPIS)), vec![(4, 0, 1 << 10 | 1 << 11)]);
    assert_eq!(changes(base.hypercalls(&[CallCode::POST_MESSAGE])), vec![(3, 1, 1 << 4)]);
    assert_eq!(changes(base.hypercalls(&[CallCode::SIGNAL_EVENT])), vec![(3, 1, 1 << 5)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[7..9])), vec![(3, 1, 1 << 17)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[11..13])), vec![(3, 1, 1 << 21)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[13..15])), vec![(10, 0, 1 << 18)]);
    assert_eq!(changes(base.hypercalls(&EVERY_CALL[15..])), vec![(3, 1, 1 << 20)]);
    let spin = base.hypercalls(&EVERY_CALL[2..3]);
    assert_eq!(changes(spin), vec![], "a handler without a count is not advertised");
    assert_eq!(changes(spin.spin_retries(5)), vec![(4, 1, u32::MAX ^ 5)]);
    let mut hints = RecommendationsEax::new(0);
    hints.set_relaxed_timing(true);
    assert_eq!(changes(base.recommend(hints)), vec![(4, 0, 1 << 5)]);
    let mut hardware = HardwareEax::new(0);
    hardware.set_second_level_translation(true);
    assert_eq!(changes(base.hardware(hardware)), vec![(6, 0, 1 << 3)]);
}

#[test]
fn gpa_flush_calls_on_amd_need_the_enlightened_tlb() {
    let calls = bare(Vendor::Amd).hypercalls(&EVERY_CALL[13..15]);
    let interface = calls.build().unwrap();
    assert_eq!(interface.cpuid(LEAF_NESTED_OPTIMIZATIONS), Some(CpuidLeaf::default()));
    assert!(!interface.privileges().contains(Privileges::GUEST_PHYSICAL_FLUSH));
    let with = calls.nested(NestedCapabilities { npt_tlb: true, ..NestedCapabilities::NONE }).build().unwrap();
    assert_eq!(with.cpuid(LEAF_NESTED_OPTIMIZATIONS).unwrap().eax, 1 << 22);
    assert!(with.privileges().contains(Privileges::GUEST_PHYSICAL_FLUSH));
}

fn refused(config: PartitionConfig) -> ConfigError {
    config.build().unwrap_err()
}

#[test]
fn sizes_have_limits() {
    for (vps, ok) in [(0, false), (1, true), (4096, true), (4097, false)] {
        let result = PartitionConfig::new(Vendor::Amd, vps, 36).build();
        assert_eq!(result.err(), (!ok).then_some(ConfigError::VpCount), "{vps}");
    }
    for (bits, ok) in [(19, false), (20, true), (52, true), (53, false), (64, false)] {
        let result = PartitionConfig::new(Vendor::Amd, 1, bits).build();
        assert_eq!(result.err(), (!ok).then_some(ConfigError::GpaBits), "{bits}");
    }
}

#[test]
fn calls_of_one_bit_come_together() {
    use CallCode as C;
    for (offered, missing) in [
        (&[C::FLUSH_VIRTUAL_ADDRESS_SPACE][..], C::FLUSH_VIRTUAL_ADDRESS_LIST),
        (&[C::FLUSH_VIRTUAL_ADDRESS_LIST], C::FLUSH_VIRTUAL_ADDRESS_SPACE),
        (&[C::SEND_SYNTHETIC_CLUSTER_IPI_EX], C::SEND_SYNTHETIC_CLUSTER_IPI),
        (&[C::GET_VP_REGISTERS], C::SET_VP_REGISTERS),
        (&[C::SET_VP_REGISTERS], C::GET_VP_REGISTERS),
        (&[C::START_VIRTUAL_PROCESSOR], C::GET_VP_INDEX_FROM_APIC_ID),
        (&[C::GET_VP_INDEX_FROM_APIC_ID], C::START_VIRTUAL_PROCESSOR),
        (&[C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE], C::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST),
        (&[C::FLUSH_GUEST_PHYSICAL_ADDRESS_LIST], C::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE),
        (&[CallCode(0x8002)], C::EXT_QUERY_CAPABILITIES),
    ] {
        assert_eq!(refused(bare(Vendor::Intel).hypercalls(offered)), ConfigError::MissingCall(missing));
    }
    // Taking any one call of a pair out of the full list names it; the four below are not half of a bit.
    for (index, code) in EVERY_CALL.iter().enumerate() {
        let rest: Vec<_> = EVERY_CALL.iter().copied().filter(|c| c != code).collect();
        let config = bare(Vendor::Intel).hypercalls(rest.leak());
        match *code {
            C::NOTIFY_LONG_SPIN_WAIT | C::POST_MESSAGE | C::SIGNAL_EVENT | C::EXT_QUERY_CAPABILITIES => {
                assert!(config.build().is_ok(), "{code:?}");
            }
            _ => assert_eq!(refused(config), ConfigError::MissingCall(*code), "{index}"),
        }
    }
    assert!(bare(Vendor::Intel).hypercalls(EVERY_CALL).build().is_ok());
}

#[test]
fn spin_retries_need_their_call() {
    let spin = bare(Vendor::Intel).hypercalls(&EVERY_CALL[2..3]);
    assert_eq!(refused(bare(Vendor::Intel).spin_retries(5)), ConfigError::SpinRetries);
    assert_eq!(refused(spin.spin_retries(0)), ConfigError::SpinRetries);
    assert!(spin.spin_retries(1).build().is_ok());
}

#[test]
fn recommendations_need_what_they_recommend() {
    for bit in 0..32 {
        let config = bare(Vendor::Intel).recommend(RecommendationsEax::new(1 << bit));
        if [5, 9, 12, 17, 18].contains(&bit) {
            assert!(config.build().is_ok(), "bit {bit}");
        } else {
            assert_eq!(refused(config), ConfigError::Recommendations(1 << bit));
        }
    }
    let both = RecommendationsEax::new(1 << 3 | 1 << 4);
    assert_eq!(refused(bare(Vendor::Intel).apic_msrs().recommend(both)), ConfigError::Recommendations(1 << 4));
    assert!(bare(Vendor::Intel).apic_msrs().reset().recommend(both).build().is_ok());
}

#[test]
fn the_reference_tsc_needs_the_counter() {
    let tsc = bare(Vendor::Intel).reference_tsc(ReferenceTsc { scale: 1, offset: 0 });
    assert_eq!(refused(tsc), ConfigError::ReferenceTscWithoutCounter);
    assert!(tsc.reference_counter().build().is_ok());
}

#[test]
fn nested_sets_that_cannot_work() {
    const NONE: NestedCapabilities = NestedCapabilities::NONE;
    let intel = bare(Vendor::Intel).hypercalls(EVERY_CALL).apic_msrs();
    let amd = bare(Vendor::Amd).hypercalls(EVERY_CALL).apic_msrs();
    assert!(intel.nested(INTEL).build().is_ok());
    assert!(amd.nested(AMD).build().is_ok());

    assert_eq!(refused(amd.nested(NestedCapabilities { evmcs: INTEL.evmcs, ..AMD })), ConfigError::EvmcsOnAmd);
    assert_eq!(refused(amd.nested(NestedCapabilities { perf_global_ctrl: true, ..AMD })), ConfigError::EvmcsOnAmd);
    assert_eq!(refused(amd.nested(NestedCapabilities { nonzero_debug_ctl: true, ..AMD })), ConfigError::EvmcsOnAmd);
    assert_eq!(refused(intel.nested(NestedCapabilities { npt_tlb: true, ..INTEL })), ConfigError::NptTlbOnIntel);
    for versions in [(0, 1), (1, 2), (2, 1), (1, 0), (2, 2)] {
        let evmcs = Some(EvmcsVersions { low: versions.0, high: versions.1 });
        assert_eq!(refused(intel.nested(NestedCapabilities { evmcs, ..INTEL })), ConfigError::EvmcsVersion);
    }
    for without in [
        NestedCapabilities { direct_flush: true, ..NONE },
        NestedCapabilities { msr_bitmap: true, ..NONE },
        NestedCapabilities { perf_global_ctrl: true, ..NONE },
        NestedCapabilities { nonzero_debug_ctl: true, ..NONE },
    ] {
        assert_eq!(refused(intel.nested(without)), ConfigError::WithoutEvmcs);
    }
    let no_page = bare(Vendor::Intel).hypercalls(EVERY_CALL);
    let evmcs_only = NestedCapabilities { evmcs: INTEL.evmcs, ..NONE };
    assert_eq!(refused(no_page.nested(evmcs_only)), ConfigError::WithoutAssistPage);
    assert!(no_page.apic_msrs().nested(evmcs_only).build().is_ok());
    let direct = NestedCapabilities { direct_flush: true, ..NONE };
    let amd_no_page = bare(Vendor::Amd).hypercalls(EVERY_CALL);
    assert_eq!(refused(amd_no_page.nested(direct)), ConfigError::WithoutAssistPage);
    assert!(amd_no_page.nested(NestedCapabilities { msr_bitmap: true, ..NONE }).build().is_ok());
    let flush = ConfigError::MissingCall(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE);
    assert_eq!(refused(bare(Vendor::Amd).apic_msrs().nested(direct)), flush);
    let gpa = ConfigError::MissingCall(CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE);
    assert_eq!(refused(bare(Vendor::Amd).nested(NestedCapabilities { npt_tlb: true, ..NONE })), gpa);
}
