//! IPv6 headers and their extension headers.
//!
//! The walk stops after [`MAX_EXTENSIONS`] headers. A chain that makes no sense leaves the packet
//! *opaque*: no rule can tell what it carries. A routing header that still has hops to go is a source
//! route.
//!
//! Source: RFC 8200, RFC 5095 (routing headers), RFC 6946 (atomic fragments); `qubes-policy.md` D2.

use super::ethernet::HEADER as ETHERNET;
use super::ipv4::{Fragment, Network, Parts, within};
use super::protocol;
use crate::address::V6;
use crate::verdict::DropReason;

/// Bytes of the fixed header.
pub(crate) const HEADER: usize = 40;

/// Most extension headers that are looked behind.
const MAX_EXTENSIONS: usize = 8;

/// Most bytes that all headers of a packet may take, so that what is rewritten stays within
/// [`crate::frame::MAX_EDITED`] bytes.
const MAX_HEADERS: u16 = 160;

/// Takes an IPv6 packet apart. Returns what [`super::ipv4::parse`] does.
#[inline(always)]
pub(crate) fn parse<'f>(
    head: &'f [u8],
    frame_len: u32,
    network: &mut Network<V6>,
) -> Result<&'f [u8], DropReason> {
    let (_, rest) = head
        .split_first_chunk::<ETHERNET>()
        .ok_or(DropReason::MalformedFrame)?;
    let (h, rest) = rest
        .split_first_chunk::<HEADER>()
        .ok_or(DropReason::MalformedIpv6)?;
    let payload_len = u32::from(u16::from_be_bytes([h[4], h[5]]));
    let total_len = payload_len + 40;
    if h[0] >> 4 != 6 || total_len > frame_len.saturating_sub(14) {
        return Err(DropReason::MalformedIpv6);
    }
    let word = |at: usize| {
        let bytes = h.get(at..).and_then(<[u8]>::first_chunk).copied();
        u64::from_be_bytes(bytes.unwrap_or_default())
    };
    network.src = V6(word(8), word(16));
    network.dst = V6(word(24), word(32));
    network.protocol = h[6];
    network.ttl = h[7];
    network.dont_fragment = true;
    network.header_len = 40;
    network.total_len = total_len;
    let payload = within(rest, payload_len);
    match network.protocol {
        protocol::TCP | protocol::UDP | protocol::ICMPV6 => Ok(payload),
        _ => {
            let skip = walk(payload, network)?;
            payload.get(skip..).ok_or(DropReason::MalformedIpv6)
        }
    }
}

/// [`parse`], for packets that are rare.
#[inline(never)]
pub(crate) fn take_apart(head: &[u8], frame_len: u32) -> Result<Parts<'_, V6>, DropReason> {
    let mut network = Network::default();
    let transport = parse(head, frame_len, &mut network)?;
    Ok(Parts { transport, network })
}

/// Walks the extension headers; returns how many bytes they take.
#[cold]
fn walk(payload: &[u8], network: &mut Network<V6>) -> Result<usize, DropReason> {
    let mut at = 0;
    // Offset of the field that names the header at `at`, from the start of the fixed header.
    let mut named_at = 6_u16;
    // Once more than there may be headers: for what stands behind the last one.
    for _ in 0..=MAX_EXTENSIONS {
        let len = match network.protocol {
            protocol::HOP_BY_HOP if at != 0 => break,
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {
                let header = first(payload, at)?;
                if network.protocol == protocol::ROUTING && header[3] != 0 {
                    network.source_routed = true;
                }
                let len = 8 + usize::from(header[1]) * 8;
                if network.protocol == protocol::HOP_BY_HOP
                    && !may_pass(payload.get(2..len).unwrap_or_default())
                {
                    return Err(DropReason::MalformedIpv6);
                }
                len
            }
            protocol::AUTHENTICATION => 8 + usize::from(first(payload, at)?[1]) * 4,
            protocol::FRAGMENT => {
                let header = first(payload, at)?;
                let offset = u16::from_be_bytes([header[2], header[3]]);
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                network.is_fragment = true;
                network.fragment = Fragment {
                    id,
                    offset: offset & !7,
                    more: offset & 1 != 0,
                    previous_next_header: named_at,
                };
                network.protocol = header[0];
                network.header_len = offset_from_header(at + 8)?;
                // What follows the header of a later fragment is payload.
                return Ok(at + 8);
            }
            _ => {
                network.header_len = offset_from_header(at)?;
                return Ok(at);
            }
        };
        named_at = offset_from_header(at)?;
        network.protocol = first(payload, at)?[0];
        at += len;
        if at > payload.len() {
            return Err(DropReason::MalformedIpv6);
        }
    }
    network.opaque = true;
    network.header_len = offset_from_header(at)?;
    Ok(at)
}

