//! Watches what a running machine prints: when each line came, and a progress line on a terminal meanwhile.
//!
//! Used by `qemu_run.rs` around a run; knows nothing of scenarios but how to show one.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How far a set of runs is.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Results so far.
    pub done: usize,
    /// Results in the end.
    pub total: usize,
    /// What runs.
    pub what: String,
}

/// A file that is being watched.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Duration>>,
}

impl Watch {
    /// Starts to watch the file at `path`, which need not be there yet.
    pub fn start(path: &Path, progress: Progress) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let (path, stopped) = (path.to_path_buf(), Arc::clone(&stop));
        Watch { stop, thread: thread::spawn(move || watch(path, &stopped, progress)) }
    }

    /// Ends it: when each whole line of the file was there, counted from the start.
    pub fn end(self) -> Vec<Duration> {
        // Release: the file is whole for who sees this.
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

fn watch(path: PathBuf, stopped: &AtomicBool, mut progress: Progress) -> Vec<Duration> {
    let (start, terminal) = (Instant::now(), std::io::stderr().is_terminal());
    let (mut file, mut lines, mut shown) = (None, Vec::new(), Duration::ZERO);
    let (mut rest, mut last) = (Vec::new(), String::new());
    loop {
        // Before the read, so that the last read sees the whole file.
        let ends = stopped.load(Ordering::Acquire);
        if file.is_none() {
            file = File::open(&path).ok();
        }
        let now = start.elapsed();
        if let Some(file) = &mut file {
            let _ = file.read_to_end(&mut rest);
        }
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            last = String::from_utf8_lossy(&line).trim().to_string();
            progress.done += usize::from(is_result(&last));
            lines.push(now);
        }
        if terminal && (ends || now - shown > Duration::from_millis(100)) {
            shown = now;
            show(&progress, &last, now, ends);
        }
        if ends {
            return lines;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// True when the line gives a scenario's result.
fn is_result(line: &str) -> bool {
    ["PASS ", "SKIP ", "FAIL "].iter().any(|word| line.starts_with(word))
}

fn show(progress: &Progress, last: &str, now: Duration, ends: bool) {
    let mut terminal = std::io::stderr();
    let Progress { done, total, what } = progress;
    let last: String = last.chars().filter(|c| !c.is_control()).take(40).collect();
    let line = if ends { String::new() } else { format!("[{done}/{total}] {what} {:.0} s: {last}", now.as_secs_f64()) };
    let _ = write!(terminal, "\r\x1b[K{line}");
    let _ = terminal.flush();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_whole_line_has_a_time() {
        let path = std::env::temp_dir().join(format!("watch-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        let watch = Watch::start(&path, Progress::default());
        fs::write(&path, "one\n").unwrap();
        thread::sleep(Duration::from_millis(60));
        fs::write(&path, "one\ntwo\nthr").unwrap();
        let times = watch.end();
        fs::remove_file(&path).unwrap();
        assert_eq!(times.len(), 2, "{times:?}");
        assert!(times[1] > times[0], "{times:?}");
    }

    #[test]
    fn results_are_counted() {
        assert!(is_result("PASS cpuid") && is_result("FAIL io: x"));
        assert!(!is_result("PASSED") && !is_result("44 passed"));
    }
}
