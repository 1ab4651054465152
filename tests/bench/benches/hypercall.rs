//! Intake: from the registers of a VMCALL to the handler, and back. The handler itself does nothing.
#![allow(non_snake_case)]

use gungraun::prelude::*;
use hvcore::addr::{L1Gpa, Level};
use hvcore::hypercall::calls::*;
use hvcore::hypercall::*;
use hvcore::memory::{GuestMemory, L1Caller, MemoryError};
use std::hint::black_box;

struct Regs {
    gpr: [u64; 7],
    xmm: [u128; 6],
}

impl Registers for Regs {
    fn gpr(&self, register: Gpr) -> u64 {
        self.gpr[register as usize]
    }
    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.gpr[register as usize] = value;
    }
    fn xmm(&self, register: Xmm) -> u128 {
        self.xmm[register as usize]
    }
    fn set_xmm(&mut self, register: Xmm, value: u128) {
        self.xmm[register as usize] = value;
    }
}

struct Mem(Vec<u8>);

impl GuestMemory for Mem {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let from = gpa.raw() as usize;
        let to = from.checked_add(buf.len()).ok_or(MemoryError)?;
        buf.copy_from_slice(self.0.get(from..to).ok_or(MemoryError)?);
        Ok(())
    }
    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

/// Sees every request and does nothing with it.
struct Host;

impl FlushVirtual for Host {
    #[inline(never)]
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        black_box(target);
        Answer::Done
    }
    #[inline(never)]
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        black_box((target, ranges));
        Answer::Done
    }
}

hvcore::offer_hypercalls!(impl for Host {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
});

struct Setup {
    host: Host,
    caller: Caller,
    regs: Regs,
    mem: Mem,
    scratch: Scratch,
}

const FAST: u64 = 1 << 16;

/// A call with its input in registers, or for a slow one in the page at 0x1000.
fn setup(input: u64, words: &[u64]) -> Box<Setup> {
    let mut mem = Mem(vec![0; 0x2000]);
    let mut regs = Regs { gpr: [0; 7], xmm: [0; 6] };
    regs.gpr[Gpr::Rcx as usize] = input;
    if input & FAST != 0 {
        let word = |i: usize| words.get(i).copied().unwrap_or(0);
        regs.gpr[Gpr::Rdx as usize] = word(0);
        regs.gpr[Gpr::R8 as usize] = word(1);
        for (i, xmm) in regs.xmm.iter_mut().enumerate() {
            *xmm = u128::from(word(2 * i + 3)) << 64 | u128::from(word(2 * i + 2));
        }
    } else {
        regs.gpr[Gpr::Rdx as usize] = 0x1000;
        for (i, word) in words.iter().enumerate() {
            mem.0[0x1000 + 8 * i..][..8].copy_from_slice(&word.to_le_bytes());
        }
    }
    let mode = CallerMode { width: Width::Bits64, protected: true, cpl: 0 };
    let privileges = Privileges::ALL.without(Privileges::NESTED_CALLS);
    let caller = Caller { mode, level: Level::L1, enabled: true, privileges };
    Box::new(Setup { host: Host, caller, regs, mem, scratch: Scratch::new() })
}

fn space() -> Box<Setup> {
    setup(0x2 | FAST, &[0xA000, 0, 0b110])
}

fn list(ranges: u64) -> Box<Setup> {
    let words: Vec<u64> = [0xA000, 0, 0b110].into_iter().chain((0..ranges).map(|n| n << 12)).collect();
    setup(0x3 | FAST | ranges << 32, &words)
}

fn list_ex() -> Box<Setup> {
    let banks = (0..64).map(|n| 1 << n);
    let ranges = (0..444).map(|n| n << 12);
    let words: Vec<u64> = [0xA000, 0, 0, u64::MAX].into_iter().chain(banks).chain(ranges).collect();
    setup(0x14 | 64 << 17 | 444 << 32, &words)
}

fn call(s: &mut Setup) {
    let outcome = handle(&mut s.host, &s.caller, &mut s.regs, &L1Caller(&s.mem), &mut s.scratch);
    let _ = black_box(outcome);
}

/// The call succeeded: what was measured is not an error path.
fn check(s: Box<Setup>) {
    assert_eq!(s.regs.gpr[Gpr::Rax as usize] & 0xFFFF, 0);
}

#[library_benchmark(teardown = check)]
#[bench::fast(space())]
fn hypercall__flush_space(mut s: Box<Setup>) -> Box<Setup> {
    call(&mut s);
    s
}

#[library_benchmark(teardown = check)]
#[bench::_1(list(1))]
#[bench::_11(list(11))]
fn hypercall__flush_list__xmm(mut s: Box<Setup>) -> Box<Setup> {
    call(&mut s);
    s
}

#[library_benchmark(teardown = check)]
#[bench::_444ranges(list_ex())]
fn hypercall__flush_list_ex__memory__64banks(mut s: Box<Setup>) -> Box<Setup> {
    call(&mut s);
    s
}

library_benchmark_group!(
    name = hypercall,
    benchmarks = [hypercall__flush_space, hypercall__flush_list__xmm, hypercall__flush_list_ex__memory__64banks]
);

main!(library_benchmark_groups = hypercall);
