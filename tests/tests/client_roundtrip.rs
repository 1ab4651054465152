//! The client's choice of call, parsed by the host side: exactly the wanted VPs, a superset of the wanted pages, for
//! random sets, ranges, index assignments and offers; or "use the native way", and then for a reason.

use hvcore::addr::{L1Gpa, Level};
use hvcore::client::{
    FlushScope, HostOffer, HypercallPort, INPUT_WORDS, Targets, UseNative, XMM_WORDS, flush, send_ipi,
};
use hvcore::hypercall::calls::*;
use hvcore::hypercall::{
    Answer, Caller, CallerMode, Gpr, Outcome, PrivilegeLeaves, Privileges, Registers, Scratch, Width, Xmm, handle,
};
use hvcore::memory::{GuestMemory, L1Caller, MemoryError};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;
use tlfs_abi::flush::GvaSpan;
use tlfs_abi::hypercall::{HypercallInput, HypercallResult};
use tlfs_abi::vp_set::VpSet;

/// What the host was asked for.
#[derive(Default)]
struct Host {
    /// How many VP indexes there are.
    online: u32,
    vps: BTreeSet<u32>,
    spans: Vec<GvaSpan>,
    whole: bool,
    spaces: Vec<Option<u64>>,
    vectors: Vec<u8>,
    calls: u32,
    /// Elements that a list call does before it stops, while it lasts.
    stops: Vec<u16>,
}

impl Host {
    fn take(&mut self, vps: &VpSet<'_>) {
        self.calls += 1;
        self.vps.extend((0..self.online.max(4096)).filter(|vp| match vps {
            VpSet::All => *vp < self.online,
            VpSet::Sparse(set) => set.contains(*vp),
        }));
    }

    fn target(&mut self, target: &FlushTarget<'_>) {
        assert_eq!(target.level, Level::L1);
        self.take(&target.vps);
        let all = target.flags.all_virtual_address_spaces();
        self.spaces.push((!all).then_some(target.address_space));
    }
}

impl FlushVirtual for Host {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.target(target);
        self.whole = true;
        Answer::Done
    }

    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.target(target);
        match self.stops.pop() {
            // No progress would be no continuation.
            Some(stop) if usize::from(stop) < ranges.raw.len() && stop != 0 => {
                self.spans.extend(ranges.spans().take(usize::from(stop)));
                Answer::Retry { completed: stop }
            }
            _ => {
                self.spans.extend(ranges.spans());
                Answer::Done
            }
        }
    }
}

impl ClusterIpi for Host {
    fn send_ipi(&mut self, _: Level, vector: u8, vps: &VpSet<'_>) -> Answer {
        self.take(vps);
        self.vectors.push(vector);
        Answer::Done
    }
}

hvcore::offer_hypercalls!(impl for Host {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    SendSyntheticClusterIpi,
    SendSyntheticClusterIpiEx,
});

#[derive(Default)]
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

/// The guest's input page, at 0x5000.
struct Page([u64; INPUT_WORDS]);

