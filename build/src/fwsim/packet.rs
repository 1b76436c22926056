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
use etherparse::{Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket, TransportSlice};
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
        let Ok(sliced) = LaxSlicedPacket::from_ethernet(frame) else {
            return Self::Other;
        };
        let upper = sliced.transport.as_ref().map_or(Upper::Other, upper);
        let (src, dst, fragment) = match sliced.net {
            Some(LaxNetSlice::Arp(_)) => return Self::Arp,
            None => return Self::Other,
            Some(LaxNetSlice::Ipv4(ip)) => {
                let header = ip.header();
                let src = IpAddr::V4(header.source_addr());
                let dst = IpAddr::V4(header.destination_addr());
                let datagram = Datagram {
                    src,
                    dst,
                    id: header.identification().into(),
                    protocol: header.protocol().0,
                };
                (
                    src,
                    dst,
                    header.is_fragmenting_payload().then_some(datagram),
                )
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let header = ip.header();
                let src = IpAddr::V6(header.source_addr());
                let dst = IpAddr::V6(header.destination_addr());
                let mut extensions = ip.extensions().clone().into_iter();
                let id = extensions.find_map(|extension| match extension {
                    Ipv6ExtensionSlice::Fragment(fragment) => Some(fragment.identification()),
                    _ => None,
                });
                let datagram = id.map(|id| Datagram {
                    src,
                    dst,
                    id,
                    protocol: 0,
                });
                (src, dst, datagram)
            }
        };
        Self::Ip(Packet {
            src,
            dst,
            upper,
            fragment,
        })
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

fn upper(transport: &TransportSlice<'_>) -> Upper {
    let id = |is_query: bool, bytes: [u8; 4]| {
        let [high, low, ..] = bytes;
        is_query.then(|| u16::from_be_bytes([high, low]))
    };
    match transport {
        TransportSlice::Tcp(tcp) => Upper::Ports(tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => Upper::Ports(udp.source_port(), udp.destination_port()),
        TransportSlice::Icmpv4(icmp) => {
            let number = icmp.type_u8();
            let is_query = matches!(number, 0 | 8 | 13..=18);
            Upper::Icmp(number, icmp.code_u8(), id(is_query, icmp.bytes5to8()))
        }
        TransportSlice::Icmpv6(icmp) => {
            let number = icmp.type_u8();
            let is_query = matches!(number, 128 | 129);
            Upper::Icmp(number, icmp.code_u8(), id(is_query, icmp.bytes5to8()))
        }
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
