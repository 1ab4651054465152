//! A second embedder on the model's processors: three L1 partitions with equal VM_IDs, more VPs than processors, another
//! processor after every exit.

use tests::embedder::actions::{self, by_chance};
use tests::embedder::{Counts, Mistake, Shape, Storage, World};
use tests::model::rng::Rng;
use tests::model::svm::Features;

/// Few ASIDs, so that they run out and come back.
const FEW: Features = Features { asids: 5, ..Features::FULL };
const PLAIN: Features = Features { asids: 5, ..Features::TCG };

fn shape(features: Features, seed: u64) -> Shape {
    Shape { partitions: 3, vps: 3, cpus: 3, features, seed, mistake: None }
}

/// `n` actions by chance, or the first broken rule.
fn run(shape: Shape, n: u32) -> Result<Vec<Counts>, String> {
    let mut storage = Storage::new(shape.partitions, shape.vps);
    let mut world = World::new(&shape, &mut storage);
    for _ in 0..n {
        by_chance(&mut world);
        world.verdict()?;
    }
    Ok(world.partitions.iter().map(|p| p.counts).collect())
}

#[test]
fn partitions_share_processors() {
    for (seed, features) in (0..).zip([FEW, PLAIN, FEW, PLAIN, Features::FULL, Features::TCG]) {
        let counts = run(shape(features, seed), 3000).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        for c in counts {
            assert!(c.checked > 200 && c.direct > 3 && c.kicked > 3 && c.entered > 50, "{c:?}");
            assert!(c.paged_in > 0 && c.dirtied > 0 && c.flushed > 20 && c.repeated > 50, "{c:?}");
            assert_eq!((c.refused, c.resets), (0, 0), "{c:?}");
        }
    }
}

#[test]
fn a_flush_reaches_only_its_partition() {
    let shape = shape(FEW, 9);
    let mut storage = Storage::new(shape.partitions, shape.vps);
    let mut world = World::new(&shape, &mut storage);
    // Everyone's L2 runs, with the same VM_ID and VP_IDs.
    for p in 0..3 {
        (0..3).for_each(|v| world.l2_access(p, v, 0, v, true));
    }
    let of = |world: &World<'_>| -> Vec<(u64, u64)> {
        world.partitions.iter().map(|p| (p.counts.flushed, p.counts.kicked)).collect()
    };
    let before = of(&world);
    for n in 0..200 {
        world.l2_edit(0, n % 3, 0, n % 6, Some((n as u8 % 6, true)), n % 2 == 0);
        for p in 0..3 {
            (0..3).for_each(|v| world.l2_access(p, v, 0, n % 6, false));
        }
    }
    assert_eq!(world.verdict(), Ok(()));
    let after = of(&world);
    assert!(after[0].0 > before[0].0 + 100, "{after:?}");
    assert_eq!(before[1..], after[1..], "the others' VPs carried out no flush and were not kicked");
}

#[test]
fn each_mistake_is_found() {
    use Mistake::*;
    let flushes = [NoKick, NoDrain, NoTlbControl, OneAsid, NoPost, NoRetire, NoPrepare];
    let bounds = [NoIntercept, NoMap, NoShadow, LeakMemory, LeakRegister];
    for mistake in flushes.into_iter().chain(bounds) {
        let found = (0..6).find_map(|seed| {
            let features = if seed & 1 == 0 { FEW } else { PLAIN };
            let partitions = 1 + (seed as usize & 2);
            run(Shape { mistake: Some(mistake), partitions, ..shape(features, seed) }, 6000).err()
        });
        assert!(found.is_some(), "{mistake:?} was not found");
        println!("{mistake:?}: {}", found.unwrap_or_default());
    }
}

/// Random inputs of the fuzzer hold, and reach what they are to reach.
#[test]
fn a_hostile_l1_harms_no_one() {
    let mut rng = Rng::new(3);
    let mut sum = [Counts::default(); 2];
    for n in 0..150 {
        let bytes: Vec<u8> = (0..200).map(|_| (rng.bits() >> 40) as u8).collect();
        let counts = actions::run(&bytes).unwrap_or_else(|why| panic!("input {n}: {why}"));
        for (sum, c) in sum.iter_mut().zip(counts) {
            sum.entered += c.entered;
            sum.refused += c.refused;
            sum.resets += c.resets;
            sum.checked += c.checked;
        }
    }
    println!("{sum:?}");
    assert!(sum[0].entered > 300 && sum[0].refused > 30 && sum[0].resets > 10, "{:?}", sum[0]);
    assert!(sum[1].checked > 300 && sum[1].refused + sum[1].resets == 0, "{:?}", sum[1]);
}
