//! Programs with the shared libraries they need.
//!
//! Libraries are looked for inside the unpacked packages only, never on this
//! machine: what runs in the lab must not depend on what is installed here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _};
use object::{Endianness, elf};

/// Where the libraries of a root archive go; the loader searches it by default.
pub const LIBRARY_FOLDER: &str = "lib/x86_64-linux-gnu";

/// The dynamic loader's path, which every program holds.
pub const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// The loader's file name, as libraries name it among their needs.
const LOADER_NAME: &str = "ld-linux-x86-64.so.2";

/// All files of the unpacked packages, by name.
#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    by_name: BTreeMap<String, Vec<PathBuf>>,
}

impl Files {
    /// Looks through the unpacked packages.
    ///
    /// # Errors
    ///
    /// If a folder cannot be read.
    pub fn scan(root: &Path) -> Result<Self> {
        let mut by_name: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        super::walk(root, &mut |path| {
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            by_name
                .entry(name.unwrap_or_default())
                .or_default()
                .push(path.to_path_buf());
        })?;
        Ok(Self {
            root: root.to_path_buf(),
            by_name,
        })
    }

    /// Finds a program by name, in whatever folder of programs it is.
    ///
    /// # Errors
    ///
    /// If it is in none; version numbers in folder names do not matter.
    pub fn program(&self, name: &str) -> Result<&Path> {
        self.find(name, |folder| {
            folder.ends_with("bin") || folder.ends_with("sbin")
        })
        .with_context(|| format!("the packages hold no program {name}"))
    }

    fn library(&self, name: &str) -> Option<&Path> {
        self.find(name, |folder| {
            folder.components().any(|part| part.as_os_str() == "lib")
        })
    }

    fn find(&self, name: &str, fits: impl Fn(&Path) -> bool) -> Option<&Path> {
        let found = self.by_name.get(name)?;
        found
            .iter()
            .find(|path| path.parent().is_some_and(&fits))
            .map(PathBuf::as_path)
    }

    /// Reads a file, following links inside the root.
    ///
    /// # Errors
    ///
    /// If it is missing or its links run in a circle.
    pub fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let mut path = path.to_path_buf();
        for _ in 0..8 {
            let Ok(target) = fs::read_link(&path) else {
                return fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
            };
            path = match target.strip_prefix("/") {
                Ok(inside) => self.root.join(inside),
                Err(_) => path.parent().unwrap_or(&self.root).join(target),
            };
        }
        bail!("too many links at {}", path.display())
    }

    /// The libraries that the given programs need, by name, with all of theirs.
    ///
    /// `extra` names libraries that are loaded at run time.
    ///
    /// # Errors
    ///
    /// If some are in none of the packages; all missing ones are named.
    pub fn libraries(
        &self,
        programs: &[Vec<u8>],
        extra: &[&str],
    ) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut missing = BTreeSet::new();
        let mut open: Vec<String> = extra.iter().map(|name| (*name).to_owned()).collect();
        for program in programs {
            open.extend(needed(program)?);
        }
        while let Some(name) = open.pop() {
            if found.contains_key(&name) || missing.contains(&name) {
                continue;
            }
            match self.library(&name) {
                Some(path) => {
                    let content = self.read(path)?;
                    open.extend(needed(&content).with_context(|| format!("{name} is damaged"))?);
                    found.insert(name, content);
                }
                None => {
                    missing.insert(name);
                }
            }
        }
        if !missing.is_empty() {
            bail!(
                "the packages lack libraries: {}",
                Vec::from_iter(missing).join(", ")
            );
        }
        Ok(found)
    }
}

/// Where a library belongs in a root archive.
#[must_use]
pub fn library_path(name: &str) -> String {
    if name == LOADER_NAME {
        LOADER.to_owned()
    } else {
        format!("{LIBRARY_FOLDER}/{name}")
    }
}

/// The `NEEDED` names of an ELF file; none if it is static.
fn needed(file: &[u8]) -> Result<Vec<String>> {
    let header = elf::FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, file)?;
    let sections = header.sections(endian, file)?;
    let Some((entries, link)) = sections.dynamic(endian, file)? else {
        // Without a section table there is nothing to read, but Debian's
        // programs have one unless they are static.
        if segments
            .iter()
            .any(|segment| segment.p_type(endian) == elf::PT_DYNAMIC)
        {
            bail!("dynamic, but without section table");
        }
        return Ok(Vec::new());
    };
    let strings = sections.strings(endian, file, link)?;
    entries
        .iter()
        .filter(|entry| entry.d_tag(endian) == elf::DT_NEEDED)
        .map(|entry| {
            let name = entry.string(endian, strings)?;
            Ok(std::str::from_utf8(name)?.to_owned())
        })
        .collect()
}
