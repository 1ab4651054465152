//! Each synthetic MSR: its values, its reserved bits, its #GP rules, and what it asks of the embedder.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod partition_support;

use hvcore::addr::{L1Gpa, Level};
use hvcore::hypercall::{CallerMode, Width};
use hvcore::partition::{
    Action, CrashMessage, EmbedderRead, Interface, MsrRead, MsrWrite, Overlay, OverlayChange, PartitionConfig,
    ReenlightenmentInterrupt, ReferenceTsc, Vendor, VpInterface,
};
use partition_support::everything;
use tlfs_abi::msr;

struct Partition {
    interface: Interface,
    vp: VpInterface,
}

impl Partition {
    fn new(config: PartitionConfig) -> Self {
        let interface = config.build().unwrap();
        let vp = interface.vp(0).unwrap();
        Self { interface, vp }
    }

    fn full() -> Self {
        Self::new(everything(Vendor::Intel))
    }

    fn read(&self, msr: u32) -> MsrRead {
        self.interface.msr_read(&self.vp, msr, 1000)
    }

    fn value(&self, msr: u32) -> u64 {
        match self.read(msr) {
            MsrRead::Value(value) => value,
            other => panic!("{msr:#x} reads as {other:?}"),
        }
    }

    fn write(&self, msr: u32, value: u64) -> MsrWrite {
        self.interface.msr_write(&self.vp, msr, value)
    }

    fn action(&self, msr: u32, value: u64) -> Action {
        match self.write(msr, value) {
            MsrWrite::Embedder(action) => action,
            other => panic!("{msr:#x} := {value:#x} gives {other:?}"),
        }
    }

    /// A write that faults and leaves no trace.
    fn refuses(&self, msr: u32, value: u64) {
        let before = self.interface.save();
        let vp_before = self.vp.save();
        assert_eq!(self.write(msr, value), MsrWrite::Fault, "{msr:#x} := {value:#x}");
        assert_eq!((self.interface.save(), self.vp.save()), (before, vp_before));
    }
}

fn overlay(which: Overlay, from: Option<u64>, to: Option<u64>) -> Action {
    Action::Overlay(OverlayChange { which, from: from.map(L1Gpa::new), to: to.map(L1Gpa::new) })
}

#[test]
fn unregistered_msrs_fault_and_foreign_ones_are_not_mine() {
    let bare = Partition::new(PartitionConfig::new(Vendor::Amd, 4, 40));
    let always = [msr::GUEST_OS_ID, msr::HYPERCALL, msr::VP_INDEX];
    for &number in msr::ALL.iter().filter(|number| !always.contains(number)) {
        assert_eq!(bare.read(number), MsrRead::Fault, "{number:#x}");
        bare.refuses(number, 0);
    }
    for number in [0x10, 0x1B, 0x3FFF_FFFF, 0x4000_2000, 0x4B56_4D00, 0xC000_0080, u32::MAX] {
        assert_eq!(bare.read(number), MsrRead::NotMine, "{number:#x}");
        assert_eq!(bare.write(number, 0), MsrWrite::NotMine, "{number:#x}");
    }
    for number in [0x4000_0004, 0x4000_00FF, 0x4000_1FFF] {
        assert_eq!(bare.read(number), MsrRead::Fault);
        bare.refuses(number, 0);
    }
}

#[test]
fn msrs_that_nothing_serves_fault_even_with_everything_registered() {
    let full = Partition::full();
    let served = [
        msr::GUEST_OS_ID,
        msr::HYPERCALL,
        msr::VP_INDEX,
        msr::RESET,
        msr::TIME_REF_COUNT,
        msr::REFERENCE_TSC,
        msr::TSC_FREQUENCY,
        msr::APIC_FREQUENCY,
        msr::EOI,
        msr::ICR,
        msr::TPR,
        msr::VP_ASSIST_PAGE,
        msr::CRASH_P0,
        msr::CRASH_P1,
        msr::CRASH_P2,
        msr::CRASH_P3,
        msr::CRASH_P4,
        msr::CRASH_CTL,
        msr::REENLIGHTENMENT_CONTROL,
        msr::TSC_EMULATION_CONTROL,
        msr::TSC_EMULATION_STATUS,
        msr::NESTED_VP_INDEX,
    ];
    for &number in msr::ALL.iter().filter(|number| !served.contains(number)) {
        assert_eq!(full.read(number), MsrRead::Fault, "{number:#x}");
        full.refuses(number, 0);
    }
}

