//! The slots of the network protocol, between words of a ring and plain data.
//!
//! "Tx" and "rx" keep the frontend's point of view on both sides: tx is frontend to backend. Fields are
//! native endian, which on x86 is little endian; a slot is read and written as whole 32-bit words.
//! The two directions swap the meaning of flag bits 0 and 1: each has its own flag type here.
//!
//! Every word of every slot that we write is initialised (XSA-216).
//!
//! Source: Xen `public/io/netif.h`.

use crate::types::GrantRef;

/// Words of a tx slot (12 bytes).
pub const TX_WORDS: usize = 3;
/// Words of an rx slot (8 bytes).
pub const RX_WORDS: usize = 2;

/// Data slots that every implementation must accept in one frame (`XEN_NETIF_NR_SLOTS_MIN`).
pub const NR_SLOTS_MIN: usize = 18;

const fn low(word: u32) -> u16 {
    let [a, b, _, _] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

const fn high(word: u32) -> u16 {
    let [_, _, a, b] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

const fn word(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

/// Flags of a tx request. Bit 0 is the blank checksum, bit 1 the validated data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TxFlags(pub u16);

impl TxFlags {
    /// The L4 checksum field holds only the pseudo-header sum.
    pub const CSUM_BLANK: u16 = 1;
    /// The sender vouches for the data.
    pub const DATA_VALIDATED: u16 = 2;
    /// Another data slot follows.
    pub const MORE_DATA: u16 = 4;
    /// An extra-info slot follows.
    pub const EXTRA_INFO: u16 = 8;

    /// Whether `flag` is set.
    #[must_use]
    pub const fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }
}

/// Flags of an rx response. Bit 0 is the validated data, bit 1 the blank checksum: the other way round than in tx.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RxFlags(pub u16);

impl RxFlags {
    /// The sender vouches for the data.
    pub const DATA_VALIDATED: u16 = 1;
    /// The L4 checksum field holds only the pseudo-header sum.
    pub const CSUM_BLANK: u16 = 2;
    /// Another data slot follows.
    pub const MORE_DATA: u16 = 4;
    /// An extra-info slot follows.
    pub const EXTRA_INFO: u16 = 8;
    /// The obsolete way to announce GSO: never sent, dropped on receipt.
    pub const GSO_PREFIX: u16 = 16;

    /// Whether `flag` is set.
    #[must_use]
    pub const fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }
}

/// Status of a tx response or (as a negative count) of an rx response.
pub mod status {
    /// The slot was an extra-info slot.
    pub const NULL: i16 = 1;
    /// The data was taken.
    pub const OKAY: i16 = 0;
    /// The frame was malformed or could not be copied.
    pub const ERROR: i16 = -1;
    /// The frame was dropped.
    pub const DROPPED: i16 = -2;
}

/// A tx request (12 bytes): one page fragment of a frame from the frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxRequest {
    /// The page.
    pub gref: GrantRef,
    /// Byte offset of the data in the page.
    pub offset: u16,
    /// Checksum flags count in the first slot of a frame only, `MORE_DATA` in all.
    pub flags: TxFlags,
    /// Opaque to the backend, echoed in the response.
    pub id: u16,
    /// In the first slot of a frame the length of the whole frame, else of this fragment, in bytes.
    pub size: u16,
}

impl TxRequest {
    /// Reads a slot.
    #[must_use]
    pub const fn decode(words: [u32; TX_WORDS]) -> Self {
        let [gref, second, third] = words;
        Self {
            gref: GrantRef(gref),
            offset: low(second),
            flags: TxFlags(high(second)),
            id: low(third),
            size: high(third),
        }
    }

    /// Writes a slot.
    #[must_use]
    pub const fn encode(self) -> [u32; TX_WORDS] {
        [
            self.gref.0,
            word(self.offset, self.flags.0),
            word(self.id, self.size),
        ]
    }
}

/// A tx response: what became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxResponse {
    /// The request's id.
    pub id: u16,
    /// One of [`status`].
    pub status: i16,
}

impl TxResponse {
    /// Reads a slot.
    #[must_use]
    pub const fn decode(words: [u32; TX_WORDS]) -> Self {
        let [first, _, _] = words;
        Self {
            id: low(first),
            status: high(first).cast_signed(),
        }
    }

    /// Writes a slot; its unused 8 bytes are zero.
    #[must_use]
    pub const fn encode(self) -> [u32; TX_WORDS] {
        [word(self.id, self.status.cast_unsigned()), 0, 0]
    }
}

/// An rx request (8 bytes): a page that the frontend offers for received data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RxRequest {
    /// Echoed in the response of the same slot.
    pub id: u16,
    /// The page.
    pub gref: GrantRef,
}

impl RxRequest {
    /// Reads a slot.
    #[must_use]
    pub const fn decode(words: [u32; RX_WORDS]) -> Self {
        let [first, gref] = words;
        Self {
            id: low(first),
            gref: GrantRef(gref),
        }
    }

    /// Writes a slot.
    #[must_use]
    pub const fn encode(self) -> [u32; RX_WORDS] {
        [word(self.id, 0), self.gref.0]
    }
}

