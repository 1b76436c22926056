//! Random rules, as dom0 would write them.
//!
//! The engine gets their text through the parser of the `qubes` crate. The kernel gets what
//! [`crate::ruleset`] makes of the same values, which knows neither that parser nor the compiler.

use std::net::{IpAddr, Ipv4Addr};

use fastrand::Rng;

use crate::packet::{ICMP, ICMPV6, TCP, UDP};
use crate::script::Flow;
use crate::world::{HOSTS, SERVERS4, SERVERS6};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proto {
    Tcp,
    Udp,
    Icmp,
}

#[derive(Clone, Debug)]
pub(crate) enum Target {
    Any,
    Network(IpAddr, u8),
    /// A name, with its place in [`HOSTS`].
    Host(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) accept: bool,
    pub(crate) target: Target,
    pub(crate) proto: Option<Proto>,
    pub(crate) ports: Option<(u16, u16)>,
    pub(crate) icmp_type: Option<u8>,
    pub(crate) dns: bool,
}

/// The rules of one client address.
#[derive(Clone, Debug)]
pub(crate) enum Tree {
    /// dom0 never wrote any.
    Absent,
    /// They cannot be understood.
    Broken,
    Rules {
        accept_policy: bool,
        rules: Vec<Rule>,
    },
}

const PORTS: [u16; 8] = [0, 22, 53, 80, 443, 1024, 5000, 65535];

pub(crate) fn port(rng: &mut Rng) -> u16 {
    *rng.choice(&PORTS).unwrap_or(&80)
}

impl Rule {
    fn random(rng: &mut Rng, v6: bool) -> Self {
        let mut rule = Self {
            accept: rng.u8(..100) < 60,
            target: Target::Any,
            proto: None,
            ports: None,
            icmp_type: None,
            dns: false,
        };
        if rng.u8(..100) < 60 {
            rule.target = target(rng, v6);
        }
        rule.proto = match rng.u8(..100) {
            0..30 => Some(Proto::Tcp),
            30..55 => Some(Proto::Udp),
            55..70 => Some(Proto::Icmp),
            _ => None,
        };
        match rule.proto {
            Some(Proto::Icmp) if rng.bool() => {
                let types: &[u8] = if v6 {
                    &[128, 129, 1, 8]
                } else {
                    &[8, 0, 3, 13]
                };
                rule.icmp_type = rng.choice(types).copied();
            }
            Some(Proto::Icmp) => {}
            _ if rng.u8(..100) < 50 => {
                let (a, b) = (port(rng), port(rng));
                rule.ports = Some(if rng.bool() {
                    (a, a)
                } else {
                    (a.min(b), a.max(b))
                });
            }
            None if rng.u8(..100) < 10 => rule.icmp_type = Some(if v6 { 128 } else { 8 }),
            _ => {}
        }
        rule.dns = rule.icmp_type.is_none() && rng.u8(..100) < 12;
        rule
    }

    /// The value of the rule's key.
    pub(crate) fn text(&self) -> String {
        let mut words = vec![format!(
            "action={}",
            if self.accept { "accept" } else { "drop" }
        )];
        match &self.target {
            Target::Any => {}
            Target::Network(address, length) => {
                let family = if address.is_ipv6() { 6 } else { 4 };
                words.push(format!("dst{family}={address}/{length}"));
            }
            Target::Host(at) => words.push(format!("dsthost={}", HOSTS[*at].0)),
        }
        if let Some(proto) = self.proto {
            let name = match proto {
                Proto::Tcp => "tcp",
                Proto::Udp => "udp",
                Proto::Icmp => "icmp",
            };
            words.push(format!("proto={name}"));
        }
        if self.dns {
            words.push("specialtarget=dns".to_owned());
        }
        if let Some((first, last)) = self.ports {
            words.push(format!("dstports={first}-{last}"));
        }
        if let Some(icmp_type) = self.icmp_type {
            words.push(format!("icmptype={icmp_type}"));
        }
        words.join(" ")
    }
}

