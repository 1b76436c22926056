//! The headers of a plain packet in one piece: Ethernet, IP without options or extension headers, and
//! the first eight bytes of TCP or UDP.
//!
//! One length check gives an array in which every field has a fixed place, so that the shortest way
//! through the engine reads and writes without further checks.
//!
//! Source: RFC 791, RFC 8200.

use super::{checksum, ethernet};
use crate::address::{Address, V4, V6};
use crate::frame::Mac;

/// An Ethernet address as [`PlainHeaders::destination`] gives it.
pub(crate) const fn mac_word(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([0, 0, a, b, c, d, e, f])
}

/// The Ethernet destination in the high 48 bits.
#[inline(always)]
pub(crate) fn destination(header: &[u8; ethernet::HEADER]) -> u64 {
    u64::from_le_bytes(field::<{ ethernet::HEADER }, 0, 8>(header)) << 16
}

/// The bytes at the place where IPv4 and IPv6 say that they are: the Ethernet type, and the first byte
/// of the IP header.
#[inline(always)]
pub(crate) fn start_word(head: &[u8; 42]) -> u32 {
    u32::from_le_bytes(field::<42, 12, 4>(head)) & 0x00ff_ffff
}

/// The bytes of a field, in one load.
#[inline(always)]
fn field<const LEN: usize, const AT: usize, const N: usize>(front: &[u8; LEN]) -> [u8; N] {
    let bytes = front.get(AT..).and_then(<[u8]>::first_chunk);
    bytes.copied().unwrap_or([0; N])
}

/// A family's plain headers.
pub(crate) trait PlainHeaders: Address {
    /// The headers.
    type Front;
    /// Takes them off the head of a frame.
    fn front(head: &[u8]) -> Option<(&Self::Front, &[u8])>;
    /// Takes them off the head of a frame, to write.
    fn front_mut(head: &mut [u8]) -> Option<(&mut Self::Front, &mut [u8])>;
    /// The upper-layer protocol.
    fn protocol(front: &Self::Front) -> u8;
    /// The Ethernet destination in the high 48 bits.
    fn destination(front: &Self::Front) -> u64;
    /// Bytes of the whole packet.
    fn total_len(front: &Self::Front) -> u32;
    /// The time to live.
    fn ttl(front: &Self::Front) -> u8;
    /// Whether routers must not fragment the packet.
    fn dont_fragment(front: &Self::Front) -> bool;
    /// Source port in the high half, destination port in the low half.
    fn ports(front: &Self::Front) -> u32;
    /// Source and destination, if there is nothing unusual about the network layer; [`start_word`] was
    /// looked at.
    fn read(front: &Self::Front, frame_len: u32) -> Option<(Self, Self)>;
    /// The first bytes of the transport.
    fn transport(front: &mut Self::Front) -> Option<&mut [u8; 8]>;
    /// Writes Ethernet and IP addresses, counts the time to live down by one, and applies `delta` to
    /// the header's checksum, if it has one.
    fn redirect(
        front: &mut Self::Front,
        link: &ethernet::Addresses,
        src: Self,
        dst: Self,
        delta: u16,
    );
}

/// IPv4 with a header of 20 bytes, as [`start_word`] gives it.
pub(crate) const START_V4: u32 = 0x0045_0008;

/// IPv6, with the low half of the first byte cleared.
pub(crate) const START_V6: u32 = 0x0060_dd86;

impl PlainHeaders for V4 {
    type Front = [u8; 42];

    #[inline(always)]
    fn front(head: &[u8]) -> Option<(&[u8; 42], &[u8])> {
        head.split_first_chunk()
    }

    #[inline(always)]
    fn front_mut(head: &mut [u8]) -> Option<(&mut [u8; 42], &mut [u8])> {
        head.split_first_chunk_mut()
    }

    #[inline(always)]
    fn protocol(front: &[u8; 42]) -> u8 {
        front[23]
    }

    #[inline(always)]
    fn destination(front: &[u8; 42]) -> u64 {
        u64::from_le_bytes(field::<42, 0, 8>(front)) << 16
    }

    #[inline(always)]
    fn total_len(front: &[u8; 42]) -> u32 {
        u32::from(u16::from_be_bytes(field::<42, 16, 2>(front)))
    }

    #[inline(always)]
    fn ttl(front: &[u8; 42]) -> u8 {
        front[22]
    }

    fn dont_fragment(front: &[u8; 42]) -> bool {
        front[20] & 0x40 != 0
    }

