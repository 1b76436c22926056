//! The operator's views for programs: one line of JSON for each command.
//!
//! Field names are those of [`crate::snapshot`], and stay; fields may be added. Addresses are text, MAC addresses text with
//! colons, counters an object with a field for each name, times and sizes numbers whose unit is in the name or in the
//! snapshot's documentation.

use alloc::string::String;
use alloc::vec::Vec;
use core::net::IpAddr;

use serde::Serialize;

use crate::command::COMMANDS;
use crate::snapshot::{Client, Counter, Flow, Memory, Rules, Snapshot, Uplink};

/// The text of a value. Ours have only text as keys, so that this does not fail.
fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

pub(crate) fn help(_: &Snapshot, _: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Entry {
        name: &'static str,
        arguments: &'static str,
        summary: &'static str,
    }
    let entries = COMMANDS.iter().map(|command| Entry {
        name: command.name,
        arguments: command.arguments,
        summary: command.summary,
    });
    text(&entries.collect::<Vec<_>>())
}

pub(crate) fn status(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Status<'a> {
        release: &'a str,
        uptime_nanos: u64,
        ready_nanos: u64,
        ready_running_nanos: u64,
        source: &'a str,
        missing: &'a [alloc::borrow::Cow<'static, str>],
        uplink: Option<&'a Uplink>,
        clients: usize,
        clients_connected: usize,
        flows_total: u32,
        memory: Memory,
        dropped: u64,
    }
    let connected = snapshot.clients.iter().filter(|client| client.connected);
    let dropped = |sum: u64, reason: &Counter| sum.saturating_add(reason.value);
    text(&Status {
        release: &snapshot.release,
        uptime_nanos: snapshot.uptime_nanos,
        ready_nanos: snapshot.ready_nanos,
        ready_running_nanos: snapshot.ready_running_nanos,
        source: &snapshot.source,
        missing: &snapshot.missing,
        uplink: snapshot.uplink.as_ref(),
        clients: snapshot.clients.len(),
        clients_connected: connected.count(),
        flows_total: snapshot.flows_total,
        memory: snapshot.memory,
        dropped: snapshot.drops.iter().fold(0, dropped),
    })
}

pub(crate) fn clients(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    text(&snapshot.clients)
}

pub(crate) fn rules(snapshot: &Snapshot, client: Option<IpAddr>) -> String {
    let wanted = |rules: &&Rules| client.is_none_or(|client| client == rules.address);
    text(&snapshot.rules.iter().filter(wanted).collect::<Vec<_>>())
}

pub(crate) fn conns(snapshot: &Snapshot, client: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Conns<'a> {
        flows: Vec<&'a Flow>,
        flows_total: u32,
    }
    let wanted = |flow: &&Flow| client.is_none_or(|client| client == flow.source.0);
    text(&Conns {
        flows: snapshot.flows.iter().filter(wanted).collect(),
        flows_total: snapshot.flows_total,
    })
}

pub(crate) fn drops(snapshot: &Snapshot, client: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Drops<'a> {
        #[serde(serialize_with = "crate::snapshot::by_name")]
        all: &'a [Counter],
        clients: Vec<ClientDrops<'a>>,
    }
    #[derive(Serialize)]
    struct ClientDrops<'a> {
        domid: u16,
        handle: u16,
        addresses: &'a [IpAddr],
        #[serde(serialize_with = "crate::snapshot::by_name")]
        drops: &'a [Counter],
    }
    let wanted = |own: &&Client| client.is_none_or(|client| own.addresses.contains(&client));
    fn entry(own: &Client) -> ClientDrops<'_> {
        ClientDrops {
            domid: own.domid,
            handle: own.handle,
            addresses: &own.addresses,
            drops: &own.drops,
        }
    }
    text(&Drops {
        all: &snapshot.drops,
        clients: snapshot.clients.iter().filter(wanted).map(entry).collect(),
    })
}

pub(crate) fn log(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    text(&snapshot.log)
}

pub(crate) fn counters(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Counters<'a> {
        #[serde(serialize_with = "crate::snapshot::by_name")]
        all: &'a [Counter],
        uplink: Option<&'a Uplink>,
        clients: &'a [Client],
    }
    text(&Counters {
        all: &snapshot.counters,
        uplink: snapshot.uplink.as_ref(),
        clients: &snapshot.clients,
    })
}

pub(crate) fn version(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    #[derive(Serialize)]
    struct Version<'a> {
        release: &'a str,
    }
    text(&Version {
        release: &snapshot.release,
    })
}

pub(crate) fn whole(snapshot: &Snapshot, _: Option<IpAddr>) -> String {
    text(snapshot)
}
