//! Events between instructions in the order of the SDM, and delivery with what interrupts it (SDM volume 3, "Other causes
//! of VM exits" and "Information for VM exits during event delivery").

use super::caps::{exitc, pin, proc};
use super::fields as f;
use super::{Cpu, Event, LINE, Op, Step, Trap, reason};
use crate::model::cpu::state::bit::*;
use crate::model::cpu::{doubles, idt};
use crate::model::mem::PhysMem;

/// Interruption information: valid.
const VALID: u32 = 1 << 31;

/// Interruption information of an event: vector, type, error-code flag, valid.
fn information(event: Event) -> u32 {
    let (vector, kind, code) = match event {
        Event::Interrupt(v) => (v, 0, false),
        Event::Nmi => (2, 2, false),
        Event::Exception(v @ (3 | 4), None) => (v, 6, false),
        Event::Exception(v, code) => (v, 3, code.is_some()),
        Event::Soft(v) => (v, 4, false),
    };
    u32::from(vector) | kind << 8 | u32::from(code) << 11 | VALID
}

impl Cpu {
    /// What happens instead of the next instruction.
    pub(super) fn poll(&mut self, mem: &PhysMem) -> Option<Step> {
        if self.guest.is_some() { self.poll_guest(mem) } else { self.poll_root() }
    }

    /// Root operation: INIT and SIPI are blocked, the rest is reported.
    fn poll_root(&mut self) -> Option<Step> {
        let lines = self.lines.clone();
        if self.vmxon.is_none() && lines.init.swap(false, LINE) {
            return Some(Step::Init);
        }
        if lines.smi.swap(false, LINE) {
            return Some(Step::Smi);
        }
        if !self.nmi_mask && !self.shadow_ss && lines.nmi.swap(false, LINE) {
            self.nmi_mask = true;
            return Some(Step::Event(Event::Nmi));
        }
        let vector = lines.intr_pending()?;
        let open = self.state.rflags & FLAG_IF != 0 && !self.shadow && !self.shadow_ss;
        if !open || u64::from(vector >> 4) <= self.cr8 {
            return None;
        }
        let _ = lines.intr.compare_exchange(u32::from(vector) + 1, 0, LINE, LINE);
        Some(Step::Event(Event::Interrupt(vector)))
    }

    fn poll_guest(&mut self, mem: &PhysMem) -> Option<Step> {
        let lines = self.lines.clone();
        let c = self.controls();
        let plain = |cpu: &mut Self, why| Some(cpu.exit(mem, (why, 0, 0), 0));
        if self.activity == 3 {
            // Waiting for a SIPI, nothing but it and INIT matters.
            if lines.init.swap(false, LINE) {
                return plain(self, reason::INIT);
            }
            let sipi = lines.sipi.swap(0, LINE).checked_sub(1)?;
            return Some(self.exit(mem, (reason::SIPI, u64::from(sipi), 0), 0));
        }
        lines.sipi.store(0, LINE);
        if lines.init.swap(false, LINE) {
            return plain(self, reason::INIT);
        }
        if lines.smi.swap(false, LINE) {
            return Some(Step::Smi);
        }
        let g = self.guest.as_mut()?;
        if std::mem::take(&mut g.mtf) {
            return plain(self, reason::MTF);
        }
        if c.pin(pin::TIMER) && g.timer == 0 {
            return plain(self, reason::TIMER);
        }
        let window = !g.nmi_block && !self.shadow_ss;
        if c.proc(proc::NMI_WINDOW) && window {
            return plain(self, reason::NMI_WINDOW);
        }
        if let Some(step) = self.poll_nmi(mem) {
            return Some(step);
        }
        let open = self.state.rflags & FLAG_IF != 0 && !self.shadow && !self.shadow_ss;
        if c.proc(proc::INTERRUPT_WINDOW) && open && self.activity != 2 {
            return plain(self, reason::INTERRUPT_WINDOW);
        }
        self.poll_interrupt(mem, open)
    }

    fn poll_nmi(&mut self, mem: &PhysMem) -> Option<Step> {
        if !self.lines.nmi.load(LINE) || self.nmi_mask || self.shadow_ss {
            return None;
        }
        self.lines.nmi.store(false, LINE);
        if self.controls().pin(pin::NMI) {
            let step = self.exception_exit(mem, information(Event::Nmi), None, 0, 0);
            // NMIs stay blocked in the host until it executes IRET.
            self.nmi_mask = true;
            return Some(step);
        }
        self.nmi_mask = true;
        self.activity = 0;
        Some(self.deliver(mem, Event::Nmi, 0, self.state.rip))
    }

    fn poll_interrupt(&mut self, mem: &PhysMem, open: bool) -> Option<Step> {
        let vector = self.lines.intr_pending()?;
        let c = self.controls();
        if u64::from(vector >> 4) <= self.cr8 {
            return None;
        }
        let line = self.lines.clone();
        let acknowledge = || line.intr.compare_exchange(u32::from(vector) + 1, 0, LINE, LINE).is_ok();
        if c.pin(pin::EXTERNAL) {
            // RFLAGS.IF plays no part; a shadow does.
            if self.shadow || self.shadow_ss {
                return None;
            }
            let info = if c.exit(exitc::ACK) && acknowledge() { information(Event::Interrupt(vector)) } else { 0 };
            self.set_field(f::EXIT_INFO, u64::from(info));
            return Some(self.exit(mem, (reason::EXTERNAL, 0, 0), 0));
        }
        if !open || self.activity == 2 || !acknowledge() {
            return None;
        }
        self.activity = 0;
        Some(self.deliver(mem, Event::Interrupt(vector), 0, self.state.rip))
    }

