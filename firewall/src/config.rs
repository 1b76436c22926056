//! What the engine is told by its owner: sizes at boot, addresses and clients at run time.
//!
//! Everything here comes from dom0, by way of xenstore or QubesDB, and is trusted to decide but not to
//! be free of mistakes.
//!
//! Source: `qubes-policy.md` 1.1, 1.5, 3.5, 5.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::{ClientId, GATEWAY_MAC, Mac};

/// Standard MTU of every link in Qubes.
pub const DEFAULT_MTU: u16 = 1500;

/// Smallest flow table that the engine accepts.
pub const MIN_FLOWS: u32 = 256;

/// Largest flow table that the engine can number.
pub const MAX_FLOWS: u32 = 1 << 23;

/// Sizes of everything that is allocated at boot. Values out of range are brought into range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// IPv4 flows, [`MIN_FLOWS`] to [`MAX_FLOWS`].
    pub flows4: u32,
    /// IPv6 flows, [`MIN_FLOWS`] to [`MAX_FLOWS`].
    pub flows6: u32,
    /// Client vifs, 1 to 1024. Higher client numbers are refused.
    pub clients: u16,
    /// Memory for fragments that wait for the rest of their datagram, in bytes.
    pub fragment_bytes: u32,
    /// Memory for frames that the engine makes itself, in bytes.
    pub outbox_bytes: u32,
    /// ICMP errors per second and client; `None` for no limit at all, in tests.
    pub icmp_rate: Option<IcmpRate>,
}

/// Limits of the ICMP errors that the engine sends (`qubes-policy.md` D8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpRate {
    /// Errors per second for one client.
    pub per_second: u16,
    /// Errors that a client may cause at once after a pause.
    pub burst: u16,
    /// Errors per second for all clients and the uplink together.
    pub global_per_second: u16,
}

impl Default for IcmpRate {
    fn default() -> Self {
        Self {
            per_second: 100,
            burst: 200,
            global_per_second: 1000,
        }
    }
}

impl Limits {
    /// Sizes for an engine that may use about `bytes` bytes for its tables.
    ///
    /// Three quarters of what remains after fragments and the outbox go to IPv4 flows, the rest to
    /// IPv6 flows. Never below 4096 and 1024 flows, which take about 1 MiB.
    pub fn for_memory(bytes: u64) -> Self {
        let scratch = (bytes / 8).clamp(256 * 1024, 4 * 1024 * 1024);
        let outbox = (bytes / 32).clamp(128 * 1024, 1024 * 1024);
        let tables = bytes.saturating_sub(scratch).saturating_sub(outbox);
        let flows = |share: u64, each: u64, least: u64| {
            let count = (share / each).clamp(least, u64::from(MAX_FLOWS));
            u32::try_from(count).unwrap_or(MAX_FLOWS)
        };
        Self {
            flows4: flows(tables / 4 * 3, 160, 4096),
            flows6: flows(tables / 4, 232, 1024),
            clients: 256,
            fragment_bytes: u32::try_from(scratch).unwrap_or(256 * 1024),
            outbox_bytes: u32::try_from(outbox).unwrap_or(128 * 1024),
            icmp_rate: Some(IcmpRate::default()),
        }
    }
}

impl Default for Limits {
    /// Sizes for a domain of 16 MiB.
    fn default() -> Self {
        Self {
            flows4: 24_576,
            flows6: 8_192,
            clients: 256,
            fragment_bytes: 512 * 1024,
            outbox_bytes: 256 * 1024,
            icmp_rate: Some(IcmpRate::default()),
        }
    }
}

/// Our side of the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UplinkConfig {
    /// Our own Ethernet address on the uplink.
    pub mac: Mac,
    /// Where frames for the outside go: [`GATEWAY_MAC`] unless something else is known.
    pub next_hop_mac: Mac,
    /// Our IPv4 address, which clients' traffic leaves with.
    pub ip4: Ipv4Addr,
    /// The netvm's IPv4 address. It appears in no packet.
    pub gateway4: Option<Ipv4Addr>,
    /// Our IPv6 address.
    pub ip6: Option<Ipv6Addr>,
    /// The netvm's IPv6 address; without it IPv6 has no way out.
    pub gateway6: Option<Ipv6Addr>,
    /// MTU of the uplink in bytes of IP packet.
    pub mtu: u16,
}

impl UplinkConfig {
    /// An IPv4 uplink with the conventional next hop and MTU.
    pub const fn new(mac: Mac, ip4: Ipv4Addr) -> Self {
        Self {
            mac,
            next_hop_mac: GATEWAY_MAC,
            ip4,
            gateway4: None,
            ip6: None,
            gateway6: None,
            mtu: DEFAULT_MTU,
        }
    }
}

/// The addresses that clients know us by: `/qubes-netvm-gateway` and `/qubes-netvm-gateway6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downstream {
    /// Source of ICMP errors to clients, and what they ping. Without it we are the uplink's address.
    pub gateway4: Option<Ipv4Addr>,
    /// The same for IPv6. Without it IPv6 is off: every IPv6 frame of a client is dropped.
    pub gateway6: Option<Ipv6Addr>,
}

/// One vif of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The number that frames of this vif carry.
    pub id: ClientId,
    /// The domain behind it, for views and to choose among vifs that share an address.
    pub domid: u16,
    /// The client's Ethernet address: where its frames go. Source addresses are not policed.
    pub mac: Mac,
    /// Every address in the backend's `ip` key, real ones only, in any order.
    pub addresses: Vec<IpAddr>,
    /// MTU of the vif in bytes of IP packet.
    pub mtu: u16,
}

/// A client that believes in another address than its own (`/mapped-ip/<real>/...`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedAddress {
    /// The address that rules, routes and guards use.
    pub real: Ipv4Addr,
    /// The address that the client believes it has.
    pub visible: Ipv4Addr,
    /// The gateway that the client believes it has.
    pub visible_gateway: Ipv4Addr,
}

/// Why a client cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// The number is beyond [`Limits::clients`].
    NumberOutOfRange,
    /// The number belongs to a client that is attached.
    NumberInUse,
    /// No room for the addresses of one more client.
    TooManyAddresses,
}

impl core::fmt::Display for AttachError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NumberOutOfRange => "the client number is out of range",
            Self::NumberInUse => "the client number is in use",
            Self::TooManyAddresses => "too many client addresses",
        })
    }
}

impl core::error::Error for AttachError {}
