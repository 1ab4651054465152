//! Virtual machines with several processors, scheduled on this hypervisor's processors: the worked example of an L1
//! that hands its guests' flushes to a Hyper-V-compatible host.
//!
//! [`Machines::run`] gives each L1 processor a run loop that takes any virtual processor that is ready, runs it for a time slice
//! (the local APIC's timer ends it) and puts it back, so that they are descheduled and migrate all the time. With
//! [`Mode::Direct`] the host does the guests' flushes and this hypervisor never sees one; with [`Mode::Reflected`] it does
//! them itself: marks the targets, interrupts those that run, and waits for these.
//!
//! Used by the scenarios with several machines; uses `guest` and `hyperv`.

use crate::guest::Guest;
use crate::npt::Table;
use crate::vmcb::{exit, misc1};
use crate::{Failure, check, frames, hyperv, smp};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use hvcore::client::HostOffer;
use rt::idt::{self, Frame};
use tlfs_abi::hypercall::HypercallResult;
use tlfs_abi::status::HvStatus;

/// Ends time slices, and interrupts a processor whose guest is to flush.
const VECTOR: u8 = 0x52;
const V_INTR_MASKING: u64 = 1 << 24;
/// Nobody; else a processor's number and 1.
const NOBODY: usize = 0;
/// Polls of a processor that waits before it gives up.
const PATIENCE: u64 = 400_000_000;

/// Who does the guests' flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The host.
    Direct,
    /// This hypervisor.
    Reflected,
}

/// A virtual machine.
pub struct Vm {
    /// Its VM_ID.
    pub id: u64,
    /// Its own page tables, which all its processors share.
    pub tables: Table,
    nested_root: u64,
    partition_assist: u64,
}

impl Vm {
    /// A machine that sees all memory one to one.
    pub fn new(id: u64) -> Self {
        let (tables, nested) = (Table::identity(4), Table::identity(4));
        Self { id, tables, nested_root: nested.root(), partition_assist: hyperv::partition_assist() }
    }

    /// TlbLockCount of the machine.
    pub fn set_lock_count(&self, count: u32) {
        // SAFETY: the first word of a page that the host reads and this hypervisor writes.
        unsafe { (self.partition_assist as *mut u32).write_volatile(count) };
    }
}

/// A virtual processor.
pub struct Vp {
    vm: &'static Vm,
    /// Its VP_ID.
    pub id: u32,
    guest: &'static mut Guest,
    /// XMM0 to XMM5, which its hypercalls use and this hypervisor does not.
    xmm: [u128; 6],
    /// The processor that ran it last.
    last: usize,
}

/// A virtual processor's place in the run queue.
pub struct Slot {
    vm: &'static Vm,
    /// Who has it: [`NOBODY`], or a processor, which alone then uses `vp`.
    owner: AtomicUsize,
    /// Who runs it in its guest; Sequential consistency between this and `flush`, as in the host's own shootdown.
    running: AtomicUsize,
    /// Its translations are to go before it runs on.
    flush: AtomicBool,
    done: AtomicBool,
    vp: crate::global::Global<Vp>,
}

/// What went on in a run, over all processors.
pub struct Counts {
    /// Flush hypercalls that this hypervisor saw.
    pub reflected: AtomicU64,
    /// Synthetic exits.
    pub synthetic: AtomicU64,
    /// How many there were when the TLB had just been released.
    pub at_release: AtomicU64,
    /// Time slices.
    pub slices: AtomicU64,
    /// Slices on another processor than the one before.
    pub migrations: AtomicU64,
    /// The code of an exit that nobody expected.
    pub unexpected: AtomicU64,
}

/// Virtual processors of one or more machines, and how they are run.
pub struct Machines {
    mode: Mode,
    slots: &'static [Slot],
    /// Average length of a slice, in ticks of the timer.
    slice: u32,
    /// The machine whose TLB is unlocked when there were so many synthetic exits.
    release: Option<(&'static Vm, u64)>,
    pub counts: Counts,
}

impl Vp {
    /// A processor of `vm` that runs `program` with `argument`. `number`, of all processors of all machines, gives it an
    /// ASID of its own.
    pub fn new(vm: &'static Vm, id: u32, number: usize, program: unsafe extern "C" fn(), argument: u64) -> Self {
        let pages = size_of::<Guest>().div_ceil(4096) as u64;
        let Some(memory) = rt::frames::allocate(pages * 4096, 4096) else { panic!("no memory for a guest") };
        let guest = memory as *mut Guest;
        // SAFETY: memory that nobody else has.
        let guest = unsafe {
            guest.write(Guest::new());
            &mut *guest
        };
        guest.long_mode(program, argument);
        let vmcb = &mut guest.vmcb;
        vmcb.set_misc1(vmcb.misc1() | misc1::INTR | misc1::NMI);
        vmcb.set_int_ctl(V_INTR_MASKING);
        vmcb.set_asid(number as u32 + 1);
        vmcb.set_cr3(vm.tables.root());
        vmcb.set_np_enable(1);
        vmcb.set_n_cr3(vm.nested_root);
        Self { vm, id, guest, xmm: [0; 6], last: NOBODY }
    }

