//! Domains: created, attached, destroyed with `xl`, as an administrator would.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::Lab;
use super::console::Console;
use super::link::{Link, Output};

/// How long `xl create` may take; libxl itself gives a device 10 s.
const CREATE: Duration = Duration::from_secs(120);

/// How long any other `xl` command may take.
const XL: Duration = Duration::from_secs(60);

/// How long a Linux guest may take from creation to its agent's first answer.
const GUEST_BOOT: Duration = Duration::from_secs(180);

/// Command line of every Linux guest; `cryptomgr.notests` saves 1.8 s.
const LINUX_ARGUMENTS: &str = "console=hvc0 rdinit=/init quiet loglevel=3 cryptomgr.notests";

/// What a PVH Linux is told beside that: it looks for hardware that it has not
/// got, by port reads that each cost an exit. Both halve the CPU time of a boot
/// under TCG, from 12 to 5 s.
///
/// * `clearcpuid=4` (TSC): else the early calibration reads a timer that is not
///   there 100,000 times. Time comes from Xen either way. The loop count `lpj`
///   then has to be given, or it is measured for half a second.
/// * `pci=off`: else the whole configuration space is searched for a graphics
///   aperture, twice.
const PVH_ARGUMENTS: &str = "clearcpuid=4 lpj=5000000 pci=off";

/// A network interface of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vif {
    /// The frontend's MAC address.
    pub mac: String,
    /// The addresses that the frontend may use, separated by spaces.
    pub ip: String,
    /// Name of the backend's domain; `None` for dom0.
    pub backend: Option<String>,
    /// Name of the hotplug script in the backend's domain.
    pub script: String,
}

impl Vif {
    /// The words of a configuration line or of `xl network-attach`.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let mut words = vec![format!("mac={}", self.mac), format!("ip={}", self.ip)];
        words.extend(
            self.backend
                .iter()
                .map(|backend| format!("backend={backend}")),
        );
        words.push(format!("script={}", self.script));
        words
    }
}

/// What a domain boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A PVH unikernel: a file in dom0, and its command line.
    Image {
        /// Path in dom0.
        path: String,
        /// Command line; may be empty.
        arguments: String,
    },
    /// The lab's Linux with a root archive, and what its init script is told.
    Linux {
        /// Path of the archive in dom0.
        archive: &'static str,
        /// `lab.*` settings.
        settings: String,
    },
}

/// A domain to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainSpec {
    /// Its name.
    pub name: String,
    /// What it boots.
    pub boot: Boot,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Its interfaces, in order.
    pub vifs: Vec<Vif>,
    /// Whether it will be a backend.
    pub driver_domain: bool,
}

impl DomainSpec {
    /// The text of the `xl` configuration.
    ///
    /// * `tsc_mode="native"`: else QEMU 7.2 reports an intercepted RDTSCP as
    ///   RDTSC, and Xen kills the domain ("Insn mismatch").
    /// * `on_crash="preserve"`: a crashed domain stays to be looked at.
    #[must_use]
    pub fn configuration(&self, pvh_linux: bool) -> String {
        let mut text = String::new();
        let quoted = |text: &str| format!("\"{text}\"");
        let mut set = |key: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key}={value}");
        };
        set("name", quoted(&self.name));
        let kind = match &self.boot {
            Boot::Linux { .. } if !pvh_linux => "pv",
            _ => "pvh",
        };
        set("type", quoted(kind));
        set("tsc_mode", quoted("native"));
        match &self.boot {
            Boot::Image { path, arguments } => {
                set("kernel", quoted(path));
                set("cmdline", quoted(arguments));
            }
            Boot::Linux { archive, settings } => {
                set("kernel", quoted("/lab/vmlinux"));
                set("ramdisk", quoted(archive));
                let hardware = if pvh_linux { PVH_ARGUMENTS } else { "" };
                let arguments = format!("{LINUX_ARGUMENTS} {hardware} {settings}");
                set("cmdline", quoted(&arguments));
            }
        }
        set("memory", self.memory_mib.to_string());
        set("vcpus", "1".into());
        if self.driver_domain {
            set("driver_domain", "1".into());
        }
        set("on_poweroff", quoted("destroy"));
        set("on_crash", quoted("preserve"));
        let vifs: Vec<String> = self
            .vifs
            .iter()
            .map(|vif| quoted(&vif.words().join(",")))
            .collect();
        set("vif", format!("[{}]", vifs.join(",")));
        text
    }
}

