//! What a packet carries above IP, reduced to what tracking and rules need.
//!
//! Source: RFC 9293 (TCP), RFC 768 (UDP), RFC 792 and 4443 (ICMP).

use super::icmp::{self, Message};
use super::ipv4::Network;
use super::{checksum, protocol};
use crate::address::Address;
use crate::rule::Family;
use crate::ruleset::UpperLayer;
use crate::verdict::DropReason;

/// Bytes of a TCP header without options.
pub(crate) const TCP_HEADER: usize = 20;

/// Bytes of a UDP header.
pub(crate) const UDP_HEADER: usize = 8;

/// What kind of packet it is for tracking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    Udp,
    /// An ICMP message that asks for an answer.
    Request,
    /// An ICMP message that answers.
    Reply,
    /// An ICMP message about another packet.
    Error,
    /// Any other ICMP message.
    OtherIcmp,
    /// Any other protocol: tracked by address pair.
    #[default]
    Other,
}

/// The transport layer of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Transport {
    pub(crate) kind: Kind,
    /// Source selector in the high half, destination selector in the low half. Selectors are ports;
    /// for ICMP the asking side's is the identifier and the other one's is the request's type and
    /// code. So the reply to anything has the two halves exchanged.
    pub(crate) ports: u32,
}

/// Ports with source and destination exchanged.
#[inline]
pub(crate) const fn swapped(ports: u32) -> u32 {
    ports.rotate_left(16)
}

/// Reads the transport header.
#[inline(always)]
pub(crate) fn parse<A: Address>(
    network: &Network<A>,
    bytes: &[u8],
) -> Result<Transport, DropReason> {
    const MALFORMED: DropReason = DropReason::MalformedTransport;
    match network.protocol {
        protocol::TCP => {
            let header = bytes.first_chunk::<TCP_HEADER>().ok_or(MALFORMED)?;
            let header_len = usize::from(header[12] >> 4) * 4;
            if header_len < TCP_HEADER || header_len > bytes.len() {
                return Err(MALFORMED);
            }
            Ok(Transport {
                kind: Kind::Tcp,
                ports: u32::from_be_bytes([header[0], header[1], header[2], header[3]]),
            })
        }
        protocol::UDP => {
            let header = bytes.first_chunk::<UDP_HEADER>().ok_or(MALFORMED)?;
            let len = u32::from(u16::from_be_bytes([header[4], header[5]]));
            if len < 8 || len > network.transport_len() {
                return Err(MALFORMED);
            }
            Ok(Transport {
                kind: Kind::Udp,
                ports: u32::from_be_bytes([header[0], header[1], header[2], header[3]]),
            })
        }
        number if number == A::ICMP => {
            let header = bytes.first_chunk::<8>().ok_or(MALFORMED)?;
            let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
            let message = icmp::classify(A::FAMILY, header[0]);
            let (kind, ports) = match message {
                Message::Request => {
                    let selector = u32::from(u16::from_be_bytes([header[0], header[1]]));
                    (Kind::Request, id << 16 | selector)
                }
                Message::Reply(request) => {
                    let selector = u32::from(u16::from_be_bytes([request, header[1]]));
                    (Kind::Reply, selector << 16 | id)
                }
                Message::Error => (Kind::Error, u32::from(header[0]) << 8),
                Message::Other => (Kind::OtherIcmp, u32::from(header[0]) << 8),
            };
            Ok(Transport { kind, ports })
        }
        _ => Ok(Transport {
            kind: Kind::Other,
            ports: 0,
        }),
    }
}

impl Transport {
    /// How rules see a packet of a client.
    #[inline]
    pub(crate) fn upper<A: Address>(&self, network: &Network<A>) -> UpperLayer {
        if network.opaque {
            return UpperLayer::Unknown;
        }
        let port = super::low16(self.ports);
        match self.kind {
            Kind::Tcp => UpperLayer::Tcp { port },
            Kind::Udp => UpperLayer::Udp { port },
            Kind::Other => UpperLayer::Other,
            Kind::Request | Kind::Reply | Kind::Error | Kind::OtherIcmp => {
                let [icmp_type, _] = port.to_be_bytes();
                UpperLayer::Icmp { icmp_type }
            }
        }
    }
}