    /// Makes it one that the host flushes, before its first run.
    fn describe(&mut self) {
        hyperv::describe(&mut self.guest.vmcb, self.vm.id, self.id, self.vm.partition_assist);
    }
}

impl Machines {
    /// Takes over the processors.
    pub fn new(mode: Mode, vps: impl Iterator<Item = Vp>, slice: u32) -> Self {
        let memory = frames::page() as *mut Slot;
        let mut count = 0;
        for mut vp in vps {
            assert!((count + 1) * size_of::<Slot>() <= 4096, "too many processors");
            if mode == Mode::Direct {
                vp.describe();
            }
            let slot = Slot {
                vm: vp.vm,
                owner: AtomicUsize::new(NOBODY),
                running: AtomicUsize::new(NOBODY),
                flush: AtomicBool::new(false),
                done: AtomicBool::new(false),
                vp: crate::global::Global::new(vp),
            };
            // SAFETY: inside a page that nobody else has.
            unsafe { memory.add(count).write(slot) };
            count += 1;
        }
        // SAFETY: as many as were written, and they stay.
        let slots = unsafe { core::slice::from_raw_parts(memory, count) };
        let zero = || AtomicU64::new(0);
        let counts = Counts {
            reflected: zero(),
            synthetic: zero(),
            at_release: zero(),
            slices: zero(),
            migrations: zero(),
            unexpected: zero(),
        };
        Self { mode, slots, slice, release: None, counts }
    }

    /// Sets the lock count of `vm` to zero after `exits` synthetic exits.
    pub fn releasing(self, vm: &'static Vm, exits: u64) -> Self {
        Self { release: Some((vm, exits)), ..self }
    }

    /// Runs all of them on all processors until each has halted.
    pub fn run(&self) -> Result<(), Failure> {
        idt::on(VECTOR, on_interrupt);
        for processor in 1..smp::count() {
            smp::spawn(processor, enter_loop, (&raw const *self) as usize);
        }
        self.run_loop();
        (1..smp::count()).for_each(smp::join);
        check("exit that nobody expected", self.counts.unexpected.load(Ordering::Relaxed), 0)
    }

    /// One processor's part.
    fn run_loop(&self) {
        let me = rt::cpu::current().index as usize + 1;
        let mut random = Random(me as u64 * 0x9E37_79B9_7F4A_7C15);
        if self.mode == Mode::Direct {
            hyperv::enable();
        }
        while !self.slots.iter().all(|slot| slot.done.load(Ordering::Acquire)) {
            let start = random.below(self.slots.len() as u64) as usize;
            let (before, from) = self.slots.split_at(start);
            let Some(slot) = from.iter().chain(before).find(|slot| slot.claim(me)) else {
                core::hint::spin_loop();
                continue;
            };
            self.counts.slices.fetch_add(1, Ordering::Relaxed);
            self.slice(slot, me, &mut random);
            // Release: the processor's state is there for the next owner.
            slot.owner.store(NOBODY, Ordering::Release);
        }
    }

