//! The client's choice of call: which call, which convention, what the host is told; and when it answers "native".
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use hvcore::client::{
    FlushScope, GpaSpan, HostOffer, HypercallPort, INPUT_WORDS, Targets, UseNative, XMM_WORDS, flush,
    flush_guest_physical, send_ipi,
};
use tlfs_abi::flush::GvaSpan;
use tlfs_abi::hypercall::{CallCode, HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Memory,
    Fast,
    Xmm,
}

/// Records each call with its words and answers with `answer(input)`.
struct Port<F> {
    page: [u64; INPUT_WORDS],
    calls: Vec<(Way, HypercallInput, Vec<u64>)>,
    answer: F,
}

impl<F: FnMut(HypercallInput) -> HypercallResult> Port<F> {
    fn new(answer: F) -> Self {
        Self { page: [0xDEAD; INPUT_WORDS], calls: Vec::new(), answer }
    }
}

impl<F: FnMut(HypercallInput) -> HypercallResult> HypercallPort for Port<F> {
    fn input_page(&mut self) -> &mut [u64; INPUT_WORDS] {
        &mut self.page
    }
    fn call_memory(&mut self, input: HypercallInput) -> HypercallResult {
        self.calls.push((Way::Memory, input, self.page.to_vec()));
        (self.answer)(input)
    }
    fn call_fast(&mut self, input: HypercallInput, words: [u64; 2]) -> HypercallResult {
        self.calls.push((Way::Fast, input, words.to_vec()));
        (self.answer)(input)
    }
    fn call_xmm(&mut self, input: HypercallInput, words: &[u64; XMM_WORDS]) -> HypercallResult {
        self.calls.push((Way::Xmm, input, words.to_vec()));
        (self.answer)(input)
    }
}

fn obey(input: HypercallInput) -> HypercallResult {
    HypercallResult::new(HvStatus::SUCCESS, input.rep_count())
}

const OFFER: HostOffer =
    HostOffer { remote_flush: true, cluster_ipi: true, ex_sets: true, xmm_input: true, guest_physical_flush: true };

fn only(indexes: &[u32]) -> Targets<impl Iterator<Item = Option<u32>> + '_> {
    Targets::Only(indexes.iter().copied().map(Some))
}

fn all() -> Targets<std::iter::Empty<Option<u32>>> {
    Targets::All
}

const SPACE: FlushScope<'static> = FlushScope::Space { non_global_only: false };

fn span(start: u64, pages: u64) -> GvaSpan {
    GvaSpan { start, pages, page_size: 4096 }
}

#[test]
fn offer_bits_stand_where_the_tlfs_puts_them() {
    assert_eq!(HostOffer::from_leaves(0, 0, 0, false), HostOffer::default());
    assert_eq!(HostOffer::from_leaves(1 << 4, 1 << 2 | 1 << 10 | 1 << 11, 1 << 18, false), OFFER);
    assert!(!HostOffer::from_leaves(0, 0, 1 << 18, true).guest_physical_flush);
    assert!(HostOffer::from_leaves(0, 0, 1 << 22, true).guest_physical_flush);
}

#[test]
fn all_online_uses_the_plain_call_with_the_flag() {
    let mut port = Port::new(obey);
    assert_eq!(flush(&mut port, &OFFER, Some(0x1000), all(), SPACE), Ok(()));
    let (way, input, words) = &port.calls[0];
    assert_eq!((way, input.call_code()), (&Way::Xmm, CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE));
    assert!(input.fast());
    assert_eq!(words[..3], [0x1000, 1, 0]);
    assert_eq!(port.calls.len(), 1);
}

#[test]
fn without_xmm_input_the_page_is_used() {
    let mut port = Port::new(obey);
    let offer = HostOffer { xmm_input: false, ..OFFER };
    let scope = FlushScope::Space { non_global_only: true };
    assert_eq!(flush(&mut port, &offer, None, only(&[0, 63]), scope), Ok(()));
    let (way, input, words) = &port.calls[0];
    assert_eq!((way, input.fast()), (&Way::Memory, false));
    assert_eq!(words[..3], [0, 0b110, 1 << 63 | 1]);
}

