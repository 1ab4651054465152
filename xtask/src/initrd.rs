//! Initial RAM disks: files of this repository and of Debian packages, in the "newc" format that Linux unpacks.

use crate::ctx::Result;
use std::fs;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive that is being made.
#[derive(Clone, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: Vec<String>,
    entries: u32,
}

impl Archive {
    /// Adds a file that may be executed, with the directories above it.
    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.above(name);
        self.entry(name, PROGRAM, content);
    }

    /// Adds the file at `path`.
    pub fn copy(&mut self, name: &str, path: &Path) -> Result<()> {
        let content = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        self.file(name, &content);
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn above(&mut self, name: &str) {
        for (at, _) in name.match_indices('/') {
            let directory = &name[..at];
            if !directory.is_empty() && !self.directories.iter().any(|known| known == directory) {
                self.directories.push(directory.to_string());
                self.entry(directory, DIRECTORY, &[]);
            }
        }
    }

    /// A header of 13 numbers of 8 hexadecimal digits, the name and the content, each padded to 4 bytes.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        // Inode, mode, owner, group, links, time, size, device (2), device number (2), size of the name, checksum.
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_once() {
        let mut archive = Archive::default();
        archive.file("bin/a", b"12345");
        archive.file("bin/b", b"");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let starts: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(starts.len(), 4, "bin, bin/a, bin/b and the trailer");
        assert!(starts.iter().all(|at| at % 4 == 0));
        // Of bin/a: its size, in the seventh field, and its content after the padded name.
        let a = &text[starts[1]..starts[2]];
        assert_eq!(&a[6 + 6 * 8..6 + 7 * 8], "00000005");
        assert!(a[110..].starts_with("bin/a\0"));
        assert_eq!(&a[116..121], "12345");
    }
}
