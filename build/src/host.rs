//! What the lab needs from this machine.
//!
//! QEMU, and valgrind for the engine's bench, are the only things that get
//! installed, by apt and after saying so; Xen and its tools never are. Everything else that is run here (`apt-get`,
//! `apt-cache`, `dpkg-deb`, `setpriv`) is part of every Debian system.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::screen::Screen;
use crate::workspace;

/// The program that emulates the machine.
pub const QEMU: &str = "qemu-system-x86_64";

/// The Debian package it comes in.
const QEMU_PACKAGE: &str = "qemu-system-x86";

/// Oldest QEMU whose TCG is known to run the lab.
const OLDEST_QEMU: u32 = 7;

/// First QEMU whose TCG cannot run PVH Linux: seen with 10.0.2, every CPU model.
const FIRST_QEMU_WITHOUT_PVH_LINUX: u32 = 10;

/// How long the trial start of KVM may take.
const KVM_TRIAL: Duration = Duration::from_secs(20);

/// Wrong use or a missing tool: the command ends with status 2.
#[derive(Debug, Clone)]
pub struct Unusable(pub String);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unusable {}

/// What executes the lab machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's translator; works everywhere.
    Tcg,
    /// The host's own virtualisation, with nesting.
    Kvm,
}

/// The emulator and how it will be used.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Its first line of `--version`.
    pub version: String,
    /// What executes instructions.
    pub accelerator: Accelerator,
    /// Whether PVH Linux guests work; PVH unikernels always do.
    pub pvh_linux: bool,
}

/// Finds a program in `PATH`, and in the folders that `PATH` of a plain user lacks.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| {
            program
                .metadata()
                .is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
        })
}

/// Finds QEMU, installing it if it is missing, and decides how to use it.
///
/// `LAB_ACCEL` chooses the accelerator (see below), `LAB_GUESTS` (`pv` or `pvh`)
/// what the Linux guests are, against what is known of this QEMU.
///
/// # Errors
///
/// [`Unusable`] if this machine cannot run the lab, with what to do about it.
pub fn prepare(screen: &Screen) -> Result<Qemu> {
    require_debian_on_x86_64()?;
    let program = match find_program(QEMU) {
        Some(program) => program,
        None => {
            install(screen, &[QEMU_PACKAGE])?;
            find_program(QEMU).ok_or_else(|| {
                Unusable(format!(
                    "{QEMU_PACKAGE} is installed, but {QEMU} is not there"
                ))
            })?
        }
    };
    let version = output_of(Command::new(&program).arg("--version"))?;
    let version = version.lines().next().unwrap_or_default().to_owned();
    let major = qemu_major(&version)
        .ok_or_else(|| Unusable(format!("cannot read QEMU's version from {version:?}")))?;
    if major < OLDEST_QEMU {
        bail!(Unusable(format!(
            "{version} is too old: the lab needs {OLDEST_QEMU}.0 or newer"
        )));
    }
    let accelerator = choose_accelerator(screen, &program)?;
    let able = accelerator == Accelerator::Kvm || major < FIRST_QEMU_WITHOUT_PVH_LINUX;
    let pvh_linux = match workspace::choice("LAB_GUESTS", &["pvh", "pv"])? {
        Some(wish) => wish == "pvh",
        None => able,
    };
    if !able {
        screen.warn(&format!(
            "TCG of QEMU {major} cannot run PVH Linux; the Linux guests of the lab are PV, the firewall image stays PVH"
        ));
    }
    Ok(Qemu {
        program,
        version,
        accelerator,
        pvh_linux,
    })
}

/// Installs valgrind if it is missing.
///
/// # Errors
///
/// [`Unusable`] if it cannot be installed, with what to do about it.
pub fn prepare_valgrind(screen: &Screen) -> Result<()> {
    match find_program("valgrind") {
        Some(_) => Ok(()),
        None => install(screen, &["valgrind"]),
    }
}

/// Installs the programs that set up network namespaces and filters, if they are missing.
///
/// # Errors
///
/// If they are missing and cannot be installed.
pub fn prepare_namespaces(screen: &Screen) -> Result<()> {
    let missing: Vec<&str> = [("nft", "nftables"), ("ip", "iproute2")]
        .into_iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(Unusable(
            "not root, who alone may make network namespaces".into()
        ));
    }
    install(screen, &missing)
}

