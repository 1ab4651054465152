//! CPUID as L1 sees it.
//!
//! Native values, except: features that follow the guest's own CR4, SVM as the library emulates it, and the
//! hypervisor leaves.

use hw::cpu::{self, CpuidResult};

use crate::shared::Shared;

/// Bits of CR4 that CPUID shows.
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;

/// CPUID of `leaf` for a guest whose CR4 is `cr4`; `shared` says what L1 is offered.
#[inline]
pub fn answer(leaf: u32, subleaf: u32, cr4: u64, shared: &Shared) -> CpuidResult {
    match leaf {
        0x8000_000a => {
            let [eax, ebx, ecx, edx] = shared.svm_leaf;
            return CpuidResult { eax, ebx, ecx, edx };
        }
        // Leaves of a hypervisor that L0 itself runs on are not L1's.
        0x4000_0000..=0x4fff_ffff => {
            let own = shared.enlighten.then(|| shared.hyperv.interface.cpuid(leaf)).flatten().unwrap_or_default();
            return CpuidResult { eax: own.eax, ebx: own.ebx, ecx: own.ecx, edx: own.edx };
        }
        _ => {}
    }
    let mut r = cpu::cpuid(leaf, subleaf);
    match leaf {
        1 => {
            // Bit 27 OSXSAVE is CR4's, bit 31 says that a hypervisor is there.
            let own = u32::from(cr4 & CR4_OSXSAVE != 0) << 27 | u32::from(shared.enlighten) << 31;
            r.ecx = r.ecx & !(1 << 27 | 1 << 31) | own;
        }
        7 if subleaf == 0 => r.ecx = r.ecx & !(1 << 4) | u32::from(cr4 & CR4_PKE != 0) << 4,
        _ => {}
    }
    r
}
