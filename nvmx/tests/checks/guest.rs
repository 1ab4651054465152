use hvcore::addr::L1Gpa;
use nvmx::check::{Guest, Refusal, Root};
use nvmx::controls::{entry, pin, primary, secondary};
use nvmx::field::Field::*;
use samples::{Profile, page};

use crate::rig::{LAYOUT, ROOT, Sets, config, guests, judge, with};

const PIN: u64 = 0x16;
const SECONDARY: u64 = 0x0400_6172 | primary::SECONDARY_CONTROLS as u64;
const LONG: u64 = 0x13FB;
const SHORT: u64 = 0x11FB;
const TOP: u64 = 1 << 46;
const IF: u64 = 1 << 9;
const TF: u64 = 1 << 8;

#[test]
fn control_registers() {
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::Cr0, &[(GuestCr0, 0x8001_0011)], &[(GuestCr0, 0x8001_0021)]),
            (Guest::Cr0, &[(GuestCr0, 0x1_8001_0031)], &[(GuestCr0, 0xE001_0031)]),
            (Guest::Cr0, &[(GuestCr0, 0x8001_0030)], &[]),
            (Guest::Cr0, &[(GuestCr0, 0x1_0031)], &[]),
            (Guest::Cr4, &[(GuestCr4, 0xA0)], &[(GuestCr4, 0x2020)]),
            (Guest::Cr4, &[(GuestCr4, 0x20A0 | 1 << 15)], &[(GuestCr4, 0x20A0 | 1 << 16)]),
            (
                Guest::Cr4,
                &[(GuestCr4, 0x20A0 | 1 << 23), (GuestCr0, 0x8000_0031)],
                &[(GuestCr4, 0x20A0 | 1 << 23), (GuestCr0, 0x8001_0031)],
            ),
            (Guest::LongModeWithoutPaging, &[(GuestCr4, 0x2080)], &[(GuestCr4, 0x2020)]),
            (Guest::Cr3, &[(GuestCr3, TOP)], &[(GuestCr3, TOP - 1)]),
            (Guest::Cr3, &[(GuestCr3, 1 << 63)], &[]),
        ],
    );
    guests(Profile::Protected, &[], &[(Guest::Pcid, &[(GuestCr4, 0x2080 | 1 << 17)], &[(GuestCr4, 0x2080 | 1 << 18)])]);
    guests(Profile::Long, &[], &[(Guest::Cr4, &[(GuestCr4, 0x20A0 | 1 << 14)], &[(GuestCr4, 0x20A0 | 1 << 17)])]);
}

#[test]
fn unrestricted_guests() {
    let unrestricted: Sets<'_> =
        &[(PrimaryControls, SECONDARY), (SecondaryControls, (secondary::EPT | secondary::UNRESTRICTED_GUEST) as u64)];
    guests(
        Profile::Flat,
        &[],
        &[
            (Guest::PagingWithoutProtection, &[(GuestCr0, 0x8000_0030)], &[(GuestCr0, 0x8000_0031)]),
            (Guest::Cr0, &[(GuestCr0, 0x11)], &[(GuestCr0, 0x21)]),
        ],
    );
    guests(
        Profile::Long,
        unrestricted,
        &[(Guest::LongModeWithoutPaging, &[(GuestCr0, 0x1_0031)], &[(GuestCr0, 0x8001_0031)])],
    );
    guests(Profile::Protected, unrestricted, &[(Guest::Cr0, &[(GuestCr0, 0x8001_0011)], &[(GuestCr0, 0x1_0031)])]);
}

