//! One VP with 1 MiB of L1 memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use hvcore::addr::{Gva, Hpa, L1Gpa};
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::bits::{access_rights as ar, cr4, rflags};
use nvmx::caps::{Config, Host};
use nvmx::evmcs::ActivePage;
use nvmx::field::{Encoding, Field};
use nvmx::vmcs12::{REVISION, Vmcs12};
use nvmx::vpid::{Support, VpidPool};
use nvmx::{Gprs, L1Exit, Linear, Machine, MergedMap, Msrs, NestedVmx, PageFault, Vmcs, exit_reason};
use zerocopy::{FromZeros, IntoBytes};

/// Where L1 keeps its VMCS.
pub const VMCS12: u64 = 0x1_0000;
/// Another VMCS of L1.
pub const OTHER: u64 = 0x1_1000;
/// L1's VMXON region.
pub const VMXON: u64 = 0x1_2000;
/// L1's MSR bitmap.
pub const MSR_BITMAP12: u64 = 0x2_0000;
/// L1's VP assist page.
pub const ASSIST: u64 = 0x4_0000;
/// L1's enlightened VMCS.
pub const EVMCS: u64 = 0x4_1000;
/// Where memory operands are; linear addresses are physical ones.
pub const OPERAND: u64 = 0x5_0000;
/// Where L1's code is.
pub const L1_RIP: u64 = 0x8000;
pub const MSR_BITMAP02: u64 = 0xAA_0000;
pub const IO_BITMAPS02: u64 = 0xBB_0000;

/// A hardware VMCS that counts what is done to it.
pub struct FakeVmcs {
    pub fields: [u64; Field::COUNT],
    pub reads: RefCell<Vec<Field>>,
    pub writes: Vec<Field>,
    /// Which of the two it is, and which is current, with the number of switches: VMPTRLDs.
    id: u8,
    pub current: Rc<Cell<(u8, usize)>>,
}

impl FakeVmcs {
    fn new(id: u8, current: &Rc<Cell<(u8, usize)>>) -> Self {
        Self {
            fields: [0; Field::COUNT],
            reads: RefCell::default(),
            writes: Vec::new(),
            id,
            current: Rc::clone(current),
        }
    }

    fn switch(&self) {
        let (current, switches) = self.current.get();
        if current != self.id {
            self.current.set((self.id, switches + 1));
        }
    }

    /// The field, not counted.
    pub fn peek(&self, field: Field) -> u64 {
        self.fields[field.slot()]
    }

    /// Sets the field, not counted.
    pub fn poke(&mut self, field: Field, value: u64) {
        self.fields[field.slot()] = value & field.mask();
    }
}

impl Vmcs for FakeVmcs {
    fn read(&self, field: Field) -> u64 {
        self.switch();
        self.reads.borrow_mut().push(field);
        self.peek(field)
    }
    fn write(&mut self, field: Field, value: u64) {
        self.switch();
        self.writes.push(field);
        self.poke(field, value);
    }
}

pub struct Memory {
    pub words: Vec<AtomicU64>,
    /// Bytes read and written through [`GuestMemory`].
    pub bytes_read: Cell<usize>,
    pub bytes_written: Cell<usize>,
    /// Writes of physical memory fail.
    pub read_only: Cell<bool>,
    /// The page of L1's linear memory that faults, and the error code.
    pub fault: Cell<Option<(u64, u32)>>,
}

impl Memory {
    fn span(&self, gpa: u64, len: usize) -> Result<usize, MemoryError> {
        let from = gpa as usize;
        let to = from.checked_add(len).ok_or(MemoryError)?;
        if to > self.words.len() * 8 { Err(MemoryError) } else { Ok(from) }
    }

    pub fn load(&self, from: usize, buf: &mut [u8]) {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = from + i;
            *byte = self.words[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
        }
    }

