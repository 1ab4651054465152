//! The processor in VMX root operation, and the samples' pages in its memory.

use core::arch::asm;
use core::sync::atomic::AtomicU8;

use crate::verdict::Outcome;
use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use hw::vmx::{self, Entered, World};
use hw::{cpu, msr, vmx_host};
use nvmx::caps::{Config, Host, Offer};
use nvmx::check::Root;
use nvmx::controls::{pin, primary, secondary};
use nvmx::evmcs::client::{AssistPage, Evmcs, EvmcsOffer, SharedPage};
use nvmx::field::{Area, Field};
use nvmx::vmcs12::{REVISION, Vmcs12};
use samples::{Layout, PAGES, page};
use tlfs_abi::cpuid;
use tlfs_abi::evmcs::EvmcsUse;

/// No NMI is expected: an entry that one holds up would be a failure.
static KICKED: AtomicU8 = AtomicU8::new(0);

/// Everything that an entry needs.
pub struct Machine {
    /// What the processor has, as the library offers it to an L1.
    pub config: Config,
    /// Where the samples' pages are.
    pub layout: Layout,
    /// 64-bit mode, and the current VMCS.
    pub root: Root,
    /// The pages.
    pub memory: Memory,
    world: &'static mut World,
    /// The enlightened VMCS to use instead of a plain one.
    enlightened: Option<Evmcs<'static>>,
    /// FS base, GS base, IA32_EFER, IA32_PAT: what an exit may have changed.
    msrs: [(u32, u64); 4],
}

/// Host fields that may have any legal value, as [`Machine::enter`] puts right afterwards what an exit loads.
pub fn harmless(field: Field) -> bool {
    matches!(
        field,
        Field::HostEsSelector
            | Field::HostDsSelector
            | Field::HostFsSelector
            | Field::HostGsSelector
            | Field::HostFsBase
            | Field::HostGsBase
            | Field::HostPat
            | Field::HostEfer
            | Field::HostPerfGlobalCtrl
            | Field::HostSysenterCs
            | Field::HostSysenterEsp
            | Field::HostSysenterEip
    )
}

/// A guest that is not active does not leave by itself: gives it a timer that has run out, and no window.
pub fn let_time_run(vmcs: &mut Vmcs12) {
    if vmcs.get(Field::GuestActivity) == 0 {
        return;
    }
    let mut change = |field, set: u32, clear: u32| {
        vmcs.set(field, vmcs.get(field) & !u64::from(clear) | u64::from(set));
    };
    change(Field::PinBasedControls, pin::PREEMPTION_TIMER, 0);
    change(Field::PrimaryControls, 0, primary::INTERRUPT_WINDOW_EXITING);
    change(Field::SecondaryControls, 0, secondary::VIRTUAL_INTERRUPT_DELIVERY);
    change(Field::PreemptionTimer, 0, u32::MAX);
}

/// Zeroed pages of memory, which is mapped to itself.
fn pages(count: u64) -> u64 {
    let Some(pages) = rt::frames::allocate(count * 4096, 4096) else { panic!("no memory") };
    // SAFETY: the allocation is this image's own.
    unsafe { pages.write_bytes(0, (count * 4096) as usize) };
    pages as u64
}

impl Machine {
    /// Starts VMX operation, with an enlightened VMCS if `enlightened`; `None` without VMX, or without a host for that.
    pub fn start(enlightened: bool) -> Option<Self> {
        if !vmx::supported() {
            return None;
        }
        let (vmxon, current, pages) = (pages(1), pages(1), pages(PAGES));
        let world: &'static mut [World] =
            // SAFETY: a world is written to it before anything else is done with it.
            unsafe { rt::frames::allocate_slice(1, 64) }?;
        let world = &mut world[0];
        *world = World::new(&KICKED);
        // SAFETY: VMX is there and off; the pages are this function's, mapped to themselves; the runtime's selectors
        // and TSS are good host state, and its handlers have stacks of their own.
        unsafe {
            let enabled = vmx::enable(vmxon as *mut [u32; 1024], vmxon);
            assert!(enabled.is_ok(), "{enabled:?}");
            (current as *mut u32).write(vmx::revision());
            assert!(vmx::vmclear(current).is_ok() && vmx::vmptrld(current).is_ok());
            vmx_host::write_host_state();
            world.bind();
        }
        let config = offered();
        let layout = Layout { pages, current, host: host_state() };
        // SAFETY: VMX is there.
        let revision = unsafe { vmx::revision() };
        samples::prepare(&layout, revision, |at, value| {
            // SAFETY: an address in the samples' pages.
            unsafe { (at as *mut u64).write(value) }
        });
        let numbers = [msr::FS_BASE, msr::GS_BASE, msr::EFER, msr::PAT];
        // SAFETY: processors in 64-bit mode have these.
        let msrs = numbers.map(|number| (number, unsafe { msr::rdmsr(number) }));
        let root = Root { long_mode: true, current: L1Gpa::new(current) };
        let memory = Memory { layout, revision };
        let enlightened = if enlightened { Some(announce(current)?) } else { None };
        Some(Self { config, layout, root, memory, world, enlightened, msrs })
    }

