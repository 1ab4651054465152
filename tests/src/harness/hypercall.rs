//! One hypercall, by the library's intake and by the reference model: same end, same registers, same memory, same
//! requests to the handlers.

use crate::reference::hypercall::{self as model, Ask, End, Say};
use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::hypercall::calls::*;
use hvcore::hypercall::*;
use hvcore::memory::{Access, GuestMemory, L1Caller, L2Caller, MemoryError, SecondStage, TranslateError};
use std::cell::RefCell;
use tlfs_abi::flush::RangeFormat;
use tlfs_abi::inputs::{ExtendedCapabilities, InitialVpContext, RegisterName, RegisterValue};
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::VpSet;
use zerocopy::IntoBytes;

/// Pages of L1's memory.
pub const PAGES: u64 = 4;
/// Pages of L2's address space; what they map to is part of the case.
pub const L2_PAGES: u64 = 8;

/// One hypercall: who calls, with which registers and memory, and how handlers answer.
#[derive(Clone, Debug)]
pub struct Case {
    /// Who calls.
    pub caller: model::Caller,
    /// With which registers.
    pub registers: model::Registers,
    /// The first bytes of each page of L1's memory; the rest is 0.
    pub memory: Vec<u8>,
    /// Page n of L2: L1's page (`PAGES` and above: none) and whether it is writable.
    pub l2: [(u8, bool); L2_PAGES as usize],
    /// How handlers answer.
    pub script: Script,
}

/// How handlers answer: a pure function of what they are asked, the same on both sides.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// 0 to 3: done; 4: failure; 5: retry; 6: suspend; others as 0.
    pub how: u8,
    /// Elements done.
    pub done: u16,
    /// Decides the status of failures and which elements fail.
    pub salt: u16,
}

impl Script {
    fn status(&self) -> u16 {
        // Never success.
        self.salt | 1
    }

    fn list(&self) -> Say {
        match self.how {
            4 => Say::Fail(self.status(), self.done),
            5 => Say::Again(self.done),
            6 => Say::Suspend,
            _ => Say::Done,
        }
    }

    /// The answer for a single element that is named by `id`.
    fn element(&self, id: u32) -> Result<u128, u16> {
        if self.how == 4 && id % 8 == u32::from(self.salt % 8) {
            return Err(self.status());
        }
        Ok(u128::from(id) * 0x1_0001_0001_0001_0001_0001 + u128::from(self.salt))
    }

    fn say(&self, ask: &Ask) -> Say {
        let say = |result: Result<u128, u16>| result.map_or_else(|status| Say::Fail(status, 0), Say::Value);
        match ask {
            Ask::ApicId(id) => say(self.element(*id)),
            Ask::GetRegister { vp, name } | Ask::SetRegister { vp, name, .. } => say(self.element(vp ^ name)),
            Ask::Capabilities => Say::Value(u128::from(self.salt)),
            _ => self.list(),
        }
    }
}

// ---- The library's side.

struct Host {
    script: Script,
    log: Vec<Ask>,
}

impl Host {
    fn answer(&mut self, ask: Ask) -> Answer {
        let say = self.script.say(&ask);
        self.log.push(ask);
        match say {
            Say::Done | Say::Value(_) => Answer::Done,
            Say::Fail(status, completed) => Answer::Failed { status: HvStatus(status), completed },
            Say::Again(completed) => Answer::Retry { completed },
            Say::Suspend => Answer::Suspend,
        }
    }

    fn value(&mut self, ask: Ask) -> Result<u128, HvStatus> {
        let say = self.script.say(&ask);
        self.log.push(ask);
        match say {
            Say::Value(value) => Ok(value),
            Say::Fail(status, _) => Err(HvStatus(status)),
            other => unreachable!("{other:?} for one element"),
        }
    }

    fn flush(&mut self, target: &FlushTarget<'_>, ranges: Option<(bool, Vec<u64>)>) -> Answer {
        self.answer(Ask::Flush {
            from_l2: target.level == Level::L2,
            space: target.address_space,
            flags: target.flags.raw(),
            vps: members(&target.vps),
            ranges,
        })
    }
}

