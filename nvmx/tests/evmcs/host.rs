//! What L0 reads and writes, and when.

use hvcore::addr::L1Gpa;
use nvmx::evmcs::{EvmcsCache, LoadError, Loaded, current_evmcs};
use nvmx::field::{Area, Field};
use nvmx::groups;
use nvmx::vmcs12::{REVISION, Vmcs12};

use crate::memory::*;

const ALL: u32 = 0xFFFF;

fn load(cache: &mut EvmcsCache, memory: &Memory, vmcs12: &mut Vmcs12) -> Result<Loaded, LoadError> {
    cache.load(memory, L1Gpa::new(PAGE), false, vmcs12)
}

/// A cache that has entered the page once.
fn entered(memory: &Memory) -> (EvmcsCache, Vmcs12) {
    let (mut cache, mut vmcs12) = (EvmcsCache::new(), Vmcs12::default());
    fill(memory, PAGE, 0);
    assert_eq!(load(&mut cache, memory, &mut vmcs12), Ok(Loaded { changed: groups::ALL, reloaded: true }));
    cache.entered(memory).unwrap();
    memory.rest();
    (cache, vmcs12)
}

#[test]
fn a_first_load_takes_every_field() {
    for memory in [Memory::new(), Memory::lending()] {
        let (mut cache, mut vmcs12) = (EvmcsCache::new(), Vmcs12::default());
        vmcs12.set(Field::Cr3TargetCount, 3);
        fill(&memory, PAGE, 0);
        // Clean bits say nothing about a page that is new.
        memory.set_clean(PAGE, ALL);
        assert_eq!(load(&mut cache, &memory, &mut vmcs12), Ok(Loaded { changed: groups::ALL, reloaded: true }));
        assert!(is_filled(&vmcs12, 0));
        assert_eq!(cache.active(), Some(L1Gpa::new(PAGE)));
        assert!(memory.reads_are_disjoint());
        assert!(memory.lends || memory.reads.borrow().len() <= 8, "{:x?}", memory.reads.borrow());
        assert!(memory.bytes_read() <= 1024);
    }
}

#[test]
fn the_fill_differs_from_another() {
    let memory = Memory::new();
    let (_, vmcs12) = entered(&memory);
    assert!(is_filled(&vmcs12, 0) && !is_filled(&vmcs12, 1));
}

#[test]
fn all_clean_costs_the_version_and_what_is_live() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    fill(&memory, PAGE, 1);
    memory.set_clean(PAGE, ALL);
    memory.set(ASSIST, 0x28, 1, 1);
    memory.set(ASSIST, 0x30, 8, PAGE);
    let gpa = current_evmcs(&memory, Some(L1Gpa::new(ASSIST))).unwrap();
    assert_eq!(cache.load(&memory, gpa, false, &mut vmcs12), Ok(Loaded { changed: groups::OTHER, reloaded: false }));
    cache.entered(&memory).unwrap();
    assert_eq!(cache.load(&memory, gpa, false, &mut vmcs12), Ok(Loaded { changed: 0, reloaded: false }));
    assert_eq!(memory.bytes_read(), 80 + 64);
    assert_eq!(memory.reads.borrow().len(), 3 + 2);
    assert!(memory.writes.borrow().is_empty(), "the bits are set already");
    for field in placed() {
        let live = matches!(field, Field::GuestRip | Field::TprThreshold);
        let salt = u64::from(live);
        if field.area() != Area::ExitInformation {
            assert_eq!(vmcs12.get(field), value(field, salt), "{field:?}");
        }
    }
}

#[test]
fn each_group_is_read_when_it_is_not_clean_and_only_then() {
    for group in 0..15u32 {
        for lends in [false, true] {
            let memory = if lends { Memory::lending() } else { Memory::new() };
            let (mut cache, mut vmcs12) = entered(&memory);
            fill(&memory, PAGE, 1);
            memory.set_clean(PAGE, ALL & !(1 << group));
            assert_eq!(
                load(&mut cache, &memory, &mut vmcs12),
                Ok(Loaded { changed: 1 << group | groups::OTHER, reloaded: false })
            );
            for field in placed() {
                let new = field.group() == 1 << group || matches!(field, Field::GuestRip | Field::TprThreshold);
                if field.area() != Area::ExitInformation {
                    assert_eq!(vmcs12.get(field), value(field, u64::from(new)), "{group} {field:?}");
                }
            }
            assert!(memory.reads_are_disjoint());
            cache.entered(&memory).unwrap();
            assert_eq!(memory.clean(PAGE), ALL);
            assert_eq!(*memory.writes.borrow(), [(PAGE + 0x338, 4)]);
        }
    }
}

