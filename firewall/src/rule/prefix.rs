//! Networks as rules name them, and how their addresses print.
//!
//! Source: `qubes-policy.md` sections 2.1 to 2.6; RFC 5952 section 4.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

/// An IPv4 network: an address whose bits below the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix4 {
    address: Ipv4Addr,
    length: u8,
}

impl Prefix4 {
    /// The network of `address` with `length` bits (0 to 32); host bits are cleared.
    pub const fn new(address: Ipv4Addr, length: u8) -> Option<Self> {
        let Some(mask) = mask4(length) else {
            return None;
        };
        Some(Self {
            address: Ipv4Addr::from_bits(address.to_bits() & mask),
            length,
        })
    }

    /// The network that holds only `address`.
    pub const fn host(address: Ipv4Addr) -> Self {
        Self {
            address,
            length: 32,
        }
    }

    /// The lowest address of the network.
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// The prefix length in bits, 0 to 32.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is in the network.
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        match mask4(self.length) {
            Some(mask) => address.to_bits() & mask == self.address.to_bits(),
            None => false,
        }
    }
}

/// `address/length`.
impl fmt::Display for Prefix4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// An IPv6 network: an address whose bits below the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix6 {
    address: Ipv6Addr,
    length: u8,
}

impl Prefix6 {
    /// The network of `address` with `length` bits (0 to 128); host bits are cleared.
    pub const fn new(address: Ipv6Addr, length: u8) -> Option<Self> {
        let Some(mask) = mask6(length) else {
            return None;
        };
        Some(Self {
            address: Ipv6Addr::from_bits(address.to_bits() & mask),
            length,
        })
    }

    /// The network that holds only `address`.
    pub const fn host(address: Ipv6Addr) -> Self {
        Self {
            address,
            length: 128,
        }
    }

    /// The lowest address of the network.
    pub const fn address(self) -> Ipv6Addr {
        self.address
    }

    /// The prefix length in bits, 0 to 128.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is in the network.
    pub const fn contains(self, address: Ipv6Addr) -> bool {
        match mask6(self.length) {
            Some(mask) => address.to_bits() & mask == self.address.to_bits(),
            None => false,
        }
    }
}

/// The address in hexadecimal groups, also where it embeds an IPv4 address, then `/length`.
impl fmt::Display for Prefix6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", HexIpv6(self.address), self.length)
    }
}

/// Prints an IPv6 address in compressed lower-case hexadecimal groups only (RFC 5952 section 4).
///
/// `core` prints IPv4-mapped addresses with a dotted tail; the keys and rules of Qubes do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HexIpv6(pub Ipv6Addr);

impl fmt::Display for HexIpv6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [_, _, _, _, _, group5, high, low] = self.0.segments();
        match self.0.to_ipv4_mapped() {
            // The zero run of a mapped address is always its first five groups, which is the longest.
            Some(_) => write!(f, "::{group5:x}:{high:x}:{low:x}"),
            None => self.0.fmt(f),
        }
    }
}

/// Mask of an IPv4 prefix length; `None` above 32.
const fn mask4(length: u8) -> Option<u32> {
    match length {
        0 => Some(0),
        1..=32 => Some(u32::MAX << (32 - length)),
        _ => None,
    }
}

/// Mask of an IPv6 prefix length; `None` above 128.
const fn mask6(length: u8) -> Option<u128> {
    match length {
        0 => Some(0),
        1..=128 => Some(u128::MAX << (128 - length)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn host_bits_are_cleared() {
        let prefix = Prefix4::new(Ipv4Addr::new(10, 0, 0, 5), 8).unwrap();
        assert_eq!(prefix.to_string(), "10.0.0.0/8");
        assert!(prefix.contains(Ipv4Addr::new(10, 255, 0, 1)));
        assert!(!prefix.contains(Ipv4Addr::new(11, 0, 0, 1)));
        let prefix = Prefix6::new("2001:db8:ffff::1".parse().unwrap(), 37).unwrap();
        assert_eq!(prefix.to_string(), "2001:db8:f800::/37");
    }

    #[test]
    fn prefix_length_zero_holds_everything_and_full_length_one_address() {
        let all = Prefix4::new(Ipv4Addr::new(1, 2, 3, 4), 0).unwrap();
        assert!(all.contains(Ipv4Addr::BROADCAST));
        let one = Prefix6::host(Ipv6Addr::LOCALHOST);
        assert!(one.contains(Ipv6Addr::LOCALHOST));
        assert!(!one.contains(Ipv6Addr::UNSPECIFIED));
    }

    #[test]
    fn prefix_lengths_past_the_address_are_refused() {
        assert_eq!(Prefix4::new(Ipv4Addr::UNSPECIFIED, 33), None);
        assert_eq!(Prefix6::new(Ipv6Addr::UNSPECIFIED, 129), None);
    }

    #[test]
    fn mapped_addresses_print_in_hexadecimal() {
        let text = |address: &str| HexIpv6(address.parse().unwrap()).to_string();
        assert_eq!(text("::ffff:1.2.3.4"), "::ffff:102:304");
        assert_eq!(text("::ffff:0.0.0.0"), "::ffff:0:0");
        assert_eq!(text("::1.2.3.4"), "::102:304");
        assert_eq!(text("fd09:24ef:4179::a89:a"), "fd09:24ef:4179::a89:a");
    }
}
