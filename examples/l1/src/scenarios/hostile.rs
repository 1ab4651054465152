//! Hostile VMCBs: half of them random, half a good VMCB with a few fields changed. Whatever they do to L2, this
//! hypervisor goes on as before.
//!
//! On the emulator a guest that got out would take the run with it, so what confines it is put back after the damage:
//! a nested table that maps a handful of pages, the permission maps, exits on interrupts, I/O, MSRs and shutdown, and a
//! timer that ends what does not end by itself.

use super::Outcome;
use crate::guest::Guest;
use crate::npt::{ALL, Table};
use crate::vmcb::{Vmcb, exit, misc1, misc2};
use crate::{bitmaps, check, cpu_guest, frames};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// VMCBs tried unless the command line says `hostile=N`.
const TRIES: u64 = 4000;
const SEED: u64 = 0x9E37_79B9_7F4A_7C15;
const TIMER_VECTOR: u8 = 0x52;
/// APIC timer ticks that a guest gets.
const PATIENCE: u32 = 200_000;

static WANTED: AtomicU64 = AtomicU64::new(TRIES);

/// Sets the number of VMCBs to try.
pub fn set_tries(tries: u64) {
    WANTED.store(tries, Ordering::Relaxed);
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A number of the kind that finds mistakes: small, a bit, an edge, or anything.
    fn interesting(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(256),
            1 => 1 << self.below(64),
            2 => !(1 << self.below(64)),
            3 => [0, u64::MAX, 1 << 63, 0xFFFF_FFFF, 0x8000_0000_0000, 0xFFF][self.below(6) as usize],
            _ => self.next(),
        }
    }
}

/// A world of a few pages: code, stack, and page tables that map them where they are.
struct Cell {
    nested: u64,
    guest_root: u64,
    code: u64,
    stack: u64,
}

impl Cell {
    fn new() -> Self {
        let (code, stack) = (frames::page(), frames::page());
        // cpuid; mov rax, [rsp]; hlt; jmp back
        const CODE: [u8; 9] = [0x0F, 0xA2, 0x48, 0x8B, 0x04, 0x24, 0xF4, 0xEB, 0xF7];
        // SAFETY: the page is this cell's.
        unsafe { core::ptr::copy_nonoverlapping(CODE.as_ptr(), code as *mut u8, CODE.len()) };
        let (guest, nested) = (Table::identity(0), Table::identity(0));
        for page in [code, stack] {
            guest.map(page, page, ALL);
            nested.map(page, page, ALL);
        }
        let mut at = guest.root();
        for level in (0..4).rev() {
            nested.map(at, at, ALL);
            if level > 0 {
                at = *guest.entry(code, level) & 0x000F_FFFF_FFFF_F000;
            }
        }
        Self { nested: nested.root(), guest_root: guest.root(), code, stack }
    }

    /// A VMCB that runs the cell's code.
    fn good(&self, guest: &mut Guest) {
        guest.long_mode(super::exits::nothing, 0);
        guest.vmcb.set_cr3(self.guest_root);
        guest.vmcb.set_rip(self.code);
        guest.vmcb.set_rsp(self.stack + 0x800);
    }

    /// Puts back what keeps the guest in.
    fn confine(&self, vmcb: &mut Vmcb) {
        vmcb.set_misc1(vmcb.misc1() | misc1::INTR | misc1::SHUTDOWN | misc1::IOIO_PROT | misc1::MSR_PROT);
        vmcb.set_misc2(vmcb.misc2() | misc2::VMRUN | misc2::VMLOAD | misc2::VMSAVE | misc2::STGI | misc2::CLGI);
        vmcb.set_iopm_base(bitmaps::iopm().address());
        vmcb.set_msrpm_base(bitmaps::msrpm().address());
        vmcb.set_int_ctl(vmcb.int_ctl() | 1 << 24);
        vmcb.set_np_enable(1);
        vmcb.set_n_cr3(self.nested);
        vmcb.set_tlb_control(1);
        vmcb.set_hv_control(0);
        vmcb.set_clean(0);
    }
}

