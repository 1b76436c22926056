//! `lab capture`: a line of plain words for each frame on an interface.
//!
//! ```text
//! capturing eth0
//! in ipv4 10.137.0.5 > 198.51.100.1 ttl=63 icmp type=8 code=0 id=7 seq=1
//! out ipv4 198.51.100.1 > 10.137.0.5 ttl=64 tcp 80 > 40312 flags=SA len=0
//! ```
//!
//! The first line means that nothing after it is missed, as long as the socket
//! buffer holds.

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, LaxNetSlice, LaxSlicedPacket, TransportSlice,
};
use lexopt::prelude::*;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket,
};

use crate::Outcome;
use crate::frame::interface_address;

/// `PACKET_OUTGOING` in `linux/if_packet.h`: a frame that this host sent.
const OUTGOING: u8 = 4;

/// Runs `lab capture IFACE [--count N] [--seconds N]`.
pub(crate) fn command(mut arguments: lexopt::Parser) -> Outcome {
    let mut interface = None;
    let mut count = u64::MAX;
    let mut seconds = u64::from(u32::MAX);
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(value) => interface = Some(value.string()?),
            Long("count") => count = arguments.value()?.parse()?,
            Long("seconds") => seconds = arguments.value()?.parse()?,
            other => return Err(other.unexpected().into()),
        }
    }
    let interface = interface.ok_or("which interface?")?;
    let index = interface_address(&interface)?.ifindex();
    let packets = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::EthAll,
    )?;
    let deadline = Instant::now() + Duration::from_secs(seconds);
    say(&format!("capturing {interface}"));
    let mut buffer = vec![0; 128 * 1024];
    let mut seen = 0;
    while seen < count {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match recvfrom::<LinkAddr>(packets.as_raw_fd(), &mut buffer) {
            Ok((len, Some(from))) if from.ifindex() == index => {
                let direction = if from.pkttype() == OUTGOING {
                    "out"
                } else {
                    "in"
                };
                let frame = buffer.get(..len).unwrap_or_default();
                say(&format!("{direction} {}", describe(frame)));
                seen += 1;
            }
            Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS | Errno::ENETDOWN) => {}
            Err(Errno::EAGAIN) => {
                let mut waited = [PollFd::new(
                    std::os::fd::AsFd::as_fd(&packets),
                    PollFlags::POLLIN,
                )];
                let timeout = PollTimeout::try_from(left.min(Duration::from_secs(1)))
                    .unwrap_or(PollTimeout::from(100_u8));
                poll(&mut waited, timeout)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a line at once: the reader waits for it.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Describes a frame as far as it can be understood.
fn describe(frame: &[u8]) -> String {
    let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else {
        return format!("short frame of {} bytes", frame.len());
    };
    let network = match &packet.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            format!(
                "ipv4 {} > {} ttl={}",
                header.source_addr(),
                header.destination_addr(),
                header.ttl()
            )
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let header = ip.header();
            format!(
                "ipv6 {} > {} ttl={}",
                header.source_addr(),
                header.destination_addr(),
                header.hop_limit()
            )
        }
        Some(LaxNetSlice::Arp(arp)) => {
            let address = |bytes: &[u8]| {
                bytes
                    .iter()
                    .map(u8::to_string)
                    .collect::<Vec<_>>()
                    .join(".")
            };
            return format!(
                "arp op={} {} > {}",
                arp.operation().0,
                address(arp.sender_protocol_addr()),
                address(arp.target_protocol_addr())
            );
        }
        None => return format!("frame of {} bytes", frame.len()),
    };
    format!("{network} {}", transport(&packet))
}

fn transport(packet: &LaxSlicedPacket<'_>) -> String {
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let flags: String = [
                (tcp.syn(), 'S'),
                (tcp.fin(), 'F'),
                (tcp.rst(), 'R'),
                (tcp.psh(), 'P'),
                (tcp.ack(), 'A'),
            ]
            .into_iter()
            .filter_map(|(set, letter)| set.then_some(letter))
            .collect();
            format!(
                "tcp {} > {} flags={flags} len={}",
                tcp.source_port(),
                tcp.destination_port(),
                tcp.payload().len()
            )
        }
        Some(TransportSlice::Udp(udp)) => format!(
            "udp {} > {} len={}",
            udp.source_port(),
            udp.destination_port(),
            udp.payload().len()
        ),
        Some(TransportSlice::Icmpv4(icmp)) => {
            let echo = match icmp.icmp_type() {
                Icmpv4Type::EchoRequest(echo) | Icmpv4Type::EchoReply(echo) => echo_text(echo),
                _ => String::new(),
            };
            format!(
                "icmp type={} code={} {echo}",
                icmp.type_u8(),
                icmp.code_u8()
            )
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let echo = match icmp.icmp_type() {
                Icmpv6Type::EchoRequest(echo) | Icmpv6Type::EchoReply(echo) => echo_text(echo),
                _ => String::new(),
            };
            format!(
                "icmp6 type={} code={} {echo}",
                icmp.type_u8(),
                icmp.code_u8()
            )
        }
        _ => {
            let number = packet.net.as_ref().and_then(|net| net.ip_payload_ref());
            number.map_or_else(String::new, |payload| {
                format!(
                    "protocol={} len={}",
                    payload.ip_number.0,
                    payload.payload.len()
                )
            })
        }
    }
}

fn echo_text(echo: IcmpEchoHeader) -> String {
    format!("id={} seq={}", echo.id, echo.seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn frame(build: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        build(&mut bytes);
        bytes
    }

    #[test]
    fn an_echo_request_is_described_with_its_identifier() {
        let frame = frame(|out| {
            PacketBuilder::ethernet2([2; 6], [0xfe; 6])
                .ipv4([10, 137, 0, 5], [198, 51, 100, 1], 63)
                .icmpv4_echo_request(7, 1)
                .write(out, b"ping")
                .unwrap();
        });
        assert_eq!(
            describe(&frame),
            "ipv4 10.137.0.5 > 198.51.100.1 ttl=63 icmp type=8 code=0 id=7 seq=1"
        );
    }

    #[test]
    fn a_handshake_segment_is_described_with_its_flags() {
        let frame = frame(|out| {
            PacketBuilder::ethernet2([2; 6], [0xfe; 6])
                .ipv4([10, 137, 0, 5], [198, 51, 100, 1], 64)
                .tcp(40312, 80, 1, 1024)
                .syn()
                .write(out, b"")
                .unwrap();
        });
        assert_eq!(
            describe(&frame),
            "ipv4 10.137.0.5 > 198.51.100.1 ttl=64 tcp 40312 > 80 flags=S len=0"
        );
    }

    #[test]
    fn noise_is_described_as_noise() {
        assert_eq!(describe(&[0; 5]), "short frame of 5 bytes");
        assert_eq!(describe(&[0xff; 20]), "frame of 20 bytes");
    }
}