/// Whether a router may pass on a packet with these hop-by-hop options: all are whole, and none says that whoever
/// does not know it must not (RFC 8200 4.2). We know none of those, as Linux does not; jumbograms have one.
fn may_pass(mut options: &[u8]) -> bool {
    while let Some((kind, rest)) = options.split_first() {
        let len = match (*kind, rest.split_first()) {
            (0, _) => 0,
            (1..=0x3f, Some((len, _))) => 1 + usize::from(*len),
            _ => return false,
        };
        let Some(rest) = rest.get(len..) else {
            return false;
        };
        options = rest;
    }
    true
}

/// The first eight bytes of the extension header at `at`.
fn first(payload: &[u8], at: usize) -> Result<&[u8; 8], DropReason> {
    payload
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .ok_or(DropReason::MalformedIpv6)
}

/// Bytes from the start of the fixed header; an error for chains that nobody sends.
fn offset_from_header(at: usize) -> Result<u16, DropReason> {
    let offset = u16::try_from(at + HEADER).map_err(|_| DropReason::MalformedIpv6)?;
    if offset > MAX_HEADERS {
        return Err(DropReason::MalformedIpv6);
    }
    Ok(offset)
}

/// The upper-layer protocol of a packet of which only the start may be there, and the bytes of its
/// extension headers. `None` if that cannot be told, or for a later fragment.
pub(crate) fn upper_layer(next: u8, payload: &[u8]) -> Option<(u8, usize)> {
    let mut number = next;
    let mut at = 0;
    for _ in 0..=MAX_EXTENSIONS {
        let len = match number {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {
                8 + usize::from(first(payload, at).ok()?[1]) * 8
            }
            protocol::AUTHENTICATION => 8 + usize::from(first(payload, at).ok()?[1]) * 4,
            protocol::FRAGMENT => {
                let header = first(payload, at).ok()?;
                if u16::from_be_bytes([header[2], header[3]]) & !7 != 0 {
                    return None;
                }
                8
            }
            _ => return Some((number, at)),
        };
        number = first(payload, at).ok()?[0];
        at += len;
    }
    None
}

/// Whether a first fragment ends before the header of the transport does. Nobody sends such fragments
/// who does not mean to hide something (RFC 8200 4.5, RFC 7112).
#[cold]
pub(crate) fn cuts_transport(next: u8, payload: &[u8]) -> bool {
    upper_layer(next, payload).is_some_and(|(number, at)| {
        let header = match number {
            protocol::TCP => super::transport::TCP_HEADER,
            protocol::UDP | protocol::ICMPV6 => super::transport::UDP_HEADER,
            _ => 1,
        };
        payload.len() < at + header
    })
}

