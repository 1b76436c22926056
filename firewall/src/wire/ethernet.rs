//! Ethernet II headers.

use crate::frame::{GATEWAY_MAC, Mac};

/// Bytes of an Ethernet header.
pub(crate) const HEADER: usize = 14;

pub(crate) const TYPE_IPV4: u16 = 0x0800;
pub(crate) const TYPE_ARP: u16 = 0x0806;
pub(crate) const TYPE_IPV6: u16 = 0x86dd;

/// The destination and source address of everything that leaves on one interface.
pub(crate) type Addresses = [u8; 12];

/// The addresses of frames from `source` to `destination`.
pub(crate) fn addresses(destination: Mac, source: Mac) -> Addresses {
    let [a, b, c, d, e, f] = destination;
    let [g, h, i, j, k, l] = source;
    [a, b, c, d, e, f, g, h, i, j, k, l]
}

/// The type of the payload.
#[inline]
pub(crate) const fn ethertype(header: &[u8; HEADER]) -> u16 {
    u16::from_be_bytes([header[12], header[13]])
}

/// Gives the frame new addresses.
#[inline]
pub(crate) fn set_addresses(header: &mut [u8; HEADER], addresses: &Addresses) {
    if let Some(chunk) = header.first_chunk_mut() {
        *chunk = *addresses;
    }
}

/// Our address on every client vif.
pub(crate) const OWN_CLIENT_SIDE: Mac = GATEWAY_MAC;
