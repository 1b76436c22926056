//! A topology, running: the firewall and its clients in a lab.
//!
//! Clients take some seconds to boot. With [`WorldOptions::booted_clients`] they
//! are created without an interface first, kept as a snapshot together with
//! dom0, and attached to the firewall when it is up: a new firewall image then
//! meets running clients within a few seconds.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::domain::Domain;
use super::double::{Double, Played};
use super::internet::{DNS, DNS2, UPLINK, UPLINK6, VIRTUAL_DNS};
use super::link::{Link, Output};
use super::linux_firewall;
use super::topology::{
    ClientSpec, FIREWALL, FIREWALL_MAC, FIREWALL_NAME, FIREWALL6, FirewallKind, FirewallSpec,
    IMAGE_PATH, Source, Topology, address_key, rule_tree,
};
use super::{Base, Lab, LabOptions};
use crate::assets;
use crate::screen::Screen;
use crate::workspace::Key;

/// How long the firewall image may take from creation to being ready.
const IMAGE_BOOT: Duration = Duration::from_secs(30);

/// How long a client's interface may take from attachment to being usable.
const LINK_UP: Duration = Duration::from_secs(30);

/// How long a small command in a guest may take.
const COMMAND: Duration = Duration::from_secs(30);

/// How dom0's qrexec daemon answers a greeting: as the newest release does.
pub(super) const GREETING: &str = "echo";

/// How a world is built.
#[derive(Debug, Clone, Copy, Default)]
pub struct WorldOptions {
    /// The lab below.
    pub lab: LabOptions,
    /// Uses a snapshot with the clients booted already; see the module.
    pub booted_clients: bool,
}

/// A lab with a topology in it.
#[derive(Debug)]
pub struct LabWorld {
    /// The lab below.
    pub lab: Lab,
    topology: Topology,
    firewall: Option<Domain>,
    double: Option<Double>,
    clients: BTreeMap<String, Domain>,
    screen: Screen,
}

impl LabWorld {
    /// The firewall is running: it was started by a script.
    pub(super) fn adopt(&mut self, firewall: Domain, double: Option<Double>) {
        self.firewall = Some(firewall);
        self.double = double;
    }

    /// Builds a topology, firewall first.
    ///
    /// # Errors
    ///
    /// If something does not come up.
    pub fn start(
        base: &Base,
        screen: &Screen,
        options: WorldOptions,
        topology: Topology,
    ) -> Result<Self> {
        let mut world = if options.booted_clients && !topology.clients.is_empty() {
            Self::with_booted_clients(base, screen, options.lab, topology)?
        } else {
            Self::empty(Lab::start(base, screen, options.lab)?, screen, topology)
        };
        if world.is_qubes() {
            let program = assets::build_double(&base.workspace, screen)?;
            Double::install(&world.lab, &program)?;
        }
        world.start_firewall()?;
        let names: Vec<String> = world
            .topology
            .clients
            .iter()
            .map(|client| client.name.clone())
            .collect();
        if options.booted_clients {
            for name in &names {
                world.write_client_rules(name)?;
                world.attach(name)?;
            }
        } else {
            for name in &names {
                world.create_client(name, true)?;
            }
            for name in &names {
                world.wait_for_client(name)?;
            }
        }
        Ok(world)
    }

    fn empty(lab: Lab, screen: &Screen, topology: Topology) -> Self {
        Self {
            lab,
            topology,
            firewall: None,
            double: None,
            clients: BTreeMap::new(),
            screen: *screen,
        }
    }