#[test]
fn a_group_that_was_clean_is_whole_when_it_is_read_later() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    fill(&memory, PAGE, 1);
    // The words of CONTROL_PROC are read along with those of GUEST_BASIC, but not taken.
    memory.set_clean(PAGE, ALL & !(1 << 10));
    load(&mut cache, &memory, &mut vmcs12).unwrap();
    assert_eq!(vmcs12.get(Field::PrimaryControls), value(Field::PrimaryControls, 0));
    assert_eq!(vmcs12.get(Field::GuestRflags), value(Field::GuestRflags, 1));
    memory.set_clean(PAGE, ALL & !(1 << 4));
    load(&mut cache, &memory, &mut vmcs12).unwrap();
    assert_eq!(vmcs12.get(Field::PrimaryControls), value(Field::PrimaryControls, 1));
}

#[test]
fn vmlaunch_another_page_and_a_release_reload_everything() {
    let memory = Memory::new();
    for (launch, page, release, reloaded) in
        [(false, PAGE, false, false), (true, PAGE, false, true), (false, OTHER, false, true), (false, PAGE, true, true)]
    {
        let (mut cache, mut vmcs12) = entered(&memory);
        fill(&memory, page, 1);
        memory.set_clean(page, ALL);
        if release {
            cache.release();
            assert_eq!((cache.active(), cache.enlightenments().vm_id), (None, 0));
        }
        vmcs12.set(Field::Cr3TargetCount, 3);
        let loaded = cache.load(&memory, L1Gpa::new(page), launch, &mut vmcs12).unwrap();
        assert_eq!(loaded, Loaded { changed: if reloaded { groups::ALL } else { groups::OTHER }, reloaded });
        assert_eq!(is_filled(&vmcs12, 1), reloaded);
        assert_eq!(vmcs12.get(Field::Cr3TargetCount), if reloaded { 0 } else { 3 });
        assert_eq!(cache.active(), Some(L1Gpa::new(page)));
    }
}

#[test]
fn synthetic_fields_are_read_at_every_entry() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    memory.set(PAGE, 0x344, 4, 1);
    memory.set(PAGE, 0x348, 4, 7);
    memory.set(PAGE, 0x350, 8, 0x1234_5678_9ABC);
    memory.set(PAGE, 0x358, 8, 0xA000);
    assert_eq!(memory.clean(PAGE), ALL, "bit 15 among them");
    load(&mut cache, &memory, &mut vmcs12).unwrap();
    let got = cache.enlightenments();
    assert!(got.control.nested_flush_virtual_hypercall());
    assert_eq!((got.vp_id, got.vm_id, got.partition_assist_page), (7, 0x1234_5678_9ABC, 0xA000));
}

#[test]
fn only_known_revisions_are_taken() {
    for (version, good) in [(1, true), (u64::from(REVISION), true), (0, false), (2, false), (0xFFFF_FFFF, false)] {
        let memory = Memory::new();
        let (mut cache, mut vmcs12) = entered(&memory);
        memory.set(PAGE, 0, 4, version);
        let loaded = load(&mut cache, &memory, &mut vmcs12);
        assert_eq!(loaded.err(), (!good).then_some(LoadError::Revision), "{version:#x}");
        assert_eq!(cache.active().is_some(), good);
    }
}

#[test]
fn pages_that_are_none_are_unreadable() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    for bad in [PAGE + 8, 0xDEAD_BEEF, 0xA000, u64::MAX, u64::MAX << 12] {
        let loaded = cache.load(&memory, L1Gpa::new(bad), false, &mut vmcs12);
        assert_eq!(loaded, Err(LoadError::Unreadable), "{bad:#x}");
        assert_eq!(cache.active(), None);
    }
    assert!(cache.load(&memory, L1Gpa::new(PAGE), false, &mut vmcs12).unwrap().reloaded);
}

#[test]
fn the_assist_page_names_the_page() {
    let memory = Memory::new();
    memory.set(ASSIST, 0x30, 8, PAGE);
    let ask = |assist: u64| current_evmcs(&memory, Some(L1Gpa::new(assist)));
    assert_eq!(ask(ASSIST), None, "EnlightenVmEntry is 0");
    memory.set(ASSIST, 0x28, 1, 1);
    assert_eq!(ask(ASSIST), Some(L1Gpa::new(PAGE)));
    assert_eq!(*memory.reads.borrow(), [(ASSIST + 0x28, 16); 2]);
    assert_eq!(current_evmcs(&memory, None), None);
    for bad in [0xA000, u64::MAX << 12] {
        assert_eq!(ask(bad), None);
    }
}

/// The fields that an exit saves, by their meaning.
fn saved_by_an_exit(field: Field) -> bool {
    match field.area() {
        Area::ExitInformation => true,
        Area::Guest => !matches!(field, Field::VmcsLinkPointer | Field::GuestPerfGlobalCtrl),
        _ => matches!(field, Field::EntryControls | Field::EntryInterruptionInfo),
    }
}