fn local_apic(register: u64, value: u32) {
    // SAFETY: the local APIC's page is mapped one to one; these are timer registers.
    unsafe { ((0xFEE0_0000 + register) as *mut u32).write_volatile(value) };
}

/// Ends the guest after a while.
fn arm_timer() {
    local_apic(0x3E0, 0b1011);
    local_apic(0x320, u32::from(TIMER_VECTOR));
    local_apic(0x380, PATIENCE);
}

fn disarm_timer() {
    local_apic(0x380, 0);
    local_apic(0x320, 1 << 16);
}

/// What of this hypervisor's own state must be as it was.
#[derive(PartialEq, Eq)]
struct Own {
    control: [u64; 3],
    efer: u64,
    tables: [(u64, u16); 2],
}

impl Own {
    fn now() -> Self {
        Self {
            control: [hw::cpu::cr0(), hw::cpu::cr3(), hw::cpu::cr4()],
            // SAFETY: every processor with SVM has EFER.
            efer: unsafe { hw::msr::rdmsr(hw::msr::EFER) },
            tables: [hw::cpu::sgdt(), hw::cpu::sidt()],
        }
    }
}

fn run(guest: &mut Guest) -> u64 {
    arm_timer();
    // SAFETY: GIF is clear until IF is clear again; the timer's vector has a handler.
    unsafe {
        hw::svm::clgi();
        asm!("sti", "nop");
        let code = guest.run_closed().code;
        asm!("cli");
        hw::svm::stgi();
        disarm_timer();
        asm!("sti", "nop", "nop", "cli");
        code
    }
}

pub fn vmcbs() -> Outcome {
    rt::idt::on(TIMER_VECTOR, |_| rt::apic::end_of_interrupt());
    let tries = WANTED.load(Ordering::Relaxed);
    let mut random = Random(SEED);
    let cell = Cell::new();
    let own = Own::now();
    bitmaps::msrpm().fill();
    bitmaps::iopm().fill();
    let guest = cpu_guest();
    let (mut entered, mut refused, mut shutdown) = (0u64, 0u64, 0u64);
    for n in 0..tries {
        cell.good(guest);
        let bytes = guest.vmcb.bytes_mut();
        if n % 2 == 0 {
            for chunk in bytes.chunks_exact_mut(8) {
                chunk.copy_from_slice(&random.next().to_le_bytes());
            }
        } else {
            for _ in 0..random.below(8) + 1 {
                // The control area up to 0xD0, or the save area up to its G_PAT.
                let slot = random.below(26 + 78);
                let at = if slot < 26 { slot * 8 } else { 0x400 + (slot - 26) * 8 } as usize;
                bytes[at..at + 8].copy_from_slice(&random.interesting().to_le_bytes());
            }
        }
        cell.confine(&mut guest.vmcb);
        match run(guest) {
            exit::INVALID | 0xFFFF_FFFF => refused += 1,
            exit::SHUTDOWN => {
                entered += 1;
                shutdown += 1;
            }
            _ => entered += 1,
        }
        check("this hypervisor's own state is as it was", u64::from(Own::now() == own), 1)?;
    }
    rt::println!("COUNT tried={tries} entered={entered} refused={refused} shutdown={shutdown}");
    check("enough entered", u64::from(entered * 10 >= tries * 3), 1)?;
    check("some were refused", u64::from(refused > 0), 1)?;
    // The control: the same guest without damage still runs.
    cell.good(guest);
    cell.confine(&mut guest.vmcb);
    let mut code = run(guest);
    for _ in 0..100 {
        // On a slow machine the timer may come first.
        if code == exit::INTR {
            code = run(guest);
        }
    }
    check("the undamaged VMCB runs to its CPUID", code, exit::CPUID)
}