    fn with_booted_clients(
        base: &Base,
        screen: &Screen,
        options: LabOptions,
        topology: Topology,
    ) -> Result<Self> {
        let key = topology.clients.iter().fold(Key::new(), |key, client| {
            key.with(
                client
                    .domain(&topology.firewall, false)
                    .configuration(base.qemu.pvh_linux),
            )
        });
        let layer = format!("clients-{}", key.name());
        if let Some(lab) = Lab::restore(base, screen, options, &layer)? {
            let mut world = Self::empty(lab, screen, topology);
            for client in &world.topology.clients {
                let domain = world.lab.find(&client.name, true)?;
                world.clients.insert(client.name.clone(), domain);
            }
            return Ok(world);
        }
        let mut world = Self::empty(Lab::start(base, screen, options)?, screen, topology);
        let names: Vec<String> = world
            .topology
            .clients
            .iter()
            .map(|client| client.name.clone())
            .collect();
        for name in &names {
            world.create_client(name, false)?;
        }
        for name in &names {
            world.wait_for_agent(name)?;
        }
        world.lab.save(screen, &layer)?;
        Ok(world)
    }

    /// What was built, as it is now.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The firewall's domain.
    ///
    /// # Errors
    ///
    /// If the topology has none or it is not running.
    pub fn firewall(&self) -> Result<&Domain> {
        self.firewall.as_ref().context("there is no firewall")
    }

    /// A client's domain.
    ///
    /// # Errors
    ///
    /// If there is no such client.
    pub fn client(&self, name: &str) -> Result<&Domain> {
        self.clients
            .get(name)
            .with_context(|| format!("there is no client {name}"))
    }

    /// The agent in a client.
    ///
    /// # Errors
    ///
    /// If there is no such client.
    pub fn guest(&self, name: &str) -> Result<&Link> {
        self.client(name)?.linux()
    }

    /// Runs a command in a client, within `timeout` (stretched on slow machines).
    ///
    /// # Errors
    ///
    /// If the client or the lab is gone.
    pub fn run(&self, client: &str, command: &str, timeout: Duration) -> Result<Output> {
        self.guest(client)?.run(command, self.lab.patience(timeout))
    }

    /// Runs a command in a client that must succeed.
    ///
    /// # Errors
    ///
    /// If it does not succeed, or the client or the lab is gone.
    pub fn ask(&self, client: &str, command: &str, timeout: Duration) -> Result<String> {
        self.guest(client)?.ask(command, self.lab.patience(timeout))
    }

    // ---- the firewall

    /// Starts the firewall of the topology, with its settings and the rules of
    /// all clients, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// If it is running, or does not come up.
    pub fn start_firewall(&mut self) -> Result<()> {
        ensure!(self.firewall.is_none(), "the firewall is running");
        let Some(spec) = self.topology.firewall.domain() else {
            return Ok(());
        };
        let step = self.screen.step("Starting the firewall");
        let firewall = match &self.topology.firewall.kind {
            FirewallKind::Image(path) => {
                let image = std::fs::read(path)
                    .with_context(|| format!("cannot read the image {}", path.display()))?;
                self.lab.put(IMAGE_PATH, 0o644, &image)?;
                let domain = if self.is_qubes() {
                    let (mut double, database) = (None, self.database());
                    let domain = self.lab.create(&spec, |domain| {
                        double = Some(Double::start(&self.lab, domain.domid, GREETING, &database)?);
                        Ok(())
                    })?;
                    self.double = double;
                    domain
                } else {
                    let settings = self.image_settings();
                    self.lab.create(&spec, |domain| {
                        self.write_settings(domain, &settings)?;
                        for client in &self.topology.clients {
                            self.write_tree(domain, client)?;
                        }
                        Ok(())
                    })?
                };
                let ready = &self.topology.firewall.ready_mark;
                domain
                    .console
                    .wait_for(0, self.lab.patience(IMAGE_BOOT), ready)?;
                domain
            }
            _ => {
                let domain = self.lab.create(&spec, |_| Ok(()))?;
                self.lab.wait_for_guest(&domain)?;
                self.feed_nft(&domain, &linux_firewall::dns_mapping())?;
                domain
            }
        };
        step.done(&format!("xl create {} ms", firewall.create_ms));
        self.firewall = Some(firewall);
        if self.topology.firewall.kind == FirewallKind::Linux {
            for client in self.topology.clients.clone() {
                self.write_client_rules(&client.name)?;
            }
        }
        Ok(())
    }