#[test]
fn sixty_four_needs_the_ex_form_and_sixty_three_does_not() {
    let mut port = Port::new(obey);
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[63]), SPACE), Ok(()));
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[0, 64, 130]), SPACE), Ok(()));
    assert_eq!(port.calls[0].1.call_code(), CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE);
    let (way, input, words) = &port.calls[1];
    assert_eq!((way, input.call_code()), (&Way::Xmm, CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX));
    assert_eq!(input.variable_header_size(), 3);
    assert_eq!(words[..7], [0, 0, 0, 0b111, 1, 1, 4]);

    let offer = HostOffer { ex_sets: false, ..OFFER };
    assert_eq!(flush(&mut port, &offer, Some(0), only(&[63]), SPACE), Ok(()));
    assert_eq!(flush(&mut port, &offer, Some(0), only(&[64]), SPACE), Err(UseNative::UnnameableVpIndex));
}

#[test]
fn what_a_set_cannot_name_is_never_a_success() {
    let mut port = Port::new(obey);
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[1, 4096]), SPACE), Err(UseNative::UnnameableVpIndex));
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[u32::MAX]), SPACE), Err(UseNative::UnnameableVpIndex));
    let unknown = Targets::Only([Some(1), None].into_iter());
    assert_eq!(flush(&mut port, &OFFER, Some(0), unknown, SPACE), Err(UseNative::UnknownVpIndex));
    assert!(port.calls.is_empty());
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[1, 4095]), SPACE), Ok(()));
    assert_eq!(port.calls.len(), 1);
}

#[test]
fn no_target_makes_no_call() {
    let mut port = Port::new(obey);
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[]), SPACE), Ok(()));
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&[])), Ok(()));
    assert_eq!(send_ipi(&mut port, &OFFER, 0x30, only(&[])), Ok(()));
    assert!(port.calls.is_empty());
}

#[test]
fn ranges_pack_sixteen_mebibytes_an_entry() {
    let mut port = Port::new(obey);
    let spans = [span(0x1000, 1), span(0x20_0000, 4097), GvaSpan { start: 0x4000_0000, pages: 2, page_size: 1 << 21 }];
    assert_eq!(flush(&mut port, &OFFER, Some(7 << 12), all(), FlushScope::Spans(&spans)), Ok(()));
    let (way, input, words) = &port.calls[0];
    assert_eq!((way, input.call_code(), input.rep_count()), (&Way::Xmm, CallCode::FLUSH_VIRTUAL_ADDRESS_LIST, 4));
    assert_eq!(words[3..7], [0x1000, 0x20_0FFF, 0x120_0000, 0x4000_03FF]);
}

#[test]
fn eleven_ranges_fit_the_registers_and_twelve_do_not() {
    let mut port = Port::new(obey);
    let spans: Vec<_> = (0..12).map(|n| span(n << 20, 1)).collect();
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans[..11])), Ok(()));
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans)), Ok(()));
    assert_eq!((&port.calls[0].0, &port.calls[1].0), (&Way::Xmm, &Way::Memory));
    assert_eq!(port.calls[1].2[14], 11 << 20);
}

#[test]
fn more_ranges_than_the_page_holds_flush_the_space() {
    let spans: Vec<_> = (0..510).map(|n| span(n << 20, 1)).collect();
    let mut port = Port::new(obey);
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans[..509])), Ok(()));
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans)), Ok(()));
    let huge = [span(0, u64::MAX)];
    assert_eq!(flush(&mut port, &OFFER, Some(0), only(&[70]), FlushScope::Spans(&huge)), Ok(()));
    let codes: Vec<_> = port.calls.iter().map(|call| call.1.call_code()).collect();
    let space = CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE;
    assert_eq!(codes, [CallCode::FLUSH_VIRTUAL_ADDRESS_LIST, space, CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE_EX]);
    assert_eq!(port.calls[0].1.rep_count(), 509);
}

#[test]
fn reps_are_followed_to_the_end() {
    let spans: Vec<_> = (0..10).map(|n| span(n << 20, 1)).collect();
    let mut port = Port::new(|input: HypercallInput| {
        HypercallResult::new(HvStatus::SUCCESS, (input.rep_start() + 4).min(input.rep_count()))
    });
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans)), Ok(()));
    let starts: Vec<_> = port.calls.iter().map(|call| (call.1.rep_start(), call.1.rep_count())).collect();
    assert_eq!(starts, [(0, 10), (4, 10), (8, 10)]);
}

#[test]
fn a_host_that_makes_no_progress_is_refused() {
    let spans = [span(0, 1), span(1 << 20, 1)];
    let mut port = Port::new(|_| HypercallResult::new(HvStatus::SUCCESS, 1));
    let refused = Err(UseNative::Refused(HvStatus::SUCCESS));
    assert_eq!(flush(&mut port, &OFFER, Some(0), all(), FlushScope::Spans(&spans)), refused);
    assert_eq!(port.calls.len(), 2);
}