#[test]
fn guest_os_id_takes_any_value_and_enables_hypercalls() {
    let full = Partition::full();
    assert_eq!(full.value(msr::GUEST_OS_ID), 0);
    assert!(!full.interface.hypercalls_enabled());
    let mode = CallerMode { width: Width::Bits64, cpl: 0, protected: true };
    assert!(!full.interface.caller(mode, Level::L1).enabled);
    for bit in 0..64 {
        assert_eq!(full.write(msr::GUEST_OS_ID, 1 << bit), MsrWrite::Done);
        assert_eq!(full.value(msr::GUEST_OS_ID), 1 << bit);
        assert!(full.interface.hypercalls_enabled());
    }
    let caller = full.interface.caller(mode, Level::L1);
    assert!(caller.enabled);
    assert_eq!((caller.level, caller.privileges), (Level::L1, full.interface.privileges()));
}

#[test]
fn the_hypercall_page_needs_an_os_id_and_goes_with_it() {
    let full = Partition::full();
    assert_eq!(full.write(msr::HYPERCALL, 0x5001), MsrWrite::Done);
    assert_eq!(full.value(msr::HYPERCALL), 0x5000, "the enable bit stays zero");
    assert_eq!(full.interface.overlay(Overlay::HypercallPage), None);
    assert_eq!(full.write(msr::GUEST_OS_ID, 1), MsrWrite::Done);
    assert_eq!(full.value(msr::HYPERCALL), 0x5000, "and does not come by itself");

    assert_eq!(full.action(msr::HYPERCALL, 0x5001), overlay(Overlay::HypercallPage, None, Some(0x5000)));
    assert_eq!(full.interface.overlay(Overlay::HypercallPage), Some(L1Gpa::new(0x5000)));
    assert_eq!(full.write(msr::HYPERCALL, 0x5001), MsrWrite::Done, "no change, nothing to do");
    assert_eq!(full.action(msr::HYPERCALL, 0x7001), overlay(Overlay::HypercallPage, Some(0x5000), Some(0x7000)));
    assert_eq!(full.write(msr::GUEST_OS_ID, 2), MsrWrite::Done, "another id keeps the page");
    assert_eq!(full.action(msr::GUEST_OS_ID, 0), overlay(Overlay::HypercallPage, Some(0x7000), None));
    assert_eq!(full.value(msr::HYPERCALL), 0x7000);
    assert_eq!(full.interface.overlay(Overlay::HypercallPage), None);
    assert_eq!(full.write(msr::GUEST_OS_ID, 0), MsrWrite::Done);
    assert_eq!(full.write(msr::GUEST_OS_ID, 3), MsrWrite::Done);
    assert_eq!(full.interface.overlay(Overlay::HypercallPage), None, "it does not come back");
}

#[test]
fn the_hypercall_page_stays_in_the_gpa_space() {
    let full = Partition::full();
    let _ = full.write(msr::GUEST_OS_ID, 1);
    full.refuses(msr::HYPERCALL, 1 << 40 | 1);
    full.refuses(msr::HYPERCALL, 1 << 40);
    full.refuses(msr::HYPERCALL, 1 << 63 | 1);
    let last = (1 << 40) - 0x1000;
    assert_eq!(full.action(msr::HYPERCALL, last | 1), overlay(Overlay::HypercallPage, None, Some(last)));
}

#[test]
fn reserved_bits_of_the_hypercall_msr_are_preserved() {
    let full = Partition::full();
    let _ = full.write(msr::GUEST_OS_ID, 1);
    for bit in 2..12 {
        let _ = full.write(msr::HYPERCALL, 0x5000 | 1 << bit);
        assert_eq!(full.value(msr::HYPERCALL), 0x5000 | 1 << bit);
    }
}

