//! The operator's commands: one table, whatever the way they come in (PV console, qrexec).
//!
//! A command line is parsed into an [`Invocation`], which says how large a snapshot it needs
//! ([`Invocation::scope`]) and renders it ([`Invocation::render`]). Nothing here reads live state, so a
//! command cannot disturb the data path, and every view is tested on a snapshot made by hand.
//!
//! Each command takes `--json`, too: the same as one line of JSON for programs, whose field names are those of
//! [`crate::snapshot`].
//!
//! Exit codes: 0 done, 2 wrong use (one line says what would be right), 127 unknown command.

use alloc::string::String;
use core::fmt::{self, Write};
use core::net::IpAddr;

use crate::json;
use crate::observe::{NAMES, UNRESOLVED};
use crate::snapshot::{BEGIN_MARK, Client, Counter, DATA_MARK, END_MARK, Flow, Scope, Snapshot};

/// The command ran.
pub const EXIT_OK: u8 = 0;
/// The command was used wrongly.
pub const EXIT_USAGE: u8 = 2;
/// There is no such command.
pub const EXIT_UNKNOWN: u8 = 127;

/// Bytes of an encoded snapshot on one console line.
const SNAPSHOT_BYTES_PER_LINE: usize = 64;

/// What a command takes after its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Takes {
    Nothing,
    OptionalClient,
}

/// One command.
#[derive(Debug)]
pub struct Command {
    /// What is typed.
    pub name: &'static str,
    /// What may follow.
    pub arguments: &'static str,
    /// What it shows, in a few words.
    pub summary: &'static str,
    takes: Takes,
    scope: Scope,
    render: fn(&Snapshot, Option<IpAddr>, &mut dyn Write) -> fmt::Result,
    /// The same for programs.
    json: fn(&Snapshot, Option<IpAddr>) -> String,
}

const FLOWS_SHOWN: usize = 256;

/// The word that asks for JSON.
const JSON: &str = "--json";

/// All commands, in the order in which `help` lists them.
pub const COMMANDS: &[Command] = &[
    Command {
        name: "help",
        arguments: "",
        summary: "this list",
        takes: Takes::Nothing,
        scope: Scope::OVERVIEW,
        render: help,
        json: json::help,
    },
    Command {
        name: "status",
        arguments: "",
        summary: "uplink, clients, memory and main counters on one page",
        takes: Takes::Nothing,
        scope: Scope::OVERVIEW,
        render: status,
        json: json::status,
    },
    Command {
        name: "clients",
        arguments: "",
        summary: "the client qubes and their traffic",
        takes: Takes::Nothing,
        scope: Scope::OVERVIEW,
        render: clients,
        json: json::clients,
    },
    Command {
        name: "rules",
        arguments: "[client address]",
        summary: "the rules in force",
        takes: Takes::OptionalClient,
        scope: Scope {
            rules: true,
            ..Scope::OVERVIEW
        },
        render: rules,
        json: json::rules,
    },
    Command {
        name: "conns",
        arguments: "[client address]",
        summary: "tracked flows",
        takes: Takes::OptionalClient,
        scope: Scope {
            flows: FLOWS_SHOWN,
            ..Scope::OVERVIEW
        },
        render: conns,
        json: json::conns,
    },
    Command {
        name: "drops",
        arguments: "[client address]",
        summary: "what was dropped, and why",
        takes: Takes::OptionalClient,
        scope: Scope::OVERVIEW,
        render: drops,
        json: json::drops,
    },
    Command {
        name: "log",
        arguments: "",
        summary: "the last log lines",
        takes: Takes::Nothing,
        scope: Scope {
            log: true,
            ..Scope::OVERVIEW
        },
        render: log,
        json: json::log,
    },
    Command {
        name: "counters",
        arguments: "",
        summary: "every counter",
        takes: Takes::Nothing,
        scope: Scope::OVERVIEW,
        render: counters,
        json: json::counters,
    },
    Command {
        name: "snapshot",
        arguments: "",
        summary: "everything, encoded for programs",
        takes: Takes::Nothing,
        scope: Scope::WHOLE,
        render: encoded,
        json: json::whole,
    },
    Command {
        name: "version",
        arguments: "",
        summary: "the release that runs",
        takes: Takes::Nothing,
        scope: Scope::OVERVIEW,
        render: version,
        json: json::version,
    },
];

