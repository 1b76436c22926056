//! The lab's "internet": addresses in dom0 that stand for the world.
//!
//! dom0 plays sys-net. Its interface `internet` carries documentation addresses
//! (RFC 5737, RFC 3849) on which small servers listen; see `lab serve` in
//! `tests/agent`. All of it runs from boot on and so is part of every snapshot.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

/// sys-net's address on every uplink vif.
pub const UPLINK: Ipv4Addr = Ipv4Addr::new(10, 137, 0, 4);
/// The same for IPv6.
pub const UPLINK6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, 0xa89, 4);

/// Web server (port 80, `/8m.bin`, `/hello.txt`) and iperf3 (port 5201).
pub const WEB: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same for IPv6.
pub const WEB6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The real resolver that virtual DNS addresses are translated to.
pub const DNS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 53);
/// The second one.
pub const DNS2: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 54);
/// A resolver for IPv6, which has no virtual address.
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53);

/// The virtual DNS addresses that every Qubes client uses.
pub const VIRTUAL_DNS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(10, 139, 1, 2)];

/// Echo, whoami, sink and flood servers.
pub const ECHO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// The same for IPv6.
pub const ECHO6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// An address that rules forbid; echo and whoami listen there too.
pub const BLOCKED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// The same for IPv6.
pub const BLOCKED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 9);

/// TCP and UDP: sends back what it gets (RFC 862).
pub const ECHO_PORT: u16 = 7;
/// TCP and UDP: tells the client's address and port as seen by the server.
pub const WHOAMI_PORT: u16 = 8;
/// TCP: reads and forgets (RFC 863).
pub const SINK_PORT: u16 = 9;
/// TCP: writes without end (RFC 864).
pub const FLOOD_PORT: u16 = 19;
/// TCP: iperf3's own port.
pub const IPERF_PORT: u16 = 5201;

/// Size in bytes of the file `/8m.bin`, whose content is random per boot.
pub const DOWNLOAD_BYTES: u64 = 8 << 20;

/// Names the resolvers know beside [`MANY_NAME`].
pub const WEB_NAME: &str = "www.lab";
/// Name of the echo server.
pub const ECHO_NAME: &str = "echo.lab";
/// Name of the forbidden address.
pub const BLOCKED_NAME: &str = "blocked.lab";
/// A name with [`MANY`] IPv4 addresses, too many for a plain UDP answer.
pub const MANY_NAME: &str = "many.lab";
/// How many addresses that name has.
pub const MANY: u32 = 60;

/// Addresses of the interface `internet` with prefix lengths, one per line.
#[must_use]
pub fn interface_addresses() -> String {
    let mut text = String::new();
    for address in [WEB, DNS, DNS2, ECHO, BLOCKED] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{address}/32");
    }
    for address in [WEB6, DNS6, ECHO6, BLOCKED6] {
        let _ = writeln!(text, "{address}/128");
    }
    text
}

/// Arguments of `lab serve`.
#[must_use]
pub fn service_arguments() -> String {
    let mut text = format!("--dns {DNS} --dns {DNS2} --dns {DNS6}");
    let names = [
        (WEB_NAME, WEB, WEB6),
        (ECHO_NAME, ECHO, ECHO6),
        (BLOCKED_NAME, BLOCKED, BLOCKED6),
    ];
    for (name, address, address6) in names {
        let _ = write!(
            text,
            " --record {name}={address} --record {name}={address6}"
        );
    }
    for number in 0..MANY {
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(192, 0, 2, 1).to_bits() + number);
        let _ = write!(text, " --record {MANY_NAME}={address}");
    }
    let services = [
        ("echo", ECHO_PORT),
        ("whoami", WHOAMI_PORT),
        ("sink", SINK_PORT),
        ("flood", FLOOD_PORT),
    ];
    for (service, port) in services {
        let _ = write!(
            text,
            " --{service} {ECHO}:{port} --{service} [{ECHO6}]:{port}"
        );
        let _ = write!(
            text,
            " --{service} {BLOCKED}:{port} --{service} [{BLOCKED6}]:{port}"
        );
    }
    text
}

/// Where web servers listen, one per line.
#[must_use]
pub fn web_addresses() -> String {
    format!("{WEB}:80\n[{WEB6}]:80\n{BLOCKED}:80\n")
}

/// Where iperf3 listens, one per line.
#[must_use]
pub fn iperf_addresses() -> String {
    format!("{WEB}\n{WEB6}\n")
}
