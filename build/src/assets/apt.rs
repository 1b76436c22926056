//! Chooses and fetches Debian packages with apt's own tools.
//!
//! apt knows the archives of this machine and checks their signatures, so no
//! archive is named here. Nothing is installed or configured, and root is not
//! needed: when the machine's package lists are missing or too old, a private
//! copy is kept in the cache folder.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::host::output_of;
use crate::screen::{Screen, size};
use crate::workspace::{Workspace, file_sha256};

/// Sections whose packages are followed as dependencies: the libraries.
const FOLLOWED_SECTIONS: &[&str] = &["libs", "oldlibs"];

/// Most levels of dependencies; Debian's libraries need five.
const MOST_LEVELS: usize = 16;

/// How often the growing files are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// One package as apt would fetch it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// The file's name, which holds version and architecture.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its checksum with the algorithm's name before it, as apt prints it.
    pub checksum: String,
}

/// A set of packages that belong together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// Distribution and release they were chosen for.
    pub release: String,
    /// What was asked for, before dependencies.
    pub wanted: Vec<String>,
    /// Everything to fetch.
    pub packages: Vec<Package>,
}

/// What a package's record says, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Record {
    section: String,
    /// Each dependency with its alternatives.
    depends: Vec<Vec<String>>,
}

/// apt with one set of package lists.
#[derive(Debug)]
struct Apt {
    options: Vec<OsString>,
}

/// This machine's distribution and release, such as `debian 12`.
///
/// # Errors
///
/// If `/etc/os-release` cannot be read.
pub fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let value = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    Ok(format!("{} {}", value("ID"), value("VERSION_ID"))
        .trim()
        .to_owned())
}

/// Chooses packages and fetches those that are not in the cache.
///
/// `choose` turns what apt knows (asked through [`Catalogue`]) into names.
///
/// # Errors
///
/// If a package is unknown or cannot be fetched, also with fresh lists.
pub fn fetch(
    workspace: &Workspace,
    screen: &Screen,
    choose: impl Fn(&Catalogue<'_>) -> Result<Vec<String>>,
) -> Result<Selection> {
    let attempt = |apt: &Apt| {
        let selection = apt.select(&choose)?;
        apt.download(workspace, screen, &selection)?;
        Ok::<_, anyhow::Error>(selection)
    };
    attempt(&Apt {
        options: Vec::new(),
    })
    .or_else(|first| {
        let step = screen.step("Refreshing a private copy of the package lists");
        let apt = Apt::private(workspace)
            .with_context(|| format!("refreshing was needed, because: {first:#}"))?;
        step.done("");
        attempt(&apt)
    })
}

/// Whether all packages of a selection are in the cache, by name and size.
#[must_use]
pub fn is_complete(workspace: &Workspace, selection: &Selection) -> bool {
    missing(workspace, selection).is_empty()
}

/// The file of a package in the cache.
#[must_use]
pub fn cached(workspace: &Workspace, package: &Package) -> PathBuf {
    workspace.lab("debs").join(&package.file)
}

fn missing<'a>(workspace: &Workspace, selection: &'a Selection) -> Vec<&'a Package> {
    // An interrupted transfer leaves a short file under the final name.
    let is_whole = |package: &Package| {
        cached(workspace, package)
            .metadata()
            .is_ok_and(|file| file.len() == package.size)
    };
    selection
        .packages
        .iter()
        .filter(|package| !is_whole(package))
        .collect()
}

/// Answers questions about what apt could fetch.
#[derive(Debug)]
pub struct Catalogue<'a> {
    apt: &'a Apt,
}

impl Catalogue<'_> {
    /// Names of packages that match a regular expression.
    ///
    /// # Errors
    ///
    /// If apt fails.
    pub fn names(&self, expression: &str) -> Result<Vec<String>> {
        let text =
            output_of(
                self.apt
                    .command("apt-cache")
                    .args(["search", "--names-only", expression]),
            )?;
        Ok(text
            .lines()
            .filter_map(|line| line.split(' ').next())
            .map(str::to_owned)
            .collect())
    }

    /// What a package depends on, alternatives flattened.
    ///
    /// # Errors
    ///
    /// If the package is unknown.
    pub fn depends(&self, name: &str) -> Result<Vec<String>> {
        let records = self.apt.records(&[name.to_owned()])?;
        let record = records
            .get(name)
            .with_context(|| format!("apt knows no package {name}"))?;
        Ok(record.depends.iter().flatten().cloned().collect())
    }
}

