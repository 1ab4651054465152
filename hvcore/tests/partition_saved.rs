//! Saving and restoring: the round trip, and every refusal.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod partition_support;

use hvcore::addr::L1Gpa;
use hvcore::partition::{
    Interface, MsrRead, Overlay, PartitionConfig, RestoreError, SAVED_VERSION, SavedPartition, SavedVp, Vendor,
};
use partition_support::everything;
use tlfs_abi::msr;
use zerocopy::{FromBytes, IntoBytes};

fn busy() -> (Interface, SavedPartition) {
    let interface = everything(Vendor::Amd).build().unwrap();
    let vp = interface.vp(0).unwrap();
    for (number, value) in [
        (msr::GUEST_OS_ID, 0x8100_0006_0C01_0000),
        (msr::HYPERCALL, 0x5003),
        (msr::REFERENCE_TSC, 0x6001),
        (msr::CRASH_P0, 10),
        (msr::CRASH_P4, 14),
        (msr::REENLIGHTENMENT_CONTROL, 3 << 32 | 1 << 16 | 0xEE),
        (msr::TSC_EMULATION_CONTROL, 1),
    ] {
        let _ = interface.msr_write(&vp, number, value);
    }
    let _ = interface.msr_read(&vp, msr::TIME_REF_COUNT, 5000);
    let saved = interface.save();
    (interface, saved)
}

#[test]
fn a_round_trip_through_bytes_keeps_what_the_guest_sees() {
    let (_, saved) = busy();
    let saved = SavedPartition::read_from_bytes(saved.as_bytes()).unwrap();
    let restored = everything(Vendor::Amd).build().unwrap();
    assert_eq!(restored.restore(&saved), Ok(()));
    let after = restored.save();
    assert_eq!(after.tsc_sequence, saved.tsc_sequence + 1, "the guest reads the new host's parameters");
    assert_eq!(SavedPartition { tsc_sequence: saved.tsc_sequence, ..after }, saved);
    assert_eq!(restored.overlay(Overlay::HypercallPage), Some(L1Gpa::new(0x5000)));
    assert_eq!(restored.overlay(Overlay::ReferenceTscPage), Some(L1Gpa::new(0x6000)));
    let vp = restored.vp(0).unwrap();
    assert_eq!(restored.msr_read(&vp, msr::TIME_REF_COUNT, 0), MsrRead::Value(5001), "time does not go back");
    assert_eq!(restored.crash_parameters(), [10, 0, 0, 0, 14]);
}

#[test]
fn the_sequence_skips_zero() {
    let (interface, saved) = busy();
    assert_eq!(interface.restore(&SavedPartition { tsc_sequence: u32::MAX, ..saved }), Ok(()));
    assert_eq!(interface.save().tsc_sequence, 1);
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let (_, good) = busy();
    let fresh = everything(Vendor::Amd).build().unwrap();
    let before = fresh.save();
    let cases = [
        (SavedPartition { version: SAVED_VERSION + 1, ..good }, RestoreError::Version),
        (SavedPartition { vendor: 0, ..good }, RestoreError::Vendor),
        (SavedPartition { vendor: 2, ..good }, RestoreError::Vendor),
        (SavedPartition { reserved: 1, ..good }, RestoreError::Reserved),
        (SavedPartition { reenlightenment: good.reenlightenment | 1 << 8, ..good }, RestoreError::Reserved),
        (SavedPartition { tsc_emulation_control: 2, ..good }, RestoreError::Reserved),
        (SavedPartition { tsc_emulation_status: 2, ..good }, RestoreError::Reserved),
        (SavedPartition { guest_os_id: 0, ..good }, RestoreError::Impossible),
        (SavedPartition { hypercall: 1 << 40, ..good }, RestoreError::Impossible),
        (SavedPartition { reenlightenment: 16 << 32 | 1 << 16 | 0xEE, ..good }, RestoreError::Impossible),
        (SavedPartition { reenlightenment: 1 << 16 | 15, ..good }, RestoreError::Impossible),
        (SavedPartition { tsc_sequence: 0, ..good }, RestoreError::Impossible),
    ];
    for (saved, error) in cases {
        assert_eq!(fresh.restore(&saved), Err(error), "{saved:x?}");
        assert_eq!(fresh.save(), before);
    }
    for just_legal in [
        SavedPartition { guest_os_id: 0, hypercall: 0x5002, ..good },
        SavedPartition { hypercall: (1 << 40) - 1, ..good },
        SavedPartition { reference_tsc: 1 << 40 | 1, ..good },
        SavedPartition { reenlightenment: 16 << 32, ..good },
        SavedPartition { tsc_emulation_status: 1, ..good },
        good,
    ] {
        assert_eq!(fresh.restore(&just_legal), Ok(()), "{just_legal:x?}");
    }
}

#[test]
fn state_of_what_is_not_offered_is_refused() {
    let (_, full) = busy();
    let bare = PartitionConfig::new(Vendor::Amd, 16, 40).build().unwrap();
    let plain = SavedPartition {
        reference_tsc: 0,
        crash: [0; 5],
        reenlightenment: 0,
        tsc_emulation_control: 0,
        tsc_emulation_status: 0,
        ..full
    };
    for saved in [
        SavedPartition { reference_tsc: 0x6000, ..plain },
        SavedPartition { crash: [0, 0, 0, 0, 1], ..plain },
        SavedPartition { reenlightenment: 0xEE, ..plain },
        SavedPartition { tsc_emulation_control: 1, ..plain },
        SavedPartition { tsc_emulation_status: 1, ..plain },
    ] {
        assert_eq!(bare.restore(&saved), Err(RestoreError::NotOffered), "{saved:x?}");
    }
    assert_eq!(bare.restore(&plain), Ok(()));
}

#[test]
fn a_vp_s_state() {
    let interface = everything(Vendor::Intel).build().unwrap();
    let vp = interface.vp(3).unwrap();
    let good = SavedVp { version: SAVED_VERSION, vp_index: 3, vp_assist_page: 0x7001 };
    for (saved, error) in [
        (SavedVp { version: 0, ..good }, RestoreError::Version),
        (SavedVp { vp_index: 4, ..good }, RestoreError::VpIndex),
        (SavedVp { vp_assist_page: 1 << 40 | 1, ..good }, RestoreError::Impossible),
    ] {
        assert_eq!(interface.restore_vp(&vp, &saved), Err(error));
        assert_eq!(vp.vp_assist_gpa(), None);
    }
    assert_eq!(interface.restore_vp(&vp, &SavedVp::read_from_bytes(good.as_bytes()).unwrap()), Ok(()));
    assert_eq!((vp.vp_assist_gpa(), vp.save()), (Some(L1Gpa::new(0x7000)), good));
    assert_eq!(interface.restore_vp(&vp, &SavedVp { vp_assist_page: 1 << 40, ..good }), Ok(()));
    let bare = PartitionConfig::new(Vendor::Intel, 16, 40).build().unwrap();
    let vp = bare.vp(3).unwrap();
    assert_eq!(bare.restore_vp(&vp, &good), Err(RestoreError::NotOffered));
    assert_eq!(bare.restore_vp(&vp, &SavedVp { vp_assist_page: 0, ..good }), Ok(()));
}
