//! A stage of `cargo xtask test`: every exit status that `run-l1` promises, from real runs of it.

use crate::ctx::{Ctx, Log, Outcome, Result};
use crate::images::{self, Freestanding};
use crate::linux;
use crate::setup;
use std::path::PathBuf;
use std::process::Command;

/// What runs as L1.
#[derive(Clone, Copy)]
enum Kernel {
    /// The runtime's test.
    Selftest,
    /// Debian's Linux with its RAM disk.
    Linux,
    /// Something that is no kernel.
    NotOne,
}

/// A run and the status that it must end with.
struct Case {
    what: &'static str,
    extension: &'static str,
    kernel: Kernel,
    append: &'static str,
    more: &'static [&'static str],
    status: i32,
}

const SVM: Case = Case {
    what: "",
    extension: "svm",
    kernel: Kernel::Selftest,
    append: "",
    more: &["--accel", "tcg", "--timeout", "60"],
    status: 0,
};
const VMX: Case = Case { extension: "vmx", more: &["--accel", "bochs", "--timeout", "60"], ..SVM };

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { what: "L1 writes 16", append: "test=boot", status: 33, ..SVM },
    Case { what: "L1 writes 17", append: "test=panic", status: 35, ..SVM },
    Case { what: "L1 powers off", append: "test=power-off", status: 0, ..SVM },
    Case { what: "L1 resets", append: "test=reset", status: 122, ..SVM },
    Case { what: "L1 triple-faults", append: "test=triple-fault", status: 122, ..SVM },
    Case { what: "L1 does not end", append: "test=hang", more: &["--accel", "tcg", "--timeout", "3"], status: 124, ..SVM },
    Case { what: "L0 gives up", kernel: Kernel::NotOne, status: 125, ..SVM },
    Case { what: "Linux powers off", kernel: Kernel::Linux, append: "console=ttyS0 panic=-1 l1=nothing", more: &["--accel", "tcg", "--smp", "2", "--timeout", "120"], status: 0, ..SVM },
    Case { what: "Linux panics and resets", kernel: Kernel::Linux, append: "console=ttyS0 panic=-1 rdinit=/none init=/none", more: &["--accel", "tcg", "--timeout", "120"], status: 122, ..SVM },
    Case { what: "L1 writes 16", append: "test=boot", status: 33, ..VMX },
    Case { what: "L1 powers off", append: "test=power-off", status: 0, ..VMX },
    Case { what: "L1 resets", append: "test=reset", status: 122, ..VMX },
    Case { what: "L1 triple-faults", append: "test=triple-fault", status: 122, ..VMX },
    Case { what: "L1 does not end", append: "test=hang", more: &["--accel", "bochs", "--timeout", "10"], status: 124, ..VMX },
    Case { what: "L0 gives up", kernel: Kernel::NotOne, status: 125, ..VMX },
];

/// Runs all cases.
pub fn stage(ctx: &Ctx, log: &mut Log) -> Result<Outcome> {
    setup::need(ctx, setup::QEMU)?;
    setup::need(ctx, setup::BOCHS)?;
    setup::need(ctx, setup::GRUB)?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    if target == images::Target::Host {
        return Ok(Outcome::Skipped("L0 needs images for x86_64-unknown-none".into()));
    }
    let selftest = images::build(ctx, log, target)?.path("selftest");
    let linux = linux::prepare(ctx, log, false)?;
    let (mut wrong, mut skipped) = (Vec::new(), 0);
    for case in CASES {
        let (kernel, initrd): (PathBuf, Option<PathBuf>) = match (case.kernel, &linux) {
            (Kernel::Selftest, _) => (selftest.clone(), None),
            (Kernel::NotOne, _) => (ctx.root.join("README.md"), None),
            (Kernel::Linux, Ok(linux)) => (linux.kernel.clone(), Some(linux.initrd.clone())),
            (Kernel::Linux, Err(_)) => {
                skipped += 1;
                continue;
            }
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["run-l1", "--no-install", "--cpu", case.extension, "--kernel"]).arg(kernel);
        command.args(["--append", case.append]).args(case.more);
        if let Some(initrd) = initrd {
            command.arg("--initrd").arg(initrd);
        }
        let name = format!("{}: {}", case.extension, case.what);
        log.line(&name)?;
        let status = log.status(&mut command)?;
        log.line(&format!("{name}: status {status:?}, wanted {}", case.status))?;
        if status != Some(case.status) {
            wrong.push(format!("{name}: {status:?} instead of {}", case.status));
        }
    }
    match (wrong.as_slice(), skipped) {
        ([], 0) => Ok(Outcome::PassedWith(format!("{} runs", CASES.len()))),
        ([], n) => Ok(Outcome::PassedWith(format!("{} runs, {n} skipped without Debian's Linux", CASES.len() - n))),
        (wrong, _) => Err(wrong.join("; ").into()),
    }
}
