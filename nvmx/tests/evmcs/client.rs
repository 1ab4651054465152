//! What the client finds, and which bits its writes touch.

use core::sync::atomic::Ordering;

use hvcore::addr::L1Gpa;
use nvmx::evmcs::client::{AssistPage, Evmcs, EvmcsOffer, NoContext, NotCarried};
use nvmx::evmcs::{EvmcsCache, current_evmcs};
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;
use tlfs_abi::evmcs::EvmcsUse;

use crate::memory::*;

const ALL: u32 = 0xFFFF;
const RECOMMENDED: u32 = 1 << 14;

#[test]
fn the_offer_is_what_the_leaves_say() {
    let with = |eax, ebx| EvmcsOffer::from_leaves(RECOMMENDED, eax, ebx);
    assert_eq!(with(0x0101, 0), EvmcsOffer { evmcs: true, ..EvmcsOffer::default() });
    let all =
        EvmcsOffer { evmcs: true, direct_flush: true, msr_bitmap: true, guest_debugctl: true, perf_global_ctrl: true };
    assert_eq!(with(0x0101 | 1 << 17 | 1 << 19 | 1 << 21, 1), all);
    for (versions, usable) in
        [(0x0101, true), (0x0201, true), (0x0100, true), (0x0202, false), (0x0001, false), (0, false)]
    {
        assert_eq!(with(versions | 1 << 17, 1).evmcs, usable, "{versions:#x}");
        assert_eq!(with(versions | 1 << 17, 1) == EvmcsOffer::default(), !usable, "nothing else without it");
    }
    assert_eq!(EvmcsOffer::from_leaves(!RECOMMENDED, 0xFFFF_0101, 1), EvmcsOffer::default());
}

/// A page that L0 has entered with: everything is clean.
fn clean(memory: &Memory) -> Evmcs<'_> {
    let evmcs = Evmcs::new(memory.shared(PAGE), L1Gpa::new(PAGE));
    let (mut cache, mut vmcs12) = (EvmcsCache::new(), Vmcs12::default());
    cache.load(memory, L1Gpa::new(PAGE), true, &mut vmcs12).unwrap();
    cache.entered(memory).unwrap();
    evmcs
}

#[test]
fn a_new_page_is_version_1_and_wholly_dirty() {
    let memory = Memory::new();
    fill(&memory, PAGE, 3);
    let evmcs = Evmcs::new(memory.shared(PAGE), L1Gpa::new(PAGE));
    assert_eq!(memory.get(PAGE, 0, 8), 1);
    assert!(memory.bytes(PAGE + 8, 4088).iter().all(|byte| *byte == 0));
    assert_eq!((evmcs.gpa(), evmcs.clean_fields().raw()), (L1Gpa::new(PAGE), 0));
}

#[test]
fn a_write_clears_the_bit_of_its_group_and_changes_its_bytes_only() {
    for field in Field::ALL {
        let memory = Memory::new();
        let mut evmcs = clean(&memory);
        let before = memory.bytes(PAGE, 4096);
        let Some(place) = field.evmcs() else {
            assert_eq!(evmcs.write(*field, 1), Err(NotCarried), "{field:?}");
            assert_eq!(evmcs.read(*field), Err(NotCarried));
            assert_eq!(memory.bytes(PAGE, 4096), before);
            continue;
        };
        evmcs.write(*field, u64::MAX).unwrap();
        let group = match place.usage {
            EvmcsUse::Group(group) => group,
            _ => 0,
        };
        assert_eq!(evmcs.clean_fields().raw(), ALL & !group, "{field:?}");
        assert_eq!(memory.field(PAGE, *field), field.mask(), "cut to its width");
        assert_eq!(evmcs.read(*field), Ok(field.mask()));
        let own = usize::from(place.offset)..usize::from(place.offset) + usize::from(place.size);
        let after = memory.bytes(PAGE, 4096);
        for at in (0..4096).filter(|at| !own.contains(at) && !(0x338..0x33C).contains(at)) {
            assert_eq!(before[at], after[at], "{field:?} {at:#x}");
        }
    }
}

