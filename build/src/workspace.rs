//! Where things are: the workspace, its target folder, the lab's cache.
//!
//! Nothing is assumed about the place of a clone or the name of its user.
//!
//! ```text
//! <target>/lab/packages.json   which Debian packages were chosen
//! <target>/lab/debs/           the packages as fetched
//! <target>/lab/parts/<key>/    what was taken out of them
//! <target>/lab/assets/<key>/   Xen, kernel and root archives, ready to boot
//! <target>/lab/snapshots/      booted labs
//! <target>/lab/run/<pid>-<n>/  sockets and logs of a running lab
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::{env, io};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// The folders of this clone.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the workspace from cargo's environment, else from the current folder upwards.
    ///
    /// # Errors
    ///
    /// If no folder up to the root holds this workspace.
    pub fn find() -> Result<Self> {
        let start = match env::var_os("CARGO_MANIFEST_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => env::current_dir().context("the current folder is gone")?,
        };
        let root = start
            .ancestors()
            .find(|folder| {
                folder.join("rust-toolchain.toml").is_file() && folder.join("build").is_dir()
            })
            .with_context(|| format!("{} is not inside this workspace", start.display()))?
            .to_path_buf();
        // Cargo takes a relative CARGO_TARGET_DIR from its own current folder.
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => env::current_dir()?.join(folder),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// A workspace whose folders are known.
    #[must_use]
    pub fn at(root: PathBuf, target: PathBuf) -> Self {
        Self { root, target }
    }

    /// The folder of the workspace's `Cargo.toml`.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target folder.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A place in the lab's cache.
    #[must_use]
    pub fn lab(&self, place: impl AsRef<Path>) -> PathBuf {
        self.target.join("lab").join(place)
    }

    /// Waits for the cache to be ours alone; it is until the result is dropped.
    ///
    /// Taken while files of the cache are made, never while a lab runs: several
    /// labs may run at once, each in a folder of its own.
    ///
    /// # Errors
    ///
    /// If the folder cannot be written.
    pub fn lock_cache(&self) -> Result<File> {
        let folder = self.lab("");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let path = folder.join("lock");
        let lock =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        lock.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(lock)
    }
}

/// Makes a folder appear whole or not at all.
///
/// `fill` works in a fresh folder beside `place`, which is then renamed. A
/// folder that exists already is left alone.
///
/// # Errors
///
/// Those of `fill` and of the file system; nothing is left at `place` then.
pub fn make_folder(place: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if place.is_dir() {
        return Ok(());
    }
    let name = place
        .file_name()
        .context("a folder needs a name")?
        .to_string_lossy();
    let fresh = place.with_file_name(format!(".{name}.{}", std::process::id()));
    remove_folder(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("cannot create {}", fresh.display()))?;
    let filled = fill(&fresh).and_then(|()| {
        fs::rename(&fresh, place).with_context(|| format!("cannot place {}", place.display()))
    });
    if filled.is_err() {
        // The first error is the one to report.
        let _ = remove_folder(&fresh);
    }
    filled
}

/// Removes a folder and its content; one that is not there is fine.
///
/// # Errors
///
/// If something in it cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Keeps the newest `keep` entries of a cache folder and removes the others.
///
/// # Errors
///
/// If the folder cannot be read or an entry cannot be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        found.push((entry.metadata()?.modified()?, entry.path()));
    }
    found.sort();
    let surplus = found.len().saturating_sub(keep);
    for (_, path) in found.into_iter().take(surplus) {
        if path.is_dir() {
            remove_folder(&path)?;
        } else {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Collects what a cached thing depends on and names it.
#[derive(Debug, Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// A key that depends on nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes; where one addition ends matters.
    #[must_use]
    pub fn with(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        // The length keeps "ab","c" and "a","bc" apart.
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.0.update(len.to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The key as 20 hexadecimal digits.
    #[must_use]
    pub fn name(self) -> String {
        let mut digits = data_encoding::HEXLOWER.encode(&self.0.finalize());
        digits.truncate(20);
        digits
    }
}

/// The SHA-256 of a file as 64 hexadecimal digits.
///
/// # Errors
///
/// If the file cannot be read.
pub fn file_sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(data_encoding::HEXLOWER.encode(&Sha256::digest(bytes)))
}

/// An environment variable that must be one of a few words; `None` if unset or empty.
///
/// # Errors
///
/// If it is set to anything else.
pub fn choice(variable: &str, words: &[&'static str]) -> Result<Option<&'static str>> {
    let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    match words.iter().find(|word| value == **word) {
        Some(word) => Ok(Some(word)),
        None => bail!(crate::host::Unusable(format!(
            "{variable} is {value:?}, but must be one of: {}",
            words.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_where_additions_end() {
        let name = |parts: &[&str]| {
            parts
                .iter()
                .fold(Key::new(), |key, part| key.with(part))
                .name()
        };
        assert_eq!(name(&["ab", "c"]).len(), 20);
        assert_ne!(name(&["ab", "c"]), name(&["a", "bc"]));
        assert_eq!(name(&["ab", "c"]), name(&["ab", "c"]));
    }

    #[test]
    fn a_folder_that_fails_to_fill_leaves_nothing() {
        let place = env::temp_dir().join(format!("portcullis-folder-{}", std::process::id()));
        let failed = make_folder(&place, |fresh| {
            fs::write(fresh.join("half"), "x")?;
            bail!("stopped")
        });
        assert!(failed.is_err());
        assert!(!place.exists());
        make_folder(&place, |fresh| Ok(fs::write(fresh.join("whole"), "x")?)).unwrap();
        assert!(place.join("whole").is_file());
        remove_folder(&place).unwrap();
    }
}
