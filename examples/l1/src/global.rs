//! Values in static memory whose one user at a time is known by construction.

use core::cell::UnsafeCell;

/// A static value that one processor uses at a time. The scenarios keep that rule: each runs on the boot processor, or
/// gives every processor values of its own.
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: see the rule above; the image has no preemption and no interrupt handler that touches these values.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value, for the one user that it has at this time.
    #[allow(clippy::mut_from_ref)]
    pub fn get(&self) -> &mut T {
        // SAFETY: by the rule of this type there is no other user now.
        unsafe { &mut *self.0.get() }
    }
}
