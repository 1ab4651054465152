//! All processors of two machines remap pages of their own and flush each other, while this hypervisor deschedules,
//! migrates and switches them; each access is held against the flushes that were over before it.

use super::Outcome;
use crate::l2::Vmmcall;
use crate::vms::{Machines, Mode, Random, Vm, Vp, offer};
use crate::{Failure, check, frames, hyperv, smp};
use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use hvcore::client::{FlushScope, HostOffer, Targets, UseNative, flush};
use tlfs_abi::flush::GvaSpan;

/// Where the first processor's page is in each machine; the others' follow.
const WINDOWS: u64 = 0x7000_0000;
/// Processors of a machine.
const PROCESSORS: usize = 3;
/// Pages that take turns behind a window: a translation that is stale by up to three flushes shows.
const PAGES: usize = 4;
/// Flushes by all processors together, unless `storm=N` says otherwise.
static FLUSHES: AtomicU32 = AtomicU32::new(2400);

/// Sets the number of flushes.
pub fn set_flushes(flushes: u32) {
    FLUSHES.store(flushes, Ordering::Relaxed);
}

/// What the processors of a machine share.
struct Arena {
    /// The generation that a processor's window must show at least.
    epochs: [AtomicU64; PROCESSORS],
    space: u64,
}

/// One processor's orders and report.
struct Orders {
    arena: &'static Arena,
    me: usize,
    rounds: u64,
    entry: *mut u64,
    pages: [u64; PAGES],
    input: *mut [u64; hvcore::client::INPUT_WORDS],
    /// The host's flush calls with XMM input, and without.
    offers: [HostOffer; 2],
    random: Random,
    calls: AtomicU64,
    reads: AtomicU64,
    stale: AtomicU64,
    failed: AtomicU64,
}

fn window(processor: usize) -> u64 {
    WINDOWS + processor as u64 * 4096
}

/// Runs in L2: remaps, flushes, publishes, and reads everybody's window.
unsafe extern "C" fn processor(orders: *mut Orders) -> ! {
    // SAFETY: the scenario's, alive as long as the guest runs.
    let orders = unsafe { &mut *orders };
    // SAFETY: this processor's alone.
    let mut port = Vmmcall { page: unsafe { &mut *orders.input } };
    for generation in 1..=orders.rounds {
        let next = orders.pages[generation as usize % PAGES];
        // SAFETY: pages and entry are this processor's, mapped one to one.
        unsafe {
            (next as *mut u64).write_volatile(generation);
            orders.entry.write_volatile(next | crate::npt::ALL);
        }
        if flush_once(orders, &mut port).is_err() {
            orders.failed.store(generation, Ordering::SeqCst);
            break;
        }
        orders.calls.fetch_add(1, Ordering::Relaxed);
        // From here on every read of anybody's must see this generation.
        orders.arena.epochs[orders.me].store(generation, Ordering::SeqCst);
        for _ in 0..orders.random.below(8) {
            (0..PROCESSORS).for_each(|other| read(orders, other));
        }
    }
    loop {
        // SAFETY: HLT ends the guest's part: the hypervisor intercepts it.
        unsafe { asm!("hlt") };
    }
}

fn read(orders: &Orders, other: usize) {
    // The epoch before the page: a flush that was over by then must have been seen.
    let least = orders.arena.epochs[other].load(Ordering::SeqCst);
    // SAFETY: every window is mapped before the guest runs.
    let seen = unsafe { (window(other) as *const u64).read_volatile() };
    orders.reads.fetch_add(1, Ordering::Relaxed);
    if seen < least {
        orders.stale.fetch_add(1, Ordering::Relaxed);
    }
}

fn flush_once(orders: &mut Orders, port: &mut Vmmcall) -> Result<(), UseNative> {
    let page = GvaSpan { start: window(orders.me), pages: 1, page_size: 4096 };
    let mut spans = [GvaSpan { start: 0x6000_0000, ..page }; 15];
    for (n, span) in spans.iter_mut().enumerate() {
        span.start += n as u64 * 8192;
    }
    spans[14] = page;
    let kind = orders.random.below(12);
    let scope = match kind % 3 {
        0 => FlushScope::Space { non_global_only: false },
        1 => FlushScope::Spans(&spans[14..]),
        _ => FlushScope::Spans(&spans),
    };
    let offer = orders.offers[usize::from(kind.is_multiple_of(2))];
    let space = Some(orders.arena.space);
    if kind < 6 {
        flush(port, &offer, space, Targets::<core::iter::Empty<_>>::All, scope)
    } else {
        flush(port, &offer, space, Targets::Only((0..PROCESSORS as u32).map(Some)), scope)
    }
}

