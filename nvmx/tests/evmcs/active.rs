//! One page, one VP.

use core::sync::atomic::AtomicU64;

use hvcore::addr::L1Gpa;
use nvmx::evmcs::{ActivePage, ActivePages, Claim, EvmcsCache, LoadError, Loaded};
use nvmx::field::Field;
use nvmx::groups;
use nvmx::vmcs12::Vmcs12;

use crate::memory::*;

const ALL: u32 = 0xFFFF;

#[test]
fn a_claim_is_kept_until_another_vp_takes_it() {
    let words = [const { AtomicU64::new(0) }; 3];
    let pages = ActivePages::new(&words);
    let page = L1Gpa::new(PAGE);
    assert_eq!(pages.claim(0, page), Claim::Taken);
    assert_eq!([1, 2].map(|vp| pages.claim(vp, page)), [Claim::Refused; 2], "L2 runs on it");
    pages.leave(0);
    assert_eq!(pages.claim(0, page), Claim::Kept);
    pages.leave(0);
    assert_eq!(pages.claim(2, page), Claim::Taken);
    assert_eq!(pages.claim(0, page), Claim::Refused);
    pages.leave(2);
    assert_eq!(pages.claim(0, page), Claim::Taken, "it was elsewhere meanwhile");
    // Other pages are other matters, and one VP has one.
    assert_eq!(pages.claim(1, L1Gpa::new(OTHER)), Claim::Taken);
    pages.leave(0);
    assert_eq!(pages.claim(0, L1Gpa::new(0)), Claim::Taken);
    assert_eq!(pages.claim(2, page), Claim::Taken);
    pages.forget(2);
    assert_eq!(pages.claim(0, page), Claim::Taken);
    assert_eq!(pages.claim(3, page), Claim::Taken, "beyond the table there is no protection");
}

#[test]
fn the_page_at_0_is_a_page() {
    let words = [const { AtomicU64::new(0) }; 2];
    let pages = ActivePages::new(&words);
    assert_eq!(pages.claim(0, L1Gpa::new(0)), Claim::Taken);
    assert_eq!(pages.claim(1, L1Gpa::new(0)), Claim::Refused);
}

/// Two VPs without VMCLEAR in between: the second takes the page over, the first reads everything when it comes back.
#[test]
fn a_page_that_comes_back_is_read_whole() {
    let words = [const { AtomicU64::new(0) }; 2];
    let place = |vp| Some(ActivePage { pages: ActivePages::new(&words), vp });
    let memory = Memory::new();
    fill(&memory, PAGE, 0);
    let mut vps = [0, 1].map(|_| (EvmcsCache::new(), Vmcs12::default()));
    let mut enter = |vp: usize| {
        let (cache, vmcs12) = &mut vps[vp];
        let loaded = cache.enter(&memory, place(vp), L1Gpa::new(PAGE), false, vmcs12);
        if loaded.is_ok() {
            cache.entered(&memory).unwrap();
        }
        (loaded, vmcs12.get(Field::HostCr3))
    };
    let whole = |salt| (Ok(Loaded { changed: groups::ALL, reloaded: true }), value(Field::HostCr3, salt));
    assert_eq!(enter(0), whole(0));
    assert_eq!(enter(1).0, Err(LoadError::Busy), "L2 runs on it");
    let leave = |vp: &mut (EvmcsCache, Vmcs12), n| vp.0.leave(place(n));
    leave(&mut vps[0], 0);
    let mut enter = |vp: usize| {
        let (cache, vmcs12) = &mut vps[vp];
        let loaded = cache.enter(&memory, place(vp), L1Gpa::new(PAGE), false, vmcs12);
        cache.entered(&memory).unwrap();
        cache.leave(place(vp));
        (loaded, vmcs12.get(Field::HostCr3))
    };
    assert_eq!(enter(0).0, Ok(Loaded { changed: 0, reloaded: false }), "a control: nobody had it");
    memory.set_field(PAGE, Field::HostCr3, value(Field::HostCr3, 1));
    assert_eq!(enter(1), whole(1));
    // L0 has set all clean bits for the other VP; here they say nothing.
    assert_eq!(memory.clean(PAGE), ALL);
    assert_eq!(enter(0), whole(1));
}

#[test]
fn without_a_table_the_clean_bits_count() {
    let memory = Memory::new();
    fill(&memory, PAGE, 0);
    let (mut cache, mut vmcs12) = (EvmcsCache::new(), Vmcs12::default());
    for changed in [groups::ALL, 0] {
        let loaded = cache.enter(&memory, None, L1Gpa::new(PAGE), false, &mut vmcs12).unwrap();
        assert_eq!(loaded.changed, changed);
        cache.entered(&memory).unwrap();
        cache.leave(None);
    }
}
