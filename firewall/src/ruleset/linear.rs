//! The meaning of a chain, one rule at a time.
//!
//! This is the reference that the compiled form must agree with: it follows `qubes-policy.md` 2.2
//! and 4.4 word by word and makes no attempt to be fast. Tests and benches use it; the packet path
//! does not.

use core::net::{Ipv4Addr, Ipv6Addr};

use super::{DNS_PORT, Decision, HostState, RuleEnvironment, RuleRef, UpperLayer};
use crate::rule::{Action, Destination, DnsTransport, PortRange, Rule, RuleChain, Traffic};

/// Decides a new flow to an IPv4 address by trying every rule in order.
///
/// The host policy of the environment plays no part: a strict chain is refused when compiled.
pub fn decide4(
    chain: &RuleChain,
    environment: &RuleEnvironment<'_>,
    destination: Ipv4Addr,
    upper: UpperLayer,
) -> Decision {
    let is_resolver = environment.resolvers4.contains(&destination);
    decide(chain, upper, is_resolver, |rule| match &rule.destination {
        Destination::Any => true,
        Destination::Prefix4(prefix) => prefix.contains(destination),
        Destination::Prefix6(_) => false,
        Destination::Host(name) => {
            let mut listed = false;
            let mut compare = |address| listed |= address == destination;
            let state = environment.hosts.addresses4(name, &mut compare);
            listed || unresolved_drop(rule, state)
        }
    })
}

/// Decides a new flow to an IPv6 address by trying every rule in order.
///
/// The host policy of the environment plays no part: a strict chain is refused when compiled.
pub fn decide6(
    chain: &RuleChain,
    environment: &RuleEnvironment<'_>,
    destination: Ipv6Addr,
    upper: UpperLayer,
) -> Decision {
    let is_resolver = environment.resolvers6.contains(&destination);
    decide(chain, upper, is_resolver, |rule| match &rule.destination {
        Destination::Any => true,
        Destination::Prefix6(prefix) => prefix.contains(destination),
        Destination::Prefix4(_) => false,
        Destination::Host(name) => {
            let mut listed = false;
            let mut compare = |address| listed |= address == destination;
            let state = environment.hosts.addresses6(name, &mut compare);
            listed || unresolved_drop(rule, state)
        }
    })
}

fn decide(
    chain: &RuleChain,
    upper: UpperLayer,
    is_resolver: bool,
    destination_matches: impl Fn(&Rule) -> bool,
) -> Decision {
    let matches = |rule: &&Rule| {
        let special = !matches!(rule.traffic, Traffic::Dns(_)) || is_resolver;
        // What cannot be told counts as a match for a drop rule only.
        let traffic = traffic_matches(rule.traffic, upper).unwrap_or(rule.action == Action::Drop);
        special && traffic && destination_matches(rule)
    };
    match chain.rules().iter().find(matches) {
        Some(rule) => Decision {
            action: rule.action,
            rule: RuleRef::Number(rule.number),
        },
        None => Decision {
            action: chain.policy(),
            rule: RuleRef::Policy,
        },
    }
}

/// An unresolved drop rule reaches every destination.
fn unresolved_drop(rule: &Rule, state: HostState) -> bool {
    rule.action == Action::Drop && state == HostState::Unresolved
}

/// Whether the protocol and the port or type fit; `None` if that cannot be told.
fn traffic_matches(traffic: Traffic, upper: UpperLayer) -> Option<bool> {
    let in_range = |ports: Option<PortRange>, port| ports.is_none_or(|range| range.contains(port));
    let fits = match (traffic, upper) {
        (Traffic::Any, _) => true,
        (_, UpperLayer::Unknown) => return None,
        (Traffic::Tcp { ports }, UpperLayer::Tcp { port })
        | (Traffic::Udp { ports }, UpperLayer::Udp { port }) => in_range(ports, port),
        (Traffic::TcpOrUdp { ports }, UpperLayer::Tcp { port } | UpperLayer::Udp { port }) => {
            ports.contains(port)
        }
        (Traffic::Icmp { icmp_type: wanted }, UpperLayer::Icmp { icmp_type }) => {
            wanted.is_none_or(|wanted| wanted == icmp_type)
        }
        (Traffic::Dns(DnsTransport::Both | DnsTransport::Tcp), UpperLayer::Tcp { port })
        | (Traffic::Dns(DnsTransport::Both | DnsTransport::Udp), UpperLayer::Udp { port }) => {
            port == DNS_PORT
        }
        _ => false,
    };
    Some(fits)
}
