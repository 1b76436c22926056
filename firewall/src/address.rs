//! What differs between IPv4 and IPv6, so that everything else is written once.

use core::fmt::Debug;
use core::hash::Hash;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::hash::HashKey;
use crate::rule::Family;
use crate::ruleset::{CompiledRules, Decision, UpperLayer};
use crate::wire::{checksum, ethernet, ipv4, ipv6, protocol};

/// An IPv4 address, highest byte first.
pub(crate) type V4 = u32;

/// An IPv6 address: its two halves, highest byte first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct V6(pub(crate) u64, pub(crate) u64);

/// The link-local address that every client vif has: made from the gateway's Ethernet address.
pub(crate) const LINK_LOCAL_GATEWAY: V6 = V6(0xfe80 << 48, 0xfcff_ffff_feff_ffff);

/// An address of one family, with its header format.
pub(crate) trait Address: Copy + Debug + Default + Eq + Hash + Ord + 'static {
    /// The fixed part of the header.
    type Header;
    /// The family.
    const FAMILY: Family;
    /// The Ethernet type.
    const ETHERTYPE: u16;
    /// The family's ICMP protocol.
    const ICMP: u8;

    /// As a standard address.
    fn to_ip(self) -> IpAddr;
    /// From a standard address of this family.
    fn from_ip(address: IpAddr) -> Option<Self>;
    /// The ones' complement sum of its words, not folded.
    fn sum(self) -> u64;
    /// The hash of a flow key.
    fn key_hash(key: &HashKey, src: Self, dst: Self, ports: u32, protocol: u8) -> u64;
    /// Whether both addresses are the same.
    fn same_pair(a: (Self, Self), b: (Self, Self)) -> bool;
    /// Multicast or limited broadcast.
    fn is_group(self) -> bool;
    /// Unspecified, loopback, or otherwise never on a wire; groups not included.
    fn is_martian(self) -> bool;
    /// Valid on one link only: never routed.
    fn is_link_scoped(self) -> bool;
    /// What compiled rules say.
    fn decide(rules: &CompiledRules, destination: Self, upper: UpperLayer) -> Decision;
    /// Writes both addresses, counts the time to live down by one, and applies `delta` to the
    /// header's checksum, if it has one.
    fn rewrite(header: &mut Self::Header, src: Self, dst: Self, delta: u16);
    /// Fits the header's checksum to a time to live that is one less, and counts it down.
    fn count_down(header: &mut Self::Header);
    /// Bytes of the fixed part of the header.
    const HEADER_LEN: usize;
    /// The same, to reckon with packet lengths.
    const HEADER_BYTES: u32;
    /// Takes the head of a frame apart whose headers were checked: Ethernet header, fixed IP header,
    /// and what comes `header_len` bytes after the start of the IP header.
    fn split(
        head: &mut [u8],
        header_len: u16,
    ) -> Option<(&mut [u8; ethernet::HEADER], &mut Self::Header, &mut [u8])>;
    /// Turns a header into that of an answer of ours; the caller completes its checksum.
    fn write_reply(header: &mut Self::Header, src: Self, dst: Self);
    /// Source, destination, protocol and header length of a packet of which only the start may be
    /// there.
    fn read_quoted(packet: &[u8]) -> Option<(Self, Self, u8, usize)>;
    /// Writes both addresses of a packet of which only the start may be there, and applies `delta`
    /// to the header's checksum, if it has one.
    fn write_quoted(packet: &mut [u8], src: Self, dst: Self, delta: u16);
    /// Writes the header of a packet of ours to the start of `packet`.
    fn write_header(packet: &mut [u8], src: Self, dst: Self, number: u8, payload: u16, ttl: u8);
}

/// The change of an IPv4 header's sum when the time to live goes down by one: minus 0x0100.
pub(crate) const TTL_DELTA: u16 = 0xfeff;

