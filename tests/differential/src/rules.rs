//! Random rules, as dom0 would write them.
//!
//! The engine gets their text through the parser of the `qubes` crate. The kernel gets what
//! [`crate::ruleset`] makes of the same values, which knows neither that parser nor the compiler.

use std::net::IpAddr;

use fastrand::Rng;

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

impl Tree {
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