    pub fn store(&self, from: usize, buf: &[u8]) {
        for (i, byte) in buf.iter().enumerate() {
            let at = from + i;
            let mut word = self.words[at / 8].load(Ordering::Relaxed).to_le_bytes();
            word[at % 8] = *byte;
            self.words[at / 8].store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }

    /// The first of `len` bytes at `address` that faults.
    fn walk(&self, address: Gva, len: usize) -> Result<usize, PageFault> {
        if let Some((page, error_code)) = self.fault.get()
            && let Some(address) = (address.raw()..address.raw() + len as u64).find(|at| at & !0xFFF == page)
        {
            return Err(PageFault { address: Gva::new(address), error_code });
        }
        Ok(address.raw() as usize)
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.bytes_read.set(self.bytes_read.get() + buf.len());
        self.load(self.span(gpa.raw(), buf.len())?, buf);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.bytes_written.set(self.bytes_written.get() + buf.len());
        if self.read_only.get() {
            return Err(MemoryError);
        }
        self.store(self.span(gpa.raw(), buf.len())?, buf);
        Ok(())
    }
    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        Err(MemoryError)
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        Err(MemoryError)
    }
}

/// Linear addresses are physical ones; what lies beyond the memory reads as ones.
impl Linear for Memory {
    fn read<V: Vmcs + ?Sized>(&self, _: &V, address: Gva, buf: &mut [u8]) -> Result<(), PageFault> {
        let from = self.walk(address, buf.len())?;
        buf.fill(0xFF);
        if self.span(address.raw(), buf.len()).is_ok() {
            self.load(from, buf);
        }
        Ok(())
    }
    fn write<V: Vmcs + ?Sized>(&self, _: &V, address: Gva, bytes: &[u8]) -> Result<(), PageFault> {
        let from = self.walk(address, bytes.len())?;
        if self.span(address.raw(), bytes.len()).is_ok() {
            self.store(from, bytes);
        }
        Ok(())
    }
}

#[derive(Default, Clone, Debug, PartialEq, Eq)]
pub struct Regs {
    pub gprs: [u64; 16],
    pub cr2: u64,
    pub msrs: Vec<(u32, u64)>,
}

impl Gprs for Regs {
    fn get(&self, n: u8) -> u64 {
        assert_ne!(n, 4, "RSP is in the VMCS");
        self.gprs[usize::from(n)]
    }
    fn set(&mut self, n: u8, value: u64) {
        assert_ne!(n, 4, "RSP is in the VMCS");
        self.gprs[usize::from(n)] = value;
    }
    fn set_cr2(&mut self, value: u64) {
        self.cr2 = value;
    }
}

/// MSRs are those that a test put there.
impl Msrs for Regs {
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(msr, _)| *msr == index).map(|(_, value)| *value)
    }
    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        match self.msrs.iter_mut().find(|(msr, _)| *msr == index) {
            Some((_, old)) => *old = value,
            None => return false,
        }
        true
    }
}

/// How an instruction of L1 ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Succeed,
    FailInvalid,
    /// With the number in L0's copy of the current VMCS.
    FailValid(u32),
    /// Vector and error code.
    Fault(u8, Option<u32>),
}

pub const UD: End = End::Fault(6, None);
pub const SS: End = End::Fault(12, Some(0));
pub const GP: End = End::Fault(13, Some(0));

pub struct Rig {
    pub nested: NestedVmx,
    pub vmcs01: FakeVmcs,
    pub vmcs02: FakeVmcs,
    pub regs: Regs,
    pub msr_bitmap02: Box<[u64; 512]>,
    pub io_bitmaps02: Box<[u64; 1024]>,
    pub msr_bitmap01: Box<[u64; 512]>,
    pub io_bitmaps01: Box<[u64; 1024]>,
    pub vpids: VpidPool,
    pub memory: Memory,
    pub assist_page: Option<L1Gpa>,
    /// None unless a test sets it.
    pub active_evmcs: Option<ActivePage<'static>>,
}

/// The capability MSRs of the emulated processor that the images run on, Bochs's corei7_skylake_x.
pub fn capability(msr: u32) -> u64 {
    match msr {
        0x480 => 0x00DA_1000_0000_002B | 1 << 55,
        0x481 | 0x48D => 0x0000_007F_0000_0016,
        0x482 => 0xFFF9_FFFE_0401_E172,
        0x48E => 0xFFF9_FFFE_0400_6172,
        0x483 => 0x01FF_FFFF_0003_6DFF,
        0x48F => 0x01FF_FFFF_0003_6DFB,
        0x484 => 0x0003_FFFF_0000_11FF,
        0x490 => 0x0003_FFFF_0000_11FB,
        0x485 => 0x7004_C1E0,
        0x486 => 0x8000_0021,
        0x487 => 0xFFFF_FFFF,
        0x488 => 0x2000,
        0x489 => 0x0037_67FF,
        0x48B => 0x0217_7FFF << 32,
        0x48C => 0xF01_0633_4141,
        0x491 => 1,
        _ => 0,
    }
}