/// A domain that was created.
#[derive(Debug, Clone)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its number; a new one after every creation.
    pub domid: u32,
    /// Its PV console.
    pub console: Console,
    /// The agent behind the console, in a Linux guest.
    pub agent: Option<Link>,
    /// Milliseconds of dom0's time that `xl create` took; 0 if it was found.
    pub create_ms: u64,
}

impl Domain {
    /// The agent of a Linux guest.
    ///
    /// # Errors
    ///
    /// If the domain has none.
    pub fn linux(&self) -> Result<&Link> {
        self.agent
            .as_ref()
            .with_context(|| format!("{} is no Linux guest", self.name))
    }

    /// The domain's own folder in xenstore.
    #[must_use]
    pub fn xenstore(&self) -> String {
        format!("/local/domain/{}", self.domid)
    }
}

impl Lab {
    /// Creates a domain. It is paused first while `prepare` runs, which may
    /// write what the domain is going to read at its start.
    ///
    /// # Errors
    ///
    /// If `xl` refuses; the error quotes it.
    pub fn create(
        &self,
        spec: &DomainSpec,
        prepare: impl FnOnce(&Domain) -> Result<()>,
    ) -> Result<Domain> {
        let name = &spec.name;
        let path = format!("/lab/run/{name}.cfg");
        self.put(
            &path,
            0o644,
            spec.configuration(self.base().qemu.pvh_linux).as_bytes(),
        )?;
        let created = self.run(&format!("xl create -p '{path}'"), CREATE)?;
        if !created.is_success() {
            bail!("xl create {name}: {}", created.stdout.trim());
        }
        let mut domain = self.find(name, matches!(spec.boot, Boot::Linux { .. }))?;
        domain.create_ms = created.guest_ms;
        prepare(&domain)?;
        self.ask(&format!("xl unpause '{name}'"), XL)?;
        Ok(domain)
    }

