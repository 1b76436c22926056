//! `Rules(n)` of `performance.md` section 2.

use std::net::{IpAddr, Ipv4Addr};

use firewall::rule::{
    Action, Destination, Family, PortRange, Prefix4, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment};

use crate::Failure;

/// `Rules(n)`.
pub(crate) fn compiled(
    count: u16,
    last: Action,
    address: IpAddr,
) -> Result<CompiledRules, Failure> {
    let family = if address.is_ipv4() {
        Family::Ipv4
    } else {
        Family::Ipv6
    };
    let mut rules = Vec::new();
    for r in 0..count.saturating_sub(1) {
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
        let network = Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset));
        let first = r % 40_000;
        let traffic = match r % 3 {
            0 => Traffic::Tcp {
                ports: PortRange::new(first, first),
            },
            1 => Traffic::Udp {
                ports: PortRange::new(first, first),
            },
            _ => Traffic::TcpOrUdp {
                ports: PortRange::new(first, first + 1000).ok_or("range")?,
            },
        };
        let destination = match family {
            Family::Ipv4 => Destination::Prefix4(Prefix4::new(network, length).ok_or("prefix")?),
            Family::Ipv6 => Destination::Any,
        };
        rules.push(rule(r, Action::Accept, destination, traffic)?);
    }
    rules.push(rule(
        count.saturating_sub(1),
        last,
        Destination::Any,
        Traffic::Any,
    )?);
    let chain = RuleChain::new(family, Action::Drop, rules).map_err(|error| error.to_string())?;
    let environment = RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    };
    CompiledRules::compile(&chain, &environment).map_err(|error| error.to_string().into())
}

fn rule(
    number: u16,
    action: Action,
    destination: Destination,
    traffic: Traffic,
) -> Result<Rule, Failure> {
    Ok(Rule {
        number: RuleNumber::new(number).ok_or("number")?,
        action,
        destination,
        traffic,
    })
}
