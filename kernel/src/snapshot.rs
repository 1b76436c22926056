//! Everything that can be seen from outside, as one plain value.
//!
//! Each command of [`crate::command`] renders a part of a [`Snapshot`]; the console command `snapshot`
//! gives out the whole, postcard-encoded, for `xtask` and the tests. Counters travel with their names, so
//! that a reader asks for what it knows and is not troubled by what was added since.
//!
//! # Encoding
//!
//! [`Snapshot::encode`]: one byte, [`VERSION`], then the postcard encoding of [`Snapshot`]. A reader
//! refuses another version by name instead of misreading it. On the console the bytes come as lines of
//! hexadecimal between [`BEGIN_MARK`] and [`END_MARK`].

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize, Serializer};

use crate::command::Mac;

/// The version of the encoding. Raised whenever a field is added, removed or changes its meaning.
pub const VERSION: u8 = 3;

/// The line before an encoded snapshot on the console.
pub const BEGIN_MARK: &str = "@@SNAPSHOT-BEGIN";
/// What each line of hexadecimal starts with.
pub const DATA_MARK: &str = "@@S ";
/// The line after an encoded snapshot.
pub const END_MARK: &str = "@@SNAPSHOT-END";

/// A named count.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Counter {
    /// A stable name: lower case, words joined by `-`, parts by `.`.
    pub name: Cow<'static, str>,
    /// The count since the domain started.
    pub value: u64,
}

/// How much may be put into a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scope {
    /// Flows listed at most; the total is always given.
    pub flows: usize,
    /// Whether rule lists are included.
    pub rules: bool,
    /// Whether the last log lines are included.
    pub log: bool,
    /// Only this client's flows and rules.
    pub client: Option<IpAddr>,
}

impl Scope {
    /// Counters, clients and the uplink only.
    pub const OVERVIEW: Self = Self {
        flows: 0,
        rules: false,
        log: false,
        client: None,
    };
    /// Everything, with the flow list bounded.
    pub const WHOLE: Self = Self {
        flows: 256,
        rules: true,
        log: false,
        client: None,
    };
}

/// Memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    /// The control plane's heap.
    pub heap_bytes: u64,
    /// Of that in use.
    pub heap_used_bytes: u64,
    /// The packet pool at boot.
    pub pool_bytes: u64,
    /// Of that free now.
    pub pool_free_bytes: u64,
}

/// The uplink.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Uplink {
    /// The netvm's domain id.
    pub domid: u16,
    /// Whether frames flow.
    pub connected: bool,
    /// Our MAC address.
    #[serde(serialize_with = "mac")]
    pub mac: [u8; 6],
    /// Our IPv4 address, the source of everything that leaves.
    pub ip4: Option<Ipv4Addr>,
    /// Our IPv6 address.
    pub ip6: Option<Ipv6Addr>,
    /// The driver's counters.
    #[serde(serialize_with = "by_name")]
    pub counters: Vec<Counter>,
}

/// One client vif.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Client {
    /// The client's domain id.
    pub domid: u16,
    /// The device number in that domain.
    pub handle: u16,
    /// The client's MAC address.
    #[serde(serialize_with = "mac")]
    pub mac: [u8; 6],
    /// The addresses that it may use.
    pub addresses: Vec<IpAddr>,
    /// Whether frames flow.
    pub connected: bool,
    /// Flows that it owns.
    pub flows: u32,
    /// Bytes of frames from the client.
    pub bytes_in: u64,
    /// Bytes of frames to the client.
    pub bytes_out: u64,
    /// Frames from the client.
    pub frames_in: u64,
    /// Frames to the client.
    pub frames_out: u64,
    /// Bits a second from the client, of late.
    pub rate_in: u64,
    /// Bits a second to the client, of late.
    pub rate_out: u64,
    /// Frames dropped, by reason; only reasons that occurred.
    #[serde(serialize_with = "by_name")]
    pub drops: Vec<Counter>,
    /// The driver's counters.
    #[serde(serialize_with = "by_name")]
    pub counters: Vec<Counter>,
}

