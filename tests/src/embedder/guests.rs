//! The guests: an L1 per partition whose VPs run L2s, their page tables, and what each access must find.
//!
//! All that a guest does goes through [`World::exec`], which puts the VP on some processor, lets it execute one
//! instruction to its end, whatever exits it takes, and moves it to another processor after each of them. A guest
//! changes its tables only together with the flush that it owes, so that between two actions every translation that a
//! processor uses must be that of the tables.

use hvcore::addr::Level;
use tlfs_abi::msr;

use super::World;
use super::layout::{self, BITS, PAGES, slot};
use super::memory::Home;
use crate::model::mem::PhysMem;
use crate::model::svm::vmcb::{ctl, exit, save};
use crate::model::svm::{Op, Step};
use crate::model::tables::flag;

/// VM_ID of every VM of every partition.
pub const VM_ID: u64 = 7;

/// An entry of one of the windows: which page, and whether it may be written.
pub type Entry = Option<(u8, bool)>;

/// What the page tables of a partition say of the windows.
#[derive(Clone, Debug)]
pub struct Tables {
    /// L1's window on its data pages.
    pub l1: [u8; PAGES],
    /// L2's GPAs on L1's data pages, by nested table.
    pub npt: [[Entry; PAGES]; 2],
    /// L2's window on its GPAs.
    pub l2: [Entry; PAGES],
    /// Nothing is known any more: a hostile L2 may have written anywhere.
    pub unknown: bool,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It completed with this result.
    Done(u64),
    /// L2 runs now.
    ToL2,
    /// L1 runs now: L2 exited with this code, as VMCB12 has it.
    ToL1(u64),
    /// An event was delivered instead.
    Event,
    /// The VP was reset.
    Reset(&'static str),
    /// It did not end in many tries.
    Stuck,
}

/// Contents of a frame's first word: which frame of the partition it is. Not a present entry of any table.
const fn marker(p: usize, frame: u64) -> u64 {
    0x4D00_0000_0060 | (p as u64) << 40 | (frame - layout::base(p)) >> 12 << 8
}

/// Address of L1's VMCB for VP `v` and nested table `s`.
pub const fn vmcb12(v: usize, s: usize) -> u64 {
    layout::VMCB12 + (v as u64 * 2 + s as u64) * 4096
}

/// nCR3 of nested table `s`.
pub const fn ncr3(s: usize) -> u64 {
    layout::NPTS + s as u64 * 0x4000
}

/// A set of four tables at `root`, present down to the page table, which is the identity of L1's memory with `rights`.
fn identity(mem: &PhysMem, at: impl Fn(u64) -> u64, root: u64, end: u64, rights: u64) {
    for level in 0..3 {
        mem.write(at(root + level * 0x1000), 8, (root + (level + 1) * 0x1000) | BITS);
    }
    for page in (0..end).step_by(4096) {
        // L2's tables are written by the processor, the stack and the hypercall input by L2.
        let writable = matches!(page, layout::STACK | layout::L2_TABLES..0x1_4000 | layout::INPUT..0x4_0000);
        mem.write(at(slot(root, page)), 8, page | if writable { BITS } else { rights });
    }
}

/// Fills the memory of partition `p`: L0's table for it, L1's and L2's tables, VMCBs, markers.
pub fn lay_out(mem: &PhysMem, p: usize, vps: usize) -> Tables {
    let base = layout::base(p);
    let npt01 = layout::VpPlaces::of(p, 0).npt01;
    for level in 0..3 {
        mem.write(npt01 + level * 0x1000, 8, (npt01 + (level + 1) * 0x1000) | BITS);
    }
    for page in (0..super::L1_BYTES).step_by(4096) {
        mem.write(slot(npt01, page), 8, (base + page) | BITS);
    }
    let at = |gpa| base + gpa;
    identity(mem, at, layout::L1_TABLES, super::L1_BYTES, BITS);
    identity(mem, at, ncr3(0), super::L1_BYTES, BITS & !flag::W);
    identity(mem, at, ncr3(1), super::L1_BYTES, BITS & !flag::W);
    identity(mem, at, layout::L2_TABLES, layout::DATA, BITS);
    for n in 0..PAGES as u64 {
        let page = n * 4096;
        let data = layout::DATA + page;
        mem.write(at(slot(layout::L1_TABLES, layout::WINDOW + page)), 8, data | BITS);
        for s in 0..2 {
            mem.write(at(slot(ncr3(s), layout::WINDOW + page)), 8, data | BITS);
        }
        mem.write(at(slot(layout::L2_TABLES, layout::L2_WINDOW + page)), 8, (layout::WINDOW + page) | BITS);
        for frame in [at(data), layout::spare(p, data)] {
            mem.write(frame, 8, marker(p, frame));
        }
    }
    for n in (0..0x2000).step_by(8) {
        // SYSENTER_CS is L2's own.
        let word = if n == 0x174 / 32 * 8 { !(3u64 << 40) } else { u64::MAX };
        mem.write(at(layout::MSRPM12 + n), 8, word);
    }
    for v in 0..vps {
        mem.write(at(layout::ASSIST + v as u64 * 4096) + tlfs_abi::assist::vp_assist_offset::NESTED_FEATURES, 4, 1);
        for s in 0..2 {
            write_vmcb12(mem, at(vmcb12(v, s)), v, s);
        }
    }
    let entry = std::array::from_fn(|n| Some((n as u8, true)));
    Tables { l1: std::array::from_fn(|n| n as u8), npt: [entry; 2], l2: entry, unknown: false }
}

/// L1's VMCB for VP `v` on nested table `s`, at host address `at`.
pub fn write_vmcb12(mem: &PhysMem, at: u64, v: usize, s: usize) {
    crate::model::svm::vmcb::write_minimal(mem, at, layout::L2_TABLES);
    // HLT, CPUID, SHUTDOWN, MSR, IOIO; VMRUN; #PF.
    mem.write(at + ctl::MISC1, 4, 1 << 24 | 1 << 18 | 1 << 31 | 1 << 28 | 1 << 27);
    mem.write(at + ctl::EXCEPTIONS, 4, 1 << 14);
    mem.write(at + ctl::ASID, 4, 1 + s as u64);
    mem.write(at + ctl::NP, 8, 1);
    mem.write(at + ctl::NCR3, 8, ncr3(s));
    mem.write(at + ctl::MSRPM, 8, layout::MSRPM12);
    mem.write(at + ctl::IOPM, 8, layout::IOPM12);
    mem.write(at + save::RIP, 8, 0x5_0000);
    mem.write(at + save::RSP, 8, layout::STACK);
    // Direct flush; VP_ID, VM_ID, partition assist page.
    mem.write(at + 0x3E0, 4, 1);
    mem.write(at + 0x3E4, 4, v as u64);
    mem.write(at + 0x3E8, 8, VM_ID);
    mem.write(at + 0x3F0, 8, layout::PARTITION_ASSIST);
}

impl World<'_> {
    /// Host address of `gpa` now.
    pub fn frame(&self, p: usize, gpa: u64) -> u64 {
        self.partitions[p].memory.home(gpa).map_or(0, |home| home.frame | (gpa & 4095))
    }