impl GuestMemory for Page {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        let from = gpa.raw().checked_sub(0x5000).ok_or(MemoryError)? as usize;
        buf.copy_from_slice(bytes.get(from..from + buf.len()).ok_or(MemoryError)?);
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

/// The guest's way to the host: through the intake.
struct Port {
    host: Host,
    page: Page,
    privileges: Privileges,
}

impl Port {
    /// Issues the call until it is complete, as a processor does that stays at the instruction.
    fn issue(&mut self, mut regs: Regs, input: HypercallInput) -> HypercallResult {
        regs.set_gpr(Gpr::Rcx, input.raw());
        let mode = CallerMode { width: Width::Bits64, protected: true, cpl: 0 };
        let caller = Caller { mode, level: Level::L1, enabled: true, privileges: self.privileges };
        loop {
            let memory = L1Caller(&self.page);
            match handle(&mut self.host, &caller, &mut regs, &memory, &mut Scratch::new()) {
                Outcome::Complete(result) => return result,
                Outcome::Retry => (),
                other => panic!("{other:?} for {input:?}"),
            }
        }
    }
}

impl HypercallPort for Port {
    fn input_page(&mut self) -> &mut [u64; INPUT_WORDS] {
        &mut self.page.0
    }
    fn call_memory(&mut self, input: HypercallInput) -> HypercallResult {
        let mut regs = Regs::default();
        regs.set_gpr(Gpr::Rdx, 0x5000);
        self.issue(regs, input)
    }
    fn call_fast(&mut self, input: HypercallInput, words: [u64; 2]) -> HypercallResult {
        let mut regs = Regs::default();
        regs.set_gpr(Gpr::Rdx, words[0]);
        regs.set_gpr(Gpr::R8, words[1]);
        self.issue(regs, input)
    }
    fn call_xmm(&mut self, input: HypercallInput, words: &[u64; XMM_WORDS]) -> HypercallResult {
        let mut regs = Regs::default();
        regs.set_gpr(Gpr::Rdx, words[0]);
        regs.set_gpr(Gpr::R8, words[1]);
        for (xmm, pair) in regs.xmm.iter_mut().zip(words[2..].chunks(2)) {
            *xmm = u128::from(pair[1]) << 64 | u128::from(pair[0]);
        }
        self.issue(regs, input)
    }
}

/// CPUs of a guest: each has the VP index that the assignment gives it, or none yet.
#[derive(Clone, Debug)]
struct Guest {
    indexes: Vec<Option<u32>>,
    offer: HostOffer,
    stops: Vec<u16>,
}

fn guest() -> impl Strategy<Value = Guest> {
    // Dense, sparse, and past what a set can name.
    let index = prop_oneof![6 => 0..64u32, 3 => 0..200u32, 2 => 0..4096u32, 1 => 4090..4100u32];
    let index = prop_oneof![60 => index.prop_map(Some), 1 => Just(None)];
    (vec(index, 0..70), any::<[bool; 4]>(), vec(0..40u16, 0..6)).prop_map(|(indexes, [a, b, c, d], stops)| {
        // Each with one chance in two would leave little.
        let offer = HostOffer {
            remote_flush: a || b,
            cluster_ipi: b || c,
            ex_sets: c || d,
            xmm_input: d,
            guest_physical_flush: false,
        };
        Guest { indexes, offer, stops }
    })
}

impl Guest {
    fn port(&self) -> Port {
        // What the host checks is what it offers: a call that was not offered would be refused, and seen.
        let recommendations = u32::from(self.offer.remote_flush) << 2
            | u32::from(self.offer.cluster_ipi) << 10
            | u32::from(self.offer.ex_sets) << 11;
        let leaves = PrivilegeLeaves {
            features_edx: u32::from(self.offer.xmm_input) << 4,
            recommendations_eax: recommendations,
            ..PrivilegeLeaves::default()
        };
        let host = Host { online: 4096, stops: self.stops.clone(), ..Host::default() };
        Port { host, page: Page([!0; INPUT_WORDS]), privileges: Privileges::from_leaves(&leaves) }
    }

    /// Why these targets cannot be named, if so.
    fn unnameable(&self) -> Option<UseNative> {
        let limit = if self.offer.ex_sets { 4096 } else { 64 };
        self.indexes.iter().find_map(|index| match index {
            None => Some(UseNative::UnknownVpIndex),
            Some(index) if *index >= limit => Some(UseNative::UnnameableVpIndex),
            Some(_) => None,
        })
    }

