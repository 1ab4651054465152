//! The flush engine, one thread at a time: what reaches whom, and what comes out of a queue.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used, clippy::panic)]

mod flush_support;

use flush_support::*;

#[test]
fn ranges_come_out_as_they_went_in() {
    let mut w = simple(1);
    assert_eq!(w.l1(&[0], normal(&[0x7000_0000_0003, 0xFFFF_F000_0000_0FFF])), Posted::Done);
    // Extended: 4 KiB, 2 MiB and 1 GiB pages.
    let extended = [0x5007, 0x4000_0000 | 1 << 11 | 2, 0x8000_0000 | 1 << 12 | 1 << 11 | 4];
    assert_eq!(w.l1(&[0], list(RangeFormat::Extended, &extended)), Posted::Done);
    let want = [
        span(0x7000_0000_0000, 4, K4),
        span(0xFFFF_F000_0000_0000, 4096, K4),
        span(0x5000, 8, K4),
        span(0x4000_0000, 3, M2),
        span(0x8000_0000, 5, G1),
    ];
    assert_eq!(spans(&mut w.vps[0], GvaWidth::Bits48).unwrap(), want);
    assert!(w.vps[0].enter(Level::L1).is_none());
}

#[test]
fn non_canonical_ranges() {
    let mut w = simple(1);
    let low_end = 1u64 << 47;
    // Last page of the lower half; one page too far is cut; wholly outside is dropped; non-canonical for 48 bits only.
    let entries = [low_end - K4, (low_end - K4) | 5, low_end, 1 << 60, 0x1FF_FFFF_0000_0000];
    assert_eq!(w.l1(&[0], normal(&entries)), Posted::Done);
    let want = [span(low_end - K4, 1, K4), span(low_end - K4, 1, K4)];
    assert_eq!(spans(&mut w.vps[0], GvaWidth::Bits48).unwrap(), want);
    assert_eq!(w.l1(&[0], normal(&entries)), Posted::Done);
    let want = [span(low_end - K4, 1, K4), span(low_end - K4, 6, K4), span(low_end, 1, K4)];
    assert_eq!(spans(&mut w.vps[0], GvaWidth::Bits57).unwrap(), want);
    // Nothing canonical at all: nobody is bothered.
    let _ = w.vps[0].enter(Level::L1);
    assert_eq!(w.l1(&[0], normal(&[1 << 60, 1 << 61])), Posted::Done);
    assert_eq!(w.l1(&[0], normal(&[1 << 60])), Posted::Done);
    w.vps[0].exit();
    assert!(w.vps[0].enter(Level::L1).is_none());
}

#[test]
fn odd_ranges_become_everything() {
    let start_57 = (1u64 << 56).wrapping_neg();
    let start_48 = (1u64 << 47).wrapping_neg();
    for entries in [&[start_57 - K4 + 1][..], &[0x1000, start_57 - K4 + 1]] {
        // Begins in the hole, reaches out of it: one page short of that is dropped.
        let mut w = simple(1);
        let _ = w.l1(&[0], normal(entries));
        assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::Everything);
    }
    let mut w = simple(1);
    let _ = w.l1(&[0], normal(&[start_57 - K4]));
    assert!(w.vps[0].enter(Level::L1).is_none());
    // The same for 48 bits shows only to a VP of that width; and a range that wraps around.
    let wrap = 0xFFFF_FFFF_FFFF_F001;
    for (entry, bits_48, bits_57) in
        [(start_48 - K4 + 1, false, true), (start_48 - K4, true, true), (wrap, false, false)]
    {
        for (width, listed) in [(GvaWidth::Bits48, bits_48), (GvaWidth::Bits57, bits_57)] {
            let _ = w.l1(&[0], normal(&[entry]));
            assert_eq!(spans(&mut w.vps[0], width).is_some(), listed, "{entry:x} {width:?}");
        }
    }
    // The last page does not wrap.
    let _ = w.l1(&[0], normal(&[wrap - 1]));
    assert_eq!(spans(&mut w.vps[0], GvaWidth::Bits48).unwrap(), [span(wrap - 1, 1, K4)]);
}

