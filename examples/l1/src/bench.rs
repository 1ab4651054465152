//! Measurements: instructions between two RDTSCs in the guest, where one tick of the time stamp counter is one
//! instruction (QEMU's `-icount shift=0`). `cargo xtask bench --nested svm` reads the lines that this prints.

use crate::guest::Guest;
use crate::vmcb::{exit, misc1};
use crate::{Failure, check, cpu_guest, frames};
use core::arch::{asm, naked_asm};
use hw::cpu::rdtsc;

/// Samples of each measurement.
const SAMPLES: usize = 1000;

type Samples = [u64; SAMPLES];

/// Runs all measurements.
pub fn run() -> Result<(), Failure> {
    let samples = buffer();
    l1_instruction(samples, || {
        core::hint::black_box(hw::cpu::cpuid(0x8000_0000, 0));
    });
    report("nested.svm.l1_cpuid", samples);
    let page = frames::page();
    // SAFETY: the page is this measurement's, and VMLOAD brings back what VMSAVE put there.
    unsafe { hw::svm::vmsave(page) };
    // SAFETY: as above.
    l1_instruction(samples, || unsafe { hw::svm::vmload(page) });
    report("nested.svm.l1_vmload", samples);
    round_trips(samples, serve)?;
    report("nested.svm.l2_cpuid_roundtrip", samples);
    round_trips(samples, serve_with_gif)?;
    report("nested.svm.l2_cpuid_roundtrip_gif", samples);
    Ok(())
}

fn buffer() -> &'static mut Samples {
    let pages = size_of::<Samples>().div_ceil(4096) as u64;
    let Some(memory) = rt::frames::allocate(pages * 4096, 4096) else { panic!("no page frame is left") };
    // SAFETY: the memory is this caller's, zeroed, aligned and never given back.
    unsafe { &mut *memory.cast() }
}

fn l1_instruction(samples: &mut Samples, mut instruction: impl FnMut()) {
    for sample in samples {
        let start = rdtsc();
        instruction();
        *sample = rdtsc() - start;
    }
}

/// Stores the ticks of `SAMPLES` CPUIDs at RDI.
#[unsafe(naked)]
unsafe extern "C" fn program_samples() {
    naked_asm!(
        "mov r9, {samples}",
        "2:",
        "rdtsc",
        "mov r8, rax",
        "xor eax, eax",
        "cpuid",
        "rdtsc",
        "sub rax, r8",
        "mov eax, eax",
        "mov [rdi], rax",
        "add rdi, 8",
        "dec r9",
        "jnz 2b",
        "hlt",
        samples = const SAMPLES,
    )
}

fn round_trips(samples: &mut Samples, serve: unsafe fn(&mut Guest)) -> Result<(), Failure> {
    let guest = cpu_guest();
    guest.long_mode(program_samples, samples.as_mut_ptr() as u64);
    let map = crate::npt::Table::identity(4);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(map.root());
    guest.vmcb.set_tlb_control(1);
    guest.vmcb.set_misc1(misc1::CPUID | misc1::HLT | misc1::SHUTDOWN);
    // SAFETY: EFER.SVME is set; the guest is this processor's and runs this image's code.
    unsafe {
        hw::svm::clgi();
        serve(guest);
        hw::svm::stgi();
    }
    check("the exit that ended the loop", guest.vmcb.exit_code(), exit::HLT)
}

/// The least that a hypervisor does: skips each CPUID of the guest; ends at another exit.
///
/// # Safety
/// GIF is clear, EFER.SVME set, the guest is this processor's.
unsafe fn serve(guest: &mut Guest) {
    // SAFETY: the guest's general-purpose registers are given up as clobbers, but RBX, which is kept by hand.
    unsafe {
        asm!(
            "push rbx",
            "2:",
            "vmrun rax",
            "mov byte ptr [rax + 0x5c], 0",
            "add qword ptr [rax + 0x578], 2",
            "cmp qword ptr [rax + 0x70], {cpuid}",
            "je 2b",
            "pop rbx",
            cpuid = const exit::CPUID,
            inout("rax") (&raw mut guest.vmcb) as u64 => _,
            inout("rdi") guest.gprs.rdi => _,
            out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _,
        );
    }
}

/// As [`serve`], with a GIF window after each exit.
///
/// # Safety
/// As [`serve`].
unsafe fn serve_with_gif(guest: &mut Guest) {
    // SAFETY: as above; nothing is pending that the image could not take.
    unsafe {
        asm!(
            "push rbx",
            "2:",
            "vmrun rax",
            "stgi",
            "mov byte ptr [rax + 0x5c], 0",
            "add qword ptr [rax + 0x578], 2",
            "clgi",
            "cmp qword ptr [rax + 0x70], {cpuid}",
            "je 2b",
            "pop rbx",
            cpuid = const exit::CPUID,
            inout("rax") (&raw mut guest.vmcb) as u64 => _,
            inout("rdi") guest.gprs.rdi => _,
            out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _,
        );
    }
}

/// Prints `BENCH name minimum mode`.
fn report(name: &str, samples: &mut Samples) {
    samples.sort_unstable();
    let (mut mode, mut most) = (samples[0], 0);
    for run in samples.chunk_by(|a, b| a == b) {
        if run.len() > most {
            (mode, most) = (run[0], run.len());
        }
    }
    rt::println!("BENCH {name} {} {mode}", samples[0]);
}
