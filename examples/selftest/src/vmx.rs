//! A hypervisor of one screen: VMX operation, a guest that shares the image's memory, with and without EPT and VPID.
//!
//! On the bare processor it checks [`hw::vmx`]; under the L0 hypervisor it is the smallest L1 there can be.

use core::arch::naked_asm;
use core::sync::atomic::AtomicU8;

use hvcore::addr::L1Gpa;
use hw::vmx::{self, Entered, World};
use hw::vmx_host::{self, Capabilities};
use hw::{cpu, msr};
use nvmx::controls::{entry, exit, primary, secondary};
use nvmx::evmcs::client::{AssistPage, Evmcs, SharedPage};
use nvmx::exit_reason;
use nvmx::field::{Area, Field};
use rt::{BootInfo, ExitCode, frames, println};

/// Stops entries.
pub static KICKED: AtomicU8 = AtomicU8::new(0);

/// The guest: `rcx` times CPUID of leaf 0x4000_0000 plus the count, a sum of what it gets in `rbx`, then VMCALL.
#[unsafe(naked)]
extern "C" fn guest() -> ! {
    naked_asm!(
        "xor r9d, r9d",
        "mov r8, rcx",
        "2:",
        "mov eax, r8d",
        "cpuid",
        "add r9, rax",
        "dec r8",
        "jnz 2b",
        "mov r10, [rsi]",
        "vmcall",
        "3:",
        "hlt",
        "jmp 3b",
    )
}

fn page() -> &'static mut [u32; 1024] {
    // SAFETY: zero is a valid array of numbers.
    let pages = unsafe { frames::allocate_slice::<[u32; 1024]>(1, 4096) }.expect("a page");
    &mut pages[0]
}

fn pa<T>(object: &T) -> u64 {
    core::ptr::from_ref(object) as u64
}

/// What the guest is run with.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    pub ept: bool,
    pub vpid: bool,
}

/// Runs the guest under each set of features, `rounds=N` times CPUID each.
pub fn run(boot: &'static BootInfo) -> ExitCode {
    if !vmx::supported() {
        println!("vmx: this processor has none");
        return ExitCode::Failure;
    }
    start();
    if let Some(which) = boot.argument("bench") {
        return bench(which == "evmcs", boot.argument("rounds").and_then(|n| n.parse().ok()).unwrap_or(100));
    }
    let rounds = boot.argument("rounds").and_then(|n| n.parse().ok()).unwrap_or(3);
    for features in [(false, false), (true, false), (true, true)] {
        let features = Features { ept: features.0, vpid: features.1 };
        let clock = cpu::rdtsc();
        run_guest(features, rounds);
        println!("vmx: {features:?}: {rounds} rounds, {} ticks each", (cpu::rdtsc() - clock) / rounds.max(1));
    }
    check_failures();
    stop();
    ExitCode::Success
}

/// Begins VMX operation.
pub fn start() {
    let region = page();
    let at = pa(region);
    // SAFETY: VMX is there and off; the page is given away.
    unsafe { vmx::enable(region, at) }.expect("VMXON");
}

/// Ends it.
pub fn stop() {
    // SAFETY: nothing of VMX is used any more.
    unsafe { vmx::vmxoff() }.expect("VMXOFF");
}

/// A current VMCS that runs `guest`, and its address.
pub fn new_vmcs(features: Features, guest: extern "C" fn() -> !, pin: u32) -> (&'static mut World, u64) {
    let region = page();
    let at = pa(region);
    // SAFETY: VMX operation; the page is given away.
    unsafe {
        region[0] = vmx::revision();
        vmx::vmclear(at).expect("VMCLEAR");
        vmx::vmptrld(at).expect("VMPTRLD");
        assert_eq!(vmx::vmptrst(), at);
    }
    // SAFETY: zeroed memory is replaced before it is used.
    let world = unsafe { frames::allocate_slice::<core::mem::MaybeUninit<World>>(1, 64) }.expect("memory")[0]
        .write(World::new(&KICKED));
    write_controls(features, pin);
    write_guest(guest);
    // SAFETY: the VMCS is current, the image's tables are loaded, and interrupts run on stacks of their own.
    unsafe {
        vmx_host::write_host_state();
        world.bind();
    }
    (world, at)
}

