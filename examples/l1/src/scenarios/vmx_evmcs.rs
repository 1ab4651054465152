//! The enlightened VMCS: what its clean fields promise, and the VMX instructions while one is active.

use super::Outcome;
use crate::guest::Guest;
use crate::npt::{ALL, Table};
use crate::vmcb::exit;
use crate::{Failure, check, cpu_guest, frames, hyperv, vmx};
use core::arch::naked_asm;
use hw::vmx as hardware;
use hw::vmx::Fail;
use nvmx::controls::{exit as exit_controls, primary, secondary};
use nvmx::field::Field;

/// L2's address that EPT maps to one of two pages.
const GPA: u64 = 0x6000_0000;
/// Offset of CleanFields in the page.
const CLEAN: u64 = 0x338;

/// Tells in registers what the tests below change: RSP, IA32_SYSENTER_ESP, DS, CR4, the word at RDI.
#[unsafe(naked)]
unsafe extern "C" fn program_tell() {
    naked_asm!(
        "mov r8, rsp",
        "mov ecx, 0x175",
        "rdmsr",
        "mov r9, rax",
        "mov ecx, ds",
        "mov r10, rcx",
        "mov r11, cr4",
        "mov r12, [rdi]",
        "sgdt [rsp - 32]",
        "in al, 0x80",
        "rdtsc",
        "mov r13, rdx",
        "ud2",
        "hlt",
    )
}

fn needs_evmcs() -> Outcome {
    hyperv::needs_direct_flush()
}

/// What a run told of a change: a number that is one before it and another after it.
type Look = fn(&Guest, u64) -> u64;

/// A clean group: its bit, a field of it, the value to change to from the value that is there, and where it shows.
struct Group {
    name: &'static str,
    bit: u32,
    field: Field,
    change: fn(u64) -> u64,
    look: Look,
}

const GROUPS: &[Group] = &[
    Group { name: "GUEST_BASIC", bit: 10, field: Field::GuestRsp, change: |v| v - 64, look: |g, _| g.gprs.r8 },
    Group { name: "GUEST_GRP1", bit: 11, field: Field::GuestSysenterEsp, change: |_| 0x5678, look: |g, _| g.gprs.r9 },
    Group { name: "GUEST_GRP2", bit: 12, field: Field::GuestDsSelector, change: |_| 0x28, look: |g, _| g.gprs.r10 },
    Group { name: "CRDR", bit: 8, field: Field::Cr4ReadShadow, change: |v| v ^ 1 << 13, look: |g, _| g.gprs.r11 },
    Group { name: "CONTROL_XLAT", bit: 9, field: Field::EptPointer, change: other_root, look: |g, _| g.gprs.r12 },
    Group {
        name: "CONTROL_GRP1",
        bit: 3,
        field: Field::SecondaryControls,
        change: |v| v | secondary::DESCRIPTOR_TABLE_EXITING as u64,
        look: |_, code| code,
    },
    Group { name: "IO_BITMAP", bit: 0, field: Field::IoBitmapA, change: |_| all_ones(), look: |_, code| code },
    Group { name: "MSR_BITMAP", bit: 1, field: Field::MsrBitmap, change: |_| all_ones(), look: |_, code| code },
    Group {
        name: "CONTROL_PROC",
        bit: 4,
        field: Field::PrimaryControls,
        change: |v| v | primary::RDTSC_EXITING as u64,
        look: |_, code| code,
    },
    Group { name: "CONTROL_EXCPN", bit: 7, field: Field::ExceptionBitmap, change: |_| 0, look: |_, code| code },
    Group {
        name: "HOST_GRP1",
        bit: 14,
        field: Field::HostSysenterEsp,
        change: |_| 0x9ABC,
        // SAFETY: every processor with SYSENTER has the MSR.
        look: |_, _| unsafe { hw::msr::rdmsr(0x175) },
    },
    Group {
        name: "HOST_POINTER",
        bit: 13,
        field: Field::HostFsBase,
        change: |_| 0x1234_5000,
        // SAFETY: 64-bit processors have the MSR.
        look: |_, _| unsafe { hw::msr::rdmsr(hw::msr::FS_BASE) },
    },
];

/// Bitmaps of ones.
fn all_ones() -> u64 {
    let page = frames::page();
    // SAFETY: the frame is this scenario's, mapped one to one.
    unsafe { (page as *mut u8).write_bytes(0xFF, 4096) };
    page
}

/// Another EPT, whose page at GPA has another word.
fn other_root(eptp: u64) -> u64 {
    mapped(0x0DD).root() | eptp & 0xFFF
}

/// EPT whose page at GPA has this word.
fn mapped(word: u64) -> Table {
    let (table, page) = (Table::identity(4), frames::page());
    // SAFETY: the frame is this scenario's, mapped one to one.
    unsafe { (page as *mut u64).write_volatile(word) };
    table.map(GPA, page, ALL);
    table
}

