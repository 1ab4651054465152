use nvmx::check::Guest;
use nvmx::field::Field::{self, *};
use samples::Profile;

use crate::rig::guests;

/// Unusable.
const UNUSABLE: u64 = 1 << 16;
const DATA: [(Field, Field, Field); 4] = [
    (GuestDsSelector, GuestDsAccessRights, GuestDsLimit),
    (GuestEsSelector, GuestEsAccessRights, GuestEsLimit),
    (GuestFsSelector, GuestFsAccessRights, GuestFsLimit),
    (GuestGsSelector, GuestGsAccessRights, GuestGsLimit),
];

#[test]
fn selectors() {
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::TrSelector, &[(GuestTrSelector, 4)], &[(GuestTrSelector, 3)]),
            (
                Guest::LdtrSelector,
                &[(GuestLdtrAccessRights, 0x82), (GuestLdtrLimit, 7), (GuestLdtrSelector, 4)],
                &[(GuestLdtrSelector, 4)],
            ),
            (Guest::SsRpl, &[(GuestCsSelector, 11)], &[(GuestCsSelector, 12)]),
        ],
    );
    // Neither in virtual-8086 mode nor for an unrestricted guest.
    for profile in [Profile::Virtual8086, Profile::Real] {
        guests(
            profile,
            &[],
            &[(Guest::TrSelector, &[(GuestTrSelector, 4)], &[(GuestCsSelector, 0x101), (GuestCsBase, 0x1010)])],
        );
    }
}

#[test]
fn bases() {
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::CanonicalBase, &[(GuestFsBase, 1 << 47)], &[(GuestFsBase, 1 << 46)]),
            (Guest::CanonicalBase, &[(GuestGsBase, 1 << 63)], &[(GuestGsBase, 0xFFFF_8000_0000_0000)]),
            (
                Guest::CanonicalBase,
                &[(GuestGsBase, 1 << 63), (GuestGsAccessRights, UNUSABLE)],
                &[(GuestGsAccessRights, UNUSABLE)],
            ),
            (Guest::CanonicalBase, &[(GuestTrBase, 1 << 47)], &[(GuestTrBase, (1 << 47) - 1)]),
            (
                Guest::CanonicalBase,
                &[(GuestLdtrAccessRights, 0x82), (GuestLdtrBase, 1 << 47)],
                &[(GuestLdtrBase, 1 << 47)],
            ),
            (Guest::Base, &[(GuestCsBase, 1 << 32)], &[(GuestCsBase, 1 << 31)]),
            (Guest::Base, &[(GuestDsBase, 1 << 32)], &[(GuestDsBase, 1 << 32), (GuestDsAccessRights, UNUSABLE)]),
            (Guest::Base, &[(GuestEsBase, 1 << 63)], &[(GuestEsBase, 0xFFFF_FFFF)]),
            (Guest::Base, &[(GuestSsBase, 1 << 32)], &[(GuestSsBase, 1 << 32), (GuestSsAccessRights, UNUSABLE)]),
        ],
    );
}

#[test]
fn code() {
    let rights = |value| (GuestCsAccessRights, value);
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::SegmentType, &[rights(0xA093)], &[rights(0xA099)]),
            (Guest::SegmentType, &[rights(0xA09A)], &[rights(0xA09D)]),
            (Guest::SegmentPresent, &[rights(0xA08B)], &[rights(0xA09F)]),
            (Guest::SegmentPresent, &[rights(0xA01B)], &[]),
            // CS has to be good even when it says it is unusable.
            (Guest::SegmentPresent, &[rights(0xA01B | UNUSABLE)], &[rights(0xA09B | UNUSABLE)]),
            (Guest::Granularity, &[(GuestCsLimit, 0xFFFF_FFFE)], &[rights(0x209B), (GuestCsLimit, 0xF_FFFE)]),
            (Guest::Granularity, &[rights(0x209B)], &[rights(0x209B), (GuestCsLimit, 0xF_FFFF)]),
            (Guest::CsDpl, &[rights(0xA0BB)], &[rights(0xA09F)]),
            (Guest::CsDpl, &[rights(0xA0BF)], &[]),
            (Guest::CsLAndD, &[rights(0xE09B)], &[rights(0xC09B)]),
        ],
    );
    guests(
        Profile::LongUser,
        &[],
        &[
            // Conforming code: at most the DPL of SS; other code: that.
            (Guest::CsDpl, &[rights(0xA0DB)], &[rights(0xA0DF)]),
            (Guest::CsDpl, &[rights(0xA09B)], &[rights(0xA09F)]),
        ],
    );
    guests(Profile::Protected, &[], &[(Guest::SegmentType, &[rights(0xC093)], &[rights(0xE09B)])]);
    guests(
        Profile::Flat,
        &[],
        &[
            // An unrestricted guest's CS may be data that expands up, with DPL 0.
            (Guest::SegmentType, &[rights(0xC097)], &[rights(0xC093)]),
            (Guest::CsDpl, &[rights(0xC0B3)], &[rights(0xC093)]),
        ],
    );
}

