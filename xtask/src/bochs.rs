//! Bochs as a machine: its configuration, a CD that boots an image, and the serial port.
//!
//! Used by [`crate::machine`] for scenarios and by [`crate::run_l1`]. Bochs has no exit status of the guest's choice: L0
//! says on its port how L1 ended, and [`status`] reads it.

use crate::ctx::Result;
use crate::machine::Loaded;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

/// The processor model that L0 is made for.
pub const MODEL: &str = "corei7_skylake_x";

/// A machine.
pub struct Machine<'a> {
    /// The image, and its command line.
    pub image: &'a Path,
    /// The image's command line.
    pub args: &'a str,
    /// Files beside it.
    pub modules: &'a [Loaded],
    /// The processor model.
    pub cpu: &'a str,
    /// Number of processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// Instructions per emulated second: few, and the serial port and the start of processors cost little; many, and an
    /// operating system's clock goes at a speed it can live with.
    pub ips: u32,
    /// The first serial port: a file, or somebody at the other end.
    pub serial: Option<&'a Serial>,
}

/// Writes all that the machine needs to `directory`, which is empty; the command that runs it there. Its standard output
/// is the debug port, its log is [`LOG`], and without [`Machine::serial`] the serial port is `serial.txt`.
pub fn command(machine: &Machine<'_>, directory: &Path) -> Result<Command> {
    make_cd(machine, directory)?;
    let serial = match machine.serial {
        Some(serial) => format!("mode=socket-client, dev=localhost:{}", serial.port),
        None => "mode=file, dev=serial.txt".to_string(),
    };
    let configuration = format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         plugin_ctrl: speaker=0, gameport=0, parallel=0\n\
         memory: guest={0}, host={0}\n\
         cpu: model={1}, count={2}, ips={3}, reset_on_triple_fault=0\n\
         clock: sync=none, time0=1700000000\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot\n\
         vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest\n\
         ata0: enabled=1\n\
         ata0-master: type=cdrom, path=cd.iso, status=inserted\n\
         boot: cdrom\n\
         port_e9_hack: enabled=1\n\
         com1: enabled=1, {serial}\n\
         log: {LOG}\n\
         panic: action=fatal\n\
         error: action=report\n\
         info: action=report\n\
         debug: action=ignore\n",
        machine.memory, machine.cpu, machine.cpus, machine.ips,
    );
    fs::write(directory.join("bochsrc"), configuration)?;
    // Debian's Bochs has the debugger, which waits for this word.
    fs::write(directory.join("continue"), "c\n")?;
    let mut command = Command::new("bochs");
    command.args(["-q", "-f", "bochsrc", "-rc", "continue"]).env("TERM", "dumb").current_dir(directory);
    Ok(command)
}

/// What Bochs says of itself.
pub const LOG: &str = "bochs.log";

