//! Random near-valid VMCS12s: a valid one with a few fields changed, mostly to values at the edge of a rule.

use crate::profile::{SEGMENTS, vary};
use crate::{Layout, MSR_LISTS, Profile, Rng, page, phys_bits, valid};
use nvmx::caps::Config;
use nvmx::check;
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::field::{Area, Field, Width};
use nvmx::vmcs12::Vmcs12;

/// A random VMCS12.
#[derive(Clone, Debug)]
pub struct Sample {
    /// It.
    pub vmcs: Vmcs12,
    /// The kind of guest that it was made of.
    pub profile: Profile,
    /// How many changes were made to a valid one. A change may be of several fields that one rule looks at.
    pub changes: u32,
}

/// A random sample: none, one, two or three changes.
pub fn sample(config: &Config, layout: &Layout, rng: &mut Rng) -> Sample {
    let profile = loop {
        let profile = rng.pick(&Profile::ALL);
        let unrestricted = config.secondary().allowed & secondary::UNRESTRICTED_GUEST != 0;
        if unrestricted || !profile.needs_unrestricted() {
            break profile;
        }
    };
    let mut vmcs = valid(config, layout, profile);
    vary(&mut vmcs, config, rng);
    let changes = rng.pick(&[0, 1, 1, 1, 1, 1, 2, 3]);
    for _ in 0..changes {
        change(&mut vmcs, config, layout, rng);
    }
    confine(&mut vmcs, config, layout);
    Sample { vmcs, profile, changes }
}

fn change(v: &mut Vmcs12, config: &Config, layout: &Layout, rng: &mut Rng) {
    match rng.below(12) {
        0 | 1 => any_field(v, config, rng),
        2 => controls(v, rng),
        3 => addresses(v, config, layout, rng),
        4 => event(v, rng),
        5 => waiting(v, rng),
        6 | 7 => segment(v, config, rng),
        8 => modes(v, rng),
        9 => msrs(v, config, layout, rng),
        10 => link(v, layout, rng),
        _ => host(v, config, rng),
    }
}

/// Values at edges of rules on 64 bits.
fn edge(config: &Config, rng: &mut Rng) -> u64 {
    let phys = 1u64 << phys_bits(config);
    rng.pick(&[
        0,
        1,
        u64::MAX,
        1 << 31,
        0xFFFF_FFFF,
        1 << 32,
        (1 << 47) - 1,
        1 << 47,
        0xFFFF_8000_0000_0000,
        0xFFFF_7FFF_FFFF_FFFF,
        phys,
        phys - 1,
        phys - 4096,
        phys >> 1,
        1 << 63,
    ])
}

/// One bit, or all, of any field that L1 may set.
fn any_field(v: &mut Vmcs12, config: &Config, rng: &mut Rng) {
    let field = loop {
        let field = rng.pick(Field::ALL);
        if field.area() != Area::ExitInformation {
            break field;
        }
    };
    let bits = match field.width() {
        Width::U16 => 16,
        Width::U32 => 32,
        Width::U64 | Width::Natural => 64,
    };
    let value = if rng.one_in(3) { edge(config, rng) } else { v.get(field) ^ 1 << rng.below(bits) };
    v.set(field, value);
}

fn toggle(v: &mut Vmcs12, field: Field, bits: u32) {
    v.set(field, v.get(field) ^ u64::from(bits));
}

