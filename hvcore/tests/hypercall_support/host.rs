//! A host that remembers the requests that reach it, and calls of it in every convention.
#![allow(dead_code, unused_imports)]

use super::*;
pub use hvcore::addr::Level;
pub use hvcore::hypercall::calls::*;
pub use hvcore::hypercall::*;
pub use tlfs_abi::flush::RangeFormat;
pub use tlfs_abi::hypercall::HypercallInput;
pub use tlfs_abi::status::HvStatus;
pub use tlfs_abi::vp_set::VpSet;

#[derive(Debug, Default, PartialEq)]
pub struct Host {
    pub log: Vec<Seen>,
    /// What handlers answer, once; then Done.
    pub answer: Option<Answer>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub level: Level,
    pub space: u64,
    pub flags: u64,
    /// None: all.
    pub vps: Option<Vec<u32>>,
    pub ranges: Option<(RangeFormat, Vec<u64>)>,
}

impl Host {
    pub fn see(&mut self, t: &FlushTarget<'_>, ranges: Option<(RangeFormat, Vec<u64>)>) -> Answer {
        let vps = match t.vps {
            VpSet::All => None,
            VpSet::Sparse(set) => Some(set.iter().collect()),
        };
        self.log.push(Seen { level: t.level, space: t.address_space, flags: t.flags.raw(), vps, ranges });
        self.answer.take().unwrap_or(Answer::Done)
    }
}

impl FlushVirtual for Host {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.see(target, None)
    }
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.see(target, Some((ranges.format, ranges.raw.to_vec())))
    }
}

impl FlushGuestPhysical for Host {
    fn flush_guest_physical_space(&mut self, space: u64) -> Answer {
        self.log.push(Seen { level: Level::L1, space, flags: 0, vps: None, ranges: None });
        Answer::Done
    }
    fn flush_guest_physical_list(&mut self, space: u64, ranges: &[u64]) -> Answer {
        let ranges = Some((RangeFormat::Normal, ranges.to_vec()));
        self.log.push(Seen { level: Level::L1, space, flags: 0, vps: None, ranges });
        self.answer.take().unwrap_or(Answer::Done)
    }
}

hvcore::offer_hypercalls!(impl for Host {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
});

pub const SPACE: u64 = 0x2;
pub const LIST: u64 = 0x3;
pub const SPACE_EX: u64 = 0x13;
pub const LIST_EX: u64 = 0x14;
pub const GPA_SPACE: u64 = 0xAF;
pub const GPA_LIST: u64 = 0xB0;
pub const FAST: u64 = 1 << 16;
pub const GPA: u64 = 0x1000;

pub fn var(n: u64) -> u64 {
    n << 17
}

pub fn reps(count: u64, start: u64) -> u64 {
    count << 32 | start << 48
}

/// What one call did.
pub struct Did {
    pub outcome: Outcome,
    pub status: HvStatus,
    pub reps: u16,
    pub host: Host,
    pub regs: Regs,
    pub mem: Mem,
}

pub fn run(caller: &Caller, input: u64, words: &[u64], answer: Option<Answer>) -> Did {
    let mem = Mem::new(8);
    let width = caller.mode.width;
    let mut regs = if input & FAST != 0 {
        registers(width, input, words)
    } else {
        let shift = if caller.level == Level::L2 { 4096 } else { 0 };
        mem.put(GPA + shift, words);
        registers(width, input, &[GPA, 0x3000])
    };
    let before = regs.clone();
    let mut host = Host { answer, ..Host::default() };
    let outcome = call(&mut host, caller, &mut regs, &mem);
    let value = HypercallInputResult(result(&regs, width));
    check_registers(caller, outcome, &before, &regs);
    Did { outcome, status: HvStatus(value.0 as u16), reps: (value.0 >> 32) as u16 & 0xFFF, host, regs, mem }
}

pub struct HypercallInputResult(pub u64);

/// Exactly the registers that the TLFS allows are written; the others, and all after #UD or Suspend, keep their value.
pub fn check_registers(caller: &Caller, outcome: Outcome, before: &Regs, after: &Regs) {
    let allowed = match (outcome, caller.mode.width) {
        (Outcome::Complete(_), Width::Bits64) => RAX,
        (Outcome::Complete(_), Width::Bits32) => RAX | RDX,
        (Outcome::Retry, Width::Bits64) => RCX,
        (Outcome::Retry, Width::Bits32) => RAX | RDX,
        _ => 0,
    };
    assert_eq!(after.written & !allowed, 0, "{outcome:?}");
    if let Outcome::Complete(_) = outcome {
        assert_eq!(after.written, allowed, "{outcome:?}");
    }
    for (i, (b, a)) in before.gpr.iter().zip(&after.gpr).enumerate() {
        assert!(allowed >> i & 1 != 0 || a == b, "gpr {i}");
    }
    assert_eq!(before.xmm, after.xmm);
}

/// Runs a call that fails before its handler: status, zero reps, no handler.
pub fn refused(caller: &Caller, input: u64, words: &[u64], status: HvStatus) {
    let did = run(caller, input, words, None);
    assert_eq!((did.status, did.reps), (status, 0), "input {input:#x} words {words:x?}");
    assert!(matches!(did.outcome, Outcome::Complete(_)));
    assert_eq!(did.host.log, []);
}

/// Runs a call that succeeds and gives what its handler saw.
pub fn served(caller: &Caller, input: u64, words: &[u64]) -> Vec<Seen> {
    let did = run(caller, input, words, None);
    let count = HypercallInput(input).rep_count();
    assert_eq!((did.status, did.reps), (HvStatus::SUCCESS, count), "input {input:#x}");
    did.host.log
}

pub fn undefined(caller: &Caller, input: u64, words: &[u64]) {
    let did = run(caller, input, words, None);
    assert_eq!(did.outcome, Outcome::InjectUd, "input {input:#x}");
    assert_eq!(did.host.log, []);
    assert_eq!(did.regs.written, 0);
}

pub fn everywhere(f: impl Fn(&Caller, u64)) {
    for caller in [CALLER64, CALLER32] {
        for level in [Level::L1, Level::L2] {
            for fast in [0, FAST] {
                f(&Caller { level, ..caller }, fast);
            }
        }
    }
}