/// Where the checksum field of a protocol is that covers the addresses, if it has one.
pub(crate) const fn checksum_offset(family: Family, number: u8) -> Option<usize> {
    match (family, number) {
        (_, protocol::TCP) => Some(16),
        (_, protocol::UDP | protocol::UDP_LITE | protocol::DCCP) => Some(6),
        (Family::Ipv6, protocol::ICMPV6) => Some(2),
        _ => None,
    }
}

/// The sum of the pseudo-header.
#[inline]
pub(crate) fn pseudo_sum<A: Address>(src: A, dst: A, number: u8, len: u32) -> u64 {
    src.sum() + dst.sum() + u64::from(number) + u64::from(len)
}

/// Whether the checksum of a transport of `len` bytes that is wholly in `bytes` is right. True if there
/// is none.
#[inline(always)]
pub(crate) fn checksum_is_right<A: Address>(
    (src, dst): (A, A),
    number: u8,
    len: u32,
    bytes: &[u8],
) -> bool {
    let (pseudo, covered) = match number {
        protocol::TCP | protocol::ICMPV6 => (pseudo_sum(src, dst, number, len), bytes),
        protocol::UDP => {
            // UDP counts its own length, which may leave bytes of the packet over.
            let len = super::get_u16(bytes, 4).unwrap_or(0);
            if super::get_u16(bytes, 6) == Some(0) {
                // No checksum. Tunnels may do so over IPv6 too (RFC 6935); it is the receiver's choice.
                return true;
            }
            let covered = bytes.get(..usize::from(len)).unwrap_or(bytes);
            (pseudo_sum(src, dst, number, u32::from(len)), covered)
        }
        protocol::ICMP => (0, bytes),
        _ => return true,
    };
    checksum::is_right(pseudo, covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ipv4::Fragment;

    fn network(protocol: u8, len: u32) -> Network<u32> {
        Network {
            src: 0x0a89_000a,
            dst: 0x0102_0304,
            protocol,
            ttl: 64,
            dont_fragment: false,
            source_routed: false,
            opaque: false,
            header_len: 20,
            total_len: 20 + len,
            is_fragment: false,
            fragment: Fragment::default(),
        }
    }

    #[test]
    fn reply_has_the_selectors_of_its_request_exchanged() {
        let request = parse(&network(1, 8), &[8, 0, 0, 0, 0, 7, 0, 1]).unwrap();
        let reply = parse(&network(1, 8), &[0, 0, 0, 0, 0, 7, 0, 1]).unwrap();
        assert_eq!((request.kind, reply.kind), (Kind::Request, Kind::Reply));
        assert_eq!(request.ports, swapped(reply.ports));
    }

    #[test]
    fn lengths_that_contradict_the_packet_are_malformed() {
        let mut tcp = [0; 20];
        tcp[12] = 0x40;
        assert!(parse(&network(6, 20), &tcp).is_err());
        tcp[12] = 0x60;
        assert!(parse(&network(6, 20), &tcp).is_err());
        assert!(parse(&network(17, 8), &[0, 1, 0, 2, 0, 9, 0, 0]).is_err());
        assert!(parse(&network(17, 8), &[0, 1, 0, 2, 0, 7, 0, 0]).is_err());
        assert!(parse(&network(17, 8), &[0, 1, 0, 2, 0, 8, 0, 0]).is_ok());
    }

    #[test]
    fn udp_checksum_is_verified() {
        // 10.137.0.10 -> 1.2.3.4, ports 5000 and 99, no payload.
        let network = network(17, 8);
        let checksum_is_right = |network: &Network<u32>, bytes: &[u8]| {
            checksum_is_right(
                (network.src, network.dst),
                17,
                network.transport_len(),
                bytes,
            )
        };
        let mut datagram = [0x13, 0x88, 0, 0x63, 0, 8, 0, 0];
        assert!(checksum_is_right(&network, &datagram));
        let field = checksum::field(checksum::add_bytes(
            pseudo_sum(network.src, network.dst, 17, 8),
            &datagram,
        ));
        super::super::put_u16(&mut datagram, 6, field);
        assert!(checksum_is_right(&network, &datagram));
        super::super::put_u16(&mut datagram, 6, field ^ 1);
        assert!(!checksum_is_right(&network, &datagram));
    }
}
