//! Linux as L1: a Debian kernel and an initial RAM disk made of Debian packages and of `examples/linux`.
//!
//! Packages are named and pinned in `examples/linux/packages.txt`. They are downloaded and unpacked below
//! `target/linux`, once per version; nothing is installed into the system.

use crate::ctx::{Ctx, Log, Result};
use crate::initrd::Archive;
use crate::setup;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::cmd;

const PACKAGES: &str = "examples/linux/packages.txt";
/// Modules of KVM, in the order in which they are loaded; of the last two the processor's own.
const MODULES: &[&str] = &["irqbypass", "kvm", "kvm-amd", "kvm-intel"];

/// Scripts of `examples/linux`.
const SCRIPTS: &[&str] = &["init", "kvm.sh", "linux.sh"];
/// Programs of `examples/linux`.
const PROGRAMS: &[&str] = &["launcher"];

/// The package of the emulator that L1 runs.
const QEMU: &str = "qemu-system-x86";
/// What it needs beside libraries.
const QEMU_FILES: &[&str] =
    &["usr/share/seabios/bios-256k.bin", "usr/share/qemu/kvmvapic.bin", "usr/share/qemu/linuxboot_dma.bin"];

/// What a Linux L1 boots.
pub struct Linux {
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The one with QEMU and a second Linux in it, when it was asked for.
    pub qemu_initrd: Option<PathBuf>,
}

/// `Ok(Err(reason))` where the packages do not exist.
pub type Prepared = std::result::Result<Linux, String>;

/// One line of the list of packages.
#[derive(Debug, PartialEq, Eq)]
struct Pin<'a> {
    package: &'a str,
    version: &'a str,
    series: Option<&'a str>,
    /// With all that it depends on.
    closure: bool,
}

/// A package that has been unpacked.
struct Unpacked {
    package: String,
    root: PathBuf,
}

/// Downloads and unpacks what is missing, and makes the initial RAM disks.
pub fn prepare(ctx: &Ctx, log: &mut Log, with_qemu: bool) -> Result<Prepared> {
    let list = fs::read_to_string(ctx.root.join(PACKAGES))?;
    let mut unpacked = Vec::new();
    for pin in pins(&list).filter(|pin| with_qemu || pin.package != QEMU) {
        match unpack(ctx, log, &pin)? {
            Ok(package) => unpacked.push(package),
            Err(reason) => return Ok(Err(reason)),
        }
    }
    let root = |name: &str| {
        let found = unpacked.iter().find(|u| u.package.starts_with(name));
        found.ok_or_else(|| format!("{PACKAGES} names no package {name}"))
    };
    let (kernel, busybox) = (root("linux-image-")?, root("busybox-static")?.root.join("bin/busybox"));
    let release = kernel.package.trim_start_matches("linux-image-");
    let image = kernel.root.join(format!("boot/vmlinuz-{release}"));
    let scripts = ctx.root.join("examples/linux");
    let programs = build_programs(ctx, log)?;
    let mut archive = Archive::default();
    for script in SCRIPTS {
        archive.copy(script, &scripts.join(script))?;
    }
    for program in PROGRAMS {
        archive.copy(&format!("bin/{program}"), &programs.join(program))?;
    }
    archive.copy("bin/busybox", &busybox)?;
    for module in MODULES {
        let path = find(&kernel.root.join("lib/modules").join(release), &format!("{module}.ko"))?;
        archive.copy(&format!("lib/modules/{module}.ko"), &path)?;
    }
    let initrd = directory(ctx)?.join("initrd.cpio");
    let qemu_initrd = if with_qemu {
        let mut inner = Archive::default();
        inner.copy("init", &scripts.join("l2-init"))?;
        inner.copy("bin/busybox", &busybox)?;
        inner.copy("bin/workload", &programs.join("workload"))?;
        let mut archive = archive.clone();
        archive.file("l2-initrd", &inner.finish());
        archive.copy("l2-kernel", &image)?;
        archive.copy("lib/libdirect_flush.so", &build_library(ctx, log)?)?;
        add_qemu(&mut archive, &root(QEMU)?.root)?;
        let path = directory(ctx)?.join("initrd-qemu.cpio");
        fs::write(&path, archive.finish())?;
        Some(path)
    } else {
        None
    };
    fs::write(&initrd, archive.finish())?;
    Ok(Ok(Linux { kernel: image, initrd, qemu_initrd }))
}

