//! Who is connected to whom: plain data that scenarios vary.
//!
//! Addresses follow Qubes: a /32 on every link, the firewall's one address
//! towards both sides, DNS at virtual addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use super::domain::{Boot, DomainSpec, Vif};
use super::internet::{UPLINK, UPLINK6, VIRTUAL_DNS};

/// The firewall's address, seen by its uplink and its clients.
pub const FIREWALL: Ipv4Addr = Ipv4Addr::new(10, 137, 0, 5);
/// The same for IPv6.
pub const FIREWALL6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, 0xa89, 5);
/// MAC address of the firewall's uplink interface.
pub const FIREWALL_MAC: &str = "00:16:3e:5e:6c:05";

/// MAC address of every backend interface, and so of every next hop.
pub const BACKEND_MAC: &str = "fe:ff:ff:ff:ff:ff";

/// Name of the firewall's domain.
pub const FIREWALL_NAME: &str = "fw";

/// Memory of the firewall image in MiB; it is meant to be small.
const IMAGE_MEMORY_MIB: u32 = 16;

/// Memory of a Linux guest in MiB: the smallest that leaves room for the kernel,
/// the root archive and a download.
const LINUX_MEMORY_MIB: u32 = 192;

/// Where the firewall image is put in dom0.
pub(super) const IMAGE_PATH: &str = "/lab/run/firewall-image";

/// What stands between uplink and clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirewallKind {
    /// Our image, a PVH unikernel.
    Image(PathBuf),
    /// A Linux guest with nftables, doing what a Qubes `sys-firewall` does.
    Linux,
    /// Nothing: clients are attached to dom0 directly, as a reference.
    None,
}

/// Where the image gets its settings and rules from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// xenstore, below its own `vm-data/`: plain Xen.
    #[default]
    Xenstore,
    /// QubesDB, from the double of dom0's daemons: Qubes OS.
    QubesDb,
}

/// The firewall.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallSpec {
    /// What it is.
    pub kind: FirewallKind,
    /// Where its settings come from, if it is the image.
    pub source: Source,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Command line of the image.
    pub arguments: String,
    /// Whether it is given an IPv6 address.
    pub ipv6: bool,
    /// What the image writes on its console when clients may come.
    pub ready_mark: String,
}

impl FirewallSpec {
    /// A firewall of this kind with usual memory.
    #[must_use]
    pub fn new(kind: FirewallKind) -> Self {
        let memory_mib = if matches!(kind, FirewallKind::Image(_)) {
            IMAGE_MEMORY_MIB
        } else {
            LINUX_MEMORY_MIB
        };
        Self {
            kind,
            source: Source::default(),
            memory_mib,
            arguments: String::new(),
            ipv6: true,
            ready_mark: "ready for clients".into(),
        }
    }

    /// The domain; `None` if there is no firewall.
    #[must_use]
    pub fn domain(&self) -> Option<DomainSpec> {
        let boot = match &self.kind {
            FirewallKind::None => return None,
            FirewallKind::Image(_) => Boot::Image {
                path: IMAGE_PATH.into(),
                arguments: self.arguments.clone(),
            },
            FirewallKind::Linux => Boot::Linux {
                archive: "/lab/firewall.cpio",
                settings: settings(FIREWALL_NAME, "firewall", FIREWALL, UPLINK)
                    + &settings6(self.ipv6.then_some((FIREWALL6, UPLINK6))),
            },
        };
        Some(DomainSpec {
            name: FIREWALL_NAME.into(),
            boot,
            memory_mib: self.memory_mib,
            vifs: vec![Vif {
                mac: FIREWALL_MAC.into(),
                ip: addresses(FIREWALL, self.ipv6.then_some(FIREWALL6)),
                backend: None,
                script: "vif-lab".into(),
            }],
            driver_domain: true,
        })
    }
}

/// A client qube and its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientSpec {
    /// Its name, and that of its domain.
    pub name: String,
    /// Its IPv4 address.
    pub ip: Ipv4Addr,
    /// Its IPv6 address, if it has one.
    pub ip6: Option<Ipv6Addr>,
    /// Its MAC address.
    pub mac: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Default action: `drop` or `accept`.
    pub policy: String,
    /// Rules in Qubes' notation, in order.
    pub rules: Vec<String>,
}

impl ClientSpec {
    /// The client called `c<number>` with addresses made from its number (1 to
    /// 200) and the rule that every new qube has: accept everything.
    #[must_use]
    pub fn numbered(number: u8) -> Self {
        let last = number.saturating_add(5);
        Self {
            name: format!("c{number}"),
            ip: Ipv4Addr::new(10, 137, 0, last),
            ip6: Some(Ipv6Addr::new(
                0xfd09,
                0x24ef,
                0x4179,
                0,
                0,
                0,
                0xa89,
                u16::from(last),
            )),
            mac: format!("00:16:3e:5e:6c:{last:02x}"),
            memory_mib: LINUX_MEMORY_MIB,
            policy: "drop".into(),
            rules: vec!["action=accept".into()],
        }
    }

    /// The same client with other rules.
    #[must_use]
    pub fn with_rules(mut self, rules: &[&str]) -> Self {
        self.rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
        self
    }

