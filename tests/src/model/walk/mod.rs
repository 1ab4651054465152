//! Page walks in one and two dimensions, as SDM volume 3 ("Paging", "Extended page tables") and APM volume 2
//! (chapters 5 and 15.25) define them.
//!
//! [`translate`] walks the guest's tables and, where a [`Second`] stage is on, translates every guest-physical
//! address on the way. It yields a [`Hit`] or the exact [`Fault`]. With `commit` it sets accessed and dirty flags by
//! compare-exchange once the whole access is known to succeed, and starts over when a table changed meanwhile;
//! without `commit` it only looks.
//!
//! Left out: protection keys, shadow stacks, mode-based execute control, sub-page permissions, SMEP and SMAP through
//! nested tables (their accesses are user accesses).

mod ept;
mod linear;

use super::mem::PhysMem;
use super::tlb::{Entry, PageSize, Rights, Table};

pub use ept::Ept;
pub(crate) use linear::pdpte_reserved;
pub use linear::{Linear, Mode};

/// Whose rules hold where AMD and Intel differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// APM: bit 8 of PML4E and PDPE is reserved; PDPEs of PAE paging are read at each walk.
    Amd,
    /// SDM: PDPTEs of PAE paging live in registers.
    Intel,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// An access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What it does.
    pub kind: Kind,
    /// At CPL 3, and not one of the CPU's own accesses to system tables.
    pub user: bool,
    /// RFLAGS.AC allows explicit supervisor data accesses to user pages in spite of SMAP.
    pub ac: bool,
}

impl Access {
    /// A supervisor access.
    pub const fn system(kind: Kind) -> Self {
        Self { kind, user: false, ac: false }
    }

    /// A user access.
    pub const fn user(kind: Kind) -> Self {
        Self { kind, user: true, ac: false }
    }
}

/// Nested paging of AMD-V: the host's paging mode at VMRUN, with nCR3 in `cr3`.
pub type Npt = Linear;

/// The second stage of translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Second {
    /// None: what the first stage yields is physical.
    Off,
    /// AMD-V nested paging.
    Npt(Npt),
    /// VT-x extended page tables.
    Ept(Ept),
}

/// Both stages: all that a walk depends on besides memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// The stage that the guest (or the host for itself) owns.
    pub linear: Linear,
    /// The stage that its hypervisor owns.
    pub second: Second,
}

/// A translation that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Guest-physical address of the access.
    pub gpa: u64,
    /// Physical address of the access.
    pub hpa: u64,
    /// The page of the first stage.
    pub linear_size: PageSize,
    /// The page that both stages have in common.
    pub size: PageSize,
    /// Rights of the first stage.
    pub first: Rights,
    /// Rights of the second stage.
    pub second: Rights,
    /// Global page (CR4.PGE and the leaf's G).
    pub global: bool,
    /// PAT index of the first stage's leaf (PAT, PCD, PWT).
    pub pat: u8,
    /// EPT memory type of the second stage's leaf, bit 3 = ignore PAT; PAT index for NPT.
    pub second_type: u8,
}

impl Hit {
    /// The TLB entry for this translation.
    pub fn entry<O>(&self, origin: O) -> Entry<O> {
        Entry {
            base: self.size.base(self.hpa),
            size: self.size,
            linear_size: self.linear_size,
            first: self.first,
            second: self.second,
            global: self.global,
            origin,
        }
    }
}

/// A translation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// #PF with this error code; the linear address is the access's own.
    Page {
        /// P, W/R, U/S, RSVD, I/D in bits 0 to 4.
        code: u32,
    },
    /// Nested page fault (exit code 0x400).
    Npf {
        /// EXITINFO1: P, RW, US, RSV, ID in bits 0 to 4, bit 32 final address, bit 33 guest table.
        info1: u64,
        /// EXITINFO2: the guest-physical address.
        gpa: u64,
    },
    /// EPT violation (exit reason 48).
    EptViolation {
        /// Exit qualification, bits 0 to 8.
        qualification: u64,
        /// Guest-physical address.
        gpa: u64,
    },
    /// EPT misconfiguration (exit reason 49).
    EptMisconfig {
        /// Guest-physical address.
        gpa: u64,
    },
}

/// Why the second stage is asked: it shapes both the rights that are needed and the fault information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The final address of an access; `linear` says that a linear address led here.
    Final { kind: Kind, linear: bool },
    /// An entry of the guest's tables is read.
    TableRead { linear: bool },
    /// Accessed or dirty flags are set in an entry of the guest's tables.
    TableUpdate,
}

/// A second stage's answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage2 {
    pub hpa: u64,
    pub size: PageSize,
    pub rights: Rights,
    pub memory_type: u8,
}

/// Cached guest-physical translations: a walk may use them in place of the second stage's tables.
pub(crate) trait GpaCache {
    /// What is cached for `gpa` and allows `why`.
    fn get(&mut self, gpa: u64, why: Purpose) -> Option<Stage2>;
    /// Offers what a walk found for `gpa`.
    fn put(&mut self, gpa: u64, found: &Stage2);
    /// A cached second-stage table on the way to `gpa`.
    fn table(&mut self, _gpa: u64) -> Option<Table> {
        None
    }
    /// Offers a table that a second-stage walk went through.
    fn put_table(&mut self, _gpa: u64, _table: Table) {}
}

/// No cache: every walk reads the tables.
struct Uncached;

impl GpaCache for Uncached {
    fn get(&mut self, _: u64, _: Purpose) -> Option<Stage2> {
        None
    }
    fn put(&mut self, _: u64, _: &Stage2) {}
}