    /// What of a sample gets to the processor: with an enlightened VMCS, the fields that it has.
    pub fn carried(&self, vmcs: &mut Vmcs12) {
        if self.enlightened.is_some() {
            for field in Field::ALL {
                if !is_carried(*field) {
                    vmcs.set(*field, 0);
                }
            }
        }
    }

    /// VMLAUNCH with `vmcs`, and what came of it.
    pub fn enter(&mut self, vmcs: &Vmcs12) -> Outcome {
        // SAFETY: VMX operation. The sample's guest is given no memory, and what it names lies in the samples' pages;
        // host state that an exit may load is the program's own, or put right by `restore`.
        let entered = unsafe {
            assert!(vmx::vmclear(self.layout.current).is_ok());
            if let Some(page) = &mut self.enlightened {
                for field in Field::ALL {
                    if field.area() != Area::ExitInformation {
                        _ = page.write(*field, vmcs.get(*field));
                    }
                }
            } else {
                assert!(vmx::vmptrld(self.layout.current).is_ok());
                for field in Field::ALL {
                    if field.area() != Area::ExitInformation {
                        vmx::write(*field, vmcs.get(*field));
                    }
                }
            }
            vmx::enter(self.world, false)
        };
        self.restore();
        let page = self.enlightened.as_ref();
        let read = |field| match page {
            Some(page) => page.read(field).unwrap_or(0),
            // SAFETY: VMX operation with a current VMCS.
            None => unsafe { vmx::read(field) },
        };
        let (reason, qualification) = (read(Field::ExitReason), read(Field::ExitQualification));
        match entered {
            Entered::Exited if reason >> 31 == 0 => Outcome::Enters,
            Entered::Exited if reason == 0x8000_0021 => Outcome::Guest(qualification),
            Entered::Exited if reason == 0x8000_0022 => Outcome::Msr(qualification),
            Entered::Exited => Outcome::Odd(reason),
            Entered::Failed(vmx::Fail::Valid) => Outcome::Fails(read(Field::InstructionError)),
            Entered::Failed(vmx::Fail::Invalid) | Entered::Kicked => panic!("{entered:?}"),
        }
    }

    /// Puts back what an exit may have loaded otherwise.
    fn restore(&self) {
        // SAFETY: the runtime's selectors, and MSRs as they were at the start.
        unsafe {
            asm!(
                "mov ds, {data:e}", "mov es, {data:e}", "mov fs, {null:e}", "mov gs, {null:e}",
                data = in(reg) u32::from(rt::cpu::DATA), null = in(reg) 0u32, options(nostack, preserves_flags),
            );
            for (number, value) in self.msrs {
                msr::wrmsr(number, value);
            }
        }
    }
}

/// True for a field that the enlightened VMCS has for L1 to write.
fn is_carried(field: Field) -> bool {
    field.evmcs().is_some_and(|place| matches!(place.usage, EvmcsUse::Group(_)))
}

