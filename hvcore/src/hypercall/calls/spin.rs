//! HvCallNotifyLongSpinWait (TLFS, "Scheduler Hypercalls").

use super::super::{Answer, Declaration, Hypercall, Input, Output, Privileges};
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::inputs;

/// Serves HvCallNotifyLongSpinWait.
pub trait LongSpinWait {
    /// The caller has spun `spins` times: others may run meanwhile.
    fn notify_long_spin_wait(&mut self, spins: u32) -> Answer;
}

/// HvCallNotifyLongSpinWait, 0x0008. Its 8 bytes of input fit a fast call of any caller.
#[derive(Clone, Copy, Debug)]
pub struct NotifyLongSpinWait;

impl Declaration for NotifyLongSpinWait {
    const CODE: CallCode = CallCode::NOTIFY_LONG_SPIN_WAIT;
    const NEEDS: Privileges = Privileges::LONG_SPIN_WAIT;
    type Header = inputs::NotifyLongSpinWait;
    type Element = u64;
}

impl<H: LongSpinWait + ?Sized> Hypercall<H> for NotifyLongSpinWait {
    #[inline]
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        host.notify_long_spin_wait(input.header().spin_count)
    }
}