    /// Runs the virtual processor of `slot` until its time is over.
    fn slice(&self, slot: &Slot, me: usize, random: &mut Random) {
        let vp = slot.vp.get();
        if vp.last != me {
            self.counts.migrations.fetch_add(u64::from(vp.last != NOBODY), Ordering::Relaxed);
            vp.last = me;
            // Translations of the last time that it was here; and the VMCB's cached parts are another processor's.
            vp.guest.vmcb.set_tlb_control(1);
            vp.guest.vmcb.set_clean(0);
        }
        for (number, value) in (0..).zip(vp.xmm) {
            // SAFETY: this hypervisor is compiled without SSE.
            unsafe { hw::fpu::set_xmm(number, value) };
        }
        rt::apic::one_shot(VECTOR, self.slice / 4 + random.below(u64::from(self.slice) * 3 / 2) as u32);
        loop {
            slot.running.store(me, Ordering::SeqCst);
            if slot.flush.swap(false, Ordering::SeqCst) {
                vp.guest.vmcb.set_tlb_control(1);
            }
            let seen = run_with_interrupts(vp.guest);
            slot.running.store(NOBODY, Ordering::SeqCst);
            vp.guest.vmcb.set_tlb_control(0);
            match seen.code {
                exit::INTR | exit::NMI => {
                    take_interrupt();
                    if random.below(4) > 0 {
                        break;
                    }
                    // Not for us, or one slice more.
                    rt::apic::one_shot(VECTOR, self.slice);
                }
                exit::HLT => {
                    slot.done.store(true, Ordering::Release);
                    break;
                }
                exit::VMMCALL => {
                    self.counts.reflected.fetch_add(1, Ordering::Relaxed);
                    let done = self.mode == Mode::Reflected && self.flush(slot, vp.vm);
                    let reps = (vp.guest.gprs.rcx >> 32) as u16 & 0xFFF;
                    let result = if done { (HvStatus::SUCCESS, reps) } else { (HvStatus::ACCESS_DENIED, 0) };
                    vp.guest.gprs.rax = HypercallResult::new(result.0, result.1).raw();
                    vp.guest.skip(3);
                }
                exit::HV_ENLIGHTENED if seen.info1 == 1 => {
                    let exits = self.counts.synthetic.fetch_add(1, Ordering::Relaxed) + 1;
                    if let Some((vm, after)) = self.release
                        && exits == after
                    {
                        vm.set_lock_count(0);
                        let exits = self.counts.synthetic.load(Ordering::SeqCst);
                        self.counts.at_release.store(exits, Ordering::Relaxed);
                    }
                    break;
                }
                code => {
                    self.counts.unexpected.store(code, Ordering::Relaxed);
                    slot.done.store(true, Ordering::Release);
                    break;
                }
            }
        }
        rt::apic::one_shot(VECTOR, 0);
        vp.xmm = core::array::from_fn(|number| hw::fpu::xmm(number as u8));
    }

    /// Has every processor of `vm` drop its translations before it runs on; more than was asked is always right.
    fn flush(&self, caller: &Slot, vm: &Vm) -> bool {
        let of_vm = |slot: &&Slot| slot.vm.id == vm.id && !core::ptr::eq(*slot, caller);
        let others = || self.slots.iter().filter(of_vm);
        caller.flush.store(true, Ordering::SeqCst);
        for slot in others() {
            slot.flush.store(true, Ordering::SeqCst);
            let running = slot.running.load(Ordering::SeqCst);
            if running != NOBODY
                && let Some(apic_id) = rt::smp::apic_id(running as u32 - 1)
            {
                rt::apic::send_interrupt(apic_id, VECTOR);
            }
        }
        // Who took the mark flushes at its VMRUN; who left its guest takes the mark before the next.
        others().all(|slot| {
            (0..PATIENCE).any(|_| {
                core::hint::spin_loop();
                slot.running.load(Ordering::SeqCst) == NOBODY || !slot.flush.load(Ordering::SeqCst)
            })
        })
    }
}

impl Slot {
    /// Takes the virtual processor, if nobody has it and it has something to do.
    fn claim(&self, me: usize) -> bool {
        // Acquire: its state as the last owner left it.
        !self.done.load(Ordering::Relaxed)
            && self.owner.compare_exchange(NOBODY, me, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }
}

fn enter_loop(machines: usize) {
    // SAFETY: `run` gave the address, and waits for this to end.
    unsafe { &*(machines as *const Machines) }.run_loop();
}

fn on_interrupt(_: &mut Frame) {
    rt::apic::end_of_interrupt();
}

/// Runs the guest with RFLAGS.IF set at VMRUN, so that a physical interrupt ends it.
fn run_with_interrupts(guest: &mut Guest) -> crate::guest::Exit {
    // SAFETY: GIF is clear until IF is clear again; the guest is one of ours.
    unsafe {
        hw::svm::clgi();
        asm!("sti", "nop");
        let seen = guest.run_closed();
        asm!("cli");
        hw::svm::stgi();
        seen
    }
}

/// Lets this processor take the interrupt that ended the guest's run.
fn take_interrupt() {
    // SAFETY: the vectors that can be pending have handlers.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Numbers that repeat from run to run (xorshift64*).
pub struct Random(pub u64);

impl Random {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit.max(1)
    }
}

/// What the guests are told of the host's flush calls.
pub fn offer(xmm: bool) -> HostOffer {
    HostOffer { remote_flush: true, ex_sets: true, xmm_input: xmm, ..HostOffer::default() }
}
