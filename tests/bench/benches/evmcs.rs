//! L0's half of the enlightened VMCS: reading L1's page at an entry, writing it after an exit. The page is lent.
#![allow(non_snake_case)]

use gungraun::prelude::*;
use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::evmcs::EvmcsCache;
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

const GPA: L1Gpa = L1Gpa::new(0);

/// One page.
struct Memory([AtomicU64; 512]);

impl GuestMemory for Memory {
    fn read(&self, _: L1Gpa, _: &mut [u8]) -> Result<(), MemoryError> {
        Err(MemoryError)
    }
    /// Whole words, and halves of words.
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let first = gpa.raw() as usize / 8;
        if let Ok(half) = <[u8; 4]>::try_from(buf) {
            let shift = gpa.raw() % 8 * 8;
            let old = self.0[first].load(Ordering::Relaxed);
            let new = old & !(0xFFFF_FFFF << shift) | u64::from(u32::from_le_bytes(half)) << shift;
            self.0[first].store(new, Ordering::Relaxed);
            return Ok(());
        }
        let (words, rest) = buf.as_chunks::<8>();
        assert!(gpa.raw() % 8 == 0 && rest.is_empty(), "only whole words are written so");
        for (word, bytes) in self.0[first..].iter().zip(words) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        Ok(())
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
    fn page(&self, _: L1Gpa) -> Option<&[AtomicU64; 512]> {
        Some(&self.0)
    }
}

struct Setup {
    memory: Memory,
    cache: EvmcsCache,
    vmcs12: Vmcs12,
}

/// A page that was entered once; `clean` says which groups still are.
fn entered(clean: u64) -> Box<Setup> {
    let memory = Memory([const { AtomicU64::new(0) }; 512]);
    memory.0[0].store(1, Ordering::Relaxed);
    let mut s = Box::new(Setup { memory, cache: EvmcsCache::new(), vmcs12: Vmcs12::default() });
    let loaded = s.cache.enter(&s.memory, None, GPA, true, &mut s.vmcs12);
    assert!(loaded.is_ok() && s.cache.entered(&s.memory).is_ok());
    assert!(s.cache.store(&s.memory, &s.vmcs12).is_ok());
    s.memory.0[0x338 / 8].store(clean, Ordering::Relaxed);
    s
}

/// An exit after `entered`: exit information and RIP, or all guest state as well.
fn left(all: bool) -> Box<Setup> {
    let mut s = entered(0xFFFF);
    for field in [Field::ExitReason, Field::ExitInstructionLength, Field::GuestRip, Field::GuestRflags] {
        s.vmcs12.set(field, 2);
    }
    for (n, field) in Field::ALL.iter().enumerate().filter(|_| all) {
        s.vmcs12.set(*field, n as u64 + 3);
    }
    s
}

#[library_benchmark]
#[bench::clean(entered(0xFFFF))]
#[bench::guest_basic(entered(0xFFFF & !(1 << 10)))]
#[bench::whole(entered(0))]
fn evmcs__load(mut s: Box<Setup>) -> Box<Setup> {
    let loaded = s.cache.enter(&s.memory, None, GPA, false, &mut s.vmcs12);
    _ = black_box((loaded.is_ok(), s.cache.entered(&s.memory).is_ok()));
    s
}

#[library_benchmark]
#[bench::cpuid(left(false))]
#[bench::whole(left(true))]
fn evmcs__store(mut s: Box<Setup>) -> Box<Setup> {
    _ = black_box(s.cache.store(&s.memory, &s.vmcs12).is_ok());
    s
}

library_benchmark_group!(name = evmcs, benchmarks = [evmcs__load, evmcs__store]);

main!(library_benchmark_groups = evmcs);