/// A control without those that it needs, or a value that goes with one.
fn controls(v: &mut Vmcs12, rng: &mut Rng) {
    match rng.below(8) {
        0 => {
            toggle(v, Field::PinBasedControls, rng.pick(&[pin::NMI_EXITING, pin::VIRTUAL_NMIS, pin::PREEMPTION_TIMER]))
        }
        1 => {
            let bits = [primary::NMI_WINDOW_EXITING, primary::TPR_SHADOW, primary::SECONDARY_CONTROLS];
            toggle(v, Field::PrimaryControls, rng.pick(&bits));
        }
        2 => toggle(v, Field::ExitControls, rng.pick(&[exit::SAVE_PREEMPTION_TIMER, exit::HOST_ADDRESS_SPACE_SIZE])),
        3 => {
            v.set(Field::Cr3TargetCount, rng.pick(&[0, 4, 5, 255]));
            v.set(Field::VirtualProcessorId, rng.pick(&[0, 1, 0xFFFF]));
        }
        4 => {
            toggle(v, Field::PrimaryControls, 0);
            v.set(Field::TprThreshold, rng.pick(&[0, 4, 5, 6, 15, 16, 1 << 31]));
        }
        5 => {
            v.set(Field::TscMultiplier, rng.pick(&[0, 1]));
            v.set(Field::VmFunctionControls, rng.pick(&[0, 1, 2, 1 << 63]));
        }
        _ => {
            v.set(Field::PrimaryControls, v.get(Field::PrimaryControls) | u64::from(primary::SECONDARY_CONTROLS));
            toggle(v, Field::SecondaryControls, 1 << rng.below(32));
        }
    }
}

/// An address of a page, with a bit of the offset or beyond the width; the EPT pointer.
fn addresses(v: &mut Vmcs12, config: &Config, layout: &Layout, rng: &mut Rng) {
    let eptp = layout.page(page::EMPTY) | 0x1E;
    let phys = phys_bits(config);
    let flip = rng.pick(&[0, 3, 11, 12, phys - 1, phys, phys + 1, 52, 63]);
    let (field, control, bits) = rng.pick(&[
        (Field::IoBitmapA, Field::PrimaryControls, primary::IO_BITMAPS),
        (Field::IoBitmapB, Field::PrimaryControls, primary::IO_BITMAPS),
        (Field::MsrBitmap, Field::PrimaryControls, primary::MSR_BITMAPS),
        (Field::VirtualApicAddress, Field::PrimaryControls, primary::TPR_SHADOW),
        (Field::ApicAccessAddress, Field::SecondaryControls, secondary::VIRTUALIZE_APIC_ACCESSES),
        (Field::PmlAddress, Field::SecondaryControls, secondary::PML),
        (Field::EptpListAddress, Field::SecondaryControls, secondary::VM_FUNCTIONS),
        (Field::EptPointer, Field::SecondaryControls, secondary::EPT),
        (Field::EptPointer, Field::SecondaryControls, secondary::EPT),
    ]);
    v.set(field, v.get(field) ^ 1 << flip);
    if field == Field::EptPointer && rng.one_in(2) {
        let low = rng.pick(&[0x1E, 0x18, 0x5E, 0x58, 0x1D, 0x1F, 0x16, 0x26, 0x9E, 0x11E, 0x81E]);
        v.set(field, eptp & !0xFFF | low);
    }
    if field == Field::EptpListAddress {
        v.set(Field::VmFunctionControls, 1);
    }
    if rng.one_in(2) {
        let allowed = match control {
            Field::PrimaryControls => config.primary().allowed,
            _ => config.secondary().allowed,
        };
        v.set(control, v.get(control) | u64::from(bits & allowed));
    }
}

fn event(v: &mut Vmcs12, rng: &mut Rng) {
    let kind = rng.below(8);
    let vector = match kind {
        2 if !rng.one_in(4) => 2,
        7 if !rng.one_in(4) => 0,
        _ => rng.pick(&[0, 1, 2, 3, 6, 8, 9, 10, 13, 14, 15, 17, 18, 20, 21, 30, 31, 32, 255]),
    };
    let natural = kind == 3 && matches!(vector, 8 | 10..=14 | 17);
    let code = if rng.one_in(6) { !natural } else { natural };
    let reserved = if rng.one_in(10) { 1 << (12 + rng.below(19)) } else { 0 };
    let valid = u64::from(!rng.one_in(12)) << 31;
    v.set(Field::EntryInterruptionInfo, vector | kind << 8 | u64::from(code) << 11 | reserved | valid);
    v.set(Field::EntryExceptionErrorCode, rng.pick(&[0, 4, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF]));
    v.set(Field::EntryInstructionLength, rng.pick(&[0, 1, 2, 15, 16, 0xFFFF_FFFF]));
    if rng.one_in(2) {
        v.set(Field::GuestRflags, v.get(Field::GuestRflags) | 1 << 9);
    }
}

