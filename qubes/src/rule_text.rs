//! The text form of one rule: what dom0 writes to `/qubes-firewall/<address>/NNNN`.
//!
//! A rule is a line of `option=value` separated by single spaces. Options may come in any order, each
//! at most once. Whatever is not understood is an error, never ignored: leaving out a condition would
//! make a rule wider than its author meant. The caller answers an error by blocking the client.
//!
//! dom0 is trusted to decide, not to be of our version; the text is read as bytes and nothing in it can
//! cause a panic. Errors carry at most a short excerpt, which prints escaped.
//!
//! Source: `qubes-policy.md` 2.1, 2.2 and the column "do" of 2.5.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

use firewall::rule::{
    Action, Destination, DnsTransport, Family, HostName, PortRange, Prefix4, Prefix6, Rule,
    RuleNumber, Traffic,
};

use crate::excerpt::Excerpt;

/// The only ports that make sense with `specialtarget=dns`.
const DNS_PORTS: PortRange = PortRange::single(53);

/// The options of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionName {
    /// `action=accept` or `action=drop`; the only option a rule must have.
    Action,
    /// `dst4=`, an IPv4 address with or without a prefix length.
    Dst4,
    /// `dst6=`, an IPv6 address with or without a prefix length.
    Dst6,
    /// `dsthost=`, a host name.
    DstHost,
    /// `proto=tcp`, `proto=udp` or `proto=icmp`.
    Proto,
    /// `specialtarget=dns`.
    SpecialTarget,
    /// `dstports=`, a port or two with `-` between them.
    DstPorts,
    /// `icmptype=`, a number up to 255.
    IcmpType,
}

impl OptionName {
    const ALL: [Self; 8] = [
        Self::Action,
        Self::Dst4,
        Self::Dst6,
        Self::DstHost,
        Self::Proto,
        Self::SpecialTarget,
        Self::DstPorts,
        Self::IcmpType,
    ];

    /// The name in the rule.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Action => "action",
            Self::Dst4 => "dst4",
            Self::Dst6 => "dst6",
            Self::DstHost => "dsthost",
            Self::Proto => "proto",
            Self::SpecialTarget => "specialtarget",
            Self::DstPorts => "dstports",
            Self::IcmpType => "icmptype",
        }
    }
}

impl fmt::Display for OptionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A rule that was not understood, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleError {
    /// The rule.
    pub number: RuleNumber,
    /// The reason.
    pub kind: RuleErrorKind,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: {}", self.number, self.kind)
    }
}

/// Why a rule was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleErrorKind {
    /// A byte that no rule contains, such as a tab or anything that is not ASCII.
    BadByte(u8),
    /// No text, or a space with no option before or after it.
    EmptyOption,
    /// A word without `=`.
    NotAnOption(Excerpt),
    /// An option that does not exist, or that dom0 keeps to itself.
    UnknownOption(Excerpt),
    /// An option that the rule already has.
    Repeated(OptionName),
    /// The option cannot have this value.
    BadValue(OptionName, Excerpt),
    /// There is no action.
    NoAction,
    /// More than one of `dst4`, `dst6` and `dsthost`.
    SeveralDestinations,
    /// `dst4` for an IPv6 client address, or `dst6` for an IPv4 one.
    WrongFamily(OptionName),
    /// Ports with ICMP.
    PortsWithIcmp,
    /// An ICMP type with TCP or UDP.
    TypeWithoutIcmp,
}

impl fmt::Display for RuleErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadByte(byte) => write!(f, "byte {byte:#04x} is not allowed"),
            Self::EmptyOption => f.write_str("empty, or a space too many"),
            Self::NotAnOption(text) => write!(f, "{text} has no '='"),
            Self::UnknownOption(name) => write!(f, "unknown option {name}"),
            Self::Repeated(option) => write!(f, "{option} given twice"),
            Self::BadValue(option, value) => write!(f, "bad value {value} for {option}"),
            Self::NoAction => f.write_str("no action"),
            Self::SeveralDestinations => f.write_str("more than one destination"),
            Self::WrongFamily(option) => write!(f, "{option} for the other address family"),
            Self::PortsWithIcmp => f.write_str("dstports with proto=icmp"),
            Self::TypeWithoutIcmp => f.write_str("icmptype without proto=icmp"),
        }
    }
}

/// Reads a rule for a client address of `family`.
///
/// `Ok(None)` is a rule that is well formed and can never match: `specialtarget=dns` with
/// `proto=icmp`, or with ports other than 53 (deviation D13).
///
/// # Errors
///
/// [`RuleError`]; the client must then be blocked in this family.
pub fn parse_rule(
    number: RuleNumber,
    family: Family,
    text: &[u8],
) -> Result<Option<Rule>, RuleError> {
    let rule = Options::read(text).and_then(|options| options.into_rule(number, family));
    rule.map_err(|kind| RuleError { number, kind })
}