    /// Finds a domain that exists (after a restore) and opens its console.
    ///
    /// # Errors
    ///
    /// If there is no such domain or it gets no console.
    pub fn find(&self, name: &str, linux: bool) -> Result<Domain> {
        // xenconsoled writes the pty's name a moment after the creation.
        let found = self.ask(
            &format!(
                "id=$(xl domid '{name}') || exit 1; n=0
                until tty=$(xenstore-read /local/domain/$id/console/tty 2>/dev/null) && [ -n \"$tty\" ]
                do n=$((n+1)); [ $n -lt 300 ] || exit 1; sleep 0.05; done
                echo \"$id $tty\""
            ),
            XL,
        )?;
        let (domid, tty) = found
            .trim()
            .split_once(' ')
            .context("xenstore has no console")?;
        let domid = domid
            .parse()
            .with_context(|| format!("{domid:?} is no domain number"))?;
        let (console, agent) = self.open_console(domid, tty, linux.then_some(name))?;
        Ok(Domain {
            name: name.to_owned(),
            domid,
            console,
            agent,
            create_ms: 0,
        })
    }

    /// Waits until the agent of a Linux guest answers.
    ///
    /// # Errors
    ///
    /// If it does not, or the guest crashed; the error quotes its console.
    pub fn wait_for_guest(&self, domain: &Domain) -> Result<()> {
        let link = domain.linux()?;
        link.wait_ready(self.patience(GUEST_BOOT), || {
            self.alive()?;
            if domain.console.is_closed() {
                bail!("{} has ended", domain.name)
            } else {
                Ok(())
            }
        })
        .with_context(|| {
            let text = domain.console.text_from(0);
            format!(
                "{} says last:\n{}",
                domain.name,
                super::console::last_lines(&text, 20)
            )
        })
    }

    /// Destroys a domain, at once and without asking it.
    ///
    /// # Errors
    ///
    /// If `xl` fails, as when a backend does not remove its folder in time.
    pub fn destroy(&self, domain: &Domain) -> Result<Output> {
        self.xl(&format!("destroy '{}'", domain.name))
    }

    /// Attaches an interface to a running domain.
    ///
    /// # Errors
    ///
    /// If the lab is gone; what `xl` thinks is in the output.
    pub fn attach(&self, domain: &Domain, vif: &Vif) -> Result<Output> {
        // Each key as a word of its own: joined by commas they are silently
        // taken as one odd value, and the vif goes to dom0.
        let words: Vec<String> = vif.words().iter().map(|word| format!("'{word}'")).collect();
        self.xl(&format!(
            "network-attach '{}' {}",
            domain.name,
            words.join(" ")
        ))
    }

    /// Detaches an interface by its number.
    ///
    /// # Errors
    ///
    /// If the lab is gone; what `xl` thinks is in the output.
    pub fn detach(&self, domain: &Domain, number: u32) -> Result<Output> {
        self.xl(&format!("network-detach '{}' {number}", domain.name))
    }

    /// Runs any `xl` command.
    ///
    /// # Errors
    ///
    /// If the lab is gone; what `xl` thinks is in the output.
    pub fn xl(&self, arguments: &str) -> Result<Output> {
        self.run(&format!("xl {arguments}"), XL)
    }

    /// The state letters of a domain (`r`, `b`, `p`, `s`, `c`, `d`), without
    /// dashes; `None` if there is no such domain.
    ///
    /// # Errors
    ///
    /// If the lab is gone.
    pub fn state(&self, name: &str) -> Result<Option<String>> {
        let listed = self.xl(&format!("list '{name}'"))?;
        let line = listed
            .stdout
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name));
        Ok(line
            .and_then(|line| line.split_whitespace().nth(4))
            .map(|state| state.replace('-', "")))
    }

    /// CPU seconds that a domain has used, by Xen's account.
    ///
    /// # Errors
    ///
    /// If there is no such domain.
    pub fn cpu_seconds(&self, name: &str) -> Result<f64> {
        let listed = self.ask(&format!("xl list '{name}'"), XL)?;
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().last()?.parse().ok())
            .with_context(|| format!("xl does not list {name}"))
    }

    /// What a domain has written on its console since its creation, as logged
    /// by dom0; works also when the domain is gone.
    ///
    /// # Errors
    ///
    /// If there is no such log.
    pub fn console_log(&self, name: &str) -> Result<String> {
        self.ask(&format!("cat '/var/log/xen/console/guest-{name}.log'"), XL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> DomainSpec {
        DomainSpec {
            name: "c1".into(),
            boot: Boot::Linux {
                archive: "/lab/guest.cpio",
                settings: "lab.name=c1".into(),
            },
            memory_mib: 192,
            vifs: vec![Vif {
                mac: "00:16:3e:5e:6c:06".into(),
                ip: "10.137.0.6 fd09::6".into(),
                backend: Some("fw".into()),
                script: "vif-fw".into(),
            }],
            driver_domain: false,
        }
    }

    #[test]
    fn a_configuration_names_backend_and_addresses() {
        let text = spec().configuration(true);
        assert!(text.contains("type=\"pvh\"\n"));
        assert!(text.contains(
            "vif=[\"mac=00:16:3e:5e:6c:06,ip=10.137.0.6 fd09::6,backend=fw,script=vif-fw\"]\n"
        ));
    }

    #[test]
    fn linux_becomes_pv_where_pvh_linux_does_not_run_but_an_image_stays_pvh() {
        assert!(spec().configuration(false).contains("type=\"pv\"\n"));
        let boot = Boot::Image {
            path: "/lab/image".into(),
            arguments: String::new(),
        };
        let image = DomainSpec { boot, ..spec() };
        assert!(image.configuration(false).contains("type=\"pvh\"\n"));
    }
}
