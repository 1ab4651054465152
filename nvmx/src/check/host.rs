//! Checks on the host-state area (SDM volume 3, "Checks on Host Control Registers, MSRs", "Segment and
//! Descriptor-Table Registers", "Checks Related to Address-Space Size").

use super::{Root, ensure, pat_is_valid};
use crate::bits::{cr0, cr4, efer};
use crate::caps::Config;
use crate::controls::{entry, exit};
use crate::field::Field;
use crate::vmcs12::Vmcs12;

/// Which check on host state failed: VMfailValid 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// CR0's fixed bits.
    Cr0,
    /// CR4's fixed bits, or CR4.CET without CR0.WP.
    Cr4,
    /// CR3 beyond the physical-address width.
    Cr3,
    /// IA32_SYSENTER_ESP or IA32_SYSENTER_EIP is not canonical.
    Sysenter,
    /// Reserved bits of IA32_PERF_GLOBAL_CTRL.
    PerfGlobalCtrl,
    /// An undefined memory type in IA32_PAT.
    Pat,
    /// Reserved bits of IA32_EFER, or LMA and LME against "host address-space size".
    Efer,
    /// RPL or TI of a selector is not 0.
    Selector,
    /// CS or TR is null, or SS of a 32-bit host.
    NullSelector,
    /// A base is not canonical.
    Base,
    /// "Host address-space size" is not IA32_EFER.LMA, or "IA-32e mode guest" with a 32-bit host.
    AddressSpaceSize,
    /// CR4.PCIDE of a 32-bit host, or no CR4.PAE of a 64-bit one.
    Cr4Mode,
    /// RIP beyond 32 bits, or not canonical.
    Rip,
}

/// Checks the host-state area.
///
/// # Errors
/// The first check that fails; VMfailValid 8.
pub fn host(vmcs: &Vmcs12, config: &Config, root: Root) -> Result<(), Host> {
    let (host_cr0, host_cr4) = (vmcs.get(Field::HostCr0), vmcs.get(Field::HostCr4));
    ensure(config.allows_cr0(host_cr0, false), Host::Cr0)?;
    ensure(config.allows_cr4(host_cr4) && (host_cr4 & cr4::CET == 0 || host_cr0 & cr0::WP != 0), Host::Cr4)?;
    ensure(config.legal_gpa(vmcs.get(Field::HostCr3)), Host::Cr3)?;
    let canonical = |field| config.canonical(vmcs.get(field));
    ensure(canonical(Field::HostSysenterEsp) && canonical(Field::HostSysenterEip), Host::Sysenter)?;
    let exits = vmcs.get32(Field::ExitControls);
    let wide = exits & exit::HOST_ADDRESS_SPACE_SIZE != 0;
    msrs(vmcs, config, exits, wide)?;
    segments(vmcs, config, wide)?;
    let long_guest = vmcs.get32(Field::EntryControls) & entry::IA32E_MODE_GUEST != 0;
    ensure(wide == root.long_mode && (wide || !long_guest), Host::AddressSpaceSize)?;
    let rip = vmcs.get(Field::HostRip);
    if wide {
        ensure(host_cr4 & cr4::PAE != 0, Host::Cr4Mode)?;
        ensure(config.canonical(rip), Host::Rip)
    } else {
        ensure(host_cr4 & cr4::PCIDE == 0, Host::Cr4Mode)?;
        ensure(rip >> 32 == 0, Host::Rip)
    }
}

fn msrs(vmcs: &Vmcs12, config: &Config, exits: u32, wide: bool) -> Result<(), Host> {
    if exits & exit::LOAD_PERF_GLOBAL_CTRL != 0 {
        let value = vmcs.get(Field::HostPerfGlobalCtrl);
        ensure(value & !config.host.perf_global_ctrl == 0, Host::PerfGlobalCtrl)?;
    }
    ensure(exits & exit::LOAD_PAT == 0 || pat_is_valid(vmcs.get(Field::HostPat)), Host::Pat)?;
    if exits & exit::LOAD_EFER != 0 {
        let value = vmcs.get(Field::HostEfer);
        let long = if wide { efer::LMA | efer::LME } else { 0 };
        ensure(value & !config.host.efer == 0 && value & (efer::LMA | efer::LME) == long, Host::Efer)?;
    }
    Ok(())
}

fn segments(vmcs: &Vmcs12, config: &Config, wide: bool) -> Result<(), Host> {
    use Field::{HostCsSelector, HostDsSelector, HostEsSelector, HostFsSelector};
    use Field::{HostGsSelector, HostSsSelector, HostTrSelector};
    let selectors = [
        HostEsSelector,
        HostCsSelector,
        HostSsSelector,
        HostDsSelector,
        HostFsSelector,
        HostGsSelector,
        HostTrSelector,
    ];
    let union = selectors.into_iter().fold(0, |union, field| union | vmcs.get(field));
    ensure(union & 7 == 0, Host::Selector)?;
    let null = |field| vmcs.get(field) == 0;
    let any_null = null(HostCsSelector) || null(HostTrSelector) || !wide && null(HostSsSelector);
    ensure(!any_null, Host::NullSelector)?;
    let bases = [Field::HostFsBase, Field::HostGsBase, Field::HostTrBase, Field::HostGdtrBase, Field::HostIdtrBase];
    ensure(bases.into_iter().all(|field| config.canonical(vmcs.get(field))), Host::Base)
}
