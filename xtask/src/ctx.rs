//! What all commands share: the repository root, a shell in it, the set-up policy, and logged runs of other programs.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::Shell;

/// Any failure; its text is one line that says what to do, or empty when everything has been said.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Handed to every command and stage.
pub struct Ctx {
    /// A shell whose directory is the repository root.
    pub sh: Shell,
    /// The repository root.
    pub root: PathBuf,
    /// `--no-install` was given.
    pub no_install: bool,
}

impl Ctx {
    /// Finds the repository this program was built from.
    pub fn new(no_install: bool) -> Result<Ctx> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("xtask is not in a repository")?.to_path_buf();
        let sh = Shell::new()?;
        sh.change_dir(&root);
        Ok(Ctx { sh, root, no_install })
    }

    /// `target/xtask/NAME`, created: where everything xtask makes goes.
    pub fn work_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join("target/xtask").join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }
}

/// The log file of one stage. Programs run through it write there, not to the screen.
pub struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// Starts `target/xtask/logs/NAME.log` anew.
    pub fn create(ctx: &Ctx, name: &str) -> Result<Log> {
        let path = ctx.work_dir("logs")?.join(format!("{name}.log"));
        Ok(Log { file: File::create(&path)?, path })
    }

    /// Where the log is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line to the log.
    pub fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.file, "{text}")?;
        Ok(())
    }

    /// Runs `command` (an `xshell::Cmd` or a `std::process::Command`) with no input and its output in the log.
    pub fn run(&mut self, command: impl Into<Command>) -> Result<()> {
        let (command, success) = self.succeeds(command)?;
        if success { Ok(()) } else { Err(format!("failed: {command}").into()) }
    }

    /// As [`run`](Self::run), for a command that must fail: the control of a check.
    pub fn run_expecting_failure(&mut self, command: impl Into<Command>) -> Result<()> {
        let (command, success) = self.succeeds(command)?;
        if success { Err(format!("should have failed, and did not: {command}").into()) } else { Ok(()) }
    }

    fn succeeds(&mut self, command: impl Into<Command>) -> Result<(String, bool)> {
        let mut command: Command = command.into();
        let text = describe(&command);
        self.line(&format!("$ {text}"))?;
        let status = command
            .stdin(Stdio::null())
            .stdout(self.file.try_clone()?)
            .stderr(self.file.try_clone()?)
            .status()
            .map_err(|e| format!("cannot run {text}: {e}"))?;
        Ok((text, status.success()))
    }

    /// Runs `command` with no input and its output in the log; its exit status.
    pub fn status(&mut self, command: &mut Command) -> Result<Option<i32>> {
        let text = describe(command);
        command.stdin(Stdio::null()).stdout(self.file.try_clone()?).stderr(self.file.try_clone()?);
        Ok(command.status().map_err(|e| format!("cannot run {text}: {e}"))?.code())
    }

    /// Bytes in the log so far, for [`since`](Self::since).
    pub fn length(&self) -> Result<usize> {
        Ok(fs::read(&self.path)?.len())
    }

    /// What came into the log after its length was `start`.
    pub fn since(&self, start: usize) -> Result<String> {
        Ok(String::from_utf8_lossy(fs::read(&self.path)?.get(start..).unwrap_or_default()).into_owned())
    }

    /// The last `lines` lines of the log.
    pub fn tail(&self, lines: usize) -> String {
        let text = fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// How a stage ended, when it did not fail.
#[allow(dead_code)]
pub enum Outcome {
    /// Everything checked.
    Passed,
    /// Checked, with something to tell in the stage's line.
    PassedWith(String),
    /// Not checked, and why.
    Skipped(String),
}
