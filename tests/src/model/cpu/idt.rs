//! Delivery of events through the IDT (or the real-mode vector table) and return from it (APM volume 2, 8.9; SDM volume
//! 3, "Interrupt and exception handling").

use super::state::{State, bit::*, seg, sign_extend};
use super::{Event, Trap};
use crate::model::mem::PhysMem;
use crate::model::walk::Kind;

/// What CPUs of both vendors do alike: registers and their own accesses to memory.
pub(crate) trait Core {
    /// The registers.
    fn state(&mut self) -> &mut State;

    /// The physical address of a linear one.
    fn translate(&mut self, mem: &PhysMem, addr: u64, kind: Kind, user: bool) -> Result<u64, Trap>;

    /// Physical addresses of the bytes before and behind a page boundary, both translated before either is used.
    fn span(&mut self, mem: &PhysMem, addr: u64, size: u64, kind: Kind, user: bool) -> Result<[(u64, u64); 2], Trap> {
        let first = size.min(4096 - (addr & 4095));
        let a = self.translate(mem, addr, kind, user)?;
        let b = if first < size { self.translate(mem, addr.wrapping_add(first), kind, user)? } else { 0 };
        Ok([(a, first), (b, size - first)])
    }

    /// Loads from a linear address.
    fn load(&mut self, mem: &PhysMem, addr: u64, size: u64, user: bool) -> Result<u64, Trap> {
        let [(a, n), (b, m)] = self.span(mem, addr, size, Kind::Read, user)?;
        Ok(mem.read(a, n) | if m == 0 { 0 } else { mem.read(b, m) << (n * 8) })
    }

    /// Stores to a linear address.
    fn store(&mut self, mem: &PhysMem, addr: u64, size: u64, value: u64, user: bool) -> Result<(), Trap> {
        let [(a, n), (b, m)] = self.span(mem, addr, size, Kind::Write, user)?;
        mem.write(a, n, value);
        if m != 0 {
            mem.write(b, m, value >> (n * 8));
        }
        Ok(())
    }

    /// Translates for a supervisor write without writing.
    fn reserve(&mut self, mem: &PhysMem, addr: u64, size: u64) -> Result<(), Trap> {
        self.span(mem, addr, size, Kind::Write, false).map(drop)
    }

    /// Fetches at RIP, as far as faults go.
    fn fetch(&mut self, mem: &PhysMem) -> Result<(), Trap> {
        let s = self.state();
        let (base, user) = (if s.bits64() { 0 } else { s.seg[seg::CS].base }, s.cpl == 3);
        let rip = s.rip.wrapping_add(base);
        self.translate(mem, rip, Kind::Fetch, user).map(drop)
    }

    /// PUSHF of 8 bytes.
    fn pushf(&mut self, mem: &PhysMem) -> Result<(), Trap> {
        let s = self.state();
        let (sp, flags, user) = (s.rsp.wrapping_sub(8), s.rflags & 0xFC_FFFF, s.cpl == 3);
        self.store(mem, sp, 8, flags, user)?;
        self.state().rsp = sp;
        Ok(())
    }

    /// POPF of 8 bytes.
    fn popf(&mut self, mem: &PhysMem) -> Result<(), Trap> {
        let (sp, cpl) = (self.state().rsp, self.state().cpl);
        let flags = self.load(mem, sp, 8, cpl == 3)?;
        let keep = if cpl == 0 { FLAG_VM } else { FLAG_VM | FLAG_IF | 3 << 12 };
        let s = self.state();
        s.rflags = flags & 0x3F_7FD5 & !keep | s.rflags & keep | 2;
        s.rsp = sp.wrapping_add(8);
        Ok(())
    }
}

/// What XSETBV takes: x87 always, AVX with SSE only, nothing else.
pub(crate) const fn xcr0_valid(value: u64) -> bool {
    value & 1 != 0 && value & 6 != 4 && value & !7 == 0
}

