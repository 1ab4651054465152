//! EPT pointers: what the shadow makes of them, VM function 0.

use hvcore::addr::L1Gpa;
use hvcore::shadow::ShadowError;
use nvmx::caps::{Config, Host};
use nvmx::ept::{EptFormat, EptShadow, switch_eptp};

use crate::machine::*;

#[test]
fn the_shadows_pointer_is_the_hosts_with_l1s_flags() {
    for (host_levels, walk, hardware_flags) in [(4, 3 << 3, true), (5, 4 << 3, true), (4, 3 << 3, false)] {
        let format = EptFormat { hardware_flags, ..FORMAT };
        let mut shadow = EptShadow::<2>::new(pool(16), host_levels, format).unwrap();
        let plain = shadow.activate(PLAIN);
        assert_eq!(plain & 0xFFF, 6 | walk);
        assert_eq!(shadow.active(), Some(PLAIN));
        let flags = shadow.activate(FLAGS);
        assert_eq!(flags & 0xFFF, 6 | walk | u64::from(hardware_flags) << 6);
        assert_ne!(plain & ADDRESS, flags & ADDRESS, "two roots");
        assert_eq!(shadow.activate(PLAIN), plain);
    }
    assert_eq!(EptShadow::<4>::new(pool(64), 3, FORMAT).err(), Some(ShadowError::Levels(3)));
}

/// A processor that has everything that the library offers.
fn config() -> Config {
    let host = Host::from_msrs(40, 48, |msr| match msr {
        0x480 => 1 << 55 | 6 << 50 | 0x1000 << 32 | 1,
        0x485 => 0x1E5,
        0x486 => 0x8000_0021,
        0x487 => 0xFFFF_FFFF,
        0x488 => 0x2000,
        0x489 => 0x77_FFFF,
        0x48A => 0x2E,
        0x48B => 0xFFFF_FFFF << 32,
        0x48C => 0xF01_0673_4141,
        0x48D => 0xFF << 32 | 0x16,
        0x48E => 0xFFF9_FFFE << 32 | 0x400_6172,
        0x48F => 0x1FF_FFFF << 32 | 0x3_6DFB,
        0x490 => 0x3_FFFF << 32 | 0x11FB,
        0x491 => 1,
        _ => 0,
    });
    Config::all(host, false, true).unwrap()
}

#[test]
fn the_format_is_what_l1_is_offered() {
    let expected =
        EptFormat { execute_only: true, pages_2m: true, pages_1g: true, physical_bits: 40, hardware_flags: true };
    assert_eq!(EptFormat::of(&config()), expected);
}

#[test]
fn the_list_names_legal_pointers_only() {
    let machine = Machine::new();
    let list = 0x9000;
    machine.back(list);
    let config = config();
    let go = |index| switch_eptp(&machine, &config, L1Gpa::new(list), index);
    machine.set(list, PLAIN);
    machine.set(list + 511 * 8, FLAGS);
    machine.set(list + 8, PLAIN | 1 << 7);
    assert_eq!((go(0), go(511)), (Some(PLAIN), Some(FLAGS)));
    assert_eq!(go(1), None, "a reserved bit");
    assert_eq!(go(2), None, "zero");
    machine.back(list + 0x1000);
    machine.set(list + 0x1000, PLAIN);
    assert_eq!((go(512), go(u32::MAX)), (None, None), "no such entry");
    assert_eq!(switch_eptp(&machine, &config, L1Gpa::new(0x77_0000), 0), None, "no memory");
}
