//! L0's half of the enlightened VMCS against the reference model, on sequences of what L1 and L0 do.

use std::cell::{Cell, RefCell};

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::evmcs::{Enlightenments, EvmcsCache, LoadError, current_evmcs};
use nvmx::field::{Encoding, Field};
use nvmx::groups;
use nvmx::vmcs12::{REVISION, Vmcs12};
use tlfs_abi::evmcs::EvmcsEnlightenmentsControl;

use super::decode::Bytes;
use crate::reference::evmcs::{Fact, Model, Refused, facts, number};

/// Pages 1 to 3 hold enlightened VMCSs, page 4 is L1's VP assist page; there are no others.
const PAGES: u64 = 4;
const ASSIST: u64 = 4;
/// Actions of one case.
const ACTIONS: usize = 40;

struct Memory {
    bytes: RefCell<Vec<u8>>,
    reads: RefCell<Vec<(u64, u64)>>,
    /// Host memory that goes away: no access succeeds.
    gone: Cell<bool>,
}

impl Memory {
    fn range(&self, gpa: L1Gpa, count: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let end = gpa.raw().checked_add(count as u64).ok_or(MemoryError)?;
        if gpa.raw() < 0x1000 || end > (PAGES + 1) << 12 || self.gone.get() {
            return Err(MemoryError);
        }
        Ok(gpa.raw() as usize..end as usize)
    }

    fn page(&self, page: u64) -> Option<Vec<u8>> {
        let at = (page as usize) << 12;
        ((1..=PAGES).contains(&page) && !self.gone.get()).then(|| self.bytes.borrow()[at..at + 4096].to_vec())
    }

    fn put(&self, page: u64, offset: usize, size: usize, value: u64) {
        let at = ((page as usize) << 12) + offset;
        self.bytes.borrow_mut()[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        buf.copy_from_slice(&self.bytes.borrow()[self.range(gpa, buf.len())?]);
        self.reads.borrow_mut().push((gpa.raw(), buf.len() as u64));
        Ok(())
    }

    fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        let range = self.range(gpa, buf.len())?;
        self.bytes.borrow_mut()[range].copy_from_slice(buf);
        Ok(())
    }

    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }

    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        unreachable!("the enlightened VMCS needs none")
    }
}

/// How often a case came to what.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reached {
    /// Entries that read every group.
    pub whole: usize,
    /// Entries that read some groups.
    pub partial: usize,
    /// Entries that read none.
    pub clean: usize,
    /// Entries that were refused for the page or for its version.
    pub unreadable: usize,
    /// The same for the version.
    pub revision: usize,
    /// Exits.
    pub exits: usize,
}

/// A fault of the library that a control puts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// None.
    None,
    /// A field changes in the VMCS12 by itself.
    StrayField,
    /// An entry does not say that it happened.
    NotEntered,
    /// A byte of L1's changes at an exit.
    StrayByte,
}

struct Case {
    memory: Memory,
    cache: EvmcsCache,
    vmcs12: Vmcs12,
    model: Model,
    facts: &'static [Fact],
    reached: Reached,
    defect: Defect,
}

fn field(fact: &Fact) -> Field {
    Field::from_encoding(Encoding(fact.encoding)).expect("the library knows every field of the table")
}

/// Runs the actions that `bytes` name on both, and panics where they differ.
pub fn compare(bytes: &[u8]) -> Reached {
    compare_with(bytes, Defect::None)
}

/// The same with a defect.
pub fn compare_with(bytes: &[u8], defect: Defect) -> Reached {
    let mut case = Case {
        memory: Memory {
            bytes: RefCell::new(vec![0; (PAGES as usize + 1) << 12]),
            reads: RefCell::default(),
            gone: Cell::new(false),
        },
        cache: EvmcsCache::new(),
        vmcs12: Vmcs12::default(),
        model: Model::default(),
        facts: facts(),
        reached: Reached::default(),
        defect,
    };
    for page in 1..ASSIST {
        case.memory.put(page, 0, 4, 1);
    }
    let mut b = Bytes(bytes);
    for _ in 0..ACTIONS {
        if b.0.is_empty() {
            break;
        }
        case.act(&mut b);
        case.compare_fields();
    }
    case.reached
}