fn members(set: &VpSet<'_>) -> Option<Vec<u32>> {
    match set {
        VpSet::All => None,
        VpSet::Sparse(set) => Some(set.iter().collect()),
    }
}

fn number(vp: NamedVp) -> u32 {
    match vp {
        NamedVp::Caller => 0xFFFF_FFFE,
        NamedVp::Index(index) => index,
    }
}

impl FlushVirtual for Host {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.flush(target, None)
    }
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.flush(target, Some((ranges.format == RangeFormat::Extended, ranges.raw.to_vec())))
    }
}

impl FlushGuestPhysical for Host {
    fn flush_guest_physical_space(&mut self, space: u64) -> Answer {
        self.answer(Ask::FlushGuestPhysical { space, ranges: None })
    }
    fn flush_guest_physical_list(&mut self, space: u64, ranges: &[u64]) -> Answer {
        self.answer(Ask::FlushGuestPhysical { space, ranges: Some(ranges.to_vec()) })
    }
}

impl ClusterIpi for Host {
    fn send_ipi(&mut self, _: Level, vector: u8, vps: &VpSet<'_>) -> Answer {
        self.answer(Ask::Ipi { vector, vps: members(vps) })
    }
}

impl LongSpinWait for Host {
    fn notify_long_spin_wait(&mut self, spins: u32) -> Answer {
        self.answer(Ask::Spin(spins))
    }
}

impl Messages for Host {
    fn post_message(&mut self, connection: u32, kind: u32, payload: &[u8]) -> Answer {
        self.answer(Ask::PostMessage { connection, kind, payload: payload.to_vec() })
    }
}

impl Events for Host {
    fn signal_event(&mut self, connection: u32, flag: u16) -> Answer {
        self.answer(Ask::SignalEvent { connection, flag })
    }
}

impl ExtendedCalls for Host {
    fn extended_capabilities(&mut self) -> ExtendedCapabilities {
        let value = self.value(Ask::Capabilities).expect("never fails");
        ExtendedCapabilities::new(value as u64)
    }
}

impl VpRegisters for Host {
    fn get_vp_register(&mut self, vp: NamedVp, name: RegisterName) -> Result<RegisterValue, HvStatus> {
        let value = self.value(Ask::GetRegister { vp: number(vp), name: name.0 })?;
        Ok(RegisterValue { low: value as u64, high: (value >> 64) as u64 })
    }
    fn set_vp_register(&mut self, vp: NamedVp, name: RegisterName, value: RegisterValue) -> Result<(), HvStatus> {
        let value = u128::from(value.high) << 64 | u128::from(value.low);
        self.value(Ask::SetRegister { vp: number(vp), name: name.0, value }).map(drop)
    }
}

impl ApicIds for Host {
    fn vp_index_of(&mut self, apic_id: u32) -> Result<u32, HvStatus> {
        self.value(Ask::ApicId(apic_id)).map(|value| value as u32)
    }
}

impl StartVp for Host {
    fn start_vp(&mut self, vp: u32, context: &InitialVpContext) -> Answer {
        self.answer(Ask::StartVp { vp, context: context.as_bytes().to_vec() })
    }
}

hvcore::offer_hypercalls!(impl for Host {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    NotifyLongSpinWait,
    SendSyntheticClusterIpi,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    SendSyntheticClusterIpiEx,
    GetVpRegisters,
    SetVpRegisters,
    PostMessage,
    SignalEvent,
    StartVirtualProcessor,
    GetVpIndexFromApicId,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
    ExtQueryCapabilities,
});

struct Regs(model::Registers);

