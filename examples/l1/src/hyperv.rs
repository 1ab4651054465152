//! The Hyper-V host under this hypervisor, when there is one: what it offers, and turning direct flush on.
//!
//! This is what an enlightened L1 does: identify itself, enable the VP assist page of each processor, set
//! DirectHypercall there, and describe each L2 processor in its VMCB. Used by the flush scenarios.

use crate::vmcb::Vmcb;
use crate::{Failure, frames};
use core::sync::atomic::{AtomicU64, Ordering};
use hvcore::client::HostOffer;
use rt::cpu::MAX_CPUS;
use tlfs_abi::{assist, cpuid, evmcb, msr};

/// What this hypervisor calls itself: open source, no registered type.
const OS_ID: u64 = 1 << 63 | 0x7F << 56 | 1;

/// The VP assist page of each processor, 0 while it has none.
static ASSIST: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// True when there is a Hyper-V-compatible host.
pub fn is_host() -> bool {
    hw::cpu::cpuid(1, 0).ecx & cpuid::LEAF1_ECX_HYPERVISOR_PRESENT != 0
        && hw::cpu::cpuid(cpuid::LEAF_INTERFACE, 0).eax == cpuid::INTERFACE_HV1
}

/// True when a Hyper-V-compatible host offers direct flush.
fn offers_direct_flush() -> bool {
    let range = hw::cpu::cpuid(cpuid::LEAF_RANGE, 0);
    is_host()
        && range.eax >= cpuid::LEAF_NESTED_OPTIMIZATIONS
        && hw::cpu::cpuid(cpuid::LEAF_NESTED_OPTIMIZATIONS, 0).eax >> 17 & 1 != 0
}

/// Skips a scenario where no host offers direct flush.
pub fn needs_direct_flush() -> Result<(), Failure> {
    if offers_direct_flush() { Ok(()) } else { Err(Failure::Missing("a host that offers direct flush")) }
}

/// What the host offers to this hypervisor and, through it, to its guests.
pub fn offer() -> HostOffer {
    let features = hw::cpu::cpuid(cpuid::LEAF_FEATURES, 0);
    let recommendations = hw::cpu::cpuid(cpuid::LEAF_RECOMMENDATIONS, 0);
    let nested = hw::cpu::cpuid(cpuid::LEAF_NESTED_OPTIMIZATIONS, 0);
    HostOffer::from_leaves(features.edx, recommendations.eax, nested.eax, true)
}

/// Makes this processor ready for direct flush: OS identity, VP assist page, DirectHypercall.
pub fn enable() {
    let index = rt::cpu::current().index as usize;
    let mut page = ASSIST[index].load(Ordering::Relaxed);
    if page == 0 {
        page = frames::page();
        ASSIST[index].store(page, Ordering::Relaxed);
    }
    // SAFETY: the host offers these MSRs; the page is given to it.
    unsafe {
        hw::msr::wrmsr(msr::GUEST_OS_ID, OS_ID);
        hw::msr::wrmsr(msr::VP_ASSIST_PAGE, page | msr::PageMsr::ENABLE);
    }
    set_direct_hypercall(true);
}

/// Sets or clears DirectHypercall in this processor's VP assist page.
pub fn set_direct_hypercall(on: bool) {
    let page = ASSIST[rt::cpu::current().index as usize].load(Ordering::Relaxed);
    let features = (page + assist::vp_assist_offset::NESTED_FEATURES) as *mut u32;
    // SAFETY: the page is this processor's VP assist page, mapped one to one.
    unsafe { features.write_volatile(u32::from(on)) };
}

/// Disables this processor's VP assist page.
pub fn disable_assist_page() {
    // SAFETY: the host offers the MSR.
    unsafe { hw::msr::wrmsr(msr::VP_ASSIST_PAGE, 0) };
}

/// True when this processor's VP assist page is enabled.
pub fn has_assist_page() -> bool {
    // SAFETY: a processor that has been given a page has a host with the MSR.
    ASSIST[rt::cpu::current().index as usize].load(Ordering::Relaxed) != 0
        && unsafe { hw::msr::rdmsr(msr::VP_ASSIST_PAGE) } & msr::PageMsr::ENABLE != 0
}

/// Announces the enlightened VMCS of this processor's next entries, or that there is none.
pub fn set_current_evmcs(gpa: Option<u64>) {
    use assist::vp_assist_offset::{CURRENT_NESTED_VMCS, ENLIGHTEN_VM_ENTRY};
    let page = ASSIST[rt::cpu::current().index as usize].load(Ordering::Relaxed);
    if page == 0 {
        return;
    }
    // SAFETY: the page is this processor's VP assist page, mapped one to one.
    unsafe {
        ((page + CURRENT_NESTED_VMCS) as *mut u64).write_volatile(gpa.unwrap_or(0));
        ((page + ENLIGHTEN_VM_ENTRY) as *mut u8).write_volatile(u8::from(gpa.is_some()));
    }
}

/// A partition assist page: its first word is TlbLockCount.
pub fn partition_assist() -> u64 {
    frames::page()
}

/// Describes an L2 processor in its VMCB: direct flush on, these ids, this partition assist page.
pub fn describe(vmcb: &mut Vmcb, vm_id: u64, vp_id: u32, partition_assist: u64) {
    vmcb.set_hv_control(1);
    vmcb.set_hv_vm_id(vm_id);
    vmcb.set_hv_vp_id(vp_id);
    vmcb.set_hv_partition_assist(partition_assist);
    vmcb.set_clean(vmcb.clean() & !evmcb::VMCB_CLEAN_ENLIGHTENMENTS);
}