#[test]
fn any_failing_status_means_native() {
    for status in [HvStatus::INVALID_HYPERCALL_CODE, HvStatus::ACCESS_DENIED, HvStatus(0xFFFF)] {
        let mut port = Port::new(|_| HypercallResult::new(status, 0));
        let refused = Err(UseNative::Refused(status));
        assert_eq!(flush(&mut port, &OFFER, Some(0), all(), SPACE), refused);
        assert_eq!(send_ipi(&mut port, &OFFER, 0x30, only(&[1])), refused);
        assert_eq!(flush_guest_physical(&mut port, &OFFER, 0, None), refused);
        assert_eq!(port.calls.len(), 3);
    }
    let mut port = Port::new(obey);
    let none = HostOffer::default();
    assert_eq!(flush(&mut port, &none, Some(0), all(), SPACE), Err(UseNative::NotOffered));
    assert_eq!(send_ipi(&mut port, &none, 0x30, all()), Err(UseNative::NotOffered));
    assert_eq!(flush_guest_physical(&mut port, &none, 0, None), Err(UseNative::NotOffered));
    assert!(port.calls.is_empty());
}

#[test]
fn ipis_take_the_cheapest_form() {
    let mut port = Port::new(obey);
    assert_eq!(send_ipi(&mut port, &OFFER, 0xFF, only(&[0, 5])), Ok(()));
    assert_eq!(send_ipi(&mut port, &OFFER, 0x10, only(&[5, 64])), Ok(()));
    assert_eq!(send_ipi(&mut port, &OFFER, 0x30, all()), Ok(()));
    let spread: Vec<u32> = (0..12).map(|bank| bank * 64).collect();
    assert_eq!(send_ipi(&mut port, &OFFER, 0x30, only(&spread[..11])), Ok(()));
    assert_eq!(send_ipi(&mut port, &OFFER, 0x30, only(&spread)), Ok(()));
    let ways: Vec<_> = port.calls.iter().map(|call| call.0.clone()).collect();
    assert_eq!(ways, [Way::Fast, Way::Xmm, Way::Xmm, Way::Xmm, Way::Memory]);
    assert_eq!(port.calls[0].2, [0xFF, 0x21]);
    assert_eq!(port.calls[1].2[..5], [0x10, 0, 0b11, 0x20, 1]);
    assert_eq!(port.calls[2].2[..3], [0x30, 1, 0]);
    let refused = Err(UseNative::Refused(HvStatus::INVALID_PARAMETER));
    assert_eq!(send_ipi(&mut port, &OFFER, 0x0F, only(&[0])), refused);
    assert_eq!(port.calls.len(), 5);
    let plain = HostOffer { ex_sets: false, ..OFFER };
    assert_eq!(send_ipi(&mut port, &plain, 0x30, all()), Err(UseNative::NotOffered));
}

#[test]
fn guest_physical_flush_packs_or_takes_the_space() {
    let mut port = Port::new(obey);
    let spans = [GpaSpan { start: 0x5123, pages: 1 }, GpaSpan { start: 0x10_0000, pages: 2049 }];
    assert_eq!(flush_guest_physical(&mut port, &OFFER, 0xABC000, Some(&spans)), Ok(()));
    let (way, input, words) = &port.calls[0];
    assert_eq!((way, input.rep_count()), (&Way::Memory, 3));
    assert_eq!(words[..5], [0xABC000, 0, 0x5000, 0x10_07FF, 0x90_0000]);
    let capacity = [GpaSpan { start: 0, pages: 510 * 2048 }];
    let beyond = [GpaSpan { start: 0, pages: 510 * 2048 + 1 }];
    assert_eq!(flush_guest_physical(&mut port, &OFFER, 0xABC000, Some(&capacity)), Ok(()));
    assert_eq!(flush_guest_physical(&mut port, &OFFER, 0xABC000, Some(&beyond)), Ok(()));
    assert_eq!(flush_guest_physical(&mut port, &OFFER, 0xABC000, Some(&[])), Ok(()));
    assert_eq!(port.calls.len(), 3);
    assert_eq!(port.calls[1].1.rep_count(), 510);
    let (way, input, words) = &port.calls[2];
    assert_eq!((way, input.call_code()), (&Way::Fast, CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE));
    assert_eq!(words, &[0xABC000, 0]);
}
