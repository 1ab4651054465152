//! Builds the bare-metal images of `examples/`, for `x86_64-unknown-none` or, freestanding, for the host's Linux target.

use crate::ctx::{Ctx, Log, Result};
use crate::setup;
use clap::ValueEnum;
use std::path::PathBuf;
use xshell::cmd;

/// Every image: a package of `examples/` with a binary of the same name.
pub const ALL: &[&str] = &["l0", "l1", "selftest", "vmxchecks"];

/// Which compiler target makes the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Freestanding {
    /// x86_64-unknown-none where rustup has or can add it, else the host's target
    Auto,
    /// x86_64-unknown-none
    None,
    /// x86_64-unknown-linux-gnu without its C library
    Host,
}

/// A target that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `x86_64-unknown-none`.
    None,
    /// `x86_64-unknown-linux-gnu`, freestanding.
    Host,
}

impl Target {
    const fn triple(self) -> &'static str {
        match self {
            Target::None => "x86_64-unknown-none",
            Target::Host => "x86_64-unknown-linux-gnu",
        }
    }

    const fn short(self) -> &'static str {
        match self {
            Target::None => "none",
            Target::Host => "host",
        }
    }

    /// The compiler flags that make an image of a program, for `CARGO_ENCODED_RUSTFLAGS`.
    fn flags(self, ctx: &Ctx) -> String {
        let script = ctx.root.join("examples/rt/link.ld");
        let mut flags = vec![
            "--cfg".into(),
            "freestanding".into(),
            "-Crelocation-model=static".into(),
            "-Ccode-model=kernel".into(),
        ];
        let mut link = vec![format!("-T{}", script.display()), "-zmax-page-size=4096".into()];
        if self == Target::Host {
            link.extend(["-nostdlib", "-static", "-no-pie"].map(String::from));
        }
        flags.extend(link.iter().map(|arg| format!("-Clink-arg={arg}")));
        flags.join("\x1f")
    }

    /// `target/image/...`: a directory of its own, so that other flags elsewhere do not rebuild everything.
    fn directory(self, ctx: &Ctx) -> PathBuf {
        ctx.root.join("target/image").join(self.short())
    }
}

/// Images that have been built.
pub struct Images {
    /// For which target.
    pub target: Target,
    directory: PathBuf,
}

impl Images {
    /// The ELF file of the image `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Finds the target to use.
pub fn choose(ctx: &Ctx, wanted: Freestanding) -> Result<Target> {
    match wanted {
        Freestanding::Host => Ok(Target::Host),
        Freestanding::Auto | Freestanding::None => match setup::rust_target(ctx, Target::None.triple())? {
            true => Ok(Target::None),
            false if wanted == Freestanding::Auto => Ok(Target::Host),
            false => Err("no target x86_64-unknown-none: run `rustup target add x86_64-unknown-none`".into()),
        },
    }
}

/// Builds all images.
pub fn build(ctx: &Ctx, log: &mut Log, target: Target) -> Result<Images> {
    let (sh, triple, directory) = (&ctx.sh, target.triple(), target.directory(ctx));
    let packages = ALL.iter().flat_map(|name| ["-p", name]);
    let build = cmd!(sh, "cargo build --profile image --target {triple} --target-dir {directory} {packages...}");
    log.run(build.env("CARGO_ENCODED_RUSTFLAGS", target.flags(ctx)))?;
    Ok(Images { target, directory: directory.join(triple).join("image") })
}

/// Lints the images as they are built.
pub fn clippy(ctx: &Ctx, log: &mut Log, target: Target) -> Result<()> {
    let (sh, triple, directory) = (&ctx.sh, target.triple(), target.directory(ctx));
    let packages = ["rt"].iter().chain(ALL).flat_map(|name| ["-p", name]);
    let profile = ["--profile", "image"];
    let clippy =
        cmd!(sh, "cargo clippy {profile...} --target {triple} --target-dir {directory} {packages...} -- -D warnings");
    log.run(clippy.env("CARGO_ENCODED_RUSTFLAGS", target.flags(ctx)))
}
