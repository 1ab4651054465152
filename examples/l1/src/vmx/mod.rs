//! This hypervisor on VT-x: its guests are described by a VMCB all the same, which is translated to a VMCS before each
//! run, and the exit back.
//!
//! So one source of a scenario serves both vendors where both can do what it does. The VMCS is a plain one, or an
//! enlightened one for a guest that was described to a Hyper-V host (`hyperv::describe`).

mod from_exit;
mod side;
mod to_vmcs;

pub use from_exit::OTHER;
pub use side::{Fields, Side, enable, forget_current};

use core::sync::atomic::{AtomicBool, Ordering};

/// Set once at boot, before other processors start: Relaxed.
static VMX: AtomicBool = AtomicBool::new(false);

/// True when this hypervisor runs on VT-x.
pub fn is_on() -> bool {
    VMX.load(Ordering::Relaxed)
}

fn set_on() {
    VMX.store(true, Ordering::Relaxed);
}

/// Declares a guest program with a hypercall in it: VMMCALL or VMCALL, whichever this processor has.
#[macro_export]
macro_rules! hypercall_program {
    ($(#[$doc:meta])* $name:ident, [$($before:literal),*], [$($after:literal),*]) => {
        $(#[$doc])*
        fn $name() -> unsafe extern "C" fn() {
            #[unsafe(naked)]
            unsafe extern "C" fn svm() {
                core::arch::naked_asm!($($before,)* "vmmcall", $($after,)*)
            }
            #[unsafe(naked)]
            unsafe extern "C" fn vmx() {
                core::arch::naked_asm!($($before,)* "vmcall", $($after,)*)
            }
            if $crate::vmx::is_on() { vmx } else { svm }
        }
    };
}
