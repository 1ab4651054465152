//! Hostile VMCBs: half of them all random, half valid ones with one to eight fields changed. Nothing confines them: L1
//! intercepts what the VMCB says, and L2 runs on whatever tables it names.
//!
//! Each runs in a world of its own, beside an orderly partition on the same processor. Afterwards the rules of
//! [`super`] hold, L1 has its own state back, and the orderly partition finds its memory as it should be.

use hvcore::addr::Level;
use nsvm::vmcb::Save;

use super::actions::{FIELDS, guest};
use super::guests::{Ended, vmcb12};
use super::{Shape, Storage, World, layout};
use crate::model::rng::Rng;
use crate::model::svm::{Features, Op};

/// What became of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// L2 ran, and L1 runs again or L2 would go on.
    Entered,
    /// Exit code -1.
    Refused,
    /// L2 ran and L1 was shut down by what it did.
    Shutdown,
}

/// How many there were of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// L2 ran, and L1 after it.
    pub entered: u64,
    /// VMRUN was refused.
    pub refused: u64,
    /// L2 ran, and L1 was shut down.
    pub shutdown: u64,
}

impl Totals {
    /// Counts one.
    pub fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Entered => self.entered += 1,
            Outcome::Refused => self.refused += 1,
            Outcome::Shutdown => self.shutdown += 1,
        }
    }
}

/// The storage that [`case`] needs.
pub fn storage() -> Storage {
    Storage::new(2, 1)
}

/// Case `n` of the sequence that `seed` begins; `Err` when something does not hold.
pub fn case(storage: &mut Storage, seed: u64, n: u64) -> Result<Outcome, String> {
    let mut rng = Rng::new(seed ^ n.wrapping_mul(0x9E37_79B9));
    let features = if n & 2 == 0 { Features { asids: 6, ..Features::FULL } } else { Features::TCG };
    let shape = Shape { partitions: 2, vps: 1, cpus: 1, features, seed: rng.bits(), mistake: None };
    let mut world = World::new(&shape, storage);
    world.partitions[0].tables.unknown = true;
    write(&mut world, &mut rng, n & 1 != 0);
    let outcome = run(&mut world, &mut rng)?;
    world.off(0, 0);
    // The neighbour.
    world.l2_access(1, 0, 0, rng.below(layout::PAGES as u64) as usize, rng.chance(512));
    world.l1_access(1, 0, rng.below(layout::PAGES as u64) as usize, rng.chance(512));
    world.verdict().map(|()| outcome)
}

/// Writes L1's VMCB.
fn write(world: &mut World<'_>, rng: &mut Rng, valid: bool) {
    let at = world.frame(0, vmcb12(0, 0));
    if !valid {
        (0..512).for_each(|n| world.mem.write(at + n * 8, 8, rng.bits()));
    } else {
        for _ in 0..=rng.below(8) {
            // Those that decide, or any.
            let (off, size) = match rng.below(2) {
                0 => FIELDS[rng.below(FIELDS.len() as u64) as usize],
                _ => ([rng.below(0x1C), 0x80 + rng.below(0x53)][rng.below(2) as usize] * 8, 8),
            };
            let old = world.mem.read(at + off, size);
            let new = match rng.below(8) {
                0 => rng.bits(),
                1 => [0, u64::MAX, 1 << 63, 1 << 40, (1 << 40) - 1, 0xFFF][rng.below(6) as usize],
                2 => old.wrapping_add(rng.below(16)).wrapping_sub(8),
                3 => rng.bits() & rng.bits() & rng.bits(),
                _ => old ^ 1 << rng.below(size * 8),
            };
            world.mem.write(at + off, size, new);
        }
    }
    for off in (0..0x1000).step_by(8) {
        // No host address but those that leak.
        let word = world.mem.read(at + off, 8);
        world.mem.write(at + off, 8, guest(word));
    }
}

/// VMRUN, and some instructions of L2.
fn run(world: &mut World<'_>, rng: &mut Rng) -> Result<Outcome, String> {
    world.off(0, 0);
    let before = world.partitions[0].vps[0].hw.vmcb01.save;
    match world.exec(0, 0, Op::Vmrun(vmcb12(0, 0))) {
        Ended::ToL2 => {}
        Ended::Done(_) => {
            let counts = world.partitions[0].counts;
            world.off(0, 0);
            return match counts.refused {
                1 => same_state(world, &before).map(|()| Outcome::Refused),
                _ => Err("VMRUN completed, and was neither entered nor refused".into()),
            };
        }
        ended => return Err(world.broken.clone().unwrap_or_else(|| format!("VMRUN ended in {ended:x?}"))),
    }
    for _ in 0..12 {
        match world.exec(0, 0, op(rng)) {
            Ended::ToL1(_) => {
                world.off(0, 0);
                return same_state(world, &before).map(|()| Outcome::Entered);
            }
            Ended::Reset(_) => return Ok(Outcome::Shutdown),
            Ended::ToL2 if world.partitions[0].vps[0].nested.level() == Level::L1 => return Err("two levels".into()),
            _ => {}
        }
    }
    Ok(Outcome::Entered)
}

/// L1 has back what #VMEXIT gives back, and goes on behind its VMRUN.
fn same_state(world: &World<'_>, before: &Save) -> Result<(), String> {
    let now = &world.partitions[0].vps[0].hw.vmcb01.save;
    let of = |s: &Save| [s.cr0, s.cr3, s.cr4, s.efer, s.rsp, s.rflags];
    let segments = |s: &Save| [s.es, s.cs, s.ss, s.ds, s.gdtr, s.idtr];
    let same = of(now) == of(before) && segments(now) == segments(before) && now.rip == before.rip + 3;
    match same && (now.rax, now.cpl, now.dr7) == (vmcb12(0, 0), 0, 0x400) {
        true => Ok(()),
        false => Err(format!("L1 was {before:x?} and is {now:x?}")),
    }
}

/// An instruction of L2.
fn op(rng: &mut Rng) -> Op {
    let window = layout::L2_WINDOW + rng.below(0x40) * 512;
    let value = guest(rng.bits() >> 24);
    match rng.below(24) {
        0 => Op::Cpuid(0, 0),
        1 => Op::Rdmsr(0xC000_0080 + rng.below(5) as u32),
        2 => Op::Wrmsr([0xC000_0080, 0x174, 0xC001_0117, 0x277][rng.below(4) as usize], value),
        3 => Op::In(rng.below(256) as u16, 1),
        4 => Op::Out(rng.below(256) as u16, 4, value as u32),
        5 => Op::Hlt,
        6 => Op::Vmmcall,
        7 => Op::Vmrun(value & !0xFFF),
        8 => Op::Vmload(value & 0x1F_F000),
        9 => Op::Vmsave(value & 0x1F_F000),
        10 => Op::Stgi,
        11 => Op::Clgi,
        12 => Op::Invlpga(window, rng.below(18) as u32),
        13 => Op::MovToCr([0, 3, 4, 8][rng.below(4) as usize], value),
        14 => Op::Raise(rng.below(32) as u8, None),
        15 => Op::Intn(rng.below(256) as u8),
        16 => Op::Iret,
        17 => Op::Pause,
        18 => Op::Sti,
        19 => Op::Rdtsc,
        20 => Op::Fetch(window),
        21 => Op::Write(window, 8, value),
        22 => Op::Read(guest(rng.bits() >> 16), 8),
        _ => Op::Read(window, 8),
    }
}