    /// Destroys the firewall; its clients keep dead interfaces.
    ///
    /// # Errors
    ///
    /// If it is not running or `xl` fails.
    pub fn stop_firewall(&mut self) -> Result<()> {
        let firewall = self.firewall.take().context("there is no firewall")?;
        let output = self.lab.destroy(&firewall)?;
        ensure!(output.is_success(), "xl destroy fw: {}", output.stdout);
        self.stop_double()
    }

    /// Forgets a firewall that has ended by itself.
    ///
    /// # Errors
    ///
    /// If the lab is gone.
    pub fn forget_firewall(&mut self) -> Result<()> {
        self.firewall = None;
        self.stop_double()
    }

    // ---- dom0's double

    /// Whether the image gets its settings as in Qubes OS.
    #[must_use]
    pub fn is_qubes(&self) -> bool {
        let firewall = &self.topology.firewall;
        matches!(firewall.kind, FirewallKind::Image(_)) && firewall.source == Source::QubesDb
    }

    /// Puts another firewall into the topology, for the next start.
    ///
    /// # Errors
    ///
    /// If one is running.
    pub fn replace_firewall(&mut self, firewall: FirewallSpec) -> Result<FirewallSpec> {
        ensure!(self.firewall.is_none(), "the firewall is running");
        Ok(std::mem::replace(&mut self.topology.firewall, firewall))
    }

    /// Has dom0's daemons carry out a scenario.
    ///
    /// # Errors
    ///
    /// As [`Double::play`], and if there is no double.
    pub fn play(&self, scenario: &str, limit: Duration) -> Result<Played> {
        let double = self.double.as_ref().context("dom0 has no Qubes daemons")?;
        double.play(&self.lab, scenario, limit)
    }

    /// Kills dom0's daemons.
    ///
    /// # Errors
    ///
    /// If the lab is gone.
    pub fn stop_double(&mut self) -> Result<()> {
        match self.double.take() {
            Some(double) => double.kill(&self.lab),
            None => Ok(()),
        }
    }

    /// Starts dom0's daemons again for the running firewall, with their database.
    ///
    /// # Errors
    ///
    /// If they do not come up.
    pub fn restart_double(&mut self) -> Result<()> {
        let domid = self.firewall()?.domid;
        self.double = Some(Double::start(&self.lab, domid, GREETING, &self.database())?);
        Ok(())
    }

    /// What qubesd has written for the firewall when it starts, as a scenario.
    #[must_use]
    pub fn database(&self) -> String {
        let mut text = format!(
            "network {FIREWALL_NAME} {FIREWALL} {UPLINK} {FIREWALL_MAC}\nkey /qubes-primary-dns {DNS}\nkey /qubes-secondary-dns {DNS2}\n"
        );
        for client in &self.topology.clients {
            text.push_str(&format!("client {} {FIREWALL}\n", client.ip));
        }
        if self.topology.firewall.ipv6 {
            text.push_str(&format!(
                "key /qubes-ip6 {FIREWALL6}\nkey /qubes-gateway6 {UPLINK6}\nkey /qubes-netvm-gateway6 {FIREWALL6}\nkey /connected-ips6 {}\n",
                self.connected(true)
            ));
        }
        for client in &self.topology.clients {
            for address in self.client_addresses(client) {
                text.push_str(&rules_statement(address, &client.policy, &client.rules));
            }
        }
        text
    }