#[test]
fn an_exit_writes_what_it_saves_and_nothing_else() {
    for memory in [Memory::new(), Memory::lending()] {
        let (mut cache, mut vmcs12) = entered(&memory);
        for field in Field::ALL {
            vmcs12.set(*field, value(*field, 2));
        }
        let before = memory.bytes(PAGE, 4096);
        cache.store(&memory, &vmcs12).unwrap();
        // A page that is lent is written in place, but for the halves of words that are shared with L1's fields.
        assert_eq!(memory.writes.borrow().len(), if memory.lends { 3 } else { 7 }, "{:x?}", memory.writes.borrow());
        let mut allowed = vec![false; 4096];
        for field in placed() {
            let place = field.evmcs().unwrap();
            let salt = if saved_by_an_exit(field) { 2 } else { 0 };
            assert_eq!(memory.field(PAGE, field), value(field, salt), "{field:?}");
            allowed[usize::from(place.offset)..][..usize::from(place.size)].fill(saved_by_an_exit(field));
        }
        let after = memory.bytes(PAGE, 4096);
        for at in 0..4096 {
            assert!(allowed[at] || before[at] == after[at], "{at:#x}");
        }
    }
}

#[test]
fn an_exit_writes_what_changed() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    cache.store(&memory, &vmcs12).unwrap();
    assert_eq!(*memory.writes.borrow(), [(PAGE + 0x2A8, 0x6C)], "guest state is all there");
    memory.rest();
    vmcs12.set(Field::GuestRip, 1);
    vmcs12.set(Field::GuestCr3, 1);
    cache.store(&memory, &vmcs12).unwrap();
    assert_eq!(*memory.writes.borrow(), [(PAGE + 0x2A8, 0x6C), (PAGE + 0x330, 8), (PAGE + 0x220, 0x20)]);
}

#[test]
fn what_l1_wrote_to_a_clean_control_survives_an_exit() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    let new = value(Field::ExceptionBitmap, 1);
    memory.set_field(PAGE, Field::ExceptionBitmap, new);
    load(&mut cache, &memory, &mut vmcs12).unwrap();
    vmcs12.set(Field::EntryControls, 0);
    cache.store(&memory, &vmcs12).unwrap();
    assert_eq!(memory.field(PAGE, Field::ExceptionBitmap), new);
    memory.set_clean(PAGE, ALL & !(1 << 7));
    load(&mut cache, &memory, &mut vmcs12).unwrap();
    assert_eq!(vmcs12.get(Field::ExceptionBitmap), new);
}

#[test]
fn a_vm_instruction_error_is_written_alone() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    vmcs12.set(Field::InstructionError, 7);
    vmcs12.set(Field::GuestCr3, 0x1000);
    cache.store_error(&memory, &vmcs12).unwrap();
    assert_eq!(*memory.writes.borrow(), [(PAGE + 0x2B0, 4)]);
    assert_eq!(memory.field(PAGE, Field::InstructionError), 7);
}

#[test]
fn a_restored_page_is_written_whole_and_read_whole() {
    let memory = Memory::new();
    let (cache, mut vmcs12) = entered(&memory);
    let enlightenments = *cache.enlightenments();
    let mut cache = EvmcsCache::new();
    cache.restore(L1Gpa::new(PAGE), enlightenments);
    memory.rest();
    vmcs12.set(Field::GuestRip, 0);
    cache.store(&memory, &vmcs12).unwrap();
    assert_eq!(memory.writes.borrow().len(), 7);
    let mut cache = EvmcsCache::new();
    cache.restore(L1Gpa::new(PAGE), enlightenments);
    assert!(load(&mut cache, &memory, &mut vmcs12).unwrap().reloaded);
}

#[test]
fn a_page_that_goes_away_is_an_error_and_not_forgotten() {
    let memory = Memory::new();
    let (mut cache, mut vmcs12) = entered(&memory);
    struct Gone;
    impl hvcore::memory::GuestMemory for Gone {
        fn read(&self, _: L1Gpa, _: &mut [u8]) -> Result<(), hvcore::memory::MemoryError> {
            Err(hvcore::memory::MemoryError)
        }
        fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), hvcore::memory::MemoryError> {
            Err(hvcore::memory::MemoryError)
        }
        fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, hvcore::memory::MemoryError> {
            Err(hvcore::memory::MemoryError)
        }
        fn compare_exchange_u32(
            &self,
            _: L1Gpa,
            _: u32,
            _: u32,
        ) -> Result<Result<u32, u32>, hvcore::memory::MemoryError> {
            Err(hvcore::memory::MemoryError)
        }
        fn compare_exchange_u64(
            &self,
            _: L1Gpa,
            _: u64,
            _: u64,
        ) -> Result<Result<u64, u64>, hvcore::memory::MemoryError> {
            Err(hvcore::memory::MemoryError)
        }
    }
    vmcs12.set(Field::GuestRip, 0x1234);
    assert!(cache.store(&Gone, &vmcs12).is_err());
    cache.store(&memory, &vmcs12).unwrap();
    assert_eq!(memory.field(PAGE, Field::GuestRip), 0x1234, "written when the page is back");
    assert_eq!(cache.load(&Gone, L1Gpa::new(PAGE), false, &mut vmcs12), Err(LoadError::Unreadable));
}
