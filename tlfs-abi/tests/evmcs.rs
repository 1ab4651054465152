//! The enlightened VMCS against the table of facts in `evmcs-v1.tsv`, field by field.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::expect_used, clippy::panic, missing_docs)]

use tlfs_abi::evmcs::{CleanFields, EnlightenedVmcs, EvmcsField, EvmcsUse, FIELDS, field};
use zerocopy::{FromBytes, IntoBytes};

const FACTS: &str = include_str!("evmcs-v1.tsv");

/// A row of the table: offset, size, name, encoding, clean group.
type Row<'a> = (u16, u8, &'a str, Option<u32>, &'a str);

fn rows() -> Vec<Row<'static>> {
    FACTS
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| {
            let mut columns = line.split('\t');
            let mut next = || columns.next().expect("five columns");
            let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16);
            let offset = hex(next()).expect("hex offset") as u16;
            let size = next().parse().expect("size");
            (offset, size, next(), hex(next()).ok(), next())
        })
        .collect()
}

fn group(name: &str) -> EvmcsUse {
    EvmcsUse::Group(match name {
        "-" => return EvmcsUse::Unmapped,
        "NONE (Read only)" => return EvmcsUse::ReadOnly,
        "NONE" => 0,
        "IO_BITMAP" => 1 << 0,
        "MSR_BITMAP" => 1 << 1,
        "CONTROL_GRP2" => 1 << 2,
        "CONTROL_GRP1" => 1 << 3,
        "CONTROL_PROC" => 1 << 4,
        "CONTROL_EVENT" => 1 << 5,
        "CONTROL_ENTRY" => 1 << 6,
        "CONTROL_EXCPN" => 1 << 7,
        "CRDR" => 1 << 8,
        "CONTROL_XLAT" => 1 << 9,
        "GUEST_BASIC" => 1 << 10,
        "GUEST_GRP1" => 1 << 11,
        "GUEST_GRP2" => 1 << 12,
        "HOST_POINTER" => 1 << 13,
        "HOST_GRP1" => 1 << 14,
        other => panic!("unknown group {other}"),
    })
}

fn agrees(field: &EvmcsField, row: &Row) -> bool {
    let (offset, size, name, encoding, clean) = *row;
    (field.offset, field.size, field.name) == (offset, size, name)
        && field.encoding == encoding
        && field.used == group(clean)
}

#[test]
fn every_field_is_the_table_s() {
    let rows = rows();
    let fields: Vec<_> = FIELDS.iter().filter(|f| f.name != "Padding").collect();
    assert_eq!(fields.len(), rows.len());
    for (field, row) in fields.iter().zip(&rows) {
        assert!(agrees(field, row), "{field:x?} is not {row:x?}");
    }
}

#[test]
fn the_comparison_sees_a_difference() {
    let (offset, size, name, encoding, clean) = rows()[20];
    let field = FIELDS.iter().find(|f| f.name == name).expect("a field of the table");
    assert!(agrees(field, &(offset, size, name, encoding, clean)));
    assert!(!agrees(field, &(offset + 4, size, name, encoding, clean)));
    assert!(!agrees(field, &(offset, size + 1, name, encoding, clean)));
    assert!(!agrees(field, &(offset, size, "Other", encoding, clean)));
    assert!(!agrees(field, &(offset, size, name, encoding.map(|e| e + 2), clean)));
    assert!(!agrees(field, &(offset, size, name, encoding, "CRDR")));
}

#[test]
fn the_fields_cover_the_kilobyte_without_gap_or_overlap() {
    let mut next = 0;
    for field in FIELDS {
        assert_eq!(field.offset, next, "{}", field.name);
        next += u16::from(field.size);
    }
    assert_eq!(next, 1024);
}

#[test]
fn encodings_are_found_and_unique() {
    for one in FIELDS {
        if let Some(encoding) = one.encoding {
            assert_eq!(field(encoding), Some(*one));
            assert_eq!(FIELDS.iter().filter(|f| f.encoding == Some(encoding)).count(), 1, "{}", one.name);
        }
    }
    assert_eq!(field(0x2016), None, "the posted-interrupt descriptor has no enlightened field");
}

#[test]
fn the_width_of_the_encoding_is_the_field_s_size() {
    // SDM volume 3, appendix B: encoding bits 14:13 are 0 for 16 bits, 1 for 64, 2 for 32, 3 for natural width.
    for one in FIELDS {
        if let Some(encoding) = one.encoding {
            let size = [2, 8, 4, 8][(encoding >> 13 & 3) as usize];
            assert_eq!(one.size, size, "{}", one.name);
        }
    }
}

#[test]
fn bytes_land_in_the_named_fields() {
    let bytes: Vec<u8> = (0..1024u32).map(|i| (i / 4) as u8).collect();
    let evmcs = EnlightenedVmcs::read_from_bytes(&bytes).expect("a kilobyte");
    assert_eq!(evmcs.host_rip, 0x1515_1515_1414_1414);
    assert_eq!(evmcs.clean_fields.raw(), 0xCECE_CECE);
    assert_eq!(evmcs.vm_id, 0xD5D5_D5D5_D4D4_D4D4);
    assert_eq!(evmcs.as_bytes(), &bytes[..]);
}

#[test]
fn a_clear_bit_means_reload() {
    let clean = CleanFields::new(CleanFields::CRDR | CleanFields::GUEST_BASIC);
    assert!(clean.all_clean(CleanFields::CRDR));
    assert!(clean.all_clean(CleanFields::NONE));
    assert!(!clean.all_clean(CleanFields::CRDR | CleanFields::HOST_GRP1));
    assert!(clean.crdr() && clean.guest_basic() && !clean.host_grp1());
}