    /// Its interface, behind the firewall or, without one, behind dom0.
    #[must_use]
    pub fn vif(&self, firewall: &FirewallSpec) -> Vif {
        let behind = firewall.kind != FirewallKind::None;
        Vif {
            mac: self.mac.clone(),
            ip: addresses(self.ip, self.ip6.filter(|_| firewall.ipv6)),
            backend: behind.then(|| FIREWALL_NAME.into()),
            script: if behind { "vif-fw" } else { "vif-lab" }.into(),
        }
    }

    /// Its domain, with or without its interface.
    #[must_use]
    pub fn domain(&self, firewall: &FirewallSpec, attached: bool) -> DomainSpec {
        let direct = firewall.kind == FirewallKind::None;
        let (gateway, gateway6) = if direct {
            (UPLINK, UPLINK6)
        } else {
            (FIREWALL, FIREWALL6)
        };
        let [dns, _] = VIRTUAL_DNS;
        let ip6 = self
            .ip6
            .filter(|_| firewall.ipv6)
            .map(|ip6| (ip6, gateway6));
        let settings = settings(&self.name, "client", self.ip, gateway)
            + &settings6(ip6)
            + &format!(" lab.dns={dns}");
        DomainSpec {
            name: self.name.clone(),
            boot: Boot::Linux {
                archive: "/lab/guest.cpio",
                settings,
            },
            memory_mib: self.memory_mib,
            vifs: if attached {
                vec![self.vif(firewall)]
            } else {
                Vec::new()
            },
            driver_domain: false,
        }
    }

    /// Its rules as they are sent for one address family: a rule that names an
    /// address of the other family is left out, and its index stays unused.
    #[must_use]
    pub fn tree(&self, address: IpAddr) -> Vec<(String, String)> {
        rule_tree(address, &self.policy, &self.rules)
    }
}

/// Keys below `qubes-firewall/<address>/` and their values.
#[must_use]
pub fn rule_tree(
    address: IpAddr,
    policy: &str,
    rules: &[impl AsRef<str>],
) -> Vec<(String, String)> {
    let foreign = if address.is_ipv4() { "dst6=" } else { "dst4=" };
    let numbered = rules.iter().map(AsRef::as_ref).enumerate();
    std::iter::once(("policy".to_owned(), policy.to_owned()))
        .chain(
            numbered
                .filter(|(_, rule)| !rule.split(' ').any(|word| word.starts_with(foreign)))
                .map(|(index, rule)| (format!("{index:04}"), rule.to_owned())),
        )
        .collect()
}

/// An address as part of a xenstore path, where `.` and `:` are not allowed.
#[must_use]
pub fn address_key(address: IpAddr) -> String {
    address.to_string().replace('.', "_").replace(':', "-")
}

/// Everything that stands around one uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// What is in the middle.
    pub firewall: FirewallSpec,
    /// Who is behind it.
    pub clients: Vec<ClientSpec>,
}

impl Topology {
    /// A firewall of this kind and clients `c1` to `c<count>`.
    #[must_use]
    pub fn new(kind: FirewallKind, count: u8) -> Self {
        Self {
            firewall: FirewallSpec::new(kind),
            clients: (1..=count).map(ClientSpec::numbered).collect(),
        }
    }

    /// A client by name.
    #[must_use]
    pub fn client(&self, name: &str) -> Option<&ClientSpec> {
        self.clients.iter().find(|client| client.name == name)
    }
}

fn addresses(ip: Ipv4Addr, ip6: Option<Ipv6Addr>) -> String {
    match ip6 {
        Some(ip6) => format!("{ip} {ip6}"),
        None => ip.to_string(),
    }
}

fn settings(name: &str, role: &str, ip: Ipv4Addr, gateway: Ipv4Addr) -> String {
    format!("lab.name={name} lab.role={role} lab.ip={ip} lab.gateway={gateway}")
}

fn settings6(addresses: Option<(Ipv6Addr, Ipv6Addr)>) -> String {
    match addresses {
        Some((ip6, gateway6)) => format!(" lab.ip6={ip6} lab.gateway6={gateway6}"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_the_other_family_leave_a_gap() {
        let rules = [
            "action=drop dst6=2001:db8::/32",
            "action=accept dst4=192.0.2.0/24",
            "action=drop",
        ];
        let keys = |address: &str| -> Vec<String> {
            rule_tree(address.parse().unwrap(), "drop", &rules)
                .into_iter()
                .map(|(key, _)| key)
                .collect()
        };
        assert_eq!(keys("10.137.0.6"), ["policy", "0001", "0002"]);
        assert_eq!(keys("fd09::6"), ["policy", "0000", "0002"]);
    }

    #[test]
    fn addresses_become_keys_that_xenstore_takes() {
        assert_eq!(address_key("10.137.0.6".parse().unwrap()), "10_137_0_6");
        assert_eq!(
            address_key("fd09:24ef:4179::a89:6".parse().unwrap()),
            "fd09-24ef-4179--a89-6"
        );
    }

    #[test]
    fn a_client_without_firewall_is_attached_to_dom0() {
        let topology = Topology::new(FirewallKind::None, 1);
        let client = topology
            .client("c1")
            .unwrap()
            .domain(&topology.firewall, true);
        assert_eq!(client.vifs[0].backend, None);
        let Boot::Linux { settings, .. } = client.boot else {
            unreachable!()
        };
        assert!(settings.contains("lab.gateway=10.137.0.4 "));
        assert!(topology.firewall.domain().is_none());
    }
}