#[test]
fn stack() {
    let rights = |value| (GuestSsAccessRights, value);
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::SegmentType, &[rights(0xC091)], &[rights(0xC097)]),
            (Guest::SegmentType, &[rights(0xC09B)], &[rights(0xC09B | UNUSABLE)]),
            (Guest::SegmentPresent, &[rights(0xC083)], &[]),
            (Guest::SegmentPresent, &[rights(0xC013)], &[rights(0xC013 | UNUSABLE)]),
            (Guest::Granularity, &[(GuestSsLimit, 0)], &[(GuestSsLimit, 0xFFF)]),
            (
                Guest::SsDpl,
                &[rights(0xC0F3), (GuestCsAccessRights, 0xA0FB)],
                &[rights(0xC0F3), (GuestCsAccessRights, 0xA0FB), (GuestSsSelector, 3), (GuestCsSelector, 3)],
            ),
            // The DPL of an unusable SS counts.
            (Guest::SsDpl, &[rights(0xC0F3 | UNUSABLE), (GuestCsAccessRights, 0xA0FB)], &[rights(0xC093 | UNUSABLE)]),
        ],
    );
    guests(
        Profile::Real,
        &[],
        &[(Guest::SsDpl, &[rights(0xB3), (GuestCsAccessRights, 0xBB)], &[(GuestSsSelector, 0x102)])],
    );
    guests(
        Profile::Flat,
        &[],
        &[
            // Without protection's rule on RPL, but with CS of type 3.
            (
                Guest::SsDpl,
                &[rights(0xC0F3), (GuestCsAccessRights, 0xC093)],
                &[rights(0xC0F3), (GuestCsAccessRights, 0xC0FB)],
            ),
        ],
    );
}

#[test]
fn data() {
    for (selector, rights, limit) in DATA {
        guests(
            Profile::Long,
            &[],
            &[
                (Guest::SegmentType, &[(rights, 0xC092)], &[(rights, 0xC091)]),
                (Guest::SegmentType, &[(rights, 0xC099)], &[(rights, 0xC09B)]),
                (Guest::SegmentPresent, &[(rights, 0xC083)], &[(rights, 0xC083 | UNUSABLE)]),
                (Guest::SegmentPresent, &[(rights, 0xC013)], &[]),
                (Guest::Granularity, &[(limit, 0x10_0000)], &[(limit, 0x10_0FFF)]),
                (Guest::Granularity, &[(rights, 0x4093)], &[(rights, 0x4093), (limit, 0xF_FFFF)]),
                (Guest::DataDpl, &[(selector, 3)], &[(selector, 3), (rights, 0xC0F3)]),
                (Guest::DataDpl, &[(selector, 3), (rights, 0xC09B)], &[(selector, 3), (rights, 0xC09F)]),
            ],
        );
        // An unrestricted guest's DPL does not count.
        guests(Profile::Flat, &[], &[(Guest::SegmentType, &[(rights, 0xC092)], &[(selector, 3)])]);
    }
}

#[test]
fn virtual_8086() {
    for (selector, base, limit, rights) in [
        (GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsAccessRights),
        (GuestCsSelector, GuestCsBase, GuestCsLimit, GuestCsAccessRights),
        (GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsAccessRights),
        (GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsAccessRights),
        (GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsAccessRights),
        (GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsAccessRights),
    ] {
        guests(
            Profile::Virtual8086,
            &[],
            &[
                (Guest::Virtual8086Base, &[(base, 0x1010)], &[(base, 0x1010), (selector, 0x101)]),
                (Guest::Virtual8086Limit, &[(limit, 0xFFFE)], &[]),
                (Guest::Virtual8086Limit, &[(limit, 0x1_FFFF)], &[]),
                (Guest::Virtual8086Rights, &[(rights, 0xF1)], &[]),
                (Guest::Virtual8086Rights, &[(rights, 0xF3 | UNUSABLE)], &[]),
            ],
        );
    }
}

#[test]
fn system_segments() {
    let (tr, ldtr) = (GuestTrAccessRights, GuestLdtrAccessRights);
    guests(
        Profile::Long,
        &[(ldtr, 0x82), (GuestLdtrLimit, 0xFFFE)],
        &[
            (Guest::TrRights, &[(tr, 0x83)], &[(tr, 0x8B)]),
            (Guest::TrRights, &[(tr, 0x89)], &[]),
            (Guest::TrRights, &[(tr, 0x9B)], &[]),
            (Guest::TrRights, &[(tr, 0x0B)], &[]),
            (Guest::TrRights, &[(tr, 0x8B | UNUSABLE)], &[]),
            (Guest::TrRights, &[(GuestTrLimit, 0x10_0000)], &[(GuestTrLimit, 0xF_FFFF)]),
            (Guest::TrRights, &[(tr, 0x808B)], &[(tr, 0x808B), (GuestTrLimit, 0xFFF)]),
            (Guest::LdtrRights, &[(ldtr, 0x83)], &[(ldtr, 0x83 | UNUSABLE)]),
            (Guest::LdtrRights, &[(ldtr, 0x92)], &[]),
            (Guest::LdtrRights, &[(ldtr, 0x02)], &[]),
            (Guest::LdtrRights, &[(ldtr, 0x8082)], &[(ldtr, 0x8082), (GuestLdtrLimit, 0xFFF)]),
            (Guest::LdtrRights, &[(GuestLdtrLimit, 0x10_0000)], &[(GuestLdtrLimit, 0xF_FFFF)]),
        ],
    );
    guests(Profile::Protected, &[], &[(Guest::TrRights, &[(tr, 0x81)], &[(tr, 0x83)])]);
}