/// Adds QEMU, the libraries that it needs, and the firmware of its PC.
fn add_qemu(archive: &mut Archive, root: &Path) -> Result<()> {
    let program = root.join("usr/bin/qemu-system-x86_64");
    archive.copy("usr/bin/qemu-system-x86_64", &program)?;
    // The packages' own loader says which of the packages' libraries the program needs.
    let directories = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|d| root.join(d));
    let loader = directories[0].join("ld-linux-x86-64.so.2");
    let path = directories.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(":");
    let out = Command::new(&loader).args(["--library-path", &path, "--list"]).arg(&program).output();
    let out = out.map_err(|e| format!("cannot run {}: {e}", loader.display()))?;
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let file = rest.split(" (").next().unwrap_or(rest);
        if !Path::new(file).starts_with(root) {
            return Err(format!("{name} is in none of the packages: {rest}").into());
        }
        archive.copy(&format!("lib/x86_64-linux-gnu/{name}"), Path::new(file))?;
    }
    archive.copy("lib64/ld-linux-x86-64.so.2", &loader)?;
    for file in QEMU_FILES {
        archive.copy(file, &root.join(file))?;
    }
    Ok(())
}

/// Builds the library that is loaded before QEMU, for the C library that QEMU uses.
fn build_library(ctx: &Ctx, log: &mut Log) -> Result<PathBuf> {
    let (sh, directory, target) = (&ctx.sh, directory(ctx)?.join("programs"), "x86_64-unknown-linux-gnu");
    log.run(cmd!(sh, "cargo build --release -p linux-guest --lib --target {target} --target-dir {directory}"))?;
    Ok(directory.join(target).join("release/libdirect_flush.so"))
}

/// Builds the programs, statically linked, and says where they are.
fn build_programs(ctx: &Ctx, log: &mut Log) -> Result<PathBuf> {
    let musl = "x86_64-unknown-linux-musl";
    let target = if setup::rust_target(ctx, musl)? { musl } else { "x86_64-unknown-linux-gnu" };
    let (sh, directory) = (&ctx.sh, directory(ctx)?.join("programs"));
    let build = cmd!(sh, "cargo build --release -p linux-guest --bins --target {target} --target-dir {directory}");
    log.run(build.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static"))?;
    Ok(directory.join(target).join("release"))
}

/// `target/linux`, created.
fn directory(ctx: &Ctx) -> Result<PathBuf> {
    let path = ctx.root.join("target/linux");
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn pins(list: &str) -> impl Iterator<Item = Pin<'_>> {
    list.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (package, version, third) = (words.next()?, words.next()?, words.next());
        Some(Pin { package, version, series: third.filter(|word| *word != "+"), closure: third == Some("+") })
    })
}

/// Gets the pinned version, or else the newest.
fn unpack(ctx: &Ctx, log: &mut Log, pin: &Pin<'_>) -> Result<std::result::Result<Unpacked, String>> {
    let have = |package: &str, version: &str| -> Result<Option<Unpacked>> {
        let root = directory(ctx)?.join(place(package, version));
        Ok(root.is_dir().then(|| Unpacked { package: package.to_string(), root }))
    };
    if let Some(unpacked) = have(pin.package, pin.version)? {
        return Ok(Ok(unpacked));
    }
    let absent = |tool: &str| Ok(Err(format!("no Debian package {}: there is no {tool}", pin.package)));
    for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
        if !setup::on_path(tool) {
            return absent(tool);
        }
    }
    if !offered(pin.package, pin.version) && !ctx.no_install {
        setup::refresh_package_lists()?;
    }
    let (package, version) = if offered(pin.package, pin.version) {
        (pin.package.to_string(), pin.version.to_string())
    } else {
        match newest(pin) {
            Some(found) => found,
            None => return Ok(Err(format!("no Debian package {} (apt-cache does not know it)", pin.package))),
        }
    };
    if let Some(unpacked) = have(&package, &version)? {
        return Ok(Ok(unpacked));
    }
    let others = if pin.closure { dependencies(&package) } else { Vec::new() };
    download(ctx, log, &package, &version, &others)?;
    let unpacked = have(&package, &version)?;
    Ok(Ok(unpacked.ok_or_else(|| format!("{package} {version} was not unpacked"))?))
}

/// The name of a package's directory. Without colons, which separate directories in paths.
fn place(package: &str, version: &str) -> String {
    format!("{package}_{}", version.replace(':', "%3a"))
}

