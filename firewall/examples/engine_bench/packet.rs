//! Frames of the workloads, byte by byte: the addresses, ports and headers of `performance.md` section 2.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::GATEWAY_MAC;

pub(crate) const OWN_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];
pub(crate) const UPLINK4: Ipv4Addr = Ipv4Addr::new(10, 138, 0, 1);
pub(crate) const UPLINK6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, 0xa8a, 1);

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

pub(crate) fn address(low: u32, v6: bool, server: bool) -> IpAddr {
    if !v6 {
        return IpAddr::V4(Ipv4Addr::from_bits(low));
    }
    let [a, b] = [low >> 16, low & 0xffff].map(|part| u16::try_from(part).unwrap_or(0));
    IpAddr::V6(if server {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, a, b)
    } else {
        Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, a, b)
    })
}

pub(crate) fn source(client: u32, v6: bool) -> IpAddr {
    address(0x0a89_0002 + client, v6, false)
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for pair in parts.concat().chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(pair.first().copied().unwrap_or(0)) << 8 | u64::from(low);
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap_or(0)
}

pub(crate) fn packet(src: IpAddr, dst: IpAddr, number: u8, mut transport: Vec<u8>) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(own) => own.octets().to_vec(),
        IpAddr::V6(own) => own.octets().to_vec(),
    };
    let len = u16::try_from(transport.len()).unwrap_or(0);
    let at = match number {
        TCP => 16,
        UDP => 6,
        _ => 2,
    };
    let pseudo = match number {
        // ICMP over IPv4 has no pseudo-header.
        ICMP => Vec::new(),
        _ => [
            octets(src),
            octets(dst),
            vec![0, number],
            len.to_be_bytes().to_vec(),
        ]
        .concat(),
    };
    let field = (!sum(&[&pseudo, &transport])).to_be_bytes();
    for (to, from) in transport.iter_mut().skip(at).zip(field) {
        *to = from;
    }
    let mut header = if src.is_ipv4() {
        let mut header = vec![0x45, 0];
        header.extend((len + 20).to_be_bytes());
        header.extend([0, 1, 0x40, 0, 64, number, 0, 0]);
        header
    } else {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(len.to_be_bytes());
        header.extend([number, 64]);
        header
    };
    header.extend(octets(src));
    header.extend(octets(dst));
    if src.is_ipv4() {
        let field = (!sum(&[&header])).to_be_bytes();
        for (to, from) in header.iter_mut().skip(10).zip(field) {
            *to = from;
        }
    }
    [header, transport].concat()
}

/// The checksum field for these bytes.
pub(crate) fn field(bytes: &[u8]) -> u16 {
    !sum(&[bytes])
}

/// The server of flow `i`.
pub(crate) fn server(i: u32, v6: bool) -> IpAddr {
    let low = 0x5d00_0001 + ((7919_u32.wrapping_mul(i) & 0x7ffe) | ((i >> 15) << 15));
    address(low, v6, true)
}

/// The source port of flow `i`.
pub(crate) fn port(i: u32) -> u16 {
    1024 + u16::try_from(i & 0x7fff).unwrap_or(0)
}

/// A TCP segment.
pub(crate) struct Segment {
    pub(crate) ports: (u16, u16),
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) payload: usize,
    /// Whether it announces window scaling by seven, so that its window of 502 means 64 KiB.
    pub(crate) scaling: bool,
}

impl Segment {
    /// Header and payload, without a checksum.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.ports.0.to_be_bytes());
        bytes.extend(self.ports.1.to_be_bytes());
        bytes.extend(self.seq.to_be_bytes());
        bytes.extend(self.ack.to_be_bytes());
        let offset = if self.scaling { 0x60 } else { 0x50 };
        bytes.extend([offset, self.flags, 1, 0xf6, 0, 0, 0, 0]);
        if self.scaling {
            bytes.extend([3, 3, 7, 1]);
        }
        bytes.resize(bytes.len() + self.payload, 0x61);
        bytes
    }
}

/// A datagram without a checksum.
pub(crate) fn datagram(ports: (u16, u16), payload: usize) -> Vec<u8> {
    let len = u16::try_from(payload + 8).unwrap_or(0);
    let mut bytes = Vec::new();
    bytes.extend(ports.0.to_be_bytes());
    bytes.extend(ports.1.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.resize(bytes.len() + payload, 0x61);
    bytes
}

/// The Ethernet frame around a packet, to us on the side that it comes from.
pub(crate) fn frame(down: bool, packet: &[u8]) -> Vec<u8> {
    let to = if down { OWN_MAC } else { GATEWAY_MAC };
    let version = packet.first().copied().unwrap_or(0) >> 4;
    let ethertype = if version == 6 { [0x86, 0xdd] } else { [8, 0] };
    [&to[..], &[2, 0, 0, 0, 0, 1], &ethertype, packet].concat()
}

/// Turns a packet of IPv4 into a fragment of itself: `from..to` of what follows its header.
pub(crate) fn fragment(packet: &[u8], from: usize, to: usize, id: u16) -> Vec<u8> {
    let (header, payload) = packet.split_at_checked(20).unwrap_or_default();
    let more = to < payload.len();
    let part = payload.get(from..to.min(payload.len())).unwrap_or_default();
    let offset = u16::try_from(from / 8).unwrap_or(0) | u16::from(more) << 13;
    let mut header = header.to_vec();
    let total = u16::try_from(20 + part.len()).unwrap_or(0);
    let fields = [total.to_be_bytes(), id.to_be_bytes(), offset.to_be_bytes()].concat();
    header.splice(2..8, fields);
    header.splice(10..12, [0, 0]);
    let field = !sum(&[&header]);
    header.splice(10..12, field.to_be_bytes());
    [&header, part].concat()
}
