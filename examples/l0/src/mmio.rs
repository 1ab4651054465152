//! Writes to pages that are read-only in L0's second-stage tables: the local APIC, and the hole where L0 lives.
//!
//! Called by the exit handlers at such a fault. Decodes the store and carries it out, or lets it vanish.

use hw::apic::reg;
use hw::decode::{self, Mode, Operation, Source, Store};

use crate::ipi::Icr;
use crate::npt01::Kind;
use crate::shared::Shared;

/// The guest whose store faulted, and the processor it runs on.
pub trait Storer {
    /// The whole machine.
    fn shared(&self) -> &'static Shared;
    /// Which processor.
    fn id(&self) -> usize;
    /// The bytes at its RIP, and how many there are.
    fn code(&mut self) -> ([u8; 15], usize);
    /// Its operand and address size.
    fn mode(&mut self) -> Mode;
    /// General-purpose register `number`, 0 to 15 by encoding.
    fn register(&mut self, number: u8) -> u64;
    /// Sets it.
    fn set_register(&mut self, number: u8, value: u64);
    /// RFLAGS.DF: strings go down.
    fn goes_down(&mut self) -> bool;
    /// Moves it past an instruction of `length` bytes.
    fn pass(&mut self, length: u64);
    /// Raises #GP(0).
    fn raise_gp(&mut self);
    /// Raises #UD.
    fn raise_ud(&mut self);
}

const RCX: u8 = 1;
const RDI: u8 = 7;

/// The guest wrote to `gpa`, a page of `kind`.
pub fn write<S: Storer>(vp: &mut S, gpa: u64, kind: Kind) {
    if kind == Kind::Overlay {
        return vp.raise_gp();
    }
    let (bytes, n) = vp.code();
    let Some(store) = decode::store(bytes.get(..n).unwrap_or(&[]), vp.mode()) else {
        // An instruction that no kernel uses on device registers: L1 learns that it is not supported there.
        crate::say!("l0: cpu {}: cannot decode a write to {gpa:#x}: {:02x?}", vp.id(), bytes);
        return vp.raise_ud();
    };
    let source = operand(vp, store.source);
    let is_apic = kind == Kind::Apic;
    // Registers are 32 bits wide on 16-byte boundaries; other accesses are undefined and ignored.
    let register = gpa & 0xfff;
    let proper = is_apic && store.size == 4 && register & 0xf == 0;
    let old = if proper && needs_old(store.operation) { u64::from(vp.shared().apic.read(register)) } else { u64::MAX };
    if proper {
        apic_write(vp.shared(), vp.id(), register, store.operation.apply(old, source) as u32);
    }
    if store.operation == Operation::Exchange {
        set_operand(vp, store.source, store.size, old);
    }
    finish(vp, &store);
}

fn needs_old(operation: Operation) -> bool {
    !matches!(operation, Operation::Store | Operation::StoreString { .. })
}

/// Moves past the instruction; a repeated string store moves its registers by one element.
fn finish<S: Storer>(vp: &mut S, store: &Store) {
    if let Operation::StoreString { repeat } = store.operation {
        let (step, rdi) = (u64::from(store.size), vp.register(RDI));
        let rdi = if vp.goes_down() { rdi.wrapping_sub(step) } else { rdi.wrapping_add(step) };
        vp.set_register(RDI, rdi);
        if repeat {
            let rcx = vp.register(RCX).wrapping_sub(1);
            vp.set_register(RCX, rcx);
            if rcx != 0 {
                return;
            }
        }
    }
    vp.pass(u64::from(store.length));
}

fn operand<S: Storer>(vp: &mut S, source: Source) -> u64 {
    match source {
        Source::Register(n) => vp.register(n),
        Source::HighByte(n) => vp.register(n) >> 8,
        Source::Immediate(value) => value,
    }
}

/// Writes `size` bytes of `value` to a register operand, by the rules of partial registers.
fn set_operand<S: Storer>(vp: &mut S, source: Source, size: u8, value: u64) {
    let (number, shift) = match source {
        Source::Register(n) => (n, 0),
        Source::HighByte(n) => (n, 8),
        Source::Immediate(_) => return,
    };
    let old = vp.register(number);
    let new = match size {
        1 => old & !(0xff << shift) | (value & 0xff) << shift,
        2 => old & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    vp.set_register(number, new);
}

/// L1's processor `id`, which is this one, writes its APIC register `register`.
pub fn apic_write(shared: &Shared, id: usize, register: u64, value: u32) {
    let apic = shared.apic;
    match register {
        // The id names the processor for L0's kicks too: it stays.
        reg::ID => return,
        reg::LDR => shared.ipis.set_ldr(id, value),
        reg::DFR => shared.ipis.set_dfr(id, value | 0x0fff_ffff),
        reg::ICR_LOW => {
            let destination = apic.read(reg::ICR_HIGH) >> 24;
            // SAFETY: only commands that L0 lets through reach the real register.
            return send_icr(shared, id, destination, value, || unsafe { apic.write(reg::ICR_LOW, value) });
        }
        _ => {}
    }
    // SAFETY: the register is L1's own: passed through, and it sends no INIT, SIPI or NMI to other processors.
    unsafe { apic.write(register, value) };
}

/// L1's processor `id` sends the command `low` to `destination`: by `pass` if the real APIC may send it, otherwise L0
/// carries it out.
pub fn send_icr(shared: &Shared, id: usize, destination: u32, low: u32, pass: impl FnOnce()) {
    match shared.ipis.icr(id, destination, low) {
        Icr::PassThrough => pass(),
        Icr::Kick(cpus) => shared.kick_all(cpus),
    }
}
