//! Guest memory as the library needs it: copy in, copy out and compare-exchange, all fallible.
//!
//! Implemented by the embedder (and wrapped by middleware: recorder, fault injector, byte counter); used by every
//! engine. An implementation shows what L1 itself sees: overlay pages of the Hyper-V interface included, host memory
//! excluded.

use core::sync::atomic::AtomicU64;

use crate::addr::{L1Gpa, L2Gpa};

/// The host cannot reach this guest memory: not backed, a device, out of range, or gone meanwhile.
///
/// Never shown to a guest as such: each engine turns it into what hardware or the TLFS prescribes for its case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryError;

/// The memory of one L1 partition, by L1 GPA. Accesses may cross page boundaries.
///
/// Methods take `&self`: guest memory is shared with running guests. An access of 1, 4 or 8 bytes that is naturally
/// aligned is single-copy atomic; larger copies are not.
pub trait GuestMemory {
    /// Copies `buf.len()` bytes from `gpa` on. On error the contents of `buf` are unspecified.
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `buf` to `gpa` on. On error any prefix may have been written.
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError>;

    /// Replaces the byte at `gpa` by `new` if it is `current`. Sequentially consistent.
    /// `Ok(Ok(old))` when exchanged, `Ok(Err(seen))` when another value was there.
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError>;

    /// As [`compare_exchange_u8`](Self::compare_exchange_u8) for 4 bytes, 4-byte aligned.
    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError>;

    /// As [`compare_exchange_u8`](Self::compare_exchange_u8) for 8 bytes, 8-byte aligned.
    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError>;

    /// The page at `gpa` (page aligned) as words in guest byte order, if it is plain RAM that may be read and written
    /// in place; the words then stand for [`read`](Self::read) and [`write`](Self::write) of the page.
    ///
    /// An implementation that must see each access answers `None`, which is the default. Whoever asks loads each word
    /// once: the guest may change it at any time.
    #[inline]
    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        let _ = gpa;
        None
    }

    /// Reads a little-endian `u32`.
    #[inline]
    fn read_u32(&self, gpa: L1Gpa) -> Result<u32, MemoryError> {
        let mut b = [0; 4];
        self.read(gpa, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads a little-endian `u64`.
    #[inline]
    fn read_u64(&self, gpa: L1Gpa) -> Result<u64, MemoryError> {
        let mut b = [0; 8];
        self.read(gpa, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes a little-endian `u64`.
    #[inline]
    fn write_u64(&self, gpa: L1Gpa, value: u64) -> Result<(), MemoryError> {
        self.write(gpa, &value.to_le_bytes())
    }
}

impl<M: GuestMemory + ?Sized> GuestMemory for &M {
    #[inline]
    fn read_u32(&self, gpa: L1Gpa) -> Result<u32, MemoryError> {
        (**self).read_u32(gpa)
    }
    #[inline]
    fn read_u64(&self, gpa: L1Gpa) -> Result<u64, MemoryError> {
        (**self).read_u64(gpa)
    }
    #[inline]
    fn write_u64(&self, gpa: L1Gpa, value: u64) -> Result<(), MemoryError> {
        (**self).write_u64(gpa, value)
    }
    #[inline]
    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        (**self).page(gpa)
    }
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read(gpa, buf)
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        (**self).write(gpa, buf)
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        (**self).compare_exchange_u8(gpa, current, new)
    }
    fn compare_exchange_u32(&self, gpa: L1Gpa, current: u32, new: u32) -> Result<Result<u32, u32>, MemoryError> {
        (**self).compare_exchange_u32(gpa, current, new)
    }
    fn compare_exchange_u64(&self, gpa: L1Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, MemoryError> {
        (**self).compare_exchange_u64(gpa, current, new)
    }
}

/// How an access through a second-stage translation will use the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// L1's second-stage tables (EPT or NPT) do not let this access through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslateError;

/// Translates the GPAs that a hypercall's caller names to L1 GPAs: the identity for a call from L1, a walk of L1's EPT
/// or NPT for a call from L2.
pub trait CallerMemory {
    /// The memory that translations end in.
    type Memory: GuestMemory + ?Sized;

    /// The partition's memory.
    fn memory(&self) -> &Self::Memory;

    /// The L1 GPA of the caller's GPA `gpa`, for an access of at most the rest of its 4 KiB page.
    fn translate(&self, gpa: u64, access: Access) -> Result<L1Gpa, TranslateError>;
}

/// A caller in L1: its GPAs are L1 GPAs.
#[derive(Clone, Copy, Debug)]
pub struct L1Caller<'a, M: ?Sized>(pub &'a M);

impl<M: GuestMemory + ?Sized> CallerMemory for L1Caller<'_, M> {
    type Memory = M;

    fn memory(&self) -> &M {
        self.0
    }

    #[inline]
    fn translate(&self, gpa: u64, _access: Access) -> Result<L1Gpa, TranslateError> {
        Ok(L1Gpa::new(gpa))
    }
}

/// A walk of L1's second-stage tables, as `nsvm` and `nvmx` implement it for the context that L2 runs in.
pub trait SecondStage {
    /// The L1 GPA that `gpa` translates to for `access`. No exit, no fault: only the answer.
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError>;
}

/// A caller in L2: its GPAs are L2 GPAs.
#[derive(Clone, Copy, Debug)]
pub struct L2Caller<'a, M: ?Sized, S: ?Sized> {
    /// The partition's memory.
    pub memory: &'a M,
    /// L1's second-stage tables for the running L2.
    pub second_stage: &'a S,
}

impl<M: GuestMemory + ?Sized, S: SecondStage + ?Sized> CallerMemory for L2Caller<'_, M, S> {
    type Memory = M;

    fn memory(&self) -> &M {
        self.memory
    }

    fn translate(&self, gpa: u64, access: Access) -> Result<L1Gpa, TranslateError> {
        self.second_stage.walk(L2Gpa::new(gpa), access)
    }
}