    fn wanted(&self, all: bool) -> BTreeSet<u32> {
        if all { (0..4096).collect() } else { self.indexes.iter().flatten().copied().collect() }
    }
}

fn spans() -> impl Strategy<Value = Vec<GvaSpan>> {
    let span = (0..1u64 << 35, 1..10_000u64, 0..8u32).prop_map(|(page, pages, size)| match size {
        0 => GvaSpan { start: page << 12 & !0x1F_FFFF, pages: 1 + pages % 20, page_size: 1 << 21 },
        1 => GvaSpan { start: page << 12 & !0x3FFF_FFFF, pages: 1 + pages % 2, page_size: 1 << 30 },
        // The upper half, and a start within a page.
        2 => GvaSpan { start: 0xFFFF_8000_0000_0123 + (page << 12), pages: 1 + pages % 3, page_size: 1 << 12 },
        _ => GvaSpan { start: page << 12, pages: 1 + pages % 5, page_size: 1 << 12 },
    });
    prop_oneof![8 => vec(span.clone(), 0..20), 1 => vec(span, 400..560)]
}

fn end(span: &GvaSpan) -> u64 {
    (span.start & !0xFFF) + span.pages * span.page_size
}

/// True when every 4 KiB page of `span` is in one of `flushed`.
fn covered(span: &GvaSpan, flushed: &[GvaSpan]) -> bool {
    let mut at = span.start & !0xFFF;
    while at < end(span) {
        match flushed.iter().filter(|f| f.start <= at && at < end(f)).map(end).max() {
            Some(to) => at = to,
            None => return false,
        }
    }
    true
}

/// Done, or refused for the reason that there is.
fn expect(offered: bool, all: bool, guest: &Guest, got: Result<(), UseNative>) -> bool {
    let reason = if !offered { Some(UseNative::NotOffered) } else { None };
    let reason = reason.or_else(|| if all { None } else { guest.unnameable() });
    match (reason, got) {
        (None, Ok(())) => true,
        (None, Err(error)) => panic!("refused: {error:?}"),
        (Some(reason), got) => {
            assert_eq!(got, Err(reason));
            false
        }
    }
}

fn targets(guest: &Guest, all: bool) -> Targets<impl Iterator<Item = Option<u32>> + '_> {
    if all { Targets::All } else { Targets::Only(guest.indexes.iter().copied()) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flushes(guest in guest(), spans in spans(), all in prop::bool::weighted(0.2), space in prop::option::of(0..1u64 << 40),
               whole in prop::bool::weighted(0.2)) {
        let mut port = guest.port();
        let scope = if whole { FlushScope::Space { non_global_only: false } } else { FlushScope::Spans(&spans) };
        let got = flush(&mut port, &guest.offer, space, targets(&guest, all), scope);
        if !expect(guest.offer.remote_flush, all, &guest, got) {
            prop_assert_eq!(port.host.calls, 0);
            return Ok(());
        }
        let nothing = guest.wanted(all).is_empty() || !whole && spans.is_empty();
        if nothing {
            prop_assert_eq!(port.host.calls, 0, "nothing to do, nothing done");
            return Ok(());
        }
        prop_assert_eq!(&port.host.vps, &guest.wanted(all));
        prop_assert!(port.host.spaces.iter().all(|seen| *seen == space));
        prop_assert!(port.host.whole || !whole);
        if !port.host.whole {
            for span in &spans {
                prop_assert!(covered(span, &port.host.spans), "{:?}", span);
            }
        }
    }

    #[test]
    fn ipis(guest in guest(), vector in 0x10..=0xFFu8, all in prop::bool::weighted(0.2)) {
        let mut port = guest.port();
        let got = send_ipi(&mut port, &guest.offer, vector, targets(&guest, all));
        if !expect(guest.offer.cluster_ipi && (!all || guest.offer.ex_sets), all, &guest, got) {
            prop_assert_eq!(port.host.calls, 0);
            return Ok(());
        }
        prop_assert_eq!(&port.host.vps, &guest.wanted(all));
        if !guest.wanted(all).is_empty() {
            prop_assert_eq!(port.host.vectors, [vector]);
        }
    }
}

/// The checks above can fail: a page too few, and a gap.
#[test]
fn coverage_is_checked() {
    let span = GvaSpan { start: 0x20_0000, pages: 1, page_size: 1 << 21 };
    let small = |first: u64, pages| GvaSpan { start: 0x20_0000 + first * 4096, pages, page_size: 4096 };
    assert!(covered(&span, &[small(0, 512)]));
    assert!(covered(&span, &[small(300, 212), small(0, 300)]));
    assert!(!covered(&span, &[small(0, 511)]));
    assert!(!covered(&span, &[small(300, 212), small(0, 299)]));
}