fn run_guest(features: Features, rounds: u64) {
    let (world, at) = new_vmcs(features, guest, 0);
    let secret = 0x5ec2e7_u64;
    world.gprs.rcx = rounds;
    world.gprs.rsi = pa(&secret);
    let (mut left, mut sum, mut launched) = (rounds, 0, false);
    while left > 0 {
        enter(world, &mut launched);
        assert_eq!(read(Field::ExitReason), u64::from(exit_reason::CPUID), "exit reason, {left} rounds left");
        assert_eq!(world.gprs.rax, left);
        world.gprs.rax = left * 3;
        sum += left * 3;
        left -= 1;
        let next = read(Field::GuestRip) + read(Field::ExitInstructionLength);
        write(Field::GuestRip, next);
    }
    enter(world, &mut launched);
    assert_eq!(read(Field::ExitReason), u64::from(exit_reason::VMCALL));
    assert_eq!((world.gprs.r8, world.gprs.r9, world.gprs.r10), (0, sum, secret));
    assert_eq!(read(Field::ExitInstructionLength), 3);
    // SAFETY: the VMCS is not used again.
    unsafe { vmx::vmclear(at) }.expect("VMCLEAR");
}

/// CPUID of the guest again and again (RIP stays: it is always the same one), with L0's counters printed when all is warm
/// and after `rounds` more: on a plain VMCS, or on an enlightened one. L1 does nothing but enter again.
fn bench(enlightened: bool, rounds: u64) -> ExitCode {
    const WARM: u64 = 10;
    let (world, at) = new_vmcs(Features { ept: true, vpid: true }, guest, 0);
    let secret = 0_u64;
    world.gprs.rcx = 1;
    world.gprs.rsi = pa(&secret);
    let evmcs = enlightened.then(|| enlighten(at));
    let reason = || match &evmcs {
        None => read(Field::ExitReason),
        Some(evmcs) => evmcs.read(Field::ExitReason).expect("a field of the enlightened VMCS"),
    };
    for round in 0..WARM + rounds {
        if round == WARM {
            print_counters();
        }
        let mut launched = round != 0;
        enter(world, &mut launched);
        if round < WARM {
            assert_eq!(reason(), u64::from(exit_reason::CPUID), "exit reason in round {round}");
        }
    }
    print_counters();
    assert_eq!(reason(), u64::from(exit_reason::CPUID));
    println!("vmx: bench: {rounds} rounds");
    stop();
    ExitCode::Success
}

/// Has L0 print its counters, where it has the hooks for tests.
fn print_counters() {
    // SAFETY: L0's port; elsewhere the byte is printed, or goes nowhere.
    unsafe { hw::port::outb(0xe9, b'S') };
}

/// Moves the current VMCS, at `at`, to an enlightened one, which the next entry uses.
fn enlighten(at: u64) -> Evmcs<'static> {
    // SAFETY: zero is a valid page of words.
    let pages = unsafe { frames::allocate_slice::<SharedPage>(2, 4096) }.expect("two pages");
    let [assist, page] = pages else { unreachable!("two pages") };
    let (assist_gpa, gpa) = (assist.as_ptr() as u64, L1Gpa::new(page.as_ptr() as u64));
    let mut evmcs = Evmcs::new(page, gpa);
    for field in Field::ALL {
        // What only hardware writes is not L1's to set; a field that the processor lacks is zero.
        if field.area() != Area::ExitInformation {
            let _ = evmcs.write(*field, read(*field));
        }
    }
    // SAFETY: the VMCS is not used again; the MSRs are L0's, which reads the page from now on.
    unsafe {
        vmx::vmclear(at).expect("VMCLEAR");
        msr::wrmsr(tlfs_abi::msr::GUEST_OS_ID, 1 << 63 | 2);
        msr::wrmsr(tlfs_abi::msr::VP_ASSIST_PAGE, assist_gpa | 1);
    }
    AssistPage::new(assist).set_current(Some(gpa));
    evmcs
}

