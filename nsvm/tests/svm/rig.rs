//! One VP with 1 MiB of L1 memory.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use hvcore::addr::{Hpa, L1Gpa, Level};
use hvcore::memory::{GuestMemory, MemoryError};
use nsvm::asid::AsidPool;
use nsvm::caps::{Config, Features, Host};
use nsvm::vmcb::Vmcb;
use nsvm::vmcb::bits::{efer, misc1, misc2, seg};
use nsvm::{Code, Entry, EntryPlan, Gprs, L1Exit, L2Exit, Machine, MergedMap, NestedSvm, exit_code};
use zerocopy::{FromZeros, IntoBytes};

/// Where L1 keeps its VMCB.
pub const VMCB12: u64 = 0x1_0000;
/// Where L1 keeps its permission maps.
pub const MSRPM12: u64 = 0x2_0000;
pub const IOPM12: u64 = 0x3_0000;
/// Where L1's code is, linear and physical.
pub const L1_RIP: u64 = 0x8000;
/// Where L2's code is; the rig fetches it from the same memory.
pub const L2_RIP: u64 = 0x9000;
pub const MSRPM02: u64 = 0xAA_0000;
pub const IOPM02: u64 = 0xBB_0000;

pub struct Memory {
    pub words: Vec<AtomicU64>,
    pub reads: Cell<usize>,
    pub writes: Cell<usize>,
    /// Writes fail.
    pub read_only: Cell<bool>,
    /// Pages are lent.
    pub lends: Cell<bool>,
}

