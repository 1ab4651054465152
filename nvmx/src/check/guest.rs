//! Checks on the guest-state area (SDM volume 3, "Checking the Guest State"), segments apart.

use super::event::injected;
use super::{Root, address, ensure, pat_is_valid, secondary_controls, segments, unrestricted, word};
use crate::bits::{access_rights, activity, cr0, cr4, efer, interruptibility, interruption, pending_debug, rflags};
use crate::caps::{Config, misc};
use crate::controls::{entry, pin, secondary};
use crate::field::Field;
use crate::vmcs12::{REVISION, Vmcs12};
use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

/// Which check on guest state failed: exit reason 0x8000_0021.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// CR0's fixed bits.
    Cr0,
    /// CR0.PG without CR0.PE.
    PagingWithoutProtection,
    /// CR4's fixed bits, or CR4.CET without CR0.WP.
    Cr4,
    /// Reserved bits of IA32_DEBUGCTL.
    Debugctl,
    /// "IA-32e mode guest" without CR0.PG or CR4.PAE.
    LongModeWithoutPaging,
    /// CR4.PCIDE outside IA-32e mode.
    Pcid,
    /// CR3 beyond the physical-address width.
    Cr3,
    /// DR7 bits 63:32.
    Dr7,
    /// IA32_SYSENTER_ESP or IA32_SYSENTER_EIP is not canonical.
    Sysenter,
    /// Reserved bits of IA32_PERF_GLOBAL_CTRL.
    PerfGlobalCtrl,
    /// An undefined memory type in IA32_PAT.
    Pat,
    /// Reserved bits of IA32_EFER, or LMA against "IA-32e mode guest".
    Efer,
    /// IA32_EFER.LMA is not LME with paging on.
    EferLme,
    /// Reserved bits of IA32_BNDCFGS, or its address.
    Bndcfgs,
    /// TI of TR's selector.
    TrSelector,
    /// TI of LDTR's selector.
    LdtrSelector,
    /// The RPLs of SS and CS differ.
    SsRpl,
    /// A base in virtual-8086 mode is not 16 times the selector.
    Virtual8086Base,
    /// A limit in virtual-8086 mode is not 0xFFFF.
    Virtual8086Limit,
    /// Access rights in virtual-8086 mode are not 0xF3.
    Virtual8086Rights,
    /// The base of TR, FS, GS or LDTR is not canonical.
    CanonicalBase,
    /// Bits 63:32 of the base of CS, SS, DS or ES.
    Base,
    /// The type of CS, SS, DS, ES, FS or GS.
    SegmentType,
    /// S = 0, or not present.
    SegmentPresent,
    /// G against the limit.
    Granularity,
    /// DPL of CS.
    CsDpl,
    /// CS with L and D in IA-32e mode.
    CsLAndD,
    /// DPL of SS.
    SsDpl,
    /// DPL of DS, ES, FS or GS below the RPL.
    DataDpl,
    /// Access rights of TR.
    TrRights,
    /// Access rights of LDTR.
    LdtrRights,
    /// The base of GDTR or IDTR is not canonical.
    TableBase,
    /// Bits 31:16 of the limit of GDTR or IDTR.
    TableLimit,
    /// RIP beyond 32 bits, or not canonical.
    Rip,
    /// Reserved bits of RFLAGS.
    Rflags,
    /// RFLAGS.VM in IA-32e mode or with CR0.PE = 0.
    Virtual8086,
    /// An external interrupt is injected with RFLAGS.IF = 0.
    InterruptFlag,
    /// An activity state that is not supported.
    Activity,
    /// HLT with a DPL of SS above 0.
    HltDpl,
    /// Not active while STI or MOV SS blocks.
    InactiveInShadow,
    /// An event that this activity state would block is injected.
    ActivityEvent,
    /// Reserved bits of the interruptibility state.
    Interruptibility,
    /// Blocking by STI and by MOV SS.
    BothShadows,
    /// Blocking by STI with RFLAGS.IF = 0.
    StiShadow,
    /// Blocking by SMI outside SMM.
    SmiBlocking,
    /// An external interrupt is injected in a shadow.
    InterruptInShadow,
    /// An NMI is injected while MOV SS blocks.
    NmiInMovSsShadow,
    /// An NMI is injected while STI blocks: qualification 3.
    NmiInStiShadow,
    /// An NMI is injected while virtual NMIs are blocked.
    NmiBlocked,
    /// Reserved bits of the pending debug exceptions.
    PendingDebug,
    /// The pending debug exceptions' BS against RFLAGS.TF and BTF.
    PendingSingleStep,
    /// The pending debug exceptions' RTM bit.
    PendingRtm,
    /// The VMCS link pointer's address: qualification 4.
    LinkPointer,
    /// The revision of the VMCS that it names: qualification 4.
    LinkRevision,
    /// It names the current VMCS: qualification 4.
    LinkCurrent,
    /// Reserved bits of a PDPTE: qualification 2.
    Pdpte,
}

