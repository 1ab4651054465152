//! L1's VMX-preemption timer: in hardware where the processor has one that the embedder does not use itself, else in
//! software, with the embedder as the clock.
//!
//! The software timer counts what the embedder reports with [`NestedVmx::timer_elapsed`]: nothing here reads a clock.

use crate::controls::{exit, pin};
use crate::state::NestedVmx;

/// The timer of the L2 that runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timer {
    /// VMCS02's timer is L1's.
    hardware: bool,
    /// What is left of the software timer; `None` while it is off.
    left: Option<u32>,
    /// The hardware timer's value while the library uses the timer for an exit of its own.
    held: Option<u32>,
    /// The next exit by the timer is the library's.
    forced: bool,
}

impl Timer {
    /// Decides which timer L1's is: hardware's needs to be saved at exits, and not to be the embedder's.
    pub(crate) const fn choose(&mut self, own_pin: u32, host_pin: u32, host_exit: u32) -> bool {
        self.hardware = own_pin & pin::PREEMPTION_TIMER == 0
            && host_pin & pin::PREEMPTION_TIMER != 0
            && host_exit & exit::SAVE_PREEMPTION_TIMER != 0;
        self.hardware
    }

    /// True when VMCS02's timer is L1's, or could be.
    pub(crate) const fn in_hardware(&self) -> bool {
        self.hardware
    }

    /// VM entry of L1's: the timer starts with `value`, or is off.
    pub(crate) const fn start(&mut self, value: Option<u32>) {
        self.left = if self.hardware { None } else { value };
        self.held = None;
        self.forced = false;
    }

    /// What is left of the software timer.
    pub(crate) const fn left(&self) -> Option<u32> {
        self.left
    }

    /// True when the software timer has run out.
    pub(crate) const fn expired(&self) -> bool {
        matches!(self.left, Some(0))
    }

    /// The library takes the hardware timer for an exit right after the next entry; `value` is what L1's stands at.
    pub(crate) const fn force(&mut self, value: Option<u32>) {
        if !self.forced {
            self.forced = true;
            self.held = value;
        }
    }

    /// True when the timer was taken for an exit of the library's own.
    pub(crate) const fn forced(&self) -> bool {
        self.forced
    }

    /// The library's use of the timer ends: what L1's stands at, if it has one.
    pub(crate) const fn release(&mut self) -> Option<u32> {
        self.forced = false;
        self.held.take()
    }
}

impl NestedVmx {
    /// L2 ran for `ticks` of the preemption timer (the TSC shifted right by IA32_VMX_MISC bits 4:0) since the entry
    /// whose plan had a [`timer`](crate::EntryPlan::timer). Called right after the exit, before
    /// [`l2_exit`](Self::l2_exit).
    #[inline]
    pub fn timer_elapsed(&mut self, ticks: u64) {
        let timer = &mut self.l2.timer;
        if let Some(left) = timer.left {
            timer.left = Some(u64::from(left).saturating_sub(ticks) as u32);
        }
    }
}
