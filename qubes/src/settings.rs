//! Network settings: what the keys of `qubes-policy.md` 1.1 say about us and our neighbours.
//!
//! Parsing is tolerant: a setting that is absent or makes no sense is a named [`Problem`], and the rest
//! still holds. What the absence of a setting means for packets is the engine's to decide. Whether there
//! is an uplink at all is not in these keys: dom0 leaves old values in place when it takes our netvm
//! away.
//!
//! Source: `qubes-policy.md` 1.1 and 4.1.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::address_text::{parse_ipv4, parse_ipv6};

/// A setting that the firewall reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// Our IPv4 address on the uplink.
    Ip,
    /// The IPv4 next hop on the uplink.
    Gateway,
    /// Our IPv6 address on the uplink.
    Ip6,
    /// The IPv6 next hop on the uplink.
    Gateway6,
    /// Our first resolver.
    PrimaryDns,
    /// Our second resolver.
    SecondaryDns,
    /// The MAC address of our uplink interface.
    Mac,
    /// Present if we provide network to clients.
    NetvmNetwork,
    /// The IPv4 address that clients use as their gateway, and that our ICMP errors come from.
    NetvmGateway,
    /// The same for IPv6; without it there is no IPv6 for clients.
    NetvmGateway6,
    /// The first resolver address that clients use.
    NetvmPrimaryDns,
    /// The second resolver address that clients use.
    NetvmSecondaryDns,
    /// IPv4 addresses of all qubes that are configured to use us.
    ConnectedIps,
    /// IPv6 addresses of all qubes that are configured to use us.
    ConnectedIps6,
}

impl Setting {
    /// Every setting.
    pub const ALL: [Self; 14] = [
        Self::Ip,
        Self::Gateway,
        Self::Ip6,
        Self::Gateway6,
        Self::PrimaryDns,
        Self::SecondaryDns,
        Self::Mac,
        Self::NetvmNetwork,
        Self::NetvmGateway,
        Self::NetvmGateway6,
        Self::NetvmPrimaryDns,
        Self::NetvmSecondaryDns,
        Self::ConnectedIps,
        Self::ConnectedIps6,
    ];

    /// The key.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Ip => "/qubes-ip",
            Self::Gateway => "/qubes-gateway",
            Self::Ip6 => "/qubes-ip6",
            Self::Gateway6 => "/qubes-gateway6",
            Self::PrimaryDns => "/qubes-primary-dns",
            Self::SecondaryDns => "/qubes-secondary-dns",
            Self::Mac => "/qubes-mac",
            Self::NetvmNetwork => "/qubes-netvm-network",
            Self::NetvmGateway => "/qubes-netvm-gateway",
            Self::NetvmGateway6 => "/qubes-netvm-gateway6",
            Self::NetvmPrimaryDns => "/qubes-netvm-primary-dns",
            Self::NetvmSecondaryDns => "/qubes-netvm-secondary-dns",
            Self::ConnectedIps => "/connected-ips",
            Self::ConnectedIps6 => "/connected-ips6",
        }
    }

    /// Whether a firewall with clients and an uplink cannot do its work without it.
    const fn is_needed(self) -> bool {
        matches!(
            self,
            Self::Ip
                | Self::Gateway
                | Self::PrimaryDns
                | Self::NetvmNetwork
                | Self::NetvmGateway
                | Self::NetvmPrimaryDns
                | Self::ConnectedIps
        )
    }
}

/// Overrides for the interface with our MAC address, which come before the plain keys.
const NET_CONFIG: &str = "/net-config/";

/// Whether a change of `path` changes [`NetworkSettings`], apart from the connected addresses.
pub(crate) fn is_setting(path: &str) -> bool {
    !is_connected_key(path)
        && (path.starts_with(NET_CONFIG)
            || Setting::ALL.iter().any(|setting| setting.key() == path))
}