impl Guest {
    /// The exit qualification.
    #[inline]
    pub const fn qualification(self) -> u64 {
        match self {
            Guest::Pdpte => 2,
            Guest::NmiInStiShadow => 3,
            Guest::LinkPointer | Guest::LinkRevision | Guest::LinkCurrent => 4,
            _ => 0,
        }
    }
}

/// Checks the guest-state area.
///
/// Yields the PDPTEs of a guest that uses PAE paging: those of the VMCS with EPT, else those in memory, read once.
///
/// # Errors
/// The first check that fails; exit reason 0x8000_0021 with [`Guest::qualification`].
pub fn guest<M: GuestMemory + ?Sized>(
    vmcs: &Vmcs12,
    config: &Config,
    root: Root,
    memory: &M,
) -> Result<Option<[u64; 4]>, Guest> {
    let entries = vmcs.get32(Field::EntryControls);
    let long = entries & entry::IA32E_MODE_GUEST != 0;
    registers(vmcs, config, entries, long)?;
    segments::check(vmcs, config, long)?;
    tables(vmcs, config)?;
    rip_and_rflags(vmcs, config, long)?;
    activity_state(vmcs, config)?;
    interruptibility_state(vmcs)?;
    pending_exceptions(vmcs, config)?;
    link(vmcs, config, root, memory)?;
    pdptes(vmcs, config, long, memory)
}

fn registers(vmcs: &Vmcs12, config: &Config, entries: u32, long: bool) -> Result<(), Guest> {
    let (guest_cr0, guest_cr4) = (vmcs.get(Field::GuestCr0), vmcs.get(Field::GuestCr4));
    ensure(config.allows_cr0(guest_cr0, unrestricted(vmcs)), Guest::Cr0)?;
    ensure(guest_cr0 & (cr0::PG | cr0::PE) != cr0::PG, Guest::PagingWithoutProtection)?;
    ensure(config.allows_cr4(guest_cr4) && (guest_cr4 & cr4::CET == 0 || guest_cr0 & cr0::WP != 0), Guest::Cr4)?;
    if long {
        ensure(guest_cr0 & cr0::PG != 0 && guest_cr4 & cr4::PAE != 0, Guest::LongModeWithoutPaging)?;
    } else {
        ensure(guest_cr4 & cr4::PCIDE == 0, Guest::Pcid)?;
    }
    ensure(config.legal_gpa(vmcs.get(Field::GuestCr3)), Guest::Cr3)?;
    let canonical = |field| config.canonical(vmcs.get(field));
    ensure(canonical(Field::GuestSysenterEsp) && canonical(Field::GuestSysenterEip), Guest::Sysenter)?;
    if entries & entry::LOAD_DEBUG_CONTROLS != 0 {
        ensure(vmcs.get(Field::GuestDebugctl) & !config.host.debugctl == 0, Guest::Debugctl)?;
        ensure(vmcs.get(Field::GuestDr7) >> 32 == 0, Guest::Dr7)?;
    }
    msrs(vmcs, config, entries, long)
}

fn msrs(vmcs: &Vmcs12, config: &Config, entries: u32, long: bool) -> Result<(), Guest> {
    if entries & entry::LOAD_PERF_GLOBAL_CTRL != 0 {
        let value = vmcs.get(Field::GuestPerfGlobalCtrl);
        ensure(value & !config.host.perf_global_ctrl == 0, Guest::PerfGlobalCtrl)?;
    }
    ensure(entries & entry::LOAD_PAT == 0 || pat_is_valid(vmcs.get(Field::GuestPat)), Guest::Pat)?;
    if entries & entry::LOAD_EFER != 0 {
        let value = vmcs.get(Field::GuestEfer);
        let (lma, lme) = (value & efer::LMA != 0, value & efer::LME != 0);
        ensure(value & !config.host.efer == 0 && lma == long, Guest::Efer)?;
        ensure(lma == lme || vmcs.get(Field::GuestCr0) & cr0::PG == 0, Guest::EferLme)?;
    }
    if entries & entry::LOAD_BNDCFGS != 0 {
        let value = vmcs.get(Field::GuestBndcfgs);
        ensure(value & 0xFFC == 0 && config.canonical(value & !0xFFF), Guest::Bndcfgs)?;
    }
    Ok(())
}

