//! Sequences of actions from bytes, for the fuzzer and for tests.

use std::cell::RefCell;

use nvmx::field::Field;

use super::layout::{ASSIST, EVMCS, VMCS12, VMCSS, VMXON, WINDOW, good};
use super::{Counts, Mistake, Storage, World, is_host};
use crate::harness::decode::Bytes;
use crate::model::vmx::Op;

/// VPs in every input.
const VPS: usize = 2;

thread_local! {
    /// From one input to the next, so that an input costs what it does and not what it does not touch.
    static STORAGE: RefCell<Storage> = RefCell::new(Storage::new(VPS));
}

/// A value that is not mistaken for a host address.
fn guest(value: u64) -> u64 {
    if is_host(value) { value ^ 1 << 40 } else { value }
}

/// Where a memory operand is: the first words of the window.
const OPERANDS: u64 = WINDOW;

/// Runs `op` in VP `v`, entering its guest if need be.
pub fn exec(world: &mut World<'_>, v: usize, op: Op) {
    if world.running != Some(v) {
        world.kick();
    }
    // An entry may end in an exit of its own: tries are bounded.
    for _ in 0..4 {
        if world.running == Some(v) || world.enter(v) {
            break;
        }
    }
    world.step(op);
}

/// A VMX instruction with an 8-byte operand that holds `value`.
fn with_operand(world: &mut World<'_>, v: usize, value: u64, op: fn(u64) -> Op) {
    world.mem.write(world.vps[v].at.l1 + OPERANDS, 8, guest(value));
    exec(world, v, op(OPERANDS));
}

/// L1 enters VMX operation, loads its first VMCS and launches L2.
pub fn launch(world: &mut World<'_>, v: usize) {
    with_operand(world, v, VMXON, Op::Vmxon);
    with_operand(world, v, VMCS12, Op::Vmclear);
    with_operand(world, v, VMCS12, Op::Vmptrld);
    exec(world, v, Op::Vmlaunch);
}

/// The same with the enlightened VMCS.
pub fn launch_enlightened(world: &mut World<'_>, v: usize) {
    with_operand(world, v, VMXON, Op::Vmxon);
    announce(world, v, true);
    exec(world, v, Op::Vmlaunch);
}

/// Enables the VP assist page and announces the enlightened VMCS there, or not.
fn announce(world: &mut World<'_>, v: usize, on: bool) {
    world.vps[v].assist = true;
    world.mem.write(world.vps[v].at.l1 + ASSIST + 0x28, 8, on.into());
}

/// Physical address of a region: mostly a good one.
fn region(b: &mut Bytes<'_>) -> u64 {
    match b.u8() {
        n @ 0..224 => VMCS12 + u64::from(n) % VMCSS * 4096,
        224..232 => VMXON,
        232..240 => EVMCS,
        _ => b.word(),
    }
}

/// The instruction of a hostile guest.
fn op(b: &mut Bytes<'_>) -> Op {
    let window = WINDOW + 0x100 + u64::from(b.u8()) * 512;
    match b.u8() % 32 {
        0 => Op::Cpuid(b.u8().into(), 0),
        1 => Op::Rdmsr(msr(b)),
        2 => Op::Wrmsr(msr(b), guest(b.word())),
        3 => Op::In(b.u8().into(), 1),
        4 => Op::Out(b.u16(), 4, b.u8().into()),
        5 => Op::Vmcall,
        6 => Op::Vmfunc(b.u8().into()),
        7 => Op::MovToCr([0, 3, 4, 8][usize::from(b.u8()) % 4], guest(b.word())),
        8 => Op::MovToDr(b.u8() % 8, guest(b.word())),
        9 => Op::MovFromCr([0, 3, 4][usize::from(b.u8()) % 3]),
        10 => {
            let vector = b.u8() % 32;
            Op::Raise(vector, matches!(vector, 8 | 10..=14 | 17).then_some(0))
        }
        11 => Op::Intn(b.u8()),
        // The model's IRET takes any frame, so not that.
        12 => Op::Pushf,
        13 => Op::Invlpg(window),
        14 => Op::Rdtsc,
        15 => Op::Pause,
        16 => Op::Sti,
        17 => Op::Cli,
        18 => Op::Xsetbv(b.u8().into()),
        19 => Op::Hlt,
        20 => Op::Wbinvd,
        21 => Op::Invd,
        22 => Op::Clts,
        23 => Op::Lmsw(b.u16()),
        24 => Op::Invvpid(u64::from(b.u8()) % 5, OPERANDS),
        25 => Op::Invept(u64::from(b.u8()) % 4, OPERANDS),
        26 => Op::Write(window, 8, guest(b.word())),
        27 => Op::Write(u64::from(b.u16()) << 4, 8, guest(b.word())),
        28 => Op::Vmxoff,
        _ => Op::Read(window, 8),
    }
}

