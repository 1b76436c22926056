//! What a frame is, for reports, and what a capture does not say about it.
//!
//! # Offload in captures
//!
//! On a virtual interface the sender may leave the checksum of TCP or UDP unfinished and hand over TCP packets larger than
//! the MTU; the driver says so beside the frame, and a capture does not keep that. Both can be told: an unfinished checksum
//! field holds the sum of the pseudo header, which a complete one has once in 65,536 cases. So such a field counts as
//! unfinished ([`Checksum::Blank`]), and a TCP packet that has it and is larger than the MTU as one to be cut into
//! segments. Any other wrong checksum is wrong, and any other large packet is too large.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    EtherType, Ethernet2HeaderSlice, Ipv4HeaderSlice, Ipv6HeaderSlice, LaxNetSlice,
    LaxSlicedPacket, TransportSlice,
};
use firewall::config::DEFAULT_MTU;
use firewall::rule::Family;
use firewall::{Checksum, Gso, GsoFamily};

/// What identifies the datagram of a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// 0 over IPv6, where it does not count.
    protocol: u8,
}

impl Datagram {
    /// How long the engine waits for the rest of it, in nanoseconds (`qubes-policy.md` 3.8).
    #[must_use]
    pub const fn patience(&self) -> u64 {
        match self.src {
            IpAddr::V4(_) => 30_000_000_000,
            IpAddr::V6(_) => 60_000_000_000,
        }
    }
}

/// What a transport says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Upper {
    /// TCP or UDP: source and destination port.
    Ports(u16, u16),
    /// ICMP in either family: type, code, and the identifier of a query.
    Icmp(u8, u8, Option<u16>),
    /// Something else, or not to be seen.
    Other,
}

/// The readable parts of an IP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Its source.
    pub src: IpAddr,
    /// Its destination.
    pub dst: IpAddr,
    /// What it carries.
    pub upper: Upper,
    /// Set if it is a fragment.
    pub fragment: Option<Datagram>,
}

/// What is in a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// An IP packet.
    Ip(Packet),
    /// ARP.
    Arp,
    /// Anything else, or damaged.
    Other,
}

impl Content {
    /// Looks into a frame.
    #[must_use]
    pub fn of(frame: &[u8]) -> Self {
        let Ok(ethernet) = Ethernet2HeaderSlice::from_slice(frame) else {
            return Self::Other;
        };
        let packet = frame.get(ethernet.slice().len()..).unwrap_or_default();
        let packet = match ethernet.ether_type() {
            EtherType::ARP => return Self::Arp,
            EtherType::IPV4 => ipv4(packet),
            EtherType::IPV6 => ipv6(packet),
            _ => None,
        };
        packet.map_or(Self::Other, Self::Ip)
    }

    /// The IP packet, if it is one.
    #[must_use]
    pub const fn packet(&self) -> Option<&Packet> {
        match self {
            Self::Ip(packet) => Some(packet),
            _ => None,
        }
    }

    /// The datagram that it is a fragment of.
    #[must_use]
    pub fn fragment(&self) -> Option<Datagram> {
        self.packet()?.fragment
    }

    /// The family of an IP packet.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        self.packet().map(|packet| match packet.src {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        })
    }
}

fn ipv4(packet: &[u8]) -> Option<Packet> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let src = IpAddr::V4(header.source_addr());
    let dst = IpAddr::V4(header.destination_addr());
    let datagram = Datagram {
        src,
        dst,
        id: header.identification().into(),
        protocol: header.protocol().0,
    };
    let starts_transport = header.fragments_offset().value() == 0;
    let end = usize::from(header.total_len()).min(packet.len());
    let transport = packet.get(header.slice().len()..end).unwrap_or_default();
    Some(Packet {
        src,
        dst,
        upper: if starts_transport {
            upper(header.protocol().0, transport)
        } else {
            Upper::Other
        },
        fragment: header.is_fragmenting_payload().then_some(datagram),
    })
}

/// The number of the fragment header (RFC 8200 4.5).
const FRAGMENT: u8 = 44;

