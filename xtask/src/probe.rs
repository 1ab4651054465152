//! The no-panic probe: a program that keeps every public function of the library alive and in which the panic handler
//! calls a symbol that does not exist. It links when the optimiser has removed every panic, and only then.
//!
//! Functions whose address can be taken as they are come from a list made of the crates' documentation. Generic ones
//! need types: `tests/probe` names each with the types it chose, and what it does not name is an error here.

use crate::ctx::{Ctx, Log, Result};
use crate::public_items;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use xshell::cmd;

/// The crates without reachable panics.
pub const CRATES: &[&str] = &["tlfs-abi", "hvcore", "nvmx", "nsvm"];

/// What the probe's panic handler calls.
const SYMBOL: &str = "a_panic_is_reachable";

/// Links the probe, and shows that it does not link with one panic in it.
pub fn stage(ctx: &Ctx, log: &mut Log) -> Result<String> {
    let sh = &ctx.sh;
    let packages = CRATES.iter().flat_map(|name| ["-p", name]);
    // In a directory of its own, emptied first: rustdoc leaves the pages of functions that are gone.
    let directory = ctx.root.join("target/probe");
    let doc = directory.join("doc");
    if doc.exists() {
        fs::remove_dir_all(&doc)?;
    }
    log.run(cmd!(sh, "cargo doc --no-deps --target-dir {directory} {packages...}"))?;
    let mut items = Vec::new();
    for name in CRATES {
        items.extend(public_items::of_crate(&doc, &name.replace('-', "_"))?);
    }
    let named = named_in_the_probe(ctx)?;
    let missing: Vec<&str> = items
        .iter()
        .map(|i| (i, i.path.as_str()))
        .filter(|(i, p)| i.generic && !named.contains(*p))
        .map(|(_, p)| p)
        .collect();
    if !missing.is_empty() {
        for path in &missing {
            log.line(&format!("not in tests/probe/src: {path}"))?;
        }
        return Err(format!(
            "{} generic functions are missing in tests/probe/src: {}",
            missing.len(),
            missing.join(", ")
        )
        .into());
    }
    let plain: Vec<&str> = items.iter().filter(|i| !i.generic).map(|i| i.path.as_str()).collect();
    let list = directory.join("plain.rs");
    write_list(&list, &plain)?;
    log.run(build(ctx, &directory, &list, &[])?)?;
    let before = log.length()?;
    log.run_expecting_failure(build(ctx, &directory, &list, &["--features", "control"])?)?;
    if !log.since(before)?.contains(SYMBOL) {
        return Err(format!("the control did not fail for its own reason, the missing symbol {SYMBOL}").into());
    }
    Ok(format!("{} functions, {} of them generic", items.len(), items.len() - plain.len()))
}

/// The string literals of the probe's sources: the names of what it keeps.
fn named_in_the_probe(ctx: &Ctx) -> Result<BTreeSet<String>> {
    let mut named = BTreeSet::new();
    for entry in fs::read_dir(ctx.root.join("tests/probe/src"))? {
        let text = fs::read_to_string(entry?.path())?;
        named.extend(text.split('"').skip(1).step_by(2).map(String::from));
    }
    Ok(named)
}

fn write_list(path: &std::path::Path, plain: &[&str]) -> Result<()> {
    let mut text = String::from("pub fn keep_all() {\n");
    for item in plain {
        writeln!(text, "    crate::keep({item} as *const ());")?;
    }
    text.push_str("}\n");
    // An unchanged list needs no new build.
    if fs::read_to_string(path).ok().as_deref() != Some(&text) {
        fs::write(path, text)?;
    }
    Ok(())
}

fn build(
    ctx: &Ctx,
    directory: &std::path::Path,
    list: &std::path::Path,
    extra: &[&str],
) -> Result<std::process::Command> {
    let sh = &ctx.sh;
    // With a target named, the flags do not reach build scripts and procedural macros.
    let version = cmd!(sh, "rustc -vV").read()?;
    let host =
        version.lines().find_map(|l| l.strip_prefix("host: ")).ok_or("rustc does not name its host")?.to_string();
    let command = cmd!(sh, "cargo build -p probe --profile probe --target {host} --target-dir {directory} {extra...}");
    Ok(command.env("CARGO_ENCODED_RUSTFLAGS", "--cfg\x1fprobe").env("PROBE_LIST", list).into())
}