/// The protocols that `proto` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proto {
    Tcp,
    Udp,
    Icmp,
}

/// The options of one rule as they come.
#[derive(Debug, Default)]
struct Options {
    action: Option<Action>,
    dst4: Option<Prefix4>,
    dst6: Option<Prefix6>,
    host: Option<HostName>,
    proto: Option<Proto>,
    is_dns: Option<()>,
    ports: Option<PortRange>,
    icmp_type: Option<u8>,
}

impl Options {
    fn read(text: &[u8]) -> Result<Self, RuleErrorKind> {
        if let Some(&byte) = text.iter().find(|byte| !matches!(byte, b' '..=b'~')) {
            return Err(RuleErrorKind::BadByte(byte));
        }
        let mut options = Self::default();
        for word in text.split(|&byte| byte == b' ') {
            options.read_word(word)?;
        }
        Ok(options)
    }

    fn read_word(&mut self, word: &[u8]) -> Result<(), RuleErrorKind> {
        // Only ASCII gets here.
        let text = str::from_utf8(word).unwrap_or_default();
        if text.is_empty() {
            return Err(RuleErrorKind::EmptyOption);
        }
        let Some((name, value)) = text.split_once('=') else {
            return Err(RuleErrorKind::NotAnOption(Excerpt::new(word)));
        };
        let Some(option) = OptionName::ALL
            .into_iter()
            .find(|option| option.as_str() == name)
        else {
            return Err(RuleErrorKind::UnknownOption(Excerpt::new(name.as_bytes())));
        };
        // A value with a `=` in it is refused by every one of these.
        match option {
            OptionName::Action => set(&mut self.action, option, value, parse_action),
            OptionName::Dst4 => set(&mut self.dst4, option, value, parse_dst4),
            OptionName::Dst6 => set(&mut self.dst6, option, value, parse_dst6),
            OptionName::DstHost => set(&mut self.host, option, value, |v| HostName::new(v).ok()),
            OptionName::Proto => set(&mut self.proto, option, value, parse_proto),
            OptionName::SpecialTarget => set(&mut self.is_dns, option, value, |v| {
                (v == "dns").then_some(())
            }),
            OptionName::DstPorts => set(&mut self.ports, option, value, parse_ports),
            OptionName::IcmpType => set(&mut self.icmp_type, option, value, |v| {
                u8::try_from(parse_number(v)?).ok()
            }),
        }
    }

    fn into_rule(self, number: RuleNumber, family: Family) -> Result<Option<Rule>, RuleErrorKind> {
        let action = self.action.ok_or(RuleErrorKind::NoAction)?;
        let traffic = self.traffic()?;
        let destination = self.destination(family)?;
        Ok(traffic.map(|traffic| Rule {
            number,
            action,
            destination,
            traffic,
        }))
    }

    fn destination(self, family: Family) -> Result<Destination, RuleErrorKind> {
        match (self.dst4, self.dst6, self.host) {
            (None, None, None) => Ok(Destination::Any),
            (Some(prefix), None, None) if family == Family::Ipv4 => {
                Ok(Destination::Prefix4(prefix))
            }
            (None, Some(prefix), None) if family == Family::Ipv6 => {
                Ok(Destination::Prefix6(prefix))
            }
            (None, None, Some(host)) => Ok(Destination::Host(host)),
            (Some(_), None, None) => Err(RuleErrorKind::WrongFamily(OptionName::Dst4)),
            (None, Some(_), None) => Err(RuleErrorKind::WrongFamily(OptionName::Dst6)),
            _ => Err(RuleErrorKind::SeveralDestinations),
        }
    }

