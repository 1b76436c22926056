//! IPv4 headers.
//!
//! Source: RFC 791; RFC 6274 for what options may do.

use super::checksum;
use super::ethernet::HEADER as ETHERNET;
use crate::address::V4;
use crate::verdict::DropReason;

/// Bytes of a header without options.
pub(crate) const MIN_HEADER: usize = 20;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_LOOSE_ROUTE: u8 = 131;
const OPTION_STRICT_ROUTE: u8 = 137;

/// The network layer of a packet, whatever its family. Parsers fill it in where it lies: it is not
/// copied from stage to stage.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Network<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    /// The upper-layer protocol, after any extension headers.
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    /// Whether routers must not fragment it. Always, for IPv6.
    pub(crate) dont_fragment: bool,
    /// Whether it names hops that it wants to take.
    pub(crate) source_routed: bool,
    /// Whether the upper layer cannot be told (an extension header that makes no sense).
    pub(crate) opaque: bool,
    /// Bytes from the start of the network header to the transport header.
    pub(crate) header_len: u16,
    /// Bytes of the whole packet.
    pub(crate) total_len: u32,
    /// Whether it is a fragment.
    pub(crate) is_fragment: bool,
    /// Which one, if it is one.
    pub(crate) fragment: Fragment,
}

impl<A> Network<A> {
    /// Bytes of transport header and payload.
    #[inline]
    pub(crate) fn transport_len(&self) -> u32 {
        self.total_len.saturating_sub(u32::from(self.header_len))
    }
}

/// Which part of a datagram a fragment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) id: u32,
    /// In bytes.
    pub(crate) offset: u16,
    pub(crate) more: bool,
    /// Where the field that names the protocol after the fragment header is, for IPv6.
    pub(crate) previous_next_header: u16,
}

/// Takes an IPv4 packet apart and checks its header completely. Returns the transport header and as much
/// of the payload as is in the head, and nothing after the packet.
#[inline(always)]
pub(crate) fn parse<'f>(
    head: &'f [u8],
    frame_len: u32,
    network: &mut Network<V4>,
) -> Result<&'f [u8], DropReason> {
    let (_, rest) = head
        .split_first_chunk::<ETHERNET>()
        .ok_or(DropReason::MalformedFrame)?;
    let (h, rest) = rest
        .split_first_chunk::<MIN_HEADER>()
        .ok_or(DropReason::MalformedIpv4)?;
    let total_len = u32::from(u16::from_be_bytes([h[2], h[3]]));
    if h[0] >> 4 != 4 || total_len > frame_len.saturating_sub(14) {
        return Err(DropReason::MalformedIpv4);
    }
    network.total_len = total_len;
    let (transport, transport_len) = if h[0] == 0x45 {
        let len = total_len.checked_sub(20).ok_or(DropReason::MalformedIpv4)?;
        if !checksum::header_is_right(h) {
            return Err(DropReason::BadHeaderChecksum);
        }
        network.header_len = 20;
        (rest, len)
    } else {
        (options(h, rest, network)?, network.transport_len())
    };
    let flags = u16::from_be_bytes([h[6], h[7]]);
    network.src = u32::from_be_bytes([h[12], h[13], h[14], h[15]]);
    network.dst = u32::from_be_bytes([h[16], h[17], h[18], h[19]]);
    network.protocol = h[9];
    network.ttl = h[8];
    network.dont_fragment = flags & DONT_FRAGMENT != 0;
    if flags & (MORE_FRAGMENTS | OFFSET_MASK) != 0 {
        network.is_fragment = true;
        network.fragment = Fragment {
            id: u32::from(u16::from_be_bytes([h[4], h[5]])),
            offset: (flags & OFFSET_MASK) << 3,
            more: flags & MORE_FRAGMENTS != 0,
            previous_next_header: 0,
        };
    }
    Ok(within(transport, transport_len))
}

/// A packet taken apart.
#[derive(Debug)]
pub(crate) struct Parts<'f, A> {
    /// The transport header and as much of the payload as is in the head; nothing after the packet.
    pub(crate) transport: &'f [u8],
    pub(crate) network: Network<A>,
}

/// [`parse`], for packets that are rare.
#[inline(never)]
pub(crate) fn take_apart(head: &[u8], frame_len: u32) -> Result<Parts<'_, V4>, DropReason> {
    let mut network = Network::default();
    let transport = parse(head, frame_len, &mut network)?;
    Ok(Parts { transport, network })
}

/// At most `len` bytes.
#[inline(always)]
pub(crate) fn within(bytes: &[u8], len: u32) -> &[u8] {
    match usize::try_from(len).ok().and_then(|len| bytes.get(..len)) {
        Some(bytes) => bytes,
        None => bytes,
    }
}