#[test]
fn a_full_queue_becomes_everything() {
    let entries: Vec<u64> = (1..18).map(|n| n << 12).collect();
    let mut w = simple(1);
    let _ = w.l1(&[0], normal(&entries[..16]));
    assert_eq!(spans(&mut w.vps[0], GvaWidth::Bits48).unwrap().len(), 16);
    for (first, second) in [(17, 0), (16, 1), (9, 8), (1, 16)] {
        let _ = w.l1(&[0], normal(&entries[..first]));
        if second != 0 {
            let _ = w.l1(&[0], normal(&entries[..second]));
        }
        assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::Everything);
        w.vps[0].exit();
        assert!(w.vps[0].enter(Level::L1).is_none(), "the queue is empty after it");
        w.vps[0].exit();
    }
}

#[test]
fn whole_flushes_and_global_pages() {
    let mut w = simple(1);
    let _ = w.l1(&[0], GvaScope::EverythingNonGlobal);
    assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::EverythingNonGlobal);
    w.vps[0].entry_failed();
    // Stays until an entry happened; a range may be global, so both together are everything.
    let _ = w.l1(&[0], normal(&[0x1000]));
    assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::Everything);
    w.vps[0].exit();
    let _ = w.l1(&[0], GvaScope::EverythingNonGlobal);
    let _ = w.l1(&[0], GvaScope::Everything);
    assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::Everything);
    w.vps[0].exit();
    assert!(w.vps[0].enter(Level::L1).is_none());
}

#[test]
fn pending_ranges_overflow_over_failed_entries() {
    let mut w = simple(1);
    for n in 0..17 {
        let _ = w.l1(&[0], normal(&[n << 12]));
        let flush = w.vps[0].enter(Level::L1).unwrap().gva;
        match flush {
            GvaFlush::Ranges(ranges) => {
                assert_eq!((ranges.len() as u64, ranges.is_empty(), n < 16), (n + 1, false, true))
            }
            other => assert_eq!((other, n), (GvaFlush::Everything, 16)),
        }
        w.vps[0].entry_failed();
    }
}

#[test]
fn a_kick_goes_to_who_runs_the_level() {
    let mut w = simple(3);
    w.run_l2(&[ids(VM, 0), ids(VM, 1), ids(VM, 2)]);
    w.vps[1].exit();
    let _ = w.vps[1].enter(Level::L1);
    w.vps[2].exit();
    assert_eq!(w.domain.vps()[0].runs(), Some(Level::L2));
    assert_eq!(w.domain.vps()[1].runs(), Some(Level::L1));
    assert_eq!(w.domain.vps()[2].runs(), None);
    // L2: only VP 0 runs it. L1: only VP 1.
    assert_eq!((w.l2(VM, &[0, 1, 2]), w.kicks()), (Posted::Wait, vec![0]));
    assert_eq!((w.l1(&[0, 1, 2], GvaScope::Everything), w.kicks()), (Posted::Wait, vec![1]));
    assert!(!w.poll());
    w.vps[1].exit();
    assert!(w.poll());
    // Marked meanwhile: VP 0 was not flushed for L2 before it left.
    w.vps[0].exit();
    for vp in &mut w.vps {
        assert_ne!(vp.enter(Level::L2).unwrap().gva, GvaFlush::None);
        vp.exit();
        assert_eq!(vp.enter(Level::L1).unwrap().gva, GvaFlush::Everything);
        vp.exit();
    }
}

#[test]
fn the_second_initiator_waits_without_a_kick() {
    let mut w = simple(1);
    let _ = w.vps[0].enter(Level::L1);
    let mut other = Shootdown::new();
    assert_eq!(w.l1(&[0], normal(&[0x1000])), Posted::Wait);
    assert_eq!(w.domain.flush_l1(&w.map, VpSet::All, normal(&[0x2000]), &mut other), Posted::Wait);
    assert_eq!((w.kicks(), other.kicks().count()), (vec![0], 0));
    assert!(!w.poll() && !other.poll(w.domain.vps()));
    // It leaves, comes back and is marked by a third: the first two are done all the same.
    w.vps[0].exit();
    let _ = w.vps[0].enter(Level::L1);
    let mut third = Shootdown::new();
    assert_eq!(w.domain.flush_l1(&w.map, VpSet::All, normal(&[0x3000]), &mut third), Posted::Wait);
    assert!(w.poll() && other.poll(w.domain.vps()));
    assert!(!third.poll(w.domain.vps()));
}

