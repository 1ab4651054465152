//! The VMX instructions and how they fail: VMfailInvalid, VMfailValid with each number, and faults.

use super::Outcome;
use super::exits::nothing;
use crate::vmcb::exit;
use crate::{check, cpu_guest, frames, vmx};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use hw::vmx as hardware;
use hw::vmx::Fail;
use nvmx::field::Field;
use rt::idt::{self, Frame};

/// Address bits that no machine here has.
const BEYOND: u64 = 1 << 50;

fn number() -> u64 {
    cpu_guest().side().field(Field::InstructionError)
}

/// Demands VMfailValid with `wanted`.
fn fails(what: &'static str, outcome: Result<(), Fail>, wanted: u64) -> Outcome {
    check(what, outcome_code(outcome), 2)?;
    check(what, number(), wanted)
}

fn outcome_code(outcome: Result<(), Fail>) -> u64 {
    match outcome {
        Ok(()) => 0,
        Err(Fail::Invalid) => 1,
        Err(Fail::Valid) => 2,
    }
}

/// A guest whose plain VMCS is current and was launched.
fn with_current() -> Outcome {
    let guest = cpu_guest();
    guest.long_mode(nothing, 0);
    guest.expect(exit::HLT).map(drop)
}

/// Each failure that has a number, with a current VMCS to hold it.
pub fn failures() -> Outcome {
    with_current()?;
    // SAFETY: VMX operation; each instruction fails and changes nothing, or works on pages of this scenario.
    unsafe {
        let current = hardware::vmptrst();
        fails("VMXON in VMX operation", hardware::vmxon(frames::page()), 15)?;
        fails("VMCLEAR, not aligned", hardware::vmclear(current + 8), 2)?;
        fails("VMCLEAR, no such address", hardware::vmclear(BEYOND), 2)?;
        fails("VMPTRLD, not aligned", hardware::vmptrld(current + 0x800), 9)?;
        fails("VMPTRLD, no such address", hardware::vmptrld(BEYOND), 9)?;
        let page = frames::page();
        (page as *mut u32).write(hardware::revision() ^ 1);
        fails("VMPTRLD, wrong revision", hardware::vmptrld(page), 11)?;
        check("the current VMCS stays", hardware::vmptrst(), current)?;
        for encoding in [0x0FFE, 0x1_0000, 0x6801, 0x1000] {
            fails("VMREAD", hardware::vmread(encoding).map(drop), 12)?;
            fails("VMWRITE", hardware::vmwrite(encoding, 0), 12)?;
        }
        // IA32_VMX_MISC bit 29: VMWRITE to any field.
        if hw::msr::rdmsr(0x485) & 1 << 29 == 0 {
            fails("VMWRITE, read-only", hardware::vmwrite(0x4402, 0), 13)?;
        }
        for kind in [0, 3, u64::MAX] {
            fails("INVEPT", hardware::raw_invept(kind, [0, 0]), 28)?;
        }
        fails("INVEPT, bad EPT pointer", hardware::raw_invept(1, [0x7, 0]), 28)?;
        check("INVEPT", outcome_code(hardware::invept(hardware::InvEpt::All)), 0)?;
        fails("INVVPID", hardware::raw_invvpid(4, [1, 0]), 28)?;
        fails("INVVPID, VPID 0", hardware::raw_invvpid(1, [0, 0]), 28)?;
        fails("INVVPID, reserved bits", hardware::raw_invvpid(1, [1 << 16 | 1, 0]), 28)?;
        fails("INVVPID, not canonical", hardware::raw_invvpid(0, [1, 1 << 47]), 28)?;
        check("INVVPID", outcome_code(hardware::invvpid(hardware::InvVpid::Address(1, 1 << 46))), 0)?;
        // A success leaves the error number as it was.
        check("the last number", number(), 28)
    }
}

/// Without a current VMCS there is nothing to hold a number.
pub fn no_current_vmcs() -> Outcome {
    with_current()?;
    // SAFETY: VMX operation; the VMCS is this guest's, which makes it current again at its next run.
    unsafe {
        let mine = hardware::vmptrst();
        hardware::vmclear(mine).expect("VMCLEAR");
        vmx::forget_current();
        check("VMPTRST", hardware::vmptrst(), u64::MAX)?;
        check("VMREAD", outcome_code(hardware::vmread(0x681E).map(drop)), 1)?;
        check("VMWRITE", outcome_code(hardware::vmwrite(0x681E, 0)), 1)?;
        check("VMPTRLD", outcome_code(hardware::vmptrld(BEYOND)), 1)?;
        check("VMCLEAR", outcome_code(hardware::vmclear(mine + 8)), 1)?;
        check("INVEPT", outcome_code(hardware::raw_invept(9, [0, 0])), 1)?;
        check("VMXON", outcome_code(hardware::vmxon(frames::page())), 1)?;
        check("VMLAUNCH", launch(false), 1)?;
        check("VMRESUME", launch(true), 1)?;
        // Cleared, the VMCS can be launched again.
        hardware::vmptrld(mine).expect("VMPTRLD");
        check("VMRESUME of a clear VMCS", launch(true), 2)?;
        check("its number", hardware::read(Field::InstructionError), 5)?;
        hardware::vmclear(mine).expect("VMCLEAR");
    }
    cpu_guest().side().cleared();
    with_current()
}