/// Checks a header with options; returns what follows it.
#[cold]
fn options<'f>(
    header: &[u8; MIN_HEADER],
    rest: &'f [u8],
    network: &mut Network<V4>,
) -> Result<&'f [u8], DropReason> {
    let words = header[0] & 0xf;
    let header_len = u16::from(words) * 4;
    let options_len = usize::from(header_len).checked_sub(MIN_HEADER);
    let Some((options, transport)) = options_len.and_then(|len| rest.split_at_checked(len)) else {
        return Err(DropReason::MalformedIpv4);
    };
    if u32::from(header_len) > network.total_len {
        return Err(DropReason::MalformedIpv4);
    }
    let sum = checksum::add_bytes(checksum::add_bytes(0, header), options);
    if checksum::fold(sum) != 0xffff {
        return Err(DropReason::BadHeaderChecksum);
    }
    network.header_len = header_len;
    network.source_routed = scan_options(options)?;
    Ok(transport)
}

/// Whether options ask for a source route.
///
/// # Errors
///
/// Options that run over the end of the header.
fn scan_options(options: &[u8]) -> Result<bool, DropReason> {
    let mut rest = options;
    let mut routed = false;
    while let [kind, tail @ ..] = rest {
        rest = match *kind {
            OPTION_END => break,
            OPTION_NOP => tail,
            kind => {
                let len = usize::from(tail.first().copied().unwrap_or(0));
                if len < 2 {
                    return Err(DropReason::MalformedIpv4);
                }
                routed |= kind == OPTION_LOOSE_ROUTE || kind == OPTION_STRICT_ROUTE;
                rest.get(len..).ok_or(DropReason::MalformedIpv4)?
            }
        };
    }
    Ok(routed)
}

/// Computes the checksum of the header that starts `packet`.
pub(crate) fn set_checksum(packet: &mut [u8]) {
    let len = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    super::put_u16(packet, 10, 0);
    let sum = packet
        .get(..len)
        .map_or(0, |header| checksum::add_bytes(0, header));
    super::put_u16(packet, 10, checksum::field(sum));
}

/// Makes a header without options and writes it to the start of `packet`, checksum included.
///
/// Packets of ours have identifier zero and must not be fragmented (RFC 6864 4.1).
pub(crate) fn write(packet: &mut [u8], src: V4, dst: V4, protocol: u8, total_len: u16, ttl: u8) {
    let [len_high, len_low] = total_len.to_be_bytes();
    let [a, b, c, d] = src.to_be_bytes();
    let [e, f, g, h] = dst.to_be_bytes();
    let constant = 0x4500 + 0x4000 + (u64::from(ttl) << 8);
    let sum = constant + u64::from(protocol) + u64::from(total_len);
    let [high, low] = checksum::field(sum + u64::from(src) + u64::from(dst)).to_be_bytes();
    if let Some(header) = packet.first_chunk_mut::<MIN_HEADER>() {
        *header = [
            0x45, 0, len_high, len_low, 0, 0, 0x40, 0, ttl, protocol, high, low, a, b, c, d, e, f,
            g, h,
        ];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn frame(options: &[u8]) -> Vec<u8> {
        let mut bytes = alloc::vec![0; 14 + 20 + options.len() + 8];
        let total = u16::try_from(bytes.len() - 14).unwrap();
        write(&mut bytes[14..], 0x0102_0304, 0x0506_0708, 17, total, 64);
        bytes[34..34 + options.len()].copy_from_slice(options);
        bytes[14] = 0x45 + u8::try_from(options.len() / 4).unwrap();
        set_checksum(&mut bytes[14..]);
        bytes
    }

    fn network(bytes: &mut [u8]) -> Result<Network<V4>, DropReason> {
        let len = u32::try_from(bytes.len()).unwrap();
        let mut network = Network::default();
        parse(bytes, len, &mut network).map(|_| network)
    }

    #[test]
    fn source_route_is_seen_behind_other_options() {
        assert!(
            network(&mut frame(&[1, 0x83, 7, 4, 8, 8, 8, 8]))
                .unwrap()
                .source_routed
        );
        assert!(!network(&mut frame(&[0x94, 4, 0, 0])).unwrap().source_routed);
        assert!(!network(&mut frame(&[0, 0x83, 7, 4])).unwrap().source_routed);
    }

    #[test]
    fn options_past_the_header_are_malformed() {
        assert_eq!(
            network(&mut frame(&[7, 9, 0, 0])).err(),
            Some(DropReason::MalformedIpv4)
        );
        assert_eq!(
            network(&mut frame(&[7, 0, 0, 0])).err(),
            Some(DropReason::MalformedIpv4)
        );
        assert_eq!(
            network(&mut frame(&[1, 1, 1, 7])).err(),
            Some(DropReason::MalformedIpv4)
        );
    }

    #[test]
    fn every_damaged_header_byte_is_noticed() {
        for at in 14..34 {
            let mut bytes = frame(&[]);
            bytes[at] ^= 0x20;
            assert!(network(&mut bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn padding_after_the_packet_is_not_transport() {
        let mut bytes = frame(&[]);
        bytes.extend([0; 18]);
        assert_eq!(parse(&bytes, 60, &mut Network::default()).unwrap().len(), 8);
    }
}
