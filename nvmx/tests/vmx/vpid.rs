use nvmx::vpid::{Assigned, Flush, Support, Tag, VpidPool};

/// Assigns and enters.
fn enter(pool: &mut VpidPool, tag: &mut Tag) -> Assigned {
    let assigned = pool.assign(tag);
    pool.entered(tag);
    assigned
}

#[test]
fn the_first_entry_flushes_everything() {
    let mut pool = VpidPool::new(0, 8, Support::SingleContext);
    let mut tag = Tag::default();
    assert_eq!(pool.assign(&mut tag), Assigned { vpid: 1, flush: Flush::All });
    assert_eq!(pool.assign(&mut tag).flush, Flush::All, "it has not happened");
    pool.entered(&mut tag);
    assert_eq!(pool.assign(&mut tag), Assigned { vpid: 1, flush: Flush::None });
}

#[test]
fn tags_do_not_share_a_vpid() {
    let mut pool = VpidPool::new(0, 8, Support::SingleContext);
    let (mut one, mut two) = (Tag::default(), Tag::default());
    assert_eq!(enter(&mut pool, &mut one).vpid, 1);
    assert_eq!(enter(&mut pool, &mut two), Assigned { vpid: 2, flush: Flush::None });
    assert_eq!(enter(&mut pool, &mut one).vpid, 1);
}

#[test]
fn an_invalidated_tag_is_flushed_where_the_processor_can() {
    let mut pool = VpidPool::new(0, 8, Support::SingleContext);
    let mut tag = Tag::default();
    enter(&mut pool, &mut tag);
    tag.invalidate();
    assert_eq!(pool.assign(&mut tag), Assigned { vpid: 1, flush: Flush::Single });
    assert_eq!(pool.assign(&mut tag).flush, Flush::Single, "it has not happened");
    pool.entered(&mut tag);
    assert_eq!(enter(&mut pool, &mut tag).flush, Flush::None);
}

#[test]
fn an_invalidated_tag_is_replaced_where_it_cannot() {
    let mut pool = VpidPool::new(0, 8, Support::AllContexts);
    let mut tag = Tag::default();
    enter(&mut pool, &mut tag);
    tag.invalidate();
    assert_eq!(enter(&mut pool, &mut tag), Assigned { vpid: 2, flush: Flush::None });
    tag.retire();
    assert_eq!(enter(&mut pool, &mut tag), Assigned { vpid: 3, flush: Flush::None });
}

#[test]
fn used_up_vpids_start_a_new_generation() {
    let mut pool = VpidPool::new(0, 2, Support::AllContexts);
    let (mut one, mut two) = (Tag::default(), Tag::default());
    enter(&mut pool, &mut one);
    enter(&mut pool, &mut two);
    two.invalidate();
    assert_eq!(enter(&mut pool, &mut two), Assigned { vpid: 1, flush: Flush::All });
    // The other tag is of the old generation: its VPID is not used again.
    assert_eq!(enter(&mut pool, &mut one), Assigned { vpid: 2, flush: Flush::None });
}

#[test]
fn all_65535_vpids_are_used() {
    let mut pool = VpidPool::new(0, u16::MAX, Support::AllContexts);
    let mut tag = Tag::default();
    for vpid in 1..=u16::MAX {
        tag.retire();
        let flush = if vpid == 1 { Flush::All } else { Flush::None };
        assert_eq!(enter(&mut pool, &mut tag), Assigned { vpid, flush });
    }
    tag.retire();
    assert_eq!(enter(&mut pool, &mut tag), Assigned { vpid: 1, flush: Flush::All });
}

#[test]
fn a_tag_is_good_on_its_cpu_only() {
    let mut here = VpidPool::new(0, 8, Support::SingleContext);
    let mut there = VpidPool::new(1, 8, Support::SingleContext);
    let (mut tag, mut other) = (Tag::default(), Tag::default());
    enter(&mut here, &mut tag);
    enter(&mut there, &mut other);
    assert_eq!(enter(&mut there, &mut tag).vpid, 2);
    assert_eq!(enter(&mut here, &mut tag).vpid, 2, "not the one it left with");
}

#[test]
fn an_exit_without_an_entry_flushed_nothing() {
    let mut pool = VpidPool::new(0, 8, Support::SingleContext);
    let mut tag = Tag::default();
    pool.entered(&mut tag);
    assert_eq!(pool.assign(&mut tag).flush, Flush::All);
}

#[test]
fn a_processor_without_vpids() {
    let mut pool = VpidPool::new(0, 8, Support::None);
    let mut tag = Tag::default();
    tag.invalidate();
    assert_eq!(enter(&mut pool, &mut tag), Assigned { vpid: 0, flush: Flush::None });
}

#[test]
fn flush_all_on_demand() {
    let mut pool = VpidPool::new(0, 8, Support::SingleContext);
    let mut tag = Tag::default();
    enter(&mut pool, &mut tag);
    pool.flush_all();
    assert_eq!(enter(&mut pool, &mut tag).flush, Flush::All);
    assert_eq!(enter(&mut pool, &mut tag).flush, Flush::None);
}
