//! Frames of the workloads, byte by byte: the addresses, ports and headers of `performance.md` section 2.
//!
//! Written without detours: some workloads need millions of them under callgrind before they begin.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::GATEWAY_MAC;

pub(crate) const OWN_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];
pub(crate) const UPLINK4: Ipv4Addr = Ipv4Addr::new(10, 138, 0, 1);
pub(crate) const UPLINK6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, 0xa8a, 1);

/// 10.137.0.2, the first client's address.
pub(crate) const FIRST_CLIENT: u32 = 0x0a89_0002;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// Bytes of an IPv4 header.
const IPV4: usize = 20;

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
    address(FIRST_CLIENT + client, v6, false)
}

/// The sum of 32-bit words, which folds to that of 16-bit words.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    sum + u64::from(u32::from_be_bytes(last))
}

fn add_address(sum: u64, address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(own) => sum + u64::from(own.to_bits()),
        IpAddr::V6(own) => add(sum, &own.octets()),
    }
}

fn finish(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *field = value.to_be_bytes();
    }
}

/// A whole frame, to us on the side that it comes from. `transport` writes header and payload; the
/// checksum is added here.
pub(crate) fn frame(
    down: bool,
    (src, dst): (IpAddr, IpAddr),
    number: u8,
    transport: impl FnOnce(&mut Vec<u8>),
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96);
    let to = if down { OWN_MAC } else { GATEWAY_MAC };
    bytes.extend_from_slice(&to);
    bytes.extend_from_slice(&[2, 0, 0, 0, 0, 1]);
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, number, 0, 0]);
            bytes.extend_from_slice(&src.octets());
            bytes.extend_from_slice(&dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, number, 64]);
            bytes.extend_from_slice(&src.octets());
            bytes.extend_from_slice(&dst.octets());
        }
        _ => {}
    }
    let start = bytes.len();
    transport(&mut bytes);
    let len = bytes.len() - start;
    let mut sum = add(0, bytes.get(start..).unwrap_or_default());
    if number != ICMP {
        // ICMP over IPv4 has no pseudo-header.
        sum = add_address(add_address(sum, src), dst) + u64::from(number);
        sum += u64::try_from(len).unwrap_or(0);
    }
    let field = match number {
        TCP => 16,
        UDP => 6,
        _ => 2,
    };
    put(&mut bytes, start + field, finish(sum));
    if src.is_ipv4() {
        put(&mut bytes, ETHERNET + 2, low16(len + IPV4));
        finish_header(&mut bytes);
    } else {
        put(&mut bytes, ETHERNET + 4, low16(len));
    }
    bytes
}

fn low16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(0)
}

/// Writes the checksum of a frame's IPv4 header.
fn finish_header(frame: &mut [u8]) {
    put(frame, ETHERNET + 10, 0);
    let sum = add(0, frame.get(ETHERNET..ETHERNET + IPV4).unwrap_or_default());
    put(frame, ETHERNET + 10, finish(sum));
}

/// Makes a frame of IPv4 say that its packet has `len` bytes.
pub(crate) fn pretend_len(frame: &mut [u8], len: u16) {
    put(frame, ETHERNET + 2, len);
    finish_header(frame);
}

/// Takes the checksum out of a UDP datagram over IPv4.
pub(crate) fn unsum(frame: &mut [u8]) {
    put(frame, ETHERNET + IPV4 + 6, 0);
}

/// The packet in a frame.
pub(crate) fn packet_in(frame: &[u8]) -> &[u8] {
    frame.get(ETHERNET..).unwrap_or_default()
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
    /// Writes header and payload, without a checksum.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        let ports = u32::from(self.ports.0) << 16 | u32::from(self.ports.1);
        bytes.extend_from_slice(&ports.to_be_bytes());
        bytes.extend_from_slice(&self.seq.to_be_bytes());
        bytes.extend_from_slice(&self.ack.to_be_bytes());
        let offset = if self.scaling { 0x60 } else { 0x50 };
        bytes.extend_from_slice(&[offset, self.flags, 1, 0xf6, 0, 0, 0, 0]);
        if self.scaling {
            bytes.extend_from_slice(&[3, 3, 7, 1]);
        }
        bytes.resize(bytes.len() + self.payload, 0x61);
    }
}

/// Writes a datagram without a checksum.
pub(crate) fn datagram(bytes: &mut Vec<u8>, ports: (u16, u16), payload: usize) {
    let ports = u32::from(ports.0) << 16 | u32::from(ports.1);
    bytes.extend_from_slice(&ports.to_be_bytes());
    bytes.extend_from_slice(&low16(payload + 8).to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.resize(bytes.len() + payload, 0x61);
}

/// A fragment of a frame of IPv4: `from..to` of what follows its header.
pub(crate) fn fragment(frame: &[u8], from: usize, to: usize, id: u16) -> Vec<u8> {
    let (header, payload) = frame.split_at_checked(ETHERNET + IPV4).unwrap_or_default();
    let more = to < payload.len();
    let part = payload.get(from..to.min(payload.len())).unwrap_or_default();
    let offset = low16(from / 8) | u16::from(more) << 13;
    let mut bytes = [header, part].concat();
    put(&mut bytes, ETHERNET + 2, low16(IPV4 + part.len()));
    put(&mut bytes, ETHERNET + 4, id);
    put(&mut bytes, ETHERNET + 6, offset);
    finish_header(&mut bytes);
    bytes
}
