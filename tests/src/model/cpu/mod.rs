//! What CPUs of both vendors have in common: registers, events, interrupt lines, and delivery through the IDT.

pub(crate) mod idt;
pub(crate) mod op;
pub mod state;

pub use op::{Code, Op};

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// An interrupt or exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// External or virtual interrupt.
    Interrupt(u8),
    /// Non-maskable interrupt.
    Nmi,
    /// Exception with its error code, if it has one.
    Exception(u8, Option<u32>),
    /// INTn.
    Soft(u8),
}

impl Event {
    /// The error code, if there is one.
    pub(crate) const fn code(self) -> Option<u32> {
        if let Self::Exception(_, code) = self { code } else { None }
    }

    pub(crate) const fn vector(self) -> u8 {
        match self {
            Self::Interrupt(v) | Self::Exception(v, _) | Self::Soft(v) => v,
            Self::Nmi => 2,
        }
    }
}

/// The CPU's input lines, raised by any thread.
#[derive(Debug, Default)]
pub struct Lines {
    pub(crate) nmi: AtomicBool,
    pub(crate) smi: AtomicBool,
    pub(crate) init: AtomicBool,
    /// 0: none, else vector + 1.
    pub(crate) intr: AtomicU32,
    /// 0: none, else vector + 1.
    pub(crate) sipi: AtomicU32,
}

/// All lines use SeqCst: a test raises a line and then looks at memory, or the other way round, and reasons with one
/// order of all of it, as an IPI through the bus gives.
pub(crate) const LINE: Ordering = Ordering::SeqCst;

impl Lines {
    /// Raises NMI; it stays pending until taken.
    pub fn nmi(&self) {
        self.nmi.store(true, LINE);
    }
    /// Raises SMI.
    pub fn smi(&self) {
        self.smi.store(true, LINE);
    }
    /// Raises INIT.
    pub fn init(&self) {
        self.init.store(true, LINE);
    }
    /// Requests the external interrupt `vector`, or none.
    pub fn intr(&self, vector: Option<u8>) {
        self.intr.store(vector.map_or(0, |v| u32::from(v) + 1), LINE);
    }
    /// Sends a start-up IPI with this vector; it counts only while the CPU waits for one.
    pub fn sipi(&self, vector: u8) {
        self.sipi.store(u32::from(vector) + 1, LINE);
    }
    /// An NMI is pending.
    pub fn nmi_pending(&self) -> bool {
        self.nmi.load(LINE)
    }
    /// The external interrupt that is requested.
    pub fn intr_pending(&self) -> Option<u8> {
        self.intr.load(LINE).checked_sub(1).map(|v| v as u8)
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The instruction completed with this result (loads, RDMSR, IN, RDTSC and the like), else 0.
    Done(u64),
    /// An event was delivered instead of the instruction: an interrupt, or a fault of the instruction. RIP is the
    /// handler's. In host mode: the event is reported and nothing else happened.
    Event(Event),
    /// The guest exited with this exit code (AMD-V; GIF is 0 now) or exit reason (VT-x). The CPU is in host mode.
    Exit(u64),
    /// Halted, nothing to wake it.
    Idle,
    /// Shutdown that nothing intercepts: this CPU is gone until reset.
    Shutdown,
    /// INIT taken, not intercepted.
    Init,
    /// SMI taken, not intercepted.
    Smi,
}

/// Why an instruction or a delivery did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    /// An exception: vector, error code, CR2.
    Exception(u8, Option<u32>, u64),
    /// An exit. AMD-V: code, EXITINFO1, EXITINFO2. VT-x: reason, qualification, guest-physical address.
    Exit(u64, u64, u64),
    /// A software interrupt that is to be delivered.
    Soft(Event),
}

pub(crate) const UD: Trap = Trap::Exception(6, None, 0);
pub(crate) const GP: Trap = Trap::Exception(13, Some(0), 0);

/// Does `second`, raised while delivering `first`, make a double fault (APM volume 2, 8.2.9; SDM volume 3, 6.15)?
pub(crate) fn doubles(first: u8, second: u8) -> bool {
    let contributory = |v| matches!(v, 0 | 10..=13);
    match first {
        14 => second == 14 || contributory(second),
        v => contributory(v) && contributory(second),
    }
}
