//! The installer for dom0, run on this machine with doubles of dom0's tools that record what they are told.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what goes wrong here must stop the test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use xtask::package::{Package, Written};

const TOOLS: [&str; 8] = [
    "qvm-check",
    "qvm-create",
    "qvm-prefs",
    "qvm-features",
    "qubes-prefs",
    "qvm-ls",
    "qvm-shutdown",
    "qvm-remove",
];

/// What a new firewall qube is told, in order.
const CALLS: &[&str] = &[
    "qvm-create --class StandaloneVM --label green sys-portcullis",
    "qvm-prefs sys-portcullis netvm 'sys-net'",
    "qvm-prefs sys-portcullis memory '32'",
    "qvm-prefs sys-portcullis kernel 'KERNEL'",
    "qvm-prefs sys-portcullis kernelopts ''",
    "qvm-prefs sys-portcullis maxmem '0'",
    "qvm-prefs sys-portcullis vcpus '1'",
    "qvm-prefs sys-portcullis provides_network 'True'",
    "qvm-prefs sys-portcullis audiovm ''",
    "qvm-prefs sys-portcullis guivm ''",
    "qvm-prefs sys-portcullis include_in_backups 'False'",
    "qvm-features sys-portcullis qubes-firewall '1'",
    "qvm-features sys-portcullis no-default-kernelopts '1'",
    "qvm-features sys-portcullis skip-update '1'",
    "qvm-features sys-portcullis qrexec '1'",
    "qvm-features sys-portcullis vmexec '1'",
    "qvm-features sys-portcullis gui ''",
];

/// A dom0 with `sys-net`, `sys-firewall` and `work`, in a folder of its own.
struct Dom0 {
    folder: PathBuf,
}

