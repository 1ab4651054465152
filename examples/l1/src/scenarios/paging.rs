//! Nested paging: faults of each kind, what they report, and several tables on one processor.

use super::Outcome;
use crate::npt::{ALL, LARGE, NO_EXECUTE, PRESENT, Table, USER, WRITE};
use crate::vmcb::exit;
use crate::{check, cpu_guest, frames};
use core::arch::naked_asm;

/// A GPA that no scenario maps otherwise; far above the image, below 4 GiB's devices.
const TEST_GPA: u64 = 0x7000_0000;

/// Error code bits of EXITINFO1.
const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const RSVD: u64 = 8;
const ID: u64 = 16;
const FINAL: u64 = 1 << 32;
const WALK: u64 = 1 << 33;

#[unsafe(naked)]
unsafe extern "C" fn program_read() {
    naked_asm!("mov rax, [rdi]", "mov r8, rax", "hlt")
}

#[unsafe(naked)]
unsafe extern "C" fn program_write() {
    naked_asm!("mov rax, 0x1122", "mov [rdi], rax", "mov r8, [rdi]", "hlt")
}

#[unsafe(naked)]
unsafe extern "C" fn program_jump() {
    naked_asm!("call rdi", "hlt")
}

/// A fresh identity table and the guest that runs under it.
macro_rules! nested {
    ($program:expr, $argument:expr) => {{
        let table = Table::identity(4);
        let guest = cpu_guest();
        guest.long_mode($program, $argument);
        guest.vmcb.set_np_enable(1);
        guest.vmcb.set_n_cr3(table.root());
        guest.vmcb.set_tlb_control(1);
        (table, guest)
    }};
}

/// Not present, then mapped: the fault says so, and the read sees the page.
pub fn npf_read() -> Outcome {
    let (table, guest) = nested!(program_read, TEST_GPA + 0x128);
    table.map(TEST_GPA, 0, 0);
    let fault = guest.expect(exit::NPF)?;
    check("EXITINFO1", fault.info1, FINAL | U)?;
    check("EXITINFO2", fault.info2, TEST_GPA + 0x128)?;
    let target = frames::page();
    // SAFETY: the frame is this scenario's, mapped one to one.
    unsafe { *((target + 0x128) as *mut u64) = 0xFEED };
    table.map(TEST_GPA, target, ALL);
    guest.expect(exit::HLT)?;
    check("what L2 read", guest.gprs.r8, 0xFEED)
}

/// Read-only: a read passes, a write faults with P and W.
pub fn npf_write() -> Outcome {
    let (table, guest) = nested!(program_write, TEST_GPA + 8);
    let target = frames::page();
    table.map(TEST_GPA, target, PRESENT | USER);
    let fault = guest.expect(exit::NPF)?;
    check("EXITINFO1", fault.info1, FINAL | U | W | P)?;
    check("EXITINFO2", fault.info2, TEST_GPA + 8)?;
    table.map(TEST_GPA, target, ALL);
    guest.vmcb.set_tlb_control(1);
    guest.expect(exit::HLT)?;
    check("what L2 wrote and read", guest.gprs.r8, 0x1122)?;
    // SAFETY: as above.
    check("what is in memory", unsafe { *((target + 8) as *const u64) }, 0x1122)
}

/// No execute: a fetch faults with P and ID.
pub fn npf_execute() -> Outcome {
    let (table, guest) = nested!(program_jump, TEST_GPA);
    let target = frames::page();
    // SAFETY: as above. 0xC3 is RET.
    unsafe { *(target as *mut u8) = 0xC3 };
    table.map(TEST_GPA, target, ALL | NO_EXECUTE);
    let fault = guest.expect(exit::NPF)?;
    check("EXITINFO1", fault.info1, FINAL | U | ID | P)?;
    table.map(TEST_GPA, target, ALL);
    guest.vmcb.set_tlb_control(1);
    guest.expect(exit::HLT).map(drop)
}

/// Supervisor page: every nested access is a user access.
pub fn npf_supervisor() -> Outcome {
    let (table, guest) = nested!(program_read, TEST_GPA);
    table.map(TEST_GPA, frames::page(), PRESENT | WRITE);
    let fault = guest.expect(exit::NPF)?;
    check("EXITINFO1", fault.info1, FINAL | U | P)
}

