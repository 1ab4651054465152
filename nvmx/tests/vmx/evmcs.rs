//! The VMX instructions while the enlightened VMCS is offered and active.

use core::sync::atomic::AtomicU64;

use hvcore::addr::{L1Gpa, Level};
use nvmx::evmcs::{ActivePage, ActivePages, Claim};
use nvmx::exit_reason::{self, VMLAUNCH, VMRESUME};
use nvmx::field::{Encoding, Field};
use nvmx::vmcs12::REVISION;
use nvmx::{Current, Entry, L1Exit};

use crate::rig::{ASSIST, EVMCS, End, OTHER, Rig, UD, VMCS12, VMXON, valid};

/// Offset of CleanFields.
const CLEAN: u64 = 0x338;
/// Offset of the VM-instruction error.
const ERROR: u64 = 0x2B0;
const ALL_CLEAN: u32 = 0xFFFF;

/// Writes `field` where the enlightened VMCS has it.
fn put(rig: &Rig, field: Field, value: u64) {
    let place = field.evmcs().unwrap();
    rig.write(EVMCS + u64::from(place.offset), &value.to_le_bytes()[..usize::from(place.size)]);
}

/// An L1 that has just launched L2 with this identity.
pub fn entered(vm_id: u64, vp_id: u32) -> Rig {
    let mut rig = announced();
    rig.write(EVMCS + 0x350, &vm_id.to_le_bytes());
    rig.write(EVMCS + 0x348, &vp_id.to_le_bytes());
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    rig
}

/// What L1's page has of `field`.
pub fn told(rig: &Rig, field: Field) -> u64 {
    let place = field.evmcs().unwrap();
    let bytes: [u8; 8] = rig.read(EVMCS + u64::from(place.offset));
    u64::from_le_bytes(bytes) & u64::MAX >> (64 - 8 * u32::from(place.size))
}

fn clean(rig: &Rig) -> u32 {
    u32::from_le_bytes(rig.read(EVMCS + CLEAN))
}

/// Announces the page at `gpa` in the VP assist page, or none.
fn announce(rig: &mut Rig, gpa: Option<u64>) {
    rig.assist_page = Some(L1Gpa::new(ASSIST));
    let mut head = [0; 16];
    head[0] = u8::from(gpa.is_some());
    head[8..].copy_from_slice(&gpa.unwrap_or(0).to_le_bytes());
    rig.write(ASSIST + 0x28, &head);
}

/// An L1 in VMX operation that has filled and announced its page.
fn announced() -> Rig {
    let mut rig = Rig::enlightened();
    assert_eq!(rig.vmxon(VMXON), End::Succeed);
    rig.region(EVMCS, 1);
    for (field, value) in valid(rig.nested.config()) {
        put(&rig, field, value);
    }
    announce(&mut rig, Some(EVMCS));
    rig
}

/// One that has entered L2 and is back.
fn active() -> Rig {
    let mut rig = announced();
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    back(&mut rig);
    rig
}

fn back(rig: &mut Rig) {
    rig.l2(exit_reason::CPUID);
    assert_eq!(rig.nested.level(), Level::L1);
}

#[test]
fn an_entry_makes_the_page_current_and_marks_it_clean() {
    let mut rig = announced();
    assert_eq!(rig.nested.current(), Current::None);
    assert_eq!(clean(&rig), 0);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(rig.nested.current(), Current::Enlightened(L1Gpa::new(EVMCS)));
    assert_eq!(clean(&rig), ALL_CLEAN);
    back(&mut rig);
    assert_eq!(told(&rig, Field::ExitReason), u64::from(exit_reason::CPUID));
}

#[test]
fn there_is_no_launch_state() {
    let mut rig = active();
    for reason in [VMLAUNCH, VMRESUME, VMRESUME, VMLAUNCH] {
        assert_eq!(rig.l1(reason), L1Exit::EnterL2);
        back(&mut rig);
    }
    let mut rig = announced();
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2, "the first one may be a VMRESUME");
}

