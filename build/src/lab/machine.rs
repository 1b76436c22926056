//! The emulated machine: one QEMU process, killed with us whatever happens.
//!
//! QEMU runs in a folder of its own where all its files have short relative
//! names, so the place of the clone may hold spaces, commas or be long. A
//! thread of ours starts QEMU and waits for it; `setpriv --pdeathsig` ties its
//! life to that thread, so a panic, an abort or a kill of `xtask` ends it too.
//! It has its own process group, so Ctrl-C reaches only us.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use shared_child::SharedChild;

use super::qmp::Qmp;
use crate::assets::Assets;
use crate::host::{Accelerator, Qemu};
use crate::workspace::{Workspace, prune, remove_folder};

/// How long QEMU may take to open its sockets. It maps files, nothing more.
const START: Duration = Duration::from_secs(60);

/// How many finished runs keep their logs.
const KEPT_RUNS: usize = 8;

/// The CPU under TCG; every flag was found by measurement (`xen-lab.md`, 2):
///
/// * `+svm,+npt`: what PVH guests are made of.
/// * `-smap`: Xen would use it, and TCG pays for every switch.
/// * `-monitor`: Xen would idle in MWAIT, which TCG turns into busy polling.
/// * `-erms,-fsrm`: kernels would copy with `rep movsb`, byte by byte in TCG; a
///   64 MiB copy takes 1,077 instead of 367 ms.
/// * `-xsave`: else PV guests' FPU state is damaged now and then at a context
///   switch, and one short process in some hundreds dies.
const TCG_CPU: &str = "max,+svm,+npt,-smap,-monitor,-erms,-fsrm,-xsave";

/// Xen's command line.
///
/// * `dom0_mem`: fixed, so that no ballooning happens while guests start.
/// * `no-real-mode`: skips BIOS calls that QEMU's direct boot does not offer.
/// * `bootscrub=0`: else Xen's idle scrubbing eats a host core for a long while.
const XEN_ARGUMENTS: &str = "console=com1 com1=115200 dom0_mem=768M,max:768M no-real-mode bootscrub=0 loglvl=warning guest_loglvl=warning";

/// dom0's command line; `cryptomgr.notests` saves 1.8 s of self-tests per boot.
const DOM0_ARGUMENTS: &str = "console=hvc0 rdinit=/init quiet panic=5 cryptomgr.notests";

/// The smallest machine that carries dom0, a firewall and three clients.
pub const DEFAULT_MEMORY_MIB: u32 = 2048;

/// How the machine is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineOptions {
    /// Memory in MiB; all that gets touched ends up in a snapshot.
    pub memory_mib: u32,
    /// Counts instructions instead of following the host's clock: each takes
    /// `2^shift` ns of guest time. Results then repeat within about 1 %.
    pub icount_shift: Option<u8>,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self {
            memory_mib: DEFAULT_MEMORY_MIB,
            icount_shift: None,
        }
    }
}

/// QEMU's arguments, but for the snapshot to start from.
///
/// All paths are relative to the run folder, so the arguments (with the content
/// of the files) name the machine.
#[must_use]
pub fn arguments(accelerator: Accelerator, options: &MachineOptions) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    match (accelerator, options.icount_shift) {
        (Accelerator::Kvm, _) => add(&["-accel", "kvm", "-cpu", "host"]),
        (Accelerator::Tcg, None) => add(&["-accel", "tcg,thread=multi", "-cpu", TCG_CPU]),
        (Accelerator::Tcg, Some(shift)) => {
            add(&[
                "-accel",
                "tcg",
                "-icount",
                &format!("shift={shift},sleep=on"),
                "-cpu",
                TCG_CPU,
            ]);
        }
    }
    // One CPU: with two on a busy host, spinning against a descheduled CPU
    // thread makes everything 2 to 50 times slower.
    add(&["-smp", "1", "-m", &options.memory_mib.to_string()]);
    // -no-reboot: a crash of Xen ends QEMU, which is noticed at once.
    add(&["-nodefaults", "-display", "none", "-no-reboot"]);
    add(&["-qmp", "unix:qmp,server=on,wait=off"]);
    add(&["-kernel", "xen.elf", "-append", XEN_ARGUMENTS]);
    // QEMU splits this list at commas; there are none inside.
    add(&["-initrd", &format!("vmlinux {DOM0_ARGUMENTS},dom0.cpio")]);
    add(&[
        "-chardev",
        "file,id=con,path=console.log",
        "-serial",
        "chardev:con",
    ]);
    add(&["-chardev", "socket,id=ctl,path=ctl,server=on,wait=off"]);
    // The port of the agent; a PV dom0 uses the DMA API under Xen, which a
    // legacy device would bypass.
    add(&[
        "-device",
        "virtio-serial-pci,disable-legacy=on,iommu_platform=on",
    ]);
    add(&["-device", "virtserialport,chardev=ctl,name=lab"]);
    arguments
}

