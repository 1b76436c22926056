//! Wire formats: headers as views that cannot be built wrong.
//!
//! A parser takes the head of a frame apart into fixed-size arrays after one length check each; what
//! it returns can be read and rewritten without further checks. Nothing here allocates or panics.

pub(crate) mod arp;
pub(crate) mod checksum;
pub(crate) mod ethernet;
pub(crate) mod icmp;
pub(crate) mod ipv4;
pub(crate) mod ipv6;
pub(crate) mod plain;
pub(crate) mod transport;

/// IANA protocol numbers that the engine treats specially.
pub(crate) mod protocol {
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const DCCP: u8 = 33;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const AUTHENTICATION: u8 = 51;
    pub(crate) const ICMPV6: u8 = 58;
    pub(crate) const DESTINATION_OPTIONS: u8 = 60;
    pub(crate) const UDP_LITE: u8 = 136;
}

/// The low half of a number.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low half is what is wanted"
)]
pub(crate) const fn low16(value: u32) -> u16 {
    value as u16
}

/// The high half of a number.
#[inline(always)]
pub(crate) const fn high16(value: u32) -> u16 {
    low16(value >> 16)
}

/// The low half of a number.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low half is what is wanted"
)]
pub(crate) const fn low32(value: u64) -> u32 {
    value as u32
}

/// Sixteen bits at `offset`, in network order.
#[inline]
pub(crate) fn get_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    let chunk = bytes.get(offset..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*chunk))
}

/// Writes sixteen bits at `offset`, in network order; nothing if they do not fit.
#[inline]
pub(crate) fn put_u16(bytes: &mut [u8], offset: usize, value: u16) {
    if let Some(chunk) = bytes.get_mut(offset..).and_then(<[u8]>::first_chunk_mut) {
        *chunk = value.to_be_bytes();
    }
}

/// Copies as many bytes as both have.
#[inline]
pub(crate) fn copy(to: &mut [u8], from: &[u8]) {
    let len = to.len().min(from.len());
    if let (Some(to), Some(from)) = (to.get_mut(..len), from.get(..len)) {
        // Of the same length: this cannot panic, and the compiler sees it.
        to.copy_from_slice(from);
    }
}
