//! Client addresses as dom0 writes them in keys: the text form of Python's `ipaddress` module.
//!
//! IPv4 is a dotted quad without leading zeros. IPv6 is lower case, with the longest run of zero
//! groups replaced by `::`. Keys are looked up by address, so a text that is not the one canonical
//! form of its address names no client: two keys could otherwise claim the same one.
//!
//! Source: `qubes-policy.md` 1.1; Python documentation of `ipaddress`.

use core::fmt::{self, Write};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use firewall::rule::{Family, HexIpv6};

/// Longest canonical text of an address in bytes: eight groups of four digits and seven colons.
pub const MAX_ADDRESS_LEN: usize = 39;

/// The family of an address.
pub const fn family(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    }
}

/// Prints an address in canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressText(pub IpAddr);

impl fmt::Display for AddressText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => address.fmt(f),
            IpAddr::V6(address) => HexIpv6(address).fmt(f),
        }
    }
}

/// Reads an address that is in canonical form.
///
/// IPv4-mapped IPv6 addresses may have a dotted tail, which Python prints from version 3.13 on.
pub fn parse_canonical(text: &str) -> Option<IpAddr> {
    if text.len() > MAX_ADDRESS_LEN {
        return None;
    }
    let address: IpAddr = text.parse().ok()?;
    let canonical = same_text(text, AddressText(address));
    // For addresses that are not mapped, this is the same text.
    let dotted = same_text(text, address);
    (canonical || dotted).then_some(address)
}

/// Reads an IPv4 address out of a setting, with white space around it.
pub fn parse_ipv4(value: &[u8]) -> Option<Ipv4Addr> {
    str::from_utf8(value).ok()?.trim_ascii().parse().ok()
}

/// Reads an IPv6 address out of a setting, with white space around it.
pub fn parse_ipv6(value: &[u8]) -> Option<Ipv6Addr> {
    str::from_utf8(value).ok()?.trim_ascii().parse().ok()
}

/// Whether `value` prints as `text`, without allocating.
fn same_text(text: &str, value: impl fmt::Display) -> bool {
    /// What is left to compare.
    struct Rest<'a>(&'a str);

    impl Write for Rest<'_> {
        fn write_str(&mut self, part: &str) -> fmt::Result {
            self.0 = self.0.strip_prefix(part).ok_or(fmt::Error)?;
            Ok(())
        }
    }

    let mut rest = Rest(text);
    write!(rest, "{value}").is_ok() && rest.0.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn canonical_forms_are_read() {
        for text in [
            "10.137.0.10",
            "10.138.0.0",
            "fd09:24ef:4179::a89:a",
            "::",
            "::1",
            "1::",
            "2001:db8:0:1:1:1:1:1",
            "2001:0:0:1::1",
            "::ffff:102:304",
            "::ffff:1.2.3.4",
        ] {
            assert!(parse_canonical(text).is_some(), "{text}");
        }
    }

    #[test]
    fn other_spellings_name_no_client() {
        for text in [
            "",
            "10.137.0.010",
            "10.137.0",
            "10.137.0.10 ",
            "FD09:24ef:4179::a89:a",
            "fd09:24ef:4179:0::a89:a",
            "fd09:24ef:4179::0a89:a",
            "2001:db8::1:1:1:1:1",
            "::1.2.3.4",
            "fe80::1%2",
            "10.137.0.10/32",
        ] {
            assert_eq!(parse_canonical(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read_back(bits in any::<u128>(), v4 in any::<bool>(), zeros in any::<u8>()) {
            // Clear groups, so that runs of zeros of every length occur.
            let group = |index: u32| (u128::from(zeros) >> index & 1) * (0xffff << (16 * index));
            let mask = (0..8).map(group).fold(0, |mask, group| mask | group);
            let address = if v4 {
                IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(bits >> 96).unwrap()))
            } else {
                IpAddr::V6(Ipv6Addr::from_bits(bits & mask))
            };
            let text = AddressText(address).to_string();
            prop_assert!(text.len() <= MAX_ADDRESS_LEN);
            prop_assert_eq!(parse_canonical(&text), Some(address));
        }

        #[test]
        fn no_text_is_a_panic(text in "[0-9a-fA-F:./% ]{0,45}") {
            if let Some(address) = parse_canonical(&text) {
                let plain = AddressText(address).to_string();
                prop_assert!(plain == text || address.to_string() == text);
            }
        }
    }
}
