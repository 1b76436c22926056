//! The `parse`, `dnsmap` and `qdb` vectors of `qubes-policy.md` section 9.
//!
//! Each vector names itself in a failure. A vector with a field that is not understood here fails, so
//! that nothing in it goes unchecked.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test program: a vector that is not as expected must fail"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use firewall::rule::{
    Action, Destination, DnsTransport, Family, PortRange, Rule, RuleNumber, Traffic,
};
use qubes::qubesdb::Sink;
use qubes::rule_text::{RuleText, parse_rule};
use qubes::settings::{DnsTarget, NetworkSettings, dns_map};
use qubes::store::{Event, Store};
use serde_json::{Value, json};

const VECTORS: &str = include_str!("../../tests/vectors/qubes-policy.json");

/// The vectors of one kind.
fn vectors(kind: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
    all.into_iter()
        .filter(|vector| vector["kind"] == kind)
        .collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item.as_str().unwrap())
        .collect()
}

/// Fails unless every field of the vector is one of `known`.
fn check_fields(vector: &Value, known: &[&str]) {
    let common = ["kind", "id", "title", "why"];
    for field in vector.as_object().unwrap().keys() {
        let is_known = common.contains(&field.as_str()) || known.contains(&field.as_str());
        assert!(is_known, "{}: unknown field {field}", vector["id"]);
    }
}

/// A rule in the form of the vectors' results.
fn as_result(rule: &Rule) -> Value {
    let mut result = json!({
        "action": match rule.action {
            Action::Accept => "accept",
            Action::Drop => "drop",
        }
    });
    match &rule.destination {
        Destination::Any => {}
        Destination::Prefix4(prefix) => result["dst"] = json!(prefix.to_string()),
        Destination::Prefix6(prefix) => result["dst"] = json!(prefix.to_string()),
        Destination::Host(name) => result["host"] = json!(name.as_str()),
    }
    let mut proto_and_ports = |proto: &str, ports: Option<PortRange>| {
        if !proto.is_empty() {
            result["proto"] = json!(proto);
        }
        if let Some(ports) = ports {
            result["ports"] = json!([ports.first(), ports.last()]);
        }
    };
    match rule.traffic {
        Traffic::Any => {}
        Traffic::Tcp { ports } => proto_and_ports("tcp", ports),
        Traffic::Udp { ports } => proto_and_ports("udp", ports),
        Traffic::TcpOrUdp { ports } => proto_and_ports("", Some(ports)),
        Traffic::Icmp { icmp_type } => {
            proto_and_ports("icmp", None);
            if let Some(icmp_type) = icmp_type {
                result["icmptype"] = json!(icmp_type);
            }
        }
        Traffic::Dns(transport) => {
            match transport {
                DnsTransport::Both => {}
                DnsTransport::Tcp => proto_and_ports("tcp", None),
                DnsTransport::Udp => proto_and_ports("udp", None),
            }
            result["special"] = json!("dns");
        }
    }
    result
}

#[test]
fn parse_vectors() {
    let vectors = vectors("parse");
    assert_eq!(vectors.len(), 26);
    let number = RuleNumber::new(0).unwrap();
    for vector in vectors {
        check_fields(&vector, &["family", "value", "result"]);
        let family = match vector["family"].as_u64() {
            Some(4) => Family::Ipv4,
            Some(6) => Family::Ipv6,
            other => panic!("{}: family {other:?}", vector["id"]),
        };
        let text = vector["value"].as_str().unwrap();
        let actual = match parse_rule(number, family, text.as_bytes()) {
            Ok(rule) => as_result(&rule.unwrap()),
            Err(_) => json!("error"),
        };
        assert_eq!(actual, vector["result"], "{}", vector["id"]);
    }
}