#[test]
fn the_page_must_be_there_and_have_the_right_version() {
    for (version, good) in [(1, true), (REVISION, true), (2, false), (0, false)] {
        let mut rig = announced();
        rig.write(EVMCS, &version.to_le_bytes());
        if good {
            assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
        } else {
            assert_eq!(rig.end(VMLAUNCH), End::FailInvalid);
        }
    }
    for gpa in [EVMCS + 8, 0xF0_0000, u64::MAX] {
        let mut rig = announced();
        announce(&mut rig, Some(gpa));
        assert_eq!(rig.end(VMLAUNCH), UD, "{gpa:#x}");
        assert_eq!(rig.nested.current(), Current::None);
    }
}

#[test]
fn without_an_announcement_the_plain_vmcs_is_used() {
    let mut rig = announced();
    announce(&mut rig, None);
    assert_eq!(rig.end(VMLAUNCH), End::FailInvalid);
    rig.region(VMCS12, REVISION);
    assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
    rig.vmwrite_valid();
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(VMCS12)));
    back(&mut rig);
    // An announcement later takes over; the plain VMCS goes to memory.
    announce(&mut rig, Some(EVMCS));
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.nested.current(), Current::Enlightened(L1Gpa::new(EVMCS)));
    assert_eq!(rig.stored(VMCS12).get(Field::ExitReason), u64::from(exit_reason::CPUID));
    back(&mut rig);
    // Withdrawn, and nothing is current.
    announce(&mut rig, None);
    assert_eq!(rig.end(VMRESUME), End::FailInvalid);
    assert_eq!(rig.nested.current(), Current::None);
}

#[test]
fn what_is_not_offered_is_not_looked_for() {
    let mut rig = Rig::filled();
    announce(&mut rig, Some(EVMCS));
    rig.region(EVMCS, 1);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(VMCS12)));
}

#[test]
fn vmread_sees_the_fields_of_the_page() {
    let mut rig = active();
    assert_eq!(rig.vmread(Field::ExitReason.encoding()), (End::Succeed, exit_reason::CPUID.into()));
    assert_eq!(rig.vmread(Field::HostRip.encoding()), (End::Succeed, 0xB000));
    for field in Field::ALL {
        let end = if field.evmcs().is_some() { End::Succeed } else { End::FailValid(12) };
        assert_eq!(rig.vmread(field.encoding()).0, end, "{field:?}");
    }
    assert_eq!(rig.vmread(Encoding(0x7FFE)).0, End::FailValid(12));
}

#[test]
fn vmwrite_fails() {
    let mut rig = active();
    assert_eq!(rig.vmwrite(Field::GuestRip.encoding(), 1), End::FailInvalid);
    assert_eq!(rig.vmread(Field::GuestRip.encoding()), (End::Succeed, 0x9000));
}

#[test]
fn vmptrld_is_refused_until_the_page_is_cleared() {
    let mut rig = active();
    rig.region(OTHER, REVISION);
    assert_eq!(rig.vmptrld(OTHER), End::FailInvalid);
    assert_eq!(rig.vmptrst(), (End::Succeed, u64::MAX));
    assert_eq!(rig.vmptrld(1), End::FailValid(9), "the checks of the address come first");
    assert_eq!(u32::from_le_bytes(rig.read(EVMCS + ERROR)), 9);
    assert_eq!(rig.vmptrld(VMXON), End::FailValid(10));
    assert_eq!(rig.vmclear(EVMCS), End::Succeed);
    assert_eq!(rig.nested.current(), Current::None);
    assert_eq!(rig.vmptrld(OTHER), End::Succeed);
    // Or until it is not announced any more.
    let mut rig = active();
    rig.region(OTHER, REVISION);
    announce(&mut rig, None);
    assert_eq!(rig.vmptrld(OTHER), End::Succeed);
    assert_eq!(rig.nested.current(), Current::Plain(L1Gpa::new(OTHER)));
}

#[test]
fn vmclear_deactivates_the_page_and_leaves_its_bytes() {
    let mut rig = active();
    let before: [u8; 4096] = rig.read(EVMCS);
    assert_eq!(rig.vmclear(OTHER), End::Succeed);
    assert_eq!(rig.nested.current(), Current::Enlightened(L1Gpa::new(EVMCS)), "another page");
    assert_eq!(rig.vmclear(EVMCS), End::Succeed);
    assert_eq!(rig.vmclear(EVMCS), End::Succeed);
    assert_eq!(rig.read::<4096>(EVMCS), before);
    assert_eq!(rig.nested.current(), Current::None);
    assert_eq!(rig.nested.enlightenments().vm_id, 0);
    // An entry loads it anew, whatever the clean bits say.
    assert_eq!(clean(&rig), ALL_CLEAN);
    put(&rig, Field::GuestRsp, 0x1230);
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2);
    assert_eq!(rig.nested.vmcs12().get(Field::GuestRsp), 0x1230);
}

