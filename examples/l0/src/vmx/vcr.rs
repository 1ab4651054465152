//! L1's control registers: L0 keeps CR0.NE and CR4.VMXE set in the guest, and shows L1 what it wrote (guest/host masks and
//! read shadows); and XCR0.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;
use hw::cpu;
use nvmx::Vmcs;
use nvmx::controls::entry;
use nvmx::field::Field;

use crate::vmx::host::VmxHost;
use crate::vmx::vp::Vp;

const PE: u64 = 1;
const ET: u64 = 1 << 4;
const NW: u64 = 1 << 29;
const CD: u64 = 1 << 30;
const PG: u64 = 1 << 31;
/// Bits of CR0 that exist; the others are ignored in the lower half.
const CR0_KNOWN: u64 = 0xe005_003f;

const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const PGE: u64 = 1 << 7;
const SMEP: u64 = 1 << 20;
/// CR4.VMXE.
pub const VMXE: u64 = 1 << 13;
const PCIDE: u64 = 1 << 17;

const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;

/// CR0 as L1 sees it.
pub fn cr0<V: Vmcs>(v: &V) -> u64 {
    let mask = v.read(Field::Cr0Mask);
    v.read(Field::GuestCr0) & !mask | v.read(Field::Cr0ReadShadow) & mask
}

/// CR4 as L1 sees it.
pub fn cr4<V: Vmcs>(v: &V) -> u64 {
    let mask = v.read(Field::Cr4Mask);
    v.read(Field::GuestCr4) & !mask | v.read(Field::Cr4ReadShadow) & mask
}

/// Makes L1's CR0 `value`, unchecked.
pub fn set_cr0<V: Vmcs>(v: &mut V, host: &VmxHost, value: u64) {
    v.write(Field::Cr0ReadShadow, value);
    v.write(Field::GuestCr0, value | host.cr0_fixed);
}

/// Makes L1's CR4 `value`, unchecked.
pub fn set_cr4<V: Vmcs>(v: &mut V, host: &VmxHost, value: u64) {
    v.write(Field::Cr4ReadShadow, value);
    v.write(Field::GuestCr4, value | host.cr4_fixed);
}

/// L1 writes CR0 with a bit that L0 keeps changed; `false`: #GP.
pub fn write_cr0(vp: &mut Vp, value: u64) -> bool {
    let value = value & (CR0_KNOWN | !0xffff_ffff) | ET;
    let illegal = value >> 32 != 0 || value & (PG | PE) == PG || value & (NW | CD) == NW;
    let v = &mut *vp.m.vmcs01;
    let (old, cr4, efer) = (cr0(v), cr4(v), v.read(Field::GuestEfer));
    let paging_on = value & !old & PG != 0;
    let paging_off = old & !value & PG != 0;
    // Long mode needs PAE, and no 64-bit code segment at its beginning; PCIDs and 64-bit code need it to stay.
    let long_code = v.read(Field::GuestCsAccessRights) & 1 << 13 != 0;
    let enters_long = paging_on && efer & LME != 0;
    if illegal
        || enters_long && (cr4 & PAE == 0 || long_code)
        || paging_off && (cr4 & PCIDE != 0 || efer & LMA != 0 && long_code)
    {
        return false;
    }
    let protected = |cr0: u64| cr0 & (PG | CD | NW);
    if value & PG != 0 && cr4 & PAE != 0 && efer & LME == 0 && protected(old) != protected(value) && !load_pdptes(vp) {
        return false;
    }
    let v = &mut *vp.m.vmcs01;
    if enters_long || paging_off {
        let controls = v.read(Field::EntryControls) & !u64::from(entry::IA32E_MODE_GUEST);
        let long = u64::from(entry::IA32E_MODE_GUEST);
        v.write(Field::EntryControls, if enters_long { controls | long } else { controls });
        v.write(Field::GuestEfer, if enters_long { efer | LMA } else { efer & !LMA });
    }
    set_cr0(v, vp.host, value);
    if (old ^ value) & (PG | PE | CD | NW) != 0 {
        vp.flush_l1();
    }
    true
}

/// L1 writes CR4 with a bit that L0 keeps changed; `false`: #GP. `vmxe`: L1 may set VMXE.
pub fn write_cr4(vp: &mut Vp, value: u64, vmxe: bool) -> bool {
    let v = &mut *vp.m.vmcs01;
    let (cr0, old, efer) = (cr0(v), cr4(v), v.read(Field::GuestEfer));
    let allowed = if vmxe { vp.host.cr4_allowed } else { vp.host.cr4_allowed & !VMXE };
    let long = efer & LMA != 0;
    let pcid_on = value & !old & PCIDE != 0;
    if value & !allowed != 0 || long && value & PAE == 0 || pcid_on && (!long || v.read(Field::GuestCr3) & 0xfff != 0) {
        return false;
    }
    let paging = |cr4: u64| cr4 & (PAE | PGE | PSE | SMEP);
    if cr0 & PG != 0 && value & PAE != 0 && !long && paging(old) != paging(value) && !load_pdptes(vp) {
        return false;
    }
    set_cr4(&mut *vp.m.vmcs01, vp.host, value);
    if paging(old) != paging(value) || old & !value & PCIDE != 0 {
        vp.flush_l1();
    }
    true
}

/// Reads the page-directory-pointer entries that PAE paging keeps in the processor; `false` when one has a reserved bit.
fn load_pdptes(vp: &mut Vp) -> bool {
    const FIELDS: [Field; 4] = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];
    let v = &mut *vp.m.vmcs01;
    let table = v.read(Field::GuestCr3) & 0xffff_ffe0;
    let reserved = !((1 << vp.shared.address_bits) - 1) | 0x1e6;
    let mut entries = [0; 4];
    for (i, entry) in (0..).zip(&mut entries) {
        *entry = vp.shared.memory.read_u64(L1Gpa::new(table + 8 * i)).unwrap_or(u64::MAX);
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return false;
        }
    }
    for (field, entry) in FIELDS.into_iter().zip(entries) {
        v.write(field, entry);
    }
    true
}

/// XSETBV of L1, whose privilege and CR4.OSXSAVE the processor has checked; `false`: #GP.
pub fn xsetbv(index: u32, value: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const MPX: u64 = 3 << 3;
    const AVX512: u64 = 7 << 5;
    const AMX: u64 = 3 << 17;
    let leaf = cpu::cpuid(0xd, 0);
    let supported = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    let all_or_none = |group: u64| matches!(value & group, bits if bits == 0 || bits == group);
    let legal = index == 0
        && value & !supported == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && (value & AVX512 == 0 || value & AVX != 0)
        && all_or_none(MPX)
        && all_or_none(AVX512)
        && all_or_none(AMX);
    if legal {
        // SAFETY: CR4.OSXSAVE is set in L0 (`Vp::new`), the value was checked, and L0 uses none of these registers.
        unsafe { cpu::xsetbv(0, value) };
    }
    legal
}
