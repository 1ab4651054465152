//! The VM-entry checks of `nvmx` and of the machine model, which shares no code with them, on the same random VMCS12s.
//!
//! `VMX_CHECKS_SAMPLES=1000000 cargo test -p tests --test vmx_checks_model` judges a million.

use std::cell::RefCell;
use std::collections::BTreeMap;

use hvcore::addr::L1Gpa;
use hvcore::memory::{GuestMemory, MemoryError};
use nvmx::caps::{Allowed, Config, Host, Offer, ept_vpid};
use nvmx::check::{self, MsrEntry, Refusal, Root};
use nvmx::field::{Area, Field};
use nvmx::vmcs12::{REVISION, Vmcs12};
use samples::{Layout, PAGES, Rng, Sample, sample};
use tests::model::mem::PhysMem;
use tests::model::vmx::{Caps, Cpu, Op, Status, Step, fields, reason};
use zerocopy::FromBytes;

const VMXON: u64 = 0x31_0000;

const LAYOUT: Layout = Layout {
    pages: 0x10_0000,
    current: 0x31_1000,
    host: samples::Host {
        cr0: 0x8001_0031,
        cr3: 0x20_0000,
        cr4: 0x20A0,
        rsp: 0xFFFF_8000_0000_2000,
        rip: 0xFFFF_8000_0000_1000,
        efer: 0xD01,
        pat: 0x0007_0406_0007_0406,
        selectors: [8, 16, 24],
        bases: [0; 5],
    },
};

/// What the model's CPU is, for the library.
fn config(caps: &Caps) -> Config {
    let allowed = |(required, allowed)| Allowed { required, allowed };
    let host = Host {
        basic: 1 << 55,
        pin: allowed(caps.pin),
        primary: allowed(caps.proc),
        secondary: caps.proc2.1,
        exit: allowed(caps.exit),
        entry: allowed(caps.entry),
        misc: u64::from(caps.timer_shift) | 0x4_01E0,
        ept_vpid: ept_vpid::EMULATED_EPT | ept_vpid::OF_VPID | ept_vpid::EXECUTE_ONLY,
        vmfunc: 0,
        cr0_fixed0: caps.cr0_fixed0,
        cr0_fixed1: 0xFFFF_FFFF,
        cr4_fixed0: 1 << 13,
        cr4_fixed1: caps.cr4,
        phys_bits: caps.maxphyaddr,
        linear_bits: 48,
        efer: Host::EFER,
        debugctl: Host::DEBUGCTL,
        perf_global_ctrl: 0,
        rtm: false,
    };
    // The model emulates nothing.
    let mut offer = Offer::all(&host, false, false);
    offer.pin &= caps.pin.1;
    offer.secondary &= caps.proc2.1;
    offer.exit &= caps.exit.1;
    let config = Config::new(host, offer).unwrap();
    assert_eq!((config.pin(), config.primary()), (allowed(caps.pin), allowed(caps.proc)));
    assert_eq!((config.exit(), config.entry()), (allowed(caps.exit), allowed(caps.entry)));
    config
}

/// The samples' pages, as L1's memory with VMCSs of the library.
struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn new() -> Self {
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
        buf.copy_from_slice(self.0.borrow().get(at..at + buf.len()).ok_or(MemoryError)?);
        Ok(())
    }
    fn write(&self, _: L1Gpa, _: &[u8]) -> Result<(), MemoryError> {
        unreachable!()
    }
    fn compare_exchange_u8(&self, _: L1Gpa, _: u8, _: u8) -> Result<Result<u8, u8>, MemoryError> {
        unreachable!()
    }
    fn compare_exchange_u32(&self, _: L1Gpa, _: u32, _: u32) -> Result<Result<u32, u32>, MemoryError> {
        unreachable!()
    }
    fn compare_exchange_u64(&self, _: L1Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, MemoryError> {
        unreachable!()
    }
}

/// What an entry comes to, as L1 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Enters,
    /// VMfailValid.
    Fails(u64),
    /// Exit reason 0x8000_0021 with a qualification.
    Guest(u64),
    /// Exit reason 0x8000_0022 with an index.
    Msr(u64),
}

fn library(vmcs: &Vmcs12, config: &Config, memory: &Memory) -> Result<(), Refusal> {
    let root = Root { long_mode: true, current: L1Gpa::new(LAYOUT.current) };
    check::controls(vmcs, config, memory).map_err(Refusal::Controls)?;
    check::host(vmcs, config, root).map_err(Refusal::Host)?;
    check::guest(vmcs, config, root, memory).map_err(Refusal::Guest)?;
    for n in 0..vmcs.get32(Field::EntryMsrLoadCount) {
        let mut bytes = [0; 16];
        let at = vmcs.get(Field::EntryMsrLoadAddress) + u64::from(n) * 16;
        memory.read(L1Gpa::new(at), &mut bytes).map_err(|_| Refusal::Msr(n + 1, check::MsrRefusal::Memory))?;
        let entry = MsrEntry::read_from_bytes(&bytes).unwrap();
        check::msr_load(&entry).map_err(|why| Refusal::Msr(n + 1, why))?;
    }
    Ok(())
}