fn make_cd(machine: &Machine<'_>, directory: &Path) -> Result<()> {
    let boot = directory.join("cd/boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::copy(machine.image, boot.join("image"))?;
    let mut menu = format!("set timeout=0\nmenuentry image {{\n  multiboot /boot/image {}\n", quoted(machine.args));
    for (i, module) in machine.modules.iter().enumerate() {
        fs::copy(&module.path, boot.join(format!("module{i}")))?;
        // The first word is the file's name, as with QEMU's loader: GRUB leaves it out.
        menu += &format!("  module /boot/module{i} module{i} {}\n", quoted(&module.args));
    }
    fs::write(boot.join("grub/grub.cfg"), menu + "}\n")?;
    let out = Command::new("grub-mkrescue")
        .args(["-d", "/usr/lib/grub/i386-pc", "--compress=no", "-o", "cd.iso", "cd"])
        .current_dir(directory)
        .output()
        .map_err(|e| format!("cannot run grub-mkrescue: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("grub-mkrescue failed: {}", String::from_utf8_lossy(&out.stderr).trim()).into())
}

/// Words as GRUB's shell takes them literally.
fn quoted(words: &str) -> String {
    let special = |word: &str| word.contains(['$', ';', '|', '&', '{', '}', '<', '>', '"', '\\', '#', '\'']);
    let quote = |word: &str| if special(word) { format!("'{}'", word.replace('\'', "'\\''")) } else { word.into() };
    words.split_ascii_whitespace().map(quote).collect::<Vec<_>>().join(" ")
}

/// The other end of the machine's serial port.
pub struct Serial {
    listener: TcpListener,
    port: u16,
    /// When the machine has connected.
    stream: Arc<Mutex<Option<TcpStream>>>,
}

impl Serial {
    /// Waits for a machine.
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener, port, stream: Arc::default() })
    }

    /// Copies what the machine prints to `sink` until it ends. To be called before it starts.
    pub fn print_to(&self, mut sink: impl Write + Send + 'static) -> Result<thread::JoinHandle<()>> {
        let (listener, stream) = (self.listener.try_clone()?, Arc::clone(&self.stream));
        Ok(thread::spawn(move || {
            let Ok((mut from, _)) = listener.accept() else { return };
            if let (Ok(clone), Ok(mut stream)) = (from.try_clone(), stream.lock()) {
                *stream = Some(clone);
            }
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if sink.write_all(buffer.get(..n).unwrap_or(&[])).is_err() || sink.flush().is_err() {
                    break;
                }
            }
        }))
    }

    /// Lets a machine that never connected not be waited for.
    pub fn give_up(&self) {
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }

    /// Types `bytes`; nothing happens before the machine has connected.
    pub fn type_bytes(&self, bytes: &[u8]) -> Result<()> {
        if let Ok(mut stream) = self.stream.lock()
            && let Some(stream) = stream.as_mut()
        {
            stream.write_all(bytes)?;
        }
        Ok(())
    }

    /// A handle that types from another thread.
    pub fn keyboard(&self) -> Arc<Mutex<Option<TcpStream>>> {
        Arc::clone(&self.stream)
    }
}

/// L1 reset the machine, or shut down by a triple fault.
const RESET: i32 = 122;
/// L0 gave up.
const GAVE_UP: i32 = 125;

/// The exit status that QEMU with its debug-exit device would have had, by what L0 said (`l0`) and what Bochs said of
/// itself (`log`).
pub fn status(l0: &str, log: &str) -> i32 {
    for line in l0.lines().rev() {
        if line.starts_with("l0: GAVE UP") {
            return GAVE_UP;
        }
        match line.strip_prefix("l0: end: ") {
            Some("power off") => return 0,
            Some("reset") => return RESET,
            Some(value) => {
                let value = value.strip_prefix("value 0x").and_then(|v| u32::from_str_radix(v, 16).ok());
                // What a process can tell of it.
                return value.map_or(1, |v| ((v << 1 | 1) & 0xff) as i32);
            }
            None => {}
        }
    }
    if log.contains("soft power off") {
        0
    } else if log.contains("reset") {
        RESET
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_l0_is_the_status() {
        assert_eq!(status("l0: cpus 1\nl0: end: value 0x10\n", ""), 33);
        assert_eq!(status("l0: end: value 0xff\n", ""), 255);
        assert_eq!(status("l0: end: value 0x1ff\n", ""), 255);
        assert_eq!(status("l0: end: power off\n", "shutdown requested"), 0);
        assert_eq!(status("l0: end: reset\n", "shutdown requested"), 122);
        assert_eq!(status("l0: end: value 0x10\nl0: GAVE UP: x\nl0: more\n", ""), 125);
        assert_eq!(status("said l0: end: reset\n", ""), 1);
    }

    #[test]
    fn what_means_something_to_grub_is_quoted() {
        assert_eq!(quoted("a=1 b;c  d='x'"), "a=1 'b;c' 'd='\\''x'\\'''");
        assert_eq!(quoted(""), "");
    }

    #[test]
    fn the_serial_port_has_two_ends() -> Result<()> {
        let serial = Serial::new()?;
        let text = Arc::new(Mutex::new(Vec::new()));
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().expect("no panic").extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let thread = serial.print_to(Sink(Arc::clone(&text)))?;
        let mut machine = TcpStream::connect(("127.0.0.1", serial.port))?;
        machine.write_all(b"hello")?;
        while text.lock().expect("no panic").is_empty() {
            thread::yield_now();
        }
        serial.type_bytes(b"x")?;
        let mut byte = [0];
        machine.read_exact(&mut byte)?;
        drop(machine);
        drop(serial);
        let _ = thread.join();
        assert_eq!((byte, &**text.lock().expect("no panic")), ([b'x'], &b"hello"[..]));
        Ok(())
    }
}