/// A command line that makes sense.
#[derive(Debug)]
pub struct Invocation {
    command: &'static Command,
    client: Option<IpAddr>,
    json: bool,
}

/// A command line that does not.
#[derive(PartialEq, Eq, Debug)]
pub enum UsageError {
    /// There is no such command.
    Unknown(String),
    /// The command takes no arguments.
    TakesNothing(&'static str),
    /// What follows the command is no address.
    NotAnAddress(&'static str, String),
    /// More than one argument.
    TooMany(&'static str),
}

impl UsageError {
    /// The exit code for it.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Unknown(_) => EXIT_UNKNOWN,
            _ => EXIT_USAGE,
        }
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "\"{name}\" is no command; try `help`")
            }
            Self::TakesNothing(name) => write!(f, "`{name}` takes no arguments"),
            Self::NotAnAddress(name, word) => write!(
                f,
                "\"{word}\" is no address; use `{name}` or, for example, `{name} 10.137.0.6`"
            ),
            Self::TooMany(name) => write!(f, "`{name}` takes one client address at most"),
        }
    }
}

/// Parses a command line.
///
/// Returns `None` for an empty line.
///
/// # Errors
///
/// [`UsageError`] with one line that says what would be right.
pub fn parse(line: &str) -> Result<Option<Invocation>, UsageError> {
    let json = line.split_ascii_whitespace().any(|word| word == JSON);
    let mut words = line.split_ascii_whitespace().filter(|word| *word != JSON);
    let Some(name) = words.next() else {
        return Ok(None);
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(UsageError::Unknown(name.into()));
    };
    let argument = words.next();
    if words.next().is_some() {
        return Err(match command.takes {
            Takes::Nothing => UsageError::TakesNothing(command.name),
            Takes::OptionalClient => UsageError::TooMany(command.name),
        });
    }
    let client = match (command.takes, argument) {
        (_, None) => None,
        (Takes::Nothing, Some(_)) => return Err(UsageError::TakesNothing(command.name)),
        (Takes::OptionalClient, Some(word)) => Some(
            word.parse()
                .map_err(|_| UsageError::NotAnAddress(command.name, word.into()))?,
        ),
    };
    Ok(Some(Invocation {
        command,
        client,
        json,
    }))
}

impl Invocation {
    /// What must be in the snapshot.
    #[must_use]
    pub const fn scope(&self) -> Scope {
        Scope {
            client: self.client,
            ..self.command.scope
        }
    }

    /// Writes the command's output.
    ///
    /// # Errors
    ///
    /// Only those of `out`.
    pub fn render(&self, snapshot: &Snapshot, out: &mut dyn Write) -> fmt::Result {
        if self.json {
            out.write_str(&(self.command.json)(snapshot, self.client))?;
            return out.write_char('\n');
        }
        (self.command.render)(snapshot, self.client, out)
    }
}

fn help(_: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    writeln!(out, "commands:")?;
    for command in COMMANDS {
        writeln!(
            out,
            "  {:<9} {:<17} {}",
            command.name, command.arguments, command.summary
        )?;
    }
    writeln!(out, "each takes --json for programs")
}

fn version(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    writeln!(out, "portcullis {}", snapshot.release)
}

/// A duration in the two largest units that matter.
struct Age(u64);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1_000_000_000;
        match seconds {
            0..=59 => write!(f, "{seconds} s"),
            60..=3599 => write!(f, "{} min {} s", seconds / 60, seconds % 60),
            3600..=86_399 => write!(f, "{} h {} min", seconds / 3600, seconds / 60 % 60),
            _ => write!(f, "{} d {} h", seconds / 86_400, seconds / 3600 % 24),
        }
    }
}

/// A number of bytes in a readable unit (powers of 1,024).
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] = [
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
            ("B", 1),
        ];
        for (unit, bytes) in UNITS {
            if self.0 >= bytes && bytes > 1 {
                let tenths = (self.0 % bytes) * 10 / bytes;
                return f.pad(&alloc::format!("{}.{tenths} {unit}", self.0 / bytes));
            }
        }
        f.pad(&alloc::format!("{} B", self.0))
    }
}

/// Bits a second.
struct Rate(u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            0..=9_999 => alloc::format!("{} bit/s", self.0),
            10_000..=9_999_999 => alloc::format!("{} kbit/s", self.0 / 1_000),
            _ => alloc::format!("{} Mbit/s", self.0 / 1_000_000),
        };
        f.pad(&text)
    }
}