/// Two machines that have their VP_IDs in common, and what their processors report.
struct Storm {
    orders: [[*mut Orders; PROCESSORS]; 2],
    vms: [&'static Vm; 2],
}

fn place<T>(value: T) -> *mut T {
    assert!(size_of::<T>() <= 4096);
    let memory = frames::page() as *mut T;
    // SAFETY: a page that nobody else has.
    unsafe { memory.write(value) };
    memory
}

impl Storm {
    fn new(rounds: u64) -> Self {
        // SAFETY: made once, and never given back.
        let vms = [0x31, 0x32].map(|id| unsafe { &*place(Vm::new(id)) });
        let orders = vms.map(|vm| {
            let arena = place(Arena { epochs: [const { AtomicU64::new(0) }; PROCESSORS], space: vm.tables.root() });
            core::array::from_fn(|me| {
                let pages: [u64; PAGES] = core::array::from_fn(|_| frames::page());
                vm.tables.map(window(me), pages[0], crate::npt::ALL);
                place(Orders {
                    // SAFETY: as above.
                    arena: unsafe { &*arena },
                    me,
                    rounds,
                    entry: vm.tables.entry(window(me), 0),
                    pages,
                    input: frames::page() as *mut _,
                    offers: [offer(false), offer(true)],
                    random: Random((vm.id << 8) + me as u64 + 1),
                    calls: AtomicU64::new(0),
                    reads: AtomicU64::new(0),
                    stale: AtomicU64::new(0),
                    failed: AtomicU64::new(0),
                })
            })
        });
        Self { orders, vms }
    }

    fn vps(&self) -> impl Iterator<Item = Vp> + '_ {
        let all = self.vms.iter().zip(&self.orders).enumerate();
        all.flat_map(|(n, (vm, orders))| {
            orders.iter().enumerate().map(move |(id, orders)| {
                let address = processor as *const () as usize;
                // SAFETY: entered with its argument in RDI and never returned from, as a guest's entry point.
                let program = unsafe { core::mem::transmute::<usize, unsafe extern "C" fn()>(address) };
                Vp::new(vm, id as u32, n * PROCESSORS + id, program, *orders as u64)
            })
        })
    }

    fn sum(&self, of: fn(&Orders) -> &AtomicU64) -> u64 {
        // SAFETY: the guests have ended.
        self.orders.iter().flatten().map(|orders| of(unsafe { &**orders }).load(Ordering::Relaxed)).sum()
    }
}

fn storm(mode: Mode) -> Result<Counted, Failure> {
    let all = (2 * PROCESSORS) as u64;
    let rounds = u64::from(FLUSHES.load(Ordering::Relaxed)).div_ceil(all);
    let storm = Storm::new(rounds);
    let machines = Machines::new(mode, storm.vps(), SLICE);
    machines.run()?;
    let counts = &machines.counts;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    rt::println!(
        "  {mode:?}: {} flushes, {} reads, {} stale, {} seen here, {} slices, {} migrations",
        storm.sum(|o| &o.calls),
        storm.sum(|o| &o.reads),
        storm.sum(|o| &o.stale),
        count(&counts.reflected),
        count(&counts.slices),
        count(&counts.migrations)
    );
    check("round of a flush that failed", storm.sum(|o| &o.failed), 0)?;
    check("flushes", storm.sum(|o| &o.calls), rounds * all)?;
    check("stale reads", storm.sum(|o| &o.stale), 0)?;
    if smp::count() > 1 {
        check("there were migrations", u64::from(count(&counts.migrations) > 0), 1)?;
    }
    Ok(Counted { flushes: rounds * all, reflected: count(&counts.reflected), synthetic: count(&counts.synthetic) })
}

struct Counted {
    flushes: u64,
    reflected: u64,
    synthetic: u64,
}

/// Ticks of the timer, divided by 16.
const SLICE: u32 = 6000;

/// The host does all flushes: none comes here.
pub fn direct() -> Outcome {
    hyperv::needs_direct_flush()?;
    let counted = storm(Mode::Direct)?;
    check("flush calls that this hypervisor saw", counted.reflected, 0)?;
    check("synthetic exits", counted.synthetic, 0)
}

/// The same with direct flush off: all come here, with the same result.
pub fn reflected() -> Outcome {
    let counted = storm(Mode::Reflected)?;
    check("flush calls that this hypervisor saw", counted.reflected, counted.flushes)
}

/// With the TLB locked each flush of the machine ends in a synthetic exit; once it is released, none does, although
/// processors that were locked wait for their turn.
pub fn lock_release() -> Outcome {
    hyperv::needs_direct_flush()?;
    let rounds = 8;
    let storm = Storm::new(rounds);
    storm.vms[0].set_lock_count(2);
    let machines = Machines::new(Mode::Direct, storm.vps(), SLICE).releasing(storm.vms[0], 5);
    machines.run()?;
    check("round of a flush that failed", storm.sum(|o| &o.failed), 0)?;
    check("flushes", storm.sum(|o| &o.calls), rounds * 2 * PROCESSORS as u64)?;
    check("stale reads", storm.sum(|o| &o.stale), 0)?;
    let counts = &machines.counts;
    let (synthetic, at_release) = (counts.synthetic.load(Ordering::Relaxed), counts.at_release.load(Ordering::Relaxed));
    check("synthetic exits came before the release", u64::from(at_release >= 5), 1)?;
    // A flush whose lock count the host had read by then: one on each processor at most.
    check("synthetic exits ended with it", u64::from(synthetic - at_release <= smp::count() as u64), 1)
}
