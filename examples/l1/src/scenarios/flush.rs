//! Direct flush: an L2 with a processor on each L1 processor remaps a page and asks the host to flush; every read after
//! the flush must see the new page, and this hypervisor must not see the call.

use super::Outcome;
use crate::l2::{How, Initiator, Reader, Shared};
use crate::npt::Table;
use crate::vmcb::exit;
use crate::{Failure, check, cpu_guest, frames, hyperv, l2, smp};
use core::sync::atomic::{AtomicU64, Ordering};
use hvcore::client::HostOffer;
use rt::cpu::MAX_CPUS;

/// L2's address of the page that is remapped.
const ADDRESS: u64 = 0x7000_0000;
/// Rounds of remapping in each case: fewer where the emulator has to share processors among many.
fn rounds() -> u64 {
    if smp::count() > 2 { 4 } else { 40 }
}

/// One L2 with a processor on each L1 processor.
struct Vm {
    guest_tables: Table,
    nested_tables: Table,
    shared: &'static Shared,
    readers: [Option<&'static Reader>; MAX_CPUS],
    partition_assist: u64,
    vp_ids: &'static [u32],
}

/// Everything a processor needs to run its L2 processor.
struct Seat {
    reader: &'static Reader,
    guest_root: u64,
    nested_root: u64,
    vp_id: u32,
    partition_assist: u64,
    direct: bool,
}

/// VMMCALLs that reached this hypervisor.
static REFLECTED: AtomicU64 = AtomicU64::new(0);
/// Synthetic exits after a direct flush that reached this hypervisor.
static SYNTHETIC: AtomicU64 = AtomicU64::new(0);
/// Exits that nobody expected.
static UNEXPECTED: AtomicU64 = AtomicU64::new(0);

const VM_ID: u64 = 0x11;

fn zeroed<T>() -> &'static mut T {
    assert!(size_of::<T>() <= 4096);
    // SAFETY: a zeroed page frame that nobody else has; the types used here are valid when zero.
    unsafe { &mut *(frames::page() as *mut T) }
}

impl Vm {
    fn new(vp_ids: &'static [u32]) -> Self {
        let shared: &'static Shared = zeroed();
        shared.address.store(ADDRESS, Ordering::Relaxed);
        let mut readers = [None; MAX_CPUS];
        for slot in readers.iter_mut().take(smp::count()).skip(1) {
            let page = frames::page() as *mut Reader;
            // SAFETY: the page is this reader's.
            unsafe {
                page.write(Reader { shared, reads: AtomicU64::new(0), stale: AtomicU64::new(0) });
                *slot = Some(&*page);
            }
        }
        let partition_assist = hyperv::partition_assist();
        let vm = Self {
            guest_tables: Table::identity(4),
            nested_tables: Table::identity(4),
            shared,
            readers,
            partition_assist,
            vp_ids,
        };
        vm.guest_tables.map(ADDRESS, frames::page(), crate::npt::ALL);
        vm
    }

    fn readers(&self) -> impl Iterator<Item = &'static Reader> + '_ {
        self.readers.iter().flatten().copied()
    }

