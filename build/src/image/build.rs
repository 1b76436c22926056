//! How the image is compiled and linked: for the host's own target, freestanding, and the same in every folder.
//!
//! No nightly and no target of its own: `core` and `alloc` are the precompiled ones of `x86_64-unknown-linux-gnu`. The
//! flags are given per build and not in a configuration file, so that host programs never see them.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::host::Unusable;
use crate::workspace::Workspace;

/// The target that the image is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the linker script is, from the workspace's folder, which is where the linker runs.
const LINKER_SCRIPT: &str = "build/image/portcullis.ld";
/// What the paths of the workspace, of crates and of the compiler's own sources become.
const WORKSPACE_NAME: &str = "/portcullis";
const CRATES_NAME: &str = "/crates";

/// Flags for every crate of the image.
const COMPILE: [&str; 8] = [
    // Linked to a fixed address; the whole image lies below 2 GiB.
    "-Crelocation-model=static",
    "-Ccode-model=small",
    "-Ctarget-feature=+crt-static",
    // An exception pushes below the stack pointer.
    "-Cno-redzone=yes",
    // For size, about 27 KB together: instructions that occur often in a row become functions; what is called once is not
    // always merged into its caller, since in a function with a large frame each access to the stack is longer; and only
    // what is tiny, or marked, is merged into many (the ways of packets are marked).
    "-Cllvm-args=-enable-machine-outliner=always -inline-max-stacksize=192 -inline-threshold=10",
    // For size, about 16 KB together, without a cost in instructions per packet: no table of addresses (8 bytes each) for a
    // match with fewer than eight arms; no copies of computations on paths that might not need them; instructions and
    // constants stay where the source has them instead of being moved ahead, which costs registers and so stack accesses.
    concat!(
        "-Cllvm-args=-min-jump-table-entries=8 -enable-pre=0 -disable-lsr -disable-constant-hoisting",
        " -enable-misched=0 -disable-machine-licm -split-spill-mode=size -tail-merge-size=2 -x86-cmov-converter=0",
    ),
    // The linker that comes with the compiler, without a C compiler around it.
    "-Clinker=rust-lld",
    "-Clinker-flavor=ld.lld",
];

/// Arguments for the linker, beside its script.
const LINK: [&str; 7] = [
    "-static",
    "--no-dynamic-linker",
    "--build-id=none",
    "--orphan-handling=error",
    "--fatal-warnings",
    "-znorelro",
    // One copy of functions that are the same code. Nothing compares the addresses of functions.
    "--icf=all",
];

/// Builds the image and returns the linked file, symbols and line tables included.
///
/// # Errors
///
/// If it does not compile or link; the error quotes cargo.
pub fn build(workspace: &Workspace, features: &str) -> Result<PathBuf> {
    let output = cargo(workspace)
        .args(["build", "--quiet", "--locked", "--profile", "image"])
        .args(["-p", "kernel", "--bin", "portcullis"])
        .args(["--features", features, "--target", TARGET])
        .args(["--message-format", "json-render-diagnostics"])
        // For the symbol file; nothing of it gets into the image.
        .args(["--config", "profile.image.debug=\"line-tables-only\""])
        .arg("--target-dir")
        .arg(workspace.target())
        .env("CARGO_ENCODED_RUSTFLAGS", flags(workspace)?.join("\x1f"))
        .env_remove("RUSTFLAGS")
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "the image does not build\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(executable)
        .next_back()
        .context("cargo built no executable")
}

/// The executable that a message of cargo announces.
fn executable(message: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    let ours = message.pointer("/target/name")? == "portcullis";
    let path = message.get("executable")?.as_str()?;
    ours.then(|| PathBuf::from(path))
}

fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace.root());
    command
}

/// All compiler flags of the image.
fn flags(workspace: &Workspace) -> Result<Vec<String>> {
    let mut flags: Vec<String> = COMPILE.iter().map(|flag| (*flag).to_owned()).collect();
    flags.extend(LINK.iter().map(|argument| format!("-Clink-arg={argument}")));
    flags.push(format!("-Clink-arg=-T{LINKER_SCRIPT}"));
    let mut rename = |from: &Path, to: &str| {
        flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    };
    // The last rule that fits wins, so the workspace, which may hold the others, comes first.
    rename(workspace.root(), WORKSPACE_NAME);
    for folder in crate_folders(workspace)? {
        rename(&folder, CRATES_NAME);
    }
    let compiler = Compiler::find(workspace)?;
    rename(&compiler.sources, &compiler.sources_name);
    Ok(flags)
}

/// The folders that hold the crates which are not ours.
fn crate_folders(workspace: &Workspace) -> Result<BTreeSet<PathBuf>> {
    let text = output(
        cargo(workspace)
            .args(["metadata", "--quiet", "--locked", "--format-version", "1"])
            .args(["--filter-platform", TARGET]),
    )?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    let packages = metadata.get("packages").and_then(Value::as_array);
    Ok(packages
        .context("cargo metadata lists no packages")?
        .iter()
        .filter(|package| package.get("source").is_some_and(Value::is_string))
        .filter_map(|package| {
            Path::new(package.get("manifest_path")?.as_str()?)
                .ancestors()
                .nth(2)
        })
        .map(Path::to_path_buf)
        .collect())
}

/// The compiler that cargo will run.
struct Compiler {
    /// Where its own sources are if they are installed; it then names them so in panic messages.
    sources: PathBuf,
    /// What it names them otherwise.
    sources_name: String,
}

impl Compiler {
    fn find(workspace: &Workspace) -> Result<Self> {
        let rustc = || {
            let mut command = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
            command.current_dir(workspace.root());
            command
        };
        let version = output(rustc().arg("-vV"))?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name));
        let commit = field("commit-hash: ").unwrap_or("unknown");
        let sysroot = PathBuf::from(output(rustc().args(["--print", "sysroot"]))?.trim());
        let libraries = sysroot.join("lib/rustlib").join(TARGET).join("lib");
        if !libraries.is_dir() {
            bail!(Unusable(format!(
                "this Rust toolchain ({}) cannot compile for {TARGET}",
                sysroot.display()
            )));
        }
        Ok(Self {
            sources: sysroot.join("lib/rustlib/src/rust"),
            sources_name: format!("/rustc/{commit}"),
        })
    }
}

/// What a command prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{:?} failed\n{}",
            command.get_program(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    String::from_utf8(output.stdout).context("a tool does not print UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_executable_is_taken_from_cargos_messages() {
        let message = |name: &str, path: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"{name}"}},"executable":{path}}}"#
            )
        };
        assert_eq!(
            executable(&message("portcullis", "\"/t/portcullis\"")),
            Some(PathBuf::from("/t/portcullis"))
        );
        assert_eq!(executable(&message("portcullis", "null")), None);
        assert_eq!(executable(&message("xtask", "\"/t/xtask\"")), None);
        assert_eq!(executable("warning: text"), None);
    }
}
