//! The authorisation of a direct flush: every condition, and one read of four bytes.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod partition_support;

use hvcore::addr::L1Gpa;
use hvcore::direct::{DirectFlush, Reason, authorise, is_direct};
use hvcore::memory::GuestMemory;
use hvcore::partition::{Interface, NestedCapabilities, Vendor, VpInterface};
use partition_support::{AMD, Ram, everything};
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::msr;

const PAGE: u64 = 0x3000;
const CALL: CallCode = CallCode::FLUSH_VIRTUAL_ADDRESS_LIST;

struct Setting {
    interface: Interface,
    vp: VpInterface,
    ram: Ram,
}

impl Setting {
    /// All conditions fulfilled.
    fn new() -> Self {
        Self::with(AMD)
    }

    fn with(nested: NestedCapabilities) -> Self {
        let interface = everything(Vendor::Amd).nested(nested).build().unwrap();
        let vp = interface.vp(2).unwrap();
        let setting = Self { interface, vp, ram: Ram::new(8) };
        setting.write(msr::GUEST_OS_ID, 1);
        setting.write(msr::VP_ASSIST_PAGE, PAGE | 1);
        setting.features(1);
        setting
    }

    fn write(&self, msr: u32, value: u64) {
        let _ = self.interface.msr_write(&self.vp, msr, value);
    }

    fn features(&self, features: u32) {
        self.ram.write(L1Gpa::new(PAGE + 0x20), &features.to_le_bytes()).unwrap();
    }

    fn ask(&self, in_context: bool, call: CallCode) -> DirectFlush {
        authorise(&self.interface, &self.vp, in_context, call, &self.ram)
    }
}

#[test]
fn the_four_calls_are_allowed_and_no_other() {
    let setting = Setting::new();
    for code in 0..=u16::MAX {
        let call = CallCode(code);
        let expected = [0x2, 0x3, 0x13, 0x14].contains(&code);
        assert_eq!(is_direct(call), expected);
        let answer = if expected { DirectFlush::Allowed } else { DirectFlush::Reflect(Reason::OtherCall) };
        assert_eq!(setting.ask(true, call), answer, "{call:?}");
    }
}

#[test]
fn one_read_of_four_bytes_at_most() {
    let setting = Setting::new();
    assert_eq!(setting.ask(true, CALL), DirectFlush::Allowed);
    assert_eq!((setting.ram.reads.get(), setting.ram.bytes_read.get()), (1, 4));
    assert_eq!(setting.ask(false, CALL), DirectFlush::Reflect(Reason::NotInContext));
    assert_eq!(setting.ask(true, CallCode::POST_MESSAGE), DirectFlush::Reflect(Reason::OtherCall));
    assert_eq!(setting.ram.reads.get(), 1, "refusals that need no page read none");
}

#[test]
fn each_condition_alone_reflects_and_is_live() {
    let setting = Setting::new();
    let allowed = || assert_eq!(setting.ask(true, CALL), DirectFlush::Allowed);
    let reflected = |reason| assert_eq!(setting.ask(true, CALL), DirectFlush::Reflect(reason));
    allowed();
    setting.features(0xFFFF_FFFE);
    reflected(Reason::NotGranted);
    setting.features(0xFFFF_FFFF);
    allowed();
    setting.write(msr::VP_ASSIST_PAGE, PAGE);
    reflected(Reason::NoAssistPage);
    setting.write(msr::VP_ASSIST_PAGE, PAGE | 1);
    allowed();
    setting.write(msr::GUEST_OS_ID, 0);
    reflected(Reason::NoOsId);
    setting.write(msr::GUEST_OS_ID, 1);
    allowed();
    setting.write(msr::VP_ASSIST_PAGE, 0x10_0001);
    reflected(Reason::AssistPageUnreadable);
    setting.vp.reset();
    reflected(Reason::NoAssistPage);
}

#[test]
fn a_partition_without_the_offer_reflects() {
    let setting = Setting::with(NestedCapabilities { direct_flush: false, ..AMD });
    assert_eq!(setting.ask(true, CALL), DirectFlush::Reflect(Reason::NotOffered));
}