    #[inline(always)]
    fn ports(front: &[u8; 42]) -> u32 {
        u32::from_be_bytes(field::<42, 34, 4>(front))
    }

    #[inline(always)]
    fn read(front: &[u8; 42], frame_len: u32) -> Option<(Self, Self)> {
        // Neither an offset nor more to come; "don't fragment" may be set.
        let fragment = u16::from_ne_bytes(field::<42, 20, 2>(front)) & 0x3fff_u16.to_be();
        let header: &[u8; 20] = front.get(14..)?.first_chunk()?;
        let right = fragment == 0
            && Self::total_len(front) <= frame_len.wrapping_sub(14)
            && checksum::header_is_right(header);
        right.then(|| {
            let src = u32::from_be_bytes(field::<42, 26, 4>(front));
            (src, u32::from_be_bytes(field::<42, 30, 4>(front)))
        })
    }

    #[inline(always)]
    fn transport(front: &mut [u8; 42]) -> Option<&mut [u8; 8]> {
        front.last_chunk_mut()
    }

    #[inline(always)]
    fn redirect(
        front: &mut [u8; 42],
        link: &ethernet::Addresses,
        src: Self,
        dst: Self,
        delta: u16,
    ) {
        if let Some(ethernet) = front.first_chunk_mut::<12>() {
            *ethernet = *link;
        }
        let field = u16::from_be_bytes([front[24], front[25]]);
        front[22] = front[22].wrapping_sub(1);
        [front[24], front[25]] = checksum::apply(field, delta).to_be_bytes();
        // Flows hold them in this order.
        let addresses = u64::from(dst) << 32 | u64::from(src);
        let addresses = addresses.rotate_left(32).to_be_bytes();
        if let Some(own) = front.get_mut(26..).and_then(<[u8]>::first_chunk_mut) {
            *own = addresses;
        }
    }
}

impl PlainHeaders for V6 {
    type Front = [u8; 62];

    #[inline(always)]
    fn front(head: &[u8]) -> Option<(&[u8; 62], &[u8])> {
        head.split_first_chunk()
    }

    #[inline(always)]
    fn front_mut(head: &mut [u8]) -> Option<(&mut [u8; 62], &mut [u8])> {
        head.split_first_chunk_mut()
    }

    #[inline(always)]
    fn protocol(front: &[u8; 62]) -> u8 {
        front[20]
    }

    #[inline(always)]
    fn destination(front: &[u8; 62]) -> u64 {
        u64::from_le_bytes(field::<62, 0, 8>(front)) << 16
    }

    #[inline(always)]
    fn total_len(front: &[u8; 62]) -> u32 {
        u32::from(u16::from_be_bytes(field::<62, 18, 2>(front))) + 40
    }

    #[inline(always)]
    fn ttl(front: &[u8; 62]) -> u8 {
        front[21]
    }

    fn dont_fragment(_: &[u8; 62]) -> bool {
        true
    }

    #[inline(always)]
    fn ports(front: &[u8; 62]) -> u32 {
        u32::from_be_bytes(field::<62, 54, 4>(front))
    }

    #[inline(always)]
    fn read(front: &[u8; 62], frame_len: u32) -> Option<(Self, Self)> {
        let src = V6(
            u64::from_be_bytes(field::<62, 22, 8>(front)),
            u64::from_be_bytes(field::<62, 30, 8>(front)),
        );
        let dst = V6(
            u64::from_be_bytes(field::<62, 38, 8>(front)),
            u64::from_be_bytes(field::<62, 46, 8>(front)),
        );
        (Self::total_len(front) <= frame_len.wrapping_sub(14)).then_some((src, dst))
    }

    #[inline(always)]
    fn transport(front: &mut [u8; 62]) -> Option<&mut [u8; 8]> {
        front.last_chunk_mut()
    }

    #[inline(always)]
    fn redirect(front: &mut [u8; 62], link: &ethernet::Addresses, src: Self, dst: Self, _: u16) {
        if let Some(ethernet) = front.first_chunk_mut::<12>() {
            *ethernet = *link;
        }
        front[21] = front[21].wrapping_sub(1);
        let words = [src.0, src.1, dst.0, dst.1];
        if let Some(own) = front.get_mut(22..) {
            let (chunks, _) = own.as_chunks_mut::<8>();
            for (to, from) in chunks.iter_mut().zip(words) {
                *to = from.to_be_bytes();
            }
        }
    }
}
