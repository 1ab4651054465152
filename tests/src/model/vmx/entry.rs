//! VM entries and VM exits (SDM volume 3, chapters "VM entries" and "VM exits").

use super::caps::{entryc, exitc, pin, proc2};
use super::check::{Checks, Controls};
use super::fields as f;
use super::{Cpu, Event, Guest, Status, Step, Trap, UD, reason};
use crate::model::cpu::state::{Segment, State, bit::*, seg};
use crate::model::mem::PhysMem;
use crate::model::walk::Ept;

/// Segment registers in the order of the VMCS: ES, CS, SS, DS, FS, GS, LDTR, TR.
const ORDER: [usize; 8] = [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS, seg::LDTR, seg::TR];

/// VMCS access rights to the attributes of [`Segment`], and back.
fn pack(ar: u64) -> u16 {
    (ar & 0xFF | (ar >> 4) & 0xF00 | (ar >> 1) & 0x8000) as u16
}
fn unpack(attributes: u16) -> u64 {
    let a = u64::from(attributes);
    a & 0xFF | (a & 0xF00) << 4 | (a & 0x8000) << 1
}

/// Why an entry is refused: VMfailValid with a number, or an exit with a qualification; and the name of the check.
enum Refusal {
    Early(u64, &'static str),
    Late(Controls, u64, &'static str),
}

impl Cpu {
    /// VMLAUNCH or VMRESUME. `Ok` with a step: the entry happened, or failed late.
    pub(super) fn enter(&mut self, mem: &PhysMem, launch: bool) -> Result<Step, Trap> {
        if self.vmxon.is_none() || self.state.cr4 & CR4_VMXE == 0 {
            return Err(UD);
        }
        let launched = match &self.current {
            None => return Ok(self.refused(Status::Invalid)),
            Some((_, vmcs)) => vmcs.launched,
        };
        if self.shadow_ss {
            return Ok(self.fail_step(26));
        }
        match (launch, launched) {
            (true, true) => return Ok(self.fail_step(4)),
            (false, false) => return Ok(self.fail_step(5)),
            _ => {}
        }
        let (c, pdptes) = match self.judge(mem) {
            Ok(good) => good,
            Err(Refusal::Early(number, why)) => {
                self.why = why;
                return Ok(self.fail_step(number));
            }
            Err(Refusal::Late(c, qualification, why)) => {
                self.why = why;
                self.failed_entry(mem, c, reason::GUEST_STATE, qualification);
                return Ok(self.late());
            }
        };
        let host_rax = self.state.rax;
        self.load_guest(c);
        self.pdptes = pdptes;
        self.state.rax = host_rax;
        if let Err(index) = self.load_msrs(mem, f::ENTRY_MSR_LOAD, f::ENTRY_MSR_LOAD_COUNT) {
            self.why = "MSR loading";
            self.failed_entry(mem, c, reason::MSR_LOADING, index);
            return Ok(self.late());
        }
        if let Some((_, v)) = &mut self.current {
            v.launched = true;
        }
        Ok(self.start(mem, c))
    }

    /// All checks on the current VMCS; the controls and PDPTEs that the entry will use.
    fn judge(&self, mem: &PhysMem) -> Result<(Controls, [u64; 4]), Refusal> {
        let Some((current, v)) = &self.current else { return Err(Refusal::Early(0, "no VMCS")) };
        let host_long = self.state.efer & EFER_LMA != 0;
        let checks = Checks { v, c: Controls::read(v), caps: &self.caps, mem, host_long, current: *current };
        checks.controls().map_err(|why| Refusal::Early(7, why))?;
        checks.host().map_err(|why| Refusal::Early(8, why))?;
        checks.guest().map_err(|(qualification, why)| Refusal::Late(checks.c, qualification, why))?;
        Ok((checks.c, checks.pdpte_values()))
    }

    fn fail_step(&mut self, number: u64) -> Step {
        let status = self.fail(number);
        self.refused(status)
    }

    fn refused(&mut self, status: Status) -> Step {
        self.flags(status);
        self.state.rip = self.state.rip.wrapping_add(3);
        Step::Done(0)
    }

    /// Everything is loaded: tags, timers, the injected event.
    fn start(&mut self, mem: &PhysMem, c: Controls) -> Step {
        let ept = c.proc2(proc2::EPT).then(|| Ept {
            eptp: self.field(f::EPTP),
            exec_only: self.caps.exec_only,
            pages_2m: true,
            pages_1g: self.caps.pages_1g,
            maxphyaddr: self.caps.maxphyaddr,
        });
        let vpid = if c.proc2(proc2::VPID) { self.field(f::VPID) as u16 } else { 0 };
        if vpid == 0 {
            // Without VPIDs, entries and exits drop what VPID 0 has.
            self.mmu.tlb.flush_linear(0);
        }
        let state = self.field(f::INTERRUPTIBILITY);
        (self.shadow, self.shadow_ss) = (state & 1 != 0, state & 2 != 0);
        let virtual_nmis = c.pin(pin::VIRTUAL_NMIS);
        self.nmi_mask = !virtual_nmis && state & 8 != 0;
        self.activity = self.field(f::ACTIVITY);
        let info = self.field(f::ENTRY_INFO);
        let timer = self.field(f::PREEMPTION_TIMER);
        let nmi_block = virtual_nmis && state & 8 != 0;
        self.guest = Some(Guest { c, ept, vpid, nmi_block, timer, mtf: false });
        if info >> 31 & 1 == 0 {
            return Step::Done(0);
        }
        self.inject(mem, info)
    }

    /// Delivers what the entry injects; type 7 is a pending MTF exit.
    fn inject(&mut self, mem: &PhysMem, info: u64) -> Step {
        let trap_flag = self.controls().proc(super::caps::proc::MTF);
        if let Some(g) = &mut self.guest {
            g.mtf = trap_flag || (info >> 8) & 7 == 7;
            if (info >> 8) & 7 == 2 {
                g.nmi_block = g.c.pin(pin::VIRTUAL_NMIS);
                self.nmi_mask = !g.nmi_block;
            }
        }
        if (info >> 8) & 7 == 7 {
            return Step::Done(0);
        }
        let (event, length) = self.injected(info);
        self.activity = 0;
        self.deliver(mem, event, info as u32, self.state.rip.wrapping_add(length))
    }

    fn injected(&self, info: u64) -> (Event, u64) {
        let vector = info as u8;
        let code = (info & (1 << 11) != 0).then(|| self.field(f::ENTRY_ERROR) as u32);
        match (info >> 8) & 7 {
            0 => (Event::Interrupt(vector), 0),
            2 => (Event::Nmi, 0),
            3 => (Event::Exception(vector, code), 0),
            4 => (Event::Soft(vector), self.field(f::ENTRY_LENGTH)),
            _ => (Event::Exception(vector, None), self.field(f::ENTRY_LENGTH)),
        }
    }

    fn load_guest(&mut self, c: Controls) {
        let get = |field| self.field(field);
        let mut s = State { sys: self.state.sys, pat: self.state.pat, lbr: self.state.lbr, ..State::default() };
        for (n, at) in (0..).step_by(2).zip(ORDER) {
            s.seg[at] = Segment {
                selector: get(f::GUEST_ES + n) as u16,
                attributes: pack(get(f::GUEST_ES_AR + n)),
                limit: get(f::GUEST_ES_LIMIT + n) as u32,
                base: get(f::GUEST_ES_BASE + n),
            };
        }
        s.seg[seg::GDTR] =
            Segment { limit: get(f::GUEST_GDTR_LIMIT) as u32, base: get(f::GUEST_GDTR_BASE), ..Segment::default() };
        s.seg[seg::IDTR] =
            Segment { limit: get(f::GUEST_IDTR_LIMIT) as u32, base: get(f::GUEST_IDTR_BASE), ..Segment::default() };
        s.cpl = ((get(f::GUEST_SS_AR) >> 5) & 3) as u8;
        (s.cr0, s.cr3, s.cr4) = (get(f::GUEST_CR0) | CR0_ET, get(f::GUEST_CR3), get(f::GUEST_CR4));
        (s.cr2, s.dr6) = (self.state.cr2, self.state.dr6);
        s.dr7 = self.state.dr7;
        if c.entry(entryc::LOAD_DEBUG) {
            s.dr7 = get(f::GUEST_DR7) & !0xD800 | 0x400;
            s.lbr[0] = get(f::GUEST_DEBUGCTL);
        }
        (s.rip, s.rsp, s.rflags) = (get(f::GUEST_RIP), get(f::GUEST_RSP), get(f::GUEST_RFLAGS));
        (s.sys[5], s.sys[6], s.sys[7]) =
            (get(f::GUEST_SYSENTER_CS), get(f::GUEST_SYSENTER_ESP), get(f::GUEST_SYSENTER_EIP));
        if c.entry(entryc::LOAD_PAT) {
            s.pat = get(f::GUEST_PAT);
        }
        s.efer = if c.entry(entryc::LOAD_EFER) {
            get(f::GUEST_EFER)
        } else {
            // LMA follows the control; LME follows it if paging is on.
            let long = if c.entry(entryc::IA32E) { EFER_LMA | EFER_LME } else { 0 };
            let lme = if s.cr0 & CR0_PG != 0 { 0 } else { self.state.efer & EFER_LME };
            self.state.efer & !(EFER_LMA | EFER_LME) | long | lme
        };
        self.state = s;
    }

    /// The MSR-load area; `Err` is the number of the entry that failed, counted from 1.
    fn load_msrs(&mut self, mem: &PhysMem, area: u32, count: u32) -> Result<(), u64> {
        let (at, n) = (self.field(area), self.field(count));
        for i in 0..n.min(512) {
            let entry = at + i * 16;
            let (msr, reserved, value) = (mem.read(entry, 4) as u32, mem.read(entry + 4, 4), mem.read(entry + 8, 8));
            let forbidden = matches!(msr, 0xC000_0100 | 0xC000_0101) || msr >> 8 == 8;
            if reserved != 0 || forbidden || self.wrmsr(mem, msr, value).is_err() {
                return Err(i + 1);
            }
        }
        Ok(())
    }

    /// An entry that failed after the checks on host state: like an exit, but only reason and qualification are written.
    fn failed_entry(&mut self, mem: &PhysMem, c: Controls, why: u64, qualification: u64) {
        self.set_field(f::EXIT_REASON, why);
        self.set_field(f::QUALIFICATION, qualification);
        self.guest = None;
        self.load_host(mem, c);
    }

    /// What a late failure looks like.
    fn late(&self) -> Step {
        if self.aborted { Step::Shutdown } else { Step::Exit(self.field(f::EXIT_REASON)) }
    }

    /// A VM exit for `trap` (reason, qualification, guest-physical address).
    pub(super) fn exit(&mut self, mem: &PhysMem, trap: (u64, u64, u64), length: u64) -> Step {
        let (why, qualification, gpa) = trap;
        let Some(g) = self.guest.take() else { return Step::Exit(why) };
        self.set_field(f::EXIT_REASON, why);
        self.set_field(f::QUALIFICATION, qualification);
        self.set_field(f::EXIT_LENGTH, length);
        self.save_vectoring();
        if matches!(why, reason::EPT_VIOLATION | reason::EPT_MISCONFIG) {
            self.set_field(f::GUEST_PHYSICAL, gpa);
            if qualification & (1 << 7) != 0 {
                self.set_field(f::GUEST_LINEAR, self.fault_linear);
            }
        }
        if why != reason::EXCEPTION && why != reason::EXTERNAL {
            self.set_field(f::EXIT_INFO, 0);
        }
        self.save_guest(&g);
        self.store_msrs(mem);
        if g.vpid == 0 {
            self.mmu.tlb.flush_linear(0);
        }
        self.load_host(mem, g.c);
        if self.aborted { Step::Shutdown } else { Step::Exit(why) }
    }

    fn store_msrs(&mut self, mem: &PhysMem) {
        let (at, n) = (self.field(f::EXIT_MSR_STORE), self.field(f::EXIT_MSR_STORE_COUNT));
        for i in 0..n.min(512) {
            let value = self.rdmsr(mem.read(at + i * 16, 4) as u32).unwrap_or(0);
            mem.write(at + i * 16 + 8, 8, value);
        }
    }

    fn save_guest(&mut self, g: &Guest) {
        let s = self.state.clone();
        for (n, at) in (0..).step_by(2).zip(ORDER) {
            self.set_field(f::GUEST_ES + n, u64::from(s.seg[at].selector));
            self.set_field(f::GUEST_ES_AR + n, unpack(s.seg[at].attributes));
            self.set_field(f::GUEST_ES_LIMIT + n, u64::from(s.seg[at].limit));
            self.set_field(f::GUEST_ES_BASE + n, s.seg[at].base);
        }
        let nmi = if g.c.pin(pin::VIRTUAL_NMIS) { g.nmi_block } else { self.nmi_mask };
        let shadows = u64::from(self.shadow) | u64::from(self.shadow_ss) << 1 | u64::from(nmi) << 3;
        for (field, value) in [
            (f::GUEST_GDTR_LIMIT, u64::from(s.seg[seg::GDTR].limit)),
            (f::GUEST_GDTR_BASE, s.seg[seg::GDTR].base),
            (f::GUEST_IDTR_LIMIT, u64::from(s.seg[seg::IDTR].limit)),
            (f::GUEST_IDTR_BASE, s.seg[seg::IDTR].base),
            (f::GUEST_CR0, s.cr0),
            (f::GUEST_CR3, s.cr3),
            (f::GUEST_CR4, s.cr4),
            (f::GUEST_RIP, s.rip),
            (f::GUEST_RSP, s.rsp),
            (f::GUEST_RFLAGS, s.rflags),
            (f::GUEST_SYSENTER_CS, s.sys[5]),
            (f::GUEST_SYSENTER_ESP, s.sys[6]),
            (f::GUEST_SYSENTER_EIP, s.sys[7]),
            (f::INTERRUPTIBILITY, shadows),
            (f::ACTIVITY, self.activity),
            (f::PENDING_DEBUG, 0),
            (f::ENTRY_INFO, self.field(f::ENTRY_INFO) & !(1 << 31)),
            // Bit 9 follows the guest's mode.
            (f::ENTRY, u64::from(g.c.entry & !entryc::IA32E) | if s.long_mode() { 1 << 9 } else { 0 }),
        ] {
            self.set_field(field, value);
        }
        if g.c.exit(exitc::SAVE_DEBUG) {
            self.set_field(f::GUEST_DR7, s.dr7);
            self.set_field(f::GUEST_DEBUGCTL, s.lbr[0]);
        }
        if g.c.exit(exitc::SAVE_PAT) {
            self.set_field(f::GUEST_PAT, s.pat);
        }
        if g.c.exit(exitc::SAVE_EFER) {
            self.set_field(f::GUEST_EFER, s.efer);
        }
        if g.c.exit(exitc::SAVE_TIMER) {
            self.set_field(f::PREEMPTION_TIMER, g.timer);
        }
        if g.ept.is_some() {
            for (n, value) in (0..).step_by(2).zip(self.pdptes) {
                self.set_field(f::PDPTE0 + n, value);
            }
        }
    }

    /// Host state from the VMCS. RAX, CR2, DR6 and the SYSCALL registers stay the guest's.
    fn load_host(&mut self, mem: &PhysMem, c: Controls) {
        let get = |field| self.field(field);
        let host64 = c.exit(exitc::HOST64);
        let mut s = self.state.clone();
        let flat = |selector: u32, attributes| Segment {
            selector: get(selector) as u16,
            attributes,
            limit: u32::MAX,
            base: 0,
        };
        s.seg[seg::CS] = flat(f::HOST_CS, if host64 { 0xA9B & !0x400 | 0x200 } else { 0xC9B });
        for (at, field) in [(seg::ES, f::HOST_ES), (seg::SS, f::HOST_SS), (seg::DS, f::HOST_DS)] {
            s.seg[at] = flat(field, 0xC93);
        }
        s.seg[seg::FS] = Segment { base: get(f::HOST_FS_BASE), ..flat(f::HOST_FS, 0xC93) };
        s.seg[seg::GS] = Segment { base: get(f::HOST_GS_BASE), ..flat(f::HOST_GS, 0xC93) };
        s.seg[seg::TR] = Segment { base: get(f::HOST_TR_BASE), limit: 0x67, ..flat(f::HOST_TR, 0x8B) };
        s.seg[seg::LDTR] = Segment { attributes: 0x8000, ..Segment::default() };
        s.seg[seg::GDTR] = Segment { base: get(f::HOST_GDTR_BASE), limit: 0xFFFF, ..Segment::default() };
        s.seg[seg::IDTR] = Segment { base: get(f::HOST_IDTR_BASE), limit: 0xFFFF, ..Segment::default() };
        (s.cr0, s.cr3, s.cr4) = (get(f::HOST_CR0), get(f::HOST_CR3), get(f::HOST_CR4));
        (s.rip, s.rsp, s.rflags, s.cpl) = (get(f::HOST_RIP), get(f::HOST_RSP), 2, 0);
        (s.dr7, s.lbr[0]) = (0x400, 0);
        (s.sys[5], s.sys[6], s.sys[7]) =
            (get(f::HOST_SYSENTER_CS), get(f::HOST_SYSENTER_ESP), get(f::HOST_SYSENTER_EIP));
        if c.exit(exitc::LOAD_PAT) {
            s.pat = get(f::HOST_PAT);
        }
        s.efer = if c.exit(exitc::LOAD_EFER) {
            get(f::HOST_EFER)
        } else {
            s.efer & !(EFER_LMA | EFER_LME) | if host64 { EFER_LMA | EFER_LME } else { 0 }
        };
        self.state = s;
        (self.shadow, self.shadow_ss, self.activity) = (false, false, 0);
        // A failure here is a VMX abort: the CPU is gone.
        self.aborted |= self.load_msrs(mem, f::EXIT_MSR_LOAD, f::EXIT_MSR_LOAD_COUNT).is_err();
    }
}