    /// Takes the VP off its processor.
    pub fn off(&mut self, p: usize, v: usize) {
        if let Some(c) = self.partitions[p].vps[v].on {
            self.kick(c);
        }
    }

    /// The VP executes one instruction of the level that it is at.
    pub fn exec(&mut self, p: usize, v: usize, op: Op) -> Ended {
        for _ in 0..24 {
            if self.broken.is_some() {
                return Ended::Stuck;
            }
            let c = match self.partitions[p].vps[v].on {
                Some(c) => c,
                None => {
                    let c = self.rng.below(self.cpus.len() as u64) as usize;
                    self.kick(c);
                    if !self.enter(c, p, v) {
                        if let Some(ended) = self.changed(p, v, None) {
                            return ended;
                        }
                        continue;
                    }
                    c
                }
            };
            let vp = &mut self.partitions[p].vps[v];
            let (level, rip) = (vp.nested.level(), self.cpus[c].hw.state.rip);
            match self.step(c, op) {
                Step::Done(value) => return Ended::Done(value),
                Step::Event(_) => return Ended::Event,
                Step::Idle => {
                    // HLT that nobody intercepts: another VP gets the processor.
                    self.kick(c);
                    return Ended::Stuck;
                }
                Step::Exit(_) => {
                    if let Some(ended) = self.changed(p, v, Some((level, rip))) {
                        return ended;
                    }
                }
                other => {
                    self.violated(|| format!("{op:?} ended in {other:?}"));
                    return Ended::Stuck;
                }
            }
        }
        Ended::Stuck
    }

