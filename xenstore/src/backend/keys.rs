//! The values of a vif's two folders, parsed strictly.
//!
//! Our own folder is written by the toolstack: a value that cannot be used is an administrator's mistake. The frontend's
//! folder is written by the client: anything may be there.
//!
//! Source: Xen `public/io/netif.h`.

use alloc::vec::Vec;
use core::fmt;
use core::net::IpAddr;

use xen::{DomId, GrantRef, PortNumber};

use super::{MAX_ADDRESSES, VifFeatures};
use crate::wire::check_path;

/// Why a vif cannot be served or connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyError {
    /// A key that must be there is missing.
    Missing(&'static str),
    /// A key has a value that cannot be used.
    Unusable(&'static str),
    /// The tx and the rx ring are the same page: never a mistake.
    SameRing,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(key) => write!(f, "no {key}"),
            Self::Unusable(key) => write!(f, "unusable {key}"),
            Self::SameRing => f.write_str("one page for both rings"),
        }
    }
}

/// A value, or nothing when the node is missing or may not be read.
pub(crate) type Value = Option<Vec<u8>>;

/// Reads a number: decimal digits only, at most ten, at most `u32::MAX`.
#[must_use]
pub fn number(value: &[u8]) -> Option<u32> {
    if value.is_empty() || value.len() > 10 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(value).ok()?.parse().ok()
}

/// Reads a feature: any number but 0 is yes; missing or junk is no.
#[must_use]
pub fn feature(value: Option<&[u8]>) -> bool {
    value.and_then(number).is_some_and(|number| number != 0)
}

/// Reads a name that is a number: decimal, without leading zeros.
#[must_use]
pub fn index(name: &str) -> Option<u16> {
    let canonical = name == "0" || !name.starts_with('0');
    if canonical {
        number(name.as_bytes()).and_then(|number| u16::try_from(number).ok())
    } else {
        None
    }
}

/// Reads `xx:xx:xx:xx:xx:xx`.
#[must_use]
pub fn mac(value: &[u8]) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = value.split(|&byte| byte == b':');
    for octet in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        *octet = u8::from_str_radix(core::str::from_utf8(part).ok()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Reads the toolstack's list of addresses: separated by spaces, junk between them skipped.
///
/// # Errors
///
/// [`KeyError::Unusable`] when there are more than [`MAX_ADDRESSES`], or only junk.
pub fn addresses(value: &[u8]) -> Result<Vec<IpAddr>, KeyError> {
    let mut addresses = Vec::new();
    let mut words = value
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
        .peekable();
    let empty = words.peek().is_none();
    for word in words {
        let address = core::str::from_utf8(word)
            .ok()
            .and_then(|word| word.parse().ok());
        if let Some(address) = address {
            if addresses.len() >= MAX_ADDRESSES {
                return Err(KeyError::Unusable("ip"));
            }
            addresses.push(address);
        }
    }
    if addresses.is_empty() && !empty {
        Err(KeyError::Unusable("ip"))
    } else {
        Ok(addresses)
    }
}

/// What our own folder says about a vif.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    /// The frontend's folder.
    pub(crate) frontend: alloc::string::String,
    pub(crate) mac: [u8; 6],
    pub(crate) addresses: Vec<IpAddr>,
}

impl Identity {
    /// The keys that [`Identity::parse`] wants, in its order.
    pub(crate) const KEYS: [&'static str; 4] = ["frontend", "frontend-id", "mac", "ip"];

    /// Reads the identity, which must be that of `client`.
    pub(crate) fn parse(client: DomId, values: [Value; 4]) -> Result<Self, KeyError> {
        let [frontend, id, mac_text, ip] = values;
        let id = id.ok_or(KeyError::Missing("frontend-id"))?;
        if number(&id) != Some(u32::from(client.0)) {
            return Err(KeyError::Unusable("frontend-id"));
        }
        let frontend = frontend.ok_or(KeyError::Missing("frontend"))?;
        let frontend = alloc::string::String::from_utf8(frontend)
            .ok()
            .filter(|path| belongs_to(path, client))
            .ok_or(KeyError::Unusable("frontend"))?;
        let mac_text = mac_text.ok_or(KeyError::Missing("mac"))?;
        let mac = mac(&mac_text).ok_or(KeyError::Unusable("mac"))?;
        let addresses = addresses(&ip.unwrap_or_default())?;
        Ok(Self {
            frontend,
            mac,
            addresses,
        })
    }
}

/// Whether `path` is a well-formed path below the home of `domain`.
#[must_use]
pub fn belongs_to(path: &str, domain: DomId) -> bool {
    let below = path
        .strip_prefix("/local/domain/")
        .and_then(|rest| rest.split_once('/'))
        .is_some_and(|(owner, below)| index(owner) == Some(domain.0) && !below.is_empty());
    below && check_path(path).is_ok()
}

/// What a frontend publishes before it connects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FrontendKeys {
    pub(crate) tx_ring: GrantRef,
    pub(crate) rx_ring: GrantRef,
    pub(crate) port: PortNumber,
    pub(crate) features: VifFeatures,
}

