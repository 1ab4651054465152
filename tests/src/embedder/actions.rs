//! Sequences of actions: by chance for tests, from bytes for the fuzzer.

use std::cell::RefCell;

use nsvm::save::SavedState;
use zerocopy::IntoBytes;

use super::guests::{Entry, vmcb12};
use super::layout::{self, PAGES};
use super::{Counts, Shape, Storage, World, is_host};
use crate::harness::decode::Bytes;
use crate::model::svm::Features;
use crate::model::svm::Op;

/// One action of orderly guests, or of the embedder, by six numbers.
pub fn orderly(world: &mut World<'_>, p: usize, v: usize, kind: u64, n: usize, arg: u64) {
    let (s, n) = (arg as usize & 1, n % PAGES);
    let page = (arg >> 1) as u8 % PAGES as u8;
    let to: Entry = match arg >> 8 & 7 {
        0 => None,
        1 => Some((page, false)),
        _ => Some((page, true)),
    };
    let flag = arg >> 4 & 1 != 0;
    match kind % 32 {
        0 => world.l2_edit(p, v, s, n, to, flag),
        1 => world.l1_edit(p, v, n, page, flag),
        2 => world.npt_edit(p, v, s, n, to, flag),
        3 => world.npt_edit_plain(p, s, n, to, flag),
        4 => world.disturb(p, n, arg >> 5),
        5 => world.off(p, v),
        6 => {
            world.off(p, v);
            world.churn(p, v);
        }
        7 => world.to_l1(p, v),
        8..=11 => world.l1_access(p, v, n, flag),
        _ => world.l2_access(p, v, s, n, flag),
    }
}

/// An orderly action by chance.
pub fn by_chance(world: &mut World<'_>) {
    let (kind, arg) = (world.rng.bits() >> 32, world.rng.bits() >> 32);
    let p = world.rng.below(world.partitions.len() as u64) as usize;
    let v = world.rng.below(world.partitions[p].vps.len() as u64) as usize;
    // Slots that were just changed are the interesting ones.
    let n = if world.rng.chance(600) { world.hot } else { world.rng.below(PAGES as u64) as usize };
    world.hot = n;
    orderly(world, p, v, kind, n, arg);
}

/// The instruction of a hostile guest.
fn op(b: &mut Bytes<'_>, v: usize) -> Op {
    let window = layout::L2_WINDOW + u64::from(b.u8()) * 512;
    match b.u8() % 32 {
        0 => Op::Cpuid(b.u8().into(), 0),
        1 => Op::Rdmsr(msr(b)),
        2 => Op::Wrmsr(msr(b), guest(b.word())),
        3 => Op::In(b.u8().into(), 1),
        4 => Op::Out(b.u16(), 4, b.u8().into()),
        5 => Op::Hlt,
        6 => Op::Vmmcall,
        7 => Op::Vmrun(vmcb12(v, 0)),
        8 => Op::Vmrun(guest(b.word())),
        9 => Op::Vmload(vmcb12(v, 1)),
        10 => Op::Vmsave(vmcb12(v, 1)),
        11 => Op::Stgi,
        12 => Op::Clgi,
        13 => Op::Skinit,
        14 => Op::Invlpga(window, u32::from(b.u8()) % 18),
        15 => Op::MovToCr([0, 3, 4, 8][usize::from(b.u8()) % 4], guest(b.word())),
        16 => Op::MovToDr(b.u8() % 8, guest(b.word())),
        17 => Op::Raise(b.u8() % 32, None),
        18 => Op::Intn(b.u8()),
        19 => Op::Iret,
        20 => Op::Invlpg(window),
        21 => Op::Rdtsc,
        22 => Op::Pause,
        23 => Op::Sti,
        24 => Op::Cli,
        25 => Op::Xsetbv(b.u8().into()),
        26 => Op::Fetch(window),
        27 => Op::Wbinvd,
        28 => Op::Write(window, 8, guest(b.word())),
        _ => Op::Read(window, 8),
    }
}

fn msr(b: &mut Bytes<'_>) -> u32 {
    const LIKELY: [u32; 13] = [
        0xC000_0080,
        0xC000_0104,
        0xC001_0114,
        0xC001_0117,
        0x174,
        0x277,
        0x4000_0000,
        0x4000_0001,
        0x4000_0073,
        0x4000_0002,
        0xC000_0082,
        0x1B,
        0x10,
    ];
    match b.u8() {
        n if n < 224 => LIKELY[usize::from(n) % LIKELY.len()],
        _ => b.word() as u32,
    }
}

/// A value that is not mistaken for a host address.
pub(super) fn guest(value: u64) -> u64 {
    if is_host(value) { value ^ 1 << 40 } else { value }
}

