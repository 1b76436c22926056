//! Everything the lab boots, made from Debian packages without installing one.
//!
//! 1. [`apt`] chooses and fetches the packages: the newest hypervisor of this
//!    release, its tools, the standard kernel, busybox and a few programs with
//!    the libraries they need. The choice is kept in `packages.json`, so a
//!    later run fetches nothing, whatever the archive has become; a refresh is
//!    asked for explicitly.
//! 2. They are unpacked, and the wanted parts taken: Xen, the kernel's ELF,
//!    programs, libraries, modules. The rest is thrown away again.
//! 3. The parts, the agent (built here) and the scripts of `build/lab/` become
//!    root archives for dom0 and the guests.
//!
//! Each result is kept under a key made from everything it depends on,
//! including the text of these modules.
//!
//! Measured on a 2-core machine with Debian 12: see [`crate::lab`].

pub mod apt;
pub mod content;
pub mod cpio;
pub mod kernel;
pub mod modules;
pub mod programs;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host::output_of;
use crate::screen::Screen;
use crate::workspace::{Key, Workspace, file_sha256, make_folder, prune, remove_folder};
use apt::{Catalogue, Selection};
use content::Text;
use cpio::Archive;
use modules::Modules;
use programs::{Files, library_path};

/// The code that decides what is in the parts: a change makes new parts.
const PARTS_SOURCES: &[&str] = &[
    include_str!("mod.rs"),
    include_str!("content.rs"),
    include_str!("kernel.rs"),
    include_str!("modules.rs"),
    include_str!("programs.rs"),
];

/// How many versions of parts and assets stay in the cache.
const KEPT: usize = 3;

/// What a lab boots.
#[derive(Debug, Clone)]
pub struct Assets {
    /// The hypervisor, an ELF file.
    pub xen: PathBuf,
    /// The Linux kernel of dom0 and the guests, an ELF file.
    pub vmlinux: PathBuf,
    /// dom0's root archive; kernel and root archives of the guests are in it.
    pub dom0: PathBuf,
    /// Names the content of all of them.
    pub key: String,
    /// The packages they come from.
    pub about: About,
}

/// Which Xen and Linux these are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct About {
    /// File name of the hypervisor's package.
    pub xen: String,
    /// File name of the kernel's package.
    pub linux: String,
}

/// Makes sure that the assets are there, fetching and building what is missing.
///
/// With `refresh`, apt is asked again which packages are current.
///
/// # Errors
///
/// If a package cannot be had or does not hold what it should.
pub fn prepare(workspace: &Workspace, screen: &Screen, refresh: bool) -> Result<Assets> {
    let _lock = workspace.lock_cache()?;
    let agent = build_agent(workspace, screen)?;
    let selection = select(workspace, screen, refresh)?;
    let parts_key = PARTS_SOURCES
        .iter()
        .fold(Key::new(), Key::with)
        .with(serde_json::to_vec(&selection)?)
        .name();
    let parts = workspace.lab("parts").join(&parts_key);
    if !parts.is_dir() {
        // The parts are new, so the packages are needed, maybe once more.
        let selection = fetch(workspace, screen, &selection)?;
        let step = screen.step("Unpacking Xen, Linux and the tools");
        make_folder(&parts, |folder| take_parts(workspace, &selection, folder))?;
        step.done("");
        prune(&workspace.lab("parts"), KEPT)?;
    }
    let texts = [
        content::dom0_texts(),
        content::guest_texts(),
        content::firewall_texts(),
    ];
    let key = texts
        .iter()
        .flatten()
        .fold(Key::new(), |key, text| {
            key.with(text.path).with(&text.content)
        })
        .with(include_str!("cpio.rs"))
        .with(&parts_key)
        .with(file_sha256(&agent)?)
        .name();
    let folder = workspace.lab("assets").join(&key);
    if !folder.is_dir() {
        let step = screen.step("Composing the root archives");
        let agent = fs::read(&agent).context("the agent is gone")?;
        make_folder(&folder, |folder| compose(&parts, &agent, folder))?;
        step.done("");
        prune(&workspace.lab("assets"), KEPT)?;
    }
    let about = package_of(&selection)?;
    Ok(Assets {
        xen: folder.join("xen.elf"),
        vmlinux: folder.join("vmlinux"),
        dom0: folder.join("dom0.cpio"),
        key,
        about,
    })
}

/// The remembered choice of packages, or a new one.
fn select(workspace: &Workspace, screen: &Screen, refresh: bool) -> Result<Selection> {
    let path = workspace.lab("packages.json");
    let remembered = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Selection>(&text).ok())
        .filter(|selection| {
            let release = apt::release().unwrap_or_default();
            let has = |name: &&str| selection.wanted.iter().any(|wanted| wanted == name);
            !refresh && selection.release == release && content::PACKAGES.iter().all(has)
        });
    match remembered {
        Some(selection) => Ok(selection),
        None => {
            let selection = apt::fetch(workspace, screen, choose_packages)?;
            fs::write(&path, serde_json::to_vec_pretty(&selection)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(selection)
        }
    }
}

