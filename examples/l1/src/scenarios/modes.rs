//! L2 in each mode of the architecture: real, protected without paging, 32-bit paging, PAE, long; and an L2 on every
//! processor at once.

use super::Outcome;
use crate::guest::Guest;
use crate::npt::{ALL, LARGE, Table};
use crate::vmcb::{Segment, exit};
use crate::{check, cpu_guest, frames, smp};
use core::arch::naked_asm;
use core::sync::atomic::{AtomicU64, Ordering};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const EFER_SVME: u64 = 1 << 12;

/// `mov ax, 0x1234; mov si, ax; cpuid; mov ax, [0x100]; hlt` for 16-bit code.
const CODE_16: &[u8] = &[0xB8, 0x34, 0x12, 0x89, 0xC6, 0x0F, 0xA2, 0xA1, 0x00, 0x01, 0xF4];

/// `mov eax, 0x12345678; mov esi, eax; cpuid; mov eax, [0x70000100]; hlt` for 32-bit code.
const CODE_32: &[u8] = &[0xB8, 0x78, 0x56, 0x34, 0x12, 0x89, 0xC6, 0x0F, 0xA2, 0xA1, 0x00, 0x01, 0x00, 0x70, 0xF4];

/// Where 32-bit guests find their page.
const DATA: u64 = 0x7000_0000;

fn page_with(bytes: &[u8], offset: u64, value: u32) -> u64 {
    let page = frames::page();
    // SAFETY: the page is this scenario's, mapped one to one; code and value lie within it.
    unsafe {
        core::ptr::copy_nonoverlapping(bytes.as_ptr(), page as *mut u8, bytes.len());
        *((page + offset) as *mut u32) = value;
    }
    page
}

/// Runs the guest past its CPUID to its HLT and checks what it computed and read.
fn finish(guest: &mut Guest, computed: u64, read: u64) -> Outcome {
    guest.expect(exit::CPUID)?;
    check("what L2 computed", guest.gprs.rsi, computed)?;
    guest.skip(2);
    guest.expect(exit::HLT)?;
    check("what L2 read", guest.gprs.rax & 0xFFFF_FFFF, read)
}

/// A guest without long mode: flat segments, no paging yet.
fn legacy(nested: Option<Table>) -> &'static mut Guest {
    let guest = cpu_guest();
    guest.long_mode(program_count, 0);
    guest.vmcb.set_efer(EFER_SVME);
    guest.vmcb.set_cr0(CR0_ET | CR0_PE);
    guest.vmcb.set_cr4(0);
    guest.vmcb.set_cr3(0);
    guest.vmcb.set_segment(Segment::Cs, 0x08, 0xC9B, u32::MAX, 0);
    if let Some(table) = nested {
        guest.vmcb.set_np_enable(1);
        guest.vmcb.set_n_cr3(table.root());
        guest.vmcb.set_tlb_control(1);
    }
    guest
}

pub fn real_mode() -> Outcome {
    for nested in [None, Some(Table::identity(4))] {
        let page = page_with(CODE_16, 0x100, 0x5AA5);
        let guest = legacy(nested);
        guest.vmcb.set_cr0(CR0_ET);
        for segment in [Segment::Es, Segment::Ss, Segment::Ds] {
            guest.vmcb.set_segment(segment, (page >> 4) as u16, 0x093, 0xFFFF, page);
        }
        guest.vmcb.set_segment(Segment::Cs, (page >> 4) as u16, 0x09B, 0xFFFF, page);
        guest.vmcb.set_rip(0);
        guest.vmcb.set_rsp(0x800);
        finish(guest, 0x1234, 0x5AA5)?;
    }
    Ok(())
}

pub fn protected_mode() -> Outcome {
    let code = page_with(CODE_32, 0x800, 0);
    let data = page_with(&[], 0x100, 0xCAFE_0001);
    let nested = Table::identity(4);
    nested.map(DATA, data, ALL);
    let guest = legacy(Some(nested));
    guest.vmcb.set_rip(code);
    finish(guest, 0x1234_5678, 0xCAFE_0001)
}