/// An rx response (8 bytes): data put into the page of the request in the same slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RxResponse {
    /// The request's id.
    pub id: u16,
    /// Byte offset of the data in the page.
    pub offset: u16,
    /// Checksum and extra flags count in the first slot of a frame only.
    pub flags: RxFlags,
    /// Bytes in this slot, or a negative [`status`].
    pub status: i16,
}

impl RxResponse {
    /// Reads a slot.
    #[must_use]
    pub const fn decode(words: [u32; RX_WORDS]) -> Self {
        let [first, second] = words;
        Self {
            id: low(first),
            offset: high(first),
            flags: RxFlags(low(second)),
            status: high(second).cast_signed(),
        }
    }

    /// Writes a slot.
    #[must_use]
    pub const fn encode(self) -> [u32; RX_WORDS] {
        [
            word(self.id, self.offset),
            word(self.flags.0, self.status.cast_unsigned()),
        ]
    }
}

/// The address family of a GSO frame, as the protocol numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GsoType {
    /// TCP over IPv4 (1).
    TcpV4,
    /// TCP over IPv6 (2).
    TcpV6,
}

/// An extra-info slot (8 bytes), which follows the first slot of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtraKind {
    /// The frame is one TCP packet to be cut into segments of `size` payload bytes (MSS).
    Gso {
        /// Payload bytes of each segment; 0 is for the reader to refuse.
        size: u16,
        /// The family; `None` for a number that the protocol does not know.
        family: Option<GsoType>,
    },
    /// Multicast filter changes (2, 3), the hash (4), XDP headroom (5): known, unused by us.
    Ignored(u8),
    /// A type that the protocol does not know.
    Unknown(u8),
}

/// An extra-info slot: its kind, and whether another extra follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extra {
    /// What it says.
    pub kind: ExtraKind,
    /// Another extra-info slot follows.
    pub more: bool,
}

impl Extra {
    const TYPE_GSO: u8 = 1;
    const FLAG_MORE: u8 = 1;

    /// Reads the 8 bytes that an extra uses of its slot.
    #[must_use]
    pub const fn decode(first: u32, second: u32) -> Self {
        let [kind, flags, _, _] = first.to_le_bytes();
        let [family, _, _, _] = second.to_le_bytes();
        let kind = match kind {
            Self::TYPE_GSO => ExtraKind::Gso {
                size: high(first),
                family: match family {
                    1 => Some(GsoType::TcpV4),
                    2 => Some(GsoType::TcpV6),
                    _ => None,
                },
            },
            2..=5 => ExtraKind::Ignored(kind),
            other => ExtraKind::Unknown(other),
        };
        Self {
            kind,
            more: flags & Self::FLAG_MORE != 0,
        }
    }

    /// The two words of a GSO extra with nothing after it.
    #[must_use]
    pub const fn encode_gso(size: u16, family: GsoType) -> [u32; 2] {
        let family = match family {
            GsoType::TcpV4 => 1,
            GsoType::TcpV6 => 2,
        };
        [word(Self::TYPE_GSO as u16, size), family]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tx_request_fields_stand_where_netif_h_puts_them() {
        let bytes: [u8; 12] = [
            0x78, 0x56, 0x34, 0x12, 0x40, 0x01, 0x0b, 0x00, 0xcd, 0xab, 0xea, 0x05,
        ];
        let mut words = [0u32; 3];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(4)) {
            *word = u32::from_le_bytes(chunk.try_into().unwrap());
        }
        let request = TxRequest::decode(words);
        assert_eq!(
            request,
            TxRequest {
                gref: GrantRef(0x1234_5678),
                offset: 0x140,
                flags: TxFlags(TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED | TxFlags::EXTRA_INFO),
                id: 0xabcd,
                size: 1514
            }
        );
        assert_eq!(request.encode(), words);
    }

    #[test]
    fn rx_response_round_trips_with_negative_status() {
        let response = RxResponse {
            id: 7,
            offset: 2,
            flags: RxFlags(RxFlags::CSUM_BLANK),
            status: status::ERROR,
        };
        assert_eq!(response.encode(), [0x0002_0007, 0xffff_0002]);
        assert_eq!(RxResponse::decode(response.encode()), response);
    }

    #[test]
    fn tx_response_pads_with_zeros() {
        assert_eq!(
            TxResponse {
                id: 0xffff,
                status: status::NULL
            }
            .encode(),
            [0x0001_ffff, 0, 0]
        );
    }

    #[test]
    fn gso_extra_stands_where_netif_h_puts_it() {
        // type 1, flags 0, size 1448 = 0x05a8, gso type 1, pad, features
        let [first, second] = Extra::encode_gso(1448, GsoType::TcpV4);
        assert_eq!(first.to_le_bytes(), [1, 0, 0xa8, 0x05]);
        assert_eq!(second.to_le_bytes(), [1, 0, 0, 0]);
        let extra = Extra::decode(first, second);
        assert_eq!(
            extra.kind,
            ExtraKind::Gso {
                size: 1448,
                family: Some(GsoType::TcpV4)
            }
        );
        assert!(!extra.more);
        assert_eq!(Extra::decode(0x0106, 0).kind, ExtraKind::Unknown(6));
        assert!(Extra::decode(0x0106, 0).more);
    }
}
