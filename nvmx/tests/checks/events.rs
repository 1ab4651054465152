use nvmx::check::{Controls, Refusal};
use nvmx::controls::primary;
use nvmx::field::Field::*;
use samples::Profile;

use crate::rig::{ROOT, Sets, config, host, judge, with, without};

const VALID: u64 = 1 << 31;

/// What an entry that injects `info` comes to.
fn inject(profile: Profile, info: u64, sets: Sets<'_>) -> Result<(), Refusal> {
    let config = config();
    let base: Sets<'_> = &[(EntryInterruptionInfo, info), (EntryInstructionLength, 1)];
    judge(&with(&config, profile, &[base, sets]), &config, ROOT).map(|_| ())
}

#[test]
fn interruption_information() {
    for (info, name) in [
        (0x100 | 0x20, Controls::EventType),
        (0x200 | 3, Controls::EventVector),
        (0x300 | 32, Controls::EventVector),
        (0x700 | 1, Controls::EventVector),
        (0x300 | 13, Controls::EventErrorCodeBit),
        (0xB00 | 6, Controls::EventErrorCodeBit),
        (0xB00 | 9, Controls::EventErrorCodeBit),
        (0xB00 | 15, Controls::EventErrorCodeBit),
        (0x800 | 0x20, Controls::EventErrorCodeBit),
        (0xE00 | 3, Controls::EventErrorCodeBit),
        (1 << 12 | 0x300 | 6, Controls::EventReserved),
        (1 << 30 | 0x300 | 6, Controls::EventReserved),
    ] {
        assert_eq!(inject(Profile::Long, VALID | info, &[]), Err(Refusal::Controls(name)), "{info:#x}");
        assert_eq!(inject(Profile::Long, info, &[]), Ok(()), "not valid: {info:#x}");
    }
    for info in [0x202, 0x306, 0xB08, 0xB0A, 0xB0E, 0xB11, 0x31F, 0x700, 0x403, 0x4FF, 0x501, 0x603] {
        assert_eq!(inject(Profile::Long, VALID | info, &[]), Ok(()), "{info:#x}");
    }
}

#[test]
fn error_codes() {
    let code = |value| inject(Profile::Long, VALID | 0xB0D, &[(EntryExceptionErrorCode, value)]);
    assert_eq!(code(1 << 16), Err(Refusal::Controls(Controls::EventErrorCode)));
    assert_eq!(code(0xFFFF), Ok(()));
    assert_eq!(inject(Profile::Long, VALID | 0x306, &[(EntryExceptionErrorCode, 1 << 16)]), Ok(()));
    // Real mode has no error codes.
    assert_eq!(inject(Profile::Real, VALID | 0x30D, &[]), Ok(()));
    assert_eq!(inject(Profile::Real, VALID | 0xB0D, &[]), Err(Refusal::Controls(Controls::EventErrorCodeBit)));
    assert_eq!(inject(Profile::Flat, VALID | 0xB0D, &[]), Ok(()));
}

#[test]
fn instruction_lengths() {
    let refused = Err(Refusal::Controls(Controls::EventLength));
    for kind in [4, 5, 6] {
        let length = |n| inject(Profile::Long, VALID | kind << 8 | 3, &[(EntryInstructionLength, n)]);
        assert_eq!([length(0), length(1), length(15), length(16)], [Ok(()), Ok(()), Ok(()), refused], "{kind}");
    }
    for info in [0x202, 0x306, 0x700] {
        assert_eq!(inject(Profile::Long, VALID | info, &[(EntryInstructionLength, 16)]), Ok(()), "{info:#x}");
    }
    // Without IA32_VMX_MISC bit 30 length 0 is refused as well.
    let mut older = host();
    older.misc &= !(1 << 30);
    let config = nvmx::caps::Config::all(older, false, true).unwrap();
    let length = |n| {
        let sets: Sets<'_> = &[(EntryInterruptionInfo, VALID | 0x403), (EntryInstructionLength, n)];
        judge(&with(&config, Profile::Long, &[sets]), &config, ROOT).map(|_| ())
    };
    assert_eq!([length(0), length(1)], [refused, Ok(())]);
}

#[test]
fn a_pending_mtf_exit_needs_the_flag() {
    let config = without(|offer| offer.primary &= !primary::MONITOR_TRAP_FLAG);
    let vmcs = with(&config, Profile::Long, &[&[(EntryInterruptionInfo, VALID | 0x700)]]);
    assert_eq!(judge(&vmcs, &config, ROOT).map(|_| ()), Err(Refusal::Controls(Controls::EventType)));
    assert_eq!(inject(Profile::Long, VALID | 0x700, &[]), Ok(()));
}
