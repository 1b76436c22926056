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

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

/// Most rules one chain can hold: the key of a rule has four decimal digits.
pub const MAX_RULES: usize = 10_000;

/// Highest rule number, key `9999`.
const MAX_RULE_NUMBER: u16 = 9_999;

/// Longest host name that DNS can carry, in bytes of text without a final dot (RFC 1035 2.3.4).
const MAX_DNS_NAME_LEN: usize = 253;

/// Longest label of a host name in bytes (RFC 1035 2.3.4).
const MAX_DNS_LABEL_LEN: usize = 63;

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

/// An IPv4 network: an address whose bits below the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix4 {
    address: Ipv4Addr,
    length: u8,
}

impl Prefix4 {
    /// The network of `address` with `length` bits (0 to 32); host bits are cleared.
    pub const fn new(address: Ipv4Addr, length: u8) -> Option<Self> {
        let Some(mask) = mask4(length) else {
            return None;
        };
        Some(Self {
            address: Ipv4Addr::from_bits(address.to_bits() & mask),
            length,
        })
    }

    /// The network that holds only `address`.
    pub const fn host(address: Ipv4Addr) -> Self {
        Self {
            address,
            length: 32,
        }
    }

    /// The lowest address of the network.
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// The prefix length in bits, 0 to 32.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is in the network.
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        match mask4(self.length) {
            Some(mask) => address.to_bits() & mask == self.address.to_bits(),
            None => false,
        }
    }
}

/// `address/length`.
impl fmt::Display for Prefix4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// An IPv6 network: an address whose bits below the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix6 {
    address: Ipv6Addr,
    length: u8,
}

impl Prefix6 {
    /// The network of `address` with `length` bits (0 to 128); host bits are cleared.
    pub const fn new(address: Ipv6Addr, length: u8) -> Option<Self> {
        let Some(mask) = mask6(length) else {
            return None;
        };
        Some(Self {
            address: Ipv6Addr::from_bits(address.to_bits() & mask),
            length,
        })
    }

    /// The network that holds only `address`.
    pub const fn host(address: Ipv6Addr) -> Self {
        Self {
            address,
            length: 128,
        }
    }

    /// The lowest address of the network.
    pub const fn address(self) -> Ipv6Addr {
        self.address
    }

    /// The prefix length in bits, 0 to 128.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is in the network.
    pub const fn contains(self, address: Ipv6Addr) -> bool {
        match mask6(self.length) {
            Some(mask) => address.to_bits() & mask == self.address.to_bits(),
            None => false,
        }
    }
}

/// The address in hexadecimal groups, also where it embeds an IPv4 address, then `/length`.
impl fmt::Display for Prefix6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", HexIpv6(self.address), self.length)
    }
}

/// Prints an IPv6 address in compressed lower-case hexadecimal groups only (RFC 5952 section 4).
///
/// `core` prints IPv4-mapped addresses with a dotted tail; the keys and rules of Qubes do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HexIpv6(pub Ipv6Addr);

impl fmt::Display for HexIpv6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [_, _, _, _, _, group5, high, low] = self.0.segments();
        match self.0.to_ipv4_mapped() {
            // The zero run of a mapped address is always its first five groups, which is the longest.
            Some(_) => write!(f, "::{group5:x}:{high:x}:{low:x}"),
            None => self.0.fmt(f),
        }
    }
}

/// Mask of an IPv4 prefix length; `None` above 32.
const fn mask4(length: u8) -> Option<u32> {
    match length {
        0 => Some(0),
        1..=32 => Some(u32::MAX << (32 - length)),
        _ => None,
    }
}

/// Mask of an IPv6 prefix length; `None` above 128.
const fn mask6(length: u8) -> Option<u128> {
    match length {
        0 => Some(0),
        1..=128 => Some(u128::MAX << (128 - length)),
        _ => None,
    }
}

/// A host name as a rule gives it: not empty, made of `a-z 0-9 - . _`.
///
/// dom0 checks the characters and nothing else, so a name may still be impossible in DNS; see
/// [`HostName::is_resolvable`]. Cloning shares the text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

impl HostName {
    /// Takes a name; upper case is folded, because names in DNS have no case.
    ///
    /// # Errors
    ///
    /// [`HostNameError`] for an empty name or a character that a name cannot have.
    pub fn new(text: &str) -> Result<Self, HostNameError> {
        if text.is_empty() {
            return Err(HostNameError::Empty);
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if !text.bytes().all(allowed) {
            return Err(HostNameError::BadCharacter);
        }
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Ok(Self(Arc::from(text.to_ascii_lowercase())));
        }
        Ok(Self(Arc::from(text)))
    }

