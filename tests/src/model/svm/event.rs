//! Events: what is pending and may be taken, delivery through the IDT, and what happens when delivery fails (APM
//! volume 2, 8.2, 8.9, 15.12, 15.13, 15.20, 15.21).

use super::state::bit::*;
use super::vmcb::{exit, misc1, vintr};
use super::{Cpu, Event, LINE, Op, Step, Trap};
use crate::model::cpu::{doubles, idt};
use crate::model::mem::PhysMem;

impl Event {
    /// As EXITINTINFO and EVENTINJ have it: vector 7:0, type 10:8, EV 11, V 31, error code 63:32.
    pub fn encode(self) -> u64 {
        let (vector, kind, code) = match self {
            Self::Interrupt(v) => (v, 0, None),
            Self::Nmi => (2, 2, None),
            Self::Exception(v, code) => (v, 3, code),
            Self::Soft(v) => (v, 4, None),
        };
        let error = code.map_or(0, |c| u64::from(c) << 32 | 1 << 11);
        u64::from(vector) | kind << 8 | error | 1 << 31
    }

    /// The event in an EVENTINJ or EXITINTINFO value, if it is valid.
    pub fn decode(value: u64) -> Option<Self> {
        if value & (1 << 31) == 0 {
            return None;
        }
        let vector = value as u8;
        Some(match (value >> 8) & 7 {
            0 => Self::Interrupt(vector),
            2 => Self::Nmi,
            4 => Self::Soft(vector),
            _ => Self::Exception(vector, (value & (1 << 11) != 0).then_some((value >> 32) as u32)),
        })
    }
}

impl Cpu {
    /// What is taken instead of the next instruction, by priority: INIT, SMI, NMI, interrupt, virtual interrupt.
    pub(super) fn poll(&mut self, mem: &PhysMem) -> Option<Step> {
        if !self.gif {
            return None;
        }
        let lines = self.lines.clone();
        let in_guest = self.guest.is_some();
        for (line, n, step) in [(&lines.init, misc1::INIT, Step::Init), (&lines.smi, misc1::SMI, Step::Smi)] {
            if line.load(LINE) {
                // An intercepted event stays pending and is the host's when it sets GIF.
                if self.intercepts(0, n) {
                    return Some(self.exit(mem, (exit::MISC1 + u64::from(n), 0, 0), None, None));
                }
                line.store(false, LINE);
                return Some(step);
            }
        }
        if lines.nmi.load(LINE) && !self.nmi_mask {
            if self.intercepts(0, misc1::NMI) {
                return Some(self.exit(mem, (exit::MISC1 + u64::from(misc1::NMI), 0, 0), None, None));
            }
            lines.nmi.store(false, LINE);
            return Some(self.take(mem, Event::Nmi));
        }
        if let Some(vector) = self.interrupt() {
            if self.intercepts(0, misc1::INTR) {
                return Some(self.exit(mem, (exit::MISC1, 0, 0), None, None));
            }
            // Only if it is still this one: another thread may have changed the line meanwhile.
            let _ = lines.intr.compare_exchange(u32::from(vector) + 1, 0, LINE, LINE);
            return Some(self.take(mem, Event::Interrupt(vector)));
        }
        if in_guest { self.virtual_event(mem) } else { None }
    }

    /// The external interrupt that may be taken now.
    fn interrupt(&self) -> Option<u8> {
        let vector = self.lines.intr_pending()?;
        let masking = self.guest.as_ref().filter(|g| g.ctl.vintr & vintr::MASKING != 0);
        let enabled = masking.map_or(self.state.rflags & FLAG_IF != 0, |g| g.host_if);
        (enabled && !self.shadow && u64::from(vector >> 4) > self.cr8).then_some(vector)
    }

    fn virtual_event(&mut self, mem: &PhysMem) -> Option<Step> {
        let v = self.guest.as_ref()?.ctl.vintr;
        let open = !(self.features.vgif && v & vintr::GIF_ENABLE != 0) || v & vintr::GIF != 0;
        if !open {
            return None;
        }
        let vnmi = self.features.vnmi && v & vintr::NMI_ENABLE != 0;
        if vnmi && v & (vintr::NMI | vintr::NMI_MASK) == vintr::NMI {
            self.change_vintr(|v| v & !vintr::NMI | vintr::NMI_MASK);
            return Some(self.take(mem, Event::Nmi));
        }
        let priority = v & vintr::IGN_TPR != 0 || (v >> 16) & 0xF > v & 0xF;
        if v & vintr::IRQ == 0 || !priority || self.shadow || self.state.rflags & FLAG_IF == 0 {
            return None;
        }
        if self.intercepts(0, misc1::VINTR) {
            return Some(self.exit(mem, (exit::MISC1 + u64::from(misc1::VINTR), 0, 0), None, None));
        }
        self.change_vintr(|v| v & !vintr::IRQ);
        Some(self.take(mem, Event::Interrupt((v >> 32) as u8)))
    }

