//! What left, in a form in which only what must agree differs.
//!
//! Fragments are put together again (the spec fixes their largest size, not every cut), ports that the
//! translation chose become the client's own, checksums become the word whether they are right. Of
//! packets that the firewall makes itself, fields that it may fill as it likes are blanked.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::kernel::Port;
use crate::packet::{
    Body, ICMP, ICMPV6, Packet, Selector, TCP, UDP, checksum_at, octets, ones_sum, transport_sum,
};

/// What is known about the checksum of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sum {
    Right,
    Wrong,
    /// The protocol has none, the sender left it out, or not all bytes are there.
    Unknown,
}

/// A packet that a packet quotes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Quote {
    pub(crate) bytes: Vec<u8>,
    pub(crate) sum: Sum,
}

/// A packet that left.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    /// Where.
    pub(crate) port: Port,
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    /// The IP header with extension headers and options; lengths, fragmentation and checksum blanked.
    pub(crate) header: Vec<u8>,
    /// The transport up to the quote, checksum blanked.
    pub(crate) transport: Vec<u8>,
    pub(crate) quote: Option<Quote>,
    pub(crate) sum: Sum,
    /// Whether the IP header's checksum is right.
    pub(crate) header_sum: bool,
    /// Bytes of the largest piece, if it left in pieces.
    pub(crate) largest: Option<usize>,
    /// The port or identifier that the translation may have chosen.
    pub(crate) outside: Option<u16>,
}

impl Seen {
    /// The ICMP type and code, if it is an ICMP message of its family.
    pub(crate) fn icmp(&self) -> Option<(u8, u8)> {
        let own = if self.src.is_ipv6() { ICMPV6 } else { ICMP };
        match (self.protocol == own, self.transport.get(..2)) {
            (true, Some([kind, code])) => Some((*kind, *code)),
            _ => None,
        }
    }
}

/// An IP packet in its parts.
struct Parts {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    header: Vec<u8>,
    /// Identification, offset in bytes, whether more follow.
    fragment: Option<(u32, usize, bool)>,
    payload: Vec<u8>,
    header_sum: bool,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(pair) => u16::from_be_bytes([pair[0], pair[1]]),
        None => 0,
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(pair) = bytes.get_mut(at..at + 2) {
        pair.copy_from_slice(&value.to_be_bytes());
    }
}

/// Takes an IP packet apart; it may be cut short.
fn parts(packet: &[u8]) -> Option<Parts> {
    if packet.first()? >> 4 == 6 {
        parts6(packet)
    } else {
        parts4(packet)
    }
}

fn parts4(packet: &[u8]) -> Option<Parts> {
    let len = usize::from(packet.first()? & 15) * 4;
    let mut header = packet.get(..len.max(20))?.to_vec();
    let field = word(&header, 6);
    let offset = usize::from(field & 0x1fff) * 8;
    let fragment =
        (field & 0x3fff != 0).then(|| (u32::from(word(&header, 4)), offset, field & 0x2000 != 0));
    let header_sum = ones_sum(&[&header]) == 0xffff;
    let address = |at: usize| -> Option<IpAddr> {
        let own: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::from(own))
    };
    let (src, dst) = (address(12)?, address(16)?);
    let total = usize::from(word(packet, 2)).max(len);
    put(&mut header, 2, 0);
    put(&mut header, 6, field & 0x4000);
    put(&mut header, 10, 0);
    Some(Parts {
        src,
        dst,
        protocol: header[9],
        header,
        fragment,
        payload: packet[len..total.min(packet.len())].to_vec(),
        header_sum,
    })
}