fn require_debian_on_x86_64() -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!(Unusable(
            "the lab needs Linux on x86_64: its guests run the host's own programs".into()
        ));
    }
    let missing: Vec<_> = ["apt-get", "apt-cache", "dpkg-deb", "setpriv"]
        .into_iter()
        .filter(|name| find_program(name).is_none())
        .collect();
    if !missing.is_empty() {
        bail!(Unusable(format!(
            "the lab needs Debian 12 or newer; missing here: {}",
            missing.join(", ")
        )));
    }
    Ok(())
}

/// The first number in `QEMU emulator version 7.2.22 (...)`.
fn qemu_major(version: &str) -> Option<u32> {
    let (_, after) = version.split_once("version ")?;
    after
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// Installs Debian packages after saying so.
fn install(screen: &Screen, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let by_hand = format!(
        "please install: {list}\n    as root: apt-get install --no-install-recommends {list}"
    );
    let mut apt: Vec<&OsStr> = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        let Some(sudo) = find_program("sudo") else {
            bail!(Unusable(by_hand))
        };
        let silent = Command::new(sudo)
            .args(["-n", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !silent && !std::io::stdin().is_terminal() {
            bail!(Unusable(by_hand));
        }
        apt.push(OsStr::new("sudo"));
    }
    screen.warn(&format!(
        "installing with apt, because it is missing here: {list}"
    ));
    apt.extend(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"].map(OsStr::new));
    let run = |arguments: &[&str]| {
        let (program, first) = apt.split_first().context("an empty command")?;
        let status = Command::new(program)
            .args(first)
            .args(arguments)
            .stdin(Stdio::inherit())
            .stdout(Stdio::null())
            .status()
            .context("cannot run apt-get")?;
        Ok::<bool, anyhow::Error>(status.success())
    };
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    arguments.extend(packages);
    // The lists may be missing or too old; one refresh cures both.
    if run(&arguments)? || (run(&["update", "-q"])? && run(&arguments)?) {
        return Ok(());
    }
    bail!(Unusable(format!("apt-get could not install it; {by_hand}")))
}

/// Obeys `LAB_ACCEL`: `tcg` (the default), `kvm` (or fail), `auto` (KVM if usable).
fn choose_accelerator(screen: &Screen, qemu: &Path) -> Result<Accelerator> {
    let wish = workspace::choice("LAB_ACCEL", &["tcg", "kvm", "auto"])?.unwrap_or("tcg");
    if wish == "tcg" {
        return Ok(Accelerator::Tcg);
    }
    match try_kvm(qemu) {
        Ok(()) => Ok(Accelerator::Kvm),
        Err(why) if wish == "auto" => {
            screen.warn(&format!("KVM is not usable here, using TCG: {why}"));
            Ok(Accelerator::Tcg)
        }
        Err(why) => bail!(Unusable(format!(
            "LAB_ACCEL=kvm, but KVM is not usable here: {why}\n(LAB_ACCEL=auto would fall back to TCG)"
        ))),
    }
}

/// Checks that KVM can be opened, nests, and carries a QEMU of this version.
fn try_kvm(qemu: &Path) -> Result<()> {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("cannot open /dev/kvm")?;
    let nested = ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    });
    if !nested {
        bail!("nested virtualisation is off, and PVH guests need it (kvm_amd/kvm_intel nested=1)");
    }
    // A vCPU is only really set up when the machine starts.
    let mut trial = Command::new(qemu)
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-display",
            "none",
            "-nodefaults",
        ])
        .args(["-S", "-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    if let Some(mut monitor) = trial.stdin.take() {
        // A trial that has died already is noticed below.
        let _ = monitor.write_all(b"cont\nquit\n");
    }
    let deadline = Instant::now() + KVM_TRIAL;
    while trial.try_wait()?.is_none() {
        if Instant::now() > deadline {
            let _ = trial.kill();
        }
        thread::sleep(Duration::from_millis(20));
    }
    let ended = trial.wait_with_output()?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        bail!("QEMU ended with {}: {}", ended.status, said.trim());
    }
    Ok(())
}

/// Runs a program and returns its standard output.
///
/// # Errors
///
/// If it cannot be run or fails; the error holds what it said.
pub fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_versions_are_read_from_the_line_debian_prints() {
        assert_eq!(
            qemu_major("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"),
            Some(7)
        );
        assert_eq!(qemu_major("QEMU emulator version 10.0.2"), Some(10));
        assert_eq!(qemu_major("something else"), None);
    }
}
