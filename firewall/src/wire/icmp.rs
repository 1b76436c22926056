//! ICMP and ICMPv6 message types, and the packets that errors quote.
//!
//! Source: RFC 792, RFC 950, RFC 4443, RFC 4861, RFC 4620.

use crate::rule::Family;

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Asks for an answer.
    Request,
    /// Answers a request of this type.
    Reply(u8),
    /// Is about another packet.
    Error,
    /// Anything else: neighbour discovery, multicast management, unknown.
    Other,
}

pub(crate) const V4_ECHO_REPLY: u8 = 0;
pub(crate) const V4_UNREACHABLE: u8 = 3;
pub(crate) const V4_REDIRECT: u8 = 5;
pub(crate) const V4_ECHO: u8 = 8;
pub(crate) const V4_TIME_EXCEEDED: u8 = 11;

pub(crate) const V6_UNREACHABLE: u8 = 1;
pub(crate) const V6_TOO_BIG: u8 = 2;
pub(crate) const V6_TIME_EXCEEDED: u8 = 3;
pub(crate) const V6_ECHO: u8 = 128;
pub(crate) const V6_ECHO_REPLY: u8 = 129;
pub(crate) const V6_SOLICITATION: u8 = 135;
pub(crate) const V6_ADVERTISEMENT: u8 = 136;

/// What a message of type `icmp_type` is for.
#[inline]
pub(crate) const fn classify(family: Family, icmp_type: u8) -> Message {
    match (family, icmp_type) {
        // Echo, timestamp, information, address mask.
        (Family::Ipv4, 8 | 13 | 15 | 17) | (Family::Ipv6, 128 | 139) => Message::Request,
        (Family::Ipv4, 0) => Message::Reply(8),
        (Family::Ipv4, 14 | 16 | 18) | (Family::Ipv6, 129 | 140) => Message::Reply(icmp_type - 1),
        (Family::Ipv4, 3 | 4 | 5 | 11 | 12) | (Family::Ipv6, 0..=127) => Message::Error,
        _ => Message::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_name_their_requests() {
        assert_eq!(classify(Family::Ipv4, 0), Message::Reply(8));
        assert_eq!(classify(Family::Ipv4, 14), Message::Reply(13));
        assert_eq!(classify(Family::Ipv6, 129), Message::Reply(128));
        assert_eq!(classify(Family::Ipv6, 140), Message::Reply(139));
    }

    #[test]
    fn neighbour_discovery_is_neither_query_nor_error() {
        for icmp_type in 130..=137 {
            assert_eq!(classify(Family::Ipv6, icmp_type), Message::Other);
        }
        assert_eq!(classify(Family::Ipv4, 9), Message::Other);
    }
}