impl Registers for Regs {
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
        *match register {
            Gpr::Rax => &mut self.0.rax,
            Gpr::Rbx => &mut self.0.rbx,
            Gpr::Rcx => &mut self.0.rcx,
            Gpr::Rdx => &mut self.0.rdx,
            Gpr::Rsi => &mut self.0.rsi,
            Gpr::Rdi => &mut self.0.rdi,
            Gpr::R8 => &mut self.0.r8,
        } = value;
    }
    fn xmm(&self, register: Xmm) -> u128 {
        self.0.xmm[register as usize]
    }
    fn set_xmm(&mut self, register: Xmm, value: u128) {
        self.0.xmm[register as usize] = value;
    }
}

/// L1's memory: each byte of input may be read once.
struct Mem {
    bytes: RefCell<Vec<u8>>,
    read: RefCell<Vec<(u64, u64)>>,
}

impl Mem {
    fn range(gpa: L1Gpa, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let end = gpa.raw().checked_add(len as u64).ok_or(MemoryError)?;
        if end <= PAGES * 4096 { Ok(gpa.raw() as usize..end as usize) } else { Err(MemoryError) }
    }
}

impl GuestMemory for Mem {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = Self::range(gpa, buf.len())?;
        let (from, to) = (range.start as u64, range.end as u64);
        for (a, b) in &*self.read.borrow() {
            assert!(to <= *a || *b <= from, "guest memory read twice at {from:#x}");
        }
        self.read.borrow_mut().push((from, to));
        buf.copy_from_slice(&self.bytes.borrow()[range]);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.bytes.borrow_mut()[Self::range(gpa, buf.len())?].copy_from_slice(buf);
        Ok(())
    }
    fn compare_exchange_u8(&self, gpa: L1Gpa, current: u8, new: u8) -> Result<Result<u8, u8>, MemoryError> {
        let byte = &mut self.bytes.borrow_mut()[Self::range(gpa, 1)?.start];
        if *byte != current {
            return Ok(Err(*byte));
        }
        Ok(Ok(std::mem::replace(byte, new)))
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        unreachable!("the intake never does")
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        unreachable!("the intake never does")
    }
}

struct Tables([(u8, bool); L2_PAGES as usize]);

impl SecondStage for Tables {
    fn walk(&self, gpa: L2Gpa, access: Access) -> Result<L1Gpa, TranslateError> {
        let (page, writable) = *self.0.get((gpa.raw() / 4096) as usize).ok_or(TranslateError)?;
        if u64::from(page) >= PAGES || access == Access::Write && !writable {
            return Err(TranslateError);
        }
        Ok(L1Gpa::new(u64::from(page) * 4096 + gpa.raw() % 4096))
    }
}

// ---- The model's side.

struct ModelMemory {
    bytes: Vec<u8>,
    l2: Option<[(u8, bool); L2_PAGES as usize]>,
}

impl ModelMemory {
    /// L1's page and whether the caller can write it.
    fn page(&self, number: u64) -> Option<(u64, bool)> {
        match &self.l2 {
            None if number < PAGES => Some((number, true)),
            None => None,
            Some(map) => {
                let (page, writable) = *map.get(usize::try_from(number).ok()?)?;
                if u64::from(page) < PAGES { Some((u64::from(page), writable)) } else { None }
            }
        }
    }
}