/// Offsets in a VMCB that a mutation prefers, with their sizes.
pub(super) const FIELDS: [(u64, u64); 44] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0C, 4),
    (0x10, 4),
    (0x14, 4),
    (0x3C, 2),
    (0x3E, 2),
    (0x40, 8),
    (0x48, 8),
    (0x50, 8),
    (0x58, 4),
    (0x5C, 1),
    (0x60, 8),
    (0x68, 8),
    (0x90, 8),
    (0xA8, 8),
    (0xB0, 8),
    (0xB8, 8),
    (0xC0, 4),
    (0xC8, 8),
    (0x3E0, 4),
    (0x3E4, 4),
    (0x3E8, 8),
    (0x3F0, 8),
    (0x410, 8),
    (0x418, 8),
    (0x420, 8),
    (0x460, 8),
    (0x480, 8),
    (0x488, 8),
    (0x4CB, 1),
    (0x4D0, 8),
    (0x548, 8),
    (0x550, 8),
    (0x558, 8),
    (0x560, 8),
    (0x568, 8),
    (0x570, 8),
    (0x578, 8),
    (0x5D8, 8),
    (0x5F8, 8),
    (0x640, 8),
    (0x668, 8),
];

/// Changes fields of L1's VMCB, by replacing them or some of their bits.
fn mutate(world: &mut World<'_>, b: &mut Bytes<'_>, v: usize) {
    let vmcb = vmcb12(v, usize::from(b.u8() & 1));
    for _ in 0..1 + b.u8() % 8 {
        let (off, size) = FIELDS[usize::from(b.u8()) % FIELDS.len()];
        let (how, value) = (b.u8(), b.word());
        let at = world.frame(0, vmcb + off);
        let old = world.mem.read(at, size);
        let new = match how & 3 {
            0 => value,
            1 => old | value,
            2 => old & !value,
            _ => old ^ value,
        };
        world.mem.write(at, size, guest(new));
    }
    // Smaller fields side by side must not look like a host address either.
    for off in (0..0x1000).step_by(8) {
        let at = world.frame(0, vmcb + off);
        let word = world.mem.read(at, 8);
        if is_host(word) {
            world.mem.write(at, 8, guest(word));
        }
    }
}

/// Changes bytes of a saved state.
fn tamper(b: &mut Bytes<'_>, saved: &mut SavedState) {
    let bytes = saved.as_mut_bytes();
    for _ in 0..1 + b.u8() % 4 {
        let at = usize::from(b.u16()) % bytes.len();
        bytes[at] ^= b.u8();
    }
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = guest(u64::from_le_bytes(*word)).to_le_bytes();
    }
}

/// One input of the fuzzer: partition 0 is hostile, partition 1 orderly, on shared processors. What was counted in them,
/// or the rule that was broken.
pub fn run(bytes: &[u8]) -> Result<Vec<Counts>, String> {
    let mut b = Bytes(bytes);
    let start = b.u8();
    let features = if start & 1 == 0 { Features::TCG } else { Features { asids: 6, ..Features::FULL } };
    let features = Features { asids: features.asids.min(3 + u32::from(start >> 1 & 15)), ..features };
    let shape = Shape {
        partitions: SIZE,
        vps: SIZE,
        cpus: 1 + usize::from(start >> 5 & 1),
        features,
        seed: b.u16().into(),
        mistake: None,
    };
    STORAGE.with_borrow_mut(|storage| drive(b, World::new(&shape, storage)))
}

/// Partitions and VPs of each, in every input.
const SIZE: usize = 2;

thread_local! {
    /// From one input to the next, so that an input costs what it does and not what it does not touch.
    static STORAGE: RefCell<Storage> = RefCell::new(Storage::new(SIZE, SIZE));
}

fn drive(mut b: Bytes<'_>, mut world: World<'_>) -> Result<Vec<Counts>, String> {
    for _ in 0..48 {
        if b.0.is_empty() {
            break;
        }
        let kind = b.u8();
        let v = usize::from(kind >> 7);
        match kind & 0x7F {
            0..32 => {
                let (n, arg) = (b.u8().into(), b.u16().into());
                orderly(&mut world, 1, v, kind.into(), n, arg);
            }
            32..56 => {
                let (n, arg) = (b.u8().into(), b.u16().into());
                orderly(&mut world, 0, v, u64::from(kind) & 31, n, arg);
            }
            56..72 => {
                world.off(0, v);
                world.partitions[0].tables.unknown = true;
                mutate(&mut world, &mut b, v);
            }
            72..80 => {
                world.off(0, v);
                let register = usize::from(b.u8() & 15);
                let value = guest(b.word());
                world.partitions[0].vps[v].hw.regs.0[register] = value;
            }
            80..84 => {
                world.partitions[0].tables.unknown = true;
                world.partitions[0].vps[v].nested.pend_nmi();
                world.off(0, v);
            }
            84 => {
                world.partitions[0].tables.unknown = true;
                world.partitions[0].vps[v].nested.pend_init();
                world.off(0, v);
            }
            85 => {
                world.partitions[0].tables.unknown = true;
                world.off(0, v);
                world.churn_with(0, v, |saved| tamper(&mut b, saved));
            }
            _ => {
                world.partitions[0].tables.unknown = true;
                let op = op(&mut b, v);
                world.exec(0, v, op);
            }
        }
        if world.partitions[0].vps[v].fell.is_some() {
            world.partitions[0].tables.unknown = true;
            world.off(0, v);
            world.boot(0, v);
        }
        world.verdict()?;
    }
    Ok(world.partitions.iter().map(|p| p.counts).collect())
}