    /// The network settings of the image, with the names they have in QubesDB.
    #[must_use]
    pub fn image_settings(&self) -> Vec<(String, String)> {
        let [dns, dns2] = VIRTUAL_DNS;
        let mut settings = vec![
            ("qubes-ip", FIREWALL.to_string()),
            ("qubes-gateway", UPLINK.to_string()),
            ("qubes-netmask", "255.255.255.255".into()),
            ("qubes-mac", FIREWALL_MAC.into()),
            ("qubes-primary-dns", DNS.to_string()),
            ("qubes-secondary-dns", DNS2.to_string()),
            ("qubes-netvm-gateway", FIREWALL.to_string()),
            ("qubes-netvm-netmask", "255.255.255.255".into()),
            ("qubes-netvm-primary-dns", dns.to_string()),
            ("qubes-netvm-secondary-dns", dns2.to_string()),
            ("connected-ips", self.connected(false)),
        ];
        if self.topology.firewall.ipv6 {
            settings.push(("qubes-ip6", FIREWALL6.to_string()));
            settings.push(("qubes-gateway6", UPLINK6.to_string()));
            settings.push(("qubes-netvm-gateway6", FIREWALL6.to_string()));
            settings.push(("connected-ips6", self.connected(true)));
        }
        settings
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    fn connected(&self, v6: bool) -> String {
        let addresses: Vec<String> = self
            .topology
            .clients
            .iter()
            .flat_map(|client| self.client_addresses(client))
            .filter(|address| address.is_ipv6() == v6)
            .map(|address| address.to_string())
            .collect();
        addresses.join(" ")
    }

    fn client_addresses(&self, client: &ClientSpec) -> Vec<IpAddr> {
        let ip6 = client.ip6.filter(|_| self.topology.firewall.ipv6);
        std::iter::once(IpAddr::V4(client.ip))
            .chain(ip6.map(IpAddr::V6))
            .collect()
    }

    /// Writes settings of the firewall image below its `vm-data`, in one
    /// transaction.
    ///
    /// # Errors
    ///
    /// If xenstore refuses.
    pub fn write_settings(&self, firewall: &Domain, settings: &[(String, String)]) -> Result<()> {
        if settings.is_empty() {
            return Ok(());
        }
        let folder = format!("{}/vm-data", firewall.xenstore());
        let words: Vec<String> = settings
            .iter()
            .map(|(key, value)| format!("{} {}", quote(&format!("{folder}/{key}")), quote(value)))
            .collect();
        self.lab
            .ask(&format!("xenstore-write {}", words.join(" ")), COMMAND)
            .map(drop)
    }

    /// Changes one setting of the running firewall image.
    ///
    /// # Errors
    ///
    /// If there is no firewall or xenstore refuses.
    pub fn write_setting(&self, key: &str, value: &str) -> Result<()> {
        if self.is_qubes() {
            return self
                .play(&format!("key /{key} {value}\n"), COMMAND)
                .map(drop);
        }
        self.write_settings(self.firewall()?, &[(key.to_owned(), value.to_owned())])
    }

    /// Gives an address new rules while the firewall runs: what `qvm-firewall`
    /// does, in the order dom0 does it.
    ///
    /// # Errors
    ///
    /// If there is no firewall, or the Linux stand-in does not know a rule.
    pub fn write_rules(
        &self,
        address: IpAddr,
        policy: &str,
        rules: &[impl AsRef<str>],
    ) -> Result<()> {
        let firewall = self.firewall()?;
        if self.topology.firewall.kind == FirewallKind::Linux {
            return self.feed_nft(
                firewall,
                &linux_firewall::client_chain(address, policy, rules)?,
            );
        }
        if self.is_qubes() {
            return self
                .play(&rules_statement(address, policy, rules), COMMAND)
                .map(drop);
        }
        let tree = format!("qubes-firewall/{}", address_key(address));
        let folder = quote(&format!("{}/vm-data/{tree}", firewall.xenstore()));
        self.lab
            .ask(&format!("xenstore-rm {folder} 2>/dev/null; true"), COMMAND)?;
        let keys: Vec<(String, String)> = rule_tree(address, policy, rules)
            .into_iter()
            .map(|(key, value)| (format!("{tree}/{key}"), value))
            .collect();
        self.write_settings(firewall, &keys)?;
        // The commit: a write to the folder itself.
        self.write_settings(firewall, &[(tree, String::new())])
    }

    /// Gives a client of the topology other rules, remembered for later starts.
    ///
    /// # Errors
    ///
    /// As [`LabWorld::write_rules`].
    pub fn set_client_rules(&mut self, name: &str, policy: &str, rules: &[&str]) -> Result<()> {
        let client = self
            .topology
            .clients
            .iter_mut()
            .find(|client| client.name == name);
        let client = client.with_context(|| format!("there is no client {name}"))?;
        policy.clone_into(&mut client.policy);
        client.rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
        self.write_client_rules(name)
    }

    /// Writes the rules of a client as the topology has them.
    fn write_client_rules(&self, name: &str) -> Result<()> {
        if self.topology.firewall.kind == FirewallKind::None {
            return Ok(());
        }
        let client = self.spec(name)?;
        for address in self.client_addresses(client) {
            self.write_rules(address, &client.policy, &client.rules)?;
        }
        Ok(())
    }

    /// Writes the rules of a client before the image runs: no commit is needed.
    fn write_tree(&self, firewall: &Domain, client: &ClientSpec) -> Result<()> {
        for address in self.client_addresses(client) {
            let key = address_key(address);
            let tree: Vec<(String, String)> = client
                .tree(address)
                .into_iter()
                .map(|(name, value)| (format!("qubes-firewall/{key}/{name}"), value))
                .collect();
            self.write_settings(firewall, &tree)?;
        }
        Ok(())
    }

    fn feed_nft(&self, firewall: &Domain, text: &str) -> Result<()> {
        let link = firewall.linux()?;
        let timeout = self.lab.patience(COMMAND);
        link.put("/run/lab.nft", 0o644, text.as_bytes(), timeout)?;
        link.ask("nft -f /run/lab.nft", timeout).map(drop)
    }

    /// Types a command on the console of the firewall image and returns what it
    /// writes up to and including the line that contains `end`.
    ///
    /// # Errors
    ///
    /// If there is no firewall or it does not answer so.
    pub fn console(&self, command: &str, end: &str) -> Result<String> {
        let console = &self.firewall()?.console;
        let position = console.send_line(command)?;
        console.wait(
            position,
            self.lab.patience(COMMAND),
            &format!("{end:?}"),
            |text| {
                let found = text.find(end)?;
                let rest = text.get(found..)?;
                let line_end = rest.find('\n')?;
                text.get(..found + line_end + 1).map(str::to_owned)
            },
        )
    }

    // ---- clients

    pub(super) fn spec(&self, name: &str) -> Result<&ClientSpec> {
        self.topology
            .client(name)
            .with_context(|| format!("there is no client {name}"))
    }

    /// Adds a client to the running world, rules first, and waits for it.
    ///
    /// # Errors
    ///
    /// If the name is taken or the client does not come up.
    pub fn add_client(&mut self, client: ClientSpec) -> Result<()> {
        ensure!(
            self.topology.client(&client.name).is_none(),
            "{} exists",
            client.name
        );
        let name = client.name.clone();
        self.topology.clients.push(client);
        if self.is_qubes() {
            let address = self.spec(&name)?.ip;
            self.play(&format!("client {address} {FIREWALL}\n"), COMMAND)?;
        } else if let FirewallKind::Image(_) = self.topology.firewall.kind {
            self.write_setting("connected-ips", &self.connected(false))?;
            if self.topology.firewall.ipv6 {
                self.write_setting("connected-ips6", &self.connected(true))?;
            }
        }
        self.write_client_rules(&name)?;
        self.create_client(&name, true)?;
        self.wait_for_client(&name)
    }

    /// Destroys a client and forgets it.
    ///
    /// # Errors
    ///
    /// If there is no such client or `xl` fails.
    pub fn remove_client(&mut self, name: &str) -> Result<()> {
        let domain = self
            .clients
            .remove(name)
            .with_context(|| format!("there is no client {name}"))?;
        self.topology.clients.retain(|client| client.name != name);
        let output = self.lab.destroy(&domain)?;
        ensure!(output.is_success(), "xl destroy {name}: {}", output.stdout);
        Ok(())
    }

    /// Creates the domain of a client without waiting for its boot.
    fn create_client(&mut self, name: &str, attached: bool) -> Result<()> {
        let spec = self.spec(name)?.domain(&self.topology.firewall, attached);
        let step = self.screen.step(format!("Creating client {name}"));
        let domain = self.lab.create(&spec, |_| Ok(()))?;
        step.done(&format!("xl create {} ms", domain.create_ms));
        self.clients.insert(name.to_owned(), domain);
        Ok(())
    }

    fn wait_for_agent(&self, name: &str) -> Result<()> {
        let step = self
            .screen
            .step(format!("Waiting for client {name} to boot"));
        self.lab.wait_for_guest(self.client(name)?)?;
        step.done("");
        Ok(())
    }

    fn wait_for_client(&self, name: &str) -> Result<()> {
        self.wait_for_agent(name)?;
        self.wait_for_link(name)
    }

    /// Waits until a client's interface is connected and has its route.
    ///
    /// # Errors
    ///
    /// If it never is.
    pub fn wait_for_link(&self, name: &str) -> Result<()> {
        self.ask(
            name,
            "n=0
            until ip route | grep -q ^default && cat /sys/class/net/eth*/carrier | grep -q 1
            do n=$((n+1)); [ $n -lt 200 ] || { ip addr; ip route; exit 1; }; sleep 0.1; done",
            LINK_UP,
        )
        .map(drop)
        .with_context(|| format!("the interface of {name} does not come up"))
    }

    /// Attaches a client's interface and waits until it is usable; returns what
    /// `xl` took.
    ///
    /// # Errors
    ///
    /// If `xl` fails or the interface does not come up.
    pub fn attach(&self, name: &str) -> Result<Output> {
        let vif = self.spec(name)?.vif(&self.topology.firewall);
        let output = self.lab.attach(self.client(name)?, &vif)?;
        ensure!(
            output.is_success(),
            "xl network-attach {name}: {}",
            output.stdout
        );
        self.wait_for_link(name)?;
        Ok(output)
    }

    /// Detaches a client's interface; returns what `xl` took.
    ///
    /// # Errors
    ///
    /// If the client has no interface or `xl` fails.
    pub fn detach(&self, name: &str) -> Result<Output> {
        let client = self.client(name)?;
        let listed = self.lab.xl(&format!("network-list '{name}'"))?;
        let last = listed.stdout.lines().last().unwrap_or_default();
        let number = last
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok());
        let Some(number) = number else {
            bail!("{name} has no interface")
        };
        let output = self.lab.detach(client, number)?;
        ensure!(
            output.is_success(),
            "xl network-detach {name} {number}: {}",
            output.stdout
        );
        Ok(output)
    }

    /// The firewall's own name for what it is, for headings.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        describe(&self.topology.firewall)
    }
}

/// The statement by which qubesd rewrites the rules of an address; its policy is always `drop`, as in Qubes.
fn rules_statement(address: IpAddr, policy: &str, rules: &[impl AsRef<str>]) -> String {
    let mut text = format!("rules {address}\n");
    let numbered = rule_tree(address, policy, rules)
        .into_iter()
        .filter(|(key, _)| key != "policy");
    for (number, rule) in numbered {
        text.push_str(&format!("  {number} {rule}\n"));
    }
    if policy == "accept" {
        text.push_str("  9999 action=accept\n");
    }
    text
}

fn describe(firewall: &FirewallSpec) -> &'static str {
    match firewall.kind {
        FirewallKind::Image(_) => "the firewall image (PVH)",
        FirewallKind::Linux => "a Linux firewall (nftables)",
        FirewallKind::None => "no firewall",
    }
}

/// A word for the shell.
#[must_use]
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
