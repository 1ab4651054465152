//! One VP: what the library needs for it, its VMCSs in the model's processor, and its L1's memory.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use hvcore::addr::{Gva, Hpa, L1Gpa};
use hvcore::shadow::{PagePool, PageRecord, ShadowPage};
use nvmx::caps::Config;
use nvmx::ept::{EptFormat, EptShadow};
use nvmx::field::Field;
use nvmx::vpid::VpidPool;
use nvmx::{Gprs, IoBitmaps, Linear, Machine, MergedMap, MsrBitmap, Msrs, NestedVmx, PageFault, Vmcs};

use super::CAPS;
use super::layout::{ASSIST, Places, TABLES, segments};
use crate::embedder::memory::L1View;
use crate::model::mem::{Lent, PhysMem};
use crate::model::vmx::{self, fields, write_minimal};

/// The embedder's own bitmaps.
pub struct OwnMaps {
    /// All MSRs but SYSENTER_CS exit.
    pub msr: Box<MsrBitmap>,
    /// Port 0xE0 exits.
    pub io: Box<IoBitmaps>,
}

impl Default for OwnMaps {
    fn default() -> Self {
        let mut maps = Self { msr: Box::new([u64::MAX; 512]), io: Box::new([0; 1024]) };
        for half in [0, 256] {
            maps.msr[half + (0x174 >> 6)] &= !(1 << (0x174 & 63));
        }
        maps.io[0xE0 >> 6] |= 1 << (0xE0 & 63);
        maps
    }
}

/// The processor, as both VMCSs of all VPs use it.
pub struct Hardware {
    cpu: RefCell<vmx::Cpu>,
    mem: Rc<PhysMem>,
}

impl Hardware {
    /// In VMX operation.
    pub fn new(mem: Rc<PhysMem>, vmxon: u64, seed: u64) -> Self {
        let mut cpu = vmx::Cpu::new(CAPS, seed);
        mem.write(vmxon, 4, fields::REVISION.into());
        assert_eq!(cpu.vmxon(&mem, vmxon), vmx::Status::Ok);
        Self { cpu: RefCell::new(cpu), mem }
    }

    /// Works on the processor.
    pub fn with<R>(&self, f: impl FnOnce(&mut vmx::Cpu, &PhysMem) -> R) -> R {
        f(&mut self.cpu.borrow_mut(), &self.mem)
    }

    /// Makes the VMCS at `pa` current and works on the processor.
    pub fn at<R>(&self, pa: u64, f: impl FnOnce(&mut vmx::Cpu, &PhysMem) -> R) -> R {
        self.with(|cpu, mem| {
            if cpu.current() != Some(pa) {
                assert_eq!(cpu.vmptrld(mem, pa), vmx::Status::Ok);
            }
            f(cpu, mem)
        })
    }
}

/// A VMCS in the processor.
pub struct HwVmcs {
    hw: Rc<Hardware>,
    /// Its address.
    pub pa: u64,
    /// VMRESUME enters.
    pub launched: bool,
}

impl HwVmcs {
    /// A cleared one, with the host's state.
    fn new(hw: &Rc<Hardware>, pa: u64) -> Self {
        hw.with(|cpu, mem| {
            mem.write(pa, 4, fields::REVISION.into());
            assert_eq!(cpu.vmclear(mem, pa), vmx::Status::Ok);
        });
        hw.at(pa, |cpu, _| write_minimal(cpu, 0));
        let mut vmcs = Self { hw: Rc::clone(hw), pa, launched: false };
        vmcs.write(Field::HostEfer, 0xD00);
        vmcs.write(Field::HostPat, 0x0007_0406_0007_0406);
        vmcs
    }
}

impl Vmcs for HwVmcs {
    fn read(&self, field: Field) -> u64 {
        self.hw.at(self.pa, |cpu, _| cpu.vmread(field.encoding().0).unwrap_or(0))
    }
    fn write(&mut self, field: Field, value: u64) {
        self.hw.at(self.pa, |cpu, _| _ = cpu.vmwrite(field.encoding().0, value));
    }
}

/// General registers but RSP, numbered as instructions do, and CR2.
#[derive(Clone, Copy, Debug, Default)]
pub struct Regs {
    /// The registers.
    pub gprs: [u64; 16],
    /// CR2.
    pub cr2: u64,
}

