//! Cases from bytes: what a fuzzer mutates and a property test generates. Values that matter to the TLFS are likely.

use super::hypercall::{Case, L2_PAGES, PAGES, Script};
use crate::reference::hypercall as model;

/// Reads values off a byte string; past its end everything is 0.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// A quadword of a likely kind: small, one bit, all ones, page-like, two halves, or anything.
    pub fn word(&mut self) -> u64 {
        match self.u8() % 10 {
            0 | 8 => 0,
            9 => 1,
            1 => u64::from(self.u8() % 16),
            2 => 1 << (self.u8() % 64),
            3 => u64::MAX,
            4 => u64::from(self.u16()) << 12 | u64::from(self.u16() & 0xFFF),
            5 => u64::from(self.u8()) | u64::from(self.u8()) << 32,
            6 => u64::from(self.u8()),
            _ => self.u64(),
        }
    }
}

const CODES: [u16; 16] = [
    0x0002, 0x0003, 0x0013, 0x0014, 0x0008, 0x000B, 0x0015, 0x0050, 0x0051, 0x005C, 0x005D, 0x0099, 0x009A, 0x00AF,
    0x00B0, 0x8001,
];

fn caller(b: &mut Bytes<'_>) -> model::Caller {
    let bits = b.u8();
    let rare = b.u8();
    // Usually everything is offered.
    let off = if bits & 0x38 == 0x38 { b.u16() } else { 0 };
    let on = |n: u32| off >> n & 1 == 0;
    model::Caller {
        long_mode_64: bits & 1 == 0,
        protected: rare & 0x1F != 0x1F,
        cpl: if rare >> 5 == 7 { bits >> 6 } else { 0 },
        enabled: rare & 0x1F != 0x1E,
        from_l2: bits & 2 != 0,
        offered: model::Offered {
            post_messages: on(0),
            signal_events: on(1),
            vp_registers: on(2),
            extended: on(3),
            start_vp: on(4),
            flush: on(5),
            ipi: on(6),
            ex: on(7),
            spin: on(8),
            gpa_flush: on(9),
            xmm_input: on(10),
            xmm_output: on(11),
            extended_ranges: on(12),
            nested: bits & 4 != 0,
        },
    }
}

/// The control word, and whether its variable header is to be made to fit the set.
fn control(b: &mut Bytes<'_>) -> (u64, bool) {
    let how = b.u8();
    let code = match b.u8() {
        n if n < 240 => CODES[usize::from(n % 16)],
        _ => b.u16(),
    };
    let mut value = u64::from(code);
    if how & 1 != 0 {
        value |= 1 << 16;
    }
    let takes_set = matches!(code, 0x13..=0x15);
    if how & 2 != 0 && (takes_set || how & 0x20 != 0 && how & 0x40 != 0) {
        value |= u64::from(b.u16() & 0x3FF) << 17;
    }
    let reps = code == 3 || code == 0x14 || code == 0xB0 || (0x50..=0x51).contains(&code) || code == 0x9A;
    if reps || how & 0xC0 == 0xC0 {
        let count = if how & 0x84 == 0x84 { b.u16() & 0xFFF } else { u16::from(b.u8() % 14) };
        let start = if how & 0x28 == 0x28 { b.u16() & 0xFFF } else { u16::from(how >> 3 & 1) };
        value |= u64::from(count) << 32 | u64::from(start) << 48;
    }
    if how & 0x10 != 0 && b.u8() > 200 {
        value ^= 1 << (b.u8() % 64);
    }
    (value, how & 2 == 0)
}

/// The words of the input; for sets with the banks that their mask asks for, when `fit`.
fn words(b: &mut Bytes<'_>, control: &mut u64, fit: bool) -> Vec<u64> {
    let limit = if *control >> 16 & 1 != 0 { 14 } else { 512 };
    let mut words: Vec<u64> = Vec::new();
    while !b.0.is_empty() && words.len() < limit {
        words.push(b.word());
    }
    let mask_at = match *control as u16 {
        0x13 | 0x14 => 3,
        0x15 => 2,
        _ => return words,
    };
    if fit && let Some(mask) = words.get(mask_at) {
        *control = *control & !(0x3FF << 17) | u64::from(mask.count_ones()) << 17;
    }
    words
}

fn gpa(b: &mut Bytes<'_>, from_l2: bool) -> u64 {
    let how = b.u8();
    let pages = if from_l2 { L2_PAGES } else { PAGES };
    let page = u64::from(how & 15) % (pages + 1);
    match how >> 5 {
        0..=4 => page << 12,
        5 => page << 12 | u64::from(b.u16() & 0xFF8),
        6 => page << 12 | u64::from(b.u16() & 0xFFF),
        _ => b.u64(),
    }
}

/// The case that `bytes` describe; every byte string describes one.
pub fn hypercall(bytes: &[u8]) -> Case {
    let mut b = Bytes(bytes);
    let caller = caller(&mut b);
    let (mut control, fit) = control(&mut b);
    let script = Script { how: b.u8() % 10, done: u16::from(b.u8()), salt: b.u16() };
    let mut l2 = [(0, true); L2_PAGES as usize];
    for (n, page) in l2.iter_mut().enumerate() {
        let byte = if caller.from_l2 { b.u8() } else { 0 };
        *page = ((byte ^ n as u8) % 6, byte & 0x40 == 0);
    }
    let places = [gpa(&mut b, caller.from_l2), gpa(&mut b, caller.from_l2)];
    let words = words(&mut b, &mut control, fit);
    let fast = control >> 16 & 1 != 0;
    let word = |n: usize| if fast { words.get(n).copied().unwrap_or(0) } else { places.get(n).copied().unwrap_or(!0) };
    let mut registers = model::Registers { rax: 0xA, rbx: 0xB, rcx: 0xC, rdx: 0xD, ..Default::default() };
    if caller.long_mode_64 {
        (registers.rcx, registers.rdx, registers.r8) = (control, word(0), word(1));
    } else {
        // High halves hold what the caller's 64-bit past left there.
        let junk = 0x5A5A_5A5A << 32;
        let split = |v: u64| (v >> 32 | junk, v & 0xFFFF_FFFF | junk);
        (registers.rdx, registers.rax) = split(control);
        (registers.rbx, registers.rcx) = split(word(0));
        (registers.rdi, registers.rsi) = split(word(1));
    }
    for (n, xmm) in registers.xmm.iter_mut().enumerate() {
        *xmm = u128::from(word(2 + 2 * n)) | u128::from(word(3 + 2 * n)) << 64;
    }
    // Each page of L1 begins with the words, so that whichever page is named has them.
    let page: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut memory = vec![0; PAGES as usize * 4096];
    for (n, target) in memory.chunks_mut(4096).enumerate() {
        let at = if fast { 0 } else { (places[0] % 4096) as usize & !7 };
        let len = page.len().min(4096 - at);
        target[at..at + len].copy_from_slice(&page[..len]);
        target[4095] ^= n as u8;
    }
    Case { caller, registers, memory, l2, script }
}
