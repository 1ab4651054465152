//! Checks on guest segment registers (SDM volume 3, "Checks on Guest Segment Registers").

use super::{Guest, ensure, unrestricted};
use crate::bits::access_rights::{DB, DPL_SHIFT, G, L, P, S, UNUSABLE};
use crate::bits::{cr0, rflags};
use crate::caps::Config;
use crate::field::Field;
use crate::vmcs12::Vmcs12;

#[inline]
pub(super) const fn dpl(rights: u32) -> u32 {
    rights >> DPL_SHIFT & 3
}

#[inline]
const fn kind(rights: u32) -> u32 {
    rights & 15
}

/// The limit's low 12 bits all 1 unless G is 0, its high 12 bits all 0 unless G is 1.
#[inline]
const fn granular(rights: u32, limit: u32) -> bool {
    if rights & G != 0 { limit & 0xFFF == 0xFFF } else { limit >> 20 == 0 }
}

/// One register, read once.
#[derive(Clone, Copy)]
struct Segment {
    selector: u64,
    base: u64,
    limit: u32,
    rights: u32,
}

impl Segment {
    #[inline]
    fn usable(self) -> bool {
        self.rights & UNUSABLE == 0
    }

    #[inline]
    fn rpl(self) -> u32 {
        self.selector as u32 & 3
    }

    /// Table indicator: the selector names the LDT.
    #[inline]
    fn ti(self) -> bool {
        self.selector & 4 != 0
    }
}

macro_rules! segment {
    ($vmcs:ident, $selector:ident, $base:ident, $limit:ident, $rights:ident) => {
        Segment {
            selector: $vmcs.get(Field::$selector),
            base: $vmcs.get(Field::$base),
            limit: $vmcs.get32(Field::$limit),
            rights: $vmcs.get32(Field::$rights),
        }
    };
}

pub(super) fn check(vmcs: &Vmcs12, config: &Config, long: bool) -> Result<(), Guest> {
    let es = segment!(vmcs, GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsAccessRights);
    let cs = segment!(vmcs, GuestCsSelector, GuestCsBase, GuestCsLimit, GuestCsAccessRights);
    let ss = segment!(vmcs, GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsAccessRights);
    let ds = segment!(vmcs, GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsAccessRights);
    let fs = segment!(vmcs, GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsAccessRights);
    let gs = segment!(vmcs, GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsAccessRights);
    let ldtr = segment!(vmcs, GuestLdtrSelector, GuestLdtrBase, GuestLdtrLimit, GuestLdtrAccessRights);
    let tr = segment!(vmcs, GuestTrSelector, GuestTrBase, GuestTrLimit, GuestTrAccessRights);
    let v86 = vmcs.get(Field::GuestRflags) & rflags::VM != 0;
    let unrestricted = unrestricted(vmcs);
    ensure(!tr.ti(), Guest::TrSelector)?;
    ensure(!(ldtr.usable() && ldtr.ti()), Guest::LdtrSelector)?;
    ensure(v86 || unrestricted || ss.rpl() == cs.rpl(), Guest::SsRpl)?;
    let canonical = config.canonical(tr.base) && config.canonical(fs.base) && config.canonical(gs.base);
    ensure(canonical && (!ldtr.usable() || config.canonical(ldtr.base)), Guest::CanonicalBase)?;
    if v86 {
        virtual_8086(&[cs, ss, ds, es, fs, gs])?;
    } else {
        let high = |segment: Segment| segment.usable() && segment.base >> 32 != 0;
        ensure(cs.base >> 32 == 0 && !high(ss) && !high(ds) && !high(es), Guest::Base)?;
        code(cs, ss, unrestricted, long)?;
        let real = vmcs.get(Field::GuestCr0) & cr0::PE == 0;
        stack(ss, cs, unrestricted, real)?;
        for segment in [ds, es, fs, gs] {
            data(segment, unrestricted)?;
        }
    }
    task(tr, long)?;
    if ldtr.usable() {
        ensure(ldtr.rights & (S | P | 15) == P | 2, Guest::LdtrRights)?;
        ensure(granular(ldtr.rights, ldtr.limit), Guest::LdtrRights)?;
    }
    Ok(())
}

fn virtual_8086(segments: &[Segment]) -> Result<(), Guest> {
    for segment in segments {
        ensure(segment.base == segment.selector << 4, Guest::Virtual8086Base)?;
        ensure(segment.limit == 0xFFFF, Guest::Virtual8086Limit)?;
        ensure(segment.rights == 0xF3, Guest::Virtual8086Rights)?;
    }
    Ok(())
}

fn code(cs: Segment, ss: Segment, unrestricted: bool, long: bool) -> Result<(), Guest> {
    let kind = kind(cs.rights);
    // Accessed code; or, for an unrestricted guest, accessed read/write data that expands up.
    ensure(kind & 9 == 9 || unrestricted && kind == 3, Guest::SegmentType)?;
    ensure(cs.rights & (S | P) == S | P, Guest::SegmentPresent)?;
    ensure(granular(cs.rights, cs.limit), Guest::Granularity)?;
    let (own, stack) = (dpl(cs.rights), dpl(ss.rights));
    let fits = match kind {
        3 => own == 0,
        9 | 11 => own == stack,
        _ => own <= stack,
    };
    ensure(fits, Guest::CsDpl)?;
    ensure(!(long && cs.rights & (L | DB) == L | DB), Guest::CsLAndD)
}

fn stack(ss: Segment, cs: Segment, unrestricted: bool, real: bool) -> Result<(), Guest> {
    if ss.usable() {
        ensure(matches!(kind(ss.rights), 3 | 7), Guest::SegmentType)?;
        ensure(ss.rights & (S | P) == S | P, Guest::SegmentPresent)?;
        ensure(granular(ss.rights, ss.limit), Guest::Granularity)?;
    }
    // The DPL counts in an unusable SS as well.
    ensure(unrestricted || dpl(ss.rights) == ss.rpl(), Guest::SsDpl)?;
    ensure(dpl(ss.rights) == 0 || !real && kind(cs.rights) != 3, Guest::SsDpl)
}

/// DS, ES, FS and GS.
fn data(segment: Segment, unrestricted: bool) -> Result<(), Guest> {
    if !segment.usable() {
        return Ok(());
    }
    let kind = kind(segment.rights);
    // Accessed, and code only if it may be read.
    ensure(kind & 1 != 0 && kind & 10 != 8, Guest::SegmentType)?;
    ensure(segment.rights & (S | P) == S | P, Guest::SegmentPresent)?;
    ensure(granular(segment.rights, segment.limit), Guest::Granularity)?;
    let conforming = kind >= 12;
    ensure(unrestricted || conforming || dpl(segment.rights) >= segment.rpl(), Guest::DataDpl)
}

fn task(tr: Segment, long: bool) -> Result<(), Guest> {
    let kind = kind(tr.rights);
    ensure(kind == 11 || kind == 3 && !long, Guest::TrRights)?;
    ensure(tr.rights & (S | P | UNUSABLE) == P, Guest::TrRights)?;
    ensure(granular(tr.rights, tr.limit), Guest::TrRights)
}
