//! Packets as the generator thinks of them, and their bytes.
//!
//! A port that the translation chooses is not known when a packet is generated, and the kernel and the
//! engine may choose differently. Such a port is written as [`Selector::Outside`] and filled in when
//! the packet is made for one of the two. Shares no code with the engine.

use std::net::IpAddr;

/// IANA protocol numbers.
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

/// A port or an ICMP identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Selector {
    /// This number.
    Is(u16),
    /// What the flow of this number has outside of the translation.
    Outside(usize),
}

/// A TCP header.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    pub(crate) sport: Selector,
    pub(crate) dport: Selector,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: usize,
}

/// What an IP packet carries.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Tcp(Tcp),
    Udp {
        sport: Selector,
        dport: Selector,
        payload: usize,
        /// Leave the checksum out.
        unsummed: bool,
    },
    Icmp {
        kind: u8,
        code: u8,
        id: Selector,
        sequence: u16,
        payload: usize,
    },
    /// An ICMP error with the first `keep` bytes of the packet that it is about.
    Error {
        kind: u8,
        code: u8,
        rest: [u8; 4],
        quote: Box<Packet>,
        keep: usize,
    },
    /// Any other protocol.
    Raw(Vec<u8>),
}

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    None,
    TransportChecksum,
    HeaderChecksum,
}

/// How a datagram is cut.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    /// Bytes in each piece, a multiple of eight.
    pub(crate) size: usize,
    /// Which pieces are sent, in this order.
    pub(crate) order: Vec<usize>,
    /// This piece starts eight bytes early and so overlaps the one before.
    pub(crate) overlap: Option<usize>,
    /// The second eight bytes of this piece are sent again, as a piece of their own.
    pub(crate) again: Option<usize>,
}

/// An IP packet.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    /// IPv4 options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    /// IPv6 extension headers: number and bytes, of which the first is filled in.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) protocol: u8,
    pub(crate) body: Body,
    pub(crate) damage: Damage,
    pub(crate) split: Option<Split>,
    /// Bytes behind the packet that do not belong to it.
    pub(crate) padding: usize,
}

/// The sum of 16-bit words with the carry added back.
pub(crate) fn ones_sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(own) => own.octets().to_vec(),
        IpAddr::V6(own) => own.octets().to_vec(),
    }
}

/// Where the checksum of a transport is.
pub(crate) fn checksum_at(v6: bool, protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        ICMP if !v6 => Some(2),
        ICMPV6 if v6 => Some(2),
        _ => None,
    }
}

/// The sum of a transport with its pseudo-header.
pub(crate) fn transport_sum(src: IpAddr, dst: IpAddr, protocol: u8, bytes: &[u8]) -> u16 {
    if protocol == ICMP {
        return ones_sum(&[bytes]);
    }
    let len = u32::try_from(bytes.len()).unwrap_or(0).to_be_bytes();
    let last = [0, 0, 0, protocol];
    ones_sum(&[&octets(src), &octets(dst), &last, &len, bytes])
}

/// Bytes that show where they were cut.
fn filler(len: usize) -> Vec<u8> {
    (0_u8..251).cycle().take(len).collect()
}

impl Packet {
    /// A plain packet.
    pub(crate) fn new(src: IpAddr, dst: IpAddr, protocol: u8, body: Body) -> Self {
        Self {
            src,
            dst,
            ttl: 64,
            tos: 0,
            id: 0x1234,
            dont_fragment: false,
            options: Vec::new(),
            extensions: Vec::new(),
            protocol,
            body,
            damage: Damage::None,
            split: None,
            padding: 0,
        }
    }