/// A running QEMU.
#[derive(Debug)]
pub struct Machine {
    folder: PathBuf,
    handle: File,
    process: Arc<SharedChild>,
}

impl Machine {
    /// Starts QEMU, from `snapshot` if one is given.
    ///
    /// # Errors
    ///
    /// If it does not start; what it said is in the error.
    pub fn start(
        workspace: &Workspace,
        qemu: &Qemu,
        assets: &Assets,
        options: &MachineOptions,
        snapshot: Option<&Path>,
    ) -> Result<Self> {
        let folder = run_folder(workspace)?;
        for (name, target) in [
            ("xen.elf", &assets.xen),
            ("vmlinux", &assets.vmlinux),
            ("dom0.cpio", &assets.dom0),
        ] {
            symlink(target, folder.join(name)).context("cannot link the lab's files")?;
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&qemu.program);
        command.args(arguments(qemu.accelerator, options));
        if let Some(snapshot) = snapshot {
            // Not as standard input ("fd:0"): once it is read and closed, the
            // pipe of a later save gets the number 0, which QEMU cannot handle.
            symlink(snapshot, folder.join("incoming")).context("cannot link the snapshot")?;
            command.args(["-incoming", "exec:cat incoming"]);
        }
        let log = File::create(folder.join("qemu.log")).context("cannot write QEMU's log")?;
        command
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        let process = spawn_and_reap(command).context("cannot start QEMU")?;
        let handle = File::open(&folder).context("the run folder is gone")?;
        Ok(Self {
            folder,
            handle,
            process,
        })
    }

    /// The folder with the logs of this run.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Connects to the control port in dom0.
    ///
    /// # Errors
    ///
    /// If QEMU dies or never listens.
    pub fn connect_control(&self) -> Result<UnixStream> {
        self.connect("ctl")
    }

    /// Connects to QEMU's own monitor.
    ///
    /// # Errors
    ///
    /// If QEMU dies or never listens.
    pub fn connect_monitor(&self) -> Result<Qmp> {
        Qmp::new(self.connect("qmp")?)
    }

    /// Whether QEMU is still there.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// What QEMU and Xen said last, for error messages.
    #[must_use]
    pub fn last_words(&self) -> String {
        let mut text = String::new();
        for name in ["qemu.log", "console.log"] {
            let end = tail(&self.folder.join(name), 2048).unwrap_or_default();
            if !end.trim().is_empty() {
                text.push_str(&format!("--- end of {name}:\n{}\n", end.trim_end()));
            }
        }
        text
    }

    /// A socket address is at most 108 bytes, a path here may be longer; so it
    /// is reached through the open folder.
    fn connect(&self, name: &str) -> Result<UnixStream> {
        let path = format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd());
        let deadline = Instant::now() + START;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > deadline => {
                    return Err(error)
                        .with_context(|| format!("QEMU does not open its socket {name}"));
                }
                Err(_) if !self.is_running() => {
                    bail!("QEMU has ended\n{}", self.last_words());
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a process from a thread that lives as long as the process does.
fn spawn_and_reap(mut command: Command) -> io::Result<Arc<SharedChild>> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || match SharedChild::spawn(&mut command) {
        Ok(child) => {
            let child = Arc::new(child);
            let _ = tell.send(Ok(Arc::clone(&child)));
            let _ = child.wait();
        }
        Err(error) => {
            let _ = tell.send(Err(error));
        }
    });
    told.recv().map_err(io::Error::other)?
}

/// Makes a fresh folder for a run and forgets old runs.
fn run_folder(workspace: &Workspace) -> Result<PathBuf> {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let runs = workspace.lab("run");
    forget_finished(&runs)?;
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let folder = runs.join(format!("{}-{number}", std::process::id()));
    remove_folder(&folder)?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Removes the run folders of processes that are gone, but for the newest.
fn forget_finished(runs: &Path) -> Result<()> {
    let running = fs::read_dir(runs).map_or(0, |entries| {
        entries
            .flatten()
            .filter(|entry| owner_lives(&entry.file_name().to_string_lossy()))
            .count()
    });
    prune(runs, KEPT_RUNS.saturating_add(running))
}

fn owner_lives(name: &str) -> bool {
    let pid = name.split('-').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_ok())
}

fn tail(path: &Path, len: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(end.saturating_sub(len)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initrd_list_has_exactly_the_kernel_and_the_archive() {
        let arguments = arguments(Accelerator::Tcg, &MachineOptions::default());
        let at = arguments
            .iter()
            .position(|argument| argument == "-initrd")
            .unwrap();
        assert_eq!(arguments[at + 1].split(',').count(), 2);
    }

    #[test]
    fn a_dropped_machine_process_is_dead() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = spawn_and_reap(command).unwrap();
        let folder = std::env::temp_dir();
        let handle = File::open(&folder).unwrap();
        let pid = Pid::from_raw(i32::try_from(process.id()).unwrap());
        drop(Machine {
            folder,
            handle,
            process,
        });
        assert!(kill(pid, None).is_err());
    }
}
