//! Threads as VPs on the model's TLBs: random flushes of all three kinds, transitions between L1 and L2, switches of
//! the nested context, failed entries, translations in software. No access may use a translation that a completed
//! flush covers.
//!
//! `FLUSH_STRESS_OPS=10000000 cargo test -p tests --release --test flush_stress` runs ten million operations; an
//! operation is an entry, a request or a change of context, guest accesses not counted. With
//! `RUSTFLAGS="--cfg flush_mutants"` the same test is run on defective engines, and must catch each.

mod cpu;
mod world;

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use world::World;

const CPUS: usize = 4;

/// Runs `ops` operations in total, or until something stale was used; the number of operations and the first finding.
fn stress(ops: u64, seed: u64, limit: Duration) -> (u64, Option<String>) {
    let world = World::new(CPUS, ops, seed);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for slot in 0..CPUS as u16 {
            let world = &world;
            scope.spawn(move || {
                let mut cpu = cpu::Cpu::new(world, slot);
                while world.claim_op() && start.elapsed() < limit {
                    cpu.operation();
                }
                cpu.leave();
                world.stopped.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    let finding = world.finding.lock().unwrap().take();
    (world.done(), finding)
}

/// A mutant is switched on for the whole process: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn ops() -> u64 {
    std::env::var("FLUSH_STRESS_OPS").ok().and_then(|ops| ops.parse().ok()).unwrap_or(200_000)
}

#[test]
fn no_access_is_stale() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = std::env::var("FLUSH_STRESS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let (done, finding) = stress(ops(), seed, Duration::MAX);
    assert_eq!(finding, None, "seed {seed}, after {done} operations");
    assert!(done >= ops());
    println!("{done} operations");
}

#[cfg(flush_mutants)]
#[test]
fn every_mutant_is_caught() {
    use hvcore::flush::mutant::{self, Mutant};
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for mutant in [
        Mutant::SkipDrain,
        Mutant::WrongTag,
        Mutant::OnePageShort,
        Mutant::DropShouldFlush,
        Mutant::KickBeforePublish,
        Mutant::ConsumeOnFailure,
        Mutant::KeepOldTag,
        Mutant::CheckBeforePublish,
    ] {
        mutant::set(mutant);
        let caught = (1..20).find_map(|seed| {
            let (done, finding) = stress(1_000_000, seed, Duration::from_secs(10));
            finding.map(|finding| (done, finding))
        });
        mutant::set(Mutant::None);
        let (done, finding) = caught.unwrap_or_else(|| panic!("{mutant:?} was not caught"));
        println!("{mutant:?}: caught after {done} operations: {finding}");
    }
}