fn tables(vmcs: &Vmcs12, config: &Config) -> Result<(), Guest> {
    let canonical = |field| config.canonical(vmcs.get(field));
    ensure(canonical(Field::GuestGdtrBase) && canonical(Field::GuestIdtrBase), Guest::TableBase)?;
    let limits = vmcs.get32(Field::GuestGdtrLimit) | vmcs.get32(Field::GuestIdtrLimit);
    ensure(limits >> 16 == 0, Guest::TableLimit)
}

/// RFLAGS bits that are 0 or 1: 63:22, 15, 5, 3 and 1.
const RFLAGS_FIXED: u64 = 0xFFFF_FFFF_FFC0_802A;

fn rip_and_rflags(vmcs: &Vmcs12, config: &Config, long: bool) -> Result<(), Guest> {
    let rip = vmcs.get(Field::GuestRip);
    let wide = long && vmcs.get32(Field::GuestCsAccessRights) & access_rights::L != 0;
    ensure(if wide { config.canonical(rip) } else { rip >> 32 == 0 }, Guest::Rip)?;
    let flags = vmcs.get(Field::GuestRflags);
    ensure(flags & RFLAGS_FIXED == 2, Guest::Rflags)?;
    let real = vmcs.get(Field::GuestCr0) & cr0::PE == 0;
    ensure(flags & rflags::VM == 0 || !long && !real, Guest::Virtual8086)?;
    let interrupt = matches!(injected(vmcs), Some((interruption::EXTERNAL, _)));
    ensure(!interrupt || flags & rflags::IF != 0, Guest::InterruptFlag)
}

/// Blocking of events for one instruction.
const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;

fn activity_state(vmcs: &Vmcs12, config: &Config) -> Result<(), Guest> {
    let state = vmcs.get32(Field::GuestActivity);
    if state == 0 {
        return Ok(());
    }
    let offered = match state {
        activity::HLT => misc::HLT,
        activity::SHUTDOWN => misc::SHUTDOWN,
        activity::WAIT_FOR_SIPI => misc::WAIT_FOR_SIPI,
        _ => 0,
    };
    ensure(config.misc() & offered != 0, Guest::Activity)?;
    let ss_dpl = segments::dpl(vmcs.get32(Field::GuestSsAccessRights));
    ensure(state != activity::HLT || ss_dpl == 0, Guest::HltDpl)?;
    ensure(vmcs.get32(Field::GuestInterruptibility) & SHADOW == 0, Guest::InactiveInShadow)?;
    let allowed = match (state, injected(vmcs)) {
        (_, None) => true,
        (activity::HLT, Some(event)) => {
            matches!(
                event,
                (interruption::EXTERNAL | interruption::NMI | interruption::OTHER, _)
                    | (interruption::HARDWARE_EXCEPTION, 1 | 18)
            )
        }
        (activity::SHUTDOWN, Some(event)) => {
            matches!(event, (interruption::NMI, _) | (interruption::HARDWARE_EXCEPTION, 18))
        }
        _ => false,
    };
    ensure(allowed, Guest::ActivityEvent)
}

fn interruptibility_state(vmcs: &Vmcs12) -> Result<(), Guest> {
    let state = vmcs.get32(Field::GuestInterruptibility);
    if state == 0 {
        return Ok(());
    }
    // Bit 4, enclave interruption, is for processors with SGX, which is not offered.
    ensure(state >> 4 == 0, Guest::Interruptibility)?;
    let has = |bit| state & bit != 0;
    let (sti, mov_ss, nmi) = (has(interruptibility::STI), has(interruptibility::MOV_SS), has(interruptibility::NMI));
    ensure(!(sti && mov_ss), Guest::BothShadows)?;
    ensure(!sti || vmcs.get(Field::GuestRflags) & rflags::IF != 0, Guest::StiShadow)?;
    ensure(!has(interruptibility::SMI), Guest::SmiBlocking)?;
    match injected(vmcs) {
        Some((interruption::EXTERNAL, _)) => ensure(!sti && !mov_ss, Guest::InterruptInShadow),
        Some((interruption::NMI, _)) => {
            ensure(!mov_ss, Guest::NmiInMovSsShadow)?;
            ensure(!sti, Guest::NmiInStiShadow)?;
            let virtual_nmis = vmcs.get32(Field::PinBasedControls) & pin::VIRTUAL_NMIS != 0;
            ensure(!(nmi && virtual_nmis), Guest::NmiBlocked)
        }
        _ => Ok(()),
    }
}