#[test]
fn msrs() {
    let load = |bit: u32| (EntryControls, LONG | u64::from(bit));
    let (debug, pat, efer) = (load(entry::LOAD_DEBUG_CONTROLS), load(entry::LOAD_PAT), load(entry::LOAD_EFER));
    let (perf, bnd) = (load(entry::LOAD_PERF_GLOBAL_CTRL), load(entry::LOAD_BNDCFGS));
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::Debugctl, &[debug, (GuestDebugctl, 4)], &[(GuestDebugctl, 4)]),
            (Guest::Debugctl, &[debug, (GuestDebugctl, 1 << 16)], &[debug, (GuestDebugctl, 0xDFC3)]),
            (Guest::Dr7, &[debug, (GuestDr7, 1 << 32)], &[(GuestDr7, 1 << 32)]),
            (Guest::Dr7, &[debug, (GuestDr7, 1 << 63)], &[debug, (GuestDr7, 0xFFFF_FFFF)]),
            (Guest::Sysenter, &[(GuestSysenterEsp, 1 << 47)], &[(GuestSysenterEsp, (1 << 47) - 1)]),
            (Guest::Sysenter, &[(GuestSysenterEip, 1 << 63)], &[(GuestSysenterEip, 0xFFFF_8000_0000_0000)]),
            (Guest::Pat, &[pat, (GuestPat, 3 << 56)], &[pat, (GuestPat, 7 << 56)]),
            (Guest::Pat, &[pat, (GuestPat, 2)], &[(GuestPat, 2)]),
            (Guest::Efer, &[efer, (GuestEfer, 0x100)], &[efer, (GuestEfer, 0x500)]),
            (Guest::Efer, &[efer, (GuestEfer, 0x1500)], &[efer, (GuestEfer, 0xD01)]),
            (Guest::EferLme, &[efer, (GuestEfer, 0x400)], &[(GuestEfer, 0x400)]),
            (Guest::PerfGlobalCtrl, &[perf, (GuestPerfGlobalCtrl, 1 << 4)], &[(GuestPerfGlobalCtrl, 1 << 4)]),
            (
                Guest::PerfGlobalCtrl,
                &[perf, (GuestPerfGlobalCtrl, 1 << 35)],
                &[perf, (GuestPerfGlobalCtrl, 0x7_0000_000F)],
            ),
            (Guest::Bndcfgs, &[bnd, (GuestBndcfgs, 4)], &[bnd, (GuestBndcfgs, 3)]),
            (Guest::Bndcfgs, &[bnd, (GuestBndcfgs, 1 << 11)], &[(GuestBndcfgs, 1 << 11)]),
            (Guest::Bndcfgs, &[bnd, (GuestBndcfgs, 1 << 47)], &[bnd, (GuestBndcfgs, (1 << 47) - 4096)]),
        ],
    );
    let short = (EntryControls, SHORT | u64::from(entry::LOAD_EFER));
    guests(
        Profile::Flat,
        &[short],
        &[
            // Without paging LME may differ.
            (Guest::Efer, &[(GuestEfer, 0x400)], &[(GuestEfer, 0x100)]),
            (Guest::Efer, &[(GuestEfer, 0x500)], &[(GuestEfer, 0x900)]),
        ],
    );
    guests(Profile::Protected, &[short], &[(Guest::EferLme, &[(GuestEfer, 0x100)], &[(GuestEfer, 0x800)])]);
}