#[test]
fn a_locked_hypercall_msr_is_immutable_until_reset() {
    let full = Partition::full();
    let _ = full.write(msr::GUEST_OS_ID, 1);
    assert_eq!(full.action(msr::HYPERCALL, 0x5003), overlay(Overlay::HypercallPage, None, Some(0x5000)));
    assert_eq!(full.value(msr::HYPERCALL), 0x5003);
    for value in [0, 0x5001, 0x5003, 0x7003] {
        full.refuses(msr::HYPERCALL, value);
    }
    // The id is gone, so the page is; the lock is not.
    assert_eq!(full.action(msr::GUEST_OS_ID, 0), overlay(Overlay::HypercallPage, Some(0x5000), None));
    let _ = full.write(msr::GUEST_OS_ID, 1);
    assert_eq!(full.value(msr::HYPERCALL), 0x5002);
    full.refuses(msr::HYPERCALL, 0x5001);
    full.interface.reset();
    assert_eq!(full.value(msr::HYPERCALL), 0);
    let _ = full.write(msr::GUEST_OS_ID, 1);
    assert_eq!(full.action(msr::HYPERCALL, 0x7001), overlay(Overlay::HypercallPage, None, Some(0x7000)));
}

#[test]
fn vp_index_is_read_only_and_each_vp_s_own() {
    let full = Partition::full();
    for index in [0, 7, 15] {
        let vp = full.interface.vp(index).unwrap();
        for number in [msr::VP_INDEX, msr::NESTED_VP_INDEX] {
            assert_eq!(full.interface.msr_read(&vp, number, 0), MsrRead::Value(u64::from(index)));
            assert_eq!(full.interface.msr_write(&vp, number, u64::from(index)), MsrWrite::Fault);
        }
    }
    assert!(full.interface.vp(16).is_none());
}

#[test]
fn reset_has_one_bit() {
    let full = Partition::full();
    assert_eq!(full.read(msr::RESET), MsrRead::Value(0));
    assert_eq!(full.write(msr::RESET, 0), MsrWrite::Done);
    assert_eq!(full.action(msr::RESET, 1), Action::Reset);
    for bit in 1..64 {
        full.refuses(msr::RESET, 1 << bit);
        full.refuses(msr::RESET, 1 << bit | 1);
    }
}

#[test]
fn the_reference_counter_is_strictly_increasing() {
    let full = Partition::full();
    let at = |now| full.interface.msr_read(&full.vp, msr::TIME_REF_COUNT, now);
    assert_eq!(at(50), MsrRead::Value(50));
    assert_eq!(at(50), MsrRead::Value(51));
    assert_eq!(at(49), MsrRead::Value(52), "a clock that went back does not show");
    assert_eq!(at(53), MsrRead::Value(53));
    assert_eq!(at(100), MsrRead::Value(100));
    full.refuses(msr::TIME_REF_COUNT, 0);
}

#[test]
fn the_reference_tsc_page_is_placed_and_preserves_reserved_bits() {
    let full = Partition::full();
    assert_eq!(full.value(msr::REFERENCE_TSC), 0);
    assert_eq!(full.action(msr::REFERENCE_TSC, 0x9001), overlay(Overlay::ReferenceTscPage, None, Some(0x9000)));
    for bit in 1..12 {
        assert_eq!(full.write(msr::REFERENCE_TSC, 0x9001 | 1 << bit), MsrWrite::Done);
        assert_eq!(full.value(msr::REFERENCE_TSC), 0x9001 | 1 << bit);
    }
    assert_eq!(full.action(msr::REFERENCE_TSC, 0xA001), overlay(Overlay::ReferenceTscPage, Some(0x9000), Some(0xA000)));
    let beyond = 1 << 40 | 1;
    assert_eq!(full.action(msr::REFERENCE_TSC, beyond), overlay(Overlay::ReferenceTscPage, Some(0xA000), None));
    assert_eq!(full.value(msr::REFERENCE_TSC), beyond, "legal, but nothing is there");
    assert_eq!(full.interface.overlay(Overlay::ReferenceTscPage), None);
    assert_eq!(full.write(msr::REFERENCE_TSC, 0), MsrWrite::Done);
}

