//! The calls that are not flushes: their parameters, and output to memory and to registers.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::unwrap_used)]

mod hypercall_support;

use hvcore::addr::Level;
use hvcore::hypercall::calls::*;
use hvcore::hypercall::*;
use hypercall_support::*;
use tlfs_abi::inputs::{ExtendedCapabilities, InitialVpContext, RegisterName, RegisterValue};
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::VpSet;

#[derive(Debug, Default)]
struct Host {
    log: Vec<String>,
}

impl ClusterIpi for Host {
    fn send_ipi(&mut self, level: Level, vector: u8, vps: &VpSet<'_>) -> Answer {
        let vps = match vps {
            VpSet::All => "all".into(),
            VpSet::Sparse(set) => format!("{:?}", set.iter().collect::<Vec<_>>()),
        };
        self.log.push(format!("{level:?} {vector:#x} to {vps}"));
        Answer::Done
    }
}

impl LongSpinWait for Host {
    fn notify_long_spin_wait(&mut self, spins: u32) -> Answer {
        self.log.push(format!("spun {spins}"));
        Answer::Done
    }
}

impl Messages for Host {
    fn post_message(&mut self, connection_id: u32, message_type: u32, payload: &[u8]) -> Answer {
        self.log.push(format!("{connection_id} {message_type} {}", payload.len()));
        HvStatus::INVALID_CONNECTION_ID.into()
    }
}

impl Events for Host {
    fn signal_event(&mut self, connection_id: u32, flag_number: u16) -> Answer {
        self.log.push(format!("{connection_id} {flag_number}"));
        Answer::Done
    }
}

impl ExtendedCalls for Host {
    fn extended_capabilities(&mut self) -> ExtendedCapabilities {
        ExtendedCapabilities::new(0x1122_3344_5566_7788)
    }
}