fn outcome(verdict: &Result<(), Refusal>) -> Outcome {
    match verdict {
        Ok(()) => Outcome::Enters,
        Err(Refusal::Controls(_)) => Outcome::Fails(7),
        Err(Refusal::Host(_)) => Outcome::Fails(8),
        Err(Refusal::Guest(why)) => Outcome::Guest(why.qualification()),
        Err(Refusal::Msr(n, _)) => Outcome::Msr(u64::from(*n)),
    }
}

/// What the model's CPU makes of it, and why.
fn model(vmcs: &Vmcs12, caps: Caps, mem: &PhysMem) -> (Outcome, &'static str) {
    let mut cpu = Cpu::new(caps, 1);
    mem.write(LAYOUT.current, 4, u64::from(fields::REVISION));
    assert_eq!(cpu.vmxon(mem, VMXON), Status::Ok);
    assert_eq!(cpu.vmclear(mem, LAYOUT.current), Status::Ok);
    assert_eq!(cpu.vmptrld(mem, LAYOUT.current), Status::Ok);
    for field in Field::ALL {
        if field.area() != Area::ExitInformation && fields::ALL.contains(&field.encoding().0) {
            assert_eq!(cpu.vmwrite(field.encoding().0, vmcs.get(*field)), Status::Ok);
        }
    }
    let step = cpu.step(mem, Op::Vmlaunch);
    let qualification = cpu.vmread(fields::QUALIFICATION).unwrap();
    let got = match step {
        Step::Exit(reason::GUEST_STATE) => Outcome::Guest(qualification),
        Step::Exit(reason::MSR_LOADING) => Outcome::Msr(qualification),
        Step::Done(0) if !cpu.in_guest() => Outcome::Fails(cpu.vmread(fields::INSTRUCTION_ERROR).unwrap()),
        // In the guest, or out again because delivering the injected event failed.
        _ => Outcome::Enters,
    };
    (got, cpu.why)
}

/// True when both answers are right: where several checks fail, the order of those within the controls and the host
/// state, and of those within the guest state, is the processor's choice (SDM volume 3, "Checks on VMX Controls and
/// Host-State Area", "Checks on the Guest State Area").
fn agree(sample: &Sample, a: Outcome, b: Outcome) -> bool {
    let order = matches!((a, b), (Outcome::Fails(_), Outcome::Fails(_)) | (Outcome::Guest(_), Outcome::Guest(_)));
    a == b || sample.changes > 1 && order
}

/// What was judged, and where the two differ: by the library's verdict and the model's, how often and where first.
#[derive(Debug, Default)]
struct Tally {
    outcomes: BTreeMap<Outcome, u64>,
    refusals: BTreeMap<String, u64>,
    disagreements: BTreeMap<(String, Outcome, &'static str), (u64, u64)>,
}

fn compare(config: &Config, caps: Caps, wanted: u64, seed: u64) -> Tally {
    let (memory, mem) = (Memory::new(), PhysMem::new(0x40_0000));
    samples::prepare(&LAYOUT, fields::REVISION, |at, value| mem.write(at, 8, value));
    mem.write(VMXON, 4, u64::from(fields::REVISION));
    let (mut tally, mut rng) = (Tally::default(), Rng::new(seed));
    for n in 0..wanted {
        let s = sample(config, &LAYOUT, &mut rng);
        let verdict = library(&s.vmcs, config, &memory);
        let ours = outcome(&verdict);
        let (theirs, why) = model(&s.vmcs, caps, &mem);
        *tally.outcomes.entry(ours).or_default() += 1;
        *tally.refusals.entry(format!("{verdict:?}")).or_default() += 1;
        if !agree(&s, ours, theirs) {
            tally.disagreements.entry((format!("{verdict:?}"), theirs, why)).or_insert((0, n)).0 += 1;
        }
    }
    tally
}

#[test]
fn the_library_and_the_model_agree() {
    let wanted = std::env::var("VMX_CHECKS_SAMPLES").ok().and_then(|n| n.parse().ok()).unwrap_or(30_000u64);
    let tally = compare(&config(&Caps::FULL), Caps::FULL, wanted, 1);
    println!("{:#?}\n{:#?}", tally.outcomes, tally.refusals);
    assert!(tally.disagreements.is_empty(), "library, model, why: count, first sample: {:#?}", tally.disagreements);
    // Most samples are near the edge of one rule: neither answer is rare, and few rules are never met.
    let entered = tally.outcomes.get(&Outcome::Enters).copied().unwrap_or(0);
    assert!(entered > wanted / 5 && entered < wanted * 4 / 5, "{entered} of {wanted} entered");
    assert!(tally.refusals.len() > 90, "only {} different answers", tally.refusals.len());
}

/// The control: each small difference between the two processors is found.
#[test]
fn a_difference_is_found() {
    let of = Caps::FULL;
    for caps in [
        Caps { maxphyaddr: 45, ..of },
        Caps { cr4: of.cr4 & !(1 << 17), ..of },
        Caps { cr0_fixed0: of.cr0_fixed0 & !(1 << 5), ..of },
        Caps { ept_ad: false, ..of },
        Caps { proc: (of.proc.0, of.proc.1 & !(1 << 27)), ..of },
        Caps { entry: (of.entry.0 | 1 << 2, of.entry.1), ..of },
    ] {
        assert!(!compare(&config(&of), caps, 10_000, 2).disagreements.is_empty(), "{caps:?}");
    }
}