fn msr(b: &mut Bytes<'_>) -> u32 {
    const LIKELY: [u32; 10] = [0x3A, 0x480, 0x485, 0x48B, 0xC000_0080, 0x174, 0x277, 0x4000_0000, 0x1D9, 0x10];
    match b.u8() {
        n if n < 224 => LIKELY[usize::from(n) % LIKELY.len()],
        _ => b.word() as u32,
    }
}

/// A field, mostly one that a good VMCS has, and a value near the good one.
fn field_and_value(b: &mut Bytes<'_>) -> (u32, u64) {
    let good = good();
    let (field, value) = match b.u8() {
        n if n < 160 => good[usize::from(n) % good.len()],
        n => {
            let field = Field::ALL[(usize::from(n) * 7 + usize::from(b.u8())) % Field::ALL.len()];
            (field, good.iter().find(|(each, _)| *each == field).map_or(0, |(_, value)| *value))
        }
    };
    let how = b.u8();
    let word = b.word();
    let new = match how & 7 {
        0 => word,
        1 => value | word,
        2 => value & !word,
        3 => value ^ word,
        4 | 5 => value ^ 1 << (how >> 3 & 31),
        _ => value,
    };
    (field.encoding().0, guest(new))
}

/// L1 changes a field of its VMCS, enlightened or not.
fn mutate(world: &mut World<'_>, b: &mut Bytes<'_>, v: usize) {
    let (encoding, value) = field_and_value(b);
    let field = Field::from_encoding(nvmx::field::Encoding(encoding));
    let place = field.and_then(Field::evmcs);
    if let (Some(place), true) = (place, world.vps[v].assist) {
        let base = world.vps[v].at.l1 + EVMCS;
        world.mem.write(base + u64::from(place.offset), place.size.into(), value);
        let clean = if b.u8() & 3 == 0 { b.u16().into() } else { 0 };
        world.mem.write(base + 0x338, 4, clean);
        // Small fields side by side must not look like a host address.
        let word = base + (u64::from(place.offset) & !7);
        if is_host(world.mem.read(word, 8)) {
            world.mem.write(word, 8, 0);
        }
    } else {
        exec(world, v, Op::Vmwrite(encoding, value));
    }
}

/// One input of the fuzzer. What was counted, or the rule that was broken.
pub fn run(bytes: &[u8]) -> Result<Counts, String> {
    run_with(bytes, None)
}

/// The same with a mistake of the embedder's.
pub fn run_with(bytes: &[u8], mistake: Option<Mistake>) -> Result<Counts, String> {
    let mut b = Bytes(bytes);
    let start = b.u8();
    let seed = b.u16().into();
    STORAGE.with_borrow_mut(|storage| drive(b, World::new(storage, start & 1 != 0, seed, mistake)))
}

fn drive(mut b: Bytes<'_>, mut world: World<'_>) -> Result<Counts, String> {
    for _ in 0..48 {
        if b.0.is_empty() {
            break;
        }
        let kind = b.u8();
        let v = usize::from(kind >> 7);
        act(&mut world, &mut b, v, kind & 0x7F);
        if world.vps[v].fell.take().is_some() {
            world.kick();
        }
        world.verdict()?;
    }
    world.kick();
    world.verdict()?;
    Ok(world.counts)
}

fn act(world: &mut World<'_>, b: &mut Bytes<'_>, v: usize, kind: u8) {
    match kind {
        0..8 => launch(world, v),
        8..12 => launch_enlightened(world, v),
        12..24 => exec(world, v, Op::Vmresume),
        24..28 => exec(world, v, Op::Vmlaunch),
        28..44 => {
            for _ in 0..1 + b.u8() % 4 {
                mutate(world, b, v);
            }
            exec(world, v, if b.u8() & 1 != 0 { Op::Vmlaunch } else { Op::Vmresume });
        }
        44..48 => {
            let at = region(b);
            with_operand(world, v, at, Op::Vmptrld);
        }
        48..51 => {
            let at = region(b);
            with_operand(world, v, at, Op::Vmclear);
        }
        51 => with_operand(world, v, 0, Op::Vmptrst),
        52 => exec(world, v, Op::Vmread(field_and_value(b).0)),
        53 => announce(world, v, b.u8() & 1 != 0),
        54..58 => {
            world.kick();
            world.churn(v);
        }
        58..60 => {
            world.vps[v].nested.pend_nmi();
            world.kick();
        }
        60 => {
            world.vps[v].nested.pend_init();
            world.kick();
        }
        61 => {
            world.vps[v].nested.pend_sipi(b.u8());
            world.kick();
        }
        62 => {
            let operand = world.vps[v].at.l1 + OPERANDS;
            world.mem.write(operand, 8, guest(b.word()));
            world.mem.write(operand + 8, 8, guest(b.word()));
        }
        63 => world.kick(),
        64..80 => exec(world, v, Op::Cpuid(0, 0)),
        _ => {
            let op = op(b);
            exec(world, v, op);
        }
    }
}