fn enter(world: &mut World, launched: &mut bool) {
    // SAFETY: the VMCS was bound to this world; the guest is the image's own code, which touches its registers and
    // reads one word.
    let entered = unsafe { vmx::enter(world, *launched) };
    assert_eq!(entered, Entered::Exited, "VM entry; error {}", read(Field::InstructionError));
    *launched = true;
}

pub fn read(field: Field) -> u64 {
    // SAFETY: VMX operation with a current VMCS.
    unsafe { vmx::read(field) }
}

pub fn write(field: Field, value: u64) {
    // SAFETY: VMX operation with a current VMCS, whose guest is the image's own code.
    unsafe { vmx::vmwrite(field.encoding().0.into(), value) }.unwrap_or_else(|e| panic!("VMWRITE {field:?}: {e:?}"));
}

fn write_controls(features: Features, pin: u32) {
    // SAFETY: VMX is there.
    let has = unsafe { Capabilities::read() };
    let ept = if features.ept { secondary::EPT } else { 0 };
    let vpid = if features.vpid { secondary::VPID } else { 0 };
    let more = if features.ept { primary::SECONDARY_CONTROLS } else { 0 };
    let controls = [
        (Field::PinBasedControls, has.pin.choose(pin, 0)),
        (Field::PrimaryControls, has.primary.choose(primary::HLT_EXITING | more, 0)),
        (Field::ExitControls, has.exit.choose(exit::HOST_ADDRESS_SPACE_SIZE | exit::LOAD_EFER | exit::SAVE_EFER, 0)),
        (Field::EntryControls, has.entry.choose(entry::IA32E_MODE_GUEST | entry::LOAD_EFER, 0)),
    ];
    for (field, value) in controls {
        write(field, value.expect("controls").into());
    }
    if features.ept {
        write(Field::SecondaryControls, has.secondary.choose(ept | vpid, 0).expect("EPT").into());
        write(Field::EptPointer, identity_ept() | 3 << 3 | 6);
    }
    if features.vpid {
        write(Field::VirtualProcessorId, 7);
    }
    let zero = [
        Field::ExceptionBitmap,
        Field::PageFaultErrorCodeMask,
        Field::PageFaultErrorCodeMatch,
        Field::Cr3TargetCount,
        Field::ExitMsrStoreCount,
        Field::ExitMsrLoadCount,
        Field::EntryMsrLoadCount,
        Field::EntryInterruptionInfo,
        Field::Cr0Mask,
        Field::Cr4Mask,
    ];
    for field in zero {
        write(field, 0);
    }
}

/// EPT that maps the first 4 GiB to themselves.
fn identity_ept() -> u64 {
    // SAFETY: zero is a valid table.
    let tables = unsafe { frames::allocate_slice::<[u64; 512]>(6, 4096) }.expect("memory");
    let base = tables.as_ptr() as u64;
    let [top, gibs, directories @ ..] = tables else { unreachable!("six tables") };
    top[0] = (base + 4096) | 7;
    for (gib, directory) in (0..).zip(directories) {
        gibs[gib as usize] = (base + 4096 * (2 + gib)) | 7;
        for (i, entry) in (0..).zip(directory) {
            *entry = (gib * 512 + i) << 21 | 1 << 7 | 6 << 3 | 7;
        }
    }
    base
}

