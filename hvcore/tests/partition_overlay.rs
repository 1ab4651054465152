//! Overlay pages: what engines read is what L1 sees, and RAM reappears.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod partition_support;

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::partition::{Interface, Overlay, OverlayMemory, ReferenceTsc, Vendor};
use partition_support::{Ram, everything};
use tlfs_abi::msr;
use tlfs_abi::msr::ReferenceTscPage;
use zerocopy::{FromBytes, IntoBytes};

const HYPERCALL: u64 = 0x2000;
const TSC: u64 = 0x4000;

fn enabled(vendor: Vendor) -> Interface {
    let interface = everything(vendor).build().unwrap();
    let vp = interface.vp(0).unwrap();
    let _ = interface.msr_write(&vp, msr::GUEST_OS_ID, 1);
    let _ = interface.msr_write(&vp, msr::HYPERCALL, HYPERCALL | 1);
    let _ = interface.msr_write(&vp, msr::REFERENCE_TSC, TSC | 1);
    interface
}

fn read(memory: &impl GuestMemory, gpa: u64, length: usize) -> Vec<u8> {
    let mut buf = vec![0; length];
    memory.read(L1Gpa::new(gpa), &mut buf).unwrap();
    buf
}

#[test]
fn the_hypercall_page_holds_the_vendor_s_instruction() {
    for (vendor, code) in [(Vendor::Intel, [0x0F, 0x01, 0xC1, 0xC3]), (Vendor::Amd, [0x0F, 0x01, 0xD9, 0xC3])] {
        let interface = enabled(vendor);
        let mut page = [0; 4096];
        interface.overlay_contents(Overlay::HypercallPage, 0, &mut page);
        assert_eq!(page[..4], code);
        assert!(page[4..].iter().all(|&byte| byte == 0xCC));
        assert_eq!(read(&OverlayMemory::new(Ram::new(8), &interface), HYPERCALL, 4096), page);
    }
}

#[test]
fn the_reference_tsc_page_holds_parameters_and_a_sequence() {
    let interface = enabled(Vendor::Intel);
    let memory = OverlayMemory::new(Ram::filled(8, 0xEE), &interface);
    let page = ReferenceTscPage::read_from_bytes(&read(&memory, TSC, 24)).unwrap();
    assert_eq!(page, ReferenceTscPage { tsc_sequence: 1, reserved_04: 0, tsc_scale: 1 << 60, tsc_offset: 7 });
    assert!(read(&memory, TSC + 24, 4096 - 24).iter().all(|&byte| byte == 0));
    let _ = interface.migrated(ReferenceTsc { scale: 3, offset: -4 });
    let page = ReferenceTscPage::read_from_bytes(&read(&memory, TSC, 24)).unwrap();
    assert_eq!((page.tsc_sequence, page.tsc_scale, page.tsc_offset as i64), (2, 3, -4));
}

#[test]
fn a_read_across_pages_sees_each_page_as_l1_does() {
    let interface = enabled(Vendor::Intel);
    let ram = Ram::filled(8, 0xEE);
    let memory = OverlayMemory::new(&ram, &interface);
    let bytes = read(&memory, HYPERCALL - 2, 0x3000 + 4);
    assert_eq!(bytes[..2], [0xEE; 2]);
    assert_eq!(bytes[2..6], [0x0F, 0x01, 0xC1, 0xC3]);
    assert_eq!(bytes[2 + 0x1000], 0xEE, "the RAM between the overlays");
    assert_eq!(bytes[2 + 0x2000], 1, "the sequence");
    assert_eq!(bytes[2 + 0x3000..], [0xEE; 2]);
    assert_eq!(read(&memory, HYPERCALL + 2, 4), [0xC1, 0xC3, 0xCC, 0xCC]);
}