#[test]
fn the_same_value_again_leaves_the_group_clean() {
    let memory = Memory::new();
    let mut evmcs = clean(&memory);
    evmcs.write(Field::GuestCr3, 0).unwrap();
    evmcs.write(Field::GuestSsAccessRights, 0xFFFE_0F00).unwrap();
    assert_eq!(evmcs.clean_fields().raw(), ALL);
    evmcs.write(Field::GuestCr3, 0x1000).unwrap();
    assert_eq!(evmcs.clean_fields().raw(), ALL & !(1 << 8));
}

#[test]
fn every_change_of_the_context_clears_bit_15() {
    let memory = Memory::new();
    let mut evmcs = clean(&memory);
    let assist = L1Gpa::new(0xA000);
    for (vm, vp, page, dirty) in [
        (5, 1, assist, true),
        (5, 1, assist, false),
        (6, 1, assist, true),
        (6, 2, assist, true),
        (6, 2, L1Gpa::new(0xB000), true),
    ] {
        memory.set_clean(PAGE, ALL);
        evmcs.set_context(vm, vp, page);
        assert_eq!(evmcs.clean_fields().raw(), if dirty { ALL & !(1 << 15) } else { ALL });
        assert_eq!(memory.get(PAGE, 0x348, 4), u64::from(vp));
        assert_eq!((memory.get(PAGE, 0x350, 8), memory.get(PAGE, 0x358, 8)), (vm, page.raw()));
    }
}

#[test]
fn direct_flush_waits_for_the_context() {
    let memory = Memory::new();
    let mut evmcs = clean(&memory);
    assert_eq!(evmcs.set_direct_flush(true), Err(NoContext));
    assert_eq!(memory.get(PAGE, 0x344, 4), 0);
    evmcs.set_context(1, 0, L1Gpa::new(0xA000));
    assert_eq!(evmcs.set_direct_flush(true), Ok(()));
    assert_eq!(memory.get(PAGE, 0x344, 4), 1);
    evmcs.set_enlightened_msr_bitmap(true);
    assert_eq!(memory.get(PAGE, 0x344, 4), 3);
    assert_eq!(evmcs.set_direct_flush(false), Ok(()));
    assert_eq!(memory.get(PAGE, 0x344, 4), 2);
    evmcs.set_enlightened_msr_bitmap(false);
    assert_eq!(memory.get(PAGE, 0x344, 4), 0);
}

#[test]
fn changes_of_the_msr_bitmap_and_reloads() {
    let memory = Memory::new();
    let mut evmcs = clean(&memory);
    evmcs.msr_bitmap_changed();
    assert_eq!(evmcs.clean_fields().raw(), ALL & !(1 << 1));
    evmcs.reload();
    assert_eq!(evmcs.clean_fields().raw(), 0);
}

#[test]
fn the_assist_page_says_what_the_host_reads() {
    let memory = Memory::new();
    let page = memory.shared(ASSIST);
    for word in page {
        word.store(u64::MAX, Ordering::Relaxed);
    }
    let asks = || current_evmcs(&memory, Some(L1Gpa::new(ASSIST))).map(L1Gpa::raw);
    assert_eq!(asks(), Some(u64::MAX));
    let mut assist = AssistPage::new(page);
    assert_eq!(asks(), None);
    assert_eq!(memory.get(ASSIST, 0x20, 4), 0xFFFF_FFFE, "other features stay as they are");
    assist.set_current(Some(L1Gpa::new(PAGE)));
    assert_eq!(asks(), Some(PAGE));
    assist.grant_direct_flush(true);
    assert_eq!(memory.get(ASSIST, 0x20, 4), 0xFFFF_FFFF);
    assist.set_current(Some(L1Gpa::new(OTHER)));
    assert_eq!(asks(), Some(OTHER));
    assist.set_current(None);
    assert_eq!(asks(), None);
    let touched = |at: u64| (0x20..0x24).contains(&at) || (0x28..0x29).contains(&at) || (0x30..0x38).contains(&at);
    assert!((0..4096).all(|at| touched(at) || memory.byte(ASSIST + at) == 0xFF));
}
