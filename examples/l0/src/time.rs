//! The machine's clocks: how fast the time stamp counter and the local APIC's timer go, and the partition's reference
//! time, which counts 100 ns from L0's start.
//!
//! Measured once at boot, before L1 has the timers; the MSR exits read it.

use hvcore::partition::ReferenceTsc;
use hw::apic::LocalApic;
use hw::{cpu, port};

/// Input clock of the 8254 timer in Hz.
const PIT_HZ: u64 = 1_193_182;
/// Its ticks in one measurement: 10 ms.
const PIT_TICKS: u16 = 11_932;
/// Measurements; the fastest one counts, the others were disturbed.
const TRIES: usize = 3;
/// The reference time's units per second.
const UNITS: u64 = 10_000_000;
/// The local APIC's timer: local vector masked, divisor 1.
const TIMER_MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0xb;

/// How fast the clocks go.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The time stamp counter, Hz.
    pub tsc: u64,
    /// The local APIC's timer, Hz.
    pub apic: u64,
    /// The time stamp counter goes at the same speed always and on all processors.
    pub constant: bool,
    /// The reference time as the TSC page says it.
    pub page: ReferenceTsc,
}

impl Clocks {
    /// Measures them. `constant` is somebody's word that the counter is constant where CPUID does not say so.
    pub fn measure(apic: &LocalApic, constant: bool) -> Self {
        let ticks = (0..TRIES).map(|_| one_try(apic)).min().unwrap_or((1, 1));
        let hz = |ticks: u64| (u128::from(ticks) * u128::from(PIT_HZ) / u128::from(PIT_TICKS)) as u64;
        let (tsc, apic) = (hz(ticks.0).max(UNITS + 1), hz(ticks.1));
        let scale = ((u128::from(UNITS) << 64) / u128::from(tsc)) as u64;
        let page = ReferenceTsc { scale, offset: -(scaled(cpu::rdtsc(), scale) as i64) };
        Self { tsc, apic, constant: constant || is_constant(), page }
    }

    /// The reference time, by the page's formula, so that who reads the MSR and who reads the page agree.
    pub fn now(&self) -> u64 {
        scaled(cpu::rdtsc(), self.page.scale).wrapping_add_signed(self.page.offset)
    }
}

const fn scaled(tsc: u64, scale: u64) -> u64 {
    ((tsc as u128 * scale as u128) >> 64) as u64
}

/// The time stamp counter is one clock for all processors: CPUID says so, or this is QEMU's emulation, where it is.
fn is_constant() -> bool {
    const INVARIANT_TSC: u32 = 1 << 8;
    let power = cpu::cpuid(0x8000_0000, 0).eax >= 0x8000_0007;
    let emulator = cpu::cpuid(0x4000_0000, 0);
    power && cpu::cpuid(0x8000_0007, 0).edx & INVARIANT_TSC != 0
        || [emulator.ebx, emulator.ecx, emulator.edx]
            == [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")]
}

/// Ticks of the time stamp counter and of the local APIC's timer while channel 2 of the 8254 counts down.
fn one_try(apic: &LocalApic) -> (u64, u64) {
    const CONTROL: u16 = 0x61;
    const OUTPUT: u8 = 1 << 5;
    let [low, high] = PIT_TICKS.to_le_bytes();
    // SAFETY: the 8254's channel 2, whose gate and output are in port 0x61, and the APIC's timer with its interrupt
    // masked: nothing else uses them yet, and both are left stopped.
    unsafe {
        let control = port::inb(CONTROL);
        // Gate on, speaker off; channel 2, both bytes, mode 0: the output rises when the count has reached 0.
        port::outb(CONTROL, control & !2 | 1);
        port::outb(0x43, 0b1011_0000);
        apic.write(0x320, TIMER_MASKED);
        apic.write(0x3e0, DIVIDE_BY_1);
        port::outb(0x42, low);
        apic.write(0x380, u32::MAX);
        port::outb(0x42, high);
        let start = cpu::rdtsc();
        while port::inb(CONTROL) & OUTPUT == 0 {
            core::hint::spin_loop();
        }
        let ticks = cpu::rdtsc().wrapping_sub(start);
        let left = apic.read(0x390);
        apic.write(0x380, 0);
        port::outb(CONTROL, control);
        (ticks, u64::from(u32::MAX - left))
    }
}
