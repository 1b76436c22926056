//! `cargo xtask image`: builds the bootable image, checks it, and says what it is.
//!
//! ```text
//! <target>/image/portcullis           the image: what Xen boots
//! <target>/image/portcullis.symbols   the same, with symbols and line tables (addr2line -e)
//! ```

pub mod build;
pub mod elf;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::host::output_of;
use crate::screen::{BOLD, Screen, paint};
use crate::workspace::{Workspace, file_sha256, remove_folder};

/// The largest file, in bytes.
pub const MOST_BYTES: u64 = 512 * 1024;

/// Arguments of `cargo xtask image`.
#[derive(Debug, Args)]
pub struct ImageArguments {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Build the image that crashes on request, for tests of how that is reported
    #[arg(long)]
    crash_commands: bool,
}

/// Which image to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Variant {
    /// The one to ship.
    #[default]
    Normal,
    /// With the console commands of `kernel/src/crash.rs`.
    CrashCommands,
}

impl Variant {
    const fn features(self) -> &'static str {
        match self {
            Self::Normal => "image",
            Self::CrashCommands => "image,crash-commands",
        }
    }

    const fn file_name(self) -> &'static str {
        match self {
            Self::Normal => "portcullis",
            Self::CrashCommands => "portcullis-crash-commands",
        }
    }
}

/// A finished image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// The file that Xen boots.
    pub path: PathBuf,
    /// The same with symbols.
    pub symbols: PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of code.
    pub text: u64,
    /// Bytes of constants.
    pub rodata: u64,
    /// Bytes of initialised data.
    pub data: u64,
    /// Bytes of memory beyond the file: zeroed data, page tables, stacks.
    pub bss: u64,
    /// SHA-256 of the file, 64 hexadecimal digits.
    pub sha256: String,
}

impl Image {
    fn is_too_large(&self) -> bool {
        self.bytes > MOST_BYTES
    }

    fn excess(&self) -> String {
        format!(
            "the image has {} bytes, at most {MOST_BYTES} are allowed",
            self.bytes
        )
    }
}

/// Builds an image. Without changes since the last time this takes a moment.
///
/// An image larger than [`MOST_BYTES`] is only remarked on, so that it can be run while it is being made smaller; the
/// command refuses it.
///
/// # Errors
///
/// If it does not compile, or the result is not as [`elf::examine`] wants it.
pub fn prepare(workspace: &Workspace, screen: &Screen, variant: Variant) -> Result<Image> {
    let image = make(workspace, screen, variant)?;
    if image.is_too_large() {
        screen.warn(&image.excess());
    }
    Ok(image)
}

fn make(workspace: &Workspace, screen: &Screen, variant: Variant) -> Result<Image> {
    let step = screen.step("Building the image");
    let linked = build::build(workspace, variant.features())?;
    let linked = fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
    let file = elf::cut(&linked).context("the image is not fit to boot")?;
    let sizes = elf::examine(&file)?;

    let folder = workspace.target().join("image");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(variant.file_name());
    let symbols = path.with_extension("symbols");
    replace(&symbols, &linked)?;
    replace(&path, &file)?;
    let image = Image {
        bytes: u64::try_from(file.len())?,
        text: sizes.text,
        rodata: sizes.rodata,
        data: sizes.data,
        bss: sizes.bss,
        sha256: file_sha256(&path)?,
        path,
        symbols,
    };
    step.done(&format!("{} KiB", image.bytes.div_ceil(1024)));
    Ok(image)
}

/// Builds the image of a copy of this clone's files in another folder; returns its SHA-256.
///
/// # Errors
///
/// If the files cannot be copied, or as [`prepare`].
pub fn prepare_elsewhere(workspace: &Workspace) -> Result<String> {
    let place = workspace
        .target()
        .join("image-elsewhere/a copy with another path");
    let root = place.join("source");
    remove_folder(&root)?;
    let listed = output_of(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(workspace.root()),
    )?;
    for name in listed.lines() {
        let (from, to) = (workspace.root().join(name), root.join(name));
        if !from.is_file() {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        fs::copy(&from, &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    let copy = Workspace::at(root, place.join("target"));
    let screen = Screen::new().silenced();
    prepare(&copy, &screen, Variant::Normal).map(|image| image.sha256)
}

/// Writes a file that appears whole or not at all, and not at all anew if its content is the same.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let fresh = path.with_extension(format!("new{}", std::process::id()));
    fs::write(&fresh, content).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, path).with_context(|| format!("cannot place {}", path.display()))
}

/// Runs the command.
///
/// # Errors
///
/// Those of [`prepare`], and an image larger than [`MOST_BYTES`].
pub fn run(workspace: &Workspace, screen: &Screen, arguments: &ImageArguments) -> Result<ExitCode> {
    let variant = if arguments.crash_commands {
        Variant::CrashCommands
    } else {
        Variant::Normal
    };
    let image = if arguments.json {
        let image = make(workspace, &screen.silenced(), variant)?;
        anstream::println!("{}", serde_json::to_string_pretty(&image)?);
        image
    } else {
        let image = make(workspace, screen, variant)?;
        describe(&image);
        image
    };
    ensure!(!image.is_too_large(), image.excess());
    Ok(ExitCode::SUCCESS)
}

/// Prints what the image is.
fn describe(image: &Image) {
    anstream::println!("{}", paint(BOLD, &image.path.display().to_string()));
    for (name, bytes, what) in [
        ("text", image.text, "code"),
        ("rodata", image.rodata, "constants"),
        ("data", image.data, "initialised data"),
        (
            "bss",
            image.bss,
            "zeroed data, page tables, stacks; not in the file",
        ),
        ("file", image.bytes, &format!("at most {MOST_BYTES}")),
    ] {
        anstream::println!("  {name:8}{bytes:>9}  {what}");
    }
    anstream::println!("  sha256   {}", image.sha256);
    anstream::println!("  symbols  {}", image.symbols.display());
}