impl Address for V4 {
    type Header = [u8; 20];
    const FAMILY: Family = Family::Ipv4;
    const ETHERTYPE: u16 = ethernet::TYPE_IPV4;
    const ICMP: u8 = protocol::ICMP;

    fn to_ip(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(self))
    }

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address.to_bits()),
            IpAddr::V6(_) => None,
        }
    }

    #[inline]
    fn sum(self) -> u64 {
        u64::from(self)
    }

    #[inline(always)]
    fn key_hash(key: &HashKey, src: Self, dst: Self, ports: u32, protocol: u8) -> u64 {
        let addresses = u64::from(src) << 32 | u64::from(dst);
        // 13 bytes: two addresses, two ports, one protocol.
        let tail = u64::from(ports) | u64::from(u32::from(protocol) | 13 << 24) << 32;
        key.hash([addresses], tail)
    }

    #[inline(always)]
    fn same_pair(a: (Self, Self), b: (Self, Self)) -> bool {
        let joined = |(src, dst)| u64::from(src) << 32 | u64::from(dst);
        joined(a) == joined(b)
    }

    #[inline]
    fn is_group(self) -> bool {
        self >> 28 == 0xe || self == u32::MAX
    }

    #[inline]
    fn is_martian(self) -> bool {
        // Linux routes the rest of 0.0.0.0/8, and 240.0.0.0/4, like any other address.
        self == 0 || self >> 24 == 127
    }

    #[inline]
    fn is_link_scoped(self) -> bool {
        // Linux routes 169.254.0.0/16 like any other address.
        false
    }

    #[inline]
    fn decide(rules: &CompiledRules, destination: Self, upper: UpperLayer) -> Decision {
        rules.decide4(Ipv4Addr::from_bits(destination), upper)
    }

    #[inline]
    fn rewrite(header: &mut [u8; 20], src: Self, dst: Self, delta: u16) {
        let field = u16::from_be_bytes([header[10], header[11]]);
        let [high, low] = checksum::apply(field, delta).to_be_bytes();
        let [a, b, c, d] = src.to_be_bytes();
        let [e, f, g, h] = dst.to_be_bytes();
        let (_, tail) = header.split_at_mut(8);
        if let Some(tail) = tail.first_chunk_mut::<12>() {
            let ttl = tail[0].wrapping_sub(1);
            *tail = [ttl, tail[1], high, low, a, b, c, d, e, f, g, h];
        }
    }

    const HEADER_LEN: usize = 20;
    const HEADER_BYTES: u32 = 20;

    #[inline(always)]
    fn split(
        head: &mut [u8],
        header_len: u16,
    ) -> Option<(&mut [u8; 14], &mut [u8; 20], &mut [u8])> {
        let (ethernet, rest) = head.split_first_chunk_mut()?;
        let (header, rest) = rest.split_first_chunk_mut()?;
        let options = usize::from(header_len).checked_sub(20)?;
        Some((ethernet, header, rest.get_mut(options..)?))
    }

    fn write_reply(header: &mut [u8; 20], src: Self, dst: Self) {
        header[8] = 64;
        let octets = src.to_be_bytes().into_iter().chain(dst.to_be_bytes());
        for (to, from) in header.iter_mut().skip(12).zip(octets) {
            *to = from;
        }
    }

    fn read_quoted(packet: &[u8]) -> Option<(Self, Self, u8, usize)> {
        let h = packet.first_chunk::<20>()?;
        let header_len = usize::from(h[0] & 0xf) * 4;
        let fragment_offset = u16::from_be_bytes([h[6], h[7]]) & 0x1fff;
        if h[0] >> 4 != 4 || header_len < 20 || fragment_offset != 0 {
            return None;
        }
        let src = u32::from_be_bytes([h[12], h[13], h[14], h[15]]);
        let dst = u32::from_be_bytes([h[16], h[17], h[18], h[19]]);
        Some((src, dst, h[9], header_len))
    }

    fn write_quoted(packet: &mut [u8], src: Self, dst: Self, delta: u16) {
        if let Some(header) = packet.first_chunk_mut::<20>() {
            let field = u16::from_be_bytes([header[10], header[11]]);
            [header[10], header[11]] = checksum::apply(field, delta).to_be_bytes();
            let octets = src.to_be_bytes().into_iter().chain(dst.to_be_bytes());
            for (to, from) in header.iter_mut().skip(12).zip(octets) {
                *to = from;
            }
        }
    }

    fn write_header(packet: &mut [u8], src: Self, dst: Self, number: u8, payload: u16, ttl: u8) {
        ipv4::write(packet, src, dst, number, payload.saturating_add(20), ttl);
    }

    fn count_down(header: &mut [u8; 20]) {
        let field = u16::from_be_bytes([header[10], header[11]]);
        let [high, low] = checksum::apply(field, TTL_DELTA).to_be_bytes();
        header[8] = header[8].wrapping_sub(1);
        header[10] = high;
        header[11] = low;
    }
}