    /// Runs the readers on the other processors and the initiator here.
    fn run(&self, how: How, offer: HostOffer, targets: Option<&'static [u32]>) -> Result<&'static Initiator, Failure> {
        let direct = how != How::Not;
        let list: &'static mut [Option<&'static Reader>; MAX_CPUS] = zeroed();
        *list = self.readers;
        for (index, reader) in self.readers.iter().enumerate() {
            let Some(reader) = *reader else { continue };
            let seat: &'static mut Seat = zeroed();
            *seat = Seat {
                reader,
                guest_root: self.guest_tables.root(),
                nested_root: self.nested_tables.root(),
                vp_id: self.vp_ids[index],
                partition_assist: self.partition_assist,
                direct,
            };
            smp::spawn(index, run_reader, (&raw const *seat) as usize);
        }
        let readers: &'static mut [&'static Reader] = {
            let count = self.readers().count();
            let memory = frames::page() as *mut &'static Reader;
            for (n, reader) in self.readers().enumerate() {
                // SAFETY: the page holds 512 references and there are at most 15.
                unsafe { memory.add(n).write(reader) };
            }
            // SAFETY: as many as were written.
            unsafe { core::slice::from_raw_parts_mut(memory, count) }
        };
        let orders = frames::page() as *mut Initiator;
        // SAFETY: the page is this order's; it is larger than the structure.
        unsafe {
            orders.write(Initiator {
                shared: self.shared,
                readers,
                entry: self.guest_tables.entry(ADDRESS, 0),
                pages: [frames::page(), frames::page()],
                rounds: rounds(),
                how,
                offer,
                targets,
                page: frames::page() as *mut _,
                space: self.guest_tables.root(),
                failed: AtomicU64::new(0),
                calls: AtomicU64::new(0),
            });
        }
        let guest = cpu_guest();
        guest.long_mode(as_program(l2::initiator as *const () as usize), orders as u64);
        self.seat(guest, self.vp_ids[0], direct);
        serve(guest);
        for index in 1..smp::count() {
            smp::join(index);
        }
        // SAFETY: the guest has ended; the page lives on.
        Ok(unsafe { &*orders })
    }

    fn seat(&self, guest: &mut crate::guest::Guest, vp_id: u32, direct: bool) {
        seat(guest, self.guest_tables.root(), self.nested_tables.root(), vp_id, self.partition_assist, direct);
    }

    fn stale(&self) -> u64 {
        self.readers().map(|reader| reader.stale.load(Ordering::Relaxed)).sum()
    }
}

fn as_program(address: usize) -> unsafe extern "C" fn() {
    // SAFETY: entered with its argument in RDI and never returned from, as the guest's entry point.
    unsafe { core::mem::transmute(address) }
}

fn seat(guest: &mut crate::guest::Guest, cr3: u64, n_cr3: u64, vp_id: u32, partition_assist: u64, direct: bool) {
    guest.vmcb.set_cr3(cr3);
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(n_cr3);
    guest.vmcb.set_tlb_control(1);
    if direct {
        hyperv::enable();
        hyperv::describe(&mut guest.vmcb, VM_ID, vp_id, partition_assist);
    }
}

fn run_reader(seat_address: usize) {
    // SAFETY: `run` gave the address of a seat that lives for good.
    let given = unsafe { &*(seat_address as *const Seat) };
    let guest = cpu_guest();
    guest.long_mode(l2::reader, (&raw const *given.reader) as u64);
    seat(guest, given.guest_root, given.nested_root, given.vp_id, given.partition_assist, given.direct);
    serve(guest);
}

/// Runs the guest until it halts.
fn serve(guest: &mut crate::guest::Guest) {
    loop {
        let seen = guest.run();
        guest.vmcb.set_tlb_control(0);
        match seen.code {
            exit::HLT => return,
            exit::INTR | exit::NMI => {}
            exit::VMMCALL => {
                REFLECTED.fetch_add(1, Ordering::Relaxed);
                guest.gprs.rax = u64::from(tlfs_abi::status::HvStatus::ACCESS_DENIED.0);
                guest.skip(3);
            }
            exit::HV_ENLIGHTENED if seen.info1 == 1 => {
                SYNTHETIC.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                UNEXPECTED.store(seen.code, Ordering::Relaxed);
                return;
            }
        }
    }
}

fn reset_counters() {
    REFLECTED.store(0, Ordering::Relaxed);
    SYNTHETIC.store(0, Ordering::Relaxed);
    UNEXPECTED.store(0, Ordering::Relaxed);
}

