//! `cargo xtask package`: what a Qubes user carries into dom0.
//!
//! ```text
//! dist/portcullis-<version>/                         the same as in the archive, to look at
//!   INSTALL.md, LICENSE-APACHE, LICENSE-MIT
//!   SHA256SUMS                                       of all other files
//!   install.sh                                       for dom0; changes nothing without --apply
//!   salt/portcullis/init.sls                         the same as a Salt state
//!   vm-kernels/portcullis-<version>-<hash>/vmlinuz   what /var/lib/qubes/vm-kernels gets
//! dist/portcullis-<version>.tar.gz                   all of it
//! dist/portcullis-<version>.tar.gz.sha256
//! ```
//!
//! The kernel's name holds the first digits of the image's hash: an upgrade never overwrites what one may want to go
//! back to. The archive depends on nothing but the content: names are sorted, and owners, modes and times are the same
//! everywhere. The texts are in `build/package/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;
use data_encoding::HEXLOWER;
use flate2::{Compression, GzBuilder};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::image::{self, Variant};
use crate::screen::{BOLD, Screen, paint};
use crate::workspace::{Workspace, remove_folder};

/// The time of every file in the archive, in seconds since 1970: the start of 1980, which every program takes.
const FILE_TIME: u64 = 315_532_800;

/// Digits of the image's hash in the name of the kernel.
const HASH_DIGITS: usize = 8;

const INSTALLER: &str = include_str!("../package/install.sh");
const STATE: &str = include_str!("../package/salt/init.sls");
const INSTRUCTIONS: &str = include_str!("../package/INSTALL.md");

/// Arguments of `cargo xtask package`.
#[derive(Debug, Args)]
pub struct PackageArguments {
    /// The folder to make it in
    #[arg(long, value_name = "FOLDER", default_value = "dist")]
    out: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// A file of the package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Permission bits.
    pub mode: u32,
    /// Its content.
    pub content: Vec<u8>,
}

/// What is carried into dom0: files by their path below the package's folder, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Name of the folder, `portcullis-<version>`.
    pub name: String,
    /// Name of the kernel in dom0.
    pub kernel: String,
    /// The files.
    pub files: BTreeMap<String, Entry>,
}

/// A package that was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// The archive.
    pub archive: PathBuf,
    /// Its SHA-256, 64 hexadecimal digits.
    pub sha256: String,
    /// The folder with the same content.
    pub folder: PathBuf,
    /// Name of the kernel in dom0.
    pub kernel: String,
}

fn digest(content: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(content))
}

impl Package {
    /// Makes the package of an image. `licences` are files to go with it, by name.
    #[must_use]
    pub fn new(version: &str, image: &[u8], licences: &[(&str, Vec<u8>)]) -> Self {
        let sha256 = digest(image);
        let name = format!("portcullis-{version}");
        let short = sha256.get(..HASH_DIGITS).unwrap_or_default();
        let kernel = format!("{name}-{short}");
        let fill = |text: &str| {
            let filled = text
                .replace("@VERSION@", version)
                .replace("@KERNEL@", &kernel)
                .replace("@SHA256@", &sha256);
            filled.into_bytes()
        };
        let mut files = BTreeMap::new();
        let mut add = |path: String, mode, content| {
            files.insert(path, Entry { mode, content });
        };
        add("install.sh".into(), 0o755, fill(INSTALLER));
        add("INSTALL.md".into(), 0o644, fill(INSTRUCTIONS));
        add("salt/portcullis/init.sls".into(), 0o644, fill(STATE));
        add(
            format!("vm-kernels/{kernel}/vmlinuz"),
            0o644,
            image.to_vec(),
        );
        for (file, content) in licences {
            add((*file).into(), 0o644, content.clone());
        }
        let sums: String = files
            .iter()
            .map(|(path, entry)| format!("{}  {path}\n", digest(&entry.content)))
            .collect();
        files.insert(
            "SHA256SUMS".into(),
            Entry {
                mode: 0o644,
                content: sums.into_bytes(),
            },
        );
        Self {
            name,
            kernel,
            files,
        }
    }

    /// The archive: the same bytes for the same package, wherever it is made.
    ///
    /// # Errors
    ///
    /// If a path is too long for an archive.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let gzip = GzBuilder::new()
            .mtime(0)
            .write(Vec::new(), Compression::best());
        let mut archive = tar::Builder::new(gzip);
        for (path, entry) in &self.files {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(u64::try_from(entry.content.len())?);
            header.set_mode(entry.mode);
            header.set_mtime(FILE_TIME);
            header.set_uid(0);
            header.set_gid(0);
            let inside = format!("{}/{path}", self.name);
            archive
                .append_data(&mut header, &inside, entry.content.as_slice())
                .with_context(|| format!("{inside} cannot be packed"))?;
        }
        Ok(archive.into_inner()?.finish()?)
    }

    /// Writes folder, archive and checksum into `out`, in place of what an earlier run left there.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn write(&self, out: &Path) -> Result<Written> {
        let folder = out.join(&self.name);
        remove_folder(&folder)?;
        for (path, entry) in &self.files {
            place(&folder.join(path), entry)?;
        }
        let content = self.archive()?;
        let sha256 = digest(&content);
        let file = format!("{}.tar.gz", self.name);
        let archive = out.join(&file);
        place(
            &archive,
            &Entry {
                mode: 0o644,
                content,
            },
        )?;
        let sum = format!("{sha256}  {file}\n").into_bytes();
        place(
            &out.join(format!("{file}.sha256")),
            &Entry {
                mode: 0o644,
                content: sum,
            },
        )?;
        Ok(Written {
            archive,
            sha256,
            folder,
            kernel: self.kernel.clone(),
        })
    }
}