/// What a walk works with.
pub(crate) struct Walker<'a> {
    pub mem: &'a PhysMem,
    pub second: &'a Second,
    pub cache: &'a mut dyn GpaCache,
    pub commit: bool,
    /// This is a second-stage walk: it may start at a cached table.
    pub inner: bool,
}

impl Walker<'_> {
    /// Translates a guest-physical address.
    pub(crate) fn resolve(&mut self, gpa: u64, why: Purpose) -> Result<Stage2, Fault> {
        if *self.second == Second::Off {
            return Ok(Stage2 { hpa: gpa, size: PageSize::G1, rights: Rights::ALL, memory_type: 0 });
        }
        if let Some(found) = self.cache.get(gpa, why) {
            return Ok(found);
        }
        let found = match self.second {
            Second::Npt(npt) => nested(npt, self.mem, gpa, why, self.commit, self.cache)?,
            Second::Ept(ept) => ept.resolve(self.mem, gpa, why, self.commit, self.cache)?,
            Second::Off => unreachable!("handled above"),
        };
        self.cache.put(gpa, &found);
        Ok(found)
    }
}

/// EXITINFO1: the fault came from the final guest-physical address.
const NPF_FINAL: u64 = 1 << 32;
/// EXITINFO1: the fault came from a guest page table.
const NPF_TABLE: u64 = 1 << 33;

/// A nested walk: a user access in the host's paging mode; what touches the guest's tables is a data write.
fn nested(
    npt: &Npt,
    mem: &PhysMem,
    gpa: u64,
    why: Purpose,
    commit: bool,
    cache: &mut dyn GpaCache,
) -> Result<Stage2, Fault> {
    let (kind, place) = match why {
        Purpose::Final { kind, .. } => (kind, NPF_FINAL),
        Purpose::TableRead { .. } | Purpose::TableUpdate => (Kind::Write, NPF_TABLE),
    };
    let access = Access::user(kind);
    let fault = |code: u32| Fault::Npf { info1: u64::from(code) | place, gpa };
    if gpa > npt.mode.reach() {
        // Beyond what the host's paging mode can translate: not present.
        return Err(fault(access.code(npt)));
    }
    let mut walker = Walker { mem, second: &Second::Off, cache, commit, inner: true };
    match linear::walk(npt, &mut walker, gpa, access) {
        Ok(leaf) => Ok(Stage2 { hpa: leaf.gpa, size: leaf.size, rights: leaf.rights, memory_type: leaf.pat }),
        Err(Fault::Page { code }) => Err(fault(code)),
        Err(other) => Err(other),
    }
}

/// Translates `addr` for `access`.
pub fn translate(cx: &Context, mem: &PhysMem, addr: u64, access: Access, commit: bool) -> Result<Hit, Fault> {
    translate_cached(cx, mem, addr, access, commit, &mut Uncached)
}

/// The same with cached guest-physical translations.
pub(crate) fn translate_cached(
    cx: &Context,
    mem: &PhysMem,
    addr: u64,
    access: Access,
    commit: bool,
    cache: &mut dyn GpaCache,
) -> Result<Hit, Fault> {
    let mut walker = Walker { mem, second: &cx.second, cache, commit, inner: false };
    let leaf = linear::walk(&cx.linear, &mut walker, addr, access)?;
    let stage2 = walker.resolve(leaf.gpa, Purpose::Final { kind: access.kind, linear: true })?;
    Ok(Hit {
        gpa: leaf.gpa,
        hpa: stage2.hpa,
        linear_size: leaf.size,
        size: leaf.size.min(stage2.size),
        first: leaf.rights,
        second: stage2.rights,
        global: leaf.global && cx.linear.pge,
        pat: leaf.pat,
        second_type: stage2.memory_type,
    })
}

/// Translates a guest-physical address alone, as the CPU does for addresses that no linear address led to.
pub fn translate_gpa(second: &Second, mem: &PhysMem, gpa: u64, kind: Kind, commit: bool) -> Result<u64, Fault> {
    let mut walker = Walker { mem, second, cache: &mut Uncached, commit, inner: false };
    walker.resolve(gpa, Purpose::Final { kind, linear: false }).map(|s| s.hpa)
}

/// Whether the rights of a cached entry allow `access` in `cx` without another walk.
pub fn allowed<O>(entry: &Entry<O>, linear: &Linear, access: Access) -> bool {
    let second = match access.kind {
        Kind::Read => entry.second.read,
        Kind::Write => entry.second.write && entry.second.dirty && entry.first.dirty,
        Kind::Fetch => entry.second.exec,
    };
    second && linear.permits(&entry.first, access)
}

/// How a cached translation differs from what memory says now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It agrees, or memory allows more than the entry.
    Fresh,
    /// A walk leads elsewhere.
    Moved {
        /// Where it leads now.
        now: u64,
    },
    /// A walk now refuses an access that the entry allows.
    Refused(Fault),
}

/// Compares the entry that `addr` hit with a fresh walk of `cx` for the same access.
pub fn judge<O>(entry: &Entry<O>, cx: &Context, mem: &PhysMem, addr: u64, access: Access) -> Verdict {
    let cached = entry.base | (addr & (entry.size.bytes() - 1));
    match translate(cx, mem, addr, access, false) {
        Err(fault) => Verdict::Refused(fault),
        Ok(hit) if hit.hpa != cached => Verdict::Moved { now: hit.hpa },
        Ok(_) => Verdict::Fresh,
    }
}