#[test]
fn dnsmap_vectors() {
    let vectors = vectors("dnsmap");
    assert_eq!(vectors.len(), 9);
    for vector in vectors {
        check_fields(&vector, &["virtual", "upstream", "map"]);
        let virtual_resolvers: Vec<Ipv4Addr> = strings(&vector["virtual"])
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let upstream: Vec<IpAddr> = strings(&vector["upstream"])
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let map: Vec<[String; 2]> = dns_map(&virtual_resolvers, &upstream)
            .into_iter()
            .map(|(from, to)| {
                let to = match to {
                    DnsTarget::Resolver(address) => address.to_string(),
                    DnsTarget::Drop => "DROP53".to_owned(),
                };
                [from.to_string(), to]
            })
            .collect();
        assert_eq!(json!(map), vector["map"], "{}", vector["id"]);
    }
}

/// The rules in force for a client address, as texts, and the policy.
fn active(store: &Store, address: IpAddr) -> Value {
    let Some(reload) = store.reload(address) else {
        return Value::Null;
    };
    let chain = reload.finish().unwrap();
    let mut lines: Vec<String> = chain
        .rules()
        .iter()
        .map(|rule| RuleText(rule).to_string())
        .collect();
    lines.push(match chain.policy() {
        Action::Accept => "policy accept".to_owned(),
        Action::Drop => "policy drop".to_owned(),
    });
    json!(lines)
}

/// Reports the events that are due: reloads in order, and what we write about them.
fn drain(store: &mut Store, reloads: &mut Vec<String>, writes: &mut Vec<[String; 2]>) {
    while let Some(event) = store.next_event() {
        if let Event::Commit(address) = event {
            reloads.push(address.to_string());
            let (path, count) = store.handled(address).unwrap();
            writes.push([path.to_string(), count.to_string()]);
        }
    }
}

#[test]
fn qdb_vectors() {
    let vectors = vectors("qdb");
    assert_eq!(vectors.len(), 10);
    for vector in vectors {
        let fields = [
            "start",
            "ops",
            "reloads",
            "active",
            "vm_writes",
            "connected",
            "connected6",
        ];
        check_fields(&vector, &fields);
        let mut store = Store::default();
        let (mut reloads, mut writes) = (Vec::new(), Vec::new());
        store.dump_started();
        let start: BTreeMap<String, Vec<String>> = match &vector["start"] {
            Value::Null => BTreeMap::new(),
            start => serde_json::from_value(start.clone()).unwrap(),
        };
        for (address, rules) in &start {
            store.written(&format!("/qubes-firewall/{address}/policy"), b"drop");
            for (number, rule) in rules.iter().enumerate() {
                let path = format!("/qubes-firewall/{address}/{number:04}");
                store.written(&path, rule.as_bytes());
            }
        }
        store.dump_ended();
        drain(&mut store, &mut reloads, &mut writes);
        reloads.clear();
        writes.clear();
        for operation in vector["ops"].as_array().unwrap() {
            match strings(operation)[..] {
                ["write", path, value] => store.written(path, value.as_bytes()),
                ["rm", path] => store.removed(path),
                _ => panic!("{}: {operation}", vector["id"]),
            }
            drain(&mut store, &mut reloads, &mut writes);
        }
        assert_eq!(json!(reloads), vector["reloads"], "{}", vector["id"]);
        if let Some(expected) = vector.get("vm_writes") {
            assert_eq!(json!(writes), *expected, "{}", vector["id"]);
        }
        for (address, rules) in vector["active"].as_object().into_iter().flatten() {
            let actual = active(&store, address.parse().unwrap());
            assert_eq!(actual, *rules, "{} {address}", vector["id"]);
        }
        let settings = NetworkSettings::from_lookup(|key| store.get(key));
        if let Some(expected) = vector.get("connected") {
            assert_eq!(json!(settings.connected4), *expected, "{}", vector["id"]);
        }
        if let Some(expected) = vector.get("connected6") {
            assert_eq!(json!(settings.connected6), *expected, "{}", vector["id"]);
        }
    }
}