    /// After an exit: what became of the instruction at `before`. `None`: it is to be executed again.
    fn changed(&mut self, p: usize, v: usize, before: Option<(Level, u64)>) -> Option<Ended> {
        let vp = &mut self.partitions[p].vps[v];
        let now = vp.nested.level();
        if let Some(why) = vp.fell {
            return Some(Ended::Reset(why));
        }
        match (before, now) {
            (Some((Level::L1, _)), Level::L2) => Some(Ended::ToL2),
            (Some((Level::L2, _)), Level::L1) => {
                // L1 finds its VMCB in the RAX that it had at VMRUN.
                let gpa = vp.hw.vmcb01.save.rax;
                let vmcb12 = self.partitions[p].memory.home(gpa).map(|home| home.frame);
                Some(Ended::ToL1(vmcb12.map_or(0, |at| self.mem.read(at + ctl::EXITCODE, 8))))
            }
            (Some((_, rip)), _) => {
                let vmcb = vp.vmcb();
                (vmcb.save.rip != rip).then_some(Ended::Done(vmcb.save.rax))
            }
            (None, _) => None,
        }
    }

    /// L1 starts on a VP: SVM on, Hyper-V known, assist page in place.
    pub fn boot(&mut self, p: usize, v: usize) {
        let assist = layout::ASSIST + v as u64 * 4096;
        self.partitions[p].vps[v].fell = None;
        for (number, value) in [(0xC000_0080, 0x1D01), (msr::GUEST_OS_ID, 1), (msr::VP_ASSIST_PAGE, assist | 1)] {
            let ended = self.exec(p, v, Op::Wrmsr(number, value));
            if !matches!(ended, Ended::Done(_)) {
                self.failed(p, || format!("booting: WRMSR {number:#x} ended in {ended:?}"));
            }
        }
        self.partitions[p].vps[v].fell = None;
    }

    /// Brings the VP to L2 on nested table `s`. False if it did not get there, which orderly guests' VMs always do.
    pub fn to_l2(&mut self, p: usize, v: usize, s: usize) -> bool {
        if self.partitions[p].vps[v].nested.level() == Level::L2 {
            if self.partitions[p].vps[v].hw.vmcb01.save.rax == vmcb12(v, s) {
                return true;
            }
            self.to_l1(p, v);
        }
        let ended = self.exec(p, v, Op::Vmrun(vmcb12(v, s)));
        if ended != Ended::ToL2 {
            let refusal = self.partitions[p].vps[v].nested.last_refusal();
            self.failed(p, || format!("VMRUN of VP {p}.{v} ended in {ended:x?}, {refusal:?}"));
        }
        ended == Ended::ToL2
    }

    /// Brings the VP to L1.
    pub fn to_l1(&mut self, p: usize, v: usize) {
        for _ in 0..8 {
            if self.partitions[p].vps[v].nested.level() == Level::L1 {
                return;
            }
            self.exec(p, v, Op::Cpuid(0, 0));
        }
        let hostile = self.partitions[p].tables.unknown;
        if !hostile {
            self.violated(|| "CPUID does not bring L2 to L1".into());
        }
    }

