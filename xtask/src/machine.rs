//! Runs an image on an emulated machine, for a limited time, and collects what it printed.

use crate::bochs::{self, Serial};
use crate::ctx::Result;
use crate::diagnose;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// QEMU's monitor socket in a run's directory.
const MONITOR: &str = "qmp";
/// What Linux prints when a processor has made no progress for long.
const LOCKED_UP: &str = "soft lockup";

/// A Linux that has printed nothing for so long is looked at.
const SILENCE: Duration = Duration::from_secs(20);

/// How QEMU executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// KVM where it works, else emulation
    Auto,
    /// Emulation: the same on every machine
    Tcg,
    /// The host's own virtualization
    Kvm,
}

/// A module as the machines take it: a file and its command line.
pub struct Loaded {
    /// Where it is.
    pub path: PathBuf,
    /// Its command line.
    pub args: String,
}

/// What somebody at the serial port types.
#[derive(Clone, Copy, Debug)]
pub struct Typed {
    /// When this has been printed,
    pub prompt: &'static str,
    /// this is typed, and the enter key.
    pub line: &'static str,
}

/// A machine to run and what to run on it.
pub struct Run<'a> {
    /// The image.
    pub image: &'a Path,
    /// The image's command line.
    pub args: &'a str,
    /// Files beside it.
    pub modules: &'a [Loaded],
    /// The emulated processor.
    pub cpu: &'a str,
    /// Number of processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// One tick of the time stamp counter is one instruction; processors take turns.
    pub icount: bool,
    /// What is typed at its serial port.
    pub typed: Option<Typed>,
    /// Linux runs: where it is stuck, QEMU is asked whether that is QEMU's own fault.
    pub linux: bool,
    /// Time limit.
    pub timeout: Duration,
    /// An empty directory for the run's files.
    pub directory: &'a Path,
}

/// What came of it.
#[derive(Debug)]
pub struct Ended {
    /// What the image printed.
    pub output: String,
    /// What the emulator said.
    pub emulator: String,
    /// The emulator's exit status.
    pub status: Option<i32>,
    /// Whether the run was cut off.
    pub timed_out: bool,
    /// The fault of the emulator's that kept the run from its end.
    pub fault: Option<String>,
    /// How long it took.
    pub time: Duration,
}

impl Ended {
    /// The code of the last `[exit N]` line.
    pub fn exit(&self) -> Option<u32> {
        self.output.lines().rev().find_map(|l| l.trim().strip_prefix("[exit ")?.strip_suffix(']')?.parse().ok())
    }

    /// A number of the line `stats: exits=N l0_instructions=N`, when the image or L0 printed one.
    pub fn stat(&self, name: &str) -> Option<u64> {
        let line = self.output.lines().chain(self.emulator.lines()).filter_map(stats_of).next_back()?;
        line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    }
}

/// What follows `stats:` in a line that says so.
fn stats_of(line: &str) -> Option<&str> {
    let line = line.trim();
    line.strip_prefix("l0: ").unwrap_or(line).strip_prefix("stats: ")
}

/// Boots the image with QEMU's own multiboot loader.
pub fn qemu(run: &Run<'_>, accel: Accel) -> Result<Ended> {
    let mut command = Command::new("qemu-system-x86_64");
    let accels: &[&str] = match accel {
        _ if run.icount => &["tcg,thread=single"],
        Accel::Auto => &["kvm", "tcg,thread=multi"],
        Accel::Tcg => &["tcg,thread=multi"],
        Accel::Kvm => &["kvm"],
    };
    for accel in accels {
        command.args(["-accel", accel]);
    }
    if run.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command.args(["-cpu", run.cpu, "-smp", &run.cpus.to_string(), "-m", &run.memory.to_string()]);
    command.args(["-no-reboot", "-nodefaults", "-display", "none"]);
    let serial = if run.typed.is_some() { "stdio,signal=off" } else { "file,path=serial.txt" };
    command.args(["-chardev", &format!("{serial},id=com1"), "-serial", "chardev:com1"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]);
    // Where the L0 hypervisor prints: its guest has the serial port.
    command.args(["-chardev", "file,id=l0,path=l0.txt", "-device", "isa-debugcon,iobase=0xe9,chardev=l0"]);
    if run.linux {
        command.args(["-qmp", &format!("unix:{MONITOR},server=on,wait=off")]);
    }
    command.arg("-kernel").arg(run.image).args(["-append", run.args]);
    if !run.modules.is_empty() {
        let name = |m: &Loaded| format!("{} {}", m.path.display(), m.args);
        // A comma inside a name is written twice.
        let names = run.modules.iter().map(|m| name(m).trim_end().replace(',', ",,"));
        command.args(["-initrd", &names.collect::<Vec<_>>().join(",")]);
    }
    let mut ended = limited(&mut command, run, None)?;
    ended.emulator += &read(&run.directory.join("l0.txt"));
    Ok(ended)
}

