//! Building frames and looking at them, for the engine's tests. Shares no code with the engine: the
//! checksum here goes one word at a time, headers are written byte by byte.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::{Checksum, ClientId, Engine, Frame, Iface, Time, Verdict};

pub(crate) type Mac = [u8; 6];
pub(crate) const GATEWAY: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
pub(crate) const CLIENT_MAC: Mac = [0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x00];

/// The ones' complement sum, one word at a time.
pub(crate) fn ones_sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    u16::try_from(sum).unwrap()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(own) => own.octets().to_vec(),
        IpAddr::V6(own) => own.octets().to_vec(),
    }
}

/// Protocol numbers whose checksum covers a pseudo-header, with the offset of the field.
fn checksum_at(v6: bool, protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(16),
        17 => Some(6),
        1 if !v6 => Some(2),
        58 if v6 => Some(2),
        _ => None,
    }
}

/// The sum of a transport with its pseudo-header.
pub(crate) fn transport_sum(src: IpAddr, dst: IpAddr, protocol: u8, transport: &[u8]) -> u16 {
    let len = u32::try_from(transport.len()).unwrap().to_be_bytes();
    if protocol == 1 {
        return ones_sum(&[transport]);
    }
    ones_sum(&[
        &octets(src),
        &octets(dst),
        &[0, 0, 0, protocol],
        &len,
        transport,
    ])
}

/// Puts the right checksum into a transport.
pub(crate) fn fill_checksum(src: IpAddr, dst: IpAddr, protocol: u8, transport: &mut [u8]) {
    let Some(at) = checksum_at(src.is_ipv6(), protocol) else {
        return;
    };
    transport[at..at + 2].fill(0);
    let field = !transport_sum(src, dst, protocol, transport);
    let field = if field == 0 && protocol == 17 {
        0xffff
    } else {
        field
    };
    transport[at..at + 2].copy_from_slice(&field.to_be_bytes());
}