/// One tracked flow, as its client sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flow {
    /// Protocol number (6 TCP, 17 UDP, 1 and 58 ICMP).
    pub protocol: u8,
    /// The client's end.
    pub source: (IpAddr, u16),
    /// The far end, as the client addresses it.
    pub destination: (IpAddr, u16),
    /// Our end towards the far end: what the far end sees.
    pub translated: (IpAddr, u16),
    /// A word for the state, e.g. `established`.
    pub state: Cow<'static, str>,
    /// The number of the rule that let it start; `None` for the policy.
    pub rule: Option<u16>,
    /// Seconds until it is forgotten unless used.
    pub expires_seconds: u32,
    /// Packets, both directions.
    pub packets: u64,
}

/// The rules in force for one address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rules {
    /// The client's address.
    pub address: IpAddr,
    /// Why everything is denied, when the rule set was unusable.
    pub error: Option<String>,
    /// What happens to packets that match no rule: `accept` or `drop`.
    pub policy: Cow<'static, str>,
    /// The rules: number and text.
    pub rules: Vec<(u16, String)>,
    /// The names in them, and what they stand for.
    pub names: Vec<Name>,
}

/// A name in the rules of one address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Name {
    /// The name.
    pub name: String,
    /// `resolved`, `pending`, or what is wrong, in words.
    pub state: Cow<'static, str>,
    /// The addresses that it stands for, looked up and learned.
    pub addresses: Vec<IpAddr>,
}

/// Everything that can be seen from outside.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The product's version.
    pub release: Cow<'static, str>,
    /// Nanoseconds since the image's first instruction.
    pub uptime_nanos: u64,
    /// Nanoseconds from the first instruction to "ready for clients".
    pub ready_nanos: u64,
    /// Of that, nanoseconds in which the domain had the processor; the rest is waiting.
    pub ready_running_nanos: u64,
    /// Where the configuration comes from: `xenstore` or `qubesdb`.
    pub source: Cow<'static, str>,
    /// Settings that are missing and waited for.
    pub missing: Vec<Cow<'static, str>>,
    /// Memory.
    pub memory: Memory,
    /// Counters of the engine, the main loop and the hypervisor interface.
    #[serde(serialize_with = "by_name")]
    pub counters: Vec<Counter>,
    /// Frames dropped, by reason, all interfaces; every reason, also those at 0.
    #[serde(serialize_with = "by_name")]
    pub drops: Vec<Counter>,
    /// The uplink, when there is one.
    pub uplink: Option<Uplink>,
    /// The clients.
    pub clients: Vec<Client>,
    /// Flows in all; [`Snapshot::flows`] may list fewer.
    pub flows_total: u32,
    /// Flows, as many as the scope allows.
    pub flows: Vec<Flow>,
    /// Rule lists, when the scope includes them.
    pub rules: Vec<Rules>,
    /// The last log lines, oldest first, when the scope includes them.
    pub log: Vec<String>,
}

/// For people and JSON as text, else as six bytes.
fn mac<S: Serializer>(mac: &[u8; 6], serializer: S) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() {
        serializer.collect_str(&Mac(*mac))
    } else {
        mac.serialize(serializer)
    }
}

/// In JSON an object with a field for each counter, else the list that it is.
pub(crate) fn by_name<S: Serializer>(
    counters: &[Counter],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() {
        serializer.collect_map(counters.iter().map(|own| (&own.name, own.value)))
    } else {
        counters.serialize(serializer)
    }
}

/// Why bytes are no snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DecodeError {
    /// There are no bytes.
    Empty,
    /// They are of another version than [`VERSION`]: the one given.
    Version(u8),
    /// They are damaged.
    Malformed,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the snapshot is empty"),
            Self::Version(found) => write!(
                f,
                "the snapshot has version {found}, this program reads version {VERSION}"
            ),
            Self::Malformed => f.write_str("the snapshot is damaged"),
        }
    }
}

impl core::error::Error for DecodeError {}

impl Snapshot {
    /// The encoded snapshot; empty only if postcard could not serialise, which its format cannot cause.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from([VERSION]);
        match postcard::to_allocvec(self) {
            Ok(body) => bytes.extend(body),
            Err(_) => bytes.clear(),
        }
        bytes
    }

    /// Reads an encoded snapshot.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when the bytes are of another version or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        match bytes.split_first() {
            None => Err(DecodeError::Empty),
            Some((&VERSION, body)) => {
                postcard::from_bytes(body).map_err(|_| DecodeError::Malformed)
            }
            Some((&other, _)) => Err(DecodeError::Version(other)),
        }
    }

    /// The counter of that name, 0 when there is none.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        value(&self.counters, name)
    }

    /// How many frames were dropped for that reason, 0 for an unknown one.
    #[must_use]
    pub fn dropped(&self, reason: &str) -> u64 {
        value(&self.drops, reason)
    }

    /// The client that may use that address and was attached last.
    #[must_use]
    pub fn client(&self, address: IpAddr) -> Option<&Client> {
        self.clients
            .iter()
            .filter(|client| client.addresses.contains(&address))
            .max_by_key(|client| (client.connected, client.domid))
    }
}