/// Reads the gate, pushes the frame, goes to the handler.
pub(crate) fn vector(c: &mut impl Core, mem: &PhysMem, event: Event, rip: u64) -> Result<(), Trap> {
    let v = event.vector();
    let ext = u32::from(!matches!(event, Event::Soft(_) | Event::Exception(3 | 4, _)));
    let bad = |vector| Trap::Exception(vector, Some(u32::from(v) * 8 + 2 + ext), 0);
    if c.state().cr0 & CR0_PE == 0 {
        return vector_real(c, mem, v, rip);
    }
    let long = c.state().long_mode();
    let width: u64 = if long { 16 } else { 8 };
    let idt = c.state().seg[seg::IDTR];
    if u64::from(v) * width + width - 1 > u64::from(idt.limit) {
        return Err(bad(13));
    }
    let at = idt.base.wrapping_add(u64::from(v) * width);
    let gate = c.load(mem, at, 8, false)?;
    let high = if long { c.load(mem, at.wrapping_add(8), 4, false)? } else { 0 };
    let kind = (gate >> 40) & 0x1F;
    if kind != 0xE && kind != 0xF {
        return Err(bad(13));
    }
    if ext == 0 && ((gate >> 45) & 3) < u64::from(c.state().cpl) {
        return Err(bad(13));
    }
    if gate & (1 << 47) == 0 {
        return Err(bad(11));
    }
    let target = gate & 0xFFFF | (gate >> 32) & 0xFFFF_0000 | high << 32;
    if long && sign_extend(target, if c.state().cr4 & CR4_LA57 != 0 { 57 } else { 48 }) != target {
        return Err(Trap::Exception(13, Some(0), 0));
    }
    let (ss, sp, switched) = handler_stack(c, mem, (gate >> 32) & 7)?;
    let code = if let Event::Exception(_, code) = event { code } else { None };
    let size = if long { 8 } else { 4 };
    let s = c.state();
    let mut frame = Vec::with_capacity(6);
    if long || switched {
        frame.extend([u64::from(s.seg[seg::SS].selector), s.rsp]);
    }
    frame.extend([s.rflags, u64::from(s.seg[seg::CS].selector), rip]);
    frame.extend(code.map(u64::from));
    let sp = push(c, mem, sp, size, &frame)?;
    let s = c.state();
    s.rsp = sp;
    s.rip = target;
    s.rflags &= !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | if kind == 0xE { FLAG_IF } else { 0 });
    s.seg[seg::CS].selector = (gate >> 16) as u16 & !3;
    s.seg[seg::CS].attributes = if long { 0xA9B } else { 0xC9B };
    if switched {
        s.seg[seg::SS].selector = ss;
        s.seg[seg::SS].attributes = 0xC93;
    }
    s.cpl = 0;
    Ok(())
}

/// SS and RSP of the handler, and whether the privilege level changes.
fn handler_stack(c: &mut impl Core, mem: &PhysMem, ist: u64) -> Result<(u16, u64, bool), Trap> {
    let (tss, switched) = (c.state().seg[seg::TR].base, c.state().cpl != 0);
    if c.state().long_mode() {
        let sp = match (ist, switched) {
            (0, false) => c.state().rsp,
            (0, true) => c.load(mem, tss.wrapping_add(4), 8, false)?,
            (n, _) => c.load(mem, tss.wrapping_add(0x1C + n * 8), 8, false)?,
        };
        return Ok((0, sp & !0xF, switched));
    }
    if !switched {
        return Ok((0, c.state().rsp, false));
    }
    let sp = c.load(mem, tss.wrapping_add(4), 4, false)?;
    Ok((c.load(mem, tss.wrapping_add(8), 2, false)? as u16, sp, true))
}

/// Pushes below `sp`, nothing if any push faults, and returns the new stack pointer.
fn push(c: &mut impl Core, mem: &PhysMem, sp: u64, size: u64, values: &[u64]) -> Result<u64, Trap> {
    let below = sp.wrapping_sub(size * values.len() as u64);
    // Both pages are translated for writing first, so that a fault leaves the stack as it was.
    c.reserve(mem, below, size * values.len() as u64)?;
    for (n, value) in (1..).zip(values) {
        c.store(mem, sp.wrapping_sub(n * size), size, *value, false)?;
    }
    Ok(below)
}

fn vector_real(c: &mut impl Core, mem: &PhysMem, v: u8, rip: u64) -> Result<(), Trap> {
    let idt = c.state().seg[seg::IDTR];
    if u32::from(v) * 4 + 3 > idt.limit {
        return Err(Trap::Exception(13, None, 0));
    }
    let gate = c.load(mem, idt.base.wrapping_add(u64::from(v) * 4), 4, false)?;
    let s = c.state();
    let base = s.seg[seg::SS].base;
    let frame = [s.rflags & 0xFFFF, u64::from(s.seg[seg::CS].selector), rip & 0xFFFF];
    let sp = s.rsp & 0xFFFF;
    push(c, mem, base.wrapping_add(sp), 2, &frame)?;
    let s = c.state();
    s.rsp = s.rsp & !0xFFFF | sp.wrapping_sub(6) & 0xFFFF;
    s.rip = gate & 0xFFFF;
    s.seg[seg::CS].selector = (gate >> 16) as u16;
    s.seg[seg::CS].base = (gate >> 16) << 4;
    s.rflags &= !(FLAG_TF | FLAG_IF | FLAG_AC);
    Ok(())
}

/// IRET: the frame that [`vector`] pushed, without the error code.
pub(crate) fn iret(c: &mut impl Core, mem: &PhysMem) -> Result<(), Trap> {
    let s = c.state();
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
        *w = c.load(mem, base.wrapping_add(sp + n * size), size, user)?;
    }
    let outer = !real && (word[1] & 3) as u8 != c.state().cpl;
    if long || outer {
        for (n, w) in (3..5).zip(&mut word[3..]) {
            *w = c.load(mem, sp.wrapping_add(n * size), size, user)?;
        }
    }
    let s = c.state();
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
    Ok(())
}