pub(crate) fn tcp(
    sport: u16,
    dport: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(sport.to_be_bytes());
    bytes.extend(dport.to_be_bytes());
    bytes.extend(seq.to_be_bytes());
    bytes.extend(ack.to_be_bytes());
    bytes.extend([0x50, flags]);
    bytes.extend(502_u16.to_be_bytes());
    bytes.extend([0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}

pub(crate) fn udp(sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(sport.to_be_bytes());
    bytes.extend(dport.to_be_bytes());
    bytes.extend(u16::try_from(payload.len() + 8).unwrap().to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

pub(crate) fn icmp(icmp_type: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![icmp_type, code, 0, 0];
    bytes.extend(rest);
    bytes.extend(payload);
    bytes
}

/// An IP packet under construction.
#[derive(Clone, Debug)]
pub(crate) struct Ip {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    /// Offset in bytes, and whether more follow.
    pub(crate) fragment: Option<(u16, bool)>,
    /// IPv4 options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    /// IPv6 extension headers: number and bytes; the first byte of each is filled in.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) transport: Vec<u8>,
}

impl Ip {
    /// A packet with the right transport checksum.
    pub(crate) fn new(src: IpAddr, dst: IpAddr, protocol: u8, mut transport: Vec<u8>) -> Self {
        fill_checksum(src, dst, protocol, &mut transport);
        Self {
            src,
            dst,
            protocol,
            ttl: 64,
            id: 0x1234,
            dont_fragment: false,
            fragment: None,
            options: Vec::new(),
            extensions: Vec::new(),
            transport,
        }
    }

    pub(crate) fn packet(&self) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.packet4(src, dst),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.packet6(src, dst),
            _ => panic!("addresses of one family"),
        }
    }

    fn packet4(&self, src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let total = u16::try_from(header_len + self.transport.len()).unwrap();
        let mut bytes = vec![0x40 | u8::try_from(header_len / 4).unwrap(), 0];
        bytes.extend(total.to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        let (offset, more) = self.fragment.unwrap_or((0, false));
        let flags = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | (offset / 8);
        bytes.extend(flags.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(&self.options);
        let field = !ones_sum(&[&bytes]);
        bytes[10..12].copy_from_slice(&field.to_be_bytes());
        bytes.extend(&self.transport);
        bytes
    }

    fn packet6(&self, src: Ipv6Addr, dst: Ipv6Addr) -> Vec<u8> {
        let mut numbers: Vec<u8> = self.extensions.iter().map(|(number, _)| *number).collect();
        let mut extensions: Vec<Vec<u8>> = self
            .extensions
            .iter()
            .map(|(_, bytes)| bytes.clone())
            .collect();
        if let Some((offset, more)) = self.fragment {
            numbers.push(44);
            let [high, low] = (offset | u16::from(more)).to_be_bytes();
            let [a, b] = self.id.to_be_bytes();
            extensions.push(vec![0, 0, high, low, 0, 0, a, b]);
        }
        numbers.push(self.protocol);
        for (bytes, next) in extensions.iter_mut().zip(&numbers[1..]) {
            bytes[0] = *next;
        }
        let payload: Vec<u8> = extensions
            .concat()
            .into_iter()
            .chain(self.transport.clone())
            .collect();
        let mut bytes = vec![0x60, 0, 0, 0];
        bytes.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend([numbers[0], self.ttl]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(payload);
        bytes
    }

    /// Ethernet frame with these addresses.
    pub(crate) fn frame(&self, destination: Mac, source: Mac) -> Vec<u8> {
        let ethertype: [u8; 2] = if self.src.is_ipv6() {
            [0x86, 0xdd]
        } else {
            [8, 0]
        };
        [&destination[..], &source, &ethertype, &self.packet()].concat()
    }

    /// The packet in fragments of at most `size` bytes of payload.
    pub(crate) fn fragments(&self, size: usize) -> Vec<Self> {
        let count = self.transport.len().div_ceil(size);
        self.transport
            .chunks(size)
            .enumerate()
            .map(|(number, payload)| Self {
                fragment: Some((u16::try_from(number * size).unwrap(), number + 1 < count)),
                transport: payload.to_vec(),
                ..self.clone()
            })
            .collect()
    }
}

/// A frame that was taken apart, with its checksums verified.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) mac_to: Mac,
    pub(crate) mac_from: Mac,
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    pub(crate) dont_fragment: bool,
    pub(crate) fragment: Option<(u16, bool)>,
    pub(crate) transport: Vec<u8>,
    pub(crate) total_len: usize,
}

impl Seen {
    pub(crate) fn port(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.transport[at], self.transport[at + 1]])
    }

    pub(crate) fn sport(&self) -> u16 {
        self.port(0)
    }

    pub(crate) fn dport(&self) -> u16 {
        self.port(2)
    }
}

/// Takes a frame apart. Panics if any checksum or length in it is wrong.
pub(crate) fn see(frame: &[u8]) -> Seen {
    let mac = |at: usize| -> Mac { frame[at..at + 6].try_into().unwrap() };
    let packet = &frame[14..];
    let mut seen = match frame[12..14] {
        [8, 0] => see4(packet),
        [0x86, 0xdd] => see6(packet),
        _ => panic!("not an IP frame: {frame:x?}"),
    };
    seen.mac_to = mac(0);
    seen.mac_from = mac(6);
    assert_eq!(
        seen.total_len,
        packet.len(),
        "frame and packet differ in length"
    );
    if seen.fragment.is_none() {
        assert_transport(&seen);
    }
    seen
}

/// Panics if the transport checksum is wrong.
pub(crate) fn assert_transport(seen: &Seen) {
    let Some(at) = checksum_at(seen.src.is_ipv6(), seen.protocol) else {
        return;
    };
    if seen.protocol == 17 && seen.port(at) == 0 {
        return;
    }
    let sum = transport_sum(seen.src, seen.dst, seen.protocol, &seen.transport);
    assert_eq!(sum, 0xffff, "wrong transport checksum: {seen:?}");
}

fn see4(packet: &[u8]) -> Seen {
    let header_len = usize::from(packet[0] & 0xf) * 4;
    assert_eq!(packet[0] >> 4, 4);
    assert_eq!(
        ones_sum(&[&packet[..header_len]]),
        0xffff,
        "wrong header checksum"
    );
    let flags = u16::from_be_bytes([packet[6], packet[7]]);
    let fragment = (flags & 0x3fff != 0).then_some(((flags & 0x1fff) * 8, flags & 0x2000 != 0));
    let address = |at: usize| {
        let octets: [u8; 4] = packet[at..at + 4].try_into().unwrap();
        IpAddr::from(octets)
    };
    Seen {
        mac_to: [0; 6],
        mac_from: [0; 6],
        src: address(12),
        dst: address(16),
        protocol: packet[9],
        ttl: packet[8],
        dont_fragment: flags & 0x4000 != 0,
        fragment,
        transport: packet[header_len..].to_vec(),
        total_len: usize::from(u16::from_be_bytes([packet[2], packet[3]])),
    }
}

fn see6(packet: &[u8]) -> Seen {
    assert_eq!(packet[0] >> 4, 6);
    let address = |at: usize| {
        let octets: [u8; 16] = packet[at..at + 16].try_into().unwrap();
        IpAddr::from(octets)
    };
    let mut protocol = packet[6];
    let mut at = 40;
    let mut fragment = None;
    while [0, 43, 44, 60].contains(&protocol) {
        let len = if protocol == 44 {
            8
        } else {
            8 + usize::from(packet[at + 1]) * 8
        };
        if protocol == 44 {
            let offset = u16::from_be_bytes([packet[at + 2], packet[at + 3]]);
            fragment = Some((offset & !7, offset & 1 != 0));
        }
        protocol = packet[at];
        at += len;
    }
    Seen {
        mac_to: [0; 6],
        mac_from: [0; 6],
        src: address(8),
        dst: address(24),
        protocol,
        ttl: packet[7],
        dont_fragment: true,
        fragment,
        transport: packet[at..].to_vec(),
        total_len: 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
    }
}

/// What the engine did with a frame.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    /// Every frame that left, and where.
    pub(crate) sent: Vec<(Iface, Vec<u8>)>,
}

impl Outcome {
    /// The only frame that left.
    pub(crate) fn only(&self) -> (Iface, Seen) {
        assert_eq!(self.sent.len(), 1, "{self:?}");
        (self.sent[0].0, see(&self.sent[0].1))
    }
}

/// Gives a frame to the engine and collects everything that leaves. Blank checksums are completed.
pub(crate) fn run(engine: &mut Engine, ingress: Iface, frame: &[u8], now: Time) -> Outcome {
    let mut bytes = frame.to_vec();
    let (verdict, len) = {
        let mut frame = Frame::whole(&mut bytes);
        let verdict = engine.process(ingress, &mut frame, now);
        assert_ne!(frame.checksum, Checksum::Blank);
        (verdict, frame.len)
    };
    let mut sent = Vec::new();
    if let Verdict::Forward { egress } = verdict {
        bytes.truncate(usize::try_from(len).unwrap());
        sent.push((egress, bytes));
    }
    sent.extend(drain(engine));
    Outcome { verdict, sent }
}

/// Everything in the outbox.
pub(crate) fn drain(engine: &mut Engine) -> Vec<(Iface, Vec<u8>)> {
    let mut sent = Vec::new();
    while let Some(frame) = engine.next_generated() {
        sent.push((frame.egress, frame.bytes.to_vec()));
    }
    sent
}

pub(crate) fn client(id: u16) -> Iface {
    Iface::Client(ClientId(id))
}
