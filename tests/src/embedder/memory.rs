//! L1's memory as the embedder keeps it: each page has a frame, and may be away or write-protected.
//!
//! Implements the library's `GuestMemory` and `L1Map`; watches everything that the library writes for host addresses.

use std::cell::Cell;
use std::rc::Rc;

use hvcore::addr::{Hpa, L1Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use hvcore::shadow::{L1Map, Mapping, PageSize};

use super::{HOST, L1_BYTES, is_host};
use crate::model::mem::PhysMem;

/// Where a page of L1's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// Host physical address.
    pub frame: u64,
    /// Mapped.
    pub present: bool,
    /// Mapped writable.
    pub writable: bool,
}

/// The memory of one partition.
#[derive(Clone)]
pub struct L1View {
    mem: Rc<PhysMem>,
    homes: Rc<[Cell<Home>]>,
    leaks: Rc<Cell<u64>>,
}

impl L1View {
    /// Every page in the frame of the same offset from `base`.
    pub fn new(mem: Rc<PhysMem>, base: u64) -> Self {
        let home = |n: u64| Cell::new(Home { frame: base + n * 4096, present: true, writable: true });
        Self { mem, homes: (0..L1_BYTES >> 12).map(home).collect(), leaks: Rc::default() }
    }

    /// The home of the page at `gpa`.
    pub fn home(&self, gpa: u64) -> Option<Home> {
        self.homes.get((gpa >> 12) as usize).map(Cell::get)
    }

    /// Moves it. The caller tells everyone.
    pub fn set_home(&self, gpa: u64, home: Home) {
        self.homes[(gpa >> 12) as usize].set(home);
    }

    /// Host addresses that the library wrote to L1's memory so far.
    pub fn leaks(&self) -> u64 {
        self.leaks.get()
    }

    /// A page that is away comes back when the embedder itself needs it: the frame still has its contents.
    fn at(&self, gpa: u64) -> Result<u64, MemoryError> {
        self.home(gpa).map(|home| home.frame | (gpa & 4095)).ok_or(MemoryError)
    }

    fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = gpa.wrapping_add(done as u64);
            let n = (4096 - (at & 4095) as usize).min(len - done);
            let piece = (n > 0).then_some((at, done..done + n));
            done += n;
            piece
        })
    }

    fn exchange(&self, gpa: L1Gpa, size: u64, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        Ok(self.mem.cmpxchg(self.at(gpa.raw())?, size, current, new).map(|()| current))
    }
}

impl GuestMemory for L1View {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        for (at, range) in Self::pieces(gpa.raw(), buf.len()) {
            self.mem.read_bytes(self.at(at)?, &mut buf[range]);
        }
        Ok(())
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        for (at, range) in Self::pieces(gpa.raw(), buf.len()) {
            self.mem.write_bytes(self.at(at)?, &buf[range]);
        }
        let leaks = buf.as_chunks::<8>().0.iter().filter(|word| is_host(u64::from_le_bytes(**word))).count();
        self.leaks.set(self.leaks.get() + leaks as u64);
        Ok(())
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let result = self.exchange(gpa, 1, current.into(), new.into())?;
        Ok(result.map(|_| current).map_err(|seen| seen as u8))
    }

    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        let result = self.exchange(gpa, 4, current.into(), new.into())?;
        Ok(result.map(|_| current).map_err(|seen| seen as u32))
    }

    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        self.exchange(gpa, 8, current, new)
    }
}

impl L1Map for L1View {
    fn map(&self, gpa: L1Gpa) -> Option<Mapping> {
        let home = self.home(gpa.raw()).filter(|home| home.present)?;
        debug_assert!(home.frame >= HOST);
        Some(Mapping {
            hpa: Hpa::new(home.frame),
            size: PageSize::Size4K,
            writable: home.writable,
            executable: true,
            memory_type: 0,
        })
    }
}
