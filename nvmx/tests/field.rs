//! The field table against the enlightened VMCS's list and the encodings' own structure; VMREAD and VMWRITE.
#![allow(clippy::unwrap_used, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use nvmx::field::{Area, Encoding, Field, Width};
use nvmx::vmcs12::{AccessError, LaunchState, REVISION, Vmcs12};
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn slots_are_dense_and_encodings_lead_back() {
    for (slot, field) in Field::ALL.iter().enumerate() {
        assert_eq!(field.slot(), slot);
        assert_eq!(Field::from_encoding(field.encoding()), Some(*field));
        assert_eq!(field.encoding().0 & (Encoding::RESERVED | 1), 0);
    }
    assert!(Field::ALL.windows(2).all(|pair| matches!(pair, [a, b] if a.encoding() < b.encoding())));
}

#[test]
fn only_64_bit_fields_have_a_high_half() {
    assert_eq!(Field::from_encoding(Encoding(0x2801)), Some(Field::VmcsLinkPointer));
    assert_eq!(Field::from_encoding(Encoding(0x6801)), None);
    assert_eq!(Field::from_encoding(Encoding(0x4001)), None);
    assert_eq!(Field::from_encoding(Encoding(0x0001)), None);
}

#[test]
fn the_parts_of_an_encoding() {
    assert_eq!((Field::HostRip.width(), Field::HostRip.area()), (Width::Natural, Area::Host));
    assert_eq!((Field::HostSysenterCs.encoding(), Field::HostRip.encoding()), (Encoding(0x4C00), Encoding(0x6C16)));
    assert_eq!((Field::ExitReason.width(), Field::ExitReason.area()), (Width::U32, Area::ExitInformation));
    assert_eq!((Field::GuestCsSelector.width(), Field::GuestCsSelector.area()), (Width::U16, Area::Guest));
    assert_eq!((Field::EptPointer.width(), Field::EptPointer.area()), (Width::U64, Area::Control));
    assert_eq!(Field::HIGHEST_INDEX, 0x19);
}

/// Fields of the enlightened VMCS that this table leaves out, because nothing offers the controls that use them.
const NOT_KNOWN: &[u32] = &[0x2034, 0x2816, 0x6828, 0x682A, 0x682C, 0x6C18, 0x6C1A, 0x6C1C];

#[test]
fn every_enlightened_field_is_known_with_its_width() {
    let mut seen = 0;
    for field in tlfs_abi::evmcs::FIELDS {
        let Some(encoding) = field.encoding else { continue };
        let Some(known) = Field::from_encoding(Encoding(encoding)) else {
            assert!(NOT_KNOWN.contains(&encoding), "{} ({encoding:#06x}) has no line in the table", field.name);
            continue;
        };
        let size = match known.width() {
            Width::U16 => 2,
            Width::U32 => 4,
            Width::U64 | Width::Natural => 8,
        };
        let place = known.evmcs().unwrap();
        assert_eq!((place.offset, place.size), (field.offset, size), "{}", field.name);
        seen += 1;
    }
    assert_eq!(seen, 121);
}

#[test]
fn what_the_enlightened_layout_lacks_is_none() {
    for field in [Field::PreemptionTimer, Field::PmlAddress, Field::PostedInterruptDescriptor, Field::VmreadBitmap] {
        assert_eq!(field.evmcs(), None, "{field:?}");
    }
}

#[test]
fn vmread_and_vmwrite_of_halves() {
    let mut vmcs = Vmcs12::default();
    vmcs.vmwrite(Encoding(0x2010), 0x1111_2222_3333_4444, false).unwrap();
    vmcs.vmwrite(Encoding(0x2011), 0xFFFF_FFFF_5555_6666, false).unwrap();
    assert_eq!(vmcs.vmread(Encoding(0x2010)), Ok(0x5555_6666_3333_4444));
    assert_eq!(vmcs.vmread(Encoding(0x2011)), Ok(0x5555_6666));
    assert_eq!(vmcs.get(Field::TscOffset), 0x5555_6666_3333_4444);
}

#[test]
fn values_are_cut_to_their_width() {
    let mut vmcs = Vmcs12::default();
    vmcs.vmwrite(Field::GuestCsSelector.encoding(), 0x12_3456, false).unwrap();
    vmcs.vmwrite(Field::ExceptionBitmap.encoding(), 0x1_0000_0002, false).unwrap();
    vmcs.vmwrite(Field::GuestSsAccessRights.encoding(), u64::MAX, false).unwrap();
    assert_eq!(vmcs.get(Field::GuestCsSelector), 0x3456);
    assert_eq!(vmcs.get(Field::ExceptionBitmap), 2);
    assert_eq!(vmcs.get(Field::GuestSsAccessRights), 0x1_F0FF);
}

#[test]
fn unsupported_and_read_only_fields() {
    let mut vmcs = Vmcs12::default();
    for bad in [0x0006, 0x2035, 0x1000, 0x8000, 0x1_0000, 0x6801, u32::MAX] {
        assert_eq!(vmcs.vmread(Encoding(bad)), Err(AccessError::Unsupported), "{bad:#x}");
        assert_eq!(vmcs.vmwrite(Encoding(bad), 0, true), Err(AccessError::Unsupported), "{bad:#x}");
    }
    let reason = Field::ExitReason.encoding();
    assert_eq!(vmcs.vmwrite(reason, 7, false), Err(AccessError::ReadOnly));
    assert_eq!(vmcs.vmread(reason), Ok(0));
    assert_eq!(vmcs.vmwrite(reason, 7, true), Ok(()));
    assert_eq!(vmcs.vmread(reason), Ok(7));
}

#[test]
fn a_region_from_memory_is_made_legal() {
    let mut region = vec![0xFFu8; size_of::<Vmcs12>()];
    region[..4].copy_from_slice(&REVISION.to_le_bytes());
    let mut vmcs = Vmcs12::read_from_bytes(&region).unwrap();
    assert_eq!(vmcs.launch_state(), LaunchState::Clear);
    vmcs.sanitize();
    for field in Field::ALL {
        assert_eq!(vmcs.get(*field), field.mask(), "{field:?}");
    }
    vmcs.set_launch_state(LaunchState::Launched);
    assert_eq!(vmcs.as_bytes()[8..12], [1, 0, 0, 0]);
}

#[test]
fn every_known_control_bit_has_one_name() {
    use nvmx::controls::{entry, exit, pin, primary, secondary};
    assert_eq!(pin::names(u32::MAX).count() as u32, pin::KNOWN.count_ones());
    assert_eq!(primary::names(u32::MAX).count() as u32, primary::KNOWN.count_ones());
    assert_eq!(secondary::names(u32::MAX).count() as u32, secondary::KNOWN.count_ones());
    assert_eq!(exit::names(u32::MAX).count() as u32, exit::KNOWN.count_ones());
    assert_eq!(entry::names(u32::MAX).count() as u32, entry::KNOWN.count_ones());
    assert_eq!(pin::names(1 << 3 | 1).collect::<Vec<_>>(), ["EXTERNAL_INTERRUPT_EXITING", "NMI_EXITING"]);
}
