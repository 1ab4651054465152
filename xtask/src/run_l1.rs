//! `cargo xtask run-l1`: boots L0 on an emulated machine with a kernel of the user's as L1.
//!
//! L1's first serial port is standard output (and input, on a terminal). L0's own messages go to standard error. The
//! exit status tells how the run ended; see `Args`.

use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding};
use crate::machine::Accel;
use crate::setup;
use clap::ValueEnum;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// L1 reset the machine, or shut down by a triple fault.
const RESET: i32 = 122;
/// The time limit passed.
const TIMEOUT: i32 = 124;

/// Options of `cargo xtask run-l1`.
///
/// Exit status: 0 when L1 powers off; (v << 1) | 1 when L1 writes v to port 0xF4; 122 when L1 resets or triple-faults;
/// 124 on timeout; 125 if L0 gave up.
#[derive(clap::Args)]
#[command(after_help = "Exit status: 0 when L1 powers off; (v << 1) | 1 when L1 writes v to port 0xF4; 122 when L1 \
    resets or triple-faults; 124 on timeout; 125 if L0 gave up.")]
pub struct Args {
    /// Which virtualization extension L0 uses
    #[arg(long, value_enum, default_value = "svm")]
    cpu: Extension,
    /// L1's kernel: a multiboot1 ELF file or a Linux bzImage
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk, for Linux; for multiboot the first module
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// A multiboot module (may be repeated); its command line may follow the file name after a space
    #[arg(long, value_name = "FILE")]
    module: Vec<String>,
    /// L1's command line
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Processors
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=16))]
    smp: u32,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value = "512", value_parser = clap::value_parser!(u32).range(128..))]
    mem: u32,
    /// Seconds after which the run is ended; 0 for no limit
    #[arg(long, value_name = "SECONDS", default_value = "0")]
    timeout: u64,
    /// How QEMU executes guest code
    #[arg(long, value_enum, default_value = "auto")]
    accel: Accel,
    /// Offer the Hyper-V interface to L1
    #[arg(long, value_enum, default_value = "on")]
    enlighten: Switch,
    /// Deterministic instruction counting (implies one emulator thread)
    #[arg(long)]
    icount: bool,
    /// More arguments for the emulator
    #[arg(last = true, value_name = "EMULATOR ARGS")]
    emulator: Vec<String>,
}

/// A virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Extension {
    /// AMD-V
    Svm,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// Offered
    On,
    /// Hidden
    Off,
}

/// Runs L1 and ends this program with the status that tells how it ended.
pub fn run(ctx: &Ctx, args: Args) -> Result<()> {
    setup::need(ctx, setup::QEMU)?;
    let mut log = Log::create(ctx, "run-l1")?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    let images =
        images::build(ctx, &mut log, target).map_err(|e| format!("{e} (details: {})", log.path().display()))?;
    let monitor = std::env::temp_dir().join(format!("run-l1-{}.sock", std::process::id()));
    let _ = fs::remove_file(&monitor);
    let mut child = command(&args, &images.path("l0"), &monitor)
        .spawn()
        .map_err(|e| format!("cannot run qemu-system-x86_64: {e}"))?;
    let messages = child.stderr.take().map(|stderr| thread::spawn(move || pass_on(stderr)));
    let reason = Arc::new(Mutex::new(String::new()));
    let events = connect(&mut child, &monitor)?.map(|stream| {
        let reason = Arc::clone(&reason);
        thread::spawn(move || watch(stream, &reason))
    });
    let status = wait(&mut child, args.timeout)?;
    for thread in [messages, events].into_iter().flatten() {
        let _ = thread.join();
    }
    let _ = fs::remove_file(&monitor);
    let reason = reason.lock().map(|r| r.clone()).unwrap_or_default();
    let code = match status {
        None => {
            eprintln!("run-l1: no end after {} seconds", args.timeout);
            TIMEOUT
        }
        Some(0) if reason == "guest-reset" => RESET,
        Some(code) => code,
    };
    std::process::exit(code)
}

