//! Entry, exit and everything between: the embedder proper. Follows `docs/embedding.md` step by step.

use hvcore::addr::{L1Gpa, Level};
use hvcore::direct::{self, DirectFlush};
use hvcore::flush::{GvaScope, NestedContext, NestedIds, SecondStageScope};
use hvcore::hypercall::Width;
use hvcore::memory::GuestMemory;
use hvcore::partition::{MsrRead, MsrWrite};
use nsvm::insn::Kind;
use nsvm::npt::{L1Access, NptContext, NptFormat, NptOutcome};
use nsvm::save::{RestoreError, SavedState};
use nsvm::vmcb::bits::{int_ctl, misc1, misc2, tlb, virt_ext};
use nsvm::{Entry, Exit, Fault, Invalidate, L1Exit, L2Exit, exit_code};
use tlfs_abi::hypercall::HypercallInput;
use tlfs_abi::vp_set::VpSet;

use super::hyperv;
use super::layout::{self, BITS};
use super::vp::{Bytes, machine};
use super::{L1_BYTES, Mistake, Owner, World, is_host};
use crate::model::svm::{Op, Step};
use crate::model::tables::flag;

/// What L1's TSC runs at.
const OWN_TSC_RATIO: u64 = 1 << 32;

/// Splits the borrow of a world: processor, VP, its partition, and the library's machine.
macro_rules! parts {
    ($world:ident, $c:expr, $p:expr, $v:expr => $cpu:ident, $partition:ident, $vp:ident, $code:ident, $m:ident) => {
        let $cpu = &mut $world.cpus[$c];
        let $partition = &mut $world.partitions[$p];
        let $vp = &mut $partition.vps[$v];
        let $code = Bytes($vp.op);
        #[allow(unused_mut)]
        let mut $m = machine($vp.hw, &mut $cpu.asids, $world.own, &$partition.memory, &$code);
        let _ = &$m;
    };
}

pub(super) use parts;