impl Gprs for Regs {
    fn get(&self, n: u8) -> u64 {
        self.gprs[usize::from(n)]
    }
    fn set(&mut self, n: u8, value: u64) {
        self.gprs[usize::from(n)] = value;
    }
    fn set_cr2(&mut self, value: u64) {
        self.cr2 = value;
    }
}

/// MSRs outside the VMCS read as zero and take nothing but zero.
impl Msrs for Regs {
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        (index >> 8 != 0xFF).then_some(0)
    }
    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        index >> 8 != 0xFF && value == 0
    }
}

/// L1's linear memory: the identity that its tables say, unless it wrote others, which this embedder overlooks.
pub struct Flat(pub L1View);

impl Linear for Flat {
    fn read<V: Vmcs + ?Sized>(&self, _: &V, address: Gva, buf: &mut [u8]) -> Result<(), PageFault> {
        use hvcore::memory::GuestMemory;
        self.0.read(L1Gpa::new(address.raw()), buf).map_err(|_| PageFault { address, error_code: 0 })
    }
    fn write<V: Vmcs + ?Sized>(&self, _: &V, address: Gva, bytes: &[u8]) -> Result<(), PageFault> {
        use hvcore::memory::GuestMemory;
        self.0.write(L1Gpa::new(address.raw()), bytes).map_err(|_| PageFault { address, error_code: 2 })
    }
}

/// The pages of a VP's shadow, as the model's memory has them.
pub struct Pool(pub Arc<[ShadowPage]>);

impl Lent for Pool {
    fn bytes(&self) -> u64 {
        self.0.len() as u64 * 4096
    }
    fn word(&self, offset: u64) -> u64 {
        self.0[(offset >> 12) as usize].entry((offset & 4095) as usize >> 3)
    }
}

/// A virtual processor.
pub struct Vp<'a> {
    /// Runs L1.
    pub vmcs01: HwVmcs,
    /// Runs L2.
    pub vmcs02: HwVmcs,
    /// The registers.
    pub regs: Regs,
    /// The library's state machine.
    pub nested: NestedVmx,
    /// The shadow of L1's EPT.
    pub shadow: EptShadow<'a, 2>,
    /// L1's memory.
    pub memory: L1View,
    /// The same by linear address.
    pub linear: Flat,
    /// The VP assist page is enabled.
    pub assist: bool,
    /// Where its pages are.
    pub at: Places,
    /// Why it has been reset since it last started.
    pub fell: Option<&'static str>,
    msr02: Box<MsrBitmap>,
    io02: Box<IoBitmaps>,
    known: Box<[u64; 512 + 1024]>,
}

/// The library's machine.
pub type VpMachine<'m> = Machine<'m, HwVmcs, Regs, L1View, Flat>;

impl<'a> Vp<'a> {
    /// The VP after reset, its L1 started.
    pub fn new(
        config: Config,
        at: Places,
        pages: &'a Arc<[ShadowPage]>,
        records: &'a mut [PageRecord],
        hw: &Rc<Hardware>,
        mem: &Rc<PhysMem>,
    ) -> Self {
        let (mut msr02, mut io02): (Box<MsrBitmap>, Box<IoBitmaps>) = (Box::new([0; 512]), Box::new([0; 1024]));
        let mut msr = MergedMap { words: &mut msr02, base: Hpa::new(at.msr02) };
        let mut io = MergedMap { words: &mut io02, base: Hpa::new(at.io02) };
        let nested = NestedVmx::new(config, &mut msr, &mut io);
        let pool = PagePool::new(pages, records, |n| Hpa::new(at.pool + n as u64 * 4096)).expect("a pool");
        let memory = L1View::new(Rc::clone(mem), at.l1);
        let mut vp = Self {
            vmcs01: HwVmcs::new(hw, at.vmcs01),
            vmcs02: HwVmcs::new(hw, at.vmcs02),
            regs: Regs::default(),
            nested,
            shadow: EptShadow::new(pool, 4, EptFormat::of(&config)).expect("enough pages"),
            linear: Flat(memory.clone()),
            memory,
            assist: false,
            at,
            fell: None,
            msr02,
            io02,
            known: Box::new([0; 512 + 1024]),
        };
        vp.set_controls();
        vp.init();
        vp
    }