/// 64-bit code in the image's own address space.
fn write_guest(guest: extern "C" fn() -> !) {
    let (gdt, gdt_limit) = cpu::sgdt();
    let (idt, idt_limit) = cpu::sidt();
    let selectors = [
        (Field::GuestEsSelector, cpu::es()),
        (Field::GuestCsSelector, cpu::cs()),
        (Field::GuestSsSelector, cpu::ss()),
        (Field::GuestDsSelector, cpu::ds()),
        (Field::GuestFsSelector, 0),
        (Field::GuestGsSelector, 0),
        (Field::GuestLdtrSelector, 0),
        (Field::GuestTrSelector, cpu::tr()),
    ];
    for (field, value) in selectors {
        write(field, value.into());
    }
    let rights = [
        (Field::GuestEsAccessRights, 0xc093),
        (Field::GuestCsAccessRights, 0xa09b),
        (Field::GuestSsAccessRights, 0xc093),
        (Field::GuestDsAccessRights, 0xc093),
        (Field::GuestFsAccessRights, 0x1_0000),
        (Field::GuestGsAccessRights, 0x1_0000),
        (Field::GuestLdtrAccessRights, 0x1_0000),
        (Field::GuestTrAccessRights, 0x8b),
    ];
    let limits = [
        Field::GuestEsLimit,
        Field::GuestCsLimit,
        Field::GuestSsLimit,
        Field::GuestDsLimit,
        Field::GuestFsLimit,
        Field::GuestGsLimit,
        Field::GuestLdtrLimit,
    ];
    let bases = [
        Field::GuestEsBase,
        Field::GuestCsBase,
        Field::GuestSsBase,
        Field::GuestDsBase,
        Field::GuestFsBase,
        Field::GuestGsBase,
        Field::GuestLdtrBase,
    ];
    rights.into_iter().for_each(|(field, value)| write(field, value));
    limits.into_iter().for_each(|field| write(field, 0xffff_ffff));
    bases.into_iter().for_each(|field| write(field, 0));
    // SAFETY: 64-bit mode has EFER.
    let efer = unsafe { msr::rdmsr(msr::EFER) };
    let rest = [
        (Field::GuestTrBase, 0),
        (Field::GuestTrLimit, 0x67),
        (Field::GuestGdtrBase, gdt),
        (Field::GuestGdtrLimit, gdt_limit.into()),
        (Field::GuestIdtrBase, idt),
        (Field::GuestIdtrLimit, idt_limit.into()),
        (Field::GuestCr0, cpu::cr0()),
        (Field::GuestCr3, cpu::cr3()),
        (Field::GuestCr4, cpu::cr4()),
        (Field::GuestEfer, efer),
        (Field::GuestDr7, 0x400),
        (Field::GuestRflags, 2),
        (Field::GuestRsp, 0),
        (Field::GuestRip, guest as *const () as u64),
        (Field::GuestDebugctl, 0),
        (Field::GuestSysenterCs, 0),
        (Field::GuestSysenterEsp, 0),
        (Field::GuestSysenterEip, 0),
        (Field::GuestInterruptibility, 0),
        (Field::GuestActivity, 0),
        (Field::GuestPendingDebugExceptions, 0),
        (Field::VmcsLinkPointer, u64::MAX),
    ];
    rest.into_iter().for_each(|(field, value)| write(field, value));
}

/// Without a current VMCS instructions end in VMfailInvalid; with one, in VMfailValid and a number.
fn check_failures() {
    let region = page();
    let at = pa(region);
    // SAFETY: VMX operation; the pages are given away; no entry happens.
    unsafe {
        assert_eq!(vmx::vmread(u64::from(Field::GuestRip.encoding().0)), Err(vmx::Fail::Invalid));
        region[0] = vmx::revision();
        vmx::vmclear(at).expect("VMCLEAR");
        vmx::vmptrld(at).expect("VMPTRLD");
        assert_eq!(vmx::vmwrite(0xfff, 0), Err(vmx::Fail::Valid));
        assert_eq!(read(Field::InstructionError), 12, "an unsupported field");
        assert_eq!(vmx::vmptrld(at + 8), Err(vmx::Fail::Valid));
        assert_eq!(read(Field::InstructionError), 9, "an invalid address");
        assert_eq!(vmx::vmwrite(Field::ExitReason.encoding().0.into(), 0).is_err(), !may_write_any());
    }
}

/// IA32_VMX_MISC bit 29: VMWRITE to every field.
fn may_write_any() -> bool {
    // SAFETY: VMX is there.
    unsafe { msr::rdmsr(0x485) & 1 << 29 != 0 }
}
