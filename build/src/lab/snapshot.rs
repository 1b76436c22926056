//! Booted labs in files, so that a start takes a second or two.
//!
//! A snapshot holds the whole machine, so it is named by everything that is
//! inside: QEMU (version, size and time of the program), its arguments, the
//! assets, and the layer's own name (what was done after booting).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};

use super::machine::{Machine, MachineOptions, arguments};
use super::qmp::Qmp;
use crate::assets::Assets;
use crate::host::Qemu;
use crate::workspace::{Key, Workspace, prune};

/// How many snapshots stay; each is some hundred MiB.
const KEPT: usize = 4;

/// The name QEMU writes to, in its own folder.
const OUTGOING: &str = "outgoing";

/// Where the snapshot of a lab is or would be.
///
/// # Errors
///
/// If QEMU's program cannot be looked at.
pub(super) fn place(
    workspace: &Workspace,
    qemu: &Qemu,
    assets: &Assets,
    options: &MachineOptions,
    layer: &str,
) -> Result<PathBuf> {
    let program = fs::metadata(&qemu.program).context("QEMU is gone")?;
    let changed = program
        .modified()?
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let key = Key::new()
        .with(&qemu.version)
        .with(program.len().to_le_bytes())
        .with(changed.to_le_bytes())
        .with(arguments(qemu.accelerator, options).join("\n"))
        .with(&assets.key)
        .with(layer);
    Ok(workspace
        .lab("snapshots")
        .join(format!("{}-{}", key.name(), layer)))
}

/// Writes the machine to its place and lets it run on.
///
/// # Errors
///
/// If QEMU cannot save it, in which case it runs on all the same.
pub(super) fn save(
    workspace: &Workspace,
    machine: &Machine,
    monitor: &mut Qmp,
    place: &Path,
) -> Result<()> {
    let outgoing = machine.folder().join(OUTGOING);
    let saved = monitor.save(Path::new(OUTGOING)).and_then(|()| {
        let _lock = workspace.lock_cache()?;
        let folder = workspace.lab("snapshots");
        fs::create_dir_all(&folder)?;
        fs::rename(&outgoing, place).context("cannot place the snapshot")?;
        prune(&folder, KEPT)
    });
    let resumed = monitor.resume();
    if saved.is_err() {
        // What is half written is of no use.
        let _ = fs::remove_file(&outgoing);
    }
    saved.and(resumed)
}

/// Marks a snapshot as used, so that it is kept.
pub(super) fn touch(place: &Path) {
    // Only a hint for pruning.
    let _ = fs::File::options()
        .append(true)
        .open(place)
        .and_then(|file| file.set_modified(SystemTime::now()));
}