#[test]
fn tables_rip_and_flags() {
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::TableBase, &[(GuestGdtrBase, 1 << 50)], &[(GuestGdtrBase, 1 << 46)]),
            (Guest::TableBase, &[(GuestIdtrBase, 1 << 47)], &[(GuestIdtrBase, (1 << 47) - 1)]),
            (Guest::TableLimit, &[(GuestIdtrLimit, 0x1_0000)], &[(GuestIdtrLimit, 0xFFFF)]),
            (Guest::TableLimit, &[(GuestGdtrLimit, 1 << 31)], &[(GuestGdtrLimit, 0)]),
            (Guest::Rip, &[(GuestRip, 1 << 47)], &[(GuestRip, (1 << 47) - 1)]),
            (Guest::Rip, &[(GuestRip, 0xFFFF_7FFF_FFFF_FFFF)], &[(GuestRip, 0xFFFF_8000_0000_0000)]),
            (Guest::Rflags, &[(GuestRflags, 0)], &[(GuestRflags, 0x202)]),
            (Guest::Rflags, &[(GuestRflags, 0x8002)], &[(GuestRflags, 0x4002)]),
            (Guest::Rflags, &[(GuestRflags, 2 | 1 << 3)], &[(GuestRflags, 2 | 1 << 2)]),
            (Guest::Rflags, &[(GuestRflags, 2 | 1 << 5)], &[(GuestRflags, 2 | 1 << 4)]),
            (Guest::Rflags, &[(GuestRflags, 0x40_0002)], &[(GuestRflags, 0x20_0002)]),
            (Guest::Rflags, &[(GuestRflags, 2 | 1 << 63)], &[]),
            (
                Guest::InterruptFlag,
                &[(EntryInterruptionInfo, 0x8000_0030)],
                &[(EntryInterruptionInfo, 0x8000_0030), (GuestRflags, 0x202)],
            ),
            (Guest::InterruptFlag, &[(EntryInterruptionInfo, 0x8000_0030)], &[(EntryInterruptionInfo, 0x8000_0202)]),
        ],
    );
    for profile in [Profile::Compatibility, Profile::Protected, Profile::Real] {
        guests(profile, &[], &[(Guest::Rip, &[(GuestRip, 1 << 32)], &[(GuestRip, 0xFFFF_FFFF)])]);
    }
    let v86: Sets<'_> = &[(EntryControls, LONG), (GuestCr4, 0x20A0)];
    guests(Profile::Virtual8086, &[], &[(Guest::Virtual8086, v86, &[])]);
    // In real mode VM is refused as well, where the segments are those of virtual-8086 mode.
    let unrestricted: Sets<'_> = &[
        (PrimaryControls, SECONDARY),
        (SecondaryControls, (secondary::EPT | secondary::UNRESTRICTED_GUEST) as u64),
        (GuestCr0, 0x31),
    ];
    guests(Profile::Virtual8086, unrestricted, &[(Guest::Virtual8086, &[(GuestCr0, 0x30)], &[(GuestCr0, 0x31)])]);
}

#[test]
fn activity() {
    const NMI: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0202);
    const PF: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0B0E);
    const DB: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0301);
    const MC: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0312);
    const INTERRUPT: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0012);
    const MTF: (nvmx::field::Field, u64) = (EntryInterruptionInfo, 0x8000_0700);
    let state = |n| (GuestActivity, n);
    guests(
        Profile::Long,
        &[(GuestRflags, 2 | IF)],
        &[
            (Guest::Activity, &[state(4)], &[state(3)]),
            (Guest::Activity, &[state(1 << 31)], &[state(2)]),
            (Guest::InactiveInShadow, &[state(1), (GuestInterruptibility, 1)], &[(GuestInterruptibility, 1)]),
            (Guest::InactiveInShadow, &[state(2), (GuestInterruptibility, 2)], &[state(2), (GuestInterruptibility, 8)]),
            (Guest::ActivityEvent, &[state(1), PF], &[state(1), NMI]),
            (Guest::ActivityEvent, &[state(1), PF], &[state(1), INTERRUPT]),
            (
                Guest::ActivityEvent,
                &[state(1), (EntryInterruptionInfo, 0x8000_0603), (EntryInstructionLength, 1)],
                &[state(1), DB],
            ),
            (Guest::ActivityEvent, &[state(1), PF], &[state(1), MTF]),
            (Guest::ActivityEvent, &[state(1), PF], &[state(1), MC]),
            (Guest::ActivityEvent, &[state(2), DB], &[state(2), MC]),
            (Guest::ActivityEvent, &[state(2), INTERRUPT], &[state(2), NMI]),
            (Guest::ActivityEvent, &[state(2), MTF], &[state(2)]),
            (Guest::ActivityEvent, &[state(3), NMI], &[state(3)]),
            (Guest::ActivityEvent, &[state(3), MC], &[]),
        ],
    );
    guests(Profile::LongUser, &[], &[(Guest::HltDpl, &[state(1)], &[state(2)])]);
    // A state that the processor has not.
    let mut host = crate::rig::host();
    host.misc &= !(1 << 8);
    let config = nvmx::caps::Config::all(host, false, true).unwrap();
    let got = |n| judge(&with(&config, Profile::Long, &[&[state(n)]]), &config, ROOT).map(|_| ());
    assert_eq!([got(3), got(2)], [Err(Refusal::Guest(Guest::Activity)), Ok(())]);
}