    pub(super) fn change_vintr(&mut self, change: impl Fn(u64) -> u64) {
        if let Some(g) = &mut self.guest {
            g.ctl.vintr = change(g.ctl.vintr);
        }
    }

    fn take(&mut self, mem: &PhysMem, event: Event) -> Step {
        self.halted = false;
        if event == Event::Nmi && self.guest.is_some() {
            self.nmi_mask = true;
        }
        self.deliver(mem, event, None)
    }

    /// An instruction ended in a trap.
    pub(super) fn trap(&mut self, mem: &PhysMem, trap: Trap, op: Op) -> Step {
        match trap {
            Trap::Exit(code, info1, info2) => self.exit(mem, (code, info1, info2), None, Some(op)),
            Trap::Soft(event) => {
                let next = self.state.rip.wrapping_add(self.length(op));
                self.deliver(mem, event, Some(next))
            }
            Trap::Exception(v, code, cr2) => {
                if let Some(step) = self.intercepted(mem, v, code, cr2, None, Some(op)) {
                    return step;
                }
                if v == 14 && self.guest.is_some() {
                    self.state.cr2 = cr2;
                }
                // INT3 and INTO are traps.
                let next = matches!(v, 3 | 4).then(|| self.state.rip.wrapping_add(self.length(op)));
                self.deliver(mem, Event::Exception(v, code), next)
            }
        }
    }

    /// Exits for an intercepted exception.
    fn intercepted(
        &mut self,
        mem: &PhysMem,
        v: u8,
        code: Option<u32>,
        cr2: u64,
        during: Option<Event>,
        op: Option<Op>,
    ) -> Option<Step> {
        if self.guest.as_ref()?.ctl.exceptions & (1 << v) == 0 {
            return None;
        }
        let info2 = if v == 14 { cr2 } else { 0 };
        let trap = (exit::EXCEPTION + u64::from(v), code.map_or(0, u64::from), info2);
        Some(self.exit(mem, trap, during, op))
    }

    /// Delivers `event` to the guest; in host mode only reports it. `next` is the RIP to push for traps and software
    /// interrupts.
    pub(super) fn deliver(&mut self, mem: &PhysMem, event: Event, next: Option<u64>) -> Step {
        if self.guest.is_none() {
            return Step::Event(event);
        }
        let mut now = event;
        loop {
            let trap = matches!(now, Event::Soft(_) | Event::Exception(3 | 4, _));
            let rip = next.filter(|_| trap && now == event).unwrap_or(self.state.rip);
            match idt::vector(self, mem, now, rip) {
                Ok(()) => {
                    self.shadow = false;
                    return Step::Event(now);
                }
                Err(Trap::Exit(code, info1, info2)) => {
                    return self.exit(mem, (code, info1, info2), Some(now), None);
                }
                Err(Trap::Soft(_)) => unreachable!("delivery is no instruction"),
                Err(Trap::Exception(v, code, cr2)) => {
                    if let Some(step) = self.intercepted(mem, v, code, cr2, Some(now), None) {
                        return step;
                    }
                    if v == 14 {
                        self.state.cr2 = cr2;
                    }
                    let first = now.vector();
                    let exception = matches!(now, Event::Exception(..));
                    if exception && first == 8 {
                        return self.shutdown(mem);
                    }
                    now = if exception && doubles(first, v) {
                        if let Some(step) = self.intercepted(mem, 8, Some(0), 0, Some(now), None) {
                            return step;
                        }
                        Event::Exception(8, Some(0))
                    } else {
                        Event::Exception(v, code)
                    };
                }
            }
        }
    }

    fn shutdown(&mut self, mem: &PhysMem) -> Step {
        if self.intercepts(0, misc1::SHUTDOWN) {
            return self.exit(mem, (exit::SHUTDOWN, 0, 0), None, None);
        }
        Step::Shutdown
    }
}
