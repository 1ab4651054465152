//! One test for each entry of `docs/tlfs-errata.md`, numbered as there.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::expect_used, clippy::panic, missing_docs)]

use tlfs_abi::assist::NestedFeatures;
use tlfs_abi::cpuid::{NestedFeaturesEax, PartitionPrivileges};
use tlfs_abi::evmcs::{CleanFields, EvmcsUse, field};
use tlfs_abi::flush::{FlushGpaRange, GpaSpan};
use tlfs_abi::hypercall::{CallCode, HypercallInput, HypercallResult};
use tlfs_abi::inputs::{ApicId, NotifyLongSpinWait, VpIndex};
use tlfs_abi::msr;
use tlfs_abi::status::HvStatus;

#[test]
fn e01_encoding_6c16_is_host_rip() {
    assert_eq!(field(0x6C16).map(|f| f.name), Some("HostRip"));
    assert_eq!(field(0x4C00).map(|f| (f.name, f.size)), Some(("HostSysenterCsMsr", 4)));
}

#[test]
fn e02_bit_31_of_the_input_value_is_not_reserved() {
    assert!(!HypercallInput(HypercallInput::NESTED).has_reserved());
    for bit in 27..31 {
        assert!(HypercallInput(1 << bit).has_reserved(), "bit {bit}");
    }
}

#[test]
fn e03_a_clear_clean_bit_means_reload() {
    assert!(!CleanFields::new(0).all_clean(CleanFields::CRDR));
    assert!(CleanFields::new(CleanFields::ALL).all_clean(CleanFields::CRDR));
}

#[test]
fn e04_reps_completed_has_twelve_bits() {
    let result = HypercallResult::new(HvStatus::SUCCESS, 0xFFF);
    assert_eq!(result.raw(), 0x0FFF_0000_0000);
    assert_eq!(result.reps_completed(), 0xFFF);
}

#[test]
fn e05_the_sources_have_sixteen_numbers() {
    let mut numbers: Vec<_> = (0..msr::SINT_COUNT).map(msr::sint).collect();
    numbers.dedup();
    assert_eq!(numbers.len(), 16);
    assert_eq!((msr::sint(0), msr::sint(15)), (msr::SINT0, msr::SINT15));
}

#[test]
fn e06_timer_3_has_the_last_count_register() {
    assert_eq!(msr::name(0x4000_00B7), Some("HV_X64_MSR_STIMER3_COUNT"));
    assert_eq!(msr::STIMER0_COUNT + 2 * (msr::STIMER_COUNT - 1), msr::STIMER3_COUNT);
}

#[test]
fn e07_reenlightenment_is_bit_13_of_one_leaf_and_bit_12_of_the_other() {
    let mut privileges = PartitionPrivileges::new(0);
    privileges.set_access_reenlightenment_controls(true);
    let mut nested = NestedFeaturesEax::new(0);
    nested.set_access_reenlightenment_controls(true);
    assert_eq!((privileges.raw(), nested.raw()), (1 << 13, 1 << 12));
}

#[test]
fn e08_gpa_ranges_are_read_both_ways() {
    let plain = FlushGpaRange(0x1234_5000 | 0x7FF);
    assert!(!plain.is_ambiguous());
    assert_eq!(plain.tlfs_span(), plain.extended_span());
    let both = FlushGpaRange(0x4060_0000 | 1 << 11 | 2);
    assert!(both.is_ambiguous());
    assert_eq!(both.tlfs_span(), GpaSpan { start: 0x4060_0000, pages: 0x803, page_size: 4096 });
    assert_eq!(both.extended_span(), GpaSpan { start: 0x4060_0000, pages: 3, page_size: 2 << 20 });
    assert_eq!(FlushGpaRange::new(0x5000, FlushGpaRange::MAX_PAGES), FlushGpaRange(0x57FF));
}

#[test]
fn e09_apic_ids_and_vp_indexes_are_packed() {
    assert_eq!((size_of::<ApicId>(), size_of::<VpIndex>()), (4, 4));
}

#[test]
fn e10_the_spin_count_has_32_bits() {
    assert_eq!(core::mem::offset_of!(NotifyLongSpinWait, reserved), 4);
    assert_eq!(size_of::<NotifyLongSpinWait>(), 8);
}

#[test]
fn e11_the_synthetic_fields_have_the_group_of_bit_15() {
    assert_eq!(CleanFields::ENLIGHTENMENTSCONTROL, 1 << 15);
    let vp_id = tlfs_abi::evmcs::FIELDS.iter().find(|f| f.name == "VpId").expect("VpId");
    assert_eq!((vp_id.encoding, vp_id.used), (None, EvmcsUse::Unmapped));
}

#[test]
fn e12_the_gpa_flush_calls_have_two_names() {
    assert_eq!(CallCode(0xAF).name(), Some("HvCallFlushGuestPhysicalAddressSpace"));
    assert_eq!(CallCode(0xB0).name(), Some("HvCallFlushGuestPhysicalAddressList"));
}

#[test]
fn e13_direct_hypercall_and_direct_virtual_flush_are_one_feature() {
    let mut features = NestedFeatures::new(0);
    features.set_direct_hypercall(true);
    assert_eq!(features.raw(), 1);
}
