//! CPUID as L1 sees it.
//!
//! Native values, except: features that follow the guest's own CR4, SVM as the library emulates it, and the
//! hypervisor leaves.

use hw::cpu::{self, CpuidResult};

/// Bits of CR4 that CPUID shows.
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;

/// CPUID of `leaf` for L1, whose CR4 is `cr4`; the SVM and hypervisor leaves are not answered here.
#[inline]
pub fn native(leaf: u32, subleaf: u32, cr4: u64, hypervisor: bool) -> CpuidResult {
    let mut r = cpu::cpuid(leaf, subleaf);
    match leaf {
        1 => {
            // Bit 27 OSXSAVE is CR4's, bit 31 says that a hypervisor is there.
            r.ecx =
                r.ecx & !(1 << 27 | 1 << 31) | u32::from(cr4 & CR4_OSXSAVE != 0) << 27 | u32::from(hypervisor) << 31;
        }
        7 if subleaf == 0 => r.ecx = r.ecx & !(1 << 4) | u32::from(cr4 & CR4_PKE != 0) << 4,
        _ => {}
    }
    r
}
