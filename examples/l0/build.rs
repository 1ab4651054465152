//! Places the image: L1 loads at 1 MiB, so L0 lies above; and L0 runs at the top of the virtual address space, where no
//! address is one of L1's physical memory by chance.

/// Where the boot loader puts the image.
const BASE: u64 = 64 << 20;
/// Virtual minus physical address of the image until it moves. `src/relocate.rs` has it from here.
const OFFSET: u64 = 0xffff_ffff_8000_0000;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let freestanding = std::env::var_os("CARGO_CFG_FREESTANDING").is_some();
    println!("cargo:rustc-env=IMAGE_OFFSET={:x}", if freestanding { OFFSET } else { 0 });
    if !freestanding {
        return;
    }
    // A linker driver (the host's target) passes linker options on behind -Wl.
    let driver = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os != "none");
    let prefix = if driver { "-Wl," } else { "" };
    println!("cargo:rustc-link-arg-bins={prefix}--defsym=__image_base={BASE:#x}");
    println!("cargo:rustc-link-arg-bins={prefix}--defsym=__image_offset={OFFSET:#x}");
}