impl Drop for Dom0 {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

struct Outcome {
    good: bool,
    text: String,
    /// Calls that change something.
    changes: Vec<String>,
}

impl Dom0 {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!(
            "portcullis-installer-{}-{number}",
            std::process::id()
        ));
        let _ = fs::remove_dir_all(&folder);
        let fake = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-dom0");
        fs::create_dir_all(folder.join("tools")).unwrap();
        fs::create_dir_all(folder.join("kernels/6.6.1")).unwrap();
        fs::write(folder.join("kernels/6.6.1/vmlinuz"), "Linux").unwrap();
        for tool in TOOLS {
            symlink(&fake, folder.join("tools").join(tool)).unwrap();
        }
        let dom0 = Self { folder };
        for (name, value) in [
            ("default_netvm", "sys-firewall"),
            ("updatevm", "sys-firewall"),
            ("clockvm", "sys-net"),
        ] {
            dom0.tool(&["qubes-prefs", name, value]);
        }
        for name in ["sys-net", "sys-firewall", "work"] {
            dom0.tool(&["qvm-create", name]);
        }
        dom0.forget_changes();
        dom0
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        let tools = self.folder.join("tools").display().to_string();
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{tools}:{path}"))
            .env("FAKE", &self.folder)
            .env("PORTCULLIS_KERNELS", self.folder.join("kernels"));
        command
    }

    /// Runs a tool as a person would.
    fn tool(&self, words: &[&str]) -> String {
        let (tool, rest) = words.split_first().unwrap();
        let program = self.folder.join("tools").join(tool);
        let output = self.command(&program).args(rest).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn forget_changes(&self) {
        let _ = fs::remove_file(self.folder.join("changes"));
    }

    fn package(&self, image: &[u8]) -> Written {
        let out = self.folder.join(format!("dist-{}", image.len()));
        Package::new("1.2.3", image, &[]).write(&out).unwrap()
    }

    fn install(&self, package: &Written, arguments: &[&str]) -> Outcome {
        self.forget_changes();
        let output = self
            .command(&package.folder.join("install.sh"))
            .args(arguments)
            .output()
            .unwrap();
        let mut text = String::from_utf8(output.stdout).unwrap();
        text.push_str(&String::from_utf8(output.stderr).unwrap());
        let changes = fs::read_to_string(self.folder.join("changes")).unwrap_or_default();
        Outcome {
            good: output.status.success(),
            text,
            changes: changes.lines().map(str::to_owned).collect(),
        }
    }

    fn kernels(&self) -> BTreeSet<String> {
        fs::read_dir(self.folder.join("kernels"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

fn calls_for(package: &Written) -> Vec<String> {
    CALLS
        .iter()
        .map(|call| call.replace("KERNEL", &package.kernel))
        .collect()
}

#[test]
fn a_dry_run_changes_nothing_and_names_every_change() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    let before = dom0.kernels();
    let dry = dom0.install(&package, &[]);
    assert!(dry.good, "{}", dry.text);
    assert_eq!(dry.changes, [""; 0]);
    assert_eq!(dom0.kernels(), before);
    let announced: Vec<String> = dry
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("would run: q"))
        .map(|line| format!("q{}", line.trim_end()))
        .collect();
    // Against a qube that is not there yet nothing can be read, so a value that is right already is named, too.
    let unquoted: Vec<String> = calls_for(&package)
        .iter()
        .map(|call| call.replace('\'', "").trim_end().to_owned())
        .collect();
    for call in &unquoted {
        assert!(announced.contains(call), "{call} in {announced:?}");
    }
    let surplus: Vec<&String> = announced
        .iter()
        .filter(|call| !unquoted.contains(call))
        .collect();
    assert_eq!(surplus, ["qvm-prefs sys-portcullis virt_mode pvh"]);
}

#[test]
fn apply_makes_exactly_the_wanted_calls_and_a_second_time_none() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    let first = dom0.install(&package, &["--apply"]);
    assert!(first.good, "{}", first.text);
    assert_eq!(first.changes, calls_for(&package));
    let image = dom0
        .folder
        .join("kernels")
        .join(&package.kernel)
        .join("vmlinuz");
    assert_eq!(fs::read(&image).unwrap(), b"an image");
    // The system's switches are named with what they are now, and not touched.
    for line in [
        "qubes-prefs updatevm sys-net         must not be this qube: dom0's updates need Linux (now: sys-firewall)",
        "Leave clockvm on a Linux qube (now: sys-net)",
    ] {
        assert!(first.text.contains(line), "{}", first.text);
    }
    let second = dom0.install(&package, &["--apply"]);
    assert!(second.good, "{}", second.text);
    assert_eq!(second.changes, [""; 0]);
    assert!(!second.text.contains("+ "), "{}", second.text);
}

#[test]
fn an_upgrade_sets_the_kernel_only_and_keeps_the_old_one() {
    let dom0 = Dom0::new();
    let old = dom0.package(b"an image");
    dom0.install(&old, &["--apply"]);
    for (name, value) in [("netvm", "sys-vpn"), ("memory", "64")] {
        dom0.tool(&["qvm-prefs", "sys-portcullis", name, value]);
    }
    let new = dom0.package(b"a better image");
    let upgrade = dom0.install(&new, &["--apply"]);
    let wanted = format!("qvm-prefs sys-portcullis kernel '{}'", new.kernel);
    assert_eq!(upgrade.changes, [wanted]);
    assert!(dom0.kernels().contains(&old.kernel));
    assert!(dom0.kernels().contains(&new.kernel));
}

#[test]
fn the_default_netvm_is_started_with_the_computer() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    dom0.install(&package, &["--apply"]);
    dom0.tool(&["qubes-prefs", "default_netvm", "sys-portcullis"]);
    let again = dom0.install(&package, &["--apply"]);
    assert_eq!(again.changes, ["qvm-prefs sys-portcullis autostart 'True'"]);
}

#[test]
fn remove_undoes_everything_and_asks_first() {
    let dom0 = Dom0::new();
    let before = dom0.kernels();
    let package = dom0.package(b"an image");
    dom0.install(&package, &["--apply"]);
    fs::write(dom0.folder.join("vms/sys-portcullis/running"), "").unwrap();
    let dry = dom0.install(&package, &["--remove"]);
    assert_eq!(dry.changes, [""; 0]);
    assert!(dom0.kernels().contains(&package.kernel));
    let removed = dom0.install(&package, &["--remove", "--apply"]);
    assert!(removed.good, "{}", removed.text);
    let wanted = [
        "qvm-shutdown --wait sys-portcullis",
        "qvm-remove --force sys-portcullis",
    ];
    assert_eq!(removed.changes, wanted);
    assert_eq!(dom0.kernels(), before);
    let again = dom0.install(&package, &["--remove", "--apply"]);
    assert!(again.good, "{}", again.text);
    assert_eq!(again.changes, [""; 0]);
}

