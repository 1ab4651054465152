//! Writes to pages that are read-only in L0's nested tables: the local APIC, and the hole where L0 lives.
//!
//! Called by the exit handlers at a nested page fault. Decodes the store and carries it out, or lets it vanish.

use hw::apic::reg;
use hw::decode::{self, Mode, Operation, Source, Store};

use crate::fatal::Failure;
use crate::ipi::Icr;
use crate::npt01::Kind;
use crate::vp::Vp;

/// L1 wrote to `gpa`, a page of `kind`.
pub fn write(vp: &mut Vp, gpa: u64, kind: Kind) -> Result<(), Failure> {
    if kind == Kind::Overlay {
        crate::exits::raise(vp, nsvm::Fault::GP);
        return Ok(());
    }
    let (bytes, n) = vp.instruction();
    let Some(store) = decode::store(bytes.get(..n).unwrap_or(&[]), mode(vp)) else {
        // An instruction that no kernel uses on device registers: L1 learns that it is not supported there.
        crate::say!("l0: cpu {}: cannot decode a write to {gpa:#x}: {:02x?}", vp.id, bytes);
        crate::exits::raise(vp, nsvm::Fault::UD);
        return Ok(());
    };
    let source = operand(vp, store.source);
    let is_apic = kind == Kind::Apic;
    // Registers are 32 bits wide on 16-byte boundaries; other accesses are undefined and ignored.
    let register = gpa & 0xfff;
    let proper = is_apic && store.size == 4 && register & 0xf == 0;
    let old = if proper && needs_old(store.operation) { u64::from(vp.shared.apic.read(register)) } else { u64::MAX };
    if proper {
        apic_write(vp, register, store.operation.apply(old, source) as u32);
    }
    if store.operation == Operation::Exchange {
        set_operand(vp, store.source, store.size, old);
    }
    finish(vp, &store);
    Ok(())
}

fn needs_old(operation: Operation) -> bool {
    !matches!(operation, Operation::Store | Operation::StoreString { .. })
}

fn mode(vp: &mut Vp) -> Mode {
    let v = vp.vmcb();
    if v.in_64bit_code() {
        Mode::Bits64
    } else if v.save.cs.attrib & 1 << 10 != 0 {
        Mode::Bits32
    } else {
        Mode::Bits16
    }
}

/// Moves past the instruction; a repeated string store moves its registers by one element.
fn finish(vp: &mut Vp, store: &Store) {
    if let Operation::StoreString { repeat } = store.operation {
        let step = u64::from(store.size);
        let down = vp.vmcb().save.rflags & 1 << 10 != 0;
        vp.m.gprs.rdi = if down { vp.m.gprs.rdi.wrapping_sub(step) } else { vp.m.gprs.rdi.wrapping_add(step) };
        if repeat {
            vp.m.gprs.rcx = vp.m.gprs.rcx.wrapping_sub(1);
            if vp.m.gprs.rcx != 0 {
                return;
            }
        }
    }
    vp.advance(u64::from(store.length));
}

fn slot(vp: &mut Vp, number: u8) -> Option<&mut u64> {
    let g = &mut vp.m.gprs;
    Some(match number {
        1 => &mut g.rcx,
        2 => &mut g.rdx,
        3 => &mut g.rbx,
        5 => &mut g.rbp,
        6 => &mut g.rsi,
        7 => &mut g.rdi,
        8 => &mut g.r8,
        9 => &mut g.r9,
        10 => &mut g.r10,
        11 => &mut g.r11,
        12 => &mut g.r12,
        13 => &mut g.r13,
        14 => &mut g.r14,
        15 => &mut g.r15,
        _ => return None,
    })
}

fn register(vp: &mut Vp, number: u8) -> u64 {
    match number {
        0 => vp.vmcb().save.rax,
        4 => vp.vmcb().save.rsp,
        n => slot(vp, n).map_or(0, |r| *r),
    }
}

fn operand(vp: &mut Vp, source: Source) -> u64 {
    match source {
        Source::Register(n) => register(vp, n),
        Source::HighByte(n) => register(vp, n) >> 8,
        Source::Immediate(value) => value,
    }
}

/// Writes `size` bytes of `value` to a register operand, by the rules of partial registers.
fn set_operand(vp: &mut Vp, source: Source, size: u8, value: u64) {
    let (number, shift) = match source {
        Source::Register(n) => (n, 0),
        Source::HighByte(n) => (n, 8),
        Source::Immediate(_) => return,
    };
    let old = register(vp, number);
    let new = match size {
        1 => old & !(0xff << shift) | (value & 0xff) << shift,
        2 => old & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    match number {
        0 => vp.vmcb().save.rax = new,
        4 => vp.vmcb().save.rsp = new,
        n => {
            if let Some(r) = slot(vp, n) {
                *r = new;
            }
        }
    }
}

/// L1 writes its APIC register `register`.
pub fn apic_write(vp: &mut Vp, register: u64, value: u32) {
    let apic = vp.shared.apic;
    match register {
        // The id names the processor for L0's kicks too: it stays.
        reg::ID => return,
        reg::LDR => vp.shared.ipis.set_ldr(vp.id, value),
        reg::DFR => vp.shared.ipis.set_dfr(vp.id, value | 0x0fff_ffff),
        reg::ICR_LOW => {
            let destination = apic.read(reg::ICR_HIGH) >> 24;
            // SAFETY: only commands that L0 lets through reach the real register.
            return send_icr(vp, destination, value, |_| unsafe { apic.write(reg::ICR_LOW, value) });
        }
        _ => {}
    }
    // SAFETY: the register is L1's own: passed through, and it sends no INIT, SIPI or NMI to other processors.
    unsafe { apic.write(register, value) };
}

/// L1 sends the command `low` to `destination`: by `pass` if the real APIC may send it, otherwise L0 carries it out.
pub fn send_icr(vp: &mut Vp, destination: u32, low: u32, pass: impl FnOnce(&mut Vp)) {
    match vp.shared.ipis.icr(vp.id, destination, low) {
        Icr::PassThrough => pass(vp),
        Icr::Kick(cpus) => vp.shared.kick_all(cpus),
    }
}