#[test]
fn l1_targets_by_vp_index() {
    // Indexes run backwards, and slot 70 is not online.
    let mut w = world(130, 256, |slot| (slot != 70).then_some(1000 - slot));
    for vp in &mut w.vps {
        let _ = vp.enter(Level::L1);
    }
    assert_eq!(
        (w.l1(&[1000, 871, 930, 5, 4095, 936], GvaScope::Everything), w.kicks()),
        (Posted::Wait, vec![0, 64, 129])
    );
    let _ = w.domain.flush_l1(&w.map, VpSet::All, GvaScope::Everything, &mut w.scratch);
    let missing = [0, 64, 70, 129];
    assert_eq!(w.kicks(), (0..130).filter(|slot| !missing.contains(slot)).collect::<Vec<_>>());
    // A slot beyond the domain's names nobody.
    w.map.assign(7, VpSlot::new(500).unwrap()).unwrap();
    assert_eq!(w.l1(&[7], GvaScope::Everything), Posted::Done);
}

#[test]
fn l2_targets_by_context() {
    let mut w = simple(5);
    w.run_l2(&[ids(VM, 7), ids(VM, 7), ids(VM, 4095), ids(VM, 4096), ids(VM + 1, 7)]);
    assert_eq!((w.l2(VM, &[7]), w.kicks()), (Posted::Wait, vec![0, 1]));
    // A VP_ID that no set can name is reached by ALL only.
    assert_eq!((w.l2(VM, &[4095, 0]), w.kicks()), (Posted::Wait, vec![2]));
    let all = |w: &mut World, vm_id| w.domain.flush_l2(vm_id, VpSet::All, GvaScope::Everything, &mut w.scratch);
    assert_eq!((all(&mut w, VM), w.kicks()), (Posted::Wait, vec![3]));
    assert_eq!((all(&mut w, VM + 1), w.kicks()), (Posted::Wait, vec![4]));
    assert_eq!(
        (all(&mut w, VM + 2), w.l2(VM + 2, &[7]), w.l2(VM, &[6, 8])),
        (Posted::Done, Posted::Done, Posted::Done)
    );
}

#[test]
fn a_context_is_found_where_it_is_now() {
    let mut w = simple(2);
    w.run_l2(&[ids(VM, 1), ids(VM, 2)]);
    w.vps[0].exit();
    // The same again: nothing to do.
    assert_eq!(w.vps[0].set_context(ids(VM, 1)), ContextChange::Same);
    assert!(w.vps[0].enter(Level::L2).is_none());
    w.vps[0].exit();
    // What was queued for the old context goes with it; the entry of the new one flushes everything.
    let _ = w.l2(VM, &[1]);
    for other in [
        NestedContext { tag: 2, ..ids(VM, 1) },
        NestedContext { root: 0x2000, ..ids(VM, 1) },
        ids(VM, 9),
        ids(VM + 1, 9),
        NestedContext { ids: None, tag: 0, root: 0 },
    ] {
        assert_eq!(w.vps[0].set_context(other), ContextChange::Retire);
        assert_eq!(w.vps[0].context(), Some(other));
        for _ in 0..2 {
            assert_eq!(w.vps[0].enter(Level::L2).unwrap().gva, GvaFlush::Everything);
            w.vps[0].entry_failed();
        }
        let _ = w.vps[0].enter(Level::L2);
        w.vps[0].exit();
        assert!(w.vps[0].enter(Level::L2).is_none());
        for (vm_id, vp_id) in [(VM, 1), (VM, 9), (VM + 1, 9)] {
            let found = other.ids == Some(NestedIds { vm_id, vp_id });
            let want = if found { (Posted::Wait, vec![0]) } else { (Posted::Done, vec![]) };
            assert_eq!((w.l2(vm_id, &[vp_id]), w.kicks()), want, "{other:?}");
        }
        w.vps[0].exit();
    }
    w.vps[1].exit();
    w.vps[1].forget_context();
    assert_eq!((w.vps[1].context(), w.l2(VM, &[2])), (None, Posted::Done));
    assert_eq!(w.vps[1].enter(Level::L2).unwrap().gva, GvaFlush::Everything);
}

