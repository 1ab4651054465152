//! Places the image: L1 loads at 1 MiB, so L0 lies above.

/// Where the image is linked and loaded.
const BASE: u64 = 64 << 20;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_CFG_FREESTANDING").is_none() {
        return;
    }
    // A linker driver (the host's target) passes linker options on behind -Wl.
    let driver = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os != "none");
    let prefix = if driver { "-Wl," } else { "" };
    println!("cargo:rustc-link-arg-bins={prefix}--defsym=__image_base={BASE:#x}");
}