impl Client {
    /// How many of its frames were dropped for that reason.
    #[must_use]
    pub fn dropped(&self, reason: &str) -> u64 {
        value(&self.drops, reason)
    }
}

fn value(counters: &[Counter], name: &str) -> u64 {
    counters
        .iter()
        .find(|counter| counter.name == name)
        .map_or(0, |counter| counter.value)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::vec;

    /// A small snapshot with one of everything.
    pub(crate) fn sample() -> Snapshot {
        let client: IpAddr = "10.137.0.6".parse().unwrap();
        Snapshot {
            release: "0.1.0".into(),
            uptime_nanos: 3_725_000_000_000,
            ready_nanos: 4_200_000,
            ready_running_nanos: 2_100_000,
            source: "xenstore".into(),
            missing: vec![],
            memory: Memory {
                heap_bytes: 2 << 20,
                heap_used_bytes: 1 << 20,
                pool_bytes: 4 << 20,
                pool_free_bytes: 3 << 20,
            },
            counters: vec![Counter {
                name: "xen.hypercalls".into(),
                value: 1234,
            }],
            drops: vec![
                Counter {
                    name: "spoofed-source".into(),
                    value: 3,
                },
                Counter {
                    name: "bad-checksum".into(),
                    value: 0,
                },
            ],
            uplink: Some(Uplink {
                domid: 1,
                connected: true,
                mac: [0, 0x16, 0x3e, 0x5e, 0x6c, 5],
                ip4: Some(Ipv4Addr::new(10, 137, 0, 5)),
                ip6: None,
                counters: vec![],
            }),
            clients: vec![Client {
                domid: 3,
                handle: 0,
                mac: [0, 0x16, 0x3e, 0x5e, 0x6c, 6],
                addresses: vec![client],
                connected: true,
                flows: 1,
                bytes_in: 1500,
                bytes_out: 3_000_000,
                frames_in: 10,
                frames_out: 2000,
                rate_in: 12_000,
                rate_out: 470_000_000,
                drops: vec![Counter {
                    name: "spoofed-source".into(),
                    value: 3,
                }],
                counters: vec![],
            }],
            flows_total: 1,
            flows: vec![Flow {
                protocol: 6,
                source: (client, 40000),
                destination: ("198.51.100.1".parse().unwrap(), 80),
                translated: ("10.137.0.5".parse().unwrap(), 40000),
                state: "established".into(),
                rule: Some(0),
                expires_seconds: 431_999,
                packets: 12,
            }],
            rules: vec![Rules {
                address: client,
                error: None,
                policy: "drop".into(),
                rules: vec![(0, "action=accept dsthost=web.example".into())],
                names: vec![Name {
                    name: "web.example".into(),
                    state: "resolved".into(),
                    addresses: vec!["198.51.100.1".parse().unwrap()],
                }],
            }],
            log: vec!["[    0.000001] a line".into()],
        }
    }

    #[test]
    fn a_snapshot_survives_encoding() {
        let snapshot = sample();
        assert_eq!(Snapshot::decode(&snapshot.encode()), Ok(snapshot));
    }

    #[test]
    fn another_version_and_damage_are_refused() {
        let mut bytes = sample().encode();
        assert_eq!(Snapshot::decode(&bytes[..20]), Err(DecodeError::Malformed));
        bytes[0] = VERSION + 1;
        assert_eq!(
            Snapshot::decode(&bytes),
            Err(DecodeError::Version(VERSION + 1))
        );
        assert_eq!(Snapshot::decode(&[]), Err(DecodeError::Empty));
    }

    #[test]
    fn counters_are_found_by_name() {
        let snapshot = sample();
        assert_eq!(snapshot.counter("xen.hypercalls"), 1234);
        assert_eq!(snapshot.counter("no-such"), 0);
        assert_eq!(snapshot.dropped("spoofed-source"), 3);
        let client = snapshot.client("10.137.0.6".parse().unwrap()).unwrap();
        assert_eq!(client.dropped("spoofed-source"), 3);
    }
}
