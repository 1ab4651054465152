//! What an emulated machine is doing that does not end: asks QEMU through its monitor protocol, and recognises a fault of
//! QEMU's own.
//!
//! QEMU before 8.1 translates a page of guest code before it watches the page for writes. With a host thread per
//! processor, one processor may so keep a translation of an INT3 that another has long replaced, which is how Linux
//! patches its text: it takes #BP at an instruction that is no INT3, returns, and takes it again, for ever. No guest and
//! no hypervisor can do that to a processor, whose instruction fetches see every store.

use crate::ctx::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Looks at each processor so often.
const SAMPLES: u32 = 60;
/// So many looks have to agree.
const ENOUGH: u32 = 5;
/// INT3.
const INT3: u8 = 0xcc;

/// The processor and address of an INT3 that is executed and is not in memory, when QEMU's `socket` tells of one.
pub fn stale_breakpoint(socket: &Path, cpus: u32) -> Result<Option<String>> {
    let mut monitor = Monitor::connect(socket)?;
    for cpu in 0..cpus {
        let (mut sites, mut trapped) = (BTreeMap::<u64, u32>::new(), BTreeMap::<u64, u32>::new());
        for _ in 0..SAMPLES {
            let text = monitor.ask("info registers", cpu)?;
            let (Some(rip), Some(rsp)) = (register(&text, "RIP"), register(&text, "RSP")) else { continue };
            *sites.entry(rip).or_default() += 1;
            // At the handler's first instruction the frame begins with the address behind the INT3, and CS.
            let frame = monitor.ask(&format!("x/2gx {rsp:#x}"), cpu)?;
            if let [next, 1..=0xffff] = numbers(&frame)[..] {
                *trapped.entry(next.wrapping_sub(1)).or_default() += 1;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let often = |counts: &BTreeMap<u64, u32>, at| counts.get(&at).is_some_and(|&n| n >= ENOUGH);
        for &site in trapped.keys().filter(|&&site| often(&sites, site) && often(&trapped, site)) {
            let byte = numbers(&monitor.ask(&format!("x/1bx {site:#x}"), cpu)?);
            if byte.first().is_some_and(|&byte| byte != u64::from(INT3)) {
                let what = format!("processor {cpu} executes an INT3 at {site:#x}, where memory has {:#04x}", byte[0]);
                return Ok(Some(what));
            }
        }
    }
    Ok(None)
}

/// QEMU's monitor protocol: a JSON object a line.
struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Result<Self> {
        // A socket's path may have some 100 bytes, so it begins at the directory's descriptor.
        let (parent, name) = (socket.parent().ok_or("no directory")?, socket.file_name().ok_or("no name")?);
        let directory = File::open(parent)?;
        let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
        let to = UnixStream::connect(short).map_err(|e| format!("{}: {e}", socket.display()))?;
        to.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut monitor = Self { from: BufReader::new(to.try_clone()?), to };
        // The greeting, then the end of negotiation.
        monitor.line()?;
        monitor.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// What the command line prints, seen by processor `cpu`.
    fn ask(&mut self, command: &str, cpu: u32) -> Result<String> {
        let arguments = json!({ "command-line": command, "cpu-index": cpu });
        let answer = self.execute(&json!({ "execute": "human-monitor-command", "arguments": arguments }))?;
        Ok(answer.as_str().unwrap_or_default().to_string())
    }

    fn execute(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.to, "{command}")?;
        loop {
            let mut answer = self.line()?;
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("QEMU refuses {command}: {error}").into());
            }
            // Anything else is an event.
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err("QEMU has ended".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// The value of `NAME=hexadecimal`.
fn register(text: &str, name: &str) -> Option<u64> {
    let value = text.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
    u64::from_str_radix(value, 16).ok()
}

/// The numbers behind the address in a line of a memory dump.
fn numbers(dump: &str) -> Vec<u64> {
    let values = dump.lines().next().and_then(|line| line.split_once(':')).map_or("", |(_, values)| values);
    values.split_ascii_whitespace().filter_map(|n| u64::from_str_radix(n.strip_prefix("0x")?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_and_dumps_are_understood() {
        let text = "R15=ff3936e2c1262b88\r\nRIP=ffffffff9fa10d9b RFL=00000046 [---Z-P-] CPL=0\r\n";
        assert_eq!(register(text, "RIP"), Some(0xffff_ffff_9fa1_0d9b));
        assert_eq!(register(text, "RSP"), None);
        let dump = "ff7b4ff940087e48: 0xffffffff9fa10d9c 0x0000000000000010\r\n";
        assert_eq!(numbers(dump), [0xffff_ffff_9fa1_0d9c, 0x10]);
        assert!(numbers("Cannot access memory\r\n").is_empty());
    }
}