#[test]
fn frequencies_are_read_only() {
    let full = Partition::full();
    assert_eq!(full.read(msr::TSC_FREQUENCY), MsrRead::Value(3_000_000_000));
    assert_eq!(full.read(msr::APIC_FREQUENCY), MsrRead::Value(200_000_000));
    full.refuses(msr::TSC_FREQUENCY, 3_000_000_000);
    full.refuses(msr::APIC_FREQUENCY, 200_000_000);
}

#[test]
fn apic_msrs_are_the_embedder_s_with_reserved_bits_checked() {
    let full = Partition::full();
    assert_eq!(full.read(msr::EOI), MsrRead::Fault, "write-only");
    assert_eq!(full.action(msr::EOI, 0xFFFF_FFFF), Action::Eoi(0xFFFF_FFFF));
    assert_eq!(full.read(msr::ICR), MsrRead::Embedder(EmbedderRead::Icr));
    assert_eq!(full.action(msr::ICR, 0x0300_0000_0000_40FE), Action::Icr(0x0300_0000_0000_40FE));
    assert_eq!(full.action(msr::ICR, u64::MAX), Action::Icr(u64::MAX));
    assert_eq!(full.read(msr::TPR), MsrRead::Embedder(EmbedderRead::Tpr));
    assert_eq!(full.action(msr::TPR, 0xFF), Action::Tpr(0xFF));
    for bit in 32..64 {
        full.refuses(msr::EOI, 1 << bit);
    }
    for bit in 8..64 {
        full.refuses(msr::TPR, 1 << bit);
    }
}

#[test]
fn the_vp_assist_page_is_each_vp_s_own() {
    let full = Partition::full();
    let other = full.interface.vp(1).unwrap();
    assert_eq!(full.vp.vp_assist_gpa(), None);
    assert_eq!(full.write(msr::VP_ASSIST_PAGE, 0xB001), MsrWrite::Done);
    assert_eq!(full.vp.vp_assist_gpa(), Some(L1Gpa::new(0xB000)));
    assert_eq!(other.vp_assist_gpa(), None);
    for bit in 1..12 {
        assert_eq!(full.write(msr::VP_ASSIST_PAGE, 0xB001 | 1 << bit), MsrWrite::Done);
        assert_eq!(full.value(msr::VP_ASSIST_PAGE), 0xB001 | 1 << bit, "RsvdP bits are preserved");
        assert_eq!(full.vp.vp_assist_gpa(), Some(L1Gpa::new(0xB000)));
    }
    for bit in 40..64 {
        full.refuses(msr::VP_ASSIST_PAGE, 1 << bit | 1);
    }
    assert_eq!(full.write(msr::VP_ASSIST_PAGE, 0xB000), MsrWrite::Done);
    assert_eq!(full.vp.vp_assist_gpa(), None, "disabled at once");
    assert_eq!(full.write(msr::VP_ASSIST_PAGE, (1 << 40) - 0x1000 + 1), MsrWrite::Done);
    full.vp.reset();
    assert_eq!((full.vp.vp_assist_gpa(), full.value(msr::VP_ASSIST_PAGE)), (None, 0));
}

#[test]
fn crash_parameters_and_control() {
    let full = Partition::full();
    for (index, number) in (msr::CRASH_P0..=msr::CRASH_P4).enumerate() {
        assert_eq!(full.write(number, 0x100 + index as u64), MsrWrite::Done);
        assert_eq!(full.value(number), 0x100 + index as u64);
    }
    assert_eq!(full.interface.crash_parameters(), [0x100, 0x101, 0x102, 0x103, 0x104]);
    assert_eq!(full.value(msr::CRASH_CTL), 3 << 62);
    assert_eq!(full.action(msr::CRASH_CTL, 1 << 63), Action::Crash(None));
    let message = |length| Some(CrashMessage { gpa: L1Gpa::new(0x103), length });
    assert_eq!(full.action(msr::CRASH_CTL, 3 << 62), Action::Crash(message(0x104)));
    for (given, length) in [(4095, 4095), (4096, 4096), (4097, 4096), (u64::MAX, 4096)] {
        let _ = full.write(msr::CRASH_P4, given);
        assert_eq!(full.action(msr::CRASH_CTL, 3 << 62), Action::Crash(message(length)));
    }
    assert_eq!(full.write(msr::CRASH_CTL, 1 << 62), MsrWrite::Done, "no notification, no crash");
    assert_eq!(full.write(msr::CRASH_CTL, 0), MsrWrite::Done);
    for bit in 0..62 {
        full.refuses(msr::CRASH_CTL, 1 << bit | 1 << 63);
    }
}

