//! What is kept of a datagram under way, beside its payload: who it is, how long it may take, its first header.

use crate::address::Address;
use crate::frame::Time;
use crate::rule::Family;
use crate::wire::ethernet;
use crate::wire::ipv4::{Fragment, Network};

use super::blocks::NONE;

/// Longest header that is kept of a datagram's first fragment.
pub(super) const MAX_HEADER: usize = 120;

/// How long a datagram may take to become complete, in seconds.
const fn patience(family: Family) -> u64 {
    match family {
        Family::Ipv4 => 30,
        Family::Ipv6 => 60,
    }
}

/// What fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Addresses, as octets; IPv4 ones in the first four.
    src: [u8; 16],
    dst: [u8; 16],
    id: u32,
    /// IPv4 only: IPv6 fragments may name different next headers.
    protocol: u8,
    family: Family,
    /// The interface that they came from.
    pub(super) account: u16,
}

impl Identity {
    pub(super) fn of<A: Address>(account: u16, network: &Network<A>, fragment: Fragment) -> Self {
        let octets = |address: A| match address.to_ip() {
            core::net::IpAddr::V4(own) => {
                let [a, b, c, d] = own.octets();
                [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            }
            core::net::IpAddr::V6(own) => own.octets(),
        };
        Self {
            src: octets(network.src),
            dst: octets(network.dst),
            id: fragment.id,
            protocol: match A::FAMILY {
                Family::Ipv4 => network.protocol,
                Family::Ipv6 => 0,
            },
            family: A::FAMILY,
            account,
        }
    }
}

/// A datagram under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram {
    pub(super) identity: Identity,
    pub(super) expires: Time,
    /// First blocks of its pieces, in the order of their offsets.
    pub(super) first_piece: u16,
    pub(super) blocks: u16,
    /// Payload bytes present.
    present: u32,
    /// Payload bytes of the whole, once the last fragment has come.
    pub(super) whole: Option<u32>,
    pub(super) largest: u16,
    /// The largest fragment that must not be fragmented further.
    largest_unfragmentable: u16,
    header: [u8; MAX_HEADER],
    /// Zero until the first fragment has come.
    header_len: u16,
}

impl Datagram {
    /// One of which nothing has come yet.
    pub(super) fn new(identity: Identity, now: Time) -> Self {
        Self {
            identity,
            expires: now.plus_secs(patience(identity.family)),
            first_piece: NONE,
            blocks: 0,
            present: 0,
            whole: None,
            largest: 0,
            largest_unfragmentable: 0,
            header: [0; MAX_HEADER],
            header_len: 0,
        }
    }

    /// Notes what a stored fragment, whose packet starts at `head[14]`, says about its datagram.
    pub(super) fn note<A: Address>(
        &mut self,
        head: &[u8],
        network: &Network<A>,
        fragment: Fragment,
        payload_len: usize,
    ) {
        let len = u32::try_from(payload_len).unwrap_or(0);
        self.present = self.present.saturating_add(len);
        if !fragment.more {
            self.whole = Some(u32::from(fragment.offset) + len);
        }
        let size = u16::try_from(network.total_len).unwrap_or(u16::MAX);
        self.largest = self.largest.max(size);
        if network.dont_fragment {
            self.largest_unfragmentable = self.largest_unfragmentable.max(size);
        }
        if fragment.offset == 0 {
            self.header_len = keep_header(&mut self.header, head, network, fragment);
        }
    }

    /// Whether nothing is missing.
    pub(super) fn is_complete(&self) -> bool {
        self.whole == Some(self.present) && self.header_len != 0
    }

    /// The Ethernet header, and the IP header without what speaks of fragments.
    pub(super) fn header(&self) -> &[u8] {
        self.header
            .get(..usize::from(self.header_len))
            .unwrap_or_default()
    }

    /// Whether the whole must not be fragmented further. As on Linux: if its largest fragment must not.
    pub(super) const fn is_unfragmentable(&self) -> bool {
        self.largest_unfragmentable == self.largest
    }
}

/// Keeps Ethernet header and what precedes the payload, without the IPv6 fragment header. Returns the
/// number of bytes, zero if they do not fit.
fn keep_header<A: Address>(
    header: &mut [u8; MAX_HEADER],
    head: &[u8],
    network: &Network<A>,
    fragment: Fragment,
) -> u16 {
    let without = match A::FAMILY {
        Family::Ipv4 => usize::from(network.header_len),
        Family::Ipv6 => usize::from(network.header_len).saturating_sub(8),
    };
    let len = ethernet::HEADER + without;
    let (Some(from), Some(to)) = (head.get(..len), header.get_mut(..len)) else {
        return 0;
    };
    to.copy_from_slice(from);
    if A::FAMILY == Family::Ipv6 {
        let named_at = ethernet::HEADER + usize::from(fragment.previous_next_header);
        if let Some(next) = header.get_mut(named_at) {
            *next = network.protocol;
        }
    }
    u16::try_from(len).unwrap_or(0)
}
