//! L0's half of the enlightened VMCS, slow and obvious: from the TLFS's table of fields and the rules of docs/evmcs.md.

use std::collections::BTreeMap;
use std::sync::LazyLock;

/// The TLFS's table: offset, size, name, VMCS encoding, clean-field group.
const TABLE: &str = include_str!("../../../tlfs-abi/tests/evmcs-v1.tsv");

/// Encodings of the layout whose controls no L0 of this library offers: CET, LBR, tertiary controls.
const NOT_OFFERED: &[u32] = &[0x2034, 0x2816, 0x6828, 0x682A, 0x682C, 0x6C18, 0x6C1A, 0x6C1C];

const GROUPS: [&str; 15] = [
    "IO_BITMAP",
    "MSR_BITMAP",
    "CONTROL_GRP2",
    "CONTROL_GRP1",
    "CONTROL_PROC",
    "CONTROL_EVENT",
    "CONTROL_ENTRY",
    "CONTROL_EXCPN",
    "CRDR",
    "CONTROL_XLAT",
    "GUEST_BASIC",
    "GUEST_GRP1",
    "GUEST_GRP2",
    "HOST_POINTER",
    "HOST_GRP1",
];

/// When L0 reads a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// At every entry.
    Always,
    /// When this clean bit is clear.
    Group(u8),
    /// Never: exit information.
    Never,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Fact {
    /// Byte offset.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// VMCS encoding.
    pub encoding: u32,
    /// When L0 reads it.
    pub read: Read,
}

impl Fact {
    /// The bits that a VMCS field of this encoding holds.
    pub fn mask(&self) -> u64 {
        match (self.encoding, self.size) {
            (0x4814..=0x4822, _) => 0x1_F0FF,
            (_, 8) => u64::MAX,
            (_, size) => (1 << (8 * size)) - 1,
        }
    }

    /// Exits save it: exit information, and guest state but for the link pointer and IA32_PERF_GLOBAL_CTRL; of the
    /// controls, those for entries, and the event.
    pub fn saved(&self) -> bool {
        match self.encoding >> 10 & 3 {
            1 => true,
            2 => !matches!(self.encoding, 0x2800 | 0x2808),
            _ => matches!(self.encoding, 0x4012 | 0x4016),
        }
    }
}

/// Every field that L0 knows, in the order of the table.
pub fn facts() -> &'static [Fact] {
    static FACTS: LazyLock<Vec<Fact>> = LazyLock::new(parse);
    &FACTS
}

fn parse() -> Vec<Fact> {
    let rows = TABLE.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    rows.filter_map(|line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let encoding = hex(columns[3]).filter(|encoding| !NOT_OFFERED.contains(encoding))?;
        let read = match columns[4] {
            "NONE" => Read::Always,
            "NONE (Read only)" => Read::Never,
            name => Read::Group(GROUPS.iter().position(|group| *group == name).expect("a group of the TLFS") as u8),
        };
        Some(Fact { offset: hex(columns[0])? as usize, size: columns[1].parse().expect("a size"), encoding, read })
    })
    .collect()
}

/// Reads `size` bytes, little-endian.
pub fn number(page: &[u8], offset: usize, size: usize) -> u64 {
    page[offset..offset + size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Why an entry cannot use the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not a page, or no memory.
    Unreadable,
    /// Neither version 1 nor the VMCS revision.
    Revision,
}

/// What L0 has of the page.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The page that is active.
    pub active: Option<u64>,
    /// The active page comes from a saved state, and no exit has written it yet.
    pub restored: bool,
    /// The VMCS12's fields by encoding.
    pub fields: BTreeMap<u32, u64>,
    /// What memory had of a field when L0 last read or wrote it.
    pub known: BTreeMap<u32, u64>,
    /// EnlightenmentsControl, VpId, VmId, PartitionAssistPage.
    pub synthetic: [u64; 4],
}

impl Model {
    /// VM entry with the page at `gpa`, whose bytes are `page` where there is memory. Yields the groups that were read.
    pub fn load(
        &mut self,
        facts: &[Fact],
        page: Option<&[u8]>,
        gpa: u64,
        launch: bool,
        revision: u64,
    ) -> Result<u16, Refused> {
        let was = self.active.take();
        let page = page.filter(|_| gpa & 0xFFF == 0).ok_or(Refused::Unreadable)?;
        let version = number(page, 0, 4);
        if version != 1 && version != revision {
            return Err(Refused::Revision);
        }
        let whole = launch || was != Some(gpa) || self.restored;
        if whole {
            self.fields.clear();
            self.known.clear();
        }
        let clean = if whole { 0 } else { number(page, 0x338, 4) };
        for fact in facts {
            let now = match fact.read {
                Read::Always => true,
                Read::Group(bit) => clean >> bit & 1 == 0,
                Read::Never => false,
            };
            if now {
                let value = number(page, fact.offset, fact.size);
                self.fields.insert(fact.encoding, value & fact.mask());
                self.known.insert(fact.encoding, value);
            }
        }
        self.synthetic = [(0x344, 4), (0x348, 4), (0x350, 8), (0x358, 8)].map(|(at, size)| number(page, at, size));
        self.active = Some(gpa);
        self.restored = false;
        Ok(!clean as u16)
    }

    /// Checks the page after an exit: `before` and `after` are its bytes around the write. A guest-state field that L1
    /// has written behind L0's back, its group clean, may stay or be overwritten.
    pub fn check_store(&mut self, facts: &[Fact], before: &[u8], after: &[u8]) {
        let mut free = vec![false; before.len()];
        for fact in facts.iter().filter(|fact| fact.saved()) {
            free[fact.offset..fact.offset + fact.size].fill(true);
            let value = self.fields.get(&fact.encoding).copied().unwrap_or(0);
            let (old, new) = (number(before, fact.offset, fact.size), number(after, fact.offset, fact.size));
            let behind = fact.read != Read::Never && !self.restored && self.known.get(&fact.encoding) != Some(&old);
            assert!(new == value || behind && new == old, "{fact:x?} is {new:#x}, was {old:#x}, L0 has {value:#x}");
            if new == value {
                self.known.insert(fact.encoding, new);
            }
        }
        let strays: Vec<_> = (0..before.len()).filter(|at| !free[*at] && before[*at] != after[*at]).collect();
        assert!(strays.is_empty(), "an exit wrote bytes that it does not save: {strays:x?}");
        self.restored = false;
    }
}
