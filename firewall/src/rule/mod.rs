//! Firewall rules as parsed data: what a client may reach, in types that cannot be built wrong.
//!
//! A [`RuleChain`] is the ordered list dom0 keeps for one address of one client. The first rule that
//! matches a new flow decides it; if none does, the chain's policy decides. This file holds only the
//! meaning: the text form is read by the `qubes` crate, the fast form is made by [`crate::ruleset`].
//!
//! Trust: rules come from dom0, which is trusted to decide but not to be free of mistakes, so every
//! constructor checks its input and combinations without a meaning (ports with ICMP, an ICMP type
//! with TCP, a reversed range, host bits below a prefix) have no representation.
//!
//! Bounds: at most [`MAX_RULES`] rules in a chain; a rule number has four decimal digits.
//!
//! Source: Qubes OS firewall rules as `qubes-policy.md` sections 2.1 to 2.6 state them.

mod host_name;
mod prefix;

use alloc::vec::Vec;
use core::fmt;

pub use host_name::{HostName, HostNameError};
pub use prefix::{HexIpv6, Prefix4, Prefix6};

/// Most rules one chain can hold: the key of a rule has four decimal digits.
pub const MAX_RULES: usize = 10_000;

/// Highest rule number, key `9999`.
const MAX_RULE_NUMBER: u16 = 9_999;

/// The address family that a rule chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// What happens to a new flow that a rule, or the policy of a chain, matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The flow may start.
    Accept,
    /// The flow is refused with an ICMP error.
    Drop,
}

/// The position of a rule in the user's list: the four digits of its key. Gaps are normal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleNumber(u16);

impl RuleNumber {
    /// Takes a number of at most four decimal digits.
    pub const fn new(number: u16) -> Option<Self> {
        if number <= MAX_RULE_NUMBER {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number, 0 to 9999.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// Four digits, as in the key.
impl fmt::Display for RuleNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}", self.0)
    }
}

/// An inclusive, non-empty range of destination ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// A range from `first` to `last`, both included; `None` if they are reversed.
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first <= last {
            Some(Self { first, last })
        } else {
            None
        }
    }

    /// The range that holds one port.
    pub const fn single(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// The lowest port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The highest port.
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether `port` lies in the range.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// Where a rule's traffic goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Anywhere.
    Any,
    /// An IPv4 network. Only in IPv4 chains.
    Prefix4(Prefix4),
    /// An IPv6 network. Only in IPv6 chains.
    Prefix6(Prefix6),
    /// The addresses of a host name in the family of the chain.
    Host(HostName),
}

impl Destination {
    /// The only family in which the destination has a meaning; `None` if it has one in both.
    pub const fn family(&self) -> Option<Family> {
        match self {
            Self::Prefix4(_) => Some(Family::Ipv4),
            Self::Prefix6(_) => Some(Family::Ipv6),
            Self::Any | Self::Host(_) => None,
        }
    }
}

/// Which transport carries DNS in [`Traffic::Dns`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DnsTransport {
    /// TCP or UDP.
    Both,
    /// TCP only.
    Tcp,
    /// UDP only.
    Udp,
}

/// What a rule's traffic is: a protocol with the ports or the type that belong to it.
///
/// `ports: None` means that the rule names no ports, which matches like [`PortRange::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// Every protocol.
    Any,
    /// TCP, protocol 6.
    Tcp {
        /// Destination ports, if the rule names any.
        ports: Option<PortRange>,
    },
    /// UDP, protocol 17.
    Udp {
        /// Destination ports, if the rule names any.
        ports: Option<PortRange>,
    },
    /// TCP or UDP: the rule names ports and no protocol.
    TcpOrUdp {
        /// Destination ports.
        ports: PortRange,
    },
    /// ICMP: protocol 1 in an IPv4 chain, ICMPv6 (58) in an IPv6 chain.
    Icmp {
        /// The message type, if the rule names one; the numbers are those of the chain's family.
        icmp_type: Option<u8>,
    },
    /// `specialtarget=dns`: port 53 of the firewall's own resolvers of the chain's family.
    ///
    /// Narrowed further by the rule's destination.
    Dns(DnsTransport),
}

