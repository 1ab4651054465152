//! `cargo xtask run-l1`: boots L0 on an emulated machine with a kernel of the user's as L1.
//!
//! L1's first serial port is standard output (and input, on a terminal). L0's own messages go to standard error. The
//! exit status tells how the run ended; see `Args`.

use crate::bochs::{self, Serial};
use crate::ctx::{Ctx, Log, Result};
use crate::images::{self, Freestanding};
use crate::machine::Loaded;
use crate::setup;
use crate::trace;
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
    /// What executes guest code: KVM where it lets its guest nest, else an emulator; QEMU's TCG has AMD-V, Bochs VT-x
    #[arg(long, value_enum, default_value = "auto")]
    accel: Accel,
    /// Offer the Hyper-V interface to L1
    #[arg(long, value_enum, default_value = "on")]
    enlighten: Switch,
    /// Deterministic instruction counting (implies one emulator thread)
    #[arg(long)]
    icount: bool,
    /// Write the timeline of every processor to FILE, as Chrome trace-event JSON (Perfetto opens it), when L1 ends the
    /// machine by power-off, port 0xF4 or a triple fault
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// More arguments for the emulator
    #[arg(last = true, value_name = "EMULATOR ARGS")]
    emulator: Vec<String>,
}

/// A virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Extension {
    /// AMD-V
    Svm,
    /// VT-x
    Vmx,
}

/// What executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Accel {
    /// KVM where it lets its guest nest, else emulation
    Auto,
    /// QEMU's emulation (AMD-V)
    Tcg,
    /// Bochs (VT-x)
    Bochs,
    /// The host's own virtualization
    Kvm,
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
    let emulated = match (args.cpu, args.accel) {
        (Extension::Svm, Accel::Bochs) => return Err("Bochs has no AMD-V".into()),
        (Extension::Vmx, Accel::Tcg) => return Err("QEMU's TCG has no VT-x: use Bochs or KVM".into()),
        (Extension::Vmx, Accel::Bochs) => true,
        (Extension::Vmx, Accel::Auto) => args.icount || !kvm_nests("kvm_intel"),
        (Extension::Vmx, Accel::Kvm) | (Extension::Svm, _) => false,
    };
    if emulated {
        setup::need(ctx, setup::BOCHS)?;
        setup::need(ctx, setup::GRUB)?;
    } else {
        setup::need(ctx, setup::QEMU)?;
    }
    let mut log = Log::create(ctx, "run-l1")?;
    let target = images::choose(ctx, Freestanding::Auto)?;
    let images =
        images::build(ctx, &mut log, target).map_err(|e| format!("{e} (details: {})", log.path().display()))?;
    if emulated {
        return on_bochs(&args, &images.path("l0"));
    }
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
    let records = messages.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if let Some(thread) = events {
        let _ = thread.join();
    }
    let _ = fs::remove_file(&monitor);
    write_timeline(&args, &records);
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

/// Writes the timeline, if one was asked for.
fn write_timeline(args: &Args, records: &[trace::Record]) {
    let Some(path) = &args.trace else { return };
    if let Err(error) = trace::write(path, records) {
        eprintln!("run-l1: {error}");
    }
}

/// Runs L1 on Bochs and ends this program with the status that tells how it ended.
fn on_bochs(args: &Args, l0: &Path) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("run-l1-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let code = in_directory(args, l0, &directory);
    let _ = fs::remove_dir_all(&directory);
    std::process::exit(code?)
}

