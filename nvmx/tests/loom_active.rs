//! Enlightened VMCSs claimed by several VPs: one page is in use on one VP, and a VP that keeps a page has nothing to
//! read again.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use hvcore::addr::L1Gpa;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use nvmx::evmcs::{ActivePages, Claim};

const PAGE: L1Gpa = L1Gpa::new(0x5000);
const OTHER: L1Gpa = L1Gpa::new(0x6000);

/// A table of two VPs and what they do with the page.
struct World {
    pages: ActivePages<'static>,
    /// Users of the page at this moment.
    users: AtomicU64,
    /// The page's contents: how often it was used. Whoever has the page sees the latest without further order.
    contents: AtomicU64,
    /// Who used the page last.
    last: AtomicU64,
}

fn world() -> &'static World {
    let words: &'static [AtomicU64] = Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect());
    let [users, contents, last] = [0, 0, 9].map(AtomicU64::new);
    let world = World { pages: ActivePages::new(words), users, contents, last };
    Box::leak(Box::new(world))
}

fn enter(world: &World, vp: usize) -> Claim {
    let claim = world.pages.claim(vp, PAGE);
    if claim != Claim::Refused {
        assert_eq!(world.users.fetch_add(1, Ordering::Relaxed), 0, "two use the page");
        // A load may see an old value, a read-modify-write sees the latest.
        let seen = world.contents.load(Ordering::Relaxed);
        assert_eq!(world.contents.fetch_add(1, Ordering::Relaxed), seen, "an old state of the page was seen");
        // Relaxed: the claims give the order.
        if claim == Claim::Kept {
            assert_eq!(world.last.load(Ordering::Relaxed), vp as u64, "kept, but used elsewhere meanwhile");
        }
        world.last.store(vp as u64, Ordering::Relaxed);
        world.users.fetch_sub(1, Ordering::Relaxed);
        world.pages.leave(vp);
    }
    claim
}

#[test]
fn a_page_is_in_use_on_one_vp() {
    loom::model(|| {
        let world = world();
        let first = thread::spawn(move || enter(world, 0));
        let second = enter(world, 1);
        let first = first.join().unwrap();
        assert!(first != Claim::Kept && second != Claim::Kept);
        // Whoever comes now gets it.
        assert_ne!(enter(world, 0), Claim::Refused);
    });
}

#[test]
fn a_page_that_is_kept_was_not_used_elsewhere() {
    loom::model(|| {
        let world = world();
        enter(world, 0);
        let first = thread::spawn(move || [enter(world, 0), enter(world, 0)]);
        enter(world, 1);
        first.join().unwrap();
    });
}

#[test]
fn a_page_that_is_left_for_another_is_free() {
    loom::model(|| {
        let world = world();
        enter(world, 0);
        let first = thread::spawn(move || {
            assert_eq!(world.pages.claim(0, OTHER), Claim::Taken);
            world.pages.leave(0);
        });
        assert_eq!(enter(world, 1), Claim::Taken);
        first.join().unwrap();
        assert_eq!(enter(world, 1), Claim::Kept);
    });
}

/// The model can fail: two VPs that each publish their claim and look at the other's with no order between the two.
#[test]
#[should_panic(expected = "both have it")]
fn control_claims_without_an_order_are_found() {
    loom::model(|| {
        let words: &'static [AtomicU64] = Vec::leak((0..2).map(|_| AtomicU64::new(0)).collect());
        let claim = |own: usize| {
            words[own].store(1, Ordering::Relaxed);
            words[1 - own].load(Ordering::Relaxed) == 0
        };
        let first = thread::spawn(move || claim(0));
        let second = claim(1);
        assert!(!(first.join().unwrap() && second), "both have it");
    });
}