/// Fetches the packages of a remembered choice again if they are gone.
///
/// The archive may have newer versions by then; the choice is made anew.
fn fetch(workspace: &Workspace, screen: &Screen, selection: &Selection) -> Result<Selection> {
    if apt::is_complete(workspace, selection) {
        return Ok(selection.clone());
    }
    select(workspace, screen, true)
}

/// Finds the packages whose names hold version numbers and adds the others.
fn choose_packages(catalogue: &Catalogue<'_>) -> Result<Vec<String>> {
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    let hypervisor = catalogue
        .names("^xen-hypervisor-[0-9.]+-amd64$")?
        .into_iter()
        .max_by_key(|name| numbers(name))
        .context("apt knows no Xen hypervisor; is this Debian with its main archive?")?;
    let version = hypervisor
        .trim_start_matches("xen-hypervisor-")
        .trim_end_matches("-amd64");
    let tools = format!("xen-utils-{version}");
    let kernel = catalogue
        .depends("linux-image-amd64")?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .context("linux-image-amd64 names no kernel")?;
    let mut names = vec![hypervisor, tools, kernel];
    names.extend(content::PACKAGES.iter().map(|name| (*name).to_owned()));
    Ok(names)
}

fn package_of(selection: &Selection) -> Result<About> {
    let file = |prefix: &str| {
        let found = selection
            .packages
            .iter()
            .find(|package| package.name.starts_with(prefix));
        found.map(|package| package.file.replace("%3a", ":").replace("_amd64.deb", ""))
    };
    match (file("xen-hypervisor-"), file("linux-image-")) {
        (Some(xen), Some(linux)) => Ok(About { xen, linux }),
        _ => bail!("the choice of packages is incomplete; remove packages.json in the lab's cache"),
    }
}

/// Builds the helper program of dom0 and the guests.
fn build_agent(workspace: &Workspace, screen: &Screen) -> Result<PathBuf> {
    build_static(workspace, screen, "lab-agent", "lab")
}

/// Builds the double of dom0's Qubes daemons. It is in no archive, so that a change of it costs no new snapshot: who
/// wants it puts it into dom0.
///
/// # Errors
///
/// If it does not compile.
pub fn build_double(workspace: &Workspace, screen: &Screen) -> Result<PathBuf> {
    let _lock = workspace.lock_cache()?;
    build_static(workspace, screen, "dom0-double", "dom0-double")
}

/// Builds a program without shared libraries.
fn build_static(
    workspace: &Workspace,
    screen: &Screen,
    package: &str,
    name: &str,
) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let folder = workspace.lab("agent");
    let program = folder.join(TARGET).join("release").join(name);
    let step = (!program.is_file()).then(|| screen.step(format!("Building {package} for the lab")));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // A target folder of its own: other flags would rebuild everything else.
    output_of(
        Command::new(cargo)
            .args(["build", "--quiet", "--release", "--locked", "-p", package])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&folder)
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C strip=symbols",
            )
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .current_dir(workspace.root()),
    )
    .with_context(|| format!("cannot build {package}"))?;
    if let Some(step) = step {
        step.done("");
    }
    Ok(program)
}

/// One set of programs, libraries and modules in the parts folder.
struct Part {
    name: &'static str,
    programs: &'static [&'static str],
    modules: &'static [&'static [&'static str]],
}

const PARTS: &[Part] = &[
    Part {
        name: "dom0",
        programs: content::DOM0_PROGRAMS,
        modules: &[content::DOM0_MODULES],
    },
    Part {
        name: "guest",
        programs: content::GUEST_PROGRAMS,
        modules: &[content::GUEST_MODULES],
    },
    Part {
        name: "firewall",
        programs: content::FIREWALL_PROGRAMS,
        modules: &[content::GUEST_MODULES, content::FIREWALL_MODULES],
    },
];