impl Case {
    fn act(&mut self, b: &mut Bytes<'_>) {
        let kind = b.u8();
        // Mostly the same page: another one is another story every time.
        let page = 1 + [0, 0, 0, 0, 0, 0, 1, 2][usize::from(b.u8() % 8)];
        match kind % 16 {
            0..=3 => {
                let fact = self.facts[usize::from(b.u8()) % self.facts.len()];
                self.memory.put(page, fact.offset, fact.size, b.word());
            }
            4 => self.memory.put(page, 0x338, 4, u64::from(b.u16()) | u64::from(kind >> 4 == 7) << 20),
            5 => {
                let at = usize::from(b.u16()) % 1100;
                self.memory.put(page, at, 1 + usize::from(b.u8() % 8), b.word());
            }
            6 => self.memory.put(page, 0, 4, [1, u64::from(REVISION), 0, b.word()][usize::from(b.u8() % 4)]),
            7..=10 => self.enter(b, page),
            11 | 12 => self.exit(b),
            13 => self.error(b),
            14 => self.release_or_restore(b, page),
            _ => self.announce(b, page),
        }
    }

    fn enter(&mut self, b: &mut Bytes<'_>, page: u64) {
        let rare = b.u8();
        let launch = rare & 7 == 7;
        let gpa = match rare >> 3 {
            31 => page << 12 | 1 << (b.u8() % 12),
            30 => b.word() & !0xFFF,
            _ => page << 12,
        };
        self.memory.gone.set(rare >> 3 == 29);
        self.memory.reads.borrow_mut().clear();
        let bytes = self.memory.page(gpa >> 12);
        let expected = self.model.load(self.facts, bytes.as_deref(), gpa, launch, u64::from(REVISION));
        let got = self.cache.load(&self.memory, L1Gpa::new(gpa), launch, &mut self.vmcs12);
        self.memory.gone.set(false);
        match (expected, got) {
            (Ok(read), Ok(loaded)) => {
                assert_eq!(loaded.changed & !groups::OTHER, u32::from(read));
                self.check_reads(read);
                let reached = match read {
                    0 => &mut self.reached.clean,
                    u16::MAX => &mut self.reached.whole,
                    _ => &mut self.reached.partial,
                };
                *reached += 1;
                self.entered(gpa >> 12);
            }
            (Err(Refused::Unreadable), Err(LoadError::Unreadable)) => self.reached.unreadable += 1,
            (Err(Refused::Revision), Err(LoadError::Revision)) => self.reached.revision += 1,
            (expected, got) => panic!("{expected:?} expected, {got:?} found"),
        }
    }

    /// No byte is read twice, and a clean entry reads little.
    fn check_reads(&self, read: u16) {
        let mut reads = self.memory.reads.borrow().clone();
        reads.sort_unstable();
        assert!(reads.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "read twice: {reads:x?}");
        let total: u64 = reads.iter().map(|(_, count)| count).sum();
        assert!(if read == 0 { total == 64 } else { total <= 1024 }, "{total} bytes: {reads:x?}");
    }

    fn entered(&mut self, page: u64) {
        let mut expected = self.memory.page(page).expect("an active page");
        for byte in &mut expected[0x338..0x33A] {
            *byte = 0xFF;
        }
        if self.defect != Defect::NotEntered {
            self.cache.entered(&self.memory).expect("memory");
        }
        if self.defect == Defect::StrayField {
            self.vmcs12.set(Field::HostCr3, !self.vmcs12.get(Field::HostCr3));
        }
        assert!(self.memory.page(page).as_deref() == Some(&expected), "all groups are clean, and nothing else changed");
    }