/// Activity, interruptibility, pending debug exceptions, and what goes with them.
fn waiting(v: &mut Vmcs12, rng: &mut Rng) {
    if rng.one_in(2) {
        v.set(Field::GuestRflags, v.get(Field::GuestRflags) | rng.pick(&[0, 1 << 9, 1 << 8, 0x300]));
    }
    if rng.one_in(2) {
        v.set(Field::GuestActivity, rng.pick(&[0, 1, 2, 3, 4, 1 << 31]));
    }
    if rng.one_in(2) {
        let state = rng.pick(&[0, 1, 2, 3, 4, 8, 9, 10, 16, 32, 1 << 31]);
        v.set(Field::GuestInterruptibility, state);
    }
    if rng.one_in(2) {
        let bit = rng.pick(&[0, 3, 4, 11, 12, 13, 14, 15, 16, 17, 31, 32, 63]);
        let more = rng.pick(&[0, 0, 1 << 14, 1 << 12, 0x1_1000]);
        v.set(Field::GuestPendingDebugExceptions, 1 << bit | more);
        v.set(Field::GuestDebugctl, rng.pick(&[0, 2]));
    }
    if rng.one_in(2) {
        event(v, rng);
    }
}

/// One segment's selector, limit, rights or base.
fn segment(v: &mut Vmcs12, config: &Config, rng: &mut Rng) {
    const SYSTEM: [[Field; 4]; 2] = [
        [Field::GuestTrSelector, Field::GuestTrLimit, Field::GuestTrAccessRights, Field::GuestTrBase],
        [Field::GuestLdtrSelector, Field::GuestLdtrLimit, Field::GuestLdtrAccessRights, Field::GuestLdtrBase],
    ];
    let [selector, limit, rights, base] = if rng.one_in(4) { rng.pick(&SYSTEM) } else { rng.pick(&SEGMENTS) };
    match rng.below(8) {
        0 => v.set(selector, v.get(selector) ^ rng.pick(&[1, 2, 3, 4, 8])),
        1 => v.set(limit, rng.pick(&[0, 0xFFFF, 0xF_FFFF, 0x10_0000, 0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFF, 0x1000])),
        2 => v.set(base, edge(config, rng)),
        3 => v.set(base, v.get(selector) << 4),
        4 => v.set(rights, v.get(rights) & !15 | rng.below(16)),
        5 => v.set(rights, v.get(rights) ^ rng.pick(&[0x10, 0x80, 0x2000, 0x4000, 0x8000, 0x6000, 0x1_0000])),
        6 => {
            // A privilege level, of all that have one or of one.
            let level = rng.below(4);
            let dpl = |rights: u64| rights & !0x60 | level << 5;
            v.set(rights, dpl(v.get(rights)));
            if rng.one_in(2) {
                v.set(selector, v.get(selector) & !3 | level);
            }
            if rng.one_in(3) {
                v.set(Field::GuestSsAccessRights, dpl(v.get(Field::GuestSsAccessRights)));
            }
        }
        _ => {
            v.set(rights, 0x82);
            v.set(limit, rng.pick(&[0xFFFF, 0x10_0000]));
        }
    }
}