/// Unpacks the packages and keeps what the archives need.
fn take_parts(workspace: &Workspace, selection: &Selection, folder: &Path) -> Result<()> {
    let root = workspace.lab("unpacked");
    remove_folder(&root)?;
    fs::create_dir_all(&root)?;
    for package in &selection.packages {
        output_of(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(apt::cached(workspace, package))
                .arg(&root),
        )?;
    }
    let boot = root.join("boot");
    let xen = find_in(&boot, |name| {
        name.starts_with("xen-") && name.ends_with(".gz")
    })?;
    let hypervisor = kernel::decompress(&fs::read(xen)?).context("cannot unpack Xen")?;
    fs::write(folder.join("xen.elf"), hypervisor)?;
    let vmlinuz = find_in(&boot, |name| name.starts_with("vmlinuz-"))?;
    fs::write(
        folder.join("vmlinux"),
        kernel::extract_vmlinux(&fs::read(vmlinuz)?)?,
    )?;
    let files = Files::scan(&root)?;
    let modules = Modules::scan(&root)?;
    for part in PARTS {
        take_part(&files, &modules, part, &folder.join(part.name))
            .with_context(|| format!("cannot gather what {} needs", part.name))?;
    }
    remove_folder(&root)
}

fn take_part(files: &Files, modules: &Modules, part: &Part, folder: &Path) -> Result<()> {
    let mut contents = Vec::new();
    fs::create_dir_all(folder.join("bin"))?;
    for name in part.programs.iter().chain(&["busybox"]) {
        let content = files.read(files.program(name)?)?;
        fs::write(folder.join("bin").join(name), &content)?;
        contents.push(content);
    }
    for (name, content) in files.libraries(&contents, content::EXTRA_LIBRARIES)? {
        let path = folder.join(library_path(&name));
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        fs::write(path, content)?;
    }
    let wanted: Vec<&str> = part
        .modules
        .iter()
        .flat_map(|list| list.iter().copied())
        .collect();
    let modules = modules.closure(&wanted)?;
    fs::create_dir_all(folder.join("lib/modules"))?;
    let mut order = String::new();
    for module in modules {
        order.push_str(&module.name);
        order.push('\n');
        fs::write(
            folder
                .join("lib/modules")
                .join(format!("{}.ko", module.name)),
            module.content,
        )?;
    }
    fs::create_dir_all(folder.join("etc/lab"))?;
    Ok(fs::write(folder.join("etc/lab/modules"), order)?)
}

/// Writes the three root archives; the guests' two go into dom0's.
fn compose(parts: &Path, agent: &[u8], folder: &Path) -> Result<()> {
    let guest = archive(
        &[&parts.join("guest")],
        &content::guest_texts(),
        agent,
        &[],
        Vec::new(),
    )?;
    let firewall_texts = [content::guest_texts(), content::firewall_texts()].concat();
    let firewall = archive(
        &[&parts.join("guest"), &parts.join("firewall")],
        &firewall_texts,
        agent,
        &[],
        Vec::new(),
    )?;
    let vmlinux = fs::read(parts.join("vmlinux"))?;
    let boot: &[(&str, &[u8])] = &[
        ("lab/vmlinux", &vmlinux),
        ("lab/guest.cpio", &guest),
        ("lab/firewall.cpio", &firewall),
    ];
    let out = BufWriter::new(File::create(folder.join("dom0.cpio"))?);
    archive(
        &[&parts.join("dom0")],
        &content::dom0_texts(),
        agent,
        boot,
        out,
    )?;
    for name in ["xen.elf", "vmlinux"] {
        fs::copy(parts.join(name), folder.join(name))?;
    }
    Ok(())
}

/// Writes one root archive from part folders (the later wins), texts and files.
fn archive<W: io::Write>(
    folders: &[&Path],
    texts: &[Text],
    agent: &[u8],
    files: &[(&str, &[u8])],
    out: W,
) -> Result<W> {
    let mut paths: BTreeMap<String, PathBuf> = BTreeMap::new();
    for folder in folders {
        walk(folder, &mut |path| {
            if let Ok(inside) = path.strip_prefix(folder) {
                paths.insert(inside.to_string_lossy().into_owned(), path.to_path_buf());
            }
        })?;
    }
    let mut archive = Archive::new(out);
    for (inside, path) in &paths {
        archive.file(inside, 0o755, &fs::read(path)?)?;
    }
    if paths.contains_key("bin/xenstore") {
        for name in content::XENSTORE_NAMES {
            archive.link(&format!("bin/xenstore-{name}"), "xenstore")?;
        }
    }
    archive.file("bin/lab", 0o755, agent)?;
    for text in texts {
        archive.file(text.path, text.mode, text.content.as_bytes())?;
    }
    for (path, content) in files {
        archive.file(path, 0o644, content)?;
    }
    Ok(archive.finish()?)
}

fn find_in(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("no folder {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| fits(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
        .pop()
        .with_context(|| format!("{} lacks an expected file", folder.display()))
}

/// Calls `visit` for every file and link below a folder, in order of names.
pub(crate) fn walk(folder: &Path, visit: &mut dyn FnMut(&Path)) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("no folder {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in entries {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        if path.is_dir() && !path.is_symlink() {
            walk(&path, visit)?;
        } else {
            visit(&path);
        }
    }
    Ok(())
}