    /// The embedder's own controls.
    fn set_controls(&mut self) {
        use Field::*;
        let required = |allowed: (u32, u32)| u64::from(allowed.0);
        for (field, value) in [
            (PinBasedControls, required(CAPS.pin) | 1 << 3 | 1 << 5),
            (PrimaryControls, required(CAPS.proc) | 1 << 25 | 1 << 28 | 1 << 31),
            (SecondaryControls, 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7),
            (ExitControls, required(CAPS.exit) | 1 << 9 | 0xF << 18),
            (EntryControls, required(CAPS.entry) | 1 << 9 | 3 << 14),
            (MsrBitmap, self.at.msr01),
            (IoBitmapA, self.at.io01),
            (IoBitmapB, self.at.io01 + 0x1000),
            (EptPointer, self.at.eptp01()),
            (Cr4Mask, 0x2000),
        ] {
            self.vmcs01.write(field, value);
        }
    }

    /// L1's processor as its kernel starts: 64-bit, paging on.
    pub fn init(&mut self) {
        use Field::*;
        for (field, value) in [
            (EntryControls, u64::from(CAPS.entry.0) | 1 << 9 | 3 << 14),
            (EntryInterruptionInfo, 0),
            (GuestCr0, 0x8001_0031),
            (GuestCr3, TABLES),
            (GuestCr4, 0x2020),
            (Cr4ReadShadow, 0x2020),
            (GuestEfer, 0xD00),
            (GuestPat, 0x0007_0406_0007_0406),
            (GuestRip, 0x6_0000),
            (GuestRsp, 0x7_F000),
            (GuestRflags, 2),
            (GuestInterruptibility, 0),
            (GuestActivity, 0),
            (GuestPendingDebugExceptions, 0),
            (GuestDebugctl, 0),
            (GuestDr7, 0x400),
        ] {
            self.vmcs01.write(field, value);
        }
        for (field, value) in segments() {
            self.vmcs01.write(field, value);
        }
        self.regs = Regs::default();
        self.assist = false;
    }

    /// Resets the VP, as a triple fault of its L1 does.
    pub fn reset(&mut self, why: &'static str) {
        self.init();
        self.nested.reset();
        self.fell = Some(why);
    }

    /// The VMCS of the level that runs.
    pub fn vmcs(&mut self) -> &mut HwVmcs {
        match self.nested.level() {
            hvcore::addr::Level::L1 => &mut self.vmcs01,
            hvcore::addr::Level::L2 => &mut self.vmcs02,
        }
    }

    /// Calls the library.
    pub fn call<R>(
        &mut self,
        vpids: &mut VpidPool,
        own: &OwnMaps,
        f: impl FnOnce(&mut NestedVmx, &mut VpMachine<'_>) -> R,
    ) -> R {
        let mut machine = Machine {
            vmcs01: &mut self.vmcs01,
            vmcs02: &mut self.vmcs02,
            gprs: &mut self.regs,
            msr_bitmap02: MergedMap { words: &mut self.msr02, base: Hpa::new(self.at.msr02) },
            io_bitmaps02: MergedMap { words: &mut self.io02, base: Hpa::new(self.at.io02) },
            msr_bitmap01: &own.msr,
            io_bitmaps01: &own.io,
            vpids,
            assist_page: self.assist.then_some(L1Gpa::new(ASSIST)),
            active_evmcs: None,
            memory: &self.memory,
            linear: &self.linear,
        };
        f(&mut self.nested, &mut machine)
    }

    /// Puts L2's bitmaps in the processor's memory. False if one lets through what `own` does not.
    pub fn store_bitmaps(&mut self, mem: &PhysMem, own: &OwnMaps) -> bool {
        let mut tight = true;
        let (msr, io) = self.known.split_at_mut(512);
        let maps =
            [(self.at.msr02, &self.msr02[..], &own.msr[..], msr), (self.at.io02, &self.io02[..], &own.io[..], io)];
        for (at, words, own, known) in maps {
            for (at, ((word, own), known)) in (at..).step_by(8).zip(words.iter().zip(own).zip(known)) {
                tight &= own & !word == 0;
                if word != known {
                    *known = *word;
                    mem.write(at, 8, *word);
                }
            }
        }
        tight
    }
}
