//! A VMCB's meaning, as VMCS fields.

use nvmx::bits::{cr0, cr4, efer};
use nvmx::controls::{entry, exit, pin, primary, secondary};
use nvmx::field::Field;

use super::side::Fields;
use crate::npt::Table;
use crate::vmcb::{Segment, Vmcb, event, misc1};
use crate::{Global, bitmaps};
use hw::vmx_host::{Allowed, Capabilities};
use spin::Once;

/// What the processor allows, and what does not change from guest to guest.
struct Common {
    capabilities: Capabilities,
    /// EPT that maps everything to itself, for guests without nested paging that need EPT to have no paging at all.
    everything: Table,
}

static COMMON: Once<Common> = Once::new();

fn common() -> &'static Common {
    COMMON.call_once(|| Common {
        // SAFETY: VMX is there.
        capabilities: unsafe { Capabilities::read() },
        everything: Table::identity(4),
    })
}

/// The VMX MSR and I/O bitmaps made of the permission maps of SVM's format.
#[repr(C, align(4096))]
struct Maps {
    msr: [u8; 4096],
    io: [u8; 8192],
}

static MAPS: Global<Maps> = Global::new(Maps { msr: [0; 4096], io: [0; 8192] });

/// EPT pointer: write-back, four levels.
const EPTP: u64 = 3 << 3 | 6;

fn choose(allowed: Allowed, wanted: u32) -> u64 {
    u64::from((wanted | allowed.must) & allowed.may)
}

/// Writes everything that the guest is entered with.
pub fn write(fields: &mut Fields<'_>, vmcb: &Vmcb) {
    let paging = vmcb.cr0() & cr0::PG != 0;
    let long = vmcb.efer() & efer::LME != 0 && paging;
    let unpaged = !paging || vmcb.cr0() & cr0::PE == 0;
    let ept = if vmcb.np_enable() & 1 != 0 { Some(vmcb.n_cr3()) } else { unpaged.then(|| common().everything.root()) };
    controls(fields, vmcb, long, unpaged, ept.is_some());
    if let Some(root) = ept {
        fields.write(Field::EptPointer, root | EPTP);
        fields.write(Field::VirtualProcessorId, u64::from(vmcb.asid() & 0xFFFF).max(1));
        if paging && !long && vmcb.cr4() & cr4::PAE != 0 {
            pdptes(fields, vmcb.cr3());
        }
    }
    maps(fields, vmcb);
    segments(fields, vmcb);
    registers(fields, vmcb, long);
    inject(fields, vmcb);
}

fn controls(fields: &mut Fields<'_>, vmcb: &Vmcb, long: bool, unpaged: bool, ept: bool) {
    let of = &common().capabilities;
    let on = |bit, control| if bit { control } else { 0 };
    let wants = |bit| vmcb.misc1() & bit != 0;
    let pins = on(wants(misc1::INTR), pin::EXTERNAL_INTERRUPT_EXITING) | on(wants(misc1::NMI), pin::NMI_EXITING);
    let primaries = on(wants(misc1::HLT), primary::HLT_EXITING)
        | on(wants(misc1::IOIO_PROT), primary::IO_BITMAPS)
        | on(wants(misc1::RDTSC), primary::RDTSC_EXITING)
        | on(wants(misc1::INVLPG), primary::INVLPG_EXITING)
        | on(wants(misc1::PAUSE), primary::PAUSE_EXITING)
        | on(vmcb.cr_intercepts() & 1 << 3 != 0, primary::CR3_STORE_EXITING)
        | on(vmcb.cr_intercepts() & 1 << 19 != 0, primary::CR3_LOAD_EXITING)
        | on(vmcb.dr_intercepts() != 0, primary::MOV_DR_EXITING)
        | primary::MSR_BITMAPS
        | on(ept, primary::SECONDARY_CONTROLS);
    let secondaries = on(ept, secondary::EPT | secondary::VPID) | on(unpaged, secondary::UNRESTRICTED_GUEST);
    let exits = exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_EFER | exit::LOAD_EFER;
    let entries = entry::LOAD_EFER | on(long, entry::IA32E_MODE_GUEST);
    fields.write(Field::PinBasedControls, choose(of.pin, pins));
    fields.write(Field::PrimaryControls, choose(of.primary, primaries));
    fields.write(Field::SecondaryControls, choose(of.secondary, secondaries));
    fields.write(Field::ExitControls, choose(of.exit, exits));
    fields.write(Field::EntryControls, choose(of.entry, entries));
    fields.write(Field::ExceptionBitmap, u64::from(vmcb.exception_intercepts()));
    for field in [
        Field::PageFaultErrorCodeMask,
        Field::PageFaultErrorCodeMatch,
        Field::Cr3TargetCount,
        Field::ExitMsrStoreCount,
        Field::ExitMsrLoadCount,
        Field::EntryMsrLoadCount,
        Field::GuestActivity,
        Field::GuestDebugctl,
        Field::GuestPendingDebugExceptions,
    ] {
        fields.write(field, 0);
    }
    fields.write(Field::TscOffset, vmcb.tsc_offset());
    fields.write(Field::VmcsLinkPointer, u64::MAX);
}