fn parts6(packet: &[u8]) -> Option<Parts> {
    let mut header = packet.get(..40)?.to_vec();
    let address = |at: usize| -> Option<IpAddr> {
        let own: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::from(own))
    };
    let (src, dst) = (address(8)?, address(24)?);
    let end = packet.len().min(40 + usize::from(word(packet, 4)));
    put(&mut header, 4, 0);
    let mut protocol = packet[6];
    let mut named_at = 6;
    let mut at = 40;
    let mut fragment = None;
    while fragment.is_none_or(|(_, offset, _)| offset == 0) && [0, 43, 44, 60].contains(&protocol) {
        let own = packet.get(at..at + 8)?;
        if protocol == 44 {
            let field = word(own, 2);
            let id = u32::from(word(own, 4)) << 16 | u32::from(word(own, 6));
            fragment = Some((id, usize::from(field & !7), field & 1 != 0));
            // As if it had never been cut.
            header[named_at] = own[0];
            protocol = own[0];
            at += 8;
            continue;
        }
        let len = 8 + usize::from(own[1]) * 8;
        named_at = header.len();
        protocol = own[0];
        header.extend(packet.get(at..at + len)?);
        at += len;
    }
    Some(Parts {
        src,
        dst,
        protocol,
        header,
        fragment,
        payload: packet.get(at..end)?.to_vec(),
        header_sum: true,
    })
}

/// Whether a transport's checksum is right; blanks it.
fn check(parts: &mut Parts, whole: bool) -> Sum {
    let v6 = parts.src.is_ipv6();
    let Some(at) = checksum_at(v6, parts.protocol) else {
        return Sum::Unknown;
    };
    if parts.payload.len() < at + 2 {
        // Half of a checksum, over a port that was chosen on each side.
        if let Some(half) = parts.payload.get_mut(at) {
            *half = 0;
        }
        return Sum::Unknown;
    }
    let absent = parts.protocol == UDP && word(&parts.payload, at) == 0;
    let sum = transport_sum(parts.src, parts.dst, parts.protocol, &parts.payload);
    put(&mut parts.payload, at, 0);
    match sum {
        _ if absent || !whole => Sum::Unknown,
        // Zero and all ones are the same number; updating by difference gives either.
        0 | 0xffff => Sum::Right,
        _ => Sum::Wrong,
    }
}

/// Where the port is that the translation may have chosen.
fn chosen_at(parts: &Parts, is_source: bool) -> Option<usize> {
    let query = |kind: u8| match parts.src.is_ipv6() {
        false => matches!(kind, 0 | 8 | 13..=18),
        true => matches!(kind, 128 | 129),
    };
    match parts.protocol {
        TCP | UDP => Some(if is_source { 0 } else { 2 }),
        ICMP | ICMPV6 if query(*parts.payload.first()?) => Some(4),
        _ => None,
    }
}

fn is_error(parts: &Parts) -> bool {
    match (parts.protocol, parts.payload.first()) {
        (ICMP, Some(kind)) => !parts.src.is_ipv6() && [3, 4, 5, 11, 12].contains(kind),
        (ICMPV6, Some(kind)) => parts.src.is_ipv6() && *kind < 128,
        _ => false,
    }
}

/// What the pieces of a datagram have in common: where they left, addresses, identification, protocol.
type Datagram = (Port, IpAddr, IpAddr, u32, u8);

/// Puts fragments together; those that do not fit stay alone.
fn whole(sent: &[(Port, Vec<u8>)]) -> Vec<(Port, Parts, Option<usize>)> {
    let mut out = Vec::new();
    let mut waiting: BTreeMap<Datagram, Vec<(Parts, usize)>> = BTreeMap::new();
    for (port, packet) in sent {
        let Some(own) = parts(packet) else {
            continue;
        };
        match own.fragment {
            Some((id, _, _)) => {
                let key = (*port, own.src, own.dst, id, own.protocol);
                waiting.entry(key).or_default().push((own, packet.len()));
            }
            None => out.push((*port, own, None)),
        }
    }
    for ((port, ..), mut pieces) in waiting {
        pieces.sort_by_key(|(own, _)| own.fragment.map(|(_, offset, _)| offset));
        let largest = pieces.iter().map(|(_, len)| *len).max();
        let mut pieces = pieces.into_iter();
        let Some((mut first, _)) = pieces.next() else {
            continue;
        };
        let mut more = first.fragment.is_none_or(|(_, _, more)| more);
        for (next, _) in pieces {
            if next
                .fragment
                .is_some_and(|(_, offset, _)| offset == first.payload.len())
            {
                more = next.fragment.is_some_and(|(_, _, more)| more);
                first.payload.extend(next.payload);
            }
        }
        // A datagram with an end missing must not look like one without.
        if more {
            first.payload.extend(b"incomplete");
        }
        out.push((port, first, largest));
    }
    out
}