impl VpRegisters for Host {
    fn get_vp_register(&mut self, vp: NamedVp, name: RegisterName) -> Result<RegisterValue, HvStatus> {
        self.log.push(format!("get {vp:?} {:#x}", name.0));
        if name.0 == 0xBAD {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        Ok(RegisterValue { low: name.0.into(), high: !u64::from(name.0) })
    }
    fn set_vp_register(&mut self, vp: NamedVp, name: RegisterName, value: RegisterValue) -> Result<(), HvStatus> {
        self.log.push(format!("set {vp:?} {:#x} {:#x} {:#x}", name.0, value.low, value.high));
        Ok(())
    }
}

impl ApicIds for Host {
    fn vp_index_of(&mut self, apic_id: u32) -> Result<u32, HvStatus> {
        if apic_id > 99 { Err(HvStatus::INVALID_PARAMETER) } else { Ok(apic_id + 1000) }
    }
}

impl StartVp for Host {
    fn start_vp(&mut self, vp_index: u32, context: &InitialVpContext) -> Answer {
        self.log.push(format!("start {vp_index} at {:#x} pat {:#x}", context.rip, context.msr_cr_pat));
        Answer::Done
    }
}

hvcore::offer_hypercalls!(impl for Host {
    NotifyLongSpinWait,
    SendSyntheticClusterIpi,
    SendSyntheticClusterIpiEx,
    PostMessage,
    SignalEvent,
    ExtQueryCapabilities,
    GetVpRegisters,
    SetVpRegisters,
    StartVirtualProcessor,
    GetVpIndexFromApicId,
});

const FAST: u64 = 1 << 16;
const IN: u64 = 0x1000;
const OUT: u64 = 0x2008;
const SELF: u64 = u64::MAX;

struct Did {
    outcome: Outcome,
    status: HvStatus,
    reps: u16,
    log: Vec<String>,
    regs: Regs,
    mem: Mem,
}

fn run_at(caller: &Caller, input: u64, words: &[u64], places: [u64; 2]) -> Did {
    let mem = Mem::new(8);
    let shift = if caller.level == Level::L2 { 4096 } else { 0 };
    let block = if input & FAST != 0 { words } else { &places };
    if input & FAST == 0 {
        mem.put(places[0] + shift, words);
    }
    let width = caller.mode.width;
    let mut regs = registers(width, input, block);
    let mut host = Host::default();
    let outcome = call(&mut host, caller, &mut regs, &mem);
    let value = result(&regs, width);
    Did { outcome, status: HvStatus(value as u16), reps: (value >> 32) as u16 & 0xFFF, log: host.log, regs, mem }
}

fn run(caller: &Caller, input: u64, words: &[u64]) -> Did {
    run_at(caller, input, words, [IN, OUT])
}

fn refused(caller: &Caller, input: u64, words: &[u64], status: HvStatus) {
    let did = run(caller, input, words);
    assert_eq!((did.status, did.reps), (status, 0), "{input:#x} {words:x?}");
    assert_eq!(did.log, [""; 0]);
    assert!(did.mem.writes.borrow().is_empty());
}

fn everywhere(f: impl Fn(&Caller, u64)) {
    for caller in [CALLER64, CALLER32] {
        for level in [Level::L1, Level::L2] {
            for fast in [0, FAST] {
                f(&Caller { level, ..caller }, fast);
            }
        }
    }
}

#[test]
fn ipis() {
    everywhere(|caller, fast| {
        let level = caller.level;
        let did = run(caller, 0x0B | fast, &[0x10, 0b101]);
        assert_eq!((did.status, did.log), (HvStatus::SUCCESS, vec![format!("{level:?} 0x10 to [0, 2]")]));
        // VTL 0 by name, padding ignored.
        let did = run(caller, 0x0B | fast, &[0xABCD_EF10_0000_00FF, 1]);
        assert_eq!(did.log, [format!("{level:?} 0xff to [0]")]);
        let did = run(caller, 0x15 | fast | 1 << 17, &[0x20, 0, 2, 3]);
        assert_eq!(did.log, [format!("{level:?} 0x20 to [64, 65]")]);
        let did = run(caller, 0x15 | fast | 1 << 17, &[0x20, 1, 2, 3]);
        assert_eq!(did.log, [format!("{level:?} 0x20 to all")]);
        // Nobody: success, nothing done.
        for (input, words) in [(0x0B, vec![0x20, 0]), (0x15, vec![0x20, 0, 0])] {
            let did = run(caller, input | fast, &words);
            assert_eq!((did.status, did.log.len()), (HvStatus::SUCCESS, 0));
        }
        for bad in [0, 0xF, 0x100, 0xFFFF_FFFF, 0x01_0000_0020, 0x11_0000_0020, 0x30_0000_0020] {
            refused(caller, 0x0B | fast, &[bad, 1], HvStatus::INVALID_PARAMETER);
            refused(caller, 0x15 | fast | 1 << 17, &[bad, 0, 1, 1], HvStatus::INVALID_PARAMETER);
            refused(caller, 0x15 | fast, &[bad, 0, 0], HvStatus::INVALID_PARAMETER);
        }
        refused(caller, 0x15 | fast | 1 << 17, &[0x20, 2, 1, 1], HvStatus::INVALID_PARAMETER);
        refused(caller, 0x15 | fast | 1 << 17, &[0x20, 0, 3, 1], HvStatus::INVALID_HYPERCALL_INPUT);
        refused(caller, 0x0B | fast | 1 << 17, &[0x20, 1], HvStatus::INVALID_HYPERCALL_INPUT);
        refused(caller, 0x0B | fast | 1 << 32, &[0x20, 1], HvStatus::INVALID_HYPERCALL_INPUT);
    });
    for (code, missing) in
        [(0x0B, Privileges::CLUSTER_IPI), (0x15, Privileges::CLUSTER_IPI), (0x15, Privileges::EX_PROCESSOR_MASKS)]
    {
        let caller = Caller { privileges: CALLER64.privileges.without(missing), ..CALLER64 };
        refused(&caller, code | FAST, &[0x20, 1, 0], HvStatus::ACCESS_DENIED);
    }
}

#[test]
fn a_cluster_ipi_needs_no_xmm_register() {
    let caller = Caller { privileges: CALLER64.privileges.without(Privileges::XMM_INPUT), ..CALLER64 };
    let did = run(&caller, 0x0B | FAST, &[0x20, 1]);
    assert_eq!((did.log.len(), did.regs.xmm_reads.get()), (1, 0));
    assert_eq!(run(&caller, 0x15 | FAST | 1 << 17, &[0x20, 0, 1, 1]).outcome, Outcome::InjectUd);
}

#[test]
fn spin_waits_and_events() {
    everywhere(|caller, fast| {
        assert_eq!(run(caller, 8 | fast, &[0xFFFF_FFFF_0000_0007]).log, ["spun 7"]);
        assert_eq!(run(caller, 0x5D | fast, &[0xABCD_0003_0000_0042]).log, ["66 3"]);
        refused(caller, 8 | fast | 1 << 32, &[1], HvStatus::INVALID_HYPERCALL_INPUT);
        refused(caller, 0x5D | fast | 1 << 17, &[1], HvStatus::INVALID_HYPERCALL_INPUT);
    });
    for (code, missing) in [
        (8, Privileges::LONG_SPIN_WAIT),
        (0x5C, Privileges::POST_MESSAGES),
        (0x5D, Privileges::SIGNAL_EVENTS),
        (0x8001, Privileges::EXTENDED_HYPERCALLS),
    ] {
        let caller = Caller { privileges: CALLER64.privileges.without(missing), ..CALLER64 };
        refused(&caller, code, &[1], HvStatus::ACCESS_DENIED);
    }
}

#[test]
fn messages() {
    let message = |kind: u64, size: u64| [9, kind | size << 32];
    for size in [0, 1, 239, 240] {
        let did = run(&CALLER64, 0x5C, &message(5, size));
        assert_eq!((did.status, did.log), (HvStatus::INVALID_CONNECTION_ID, vec![format!("9 5 {size}")]));
    }
    refused(&CALLER64, 0x5C, &message(5, 241), HvStatus::INVALID_PARAMETER);
    refused(&CALLER64, 0x5C, &message(5, 0xFFFF_FFFF), HvStatus::INVALID_PARAMETER);
    refused(&CALLER64, 0x5C, &message(0, 1), HvStatus::INVALID_PARAMETER);
    refused(&CALLER64, 0x5C, &message(1 << 31, 1), HvStatus::INVALID_PARAMETER);
    assert_eq!(run(&CALLER64, 0x5C, &message((1 << 31) - 1, 1)).log.len(), 1);
    refused(&CALLER64, 0x5C | FAST, &message(5, 1), HvStatus::INVALID_HYPERCALL_INPUT);
}

#[test]
fn calls_on_vps_name_their_own_partition_and_trust_level() {
    let vtl = |vtl: u64| 0xFFFF_FFFE | vtl << 32;
    for (input, words) in [(0x50 | 1 << 32, vec![7]), (0x51 | 1 << 32, vec![7, 0, 8, 9]), (0x99, vec![0; 28])] {
        let with = |partition, second| [vec![partition, second], words.clone()].concat();
        assert_eq!(run(&CALLER64, input, &with(SELF, vtl(0))).log.len(), 1);
        assert_eq!(run(&CALLER64, input, &with(SELF, vtl(0x10))).log.len(), 1);
        refused(&CALLER64, input, &with(1, vtl(0)), HvStatus::INVALID_PARTITION_ID);
        refused(&CALLER64, input, &with(SELF, vtl(1)), HvStatus::INVALID_PARAMETER);
        refused(&CALLER64, input, &with(SELF, vtl(0x11)), HvStatus::INVALID_PARAMETER);
    }
    refused(&CALLER64, 0x9A | 1 << 32, &[SELF, 0x11, 7], HvStatus::INVALID_PARAMETER);
    refused(&CALLER64, 0x9A | 1 << 32, &[0, 0, 7], HvStatus::INVALID_PARTITION_ID);
    let did = run(&CALLER64, 0x51 | 1 << 32, &[SELF, 5, 7, 0, 8, 9]);
    assert_eq!(did.log, ["set Index(5) 0x7 0x8 0x9"]);
    let mut words = vec![SELF, 3, 0xFFF0];
    words.resize(30, 0x77);
    assert_eq!(run(&CALLER64, 0x99, &words).log, ["start 3 at 0xfff0 pat 0x77"]);
}

#[test]
fn output_in_memory() {
    for caller in [CALLER64, CALLER32, Caller { level: Level::L2, ..CALLER64 }] {
        let shift = if caller.level == Level::L2 { 4096 } else { 0 };
        let did = run(&caller, 0x50 | 3 << 32, &[SELF, 0xFFFF_FFFE, 0x0B_0000_000A, 0xC]);
        assert_eq!((did.status, did.reps), (HvStatus::SUCCESS, 3));
        assert_eq!(did.log, ["get Caller 0xa", "get Caller 0xb", "get Caller 0xc"]);
        let writes = [(OUT + shift, 16), (OUT + shift + 16, 16), (OUT + shift + 32, 16)];
        assert_eq!(*did.mem.writes.borrow(), writes);
        let bytes = did.mem.bytes.borrow();
        assert_eq!(bytes[(OUT + shift) as usize + 32..][..8], 0xCu64.to_le_bytes());
        // No register but the result's changes.
        assert_eq!(did.regs.written & !(RAX | if caller == CALLER32 { RDX } else { 0 }), 0);
    }
    // A failure in the middle: the reps before it are done. A start index: output continues where it belongs.
    let did = run(&CALLER64, 0x50 | 3 << 32, &[SELF, 0, 0x0BAD_0000_000A, 0xC]);
    assert_eq!((did.status, did.reps, did.log.len()), (HvStatus::INVALID_PARAMETER, 1, 2));
    let did = run(&CALLER64, 0x50 | 3 << 32 | 2 << 48, &[SELF, 0, 0x0BAD_0000_000A, 0xC]);
    assert_eq!((did.status, did.reps), (HvStatus::SUCCESS, 3));
    assert_eq!(*did.mem.writes.borrow(), [(OUT + 32, 16)]);
}

#[test]
fn output_places() {
    let words = [SELF, 0, 1];
    let at = |input, output| run_at(&CALLER64, 0x50 | 1 << 32, &words, [input, output]);
    // Just before, just behind and overlapping the 20 bytes of input.
    for (output, status) in [
        (IN + 24, HvStatus::SUCCESS),
        (IN + 16, HvStatus::INVALID_ALIGNMENT),
        (IN, HvStatus::INVALID_ALIGNMENT),
        (IN - 16, HvStatus::SUCCESS),
        (IN - 8, HvStatus::INVALID_ALIGNMENT),
        (0x2FF0, HvStatus::SUCCESS),
        (0x2FF8, HvStatus::INVALID_ALIGNMENT),
        (0x2004, HvStatus::INVALID_ALIGNMENT),
        (0x8000, HvStatus::INVALID_HYPERCALL_INPUT),
    ] {
        let did = at(IN, output);
        assert_eq!(did.status, status, "{output:#x}");
        assert_eq!(did.log.len(), usize::from(status == HvStatus::SUCCESS), "{output:#x}");
    }
    // From L2, page 6 is read-only: not for output. Page 5 is a control.
    let caller = Caller { level: Level::L2, ..CALLER64 };
    let did = run_at(&caller, 0x50 | 1 << 32, &words, [IN, 0x6000]);
    assert_eq!((did.status, did.log.len()), (HvStatus::INVALID_HYPERCALL_INPUT, 0));
    assert_eq!(run_at(&caller, 0x50 | 1 << 32, &words, [IN, 0x5000]).status, HvStatus::SUCCESS);
    // A call without input ignores the input GPA, and one without output the output GPA.
    assert_eq!(run_at(&CALLER64, 0x8001, &[], [0x7, OUT]).status, HvStatus::SUCCESS);
    assert_eq!(run_at(&CALLER64, 8, &[1], [IN, 0x7]).status, HvStatus::SUCCESS);
}

#[test]
fn output_in_registers() {
    let xmm = |n: u32| 1u32 << (8 + n);
    // 20 bytes of input leave XMM1 to XMM5.
    let did = run(&CALLER64, 0x50 | FAST | 1 << 32, &[SELF, 0, 0xA]);
    assert_eq!((did.status, did.reps), (HvStatus::SUCCESS, 1));
    assert_eq!(did.regs.written, RAX | xmm(1));
    assert_eq!(did.regs.xmm[1], 0xA | (!0xA_u64 as u128) << 64);
    // No input: output begins with RDX. R8 keeps its value.
    let did = run(&CALLER64, 0x8001 | FAST, &[1, 2]);
    assert_eq!(did.regs.written, RAX | RDX);
    assert_eq!(did.regs.gpr[Gpr::Rdx as usize], 0x1122_3344_5566_7788);
    // Elements of 4 bytes fill a register in part; the rest of it keeps its value. Input: 16 + 12 bytes.
    let did = run(&CALLER64, 0x9A | FAST | 3 << 32, &[SELF, 0, 0x2_0000_0001, 3, 0xAA, 0xBBBB_BBBB_BBBB_BBBB]);
    assert_eq!(did.regs.written, RAX | xmm(1));
    assert_eq!(did.regs.xmm[1], 0xBBBB_BBBB_0000_03EB_0000_03EA_0000_03E9);
    // Continued at index 2: only the last one is written.
    let did =
        run(&CALLER64, 0x9A | FAST | 3 << 32 | 2 << 48, &[SELF, 0, 0x2_0000_0001, 3, 0xAA, 0xBBBB_BBBB_BBBB_BBBB]);
    assert_eq!(did.regs.xmm[1], 0xBBBB_BBBB_0000_03EB_0000_0000_0000_00AA);
    // As much as fits, and one more: 16 + 4 * 4 bytes in leave 80; 16 + 5 * 4 leave 64, too little for five values.
    let did = run(&CALLER64, 0x50 | FAST | 4 << 32, &[SELF, 0, 1, 2]);
    assert_eq!((did.status, did.regs.written), (HvStatus::SUCCESS, RAX | xmm(1) | xmm(2) | xmm(3) | xmm(4)));
    refused(&CALLER64, 0x50 | FAST | 5 << 32, &[SELF, 0, 1, 2], HvStatus::INVALID_HYPERCALL_INPUT);
    // Without the feature, and for a 32-bit caller, it is #UD.
    let none = Caller { privileges: CALLER64.privileges.without(Privileges::XMM_OUTPUT), ..CALLER64 };
    for caller in [none, CALLER32] {
        let did = run(&caller, 0x8001 | FAST, &[1, 2]);
        assert_eq!((did.outcome, did.regs.written), (Outcome::InjectUd, 0));
        assert_eq!(run(&caller, 0x8001, &[]).status, HvStatus::SUCCESS);
    }
    // A call that fails writes what it completed and nothing else.
    let did = run(&CALLER64, 0x50 | FAST | 2 << 32, &[SELF, 0, 0xBAD]);
    assert_eq!((did.status, did.reps, did.regs.written), (HvStatus::INVALID_PARAMETER, 0, RAX));
}

#[test]
fn privileges_follow_the_leaves() {
    let none = PrivilegeLeaves::default();
    assert_eq!(Privileges::from_leaves(&none), Privileges::NONE);
    let all = PrivilegeLeaves {
        features_ebx: !0,
        features_edx: !0,
        recommendations_eax: !0,
        recommendations_ebx: 0xFFF,
        nested_features_eax: !0,
        nested_optimizations_eax: !0,
    };
    assert_eq!(Privileges::from_leaves(&all), Privileges::ALL);
    let one = |leaves: PrivilegeLeaves| Privileges::from_leaves(&leaves);
    assert_eq!(one(PrivilegeLeaves { features_ebx: 1 << 4, ..none }), Privileges::POST_MESSAGES);
    assert_eq!(one(PrivilegeLeaves { features_ebx: 1 << 5, ..none }), Privileges::SIGNAL_EVENTS);
    assert_eq!(one(PrivilegeLeaves { features_ebx: 1 << 17, ..none }), Privileges::ACCESS_VP_REGISTERS);
    assert_eq!(one(PrivilegeLeaves { features_ebx: 1 << 20, ..none }), Privileges::EXTENDED_HYPERCALLS);
    assert_eq!(one(PrivilegeLeaves { features_ebx: 1 << 21, ..none }), Privileges::START_VIRTUAL_PROCESSOR);
    assert_eq!(one(PrivilegeLeaves { features_edx: 1 << 4, ..none }), Privileges::XMM_INPUT);
    assert_eq!(one(PrivilegeLeaves { features_edx: 1 << 14, ..none }), Privileges::EXTENDED_GVA_RANGES);
    assert_eq!(one(PrivilegeLeaves { features_edx: 1 << 15, ..none }), Privileges::XMM_OUTPUT);
    assert_eq!(one(PrivilegeLeaves { recommendations_eax: 1 << 2, ..none }), Privileges::REMOTE_FLUSH);
    assert_eq!(one(PrivilegeLeaves { recommendations_eax: 1 << 10, ..none }), Privileges::CLUSTER_IPI);
    assert_eq!(one(PrivilegeLeaves { recommendations_eax: 1 << 11, ..none }), Privileges::EX_PROCESSOR_MASKS);
    assert_eq!(one(PrivilegeLeaves { recommendations_ebx: 1, ..none }), Privileges::LONG_SPIN_WAIT);
    assert_eq!(one(PrivilegeLeaves { recommendations_ebx: !0, ..none }), Privileges::NONE);
    assert_eq!(one(PrivilegeLeaves { nested_features_eax: 1 << 5, ..none }), Privileges::NESTED_CALLS);
    assert_eq!(one(PrivilegeLeaves { nested_optimizations_eax: 1 << 18, ..none }), Privileges::GUEST_PHYSICAL_FLUSH);
    assert_eq!(one(PrivilegeLeaves { nested_optimizations_eax: 1 << 22, ..none }), Privileges::GUEST_PHYSICAL_FLUSH);
    assert_eq!(one(PrivilegeLeaves { nested_optimizations_eax: 1 << 19, ..none }), Privileges::NONE);
}