/// The processor without more than the capability MSRs say.
pub fn host() -> Host {
    Host::from_msrs(40, 48, capability)
}

/// What a 64-bit L1 hypervisor writes into its VMCS for a 64-bit L2 with EPT and VPID; every check passes.
pub fn valid(config: &Config) -> Vec<(Field, u64)> {
    use Field::*;
    let control = |allowed: nvmx::caps::Allowed, wanted: u32| u64::from(allowed.required | wanted);
    let mut fields = vec![
        (PinBasedControls, control(config.pin(), 0)),
        (PrimaryControls, control(config.primary(), 1 << 7 | 1 << 28 | 1 << 31)),
        (SecondaryControls, control(config.secondary(), 1 << 1 | 1 << 5)),
        (ExitControls, control(config.exit(), 1 << 9 | 1 << 20 | 1 << 21)),
        (EntryControls, control(config.entry(), 1 << 9 | 1 << 15)),
        (MsrBitmap, MSR_BITMAP12),
        (EptPointer, 0x6_0000 | 3 << 3 | 6),
        (VirtualProcessorId, 7),
        (VmcsLinkPointer, u64::MAX),
        (Cr0Mask, 0),
        (Cr4Mask, cr4::VMXE),
        (GuestCr0, 0x8000_0031),
        (GuestCr3, 0x7_0000),
        (GuestCr4, cr4::PAE | cr4::VMXE),
        (GuestEfer, 0xD00),
        (GuestRip, 0x9000),
        (GuestRsp, 0xA000),
        (GuestRflags, 2),
        (GuestDr7, 0x400),
        (HostCr0, 0x8000_0031),
        (HostCr3, 0x7_1000),
        (HostCr4, cr4::PAE | cr4::VMXE),
        (HostEfer, 0xD00),
        (HostCsSelector, 8),
        (HostSsSelector, 0x10),
        (HostDsSelector, 0x10),
        (HostEsSelector, 0x10),
        (HostTrSelector, 0x18),
        (HostTrBase, 0x1234_0000),
        (HostGdtrBase, 0x1235_0000),
        (HostIdtrBase, 0x1236_0000),
        (HostRip, 0xB000),
        (HostRsp, 0xC000),
    ];
    fields.extend(segments());
    fields
}

