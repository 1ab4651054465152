use nvmx::check::{Host, Refusal, Root};
use nvmx::controls::{entry, exit};
use nvmx::field::Field::*;
use samples::Profile;

use crate::rig::{ROOT, Sets, config, judge, table, with};

const X: u64 = 0x3_6FFB;
const TOP: u64 = 1 << 46;

fn hosts(rows: &[(Host, Sets<'_>, Sets<'_>)]) {
    table(Profile::Long, &[], Refusal::Host, rows);
}

#[test]
fn control_registers() {
    hosts(&[
        (Host::Cr0, &[(HostCr0, 0x8001_0030)], &[(HostCr0, 0x8000_0021)]),
        (Host::Cr0, &[(HostCr0, 0x8001_0011)], &[]),
        (Host::Cr0, &[(HostCr0, 0x1_8001_0031)], &[(HostCr0, 0xE001_0031)]),
        (Host::Cr4, &[(HostCr4, 0xA0)], &[(HostCr4, 0x2020)]),
        (Host::Cr4, &[(HostCr4, 0x20A0 | 1 << 15)], &[(HostCr4, 0x20A0 | 1 << 20)]),
        (
            Host::Cr4,
            &[(HostCr4, 0x20A0 | 1 << 23), (HostCr0, 0x8000_0031)],
            &[(HostCr4, 0x20A0 | 1 << 23), (HostCr0, 0x8001_0031)],
        ),
        (Host::Cr3, &[(HostCr3, TOP)], &[(HostCr3, TOP - 1)]),
        (Host::Cr4Mode, &[(HostCr4, 0x2080)], &[(HostCr4, 0x20A0)]),
    ]);
}

#[test]
fn msrs() {
    const PAT: u64 = X | exit::LOAD_PAT as u64;
    const EFER: u64 = X | exit::LOAD_EFER as u64;
    const PERF: u64 = X | exit::LOAD_PERF_GLOBAL_CTRL as u64;
    hosts(&[
        (Host::Sysenter, &[(HostSysenterEsp, 1 << 47)], &[(HostSysenterEsp, 1 << 46)]),
        (Host::Sysenter, &[(HostSysenterEip, 1 << 63)], &[(HostSysenterEip, 0xFFFF_8000_0000_0000)]),
        (Host::Pat, &[(ExitControls, PAT), (HostPat, 2)], &[(HostPat, 2)]),
        (Host::Pat, &[(ExitControls, PAT), (HostPat, 3 << 56)], &[(ExitControls, PAT), (HostPat, 7 << 56)]),
        (Host::Pat, &[(ExitControls, PAT), (HostPat, 8 << 8)], &[(ExitControls, PAT), (HostPat, 0x0706_0504_0100)]),
        (Host::Efer, &[(ExitControls, EFER), (HostEfer, 0x400)], &[(HostEfer, 0x400)]),
        (Host::Efer, &[(ExitControls, EFER), (HostEfer, 0x100)], &[(ExitControls, EFER), (HostEfer, 0x500)]),
        (Host::Efer, &[(ExitControls, EFER), (HostEfer, 0x1500)], &[(ExitControls, EFER), (HostEfer, 0xD01)]),
        (
            Host::PerfGlobalCtrl,
            &[(ExitControls, PERF), (HostPerfGlobalCtrl, 1 << 4)],
            &[(ExitControls, PERF), (HostPerfGlobalCtrl, 1 << 34 | 1 << 3)],
        ),
        (
            Host::PerfGlobalCtrl,
            &[(ExitControls, PERF), (HostPerfGlobalCtrl, 1 << 35)],
            &[(HostPerfGlobalCtrl, 1 << 35)],
        ),
    ]);
}

#[test]
fn segments() {
    for selector in
        [HostEsSelector, HostCsSelector, HostSsSelector, HostDsSelector, HostFsSelector, HostGsSelector, HostTrSelector]
    {
        for low in [1, 2, 4] {
            hosts(&[(Host::Selector, &[(selector, 0x20 | low)], &[(selector, 0x20)])]);
        }
    }
    for base in [HostFsBase, HostGsBase, HostTrBase, HostGdtrBase, HostIdtrBase] {
        hosts(&[
            (Host::Base, &[(base, 1 << 47)], &[(base, (1 << 47) - 1)]),
            (Host::Base, &[(base, 0xFFFF_7FFF_FFFF_FFFF)], &[(base, 0xFFFF_8000_0000_0000)]),
        ]);
    }
    hosts(&[
        (Host::NullSelector, &[(HostCsSelector, 0)], &[(HostSsSelector, 0)]),
        (Host::NullSelector, &[(HostTrSelector, 0)], &[(HostDsSelector, 0)]),
    ]);
}

#[test]
fn address_space_size() {
    const NARROW: u64 = X & !(exit::HOST_ADDRESS_SPACE_SIZE as u64);
    hosts(&[
        (Host::AddressSpaceSize, &[(ExitControls, NARROW)], &[]),
        (Host::Rip, &[(HostRip, 1 << 47)], &[(HostRip, (1 << 47) - 1)]),
    ]);
    // An L1 in 32-bit mode.
    let config = config();
    let root = Root { long_mode: false, ..ROOT };
    let narrow: Sets<'_> = &[(ExitControls, NARROW), (HostRip, 0x1000)];
    let got = |profile, sets: Sets<'_>| judge(&with(&config, profile, &[narrow, sets]), &config, root).map(|_| ());
    let refused = |name| Err(Refusal::Host(name));
    assert_eq!(got(Profile::Pae, &[]), Ok(()));
    assert_eq!(got(Profile::Pae, &[(ExitControls, X)]), refused(Host::AddressSpaceSize));
    assert_eq!(got(Profile::Long, &[]), refused(Host::AddressSpaceSize));
    assert_eq!(got(Profile::Pae, &[(HostRip, 1 << 32)]), refused(Host::Rip));
    assert_eq!(got(Profile::Pae, &[(HostRip, 0xFFFF_FFFF)]), Ok(()));
    assert_eq!(got(Profile::Pae, &[(HostCr4, 0x20A0 | 1 << 17)]), refused(Host::Cr4Mode));
    assert_eq!(got(Profile::Pae, &[(HostCr4, 0x2080)]), Ok(()));
    assert_eq!(got(Profile::Pae, &[(HostSsSelector, 0)]), refused(Host::NullSelector));
    let efer = |value| [(ExitControls, NARROW | exit::LOAD_EFER as u64), (HostEfer, value)];
    assert_eq!(got(Profile::Pae, &efer(0x500)), refused(Host::Efer));
    assert_eq!(got(Profile::Pae, &efer(0x800)), Ok(()));
    // A 64-bit L1 with a 32-bit guest is as good.
    assert_eq!(judge(&with(&config, Profile::Pae, &[]), &config, ROOT).map(|_| ()), Ok(()));
    assert_eq!(entry::IA32E_MODE_GUEST, exit::HOST_ADDRESS_SPACE_SIZE);
}