/// Control registers, IA32_EFER and the flags that together make a mode.
fn modes(v: &mut Vmcs12, rng: &mut Rng) {
    let flip = |v: &mut Vmcs12, field, bit: u64| v.set(field, v.get(field) ^ 1 << bit);
    match rng.below(7) {
        0 => flip(v, Field::GuestCr0, rng.pick(&[0, 0, 5, 16, 29, 30, 31, 31, 32, 63])),
        1 => flip(v, Field::GuestCr4, rng.pick(&[5, 5, 12, 13, 14, 16, 17, 17, 18, 20, 22, 23, 31, 32])),
        2 => toggle(v, Field::EntryControls, entry::IA32E_MODE_GUEST),
        3 => {
            flip(v, Field::GuestEfer, rng.pick(&[0, 1, 8, 8, 10, 10, 11, 12, 32]));
            v.set(Field::EntryControls, v.get(Field::EntryControls) | u64::from(entry::LOAD_EFER));
        }
        4 => flip(v, Field::GuestRflags, rng.pick(&[1, 3, 5, 8, 9, 15, 17, 17, 21, 22, 32, 63])),
        5 => {
            flip(v, Field::GuestCr0, rng.pick(&[0, 31]));
            toggle(v, Field::EntryControls, entry::IA32E_MODE_GUEST);
        }
        _ => {
            v.set(Field::GuestRip, rng.pick(&[0, 0xFFFF_FFFF, 1 << 32, 1 << 46, 1 << 47, u64::MAX, 1 << 63]));
            if rng.one_in(2) {
                flip(v, Field::GuestCsAccessRights, 13);
            }
        }
    }
}

/// MSR fields and MSR areas, PDPTEs.
fn msrs(v: &mut Vmcs12, config: &Config, layout: &Layout, rng: &mut Rng) {
    let pat = 0x0007_0406_0007_0406 ^ rng.pick(&[0, 2, 3, 8, 0x80, 5]) << (8 * rng.below(8));
    let of_exit = |v: &mut Vmcs12, bits: u32| v.set(Field::ExitControls, v.get(Field::ExitControls) | u64::from(bits));
    let of_entry = |v: &mut Vmcs12, bits| v.set(Field::EntryControls, v.get(Field::EntryControls) | u64::from(bits));
    match rng.below(8) {
        0 => {
            v.set(Field::GuestPat, pat);
            of_entry(v, entry::LOAD_PAT);
        }
        1 => {
            v.set(Field::HostPat, pat);
            of_exit(v, exit::LOAD_PAT);
        }
        2 => {
            v.set(Field::HostEfer, v.get(Field::HostEfer) ^ 1 << rng.pick(&[0, 1, 8, 10, 11, 12, 63]));
            of_exit(v, exit::LOAD_EFER);
        }
        3 => {
            let list = layout.page(page::MSRS) + rng.below(MSR_LISTS.len() as u64) * 64;
            v.set(Field::EntryMsrLoadAddress, list);
            v.set(Field::EntryMsrLoadCount, rng.below(3));
        }
        4 => {
            let (address, count) = rng.pick(&[
                (Field::EntryMsrLoadAddress, Field::EntryMsrLoadCount),
                (Field::ExitMsrLoadAddress, Field::ExitMsrLoadCount),
                (Field::ExitMsrStoreAddress, Field::ExitMsrStoreCount),
            ]);
            let top = 1u64 << phys_bits(config);
            v.set(count, rng.pick(&[0, 1, 2, 255]));
            v.set(address, v.get(address) ^ rng.pick(&[0, 8, 1, top, 1 << 63]));
            if rng.one_in(4) {
                v.set(address, top - 16 * rng.below(3));
            }
        }
        5 => {
            v.set(Field::GuestDebugctl, 1 << rng.below(64));
            v.set(Field::GuestDr7, 0x400 | 1 << rng.below(64));
            of_entry(v, entry::LOAD_DEBUG_CONTROLS);
        }
        6 => v.set(Field::GuestCr3, layout.page(page::PDPT) + 32 * rng.below(8)),
        _ => {
            let field = rng.pick(&[Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3]);
            v.set(field, rng.next() & 1 | 1 << rng.pick(&[1, 2, 3, 4, 5, 8, 9, 11, 38, 40, 46, 51, 52, 63]));
        }
    }
}

fn link(v: &mut Vmcs12, layout: &Layout, rng: &mut Rng) {
    let pages = [page::VMCS, page::VMCS, page::SHADOW_VMCS, page::WRONG_VMCS, page::EMPTY];
    let good = layout.page(rng.pick(&pages));
    let value = match rng.below(6) {
        0 => layout.current,
        1 => good | 8,
        2 => u64::MAX - 1,
        _ => good,
    };
    v.set(Field::VmcsLinkPointer, value);
}