impl model::Memory for ModelMemory {
    fn read_page(&self, number: u64) -> Option<Vec<u8>> {
        let (page, _) = self.page(number)?;
        Some(self.bytes[page as usize * 4096..][..4096].to_vec())
    }
    fn can_write(&self, number: u64) -> bool {
        self.page(number).is_some_and(|(_, writable)| writable)
    }
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let (page, _) = self.page(address / 4096).expect("checked");
        self.bytes[(page * 4096 + address % 4096) as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// The library's privileges for what the model calls offered.
pub fn privileges(o: &model::Offered) -> Privileges {
    use Privileges as P;
    let list = [
        (o.post_messages, P::POST_MESSAGES),
        (o.signal_events, P::SIGNAL_EVENTS),
        (o.vp_registers, P::ACCESS_VP_REGISTERS),
        (o.extended, P::EXTENDED_HYPERCALLS),
        (o.start_vp, P::START_VIRTUAL_PROCESSOR),
        (o.flush, P::REMOTE_FLUSH),
        (o.ipi, P::CLUSTER_IPI),
        (o.ex, P::EX_PROCESSOR_MASKS),
        (o.spin, P::LONG_SPIN_WAIT),
        (o.gpa_flush, P::GUEST_PHYSICAL_FLUSH),
        (o.xmm_input, P::XMM_INPUT),
        (o.xmm_output, P::XMM_OUTPUT),
        (o.extended_ranges, P::EXTENDED_GVA_RANGES),
        (o.nested, P::NESTED_CALLS),
    ];
    list.into_iter().filter(|(on, _)| *on).fold(P::NONE, |set, (_, one)| set.with(one))
}

fn memory_image(case: &Case) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    let share = case.memory.len().div_ceil(PAGES as usize).clamp(1, 4096);
    for (page, part) in bytes.chunks_mut(4096).zip(case.memory.chunks(share)) {
        page[..part.len()].copy_from_slice(part);
    }
    bytes
}

/// What one side did.
#[derive(Debug, PartialEq)]
pub struct Did {
    /// How the instruction ended.
    pub end: End,
    /// The registers afterwards.
    pub registers: model::Registers,
    /// L1's memory afterwards.
    pub memory: Vec<u8>,
    /// What handlers were asked.
    pub asked: Vec<Ask>,
}

/// Runs the library.
pub fn library(case: &Case) -> Did {
    let mem = Mem { bytes: RefCell::new(memory_image(case)), read: RefCell::default() };
    let level = if case.caller.from_l2 { Level::L2 } else { Level::L1 };
    let width = if case.caller.long_mode_64 { Width::Bits64 } else { Width::Bits32 };
    let mode = CallerMode { width, protected: case.caller.protected, cpl: case.caller.cpl };
    let privileges = privileges(&case.caller.offered);
    let caller = Caller { mode, level, enabled: case.caller.enabled, privileges };
    let mut regs = Regs(case.registers.clone());
    let mut host = Host { script: case.script, log: Vec::new() };
    let mut scratch = Scratch::new();
    let outcome = match level {
        Level::L1 => handle(&mut host, &caller, &mut regs, &L1Caller(&mem), &mut scratch),
        Level::L2 => {
            let memory = L2Caller { memory: &mem, second_stage: &Tables(case.l2) };
            handle(&mut host, &caller, &mut regs, &memory, &mut scratch)
        }
    };
    let end = match outcome {
        Outcome::Complete(result) => End::Result { status: result.status().0, reps: result.reps_completed() },
        Outcome::Retry => End::Again,
        Outcome::Suspend => End::Suspend,
        Outcome::InjectUd => End::Undefined,
    };
    Did { end, registers: regs.0, memory: mem.bytes.into_inner(), asked: host.log }
}

/// Runs the reference model.
pub fn reference(case: &Case) -> Did {
    let l2 = case.caller.from_l2.then_some(case.l2);
    let mut memory = ModelMemory { bytes: memory_image(case), l2 };
    let mut registers = case.registers.clone();
    let mut asked = Vec::new();
    let mut handler = |ask: &Ask| {
        asked.push(ask.clone());
        case.script.say(ask)
    };
    let end = model::hypercall(&case.caller, &mut registers, &mut memory, &mut handler);
    Did { end, registers, memory: memory.bytes, asked }
}

/// Runs both and panics when they differ. Gives what they did.
pub fn compare(case: &Case) -> Did {
    let (library, reference) = (library(case), reference(case));
    let who = (case.caller, &case.registers, case.script, case.l2);
    assert_eq!((&library.end, &library.asked), (&reference.end, &reference.asked), "{who:x?}");
    assert_eq!(library.registers, reference.registers, "{who:x?}");
    let differs = library.memory.iter().zip(&reference.memory).position(|(a, b)| a != b);
    assert_eq!(differs, None, "memory differs at this byte: {who:x?}");
    library
}
