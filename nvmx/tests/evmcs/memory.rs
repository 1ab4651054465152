//! L1's memory for these tests: a few pages, every access written down.

use core::sync::atomic::{AtomicU64, Ordering};
use std::cell::RefCell;

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;

pub const PAGE: u64 = 0x5000;
pub const OTHER: u64 = 0x6000;
pub const ASSIST: u64 = 0x7000;
const PAGES: usize = 10;

pub type PageWords = [AtomicU64; 512];

/// Pages 0 to 9; all else is no memory.
pub struct Memory {
    pages: Vec<PageWords>,
    /// Lends its pages.
    pub lends: bool,
    /// Offsets and lengths.
    pub reads: RefCell<Vec<(u64, usize)>>,
    pub writes: RefCell<Vec<(u64, usize)>>,
}

impl Memory {
    pub fn new() -> Self {
        Self {
            pages: (0..PAGES).map(|_| [const { AtomicU64::new(0) }; 512]).collect(),
            lends: false,
            reads: RefCell::default(),
            writes: RefCell::default(),
        }
    }

    pub fn lending() -> Self {
        Self { lends: true, ..Self::new() }
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.pages.get((at >> 12) as usize).map(|page| &page[(at >> 3 & 511) as usize])
    }

    /// The page at `gpa` as L1 sees it.
    pub fn shared(&self, gpa: u64) -> &PageWords {
        &self.pages[(gpa >> 12) as usize]
    }

    pub fn byte(&self, at: u64) -> u8 {
        self.word(at).unwrap().load(Ordering::Relaxed).to_le_bytes()[(at & 7) as usize]
    }

    pub fn set_byte(&self, at: u64, value: u8) {
        let word = self.word(at).unwrap();
        let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
        bytes[(at & 7) as usize] = value;
        word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
    }

    pub fn bytes(&self, at: u64, count: u64) -> Vec<u8> {
        (at..at + count).map(|at| self.byte(at)).collect()
    }

    /// What is at `offset` of the page at `page`, `size` bytes.
    pub fn get(&self, page: u64, offset: u16, size: u8) -> u64 {
        (0..u64::from(size)).map(|n| u64::from(self.byte(page + u64::from(offset) + n)) << (8 * n)).sum()
    }

    pub fn set(&self, page: u64, offset: u16, size: u8, value: u64) {
        for n in 0..u64::from(size) {
            self.set_byte(page + u64::from(offset) + n, (value >> (8 * n)) as u8);
        }
    }

    pub fn field(&self, page: u64, field: Field) -> u64 {
        let place = field.evmcs().unwrap();
        self.get(page, place.offset, place.size)
    }

    pub fn set_field(&self, page: u64, field: Field, value: u64) {
        let place = field.evmcs().unwrap();
        self.set(page, place.offset, place.size, value);
    }

    pub fn clean(&self, page: u64) -> u32 {
        self.get(page, 0x338, 4) as u32
    }

    pub fn set_clean(&self, page: u64, clean: u32) {
        self.set(page, 0x338, 4, u64::from(clean));
    }

    /// Forgets what was written down.
    pub fn rest(&self) {
        self.reads.borrow_mut().clear();
        self.writes.borrow_mut().clear();
    }

    pub fn bytes_read(&self) -> usize {
        self.reads.borrow().iter().map(|(_, count)| count).sum()
    }

    /// No byte was read twice.
    pub fn reads_are_disjoint(&self) -> bool {
        let mut reads = self.reads.borrow().clone();
        reads.sort_unstable();
        reads.windows(2).all(|pair| pair[0].0 + pair[0].1 as u64 <= pair[1].0)
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.borrow_mut().push((gpa.raw(), buf.len()));
        for (at, byte) in (gpa.raw()..).zip(buf) {
            let word = self.word(at).ok_or(MemoryError)?;
            *byte = word.load(Ordering::Relaxed).to_le_bytes()[(at & 7) as usize];
        }
        Ok(())
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.writes.borrow_mut().push((gpa.raw(), buf.len()));
        for (at, byte) in (gpa.raw()..).zip(buf) {
            self.word(at).ok_or(MemoryError)?;
            self.set_byte(at, *byte);
        }
        Ok(())
    }

    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }

    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }

    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        self.pages.get((gpa.raw() >> 12) as usize).filter(|_| self.lends)
    }
}

/// Fields with a place in the page.
pub fn placed() -> impl Iterator<Item = Field> {
    Field::ALL.iter().copied().filter(|field| field.evmcs().is_some())
}

/// A page whose fields all differ: version 1, nothing clean. `salt` makes another one.
pub fn fill(memory: &Memory, page: u64, salt: u64) {
    memory.set(page, 0, 4, 1);
    for field in placed() {
        memory.set_field(page, field, value(field, salt));
    }
    memory.set_clean(page, 0);
}

/// A value for `field` that no other field or salt has, as far as its width goes.
pub fn value(field: Field, salt: u64) -> u64 {
    let spread = (u64::from(field.encoding().0) << 8 | (salt & 0xFF)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    spread.rotate_left(17) & field.mask()
}

/// True when `vmcs12` has exactly the fields of `fill(.., salt)`, exit information apart.
pub fn is_filled(vmcs12: &Vmcs12, salt: u64) -> bool {
    Field::ALL.iter().all(|field| {
        let read = matches!(field.evmcs(), Some(place) if place.usage != tlfs_abi::evmcs::EvmcsUse::ReadOnly);
        vmcs12.get(*field) == if read { value(*field, salt) } else { 0 }
    })
}
