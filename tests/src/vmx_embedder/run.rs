//! Entry, exit and everything between: the embedder proper.

use hvcore::addr::{L2Gpa, Level};
use nvmx::controls::{pin, primary, secondary};
use nvmx::ept::EptOutcome;
use nvmx::field::Field;
use nvmx::save::SavedState;
use nvmx::step::{complete_instruction, inject_fault};
use nvmx::vpid::Flush;
use nvmx::{Entry, EntryPlan, Exit, Fault, InvEpt, L1Exit, L2Exit, NestedVmx, Vmcs, exit_reason as r};

use super::layout::TABLES;
use super::vp::Vp;
use super::{Mistake, Owner, World, is_host};
use crate::model::cpu::state::bit;
use crate::model::vmx::{Event, Op, Status, Step};

/// Controls that VMCS02 must have, by field.
const MUST: [(Field, u32); 4] = [
    (Field::PinBasedControls, pin::NMI_EXITING),
    (Field::PrimaryControls, primary::SECONDARY_CONTROLS),
    (Field::SecondaryControls, secondary::EPT | secondary::VPID),
    (Field::ExitControls, 1 << 9),
];

impl World<'_> {
    fn call<R>(&mut self, v: usize, f: impl FnOnce(&mut NestedVmx, &mut super::vp::VpMachine<'_>) -> R) -> R {
        self.vps[v].call(&mut self.vpids, self.own, f)
    }

    /// Enters VP `v`'s guest. False if it did not get there.
    pub fn enter(&mut self, v: usize) -> bool {
        assert!(self.running.is_none());
        let plan = match self.call(v, |nested, m| nested.prepare_entry(m)) {
            Entry::Run(plan) => plan,
            Entry::Wait => {
                // Nobody would wake it: an NMI does, or an INIT.
                let nested = &mut self.vps[v].nested;
                nested.pend_nmi();
                nested.pend_init();
                return false;
            }
            Entry::Init | Entry::Shutdown => {
                self.reset(v, "INIT or VMX abort");
                return false;
            }
        };
        let level = plan.level;
        let tight = match level {
            Level::L1 => true,
            Level::L2 => self.vps[v].store_bitmaps(&self.mem, self.own),
        };
        self.spoil(v, level);
        self.check_entry(v, level, tight);
        self.flush(v, &plan);
        match level {
            Level::L1 => self.counts.l1 += 1,
            Level::L2 => self.counts.l2 += 1,
        }
        let vp = &mut self.vps[v];
        let (regs, vmcs) = (vp.regs, vp.vmcs());
        let (pa, launched) = (vmcs.pa, vmcs.launched);
        let step = self.hw.at(pa, |cpu, mem| {
            cpu.regs = regs.gprs;
            cpu.state.rax = regs.gprs[0];
            cpu.state.cr2 = regs.cr2;
            let enter = if launched { Op::Vmresume } else { Op::Vmlaunch };
            match cpu.step(mem, enter) {
                // A kick that another exit was ahead of.
                Step::Event(Event::Nmi) if !cpu.in_guest() => cpu.step(mem, enter),
                step => step,
            }
        });
        self.running = Some(v);
        match step {
            Step::Exit(_) => {
                self.leave();
                false
            }
            _ if self.hw.with(|cpu, _| cpu.in_guest()) => {
                self.vps[v].vmcs().launched = true;
                true
            }
            other => {
                self.running = None;
                self.refused(v, level, other);
                false
            }
        }
    }

    /// VMLAUNCH or VMRESUME failed with a number.
    fn refused(&mut self, v: usize, level: Level, step: Step) {
        let error = self.vps[v].vmcs().read32(Field::InstructionError);
        let why = self.hw.with(|cpu, _| cpu.why);
        let blamed = level == Level::L2 && self.call(v, |nested, m| nested.entry_failed(m, error));
        self.counts.late += 1;
        if !blamed {
            self.violated(|| format!("entry of {level:?} refused with {error} ({why}), {step:?}"));
            self.reset(v, "refused");
        }
    }

    /// Commits the mistake, if there is one to commit.
    fn spoil(&mut self, v: usize, level: Level) {
        let vp = &mut self.vps[v];
        match self.mistake {
            Some(Mistake::OneVpid) => vp.vmcs().write(Field::VirtualProcessorId, 1),
            Some(Mistake::NoControl) if level == Level::L2 => {
                let pins = vp.vmcs02.read32(Field::PinBasedControls) & !(pin::NMI_EXITING | pin::VIRTUAL_NMIS);
                vp.vmcs02.write(Field::PinBasedControls, pins.into());
            }
            Some(Mistake::WrongRoot) if level == Level::L2 => {
                let root = vp.at.eptp01();
                vp.vmcs02.write(Field::EptPointer, root);
            }
            Some(Mistake::BadField) => vp.vmcs().write(Field::PrimaryControls, 0),
            Some(Mistake::Leak) => {
                use hvcore::memory::GuestMemory;
                let host = vp.at.vmcs01;
                let _ = vp.memory.write_u64(hvcore::addr::L1Gpa::new(TABLES + 0x800), host);
            }
            _ => {}
        }
    }

    /// Rules 1 to 5.
    fn check_entry(&mut self, v: usize, level: Level, tight: bool) {
        let vp = &mut self.vps[v];
        let mut why = (!tight).then(|| "a bitmap lets through what the embedder's does not".into());
        if level == Level::L2 {
            for (field, must) in MUST {
                let has = vp.vmcs02.read32(field);
                if has & must != must {
                    why = Some(format!("VMCS02 lacks a control: {field:?} {has:#x}"));
                }
            }
            let bitmaps = vp.vmcs02.read32(Field::PrimaryControls);
            let msr = vp.vmcs02.read(Field::MsrBitmap);
            let io = (vp.vmcs02.read(Field::IoBitmapA), vp.vmcs02.read(Field::IoBitmapB));
            let own_io = io == (vp.at.io01, vp.at.io01 + 0x1000);
            let merged_io = io == (vp.at.io02, vp.at.io02 + 0x1000);
            let msr_ok = bitmaps & primary::MSR_BITMAPS == 0 || msr == vp.at.msr01 || msr == vp.at.msr02;
            let io_ok = match bitmaps & primary::IO_BITMAPS {
                0 => bitmaps & primary::UNCONDITIONAL_IO_EXITING != 0,
                _ => own_io || merged_io,
            };
            if !msr_ok || !io_ok {
                why = Some(format!("a bitmap of VMCS02 is nobody's: {msr:#x} {io:x?}"));
            }
            let root = vp.vmcs02.read(Field::EptPointer);
            let pool = vp.at.pool..vp.at.pool + 4096 * super::SHADOW_PAGES as u64;
            let rooted = match vp.nested.context().eptp {
                Some(_) => pool.contains(&(root & !0xFFF)),
                None => root == vp.at.eptp01(),
            };
            if !rooted {
                why = Some(format!("second stage {root:#x} with {:x?}", vp.nested.context()));
            }
        } else {
            let fields =
                [Field::GuestRip, Field::GuestRsp, Field::GuestCr3, Field::GuestGdtrBase, Field::GuestIdtrBase];
            let values = fields.map(|field| vp.vmcs01.read(field));
            if values.iter().chain(&vp.regs.gprs).any(|value| is_host(*value)) {
                why = Some(format!("a host address in L1's registers: {values:x?} {:x?}", vp.regs));
            }
        }
        if let Some(why) = why {
            self.violated(|| why);
        }
    }

    /// Executes INVVPID and INVEPT as planned, and checks that the VPID is the context's alone.
    fn flush(&mut self, v: usize, plan: &EntryPlan) {
        let flush = if self.mistake == Some(Mistake::NoInvvpid) { Flush::None } else { plan.flush };
        let vp = &mut self.vps[v];
        let level = plan.level;
        let vpid = vp.vmcs().read(Field::VirtualProcessorId) as u16;
        let context = if level == Level::L2 { *vp.nested.context() } else { nvmx::Context::default() };
        let stale = level == Level::L2 && vp.shadow.tag_stale();
        let root = vp.vmcs().read(Field::EptPointer);
        if stale {
            vp.shadow.tag_retired();
        }
        self.hw.with(|cpu, _| {
            match flush {
                Flush::None => {}
                Flush::Single => assert_eq!(cpu.invvpid(1, vpid, 0), Status::Ok),
                Flush::All => assert_eq!(cpu.invvpid(2, 0, 0), Status::Ok),
            }
            if stale {
                assert_eq!(cpu.invept(1, root), Status::Ok);
            }
        });
        match flush {
            Flush::None => {}
            Flush::Single => _ = self.owners.remove(&vpid),
            Flush::All => self.owners.clear(),
        }
        let owner = Owner { vp: v, level, context };
        let before = self.owners.insert(vpid, owner);
        if vpid == 0 || vpid != plan.vpid || before.is_some_and(|before| before != owner) {
            self.violated(|| format!("VPID {vpid} of {before:?} entered by {owner:?}, plan {plan:?}"));
        }
    }

    /// One instruction of the guest that runs.
    pub fn step(&mut self, op: Op) {
        if self.running.is_none() {
            return;
        }
        match self.hw.with(|cpu, mem| cpu.step(mem, op)) {
            Step::Exit(_) => self.leave(),
            Step::Shutdown => self.violated(|| "the processor is gone".into()),
            _ => {}
        }
    }

    /// Makes the guest leave: an NMI of the embedder's.
    pub fn kick(&mut self) {
        if self.running.is_some() {
            self.hw.with(|cpu, _| cpu.lines.nmi());
            self.step(Op::Nop);
            assert!(self.running.is_none() || self.broken.is_some(), "a kick makes a guest exit");
        }
    }

    /// Right after the exit: takes the registers, deals with the exit.
    fn leave(&mut self) {
        let Some(v) = self.running.take() else { return };
        let hw = std::rc::Rc::clone(&self.hw);
        let vp = &mut self.vps[v];
        hw.with(|cpu, _| {
            vp.regs.gprs = cpu.regs;
            (vp.regs.gprs[0], vp.regs.cr2) = (cpu.state.rax, cpu.state.cr2);
            // RSP is in the VMCS.
            vp.regs.gprs[4] = 0;
        });
        let reason = vp.vmcs().read32(Field::ExitReason);
        if reason & r::ENTRY_FAILURE == 0 {
            vp.vmcs().launched = true;
        }
        match vp.nested.level() {
            Level::L1 => self.l1_exit(v),
            Level::L2 => self.l2_exit(v),
        }
    }

    fn l1_exit(&mut self, v: usize) {
        match self.call(v, |nested, m| nested.l1_exit(m)) {
            L1Exit::Resume => {}
            L1Exit::EnterL2 => {
                self.counts.entered += 1;
                self.activate(v);
            }
            L1Exit::InvEpt(InvEpt::Context { eptp }) => _ = self.vps[v].shadow.flush_context(eptp),
            L1Exit::InvEpt(InvEpt::Global) => _ = self.vps[v].shadow.flush_everything(),
            L1Exit::NotMine { reason } if reason & r::ENTRY_FAILURE != 0 => {
                let why = self.hw.with(|cpu, _| cpu.why);
                self.violated(|| format!("L1's entry failed: {reason:#x} ({why})"));
                self.reset(v, "L1's entry failed");
            }
            L1Exit::NotMine { reason } => self.own_exit(v, reason),
            L1Exit::Shutdown => self.reset(v, "VMX abort"),
        }
    }

    /// Puts the shadow of the tables that L2 runs on in VMCS02.
    fn activate(&mut self, v: usize) {
        let vp = &mut self.vps[v];
        match vp.nested.context().eptp {
            Some(eptp) => {
                let root = vp.shadow.activate(eptp);
                vp.vmcs02.write(Field::EptPointer, root);
            }
            None => {
                vp.shadow.deactivate();
                let root = vp.at.eptp01();
                vp.vmcs02.write(Field::EptPointer, root);
            }
        }
        if let Some(gpa) = vp.nested.virtual_apic_page() {
            // Where L1 has no memory, a page of the embedder's that nobody else uses.
            let page = vp.memory.home(gpa.raw()).map_or(vp.at.scratch, |home| home.frame);
            vp.vmcs02.write(Field::VirtualApicAddress, page);
        }
    }

    fn l2_exit(&mut self, v: usize) {
        let outcome = self.call(v, |nested, m| nested.l2_exit(m, |_, _, _| false));
        self.settle(v, outcome);
    }

    fn settle(&mut self, v: usize, outcome: L2Exit) {
        match outcome {
            L2Exit::Resume => {}
            L2Exit::ToL1 => self.counts.reflected += 1,
            L2Exit::Embedder { reason } => self.own_exit(v, reason),
            L2Exit::EptViolation { gpa, qualification } => self.ept_violation(v, gpa, qualification),
            L2Exit::EptMisconfiguration { gpa } => {
                self.violated(|| format!("the shadow is misconfigured for {gpa:?}"));
                self.reset(v, "misconfigured shadow");
            }
            L2Exit::L1EptViolation { .. } | L2Exit::L1EptMisconfiguration { .. } => {
                self.exit_to_l1(v, Exit::simple(r::TRIPLE_FAULT, 0));
            }
            L2Exit::EptpSwitched => self.activate(v),
            L2Exit::DirectFlush => self.violated(|| "a direct flush that nobody wanted".into()),
            L2Exit::Refused { reason, qualification } => {
                let why = self.hw.with(|cpu, _| cpu.why);
                self.violated(|| format!("L2 refused: {reason:#x} {qualification:#x} ({why})"));
                self.reset(v, "refused");
            }
            L2Exit::Shutdown => self.reset(v, "VMX abort"),
        }
    }

    fn ept_violation(&mut self, v: usize, gpa: L2Gpa, qualification: u64) {
        let vp: &mut Vp<'_> = &mut self.vps[v];
        let outcome: (u32, u64) = match vp.shadow.fault(&vp.memory, &vp.memory, gpa, qualification, None) {
            EptOutcome::Resume => return,
            EptOutcome::Reflect { reason, qualification } => (reason, qualification),
            // Nothing is there: L1 sees the violation as it came.
            EptOutcome::Embedder(_) => (r::EPT_VIOLATION, qualification),
        };
        let outcome = self.call(v, |nested, m| nested.reflect_ept(m, outcome.0, outcome.1));
        self.settle(v, outcome);
    }

    fn exit_to_l1(&mut self, v: usize, exit: Exit) {
        let outcome = self.call(v, |nested, m| nested.exit_to_l1(m, exit));
        self.settle(v, outcome);
    }

    /// An exit of either level that is the embedder's.
    fn own_exit(&mut self, v: usize, reason: u32) {
        let vp = &mut self.vps[v];
        let level = vp.nested.level();
        match reason {
            // A kick.
            r::EXCEPTION_OR_NMI => {}
            r::CPUID => {
                vp.regs.gprs[..4].fill(0);
                complete_instruction(vp.vmcs());
            }
            r::RDMSR => {
                (vp.regs.gprs[0], vp.regs.gprs[2]) = (0, 0);
                complete_instruction(vp.vmcs());
            }
            r::WRMSR | r::IO | r::VMCALL | r::XSETBV | r::INVD => complete_instruction(vp.vmcs()),
            r::CR_ACCESS => self.cr_access(v),
            r::TRIPLE_FAULT if level == Level::L1 => self.reset(v, "triple fault of L1"),
            r::EPT_VIOLATION if level == Level::L1 => self.reset(v, "nothing behind an address"),
            _ => {
                self.violated(|| format!("exit {reason} of {level:?} is nobody's"));
                self.reset(v, "an exit of nobody");
            }
        }
    }

    /// MOV to CR4 that changes VMXE, the only masked bit.
    fn cr_access(&mut self, v: usize) {
        let vp = &mut self.vps[v];
        let level = vp.nested.level();
        let qualification = vp.vmcs().read(Field::ExitQualification);
        let value = vp.regs.gprs[(qualification >> 8 & 15) as usize];
        let fine = qualification & 0x3F == 4 && value & !super::CAPS.cr4 == 0;
        let fine = fine && (level == Level::L2 || vp.nested.allows_cr4(value));
        // Changes of paging take more than this embedder does.
        let real = vp.vmcs().read(Field::GuestCr4);
        let fine = fine && (value ^ real) & !(bit::CR4_VMXE | 1 << 9) == 0;
        if fine {
            let vmcs = vp.vmcs();
            vmcs.write(Field::GuestCr4, value | bit::CR4_VMXE);
            vmcs.write(Field::Cr4ReadShadow, value);
            complete_instruction(vmcs);
            return;
        }
        match level {
            Level::L1 => inject_fault(&mut vp.vmcs01, &mut vp.regs, Fault::GP),
            Level::L2 => {
                let outcome = self.call(v, |nested, m| nested.raise_in_l2(m, Fault::GP));
                self.settle(v, outcome);
            }
        }
    }

    /// Resets VP `v`.
    pub fn reset(&mut self, v: usize, why: &'static str) {
        self.counts.resets += 1;
        self.vps[v].reset(why);
    }

    /// Saves VP `v`'s nested state, destroys it, and restores it. The VP does not run.
    pub fn churn(&mut self, v: usize) {
        self.counts.churned += 1;
        let saved: SavedState = self.call(v, |nested, m| nested.save(m));
        let config = *self.vps[v].nested.config();
        for field in nvmx::save::GUEST {
            self.vps[v].vmcs02.write(field, 0);
        }
        match self.call(v, |_, m| NestedVmx::restore(config, &saved, m)) {
            Ok(nested) => self.vps[v].nested = nested,
            Err(error) => {
                self.violated(|| format!("a state that was just saved is refused: {error:?}, L2 {:x?}", saved.l2));
                self.reset(v, "not restored");
                return;
            }
        }
        let _ = self.vps[v].shadow.flush_everything();
        if self.vps[v].nested.level() == Level::L2 {
            self.activate(v);
        }
    }
}
