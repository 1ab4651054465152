//! States in which L1's processors start, in VMCS01: after INIT, after SIPI, as multiboot and Linux want it.

use nvmx::Vmcs;
use nvmx::field::Field;

use crate::vmx::host::VmxHost;
use crate::vmx::vcr::{set_cr0, set_cr4};

/// A segment as a VMCS holds it.
#[derive(Clone, Copy, Debug)]
struct Segment {
    selector: u16,
    rights: u32,
    limit: u32,
    base: u64,
}

/// The fields of ES, CS, SS, DS, FS, GS, LDTR, TR: selector, rights, limit, base.
const FIELDS: [[Field; 4]; 8] = [
    [Field::GuestEsSelector, Field::GuestEsAccessRights, Field::GuestEsLimit, Field::GuestEsBase],
    [Field::GuestCsSelector, Field::GuestCsAccessRights, Field::GuestCsLimit, Field::GuestCsBase],
    [Field::GuestSsSelector, Field::GuestSsAccessRights, Field::GuestSsLimit, Field::GuestSsBase],
    [Field::GuestDsSelector, Field::GuestDsAccessRights, Field::GuestDsLimit, Field::GuestDsBase],
    [Field::GuestFsSelector, Field::GuestFsAccessRights, Field::GuestFsLimit, Field::GuestFsBase],
    [Field::GuestGsSelector, Field::GuestGsAccessRights, Field::GuestGsLimit, Field::GuestGsBase],
    [Field::GuestLdtrSelector, Field::GuestLdtrAccessRights, Field::GuestLdtrLimit, Field::GuestLdtrBase],
    [Field::GuestTrSelector, Field::GuestTrAccessRights, Field::GuestTrLimit, Field::GuestTrBase],
];
const CS: usize = 1;
const LDTR: usize = 6;
const TR: usize = 7;
const DATA: [usize; 5] = [0, 2, 3, 4, 5];

/// CR0 after INIT: CD, NW, ET.
const CR0_INIT: u64 = 0x6000_0010;
/// CR0 as boot loaders leave it: PE, ET.
const CR0_FLAT: u64 = 0x11;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

fn set<V: Vmcs>(v: &mut V, index: usize, segment: Segment) {
    let [selector, rights, limit, base] = FIELDS[index];
    v.write(selector, segment.selector.into());
    v.write(rights, segment.rights.into());
    v.write(limit, segment.limit.into());
    v.write(base, segment.base);
}

fn set_data<V: Vmcs>(v: &mut V, segment: Segment) {
    for index in DATA {
        set(v, index, segment);
    }
}

/// The state after INIT.
pub fn init<V: Vmcs>(v: &mut V, host: &VmxHost) {
    set_data(v, Segment { selector: 0, rights: 0x93, limit: 0xffff, base: 0 });
    set(v, CS, Segment { selector: 0xf000, rights: 0x9b, limit: 0xffff, base: 0xffff_0000 });
    set(v, LDTR, Segment { selector: 0, rights: 0x82, limit: 0xffff, base: 0 });
    set(v, TR, Segment { selector: 0, rights: 0x8b, limit: 0xffff, base: 0 });
    let fields = [
        (Field::GuestGdtrBase, 0),
        (Field::GuestGdtrLimit, 0xffff),
        (Field::GuestIdtrBase, 0),
        (Field::GuestIdtrLimit, 0xffff),
        (Field::GuestCr3, 0),
        (Field::GuestDr7, 0x400),
        (Field::GuestRflags, 2),
        (Field::GuestRip, 0xfff0),
        (Field::GuestRsp, 0),
        (Field::GuestEfer, 0),
        (Field::GuestPat, PAT_RESET),
        (Field::GuestDebugctl, 0),
        (Field::GuestSysenterCs, 0),
        (Field::GuestSysenterEsp, 0),
        (Field::GuestSysenterEip, 0),
        (Field::GuestInterruptibility, 0),
        (Field::GuestActivity, 0),
        (Field::GuestPendingDebugExceptions, 0),
        (Field::EntryInterruptionInfo, 0),
    ];
    for (field, value) in fields {
        v.write(field, value);
    }
    set_cr0(v, host, CR0_INIT);
    set_cr4(v, host, 0);
}

/// 32-bit protected mode at `eip` with flat segments of these selectors; the rest as after INIT.
pub fn start_flat<V: Vmcs>(v: &mut V, host: &VmxHost, eip: u32, code: u16, data: u16) {
    init(v, host);
    set(v, CS, Segment { selector: code, rights: 0xc09b, limit: u32::MAX, base: 0 });
    set_data(v, Segment { selector: data, rights: 0xc093, limit: u32::MAX, base: 0 });
    set_cr0(v, host, CR0_FLAT);
    v.write(Field::GuestRip, eip.into());
}

/// The descriptor table that a Linux kernel starts with.
pub fn set_gdt<V: Vmcs>(v: &mut V, base: u32, limit: u32) {
    v.write(Field::GuestGdtrBase, base.into());
    v.write(Field::GuestGdtrLimit, limit.into());
}

/// A SIPI: real mode at page `vector`; the rest as after INIT.
pub fn start_up<V: Vmcs>(v: &mut V, vector: u8) {
    let selector = u16::from(vector) << 8;
    set(v, CS, Segment { selector, rights: 0x9b, limit: 0xffff, base: u64::from(selector) << 4 });
    v.write(Field::GuestRip, 0);
}