/// A MAC address.
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

fn status(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    writeln!(
        out,
        "portcullis {}, up {}, configured by {}",
        snapshot.release,
        Age(snapshot.uptime_nanos),
        snapshot.source
    )?;
    match &snapshot.uplink {
        None => writeln!(out, "uplink    none")?,
        Some(uplink) => {
            write!(
                out,
                "uplink    domain {}, {}, mac {}",
                uplink.domid,
                if uplink.connected {
                    "connected"
                } else {
                    "waiting"
                },
                Mac(uplink.mac)
            )?;
            if let Some(address) = uplink.ip4 {
                write!(out, ", {address}")?;
            }
            if let Some(address) = uplink.ip6 {
                write!(out, ", {address}")?;
            }
            writeln!(out)?;
        }
    }
    for name in &snapshot.missing {
        writeln!(out, "waiting   for the setting {name}")?;
    }
    let connected = snapshot.clients.iter().filter(|client| client.connected);
    writeln!(
        out,
        "clients   {} connected of {}",
        connected.count(),
        snapshot.clients.len()
    )?;
    writeln!(out, "flows     {}", snapshot.flows_total)?;
    let names = snapshot.counter(NAMES);
    if names > 0 {
        let unresolved = snapshot.counter(UNRESOLVED);
        writeln!(
            out,
            "names     {names} in rules, {unresolved} not resolved (see `rules`)"
        )?;
    }
    let memory = snapshot.memory;
    writeln!(
        out,
        "memory    heap {} of {}, packet pool {} free of {}",
        Size(memory.heap_used_bytes),
        Size(memory.heap_bytes),
        Size(memory.pool_free_bytes),
        Size(memory.pool_bytes)
    )?;
    let dropped: u64 = snapshot
        .drops
        .iter()
        .fold(0, |sum, reason| sum.saturating_add(reason.value));
    writeln!(out, "dropped   {dropped} frames (see `drops`)")
}

fn clients(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    if snapshot.clients.is_empty() {
        return writeln!(out, "no clients");
    }
    writeln!(
        out,
        "{:<8} {:<10} {:<17} {:>6} {:>11} {:>13} {:>11} {:>13} {:>8}  addresses",
        "vif", "state", "mac", "flows", "from", "now", "to", "now", "dropped"
    )?;
    for client in &snapshot.clients {
        write!(
            out,
            "{:<8} {:<10} {:<17} {:>6} {:>11} {:>13} {:>11} {:>13} {:>8} ",
            alloc::format!("{}/{}", client.domid, client.handle),
            if client.connected {
                "connected"
            } else {
                "waiting"
            },
            Mac(client.mac),
            client.flows,
            Size(client.bytes_in),
            Rate(client.rate_in),
            Size(client.bytes_out),
            Rate(client.rate_out),
            total(client)
        )?;
        for address in &client.addresses {
            write!(out, " {address}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn total(client: &Client) -> u64 {
    client
        .drops
        .iter()
        .fold(0, |sum, reason| sum.saturating_add(reason.value))
}

fn rules(snapshot: &Snapshot, client: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    let mut any = false;
    for set in &snapshot.rules {
        if client.is_some_and(|client| client != set.address) {
            continue;
        }
        any = true;
        match &set.error {
            Some(error) => writeln!(out, "{}: everything denied: {error}", set.address)?,
            None => {
                writeln!(out, "{}:", set.address)?;
                for (number, text) in &set.rules {
                    writeln!(out, "  {number:04}   {text}")?;
                }
                writeln!(out, "  policy {}", set.policy)?;
            }
        }
        for name in &set.names {
            write!(out, "  {}: {}", name.name, name.state)?;
            for address in &name.addresses {
                write!(out, " {address}")?;
            }
            writeln!(out)?;
        }
    }
    if !any {
        writeln!(out, "no rules: everything is dropped")?;
    }
    Ok(())
}

/// An address and a port, or the address alone where ports mean nothing.
struct End(IpAddr, u16);

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match (self.0, self.1) {
            (address, 0) => alloc::format!("{address}"),
            (IpAddr::V4(address), port) => alloc::format!("{address}:{port}"),
            (IpAddr::V6(address), port) => alloc::format!("[{address}]:{port}"),
        };
        f.pad(&text)
    }
}

fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        other => alloc::format!("{other}"),
    }
}