/// Makes the page at `gpa` an enlightened VMCS and announces it in this processor's VP assist page; `None` without a
/// Hyper-V host that has such.
fn announce(gpa: u64) -> Option<Evmcs<'static>> {
    let leaf = |number| cpu::cpuid(number, 0);
    let there = leaf(1).ecx & cpuid::LEAF1_ECX_HYPERVISOR_PRESENT != 0
        && leaf(cpuid::LEAF_INTERFACE).eax == cpuid::INTERFACE_HV1
        && leaf(cpuid::LEAF_RANGE).eax >= cpuid::LEAF_NESTED_OPTIMIZATIONS;
    let (recommended, nested) = (leaf(cpuid::LEAF_RECOMMENDATIONS), leaf(cpuid::LEAF_NESTED_OPTIMIZATIONS));
    if !there || !EvmcsOffer::from_leaves(recommended.eax, nested.eax, nested.ebx).evmcs {
        return None;
    }
    let assist = pages(1);
    // SAFETY: a Hyper-V host has the MSRs; both pages are this image's, given to it, mapped one to one. The VMCS there
    // was used for nothing but the host's state, which has been read.
    unsafe {
        assert!(vmx::vmclear(gpa).is_ok());
        msr::wrmsr(tlfs_abi::msr::GUEST_OS_ID, 1 << 63 | 0x7F << 56 | 1);
        msr::wrmsr(tlfs_abi::msr::VP_ASSIST_PAGE, assist | tlfs_abi::msr::PageMsr::ENABLE);
        AssistPage::new(&*(assist as *const SharedPage)).set_current(Some(L1Gpa::new(gpa)));
        Some(Evmcs::new(&*(gpa as *const SharedPage), L1Gpa::new(gpa)))
    }
}

/// The processor's own controls, less what the library refuses: it is to emulate nothing here.
fn offered() -> Config {
    let widths = cpu::cpuid(0x8000_0008, 0).eax;
    // SAFETY: the library asks for no MSR that the ones before it do not announce.
    let mut host = Host::from_msrs(widths as u8, (widths >> 8) as u8, |number| unsafe { msr::rdmsr(number) });
    let counters = cpu::cpuid(0xA, 0);
    host.perf_global_ctrl = Host::perf_global_ctrl_of(counters.eax, counters.edx);
    host.rtm = cpu::cpuid(7, 0).ebx & 1 << 11 != 0;
    let mut offer = Offer::all(&host, false, true);
    offer.pin &= host.pin.allowed;
    offer.secondary &= host.secondary;
    offer.exit &= host.exit.allowed;
    offer.ept_vpid &= host.ept_vpid;
    match Config::new(host, offer) {
        Ok(config) => config,
        Err(error) => panic!("{error:?}"),
    }
}

/// Host state as it was written to the current VMCS.
fn host_state() -> samples::Host {
    // SAFETY: VMX operation with a current VMCS.
    let read = |field| unsafe { vmx::read(field) };
    samples::Host {
        cr0: read(Field::HostCr0),
        cr3: read(Field::HostCr3),
        cr4: read(Field::HostCr4),
        rsp: read(Field::HostRsp),
        rip: read(Field::HostRip),
        efer: read(Field::HostEfer),
        pat: read(Field::HostPat),
        selectors: [
            read(Field::HostCsSelector) as u16,
            read(Field::HostSsSelector) as u16,
            read(Field::HostTrSelector) as u16,
        ],
        bases: [
            read(Field::HostFsBase),
            read(Field::HostGsBase),
            read(Field::HostTrBase),
            read(Field::HostGdtrBase),
            read(Field::HostIdtrBase),
        ],
    }
}

/// The samples' pages, as L1's memory: VMCSs there have the library's revision.
pub struct Memory {
    layout: Layout,
    revision: u32,
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let last = gpa.raw().wrapping_add(buf.len() as u64).wrapping_sub(1);
        if !self.layout.contains(gpa.raw()) || !self.layout.contains(last) {
            return Err(MemoryError);
        }
        // SAFETY: a page of the samples, which only this processor uses.
        unsafe { buf.as_mut_ptr().copy_from(gpa.raw() as *const u8, buf.len()) };
        let regions = [page::VMCS, page::SHADOW_VMCS, page::WRONG_VMCS].map(|number| self.layout.page(number));
        if regions.contains(&gpa.raw()) {
            for (byte, difference) in buf.iter_mut().zip((self.revision ^ REVISION).to_le_bytes()) {
                *byte ^= difference;
            }
        }
        Ok(())
    }

    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}
