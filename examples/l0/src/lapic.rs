//! What L0 does to the processor's own local APIC on behalf of L1: changes of APIC_BASE, and the reset by an INIT.
//!
//! Called by the exit handlers and run loops of both vendors.

use hw::{apic, msr};

use crate::shared::Shared;

/// L1's processor `id` writes `value` to APIC_BASE, which it sees as `base`; `false`: #GP. The real APIC stays enabled
/// where it is: L0 needs it. x2APIC mode is passed on.
pub fn write_base(shared: &Shared, id: usize, base: &mut u64, value: u64) -> bool {
    const KNOWN: u64 = 0x000f_ffff_ffff_f000 | apic::BASE_ENABLE | apic::BASE_X2APIC | apic::BASE_BSP;
    let x2apic_there = hw::cpu::cpuid(1, 0).ecx & 1 << 21 != 0;
    let mode = |v: u64| (v & apic::BASE_ENABLE != 0, v & apic::BASE_X2APIC != 0);
    let legal = match (mode(*base), mode(value)) {
        (_, (false, true)) => false,
        ((_, true), (true, false)) => false,
        ((false, _), (true, true)) => false,
        (_, (_, true)) => x2apic_there,
        _ => true,
    };
    if value & !KNOWN != 0 || !legal {
        return false;
    }
    let x2apic = value & apic::BASE_X2APIC != 0;
    if x2apic != (*base & apic::BASE_X2APIC != 0) {
        // SAFETY: a legal change of mode of this processor's APIC; leaving x2APIC goes through disabled.
        unsafe {
            let real = msr::rdmsr(msr::APIC_BASE);
            if x2apic {
                msr::wrmsr(msr::APIC_BASE, real | apic::BASE_X2APIC);
            } else {
                msr::wrmsr(msr::APIC_BASE, real & !(apic::BASE_X2APIC | apic::BASE_ENABLE));
                msr::wrmsr(msr::APIC_BASE, real & !apic::BASE_X2APIC);
            }
        }
        shared.ipis.set_x2apic(id, x2apic);
    }
    *base = value;
    true
}

/// An INIT of L1's processor `id` clears the local APIC but for its id (APM volume 2, 16.3.1; SDM volume 3, "Local APIC
/// State After It Receives an INIT Reset"): local vectors masked, no timer, no logical destination, software-disabled.
pub fn reset(shared: &Shared, id: usize) {
    const LVTS: [u64; 6] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
    let a = shared.apic;
    if a.is_x2apic() {
        return;
    }
    // SAFETY: none of these sends an interrupt; the APIC is passed through to the guest being reset.
    unsafe {
        for lvt in LVTS {
            a.write(lvt, 1 << 16);
        }
        a.write(0x380, 0);
        a.write(0x3e0, 0);
        a.write(apic::reg::LDR, 0);
        a.write(apic::reg::DFR, u32::MAX);
        a.write(0x80, 0);
        for _ in 0..256 {
            a.write(apic::reg::EOI, 0);
        }
        a.write(apic::reg::SPURIOUS, 0xff);
    }
    shared.ipis.set_ldr(id, 0);
    shared.ipis.set_dfr(id, u32::MAX);
}
