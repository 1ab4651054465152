//! What all processors share of SVM: what the hardware has, and what L1 is offered of it. Built once, at boot.

use hvcore::partition::NestedCapabilities;
use hw::{cpu, svm};
use nsvm::caps::{Config, Features, Host};
use nsvm::vmcb::bits::efer;

use crate::fatal::give_up;
use crate::permissions::{IOPM01, MSRPM01};
use crate::relocate::phys_of;

/// SVM of this machine.
#[derive(Debug)]
pub struct SvmHost {
    /// CPUID leaf 0x8000_000A of the hardware.
    pub leaf: cpu::CpuidResult,
    /// What L1 is offered.
    pub config: Config,
    /// Physical address of the MSR permission map of L1.
    pub msrpm01: u64,
    /// Physical address of the IO permission map of L1.
    pub iopm01: u64,
}

impl SvmHost {
    /// What L1 is offered for its guests.
    pub const ENLIGHTENMENTS: NestedCapabilities =
        NestedCapabilities { direct_flush: true, msr_bitmap: true, npt_tlb: true, ..NestedCapabilities::NONE };

    /// `None` without SVM.
    pub fn new(address_bits: u32, enlighten: bool) -> Option<Self> {
        let leaf = svm::capabilities()?;
        if leaf.edx & 1 == 0 {
            give_up(format_args!("this processor has no nested paging"));
        }
        Some(Self {
            leaf,
            config: config(leaf, address_bits, enlighten),
            msrpm01: phys_of(&raw const MSRPM01),
            iopm01: phys_of(&raw const IOPM01),
        })
    }
}

/// What L1 is offered of SVM: all that this processor and the library have.
fn config(svm: cpu::CpuidResult, address_bits: u32, enlighten: bool) -> Config {
    let (basic, structured, extended) = (cpu::cpuid(1, 0), cpu::cpuid(7, 0), cpu::cpuid(0x8000_0001, 0));
    let bit = |word: u32, bit: u32| word >> bit & 1 != 0;
    let cr4_bits = [
        (11, bit(structured.ecx, 2)),
        (12, bit(structured.ecx, 16)),
        (16, bit(structured.ebx, 0)),
        (17, bit(basic.ecx, 17)),
        (18, bit(basic.ecx, 26)),
        (20, bit(structured.ebx, 7)),
        (21, bit(structured.ebx, 20)),
        (22, bit(structured.ecx, 3)),
        (23, bit(structured.ecx, 7)),
    ];
    // VME to OSXMMEXCPT are in every processor with SVM.
    let cr4_valid = cr4_bits.iter().filter(|(_, has)| *has).fold(0x7ff, |bits, (n, _)| bits | 1 << n);
    let mut efer_valid = efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::SVME;
    if bit(extended.edx, 25) {
        efer_valid |= efer::FFXSR;
    }
    if bit(extended.ecx, 17) {
        efer_valid |= efer::TCE;
    }
    let host = Host {
        features: Features::from_edx(svm.edx),
        phys_bits: address_bits as u8,
        cr4_valid,
        efer_valid,
        intercepts: Host::intercepts_of(
            bit(extended.edx, 27),
            bit(basic.ecx, 3),
            bit(basic.ecx, 26),
            bit(cpu::cpuid(0x8000_0008, 0).ebx, 4),
            bit(structured.ebx, 10),
        ),
    };
    match Config::all(host, svm.ebx, enlighten) {
        Ok(config) => config,
        Err(error) => give_up(format_args!("SVM cannot be offered to L1: {error:?}")),
    }
}