/// Makes a header and writes it to the start of `packet`.
pub(crate) fn write(
    packet: &mut [u8],
    src: V6,
    dst: V6,
    next: u8,
    payload_len: u16,
    hop_limit: u8,
) {
    let [high, low] = payload_len.to_be_bytes();
    if let Some(start) = packet.first_chunk_mut::<8>() {
        *start = [0x60, 0, 0, 0, high, low, next, hop_limit];
    }
    let octets = src.octets().into_iter().chain(dst.octets());
    for (to, from) in packet.iter_mut().skip(8).zip(octets) {
        *to = from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const SRC: V6 = V6(0x2001_0db8 << 32, 1);
    const DST: V6 = V6(0x2001_0db8 << 32, 2);

    fn network(next: u8, payload: &[u8]) -> Result<Network<V6>, DropReason> {
        let mut bytes: Vec<u8> = alloc::vec![0; 54];
        write(
            &mut bytes[14..],
            SRC,
            DST,
            next,
            u16::try_from(payload.len()).unwrap(),
            64,
        );
        bytes.extend(payload);
        let len = u32::try_from(bytes.len()).unwrap();
        let mut network = Network::default();
        parse(&bytes, len, &mut network).map(|_| network)
    }

    #[test]
    fn upper_layer_is_found_behind_extension_headers() {
        let payload = [60, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0, 1, 2, 3, 4];
        let network = network(0, &payload).unwrap();
        assert_eq!((network.protocol, network.header_len), (6, 56));
        assert!(!network.opaque && !network.source_routed);
    }

    #[test]
    fn routing_header_with_hops_to_go_is_a_source_route() {
        assert!(
            network(43, &[6, 0, 0, 1, 0, 0, 0, 0])
                .unwrap()
                .source_routed
        );
        assert!(
            !network(43, &[6, 0, 0, 0, 0, 0, 0, 0])
                .unwrap()
                .source_routed
        );
    }

    #[test]
    fn eight_extension_headers_are_looked_behind_and_no_more() {
        let mut payload = [60, 0, 1, 4, 0, 0, 0, 0].repeat(8);
        payload[56] = 17;
        let eight = network(60, &payload).unwrap();
        assert_eq!((eight.protocol, eight.header_len), (17, 104));
        assert!(!eight.opaque);
        assert_eq!(upper_layer(60, &payload), Some((17, 64)));
        let nine = [&[60, 0, 1, 4, 0, 0, 0, 0], &payload[..]].concat();
        assert!(network(60, &nine).unwrap().opaque);
        assert_eq!(upper_layer(60, &nine), None);
    }

    #[test]
    fn hop_by_hop_options_that_must_not_pass_are_malformed() {
        for (options, passes) in [
            ([0, 0, 0, 0, 0, 0], true),
            ([5, 2, 0, 0, 1, 0], true),
            ([0x3e, 4, 0, 0, 0, 0], true),
            ([0x5e, 4, 0, 0, 0, 0], false),
            ([0x9e, 4, 0, 0, 0, 0], false),
            ([0xde, 4, 0, 0, 0, 0], false),
            // A jumbogram.
            ([0xc2, 4, 0, 1, 0, 0], false),
            ([1, 5, 0, 0, 0, 0], false),
            ([1, 3, 0, 0, 0, 1], false),
        ] {
            let payload = [&[17, 0][..], &options, &[0; 8]].concat();
            assert_eq!(network(0, &payload).is_ok(), passes, "{options:x?}");
            // What is for the destination only is not ours to judge.
            assert!(network(60, &payload).is_ok());
        }
    }

    #[test]
    fn endless_chain_is_opaque() {
        assert!(
            network(60, &[60, 0, 1, 4, 0, 0, 0, 0].repeat(9))
                .unwrap()
                .opaque
        );
        let late_hop_by_hop = [0, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0];
        assert!(network(60, &late_hop_by_hop).unwrap().opaque);
    }

    #[test]
    fn extension_header_past_the_packet_is_malformed() {
        assert!(network(60, &[6, 1, 1, 4, 0, 0, 0, 0]).is_err());
        assert!(network(60, &[6, 0, 1, 4]).is_err());
    }

    #[test]
    fn fragment_header_names_its_part() {
        let fragment = network(44, &[17, 0, 0x05, 0x79, 0, 0, 0, 9])
            .unwrap()
            .fragment;
        assert_eq!(
            (fragment.id, fragment.offset, fragment.more),
            (9, 0x578, true)
        );
        assert_eq!(fragment.previous_next_header, 6);
    }
}
