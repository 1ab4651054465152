//! The end of a run that L0 cannot continue: one screen on its own port, and an exit status of its own.

use hw::port;

use crate::debug::{self, print_dying};
use crate::ports;
use crate::trace;
use crate::vp::Vp;
use nsvm::vmcb::Vmcb;

/// QEMU's isa-debug-exit port; the status is `value * 2 + 1`.
const DEBUG_EXIT: u16 = 0xf4;
/// Status 125: L0 gave up.
const GAVE_UP: u32 = 62;

/// Why L0 cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The firmware disabled SVM (VM_CR.SVMDIS).
    SvmDisabled,
    /// The firmware disabled VMX (IA32_FEATURE_CONTROL), or VMXON failed.
    VmxDisabled,
    /// More processors than L0 has room for.
    TooManyCpus,
    /// VMRUN refused VMCB01: L0 built an illegal state.
    Vmcb01Refused,
    /// VMLAUNCH or VMRESUME refused VMCS01: L0 built an illegal state.
    Vmcs01Refused,
    /// VMLAUNCH or VMRESUME refused VMCS02, for no fault of L1's.
    Vmcs02Refused,
    /// The processor has too few ASIDs.
    TooFewAsids,
    /// The library refused to restore what it had saved.
    NotRestored(nsvm::save::RestoreError),
    /// The same on VT-x.
    VmxNotRestored(nvmx::save::RestoreError),
    /// An exit that L0 did not ask for.
    UnexpectedExit,
    /// A nested page fault on an address that should be mapped.
    UnexpectedFault,
    /// The pages of L0's nested tables are used up.
    OutOfPages,
}

/// Ends the run before any VP exists.
pub fn give_up(args: core::fmt::Arguments<'_>) -> ! {
    print_dying(format_args!("l0: GAVE UP: {args}"));
    end()
}

/// Ends the run with a screen about `vp`.
pub fn report(vp: &mut Vp, failure: Failure) -> ! {
    let exits = vp.counters.l1_exits.get() + vp.counters.l2_exits.get();
    print_dying(format_args!("l0: GAVE UP: {failure:?} on cpu {} after {exits} exits", vp.id));
    print_dying(format_args!("l0: VMCB01:"));
    vmcb(vp.m.vmcb01);
    print_dying(format_args!("l0: VMCB02:"));
    vmcb(vp.m.vmcb02);
    print_dying(format_args!("l0: {:x?}", vp.m.gprs));
    let (bytes, n) = vp.instruction();
    print_dying(format_args!("l0: {:?} code: {:02x?}", vp.nested.level(), bytes.get(..n).unwrap_or(&[])));
    end()
}

fn vmcb(v: &Vmcb) {
    print_dying(format_args!(
        "l0:  exit {:#x} info1 {:#x} info2 {:#x} intinfo {:#x} | inject {:#x} int_ctl {:#x} shadow {:#x}",
        v.control.exit_code,
        v.control.exit_info_1,
        v.control.exit_info_2,
        v.control.exit_int_info,
        v.control.event_inj,
        v.control.int_ctl,
        v.control.int_state
    ));
    print_dying(format_args!(
        "l0:  asid {} tlb {} ncr3 {:#x} intercepts cr {:#x} misc {:#x} {:#x} iopm {:#x} msrpm {:#x} clean {:#x}",
        v.control.asid,
        v.control.tlb_control,
        v.control.n_cr3,
        v.control.intercepts.cr,
        v.control.intercepts.misc1,
        v.control.intercepts.misc2,
        v.control.iopm_base,
        v.control.msrpm_base,
        v.control.clean
    ));
    print_dying(format_args!(
        "l0:  rip {:#x} rsp {:#x} rax {:#x} rflags {:#x} cpl {} cs base {:#x} attributes {:#x}",
        v.save.rip, v.save.rsp, v.save.rax, v.save.rflags, v.save.cpl, v.save.cs.base, v.save.cs.attrib
    ));
    print_dying(format_args!(
        "l0:  cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} dr6 {:#x} dr7 {:#x} pat {:#x}",
        v.save.cr0, v.save.cr2, v.save.cr3, v.save.cr4, v.save.efer, v.save.dr6, v.save.dr7, v.save.g_pat
    ));
}

/// Ends the machine with the status that says that L0 gave up.
pub fn end() -> ! {
    if debug::is_free() {
        trace::print();
    }
    // SAFETY: the debug-exit device ends the emulator; without it the write goes nowhere.
    unsafe { port::outl(DEBUG_EXIT, GAVE_UP) };
    ports::bochs_shutdown();
    loop {
        hw::cpu::cli();
        hw::cpu::halt();
    }
}
