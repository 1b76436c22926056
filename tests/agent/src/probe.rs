//! `lab connect` and `lab udp`: one attempt, and exactly what came back.
//!
//! A firewall refuses with an ICMP error; the socket only tells an error number
//! that several ICMP codes share. So a raw ICMP socket listens beside the
//! attempt and the error that quotes our packet is printed with type and code.
//!
//! Output is one line of `key=value` words:
//!
//! ```text
//! result=connected ms=12 local=10.137.0.6:40312
//! result=refused ms=9 icmp=3/13 from=10.137.0.5 error=EHOSTUNREACH
//! result=timeout ms=3000
//! result=reply ms=14 text=hello
//! ```
//!
//! The exit status is 0 for `connected` and `reply`, 1 otherwise.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{LaxSlicedPacket, TransportSlice, ip_number};
use lexopt::prelude::*;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, socket,
};

use crate::Outcome;
use crate::agent::milliseconds;

/// How long to look for the ICMP error after the socket reported one.
const ICMP_PATIENCE: Duration = Duration::from_millis(200);

struct Attempt {
    target: SocketAddr,
    timeout: Duration,
    text: String,
}

fn parse(mut arguments: lexopt::Parser) -> Result<Attempt, lexopt::Error> {
    let mut values = Vec::new();
    let mut timeout = Duration::from_secs(5);
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(value) => values.push(value.string()?),
            Long("timeout-ms") => timeout = Duration::from_millis(arguments.value()?.parse()?),
            other => return Err(other.unexpected()),
        }
    }
    let mut values = values.into_iter();
    let mut next = |what: &str| values.next().ok_or(format!("{what} is missing"));
    let address = next("the address")?;
    let port = next("the port")?;
    let target = SocketAddr::new(
        address
            .parse::<IpAddr>()
            .map_err(|error| error.to_string())?,
        port.parse::<u16>().map_err(|error| error.to_string())?,
    );
    Ok(Attempt {
        target,
        timeout,
        text: values.next().unwrap_or_default(),
    })
}

/// Runs `lab connect ADDR PORT [--timeout-ms N]`.
pub(crate) fn connect_command(arguments: lexopt::Parser) -> Outcome {
    let attempt = parse(arguments)?;
    let errors = IcmpErrors::listen(attempt.target.ip())?;
    let begun = Instant::now();
    let outcome = TcpStream::connect_timeout(&attempt.target, attempt.timeout);
    let ms = milliseconds(begun);
    match outcome {
        Ok(stream) => {
            println!("result=connected ms={ms} local={}", stream.local_addr()?);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Ok(report_failure(&error, ms, &errors, attempt.target)),
    }
}

/// Runs `lab udp ADDR PORT TEXT [--timeout-ms N]`.
pub(crate) fn udp_command(arguments: lexopt::Parser) -> Outcome {
    let attempt = parse(arguments)?;
    let errors = IcmpErrors::listen(attempt.target.ip())?;
    let any: IpAddr = match attempt.target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(attempt.target)?;
    socket.set_read_timeout(Some(attempt.timeout))?;
    let begun = Instant::now();
    let mut buffer = vec![0; 65_536];
    let outcome = socket
        .send(attempt.text.as_bytes())
        .and_then(|_| socket.recv(&mut buffer));
    let ms = milliseconds(begun);
    match outcome {
        Ok(len) => {
            let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default()).into_owned();
            println!(
                "result=reply ms={ms} local={} text={}",
                socket.local_addr()?,
                text.trim_end()
            );
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Ok(report_failure(&error, ms, &errors, attempt.target)),
    }
}

fn report_failure(error: &io::Error, ms: u64, errors: &IcmpErrors, target: SocketAddr) -> ExitCode {
    let waited_in_vain = matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    );
    let number = error.raw_os_error().map_or_else(
        || error.to_string().replace(' ', "-"),
        |raw| format!("{:?}", Errno::from_raw(raw)),
    );
    // A TCP attempt may end by timeout although an error that Linux takes for
    // a soft one came; so look in both cases.
    match errors.find(
        target,
        if waited_in_vain {
            Duration::ZERO
        } else {
            ICMP_PATIENCE
        },
    ) {
        Some(found) => println!(
            "result=refused ms={ms} icmp={}/{} from={} error={number}",
            found.kind, found.code, found.from
        ),
        None if waited_in_vain => println!("result=timeout ms={ms}"),
        None => println!("result=reset ms={ms} error={number}"),
    }
    ExitCode::FAILURE
}