#[test]
fn interruptibility() {
    let nmi = (EntryInterruptionInfo, 0x8000_0202);
    let interrupt = (EntryInterruptionInfo, 0x8000_0030);
    let blocked = |bits| (GuestInterruptibility, bits);
    let virtual_nmis = (PinBasedControls, PIN | u64::from(pin::NMI_EXITING | pin::VIRTUAL_NMIS));
    guests(
        Profile::Long,
        &[(GuestRflags, 2 | IF)],
        &[
            (Guest::Interruptibility, &[blocked(0x10)], &[blocked(8)]),
            (Guest::Interruptibility, &[blocked(1 << 31)], &[]),
            (Guest::BothShadows, &[blocked(3)], &[blocked(2)]),
            (Guest::StiShadow, &[blocked(1), (GuestRflags, 2)], &[blocked(1)]),
            (Guest::StiShadow, &[blocked(1), (GuestRflags, 2)], &[blocked(2), (GuestRflags, 2)]),
            (Guest::SmiBlocking, &[blocked(4)], &[]),
            (Guest::InterruptInShadow, &[blocked(1), interrupt], &[interrupt]),
            (Guest::InterruptInShadow, &[blocked(2), interrupt], &[blocked(8), interrupt]),
            (Guest::NmiInMovSsShadow, &[blocked(2), nmi], &[nmi]),
            (Guest::NmiInStiShadow, &[blocked(1), nmi], &[nmi]),
            (Guest::NmiBlocked, &[blocked(8), nmi, virtual_nmis], &[blocked(8), nmi]),
            (Guest::NmiBlocked, &[blocked(8), nmi, virtual_nmis], &[nmi, virtual_nmis]),
        ],
    );
}

#[test]
fn pending_debug_exceptions() {
    let pending = |bits| (GuestPendingDebugExceptions, bits);
    let shadow = (GuestInterruptibility, 2);
    let hlt = (GuestActivity, 1);
    let steps = (GuestRflags, 2 | TF);
    let btf = (GuestDebugctl, 2);
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::PendingDebug, &[pending(0x10)], &[pending(0x100F)]),
            (Guest::PendingDebug, &[pending(1 << 11)], &[pending(1 << 12)]),
            (Guest::PendingDebug, &[pending(1 << 13)], &[pending(1 << 14)]),
            (Guest::PendingDebug, &[pending(1 << 15)], &[]),
            (Guest::PendingDebug, &[pending(1 << 17)], &[]),
            (Guest::PendingDebug, &[pending(1 << 63)], &[]),
            (Guest::PendingSingleStep, &[shadow, steps], &[shadow, steps, pending(1 << 14)]),
            (Guest::PendingSingleStep, &[shadow, pending(1 << 14)], &[pending(1 << 14)]),
            (Guest::PendingSingleStep, &[hlt, steps], &[steps]),
            (Guest::PendingSingleStep, &[hlt, pending(1 << 14)], &[hlt]),
            (Guest::PendingSingleStep, &[shadow, steps, btf, pending(1 << 14)], &[shadow, steps, btf]),
            (Guest::PendingRtm, &[pending(1 << 16)], &[pending(0x1_1000)]),
            (Guest::PendingRtm, &[pending(0x1_1001)], &[]),
            (Guest::PendingRtm, &[pending(0x1_1000), shadow], &[pending(0x1000), shadow]),
        ],
    );
    let mut host = crate::rig::host();
    host.rtm = false;
    let config = nvmx::caps::Config::all(host, false, true).unwrap();
    let got = |bits| judge(&with(&config, Profile::Long, &[&[pending(bits)]]), &config, ROOT).map(|_| ());
    assert_eq!([got(0x1_1000), got(0x1000)], [Err(Refusal::Guest(Guest::PendingRtm)), Ok(())]);
}

