//! Root archives in the "newc" format.
//!
//! Linux unpacks such an archive into its first root file system. The format
//! is a header of 110 bytes in hexadecimal text, the name, the content, each
//! padded to 4 bytes; a record named `TRAILER!!!` ends it. Archives that follow
//! each other, each padded to 512 bytes, are unpacked one after the other.
//!
//! Every time stamp is zero and nobody but root owns anything, so the same
//! content gives the same bytes. No device nodes: the kernel's built-in archive
//! has `/dev/console`, and devtmpfs the rest.
//!
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::io::{self, Write};

/// File type bits of `stat` for a folder.
const FOLDER: u32 = 0o040_000;
/// File type bits of `stat` for a plain file.
const FILE: u32 = 0o100_000;
/// File type bits of `stat` for a symbolic link.
const LINK: u32 = 0o120_000;

/// Where an archive ends is padded to this many bytes.
const BLOCK: u64 = 512;

/// Writes one archive.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    written: u64,
    entries: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            entries: 0,
            folders: BTreeSet::new(),
        }
    }

    /// Adds a folder and those above it; one that is there already is kept.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above)?;
        }
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER | 0o755, &[])
    }

    /// Adds a file and the folders above it.
    ///
    /// # Errors
    ///
    /// Those of the writer; `InvalidInput` for a file of 4 GiB or more.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.folder_above(path)?;
        self.entry(path.trim_matches('/'), FILE | mode, content)
    }

    /// Adds a symbolic link and the folders above it.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.folder_above(path)?;
        self.entry(path.trim_matches('/'), LINK | 0o777, target.as_bytes())
    }

    /// Ends the archive and returns the writer.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.pad(BLOCK)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn folder_above(&mut self, path: &str) -> io::Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((above, _)) => self.folder(above),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let content_len = u32::try_from(content.len()).map_err(too_large)?;
        let name_len = u32::try_from(name.len() + 1).map_err(too_large)?;
        self.entries += 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        // inode, mode, user, group, links, time, size, device and its kind
        // (major, minor each), length of the name with its end, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content_len,
            0,
            0,
            0,
            0,
            name_len,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.pad(4)?;
        self.write(content)?;
        self.pad(4)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += u64::try_from(bytes.len()).map_err(io::Error::other)?;
        Ok(())
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        while !self.written.is_multiple_of(to) {
            self.write(&[0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_laid_out_as_the_kernel_expects() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/etc/name", 0o644, b"lab\n").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(bytes.len() % 512, 0);
        assert!(text.starts_with("070701"));
        // folder: 110 bytes of header, "etc\0", padded to 116
        assert_eq!(&bytes[110..114], b"etc\0");
        assert_eq!(&text[116..122], "070701");
        assert_eq!(&text[116 + 14..116 + 22], "000081a4");
        assert_eq!(&text[116 + 54..116 + 62], "00000004");
        // header 110, name 9 and its end, padding 0, content
        assert_eq!(&bytes[116 + 110..116 + 120], b"etc/name\0\0");
        assert_eq!(&bytes[116 + 120..116 + 124], b"lab\n");
    }

    #[test]
    fn folders_are_written_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/one", 0o644, b"").unwrap();
        archive.link("a/b/two", "one").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5);
    }
}
