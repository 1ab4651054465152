//! From the runtime's `main` to a running L1: checks, tables, L1's image, then every processor into its run loop.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use hw::apic::LocalApic;
use hw::{cpu, msr, svm};
use rt::{BootInfo, ExitCode};
use spin::{Mutex, Once};

use crate::audit;
use crate::fatal::give_up;

use crate::hyperv::{HyperV, OVERLAYS};
use crate::ipi::{Ipis, MAX_CPUS};
use crate::l1map::IdentityMap;
use crate::linux;
use crate::loader::{self, Module, Region};
use crate::memory;
use crate::memory::{FOUR_GIB, L1Memory, Range};
use crate::mutant::Mutant;
use crate::npt01::{self, Format, Npt01, TablePage};
use crate::pages::{Pages, PagesPa, keep};
use crate::relocate::{self, phys_of};
use crate::say;
use crate::shared::{Shared, Vendor};
use crate::svm::SvmHost;
use crate::time::Clocks;
use crate::trace;
use crate::vmx::host::VmxHost;
use crate::vp::Vp;
use crate::{fatal, vmx};

/// Memory that one owner takes once.
#[repr(C, align(4096))]
struct Reserve<T>(UnsafeCell<T>);

// SAFETY: each element is handed out once (`VPS`: element n to processor n; the tables: to the boot processor).
unsafe impl<T> Sync for Reserve<T> {}

static NPT_PAGES: [TablePage; npt01::POOL_PAGES] = [const { TablePage::new() }; npt01::POOL_PAGES];
/// Physical memory that L0 maps at most.
const MEMORY_MAX: u64 = 64 << 30;
const HOST_TABLE_PAGES: usize = relocate::table_pages(MEMORY_MAX);
static HOST_TABLES: [TablePage; HOST_TABLE_PAGES] = [const { TablePage::new() }; HOST_TABLE_PAGES];
// Zero is a valid `Pages`: VMCBs are plain memory.
static VPS: Reserve<[[u8; size_of::<Pages>()]; MAX_CPUS]> =
    Reserve(UnsafeCell::new([[0; size_of::<Pages>()]; MAX_CPUS]));
/// Stacks, per-processor state and shadow tables of all processors.
const HEAP_BYTES: usize = 24 << 20;
static HEAP: Reserve<[u8; HEAP_BYTES]> = Reserve(UnsafeCell::new([0; HEAP_BYTES]));

static SHARED: Once<Shared> = Once::new();
/// All processors have started, and L0's tables are as they stay. Release and Acquire carry the tables over.
static STARTED: AtomicBool = AtomicBool::new(false);
static ENTRY: Mutex<Option<Start>> = Mutex::new(None);

/// How L1's boot processor starts.
#[derive(Clone, Copy, Debug)]
enum Start {
    Multiboot(loader::Entry),
    Linux(linux::Entry),
}

#[cfg(freestanding)]
unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
}

/// The virtual addresses at which L0 runs: whole 2 MiB pages.
fn image() -> Range {
    const MIB2: u64 = 2 << 20;
    #[cfg(freestanding)]
    let (start, end) = ((&raw const __image_start) as u64, (&raw const __image_end) as u64);
    #[cfg(not(freestanding))]
    let (start, end) = (64u64 << 20, 66u64 << 20);
    Range { start: start & !(MIB2 - 1), end: end.next_multiple_of(MIB2) }
}