/// Pending debug exceptions: B0 to B3, enabled breakpoint, BS, RTM.
const PENDING: u64 = 0x1_500F;
const RTM: u64 = 1 << 16;
/// IA32_DEBUGCTL.BTF: single steps trap on branches only.
const BTF: u64 = 1 << 1;

fn pending_exceptions(vmcs: &Vmcs12, config: &Config) -> Result<(), Guest> {
    let pending = vmcs.get(Field::GuestPendingDebugExceptions);
    ensure(pending & !PENDING == 0, Guest::PendingDebug)?;
    let state = vmcs.get32(Field::GuestInterruptibility);
    if state & SHADOW != 0 || vmcs.get32(Field::GuestActivity) == activity::HLT {
        let steps = vmcs.get(Field::GuestRflags) & rflags::TF != 0 && vmcs.get(Field::GuestDebugctl) & BTF == 0;
        ensure((pending & pending_debug::BS != 0) == steps, Guest::PendingSingleStep)?;
    }
    if pending & RTM != 0 {
        // Nothing else is pending then, but the enabled breakpoint (bit 12), which must be.
        let alone = pending == RTM | 1 << 12;
        ensure(config.host.rtm && alone && state & interruptibility::MOV_SS == 0, Guest::PendingRtm)?;
    }
    Ok(())
}

fn link<M: GuestMemory + ?Sized>(vmcs: &Vmcs12, config: &Config, root: Root, memory: &M) -> Result<(), Guest> {
    let link = vmcs.get(Field::VmcsLinkPointer);
    if link == u64::MAX {
        return Ok(());
    }
    ensure(address(config, link, 4096), Guest::LinkPointer)?;
    ensure(L1Gpa::new(link) != root.current, Guest::LinkCurrent)?;
    // A shadow VMCS would need "VMCS shadowing", which is not offered.
    ensure(word(memory, link) == REVISION, Guest::LinkRevision)
}

fn pdptes<M: GuestMemory + ?Sized>(
    vmcs: &Vmcs12,
    config: &Config,
    long: bool,
    memory: &M,
) -> Result<Option<[u64; 4]>, Guest> {
    if long || vmcs.get(Field::GuestCr0) & cr0::PG == 0 || vmcs.get(Field::GuestCr4) & cr4::PAE == 0 {
        return Ok(None);
    }
    let entries = if secondary_controls(vmcs) & secondary::EPT != 0 {
        [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3].map(|field| vmcs.get(field))
    } else {
        read_pdptes(vmcs.get(Field::GuestCr3), memory)
    };
    ensure(pdptes_are_legal(config, &entries), Guest::Pdpte)?;
    Ok(Some(entries))
}

fn pdptes_are_legal(config: &Config, entries: &[u64; 4]) -> bool {
    entries.iter().all(|entry| entry & 1 == 0 || entry & 0x1E6 == 0 && config.legal_gpa(*entry))
}

/// The four PDPTEs that `cr3` points to; `None` when one has reserved bits set.
pub(crate) fn pdptes_at<M: GuestMemory + ?Sized>(config: &Config, cr3: u64, memory: &M) -> Option<[u64; 4]> {
    Some(read_pdptes(cr3, memory)).filter(|entries| pdptes_are_legal(config, entries))
}

/// The four PDPTEs that CR3 points to, 32-byte aligned below 4 GiB; all ones where there is no memory.
fn read_pdptes<M: GuestMemory + ?Sized>(cr3: u64, memory: &M) -> [u64; 4] {
    let mut bytes = [0; 32];
    if memory.read(L1Gpa::new(cr3 & 0xFFFF_FFE0), &mut bytes).is_err() {
        return [u64::MAX; 4];
    }
    let mut entries = [0; 4];
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    entries
}