impl Memory {
    fn span(&self, gpa: L1Gpa, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let from = gpa.raw() as usize;
        let to = from.checked_add(len).ok_or(MemoryError)?;
        if to > self.words.len() * 8 { Err(MemoryError) } else { Ok(from..to) }
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
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.set(self.reads.get() + 1);
        let span = self.span(gpa, buf.len())?;
        self.load(span.start, buf);
        Ok(())
    }
    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.writes.set(self.writes.get() + 1);
        if self.read_only.get() {
            return Err(MemoryError);
        }
        let span = self.span(gpa, buf.len())?;
        self.store(span.start, buf);
        Ok(())
    }
    fn page(&self, gpa: L1Gpa) -> Option<&[AtomicU64; 512]> {
        let span = self.span(gpa, 4096).ok().filter(|_| self.lends.get())?;
        self.words[span.start / 8..][..512].try_into().ok()
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

/// Code is at the GPA that equals RIP.
impl Code for Memory {
    fn fetch(&self, _: Level, vmcb: &Vmcb, bytes: &mut [u8; 15]) -> usize {
        match self.span(L1Gpa::new(vmcb.save.rip), 15) {
            Ok(span) => {
                self.load(span.start, bytes);
                15
            }
            Err(_) => 0,
        }
    }
}

#[derive(Default, Clone, Debug, PartialEq, Eq)]
pub struct Regs {
    pub rcx: u64,
    pub rdx: u64,
}

impl Gprs for Regs {
    fn rcx(&self) -> u64 {
        self.rcx
    }
    fn rdx(&self) -> u64 {
        self.rdx
    }
    fn set_rdx(&mut self, value: u64) {
        self.rdx = value;
    }
}

pub struct Rig {
    pub nested: NestedSvm,
    pub vmcb01: Box<Vmcb>,
    pub vmcb02: Box<Vmcb>,
    /// L1's VMCB as L1 would write it; [`Rig::put`] copies it to memory.
    pub vmcb12: Box<Vmcb>,
    pub regs: Regs,
    pub msrpm02: Box<[u64; 1024]>,
    pub iopm02: Box<[u64; 1536]>,
    pub msrpm01: Box<[u64; 1024]>,
    pub iopm01: Box<[u64; 1536]>,
    pub asids: AsidPool,
    pub memory: Memory,
    /// The plan of the last entry.
    plan: Option<EntryPlan>,
}

pub fn host(features: Features) -> Host {
    Host {
        features,
        phys_bits: 40,
        cr4_valid: 0x0037_07FF,
        efer_valid: 0xFD01,
        intercepts: Host::intercepts_of(true, true, true, false, true),
    }
}

/// A processor with nested paging and nothing else, like QEMU's without vGIF.
pub fn plain() -> Host {
    host(Features::NP)
}

/// A VMCB of a 64-bit guest at CPL 0.
pub fn long_mode() -> Box<Vmcb> {
    let mut vmcb = Box::new(Vmcb::new_zeroed());
    let save = &mut vmcb.save;
    save.efer = efer::SVME | efer::LME | efer::LMA;
    save.cr0 = 0x8000_0011;
    save.cr4 = 0x20;
    save.cr3 = 0x5000;
    save.cs.attrib = 0x9B | seg::L;
    save.rflags = 2;
    save.dr6 = 0xFFFF_0FF0;
    save.dr7 = 0x400;
    save.g_pat = 0x0007_0406_0007_0406;
    vmcb
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Config::all(plain(), 8, true).unwrap())
    }

    pub fn with(config: Config) -> Self {
        let mut msrpm02: Box<[u64; 1024]> = Box::new([0; 1024]);
        let mut iopm02: Box<[u64; 1536]> = Box::new([0; 1536]);
        let nested = NestedSvm::new(
            config,
            &mut MergedMap { words: &mut msrpm02, base: Hpa::new(MSRPM02) },
            &mut MergedMap { words: &mut iopm02, base: Hpa::new(IOPM02) },
        );
        let mut vmcb01 = long_mode();
        vmcb01.save.rip = L1_RIP;
        vmcb01.save.rsp = 0x7000;
        vmcb01.save.cr3 = 0x4000;
        vmcb01.control.intercepts.misc1 = misc1::NMI | misc1::INIT | misc1::MSR_PROT | misc1::SHUTDOWN;
        vmcb01.control.intercepts.misc2 = 0x7F;
        vmcb01.control.np_control = 1;
        vmcb01.control.n_cr3 = 0xCC_0000;
        vmcb01.control.msrpm_base = 0xDD_0000;
        vmcb01.control.iopm_base = 0xEE_0000;
        vmcb01.control.tsc_offset = 1000;
        let mut vmcb12 = long_mode();
        vmcb12.save.rip = L2_RIP;
        vmcb12.save.rsp = 0x6000;
        vmcb12.control.intercepts.misc2 = misc2::VMRUN;
        vmcb12.control.asid = 1;
        vmcb12.control.msrpm_base = MSRPM12;
        vmcb12.control.iopm_base = IOPM12;
        vmcb12.control.tsc_offset = 20;
        Self {
            nested,
            vmcb01,
            vmcb02: Box::new(Vmcb::new_zeroed()),
            vmcb12,
            regs: Regs::default(),
            msrpm02,
            iopm02,
            msrpm01: Box::new([0; 1024]),
            iopm01: Box::new([0; 1536]),
            asids: AsidPool::new(0, 16, false).unwrap(),
            memory: Memory {
                words: (0..1 << 17).map(|_| AtomicU64::new(0)).collect(),
                reads: Cell::new(0),
                writes: Cell::new(0),
                read_only: Cell::new(false),
                lends: Cell::new(false),
            },
            plan: None,
        }
    }

    /// A rig whose L1 has switched SVM on.
    pub fn ready() -> Self {
        let mut rig = Self::new();
        rig.enable();
        rig
    }

    pub fn enable(&mut self) {
        assert_eq!(self.wrmsr(nsvm::msr::EFER, efer::SVME | efer::LME), L1Exit::Resume);
        assert!(self.nested.svm_enabled());
    }

    pub fn call<R>(&mut self, f: impl FnOnce(&mut NestedSvm, &mut Machine<'_, Regs, Memory, Memory>) -> R) -> R {
        let mut machine = Machine {
            vmcb01: &mut self.vmcb01,
            vmcb02: &mut self.vmcb02,
            gprs: &mut self.regs,
            msrpm02: MergedMap { words: &mut self.msrpm02, base: Hpa::new(MSRPM02) },
            iopm02: MergedMap { words: &mut self.iopm02, base: Hpa::new(IOPM02) },
            msrpm01: &self.msrpm01,
            iopm01: &self.iopm01,
            asids: &mut self.asids,
            memory: &self.memory,
            code: &self.memory,
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

    /// Writes L1's VMCB to memory.
    pub fn put(&self) {
        self.write(VMCB12, self.vmcb12.as_bytes());
    }

    /// Reads L1's VMCB back.
    pub fn get(&mut self) {
        self.memory.load(VMCB12 as usize, self.vmcb12.as_mut_bytes());
    }

    /// L1 exits with `code` at an instruction of these bytes.
    pub fn l1(&mut self, code: u64, insn: &[u8]) -> L1Exit {
        self.write(self.vmcb01.save.rip, insn);
        self.vmcb01.control.exit_code = code;
        self.call(|nested, m| nested.l1_exit(m))
    }

    pub fn wrmsr(&mut self, index: u32, value: u64) -> L1Exit {
        (self.regs.rcx, self.regs.rdx) = (index.into(), value >> 32);
        self.vmcb01.save.rax = value & 0xFFFF_FFFF;
        self.vmcb01.control.exit_info_1 = 1;
        self.l1(exit_code::MSR, &[0x0F, 0x30])
    }

    pub fn rdmsr(&mut self, index: u32) -> (L1Exit, u64) {
        self.regs = Regs { rcx: index.into(), rdx: u64::MAX };
        self.vmcb01.control.exit_info_1 = 0;
        let exit = self.l1(exit_code::MSR, &[0x0F, 0x32]);
        (exit, self.regs.rdx << 32 | self.vmcb01.save.rax)
    }

    /// L1 executes VMRUN with the VMCB in `vmcb12`.
    pub fn vmrun(&mut self) -> L1Exit {
        self.put();
        self.vmcb01.save.rax = VMCB12;
        self.l1(exit_code::VMRUN, &[0x0F, 0x01, 0xD8])
    }

    /// As [`vmrun`](Self::vmrun), and it enters.
    pub fn enter(&mut self) {
        let exit = self.vmrun();
        assert!(matches!(exit, L1Exit::EnterL2(_)), "{exit:?}: {:?}", self.nested.last_refusal());
    }

    /// Whether the next entry is the last one over again.
    pub fn repeats(&mut self) -> bool {
        let level = self.nested.level();
        self.call(|nested, m| nested.may_repeat(m, level))
    }

    /// Prepares the last entry over again.
    pub fn repeat(&mut self) {
        let level = self.nested.level();
        self.call(|nested, m| nested.repeat_entry(m, level));
    }

    /// Prepares an entry. One that may be repeated must be what it is when prepared anew.
    pub fn prepare(&mut self) -> EntryPlan {
        let before = (self.vmcb01.clone(), self.vmcb02.clone(), self.nested.clone(), self.asids.clone());
        let repeated = self.repeats().then(|| {
            self.repeat();
            (self.plan, self.vmcb01.as_bytes().to_vec(), self.vmcb02.as_bytes().to_vec())
        });
        (self.vmcb01, self.vmcb02, self.nested, self.asids) = before;
        let plan = match self.call(|nested, m| nested.prepare_entry(m)) {
            Entry::Run(plan) => plan,
            other => panic!("{other:?}"),
        };
        if let Some(repeated) = repeated {
            let anew = (Some(plan), self.vmcb01.as_bytes().to_vec(), self.vmcb02.as_bytes().to_vec());
            assert_eq!(repeated, anew);
        }
        self.plan = Some(plan);
        plan
    }

    /// L2 exits with `code`.
    pub fn l2(&mut self, code: u64) -> L2Exit {
        self.l2_with(code, 0, 0)
    }

    pub fn l2_with(&mut self, code: u64, info_1: u64, info_2: u64) -> L2Exit {
        let control = &mut self.vmcb02.control;
        (control.exit_code, control.exit_info_1, control.exit_info_2) = (code, info_1, info_2);
        self.call(|nested, m| nested.l2_exit(m, |_, _, _| false))
    }

    /// L2 exits to L1 with `code`, and L1's VMCB is read back.
    pub fn l2_to_l1(&mut self, code: u64) {
        assert_eq!(self.l2(code), L2Exit::ToL1);
        self.get();
    }
}
