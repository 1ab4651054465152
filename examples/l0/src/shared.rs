//! What all processors of L0 share. Built once by the boot processor, then read-only but for atomics and one lock.

use hw::apic::LocalApic;
use spin::Mutex;

use crate::hyperv::HyperV;
use crate::ipi::Ipis;
use crate::l1map::IdentityMap;
use crate::memory::L1Memory;
use crate::mutant::Mutant;
use crate::npt01::{Kind, Npt01};
use crate::svm::SvmHost;
use crate::time::Clocks;
use crate::trace;
use crate::vmx::host::VmxHost;

/// The processor's virtualization extension, and what all VPs need to know of it.
#[derive(Debug)]
pub enum Vendor {
    /// AMD-V.
    Svm(SvmHost),
    /// VT-x.
    Vmx(VmxHost),
}

/// The state of the whole machine.
#[derive(Debug)]
pub struct Shared {
    /// L1's memory.
    pub memory: L1Memory,
    /// L0's second-stage tables for L1; the lock is for growing them.
    pub npt01: Mutex<Npt01<'static>>,
    /// Physical address of their root.
    pub root01: u64,
    /// Inter-processor interrupts.
    pub ipis: Ipis,
    /// Access to the processor's own local APIC.
    pub apic: LocalApic,
    /// How fast the clocks go, when L1 is told.
    pub clocks: Option<Clocks>,
    /// How L0 maps L1's memory, for shadows.
    pub l1map: IdentityMap,
    /// Width of physical addresses, bits.
    pub address_bits: u32,
    /// The processor has 1 GiB pages.
    pub gib_pages: bool,
    /// What the vendor's extension offers, to L0 and to L1.
    pub vendor: Vendor,
    /// CPUID leaf 0x8000_000A (SVM) as L1 sees it: EAX to EDX.
    pub svm_leaf: [u32; 4],
    /// The Hyper-V interface.
    pub hyperv: HyperV,
    /// It is offered to L1.
    pub enlighten: bool,
    /// Hooks for tests are offered.
    pub test_hooks: bool,
    /// The nested state is saved, destroyed and restored after so many exits; 0: never.
    pub churn: u64,
    /// Instructions in L0 are counted.
    pub count: bool,
    /// Bytes of L1's memory that the library reads are counted (VT-x), which costs instructions.
    pub count_bytes: bool,
    /// The TLB auditor is on.
    pub audit: bool,
    /// A timeline is recorded.
    pub trace: bool,
    /// One of `count`, `audit` and `trace`: the run loop asks once.
    pub observed: bool,
    /// A fault to commit.
    pub mutant: Option<Mutant>,
}

impl Shared {
    /// What the page of `gpa`, an L1 GPA, is.
    pub fn kind(&self, gpa: u64) -> Kind {
        if self.l1map.overlays.at(gpa).is_some() {
            Kind::Overlay
        } else if self.l1map.hole.contains(gpa) {
            Kind::Hole
        } else if gpa & !0xfff == hw::apic::DEFAULT_BASE {
            Kind::Apic
        } else {
            Kind::Plain
        }
    }

    /// Makes processor `cpu` leave its guest, if it runs one, or its wait.
    pub fn kick(&self, cpu: usize) {
        let Some(apic_id) = self.ipis.apic_id(cpu) else { return };
        if self.ipis.start_kick(cpu) {
            if self.trace {
                trace::record(rt::cpu::current().index as usize, trace::Event::Kick(cpu));
            }
            // SAFETY: the target runs L0, whose NMI handler counts the kick, or a guest, whose NMIs are intercepted.
            unsafe { self.apic.send_preserving_icr(apic_id, hw::apic::ICR_ASSERT | hw::apic::ICR_NMI) };
        }
    }

    /// Kicks processor n for each bit n of `cpus`.
    pub fn kick_all(&self, mut cpus: u32) {
        while cpus != 0 {
            self.kick(cpus.trailing_zeros() as usize);
            cpus &= cpus - 1;
        }
    }
}