pub fn paging_32() -> Outcome {
    for nested in [None, Some(Table::identity(4))] {
        let code = page_with(CODE_32, 0x800, 0);
        let data = page_with(&[], 0x100, 0xCAFE_0002);
        let (directory, table) = (frames::page(), frames::page());
        for n in 0..1024u64 {
            // SAFETY: the directory is this scenario's page of 1,024 entries.
            unsafe { *((directory + 4 * n) as *mut u32) = (n << 22 | LARGE | ALL) as u32 };
        }
        // SAFETY: as above; one entry of the directory leads to the table, one entry of it to the data.
        unsafe {
            *((directory + 4 * (DATA >> 22)) as *mut u32) = (table | ALL) as u32;
            *((table + 4 * (DATA >> 12 & 0x3FF)) as *mut u32) = (data | ALL) as u32;
        }
        let guest = legacy(nested);
        guest.vmcb.set_cr0(CR0_ET | CR0_PE | CR0_PG);
        guest.vmcb.set_cr4(CR4_PSE);
        guest.vmcb.set_cr3(directory);
        guest.vmcb.set_rip(code);
        finish(guest, 0x1234_5678, 0xCAFE_0002)?;
    }
    Ok(())
}

pub fn pae() -> Outcome {
    for nested in [None, Some(Table::identity(4))] {
        let code = page_with(CODE_32, 0x800, 0);
        let data = page_with(&[], 0x100, 0xCAFE_0003);
        // The lower three levels of a long-mode table are PAE's; its own top is four entries without permission bits.
        let long = Table::identity(4);
        long.map(DATA, data, ALL);
        let top = frames::page();
        for n in 0..4u64 {
            // SAFETY: the page is this scenario's.
            unsafe { *((top + 8 * n) as *mut u64) = *long.entry(n << 30, 2) & !0xFFF | 1 };
        }
        let guest = legacy(nested);
        guest.vmcb.set_cr0(CR0_ET | CR0_PE | CR0_PG);
        guest.vmcb.set_cr4(CR4_PAE);
        guest.vmcb.set_cr3(top);
        guest.vmcb.set_rip(code);
        finish(guest, 0x1234_5678, 0xCAFE_0003)?;
    }
    Ok(())
}

/// CPUIDs that each processor's L2 executes.
const TURNS: u64 = 2000;

#[unsafe(naked)]
unsafe extern "C" fn program_count() {
    naked_asm!("mov r9, {turns}", "2:", "cpuid", "add r12, rax", "dec r9", "jnz 2b", "hlt", turns = const TURNS)
}

/// What each processor's guest added up, or the failing exit code.
static SUMS: [AtomicU64; rt::cpu::MAX_CPUS] = [const { AtomicU64::new(0) }; rt::cpu::MAX_CPUS];

fn count_on(processor: usize) {
    let guest = cpu_guest();
    guest.long_mode(program_count, 0);
    let nested = Table::identity(4);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(nested.root());
    guest.vmcb.set_tlb_control(1);
    loop {
        let seen = guest.run();
        guest.vmcb.set_tlb_control(0);
        match seen.code {
            exit::CPUID => {
                guest.gprs.rax = processor as u64 + 1;
                guest.skip(2);
            }
            exit::HLT => break,
            code => {
                SUMS[processor].store(code << 32, Ordering::Relaxed);
                return;
            }
        }
    }
    SUMS[processor].store(guest.gprs.r12, Ordering::Relaxed);
}

/// An L2 on every processor at the same time.
pub fn every_processor() -> Outcome {
    for processor in 1..smp::count() {
        smp::spawn(processor, count_on, processor);
    }
    count_on(0);
    for processor in 1..smp::count() {
        smp::join(processor);
    }
    for (processor, sum) in SUMS.iter().enumerate().take(smp::count()) {
        check("what L2 added up", sum.load(Ordering::Relaxed), (processor as u64 + 1) * TURNS)?;
    }
    Ok(())
}