/// An ICMP error that quotes a packet of ours.
struct IcmpError {
    kind: u8,
    code: u8,
    from: IpAddr,
}

/// A raw socket that collects ICMP messages from before the attempt on.
struct IcmpErrors {
    socket: OwnedFd,
    v6: bool,
}

impl IcmpErrors {
    fn listen(target: IpAddr) -> nix::Result<Self> {
        let v6 = target.is_ipv6();
        let (family, protocol) = if v6 {
            (AddressFamily::Inet6, SockProtocol::IcmpV6)
        } else {
            (AddressFamily::Inet, SockProtocol::Icmp)
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Self {
            socket: socket(family, SockType::Raw, flags, protocol)?,
            v6,
        })
    }

    fn find(&self, target: SocketAddr, patience: Duration) -> Option<IcmpError> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 65_536];
        loop {
            match recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, from)) => {
                    let packet = buffer.get(..len).unwrap_or_default();
                    let from = from.as_ref().and_then(peer_address);
                    if let Some(found) = from.and_then(|from| self.judge(packet, from, target)) {
                        return Some(found);
                    }
                }
                Err(Errno::EAGAIN) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }

    /// Decides whether a message is an error about a packet to `target`.
    ///
    /// IPv4 raw sockets deliver the IP header too, IPv6 ones do not.
    fn judge(&self, packet: &[u8], from: IpAddr, target: SocketAddr) -> Option<IcmpError> {
        let header_len = if self.v6 {
            0
        } else {
            usize::from(packet.first()? & 0x0f) * 4
        };
        let icmp = packet.get(header_len..)?;
        let (&kind, &code) = (icmp.first()?, icmp.get(1)?);
        // Destination unreachable, time exceeded, parameter problem; IPv6 has
        // its errors below 128 (RFC 792, RFC 4443).
        let is_error = if self.v6 {
            kind < 128
        } else {
            matches!(kind, 3 | 11 | 12)
        };
        let quoted = LaxSlicedPacket::from_ip(icmp.get(8..)?).ok()?;
        let to = match quoted.net.as_ref()? {
            etherparse::LaxNetSlice::Ipv4(ip) => IpAddr::V4(ip.header().destination_addr()),
            etherparse::LaxNetSlice::Ipv6(ip) => IpAddr::V6(ip.header().destination_addr()),
            etherparse::LaxNetSlice::Arp(_) => return None,
        };
        let port = quoted_destination_port(&quoted);
        let ours = to == target.ip() && port.is_none_or(|port| port == target.port());
        (is_error && ours).then_some(IcmpError { kind, code, from })
    }
}

/// The destination port in the quoted packet, if that much of it is quoted.
///
/// RFC 792 quotes 8 bytes after the IP header, less than a TCP header, so the
/// port is taken from the IP payload itself.
fn quoted_destination_port(quoted: &LaxSlicedPacket<'_>) -> Option<u16> {
    match &quoted.transport {
        Some(TransportSlice::Tcp(tcp)) => Some(tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => Some(udp.destination_port()),
        _ => {
            let payload = quoted.net.as_ref()?.ip_payload_ref()?;
            let has_ports = matches!(payload.ip_number, ip_number::TCP | ip_number::UDP);
            let bytes = payload.payload.get(2..4)?.try_into().ok()?;
            has_ports.then_some(u16::from_be_bytes(bytes))
        }
    }
}

fn peer_address(from: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = from
        .as_sockaddr_in()
        .map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| {
        from.as_sockaddr_in6()
            .map(|address| IpAddr::V6(address.ip()))
    })
}