fn conns(snapshot: &Snapshot, client: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    let shown = |flow: &&Flow| client.is_none_or(|client| client == flow.source.0);
    writeln!(
        out,
        "{:<6} {:<22} {:<22} {:<22} {:<12} {:>6} {:>9} {:>9}",
        "proto", "client", "destination", "seen outside as", "state", "rule", "packets", "expires"
    )?;
    let mut count = 0u32;
    for flow in snapshot.flows.iter().filter(shown) {
        count = count.saturating_add(1);
        writeln!(
            out,
            "{:<6} {:<22} {:<22} {:<22} {:<12} {:>6} {:>9} {:>7} s",
            protocol(flow.protocol),
            End(flow.source.0, flow.source.1),
            End(flow.destination.0, flow.destination.1),
            End(flow.translated.0, flow.translated.1),
            flow.state,
            flow.rule
                .map_or_else(|| "policy".into(), |rule| alloc::format!("{rule:04}")),
            flow.packets,
            flow.expires_seconds
        )?;
    }
    writeln!(out, "{count} shown, {} in all", snapshot.flows_total)
}

fn drops(snapshot: &Snapshot, client: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    match client {
        None => {
            writeln!(out, "dropped since the start, all interfaces:")?;
            list(&snapshot.drops, out)?;
            for client in snapshot.clients.iter().filter(|client| total(client) > 0) {
                client_drops(client, out)?;
            }
            Ok(())
        }
        Some(address) => match snapshot.client(address) {
            Some(client) => client_drops(client, out),
            None => writeln!(out, "no client has the address {address}; see `clients`"),
        },
    }
}

fn client_drops(client: &Client, out: &mut dyn Write) -> fmt::Result {
    write!(out, "vif {}/{}", client.domid, client.handle)?;
    for address in &client.addresses {
        write!(out, " {address}")?;
    }
    writeln!(out, ":")?;
    list(&client.drops, out)
}

/// Counters that are not zero, one a line.
fn list(counters: &[Counter], out: &mut dyn Write) -> fmt::Result {
    let mut any = false;
    for counter in counters.iter().filter(|counter| counter.value > 0) {
        any = true;
        writeln!(out, "  {:<32} {:>12}", counter.name, counter.value)?;
    }
    if !any {
        writeln!(out, "  nothing")?;
    }
    Ok(())
}

fn counters(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    for counter in &snapshot.counters {
        writeln!(out, "{:<36} {:>14}", counter.name, counter.value)?;
    }
    if let Some(uplink) = &snapshot.uplink {
        writeln!(out, "uplink:")?;
        list(&uplink.counters, out)?;
    }
    for client in &snapshot.clients {
        writeln!(out, "vif {}/{}:", client.domid, client.handle)?;
        list(&client.counters, out)?;
    }
    Ok(())
}