#[test]
fn remove_leaves_a_kernel_that_another_qube_uses() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    dom0.install(&package, &["--apply"]);
    dom0.install(&package, &["--apply", "--name", "sys-second"]);
    dom0.install(&package, &["--remove", "--apply"]);
    assert!(dom0.kernels().contains(&package.kernel));
    dom0.install(&package, &["--remove", "--apply", "--name", "sys-second"]);
    assert!(!dom0.kernels().contains(&package.kernel));
}

#[test]
fn remove_refuses_what_is_still_in_use() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    dom0.install(&package, &["--apply"]);
    for switch in ["default_netvm", "updatevm", "clockvm"] {
        let was = dom0.tool(&["qubes-prefs", switch]);
        dom0.tool(&["qubes-prefs", switch, "sys-portcullis"]);
        let refused = dom0.install(&package, &["--remove", "--apply"]);
        assert!(!refused.good && refused.changes.is_empty());
        assert!(refused.text.contains(switch), "{}", refused.text);
        dom0.tool(&["qubes-prefs", switch, &was]);
    }
    dom0.tool(&["qvm-prefs", "work", "netvm", "sys-portcullis"]);
    let refused = dom0.install(&package, &["--remove", "--apply"]);
    assert!(!refused.good && refused.changes.is_empty());
    assert!(refused.text.contains("work"), "{}", refused.text);
}

#[test]
fn a_qube_that_is_something_else_is_left_alone() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    for arguments in [
        ["--apply", "--name", "sys-firewall"].as_slice(),
        &["--remove", "--apply", "--name", "sys-firewall"],
    ] {
        let refused = dom0.install(&package, arguments);
        assert!(!refused.good && refused.changes.is_empty());
        assert!(refused.text.contains("no Portcullis"), "{}", refused.text);
    }
    assert!(!dom0.kernels().contains(&package.kernel));
}

#[test]
fn a_damaged_image_and_wrong_use_change_nothing() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    let wrong = dom0.install(&package, &["--aply"]);
    assert!(!wrong.good && wrong.changes.is_empty());
    assert!(wrong.text.contains("install.sh --apply"), "{}", wrong.text);
    let inside = format!("vm-kernels/{}/vmlinuz", package.kernel);
    fs::write(package.folder.join(inside), b"an imagf").unwrap();
    let refused = dom0.install(&package, &["--apply"]);
    assert!(!refused.good && refused.changes.is_empty());
    assert!(refused.text.contains("is damaged"), "{}", refused.text);
    assert!(!dom0.kernels().contains(&package.kernel));
}

/// The values of a list below `key:` in the Salt state.
fn listed(state: &str, key: &str) -> BTreeSet<String> {
    let below = |line: &&str| line.starts_with(' ') && !line.trim_end().ends_with(':');
    state
        .lines()
        .skip_while(|line| line.trim() != format!("- {key}:"))
        .skip(1)
        .take_while(below)
        .map(|line| line.trim().trim_start_matches("- ").to_owned())
        .collect()
}

#[test]
fn the_salt_state_sets_what_the_installer_sets() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    let state = fs::read_to_string(package.folder.join("salt/portcullis/init.sls")).unwrap();
    let calls = calls_for(&package);
    let words = |tool: &str| -> BTreeSet<(String, String)> {
        calls
            .iter()
            .filter_map(|call| call.strip_prefix(tool)?.strip_prefix(" sys-portcullis "))
            .filter_map(|rest| rest.split_once(' '))
            .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
            .collect()
    };
    let mut prefs: BTreeSet<(String, String)> = listed(&state, "prefs")
        .iter()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
        .collect();
    // The installer finds this one right already.
    assert!(prefs.remove(&("virt_mode".into(), "pvh".into())));
    assert_eq!(prefs, words("qvm-prefs"));
    let enabled = listed(&state, "enable")
        .into_iter()
        .map(|name| (name, "1".into()));
    let disabled = listed(&state, "disable")
        .into_iter()
        .map(|name| (name, String::new()));
    let features: BTreeSet<(String, String)> = enabled.chain(disabled).collect();
    assert_eq!(features, words("qvm-features"));
}

#[test]
fn the_installer_can_be_run_as_it_is() {
    let dom0 = Dom0::new();
    let package = dom0.package(b"an image");
    let mode = fs::metadata(package.folder.join("install.sh"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o755);
}