impl Address for V6 {
    type Header = [u8; 40];
    const FAMILY: Family = Family::Ipv6;
    const ETHERTYPE: u16 = ethernet::TYPE_IPV6;
    const ICMP: u8 = protocol::ICMPV6;

    fn to_ip(self) -> IpAddr {
        let bits = u128::from(self.0) << 64 | u128::from(self.1);
        IpAddr::V6(Ipv6Addr::from_bits(bits))
    }

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(Self::from_octets(&address.octets())),
        }
    }

    #[inline]
    fn sum(self) -> u64 {
        (self.0 >> 32) + (self.0 & 0xffff_ffff) + (self.1 >> 32) + (self.1 & 0xffff_ffff)
    }

    #[inline(always)]
    fn key_hash(key: &HashKey, src: Self, dst: Self, ports: u32, protocol: u8) -> u64 {
        // 37 bytes: two addresses, two ports, one protocol.
        let tail = u64::from(ports) | u64::from(u32::from(protocol) | 37 << 24) << 32;
        key.hash([src.0, src.1, dst.0, dst.1], tail)
    }

    #[inline(always)]
    fn same_pair(a: (Self, Self), b: (Self, Self)) -> bool {
        a == b
    }

    #[inline]
    fn is_group(self) -> bool {
        self.0 >> 56 == 0xff
    }

    #[inline]
    fn is_martian(self) -> bool {
        // Unspecified and loopback, and IPv4-mapped addresses, which are never on a wire.
        self.0 == 0 && (self.1 <= 1 || self.1 >> 32 == 0xffff)
    }

    #[inline]
    fn is_link_scoped(self) -> bool {
        self.is_link_local()
    }

    #[inline]
    fn decide(rules: &CompiledRules, destination: Self, upper: UpperLayer) -> Decision {
        let bits = u128::from(destination.0) << 64 | u128::from(destination.1);
        rules.decide6(Ipv6Addr::from_bits(bits), upper)
    }

    #[inline]
    fn rewrite(header: &mut [u8; 40], src: Self, dst: Self, _: u16) {
        Self::count_down(header);
        let (_, addresses) = header.split_at_mut(8);
        let (words, _) = addresses.as_chunks_mut::<8>();
        for (to, from) in words.iter_mut().zip([src.0, src.1, dst.0, dst.1]) {
            *to = from.to_be_bytes();
        }
    }

    const HEADER_LEN: usize = 40;
    const HEADER_BYTES: u32 = 40;

    #[inline(always)]
    fn split(
        head: &mut [u8],
        header_len: u16,
    ) -> Option<(&mut [u8; 14], &mut [u8; 40], &mut [u8])> {
        let (ethernet, rest) = head.split_first_chunk_mut()?;
        let (header, rest) = rest.split_first_chunk_mut()?;
        let extensions = usize::from(header_len).checked_sub(40)?;
        Some((ethernet, header, rest.get_mut(extensions..)?))
    }

    fn write_reply(header: &mut [u8; 40], src: Self, dst: Self) {
        header[7] = 64;
        Self::write_quoted(header, src, dst, 0);
    }

    fn read_quoted(packet: &[u8]) -> Option<(Self, Self, u8, usize)> {
        let h = packet.first_chunk::<40>()?;
        if h[0] >> 4 != 6 {
            return None;
        }
        let (number, extensions) = ipv6::upper_layer(h[6], packet.get(40..)?)?;
        let (_, addresses) = h.split_at(8);
        let (src, dst) = addresses.split_first_chunk::<16>()?;
        let dst = dst.first_chunk::<16>()?;
        Some((
            Self::from_octets(src),
            Self::from_octets(dst),
            number,
            40 + extensions,
        ))
    }

    fn write_quoted(packet: &mut [u8], src: Self, dst: Self, _: u16) {
        let octets = src.octets().into_iter().chain(dst.octets());
        for (to, from) in packet.iter_mut().skip(8).zip(octets) {
            *to = from;
        }
    }

    fn write_header(packet: &mut [u8], src: Self, dst: Self, number: u8, payload: u16, ttl: u8) {
        ipv6::write(packet, src, dst, number, payload, ttl);
    }

    #[inline]
    fn count_down(header: &mut [u8; 40]) {
        header[7] = header[7].wrapping_sub(1);
    }
}

