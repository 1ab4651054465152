//! The Hyper-V interface of a partition: its hypercalls and what a flush asks of a VP before it runs.

use hvcore::addr::{L1Gpa, L2Gpa, Level};
use hvcore::flush::{EntryFlush, FlushCalls, GvaFlush, SecondStageFlush, SecondStageItem};
use hvcore::hypercall::calls::{
    FlushGuestPhysical, FlushGuestPhysicalAddressList, FlushGuestPhysicalAddressSpace, FlushTarget, FlushVirtual,
    FlushVirtualAddressList, FlushVirtualAddressListEx, FlushVirtualAddressSpace, FlushVirtualAddressSpaceEx,
    GvaRanges,
};
use hvcore::hypercall::{Answer, CallerMode, Gpr, Registers, Xmm};
use hvcore::partition::{Interface, NestedCapabilities, PartitionConfig, Vendor};
use hvcore::shadow::L1Change;
use nsvm::NestedSvm;
use nsvm::npt::NptShadow;
use nsvm::vmcb::Vmcb;

use super::vp::{ROOTS, Regs};

/// Serves one caller.
pub struct Calls<'c, 'a> {
    /// The engine's part.
    pub flush: FlushCalls<'c, 'a>,
}

impl FlushVirtual for Calls<'_, '_> {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.flush.flush_space(target)
    }
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.flush.flush_list(target, ranges)
    }
}

impl FlushGuestPhysical for Calls<'_, '_> {
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer {
        self.flush.flush_guest_physical_space(address_space)
    }
    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        self.flush.flush_guest_physical_list(address_space, ranges)
    }
}

hvcore::offer_hypercalls!(impl['c, 'a] for Calls<'c, 'a> {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
});

/// The interface of a partition with `vps` VPs.
pub fn interface(vps: u32) -> Interface {
    let nested = NestedCapabilities { direct_flush: true, msr_bitmap: true, npt_tlb: true, ..NestedCapabilities::NONE };
    let config = PartitionConfig::new(Vendor::Amd, vps, 40).offer::<Calls<'_, '_>>().apic_msrs().nested(nested);
    config.build().expect("a possible interface")
}

/// The registers of a caller: RAX in its VMCB, the others saved at the exit.
pub struct CallRegisters<'r> {
    /// The caller's VMCB.
    pub vmcb: &'r mut Vmcb,
    /// Its other registers.
    pub regs: &'r mut Regs,
}

impl CallRegisters<'_> {
    fn number(register: Gpr) -> usize {
        match register {
            Gpr::Rax => 0,
            Gpr::Rcx => 1,
            Gpr::Rdx => 2,
            Gpr::Rbx => 3,
            Gpr::Rsi => 6,
            Gpr::Rdi => 7,
            Gpr::R8 => 8,
        }
    }
}

impl Registers for CallRegisters<'_> {
    fn gpr(&self, register: Gpr) -> u64 {
        match Self::number(register) {
            0 => self.vmcb.save.rax,
            n => self.regs.0[n],
        }
    }
    fn set_gpr(&mut self, register: Gpr, value: u64) {
        match Self::number(register) {
            0 => self.vmcb.save.rax = value,
            n => self.regs.0[n] = value,
        }
    }
    fn xmm(&self, _: Xmm) -> u128 {
        0
    }
    fn set_xmm(&mut self, _: Xmm, _: u128) {}
}

/// The mode of the guest in `vmcb`.
pub fn mode(vmcb: &Vmcb) -> CallerMode {
    CallerMode::new(vmcb.save.efer, vmcb.save.cr0, vmcb.in_64bit_code(), vmcb.save.cpl)
}

/// Carries out what is to be flushed before the guest of `level` runs.
pub fn apply(nested: &mut NestedSvm, shadow: &mut NptShadow<'_, ROOTS>, level: Level, due: &EntryFlush<'_, 16>) {
    if due.gva != GvaFlush::None {
        nested.retire_tag(level);
    }
    match due.second_stage {
        SecondStageFlush::None => return,
        SecondStageFlush::Everything => _ = shadow.flush_everything(),
        SecondStageFlush::Items(items) => {
            for item in items {
                let _ = match *item {
                    SecondStageItem::Root(root) => shadow.flush_address_space(root),
                    SecondStageItem::RootRange { root, first, pages } => {
                        shadow.flush_gpa_range(root, L2Gpa::new(first), pages * 4096)
                    }
                    SecondStageItem::L1Range { first, pages } => {
                        shadow.l1_gpa_changed(L1Gpa::new(first), pages * 4096, L1Change::Unmap)
                    }
                };
            }
        }
    }
    // With a shadow, its stale tag says what the hardware tag needs. Without, L2 runs on the embedder's own tables.
    if shadow.context().is_none() {
        nested.retire_tag(Level::L2);
    }
}
