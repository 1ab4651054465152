//! Set-up: finds the tools a command needs and, on Debian and Ubuntu, installs the missing ones with apt-get.
//!
//! Each command asks for what it needs just before it needs it, so nobody installs an emulator to check the format.

use crate::ctx::{Ctx, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// A program or file from outside, and the Debian packages that bring it.
pub struct Tool {
    /// What people call it.
    pub name: &'static str,
    /// Present when this program is on PATH, or, with a leading `/`, when this file exists.
    pub probe: &'static str,
    /// Debian packages to install when it is missing.
    pub packages: &'static [&'static str],
}

/// The emulator of AMD-V machines.
#[allow(dead_code)]
pub const QEMU: &[Tool] =
    &[Tool { name: "QEMU", probe: "qemu-system-x86_64", packages: &["qemu-system-x86", "seabios"] }];

/// Instruction counting.
#[allow(dead_code)]
pub const VALGRIND: &[Tool] = &[
    Tool { name: "valgrind", probe: "valgrind", packages: &["valgrind"] },
    // What valgrind needs to recognise the C library's functions.
    Tool { name: "the C library's symbols", probe: "/usr/lib/debug/.build-id", packages: &["libc6-dbg"] },
];

/// The emulator of Intel VT-x machines.
#[allow(dead_code)]
pub const BOCHS: &[Tool] = &[
    Tool { name: "Bochs", probe: "bochs", packages: &["bochs"] },
    Tool { name: "Bochs's BIOS", probe: "/usr/share/bochs/BIOS-bochs-latest", packages: &["bochsbios"] },
    Tool { name: "Bochs's VGA BIOS", probe: "/usr/share/bochs/VGABIOS-lgpl-latest", packages: &["vgabios"] },
    Tool {
        name: "Bochs's terminal display",
        probe: "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
        packages: &["bochs-term"],
    },
];

/// Making a bootable disk for Bochs.
#[allow(dead_code)]
pub const GRUB: &[Tool] = &[
    Tool { name: "grub-mkrescue", probe: "grub-mkrescue", packages: &["grub-common"] },
    Tool { name: "GRUB for BIOS", probe: "/usr/lib/grub/i386-pc/kernel.img", packages: &["grub-pc-bin"] },
    Tool { name: "xorriso", probe: "xorriso", packages: &["xorriso"] },
    Tool { name: "mtools", probe: "mformat", packages: &["mtools"] },
];

/// True when `program` is on PATH.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn present(tool: &Tool) -> bool {
    if tool.probe.starts_with('/') { Path::new(tool.probe).exists() } else { on_path(tool.probe) }
}

/// Makes sure that all `tools` are there: installs the missing ones, or says how to.
#[allow(dead_code)]
pub fn need(ctx: &Ctx, tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|t| !present(t)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|t| t.name).collect::<Vec<_>>().join(", ");
    let packages = missing.iter().flat_map(|t| t.packages).copied().collect::<Vec<_>>();
    let list = packages.join(" ");
    if !on_path("apt-get") {
        return Err(format!("{names} missing: install what your system calls the Debian packages {list}").into());
    }
    let sudo = if is_root() { "" } else { "sudo " };
    if ctx.no_install {
        return Err(format!("{names} missing, and --no-install given: run `{sudo}apt-get install {list}`").into());
    }
    println!("set-up: installing {list} with apt-get");
    apt_update(sudo)?;
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(&packages);
    apt_get(sudo, &args)?;
    match missing.iter().find(|t| !present(t)) {
        Some(tool) => Err(format!("{} is still missing after installing {list}: {}", tool.name, tool.probe).into()),
        None => Ok(()),
    }
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|out| out.stdout.trim_ascii() == b"0")
}

/// Runs `apt-get update`, unless this run has done so.
pub fn refresh_package_lists() -> Result<()> {
    apt_update(if is_root() { "" } else { "sudo " })
}

fn apt_update(sudo: &str) -> Result<()> {
    // Once per run of xtask. Relaxed: one thread does the set-up, and running it twice would do no harm.
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    println!("set-up: refreshing the package lists with apt-get update");
    apt_get(sudo, &["update"])
}

fn apt_get(sudo: &str, args: &[&str]) -> Result<()> {
    // `env` because sudo drops the caller's environment.
    let mut words = vec!["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"];
    words.extend(args);
    if !sudo.is_empty() {
        words.insert(0, "sudo");
    }
    let command = words.join(" ");
    let out = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot run `{command}`: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    let last = text.lines().last().unwrap_or("no message").to_string();
    Err(format!("`{command}` failed ({last}): run it by hand, then try again").into())
}

/// Makes sure that rustup's toolchain has `target`: `Ok(false)` when it is not there and cannot be had.
pub fn rust_target(ctx: &Ctx, target: &str) -> Result<bool> {
    rustup_has(ctx, "target", target)
}

/// Makes sure that rustup's toolchain has `component`: `Ok(false)` when it is not there and cannot be had.
pub fn rust_component(ctx: &Ctx, component: &str) -> Result<bool> {
    rustup_has(ctx, "component", component)
}

/// Makes sure that rustup has the toolchain `version`: `Ok(false)` when it is not there and cannot be had.
pub fn rust_toolchain(ctx: &Ctx, version: &str) -> Result<bool> {
    let Ok(out) = Command::new("rustup").args(["toolchain", "list"]).output() else { return Ok(false) };
    if String::from_utf8_lossy(&out.stdout).lines().any(|l| l.starts_with(&format!("{version}-"))) {
        return Ok(true);
    }
    if ctx.no_install {
        return Ok(false);
    }
    println!("set-up: rustup toolchain install {version}");
    let install = ["toolchain", "install", version, "--profile", "minimal", "--no-self-update"];
    Ok(Command::new("rustup").args(install).output().is_ok_and(|out| out.status.success()))
}

fn rustup_has(ctx: &Ctx, kind: &str, name: &str) -> Result<bool> {
    let Ok(out) = Command::new("rustup").args([kind, "list", "--installed"]).output() else { return Ok(false) };
    // Components are listed with the host's triple behind them.
    if String::from_utf8_lossy(&out.stdout).lines().any(|l| l == name || l.starts_with(&format!("{name}-"))) {
        return Ok(true);
    }
    if ctx.no_install {
        return Ok(false);
    }
    println!("set-up: rustup {kind} add {name}");
    Ok(Command::new("rustup").args([kind, "add", name]).output().is_ok_and(|out| out.status.success()))
}
