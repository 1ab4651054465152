//! Checks the runtime and, on real processor registers, the library. The command line says which: `test=NAME`.
#![cfg_attr(freestanding, no_std, no_main)]
#![cfg_attr(not(freestanding), allow(dead_code, reason = "a hosted build is for lints and documentation"))]

mod boot;

use rt::{BootInfo, ExitCode, println};

rt::entry!(image);

fn image(boot: &'static BootInfo) -> ExitCode {
    let test = boot.argument("test").unwrap_or("boot");
    println!("selftest: {test}");
    match test {
        "boot" => boot::run(boot),
        "unhandled" => boot::unhandled_exception(),
        "nested" => boot::nested_fault(),
        "panic" => panic!("as asked"),
        _ => {
            println!("no such test");
            ExitCode::Failure
        }
    }
}