#[test]
fn identity_is_read_at_every_entry() {
    let mut rig = active();
    assert_eq!((rig.nested.enlightenments().vm_id, rig.nested.enlightenments().vp_id), (0, 0));
    rig.write(EVMCS + 0x350, &77u64.to_le_bytes());
    rig.write(EVMCS + 0x348, &5u32.to_le_bytes());
    assert_eq!(clean(&rig), ALL_CLEAN, "without a clean bit being cleared");
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2);
    assert_eq!((rig.nested.context().vm_id, rig.nested.context().vp_id), (77, 5));
}

#[test]
fn failures_are_told_in_the_page() {
    let mut rig = active();
    let pins = told(&rig, Field::PinBasedControls);
    for (field, bad, good, error) in [(Field::PinBasedControls, 0, pins, 7), (Field::HostCr3, u64::MAX, 0x7_1000, 8)] {
        rig.write(EVMCS + CLEAN, &0u32.to_le_bytes());
        put(&rig, field, bad);
        assert_eq!(rig.end(VMRESUME), End::FailValid(error));
        assert_eq!(u32::from_le_bytes(rig.read(EVMCS + ERROR)), error);
        assert_eq!(clean(&rig), 0, "not entered, not clean");
        put(&rig, field, good);
    }
    assert_eq!(rig.l1(VMRESUME), L1Exit::EnterL2);
    back(&mut rig);
    // A guest state that is bad: an exit, told in the page as well.
    put(&rig, Field::GuestRflags, 0);
    rig.write(EVMCS + CLEAN, &0u32.to_le_bytes());
    assert_eq!(rig.l1(VMRESUME), L1Exit::Resume);
    assert_eq!(told(&rig, Field::ExitReason), 0x8000_0021);
}

#[test]
fn vmxoff_deactivates_the_page() {
    let mut rig = active();
    assert_eq!(rig.end(exit_reason::VMXOFF), End::Succeed);
    assert_eq!(rig.nested.current(), Current::None);
    assert_eq!(rig.vmxon(VMXON), End::Succeed);
    assert_eq!(rig.vmread(Field::ExitReason.encoding()).0, End::FailInvalid);
}

/// L1 runs on the rig's VP.
fn run_l1(rig: &mut Rig) {
    rig.call(|nested, machine| assert!(matches!(nested.prepare_entry(machine), Entry::Run(_))));
}

#[test]
fn a_page_is_active_on_one_vp() {
    let words: &'static [AtomicU64] = Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect());
    let pages = ActivePages::new(words);
    let page = L1Gpa::new(EVMCS);
    let mut rig = announced();
    rig.active_evmcs = Some(ActivePage { pages, vp: 0 });
    assert_eq!(pages.claim(1, page), Claim::Taken);
    assert_eq!(rig.end(VMLAUNCH), End::FailInvalid, "L2 runs on it on the other VP");
    pages.leave(1);
    assert_eq!(rig.l1(VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(pages.claim(1, page), Claim::Refused, "L2 runs on it on this VP");
    back(&mut rig);
    run_l1(&mut rig);
    assert_eq!(pages.claim(1, page), Claim::Taken);
    pages.leave(1);
    // It was elsewhere: what the clean bits say is not for this VP.
    put(&rig, Field::GuestCr3, 0x5000);
    assert_eq!((clean(&rig), rig.l1(VMRESUME)), (ALL_CLEAN, L1Exit::EnterL2));
    assert_eq!(rig.vmcs02.peek(Field::GuestCr3), 0x5000);
}

#[test]
fn an_entry_that_fails_leaves_the_page() {
    let words: &'static [AtomicU64] = Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect());
    let pages = ActivePages::new(words);
    let mut rig = announced();
    rig.active_evmcs = Some(ActivePage { pages, vp: 0 });
    put(&rig, Field::PinBasedControls, 0);
    assert_eq!(rig.end(VMLAUNCH), End::FailValid(7));
    run_l1(&mut rig);
    assert_eq!(pages.claim(1, L1Gpa::new(EVMCS)), Claim::Taken);
}
