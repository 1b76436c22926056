//! Rule chains made fast: one lookup decides a new flow, whatever the number of rules.
//!
//! [`Compiler`] turns a [`RuleChain`](crate::rule::RuleChain) and what is known about names and
//! resolvers into [`CompiledRules`]; [`CompiledRules::decide4`] and [`CompiledRules::decide6`] give
//! the first matching rule for a destination without allocating. [`linear`] says the same thing one
//! rule at a time and is what the fast form is tested against.
//!
//! # Shape of the fast form
//!
//! Every distinct destination prefix of the chain is a *line*. The address space is cut where lines
//! begin and end; one binary search finds the longest prefix that holds an address, and each line
//! knows the next shorter prefix around it. A line keeps, for TCP, UDP and ICMP, the first match over
//! all ports or types as a sorted list of intervals. A lookup walks from the longest prefix outwards
//! and stops as soon as no prefix further out has an earlier rule. Its cost is two binary searches
//! plus the nesting depth of prefixes around the address, which dom0's rules alone set: at most 33
//! for IPv4 and 129 for IPv6. Traffic cannot grow any of it.
//!
//! # Trust and bounds
//!
//! Rules come from dom0, names from DNS answers. A compiled chain has at most [`MAX_LINES`] pairs of
//! a rule and a destination; past that compilation fails and the caller must refuse everything.
//!
//! Source: `qubes-policy.md` 2.2, 4.2, 4.4 and 10.1 (D2); `performance.md` 5.6.

mod compile;
mod expand;
mod heap_sort;
mod index;
pub mod linear;
mod lines;
mod outcome;
mod paint;

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

use crate::rule::{Action, Family, HostName, RuleNumber};

pub use compile::{Compiler, Progress};
pub use index::CompiledRules;

/// Most pairs of a rule and one of its destinations in a compiled chain.
///
/// Twice the number of rules a chain can have: names may stand for several addresses. Lines are
/// numbered in 16 bits, so this must stay below 65,535.
pub const MAX_LINES: usize = 20_000;

/// Port of DNS over TCP and UDP, which `specialtarget=dns` implies.
const DNS_PORT: u16 = 53;

// IANA protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// What a packet carries above IP, as far as rules can tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpperLayer {
    /// TCP.
    Tcp {
        /// Destination port.
        port: u16,
    },
    /// UDP.
    Udp {
        /// Destination port.
        port: u16,
    },
    /// ICMP in an IPv4 packet, ICMPv6 in an IPv6 packet.
    Icmp {
        /// Message type.
        icmp_type: u8,
    },
    /// Any other protocol: only rules without a protocol match.
    Other,
    /// The protocol, or the port or type, cannot be told: an IPv6 header chain that does not end in
    /// anything known. A rule that depends on it matches if it drops, not if it accepts (D2).
    Unknown,
}

impl UpperLayer {
    /// Classifies by protocol number.
    ///
    /// `selector` is the destination port of TCP and UDP, the message type of ICMP, and is ignored
    /// otherwise. An ICMP type above 255 is [`UpperLayer::Unknown`].
    pub fn from_protocol(family: Family, protocol: u8, selector: u16) -> Self {
        match (family, protocol) {
            (_, TCP) => Self::Tcp { port: selector },
            (_, UDP) => Self::Udp { port: selector },
            (Family::Ipv4, ICMP) | (Family::Ipv6, ICMPV6) => match u8::try_from(selector) {
                Ok(icmp_type) => Self::Icmp { icmp_type },
                Err(_) => Self::Unknown,
            },
            _ => Self::Other,
        }
    }
}

/// What decided a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RuleRef {
    /// The rule with this number.
    Number(RuleNumber),
    /// The policy of the chain: no rule matched.
    Policy,
}

/// `rule NNNN` or `policy`.
impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "rule {number}"),
            Self::Policy => f.write_str("policy"),
        }
    }
}

/// The answer of a chain for one new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Which part of the chain says so.
    pub rule: RuleRef,
}

/// Whether the addresses of a host name are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostState {
    /// No usable answer yet, or no longer.
    Unresolved,
    /// The addresses are known. There may be none: a name without an address of this family.
    Resolved,
}

/// Where a compiler learns the addresses of host names.
///
/// The state says how far a *drop* rule reaches: if unresolved, everywhere. Addresses may be given
/// even for an unresolved name, when they are known from another source; an accept rule then admits
/// them.
pub trait HostLookup {
    /// Calls `each` with every IPv4 address of `name`, in any order.
    fn addresses4(&self, name: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState;

    /// Calls `each` with every IPv6 address of `name`, in any order.
    fn addresses6(&self, name: &HostName, each: &mut dyn FnMut(Ipv6Addr)) -> HostState;
}

/// Knows no name: every host is unresolved.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHosts;

impl HostLookup for NoHosts {
    fn addresses4(&self, _: &HostName, _: &mut dyn FnMut(Ipv4Addr)) -> HostState {
        HostState::Unresolved
    }

    fn addresses6(&self, _: &HostName, _: &mut dyn FnMut(Ipv6Addr)) -> HostState {
        HostState::Unresolved
    }
}

/// What a name without addresses does to its chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HostPolicy {
    /// Only rules with that name are affected (`qubes-policy.md` 4.4, items 2 and 3).
    #[default]
    PerRule,
    /// The chain does not compile, as on Linux (4.4 item 8, `parity=strict`).
    Strict,
}

/// What rules depend on besides themselves. When any of it changes, compile again.
#[derive(Clone, Copy)]
pub struct RuleEnvironment<'a> {
    /// Our resolvers with IPv4 addresses, which `specialtarget=dns` means in an IPv4 chain.
    pub resolvers4: &'a [Ipv4Addr],
    /// Our resolvers with IPv6 addresses; empty unless somebody configured them.
    pub resolvers6: &'a [Ipv6Addr],
    /// The addresses of host names, as far as this client may use them.
    pub hosts: &'a dyn HostLookup,
    /// What to do about names without addresses.
    pub host_policy: HostPolicy,
}

/// Why a chain cannot be compiled. The caller must then refuse everything the client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompileError {
    /// With this rule the destinations pass [`MAX_LINES`].
    TooManyDestinations(RuleNumber),
    /// The rule's host has no addresses, under [`HostPolicy::Strict`].
    HostWithoutAddress(RuleNumber),
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyDestinations(number) => {
                write!(
                    f,
                    "rule {number}: more than {MAX_LINES} destinations in all rules"
                )
            }
            Self::HostWithoutAddress(number) => write!(f, "rule {number}: host has no address"),
        }
    }
}

#[cfg(test)]
mod tests;
