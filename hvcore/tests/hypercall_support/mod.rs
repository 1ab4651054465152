//! A caller for tests of the intake: recorded registers, flat memory that counts, a host that remembers requests.
#![allow(dead_code)]

pub mod host;

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::hypercall::*;
use hvcore::memory::{Access, GuestMemory, L1Caller, L2Caller, MemoryError, SecondStage, TranslateError};
use std::cell::RefCell;

/// A register file that remembers which registers were written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Regs {
    pub gpr: [u64; 7],
    pub xmm: [u128; 6],
    /// Bit n: gpr n written; bit 8 + n: xmm n written.
    pub written: u32,
    pub xmm_reads: std::cell::Cell<u32>,
}

impl Registers for Regs {
    fn gpr(&self, r: Gpr) -> u64 {
        self.gpr[r as usize]
    }
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        self.gpr[r as usize] = v;
        self.written |= 1 << r as u32;
    }
    fn xmm(&self, r: Xmm) -> u128 {
        self.xmm_reads.set(self.xmm_reads.get() + 1);
        self.xmm[r as usize]
    }
    fn set_xmm(&mut self, r: Xmm, v: u128) {
        self.xmm[r as usize] = v;
        self.written |= 1 << (8 + r as u32);
    }
}

pub const RAX: u32 = 1 << Gpr::Rax as u32;
pub const RCX: u32 = 1 << Gpr::Rcx as u32;
pub const RDX: u32 = 1 << Gpr::Rdx as u32;

/// Guest memory of some pages from 0 on, with a log of accesses and pages that cannot be reached.
pub struct Mem {
    pub bytes: RefCell<Vec<u8>>,
    pub reads: RefCell<Vec<(u64, usize)>>,
    pub writes: RefCell<Vec<(u64, usize)>>,
}

impl Mem {
    pub fn new(pages: usize) -> Self {
        Self { bytes: RefCell::new(vec![0; pages * 4096]), reads: Default::default(), writes: Default::default() }
    }

    pub fn put(&self, gpa: u64, words: &[u64]) {
        let mut bytes = self.bytes.borrow_mut();
        for (i, w) in words.iter().enumerate() {
            let at = gpa as usize + 8 * i;
            bytes[at..at + 8].copy_from_slice(&w.to_le_bytes());
        }
    }
}

impl GuestMemory for Mem {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.borrow_mut().push((gpa.raw(), buf.len()));
        let bytes = self.bytes.borrow();
        let end = gpa.raw().checked_add(buf.len() as u64).ok_or(MemoryError)?;
        let src = bytes.get(gpa.raw() as usize..end as usize).ok_or(MemoryError)?;
        buf.copy_from_slice(src);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.writes.borrow_mut().push((gpa.raw(), buf.len()));
        let mut bytes = self.bytes.borrow_mut();
        let end = gpa.raw().checked_add(buf.len() as u64).ok_or(MemoryError)?;
        bytes.get_mut(gpa.raw() as usize..end as usize).ok_or(MemoryError)?.copy_from_slice(buf);
        Ok(())
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let mut bytes = self.bytes.borrow_mut();
        let byte = bytes.get_mut(gpa.raw() as usize).ok_or(MemoryError)?;
        if *byte != current {
            return Ok(Err(*byte));
        }
        *byte = new;
        Ok(Ok(current))
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

/// L1's tables: page n of L2 is page n + 1 of L1, page 7 is unmapped, page 6 is read-only.
pub struct Shifted;

impl SecondStage for Shifted {
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        match gpa.raw() >> 12 {
            7 => Err(TranslateError),
            6 if access == Access::Write => Err(TranslateError),
            _ => Ok(L1Gpa::new(gpa.raw() + 4096)),
        }
    }
}

pub const CALLER64: Caller = Caller {
    mode: CallerMode { width: Width::Bits64, protected: true, cpl: 0 },
    level: Level::L1,
    enabled: true,
    privileges: Privileges::ALL.without(Privileges::NESTED_CALLS),
};

pub const CALLER32: Caller = Caller { mode: CallerMode { width: Width::Bits32, protected: true, cpl: 0 }, ..CALLER64 };

/// Registers of a call by `width` with `input`, and the register block filled from `block`.
pub fn registers(width: Width, input: u64, block: &[u64]) -> Regs {
    let word = |i: usize| block.get(i).copied().unwrap_or(0xDEAD_0000 + i as u64);
    let gpr = [0x1111_0000_0001, 0x2222_0000_0001, 0x3333_0000_0001, 4, 0x5555_0000_0001, 0x6666_0000_0001, 7];
    let mut r = Regs { gpr, ..Regs::default() };
    let mut set = |g: Gpr, v: u64| r.gpr[g as usize] = v;
    match width {
        Width::Bits64 => {
            set(Gpr::Rcx, input);
            set(Gpr::Rdx, word(0));
            set(Gpr::R8, word(1));
        }
        Width::Bits32 => {
            // Garbage above bit 31 must not matter.
            let junk = 0xABCD_0000_0000_0000;
            set(Gpr::Rdx, input >> 32 | junk);
            set(Gpr::Rax, input & 0xFFFF_FFFF | junk);
            set(Gpr::Rbx, word(0) >> 32 | junk);
            set(Gpr::Rcx, word(0) & 0xFFFF_FFFF | junk);
            set(Gpr::Rdi, word(1) >> 32 | junk);
            set(Gpr::Rsi, word(1) & 0xFFFF_FFFF | junk);
        }
    }
    for i in 0..6 {
        r.xmm[i] = word(2 + 2 * i) as u128 | (word(3 + 2 * i) as u128) << 64;
    }
    r
}

/// The result value in the registers of a `width` caller.
pub fn result(r: &Regs, width: Width) -> u64 {
    match width {
        Width::Bits64 => r.gpr[Gpr::Rax as usize],
        Width::Bits32 => r.gpr[Gpr::Rdx as usize] << 32 | r.gpr[Gpr::Rax as usize],
    }
}

/// Calls `host` as `caller` from L1 or L2 memory.
pub fn call<H: Offer>(host: &mut H, caller: &Caller, regs: &mut Regs, mem: &Mem) -> Outcome {
    let mut scratch = Scratch::new();
    match caller.level {
        Level::L1 => handle(host, caller, regs, &L1Caller(mem), &mut scratch),
        Level::L2 => handle(host, caller, regs, &L2Caller { memory: mem, second_stage: &Shifted }, &mut scratch),
    }
}
