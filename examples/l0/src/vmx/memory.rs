//! L1's memory as one VP's library state sees it: with the word `count-bytes` the bytes that it reads are counted.

use core::sync::atomic::AtomicU64;

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};

use crate::counters::Counters;
use crate::memory::L1Memory;

/// L1's memory, and who counts what is read of it.
#[derive(Debug)]
pub struct VpMemory {
    inner: &'static L1Memory,
    counters: Option<&'static Counters>,
}

impl VpMemory {
    /// `memory`, whose reads `counters` counts.
    pub const fn new(memory: &'static L1Memory, counters: Option<&'static Counters>) -> Self {
        Self { inner: memory, counters }
    }

    #[inline]
    fn count(&self, bytes: usize) {
        if let Some(counters) = self.counters {
            counters.guest_bytes_read.add(bytes as u64);
        }
    }
}

impl GuestMemory for VpMemory {
    #[inline]
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.count(buf.len());
        self.inner.read(gpa, buf)
    }

    #[inline]
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.inner.write(gpa, buf)
    }

    /// Not lent where reads are counted: what is read of a lent page cannot be.
    #[inline]
    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        if self.counters.is_some() { None } else { self.inner.page(gpa) }
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        self.count(1);
        self.inner.compare_exchange_u8(gpa, current, new)
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        self.count(4);
        self.inner.compare_exchange_u32(gpa, current, new)
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        self.count(8);
        self.inner.compare_exchange_u64(gpa, current, new)
    }

    #[inline]
    fn read_u32(&self, gpa: L1Gpa) -> Result<u32, MemoryError> {
        self.count(4);
        self.inner.read_u32(gpa)
    }

    #[inline]
    fn read_u64(&self, gpa: L1Gpa) -> Result<u64, MemoryError> {
        self.count(8);
        self.inner.read_u64(gpa)
    }
}
