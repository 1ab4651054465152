//! Valid VMCS12s.

use crate::{Host, Layout, Rng, page, some_of};
use nvmx::caps::Config;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::field::Field;
use nvmx::vmcs12::Vmcs12;

/// A kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// 64-bit mode, CPL 0.
    Long,
    /// 64-bit mode, CPL 3.
    LongUser,
    /// Compatibility mode.
    Compatibility,
    /// Protected mode with PAE paging.
    Pae,
    /// Protected mode with 32-bit paging.
    Protected,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode without paging: an unrestricted guest.
    Flat,
    /// Real mode: an unrestricted guest.
    Real,
}

impl Profile {
    /// All kinds.
    pub const ALL: [Profile; 8] = [
        Profile::Long,
        Profile::LongUser,
        Profile::Compatibility,
        Profile::Pae,
        Profile::Protected,
        Profile::Virtual8086,
        Profile::Flat,
        Profile::Real,
    ];

    /// True for what only an unrestricted guest may be.
    pub const fn needs_unrestricted(self) -> bool {
        matches!(self, Profile::Flat | Profile::Real)
    }

    const fn is_long(self) -> bool {
        matches!(self, Profile::Long | Profile::LongUser | Profile::Compatibility)
    }
}

/// A VMCS12 that enters: the least that `config` requires, for a guest of kind `profile`.
pub fn valid(config: &Config, layout: &Layout, profile: Profile) -> Vmcs12 {
    let mut v = Vmcs12::default();
    let mut set = |field, value| v.set(field, value);
    set(Field::PinBasedControls, u64::from(config.pin().required));
    set(Field::PrimaryControls, u64::from(config.primary().required));
    set(Field::ExitControls, u64::from(config.exit().required | exit::HOST_ADDRESS_SPACE_SIZE));
    set(Field::EntryControls, u64::from(config.entry().required));
    set(Field::ExceptionBitmap, u64::from(u32::MAX));
    pointers(&mut v, layout);
    host(&mut v, &layout.host);
    guest(&mut v, layout, profile);
    if profile.is_long() {
        or(&mut v, Field::EntryControls, entry::IA32E_MODE_GUEST);
    }
    if profile.needs_unrestricted() {
        or(&mut v, Field::PrimaryControls, primary::SECONDARY_CONTROLS);
        or(&mut v, Field::SecondaryControls, secondary::EPT | secondary::UNRESTRICTED_GUEST);
    }
    v
}

fn or(v: &mut Vmcs12, field: Field, bits: u32) {
    v.set(field, v.get(field) | u64::from(bits));
}

/// Everything that a control may give a meaning to is good, whether the control is set or not.
fn pointers(v: &mut Vmcs12, layout: &Layout) {
    let empty = layout.page(page::EMPTY);
    for (field, value) in [
        (Field::IoBitmapA, empty),
        (Field::IoBitmapB, empty),
        (Field::MsrBitmap, empty),
        (Field::VirtualApicAddress, layout.page(page::VIRTUAL_APIC)),
        (Field::ApicAccessAddress, layout.page(page::APIC_ACCESS)),
        (Field::PmlAddress, layout.page(page::PML)),
        (Field::PmlIndex, 511),
        (Field::EptpListAddress, empty),
        (Field::VmreadBitmap, empty),
        (Field::VmwriteBitmap, empty),
        (Field::EptPointer, empty | 0x1E),
        (Field::VirtualProcessorId, 1),
        (Field::TscMultiplier, 1 << 48),
        (Field::ExitMsrStoreAddress, layout.page(page::STORE)),
        (Field::ExitMsrLoadAddress, layout.page(page::MSRS)),
        (Field::EntryMsrLoadAddress, layout.page(page::MSRS)),
        (Field::VmcsLinkPointer, u64::MAX),
    ] {
        v.set(field, value);
    }
}

fn host(v: &mut Vmcs12, host: &Host) {
    let [cs, data, tr] = host.selectors.map(u64::from);
    let [fs_base, gs_base, tr_base, gdtr, idtr] = host.bases;
    for (field, value) in [
        (Field::HostEsSelector, data),
        (Field::HostCsSelector, cs),
        (Field::HostSsSelector, data),
        (Field::HostDsSelector, data),
        (Field::HostTrSelector, tr),
        (Field::HostPat, host.pat),
        (Field::HostEfer, host.efer),
        (Field::HostCr0, host.cr0),
        (Field::HostCr3, host.cr3),
        (Field::HostCr4, host.cr4),
        (Field::HostFsBase, fs_base),
        (Field::HostGsBase, gs_base),
        (Field::HostTrBase, tr_base),
        (Field::HostGdtrBase, gdtr),
        (Field::HostIdtrBase, idtr),
        (Field::HostRsp, host.rsp),
        (Field::HostRip, host.rip),
    ] {
        v.set(field, value);
    }
}

/// The six segments of code and data, in the order of their fields: selector, limit, access rights, base.
pub(crate) const SEGMENTS: [[Field; 4]; 6] = [
    [Field::GuestEsSelector, Field::GuestEsLimit, Field::GuestEsAccessRights, Field::GuestEsBase],
    [Field::GuestCsSelector, Field::GuestCsLimit, Field::GuestCsAccessRights, Field::GuestCsBase],
    [Field::GuestSsSelector, Field::GuestSsLimit, Field::GuestSsAccessRights, Field::GuestSsBase],
    [Field::GuestDsSelector, Field::GuestDsLimit, Field::GuestDsAccessRights, Field::GuestDsBase],
    [Field::GuestFsSelector, Field::GuestFsLimit, Field::GuestFsAccessRights, Field::GuestFsBase],
    [Field::GuestGsSelector, Field::GuestGsLimit, Field::GuestGsAccessRights, Field::GuestGsBase],
];