/// One rule: all its predicates must hold for it to match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Position in the user's list.
    pub number: RuleNumber,
    /// What happens to a flow that matches.
    pub action: Action,
    /// Where the flow goes.
    pub destination: Destination,
    /// What the flow is.
    pub traffic: Traffic,
}

/// The rules of one client address, in order, and what happens when none matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleChain {
    family: Family,
    policy: Action,
    rules: Vec<Rule>,
}

impl RuleChain {
    /// Puts rules together; they must be in ascending order of their numbers.
    ///
    /// # Errors
    ///
    /// [`ChainError`] names the first rule that cannot be part of the chain.
    pub fn new(family: Family, policy: Action, rules: Vec<Rule>) -> Result<Self, ChainError> {
        let mut previous = None;
        for rule in &rules {
            if previous >= Some(rule.number) {
                return Err(ChainError::OutOfOrder(rule.number));
            }
            previous = Some(rule.number);
            if rule.destination.family().is_some_and(|own| own != family) {
                return Err(ChainError::WrongFamily(rule.number));
            }
        }
        Ok(Self {
            family,
            policy,
            rules,
        })
    }

    /// The chain that refuses everything: what a client gets whose rules cannot be understood.
    pub const fn deny_all(family: Family) -> Self {
        Self {
            family,
            policy: Action::Drop,
            rules: Vec::new(),
        }
    }

    /// The family of the client address.
    pub const fn family(&self) -> Family {
        self.family
    }

    /// What happens to a flow that no rule matches.
    pub const fn policy(&self) -> Action {
        self.policy
    }

    /// The rules in order, at most [`MAX_RULES`].
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The host names in the rules, in order, with repetitions.
    pub fn host_names(&self) -> impl Iterator<Item = &HostName> {
        self.rules
            .iter()
            .filter_map(|rule| match &rule.destination {
                Destination::Host(name) => Some(name),
                _ => None,
            })
    }
}

/// Why rules do not form a chain.
///
/// Too many rules need no reason of their own: distinct numbers of four digits are at most
/// [`MAX_RULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// The rule does not come after the one before it.
    OutOfOrder(RuleNumber),
    /// The rule's destination is of the other family.
    WrongFamily(RuleNumber),
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfOrder(number) => write!(f, "rule {number}: out of order"),
            Self::WrongFamily(number) => {
                write!(f, "rule {number}: destination of the other address family")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use core::net::Ipv6Addr;

    fn rule(number: u16, destination: Destination) -> Rule {
        Rule {
            number: RuleNumber::new(number).unwrap(),
            action: Action::Accept,
            destination,
            traffic: Traffic::Any,
        }
    }

    #[test]
    fn reversed_port_range_is_refused() {
        assert_eq!(PortRange::new(2, 1), None);
        assert!(PortRange::new(1, 2).unwrap().contains(2));
    }

    #[test]
    fn chain_wants_ascending_numbers_and_its_own_family() {
        let in_order = vec![rule(0, Destination::Any), rule(7, Destination::Any)];
        assert!(RuleChain::new(Family::Ipv4, Action::Drop, in_order).is_ok());
        let twice = vec![rule(3, Destination::Any), rule(3, Destination::Any)];
        let number = RuleNumber::new(3).unwrap();
        assert_eq!(
            RuleChain::new(Family::Ipv4, Action::Drop, twice),
            Err(ChainError::OutOfOrder(number))
        );
        let other = vec![rule(
            3,
            Destination::Prefix6(Prefix6::host(Ipv6Addr::LOCALHOST)),
        )];
        assert_eq!(
            RuleChain::new(Family::Ipv4, Action::Drop, other),
            Err(ChainError::WrongFamily(number))
        );
    }

    #[test]
    fn rule_numbers_have_four_digits() {
        assert_eq!(RuleNumber::new(10_000), None);
        assert_eq!(RuleNumber::new(42).unwrap().to_string(), "0042");
    }
}
