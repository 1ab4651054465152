//! The flush engine behind the hypercalls: what they post, and what their caller does itself.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod flush_support;

use flush_support::*;

#[test]
fn hypercalls_become_requests() {
    let mut w = simple(2);
    w.run_l2(&[ids(VM, 0), ids(VM, 1)]);
    let mask = 0b10;
    let vps = VpSet::Sparse(SparseVpSet::from_mask(&mask));
    let target = |level, flags| FlushTarget { level, address_space: 0x1000, flags: FlushFlags::new(flags), vps };
    let mut scratch = Shootdown::new();
    let mut calls = FlushCalls::new(&w.domain, &w.map, VM, &mut scratch);
    let ranges = GvaRanges { format: RangeFormat::Extended, raw: &[0x4000_0800] };
    assert_eq!(calls.flush_list(&target(Level::L2, 8), &ranges), Answer::Done);
    assert_eq!(calls.posted(), Posted::Wait);
    assert_eq!(calls.flush_space(&target(Level::L1, FlushFlags::NON_GLOBAL_ONLY)), Answer::Done);
    assert_eq!(calls.posted(), Posted::Done);
    assert_eq!(calls.flush_guest_physical_list(0x9018, &[0x1000]), Answer::Done);
    assert_eq!(calls.posted(), Posted::Wait);
    w.domain.vps()[1].inhibit();
    assert_eq!(calls.flush_space(&target(Level::L2, 0)), Answer::Suspend);
    assert_eq!(calls.posted(), Posted::Suspend);
    assert_eq!(calls.flush_guest_physical_space(0x9018), Answer::Suspend);
    assert!(w.domain.vps()[1].uninhibit());
    w.vps[1].exit();
    assert_eq!(w.vps[1].enter(Level::L1).unwrap().gva, GvaFlush::EverythingNonGlobal);
    w.vps[1].exit();
    let flush = w.vps[1].enter(Level::L2).unwrap();
    assert_eq!(flush.gva, GvaFlush::Everything, "the second call of L2");
    let SecondStageFlush::Items(items) = flush.second_stage else { panic!() };
    let range = SecondStageItem::RootRange { root: 0x9000, first: 0x1000, pages: 1 };
    assert_eq!(items.as_slice(), [range, SecondStageItem::Root(0x9000)]);
    w.vps[1].exit();
    // Alone, the list comes out in its own format.
    let mut scratch = Shootdown::new();
    let mut calls = FlushCalls::new(&w.domain, &w.map, VM, &mut scratch);
    let _ = calls.flush_list(&target(Level::L2, 8), &ranges);
    let flush = w.vps[1].enter(Level::L2).unwrap();
    let GvaFlush::Ranges(ranges) = flush.gva else { panic!() };
    assert_eq!(ranges.spans(GvaWidth::Bits48).unwrap().collect::<Vec<_>>(), [span(0x4000_0000, 1, M2)]);
}

/// A flush call by the VP in `slot`, or by nobody: what it leaves to do, whom it kicks, and whether it concerns the
/// caller.
fn call_of(w: &mut World, slot: Option<u16>, level: Level, vm_id: u64, set: VpSet<'_>) -> (Posted, Vec<u16>, bool) {
    let target = FlushTarget { level, address_space: 0, flags: FlushFlags::new(0), vps: set };
    let mut calls = FlushCalls::new(&w.domain, &w.map, vm_id, &mut w.scratch);
    if let Some(slot) = slot {
        calls = calls.called_by(slot);
    }
    let _ = calls.flush_list(&target, &GvaRanges { format: RangeFormat::Normal, raw: &[0x1000] });
    let (posted, own) = (calls.posted(), calls.flushes_caller());
    let _ = calls.flush_guest_physical_space(0x9000);
    assert!(!calls.flushes_caller(), "a second stage is the queue's");
    (posted, w.kicks(), own)
}

/// Three VPs outside their guests, contexts 0 to 2 of [`VM`]; the VP index of the second is 7.
fn callers() -> World {
    let mut w = world(3, 8, |slot| Some(if slot == 1 { 7 } else { slot }));
    w.run_l2(&[ids(VM, 0), ids(VM, 1), ids(VM, 2)]);
    for vp in &mut w.vps {
        vp.exit();
    }
    w
}

/// What is due for `level` in `slot`.
fn due(w: &mut World, slot: usize, level: Level) -> bool {
    let due = w.vps[slot].enter(level).is_some_and(|flush| flush.gva != GvaFlush::None);
    w.vps[slot].exit();
    due
}

#[test]
fn the_callers_own_vp_is_not_posted_to() {
    for level in [Level::L1, Level::L2] {
        // As L1 knows them, and as L2 does.
        let own = if level == Level::L1 { 7 } else { 1 };
        let only_own = sparse(&[own]);
        let others = sparse(&[0, 2]);
        let set = |(mask, banks): &'static (u64, Vec<u64>)| VpSet::Sparse(SparseVpSet::new(*mask, banks).unwrap());
        let (only_own, others) = (&*Box::leak(Box::new(only_own)), &*Box::leak(Box::new(others)));
        for (vps, concerns_caller, concerns_others) in
            [(VpSet::All, true, true), (set(only_own), true, false), (set(others), false, true)]
        {
            let mut w = callers();
            let (_, _, own) = call_of(&mut w, Some(1), level, VM, vps);
            assert_eq!(own, concerns_caller, "{level:?} {vps:?}");
            assert!(!due(&mut w, 1, level), "{level:?} {vps:?}: posted to");
            assert_eq!((due(&mut w, 0, level), due(&mut w, 2, level)), (concerns_others, concerns_others));
            // The control: a call in nobody's name is posted to all.
            let mut w = callers();
            let (_, _, own) = call_of(&mut w, None, level, VM, vps);
            assert_eq!((own, due(&mut w, 1, level)), (false, concerns_caller));
        }
    }
    // Of another VM.
    let mut w = callers();
    assert_eq!(call_of(&mut w, Some(1), Level::L2, VM + 1, VpSet::All), (Posted::Done, vec![], false));
}

#[test]
fn a_caller_that_inhibits_flushes_is_a_target_as_any_other() {
    let mut w = callers();
    w.domain.vps()[1].inhibit();
    let (posted, _, own) = call_of(&mut w, Some(1), Level::L2, VM, VpSet::All);
    assert_eq!((posted, own), (Posted::Suspend, false));
    assert!(w.domain.vps()[1].uninhibit());
    assert!(due(&mut w, 1, Level::L2));
}

#[test]
fn what_the_caller_flushes_itself_is_due_until_it_has_run() {
    for (level, other) in [(Level::L1, Level::L2), (Level::L2, Level::L1)] {
        let mut w = callers();
        w.vps[1].flush_gva(level);
        assert!(!due(&mut w, 1, other));
        let flush = w.vps[1].enter(level).unwrap();
        assert_eq!((flush.gva, flush.second_stage), (GvaFlush::Everything, SecondStageFlush::None));
        w.vps[1].entry_failed();
        assert_eq!(w.vps[1].enter(level).unwrap().gva, GvaFlush::Everything);
        w.vps[1].exit();
        assert!(w.vps[1].enter(level).is_none());
    }
}
