//! Measurements: instructions between two RDTSCs in the guest, where one tick of the time stamp counter is one
//! instruction (QEMU's `-icount shift=0`). `cargo xtask bench --nested svm` reads the lines that this prints.

mod remote;

use crate::guest::Guest;
use crate::vmcb::{exit, misc1};
use crate::{Failure, check, cpu_guest, frames, hyperv, smp};
use core::arch::{asm, naked_asm};
use core::fmt::Display;
use hw::cpu::rdtsc;
use tlfs_abi::flush::FlushFlags;
use tlfs_abi::hypercall::{CallCode, HypercallInput};

/// Samples of each measurement.
const SAMPLES: usize = 1000;

type Samples = [u64; SAMPLES];

/// Runs all measurements.
pub fn run() -> Result<(), Failure> {
    let samples = buffer();
    if smp::count() > 1 {
        return remote::run(samples);
    }
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
    match hyperv::needs_direct_flush() {
        Ok(()) => {
            remote::run(samples)?;
            flushes(samples)
        }
        Err(_) => Ok(()),
    }
}

/// Flushes of the whole space on all processors, of which there is one: by L2 directly, by L2 through this hypervisor,
/// by L2 with the synthetic exit, by this hypervisor itself.
fn flushes(samples: &mut Samples) -> Result<(), Failure> {
    let assist = hyperv::partition_assist();
    let lock = |count: u32| {
        // SAFETY: the page is this measurement's.
        unsafe { (assist as *mut u32).write_volatile(count) };
    };
    flush_samples(samples, assist, true, exit::HLT)?;
    // Without targets there is nobody who could run or not.
    report("flush.svm.direct.running.0.instructions", samples);
    report("flush.svm.direct.descheduled.0.instructions", samples);
    lock(1);
    flush_samples(samples, assist, true, exit::HV_ENLIGHTENED)?;
    report("flush.svm.synthetic.0.instructions", samples);
    lock(0);
    flush_samples(samples, assist, false, exit::VMMCALL)?;
    report("flush.svm.reflected.running.0.instructions", samples);
    report("flush.svm.reflected.descheduled.0.instructions", samples);
    l1_instruction(samples, || {
        // SAFETY: a hypercall changes RAX and RCX.
        unsafe { asm!("vmmcall", inout("rcx") FLUSH => _, in("rdx") 0, in("r8") FLAGS, out("rax") _) };
    });
    report("flush.svm.l1.0.instructions", samples);
    Ok(())
}

/// HvCallFlushVirtualAddressSpace, fast.
const FLUSH: u64 = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE).with_fast().raw();
const FLAGS: u64 = FlushFlags::ALL_PROCESSORS | FlushFlags::ALL_VIRTUAL_ADDRESS_SPACES;

/// Stores the ticks of `SAMPLES` flush calls at RDI.
#[unsafe(naked)]
unsafe extern "C" fn program_flushes() {
    naked_asm!(
        "mov r9, {samples}",
        "mov r8, {flags}",
        "2:",
        "mov rcx, {flush}",
        "rdtsc",
        "mov esi, eax",
        "xor edx, edx",
        "vmmcall",
        "rdtsc",
        "sub eax, esi",
        "mov [rdi], rax",
        "add rdi, 8",
        "dec r9",
        "jnz 2b",
        "hlt",
        samples = const SAMPLES,
        flags = const FLAGS,
        flush = const FLUSH,
    )
}

/// Runs the flushing guest; this hypervisor does the least at each exit `served`, and no other may come.
fn flush_samples(samples: &mut Samples, assist: u64, direct: bool, served: u64) -> Result<(), Failure> {
    let guest = cpu_guest();
    guest.long_mode(program_flushes, samples.as_mut_ptr() as u64);
    let map = crate::npt::Table::identity(4);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(map.root());
    guest.vmcb.set_tlb_control(1);
    hyperv::enable();
    hyperv::describe(&mut guest.vmcb, 0x33, 0, assist);
    if !direct {
        guest.vmcb.set_hv_control(0);
    }
    // SAFETY: EFER.SVME is set; the guest is this processor's and runs this image's code.
    unsafe {
        hw::svm::clgi();
        match served {
            exit::VMMCALL => serve_calls(guest),
            _ => serve_synthetic(guest),
        }
        hw::svm::stgi();
    }
    check("the exit that ended the loop", guest.vmcb.exit_code(), exit::HLT)
}

/// A loop around VMRUN in which a hypervisor does the least: runs the guest, does `$act` with its VMCB at RAX, and goes
/// on while the exit code is `$code`; ends at another exit.
macro_rules! serve {
    ($(#[$doc:meta])* $name:ident: $code:expr, $($act:literal),*) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// GIF is clear, EFER.SVME set, the guest is this processor's.
        unsafe fn $name(guest: &mut Guest) {
            // SAFETY: the guest's general-purpose registers are given up as clobbers, but RBX, which is kept by hand.
            unsafe {
                asm!(
                    "push rbx",
                    "2:",
                    "vmrun rax",
                    $($act,)*
                    "cmp dword ptr [rax + 0x70], {code}",
                    "je 2b",
                    "pop rbx",
                    code = const $code as u32 as i32,
                    inout("rax") (&raw mut guest.vmcb) as u64 => _,
                    inout("rdi") guest.gprs.rdi => _,
                    out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _,
                );
            }
        }
    };
}

serve!(
    /// A flush call of the only processor: success, and on.
    serve_calls: exit::VMMCALL,
    "mov byte ptr [rax + 0x5c], 0", "add qword ptr [rax + 0x578], 3", "mov qword ptr [rax + 0x5f8], 0"
);
serve!(
    /// A synthetic exit: on.
    serve_synthetic: exit::HV_ENLIGHTENED,
    "mov byte ptr [rax + 0x5c], 0"
);
serve!(
    /// CPUID: skipped.
    serve: exit::CPUID,
    "mov byte ptr [rax + 0x5c], 0", "add qword ptr [rax + 0x578], 2"
);
serve!(
    /// CPUID: skipped, with a GIF window after each exit. Nothing is pending that the image could not take.
    serve_with_gif: exit::CPUID,
    "stgi", "mov byte ptr [rax + 0x5c], 0", "add qword ptr [rax + 0x578], 2", "clgi"
);

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

/// Prints `BENCH name minimum mode`.
fn report(name: impl Display, samples: &mut Samples) {
    samples.sort_unstable();
    let (mut mode, mut most) = (samples[0], 0);
    for run in samples.chunk_by(|a, b| a == b) {
        if run.len() > most {
            (mode, most) = (run[0], run.len());
        }
    }
    rt::println!("BENCH {name} {} {mode}", samples[0]);
}
