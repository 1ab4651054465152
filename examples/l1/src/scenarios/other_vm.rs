//! A direct flush reaches the caller's machine alone: a processor of another one with the same VP_ID is neither flushed
//! nor interrupted, and so goes on with a translation that has become stale.

use super::Outcome;
use crate::l2::{self, Reader, Shared};
use crate::npt::Table;
use crate::vmcb::exit;
use crate::{Failure, check, cpu_guest, frames, hyperv, smp};
use core::sync::atomic::{AtomicU64, Ordering};
use tlfs_abi::flush::FlushFlags;
use tlfs_abi::hypercall::{CallCode, HypercallInput};

const ADDRESS: u64 = 0x7000_0000;
const READER_VM: u64 = 0x41;
const OTHER_VM: u64 = 0x42;
const VP_ID: u32 = 3;
/// Polls for the reader to go on.
const PATIENCE: u64 = 200_000_000;

crate::hypercall_program!(
    /// Flushes every address space of all processors of its machine: the input value is in RDI, the flags in RSI. The
    /// mask, in XMM0, is empty.
    program_flush,
    ["mov rcx, rdi", "xor edx, edx", "mov r8, rsi", "pxor xmm0, xmm0"],
    ["hlt"]
);

/// The reader's machine.
struct Watched {
    tables: Table,
    nested: Table,
    shared: &'static Shared,
    reader: &'static Reader,
    partition_assist: u64,
}

fn place<T>(value: T) -> &'static T {
    assert!(size_of::<T>() <= 4096);
    let memory = frames::page() as *mut T;
    // SAFETY: a page that nobody else has.
    unsafe {
        memory.write(value);
        &*memory
    }
}

impl Watched {
    fn new() -> &'static Self {
        let zero = || AtomicU64::new(0);
        let shared = place(Shared { epoch: zero(), stop: zero(), address: AtomicU64::new(ADDRESS) });
        let reader = place(Reader { shared, reads: zero(), stale: zero() });
        let (tables, nested) = (Table::identity(4), Table::identity(4));
        tables.map(ADDRESS, frames::page(), crate::npt::ALL);
        place(Self { tables, nested, shared, reader, partition_assist: hyperv::partition_assist() })
    }

    /// Waits for the reader to read on: how much of it was stale.
    fn reads(&self) -> Option<(u64, u64)> {
        let now = || (self.reader.reads.load(Ordering::SeqCst), self.reader.stale.load(Ordering::SeqCst));
        let (reads, stale) = now();
        let went_on = (0..PATIENCE).any(|_| {
            core::hint::spin_loop();
            now().0 > reads + 2000
        });
        let after = now();
        went_on.then_some((after.0 - reads, after.1 - stale))
    }

    /// Maps another page, and demands of every read from now on that it sees that page.
    fn remap(&self) {
        let next = frames::page();
        // SAFETY: a page of the reader's machine.
        unsafe { (next as *mut u64).write_volatile(1) };
        self.tables.map(ADDRESS, next, crate::npt::ALL);
        l2::raise(self.shared, 1);
    }
}

fn run_reader(watched: usize) {
    // SAFETY: `flush_seen` gave the address; it lives for good.
    let watched = unsafe { &*(watched as *const Watched) };
    let guest = cpu_guest();
    guest.long_mode(l2::reader, (&raw const *watched.reader) as u64);
    guest.vmcb.set_cr3(watched.tables.root());
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(watched.nested.root());
    guest.vmcb.set_tlb_control(1);
    hyperv::enable();
    hyperv::describe(&mut guest.vmcb, READER_VM, VP_ID, watched.partition_assist);
    while guest.run().code != exit::HLT {
        guest.vmcb.set_tlb_control(0);
    }
}

/// True when the reader, remapped, sees the new page after a flush from machine `vm_id`.
fn flush_seen(vm_id: u64) -> Result<bool, Failure> {
    let watched = Watched::new();
    smp::spawn(1, run_reader, (&raw const *watched) as usize);
    let outcome = flush_from(vm_id, watched);
    watched.shared.stop.store(1, Ordering::SeqCst);
    smp::join(1);
    outcome
}

fn flush_from(vm_id: u64, watched: &Watched) -> Result<bool, Failure> {
    check("the reader reads", u64::from(watched.reads().is_some()), 1)?;
    watched.remap();
    let (reads, stale) = watched.reads().unwrap_or_default();
    // The control: without a flush the translation is stale. A TLB may forget, so not of every single read.
    check("most reads are stale before the flush", u64::from(stale * 2 > reads), 1)?;
    let guest = cpu_guest();
    let call = HypercallInput::new(CallCode::FLUSH_VIRTUAL_ADDRESS_SPACE).with_fast();
    guest.long_mode(program_flush(), call.raw());
    guest.gprs.rsi = FlushFlags::ALL_PROCESSORS | FlushFlags::ALL_VIRTUAL_ADDRESS_SPACES;
    guest.vmcb.set_np_enable(1);
    guest.vmcb.set_n_cr3(Table::identity(4).root());
    guest.vmcb.set_tlb_control(1);
    hyperv::enable();
    hyperv::describe(&mut guest.vmcb, vm_id, VP_ID, hyperv::partition_assist());
    guest.expect(exit::HLT)?;
    check("result", guest.gprs.rax, 0)?;
    let (reads, stale) = watched.reads().unwrap_or_default();
    check("the reader reads on", u64::from(reads > 0), 1)?;
    Ok(stale == 0)
}

/// A flush of another machine leaves the reader's translation; one of its own machine, the control, does not.
pub fn keeps() -> Outcome {
    hyperv::needs_direct_flush()?;
    if smp::count() == 1 {
        return Err(Failure::Missing("a second processor"));
    }
    check("after a flush of another machine", u64::from(flush_seen(OTHER_VM)?), 0)?;
    check("after a flush of its own", u64::from(flush_seen(READER_VM)?), 1)
}
