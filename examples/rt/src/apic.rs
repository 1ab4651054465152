//! The local APIC in its memory-mapped form (SDM volume 3, 12.4): identifier, end of interrupt, commands.

use x86::msr::{IA32_APIC_BASE, rdmsr};

const ID: u64 = 0x20;
const END_OF_INTERRUPT: u64 = 0xB0;
const SPURIOUS: u64 = 0xF0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER_VECTOR: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3E0;
/// Timer divisor 16.
const DIVIDE_BY_16: u32 = 3;
/// The timer's vector is masked.
const MASKED: u32 = 1 << 16;

/// Delivery mode and level of the interrupt command register.
mod command {
    pub const ASSERT: u32 = 1 << 14;
    pub const ALL_BUT_SELF: u32 = 3 << 18;
    pub const PENDING: u32 = 1 << 12;
    pub const NMI: u32 = 4 << 8;
    pub const INIT: u32 = 5 << 8;
    pub const START_UP: u32 = 6 << 8;
}

/// The vector that spurious interrupts arrive at.
pub const SPURIOUS_VECTOR: u8 = 0xFF;

fn register(offset: u64) -> *mut u32 {
    // SAFETY: every processor in long mode has this MSR.
    let base = unsafe { rdmsr(IA32_APIC_BASE) } & 0x000F_FFFF_FFFF_F000;
    (base + offset) as *mut u32
}

fn read(offset: u64) -> u32 {
    // SAFETY: the APIC's page lies below 4 GiB, mapped to itself; these registers have no effect when read.
    unsafe { register(offset).read_volatile() }
}

fn write(offset: u64, value: u32) {
    // SAFETY: as in `read`; the callers below write what the registers define.
    unsafe { register(offset).write_volatile(value) }
}

/// This processor's identifier.
pub fn id() -> u32 {
    read(ID) >> 24
}

/// Lets this processor's APIC take interrupts.
pub fn enable() {
    write(SPURIOUS, 1 << 8 | u32::from(SPURIOUS_VECTOR));
}

/// The interrupt being handled is done.
pub fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Has the timer send `vector` to this processor once, after 16 times `ticks` of its clock; 0 stops it.
pub fn one_shot(vector: u8, ticks: u32) {
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    write(TIMER_VECTOR, u32::from(vector) | if ticks == 0 { MASKED } else { 0 });
    write(TIMER_COUNT, ticks);
}

fn send(destination: u32, low: u32) {
    write(COMMAND_HIGH, destination << 24);
    write(COMMAND_LOW, low);
    while read(COMMAND_LOW) & command::PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Sends `vector` to the processor with `apic_id`.
pub fn send_interrupt(apic_id: u32, vector: u8) {
    send(apic_id, command::ASSERT | u32::from(vector));
}

/// Sends an NMI to the processor with `apic_id`.
pub fn send_nmi(apic_id: u32) {
    send(apic_id, command::ASSERT | command::NMI);
}

/// Sends INIT to every other processor.
pub(crate) fn send_init_to_others() {
    send(0, command::ALL_BUT_SELF | command::ASSERT | command::INIT);
}

/// Starts every other processor in real mode at `page * 4096`.
pub(crate) fn send_start_up_to_others(page: u8) {
    send(0, command::ALL_BUT_SELF | command::ASSERT | command::START_UP | u32::from(page));
}
