//! What the engine is given: time, interfaces and frames.
//!
//! These types carry no policy. A [`Frame`] borrows the driver's memory; everything in it was written
//! by a peer and is checked by the engine before use.
//!
//! Source: `xen-netif.md` 6.1 (checksum flags), 6.3 (segmentation offload), 7 (data path).

use serde::{Deserialize, Serialize};

/// A point in time, in nanoseconds from any fixed start. It never runs backwards.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Time(u64);

impl Time {
    /// The start of the clock.
    pub const ZERO: Self = Self(0);

    /// `nanos` nanoseconds after the start.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// `millis` milliseconds after the start.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// `seconds` seconds after the start.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1_000_000_000))
    }

    /// Nanoseconds since the start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The time `nanos` nanoseconds later.
    #[must_use]
    pub const fn plus_nanos(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    /// The time `seconds` seconds later.
    #[must_use]
    pub const fn plus_secs(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1_000_000_000)))
    }
}

/// The number of a client vif: a small index that the caller chooses.
///
/// A number may be used again once its client is detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClientId(pub u16);

/// Where a frame came from, or where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Iface {
    /// Our frontend towards the netvm.
    Uplink,
    /// A client vif.
    Client(ClientId),
}

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The address of every client vif's backend side, and of every netvm's, by Qubes convention.
pub const GATEWAY_MAC: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

/// What is known about the transport checksum of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Checksum {
    /// The field holds only the pseudo-header sum, not inverted; whoever puts the frame on a wire
    /// must complete it. Only TCP and UDP, never in fragments.
    Blank,
    /// Complete, and the sender says that it has verified it.
    Validated,
    /// Complete, as far as anybody knows.
    Unverified,
}

/// The family of a segmentation-offload frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GsoFamily {
    /// TCP over IPv4.
    V4,
    /// TCP over IPv6.
    V6,
}

/// A frame that holds more TCP payload than fits a segment, to be cut by whoever sends it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gso {
    /// Payload bytes of each segment.
    pub mss: u16,
    /// What the peer says is inside. The engine compares it with the packet.
    pub family: GsoFamily,
}

/// The engine changes nothing behind this many bytes of a frame that it lets go on.
pub const MAX_EDITED: usize = 256;

/// An Ethernet frame on its way through the engine.
///
/// The engine rewrites the first [`MAX_EDITED`] bytes of `head` in place and may change `checksum` and
/// `gso`. It never lengthens a frame; it cuts padding behind the packet off `len`.
#[derive(Debug)]
pub struct Frame<'a> {
    /// The linear first part, from the destination address on: all headers, and the whole frame if it
    /// is at most a page. Headers beyond it make the frame malformed.
    pub head: &'a mut [u8],
    /// Length of the whole frame in bytes, at least that of `head`.
    pub len: u32,
    /// State of the transport checksum, in and out.
    pub checksum: Checksum,
    /// Set for segmentation-offload frames. The engine forces [`Checksum::Blank`] on them.
    pub gso: Option<Gso>,
}

impl<'a> Frame<'a> {
    /// A frame that is wholly in `head`, with a complete checksum that nobody vouches for.
    pub fn whole(head: &'a mut [u8]) -> Self {
        let len = u32::try_from(head.len()).unwrap_or(u32::MAX);
        Self {
            head,
            len,
            checksum: Checksum::Unverified,
            gso: None,
        }
    }
}