    pub(crate) fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }

    /// The transport with its checksum.
    fn transport(&self, outside: &dyn Fn(usize) -> u16) -> Vec<u8> {
        let number = |selector: Selector| match selector {
            Selector::Is(number) => number,
            Selector::Outside(flow) => outside(flow),
        };
        let mut bytes = Vec::new();
        let mut summed = true;
        match &self.body {
            Body::Tcp(tcp) => {
                bytes.extend(number(tcp.sport).to_be_bytes());
                bytes.extend(number(tcp.dport).to_be_bytes());
                bytes.extend(tcp.seq.to_be_bytes());
                bytes.extend(tcp.ack.to_be_bytes());
                let words = u8::try_from(5 + tcp.options.len() / 4).unwrap_or(15);
                bytes.extend([words << 4, tcp.flags]);
                bytes.extend(tcp.window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(&tcp.options);
                bytes.extend(filler(tcp.payload));
            }
            Body::Udp {
                sport,
                dport,
                payload,
                unsummed,
            } => {
                bytes.extend(number(*sport).to_be_bytes());
                bytes.extend(number(*dport).to_be_bytes());
                let len = u16::try_from(payload + 8).unwrap_or(u16::MAX);
                bytes.extend(len.to_be_bytes());
                bytes.extend([0; 2]);
                bytes.extend(filler(*payload));
                summed = !unsummed;
            }
            Body::Icmp {
                kind,
                code,
                id,
                sequence,
                payload,
            } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(number(*id).to_be_bytes());
                bytes.extend(sequence.to_be_bytes());
                bytes.extend(filler(*payload));
            }
            Body::Error {
                kind,
                code,
                rest,
                quote,
                keep,
            } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(rest);
                let quoted = quote.whole(outside);
                bytes.extend(&quoted[..quoted.len().min(*keep)]);
            }
            Body::Raw(raw) => bytes.extend(raw),
        }
        if let Some(at) = checksum_at(self.is_v6(), self.protocol)
            && summed
            && bytes.len() >= at + 2
        {
            let mut field = !transport_sum(self.src, self.dst, self.protocol, &bytes);
            if field == 0 && self.protocol == UDP {
                field = 0xffff;
            }
            if self.damage == Damage::TransportChecksum {
                field ^= 0x5a5a;
                // Zero would say that there is none.
                field = field.max(1);
            }
            bytes[at..at + 2].copy_from_slice(&field.to_be_bytes());
        }
        bytes
    }

    /// The packet in one piece.
    fn whole(&self, outside: &dyn Fn(usize) -> u16) -> Vec<u8> {
        let transport = self.transport(outside);
        self.piece(&transport, None)
    }

    /// A packet with a part of the transport: its offset, and whether more follows.
    fn piece(&self, part: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        if self.is_v6() {
            self.piece6(part, fragment)
        } else {
            self.piece4(part, fragment)
        }
    }

    fn piece4(&self, part: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        let header = 20 + self.options.len();
        let total = u16::try_from(header + part.len()).unwrap_or(u16::MAX);
        let mut bytes = vec![0x40 | u8::try_from(header / 4).unwrap_or(15), self.tos];
        bytes.extend(total.to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        let (offset, more) = fragment.unwrap_or((0, false));
        let offset = u16::try_from(offset / 8).unwrap_or(0);
        let flags = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | offset;
        bytes.extend(flags.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(octets(self.src));
        bytes.extend(octets(self.dst));
        bytes.extend(&self.options);
        let mut field = !ones_sum(&[&bytes]);
        if self.damage == Damage::HeaderChecksum {
            field ^= 0x0101;
        }
        bytes[10..12].copy_from_slice(&field.to_be_bytes());
        bytes.extend(part);
        bytes.extend(vec![0; self.padding]);
        bytes
    }

    fn piece6(&self, part: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        let mut extensions = self.extensions.clone();
        if let Some((offset, more)) = fragment {
            let field = u16::try_from(offset).unwrap_or(0) | u16::from(more);
            let [high, low] = field.to_be_bytes();
            let [a, b] = self.id.to_be_bytes();
            extensions.push((44, vec![0, 0, high, low, 0, 0, a, b]));
        }
        let numbers: Vec<u8> = extensions.iter().map(|(number, _)| *number).collect();
        let following = numbers.iter().skip(1).chain([&self.protocol]);
        for ((_, bytes), next) in extensions.iter_mut().zip(following) {
            bytes[0] = *next;
        }
        let headers: Vec<u8> = extensions.into_iter().flat_map(|(_, own)| own).collect();
        let len = u16::try_from(headers.len() + part.len()).unwrap_or(u16::MAX);
        let mut bytes = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 0];
        bytes.extend(len.to_be_bytes());
        bytes.extend([*numbers.first().unwrap_or(&self.protocol), self.ttl]);
        bytes.extend(octets(self.src));
        bytes.extend(octets(self.dst));
        bytes.extend(headers);
        bytes.extend(part);
        bytes.extend(vec![0; self.padding]);
        bytes
    }

    /// What goes over the wire, one or more IP packets; `outside` knows the ports of flows.
    pub(crate) fn bytes(&self, outside: &dyn Fn(usize) -> u16) -> Vec<Vec<u8>> {
        let transport = self.transport(outside);
        let Some(split) = &self.split else {
            return vec![self.piece(&transport, None)];
        };
        let count = transport.len().div_ceil(split.size).max(1);
        let mut sent = Vec::new();
        for number in &split.order {
            let number = number % count;
            let early = if split.overlap == Some(number) && number > 0 {
                8
            } else {
                0
            };
            let from = number * split.size - early;
            let to = ((number + 1) * split.size).min(transport.len());
            sent.push(self.piece(&transport[from..to], Some((from, number + 1 < count))));
            if split.again == Some(number) && to - from > 16 {
                let part = &transport[from + 8..from + 16];
                sent.push(self.piece(part, Some((from + 8, true))));
            }
        }
        sent
    }

    /// Pieces that the datagram has when cut to `size`.
    pub(crate) fn pieces(&self, size: usize) -> usize {
        self.transport(&|_| 0).len().div_ceil(size).max(1)
    }
}