/// Writes one file.
fn place(path: &Path, entry: &Entry) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let cannot = || format!("cannot write {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(cannot)?;
    }
    fs::write(path, &entry.content).with_context(cannot)?;
    fs::set_permissions(path, fs::Permissions::from_mode(entry.mode)).with_context(cannot)
}

/// Makes the package of the image that this clone builds.
///
/// # Errors
///
/// If the image cannot be built or is too large, or a licence is missing.
pub fn of_clone(workspace: &Workspace, screen: &Screen) -> Result<Package> {
    let image = image::prepare(workspace, screen, Variant::Normal)?;
    anyhow::ensure!(
        image.bytes <= image::MOST_BYTES,
        "the image has {} bytes, at most {} are allowed",
        image.bytes,
        image::MOST_BYTES
    );
    let content = fs::read(&image.path).context("the image is gone")?;
    let licences = ["LICENSE-APACHE", "LICENSE-MIT"]
        .into_iter()
        .map(|name| {
            let content = fs::read(workspace.root().join(name))
                .with_context(|| format!("{name} is missing"))?;
            Ok((name, content))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Package::new(env!("CARGO_PKG_VERSION"), &content, &licences))
}

/// Runs the command.
///
/// # Errors
///
/// Those of [`of_clone`], and if the package cannot be written.
pub fn run(
    workspace: &Workspace,
    screen: &Screen,
    arguments: &PackageArguments,
) -> Result<ExitCode> {
    let screen = &if arguments.json {
        screen.silenced()
    } else {
        *screen
    };
    let package = of_clone(workspace, screen)?;
    let written = package.write(&workspace.root().join(&arguments.out))?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&written)?);
        return Ok(ExitCode::SUCCESS);
    }
    anstream::println!("{}", paint(BOLD, &written.archive.display().to_string()));
    println!("  sha256   {}", written.sha256);
    println!("  kernel   {}", written.kernel);
    println!("  content  {}", written.folder.display());
    println!("  next     read INSTALL.md there");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn package() -> Package {
        Package::new("1.2.3", b"an image", &[("LICENSE-MIT", b"may".to_vec())])
    }

    #[test]
    fn the_kernel_is_where_and_called_as_dom0_wants_it() {
        let package = package();
        let name = format!("portcullis-1.2.3-{}", &digest(b"an image")[..8]);
        assert_eq!(package.kernel, name);
        let kernel = &package.files[&format!("vm-kernels/{name}/vmlinuz")];
        assert_eq!(kernel.content, b"an image");
        let state = String::from_utf8_lossy(&package.files["salt/portcullis/init.sls"].content);
        assert!(state.contains(&format!("sha256={}", digest(b"an image"))));
        for (path, entry) in &package.files {
            let text = String::from_utf8_lossy(&entry.content);
            assert!(!text.contains("@KERNEL@"), "{path}");
            assert!(!text.contains("@VERSION@"), "{path}");
        }
    }

    #[test]
    fn m2_both_installers_forbid_memory_on_demand() {
        let package = package();
        let text = |path: &str| {
            let (_, entry) = package
                .files
                .iter()
                .find(|(name, _)| name.ends_with(path))
                .unwrap();
            String::from_utf8_lossy(&entry.content).into_owned()
        };
        assert!(text("portcullis/init.sls").contains("- maxmem: 0\n"));
        assert!(text("install.sh").contains("set_pref maxmem 0\n"));
    }

    #[test]
    fn an_archive_is_sorted_and_knows_no_time_owner_or_place() {
        let bytes = package().archive().unwrap();
        assert_eq!(bytes, package().archive().unwrap());
        // Byte 4 to 7 of a gzip file are its time, byte 9 the system that made it.
        assert_eq!(bytes[4..8], [0; 4]);
        assert_eq!(bytes[9], 255);
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes.as_slice()));
        let mut names = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), FILE_TIME);
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            let path = entry.path().unwrap().into_owned();
            let wanted = if path.ends_with("install.sh") {
                0o755
            } else {
                0o644
            };
            assert_eq!(header.mode().unwrap(), wanted);
            names.push(path);
        }
        assert!(names.is_sorted());
        assert_eq!(names.len(), package().files.len());
    }

    #[test]
    fn checksums_name_every_other_file() {
        let package = package();
        let mut sums = String::new();
        package.files["SHA256SUMS"]
            .content
            .as_slice()
            .read_to_string(&mut sums)
            .unwrap();
        assert_eq!(sums.lines().count(), package.files.len() - 1);
        for line in sums.lines() {
            let (sum, path) = line.split_once("  ").unwrap();
            assert_eq!(sum, digest(&package.files[path].content));
        }
    }
}