#[test]
fn retired_tags_and_whole_levels() {
    let mut w = simple(1);
    let _ = (w.l1(&[0], normal(&[0x1000])), w.vps[0].retired(Level::L1));
    assert!(w.vps[0].enter(Level::L1).is_none());
    w.vps[0].exit();
    w.vps[0].flush_all(Level::L1);
    assert_eq!(w.vps[0].enter(Level::L1).unwrap().gva, GvaFlush::Everything);
    w.vps[0].exit();
    w.run_l2(&[ids(VM, 1)]);
    w.vps[0].exit();
    let _ = (w.l2(VM, &[1]), w.vps[0].retired(Level::L2));
    assert!(w.vps[0].enter(Level::L2).is_none());
    w.vps[0].exit();
    w.vps[0].flush_all(Level::L2);
    let flush = w.vps[0].enter(Level::L2).unwrap();
    assert_eq!((flush.gva, flush.second_stage), (GvaFlush::Everything, SecondStageFlush::Everything));
}

/// Every VP collides with every other: five do not fit a bucket. And a set that names more than the VM has.
#[test]
fn the_index_agrees_with_a_list() {
    let mut seed = 0x0123_4567_89AB_CDEF_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for buckets in [1, 4, 256] {
        let mut w = world(100, buckets, Some);
        let mut contexts = vec![ids(0, 0); 100];
        for round in 0..400 {
            let changes = if round == 0 { 100 } else { random(8) as usize };
            for n in 0..changes {
                let slot = if round == 0 { n } else { random(100) as usize };
                let context = ids(VM + random(3), [random(40), 4090 + random(12)][random(2) as usize] as u32);
                w.vps[slot].exit();
                let _ = w.vps[slot].set_context(context);
                contexts[slot] = context;
            }
            for vp in &mut w.vps {
                vp.exit();
                let _ = vp.enter(Level::L2);
            }
            let vm_id = VM + random(3);
            let named: Vec<u32> = match random(3) {
                0 => (0..4096).collect(),
                1 => vec![random(40) as u32],
                _ => (0..1 + random(60)).map(|_| random(4096) as u32 % 45).collect(),
            };
            let all = random(5) == 0;
            let want: Vec<u16> = (0..100)
                .filter(|slot| {
                    let ids = contexts[usize::from(*slot)].ids.unwrap();
                    ids.vm_id == vm_id && (all || named.contains(&ids.vp_id))
                })
                .collect();
            if all {
                let _ = w.domain.flush_l2(vm_id, VpSet::All, normal(&[0x1000]), &mut w.scratch);
            } else {
                let _ = w.l2(vm_id, &named);
            }
            assert_eq!(w.kicks(), want, "{buckets} buckets, round {round}");
        }
    }
}

