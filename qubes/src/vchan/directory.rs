//! What a channel puts into xenstore and wants from it: paths and values, no wire format.
//!
//! | role | path | values |
//! | --- | --- | --- |
//! | server, ours | `data/vchan/<peer>/<port>/ring-ref`, `…/event-channel` (relative to our home) | decimal, no NUL |
//! | client, ours | `/local/domain/<peer>/data/vchan/<own domid>/<port>/…` | the same |
//!
//! A client can read the two leaves only, not the directory, and waits for `event-channel`, which is written last.
//!
//! Source: Xen `tools/libs/vchan/init.c`, Qubes libvchan `init.c`.

use alloc::format;
use alloc::string::String;

use xen::DomId;

/// Names one watch or one read of a channel. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u32);

/// Something for the kernel to do in xenstore. In order; errors need no report except where said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreRequest {
    /// Write `value` at `path` (relative to our home), then set the node's permissions: owner us without access
    /// for others, `reader` may read.
    Publish {
        /// Relative path.
        path: String,
        /// ASCII digits.
        value: String,
        /// The domain that may read it.
        reader: DomId,
    },
    /// Remove `path` (relative to our home) and what is below it. It may be gone already.
    Remove {
        /// Relative path.
        path: String,
    },
    /// Watch `path`; call [`super::Registry::fired`] with the token each time the watch fires. A watch that
    /// xenstore refuses is no failure: channels also look by themselves every [`super::channels::LOOK_AGAIN`].
    Watch {
        /// Absolute path of a node that may not exist yet.
        path: String,
        /// To name the watch.
        token: Token,
    },
    /// Take back a watch made before.
    Unwatch {
        /// As in the watch.
        path: String,
        /// As in the watch.
        token: Token,
    },
    /// Read `path` and give the content, or that there is none, to [`super::Registry::answer`].
    Read {
        /// Absolute path.
        path: String,
        /// To name the answer.
        token: Token,
    },
}

/// The directory of a channel that we serve, relative to our home: `data/vchan/<peer>/<port>`.
#[must_use]
pub fn offer_path(peer: DomId, port: u32) -> String {
    format!("data/vchan/{peer}/{port}")
}

/// The directory above all channels that we serve to `peer`: `data/vchan/<peer>`.
#[must_use]
pub fn peer_path(peer: DomId) -> String {
    format!("data/vchan/{peer}")
}

/// The directory where `server` advertises a channel to us.
#[must_use]
pub fn advertised_path(server: DomId, own: DomId, port: u32) -> String {
    format!("/local/domain/{server}/data/vchan/{own}/{port}")
}

/// The two nodes that advertise a channel, in the order in which they must be written.
#[must_use]
pub fn advertisement(
    peer: DomId,
    port: u32,
    ring_ref: u32,
    event_channel: u32,
) -> [(String, String); 2] {
    let base = offer_path(peer, port);
    [
        (format!("{base}/ring-ref"), format!("{ring_ref}")),
        (format!("{base}/event-channel"), format!("{event_channel}")),
    ]
}

/// A number as xenstore holds it: decimal digits only. `None` for anything else, also for nothing.
#[must_use]
pub fn parse_number(text: &[u8]) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u32, |number, byte| {
        let digit = u32::from(byte.checked_sub(b'0').filter(|digit| *digit < 10)?);
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_protocol() {
        assert_eq!(offer_path(DomId(0), 512), "data/vchan/0/512");
        assert_eq!(
            advertised_path(DomId(0), DomId(7), 111),
            "/local/domain/0/data/vchan/7/111"
        );
        let [ring_ref, event_channel] = advertisement(DomId(3), 513, 900, 14);
        assert_eq!(ring_ref, ("data/vchan/3/513/ring-ref".into(), "900".into()));
        assert_eq!(
            event_channel,
            ("data/vchan/3/513/event-channel".into(), "14".into())
        );
    }

    #[test]
    fn numbers_are_digits_only() {
        assert_eq!(parse_number(b"42"), Some(42));
        assert_eq!(parse_number(b"4294967295"), Some(u32::MAX));
        for bad in [
            &b""[..],
            b"-1",
            b"+1",
            b"1 ",
            b"0x10",
            b"4294967296",
            b"1\0",
            b"99999999999999999999",
        ] {
            assert_eq!(parse_number(bad), None, "{bad:?}");
        }
    }
}