impl V6 {
    #[inline]
    pub(crate) fn from_octets(octets: &[u8; 16]) -> Self {
        let bits = u128::from_be_bytes(*octets);
        let [a, b, c, d, e, f, g, h, rest @ ..] = bits.to_be_bytes();
        Self(
            u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            u64::from_be_bytes(rest),
        )
    }

    pub(crate) fn octets(self) -> [u8; 16] {
        (u128::from(self.0) << 64 | u128::from(self.1)).to_be_bytes()
    }

    /// `fe80::/10`.
    pub(crate) const fn is_link_local(self) -> bool {
        self.0 >> 54 == 0xfe80 >> 6
    }

    /// The multicast address on which neighbours ask for this one (RFC 4291 2.7.1).
    pub(crate) const fn solicited_node(self) -> Self {
        Self(0xff02 << 48, 0x0000_0001_ff00_0000 | self.1 & 0xff_ffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(text: &str) -> V4 {
        V4::from_ip(text.parse().unwrap()).unwrap()
    }

    fn v6(text: &str) -> V6 {
        V6::from_ip(text.parse().unwrap()).unwrap()
    }

    #[test]
    fn addresses_survive_the_conversion() {
        assert_eq!(
            v6("2001:db8::1").to_ip(),
            "2001:db8::1".parse::<IpAddr>().unwrap()
        );
        assert_eq!(
            V6::from_octets(&v6("2001:db8::1").octets()),
            v6("2001:db8::1")
        );
        assert_eq!(v4("1.2.3.4").to_ip(), "1.2.3.4".parse::<IpAddr>().unwrap());
        assert_eq!(LINK_LOCAL_GATEWAY, v6("fe80::fcff:ffff:feff:ffff"));
        assert_eq!(v6("fd09::a89:6").solicited_node(), v6("ff02::1:ff89:6"));
    }

    #[test]
    fn groups_and_martians_are_told_from_hosts() {
        assert!(v4("239.255.255.250").is_group() && v4("255.255.255.255").is_group());
        assert!(v4("127.0.0.1").is_martian() && v4("0.0.0.0").is_martian());
        assert!(!v4("240.0.0.1").is_martian() && !v4("169.254.1.1").is_martian());
        assert!(v6("ff02::1").is_group() && v6("::1").is_martian() && v6("::").is_martian());
        assert!(!v6("fd09::1").is_group() && !v6("fd09::1").is_martian());
        assert!(v6("fe80::1").is_link_local() && !v6("fec0::1").is_link_local());
    }
}
