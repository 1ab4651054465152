//! A processor on paper, the memory that a VMCS12 points to, and tables of what is refused and what just is not.

use std::cell::RefCell;
use std::fmt::Debug;

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::caps::{Allowed, Config, Host, Offer};
use nvmx::check::{self, Guest, Refusal, Root};
use nvmx::field::Field;
use nvmx::vmcs12::{REVISION, Vmcs12};
use samples::{Layout, PAGES, Profile, valid};

/// Everything that this library knows of, as "true" controls; physical addresses have 46 bits.
pub fn host() -> Host {
    use nvmx::controls::{entry, exit, pin, primary, secondary};
    Host {
        basic: 1 << 54 | 1 << 55,
        pin: Allowed { required: 0x16, allowed: 0x16 | pin::KNOWN },
        primary: Allowed { required: 0x0400_6172, allowed: 0x0400_6172 | primary::KNOWN },
        secondary: secondary::KNOWN,
        exit: Allowed { required: 0x3_6DFB, allowed: 0x3_6DFB | exit::KNOWN },
        entry: Allowed { required: 0x11FB, allowed: 0x11FB | entry::KNOWN },
        misc: 0x4004_01E7,
        ept_vpid: 0x0F01_0673_4141,
        vmfunc: 1,
        cr0_fixed0: 0x8000_0021,
        cr0_fixed1: 0xFFFF_FFFF,
        cr4_fixed0: 0x2000,
        cr4_fixed1: 0x00F7_2FFF,
        phys_bits: 46,
        linear_bits: 48,
        efer: Host::EFER,
        debugctl: Host::DEBUGCTL,
        perf_global_ctrl: 0x7_0000_000F,
        rtm: true,
    }
}

pub fn config() -> Config {
    Config::all(host(), false, true).unwrap()
}

/// All that [`config`] offers, less what `change` clears.
pub fn without(change: impl Fn(&mut Offer)) -> Config {
    let mut offer = Offer::all(&host(), false, true);
    change(&mut offer);
    Config::new(host(), offer).unwrap()
}

pub const LAYOUT: Layout = Layout {
    pages: 0x10_0000,
    current: 0x20_0000,
    host: samples::Host {
        cr0: 0x8001_0031,
        cr3: 0x30_0000,
        cr4: 0x20A0,
        rsp: 0xFFFF_8000_0000_2000,
        rip: 0xFFFF_8000_0000_1000,
        efer: 0xD01,
        pat: 0x0007_0406_0007_0406,
        selectors: [8, 16, 24],
        bases: [0; 5],
    },
};

/// What the entry is made from: 64-bit L1.
pub const ROOT: Root = Root { long_mode: true, current: L1Gpa::new(LAYOUT.current) };

/// The pages of [`LAYOUT`]; nothing else is there.
pub struct Memory(RefCell<Vec<u8>>);

impl Memory {
    pub fn new() -> Self {
        let mut bytes = vec![0; (PAGES * 4096) as usize];
        samples::prepare(&LAYOUT, REVISION, |at, value| {
            let at = (at - LAYOUT.pages) as usize;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        });
        Self(RefCell::new(bytes))
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let at = gpa.raw().checked_sub(LAYOUT.pages).ok_or(MemoryError)? as usize;
        let bytes = self.0.borrow();
        buf.copy_from_slice(bytes.get(at..at + buf.len()).ok_or(MemoryError)?);
        Ok(())
    }

    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        panic!("a check writes");
    }

    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        panic!("a check writes");
    }

    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        panic!("a check writes");
    }

    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        panic!("a check writes");
    }
}

/// What an entry with `vmcs` comes to.
pub fn judge(vmcs: &Vmcs12, config: &Config, root: Root) -> Result<Option<[u64; 4]>, Refusal> {
    let memory = Memory::new();
    check::controls(vmcs, config, &memory).map_err(Refusal::Controls)?;
    check::host(vmcs, config, root).map_err(Refusal::Host)?;
    check::guest(vmcs, config, root, &memory).map_err(Refusal::Guest)
}

/// Fields set on top of a valid VMCS12.
pub type Sets<'a> = &'a [(Field, u64)];

/// A valid VMCS12 with `sets` on top.
pub fn with(config: &Config, profile: Profile, sets: &[Sets<'_>]) -> Vmcs12 {
    let mut vmcs = valid(config, &LAYOUT, profile);
    for (field, value) in sets.iter().flat_map(|sets| sets.iter()) {
        vmcs.set(*field, *value);
    }
    vmcs
}

/// Runs a table of (refusal, settings that are refused, settings just short of it), each on top of `base`.
pub fn table<R: Copy + Debug>(
    profile: Profile,
    base: Sets<'_>,
    refusal: impl Fn(R) -> Refusal,
    rows: &[(R, Sets<'_>, Sets<'_>)],
) {
    let config = config();
    assert_eq!(judge(&with(&config, profile, &[base]), &config, ROOT).map(|_| ()), Ok(()), "the table's base");
    for (name, bad, good) in rows {
        let got = judge(&with(&config, profile, &[base, bad]), &config, ROOT).map(|_| ());
        assert_eq!(got, Err(refusal(*name)), "{bad:#x?}");
        let got = judge(&with(&config, profile, &[base, good]), &config, ROOT).map(|_| ());
        assert_eq!(got, Ok(()), "{name:?} was to be just avoided by {good:#x?}");
    }
}

pub fn guests(profile: Profile, base: Sets<'_>, rows: &[(Guest, Sets<'_>, Sets<'_>)]) {
    table(profile, base, Refusal::Guest, rows);
}