/// The control: the same change without a flush leaves the stale translation visible on a running processor.
pub fn control() -> Outcome {
    reset_counters();
    if smp::count() == 1 {
        return Err(Failure::Missing("a second processor"));
    }
    let vm = Vm::new(&LOW_IDS);
    vm.run(How::Not, HostOffer::default(), None)?;
    check("unexpected exits", UNEXPECTED.load(Ordering::Relaxed), 0)?;
    check("stale translations were seen", u64::from(vm.stale() > 0), 1)
}

/// VP_IDs below 64: a mask names them.
static LOW_IDS: [u32; MAX_CPUS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 63];
/// VP_IDs in several banks: only a VP set names them.
static SPARSE_IDS: [u32; MAX_CPUS] = [0, 64, 130, 4095, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1100, 1200, 1300];

fn case(name: &str, vp_ids: &'static [u32; MAX_CPUS], how: How, xmm: bool, all: bool) -> Outcome {
    reset_counters();
    let vm = Vm::new(vp_ids);
    let offer = HostOffer { remote_flush: true, ex_sets: true, xmm_input: xmm, ..HostOffer::default() };
    let targets = if all { None } else { Some(&vp_ids[..smp::count()]) };
    let orders = vm.run(how, offer, targets)?;
    rt::println!("  {name}: {} flushes, {} stale", orders.calls.load(Ordering::Relaxed), vm.stale());
    check("exit that ended a processor", UNEXPECTED.load(Ordering::Relaxed), 0)?;
    check("flush calls that this hypervisor saw", REFLECTED.load(Ordering::Relaxed), 0)?;
    check("the initiator's failure", orders.failed.load(Ordering::Relaxed), 0)?;
    check("rounds", orders.calls.load(Ordering::Relaxed), rounds())?;
    check("stale reads", vm.stale(), 0)
}

/// All four calls, by registers, XMM and memory, for all processors, a mask and a sparse set.
pub fn direct() -> Outcome {
    hyperv::needs_direct_flush()?;
    case("space, all, XMM", &LOW_IDS, How::Space, true, true)?;
    case("space, all, memory", &LOW_IDS, How::Space, false, true)?;
    case("space, mask, XMM", &LOW_IDS, How::Space, true, false)?;
    case("space, mask, memory", &LOW_IDS, How::Space, false, false)?;
    case("space, set, XMM", &SPARSE_IDS, How::Space, true, false)?;
    case("space, set, memory", &SPARSE_IDS, How::Space, false, false)?;
    case("list of 1, all, XMM", &LOW_IDS, How::List(0), true, true)?;
    case("list of 1, mask, memory", &LOW_IDS, How::List(0), false, false)?;
    case("list of 1, set, XMM", &SPARSE_IDS, How::List(0), true, false)?;
    case("list of 15, mask, memory", &LOW_IDS, How::List(14), true, false)?;
    case("list of 15, set, memory", &SPARSE_IDS, How::List(14), false, false)?;
    case("list of 500, set, memory", &SPARSE_IDS, How::List(499), false, false)?;
    case("list of 509, mask, memory", &LOW_IDS, How::List(508), false, false)?;
    case("list of 508, all, memory", &LOW_IDS, How::List(507), false, true)?;
    case("2 MiB, mask, XMM", &LOW_IDS, How::Large, true, false)?;
    case("2 MiB, extended", &LOW_IDS, How::Extended, false, true)
}

/// A set that names nobody is a success and no flush: the readers go on seeing the old page.
pub fn empty_set() -> Outcome {
    hyperv::needs_direct_flush()?;
    if smp::count() == 1 {
        return Err(Failure::Missing("a second processor"));
    }
    reset_counters();
    let vm = Vm::new(&LOW_IDS);
    let orders = vm.run(How::EmptySet, HostOffer::default(), None)?;
    check("flush calls that this hypervisor saw", REFLECTED.load(Ordering::Relaxed), 0)?;
    check("the initiator's failure", orders.failed.load(Ordering::Relaxed), 0)?;
    check("stale translations were seen", u64::from(vm.stale() > 0), 1)
}