impl FrontendKeys {
    /// The keys that [`FrontendKeys::parse`] wants, in its order.
    pub(crate) const KEYS: [&'static str; 11] = [
        "tx-ring-ref",
        "rx-ring-ref",
        "event-channel",
        "request-rx-copy",
        "multi-queue-num-queues",
        "feature-rx-notify",
        "feature-sg",
        "feature-gso-tcpv4",
        "feature-gso-tcpv6",
        "feature-no-csum-offload",
        "feature-ipv6-csum-offload",
    ];

    /// Reads the keys. We offer one queue and one event channel for both rings, so anything else is refused.
    pub(crate) fn parse(values: &[Value; 11]) -> Result<Self, KeyError> {
        let [
            tx,
            rx,
            port,
            rx_copy,
            queues,
            rx_notify,
            sg,
            gso4,
            gso6,
            no_csum,
            csum6,
        ] = values;
        let required = |value: &Value, key| {
            let value = value.as_deref().ok_or(KeyError::Missing(key))?;
            number(value).ok_or(KeyError::Unusable(key))
        };
        if let Some(queues) = queues
            && number(queues) != Some(1)
        {
            return Err(KeyError::Unusable("multi-queue-num-queues"));
        }
        if required(rx_copy, "request-rx-copy")? != 1 {
            return Err(KeyError::Unusable("request-rx-copy"));
        }
        let tx_ring = GrantRef(required(tx, "tx-ring-ref")?);
        let rx_ring = GrantRef(required(rx, "rx-ring-ref")?);
        let port = PortNumber(required(port, "event-channel")?);
        if tx_ring == rx_ring {
            return Err(KeyError::SameRing);
        }
        let features = VifFeatures {
            rx_notify: feature(rx_notify.as_deref()),
            scatter_gather: feature(sg.as_deref()),
            gso_tcpv4: feature(gso4.as_deref()),
            gso_tcpv6: feature(gso6.as_deref()),
            checksum_ipv4: !feature(no_csum.as_deref()),
            checksum_ipv6: feature(csum6.as_deref()),
        };
        Ok(Self {
            tx_ring,
            rx_ring,
            port,
            features,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;

    fn linux_keys() -> [Value; 11] {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        [
            text("8"),
            text("9"),
            text("17"),
            text("1"),
            None,
            text("1"),
            text("1"),
            text("1"),
            text("1"),
            None,
            text("1"),
        ]
    }

    #[test]
    fn a_linux_frontend_is_understood() {
        let keys = FrontendKeys::parse(&linux_keys()).unwrap();
        assert_eq!(
            (keys.tx_ring, keys.rx_ring, keys.port),
            (GrantRef(8), GrantRef(9), PortNumber(17))
        );
        let all = VifFeatures {
            rx_notify: true,
            scatter_gather: true,
            gso_tcpv4: true,
            gso_tcpv6: true,
            checksum_ipv4: true,
            checksum_ipv6: true,
        };
        assert_eq!(keys.features, all);
    }

    #[test]
    fn b22_junk_in_ring_refs_and_port_is_refused() {
        let names = ["tx-ring-ref", "rx-ring-ref", "event-channel"];
        for (position, name) in names.into_iter().enumerate() {
            let mut keys = linux_keys();
            keys[position] = None;
            assert_eq!(FrontendKeys::parse(&keys), Err(KeyError::Missing(name)));
            let long = "9".repeat(1900);
            for junk in [
                "",
                "x",
                "-1",
                "+1",
                " 8",
                "8 ",
                "4294967296",
                "99999999999",
                "0x8",
                "8\0",
                "\u{fc}",
                &long,
            ] {
                keys[position] = Some(junk.as_bytes().to_vec());
                assert_eq!(
                    FrontendKeys::parse(&keys),
                    Err(KeyError::Unusable(name)),
                    "{junk:?}"
                );
            }
        }
        let mut keys = linux_keys();
        keys[1] = Some(b"008".to_vec());
        assert_eq!(FrontendKeys::parse(&keys), Err(KeyError::SameRing));
    }

    #[test]
    fn b23_anything_but_one_queue_with_one_channel_is_refused() {
        for queues in ["0", "2", "999", "junk", ""] {
            let mut keys = linux_keys();
            keys[4] = Some(queues.as_bytes().to_vec());
            assert_eq!(
                FrontendKeys::parse(&keys),
                Err(KeyError::Unusable("multi-queue-num-queues"))
            );
        }
        let mut keys = linux_keys();
        keys[4] = Some(b"1".to_vec());
        assert!(FrontendKeys::parse(&keys).is_ok());
        // With split channels only `event-channel-tx` and `event-channel-rx` exist.
        keys[2] = None;
        assert_eq!(
            FrontendKeys::parse(&keys),
            Err(KeyError::Missing("event-channel"))
        );
    }

    #[test]
    fn b30_a_frontend_without_rx_copy_is_refused() {
        let mut keys = linux_keys();
        for (value, error) in [
            (None, KeyError::Missing("request-rx-copy")),
            (Some(b"0".to_vec()), KeyError::Unusable("request-rx-copy")),
            (Some(b"2".to_vec()), KeyError::Unusable("request-rx-copy")),
        ] {
            keys[3] = value;
            assert_eq!(FrontendKeys::parse(&keys), Err(error));
        }
    }

    #[test]
    fn features_that_are_missing_or_junk_are_not_there() {
        let mut keys = linux_keys();
        for value in &mut keys[5..] {
            *value = Some(b"yes".to_vec());
        }
        let keys = FrontendKeys::parse(&keys).unwrap();
        // A blank IPv4 checksum is allowed unless the frontend objects.
        assert_eq!(
            keys.features,
            VifFeatures {
                checksum_ipv4: true,
                ..VifFeatures::default()
            }
        );
    }

    #[test]
    fn identity_must_agree_with_the_path() {
        let values = |frontend: &str, id: &str, mac: &str, ip: &str| {
            [frontend, id, mac, ip].map(|text| Some(text.as_bytes().to_vec()))
        };
        let good = values(
            "/local/domain/7/device/vif/0",
            "7",
            "00:16:3e:5e:6C:00",
            "10.137.0.6 fd09::6",
        );
        let identity = Identity::parse(DomId(7), good.clone()).unwrap();
        assert_eq!(identity.mac, [0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x00]);
        assert_eq!(
            identity.addresses,
            vec![
                "10.137.0.6".parse::<IpAddr>().unwrap(),
                "fd09::6".parse().unwrap()
            ]
        );
        assert_eq!(
            Identity::parse(DomId(8), good),
            Err(KeyError::Unusable("frontend-id"))
        );
        for path in [
            "",
            "/",
            "/local/domain/70/device/vif/0",
            "/local/domain/7",
            "/local/domain/7/",
            "device/vif/0",
            "/local/domain/7/../8",
            "/local/domain/07/device/vif/0",
            "/local/domain//7/a",
        ] {
            let values = values(path, "7", "00:16:3e:5e:6c:00", "");
            assert_eq!(
                Identity::parse(DomId(7), values),
                Err(KeyError::Unusable("frontend")),
                "{path}"
            );
        }
    }

    #[test]
    fn b40_an_unusable_address_list_or_mac_refuses_the_vif() {
        let many = "10.0.0.1 ".repeat(MAX_ADDRESSES + 1);
        for list in [
            "10.137.0",
            "junk",
            "10.137.0.6.7 ::g",
            &many,
            &"1".repeat(2000),
        ] {
            assert_eq!(
                addresses(list.as_bytes()),
                Err(KeyError::Unusable("ip")),
                "{list}"
            );
        }
        assert_eq!(addresses(b""), Ok(vec![]));
        assert_eq!(addresses(b"  \n"), Ok(vec![]));
        // Junk beside an address costs only the junk: nothing is allowed for it.
        assert_eq!(
            addresses(b"junk 10.137.0.6 \xFF"),
            Ok(vec![[10, 137, 0, 6].into()])
        );
        for text in [
            "",
            "00:16:3e:5e:6c",
            "00:16:3e:5e:6c:00:00",
            "0:16:3e:5e:6c:00",
            "00:16:3e:5e:6c:0g",
            "+0:16:3e:5e:6c:00",
            "00-16-3e-5e-6c-00",
        ] {
            assert_eq!(mac(text.as_bytes()), None, "{text}");
        }
        let values = [
            Some(b"/local/domain/7/device/vif/0".to_vec()),
            Some(b"7".to_vec()),
            None,
            None,
        ];
        assert_eq!(
            Identity::parse(DomId(7), values),
            Err(KeyError::Missing("mac"))
        );
    }

    #[test]
    fn indices_have_no_leading_zeros() {
        assert_eq!(index("0"), Some(0));
        assert_eq!(index("32752"), Some(32752));
        for junk in [
            "",
            "00",
            "01",
            "-1",
            "65536",
            "a",
            "1a",
            &String::from("9").repeat(40),
        ] {
            assert_eq!(index(junk), None, "{junk}");
        }
    }
}