/// Whether `path` holds connected addresses.
pub(crate) fn is_connected_key(path: &str) -> bool {
    path == Setting::ConnectedIps.key() || path == Setting::ConnectedIps6.key()
}

/// What is wrong with a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is not there, and we need it.
    Missing(Setting),
    /// It is there and makes no sense, in whole or in part.
    Malformed(Setting),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(setting) => write!(f, "{} is missing", setting.key()),
            Self::Malformed(setting) => write!(f, "{} makes no sense", setting.key()),
        }
    }
}

/// An Ethernet address.
pub type MacAddress = [u8; 6];

/// Everything the network keys say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Our IPv4 address on the uplink.
    pub uplink4: Option<Ipv4Addr>,
    /// The IPv4 next hop on the uplink.
    pub uplink_gateway4: Option<Ipv4Addr>,
    /// Our IPv6 address on the uplink.
    pub uplink6: Option<Ipv6Addr>,
    /// The IPv6 next hop on the uplink; absent if our netvm has no IPv6.
    pub uplink_gateway6: Option<Ipv6Addr>,
    /// The MAC address of our uplink interface.
    pub uplink_mac: Option<MacAddress>,
    /// Our own resolvers in their order.
    pub resolvers: Vec<IpAddr>,
    /// Whether dom0 says that we provide network.
    pub is_network_provider: bool,
    /// Our address towards clients; if dom0 does not say, our address on the uplink.
    pub client_gateway4: Option<Ipv4Addr>,
    /// Our IPv6 address towards clients; absent means no IPv6 for them.
    pub client_gateway6: Option<Ipv6Addr>,
    /// The resolver addresses that clients use, in their order.
    pub virtual_resolvers: Vec<Ipv4Addr>,
    /// IPv4 addresses of all qubes configured to use us, as dom0 shows them (`qubes-policy.md` 5.4).
    pub connected4: Vec<Ipv4Addr>,
    /// IPv6 addresses of all qubes configured to use us.
    pub connected6: Vec<Ipv6Addr>,
    /// What is missing or malformed.
    pub problems: Vec<Problem>,
}

impl NetworkSettings {
    /// Reads the settings by asking for every key. White space around values is ignored, and an empty
    /// value is an absent one, except for the lists.
    pub fn from_lookup<'a>(lookup: impl Fn(&str) -> Option<&'a [u8]>) -> Self {
        let mut reader = Reader {
            lookup,
            problems: Vec::new(),
        };
        let uplink_mac = reader.parsed(Setting::Mac, parse_mac);
        let mut settings = Self {
            uplink_mac,
            is_network_provider: (reader.lookup)(Setting::NetvmNetwork.key()).is_some(),
            client_gateway4: reader.parsed(Setting::NetvmGateway, parse_ipv4),
            client_gateway6: reader.parsed(Setting::NetvmGateway6, parse_ipv6),
            connected4: reader.list(Setting::ConnectedIps),
            connected6: reader.list(Setting::ConnectedIps6),
            ..Self::default()
        };
        for setting in [Setting::PrimaryDns, Setting::SecondaryDns] {
            settings.resolvers.extend(reader.parsed(setting, parse_ip));
        }
        for setting in [Setting::NetvmPrimaryDns, Setting::NetvmSecondaryDns] {
            settings
                .virtual_resolvers
                .extend(reader.parsed(setting, parse_ipv4));
        }
        reader.read_uplink(&mut settings);
        settings.client_gateway4 = settings.client_gateway4.or(settings.uplink4);
        for setting in Setting::ALL {
            if setting.is_needed() && (reader.lookup)(setting.key()).is_none() {
                reader.problems.push(Problem::Missing(setting));
            }
        }
        settings.problems = reader.problems;
        settings
    }

    /// The map from the resolver addresses that clients use to our own resolvers.
    pub fn dns_map(&self) -> Vec<(Ipv4Addr, DnsTarget)> {
        dns_map(&self.virtual_resolvers, &self.resolvers)
    }
}

struct Reader<L> {
    lookup: L,
    problems: Vec<Problem>,
}