/// The image's main function.
pub fn main(boot: &'static BootInfo) -> ExitCode {
    if cfg!(all(freestanding, target_feature = "sse")) {
        give_up(format_args!("built with SSE, which would lose the guests' registers: build for x86_64-unknown-none"));
    }
    let mut modules = ArrayVec::<Module<'static>, { rt::multiboot::MAX_MODULES }>::new();
    for m in &boot.modules {
        let range = Range { start: m.start, end: m.end };
        let _ = modules.try_push(Module { range, string: m.command_line.as_bytes() });
    }
    let hole = settle_down(boot, &mut modules);
    let heap = HEAP.0.get() as u64;
    // SAFETY: `HEAP` is used for nothing else, and nothing has been allocated yet.
    unsafe { rt::frames::use_region(rt::multiboot::Region { start: heap, end: heap + HEAP_BYTES as u64 }) };
    rt::idt::on(2, nmi);
    let map = map_for_l1(boot, hole);
    let shared = SHARED.call_once(|| shared(boot, hole));
    if shared.audit {
        audit::start(cpus(boot) as usize, crate::pages::SHADOW_PAGES);
    }
    if shared.trace && !trace::start(cpus(boot) as usize) {
        give_up(format_args!("no memory for the timeline"));
    }
    load_l1(&modules, shared, &map);
    let cpus = cpus(boot);
    match &shared.vendor {
        Vendor::Svm(SvmHost { leaf, .. }) => {
            say!("l0: cpus {cpus} hole {:#x}..{:#x} asids {} svm {:#x}", hole.start, hole.end, leaf.ebx, leaf.edx);
        }
        Vendor::Vmx(vmx) => {
            say!("l0: cpus {cpus} hole {:#x}..{:#x} vmx {:#x?}", hole.start, hole.end, vmx.controls);
        }
    }
    if let Err(missing) = rt::smp::start(cpus, other) {
        give_up(format_args!("{cpus} processors asked for, {} came", missing.online));
    }
    // The processors started at their own low addresses; all have left them.
    relocate::forget_low(&HOST_TABLES);
    STARTED.store(true, Ordering::Release);
    run(0)
}

