//! Events: what is pending and may be taken, delivery through the IDT, and what happens when delivery fails (APM
//! volume 2, 8.2, 8.9, 15.12, 15.13, 15.20, 15.21).

use super::state::{bit::*, seg};
use super::vmcb::{exit, misc1, vintr};
use super::{Cpu, LINE, Op, Step, Trap};
use crate::model::mem::PhysMem;

/// An interrupt or exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// External or virtual interrupt.
    Interrupt(u8),
    /// Non-maskable interrupt.
    Nmi,
    /// Exception with its error code, if it has one.
    Exception(u8, Option<u32>),
    /// INTn.
    Soft(u8),
}

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

    const fn vector(self) -> u8 {
        match self {
            Self::Interrupt(v) | Self::Exception(v, _) | Self::Soft(v) => v,
            Self::Nmi => 2,
        }
    }
}

/// Does `second`, raised while delivering `first`, make a double fault (8.2.9)?
fn doubles(first: u8, second: u8) -> bool {
    let contributory = |v| matches!(v, 0 | 10..=13);
    match first {
        14 => second == 14 || contributory(second),
        v => contributory(v) && contributory(second),
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
                let next = self.state.rip.wrapping_add(op.len());
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
                let next = matches!(v, 3 | 4).then(|| self.state.rip.wrapping_add(op.len()));
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
            match self.vector(mem, now, rip) {
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

    /// Reads the gate, pushes the frame, goes to the handler.
    fn vector(&mut self, mem: &PhysMem, event: Event, rip: u64) -> Result<(), Trap> {
        let v = event.vector();
        let ext = u32::from(!matches!(event, Event::Soft(_) | Event::Exception(3 | 4, _)));
        let bad = |vector| Trap::Exception(vector, Some(u32::from(v) * 8 + 2 + ext), 0);
        if self.state.cr0 & CR0_PE == 0 {
            return self.vector_real(mem, v, rip);
        }
        let long = self.state.long_mode();
        let width: u64 = if long { 16 } else { 8 };
        let idt = self.state.seg[seg::IDTR];
        if u64::from(v) * width + width - 1 > u64::from(idt.limit) {
            return Err(bad(13));
        }
        let at = idt.base.wrapping_add(u64::from(v) * width);
        let gate = self.load(mem, at, 8, false)?;
        let high = if long { self.load(mem, at.wrapping_add(8), 4, false)? } else { 0 };
        let kind = (gate >> 40) & 0x1F;
        if kind != 0xE && kind != 0xF {
            return Err(bad(13));
        }
        if ext == 0 && ((gate >> 45) & 3) < u64::from(self.state.cpl) {
            return Err(bad(13));
        }
        if gate & (1 << 47) == 0 {
            return Err(bad(11));
        }
        let target = gate & 0xFFFF | (gate >> 32) & 0xFFFF_0000 | high << 32;
        if long && super::state::sign_extend(target, if self.state.cr4 & CR4_LA57 != 0 { 57 } else { 48 }) != target {
            return Err(Trap::Exception(13, Some(0), 0));
        }
        let (ss, sp, switched) = self.handler_stack(mem, (gate >> 32) & 7)?;
        let code = if let Event::Exception(_, code) = event { code } else { None };
        let size = if long { 8 } else { 4 };
        let s = &self.state;
        let mut frame = Vec::with_capacity(6);
        if long || switched {
            frame.extend([u64::from(s.seg[seg::SS].selector), s.rsp]);
        }
        frame.extend([s.rflags, u64::from(s.seg[seg::CS].selector), rip]);
        frame.extend(code.map(u64::from));
        let sp = self.push(mem, sp, size, &frame)?;
        let s = &mut self.state;
        s.rsp = sp;
        s.rip = target;
        s.rflags &= !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | if kind == 0xE { FLAG_IF } else { 0 });
        s.seg[seg::CS].selector = (gate >> 16) as u16 & !3;
        s.seg[seg::CS].attributes = if long { 0x29B } else { 0xC9B };
        if switched {
            s.seg[seg::SS].selector = ss;
            s.seg[seg::SS].attributes = 0xC93;
        }
        s.cpl = 0;
        Ok(())
    }

    /// SS and RSP of the handler, and whether the privilege level changes.
    fn handler_stack(&mut self, mem: &PhysMem, ist: u64) -> Result<(u16, u64, bool), Trap> {
        let (tss, switched) = (self.state.seg[seg::TR].base, self.state.cpl != 0);
        if self.state.long_mode() {
            let sp = match (ist, switched) {
                (0, false) => self.state.rsp,
                (0, true) => self.load(mem, tss.wrapping_add(4), 8, false)?,
                (n, _) => self.load(mem, tss.wrapping_add(0x1C + n * 8), 8, false)?,
            };
            return Ok((0, sp & !0xF, switched));
        }
        if !switched {
            return Ok((0, self.state.rsp, false));
        }
        let sp = self.load(mem, tss.wrapping_add(4), 4, false)?;
        Ok((self.load(mem, tss.wrapping_add(8), 2, false)? as u16, sp, true))
    }

    /// Pushes below `sp`, nothing if any push faults, and returns the new stack pointer.
    fn push(&mut self, mem: &PhysMem, sp: u64, size: u64, values: &[u64]) -> Result<u64, Trap> {
        let below = sp.wrapping_sub(size * values.len() as u64);
        // Both pages are translated for writing first, so that a fault leaves the stack as it was.
        self.span(mem, below, size * values.len() as u64, crate::model::walk::Kind::Write, false)?;
        for (n, value) in (1..).zip(values) {
            self.store(mem, sp.wrapping_sub(n * size), size, *value, false)?;
        }
        Ok(below)
    }

    fn vector_real(&mut self, mem: &PhysMem, v: u8, rip: u64) -> Result<(), Trap> {
        let idt = self.state.seg[seg::IDTR];
        if u32::from(v) * 4 + 3 > idt.limit {
            return Err(Trap::Exception(13, None, 0));
        }
        let gate = self.load(mem, idt.base.wrapping_add(u64::from(v) * 4), 4, false)?;
        let s = &self.state;
        let base = s.seg[seg::SS].base;
        let frame = [s.rflags & 0xFFFF, u64::from(s.seg[seg::CS].selector), rip & 0xFFFF];
        let sp = s.rsp & 0xFFFF;
        self.push(mem, base.wrapping_add(sp), 2, &frame)?;
        let s = &mut self.state;
        s.rsp = s.rsp & !0xFFFF | sp.wrapping_sub(6) & 0xFFFF;
        s.rip = gate & 0xFFFF;
        s.seg[seg::CS].selector = (gate >> 16) as u16;
        s.seg[seg::CS].base = (gate >> 16) << 4;
        s.rflags &= !(FLAG_TF | FLAG_IF | FLAG_AC);
        Ok(())
    }

    /// IRET: the frame that [`Self::vector`] pushed, without the error code.
    pub(super) fn iret(&mut self, mem: &PhysMem) -> Result<(), Trap> {
        let s = &self.state;
        let (real, long) = (s.cr0 & CR0_PE == 0, s.long_mode());
        let size: u64 = if real {
            2
        } else if long {
            8
        } else {
            4
        };
        let base = if real { s.seg[seg::SS].base } else { 0 };
        let (sp, user) = (if real { s.rsp & 0xFFFF } else { s.rsp }, s.cpl == 3);
        let mut word = [0u64; 5];
        for (n, w) in (0..3).zip(&mut word) {
            *w = self.load(mem, base.wrapping_add(sp + n * size), size, user)?;
        }
        let outer = !real && (word[1] & 3) as u8 != self.state.cpl;
        if long || outer {
            for (n, w) in (3..5).zip(&mut word[3..]) {
                *w = self.load(mem, sp.wrapping_add(n * size), size, user)?;
            }
        }
        let s = &mut self.state;
        s.rip = word[0];
        s.seg[seg::CS].selector = word[1] as u16;
        s.rflags = word[2] & 0x3F_7FD5 | 2 | if real { s.rflags & !0xFFFF } else { 0 };
        if real {
            s.seg[seg::CS].base = (word[1] & 0xFFFF) << 4;
            s.rsp = s.rsp & !0xFFFF | (sp + 6) & 0xFFFF;
        } else if long || outer {
            s.seg[seg::SS].selector = word[4] as u16;
            s.rsp = word[3];
        } else {
            s.rsp = sp.wrapping_add(3 * size);
        }
        if !real {
            let cpl = (word[1] & 3) as u8;
            s.cpl = cpl;
            s.seg[seg::CS].attributes = s.seg[seg::CS].attributes & !0x60 | u16::from(cpl) << 5;
        }
        self.nmi_mask = false;
        self.change_vintr(|v| v & !vintr::NMI_MASK);
        Ok(())
    }
}