/// Boots the image on Bochs from a CD with GRUB.
pub fn bochs(run: &Run<'_>) -> Result<Ended> {
    let serial = run.typed.map(|_| Serial::new()).transpose()?;
    let machine = bochs::Machine {
        image: run.image,
        args: run.args,
        modules: run.modules,
        cpu: run.cpu,
        cpus: run.cpus,
        memory: run.memory,
        ips: if run.linux { 25_000_000 } else { 4_000_000 },
        serial: serial.as_ref(),
    };
    let mut command = bochs::command(&machine, run.directory)?;
    let ended = limited(&mut command, run, serial.as_ref())?;
    // Where the L0 hypervisor prints is the emulator's standard output.
    let log = read(&run.directory.join(bochs::LOG));
    let status = ended.status.map(|_| bochs::status(&ended.emulator, &log));
    Ok(Ended { emulator: log + &ended.emulator, status, ..ended })
}

/// Runs the emulator in its directory, killing it at the time limit.
///
/// With somebody at the keyboard the serial port is `serial`, or else the emulator's standard input and output.
fn limited(command: &mut Command, run: &Run<'_>, serial: Option<&Serial>) -> Result<Ended> {
    let (log, screen) = (run.directory.join("emulator.txt"), run.directory.join("serial.txt"));
    let file = File::create(&log)?;
    let name = command.get_program().to_string_lossy().into_owned();
    let (start, mut looked, mut pressed, mut fault) = (Instant::now(), Instant::now(), false, None);
    let (mut printed_bytes, mut silent_since) = (0, start);
    let printed = serial.map(|serial| serial.print_to(File::create(&screen)?)).transpose()?;
    let (stdin, stdout) = match run.typed {
        Some(_) if serial.is_none() => (Stdio::piped(), File::create(&screen)?),
        _ => (Stdio::null(), file.try_clone()?),
    };
    let mut child = command
        .current_dir(run.directory)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(file)
        .spawn()
        .map_err(|e| format!("cannot run {name}: {e}"))?;
    let (status, timed_out) = loop {
        if let Some(status) = child.try_wait()? {
            break (status.code(), false);
        }
        let late = start.elapsed() > run.timeout;
        if run.linux && name.starts_with("qemu") && (late || looked.elapsed() > Duration::from_secs(1)) {
            looked = Instant::now();
            let said = read(&screen);
            if said.len() != printed_bytes {
                (printed_bytes, silent_since) = (said.len(), Instant::now());
            }
            let silent = silent_since.elapsed() > SILENCE;
            if late || silent || said.contains(LOCKED_UP) {
                fault = emulator_fault(run);
                silent_since = Instant::now();
            }
        }
        if late || fault.is_some() {
            // SIGKILL: Bochs does not end at SIGTERM.
            child.kill()?;
            child.wait()?;
            break (None, true);
        }
        if let Some(typed) = run.typed
            && !pressed
            && read(&screen).contains(typed.prompt)
        {
            let line = format!("{}\r", typed.line);
            match (serial, &mut child.stdin) {
                (Some(serial), _) => serial.type_bytes(line.as_bytes())?,
                (None, Some(keyboard)) => keyboard.write_all(line.as_bytes())?,
                (None, None) => {}
            }
            pressed = true;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if let (Some(serial), Some(printed)) = (serial, printed) {
        serial.give_up();
        let _ = printed.join();
    }
    Ok(Ended { output: read(&screen), emulator: read(&log), status, timed_out, fault, time: start.elapsed() })
}

/// Why Linux is stuck, if QEMU is to blame.
fn emulator_fault(run: &Run<'_>) -> Option<String> {
    diagnose::stale_breakpoint(&run.directory.join(MONITOR), run.cpus).unwrap_or_else(|e| {
        eprintln!("cannot tell why Linux is stuck: {e}");
        None
    })
}

fn read(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(output: &str) -> Ended {
        Ended {
            output: output.into(),
            emulator: String::new(),
            status: Some(0),
            timed_out: false,
            fault: None,
            time: Duration::ZERO,
        }
    }

    #[test]
    fn the_last_exit_line_counts_and_must_be_whole() {
        assert_eq!(ended("[exit 17]\r\nx\n[exit 16]\r\n\r\n").exit(), Some(16));
        assert_eq!(ended("[exit 16\n").exit(), None);
        assert_eq!(ended("say [exit 16]\n").exit(), None);
    }

    #[test]
    fn stats_are_found_by_name() {
        let e = ended("stats: exits=12 l0_instructions=3456\n[exit 16]\n");
        assert_eq!((e.stat("exits"), e.stat("l0_instructions"), e.stat("exit")), (Some(12), Some(3456), None));
        assert_eq!(ended("exits=12\n").stat("exits"), None);
    }
}