/// Downloads and unpacks into a directory that gets its name when it is whole.
fn download(ctx: &Ctx, log: &mut Log, package: &str, version: &str, others: &[String]) -> Result<()> {
    println!("set-up: downloading {package} {version} and {} others", others.len());
    let parent = directory(ctx)?;
    let temporary = parent.join(format!("{package}.part"));
    let _ = fs::remove_dir_all(&temporary);
    let (debs, root) = (temporary.join("deb"), temporary.join("root"));
    fs::create_dir_all(&debs)?;
    // As root, apt-get would hand the download to a user who may not write here.
    let options = ["-qq", "-o", "APT::Sandbox::User=root", "download"];
    let mut command = Command::new("apt-get");
    log.run({
        command.current_dir(&debs).args(options).arg(format!("{package}={version}")).args(others);
        command
    })?;
    for deb in fs::read_dir(&debs)? {
        let mut command = Command::new("dpkg-deb");
        command.arg("-x").arg(deb?.path()).arg(&root);
        log.run(command)?;
    }
    fs::rename(&root, parent.join(place(package, version)))?;
    fs::remove_dir_all(&temporary)?;
    Ok(())
}

/// True when this version can be downloaded.
fn offered(package: &str, version: &str) -> bool {
    apt_cache(&["show", "--no-all-versions", &format!("{package}={version}")]).is_some()
}

/// The newest version, of the package that the series depends on when there is one.
fn newest(pin: &Pin<'_>) -> Option<(String, String)> {
    let package = match pin.series {
        None => pin.package.to_string(),
        Some(series) => first_dependency(&apt_cache(&["depends", series])?)?,
    };
    let version = candidate(&apt_cache(&["policy", &package])?)?;
    Some((package, version))
}

/// All packages that `package` depends on, directly or not.
fn dependencies(package: &str) -> Vec<String> {
    let leave_out =
        ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"].map(|r| format!("--no-{r}"));
    let mut args = vec!["depends", "--recurse"];
    args.extend(leave_out.iter().map(String::as_str));
    args.push(package);
    names(&apt_cache(&args).unwrap_or_default(), package)
}

/// The packages whose dependencies are listed, without `itself`: their names stand at the beginning of a line, those
/// of packages that do not exist in angle brackets.
fn names(depends: &str, itself: &str) -> Vec<String> {
    let mut names: Vec<_> =
        depends.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_alphanumeric())).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().filter(|name| *name != itself).map(String::from).collect()
}

fn first_dependency(depends: &str) -> Option<String> {
    depends.lines().find_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_string()))
}

fn candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_string())
}

/// What apt-cache prints, when it succeeds and prints something.
fn apt_cache(args: &[&str]) -> Option<String> {
    let out = Command::new("apt-cache").args(args).env("LC_ALL", "C").output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success() && !text.trim().is_empty()).then_some(text)
}

/// The file `name` somewhere below `directory`.
fn find(directory: &Path, name: &str) -> Result<PathBuf> {
    let mut left = vec![directory.to_path_buf()];
    while let Some(next) = left.pop() {
        let entries = fs::read_dir(&next).map_err(|e| format!("cannot read {}: {e}", next.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                left.push(entry.path());
            } else if entry.file_name() == name {
                return Ok(entry.path());
            }
        }
    }
    Err(format!("no {name} below {}", directory.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_have_a_version_and_maybe_a_series() {
        let found: Vec<_> = pins("# a comment\nkernel 6.1 series\n\nbusybox 1:2\nqemu 7 +\n").collect();
        let busybox = Pin { package: "busybox", version: "1:2", series: None, closure: false };
        let kernel = Pin { package: "kernel", version: "6.1", series: Some("series"), closure: false };
        assert_eq!(found, [kernel, busybox, Pin { package: "qemu", version: "7", series: None, closure: true }]);
    }

    #[test]
    fn apt_cache_is_understood() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Suggests: x\n";
        assert_eq!(first_dependency(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        let recursive =
            "qemu\n  Depends: libc6\n  Depends: <virtual>\nlibc6\n  Depends: libgcc\nlibgcc\n<virtual>\n    x\n";
        assert_eq!(names(recursive, "qemu"), ["libc6", "libgcc"]);
        assert_eq!(candidate("a:\n  Installed: (none)\n  Candidate: 1:2-3\n").as_deref(), Some("1:2-3"));
        assert_eq!(candidate("a:\n  Installed: (none)\n  Candidate: (none)\n"), None);
    }
}