/// A field of the host.
fn host(v: &mut Vmcs12, config: &Config, rng: &mut Rng) {
    let field = loop {
        let field = rng.pick(Field::ALL);
        if field.area() == Area::Host {
            break field;
        }
    };
    let value = match field.width() {
        Width::U16 => rng.pick(&[0, 1, 4, 8, 16, 24, 0x33]),
        Width::U64 | Width::U32 => v.get(field) ^ 1 << rng.below(64),
        Width::Natural if rng.one_in(2) => edge(config, rng),
        Width::Natural => v.get(field) ^ 1 << rng.below(64),
    };
    v.set(field, value);
}

/// Fields with addresses that the processor may follow: each is `layout`'s own, or refused.
const FOLLOWED: [Field; 12] = [
    Field::IoBitmapA,
    Field::IoBitmapB,
    Field::MsrBitmap,
    Field::VirtualApicAddress,
    Field::ApicAccessAddress,
    Field::PmlAddress,
    Field::EptpListAddress,
    Field::VmreadBitmap,
    Field::VmwriteBitmap,
    Field::EptPointer,
    Field::GuestCr3,
    Field::VmcsLinkPointer,
];

/// Makes a sample harmless for a machine that follows its pointers, without making it more valid: an address that
/// every processor would accept becomes one of a page of `layout`.
fn confine(v: &mut Vmcs12, config: &Config, layout: &Layout) {
    let own = valid(config, layout, Profile::Long);
    for field in FOLLOWED {
        let value = v.get(field);
        let table = matches!(field, Field::EptPointer | Field::GuestCr3);
        let address = if table { value & !0xFFF } else { value };
        if address & 0xFFF != 0 || !config.legal_gpa(address) {
            continue;
        }
        let good = match field {
            // What these lead to is taken for translations.
            Field::EptPointer => address == layout.page(page::EMPTY),
            Field::GuestCr3 => [page::EMPTY, page::PDPT].iter().any(|page| address == layout.page(*page)),
            _ => layout.contains(address) || address == layout.current,
        };
        if !good {
            let own =
                if field == Field::VmcsLinkPointer { layout.page(page::WRONG_VMCS) } else { own.get(field) & !0xFFF };
            v.set(field, own | value & 0xFFF);
        }
    }
    for (address, count) in [
        (Field::ExitMsrLoadAddress, Field::ExitMsrLoadCount),
        (Field::ExitMsrStoreAddress, Field::ExitMsrStoreCount),
        (Field::EntryMsrLoadAddress, Field::EntryMsrLoadCount),
    ] {
        let (at, n) = (v.get(address), v.get(count));
        let in_width = at & 15 == 0 && config.legal_gpa(at) && config.legal_gpa(at + n * 16 - u64::from(n != 0));
        if n != 0 && in_width {
            let lists = layout.page(page::MSRS);
            let is_list = address == Field::EntryMsrLoadAddress && at & 63 == 0 && (lists..lists + 512).contains(&at);
            v.set(address, if is_list { at } else { own.get(address) });
            v.set(count, n.min(2));
        } else if n >> 28 != 0 {
            // The length would not fit 32 bits.
            v.set(count, n & 0xFFF_FFFF);
        }
    }
}

/// What happens to a host field that is legal by itself, where an exit would load it: with `keep` false it becomes
/// `layout`'s own. For machines that do return to their host.
pub fn settle_host(v: &mut Vmcs12, config: &Config, layout: &Layout, root: check::Root, keep: impl Fn(Field) -> bool) {
    let own = valid(config, layout, Profile::Long);
    for field in Field::ALL {
        if field.area() != Area::Host || keep(*field) || v.get(*field) == own.get(*field) {
            continue;
        }
        let mut alone = own.clone();
        alone.set(Field::ExitControls, v.get(Field::ExitControls) | u64::from(exit::HOST_ADDRESS_SPACE_SIZE));
        alone.set(*field, v.get(*field));
        if check::host(&alone, config, root).is_ok() {
            v.set(*field, own.get(*field));
        }
    }
}
