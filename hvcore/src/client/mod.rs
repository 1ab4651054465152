//! The guest side: a kernel or hypervisor that runs on a Hyper-V-compatible host asks it to flush and to send IPIs.
//!
//! Each operation chooses the cheapest call that says exactly what is wanted, or answers [`UseNative`]: then nothing
//! was promised and the caller does the operation its own way (an IPI, an INVLPG loop). It never reports success for a
//! set that it could not name. The guest's own code calls this module; it uses `tlfs-abi` only and reaches the host
//! through [`HypercallPort`].

mod flush;
mod gpa;
mod ipi;
mod targets;

pub use flush::{FlushScope, flush};
pub use gpa::{GpaSpan, flush_guest_physical};
pub use ipi::send_ipi;
pub use targets::Targets;

use targets::{Banks, TargetSet};
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};

/// 8-byte words in a page of input.
pub const INPUT_WORDS: usize = 512;

/// 8-byte words that the registers of a fast call with XMM input hold: RDX, R8 and XMM0 to XMM5.
pub const XMM_WORDS: usize = 14;

/// What the host recommends and offers, from its CPUID leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostOffer {
    /// 0x40000004 EAX bit 2: hypercalls for remote TLB flushes.
    pub remote_flush: bool,
    /// 0x40000004 EAX bit 10: hypercalls for IPIs.
    pub cluster_ipi: bool,
    /// 0x40000004 EAX bit 11: the Ex forms, which take VP sets.
    pub ex_sets: bool,
    /// 0x40000003 EDX bit 4: fast calls may use XMM0 to XMM5 for input.
    pub xmm_input: bool,
    /// 0x4000000A EAX bit 18 (Intel) or 22 (AMD): the GPA flush calls.
    pub guest_physical_flush: bool,
}

impl HostOffer {
    /// Reads the offer from the registers of the host's leaves: EDX of 0x40000003, EAX of 0x40000004, EAX of
    /// 0x4000000A (0 where the host has no such leaf). `amd` says which bit stands for the GPA flush calls.
    #[inline]
    pub const fn from_leaves(features_edx: u32, recommendations_eax: u32, nested_eax: u32, amd: bool) -> Self {
        let gpa_bit = if amd { 22 } else { 18 };
        Self {
            remote_flush: recommendations_eax >> 2 & 1 != 0,
            cluster_ipi: recommendations_eax >> 10 & 1 != 0,
            ex_sets: recommendations_eax >> 11 & 1 != 0,
            xmm_input: features_edx >> 4 & 1 != 0,
            guest_physical_flush: nested_eax >> gpa_bit & 1 != 0,
        }
    }
}

/// The way to the host: the current processor's input page and the three conventions.
///
/// The caller keeps the processor (no preemption, no interrupt that makes hypercalls) for the time of an operation:
/// the page and the registers are the processor's own.
pub trait HypercallPort {
    /// The processor's input page.
    fn input_page(&mut self) -> &mut [u64; INPUT_WORDS];

    /// Issues `input` with the GPA of the input page as its input and no output.
    fn call_memory(&mut self, input: HypercallInput) -> HypercallResult;

    /// Issues the fast `input` with RDX and R8.
    fn call_fast(&mut self, input: HypercallInput, words: [u64; 2]) -> HypercallResult;

    /// Issues the fast `input` with RDX, R8 and XMM0 to XMM5 (low half first).
    fn call_xmm(&mut self, input: HypercallInput, words: &[u64; XMM_WORDS]) -> HypercallResult;
}

/// The operation was not done, or not wholly: do it the native way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum UseNative {
    /// The host does not offer the call.
    NotOffered,
    /// A target's VP index is not yet known.
    UnknownVpIndex,
    /// A target's VP index cannot be named: 4,096 or above, or 64 or above where the Ex forms are not offered.
    UnnameableVpIndex,
    /// The host refused with this status, or made no progress (then the status is that of success).
    Refused(tlfs_abi::status::HvStatus),
}

/// The words of one input, collected in registers or in the input page.
struct InputWords<'a> {
    words: &'a mut [u64],
    used: usize,
}

impl<'a> InputWords<'a> {
    fn new(words: &'a mut [u64]) -> Self {
        Self { words, used: 0 }
    }

    /// Adds a word; one past the end is dropped, callers have sized the input before.
    fn push(&mut self, word: u64) {
        if let Some(slot) = self.words.get_mut(self.used) {
            *slot = word;
            self.used = self.used.wrapping_add(1);
        }
    }
}

/// How an input of `words` 8-byte words travels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Convention {
    Fast,
    Xmm,
    Memory,
}

impl Convention {
    fn for_words(offer: &HostOffer, words: usize) -> Self {
        if words <= 2 {
            Self::Fast
        } else if offer.xmm_input && words <= XMM_WORDS {
            Self::Xmm
        } else {
            Self::Memory
        }
    }
}

/// Builds the input with `fill` where its convention wants it and issues the call; a rep call is followed to its end.
fn issue<P: HypercallPort + ?Sized>(
    port: &mut P,
    convention: Convention,
    input: HypercallInput,
    fill: impl FnOnce(&mut InputWords<'_>),
) -> Result<(), UseNative> {
    match convention {
        Convention::Fast => {
            let mut words = [0; 2];
            fill(&mut InputWords::new(&mut words));
            follow(input.with_fast(), |input| port.call_fast(input, words))
        }
        Convention::Xmm => {
            let mut words = [0; XMM_WORDS];
            fill(&mut InputWords::new(&mut words));
            follow(input.with_fast(), |input| port.call_xmm(input, &words))
        }
        Convention::Memory => {
            fill(&mut InputWords::new(port.input_page()));
            follow(input, |input| port.call_memory(input))
        }
    }
}

/// Issues a call until all its reps are done. Each turn must make progress, so there are at most as many turns as reps.
fn follow(mut input: HypercallInput, mut call: impl FnMut(HypercallInput) -> HypercallResult) -> Result<(), UseNative> {
    let count = input.rep_count();
    loop {
        let result = call(input);
        if !result.status().is_success() {
            return Err(UseNative::Refused(result.status()));
        }
        let done = result.reps_completed();
        if done >= count {
            return Ok(());
        }
        if done <= input.rep_start() {
            return Err(UseNative::Refused(result.status()));
        }
        input = input.with_reps(count, done);
    }
}