fn in_directory(args: &Args, l0: &Path, directory: &Path) -> Result<i32> {
    let serial = Serial::new()?;
    let machine = bochs::Machine {
        image: l0,
        args: &l0_line(args),
        modules: &loaded(args),
        cpu: bochs::MODEL,
        cpus: args.smp,
        memory: args.mem,
        ips: if args.initrd.is_some() { 25_000_000 } else { 4_000_000 },
        serial: Some(&serial),
    };
    let mut command = bochs::command(&machine, directory)?;
    command.args(&args.emulator).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let printed = serial.print_to(std::io::stdout())?;
    if std::io::stdin().is_terminal() {
        // Ends with this program.
        let keyboard = serial.keyboard();
        thread::spawn(move || {
            let mut byte = [0];
            while let Ok(1) = std::io::stdin().read(&mut byte) {
                if let Ok(mut stream) = keyboard.lock()
                    && let Some(stream) = stream.as_mut()
                {
                    let _ = stream.write_all(&byte);
                }
            }
        });
    }
    let mut child = command.spawn().map_err(|e| format!("cannot run bochs: {e}"))?;
    let said = Arc::new(Mutex::new(String::new()));
    let messages = child.stdout.take().map(|stdout| {
        let said = Arc::clone(&said);
        thread::spawn(move || note(stdout, &said))
    });
    let status = wait(&mut child, args.timeout)?;
    serial.give_up();
    for thread in [Some(printed), messages].into_iter().flatten() {
        let _ = thread.join();
    }
    if status.is_none() {
        eprintln!("run-l1: no end after {} seconds", args.timeout);
        return Ok(TIMEOUT);
    }
    let log = fs::read(directory.join(bochs::LOG)).unwrap_or_default();
    let said = said.lock().map(|said| said.clone()).unwrap_or_default();
    write_timeline(args, &trace::records(&said));
    Ok(bochs::status(&said, &String::from_utf8_lossy(&log)))
}

/// L0's modules: L1's kernel with its command line, then L1's own modules.
fn loaded(args: &Args) -> Vec<Loaded> {
    let kernel = Loaded { path: args.kernel.clone(), args: args.append.clone() };
    let initrd = args.initrd.iter().map(|path| Loaded { path: path.clone(), args: String::new() });
    let others = args.module.iter().map(|module| {
        let (path, args) = module.split_once(' ').unwrap_or((module, ""));
        Loaded { path: path.into(), args: args.into() }
    });
    std::iter::once(kernel).chain(initrd).chain(others).collect()
}

/// Passes L0's lines on to standard error, and keeps them. What Bochs itself prints there stays unseen.
fn note(from: impl Read, said: &Mutex<String>) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        // Bochs's own prompt may come before the first.
        if let Some(at) = text.find("l0: ") {
            if trace::record(&text[at..]).is_none() {
                eprint!("{}", &text[at..]);
            }
            if let Ok(mut said) = said.lock() {
                said.push_str(&text[at..]);
            }
        }
        line.clear();
    }
}

/// The emulator's command line.
fn command(args: &Args, l0: &Path, monitor: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let threads = if args.icount { "tcg,thread=single" } else { "tcg,thread=multi" };
    let accels: &[&str] = match args.accel {
        // KVM serves only if it lets its guest nest, and it cannot count instructions.
        Accel::Auto if args.cpu == Extension::Vmx || !args.icount && kvm_nests("kvm_amd") => &["kvm", threads],
        Accel::Auto | Accel::Tcg | Accel::Bochs => &[threads],
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
    command.arg("-kernel").arg(l0).args(["-append", &l0_line(args)]);
    command.arg("-initrd").arg(modules(args));
    command.args(&args.emulator);
    // Without a terminal there is nothing to type.
    command.stdin(if std::io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() });
    command.stderr(Stdio::piped());
    command
}

/// L0's command line.
fn l0_line(args: &Args) -> String {
    let enlighten = match args.enlighten {
        Switch::On => "on",
        Switch::Off => "off",
    };
    let trace = if args.trace.is_some() { " trace" } else { "" };
    format!("cpus={} enlighten={enlighten}{trace}", args.smp)
}

/// L0's modules: L1's kernel with its command line, then L1's own modules. A comma inside is written twice.
fn modules(args: &Args) -> String {
    let kernel = format!("{} {}", args.kernel.display(), args.append);
    let initrd = args.initrd.iter().map(|path| path.display().to_string());
    let all = std::iter::once(kernel.trim_end().to_string()).chain(initrd).chain(args.module.iter().cloned());
    all.map(|m| m.replace(',', ",,")).collect::<Vec<_>>().join(",")
}

/// True when the host's KVM runs nested guests: its `module` says so.
fn kvm_nests(module: &str) -> bool {
    let nested = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
    matches!(nested.trim(), "1" | "Y") && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Copies what L0 and the emulator say to standard error, but for what L0 recorded.
fn pass_on(from: impl Read) -> Vec<trace::Record> {
    let mut records = Vec::new();
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        if let Some(record) = trace::record(&text) {
            records.push(record);
        } else {
            let prefix = if text.starts_with("l0: ") { "" } else { "emulator: " };
            eprint!("{prefix}{text}");
        }
        line.clear();
    }
    records
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
