//! Where everything is, in host memory and in the memory of an L1, and what is there at first.

use std::sync::OnceLock;

use nvmx::field::Field;
use nvmx::vmcs12::{REVISION, Vmcs12};
use zerocopy::IntoBytes;

use super::vp::OwnMaps;
use super::{HOST, L1_BYTES, SHADOW_PAGES, config};
use crate::model::mem::PhysMem;

/// L1's page tables: 2 MiB of identity; L2's as well.
pub const TABLES: u64 = 0x1000;
/// L1's EPT: the same identity.
pub const EPT: u64 = 0x4000;
/// VMXON region of L1.
pub const VMXON: u64 = 0x7000;
/// VMCSs of L1.
pub const VMCS12: u64 = 0x8000;
/// How many.
pub const VMCSS: u64 = 3;
/// The enlightened VMCS.
pub const EVMCS: u64 = 0xB000;
/// VP assist page.
pub const ASSIST: u64 = 0xC000;
/// L1's MSR bitmap.
pub const MSR_BITMAP: u64 = 0xD000;
/// L1's I/O bitmaps.
pub const IO_BITMAPS: u64 = 0xE000;
/// The IDT of L1 and L2: gates to a handler that goes on like everything else.
pub const IDT: u64 = 0x4_0000;
/// Where guests read and write, and memory operands are.
pub const WINDOW: u64 = 0x1_0000;

/// L1's EPT pointer: write-back, 4 levels.
pub const EPTP12: u64 = EPT | 3 << 3 | 6;

/// Where a VP's pages are in host memory.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Places {
    pub l1: u64,
    pub vmcs01: u64,
    pub vmcs02: u64,
    pub vmxon: u64,
    pub msr01: u64,
    pub msr02: u64,
    pub io01: u64,
    pub io02: u64,
    pub ept01: u64,
    pub scratch: u64,
    pub pool: u64,
}

impl Places {
    /// Host memory per VP.
    pub const BYTES: u64 = 0x20_0000;

    /// Those of VP `n`.
    pub const fn of(n: usize) -> Self {
        let l1 = HOST + n as u64 * Self::BYTES;
        let own = l1 + L1_BYTES;
        Self {
            l1,
            vmcs01: own,
            vmcs02: own + 0x1000,
            vmxon: own + 0x2000,
            msr01: own + 0x3000,
            msr02: own + 0x4000,
            io01: own + 0x5000,
            io02: own + 0x7000,
            ept01: own + 0x1_0000,
            scratch: own + 0x9000,
            pool: own + 0x8_0000,
        }
    }

    /// The EPT pointer of VMCS01.
    pub const fn eptp01(&self) -> u64 {
        self.ept01 | 3 << 3 | 6
    }
}

/// Flat segments of 64-bit code.
pub fn segments() -> Vec<(Field, u64)> {
    use Field::*;
    let mut fields = vec![
        (GuestCsSelector, 8),
        (GuestCsBase, 0),
        (GuestCsLimit, 0xFFFF_FFFF),
        (GuestCsAccessRights, 0xA09B),
        (GuestTrSelector, 24),
        (GuestTrBase, 0),
        (GuestTrLimit, 0x67),
        (GuestTrAccessRights, 0x8B),
        (GuestLdtrSelector, 0),
        (GuestLdtrAccessRights, 1 << 16),
        (GuestGdtrBase, 0),
        (GuestGdtrLimit, 0xFFFF),
        (GuestIdtrBase, IDT),
        (GuestIdtrLimit, 0xFFF),
    ];
    for (selector, base, limit, rights) in [
        (GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsAccessRights),
        (GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsAccessRights),
        (GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsAccessRights),
        (GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsAccessRights),
        (GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsAccessRights),
    ] {
        fields.extend([(selector, 16), (base, 0), (limit, 0xFFFF_FFFF), (rights, 0xC093)]);
    }
    fields
}

/// What a 64-bit L1 writes into a VMCS for a 64-bit L2 in its own memory, with EPT and VPID.
pub fn good() -> &'static [(Field, u64)] {
    static GOOD: OnceLock<Vec<(Field, u64)>> = OnceLock::new();
    GOOD.get_or_init(make_good)
}