/// How many processors L0 is to take.
fn cpus(boot: &BootInfo) -> u32 {
    boot.argument("cpus").and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// The memory map that L1 sees.
fn map_for_l1(boot: &BootInfo, hole: Range) -> ArrayVec<Region, 64> {
    let machine = boot.regions.iter().map(|r| Region { range: Range { start: r.start, end: r.end }, kind: 1 });
    let mut map = ArrayVec::new();
    loader::memory_map(machine, hole, |r| {
        if map.try_push(r).is_err() {
            give_up(format_args!("the memory map has too many entries"));
        }
    });
    map
}

fn shared(boot: &BootInfo, hole: Range) -> Shared {
    let (low_end, high_end) = ends(boot);
    let enlighten = boot.argument("enlighten") != Some("off");
    let address_bits = cpu::cpuid(0x8000_0008, 0).eax & 0xff;
    let (vendor, format, svm_leaf) = vendor(address_bits, enlighten);
    let (hyperv_vendor, enlightenments) = match vendor {
        Vendor::Svm(_) => (hvcore::partition::Vendor::Amd, SvmHost::ENLIGHTENMENTS),
        Vendor::Vmx(_) => (hvcore::partition::Vendor::Intel, VmxHost::ENLIGHTENMENTS),
    };
    let Ok(npt) = Npt01::new(&NPT_PAGES, phys_of(NPT_PAGES.as_ptr()), format, hole, (low_end, high_end), address_bits)
    else {
        give_up(format_args!("no pages for the nested tables"));
    };
    // SAFETY: L0's tables map the page uncached.
    let apic = unsafe { LocalApic::new(memory::phys_to_virt(hw::apic::DEFAULT_BASE)) };
    let clocks = enlighten.then(|| Clocks::measure(&apic, has_word(boot, "constant-tsc")));
    Shared {
        // SAFETY: the firmware says that this is RAM, it is mapped, and L0's own memory is the hole.
        memory: unsafe { L1Memory::new(low_end, high_end, hole, &OVERLAYS) },
        l1map: IdentityMap { hole, ones: npt.ones(), address_bits, overlays: &OVERLAYS },
        address_bits,
        gib_pages: cpu::cpuid(0x8000_0001, 0).edx & 1 << 26 != 0,
        root01: npt.root(),
        npt01: Mutex::new(npt),
        ipis: Ipis::new(),
        apic,
        clocks,
        svm_leaf,
        vendor,
        hyperv: HyperV::new(address_bits, hyperv_vendor, enlightenments, clocks),
        enlighten,
        churn: boot.argument("churn").and_then(|n| n.parse().ok()).unwrap_or(0),
        count: has_word(boot, "count"),
        count_bytes: has_word(boot, "count-bytes"),
        audit: has_word(boot, "audit"),
        trace: has_word(boot, "trace"),
        observed: ["count", "audit", "trace"].iter().any(|word| has_word(boot, word)),
        mutant: boot.argument("mutant").and_then(Mutant::named),
        test_hooks: has_word(boot, "test-hooks"),
    }
}

/// The virtualization extension of this processor, the format of its second-stage tables, and L1's leaf 0x8000_000A.
fn vendor(address_bits: u32, enlighten: bool) -> (Vendor, Format, [u32; 4]) {
    if let Some(svm) = SvmHost::new(address_bits, enlighten) {
        let leaf = svm.config.cpuid_8000_000a();
        return (Vendor::Svm(svm), Format::NPT, leaf);
    }
    match VmxHost::new(address_bits, enlighten) {
        Some(vmx) => (Vendor::Vmx(vmx), Format::EPT, [0; 4]),
        None => give_up(format_args!("this processor has neither SVM nor VMX")),
    }
}

/// True when `word` is on L0's command line.
fn has_word(boot: &BootInfo, word: &str) -> bool {
    boot.command_line.split_ascii_whitespace().any(|w| w == word)
}

/// Moves the image and the modules to the top of memory, where that is possible; where the image is then.
fn settle_down(boot: &BootInfo, modules: &mut ArrayVec<Module<'_>, { rt::multiboot::MAX_MODULES }>) -> Range {
    let image = image();
    let loaded_at = relocate::loaded_at(image);
    let (low_end, high_end) = ends(boot);
    let target = relocate::destination(loaded_at, low_end, modules.iter());
    let place = target.unwrap_or(loaded_at);
    let Ok(cr3) = relocate::tables(&HOST_TABLES, image, place, high_end) else {
        give_up(format_args!("more memory than L0 maps: {high_end:#x}"));
    };
    match target {
        // SAFETY: the tables are for this move; the target is RAM, clear of everything; this is the only processor,
        // its interrupts are off.
        Some(target) => unsafe {
            relocate::go(image, target, cr3);
            relocate::move_modules(modules, target.start);
        },
        None => {
            // SAFETY: the tables map all that the runtime's do at the same addresses, and more.
            unsafe { cpu::write_cr3(cr3) };
            say!("l0: no room to move to: L0 stays at {:#x}", loaded_at.start);
        }
    }
    place
}

/// End of RAM below 4 GiB, and of all RAM.
fn ends(boot: &BootInfo) -> (u64, u64) {
    let low_end = boot.regions.iter().map(|r| r.end).filter(|&e| e <= FOUR_GIB).max().unwrap_or(0);
    (low_end, boot.regions.iter().map(|r| r.end).max().unwrap_or(0).max(FOUR_GIB))
}

/// Module 0 is L1, its command line that of L1; the modules behind it are L1's.
fn load_l1(modules: &[Module<'_>], shared: &Shared, map: &[Region]) {
    let Some((l1, modules)) = modules.split_first() else {
        give_up(format_args!("no module: give L1's kernel as the first"));
    };
    // SAFETY: the boot loader put the file there; nothing writes it before it has been copied.
    let image = unsafe {
        core::slice::from_raw_parts(
            memory::phys_to_virt::<u8>(l1.range.start).cast_const(),
            (l1.range.end - l1.range.start) as usize,
        )
    };
    let line = l1.string;
    let loaded = if linux::is_bzimage(image) {
        // The first word is the file's name, which is not Linux's.
        let line = line.iter().position(|&b| b == b' ').and_then(|at| line.get(at + 1..)).unwrap_or(b"");
        linux::load(&shared.memory, image, line, modules.first(), modules, map).map(Start::Linux)
    } else {
        loader::multiboot(&shared.memory, image, line, modules, map).map(Start::Multiboot)
    };
    match loaded {
        Ok(start) => *ENTRY.lock() = Some(start),
        Err(error) => give_up(format_args!("cannot load L1: {error:?}")),
    }
}

fn other(this: &'static rt::cpu::Cpu) {
    while !STARTED.load(Ordering::Acquire) {
        cpu::pause();
    }
    run(this.index as usize);
}

/// This processor's part, for good.
fn run(id: usize) -> ! {
    let (Some(shared), Some(pages)) = (SHARED.get(), vp_pages(id)) else {
        give_up(format_args!("processor {id} started too early, or is one too many"));
    };
    // SAFETY: the tables in use, in which this processor needs no low address any more.
    unsafe { cpu::write_cr3(cpu::cr3()) };
    let svm = match &shared.vendor {
        Vendor::Svm(svm) => svm,
        Vendor::Vmx(_) => run_vmx(id),
    };
    let pa = PagesPa::at(phys_of(&raw const *pages));
    // SAFETY: long mode processors have NX; the nested tables use it, and the host's EFER decides whether they may.
    unsafe { msr::wrmsr(msr::EFER, msr::rdmsr(msr::EFER) | msr::EFER_NXE) };
    // SAFETY: the runtime has loaded this processor's tables and TSS; `main` set the NMI handler.
    let vp = unsafe { Vp::new(id, shared, svm, pages, pa) };
    let mut vp = match vp {
        Ok(vp) => vp,
        Err(failure) => give_up(format_args!("{failure:?} on cpu {id}")),
    };
    if id == 0
        && let Some(start) = ENTRY.lock().take()
    {
        match start {
            Start::Multiboot(entry) => vp.start_multiboot(&entry),
            Start::Linux(entry) => vp.start_linux(&entry),
        }
    }
    let failure = vp.run();
    fatal::report(&mut vp, failure)
}

/// As [`run`], on VT-x.
fn run_vmx(id: usize) -> ! {
    // SAFETY: long mode processors have NX, and L0's own tables do without it.
    unsafe { msr::wrmsr(msr::EFER, msr::rdmsr(msr::EFER) | msr::EFER_NXE) };
    let vp = new_vmx(id);
    if id == 0
        && let Some(start) = ENTRY.lock().take()
    {
        match start {
            Start::Multiboot(entry) => vp.start_multiboot(&entry),
            Start::Linux(entry) => vp.start_linux(&entry),
        }
    }
    let failure = vp.run();
    vmx::report::report(vp, failure)
}

/// The VP of this processor, on the heap: making it takes much of the stack, which is given back here.
#[inline(never)]
fn new_vmx(id: usize) -> &'static mut vmx::vp::Vp {
    let Some(shared @ Shared { vendor: Vendor::Vmx(host), .. }) = SHARED.get() else {
        give_up(format_args!("processor {id} started too early"));
    };
    // SAFETY: the runtime has loaded this processor's tables and TSS; `main` set the NMI handler; this is called once.
    let vp = unsafe { vmx::vp::Vp::new(id, shared, host) };
    match vp.and_then(keep) {
        Ok(vp) => vp,
        Err(failure) => give_up(format_args!("{failure:?} on cpu {id}")),
    }
}

fn vp_pages(id: usize) -> Option<&'static mut Pages> {
    if id >= MAX_CPUS {
        return None;
    }
    // SAFETY: processor `id` alone takes element `id`, once; it is aligned (a multiple of a page from an aligned
    // start) and zero, which is a valid value.
    Some(unsafe { &mut *VPS.0.get().cast::<Pages>().add(id) })
}

/// L0's NMI handler. It tells kicks from L1's NMIs, and wakes a waiting processor.
fn nmi(frame: &mut rt::idt::Frame) {
    let (Some(shared), id) = (SHARED.get(), rt::cpu::current().index as usize) else { return };
    if !shared.ipis.nmi_arrived(id) {
        shared.ipis.post_nmi(id);
    }
    frame.rip = svm::skip_wait(vmx::kick::nmi(id, frame.rip));
}