impl Apt {
    /// Fetches the package lists into the cache folder.
    fn private(workspace: &Workspace) -> Result<Self> {
        let (state, cache) = (workspace.lab("apt/state"), workspace.lab("apt/cache"));
        for folder in [state.join("lists/partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let setting = |key: &str, folder: &Path| {
            let mut value = OsString::from(format!("{key}="));
            value.push(folder);
            [OsString::from("-o"), value]
        };
        let mut options = Vec::new();
        options.extend(setting("Dir::State", &state));
        options.extend(setting(
            "Dir::State::status",
            Path::new("/var/lib/dpkg/status"),
        ));
        options.extend(setting("Dir::Cache", &cache));
        let apt = Self { options };
        output_of(apt.command("apt-get").args(["update", "-q"])).context(
            "the package lists cannot be refreshed; is this machine's apt configured and online?",
        )?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Messages are parsed, and as root apt would fetch as another user, who
        // may not be allowed to write here.
        command
            .env("LC_ALL", "C")
            .args(["-o", "APT::Sandbox::User=root"])
            .args(&self.options);
        command.stdin(Stdio::null());
        command
    }

    /// The records of those of the packages that exist.
    fn records(&self, names: &[String]) -> Result<BTreeMap<String, Record>> {
        let shown = self
            .command("apt-cache")
            .args(["show", "--no-all-versions"])
            .args(names)
            .output()
            .context("cannot run apt-cache")?;
        // The status only says whether all names were known.
        Ok(parse_records(&String::from_utf8_lossy(&shown.stdout)))
    }

    fn select(&self, choose: &impl Fn(&Catalogue<'_>) -> Result<Vec<String>>) -> Result<Selection> {
        let wanted = choose(&Catalogue { apt: self })?;
        let mut chosen: BTreeSet<String> = wanted.iter().cloned().collect();
        let mut records = self.records(&wanted)?;
        for name in &wanted {
            ensure!(records.contains_key(name), "apt knows no package {name}");
        }
        let mut asked = chosen.clone();
        let mut frontier = wanted.clone();
        for _ in 0..MOST_LEVELS {
            let mut names: Vec<String> = frontier
                .iter()
                .filter_map(|name| records.get(name))
                .flat_map(|record| record.depends.iter().flatten())
                .filter(|name| !asked.contains(*name))
                .cloned()
                .collect();
            names.sort();
            names.dedup();
            if !names.is_empty() {
                asked.extend(names.iter().cloned());
                records.extend(self.records(&names)?);
            }
            let is_library = |name: &&String| {
                records
                    .get(*name)
                    .is_some_and(|record| FOLLOWED_SECTIONS.contains(&record.section.as_str()))
            };
            // Of alternatives the first library that exists.
            let next: BTreeSet<String> = frontier
                .iter()
                .filter_map(|name| records.get(name))
                .flat_map(|record| &record.depends)
                .filter_map(|alternatives| alternatives.iter().find(is_library))
                .filter(|name| !chosen.contains(*name))
                .cloned()
                .collect();
            if next.is_empty() {
                break;
            }
            chosen.extend(next.iter().cloned());
            frontier = next.into_iter().collect();
        }
        let packages = self.locate(&chosen)?;
        Ok(Selection {
            release: release()?,
            wanted,
            packages,
        })
    }

    /// Asks apt for file name, size and checksum of each package.
    fn locate(&self, names: &BTreeSet<String>) -> Result<Vec<Package>> {
        let text = output_of(
            self.command("apt-get")
                .args(["download", "--print-uris", "-q"])
                .args(names),
        )?;
        let mut packages: Vec<Package> = text.lines().filter_map(parse_location).collect();
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        let found: BTreeSet<&str> = packages
            .iter()
            .map(|package| package.name.as_str())
            .collect();
        for name in names {
            ensure!(
                found.contains(name.as_str()),
                "apt does not say where {name} is"
            );
        }
        Ok(packages)
    }

    fn download(
        &self,
        workspace: &Workspace,
        screen: &Screen,
        selection: &Selection,
    ) -> Result<()> {
        let missing = missing(workspace, selection);
        if missing.is_empty() {
            return Ok(());
        }
        let folder = workspace.lab("debs");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let total = missing.iter().map(|package| package.size).sum();
        let step = screen.bytes(format!("Fetching {} Debian packages", missing.len()), total);
        for package in &missing {
            // Left from an interrupted transfer; apt would try to continue it.
            let _ = fs::remove_file(cached(workspace, package));
        }
        let mut child = self
            .command("apt-get")
            .args(["download", "-q"])
            .args(missing.iter().map(|package| &package.name))
            .current_dir(&folder)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run apt-get")?;
        while child.try_wait()?.is_none() {
            let len = |package: &&Package| {
                cached(workspace, package)
                    .metadata()
                    .map_or(0, |file| file.len())
            };
            step.position(missing.iter().map(len).sum());
            thread::sleep(LOOK);
        }
        let ended = child.wait_with_output()?;
        if !ended.status.success() {
            bail!(
                "apt-get download: {}",
                String::from_utf8_lossy(&ended.stderr).trim()
            );
        }
        for package in &missing {
            let path = cached(workspace, package);
            if let Some(expected) = package.checksum.strip_prefix("SHA256:") {
                ensure!(
                    file_sha256(&path)? == expected,
                    "{} has a wrong checksum",
                    path.display()
                );
            }
        }
        step.done(&size(total));
        Ok(())
    }
}

/// Reads `'uri' file size ALGORITHM:digits`.
fn parse_location(line: &str) -> Option<Package> {
    let mut words = line.rsplit(' ');
    let (checksum, size, file) = (words.next()?, words.next()?, words.next()?);
    let (name, _) = file.split_once('_')?;
    let is_location = line.starts_with('\'') && checksum.contains(':') && file.ends_with(".deb");
    is_location.then_some(())?;
    Some(Package {
        name: name.to_owned(),
        file: file.to_owned(),
        size: size.parse().ok()?,
        checksum: checksum.to_owned(),
    })
}

/// Reads the paragraphs that `apt-cache show` prints.
fn parse_records(text: &str) -> BTreeMap<String, Record> {
    let mut records = BTreeMap::new();
    for paragraph in text.split("\n\n") {
        let mut name = None;
        let mut record = Record::default();
        for line in paragraph.lines() {
            match line.split_once(": ") {
                Some(("Package", value)) => name = Some(value.to_owned()),
                // Sections outside main look like contrib/libs.
                Some(("Section", value)) => {
                    record.section = value.rsplit('/').next().unwrap_or(value).to_owned();
                }
                Some(("Depends" | "Pre-Depends", value)) => {
                    record.depends.extend(value.split(',').map(alternatives));
                }
                _ => {}
            }
        }
        if let Some(name) = name {
            records.entry(name).or_insert(record);
        }
    }
    records
}

/// `a (>= 1) | b:any` is `["a", "b"]`.
fn alternatives(text: &str) -> Vec<String> {
    text.split('|')
        .filter_map(|choice| choice.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read_as_apt_prints_them() {
        let line = "'http://archive/pool/busybox-static_1.35.0-4%2bb1_amd64.deb' busybox-static_1%3a1.35.0-4+b1_amd64.deb 928188 SHA256:3d3f";
        let package = parse_location(line).unwrap();
        assert_eq!(package.name, "busybox-static");
        assert_eq!(package.file, "busybox-static_1%3a1.35.0-4+b1_amd64.deb");
        assert_eq!(package.size, 928_188);
        assert_eq!(package.checksum, "SHA256:3d3f");
        assert_eq!(parse_location("Reading package lists..."), None);
    }

    #[test]
    fn records_are_read_with_alternatives_and_versions() {
        let text = "Package: iperf3\nSection: net\nPre-Depends: init (>= 1)\nDepends: libc6 (>= 2.34), debconf (>= 0.5) | debconf-2.0, python3:any\nDescription: x\n more\n\nPackage: libc6\nSection: contrib/libs\n";
        let records = parse_records(text);
        assert_eq!(records["libc6"].section, "libs");
        let expected = [
            vec!["init"],
            vec!["libc6"],
            vec!["debconf", "debconf-2.0"],
            vec!["python3"],
        ];
        assert_eq!(records["iperf3"].depends, expected);
    }
}
