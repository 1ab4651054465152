//! Checks the runtime and, on real processor registers, the library. The command line says which: `test=NAME`.
#![cfg_attr(freestanding, no_std, no_main)]
#![cfg_attr(not(freestanding), allow(dead_code, reason = "a hosted build is for lints and documentation"))]

mod boot;
mod caller;
mod ending;
mod host;
mod hypercall;
mod kick;
mod vmx;

// Linked so that an image with all four shows that they need no operating system.
use nsvm as _;
use rt::{BootInfo, ExitCode, println};

rt::entry!(image);

fn image(boot: &'static BootInfo) -> ExitCode {
    let test = boot.argument("test").unwrap_or("boot");
    println!("selftest: {test}");
    match test {
        "boot" => boot::run(boot),
        "hypercall" => hypercall::run(boot),
        "vmx" => vmx::run(boot),
        "kick" => kick::run(boot),
        "unhandled" => boot::unhandled_exception(),
        "nested" => boot::nested_fault(),
        "panic" => panic!("as asked"),
        "power-off" => ending::power_off(),
        "reset" => ending::reset(),
        "triple-fault" => ending::triple_fault(),
        "hang" => ending::hang(),
        _ => {
            println!("no such test");
            ExitCode::Failure
        }
    }
}
