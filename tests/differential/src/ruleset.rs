//! The ruleset of the Linux agent, as `nft` reads it.
//!
//! Written from the tables and sections of `qubes-policy.md` 3.1 (tables, chains, order), 2.2 (rules),
//! 4.1 (DNS), 3.4 (ICMP of rejects). Both tables `qubes` come before both tables `qubes-firewall`, so
//! that the forward chain of the second, which is registered later, is asked first.
//!
//! Left out: the flow table for offload, which changes no verdict while flows are not deleted under it,
//! and which not every kernel has. A name that nobody knows has the meaning of 4.4 item 2, because what
//! the agent does with it (D3) is no matter of the kernel.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::rules::{Proto, Rule, Target, Tree};
use crate::world::{ABSENT, CLIENTS, HOSTS, VIRTUAL_RESOLVERS, World};

/// Who is where.
#[derive(Debug)]
pub(crate) struct Clients {
    /// Addresses and the interfaces that they are behind.
    pub(crate) attached: Vec<(String, IpAddr)>,
    /// Addresses of qubes that are configured and not attached.
    pub(crate) absent: Vec<IpAddr>,
}

impl Clients {
    fn attached(&self, v6: bool) -> impl Iterator<Item = (&str, IpAddr)> {
        let attached = self.attached.iter();
        attached
            .filter(move |(_, own)| own.is_ipv6() == v6)
            .map(|(name, own)| (name.as_str(), *own))
    }
}

/// Writes the whole ruleset, which replaces the one before.
pub(crate) fn text(world: &World) -> String {
    text_for(world, &everybody(), &[false, true])
}

/// Writes what brings rules and resolvers up to date, in one transaction that leaves flows alone.
pub(crate) fn update(world: &World) -> String {
    let mut out = String::new();
    for v6 in [false, true] {
        let _ = writeln!(out, "delete table {} qubes-firewall", family(v6));
        agent(&mut out, world, &everybody(), v6);
    }
    out.push_str("flush chain ip qubes dnat-dns\n");
    for rule in dns_rules(world) {
        let _ = writeln!(out, "add rule ip qubes dnat-dns {rule}");
    }
    out
}

fn everybody() -> Clients {
    let attached = CLIENTS.iter().flat_map(|client| {
        let own = client.addresses.iter();
        own.map(|own| (client.name.to_owned(), *own))
    });
    Clients {
        attached: attached.collect(),
        absent: ABSENT.to_vec(),
    }
}

/// Writes the whole ruleset for these clients, of IPv4 (`false`), IPv6 (`true`) or both.
pub(crate) fn text_for(world: &World, clients: &Clients, families: &[bool]) -> String {
    let mut out = String::from("flush ruleset\n");
    for v6 in families {
        base(&mut out, world, clients, *v6);
    }
    for v6 in families {
        agent(&mut out, world, clients, *v6);
    }
    out
}

fn family(v6: bool) -> &'static str {
    if v6 { "ip6" } else { "ip" }
}

fn set_of<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("{{ {} }}", items.join(", "))
}

fn base(out: &mut String, world: &World, clients: &Clients, v6: bool) {
    let ip = family(v6);
    let kind = if v6 { "ipv6_addr" } else { "ipv4_addr" };
    let allowed = clients.attached(v6);
    let allowed = set_of(allowed.map(|(name, own)| format!("\"{name}\" . {own}")));
    let downstream = set_of(clients.attached(v6).map(|(_, own)| own));
    let input = if v6 {
        "jump custom-input
            ct state invalid drop
            ct state related,established accept
            iifgroup 2 goto from-clients
            iif lo accept
            ip6 saddr fe80::/64 ip6 daddr fe80::/64 udp dport 546 accept
            meta l4proto icmpv6 accept"
    } else {
        "jump custom-input
            ct state invalid drop
            iifgroup 2 udp dport 68 drop
            ct state related,established accept
            iifgroup 2 meta l4proto icmp accept
            iif lo accept
            iifgroup 2 reject with icmp type host-prohibited"
    };
    let from_clients = if v6 {
        "chain from-clients {
            meta l4proto != icmpv6 reject with icmpv6 type admin-prohibited
            icmpv6 type { nd-router-advert, nd-redirect } drop
            accept
        }"
    } else {
        ""
    };
    let dns = if v6 { String::new() } else { dns(world) };
    let _ = write!(
        out,
        "table {ip} qubes {{
        set downstream {{ type {kind}; elements = {downstream} }}
        set allowed {{ type ifname . {kind}; elements = {allowed} }}
        chain custom-input {{ }}
        chain custom-forward {{ }}
        chain antispoof {{ iifname . {ip} saddr @allowed accept; drop; }}
        chain prerouting {{
            type filter hook prerouting priority raw; policy accept;
            iifgroup 2 goto antispoof
            {ip} saddr @downstream drop
        }}
        {from_clients}
        {dns}
        chain input {{
            type filter hook input priority filter; policy drop;
            {input}
        }}
        chain forward {{
            type filter hook forward priority filter; policy accept;
            jump custom-forward
            ct state invalid drop
            ct state related,established accept
            oifgroup 2 drop
        }}
        chain postrouting {{
            type nat hook postrouting priority srcnat; policy accept;
            oifgroup 2 accept
            oif lo accept
            masquerade
        }}
        }}\n"
    );
}