impl World<'_> {
    /// Puts VP `v` of partition `p` on processor `c` and enters its guest. False if it did not get there.
    pub fn enter(&mut self, c: usize, p: usize, v: usize) -> bool {
        assert!(self.cpus[c].running.is_none() && self.partitions[p].vps[v].on.is_none());
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        let level = vp.nested.level();
        let again = vp.plan.filter(|_| self.rng.chance(768) && vp.nested.may_repeat(&m, level));
        let level = if again.is_some() { level } else { vp.nested.route_events(&mut m) };
        let mut flushed = false;
        if let Some(due) = vp.flush.enter(level) {
            flushed = true;
            if self.mistake != Some(Mistake::NoDrain) {
                hyperv::apply(&mut vp.nested, &mut vp.shadow, level, &due);
            }
        }
        if vp.shadow.tag_stale() && self.mistake != Some(Mistake::NoRetire) {
            vp.nested.retire_tag(Level::L2);
        }
        let plan = match again {
            Some(plan) => {
                if !flushed || self.mistake != Some(Mistake::NoPrepare) {
                    vp.nested.repeat_entry(&mut m, level);
                }
                plan
            }
            None => match vp.nested.prepare_entry(&mut m) {
                Entry::Run(plan) => plan,
                Entry::Init | Entry::Shutdown => {
                    vp.flush.entry_failed();
                    self.reset(p, v, "INIT or a lost VMCB12 at entry");
                    return false;
                }
            },
        };
        vp.plan = Some(plan);
        partition.counts.repeated += u64::from(again.is_some());
        partition.counts.flushed += u64::from(flushed);
        if plan.level != level {
            self.violated(|| format!("a plan for another level: {plan:?}"));
            return false;
        }
        let partition = &mut self.partitions[p];
        let vp = &mut partition.vps[v];
        let control = match level {
            Level::L1 => &mut vp.hw.vmcb01.control,
            Level::L2 => &mut vp.hw.vmcb02.control,
        };
        match self.mistake {
            Some(Mistake::NoTlbControl) => control.tlb_control = 0,
            Some(Mistake::OneAsid) => control.asid = 1,
            Some(Mistake::NoIntercept) if level == Level::L2 => control.intercepts.misc1 &= !misc1::NMI,
            Some(Mistake::NoMap) if level == Level::L2 => vp.hw.msrpm02[0] = 0,
            Some(Mistake::NoShadow) if level == Level::L2 => control.n_cr3 = vp.walk.map_or(0, |(_, ncr3)| ncr3),
            Some(Mistake::LeakRegister) if level == Level::L1 => vp.hw.regs.0[3] = control.n_cr3,
            Some(Mistake::LeakMemory) => {
                let _ = partition.memory.write_u64(L1Gpa::new(layout::VMCB12 + 0x300), control.n_cr3);
            }
            _ => {}
        }
        self.check_entry(c, p, v, level);
        let cpu = &mut self.cpus[c];
        let vp = &mut self.partitions[p].vps[v];
        let at = vp.hw.at;
        let tight = vp.store(&self.mem, level == Level::L2, self.own);
        cpu.hw.regs = vp.hw.regs.0;
        if plan.exit_soon {
            cpu.hw.lines.nmi();
        }
        let flags = &mut cpu.hw.state.rflags;
        *flags = *flags & !(1 << 9) | u64::from(plan.host_if) << 9;
        cpu.hw.tsc_ratio = vp.nested.hardware_tsc_ratio(OWN_TSC_RATIO);
        let vmcb = if level == Level::L2 { at.vmcb02 } else { at.vmcb01 };
        cpu.hw.step(&self.mem, Op::Vmload(at.vmcb01));
        let step = cpu.hw.step(&self.mem, Op::Vmrun(vmcb));
        cpu.running = Some((p, v));
        vp.on = Some(c);
        if !tight {
            self.violated(|| "a permission map lets through what the embedder's does not".into());
        }
        if let Step::Exit(_) = step {
            self.leave(c);
            return false;
        }
        true
    }

    /// Rules 1 to 4, and 5 for L1's registers.
    fn check_entry(&mut self, c: usize, p: usize, v: usize, level: Level) {
        let vp = &mut self.partitions[p].vps[v];
        let (own, root) = (vp.hw.vmcb01.control.intercepts, vp.hw.vmcb01.control.n_cr3);
        let shadow_root = vp.walk.is_some();
        let pool = vp.hw.at.pool..vp.hw.at.pool + 4096 * vp.pool_pages();
        let (at, context) = (vp.hw.at, *vp.nested.context());
        let control = vp.vmcb().control;
        let mut why = None;
        if level == Level::L2 {
            let has = control.intercepts;
            let mut must = super::vp::INTERCEPTS;
            must.misc1 |= misc1::INVLPGA;
            must.misc2 |= misc2::VMLOAD | misc2::VMSAVE | misc2::SKINIT | misc2::VMRUN;
            if control.int_ctl & int_ctl::V_GIF_ENABLE != 0 {
                must.misc2 &= !(misc2::STGI | misc2::CLGI);
            }
            let virtual_vmload = control.virt_ext & virt_ext::VMLOAD_VMSAVE != 0;
            if virtual_vmload && shadow_root {
                must.misc2 &= !(misc2::VMLOAD | misc2::VMSAVE);
            }
            if has.intersection(must) != must || own.intersection(super::vp::INTERCEPTS) != super::vp::INTERCEPTS {
                why = Some(format!("VMCB02 lacks an intercept: {has:x?}"));
            }
            let maps = [(control.msrpm_base, at.msrpm01, at.msrpm02), (control.iopm_base, at.iopm01, at.iopm02)];
            if maps.iter().any(|(is, one, two)| is != one && is != two) {
                why = Some("a permission map of VMCB02 is nobody's".into());
            }
            let rooted = if shadow_root { pool.contains(&control.n_cr3) } else { control.n_cr3 == root };
            if !rooted || control.np_control & 1 == 0 || control.virt_ext & !3 != 0 || (virtual_vmload && !shadow_root)
            {
                why = Some(format!("second stage {:#x}", control.n_cr3));
            }
        } else {
            let s = &vp.hw.vmcb01.save;
            let regs = [s.rax, s.rip, s.rsp, s.cr2, s.cr3, s.gdtr.base, s.idtr.base];
            if regs.iter().chain(&vp.hw.regs.0).any(|r| is_host(*r)) {
                why = Some(format!("a host address in L1's registers: {regs:x?}"));
            }
        }
        let owner =
            Owner { vp: (p, v), level, context: if level == Level::L2 { context } else { nsvm::Context::default() } };
        let owners = &mut self.cpus[c].owners;
        match control.tlb_control {
            tlb::ALL => owners.clear(),
            tlb::NONE => {}
            _ => _ = owners.remove(&control.asid),
        }
        let before = owners.insert(control.asid, owner);
        if control.asid == 0 || before.is_some_and(|before| before != owner) {
            why = Some(format!("ASID {} of {before:?} entered by {owner:?}", control.asid));
        }
        if let Some(why) = why {
            self.violated(|| why);
        }
    }

    /// Right after #VMEXIT on processor `c`: takes the guest's state, acknowledges flushes, deals with the exit. The VP
    /// is on no processor afterwards.
    pub fn leave(&mut self, c: usize) {
        let Some((p, v)) = self.cpus[c].running.take() else { return };
        let cpu = &mut self.cpus[c];
        let vp = &mut self.partitions[p].vps[v];
        let at = vp.hw.at;
        cpu.hw.step(&self.mem, Op::Vmsave(at.vmcb01));
        let level = vp.nested.level();
        vp.load(&self.mem, level == Level::L2);
        vp.hw.regs.0 = cpu.hw.regs;
        vp.on = None;
        if exit_code::is_invalid(vp.vmcb().control.exit_code) {
            vp.flush.entry_failed();
        } else {
            vp.flush.exit();
            if level == Level::L2 {
                vp.shadow.tag_retired();
            }
        }
        match level {
            Level::L1 => self.l1_exit(c, p, v),
            Level::L2 => self.l2_exit(c, p, v),
        }
    }

    /// One instruction of the guest on processor `c`.
    pub fn step(&mut self, c: usize, op: Op) -> Step {
        if let Some((p, v)) = self.cpus[c].running {
            self.partitions[p].vps[v].op = op;
        }
        let step = self.cpus[c].hw.step(&self.mem, op);
        if let Step::Exit(_) = step {
            self.leave(c);
        }
        step
    }

    /// Makes processor `c` leave its guest.
    ///
    /// The model blocks NMIs after one was injected, intercepted ones too. A kick must get through nevertheless, so
    /// this embedder has a line that is never blocked.
    pub fn kick(&mut self, c: usize) {
        if self.cpus[c].running.is_some() {
            self.cpus[c].hw.nmi_mask = false;
            self.cpus[c].hw.lines.nmi();
            self.step(c, Op::Nop);
            assert!(self.cpus[c].running.is_none() || self.broken.is_some(), "a kick makes a guest exit");
        }
    }

    fn l1_exit(&mut self, c: usize, p: usize, v: usize) {
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        let exit = m.vmcb01.control.exit_code;
        match vp.nested.l1_exit(&mut m) {
            L1Exit::Resume if exit == exit_code::VMRUN && vp.nested.last_refusal().is_some() => {
                partition.counts.refused += 1;
            }
            L1Exit::Resume => {}
            L1Exit::EnterL2(invalidate) => {
                partition.counts.entered += 1;
                self.enter_l2(p, v, invalidate);
            }
            L1Exit::InvalidateAsid { asid } => _ = vp.shadow.flush_asid(asid),
            L1Exit::NotMine => self.own_exit(c, p, v),
            L1Exit::Shutdown => self.reset(p, v, "VMCB12 lost at VMRUN"),
        }
    }

    /// L1 executed VMRUN: announces the nested context and activates its shadow.
    fn enter_l2(&mut self, p: usize, v: usize, invalidate: Invalidate) {
        let vp = &mut self.partitions[p].vps[v];
        match invalidate {
            Invalidate::None => {}
            Invalidate::Asid(asid) => _ = vp.shadow.flush_asid(asid),
            Invalidate::All => _ = vp.shadow.flush_all_asids(),
        }
        self.activate(p, v);
    }

    /// The part of it that a restored VP needs, too.
    pub fn activate(&mut self, p: usize, v: usize) {
        let vp = &mut self.partitions[p].vps[v];
        let phys_bits = self.cpus[0].hw.features.maxphyaddr;
        let (hv, context) = (vp.nested.enlightenments(), vp.nested.context());
        let ids = Some(NestedIds { vm_id: hv.vm_id, vp_id: hv.vp_id });
        let announced = NestedContext { ids, tag: context.asid.into(), root: context.n_cr3.unwrap_or(0) };
        let _ = vp.flush.set_context(announced);
        let context = vp.nested.nested_paging(&vp.hw.vmcb01).and_then(|paging| {
            let format = NptFormat::from_registers(paging.cr0, paging.cr4, paging.efer, phys_bits, true)?;
            let asid = if paging.enlightened_tlb { 0 } else { paging.asid };
            Some(NptContext { ncr3: paging.n_cr3.raw(), asid, format })
        });
        match context {
            Some(context) => {
                vp.hw.vmcb02.control.n_cr3 = vp.shadow.activate(context).raw();
                vp.walk = Some((context.format, context.ncr3));
            }
            None => {
                vp.shadow.deactivate();
                vp.walk = None;
            }
        }
    }

    fn l2_exit(&mut self, c: usize, p: usize, v: usize) {
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        let (interface, msrs, memory) = (&partition.interface, &vp.msrs, &partition.memory);
        let outcome = vp.nested.l2_exit(&mut m, |hv, vmcb, regs| {
            let input = match hyperv::mode(vmcb).width {
                Width::Bits64 => regs.0[1],
                Width::Bits32 => regs.0[2] << 32 | vmcb.save.rax & 0xFFFF_FFFF,
            };
            let granted = hv.enlightenments_control.nested_flush_virtual_hypercall();
            let call = HypercallInput(input).call_code();
            direct::authorise(interface, msrs, granted, call, memory) == DirectFlush::Allowed
        });
        match outcome {
            L2Exit::Resume | L2Exit::ToL1 => {}
            L2Exit::NestedPageFault { gpa, error_code } => {
                match vp.shadow.fault(&partition.memory, &partition.memory, gpa, error_code) {
                    NptOutcome::Resume => {}
                    NptOutcome::Reflect { info1, info2 } => self.exit_to_l1(c, p, v, exit_code::NPF, info1, info2),
                    NptOutcome::Embedder(L1Access { l1, .. }) => {
                        if !self.provide(p, l1.raw(), error_code) {
                            self.exit_to_l1(c, p, v, exit_code::NPF, error_code, gpa.raw());
                        }
                    }
                }
            }
            L2Exit::L1PageFault { gpa, error_code } => {
                if !self.provide(p, gpa.raw(), error_code) {
                    self.exit_to_l1(c, p, v, exit_code::SHUTDOWN, 0, 0);
                }
            }
            L2Exit::InvalidateAsid { asid } => _ = vp.shadow.flush_asid(asid),
            L2Exit::Embedder => self.own_exit(c, p, v),
            L2Exit::DirectFlush { next_rip } => self.direct_flush(c, p, v, next_rip),
            L2Exit::Shutdown => self.reset(p, v, "VMCB12 lost at an exit"),
        }
    }

    fn exit_to_l1(&mut self, c: usize, p: usize, v: usize, code: u64, info_1: u64, info_2: u64) {
        parts!(self, c, p, v => cpu, partition, vp, bytes, m);
        if vp.nested.exit_to_l1(&mut m, Exit { code, info_1, info_2 }) == L2Exit::Shutdown {
            self.reset(p, v, "VMCB12 lost at a fault");
        }
    }

    /// Brings a page back or lifts its write protection. False for an address behind which there is nothing.
    fn provide(&mut self, p: usize, gpa: u64, error: u64) -> bool {
        let partition = &mut self.partitions[p];
        let Some(mut home) = partition.memory.home(gpa) else { return false };
        if !home.present {
            home.present = true;
            partition.counts.paged_in += 1;
        } else if error & 2 != 0 && !home.writable {
            home.writable = true;
            partition.counts.dirtied += 1;
        }
        // Rights are added only: nothing to flush.
        self.place(p, gpa, home);
        true
    }

    /// The page at `gpa` is at `home` from now on, for L1; the caller flushes.
    fn place(&mut self, p: usize, gpa: u64, home: super::memory::Home) {
        self.partitions[p].memory.set_home(gpa, home);
        let rights = if home.writable { BITS } else { BITS & !(flag::W | flag::D) };
        let entry = if home.present { home.frame | rights } else { 0 };
        self.mem.write(layout::slot(layout::VpPlaces::of(p, 0).npt01, gpa), 8, entry);
    }

    /// Moves, takes away or protects a page of L1's memory, and tells every VP.
    pub fn move_page(&mut self, p: usize, gpa: u64, home: super::memory::Home) {
        self.place(p, gpa, home);
        if self.mistake == Some(Mistake::NoPost) {
            return;
        }
        let partition = &mut self.partitions[p];
        let mut scratch = hvcore::flush::Shootdown::new();
        let posted = partition.domain.flush_l1(&partition.map, VpSet::All, GvaScope::Everything, &mut scratch);
        self.settle(p, &mut scratch, posted);
        let scope = SecondStageScope::L1Pages { first: L1Gpa::new(gpa & !4095), pages: 1 };
        let posted = self.partitions[p].domain.flush_second_stage(scope, &mut scratch);
        self.settle(p, &mut scratch, posted);
    }

    /// Exits that are the embedder's own.
    fn own_exit(&mut self, c: usize, p: usize, v: usize) {
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        let level = vp.nested.level();
        let vmcb = if level == Level::L2 { &*m.vmcb02 } else { &*m.vmcb01 };
        let (exit, info1, info2) = (vmcb.control.exit_code, vmcb.control.exit_info_1, vmcb.control.exit_info_2);
        match exit {
            exit_code::NMI => {
                // The host's handler: the NMI is taken, and blocked no longer when it has returned.
                cpu.hw.lines.nmi.store(false, std::sync::atomic::Ordering::SeqCst);
                cpu.hw.nmi_mask = false;
            }
            exit_code::CPUID => {
                if vp.nested.step_over(&mut m, Kind::Cpuid) {
                    vp.vmcb().save.rax = 0;
                }
            }
            exit_code::MSR => self.msr(c, p, v, info1 & 1 != 0),
            exit_code::NPF => {
                if !self.provide(p, info2, info1) {
                    self.reset(p, v, "nothing behind an address");
                }
            }
            exit_code::IOIO => vp.vmcb().complete_instruction(info2),
            exit_code::VMMCALL => self.l1_call(c, p, v),
            exit_code::SHUTDOWN | exit_code::INIT => self.reset(p, v, "shutdown of L1"),
            _ => self.violated(|| format!("exit {exit:#x} of {level:?} is nobody's")),
        }
    }

    fn msr(&mut self, c: usize, p: usize, v: usize, write: bool) {
        parts!(self, c, p, v => cpu, partition, vp, code, m);
        let number = m.gprs.0[1] as u32;
        let rax = if vp.nested.level() == Level::L2 { m.vmcb02.save.rax } else { m.vmcb01.save.rax };
        let value = m.gprs.0[2] << 32 | rax & 0xFFFF_FFFF;
        let (ok, read) = match (number >> 28 == 4, write) {
            (true, true) => (!matches!(partition.interface.msr_write(&vp.msrs, number, value), MsrWrite::Fault), 0),
            (true, false) => match partition.interface.msr_read(&vp.msrs, number, 0) {
                MsrRead::Value(value) => (true, value),
                _ => (false, 0),
            },
            (false, _) => (true, 0),
        };
        if !ok {
            match vp.nested.level() {
                Level::L1 => m.vmcb01.inject_exception(13, Some(0)),
                Level::L2 => _ = vp.nested.raise_in_l2(&mut m, Fault::GP),
            }
        } else if vp.nested.step_over(&mut m, if write { Kind::Wrmsr } else { Kind::Rdmsr }) && !write {
            m.gprs.0[2] = read >> 32;
            vp.vmcb().save.rax = read & 0xFFFF_FFFF;
        }
    }

    pub(super) fn reset(&mut self, p: usize, v: usize, why: &'static str) {
        self.partitions[p].counts.resets += 1;
        self.partitions[p].vps[v].reset(why);
    }

    /// Saves the VP's nested state, destroys it, and restores it. The VP is on no processor.
    pub fn churn(&mut self, p: usize, v: usize) {
        self.churn_with(p, v, |_| ());
    }

    /// The same with a saved state that somebody changes. False if it was refused, and the one that was saved restored.
    pub fn churn_with(&mut self, p: usize, v: usize, change: impl FnOnce(&mut SavedState)) -> bool {
        let saved = {
            let vp = &mut self.partitions[p].vps[v];
            vp.nested.save(&mut vp.hw.vmcb01, &mut vp.hw.vmcb02)
        };
        let mut changed = saved;
        change(&mut changed);
        let taken = match (self.restore(p, v, &changed), changed == saved) {
            (Ok(()), _) => true,
            (Err(error), true) => {
                self.violated(|| format!("a state that was just saved is refused: {error:?}"));
                return false;
            }
            (Err(_), false) => {
                let again = self.restore(p, v, &saved);
                assert_eq!(again, Ok(()));
                false
            }
        };
        let vp = &mut self.partitions[p].vps[v];
        let _ = vp.shadow.flush_everything();
        vp.flush.forget_context();
        if vp.nested.level() == Level::L2 {
            self.activate(p, v);
        }
        taken
    }

    fn restore(&mut self, p: usize, v: usize, saved: &SavedState) -> Result<(), RestoreError> {
        parts!(self, 0, p, v => cpu, partition, vp, code, m);
        *m.vmcb02 = zerocopy::FromZeros::new_zeroed();
        vp.nested = nsvm::NestedSvm::restore(*vp.nested.config(), saved, &mut m)?;
        Ok(())
    }

    /// True for an address in L1's memory.
    pub const fn is_ram(gpa: u64) -> bool {
        gpa < L1_BYTES
    }
}