/// A guest with an enlightened VMCS that has run once: everything is clean.
fn ready() -> Result<&'static mut Guest, Failure> {
    hyperv::enable();
    let guest = cpu_guest();
    guest.long_mode(program_tell, GPA);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(mapped(0xE4E).root());
    guest.vmcb.set_tlb_control(1);
    guest.vmcb.set_exception_intercepts(1 << 6);
    guest.vmcb.set_idtr_limit(0);
    guest.vmcb.set_misc1(guest.vmcb.misc1() | crate::vmcb::misc1::IOIO_PROT);
    crate::bitmaps::iopm().clear();
    hyperv::describe(&mut guest.vmcb, 0x51, 9, hyperv::partition_assist());
    vmx::forget_current();
    let seen = guest.run();
    check("the first run", seen.code, exit::EXCP_UD)?;
    check("EPT", guest.gprs.r12, 0xE4E)?;
    Ok(guest)
}

fn clean(guest: &mut Guest) -> Result<*mut u32, Failure> {
    let page = guest.side().evmcs().ok_or(Failure::Missing("an enlightened VMCS"))?;
    Ok((page + CLEAN) as *mut u32)
}

/// Runs from the start once more, with nothing changed but `value` in `field`, and its clean bit set or clear.
fn again(guest: &mut Guest, group: &Group, value: u64, stays_clean: bool) -> Result<u64, Failure> {
    let word = clean(guest)?;
    let (start, place) = (program_tell as *const () as u64, group.field.evmcs());
    let at = word as u64 - CLEAN + place.map_or(0, |place| u64::from(place.offset));
    let size = place.map_or(0, |place| place.size);
    guest.gprs.rdi = GPA;
    let seen = guest.run_again(|fields| {
        // GuestRip belongs to no group.
        fields.write(Field::GuestRip, start);
        // SAFETY: the page is this guest's enlightened VMCS, which L0 does not touch while this runs.
        unsafe {
            let before = word.read_volatile();
            match size {
                2 => (at as *mut u16).write_volatile(value as u16),
                4 => (at as *mut u32).write_volatile(value as u32),
                _ => (at as *mut u64).write_volatile(value),
            }
            word.write_volatile(if stays_clean { before } else { before & !(1 << group.bit) });
        }
    });
    Ok((group.look)(guest, seen.code))
}

/// A field that is changed with its group's bit clear counts; with the bit set either value does, and no third.
pub fn clean_fields() -> Outcome {
    needs_evmcs()?;
    for group in GROUPS {
        if !is_offered(group.field) {
            continue;
        }
        let guest = ready()?;
        let old = guest.side().field(group.field);
        let new = (group.change)(old);
        let saw_old = again(guest, group, old, true)?;
        let word = clean(guest)?;
        // SAFETY: as in `again`.
        check("all clean after a run", u64::from(unsafe { word.read_volatile() } & 0x7FFF), 0x7FFF)?;
        let may_be_either = again(guest, group, new, true)?;
        let saw_new = again(guest, group, new, false)?;
        rt::println!("  {}: {saw_old:#x}, {may_be_either:#x}, {saw_new:#x}", group.name);
        check("the change shows", u64::from(saw_old != saw_new), 1)?;
        check("no third value", u64::from(may_be_either == saw_old || may_be_either == saw_new), 1)?;
        let back = again(guest, group, old, false)?;
        check("and back", back, saw_old)?;
    }
    Ok(())
}

/// Descriptor-table exiting is not on every processor.
fn is_offered(field: Field) -> bool {
    // SAFETY: VMX is there.
    let may = unsafe { hw::vmx_host::Capabilities::read() }.secondary.may;
    field != Field::SecondaryControls || may & secondary::DESCRIPTOR_TABLE_EXITING != 0
}

fn code(outcome: Result<(), Fail>) -> u64 {
    match outcome {
        Ok(()) => 0,
        Err(Fail::Invalid) => 1,
        Err(Fail::Valid) => 2,
    }
}

/// While an enlightened VMCS is active: VMREAD reads it, VMWRITE fails; VMCLEAR of the page ends it.
pub fn instructions() -> Outcome {
    needs_evmcs()?;
    let guest = ready()?;
    let page = guest.side().evmcs().ok_or(Failure::Missing("an enlightened VMCS"))?;
    let rip = guest.side().field(Field::GuestRip);
    // SAFETY: VMX operation; the VMCSs are this guest's.
    unsafe {
        let encoding = u64::from(Field::GuestRip.encoding().0);
        check("VMREAD", hardware::vmread(encoding).unwrap_or(0), rip)?;
        check("VMWRITE", code(hardware::vmwrite(encoding, 5)), 1)?;
        check("RIP stays", hardware::vmread(encoding).unwrap_or(0), rip)?;
        check("VMCLEAR", code(hardware::vmclear(page)), 0)?;
        check("VMREAD afterwards", code(hardware::vmread(encoding).map(drop)), 1)?;
    }
    hyperv::set_current_evmcs(None);
    vmx::forget_current();
    // Launched again, everything is read.
    ready().map(drop)?;
    check("controls", u64::from(exit_controls::HOST_ADDRESS_SPACE_SIZE), 0x200)
}