fn dns_rules(world: &World) -> Vec<String> {
    let mut rules = Vec::new();
    for address in VIRTUAL_RESOLVERS {
        let verdict = match world.after_dns(IpAddr::V4(address)) {
            Some(real) => format!("dnat to {real}"),
            None => "drop".to_owned(),
        };
        for protocol in ["udp", "tcp"] {
            rules.push(format!("ip daddr {address} {protocol} dport 53 {verdict}"));
        }
    }
    rules
}

fn dns(world: &World) -> String {
    let rules = dns_rules(world).join("\n");
    format!(
        "chain dnat-dns {{
            type nat hook prerouting priority dstnat; policy accept;
            {rules}
        }}"
    )
}

fn agent(out: &mut String, world: &World, clients: &Clients, v6: bool) {
    let ip = family(v6);
    let absent = clients.absent.iter().filter(|own| own.is_ipv6() == v6);
    let attached = clients.attached(v6).map(|(_, own)| own);
    let connected = set_of(attached.chain(absent.copied()));
    let mut chains = String::new();
    let mut jumps = String::new();
    for (number, (address, tree)) in world.trees.iter().enumerate() {
        if address.is_ipv6() != v6 {
            continue;
        }
        let Some(rules) = chain(world, tree, v6) else {
            continue;
        };
        let _ = writeln!(chains, "chain client-{number} {{\n{rules}\n}}");
        let _ = writeln!(jumps, "{ip} saddr {address} jump client-{number}");
    }
    let _ = write!(
        out,
        "table {ip} qubes-firewall {{
        {chains}
        chain qubes-forward {{
            {jumps}
        }}
        chain prerouting {{
            type filter hook prerouting priority raw; policy accept;
            iifname != \"vif*\" {ip} saddr {connected} drop
        }}
        chain forward {{
            type filter hook forward priority filter; policy drop;
            ct state established,related accept
            iifname != \"vif*\" accept
            jump qubes-forward
        }}
        chain postrouting {{
            type filter hook postrouting priority raw; policy accept;
            oifname != \"vif*\" {ip} daddr {connected} drop
        }}
        }}\n"
    );
}

/// The rules of one client address; `None` for no chain at all.
fn chain(world: &World, tree: &Tree, v6: bool) -> Option<String> {
    let mut lines = Vec::new();
    let last = match tree {
        Tree::Absent => return None,
        Tree::Broken => false,
        Tree::Rules {
            accept_policy,
            rules,
        } => {
            for rule in rules {
                lines.extend(self::rule(world, rule, v6));
            }
            *accept_policy
        }
    };
    lines.push(verdict(last, v6).to_owned());
    Some(lines.join("\n"))
}

fn verdict(accept: bool, v6: bool) -> &'static str {
    match (accept, v6) {
        (true, _) => "accept",
        (false, false) => "reject with icmp type admin-prohibited",
        (false, true) => "reject with icmpv6 type admin-prohibited",
    }
}

/// The lines that say what one rule says.
fn rule(world: &World, rule: &Rule, v6: bool) -> Vec<String> {
    let ip = family(v6);
    let verdict = verdict(rule.accept, v6);
    let mut start = String::new();
    match &rule.target {
        Target::Any => {}
        Target::Network(address, length) => {
            let _ = write!(start, "{ip} daddr {address}/{length} ");
        }
        Target::Host(at) => match HOSTS[*at].1 {
            Some(addresses) => {
                let own: Vec<_> = addresses.iter().filter(|own| own.is_ipv6() == v6).collect();
                if own.is_empty() {
                    return Vec::new();
                }
                let _ = write!(start, "{ip} daddr {} ", set_of(own));
            }
            None if rule.accept => return Vec::new(),
            None => {}
        },
    }
    if rule.dns {
        let only_dns = rule.ports.is_none_or(|ports| ports == (53, 53));
        if v6 || !only_dns || world.resolvers.is_empty() || rule.proto == Some(Proto::Icmp) {
            return Vec::new();
        }
        let _ = write!(start, "ip daddr {} ", set_of(&world.resolvers));
    }
    let ports = if rule.dns { Some((53, 53)) } else { rule.ports };
    let first = |name: &str| {
        if v6 {
            format!("ip6 nexthdr {name}")
        } else {
            format!("ip protocol {name}")
        }
    };
    let named = |name: &str| match ports {
        Some((from, to)) => format!("{start}{} {name} dport {from}-{to} {verdict}", first(name)),
        None => format!("{start}{} {verdict}", first(name)),
    };
    let icmp = if v6 { "icmpv6" } else { "icmp" };
    match (rule.proto, rule.icmp_type) {
        (_, Some(kind)) => vec![format!(
            "{start}{} {icmp} type {kind} {verdict}",
            first(icmp)
        )],
        (Some(Proto::Icmp), None) => vec![format!("{start}{} {verdict}", first(icmp))],
        (Some(Proto::Tcp), None) => vec![named("tcp")],
        (Some(Proto::Udp), None) => vec![named("udp")],
        (None, None) if ports.is_some() => vec![named("tcp"), named("udp")],
        (None, None) => vec![format!("{start}{verdict}")],
    }
}
