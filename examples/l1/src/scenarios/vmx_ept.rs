//! EPT: violations of each kind with their qualification, misconfigurations, large pages, accessed and dirty flags,
//! INVEPT.

use super::Outcome;
use crate::guest::Guest;
use crate::npt::{ALL, LARGE, Table};
use crate::vmcb::exit;
use crate::vmx::OTHER;
use crate::{Failure, check, cpu_guest, frames};
use core::arch::naked_asm;
use hw::vmx as hardware;
use nvmx::exit_reason;
use nvmx::field::Field;

/// L2's address that the scenarios map in their own ways.
const GPA: u64 = 0x6000_0000;
const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;
/// Memory type write-back, in a leaf.
const WB: u64 = 6 << 3;
const EXECUTE_ONLY: u64 = 1;
const PAGES_1G: u64 = 1 << 17;
const ACCESSED_DIRTY: u64 = 1 << 21;

#[unsafe(naked)]
unsafe extern "C" fn program_read() {
    naked_asm!("mov r8, [rdi]", "hlt")
}

#[unsafe(naked)]
unsafe extern "C" fn program_write() {
    naked_asm!("mov qword ptr [rdi], 0x1122", "mov r8, [rdi]", "hlt")
}

#[unsafe(naked)]
unsafe extern "C" fn program_call() {
    naked_asm!("call rdi", "mov r8, 1", "hlt")
}

fn has(capability: u64) -> bool {
    // SAFETY: a processor with EPT has the MSR.
    unsafe { hw::msr::rdmsr(0x48C) & capability == capability }
}

fn with(table: Table, program: unsafe extern "C" fn(), address: u64) -> &'static mut Guest {
    let guest = cpu_guest();
    guest.long_mode(program, address);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(table.root());
    guest.vmcb.set_tlb_control(1);
    guest
}

/// A page with RET at its beginning.
fn page() -> u64 {
    let page = frames::page();
    // SAFETY: the frame is this scenario's, mapped one to one.
    unsafe { (page as *mut u64).write_volatile(0xC3) };
    page
}

/// Each access that the rights of a page do not allow.
pub fn violations() -> Outcome {
    type Program = unsafe extern "C" fn();
    let cases: [(u64, Program, u64); 9] = [
        (0, program_read, READ),
        (0, program_write, WRITE),
        (0, program_call, EXECUTE),
        (READ, program_write, WRITE),
        (READ | EXECUTE, program_write, WRITE),
        (READ, program_call, EXECUTE),
        (READ | WRITE, program_call, EXECUTE),
        (EXECUTE, program_read, READ),
        (EXECUTE, program_write, WRITE),
    ];
    for (rights, program, access) in cases {
        if rights == EXECUTE && !has(EXECUTE_ONLY) {
            continue;
        }
        let (table, target) = (Table::identity(4), page());
        *table.entry(GPA, 0) = if rights == 0 { 0 } else { target | rights | WB };
        let guest = with(table, program, GPA + 0x10 * u64::from(access != EXECUTE));
        let address = guest.gprs.rdi;
        guest.expect(exit::NPF)?;
        let side = guest.side();
        // Bit 7: the linear address is valid; bit 8: it is that of the access.
        let qualification = side.field(Field::ExitQualification) & 0x1FF;
        check("exit qualification", qualification, access | rights << 3 | 0x180)?;
        check("guest-physical address", side.field(Field::GuestPhysicalAddress), address)?;
        check("guest-linear address", side.field(Field::GuestLinearAddress), address)?;
        *table.entry(GPA, 0) = target | ALL | WB;
        guest.vmcb.set_tlb_control(1);
        guest.expect(exit::HLT)?;
    }
    Ok(())
}

/// Entries that no processor accepts.
pub fn misconfigurations() -> Outcome {
    for entry in [WRITE | WB, WRITE | EXECUTE | WB, ALL | 2 << 3, ALL | 3 << 3, ALL | 7 << 3, ALL | WB | 1 << 51] {
        let (table, target) = (Table::identity(4), page());
        *table.entry(GPA, 0) = target | entry;
        let guest = with(table, program_read, GPA);
        let seen = guest.run();
        check("exit", seen.code, OTHER | u64::from(exit_reason::EPT_MISCONFIGURATION))?;
        check("guest-physical address", guest.side().field(Field::GuestPhysicalAddress), GPA)?;
        *table.entry(GPA, 0) = target | ALL | WB;
        guest.vmcb.set_tlb_control(1);
        guest.expect(exit::HLT)?;
    }
    Ok(())
}

/// 2 MiB and 1 GiB pages that lead elsewhere.
pub fn large_pages() -> Outcome {
    let target = frames::page();
    // SAFETY: the frame is this scenario's, mapped one to one.
    unsafe { (target as *mut u64).write_volatile(0xB16) };
    let table = Table::identity(4);
    *table.entry(GPA, 1) = target & !0x1F_FFFF | LARGE | ALL | WB;
    let guest = with(table, program_read, GPA | target & 0x1F_FFFF);
    guest.expect(exit::HLT)?;
    check("what L2 read in a 2 MiB page", guest.gprs.r8, 0xB16)?;
    if !has(PAGES_1G) {
        return Ok(());
    }
    let table = Table::identity(4);
    // The second GiB leads to the first.
    *table.entry(1 << 30, 2) = LARGE | ALL | WB;
    let guest = with(table, program_read, 1 << 30 | target);
    guest.expect(exit::HLT)?;
    check("what L2 read in a 1 GiB page", guest.gprs.r8, 0xB16)
}

/// With bit 6 of the EPT pointer accesses set bits 8 and 9 of the leaf.
pub fn accessed_dirty() -> Outcome {
    if !has(ACCESSED_DIRTY) {
        return Err(Failure::Missing("accessed and dirty flags"));
    }
    for (program, flags) in [(program_read as unsafe extern "C" fn(), 1), (program_write, 3)] {
        let (table, target) = (Table::identity(4), page());
        *table.entry(GPA, 0) = target | ALL | WB;
        let guest = with(table, program, GPA);
        let seen = guest.run_changed(|fields| {
            let pointer = fields.read(Field::EptPointer) | 1 << 6;
            fields.write(Field::EptPointer, pointer);
        });
        check("exit", seen.code, exit::HLT)?;
        check("accessed and dirty", *table.entry(GPA, 0) >> 8 & 3, flags)?;
    }
    Ok(())
}

/// A mapping that changed counts after INVEPT, of one context or of all.
pub fn invept() -> Outcome {
    let (table, pages) = (Table::identity(4), [frames::page(), frames::page()]);
    for (n, page) in pages.iter().enumerate() {
        // SAFETY: the frames are this scenario's, mapped one to one.
        unsafe { (*page as *mut u64).write_volatile(n as u64 + 70) };
    }
    for round in 0..8usize {
        *table.entry(GPA, 0) = pages[round & 1] | ALL | WB;
        let guest = with(table, program_read, GPA);
        guest.vmcb.set_tlb_control(0);
        let what = match round & 2 {
            0 => hardware::InvEpt::Single(table.root() | 3 << 3 | 6),
            _ => hardware::InvEpt::All,
        };
        // SAFETY: VMX operation.
        unsafe { hardware::invept(what) }.map_err(|_| Failure::Missing("INVEPT"))?;
        guest.expect(exit::HLT)?;
        check("what L2 read", guest.gprs.r8, (round as u64 & 1) + 70)?;
    }
    Ok(())
}