fn make_good() -> Vec<(Field, u64)> {
    use Field::*;
    let config = config(false);
    let control = |allowed: nvmx::caps::Allowed, wanted: u32| u64::from(allowed.required | wanted);
    let mut fields = vec![
        (PinBasedControls, control(config.pin(), 1 << 3 | 1 << 5)),
        (PrimaryControls, control(config.primary(), 1 << 7 | 1 << 25 | 1 << 28 | 1 << 31)),
        (SecondaryControls, 1 << 1 | 1 << 5 | 1 << 7),
        (ExitControls, control(config.exit(), 1 << 9 | 3 << 20)),
        (EntryControls, control(config.entry(), 1 << 9 | 1 << 15)),
        (MsrBitmap, MSR_BITMAP),
        (IoBitmapA, IO_BITMAPS),
        (IoBitmapB, IO_BITMAPS + 0x1000),
        (EptPointer, EPTP12),
        (VirtualProcessorId, 7),
        (VmcsLinkPointer, u64::MAX),
        (Cr4Mask, 0x2000),
        (Cr4ReadShadow, 0x20),
        (GuestCr0, 0x8001_0031),
        (GuestCr3, TABLES),
        (GuestCr4, 0x2020),
        (GuestEfer, 0xD00),
        (GuestRip, 0x6_8000),
        (GuestRsp, 0x7_E000),
        (GuestRflags, 2),
        (GuestDr7, 0x400),
        (HostCr0, 0x8001_0031),
        (HostCr3, TABLES),
        (HostCr4, 0x2020),
        (HostEfer, 0xD00),
        (HostCsSelector, 8),
        (HostSsSelector, 16),
        (HostDsSelector, 16),
        (HostEsSelector, 16),
        (HostTrSelector, 24),
        (HostIdtrBase, IDT),
        (HostRip, 0x6_0000),
        (HostRsp, 0x7_F000),
    ];
    fields.extend(segments());
    fields
}

/// Fills the memory of the VP at `at`.
pub fn lay_out(mem: &PhysMem, at: Places, own: &OwnMaps) {
    let put = |gpa: u64, value: u64| mem.write(at.l1 + gpa, 8, value);
    // Page tables: present, writable, user; a 2 MiB page.
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    put(TABLES + 0x2000, 0x87 | 0x60);
    // EPT: read, write, execute; a 2 MiB page, write-back.
    put(EPT, (EPT + 0x1000) | 7);
    put(EPT + 0x1000, (EPT + 0x2000) | 7);
    put(EPT + 0x2000, 0xB7);
    for n in 0..256 {
        // An interrupt gate: selector 8, present, DPL 0, offset 0x6_1000.
        put(IDT + n * 16, 0x1000 | 8 << 16 | 0x8E << 40 | 6 << 48);
    }
    mem.write(at.l1 + VMXON, 4, REVISION.into());
    let mut region = Vmcs12::default();
    for (field, value) in good().iter().copied() {
        region.set(field, value);
        if let Some(place) = field.evmcs() {
            mem.write(at.l1 + EVMCS + u64::from(place.offset), place.size.into(), value);
        }
    }
    mem.write(at.l1 + EVMCS, 4, 1);
    for n in 0..VMCSS {
        mem.write_bytes(at.l1 + VMCS12 + n * 4096, region.as_bytes());
    }
    mem.write(at.l1 + ASSIST + 0x30, 8, EVMCS);
    // The embedder's own: EPT01 with 4 KiB pages, bitmaps.
    for (n, table) in (0..3).map(|n| (n, at.ept01 + n * 0x1000)) {
        mem.write(table, 8, (at.ept01 + (n + 1) * 0x1000) | 7);
    }
    for n in 0..L1_BYTES >> 12 {
        mem.write(at.ept01 + 0x3000 + n * 8, 8, (at.l1 + n * 4096) | 0x37);
    }
    for (n, word) in (0..).zip(own.msr.iter()) {
        mem.write(at.msr01 + n * 8, 8, *word);
    }
    for (n, word) in (0..).zip(own.io.iter()).filter(|(_, word)| **word != 0) {
        mem.write(at.io01 + n * 8, 8, *word);
    }
    const { assert!(SHADOW_PAGES <= 0x40) };
}
