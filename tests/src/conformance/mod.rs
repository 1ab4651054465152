//! The conformance suite: what `docs/embedding.md` asks of an embedder's implementations, as functions that any of them
//! is given to. Each answers with the first sentence of the contract that does not hold.
//!
//! An embedder depends on this crate for its own tests and calls [`guest_memory`], [`l1_map`] and [`kick`].

use hvcore::addr::{L1Gpa, Level};
use hvcore::flush::{LocalFlush, VpFlush};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping};

/// What does not hold.
pub type Verdict = Result<(), String>;

fn ensure(holds: bool, what: &str) -> Verdict {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn got<T>(result: Result<T, MemoryError>, what: &str) -> Result<T, String> {
    result.map_err(|MemoryError| format!("{what}: refused"))
}

/// `GuestMemory`: `ram` is the start of two pages of plain RAM side by side, which are overwritten; `nothing` is an
/// address where L1 has no memory.
pub fn guest_memory<M: GuestMemory + ?Sized>(memory: &M, ram: L1Gpa, nothing: L1Gpa) -> Verdict {
    let at = |bytes: u64| L1Gpa::new(ram.raw() + bytes);
    let pattern: [u8; 64] = std::array::from_fn(|n| n as u8 ^ 0x5A);
    // In place, misaligned, and across the page boundary.
    for start in [0, 1, 7, 4096 - 32, 4096 - 1, 4096 - 64] {
        got(memory.write(at(start), &pattern), "write")?;
        let mut back = [0; 64];
        got(memory.read(at(start), &mut back), "read")?;
        ensure(back == pattern, "a read returns what was written, across pages too")?;
    }
    got(memory.write(at(0), &[0x11; 64]), "write")?;
    got(memory.write(at(9), &[0xFF; 3]), "write")?;
    ensure(
        got(memory.read_u64(at(8)), "read_u64")? == 0x1111_1111_FFFF_FF11,
        "a write changes its own bytes only, little-endian",
    )?;
    got(memory.write_u64(at(16), 0x1122_3344_5566_7788), "write_u64")?;
    ensure(got(memory.read_u32(at(20)), "read_u32")? == 0x1122_3344, "read_u32 is little-endian")?;
    ensure(memory.read(at(0), &mut []).is_ok(), "an empty read succeeds")?;
    exchanges(memory, at(32))?;
    in_place(memory, ram)?;
    absent(memory, nothing)
}

fn exchanges<M: GuestMemory + ?Sized>(memory: &M, at: L1Gpa) -> Verdict {
    let next = |bytes: u64| L1Gpa::new(at.raw() + bytes);
    got(memory.write_u64(at, 0x8877_6655_4433_2211), "write_u64")?;
    let byte = got(memory.compare_exchange_u8(next(1), 0x22, 0xAA), "compare_exchange_u8")?;
    ensure(byte == Ok(0x22), "a successful exchange tells the old byte")?;
    let byte = got(memory.compare_exchange_u8(next(1), 0x22, 0xBB), "compare_exchange_u8")?;
    ensure(byte == Err(0xAA), "a failed exchange tells the byte that is there and changes nothing")?;
    let word = got(memory.compare_exchange_u32(next(4), 0x8877_6655, 1), "compare_exchange_u32")?;
    ensure(word == Ok(0x8877_6655), "a successful exchange tells the old 4 bytes")?;
    let word = got(memory.compare_exchange_u32(next(4), 2, 3), "compare_exchange_u32")?;
    ensure(word == Err(1), "a failed exchange tells the 4 bytes that are there")?;
    let now = 0x1_4433_AA11;
    let word = got(memory.compare_exchange_u64(at, 0, 5), "compare_exchange_u64")?;
    ensure(word == Err(now), "exchanges change their own bytes only")?;
    let word = got(memory.compare_exchange_u64(at, now, 5), "compare_exchange_u64")?;
    ensure(word == Ok(now) && memory.read_u64(at) == Ok(5), "a successful exchange of 8 bytes")
}

fn in_place<M: GuestMemory + ?Sized>(memory: &M, ram: L1Gpa) -> Verdict {
    use std::sync::atomic::Ordering::Relaxed;
    let Some(page) = memory.page(ram) else { return Ok(()) };
    got(memory.write_u64(L1Gpa::new(ram.raw() + 64), 0x0102_0304), "write_u64")?;
    ensure(u64::from_le(page[8].load(Relaxed)) == 0x0102_0304, "page() shows what was written")?;
    page[8].store(6u64.to_le(), Relaxed);
    ensure(memory.read_u64(L1Gpa::new(ram.raw() + 64)) == Ok(6), "read shows what was stored in page()")
}

fn absent<M: GuestMemory + ?Sized>(memory: &M, nothing: L1Gpa) -> Verdict {
    let what = "an access where there is no memory is an error, not a value";
    ensure(memory.read(nothing, &mut [0; 8]).is_err(), what)?;
    ensure(memory.write(nothing, &[0; 8]).is_err(), what)?;
    ensure(memory.compare_exchange_u8(nothing, 0, 0).is_err(), what)?;
    ensure(memory.compare_exchange_u64(nothing, 0, 0).is_err(), what)?;
    ensure(memory.page(nothing).is_none(), "page() of no memory is none")?;
    // The last bytes of the address space: no wrap to address 0.
    let end = L1Gpa::new(u64::MAX - 3);
    ensure(memory.read(end, &mut [0; 8]).is_err(), "a read past the end of the address space is an error")
}

/// `L1Map` for each of `pages` (L1 GPAs), mapped or not. `own` is true for a host physical address that is the
/// embedder's and no memory of L1's.
pub fn l1_map<T: L1Map + ?Sized>(
    map: &T,
    pages: impl IntoIterator<Item = L1Gpa>,
    own: impl Fn(u64) -> bool,
) -> Verdict {
    for gpa in pages {
        let Some(mapping) = map.map(gpa) else { continue };
        let Mapping { hpa, size, memory_type, .. } = mapping;
        let what = |why: &str| format!("{why}: {gpa:x?} is {mapping:x?}");
        ensure(hpa.raw() & size.offset_mask() == 0, &what("the host address is that of the page's start"))?;
        ensure(memory_type < 8, &what("a memory type has three bits"))?;
        let base = gpa.raw() & !size.offset_mask();
        let last = base + size.offset_mask();
        for inside in [base, last, gpa.raw()] {
            let other = map.map(L1Gpa::new(inside));
            ensure(other == Some(mapping), &what("every address of a page has the same mapping"))?;
        }
        // At most 512 pages of it.
        for off in (0..size.bytes()).step_by(4096.max((size.bytes() >> 9) as usize)) {
            ensure(!own(hpa.raw() + off), &what("memory of the embedder's own is not mapped"))?;
        }
    }
    Ok(())
}

/// Kicks: that one which comes between [`LocalFlush::enter`] and the entry of the guest is not lost. The VP of `local` is
/// outside a guest; `kick` sends one; `run` enters the guest, until it leaves or for some instructions, and returns
/// true when it left because of a kick.
pub fn kick(
    local: &mut LocalFlush<'_>,
    level: Level,
    mut kick: impl FnMut(),
    mut run: impl FnMut() -> bool,
) -> Verdict {
    let shared: &VpFlush = local.shared();
    ensure(shared.runs().is_none(), "the VP starts outside a guest")?;
    let _ = local.enter(level);
    ensure(shared.runs() == Some(level), "the VP is seen to run from enter on")?;
    // Between the last look and the entry: the window that an embedder must close.
    kick();
    ensure(run(), "a kick between enter and the entry of the guest makes it leave at once")?;
    local.exit();
    ensure(shared.runs().is_none(), "the VP is seen to have left")?;
    // When it is out already: harmless.
    kick();
    let _ = local.enter(level);
    let _ = run();
    local.exit();
    // Two in a row are one.
    let _ = local.enter(level);
    kick();
    kick();
    ensure(run(), "a kick is not lost because there was one before")?;
    local.exit();
    Ok(())
}