/// Extension headers are taken in any order, as the engine takes them.
fn ipv6(packet: &[u8]) -> Option<Packet> {
    let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
    let src = IpAddr::V6(header.source_addr());
    let dst = IpAddr::V6(header.destination_addr());
    let end = usize::from(header.payload_length()) + header.slice().len();
    let packet = packet.get(..end).unwrap_or(packet);
    let mut next = header.next_header().0;
    let mut rest = packet.get(header.slice().len()..).unwrap_or_default();
    let mut fragment = None;
    let mut starts_transport = true;
    while let Some((start, _)) = rest.split_first_chunk::<8>() {
        let [following, len, high, low, id @ ..] = *start;
        let len = match next {
            // Hop-by-hop options, routing, destination options: in units of eight bytes.
            0 | 43 | 60 => usize::from(len) * 8 + 8,
            // Authentication: in units of four.
            51 => usize::from(len) * 4 + 8,
            FRAGMENT => {
                let place = u16::from_be_bytes([high, low]);
                starts_transport &= place & !7 == 0;
                // One that is the whole of its datagram is none (RFC 6946).
                if fragment.is_none() && place & !6 != 0 {
                    fragment = Some(Datagram {
                        src,
                        dst,
                        id: u32::from_be_bytes(id),
                        protocol: 0,
                    });
                }
                8
            }
            _ => break,
        };
        next = following;
        rest = rest.get(len..).unwrap_or_default();
    }
    Some(Packet {
        src,
        dst,
        upper: if starts_transport {
            upper(next, rest)
        } else {
            Upper::Other
        },
        fragment,
    })
}

