//! What the library's intake needs of an embedder, on this image: registers of an exception frame, a window of memory,
//! and a host that remembers what was asked of it.

use core::sync::atomic::{AtomicU8, Ordering};
use hvcore::addr::L1Gpa;
use hvcore::hypercall::calls::*;
use hvcore::hypercall::{Answer, Declaration, Gpr, Hypercall, Input, Output, Privileges, Registers, Xmm};
use hvcore::memory::{CallerMemory, GuestMemory, MemoryError};
use hvcore::offer_hypercalls;
use rt::idt::Frame;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::vp_set::VpSet;

/// The registers of the code that an exception interrupted.
pub struct FrameRegisters<'a>(pub &'a mut Frame);

impl Registers for FrameRegisters<'_> {
    fn gpr(&self, register: Gpr) -> u64 {
        match register {
            Gpr::Rax => self.0.rax,
            Gpr::Rbx => self.0.rbx,
            Gpr::Rcx => self.0.rcx,
            Gpr::Rdx => self.0.rdx,
            Gpr::Rsi => self.0.rsi,
            Gpr::Rdi => self.0.rdi,
            Gpr::R8 => self.0.r8,
        }
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        match register {
            Gpr::Rax => self.0.rax = value,
            Gpr::Rbx => self.0.rbx = value,
            Gpr::Rcx => self.0.rcx = value,
            Gpr::Rdx => self.0.rdx = value,
            Gpr::Rsi => self.0.rsi = value,
            Gpr::Rdi => self.0.rdi = value,
            Gpr::R8 => self.0.r8 = value,
        }
    }

    fn xmm(&self, register: Xmm) -> u128 {
        self.0.fx.xmm[register as usize]
    }

    fn set_xmm(&mut self, register: Xmm, value: u128) {
        self.0.fx.xmm[register as usize] = value;
    }
}

/// Bytes of memory that a caller can name.
pub const WINDOW_BYTES: u64 = 4 * 4096;

/// Some pages of this image's own memory, by their physical addresses.
#[derive(Clone, Copy)]
pub struct Window {
    start: u64,
}

impl Window {
    /// Allocates the pages.
    pub fn new() -> Window {
        let start = rt::frames::allocate(WINDOW_BYTES, 4096).expect("four pages");
        Window { start: start as u64 }
    }

    /// Physical address of the first byte.
    pub fn start(self) -> u64 {
        self.start
    }

    fn pointer(self, gpa: L1Gpa, bytes: usize) -> Result<*mut u8, MemoryError> {
        let offset = gpa.raw().checked_sub(self.start).ok_or(MemoryError)?;
        let end = offset.checked_add(bytes as u64).ok_or(MemoryError)?;
        if end > WINDOW_BYTES { Err(MemoryError) } else { Ok(gpa.raw() as *mut u8) }
    }
}

impl GuestMemory for Window {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(gpa, buf.len())?;
        // SAFETY: inside the window, which this image allocated and refers to by pointers only.
        unsafe { core::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let to = self.pointer(gpa, buf.len())?;
        // SAFETY: as in `read`.
        unsafe { core::ptr::copy_nonoverlapping(buf.as_ptr(), to, buf.len()) };
        Ok(())
    }

    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let byte = self.pointer(gpa, 1)?;
        // SAFETY: inside the window, as in `read`; atomics need no alignment beyond a byte's.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        Ok(byte.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst))
    }

    // No hypercall compares and exchanges more than a byte.
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

/// A flush as it arrived at its handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flush {
    /// The address space.
    pub address_space: u64,
    /// The flags.
    pub flags: u64,
    /// Number of VPs named; `None` for all.
    pub vps: Option<u32>,
    /// Number of ranges, and the exclusive or of their entries.
    pub ranges: (usize, u64),
}

/// Remembers what was asked of it.
#[derive(Debug)]
pub struct Host {
    /// The last flush.
    pub flush: Option<Flush>,
    /// The last argument of HvCallNotifyLongSpinWait.
    pub spins: u32,
    /// How many elements [`Double`] does at a time.
    pub portion: usize,
    /// How often [`Double`] was served.
    pub portions: u32,
}

impl Host {
    /// One that has seen nothing.
    pub const fn new() -> Host {
        Host { flush: None, spins: 0, portion: usize::MAX, portions: 0 }
    }

    fn remember(&mut self, target: &FlushTarget<'_>, ranges: &[u64]) -> Answer {
        self.flush = Some(Flush {
            address_space: target.address_space,
            flags: target.flags.raw(),
            vps: match target.vps {
                VpSet::All => None,
                VpSet::Sparse(set) => Some(set.count()),
            },
            ranges: (ranges.len(), ranges.iter().fold(0, |all, range| all ^ range)),
        });
        Answer::Done
    }
}

impl FlushVirtual for Host {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.remember(target, &[])
    }

    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.remember(target, ranges.raw)
    }
}

impl LongSpinWait for Host {
    fn notify_long_spin_wait(&mut self, spins: u32) -> Answer {
        self.spins = spins;
        Answer::Done
    }
}

/// A rep call of this image's own, with output: each element comes back doubled, plus the header.
pub struct Double;

impl Declaration for Double {
    const CODE: CallCode = CallCode(0x7D0B);
    const NEEDS: Privileges = Privileges::NONE;
    const REP: bool = true;
    const OUTPUT_ELEMENT: usize = 8;
    type Header = u64;
    type Element = u64;
}

impl Hypercall<Host> for Double {
    fn serve<C: CallerMemory + ?Sized>(host: &mut Host, input: &Input<'_, Self>, output: &mut Output<'_, C>) -> Answer {
        host.portions += 1;
        let portion = input.elements().iter().take(host.portion);
        for (completed, element) in (0..).zip(portion) {
            if let Err(status) = output.push(&(element * 2 + input.header())) {
                return Answer::Failed { status, completed };
            }
        }
        match input.elements().len() {
            left if left <= host.portion => Answer::Done,
            _ => Answer::Retry { completed: host.portion as u16 },
        }
    }
}

offer_hypercalls!(impl for Host {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    NotifyLongSpinWait,
    Double,
});