#[test]
fn overlays_are_read_only_and_writes_beside_them_are_not() {
    let interface = enabled(Vendor::Intel);
    let ram = Ram::filled(8, 0xEE);
    let memory = OverlayMemory::new(&ram, &interface);
    for page in [HYPERCALL, TSC] {
        for (gpa, length, refused) in [
            (page, 1, true),
            (page + 4095, 1, true),
            (page - 1, 2, true),
            (page + 4095, 2, true),
            (page - 4, 4, false),
            (page + 4096, 4, false),
            (page - 0x800, 0x1801, true),
            (page, 0, false),
        ] {
            let expected = if refused { Err(MemoryError) } else { Ok(()) };
            assert_eq!(memory.write(L1Gpa::new(gpa), &vec![0xDD; length]), expected, "{gpa:#x} {length}");
        }
        let gpa = L1Gpa::new(page + 8);
        assert_eq!(memory.compare_exchange_u8(gpa, 0xEE, 1), Err(MemoryError));
        assert_eq!(memory.compare_exchange_u32(gpa, 0xEEEE_EEEE, 1), Err(MemoryError));
        assert_eq!(memory.compare_exchange_u64(gpa, 0xEEEE_EEEE_EEEE_EEEE, 1), Err(MemoryError));
        let beside = L1Gpa::new(page + 0x1008);
        assert_eq!(memory.compare_exchange_u8(beside, 0xEE, 1), Ok(Ok(0xEE)));
        assert_eq!(memory.compare_exchange_u32(beside, 0, 1), Ok(Err(0xEEEE_EE01)));
        assert_eq!(memory.compare_exchange_u64(beside, 0xEEEE_EEEE_EEEE_EE01, 1), Ok(Ok(0xEEEE_EEEE_EEEE_EE01)));
    }
    assert_eq!(read(&ram, HYPERCALL, 4096), vec![0xEE; 4096], "the RAM beneath is untouched");
}

#[test]
fn ram_reappears_when_an_overlay_goes() {
    let interface = enabled(Vendor::Amd);
    let vp = interface.vp(0).unwrap();
    let memory = OverlayMemory::new(Ram::filled(8, 0xEE), &interface);
    let _ = interface.msr_write(&vp, msr::REFERENCE_TSC, 0);
    assert_eq!(read(&memory, TSC, 4096), vec![0xEE; 4096]);
    assert_eq!(read(&memory, HYPERCALL, 4), [0x0F, 0x01, 0xD9, 0xC3]);
    let _ = interface.msr_write(&vp, msr::GUEST_OS_ID, 0);
    assert_eq!(read(&memory, HYPERCALL, 4096), vec![0xEE; 4096]);
    assert_eq!(memory.write(L1Gpa::new(HYPERCALL), &[1]), Ok(()));
}

#[test]
fn of_two_overlays_at_one_page_the_hypercall_page_is_seen() {
    let interface = enabled(Vendor::Intel);
    let vp = interface.vp(0).unwrap();
    let _ = interface.msr_write(&vp, msr::REFERENCE_TSC, HYPERCALL | 1);
    let memory = OverlayMemory::new(Ram::new(8), &interface);
    assert_eq!(read(&memory, HYPERCALL, 4), [0x0F, 0x01, 0xC1, 0xC3]);
    let _ = interface.msr_write(&vp, msr::HYPERCALL, 0);
    assert_eq!(read(&memory, HYPERCALL, 4), [1, 0, 0, 0]);
}

#[test]
fn an_overlay_shows_where_there_is_no_ram() {
    let interface = enabled(Vendor::Intel);
    let vp = interface.vp(0).unwrap();
    let beyond_ram = 0x10_0000;
    let _ = interface.msr_write(&vp, msr::HYPERCALL, beyond_ram | 1);
    let memory = OverlayMemory::new(Ram::new(8), &interface);
    assert_eq!(read(&memory, beyond_ram, 4), [0x0F, 0x01, 0xC1, 0xC3]);
    let mut buf = [0; 2];
    assert_eq!(memory.read(L1Gpa::new(beyond_ram + 4095), &mut buf), Err(MemoryError));
    assert_eq!(memory.read(L1Gpa::new(u64::MAX - 1), &mut buf), Err(MemoryError));
}

#[test]
fn accesses_elsewhere_are_one_access_of_the_ram() {
    let interface = enabled(Vendor::Intel);
    let ram = Ram::new(8);
    let memory = OverlayMemory::new(&ram, &interface);
    read(&memory, 0x5FF0, 0x20);
    assert_eq!((ram.reads.get(), ram.bytes_read.get()), (1, 0x20));
    assert_eq!(memory.beneath().reads.get(), 1);
}

#[test]
fn contents_beyond_the_page_are_zero() {
    let interface = enabled(Vendor::Intel);
    let mut out = [0xAA; 4];
    interface.overlay_contents(Overlay::HypercallPage, 4094, &mut out);
    assert_eq!(out, [0xCC, 0xCC, 0, 0]);
    interface.overlay_contents(Overlay::HypercallPage, usize::MAX, &mut out);
    assert_eq!(out.as_bytes(), [0; 4]);
}
