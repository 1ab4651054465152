use nvmx::check::{MsrEntry, MsrRefusal, msr_load, msr_store};
use zerocopy::FromBytes;

fn entry(index: u32, reserved: u32) -> MsrEntry {
    MsrEntry { index, reserved, value: 5 }
}

#[test]
fn what_may_be_loaded() {
    for (index, refusal) in [
        (0xC000_0100, MsrRefusal::Base),
        (0xC000_0101, MsrRefusal::Base),
        (0x800, MsrRefusal::X2apic),
        (0x8FF, MsrRefusal::X2apic),
        (0x9B, MsrRefusal::Smm),
        (0x9E, MsrRefusal::Smm),
        (0x79, MsrRefusal::Microcode),
        (0x8B, MsrRefusal::Microcode),
    ] {
        assert_eq!(msr_load(&entry(index, 0)), Err(refusal), "{index:#x}");
    }
    for index in [0xC000_0102, 0xC000_00FF, 0x7FF, 0x900, 0x174, 0xC000_0080, 0x9C, 0x7A, u32::MAX] {
        assert_eq!(msr_load(&entry(index, 0)), Ok(()), "{index:#x}");
        assert_eq!(msr_load(&entry(index, 1)), Err(MsrRefusal::Reserved), "{index:#x}");
    }
}

#[test]
fn what_may_be_stored() {
    assert_eq!(msr_store(&entry(0x9E, 0)), Err(MsrRefusal::Smm));
    assert_eq!(msr_store(&entry(0x8FF, 0)), Err(MsrRefusal::X2apic));
    assert_eq!(msr_store(&entry(0x174, 1 << 31)), Err(MsrRefusal::Reserved));
    for index in [0xC000_0100, 0x900, 0x7FF, 0x174, 0x9D] {
        assert_eq!(msr_store(&entry(index, 0)), Ok(()), "{index:#x}");
    }
}

#[test]
fn an_entry_in_memory() {
    let bytes = [0x74, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0x80];
    assert_eq!(MsrEntry::read_from_bytes(&bytes).unwrap(), MsrEntry { index: 0x174, reserved: 2, value: 1 << 63 | 3 });
}
