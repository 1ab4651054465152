//! A CPU's memory-management unit: the TLB in front of the walks.
//!
//! [`Mmu::access`] answers from the TLB whenever it may, and otherwise walks and caches, guest-physical translations
//! included. An entry whose rights do not suffice is walked again, as AMD-V promises; with `spurious` set, the fault
//! may come from the cached rights instead, as the SDM allows (VT-x only).
//!
//! With `audit` on, each result is compared with a fresh walk of what memory says now and differences are kept in
//! `stale` (the first 64) and counted. A stale hit is legal hardware behaviour: whether it is a bug of the software
//! under test, the test knows.

use super::mem::PhysMem;
use super::rng::Rng;
use super::tlb::{Entry, Kind as TlbKind, Rights, Table, Tag, Tlb};
use super::walk::{self, Access, Context, Fault, GpaCache, Kind, Purpose, Second, Stage2, Vendor, Verdict};

/// A hit whose entry no longer agrees with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// The tag that matched.
    pub tag: Tag,
    /// The address that was accessed.
    pub addr: u64,
    /// Where the entry led.
    pub hpa: u64,
    /// The tables that the entry was made from.
    pub made_by: Context,
    /// What a walk of the current context says.
    pub verdict: Verdict,
}

/// TLB and walker of one CPU.
pub struct Mmu {
    /// The TLB; each entry remembers the context that it was walked in.
    pub tlb: Tlb<Context>,
    /// Compare each result with memory.
    pub audit: bool,
    /// Faults may come from cached rights, this many times in 1,024.
    pub spurious: u32,
    /// Stale hits seen by the audit, the first 64.
    pub stale: Vec<Stale>,
    /// How many there were.
    pub stale_count: u64,
    rng: Rng,
}

impl Mmu {
    /// A unit with a TLB of `capacity` entries, evictions by `seed`.
    pub fn new(capacity: usize, seed: u64) -> Self {
        let rng = Rng::new(seed ^ 0xA5A5);
        Self { tlb: Tlb::new(capacity, seed), audit: false, spurious: 0, stale: Vec::new(), stale_count: 0, rng }
    }

    /// Physical address for `access` to `addr`. `tag` names the context's translations (its kind is ignored).
    pub fn access(&mut self, mem: &PhysMem, cx: &Context, tag: Tag, addr: u64, access: Access) -> Result<u64, Fault> {
        let nested = cx.second != Second::Off;
        let tag = Tag { kind: if nested { TlbKind::Combined } else { TlbKind::Linear }, ..tag };
        if let Some(entry) = self.tlb.lookup(tag, addr) {
            if walk::allowed(entry, &cx.linear, access) {
                let hpa = entry.base | (addr & (entry.size.bytes() - 1));
                if self.audit {
                    self.check(mem, cx, tag, addr, access, hpa);
                }
                return Ok(hpa);
            }
            if let Some(fault) = self.spurious_fault(cx, tag, addr, access) {
                self.forget(tag, addr, fault, cx.linear.vendor);
                return Err(fault);
            }
        }
        let mut cache = Cached { tlb: &mut self.tlb, tag: physical(tag), cx };
        match walk::translate_cached(cx, mem, addr, access, true, &mut cache) {
            Ok(hit) => {
                if cx.linear.mode != walk::Mode::Off || nested {
                    self.tlb.insert(tag, addr, hit.entry(*cx));
                    if self.audit {
                        // Cached guest-physical translations and tables may have led the walk astray.
                        self.check(mem, cx, tag, addr, access, hit.hpa);
                    }
                }
                Ok(hit.hpa)
            }
            Err(fault) => {
                self.forget(tag, addr, fault, cx.linear.vendor);
                Err(fault)
            }
        }
    }

    /// What a fault removes: on VT-x a #PF and an EPT violation drop what translates the faulting addresses. The APM
    /// promises no such thing, so nothing goes on AMD-V.
    fn forget(&mut self, tag: Tag, addr: u64, fault: Fault, vendor: Vendor) {
        match fault {
            Fault::Page { .. } if vendor == Vendor::Intel => {
                self.tlb.drop_faulting(tag, addr);
            }
            Fault::EptViolation { gpa, .. } => {
                self.tlb.drop_faulting(tag, addr);
                self.tlb.drop_faulting(physical(tag), gpa);
            }
            _ => {}
        }
    }

    /// A #PF from the cached rights of the first stage, if the seed wants one.
    fn spurious_fault(&mut self, cx: &Context, tag: Tag, addr: u64, access: Access) -> Option<Fault> {
        if cx.linear.vendor == Vendor::Amd || !self.rng.chance(self.spurious) {
            return None;
        }
        let entry = self.tlb.lookup(tag, addr)?;
        let denied = !cx.linear.permits(&entry.first, access);
        denied.then(|| Fault::Page { code: access.code(&cx.linear) | 1 })
    }

    fn check(&mut self, mem: &PhysMem, cx: &Context, tag: Tag, addr: u64, access: Access, hpa: u64) {
        let Some(entry) = self.tlb.lookup(tag, addr) else { return };
        let verdict = walk::judge(entry, cx, mem, addr, access);
        if verdict == Verdict::Fresh {
            return;
        }
        let made_by = entry.origin;
        self.stale_count += 1;
        if self.stale.len() < 64 {
            self.stale.push(Stale { tag, addr, hpa, made_by, verdict });
        }
    }
}

/// The tag of the guest-physical translations behind `tag`: VT-x tags them by root alone, AMD-V by ASID.
fn physical(tag: Tag) -> Tag {
    let asid = if tag.root == 0 { tag.asid } else { 0 };
    Tag { kind: TlbKind::Physical, asid, root: tag.root, pcid: 0 }
}

/// The TLB as the walker's cache of guest-physical translations.
struct Cached<'a> {
    tlb: &'a mut Tlb<Context>,
    tag: Tag,
    cx: &'a Context,
}

impl GpaCache for Cached<'_> {
    fn get(&mut self, gpa: u64, why: Purpose) -> Option<Stage2> {
        let entry = self.tlb.lookup(self.tag, gpa)?;
        let r = entry.second;
        // A guest table is touched as a write wherever the second stage has accessed and dirty flags.
        let enough = match why {
            Purpose::Final { kind: Kind::Read, .. } => r.read,
            Purpose::Final { kind: Kind::Fetch, .. } => r.exec,
            _ => r.write && r.dirty,
        };
        let hpa = entry.base | (gpa & (entry.size.bytes() - 1));
        enough.then_some(Stage2 { hpa, size: entry.size, rights: r, memory_type: 0 })
    }

    fn table(&mut self, gpa: u64) -> Option<Table> {
        self.tlb.table(self.tag, gpa)
    }

    fn put_table(&mut self, gpa: u64, table: Table) {
        self.tlb.put_table(self.tag, gpa, table);
    }

    fn put(&mut self, gpa: u64, found: &Stage2) {
        let entry = Entry {
            base: found.size.base(found.hpa),
            size: found.size,
            linear_size: found.size,
            first: Rights::ALL,
            second: found.rights,
            global: false,
            origin: *self.cx,
        };
        self.tlb.insert(self.tag, gpa, entry);
    }
}