/// Brings what left into the form that is compared. `step` came in on `from`; `outside` is what its
/// flow has outside, and becomes `inside`.
pub(crate) fn all(
    sent: &[(Port, Vec<u8>)],
    from: Port,
    packet: &Packet,
    outside: Option<(u16, u16)>,
) -> Vec<Seen> {
    let mut seen: Vec<Seen> = whole(sent)
        .into_iter()
        .map(|(port, parts, largest)| one(port, parts, largest, from, packet, outside))
        .collect();
    seen.sort();
    seen
}

fn one(
    port: Port,
    mut parts: Parts,
    largest: Option<usize>,
    from: Port,
    packet: &Packet,
    outside: Option<(u16, u16)>,
) -> Seen {
    let sum = check(&mut parts, true);
    let back = port == from;
    let error = is_error(&parts);
    if back {
        blank_own_choices(&mut parts);
        // An answer has the identifier of the question, which the translation chose on each side.
        if matches!(
            &packet.body,
            Body::Icmp {
                id: Selector::Outside(_),
                ..
            }
        ) && let Some(at) = chosen_at(&parts, true)
        {
            put(&mut parts.payload, at, 0);
        }
    }
    let mut quote = None;
    let mut chosen = None;
    if error {
        let bytes = parts.payload.split_off(parts.payload.len().min(8));
        quote = Some(quoted(&bytes, port == 0, outside));
    } else if port == 0
        && !back
        && !matches!(packet.body, Body::Error { .. })
        && let Some(at) = chosen_at(&parts, true)
    {
        chosen = Some(word(&parts.payload, at));
        if let Some(inside) = own_port(packet) {
            put(&mut parts.payload, at, inside);
        }
    }
    Seen {
        port,
        src: parts.src,
        dst: parts.dst,
        protocol: parts.protocol,
        header: parts.header,
        transport: parts.payload,
        quote,
        sum,
        header_sum: parts.header_sum,
        largest,
        outside: chosen,
    }
}

/// The port or identifier that a client's packet came with.
pub(crate) fn own_port(packet: &Packet) -> Option<u16> {
    let selector = match &packet.body {
        Body::Tcp(tcp) => tcp.sport,
        Body::Udp { sport, .. } => *sport,
        Body::Icmp { id, .. } => *id,
        Body::Error { .. } | Body::Raw(_) => return None,
    };
    match selector {
        Selector::Is(number) => Some(number),
        Selector::Outside(_) => None,
    }
}

/// Blanks what a host may put as it likes into packets of its own: type of service, identification,
/// the flag against fragmentation, the flow label.
fn blank_own_choices(parts: &mut Parts) {
    if parts.src.is_ipv6() {
        parts.header[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    } else {
        parts.header[1] = 0;
        put(&mut parts.header, 4, 0);
        put(&mut parts.header, 6, 0);
    }
}

fn quoted(bytes: &[u8], to_uplink: bool, outside: Option<(u16, u16)>) -> Quote {
    let Some(mut own) = parts(bytes) else {
        return Quote {
            bytes: bytes.to_vec(),
            sum: Sum::Unknown,
        };
    };
    let is_v6 = own.src.is_ipv6();
    let said = if is_v6 {
        40 + usize::from(word(bytes, 4))
    } else {
        usize::from(word(bytes, 2))
    };
    let complete = bytes.len() >= said && own.fragment.is_none();
    let sum = check(&mut own, complete);
    if to_uplink
        && let (Some(at), Some((outside, inside))) = (chosen_at(&own, false), outside)
        && own.payload.len() >= at + 2
        && word(&own.payload, at) == outside
    {
        put(&mut own.payload, at, inside);
    }
    // The lengths and the checksum of the header count in a quote.
    let mut all = bytes[..bytes.len() - own.payload.len().min(bytes.len())].to_vec();
    if is_v6 {
        all = own.header.clone();
        all.extend(&bytes[4..6]);
    }
    all.extend(octets(own.src));
    all.extend(&own.payload);
    Quote { bytes: all, sum }
}