/// Segments of 64-bit code.
fn segments() -> Vec<(Field, u64)> {
    use Field::*;
    let data = [
        (GuestEsSelector, GuestEsLimit, GuestEsAccessRights),
        (GuestSsSelector, GuestSsLimit, GuestSsAccessRights),
        (GuestDsSelector, GuestDsLimit, GuestDsAccessRights),
        (GuestFsSelector, GuestFsLimit, GuestFsAccessRights),
        (GuestGsSelector, GuestGsLimit, GuestGsAccessRights),
    ];
    let mut fields: Vec<_> = data
        .into_iter()
        .flat_map(|(selector, limit, rights)| [(selector, 0x10), (limit, 0xFFFF_FFFF), (rights, 0xC093)])
        .collect();
    fields.extend([
        (GuestCsSelector, 8),
        (GuestCsLimit, 0xFFFF_FFFF),
        (GuestCsAccessRights, 0xA09B),
        (GuestTrSelector, 0x18),
        (GuestTrLimit, 0x67),
        (GuestTrAccessRights, 0x8B),
        (GuestLdtrAccessRights, u64::from(ar::UNUSABLE)),
    ]);
    fields
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Config::all(host(), false, false).unwrap())
    }

    /// L1 may use the enlightened VMCS.
    pub fn enlightened() -> Self {
        Self::with(Config::all(host(), true, false).unwrap())
    }

    pub fn with(config: Config) -> Self {
        let mut msr_bitmap02: Box<[u64; 512]> = Box::new([0; 512]);
        let mut io_bitmaps02: Box<[u64; 1024]> = Box::new([0; 1024]);
        let nested = NestedVmx::new(
            config,
            &mut MergedMap { words: &mut msr_bitmap02, base: Hpa::new(MSR_BITMAP02) },
            &mut MergedMap { words: &mut io_bitmaps02, base: Hpa::new(IO_BITMAPS02) },
        );
        let current = Rc::default();
        let mut rig = Self {
            nested,
            vmcs01: FakeVmcs::new(1, &current),
            vmcs02: FakeVmcs::new(2, &current),
            regs: Regs::default(),
            msr_bitmap02,
            io_bitmaps02,
            msr_bitmap01: Box::new([0; 512]),
            io_bitmaps01: Box::new([0; 1024]),
            vpids: VpidPool::new(0, 16, Support::SingleContext),
            memory: Memory {
                words: (0..1 << 17).map(|_| AtomicU64::new(0)).collect(),
                bytes_read: Cell::new(0),
                bytes_written: Cell::new(0),
                read_only: Cell::new(false),
                fault: Cell::new(None),
            },
            assist_page: None,
            active_evmcs: None,
        };
        rig.start_l1();
        rig
    }

    /// VMCS01 as an embedder sets it up, L1 in 64-bit code at CPL 0 with CR4.VMXE set.
    fn start_l1(&mut self) {
        use Field::*;
        let own = [
            (PinBasedControls, 0x16 | 1 << 3),
            (PrimaryControls, 0x0400_6172 | 1 << 28 | 1 << 31),
            (SecondaryControls, 1 << 1 | 1 << 5 | 1 << 7),
            (ExitControls, 0x0003_6DFB | 1 << 9 | 1 << 20 | 1 << 21),
            (EntryControls, 0x11FB | 1 << 9 | 1 << 15),
            (MsrBitmap, 0xDD_0000),
            (EptPointer, 0xCC_0000 | 3 << 3 | 6),
            (VirtualProcessorId, 1),
            (VmcsLinkPointer, u64::MAX),
            (Cr4Mask, cr4::VMXE),
            (Cr4ReadShadow, cr4::VMXE),
            (GuestCr0, 0x8000_0031),
            (GuestCr3, 0x4000),
            (GuestCr4, cr4::PAE | cr4::VMXE),
            (GuestEfer, 0xD00),
            (GuestRip, L1_RIP),
            (GuestRsp, 0x7000),
            (GuestRflags, 2),
            (GuestDr7, 0x400),
        ];
        for (field, value) in own.into_iter().chain(segments()) {
            self.vmcs01.poke(field, value);
        }
    }

    /// A rig whose L1 is in VMX operation.
    pub fn ready() -> Self {
        let mut rig = Self::new();
        assert_eq!(rig.vmxon(VMXON), End::Succeed);
        rig
    }

    /// A rig whose L1 has a current VMCS.
    pub fn loaded() -> Self {
        let mut rig = Self::ready();
        rig.region(VMCS12, REVISION);
        assert_eq!(rig.vmptrld(VMCS12), End::Succeed);
        rig
    }

    pub fn call<R>(
        &mut self,
        f: impl FnOnce(&mut NestedVmx, &mut Machine<'_, FakeVmcs, Regs, Memory, Memory>) -> R,
    ) -> R {
        let mut machine = Machine {
            vmcs01: &mut self.vmcs01,
            vmcs02: &mut self.vmcs02,
            gprs: &mut self.regs,
            msr_bitmap02: MergedMap { words: &mut self.msr_bitmap02, base: Hpa::new(MSR_BITMAP02) },
            io_bitmaps02: MergedMap { words: &mut self.io_bitmaps02, base: Hpa::new(IO_BITMAPS02) },
            msr_bitmap01: &self.msr_bitmap01,
            io_bitmaps01: &self.io_bitmaps01,
            vpids: &mut self.vpids,
            assist_page: self.assist_page,
            active_evmcs: self.active_evmcs,
            memory: &self.memory,
            linear: &self.memory,
        };
        f(&mut self.nested, &mut machine)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.store(gpa as usize, bytes);
    }

    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.load(gpa as usize, &mut bytes);
        bytes
    }

    /// An empty region with this revision identifier.
    pub fn region(&self, gpa: u64, revision: u32) {
        self.write(gpa, &[0; 4096]);
        self.write(gpa, &revision.to_le_bytes());
    }

    /// The VMCS in L1's memory.
    pub fn stored(&self, gpa: u64) -> Vmcs12 {
        let mut vmcs = Vmcs12::new_zeroed();
        self.memory.load(gpa as usize, vmcs.as_mut_bytes());
        vmcs
    }

    /// L1 exits with `reason`, at an instruction of 4 bytes.
    pub fn l1(&mut self, reason: u32) -> L1Exit {
        self.vmcs01.poke(Field::ExitReason, reason.into());
        self.vmcs01.poke(Field::ExitInstructionLength, 4);
        self.vmcs01.poke(Field::EntryInterruptionInfo, 0);
        self.call(|nested, m| nested.l1_exit(m))
    }

    /// As [`l1`](Self::l1); it goes on in L1, and how.
    pub fn end(&mut self, reason: u32) -> End {
        let rip = self.vmcs01.peek(Field::GuestRip);
        let before = self.vmcs01.peek(Field::GuestRflags);
        assert_eq!(self.l1(reason), L1Exit::Resume);
        self.ended(rip, before)
    }

    /// How the instruction at `rip` ended; RFLAGS were `before`.
    pub fn ended(&self, rip: u64, before: u64) -> End {
        let info = self.vmcs01.peek(Field::EntryInterruptionInfo);
        let flags = self.vmcs01.peek(Field::GuestRflags);
        if info != 0 {
            assert_eq!(info & !0xFFF, 0x8000_0000, "{info:#x}");
            assert_eq!(info >> 8 & 7, 3);
            assert_eq!((self.vmcs01.peek(Field::GuestRip), flags), (rip, before), "a fault changes nothing");
            let code = (info & 1 << 11 != 0).then(|| self.vmcs01.peek(Field::EntryExceptionErrorCode) as u32);
            return End::Fault(info as u8, code);
        }
        assert_eq!(self.vmcs01.peek(Field::GuestRip), rip + 4);
        assert_eq!(flags & !rflags::ARITHMETIC, before & !rflags::ARITHMETIC);
        match flags & rflags::ARITHMETIC {
            0 => End::Succeed,
            rflags::CF => End::FailInvalid,
            rflags::ZF => End::FailValid(self.nested.vmcs12().get32(Field::InstructionError)),
            other => panic!("RFLAGS {other:#x}"),
        }
    }

    /// Instruction information of a memory operand at [`OPERAND`]: DS, no base, no index, 64-bit address.
    pub fn at_operand(&mut self) {
        self.vmcs01.poke(Field::ExitInstructionInfo, 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27);
        self.vmcs01.poke(Field::ExitQualification, OPERAND);
    }

    /// The instruction of `reason` with an 8-byte memory operand that holds `value`.
    pub fn with_pointer(&mut self, reason: u32, value: u64) -> End {
        self.at_operand();
        self.write(OPERAND, &value.to_le_bytes());
        self.end(reason)
    }

    /// VMXON with a good region at `gpa`.
    pub fn vmxon(&mut self, gpa: u64) -> End {
        if gpa & 0xFFF == 0 && gpa < 0x10_0000 {
            self.region(gpa, REVISION);
        }
        self.with_pointer(exit_reason::VMXON, gpa)
    }

    pub fn vmptrld(&mut self, gpa: u64) -> End {
        self.with_pointer(exit_reason::VMPTRLD, gpa)
    }

    pub fn vmclear(&mut self, gpa: u64) -> End {
        self.with_pointer(exit_reason::VMCLEAR, gpa)
    }

    /// VMPTRST to memory: what is there after it.
    pub fn vmptrst(&mut self) -> (End, u64) {
        let end = self.with_pointer(exit_reason::VMPTRST, 0x5555);
        (end, u64::from_le_bytes(self.read(OPERAND)))
    }

    /// VMREAD of the field whose encoding RCX has, to RBX.
    pub fn vmread(&mut self, encoding: Encoding) -> (End, u64) {
        self.regs.gprs[1] = encoding.0.into();
        self.regs.gprs[3] = 0x5555;
        self.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 1 << 10 | 3 << 3);
        let end = self.end(exit_reason::VMREAD);
        (end, self.regs.gprs[3])
    }

    /// VMWRITE of RBX to the field whose encoding RCX has.
    pub fn vmwrite(&mut self, encoding: Encoding, value: u64) -> End {
        self.regs.gprs[1] = encoding.0.into();
        self.regs.gprs[3] = value;
        self.vmcs01.poke(Field::ExitInstructionInfo, 1 << 28 | 1 << 10 | 3 << 3);
        self.end(exit_reason::VMWRITE)
    }

    /// VMWRITEs of what [`valid`] says.
    pub fn vmwrite_valid(&mut self) {
        for (field, value) in valid(self.nested.config()) {
            assert_eq!(self.vmwrite(field.encoding(), value), End::Succeed, "{field:?}");
        }
    }
}