/// VMLAUNCH or VMRESUME that is to fail: 1 VMfailInvalid, 2 VMfailValid.
fn launch(resume: bool) -> u64 {
    let (carry, zero): (u8, u8);
    // SAFETY: the entry fails; nothing is entered.
    unsafe {
        asm!(
            "test {resume:e}, {resume:e}", "jnz 2f", "vmlaunch", "jmp 3f", "2: vmresume", "3:", "setc {carry}", "setz {zero}",
            resume = in(reg) u32::from(resume), carry = out(reg_byte) carry, zero = out(reg_byte) zero
        );
    }
    u64::from(carry) | u64::from(zero) << 1
}

/// VMLAUNCH of a launched VMCS, VMRESUME of a clear one, either in the shadow of MOV SS.
pub fn launch_state() -> Outcome {
    with_current()?;
    check("VMLAUNCH of a launched VMCS", launch(false), 2)?;
    check("its number", number(), 4)?;
    let zero: u8;
    // SAFETY: SS gets what it has; the entry fails as it is in the shadow of the load.
    unsafe {
        asm!("mov ss, {data:e}", "vmresume", "setz {zero}", data = in(reg) u32::from(rt::cpu::DATA), zero = out(reg_byte) zero);
    }
    check("VMRESUME in the shadow of MOV SS", zero.into(), 1)?;
    check("its number", number(), 26)
}

/// Where the handlers below go on, and what they saw: the vector, or 0.
static RECOVER: AtomicU64 = AtomicU64::new(0);
static FAULT: AtomicU64 = AtomicU64::new(0);

fn on_fault(frame: &mut Frame) {
    FAULT.store(u64::from(frame.vector as u8), Ordering::Relaxed);
    frame.rip = RECOVER.load(Ordering::Relaxed);
}

/// Executes an instruction that is to fault; the vector.
macro_rules! fault_of {
    ($instruction:literal, $operand:expr) => {{
        FAULT.store(0, Ordering::Relaxed);
        // SAFETY: the handlers go on behind the instruction, which faults before it does anything.
        unsafe {
            asm!("lea {scratch}, [rip + 4f]", "mov [{recover}], {scratch}", $instruction, "4:",
                scratch = out(reg) _, recover = in(reg) RECOVER.as_ptr(), operand = in(reg) $operand);
        }
        FAULT.load(Ordering::Relaxed)
    }};
}

/// #PF and #GP of memory operands; #UD outside VMX operation.
pub fn faults() -> Outcome {
    with_current()?;
    for vector in [6, 13, 14] {
        idt::on(vector, on_fault);
    }
    let (unmapped, odd) = (0x7F12_3456_7000u64, 1u64 << 63);
    check("VMPTRLD, #PF", fault_of!("vmptrld [{operand}]", unmapped), 14)?;
    check("VMCLEAR, #PF", fault_of!("vmclear [{operand}]", unmapped), 14)?;
    // In VMX operation VMXON fails without a look at its operand.
    check("VMXON", fault_of!("vmxon [{operand}]", unmapped), 0)?;
    check("VMPTRST, #PF", fault_of!("vmptrst [{operand}]", unmapped), 14)?;
    check("VMPTRLD, #GP", fault_of!("vmptrld [{operand}]", odd), 13)?;
    check("VMPTRST, #GP", fault_of!("vmptrst [{operand}]", odd), 13)?;
    let encoding = u64::from(Field::GuestRip.encoding().0);
    FAULT.store(0, Ordering::Relaxed);
    // SAFETY: as in the macro.
    unsafe {
        asm!("lea {scratch}, [rip + 4f]", "mov [{recover}], {scratch}", "vmread [{operand}], {encoding}", "4:",
            scratch = out(reg) _, recover = in(reg) RECOVER.as_ptr(), operand = in(reg) unmapped, encoding = in(reg) encoding);
    }
    check("VMREAD to memory, #PF", FAULT.load(Ordering::Relaxed), 14)?;
    // SAFETY: the VMCS of this guest is cleared first; VMX operation begins again below.
    unsafe {
        hardware::vmclear(hardware::vmptrst()).expect("VMCLEAR");
        vmx::forget_current();
        hardware::vmxoff().expect("VMXOFF");
    }
    let outside = [
        ("VMPTRLD", fault_of!("vmptrld [{operand}]", unmapped)),
        ("VMREAD", fault_of!("vmread {operand}, {operand}", encoding)),
        ("VMXOFF", fault_of!("vmxoff /* {operand} */", 0u64)),
        ("VMLAUNCH", fault_of!("vmlaunch /* {operand} */", 0u64)),
    ];
    let began = vmx::enable();
    for vector in [6, 13, 14] {
        idt::off(vector);
    }
    cpu_guest().side().cleared();
    for (what, seen) in outside {
        check(what, seen, 6)?;
    }
    check("VMX operation began again", u64::from(began), 1)?;
    with_current()
}