    fn exit(&mut self, b: &mut Bytes<'_>) {
        let Some(gpa) = self.model.active else { return };
        for _ in 0..b.u8() % 8 {
            let fact = self.facts[usize::from(b.u8()) % self.facts.len()];
            let value = b.word() & fact.mask();
            if fact.saved() {
                self.vmcs12.set(field(&fact), value);
                self.model.fields.insert(fact.encoding, value);
            }
        }
        let before = self.memory.page(gpa >> 12).expect("an active page");
        self.cache.store(&self.memory, &self.vmcs12).expect("memory");
        if self.defect == Defect::StrayByte {
            self.memory.put(gpa >> 12, 0x318, 1, !number(&before, 0x318, 1));
        }
        let after = self.memory.page(gpa >> 12).expect("an active page");
        self.model.check_store(self.facts, &before, &after);
        self.reached.exits += 1;
    }

    fn error(&mut self, b: &mut Bytes<'_>) {
        let Some(gpa) = self.model.active else { return };
        let number = u64::from(b.u8());
        self.vmcs12.set(Field::InstructionError, number);
        self.model.fields.insert(0x4400, number);
        let mut expected = self.memory.page(gpa >> 12).expect("an active page");
        expected[0x2B0..0x2B4].copy_from_slice(&(number as u32).to_le_bytes());
        self.cache.store_error(&self.memory, &self.vmcs12).expect("memory");
        assert!(self.memory.page(gpa >> 12) == Some(expected), "the error alone is written");
    }

    fn release_or_restore(&mut self, b: &mut Bytes<'_>, page: u64) {
        let control = b.u8();
        if control & 1 == 0 {
            self.cache.release();
            self.model.active = None;
            self.model.synthetic = [0; 4];
        } else {
            let ids = [u64::from(control), u64::from(b.u16()), b.word(), b.word()];
            let enlightenments = Enlightenments {
                control: EvmcsEnlightenmentsControl::new(ids[0] as u32),
                vp_id: ids[1] as u32,
                vm_id: ids[2],
                partition_assist_page: ids[3],
            };
            self.cache.restore(L1Gpa::new(page << 12), enlightenments);
            (self.model.active, self.model.restored, self.model.synthetic) = (Some(page << 12), true, ids);
        }
    }

    /// L1 writes its assist page.
    fn announce(&mut self, b: &mut Bytes<'_>, page: u64) {
        let (on, gpa) = (b.u8() % 3, if b.u8() & 1 == 0 { page << 12 } else { b.word() });
        self.memory.put(ASSIST, 0x28, 1, u64::from(on));
        self.memory.put(ASSIST, 0x30, 8, gpa);
        let assist = [Some(ASSIST << 12), None, Some(b.word() << 12)][usize::from(b.u8() % 3)];
        let readable = assist.is_some_and(|at| (0x1000..=PAGES << 12).contains(&at));
        let expected = match assist.filter(|_| readable) {
            Some(at) => {
                let head = self.memory.page(at >> 12).expect("a page");
                (head[0x28] != 0).then(|| number(&head, 0x30, 8))
            }
            None => None,
        };
        assert_eq!(current_evmcs(&self.memory, assist.map(L1Gpa::new)).map(L1Gpa::raw), expected);
    }

    fn compare_fields(&self) {
        assert_eq!(self.cache.active().map(L1Gpa::raw), self.model.active);
        if self.model.active.is_none() {
            return;
        }
        for fact in self.facts {
            let expected = self.model.fields.get(&fact.encoding).copied().unwrap_or(0);
            assert_eq!(self.vmcs12.get(field(fact)), expected, "{:?}", field(fact));
        }
        let ids = self.cache.enlightenments();
        let got = [u64::from(ids.control.raw()), u64::from(ids.vp_id), ids.vm_id, ids.partition_assist_page];
        assert_eq!(got, self.model.synthetic);
    }
}