#[test]
fn second_stage_requests() {
    let mut w = simple(3);
    w.run_l2(&[ids(VM, 0), ids(VM, 1)]);
    let root = L1Gpa::new(0x4_0018);
    let flush = |w: &mut World, scope| {
        let posted = w.domain.flush_second_stage(scope, &mut w.scratch);
        assert_eq!((posted, w.kicks()), (Posted::Wait, vec![0, 1]), "VP 2 never ran an L2");
        w.vps[0].exit();
        w.vps[1].exit();
        assert!(w.poll() && w.vps[2].enter(Level::L2).is_none());
        w.vps[2].exit();
        let _ = w.vps[1].enter(Level::L2);
        let flush = w.vps[0].enter(Level::L2).unwrap();
        assert_eq!(flush.gva, GvaFlush::None);
        match flush.second_stage {
            SecondStageFlush::Items(items) => Some(items.to_vec()),
            other => {
                assert_eq!(other, SecondStageFlush::Everything);
                None
            }
        }
    };
    let whole = SecondStageItem::Root(0x4_0000);
    assert_eq!(flush(&mut w, SecondStageScope::Root(root)).unwrap(), [whole]);
    let entries = [0x1_2000, 0x3_47FF];
    let range = |first, pages| SecondStageItem::RootRange { root: 0x4_0000, first, pages };
    let want = [range(0x1_2000, 1), range(0x3_4000, 2048)];
    assert_eq!(flush(&mut w, SecondStageScope::Ranges { root, entries: &entries }).unwrap(), want);
    // Bit 11 can be read two ways; more entries than the queue has room for.
    let ambiguous = [0x1_2000, 0x3_4800];
    assert_eq!(flush(&mut w, SecondStageScope::Ranges { root, entries: &ambiguous }).unwrap(), [whole]);
    assert_eq!(flush(&mut w, SecondStageScope::Ranges { root, entries: &[0x1000; 16] }).unwrap().len(), 16);
    assert_eq!(flush(&mut w, SecondStageScope::Ranges { root, entries: &[0x1000; 17] }).unwrap(), [whole]);
    let pages = |pages| SecondStageScope::L1Pages { first: root, pages };
    let want = [SecondStageItem::L1Range { first: 0x4_0000, pages: 4096 }];
    assert_eq!(flush(&mut w, pages(4096)).unwrap(), want);
    assert_eq!(flush(&mut w, pages(4097)), None);
    assert_eq!(flush(&mut w, SecondStageScope::Everything), None);
    assert_eq!(w.domain.flush_second_stage(pages(0), &mut w.scratch), Posted::Done);
    let none = SecondStageScope::Ranges { root, entries: &[] };
    assert_eq!(w.domain.flush_second_stage(none, &mut w.scratch), Posted::Done);
    // A queue without room.
    let _ = w.domain.flush_second_stage(SecondStageScope::Ranges { root, entries: &[0x1000; 15] }, &mut w.scratch);
    let _ = w.domain.flush_second_stage(SecondStageScope::Ranges { root, entries: &[0x1000; 2] }, &mut w.scratch);
    w.vps[0].exit();
    assert_eq!(w.vps[0].enter(Level::L2).unwrap().second_stage, SecondStageFlush::Everything);
}

#[test]
fn an_inhibiting_target_suspends_its_callers() {
    let mut w = simple(2);
    let shared = &w.domain.vps()[1];
    shared.inhibit();
    assert!(!shared.uninhibit(), "nobody came");
    shared.inhibit();
    let _ = w.vps[0].enter(Level::L1);
    assert_eq!(
        (w.l1(&[0, 1], GvaScope::Everything), w.kicks()),
        (Posted::Suspend, vec![0]),
        "the kick is due all the same"
    );
    assert_eq!(w.l1(&[0], GvaScope::Everything), Posted::Wait, "the other one does not inhibit");
    assert!(shared.uninhibit());
    assert!(!shared.uninhibit());
    w.vps[0].exit();
    assert_eq!(w.l1(&[0, 1], GvaScope::Everything), Posted::Done);
    // One that inhibits while its guest runs is kicked, too.
    let _ = w.vps[1].enter(Level::L1);
    shared.inhibit();
    assert_eq!((w.l1(&[1], GvaScope::Everything), w.kicks()), (Posted::Suspend, vec![1]));
}

#[test]
fn storage_of_the_index() {
    let words = TargetIndex::group_words(100);
    assert_eq!(words, 3);
    let new = |vps, buckets, groups| TargetIndex::new(vps, zeros(buckets), zeros(groups)).map(|_| ());
    assert_eq!(new(100, 128, 2 * words), Ok(()));
    assert_eq!(new(100, 128, 5 * words), Ok(()));
    assert_eq!(new(4096, 1, 2 * 65), Ok(()));
    assert_eq!(new(4097, 1, 2 * 66), Err(IndexError::Vps));
    assert_eq!(new(100, 0, 2 * words), Err(IndexError::Buckets));
    assert_eq!(new(100, 129, 2 * words), Err(IndexError::Buckets));
    for groups in [0, words - 1, words, 2 * words - 1, 4 * words, 2 * words + 1] {
        assert_eq!(new(100, 128, groups), Err(IndexError::Groups), "{groups}");
    }
}

#[test]
fn entering_twice_is_entering_anew() {
    let mut w = simple(1);
    let _ = w.vps[0].enter(Level::L1);
    let _ = w.vps[0].enter(Level::L2);
    assert_eq!(w.domain.vps()[0].runs(), Some(Level::L2));
    w.vps[0].exit();
    w.vps[0].exit();
    assert_eq!(w.domain.vps()[0].runs(), None);
    assert!(w.domain.local(1).is_none());
    assert_eq!((w.vps[0].slot(), w.vps[0].shared().runs()), (0, None));
}
