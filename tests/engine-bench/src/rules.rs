//! `Rules(n)` of `performance.md` section 2.

use std::net::{IpAddr, Ipv4Addr};

use firewall::rule::{
    Action, Destination, Family, PortRange, Prefix4, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment};

use crate::Failure;

/// One of `Rules(n)`, but for the last one.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Its destination: address and prefix length.
    pub network: (Ipv4Addr, u8),
    /// Whether it is about TCP, about UDP.
    pub protocols: (bool, bool),
    /// First and last port.
    pub ports: (u16, u16),
}

/// `Rules(n)` without the last one, which has neither destination nor protocol.
pub fn lines(count: u16) -> impl Iterator<Item = Line> {
    (0..count.saturating_sub(1)).map(|r| {
        let n = u32::from(r);
        let (base, offset, length) = match r % 10 {
            9 => (Ipv4Addr::new(198, 18, 0, 0), n.wrapping_mul(256), 24),
            8 => (Ipv4Addr::new(172, 0, 0, 0), n.wrapping_mul(65_536), 16),
            _ => (
                Ipv4Addr::new(198, 51, 0, 0),
                n.wrapping_mul(2_654_435_761),
                32,
            ),
        };
        let first = r % 40_000;
        Line {
            network: (
                Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset)),
                length,
            ),
            protocols: (r % 3 != 1, r % 3 != 0),
            ports: (first, if r % 3 == 2 { first + 1000 } else { first }),
        }
    })
}

/// `Rules(n)`, with the last rule's action. For IPv6 the destinations are left out.
///
/// # Errors
///
/// If the engine takes no such number of rules.
pub fn chain(count: u16, last: Action, family: Family) -> Result<RuleChain, Failure> {
    let mut rules = Vec::new();
    for (line, number) in lines(count).zip(0..) {
        let ports = PortRange::new(line.ports.0, line.ports.1).ok_or("port range")?;
        let traffic = match line.protocols {
            (true, false) => Traffic::Tcp { ports: Some(ports) },
            (false, _) => Traffic::Udp { ports: Some(ports) },
            (true, true) => Traffic::TcpOrUdp { ports },
        };
        let (address, length) = line.network;
        let destination = match family {
            Family::Ipv4 => Destination::Prefix4(Prefix4::new(address, length).ok_or("prefix")?),
            Family::Ipv6 => Destination::Any,
        };
        rules.push(rule(number, Action::Accept, destination, traffic)?);
    }
    let number = count.saturating_sub(1);
    rules.push(rule(number, last, Destination::Any, Traffic::Any)?);
    RuleChain::new(family, Action::Drop, rules).map_err(|error| error.to_string().into())
}

fn rule(
    number: u16,
    action: Action,
    destination: Destination,
    traffic: Traffic,
) -> Result<Rule, Failure> {
    Ok(Rule {
        number: RuleNumber::new(number).ok_or("rule number")?,
        action,
        destination,
        traffic,
    })
}

/// No resolvers and no names.
pub fn environment() -> RuleEnvironment<'static> {
    RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    }
}

/// A chain made fast.
///
/// # Errors
///
/// If it is too long.
pub fn compile(chain: &RuleChain) -> Result<CompiledRules, Failure> {
    CompiledRules::compile(chain, &environment()).map_err(|error| error.to_string().into())
}

/// `Rules(n)` for a client's address, made fast.
///
/// # Errors
///
/// As [`chain`] and [`compile`].
pub fn compiled(count: u16, last: Action, address: IpAddr) -> Result<CompiledRules, Failure> {
    let family = if address.is_ipv4() {
        Family::Ipv4
    } else {
        Family::Ipv6
    };
    compile(&chain(count, last, family)?)
}
