//! Hypercalls of L1 and direct flushes of L2: performed, with the kicks and waits that they need. Called by [`super::run`].

use hvcore::addr::{L1Gpa, Level};
use hvcore::flush::{FlushCalls, Posted};
use hvcore::hypercall::{Outcome, handle};
use hvcore::memory::{CallerMemory, GuestMemory, L1Caller, L2Caller};
use nsvm::insn::Kind;
use nsvm::npt::{NptFormat, NptWalk};
use nsvm::{Fault, L2Exit};
use tlfs_abi::hypercall::HypercallResult;
use tlfs_abi::status::HvStatus;

use super::hyperv::{self, CallRegisters, Calls};
use super::run::parts;
use super::vp::{Bytes, machine};
use super::{Mistake, World, layout};
use crate::model::svm::Op;

impl World<'_> {
    /// Kicks the targets of a request and waits for them.
    pub(super) fn settle(&mut self, p: usize, scratch: &mut hvcore::flush::Shootdown, posted: Posted) {
        if posted == Posted::Done || self.mistake == Some(Mistake::NoKick) {
            return;
        }
        let targets: Vec<u16> = scratch.kicks().collect();
        for slot in targets {
            self.partitions[p].counts.kicked += 1;
            let Some(c) = self.partitions[p].vps[usize::from(slot)].on else { continue };
            if self.rng.chance(256) {
                // The kick is on its way: the target may still use what it has.
                let level = self.partitions[p].vps[usize::from(slot)].nested.level();
                let window = if level == Level::L2 { layout::L2_WINDOW } else { layout::WINDOW };
                let at = window + self.rng.below(layout::PAGES as u64) * 4096;
                self.step(c, Op::Read(at, 8));
            }
            self.kick(c);
        }
        let vps = self.partitions[p].domain.vps();
        if !(0..3).any(|_| scratch.poll(vps)) {
            self.violated(|| format!("a flush of partition {p} does not end"));
        }
    }

    /// Performs a hypercall, kicks and waits included.
    pub(super) fn call(
        &mut self,
        p: usize,
        v: usize,
        level: Level,
        vm_id: u64,
        l2: Option<(NptFormat, u64)>,
    ) -> Outcome {
        fn perform<C: CallerMemory + ?Sized>(
            partition: &mut super::Partition<'_>,
            v: usize,
            level: Level,
            vm_id: u64,
            memory: &C,
        ) -> (Outcome, Posted) {
            let vp = &mut partition.vps[v];
            let vmcb = match level {
                Level::L1 => &mut vp.hw.vmcb01,
                Level::L2 => &mut vp.hw.vmcb02,
            };
            let caller = partition.interface.caller(hyperv::mode(vmcb), level);
            let mut registers = CallRegisters { vmcb, regs: &mut vp.hw.regs };
            let flush = FlushCalls::new(&partition.domain, &partition.map, vm_id, &mut vp.shootdown);
            let mut calls = Calls { flush: flush.called_by(v as u16) };
            let outcome = handle(&mut calls, &caller, &mut registers, memory, &mut vp.scratch);
            let posted = calls.flush.posted();
            if calls.flush.flushes_caller() {
                vp.flush.flush_gva(level);
            }
            (outcome, posted)
        }
        let memory = self.partitions[p].memory.clone();
        let partition = &mut self.partitions[p];
        let (outcome, posted) = match l2 {
            Some((format, ncr3)) => {
                let second_stage = NptWalk { memory: &memory, format, ncr3 };
                perform(partition, v, level, vm_id, &L2Caller { memory: &memory, second_stage: &second_stage })
            }
            None => perform(partition, v, level, vm_id, &L1Caller(&memory)),
        };
        let mut scratch = std::mem::take(&mut self.partitions[p].vps[v].shootdown);
        self.settle(p, &mut scratch, posted);
        self.partitions[p].vps[v].shootdown = scratch;
        outcome
    }

    pub(super) fn l1_call(&mut self, c: usize, p: usize, v: usize) {
        let outcome = self.call(p, v, Level::L1, 0, None);
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        match outcome {
            Outcome::Complete(_) => _ = vp.nested.step_over(&mut m, Kind::Vmmcall),
            Outcome::Retry | Outcome::Suspend => {}
            Outcome::InjectUd => m.vmcb01.inject_exception(6, None),
        }
    }

    pub(super) fn direct_flush(&mut self, c: usize, p: usize, v: usize, next_rip: u64) {
        let vp = &self.partitions[p].vps[v];
        let (vm_id, assist, walk) =
            (vp.nested.enlightenments().vm_id, vp.nested.enlightenments().partition_assist_page, vp.walk);
        let outcome = self.call(p, v, Level::L2, vm_id, walk);
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        match outcome {
            Outcome::Complete(result) => {
                m.vmcb02.complete_instruction(next_rip);
                if !result.status().is_success() {
                    return;
                }
                partition.counts.direct += 1;
                let lock = if assist & 4095 == 0 { partition.memory.read_u32(L1Gpa::new(assist)).ok() } else { None };
                match lock {
                    Some(0) => {}
                    Some(_) => {
                        if vp.nested.synthetic_exit(&mut m) == L2Exit::Shutdown {
                            self.reset(p, v, "VMCB12 lost at a synthetic exit");
                        }
                    }
                    None => {
                        let status = HvStatus::INVALID_HYPERCALL_INPUT;
                        m.vmcb02.save.rax = HypercallResult::new(status, result.reps_completed()).raw();
                    }
                }
            }
            Outcome::Retry | Outcome::Suspend => {}
            Outcome::InjectUd => _ = vp.nested.raise_in_l2(&mut m, Fault::UD),
        }
    }
}
