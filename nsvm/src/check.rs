//! The consistency checks of VMRUN (APM volume 2, sections 15.5.1, 15.20 and 15.25): each failing one ends VMRUN with
//! exit code -1.
//!
//! They look at the copy of L1's VMCB only, and at L1's own paging mode.

use crate::caps::{Config, Features};
use crate::vmcb::bits::{Event, EventKind, S_CET_DEFINED, cr0, cr4, efer, int_ctl, misc1, misc2, np, seg};
use crate::vmcb::{Control, Save};

/// Which check failed. L1 sees exit code -1 for each; the embedder may trace it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The VMRUN intercept is clear.
    VmrunIntercept,
    /// ASID 0.
    Asid,
    /// The MSR or IO permission map reaches beyond physical memory's width.
    PermissionMap,
    /// EVENTINJ names an impossible event.
    EventInjection,
    /// V_NMI_ENABLE without the NMI intercept.
    VirtualNmi,
    /// Nested paging with paging off in L1, or nCR3 out of range.
    NestedPaging,
    /// G_PAT has an undefined memory type.
    GuestPat,
    /// EFER.SVME is clear.
    Svme,
    /// EFER has reserved bits.
    Efer,
    /// CR0.NW without CR0.CD, or CR0 bits 63:32.
    Cr0,
    /// CR3 has reserved bits.
    Cr3,
    /// CR4 has reserved bits.
    Cr4,
    /// DR6 or DR7 bits 63:32.
    Dr,
    /// Long mode without PAE or protection, or CS.L with CS.D.
    LongMode,
    /// CR4.CET without CR0.WP, or reserved bits in S_CET.
    Cet,
}

/// Checks the control area. `l1_cr0` is L1's CR0.
#[inline]
pub(crate) fn control(config: &Config, control: &Control, save: &Save, l1_cr0: u64) -> Result<(), Refusal> {
    if control.intercepts.misc2 & misc2::VMRUN == 0 {
        return Err(Refusal::VmrunIntercept);
    }
    if control.asid == 0 {
        return Err(Refusal::Asid);
    }
    if !map_fits(config, control.msrpm_base, 8 << 10) || !map_fits(config, control.iopm_base, 12 << 10) {
        return Err(Refusal::PermissionMap);
    }
    if control.event_inj & Event::VALID != 0 && !event_is_possible(Event::from_raw(control.event_inj), save) {
        return Err(Refusal::EventInjection);
    }
    if control.int_ctl & int_ctl::V_NMI_ENABLE != 0 && control.intercepts.misc1 & misc1::NMI == 0 {
        return Err(Refusal::VirtualNmi);
    }
    if control.np_control & np::ENABLE != 0 && config.offered.has(Features::NP) {
        if l1_cr0 & cr0::PG == 0 || !config.legal_gpa(control.n_cr3) {
            return Err(Refusal::NestedPaging);
        }
        if !pat_is_valid(save.g_pat) {
            return Err(Refusal::GuestPat);
        }
    }
    Ok(())
}

fn map_fits(config: &Config, base: u64, len: u64) -> bool {
    match (base & !0xFFF).checked_add(len.wrapping_sub(1)) {
        Some(last) => config.legal_gpa(last),
        None => false,
    }
}

/// True for the events that EVENTINJ may name for a guest in this state (APM section 15.20).
pub(crate) fn event_is_possible(event: Event, save: &Save) -> bool {
    match event.kind() {
        Some(EventKind::Exception) => match event.vector() {
            // The NMI, which is no exception.
            2 => false,
            // BOUND does not exist in 64-bit code.
            5 => !(save.efer & efer::LME != 0 && save.cr0 & cr0::PG != 0 && save.cs.attrib & seg::L != 0),
            vector => vector <= 31,
        },
        Some(EventKind::Interrupt | EventKind::Nmi | EventKind::Software) => true,
        None => false,
    }
}

/// True when each of the eight entries is a defined memory type: 0, 1, 4, 5, 6 or 7.
pub(crate) const fn pat_is_valid(pat: u64) -> bool {
    // Bits 7:3 of every entry are zero; of 2:0, the values 2 and 3 (bit 1 without bit 2) are undefined.
    let reserved = pat & 0xF8F8_F8F8_F8F8_F8F8;
    let undefined = pat & 0x0202_0202_0202_0202 & !((pat & 0x0404_0404_0404_0404) >> 1);
    reserved | undefined == 0
}

/// Checks the state save area.
#[inline]
pub(crate) fn save(config: &Config, save: &Save) -> Result<(), Refusal> {
    if save.efer & efer::SVME == 0 {
        return Err(Refusal::Svme);
    }
    if save.efer & !config.host.efer_valid != 0 {
        return Err(Refusal::Efer);
    }
    if save.cr0 >> 32 != 0 || save.cr0 & (cr0::CD | cr0::NW) == cr0::NW {
        return Err(Refusal::Cr0);
    }
    if !config.legal_gpa(save.cr3) {
        return Err(Refusal::Cr3);
    }
    if save.cr4 & !config.host.cr4_valid != 0 {
        return Err(Refusal::Cr4);
    }
    if (save.dr6 | save.dr7) >> 32 != 0 {
        return Err(Refusal::Dr);
    }
    if save.efer & efer::LME != 0 && save.cr0 & cr0::PG != 0 {
        let both = seg::L | seg::DB;
        if save.cr4 & cr4::PAE == 0 || save.cr0 & cr0::PE == 0 || save.cs.attrib & both == both {
            return Err(Refusal::LongMode);
        }
    }
    if save.cr4 & cr4::CET != 0 && (save.cr0 & cr0::WP == 0 || save.s_cet & !S_CET_DEFINED != 0) {
        return Err(Refusal::Cet);
    }
    Ok(())
}