    /// An exit for an exception or NMI, with its interruption information.
    fn exception_exit(&mut self, mem: &PhysMem, info: u32, code: Option<u32>, cr2: u64, length: u64) -> Step {
        self.set_field(f::EXIT_INFO, u64::from(info));
        if let Some(code) = code {
            self.set_field(f::EXIT_ERROR, u64::from(code));
        }
        self.exit(mem, (reason::EXCEPTION, cr2, 0), length)
    }

    /// Whether the exception bitmap, with the #PF mask and match, wants this exception.
    fn wants(&self, v: u8, code: Option<u32>) -> bool {
        if self.guest.is_none() {
            return false;
        }
        let bit = self.field(f::EXCEPTIONS) >> v & 1 != 0;
        if v != 14 {
            return bit;
        }
        let matches = u64::from(code.unwrap_or(0)) & self.field(f::PF_MASK) == self.field(f::PF_MATCH);
        bit == matches
    }

    /// An instruction ended in a trap.
    pub(super) fn trap(&mut self, mem: &PhysMem, trap: Trap, op: Op) -> Step {
        let next = self.state.rip.wrapping_add(self.length(op));
        match trap {
            Trap::Exit(why, qualification, gpa) => {
                let iret = op == Op::Iret && matches!(why, reason::EPT_VIOLATION | reason::EPT_MISCONFIG);
                let length = if iret || why == reason::EPT_VIOLATION { 0 } else { self.length(op) };
                self.exit(mem, (why, qualification, gpa), length)
            }
            Trap::Soft(event) => self.deliver(mem, event, 0, next),
            Trap::Exception(v, code, cr2) => {
                let event = Event::Exception(v, code);
                if self.wants(v, code) {
                    let qualification = if v == 14 { cr2 } else { 0 };
                    return self.exception_exit(mem, information(event), code, qualification, self.length(op));
                }
                if v == 14 && self.guest.is_some() {
                    self.state.cr2 = cr2;
                }
                let rip = if matches!(v, 3 | 4) { next } else { self.state.rip };
                self.deliver(mem, event, 0, rip)
            }
        }
    }

    /// IDT-vectoring information of an exit: the event whose delivery it interrupted, if any.
    pub(super) fn save_vectoring(&mut self) {
        let (info, code) = match self.vectoring.take() {
            None => (0, None),
            // An injected event is reported as it was injected, privileged software exceptions included.
            Some((event, injected)) if injected & VALID != 0 => (injected & !0x7FFF_F000, event.code()),
            Some((event, _)) => (information(event), event.code()),
        };
        self.set_field(f::IDT_INFO, u64::from(info));
        if let Some(code) = code {
            self.set_field(f::IDT_ERROR, u64::from(code));
        }
    }

    /// Delivers `event`; `rip` is what the frame gets. `injected` is the entry's interruption information or 0. In root
    /// operation the event is only reported.
    pub(super) fn deliver(&mut self, mem: &PhysMem, event: Event, injected: u32, rip: u64) -> Step {
        if self.guest.is_none() {
            return Step::Event(event);
        }
        let (mut now, mut raw) = (event, injected);
        loop {
            let at = if now == event { rip } else { self.state.rip };
            let length = at.wrapping_sub(self.state.rip);
            match idt::vector(self, mem, now, at) {
                Ok(()) => {
                    self.vectoring = None;
                    (self.shadow, self.shadow_ss) = (false, false);
                    return Step::Event(now);
                }
                Err(Trap::Exit(why, qualification, gpa)) => {
                    self.vectoring = Some((now, raw));
                    return self.exit(mem, (why, qualification, gpa), length);
                }
                Err(Trap::Soft(_)) => unreachable!("delivery is no instruction"),
                Err(Trap::Exception(v, code, cr2)) => {
                    self.vectoring = Some((now, raw));
                    if self.wants(v, code) {
                        let (info, qual) = (information(Event::Exception(v, code)), if v == 14 { cr2 } else { 0 });
                        return self.exception_exit(mem, info, code, qual, length);
                    }
                    if v == 14 {
                        self.state.cr2 = cr2;
                    }
                    let exception = matches!(now, Event::Exception(..));
                    if exception && now.vector() == 8 {
                        self.vectoring = None;
                        return self.exit(mem, (reason::TRIPLE_FAULT, 0, 0), 0);
                    }
                    let double = exception && doubles(now.vector(), v);
                    now = if double { Event::Exception(8, Some(0)) } else { Event::Exception(v, code) };
                    raw = 0;
                    if double && self.wants(8, Some(0)) {
                        return self.exception_exit(mem, information(now), Some(0), 0, 0);
                    }
                }
            }
        }
    }
}