fn log(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    for line in &snapshot.log {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn encoded(snapshot: &Snapshot, _: Option<IpAddr>, out: &mut dyn Write) -> fmt::Result {
    let bytes = snapshot.encode();
    writeln!(out, "{BEGIN_MARK} {}", bytes.len())?;
    for line in bytes.chunks(SNAPSHOT_BYTES_PER_LINE) {
        write!(out, "{DATA_MARK}")?;
        for byte in line {
            write!(out, "{byte:02x}")?;
        }
        writeln!(out)?;
    }
    writeln!(out, "{END_MARK}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::sample;
    use alloc::vec::Vec;

    fn output(line: &str) -> String {
        let mut out = String::new();
        parse(line)
            .unwrap()
            .unwrap()
            .render(&sample(), &mut out)
            .unwrap();
        out
    }

    #[test]
    fn every_command_is_in_help_and_renders() {
        let help = output("help");
        for command in COMMANDS {
            assert!(help.contains(command.name));
            assert!(!output(command.name).is_empty(), "{}", command.name);
            let json = output(&alloc::format!("{} --json", command.name));
            assert_eq!(json.lines().count(), 1, "{json}");
            assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
        }
    }

    #[test]
    fn wrong_use_says_what_would_be_right() {
        let error = |line| parse(line).unwrap_err();
        assert_eq!(error("frobnicate").exit_code(), EXIT_UNKNOWN);
        assert_eq!(
            error("frobnicate").to_string(),
            "\"frobnicate\" is no command; try `help`"
        );
        assert_eq!(
            error("status now").to_string(),
            "`status` takes no arguments"
        );
        assert_eq!(error("rules work").exit_code(), EXIT_USAGE);
        assert!(error("rules work").to_string().contains("rules 10.137.0.6"));
        assert!(
            error("conns 10.137.0.6 10.137.0.7")
                .to_string()
                .contains("one client")
        );
        assert!(parse("   ").unwrap().is_none());
    }

    #[test]
    fn drops_names_reasons_in_total_and_per_client() {
        let all = output("drops");
        assert!(all.contains("spoofed-source"));
        assert!(!all.contains("bad-checksum"), "zero counts are left out");
        assert!(all.contains("vif 3/0 10.137.0.6:"));
        assert!(output("drops 10.9.9.9").contains("no client has the address"));
    }

    #[test]
    fn rules_show_names_with_their_state_and_addresses() {
        let text = output("rules 10.137.0.6");
        assert!(
            text.contains("  web.example: resolved 198.51.100.1\n"),
            "{text}"
        );
        assert!(
            !output("status").contains("not resolved"),
            "no names: no line"
        );
        let mut snapshot = sample();
        for (name, value) in [(NAMES, 3), (UNRESOLVED, 1)] {
            let name = name.into();
            snapshot.counters.push(Counter { name, value });
        }
        let mut out = String::new();
        status(&snapshot, None, &mut out).unwrap();
        assert!(
            out.contains("names     3 in rules, 1 not resolved"),
            "{out}"
        );
    }

    #[test]
    fn conns_shows_what_the_far_end_sees() {
        let text = output("conns 10.137.0.6");
        assert!(text.contains("10.137.0.5:40000"));
        assert!(text.contains("1 shown, 1 in all"));
        assert!(output("conns 10.137.0.9").contains("0 shown"));
    }

    #[test]
    fn the_encoded_snapshot_can_be_read_back_from_the_console_text() {
        let text = output("snapshot");
        let mut bytes = Vec::new();
        for line in text.lines().filter_map(|line| line.strip_prefix(DATA_MARK)) {
            for pair in line.as_bytes().chunks(2) {
                bytes.push(u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).unwrap());
            }
        }
        assert_eq!(Snapshot::decode(&bytes).unwrap(), sample());
        assert!(text.starts_with(&alloc::format!("{BEGIN_MARK} {}", bytes.len())));
    }

    #[test]
    fn json_has_the_names_of_the_snapshot_and_only_what_was_asked_for() {
        let value = |line: &str| serde_json::from_str::<serde_json::Value>(&output(line)).unwrap();
        let status = value("status --json");
        assert_eq!(status["uplink"]["mac"], "00:16:3e:5e:6c:05");
        assert_eq!(status["clients_connected"], 1);
        assert_eq!(status["dropped"], 3);
        assert_eq!(value("--json drops")["all"]["spoofed-source"], 3);
        assert_eq!(value("drops 10.137.0.6 --json")["clients"][0]["domid"], 3);
        assert_eq!(
            value("drops 10.9.9.9 --json")["clients"][0],
            serde_json::Value::Null
        );
        assert_eq!(value("clients --json")[0]["addresses"][0], "10.137.0.6");
        assert_eq!(value("rules --json")[0]["rules"][0][0], 0);
        assert_eq!(value("conns --json")["flows"][0]["rule"], 0);
        assert_eq!(
            value("conns 10.9.9.9 --json")["flows"][0],
            serde_json::Value::Null
        );
        assert_eq!(value("version --json")["release"], "0.1.0");
        assert_eq!(value("log --json")[0], "[    0.000001] a line");
    }

    #[test]
    fn durations_and_sizes_read_well() {
        assert_eq!(alloc::format!("{}", Age(3_725_000_000_000)), "1 h 2 min");
        assert_eq!(alloc::format!("{}", Size(1536)), "1.5 KiB");
        assert_eq!(alloc::format!("{:>8}", Size(12)), "    12 B");
        assert_eq!(alloc::format!("{}", Rate(4_200)), "4200 bit/s");
        assert_eq!(alloc::format!("{}", Rate(470_000_000)), "470 Mbit/s");
    }
}