/// The emulator's command line.
fn command(args: &Args, l0: &Path, monitor: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let threads = if args.icount { "tcg,thread=single" } else { "tcg,thread=multi" };
    let accels: &[&str] = match args.accel {
        // KVM serves only if it lets its guest nest, and it cannot count instructions.
        Accel::Auto if !args.icount && kvm_nests_svm() => &["kvm", threads],
        Accel::Auto | Accel::Tcg => &[threads],
        Accel::Kvm => &["kvm"],
    };
    for accel in accels {
        command.args(["-accel", accel]);
    }
    let cpu = if accels.first() == Some(&"kvm") { "host" } else { "max" };
    command.args(["-cpu", cpu, "-smp", &args.smp.to_string(), "-m", &args.mem.to_string()]);
    if args.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command.args(["-no-reboot", "-nodefaults", "-display", "none", "-S"]);
    command.args(["-chardev", "stdio,id=com1,signal=off", "-serial", "chardev:com1"]);
    command.args(["-chardev", "file,id=l0,path=/dev/stderr", "-device", "isa-debugcon,iobase=0xe9,chardev=l0"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
    let enlighten = match args.enlighten {
        Switch::On => "on",
        Switch::Off => "off",
    };
    command.arg("-kernel").arg(l0).args(["-append", &format!("cpus={} enlighten={enlighten}", args.smp)]);
    command.arg("-initrd").arg(modules(args));
    command.args(&args.emulator);
    // Without a terminal there is nothing to type.
    command.stdin(if std::io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() });
    command.stderr(Stdio::piped());
    command
}

/// L0's modules: L1's kernel with its command line, then L1's own modules. A comma inside is written twice.
fn modules(args: &Args) -> String {
    let kernel = format!("{} {}", args.kernel.display(), args.append);
    let initrd = args.initrd.iter().map(|path| path.display().to_string());
    let all = std::iter::once(kernel.trim_end().to_string()).chain(initrd).chain(args.module.iter().cloned());
    all.map(|m| m.replace(',', ",,")).collect::<Vec<_>>().join(",")
}

/// True when the host's KVM runs nested SVM guests.
fn kvm_nests_svm() -> bool {
    let nested = fs::read_to_string("/sys/module/kvm_amd/parameters/nested").unwrap_or_default();
    matches!(nested.trim(), "1" | "Y") && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Copies what L0 and the emulator say to standard error.
fn pass_on(from: impl Read) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        let prefix = if text.starts_with("l0: ") { "" } else { "emulator: " };
        eprint!("{prefix}{text}");
        line.clear();
    }
}

/// Connects to the emulator's monitor and lets the machine start; `None` when the emulator ended before.
fn connect(child: &mut Child, monitor: &Path) -> Result<Option<UnixStream>> {
    let start = Instant::now();
    loop {
        if let Ok(mut stream) = UnixStream::connect(monitor) {
            stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"cont\"}\n")?;
            return Ok(Some(stream));
        }
        if child.try_wait()?.is_some() {
            return Ok(None);
        }
        if start.elapsed() > Duration::from_secs(10) {
            child.kill()?;
            return Err("the emulator opened no monitor within 10 seconds".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Notes why the machine stopped, until the monitor closes.
fn watch(stream: UnixStream, reason: &Mutex<String>) {
    for line in BufReader::new(stream).lines().map_while(std::io::Result::ok) {
        let Ok(event) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
        if event["event"] == "SHUTDOWN"
            && let (Some(why), Ok(mut reason)) = (event["data"]["reason"].as_str(), reason.lock())
        {
            *reason = why.to_string();
        }
    }
}

/// Waits for the emulator, at most `limit` seconds (0: for good); its status, or `None` when it was cut off.
fn wait(child: &mut Child, limit: u64) -> Result<Option<i32>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code().unwrap_or(1)));
        }
        if limit > 0 && start.elapsed() > Duration::from_secs(limit) {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Args {
        Cli::parse_from(["x"].iter().chain(words)).args
    }

    #[test]
    fn modules_are_joined_and_commas_doubled() {
        let args = parse(&["--kernel", "k,1", "--append", "a=1,2 b", "--initrd", "i", "--module", "m x=y"]);
        assert_eq!(modules(&args), "k,,1 a=1,,2 b,i,m x=y");
        assert_eq!(modules(&parse(&["--kernel", "k"])), "k");
    }

    #[test]
    fn what_follows_two_dashes_goes_to_the_emulator() {
        let args = parse(&["--kernel", "k", "--icount", "--accel", "tcg", "--", "-cpu", "EPYC-Rome,+svm"]);
        let command = command(&args, Path::new("l0"), Path::new("/tmp/s"));
        let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        assert!(words.ends_with(&["-cpu".into(), "EPYC-Rome,+svm".into()]), "{words:?}");
        assert!(words.windows(2).any(|w| w == ["-accel", "tcg,thread=single"]), "{words:?}");
    }
}