#[test]
fn a_crash_message_needs_support() {
    let quiet = Partition::new(PartitionConfig::new(Vendor::Amd, 1, 40).crash(false));
    assert_eq!(quiet.value(msr::CRASH_CTL), 1 << 63);
    quiet.refuses(msr::CRASH_CTL, 3 << 62);
    assert_eq!(quiet.action(msr::CRASH_CTL, 1 << 63), Action::Crash(None));
}

#[test]
fn reenlightenment_names_a_vector_and_a_vp() {
    let full = Partition::full();
    let tsc = ReferenceTsc { scale: 5, offset: 6 };
    assert_eq!(full.interface.migrated(tsc), None, "not asked for");
    let good = 15 << 32 | 1 << 16 | 0xEE;
    assert_eq!(full.write(msr::REENLIGHTENMENT_CONTROL, good), MsrWrite::Done);
    assert_eq!(full.value(msr::REENLIGHTENMENT_CONTROL), good);
    assert_eq!(full.interface.migrated(tsc), Some(ReenlightenmentInterrupt { vector: 0xEE, vp_index: 15 }));
    for bit in (8..16).chain(17..32) {
        full.refuses(msr::REENLIGHTENMENT_CONTROL, good | 1 << bit);
    }
    full.refuses(msr::REENLIGHTENMENT_CONTROL, 16 << 32 | 1 << 16 | 0xEE);
    full.refuses(msr::REENLIGHTENMENT_CONTROL, 1 << 16 | 15);
    assert_eq!(full.write(msr::REENLIGHTENMENT_CONTROL, 1 << 16 | 16), MsrWrite::Done);
    assert_eq!(full.write(msr::REENLIGHTENMENT_CONTROL, 0xFFFF << 32 | 3), MsrWrite::Done, "disabled: any target");
    assert_eq!(full.interface.migrated(tsc), None);
}

#[test]
fn tsc_emulation_is_opted_into_and_ended_by_the_guest() {
    let full = Partition::full();
    let tsc = ReferenceTsc { scale: 5, offset: 6 };
    let _ = full.interface.migrated(tsc);
    assert!(!full.interface.tsc_emulation());
    assert_eq!(full.write(msr::TSC_EMULATION_CONTROL, 1), MsrWrite::Done);
    assert_eq!(full.value(msr::TSC_EMULATION_CONTROL), 1);
    assert!(!full.interface.tsc_emulation(), "only from the next migration on");
    assert_eq!(full.write(msr::TSC_EMULATION_STATUS, 0), MsrWrite::Done);
    let _ = full.interface.migrated(tsc);
    assert!(full.interface.tsc_emulation());
    assert_eq!(full.value(msr::TSC_EMULATION_STATUS), 1);
    for bit in 0..64 {
        full.refuses(msr::TSC_EMULATION_STATUS, 1 << bit);
    }
    for bit in 1..64 {
        full.refuses(msr::TSC_EMULATION_CONTROL, 1 << bit);
    }
    assert_eq!(full.action(msr::TSC_EMULATION_STATUS, 0), Action::StopTscEmulation);
    assert!(!full.interface.tsc_emulation());
}

#[test]
fn reset_returns_every_msr_and_keeps_the_time() {
    let full = Partition::full();
    let fresh = full.interface.save();
    let _ = full.write(msr::GUEST_OS_ID, 1);
    for number in [msr::HYPERCALL, msr::REFERENCE_TSC, msr::CRASH_P2, msr::TSC_EMULATION_CONTROL] {
        let _ = full.write(number, 1);
    }
    let _ = full.write(msr::REENLIGHTENMENT_CONTROL, 1 << 16 | 0x20);
    let _ = full.read(msr::TIME_REF_COUNT);
    assert_ne!(full.interface.save(), fresh);
    full.interface.reset();
    let reset = full.interface.save();
    assert_eq!(reset.reference_time, 1000);
    assert_eq!(hvcore::partition::SavedPartition { reference_time: 0, ..reset }, fresh);
}