/// A reserved bit in a nested entry.
pub fn npf_reserved() -> Outcome {
    let (table, guest) = nested!(program_read, TEST_GPA);
    table.map(TEST_GPA, 0, 0);
    *table.entry(TEST_GPA, 1) |= LARGE | ALL | 1 << 13;
    let fault = guest.expect(exit::NPF)?;
    // TCG leaves out P on reserved-bit faults, so a control on it differs there and nowhere else.
    check("EXITINFO1 but P", fault.info1 & !P, FINAL | U | RSVD)
}

/// The guest's own page tables lie in a page that the nested table does not map.
pub fn npf_walk() -> Outcome {
    let (table, guest) = nested!(program_read, TEST_GPA);
    let guest_root = frames::page();
    // SAFETY: both are page tables, mapped one to one; the copy is this scenario's.
    unsafe { *(guest_root as *mut [u64; 512]) = *((guest.vmcb.cr3() & !0xFFF) as *const [u64; 512]) };
    guest.vmcb.set_cr3(guest_root);
    table.map(guest_root, 0, 0);
    let fault = guest.expect(exit::NPF)?;
    check("EXITINFO1 but W", fault.info1 & !W, WALK | U)?;
    check("page of EXITINFO2", fault.info2 & !0xFFF, guest_root)?;
    table.map(guest_root, guest_root, ALL);
    table.map(TEST_GPA, frames::page(), ALL);
    guest.expect(exit::HLT).map(drop)
}

/// Accessed and dirty bits of the nested table, as the guest's accesses set them.
pub fn npt_accessed_dirty() -> Outcome {
    let (table, guest) = nested!(program_read, TEST_GPA);
    let target = frames::page();
    table.map(TEST_GPA, target, ALL);
    guest.expect(exit::HLT)?;
    check("A and D after a read", *table.entry(TEST_GPA, 0) >> 5 & 3, 1)?;
    let (table, guest) = nested!(program_write, TEST_GPA);
    table.map(TEST_GPA, target, ALL);
    guest.expect(exit::HLT)?;
    check("A and D after a write", *table.entry(TEST_GPA, 0) >> 5 & 3, 3)
}

/// Two guests with ASIDs and tables of their own take turns on one processor; each sees its own page.
pub fn asids() -> Outcome {
    let tables = [Table::identity(4), Table::identity(4)];
    let pages = [frames::page(), frames::page()];
    for round in 0..20u64 {
        for side in 0..2 {
            let guest = cpu_guest();
            guest.long_mode(program_read, TEST_GPA);
            guest.vmcb.set_np_enable(1);
            guest.vmcb.set_n_cr3(tables[side].root());
            guest.vmcb.set_asid(side as u32 + 1);
            guest.vmcb.set_tlb_control(u8::from(round == 0));
            tables[side].map(TEST_GPA, pages[side], ALL);
            let value = round * 2 + side as u64;
            // SAFETY: the frames are this scenario's, mapped one to one.
            unsafe { (pages[side] as *mut u64).write_volatile(value) };
            guest.expect(exit::HLT)?;
            check("what L2 read in its own space", guest.gprs.r8, value)?;
        }
    }
    Ok(())
}

/// The same ASID with another table: after TLB_CONTROL the new table counts.
pub fn asid_reuse() -> Outcome {
    let tables = [Table::identity(4), Table::identity(4)];
    let pages = [frames::page(), frames::page()];
    for (n, table) in tables.iter().enumerate() {
        table.map(TEST_GPA, pages[n], ALL);
        // SAFETY: the frames are this scenario's, mapped one to one.
        unsafe { (pages[n] as *mut u64).write_volatile(n as u64 + 100) };
    }
    for round in 0..10 {
        let side = round & 1;
        let guest = cpu_guest();
        guest.long_mode(program_read, TEST_GPA);
        guest.vmcb.set_np_enable(1);
        guest.vmcb.set_n_cr3(tables[side].root());
        guest.vmcb.set_tlb_control(1);
        guest.expect(exit::HLT)?;
        check("what L2 read", guest.gprs.r8, side as u64 + 100)?;
    }
    Ok(())
}