    /// L2 reads or writes its window, and the outcome is compared with the tables.
    pub fn l2_access(&mut self, p: usize, v: usize, s: usize, n: usize, write: bool) {
        if !self.to_l2(p, v, s) {
            return;
        }
        let at = layout::L2_WINDOW + n as u64 * 4096;
        let value = self.rng.bits() << 33 >> 32;
        let op = if write { Op::Write(at + 8, 8, value) } else { Op::Read(at, 8) };
        let ended = self.exec(p, v, op);
        let partition = &mut self.partitions[p];
        if partition.tables.unknown {
            return;
        }
        partition.counts.checked += 1;
        let tables = &partition.tables;
        let first = tables.l2[n].filter(|(_, writable)| *writable || !write);
        let wanted = match first {
            None => Err(exit::EXCEPTION + 14),
            Some((gpa, _)) => match tables.npt[s][usize::from(gpa)].filter(|(_, writable)| *writable || !write) {
                None => Err(exit::NPF),
                Some((page, _)) => Ok(layout::DATA + u64::from(page) * 4096),
            },
        };
        self.compare(p, ended, wanted, write.then_some(value), || format!("L2 of VP {p}.{v} at slot {n}"));
    }

    /// L1 reads or writes its window, compared likewise.
    pub fn l1_access(&mut self, p: usize, v: usize, n: usize, write: bool) {
        self.to_l1(p, v);
        let at = layout::WINDOW + n as u64 * 4096;
        let value = self.rng.bits() << 33 >> 32;
        let op = if write { Op::Write(at + 8, 8, value) } else { Op::Read(at, 8) };
        let ended = self.exec(p, v, op);
        let partition = &mut self.partitions[p];
        if partition.tables.unknown {
            return;
        }
        partition.counts.checked += 1;
        let wanted = Ok(layout::DATA + u64::from(partition.tables.l1[n]) * 4096);
        self.compare(p, ended, wanted, write.then_some(value), || format!("L1 of VP {p}.{v} at slot {n}"));
    }

    /// Rule 6. `wanted` is the L1 GPA of the page, or the exit code that L1 must see.
    fn compare(
        &mut self,
        p: usize,
        ended: Ended,
        wanted: Result<u64, u64>,
        written: Option<u64>,
        who: impl Fn() -> String,
    ) {
        let right = match (ended, wanted, written) {
            (Ended::ToL1(code), Err(wanted), _) => code == wanted,
            (Ended::Done(value), Ok(gpa), None) => value == marker(p, self.frame(p, gpa)),
            (Ended::Done(_), Ok(gpa), Some(value)) => self.mem.read(self.frame(p, gpa) + 8, 8) == value,
            _ => false,
        };
        if !right {
            let frame = wanted.map(|gpa| self.frame(p, gpa));
            self.violated(|| format!("{}: {ended:x?}, not {wanted:x?} ({frame:x?}), written {written:x?}", who()));
        }
    }

    /// Something that only a hostile guest may bring about.
    fn failed(&mut self, p: usize, why: impl FnOnce() -> String) {
        if !self.partitions[p].tables.unknown {
            self.violated(why);
        }
    }

    /// L2 maps slot `n` of its window to page `to`, or not, and flushes: all of its VM, by an address space or a list.
    pub fn l2_edit(&mut self, p: usize, v: usize, s: usize, n: usize, to: Entry, list: bool) {
        if !self.to_l2(p, v, s) {
            return;
        }
        self.off(p, v);
        let entry = to.map_or(0, |(page, writable)| entry(layout::WINDOW, page, writable));
        self.mem.write(self.frame(p, slot(layout::L2_TABLES, layout::L2_WINDOW + n as u64 * 4096)), 8, entry);
        self.partitions[p].tables.l2[n] = to;
        let range = layout::L2_WINDOW + n as u64 * 4096;
        let code = if list { 0x1_0000_0003 } else { 2 };
        self.flush(p, v, Level::L2, code, [0, 3, u64::MAX, range]);
    }