fn guest(v: &mut Vmcs12, layout: &Layout, profile: Profile) {
    let (cr0, cr4, efer, rflags) = match profile {
        Profile::Long | Profile::LongUser | Profile::Compatibility => (0x8001_0031, 0x20A0, 0xD00, 2),
        Profile::Pae => (0x8001_0031, 0x20A0, 0, 2),
        Profile::Protected => (0x8001_0031, 0x2080, 0, 2),
        Profile::Virtual8086 => (0x8001_0031, 0x2080, 0, 2 | 1 << 17),
        Profile::Flat => (0x31, 0x2000, 0, 2),
        Profile::Real => (0x30, 0x2000, 0, 2),
    };
    for [selector, limit, rights, base] in SEGMENTS {
        let code = selector == Field::GuestCsSelector;
        let (s, l, r, b) = match profile {
            Profile::Virtual8086 | Profile::Real => {
                let rights = if profile == Profile::Virtual8086 { 0xF3 } else { if code { 0x9B } else { 0x93 } };
                (0x100, 0xFFFF, rights, 0x1000)
            }
            Profile::LongUser => (if code { 0x33 } else { 0x2B }, 0xFFFF_FFFF, if code { 0xA0FB } else { 0xC0F3 }, 0),
            Profile::Long if code => (8, 0xFFFF_FFFF, 0xA09B, 0),
            _ => (if code { 8 } else { 16 }, 0xFFFF_FFFF, if code { 0xC09B } else { 0xC093 }, 0),
        };
        v.set(selector, s);
        v.set(limit, l);
        v.set(rights, r);
        v.set(base, b);
    }
    for (field, value) in [
        (Field::GuestCr0, cr0),
        (Field::GuestCr3, if profile == Profile::Pae { layout.page(page::PDPT) } else { layout.page(page::EMPTY) }),
        (Field::GuestCr4, cr4),
        (Field::GuestEfer, efer),
        (Field::GuestRflags, rflags),
        (Field::GuestPat, 0x0007_0406_0007_0406),
        (Field::GuestDr7, 0x400),
        (Field::GuestRip, 0x7000),
        (Field::GuestRsp, 0x8000),
        (Field::GuestLdtrAccessRights, 1 << 16),
        (Field::GuestTrSelector, 24),
        (Field::GuestTrLimit, 0x67),
        (Field::GuestTrAccessRights, 0x8B),
        (Field::GuestGdtrLimit, 0xFFFF),
        (Field::GuestIdtrLimit, 0xFFF),
    ] {
        v.set(field, value);
    }
}

/// Turns optional controls on at random, those that they need with them: the VMCS12 stays valid.
pub(crate) fn vary(v: &mut Vmcs12, config: &Config, rng: &mut Rng) {
    let mut pins = v.get32(Field::PinBasedControls) | some_of(rng, config.pin(), 3);
    let mut primaries = v.get32(Field::PrimaryControls) | some_of(rng, config.primary(), 3);
    let mut secondaries = v.get32(Field::SecondaryControls);
    if rng.one_in(2) {
        secondaries |= some_of(rng, config.secondary(), 4);
    }
    if secondaries & (secondary::UNRESTRICTED_GUEST | secondary::PML | secondary::VM_FUNCTIONS) != 0 {
        secondaries |= secondary::EPT;
    }
    if secondaries & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
        secondaries &= !secondary::VIRTUALIZE_X2APIC_MODE;
    }
    let of_shadow = secondary::VIRTUALIZE_X2APIC_MODE
        | secondary::APIC_REGISTER_VIRTUALIZATION
        | secondary::VIRTUAL_INTERRUPT_DELIVERY;
    if secondaries & of_shadow != 0 {
        primaries |= primary::TPR_SHADOW;
    }
    if secondaries & secondary::VIRTUAL_INTERRUPT_DELIVERY != 0 {
        pins |= pin::EXTERNAL_INTERRUPT_EXITING;
    }
    if pins & pin::VIRTUAL_NMIS != 0 {
        pins |= pin::NMI_EXITING;
    } else {
        primaries &= !primary::NMI_WINDOW_EXITING;
    }
    if secondaries != 0 {
        primaries |= primary::SECONDARY_CONTROLS;
    }
    let mut exits = v.get32(Field::ExitControls) | some_of(rng, config.exit(), 3);
    if pins & pin::PREEMPTION_TIMER == 0 {
        exits &= !exit::SAVE_PREEMPTION_TIMER;
    }
    // Which mode the guest has is not optional.
    let mode = v.get32(Field::EntryControls) & entry::IA32E_MODE_GUEST;
    let entries = some_of(rng, config.entry(), 3) & !entry::IA32E_MODE_GUEST | mode;
    for (field, value) in [
        (Field::PinBasedControls, pins),
        (Field::PrimaryControls, primaries),
        (Field::SecondaryControls, secondaries),
        (Field::ExitControls, exits),
        (Field::EntryControls, entries),
    ] {
        v.set(field, u64::from(value));
    }
    if secondaries & secondary::VM_FUNCTIONS != 0 {
        v.set(Field::VmFunctionControls, config.vmfunc() & rng.next());
    }
}