impl<'a, L: Fn(&str) -> Option<&'a [u8]>> Reader<L> {
    /// The value of a setting that is not empty.
    fn value(&self, key: &str) -> Option<&'a [u8]> {
        (self.lookup)(key)
            .map(<[u8]>::trim_ascii)
            .filter(|value| !value.is_empty())
    }

    fn parsed<T>(&mut self, setting: Setting, parse: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let parsed = parse(self.value(setting.key())?);
        if parsed.is_none() {
            self.problems.push(Problem::Malformed(setting));
        }
        parsed
    }

    /// A list separated by spaces. What is no address is left out and reported.
    fn list<T: core::str::FromStr>(&mut self, setting: Setting) -> Vec<T> {
        let value = self.value(setting.key()).unwrap_or(&[]);
        let mut is_whole = true;
        let mut list = Vec::new();
        for word in value
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty())
        {
            match str::from_utf8(word).ok().and_then(|word| word.parse().ok()) {
                Some(address) => list.push(address),
                None => is_whole = false,
            }
        }
        if !is_whole {
            self.problems.push(Problem::Malformed(setting));
        }
        list
    }

    /// The addresses on the uplink, from the override of our interface if there is one.
    fn read_uplink(&mut self, settings: &mut NetworkSettings) {
        let directory = settings.uplink_mac.map(|mac| {
            let [a, b, c, d, e, f] = mac;
            alloc::format!("{NET_CONFIG}{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}/")
        });
        let from = |name: &str, directory: &String| {
            let mut key = directory.clone();
            key.push_str(name);
            self.value(&key)
        };
        if let Some(directory) = directory
            && let Some(address) = from("ip", &directory).and_then(parse_ipv4)
        {
            settings.uplink4 = Some(address);
            settings.uplink_gateway4 = from("gateway", &directory).and_then(parse_ipv4);
            settings.uplink6 = from("ip6", &directory).and_then(parse_ipv6);
            settings.uplink_gateway6 = from("gateway6", &directory).and_then(parse_ipv6);
            return;
        }
        settings.uplink4 = self.parsed(Setting::Ip, parse_ipv4);
        settings.uplink_gateway4 = self.parsed(Setting::Gateway, parse_ipv4);
        settings.uplink6 = self.parsed(Setting::Ip6, parse_ipv6);
        settings.uplink_gateway6 = self.parsed(Setting::Gateway6, parse_ipv6);
    }
}

fn parse_ip(value: &[u8]) -> Option<IpAddr> {
    str::from_utf8(value).ok()?.trim_ascii().parse().ok()
}

/// Six groups of two hexadecimal digits with colons between them.
fn parse_mac(value: &[u8]) -> Option<MacAddress> {
    let mut groups = str::from_utf8(value).ok()?.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let group = groups.next()?;
        let is_hex = group.len() == 2 && group.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = u8::from_str_radix(group, 16).ok().filter(|_| is_hex)?;
    }
    groups.next().is_none().then_some(mac)
}

/// Where DNS traffic to a resolver address of the clients goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DnsTarget {
    /// To this resolver of ours.
    Resolver(Ipv4Addr),
    /// Nowhere: we have no resolver. It is dropped before the client's rules are asked.
    Drop,
}

/// Maps the resolver addresses that clients use to `upstream`, our own resolvers, in turn. There is no
/// mapping to IPv6 resolvers.
///
/// Source: `qubes-policy.md` 4.1.
pub fn dns_map(virtual_resolvers: &[Ipv4Addr], upstream: &[IpAddr]) -> Vec<(Ipv4Addr, DnsTarget)> {
    let upstream4 = upstream.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(DnsTarget::Resolver(*address)),
        IpAddr::V6(_) => None,
    });
    let targets = upstream4.cycle().chain(core::iter::repeat(DnsTarget::Drop));
    virtual_resolvers.iter().copied().zip(targets).collect()
}

#[cfg(test)]
mod tests;