#[test]
fn link_pointer() {
    let to = |address| (VmcsLinkPointer, address);
    guests(
        Profile::Long,
        &[],
        &[
            (Guest::LinkPointer, &[to(LAYOUT.page(page::VMCS) + 8)], &[to(LAYOUT.page(page::VMCS))]),
            (Guest::LinkPointer, &[to(TOP)], &[to(u64::MAX)]),
            (Guest::LinkPointer, &[to(u64::MAX - 1)], &[]),
            (Guest::LinkRevision, &[to(LAYOUT.page(page::WRONG_VMCS))], &[to(LAYOUT.page(page::VMCS))]),
            // A shadow VMCS needs "VMCS shadowing", which is not offered.
            (Guest::LinkRevision, &[to(LAYOUT.page(page::SHADOW_VMCS))], &[to(LAYOUT.page(page::VMCS))]),
            (Guest::LinkRevision, &[to(0x5000)], &[]),
            (Guest::LinkCurrent, &[to(LAYOUT.current)], &[]),
        ],
    );
    // The same address is good when another VMCS is current.
    let config = config();
    let vmcs = with(&config, Profile::Long, &[&[to(LAYOUT.page(page::VMCS))]]);
    let got = |current| judge(&vmcs, &config, Root { current: L1Gpa::new(current), ..ROOT }).map(|_| ());
    assert_eq!(got(LAYOUT.page(page::VMCS)), Err(Refusal::Guest(Guest::LinkCurrent)));
    assert_eq!(got(LAYOUT.page(page::PML)), Ok(()));
}

#[test]
fn pdptes() {
    let table = |n: u64| (GuestCr3, LAYOUT.page(page::PDPT) + n * 32);
    let empty = LAYOUT.page(page::EMPTY);
    guests(
        Profile::Pae,
        &[],
        &[
            (Guest::Pdpte, &[table(2)], &[table(1)]),
            (Guest::Pdpte, &[table(3)], &[table(0)]),
            (Guest::Pdpte, &[table(4)], &[table(5)]),
            (Guest::Pdpte, &[table(6)], &[]),
            (Guest::Pdpte, &[table(7)], &[]),
            // No memory: all ones.
            (Guest::Pdpte, &[(GuestCr3, 0x5000)], &[]),
        ],
    );
    let ept: Sets<'_> = &[(PrimaryControls, SECONDARY), (SecondaryControls, secondary::EPT as u64), table(2)];
    guests(
        Profile::Pae,
        ept,
        &[
            (Guest::Pdpte, &[(GuestPdpte0, 1 | 2)], &[(GuestPdpte0, 2)]),
            (Guest::Pdpte, &[(GuestPdpte1, 1 | 1 << 5)], &[(GuestPdpte1, 1 | 1 << 3 | 1 << 4)]),
            (Guest::Pdpte, &[(GuestPdpte2, 1 | 1 << 8)], &[(GuestPdpte2, 1 | 0xE00)]),
            (Guest::Pdpte, &[(GuestPdpte3, 1 | TOP)], &[(GuestPdpte3, 1 | (TOP / 2))]),
            (Guest::Pdpte, &[(GuestPdpte3, 1 | 1 << 63)], &[(GuestPdpte3, 1 << 63)]),
        ],
    );
    // Which ones the guest gets.
    let config = config();
    let of_memory = judge(&with(&config, Profile::Pae, &[&[table(1)]]), &config, ROOT);
    assert_eq!(of_memory, Ok(Some([1 | empty, 0, 0, 1 | empty])));
    let of_vmcs = judge(&with(&config, Profile::Pae, &[ept, &[(GuestPdpte2, 0x7001)]]), &config, ROOT);
    assert_eq!(of_vmcs, Ok(Some([0, 0, 0x7001, 0])));
    for profile in [Profile::Long, Profile::Protected, Profile::Flat] {
        assert_eq!(judge(&with(&config, profile, &[&[(GuestPdpte0, 3)]]), &config, ROOT), Ok(None), "{profile:?}");
    }
}

#[test]
fn qualifications() {
    for (refusal, qualification) in [
        (Guest::Cr0, 0),
        (Guest::NmiInMovSsShadow, 0),
        (Guest::Pdpte, 2),
        (Guest::NmiInStiShadow, 3),
        (Guest::LinkPointer, 4),
        (Guest::LinkRevision, 4),
        (Guest::LinkCurrent, 4),
    ] {
        assert_eq!(refusal.qualification(), qualification, "{refusal:?}");
    }
}
