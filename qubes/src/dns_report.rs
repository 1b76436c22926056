//! What we tell dom0 about the names in rules: `/dns/<address>/<name>`.
//!
//! Tools in the firewall and in dom0 read which addresses a name stands for. The value is the text of a
//! Python set, because that is what the Linux agent writes.
//!
//! Source: `qubes-policy.md` 1.2.

use alloc::string::String;
use core::fmt::Write;
use core::net::IpAddr;

use firewall::rule::HostName;

use crate::address_text::AddressText;
use crate::qubesdb::{Path, VALUE_MAX};

/// The value for a name without addresses.
const EMPTY_SET: &str = "set()";

/// The directory of all names of a client address, without a slash at its end.
pub fn directory(client: IpAddr) -> String {
    alloc::format!("/dns/{}", AddressText(client))
}

/// The key of a name in the rules of a client address. `None` if it is too long for a key; the agent
/// leaves such names out.
pub fn path(client: IpAddr, name: &HostName) -> Option<Path> {
    Path::new(&alloc::format!("/dns/{}/{name}", AddressText(client))).ok()
}

/// The value: the addresses as networks of one address each. Those that do not fit are left out.
pub fn value(addresses: impl IntoIterator<Item = IpAddr>) -> String {
    let mut text = String::new();
    for address in addresses {
        let length = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        let before = text.len();
        text.push_str(if before == 0 { "{" } else { ", " });
        // Writing to a string does not fail.
        let _ = write!(text, "'{}/{length}'", AddressText(address));
        if text.len() >= VALUE_MAX {
            text.truncate(before);
            break;
        }
    }
    if text.is_empty() {
        return String::from(EMPTY_SET);
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn value_is_the_text_of_a_python_set() {
        let addresses = [address("93.184.216.34"), address("93.184.216.35")];
        assert_eq!(value(addresses), "{'93.184.216.34/32', '93.184.216.35/32'}");
        assert_eq!(value([address("2606:2800::1")]), "{'2606:2800::1/128'}");
        assert_eq!(value([]), "set()");
    }

    #[test]
    fn value_that_would_be_too_long_names_fewer_addresses() {
        let long = "2001:1111:2222:3333:4444:5555:6666:7777";
        let text = value((0..100).map(|_| address(long)));
        assert!(text.len() <= VALUE_MAX && text.ends_with("'}"));
        assert_eq!(text.matches('/').count(), 65);
    }

    #[test]
    fn names_that_are_too_long_for_a_key_are_left_out() {
        let client = address("10.137.0.10");
        let name = |len: usize| HostName::new(&"a".repeat(len)).unwrap();
        let expected = "/dns/10.137.0.10/updates.example.org";
        let short = HostName::new("updates.example.org").unwrap();
        assert_eq!(path(client, &short).unwrap().to_string(), expected);
        assert!(path(client, &name(46)).is_some());
        assert!(path(client, &name(47)).is_none());
        let client6 = address("fd09:24ef:4179::a89:a");
        assert_eq!(directory(client6), "/dns/fd09:24ef:4179::a89:a");
    }
}
