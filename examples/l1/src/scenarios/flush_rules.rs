//! The rules around a direct flush, on one processor: what it needs, what else L2 may call, the synthetic exit.

use super::Outcome;
use crate::guest::Guest;
use crate::npt::Table;
use crate::vmcb::exit;
use crate::{check, cpu_guest, hyperv};
use tlfs_abi::hypercall::{CallCode, HypercallInput, HypercallResult};
use tlfs_abi::status::HvStatus;

crate::hypercall_program!(
/// One hypercall by registers (RCX, RDX, R8 from the four words at RDI, XMM0 from the fourth), then HLT.
program_call,
    ["mov rcx, [rdi]", "mov rdx, [rdi + 8]", "mov r8, [rdi + 16]", "movq xmm0, qword ptr [rdi + 24]"],
    ["hlt"]
);

/// Bytes before the VMMCALL and of it.
const TO_CALL: u64 = 3 + 4 + 4 + 5;
const CALL: u64 = 3;

const VM_ID: u64 = 0x22;

/// A guest about to flush everything on all processors with direct flush on; `words` may be changed before it runs.
struct Caller {
    guest: &'static mut Guest,
    start: u64,
    assist: u64,
}

impl Caller {
    fn new(code: CallCode) -> Self {
        let words = crate::frames::page() as *mut [u64; 4];
        // SAFETY: the page is this caller's.
        unsafe { words.write([HypercallInput::new(code).with_fast().raw(), 0, 0b11, 0]) };
        let guest = cpu_guest();
        guest.long_mode(program_call(), words as u64);
        let nested = Table::identity(4);
        guest.vmcb.set_np_enable(1);
        guest.vmcb.set_n_cr3(nested.root());
        guest.vmcb.set_tlb_control(1);
        hyperv::enable();
        let assist = hyperv::partition_assist();
        hyperv::describe(&mut guest.vmcb, VM_ID, 7, assist);
        let start = guest.vmcb.rip();
        Self { guest, start, assist }
    }

    fn flush() -> Self {
        Self::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE)
    }

    /// The call reaches this hypervisor: once, with L2's registers as they were.
    fn reflected(self) -> Outcome {
        let rcx = self.words()[0];
        self.guest.expect(exit::VMMCALL)?;
        check("rip at the call", self.guest.vmcb.rip(), self.start + TO_CALL)?;
        check("rcx", self.guest.gprs.rcx, rcx)?;
        check("rax", self.guest.gprs.rax, 0)?;
        self.guest.skip(CALL);
        self.guest.expect(exit::HLT).map(drop)
    }

    /// The host does the call: L2 runs on to its HLT with this result.
    fn done(self, result: HypercallResult) -> Outcome {
        self.guest.expect(exit::HLT)?;
        check("result", self.guest.gprs.rax, result.raw())
    }

    fn words(&self) -> &[u64; 4] {
        // SAFETY: `new` put the words where RDI points.
        unsafe { &*(self.guest.gprs.rdi as *const [u64; 4]) }
    }

    fn set_input(&self, input: HypercallInput) {
        // SAFETY: as above; the guest does not run.
        unsafe { *(self.guest.gprs.rdi as *mut u64) = input.raw() };
    }

    fn set_lock_count(&self, count: u32) {
        // SAFETY: the partition assist page is this caller's.
        unsafe { (self.assist as *mut u32).write_volatile(count) };
    }
}

const SUCCESS: HypercallResult = HypercallResult::new(HvStatus::SUCCESS, 0);

/// Each thing that a direct flush needs, missing in turn; and all there, as the control.
pub fn preconditions() -> Outcome {
    hyperv::needs_direct_flush()?;
    check("the host recommends remote flushes", u64::from(hyperv::offer().remote_flush), 1)?;
    Caller::flush().done(SUCCESS)?;

    let caller = Caller::flush();
    hyperv::set_direct_hypercall(false);
    caller.reflected()?;

    let caller = Caller::flush();
    hyperv::disable_assist_page();
    caller.reflected()?;

    let caller = Caller::flush();
    caller.guest.vmcb.set_hv_control(0);
    caller.reflected()?;

    Caller::flush().done(SUCCESS)
}

/// Calls that are not among the four flushes go to this hypervisor.
pub fn other_calls() -> Outcome {
    hyperv::needs_direct_flush()?;
    for code in [
        CallCode::SEND_SYNTHETIC_CLUSTER_IPI,
        CallCode::POST_MESSAGE,
        CallCode::FLUSH_GUEST_PHYSICAL_ADDRESS_SPACE,
        CallCode(0x0001),
        CallCode(0x7FFF),
    ] {
        Caller::new(code).reflected()?;
    }
    Ok(())
}

/// The host judges a direct flush by the same rules as one from L1.
pub fn refused_input() -> Outcome {
    hyperv::needs_direct_flush()?;
    let flush = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE).with_fast();
    let caller = Caller::flush();
    caller.set_input(flush.with_reps(1, 0));
    caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))?;
    let caller = Caller::flush();
    caller.set_input(flush.with_variable_header_size(1));
    caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))?;
    // By memory, at an address that the nested table does not map.
    let caller = Caller::flush();
    caller.set_input(HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE));
    // SAFETY: the words are this caller's; the guest does not run.
    unsafe { *((caller.guest.gprs.rdi + 8) as *mut u64) = 1 << 40 };
    caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))
}

/// A lock count makes the host leave L2 right after the flush; without one L2 goes on.
pub fn synthetic_exit() -> Outcome {
    hyperv::needs_direct_flush()?;
    let caller = Caller::flush();
    caller.set_lock_count(1);
    let seen = caller.guest.expect(exit::HV_ENLIGHTENED)?;
    check("EXITINFO1", seen.info1, 1)?;
    check("EXITINFO2", seen.info2, 0)?;
    check("rip past the call", caller.guest.vmcb.rip(), caller.start + TO_CALL + CALL)?;
    check("result", caller.guest.gprs.rax, SUCCESS.raw())?;
    caller.guest.expect(exit::HLT)?;

    let caller = Caller::flush();
    caller.set_lock_count(1);
    caller.set_input(HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE).with_fast().with_reps(1, 0));
    // A flush that failed causes no exit.
    caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))
}

/// A partition assist page that cannot be read: the flush is done, the status says that something was wrong.
pub fn unreadable_partition_assist() -> Outcome {
    hyperv::needs_direct_flush()?;
    for address in [1 << 50, 0x7FF0_0000_0008] {
        let caller = Caller::flush();
        caller.guest.vmcb.set_hv_partition_assist(address);
        caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))?;
    }
    let caller = Caller::flush();
    let misaligned = caller.assist + 4;
    caller.guest.vmcb.set_hv_partition_assist(misaligned);
    caller.done(HypercallResult::new(HvStatus::INVALID_HYPERCALL_INPUT, 0))
}