/// The PDPTEs in memory: with EPT an entry takes them from the VMCS.
fn pdptes(fields: &mut Fields<'_>, cr3: u64) {
    let table = (cr3 & !0x1F) as *const u64;
    let slots = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];
    for (n, field) in slots.into_iter().enumerate() {
        // SAFETY: the guest's tables are this image's pages, mapped one to one.
        fields.write(field, unsafe { *table.add(n) });
    }
}

/// The permission maps, where the guest has them.
fn maps(fields: &mut Fields<'_>, vmcb: &Vmcb) {
    let maps = MAPS.get();
    maps.msr = [0; 4096];
    if vmcb.misc1() & misc1::MSR_PROT != 0 {
        bitmaps::msrpm().to_vmx(&mut maps.msr);
    }
    if vmcb.misc1() & misc1::IOIO_PROT != 0 {
        bitmaps::iopm().to_vmx(&mut maps.io);
    }
    fields.write(Field::MsrBitmap, (&raw const maps.msr) as u64);
    fields.write(Field::IoBitmapA, (&raw const maps.io) as u64);
    fields.write(Field::IoBitmapB, (&raw const maps.io) as u64 + 4096);
}

fn segments(fields: &mut Fields<'_>, vmcb: &Vmcb) {
    use Field::*;
    for (segment, selector, limit, rights, base) in [
        (Segment::Es, GuestEsSelector, GuestEsLimit, GuestEsAccessRights, GuestEsBase),
        (Segment::Cs, GuestCsSelector, GuestCsLimit, GuestCsAccessRights, GuestCsBase),
        (Segment::Ss, GuestSsSelector, GuestSsLimit, GuestSsAccessRights, GuestSsBase),
        (Segment::Ds, GuestDsSelector, GuestDsLimit, GuestDsAccessRights, GuestDsBase),
        (Segment::Fs, GuestFsSelector, GuestFsLimit, GuestFsAccessRights, GuestFsBase),
        (Segment::Gs, GuestGsSelector, GuestGsLimit, GuestGsAccessRights, GuestGsBase),
        (Segment::Ldtr, GuestLdtrSelector, GuestLdtrLimit, GuestLdtrAccessRights, GuestLdtrBase),
        (Segment::Tr, GuestTrSelector, GuestTrLimit, GuestTrAccessRights, GuestTrBase),
    ] {
        let (s, attributes, l, b) = vmcb.segment(segment);
        let unusable = if attributes & 0x80 == 0 { 1 << 16 } else { 0 };
        let packed = u64::from(attributes);
        fields.write(selector, u64::from(s));
        fields.write(limit, u64::from(l));
        fields.write(rights, packed & 0xFF | (packed & 0xF00) << 4 | unusable);
        fields.write(base, b);
    }
    fields.write(GuestGdtrBase, vmcb.gdtr_base());
    fields.write(GuestGdtrLimit, u64::from(vmcb.gdtr_limit()));
    fields.write(GuestIdtrBase, vmcb.idtr_base());
    fields.write(GuestIdtrLimit, u64::from(vmcb.idtr_limit()));
}

fn registers(fields: &mut Fields<'_>, vmcb: &Vmcb, long: bool) {
    let lma = if long { efer::LMA } else { 0 };
    // What VMX operation demands and the guest does not see.
    for (field, value) in [
        (Field::GuestCr0, vmcb.cr0() | cr0::NE),
        (Field::Cr0Mask, cr0::NE),
        (Field::Cr0ReadShadow, vmcb.cr0()),
        (Field::GuestCr3, vmcb.cr3()),
        (Field::GuestCr4, vmcb.cr4() | cr4::VMXE),
        (Field::Cr4Mask, cr4::VMXE),
        (Field::Cr4ReadShadow, vmcb.cr4()),
        (Field::GuestEfer, vmcb.efer() & (efer::SCE | efer::LME | efer::NXE) | lma),
        (Field::GuestDr7, vmcb.dr7()),
        (Field::GuestRflags, vmcb.rflags()),
        (Field::GuestRip, vmcb.rip()),
        (Field::GuestRsp, vmcb.rsp()),
        (Field::GuestInterruptibility, vmcb.int_state() & 1),
        (Field::GuestSysenterCs, 0),
        (Field::GuestSysenterEsp, 0),
        (Field::GuestSysenterEip, 0),
    ] {
        fields.write(field, value);
    }
}

/// EVENTINJ has the format of the interruption information. VMX pushes the address behind a software interrupt.
fn inject(fields: &mut Fields<'_>, vmcb: &Vmcb) {
    let info = vmcb.event_inj();
    fields.write(Field::EntryInterruptionInfo, info & 0xFFFF_FFFF);
    fields.write(Field::EntryExceptionErrorCode, info >> 32);
    if info & event::VALID != 0 && info & 7 << 8 == event::TYPE_SOFTWARE {
        fields.write(Field::EntryInstructionLength, 1);
        fields.write(Field::GuestRip, vmcb.rip().wrapping_sub(1));
    }
}
