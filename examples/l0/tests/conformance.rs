//! The conformance suite of the embedder's contract on L0's own implementations, as a program of the host.

use hvcore::addr::L1Gpa;
use hvcore::partition::Overlay;
use l0::l1map::IdentityMap;
use l0::memory::{DIRECT_MAP, FOUR_GIB, L1Memory, Overlays, Range};
use tests::conformance::{guest_memory, l1_map};

const LOW_END: u64 = 8 << 20;
const HIGH_END: u64 = FOUR_GIB + (2 << 20);
/// Where L0 would live.
const HOLE: Range = Range { start: 4 << 20, end: 6 << 20 };
const ONES: u64 = 0x3f_f000;

/// RAM at the direct map, once for all tests.
fn ram() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for (start, end) in [(0, LOW_END), (FOUR_GIB, HIGH_END)] {
            let at = (DIRECT_MAP + start) as *mut libc::c_void;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: new memory where this process has none.
            let got =
                unsafe { libc::mmap(at, (end - start) as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            assert_eq!(got, at, "the address space is free there");
        }
    });
}

/// L1's memory with overlays of its own.
fn memory() -> (L1Memory, &'static Overlays) {
    ram();
    let overlays: &'static Overlays = Box::leak(Box::default());
    // SAFETY: `ram` mapped all of it, and nothing else lives there.
    (unsafe { L1Memory::new(LOW_END, HIGH_END, HOLE, overlays) }, overlays)
}

/// Each test's pages are its own.
#[test]
fn l1s_memory_conforms() {
    let (memory, overlays) = memory();
    let nothing = [HOLE.start, HOLE.end - 8, LOW_END, FOUR_GIB - 0x1000, HIGH_END, 1 << 45];
    let pairs = [0x4000, HOLE.start - 0x2000, HOLE.end, LOW_END - 0x2000, FOUR_GIB, HIGH_END - 0x2000];
    for (ram, nothing) in pairs.into_iter().zip(nothing) {
        assert_eq!(guest_memory(&memory, L1Gpa::new(ram), L1Gpa::new(nothing)), Ok(()), "{ram:#x} {nothing:#x}");
    }
    // An overlay nearby changes nothing, one on the page does: it cannot be written.
    overlays.place(Overlay::ALL[0], Some(0xb000), 0x10_0000);
    assert_eq!(guest_memory(&memory, L1Gpa::new(0x9000), L1Gpa::new(LOW_END)), Ok(()));
    assert!(guest_memory(&memory, L1Gpa::new(0xa000), L1Gpa::new(LOW_END)).is_err());
    overlays.place(Overlay::ALL[0], None, 0);
    assert_eq!(guest_memory(&memory, L1Gpa::new(0xa000), L1Gpa::new(LOW_END)), Ok(()));
}

#[test]
fn what_is_not_l1s_is_found() {
    let (memory, _) = memory();
    // The hole is no memory; said to be RAM, it is refused, and RAM that is said to be none is found.
    assert!(guest_memory(&memory, L1Gpa::new(HOLE.start), L1Gpa::new(LOW_END)).is_err());
    assert!(guest_memory(&memory, L1Gpa::new(0x2_0000), L1Gpa::new(0x3_0000)).is_err());
}

#[test]
fn l0s_map_conforms() {
    let (_, overlays) = memory();
    let map = IdentityMap { hole: HOLE, ones: ONES, address_bits: 40, overlays };
    let own = |hpa: u64| HOLE.contains(hpa);
    let apic = 0xfee0_0000u64;
    let places = [0, 0x1234, HOLE.start - 1, HOLE.start, HOLE.end - 1, HOLE.end, LOW_END, apic, apic + 0x1000];
    let pages = || places.into_iter().chain([apic - 1, FOUR_GIB, (1 << 40) - 1, 1 << 40]).map(L1Gpa::new);
    assert_eq!(l1_map(&map, pages(), own), Ok(()));
    overlays.place(Overlay::ALL[0], Some(0x1000), 0x10_0000);
    assert_eq!(l1_map(&map, pages(), own), Ok(()));
    // The control: a map that does not know where L0 lives shows it to L1.
    let open = IdentityMap { hole: Range::default(), ..map };
    assert!(l1_map(&open, pages(), own).is_err());
}
