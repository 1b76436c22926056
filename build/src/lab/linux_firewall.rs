//! Qubes rules for the Linux stand-in, as nftables text.
//!
//! The stand-in is what results are compared with; it takes the part of the
//! rule notation that scenarios use and refuses the rest, so that a comparison
//! is never made with other rules than ours.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail};

use super::internet::{DNS, DNS2, VIRTUAL_DNS};
use super::topology::{address_key, rule_tree};

/// The text that maps the virtual resolvers to the lab's.
#[must_use]
pub(super) fn dns_mapping() -> String {
    let mut text = String::from("flush chain ip labdns dns\n");
    for (from, to) in VIRTUAL_DNS.iter().zip([DNS, DNS2]) {
        for protocol in ["udp", "tcp"] {
            text.push_str(&format!(
                "add rule ip labdns dns ip daddr {from} {protocol} dport 53 dnat to {to}\n"
            ));
        }
    }
    text
}

/// The text that gives a client its chain, replacing an earlier one.
///
/// Clients are found by a map from source address to chain, so giving a client
/// new rules touches nothing but its own chain.
///
/// # Errors
///
/// If a rule uses something that the stand-in does not know.
pub(super) fn client_chain(
    address: IpAddr,
    policy: &str,
    rules: &[impl AsRef<str>],
) -> Result<String> {
    let chain = format!("client_{}", address_key(address).replace('-', "_"));
    let map = if address.is_ipv4() {
        "chains"
    } else {
        "chains6"
    };
    let mut text = format!("add chain inet lab {chain}\nflush chain inet lab {chain}\n");
    for (key, rule) in rule_tree(address, policy, rules) {
        if key != "policy" {
            text.push_str(&format!(
                "add rule inet lab {chain} {}\n",
                statement(address, &rule)?
            ));
        }
    }
    text.push_str(&format!(
        "add rule inet lab {chain} {}\n",
        verdict(address, policy)?
    ));
    text.push_str(&format!(
        "add element inet lab {map} {{ {address} : jump {chain} }}\n"
    ));
    Ok(text)
}

fn verdict(address: IpAddr, action: &str) -> Result<&'static str> {
    Ok(match (action, address) {
        ("accept", _) => "accept",
        ("drop", IpAddr::V4(_)) => "reject with icmp type admin-prohibited",
        ("drop", IpAddr::V6(_)) => "reject with icmpv6 type admin-prohibited",
        _ => bail!("no action {action:?}"),
    })
}

fn statement(address: IpAddr, rule: &str) -> Result<String> {
    let mut conditions = Vec::new();
    let mut action = None;
    let mut protocol = None;
    for word in rule.split(' ') {
        match word.split_once('=') {
            Some(("action", value)) => action = Some(value),
            Some(("dst4", value)) => conditions.push(format!("ip daddr {value}")),
            Some(("dst6", value)) => conditions.push(format!("ip6 daddr {value}")),
            Some(("proto", value @ ("tcp" | "udp"))) => {
                protocol = Some(value);
                conditions.push(format!("meta l4proto {value}"));
            }
            Some(("proto", "icmp")) => conditions.push(
                if address.is_ipv4() {
                    "meta l4proto icmp"
                } else {
                    "meta l4proto icmpv6"
                }
                .into(),
            ),
            Some(("dstports", value)) => match protocol {
                Some(protocol) => conditions.push(format!("{protocol} dport {value}")),
                None => bail!("ports without protocol in {rule:?}"),
            },
            Some(("icmptype", value)) => conditions.push(if address.is_ipv4() {
                format!("icmp type {value}")
            } else {
                format!("icmpv6 type {value}")
            }),
            Some(("specialtarget", "dns")) if address.is_ipv4() => {
                let servers: [Ipv4Addr; 2] = [DNS, DNS2];
                let [first, second] = servers;
                conditions.push(format!("ip daddr {{ {first}, {second} }} th dport 53"));
            }
            _ => bail!("the Linux stand-in does not know {word:?} in {rule:?}"),
        }
    }
    conditions.push(verdict(address, action.unwrap_or_default())?.to_owned());
    Ok(conditions.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_one_chain_that_ends_with_the_policy() {
        let rules = [
            "action=accept specialtarget=dns",
            "action=drop dst4=203.0.113.9/32 proto=tcp dstports=80-443",
        ];
        let text = client_chain("10.137.0.6".parse().unwrap(), "drop", &rules).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[3],
            "add rule inet lab client_10_137_0_6 ip daddr 203.0.113.9/32 meta l4proto tcp tcp dport 80-443 reject with icmp type admin-prohibited"
        );
        assert_eq!(
            lines[4],
            "add rule inet lab client_10_137_0_6 reject with icmp type admin-prohibited"
        );
        assert_eq!(
            lines[5],
            "add element inet lab chains { 10.137.0.6 : jump client_10_137_0_6 }"
        );
    }

    #[test]
    fn what_the_stand_in_cannot_do_is_an_error() {
        let rules = ["action=accept dsthost=www.lab"];
        assert!(client_chain("10.137.0.6".parse().unwrap(), "drop", &rules).is_err());
    }
}