fn target(rng: &mut Rng, v6: bool) -> Target {
    if rng.u8(..100) < 20 {
        return Target::Host(rng.usize(..HOSTS.len()));
    }
    let (servers, most): (&[IpAddr], u8) = if v6 {
        (&SERVERS6, 128)
    } else {
        (&SERVERS4, 32)
    };
    let length = match rng.u8(..10) {
        0..5 => most,
        5..8 => most - rng.u8(1..9),
        _ => rng.u8(..=most),
    };
    Target::Network(servers[rng.usize(..servers.len())], length)
}

impl Rule {
    /// Whether the rule is about a flow to this place. A third opinion, beside nftables and the engine:
    /// it tells only which flows a change of rules should end.
    fn matches(&self, flow: &Flow, remote: IpAddr, resolvers: &[Ipv4Addr]) -> bool {
        let v6 = remote.is_ipv6();
        let about_target = match &self.target {
            Target::Any => true,
            Target::Network(address, length) => is_in(remote, *address, *length),
            Target::Host(at) => match HOSTS[*at].1 {
                Some(addresses) => addresses.contains(&remote),
                None => !self.accept,
            },
        };
        let ports = if self.dns { Some((53, 53)) } else { self.ports };
        let has_ports = matches!(flow.protocol, TCP | UDP);
        let is_icmp = flow.protocol == if v6 { ICMPV6 } else { ICMP };
        let about_protocol = match self.proto {
            None => true,
            Some(Proto::Tcp) => flow.protocol == TCP,
            Some(Proto::Udp) => flow.protocol == UDP,
            Some(Proto::Icmp) => is_icmp,
        };
        let about_type = self
            .icmp_type
            .is_none_or(|kind| is_icmp && flow.dport >> 8 == u16::from(kind));
        let about_ports =
            ports.is_none_or(|(from, to)| has_ports && (from..=to).contains(&flow.dport));
        let about_dns = !self.dns
            || !v6
                && self.ports.is_none_or(|own| own == (53, 53))
                && resolvers.iter().any(|own| IpAddr::V4(*own) == remote);
        about_target && about_protocol && about_type && about_ports && about_dns
    }
}

fn is_in(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let bits = |own: IpAddr| match own {
        IpAddr::V4(own) => u128::from(own.to_bits()) << 96,
        IpAddr::V6(own) => own.to_bits(),
    };
    // The bits of both families start at the top.
    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    address.is_ipv6() == network.is_ipv6() && (bits(address) ^ bits(network)) & mask == 0
}

impl Tree {
    /// Whether a flow to this place may start.
    pub(crate) fn allows(&self, flow: &Flow, remote: IpAddr, resolvers: &[Ipv4Addr]) -> bool {
        match self {
            Self::Absent | Self::Broken => false,
            Self::Rules {
                accept_policy,
                rules,
            } => rules
                .iter()
                .find(|rule| rule.matches(flow, remote, resolvers))
                .map_or(*accept_policy, |rule| rule.accept),
        }
    }

    pub(crate) fn random(rng: &mut Rng, v6: bool) -> Self {
        match rng.u8(..100) {
            0..4 => return Self::Absent,
            4..8 => return Self::Broken,
            _ => {}
        }
        let count = match rng.u8(..10) {
            0 => 0,
            1..8 => rng.usize(1..6),
            _ => rng.usize(6..40),
        };
        let mut rules: Vec<Rule> = (0..count).map(|_| Rule::random(rng, v6)).collect();
        // Most of the traffic should pass.
        if rng.u8(..100) < 70 {
            rules.push(Rule {
                accept: true,
                target: Target::Any,
                proto: None,
                ports: None,
                icmp_type: None,
                dns: false,
            });
        }
        Self::Rules {
            accept_policy: rng.u8(..100) < 15,
            rules,
        }
    }

    /// The keys of the tree; gaps are normal.
    pub(crate) fn keys(&self) -> Vec<(String, String)> {
        match self {
            Self::Absent => Vec::new(),
            Self::Broken => vec![("policy".to_owned(), "perhaps".to_owned())],
            Self::Rules {
                accept_policy,
                rules,
            } => {
                let policy = if *accept_policy { "accept" } else { "drop" };
                let mut keys = vec![("policy".to_owned(), policy.to_owned())];
                for (number, rule) in rules.iter().enumerate() {
                    keys.push((format!("{:04}", number * 2), rule.text()));
                }
                keys
            }
        }
    }
}