/// What the start of a transport says.
fn upper(protocol: u8, bytes: &[u8]) -> Upper {
    let Some([a, b, c, d]) = bytes.first_chunk::<4>().copied() else {
        return Upper::Other;
    };
    let id = |is_query: bool| match bytes.get(4..6) {
        Some([high, low]) if is_query => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    };
    match protocol {
        6 | 17 => Upper::Ports(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
        1 => Upper::Icmp(a, b, id(matches!(a, 0 | 8 | 13..=18))),
        58 => Upper::Icmp(a, b, id(matches!(a, 128 | 129))),
        _ => Upper::Other,
    }
}

/// What the driver would have said about checksum and segmentation of a captured frame.
#[must_use]
pub fn offload(frame: &[u8]) -> (Checksum, Option<Gso>) {
    unfinished(frame).unwrap_or((Checksum::Unverified, None))
}

/// `None` if the frame is as it would be on a wire.
fn unfinished(frame: &[u8]) -> Option<(Checksum, Option<Gso>)> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let (transport, number, field, header_len) = match sliced.transport? {
        TransportSlice::Tcp(tcp) => (
            tcp.slice(),
            6,
            tcp.checksum(),
            usize::from(tcp.data_offset()) * 4,
        ),
        // Zero means that there is none.
        TransportSlice::Udp(udp) if udp.checksum() != 0 => (udp.slice(), 17, udp.checksum(), 8),
        _ => return None,
    };
    let len = u32::try_from(transport.len()).ok()?;
    let mut pseudo = Sum16BitWords::new();
    pseudo = pseudo.add_2bytes([0, number]);
    pseudo = pseudo.add_4bytes(len.to_be_bytes());
    let (total_len, family) = match sliced.net? {
        LaxNetSlice::Ipv4(ip) if !ip.payload().incomplete => {
            let header = ip.header();
            pseudo = pseudo.add_4bytes(header.source());
            pseudo = pseudo.add_4bytes(header.destination());
            (usize::from(header.total_len()), GsoFamily::V4)
        }
        LaxNetSlice::Ipv6(ip) if !ip.payload().incomplete => {
            let header = ip.header();
            pseudo = pseudo.add_16bytes(header.source());
            pseudo = pseudo.add_16bytes(header.destination());
            (usize::from(header.payload_length()) + 40, GsoFamily::V6)
        }
        _ => return None,
    };
    let blank = !pseudo.ones_complement().to_be();
    let is_complete = pseudo.add_slice(transport).ones_complement() == 0;
    if is_complete || field != blank {
        return None;
    }
    let headers = total_len.checked_sub(transport.len())? + header_len;
    let is_large = number == 6 && total_len > usize::from(DEFAULT_MTU);
    let mss = u16::try_from(usize::from(DEFAULT_MTU).checked_sub(headers)?).ok()?;
    Some((Checksum::Blank, is_large.then_some(Gso { mss, family })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

    fn tcp(v6: bool, payload: usize) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
        let ip = if v6 {
            ethernet.ipv6([1; 16], [2; 16], 64)
        } else {
            ethernet.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        };
        let mut frame = Vec::new();
        let builder = ip.tcp(1000, 80, 1, 1000);
        builder.write(&mut frame, &vec![7; payload]).unwrap();
        frame
    }

    /// Puts the sum of the pseudo header in the checksum field, as a driver gets it: computed here a second time.
    fn blank(frame: &mut [u8], v6: bool) {
        let (addresses, at) = if v6 { (22..54, 54) } else { (26..34, 34) };
        let mut sum = 6 + u32::try_from(frame.len() - at).unwrap();
        for pair in frame[addresses].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let sum = u16::try_from(sum).unwrap().to_be_bytes();
        frame[at + 16..at + 18].copy_from_slice(&sum);
    }

    #[test]
    fn complete_and_wrong_checksums_are_what_they_are() {
        let mut frame = tcp(false, 100);
        assert_eq!(offload(&frame), (Checksum::Unverified, None));
        frame[50] ^= 1;
        assert_eq!(offload(&frame), (Checksum::Unverified, None));
        frame[50..52].fill(0);
        assert_eq!(offload(&frame), (Checksum::Unverified, None));
        assert_eq!(offload(&tcp(false, 3000)), (Checksum::Unverified, None));
        assert_eq!(offload(&[]), (Checksum::Unverified, None));
    }

    #[test]
    fn unfinished_checksums_and_large_packets_are_told() {
        for (v6, family, mss) in [(false, GsoFamily::V4, 1460), (true, GsoFamily::V6, 1440)] {
            let mut frame = tcp(v6, 100);
            blank(&mut frame, v6);
            assert_eq!(offload(&frame), (Checksum::Blank, None));
            let mut frame = tcp(v6, 3000);
            blank(&mut frame, v6);
            let gso = Some(Gso { mss, family });
            assert_eq!(offload(&frame), (Checksum::Blank, gso));
        }
    }

    #[test]
    fn transport_is_found_behind_extension_headers_in_any_order() {
        let datagram = tcp(true, 0);
        let with = |first: u8, headers: &[[u8; 8]]| {
            let mut frame = datagram[..54].to_vec();
            frame[20] = first;
            frame[18..20].copy_from_slice(&[0, 20 + 8 * u8::try_from(headers.len()).unwrap()]);
            frame.extend(headers.concat());
            frame.extend(&datagram[54..]);
            Content::of(&frame)
        };
        let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
        let ports = Upper::Ports(1000, 80);
        for (first, headers) in [
            (0, [options(60), options(6)]),
            (60, [options(0), options(6)]),
            (44, [[43, 0, 0, 0, 0, 0, 0, 9], [6, 0, 0, 0, 0, 0, 0, 0]]),
        ] {
            let content = with(first, &headers);
            assert_eq!(content.packet().unwrap().upper, ports);
            assert_eq!(content.fragment(), None);
        }
        let later = with(60, &[options(44), [6, 0, 0, 8, 0, 0, 0, 9]]);
        assert_eq!(later.packet().unwrap().upper, Upper::Other);
        assert!(later.fragment().is_some());
    }

    #[test]
    fn fragments_of_a_datagram_have_one_identity() {
        let mut first = tcp(false, 24);
        first[20] = 0x20;
        let mut last = first.clone();
        last[20..22].copy_from_slice(&[0, 3]);
        let datagram = Content::of(&first).fragment().unwrap();
        assert_eq!(Content::of(&last).fragment(), Some(datagram));
        last[19] ^= 1;
        assert_ne!(Content::of(&last).fragment(), Some(datagram));
        assert_eq!(Content::of(&tcp(false, 24)).fragment(), None);
        assert_eq!(Content::of(&first[..20]), Content::Other);
    }
}
