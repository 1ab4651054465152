use nsvm::asid::{AsidPool, Tag};
use nsvm::vmcb::bits::tlb;

#[test]
fn too_few_asids_make_no_pool() {
    assert!(AsidPool::new(0, 1, false).is_none());
    assert!(AsidPool::new(0, 2, false).is_some());
}

#[test]
fn the_first_entry_flushes_everything_until_it_happened() {
    let mut pool = AsidPool::new(0, 16, false).unwrap();
    let mut tag = Tag::default();
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::ALL);
    // The entry failed: the flush is still to come.
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::ALL);
    pool.entered(&mut tag);
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::NONE);
}

#[test]
fn tags_never_share_an_asid_within_a_generation() {
    let mut pool = AsidPool::new(0, 4, false).unwrap();
    let mut tags = [Tag::default(); 3];
    let asids: Vec<u32> = tags.iter_mut().map(|tag| pool.assign(tag).asid).collect();
    assert_eq!(asids, [1, 2, 3]);
    tags.iter_mut().for_each(|tag| pool.entered(tag));
    // All are taken: a fourth starts a generation, and the old tags get new ASIDs in it.
    let mut fourth = Tag::default();
    let assigned = pool.assign(&mut fourth);
    assert_eq!((assigned.asid, assigned.tlb_control), (1, tlb::ALL));
    pool.entered(&mut fourth);
    assert_eq!(pool.assign(&mut tags[0]).asid, 2);
}

#[test]
fn a_retired_or_invalidated_tag_gets_a_fresh_asid() {
    let mut pool = AsidPool::new(0, 16, false).unwrap();
    let mut tag = Tag::default();
    pool.assign(&mut tag);
    pool.entered(&mut tag);
    tag.retire();
    assert_eq!(pool.assign(&mut tag).asid, 2);
    pool.entered(&mut tag);
    tag.invalidate();
    let assigned = pool.assign(&mut tag);
    assert_eq!((assigned.asid, assigned.tlb_control), (3, tlb::NONE));
}

#[test]
fn with_flush_by_asid_an_invalidated_tag_keeps_its_asid_and_flushes_it() {
    let mut pool = AsidPool::new(0, 16, true).unwrap();
    let mut tag = Tag::default();
    pool.assign(&mut tag);
    pool.entered(&mut tag);
    tag.invalidate();
    let assigned = pool.assign(&mut tag);
    assert_eq!((assigned.asid, assigned.tlb_control), (1, tlb::ASID));
    // Not entered: asked for again.
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::ASID);
    pool.entered(&mut tag);
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::NONE);
}

#[test]
fn a_tag_of_another_cpu_is_not_good_here() {
    let mut here = AsidPool::new(0, 16, false).unwrap();
    let mut there = AsidPool::new(1, 16, false).unwrap();
    let (mut tag, mut other) = (Tag::default(), Tag::default());
    here.assign(&mut other);
    assert_eq!(here.assign(&mut tag).asid, 2);
    here.entered(&mut tag);
    assert_eq!(there.assign(&mut tag).asid, 1);
    there.entered(&mut tag);
    // Back again: whatever was cached here under ASID 2 may be stale by now.
    assert_eq!(here.assign(&mut tag).asid, 3);
}

#[test]
fn an_exit_without_a_prepared_entry_flushed_nothing() {
    let mut pool = AsidPool::new(0, 16, false).unwrap();
    let mut tag = Tag::default();
    pool.entered(&mut tag);
    assert_eq!(pool.assign(&mut tag).tlb_control, tlb::ALL);
}
