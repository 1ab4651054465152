//! The VMX embedder on the machine model: what orderly L1s get, what hostile ones do not get, and that each rule is
//! checked.

use tests::model::rng::Rng;
use tests::vmx_embedder::actions::{launch, launch_enlightened, run, run_with};
use tests::vmx_embedder::{Counts, Mistake, Storage, World};

use hvcore::addr::Level;
use nvmx::field::Field;
use tests::model::vmx::Op;
use tests::vmx_embedder::actions::exec;

/// An L1 launches L2, L2 executes CPUID, L1 resumes it; both kinds of VMCS.
#[test]
fn round_trips() {
    for (enlightened, start) in [(false, launch as fn(&mut World<'_>, usize)), (true, launch_enlightened)] {
        let mut storage = Storage::new(2);
        let mut world = World::new(&mut storage, enlightened, 1, None);
        for v in 0..2 {
            start(&mut world, v);
            world.verdict().unwrap();
            assert_eq!(world.vps[v].nested.level(), Level::L2, "{:?}", world.vps[v].nested.last_refusal());
        }
        for round in 1..=10 {
            for v in 0..2 {
                exec(&mut world, v, Op::Cpuid(0, 0));
                world.verdict().unwrap();
                assert_eq!(world.vps[v].nested.level(), Level::L1);
                assert_eq!(world.vps[v].nested.vmcs12().get(Field::ExitReason), 10);
                exec(&mut world, v, Op::Vmresume);
                world.verdict().unwrap();
                assert_eq!(world.vps[v].nested.level(), Level::L2);
            }
            assert_eq!(world.counts.reflected, 2 * round);
        }
        assert_eq!((world.counts.late, world.counts.resets), (0, 0));
    }
}

/// L2 reads and writes its memory through L1's EPT, and is saved and restored in between.
#[test]
fn l2_has_l1s_memory() {
    let mut storage = Storage::new(2);
    let mut world = World::new(&mut storage, false, 1, None);
    launch(&mut world, 0);
    for n in 0..20u64 {
        let at = 0x2_0000 + n * 8;
        // L2's three tables and the page come one by one into the shadow.
        for _ in 0..5 {
            exec(&mut world, 0, Op::Write(at, 8, 0x1111 * n));
        }
        world.kick();
        world.churn(0);
        world.verdict().unwrap();
        assert_eq!(world.mem.read(world.vps[0].at.l1 + at, 8), 0x1111 * n);
    }
    assert_eq!(world.vps[0].nested.level(), Level::L2);
    assert_eq!(world.counts.churned, 20);
}

/// Bytes by chance that an input is made of.
fn input(rng: &mut Rng) -> Vec<u8> {
    (0..64 + rng.below(400)).map(|_| (rng.bits() >> 24) as u8).collect()
}

#[test]
fn sequences_by_chance_keep_the_rules() {
    let mut rng = Rng::new(7);
    let mut all = Counts::default();
    let rounds = std::env::var("VMX_EMBEDDER_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3000);
    for n in 0..rounds {
        let bytes = input(&mut rng);
        let counts = run(&bytes).unwrap_or_else(|why| panic!("input {n}: {why}\n{bytes:?}"));
        all.entered += counts.entered;
        all.reflected += counts.reflected;
        all.churned += counts.churned;
        all.late += counts.late;
        all.resets += counts.resets;
    }
    assert!(all.entered > rounds && all.reflected > rounds && all.churned > rounds / 2, "{all:?}");
}

/// Each mistake breaks a rule soon, and the right one.
#[test]
fn mistakes_are_found() {
    for (mistake, found) in [
        (Mistake::NoInvvpid, "entered by"),
        (Mistake::OneVpid, "entered by"),
        (Mistake::NoControl, "lacks a control"),
        (Mistake::WrongRoot, "second stage"),
        (Mistake::BadField, "refused with 7"),
        (Mistake::Leak, "a host address in L1's memory"),
    ] {
        let mut rng = Rng::new(11);
        let why = (0..500).find_map(|_| run_with(&input(&mut rng), Some(mistake)).err());
        let why = why.unwrap_or_else(|| panic!("{mistake:?} was not found"));
        assert!(why.contains(found), "{mistake:?}: {why}");
    }
}
