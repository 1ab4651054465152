//! Links only when no public function of the library crates can panic: the panic handler calls a function that does
//! not exist. `cargo xtask test --only no-panic` builds it with `--cfg probe`; without, it is an empty program.
//!
//! Functions that are not generic come from a list that xtask makes. A generic one is named here, with the types that
//! stand for an embedder: their answers are opaque to the optimiser, as an embedder's are. A function whose address is
//! kept is compiled on its own, knowing nothing of its arguments.
#![cfg_attr(probe, no_std, no_main)]

#[cfg(probe)]
mod embedder;
#[cfg(probe)]
mod of_hvcore;
#[cfg(probe)]
mod of_nsvm;
#[cfg(probe)]
mod of_nvmx;
#[cfg(probe)]
mod of_tlfs_abi;

#[cfg(probe)]
mod plain {
    include!(env!("PROBE_LIST"));
}

// For the start-up code and memcpy, which a program without std does not link by itself.
#[cfg(probe)]
#[link(name = "c")]
unsafe extern "C" {}

/// Keeps the function at `address` in the program.
#[cfg(probe)]
fn keep(address: *const ()) {
    core::hint::black_box(address);
}

/// Keeps each function, and gives the name under which xtask looks for it.
#[cfg(probe)]
#[macro_export]
macro_rules! keep_named {
    ($($name:literal: $function:expr;)*) => { $( let _ = $name; $crate::keep($function as *const ()); )* };
}

#[cfg(probe)]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    plain::keep_all();
    of_tlfs_abi::keep_all();
    of_hvcore::keep_all();
    of_nvmx::keep_all();
    of_nsvm::keep_all();
    #[cfg(feature = "control")]
    keep(control as *const ());
    0
}

/// Panics for an index that the compiler cannot know.
#[cfg(all(probe, feature = "control"))]
fn control(index: usize) -> u8 {
    [1, 2, 3][index]
}

#[cfg(probe)]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn a_panic_is_reachable() -> !;
    }
    // SAFETY: never executed: with this call in the program it does not link.
    unsafe { a_panic_is_reachable() }
}

/// Named by the unwind tables of the precompiled `core`; never called.
#[cfg(probe)]
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[cfg(not(probe))]
fn main() {
    println!("nothing to run: `cargo xtask test --only no-panic` links this program in its own way");
}