    /// What the rule is about; `None` if nothing can be that.
    fn traffic(&self) -> Result<Option<Traffic>, RuleErrorKind> {
        let ports = self.ports;
        let plain = match (self.proto, ports, self.icmp_type) {
            (Some(Proto::Icmp), Some(_), _) | (None, Some(_), Some(_)) => {
                return Err(RuleErrorKind::PortsWithIcmp);
            }
            (Some(Proto::Tcp | Proto::Udp), _, Some(_)) => {
                return Err(RuleErrorKind::TypeWithoutIcmp);
            }
            (Some(Proto::Icmp), None, icmp_type) | (None, None, icmp_type @ Some(_)) => {
                Traffic::Icmp { icmp_type }
            }
            (Some(Proto::Tcp), ports, None) => Traffic::Tcp { ports },
            (Some(Proto::Udp), ports, None) => Traffic::Udp { ports },
            (None, Some(ports), None) => Traffic::TcpOrUdp { ports },
            (None, None, None) => Traffic::Any,
        };
        if self.is_dns.is_none() {
            return Ok(Some(plain));
        }
        if ports.is_some_and(|ports| ports != DNS_PORTS) {
            return Ok(None);
        }
        Ok(match plain {
            Traffic::Any | Traffic::TcpOrUdp { .. } => Some(Traffic::Dns(DnsTransport::Both)),
            Traffic::Tcp { .. } => Some(Traffic::Dns(DnsTransport::Tcp)),
            Traffic::Udp { .. } => Some(Traffic::Dns(DnsTransport::Udp)),
            Traffic::Icmp { .. } | Traffic::Dns(_) => None,
        })
    }
}

/// Sets an option that must not be set yet.
fn set<T>(
    slot: &mut Option<T>,
    option: OptionName,
    text: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<(), RuleErrorKind> {
    if slot.is_some() {
        return Err(RuleErrorKind::Repeated(option));
    }
    match parse(text) {
        Some(value) => *slot = Some(value),
        None => {
            return Err(RuleErrorKind::BadValue(
                option,
                Excerpt::new(text.as_bytes()),
            ));
        }
    }
    Ok(())
}

fn parse_action(text: &str) -> Option<Action> {
    match text {
        "accept" => Some(Action::Accept),
        "drop" => Some(Action::Drop),
        _ => None,
    }
}

fn parse_proto(text: &str) -> Option<Proto> {
    match text {
        "tcp" => Some(Proto::Tcp),
        "udp" => Some(Proto::Udp),
        "icmp" => Some(Proto::Icmp),
        _ => None,
    }
}

fn parse_dst4(text: &str) -> Option<Prefix4> {
    match text.split_once('/') {
        None => Some(Prefix4::host(text.parse().ok()?)),
        Some((address, length)) => {
            let address: Ipv4Addr = address.parse().ok()?;
            Prefix4::new(address, u8::try_from(parse_number(length)?).ok()?)
        }
    }
}

fn parse_dst6(text: &str) -> Option<Prefix6> {
    match text.split_once('/') {
        None => Some(Prefix6::host(text.parse().ok()?)),
        Some((address, length)) => {
            let address: Ipv6Addr = address.parse().ok()?;
            Prefix6::new(address, u8::try_from(parse_number(length)?).ok()?)
        }
    }
}

/// One port, or the lowest and the highest of a range.
fn parse_ports(text: &str) -> Option<PortRange> {
    match text.split_once('-') {
        None => Some(PortRange::single(parse_number(text)?)),
        Some((first, last)) => PortRange::new(parse_number(first)?, parse_number(last)?),
    }
}

/// A number of decimal digits only, up to 65535. Leading zeros do not make it octal.
fn parse_number(text: &str) -> Option<u16> {
    let is_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_digits.then(|| text.parse().ok()).flatten()
}

/// Prints a rule in the form and order that dom0 uses.
#[derive(Clone, Copy, Debug)]
pub struct RuleText<'a>(pub &'a Rule);

impl fmt::Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.action {
            Action::Accept => "action=accept",
            Action::Drop => "action=drop",
        })?;
        match &self.0.destination {
            Destination::Any => {}
            Destination::Prefix4(prefix) => write!(f, " dst4={prefix}")?,
            Destination::Prefix6(prefix) => write!(f, " dst6={prefix}")?,
            Destination::Host(name) => write!(f, " dsthost={name}")?,
        }
        let (proto, ports) = match self.0.traffic {
            Traffic::Any => ("", None),
            Traffic::Tcp { ports } => (" proto=tcp", ports),
            Traffic::Udp { ports } => (" proto=udp", ports),
            Traffic::TcpOrUdp { ports } => ("", Some(ports)),
            Traffic::Icmp { .. } => (" proto=icmp", None),
            Traffic::Dns(DnsTransport::Both) => (" specialtarget=dns", None),
            Traffic::Dns(DnsTransport::Tcp) => (" proto=tcp specialtarget=dns", None),
            Traffic::Dns(DnsTransport::Udp) => (" proto=udp specialtarget=dns", None),
        };
        f.write_str(proto)?;
        if let Some(ports) = ports {
            write!(f, " dstports={}-{}", ports.first(), ports.last())?;
        }
        match self.0.traffic {
            Traffic::Icmp {
                icmp_type: Some(icmp_type),
            } => write!(f, " icmptype={icmp_type}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