    /// The name in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether DNS could have an answer: the lengths fit, no label is empty (but one final dot is
    /// fine) and the last label is not a number.
    ///
    /// Names that end in a number (`10.1`, `0x7f.1`) are what a C library would read as an address.
    /// Here they are names that never resolve (`qubes-policy.md` 2.5).
    pub fn is_resolvable(&self) -> bool {
        let name = self.0.strip_suffix('.').unwrap_or(&self.0);
        let mut last = name;
        for label in name.split('.') {
            if !(1..=MAX_DNS_LABEL_LEN).contains(&label.len()) {
                return false;
            }
            last = label;
        }
        name.len() <= MAX_DNS_NAME_LEN && !is_number(last)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a C library reads `label` as a number: decimal or octal digits, or `0x` and hex digits.
fn is_number(label: &str) -> bool {
    let all_hex = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    label.bytes().all(|byte| byte.is_ascii_digit()) || label.strip_prefix("0x").is_some_and(all_hex)
}

/// Why a text is not a host name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNameError {
    /// There is no text.
    Empty,
    /// A byte is not one of `A-Z a-z 0-9 - . _`.
    BadCharacter,
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

    fn rule(number: u16, destination: Destination) -> Rule {
        Rule {
            number: RuleNumber::new(number).unwrap(),
            action: Action::Accept,
            destination,
            traffic: Traffic::Any,
        }
    }

    #[test]
    fn host_bits_are_cleared() {
        let prefix = Prefix4::new(Ipv4Addr::new(10, 0, 0, 5), 8).unwrap();
        assert_eq!(prefix.to_string(), "10.0.0.0/8");
        assert!(prefix.contains(Ipv4Addr::new(10, 255, 0, 1)));
        assert!(!prefix.contains(Ipv4Addr::new(11, 0, 0, 1)));
        let prefix = Prefix6::new("2001:db8:ffff::1".parse().unwrap(), 37).unwrap();
        assert_eq!(prefix.to_string(), "2001:db8:f800::/37");
    }

    #[test]
    fn prefix_length_zero_holds_everything_and_full_length_one_address() {
        let all = Prefix4::new(Ipv4Addr::new(1, 2, 3, 4), 0).unwrap();
        assert!(all.contains(Ipv4Addr::BROADCAST));
        let one = Prefix6::host(Ipv6Addr::LOCALHOST);
        assert!(one.contains(Ipv6Addr::LOCALHOST));
        assert!(!one.contains(Ipv6Addr::UNSPECIFIED));
    }

    #[test]
    fn prefix_lengths_past_the_address_are_refused() {
        assert_eq!(Prefix4::new(Ipv4Addr::UNSPECIFIED, 33), None);
        assert_eq!(Prefix6::new(Ipv6Addr::UNSPECIFIED, 129), None);
    }

    #[test]
    fn mapped_addresses_print_in_hexadecimal() {
        let text = |address: &str| HexIpv6(address.parse().unwrap()).to_string();
        assert_eq!(text("::ffff:1.2.3.4"), "::ffff:102:304");
        assert_eq!(text("::ffff:0.0.0.0"), "::ffff:0:0");
        assert_eq!(text("::1.2.3.4"), "::102:304");
        assert_eq!(text("fd09:24ef:4179::a89:a"), "fd09:24ef:4179::a89:a");
    }

    #[test]
    fn reversed_port_range_is_refused() {
        assert_eq!(PortRange::new(2, 1), None);
        assert!(PortRange::new(1, 2).unwrap().contains(2));
    }

    #[test]
    fn host_names_have_only_name_characters() {
        assert_eq!(HostName::new(""), Err(HostNameError::Empty));
        assert_eq!(HostName::new("a b"), Err(HostNameError::BadCharacter));
        assert_eq!(HostName::new("ä.example"), Err(HostNameError::BadCharacter));
        assert_eq!(
            HostName::new("WWW.Example").unwrap().as_str(),
            "www.example"
        );
    }

    #[test]
    fn names_that_dns_cannot_have_are_known() {
        let resolvable = |text: &str| HostName::new(text).unwrap().is_resolvable();
        assert!(resolvable("www.example.com"));
        assert!(resolvable("_sip._udp.example.com."));
        assert!(resolvable("1.2.example"));
        for numeric in ["10.1", "127.1", "0x7f.1", "010.0.0.1", "1.2.3.4", "1.0x"] {
            assert!(!resolvable(numeric), "{numeric}");
        }
        for broken in ["a..b", ".a", ".", "a.."] {
            assert!(!resolvable(broken), "{broken}");
        }
        assert!(!resolvable(&"a".repeat(64)));
        assert!(resolvable(&["a"; 127].join(".")));
        assert!(!resolvable(&["a"; 128].join(".")));
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