    /// L1 does the same for its own window.
    pub fn l1_edit(&mut self, p: usize, v: usize, n: usize, to: u8, list: bool) {
        self.to_l1(p, v);
        self.off(p, v);
        let range = layout::WINDOW + n as u64 * 4096;
        self.mem.write(self.frame(p, slot(layout::L1_TABLES, range)), 8, entry(layout::DATA, to, true));
        self.partitions[p].tables.l1[n] = to;
        let code = if list { 0x1_0000_0003 } else { 2 };
        self.flush(p, v, Level::L1, code, [0, 3, u64::MAX, range]);
    }

    /// L1 changes nested table `s` and flushes the guest-physical space, as a whole or the page.
    pub fn npt_edit(&mut self, p: usize, v: usize, s: usize, n: usize, to: Entry, list: bool) {
        self.to_l1(p, v);
        self.off(p, v);
        let range = layout::WINDOW + n as u64 * 4096;
        let value = to.map_or(0, |(page, writable)| entry(layout::DATA, page, writable));
        self.mem.write(self.frame(p, slot(ncr3(s), range)), 8, value);
        self.partitions[p].tables.npt[s][n] = to;
        let code = if list { 0x1_0000_00B0 } else { 0xAF };
        self.flush(p, v, Level::L1, code, [ncr3(s), 0, range, 0]);
    }

    /// The same by TLB_CONTROL: every VP of L1 leaves L2 and enters it again with a flush asked for.
    pub fn npt_edit_plain(&mut self, p: usize, s: usize, n: usize, to: Entry, by_asid: bool) {
        let vps = self.partitions[p].vps.len();
        (0..vps).for_each(|v| self.to_l1(p, v));
        let value = to.map_or(0, |(page, writable)| entry(layout::DATA, page, writable));
        self.mem.write(self.frame(p, slot(ncr3(s), layout::WINDOW + n as u64 * 4096)), 8, value);
        self.partitions[p].tables.npt[s][n] = to;
        for v in 0..vps {
            let control = self.frame(p, vmcb12(v, s) + ctl::TLB_CONTROL);
            self.mem.write(control, 1, if by_asid { 3 } else { 1 });
            self.to_l2(p, v, s);
            self.to_l1(p, v);
            self.mem.write(control, 1, 0);
        }
    }

    fn flush(&mut self, p: usize, v: usize, level: Level, code: u64, input: [u64; 4]) {
        let at = layout::INPUT + v as u64 * 4096;
        for (n, word) in (0..).zip(input) {
            self.mem.write(self.frame(p, at) + n * 8, 8, word);
        }
        let regs = &mut self.partitions[p].vps[v].hw.regs.0;
        (regs[1], regs[2], regs[8]) = (code, at, 0);
        let ended = self.exec(p, v, Op::Vmmcall);
        let good = matches!(ended, Ended::Done(result) if result & 0xFFFF == 0);
        if !good || self.partitions[p].vps[v].nested.level() != level {
            self.failed(p, || format!("{level:?} of VP {p}.{v}: call {code:#x} ended in {ended:x?}"));
        }
    }

    /// The embedder moves data page `n` of L1, takes it away, or protects it.
    pub fn disturb(&mut self, p: usize, n: usize, how: u64) {
        let gpa = layout::DATA + n as u64 * 4096;
        let Some(home) = self.partitions[p].memory.home(gpa) else { return };
        let home = match how & 3 {
            0 => Home { frame: layout::base(p) + gpa, ..home },
            1 => Home { frame: layout::spare(p, gpa), ..home },
            2 => Home { present: false, ..home },
            _ => Home { writable: false, ..home },
        };
        self.move_page(p, gpa, home);
    }
}

const fn entry(window: u64, page: u8, writable: bool) -> u64 {
    (window + page as u64 * 4096) | if writable { BITS } else { BITS & !flag::W }
}
