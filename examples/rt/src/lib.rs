//! The runtime of the bare-metal images: what stands between the boot loader and an image's `main`.
//!
//! An image is a crate with one line of attributes and one of entry:
//!
//! ```text
//! #![cfg_attr(freestanding, no_std, no_main)]
//! rt::entry!(image);
//! fn image(boot: &'static rt::BootInfo) -> rt::ExitCode { rt::println!("hello"); rt::ExitCode::Success }
//! ```
//!
//! `cargo xtask qemu-test` builds it with `--cfg freestanding`, for `x86_64-unknown-none` or, where that target cannot
//! be had, for the host's own Linux target. Without the cfg the crates are ordinary ones: lints, documentation and unit
//! tests of the parts that touch no hardware run on the host.
//!
//! The machine at `main`: long mode, the first 4 GiB mapped to themselves with 2 MiB pages, SSE on, interrupts off,
//! one processor, its GDT, TSS and IDT loaded, every exception reported and fatal unless a handler is registered.
//! This crate is a hardware layer: here, and in the images, `unsafe` is allowed, each use with its reason.
#![cfg_attr(not(test), no_std)]
#![cfg(target_arch = "x86_64")]

pub mod apic;
pub mod cpu;
pub mod exit;
pub mod frames;
pub mod idt;
pub mod multiboot;
pub mod serial;
pub mod smp;

#[cfg(freestanding)]
mod boot;
#[cfg(all(freestanding, target_os = "linux"))]
mod host_target;

pub use exit::ExitCode;
pub use multiboot::BootInfo;

/// Declares the image's main function, a `fn(&'static BootInfo) -> ExitCode`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[cfg(freestanding)]
        #[unsafe(no_mangle)]
        extern "Rust" fn rt_main(boot: &'static $crate::BootInfo) -> $crate::ExitCode {
            $main(boot)
        }

        #[cfg(not(freestanding))]
        fn main() {
            let _: fn(&'static $crate::BootInfo) -> $crate::ExitCode = $main;
            eprintln!("a bare-metal image: build and run it with `cargo xtask qemu-test`");
            std::process::exit(1);
        }
    };
}
