//! The control page of a vchan: offsets, ring orders, and what a client must refuse.
//!
//! Source: Xen `public/io/libxenvchan.h` (`struct vchan_interface`), `tools/libs/vchan/init.c` (choice of orders).

use alloc::vec::Vec;

use xen::{GrantRef, PAGE_SIZE};

use super::memory::{SharedBytes, read_byte};
use super::{MAPPED_PAGES_MAX, OpenError};

/// `left.cons`: written by the server, 4 bytes.
pub(crate) const LEFT_CONS: usize = 0x00;
/// `left.prod`: written by the client, 4 bytes.
pub(crate) const LEFT_PROD: usize = 0x04;
/// `right.cons`: written by the client, 4 bytes.
pub(crate) const RIGHT_CONS: usize = 0x08;
/// `right.prod`: written by the server, 4 bytes.
pub(crate) const RIGHT_PROD: usize = 0x0c;
/// `left_order` and `right_order`, 2 bytes each, in one aligned word.
pub(crate) const ORDERS: usize = 0x10;
/// `cli_live`: 2 no client yet, 1 connected, 0 gone.
pub(crate) const CLIENT_LIVE: usize = 0x14;
/// `srv_live`: 1 alive, 0 gone.
pub(crate) const SERVER_LIVE: usize = 0x15;
/// `cli_notify`: events that the server wants from the client.
pub(crate) const CLIENT_NOTIFY: usize = 0x16;
/// `srv_notify`: events that the client wants from the server.
pub(crate) const SERVER_NOTIFY: usize = 0x17;
/// Grant references of the left ring's pages, then of the right ring's, 4 bytes each.
pub(crate) const GRANTS: usize = 0x18;

/// Notification bit: "tell me when you have produced data".
pub(crate) const NOTIFY_WRITE: u8 = 0x01;
/// Notification bit: "tell me when you have consumed data".
pub(crate) const NOTIFY_READ: u8 = 0x02;

/// The binary logarithm of a ring's size in bytes, `10..=20`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order(u8);

impl Order {
    /// 1,024 bytes, at offset 1,024 of the control page.
    pub const IN_PAGE_SMALL: Self = Self(10);
    /// 2,048 bytes, at offset 2,048 of the control page.
    pub const IN_PAGE_LARGE: Self = Self(11);
    /// One page of its own.
    pub const PAGE: Self = Self(12);
    /// 65,536 bytes in 16 pages: what qrexec needs so that the largest message fits at once.
    pub const QREXEC: Self = Self(16);

    /// The order with this number, if the protocol knows it.
    #[must_use]
    pub const fn new(order: u16) -> Option<Self> {
        match order {
            #[expect(clippy::cast_possible_truncation, reason = "at most 20 in this arm")]
            10..=20 => Some(Self(order as u8)),
            _ => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The ring's size in bytes, `1024..=1048576`.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1u32.wrapping_shl(self.0 as u32)
    }

    /// Pages of its own that the ring has; 0 when it lies in the control page.
    #[must_use]
    pub const fn pages(self) -> usize {
        if self.0 < 12 {
            0
        } else {
            1usize.wrapping_shl(self.0 as u32 - 12)
        }
    }

    /// Where in the control page the ring lies, in bytes, if it lies there.
    pub(crate) const fn in_page_offset(self) -> Option<usize> {
        match self.0 {
            10 => Some(1024),
            11 => Some(2048),
            _ => None,
        }
    }

    /// The smallest order with pages of its own for `bytes`; `None` above 1 MiB.
    const fn with_pages(bytes: u32) -> Option<Self> {
        let mut order = 12;
        while order <= 20 {
            if bytes <= Self(order).bytes() {
                return Some(Self(order));
            }
            order += 1;
        }
        None
    }
}

/// The orders of both rings. Never both in the same place of the control page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Orders {
    left: Order,
    right: Order,
}

impl Orders {
    /// 4,096 bytes each way: QubesDB, and the stock qrexec control channel.
    pub const PAGES: Self = Self {
        left: Order::PAGE,
        right: Order::PAGE,
    };
    /// 65,536 bytes each way: qrexec data channels.
    pub const QREXEC_DATA: Self = Self {
        left: Order::QREXEC,
        right: Order::QREXEC,
    };
    /// Our qrexec control channel: 65,536 bytes from dom0, whose daemon dies when a message does not fit; 4,096 back.
    pub const QREXEC_CONTROL: Self = Self {
        left: Order::QREXEC,
        right: Order::PAGE,
    };

    /// Both orders, if the rings do not overlap.
    #[must_use]
    pub const fn new(left: Order, right: Order) -> Option<Self> {
        if left.0 == right.0 && left.0 < 12 {
            return None;
        }
        Some(Self { left, right })
    }

    /// What the reference server chooses for these smallest sizes, in bytes: `read` towards it, `write` from it.
    ///
    /// `None` above 1 MiB.
    #[must_use]
    pub const fn for_sizes(read: u32, write: u32) -> Option<Self> {
        if read <= 1024 && write <= 2048 {
            return Self::new(Order::IN_PAGE_SMALL, Order::IN_PAGE_LARGE);
        }
        if read <= 2048 && write <= 1024 {
            return Self::new(Order::IN_PAGE_LARGE, Order::IN_PAGE_SMALL);
        }
        let (Some(mut left), Some(mut right)) = (Order::with_pages(read), Order::with_pages(write))
        else {
            return None;
        };
        if read <= 2048 {
            left = Order::IN_PAGE_LARGE;
        } else if write <= 2048 {
            right = Order::IN_PAGE_LARGE;
        }
        Self::new(left, right)
    }

    /// The order of the ring that carries data to the server.
    #[must_use]
    pub const fn left(self) -> Order {
        self.left
    }

    /// The order of the ring that carries data to the client.
    #[must_use]
    pub const fn right(self) -> Order {
        self.right
    }

    /// Ring pages beside the control page.
    #[must_use]
    pub const fn pages(self) -> usize {
        self.left.pages() + self.right.pages()
    }

    /// Both orders as they lie in the control page.
    pub(crate) const fn word(self) -> u32 {
        (self.left.0 as u32) | ((self.right.0 as u32) << 16)
    }
}

/// What a client learns from a control page, read once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(crate) orders: Orders,
    /// The grant references of the left ring's pages, then of the right ring's.
    pub(crate) grants: Vec<GrantRef>,
}

impl Offer {
    /// Copies orders and grant references out of a server's control page and checks them.
    ///
    /// # Errors
    ///
    /// [`OpenError::Stale`] for orders that the protocol does not have, rings that overlap, a grant reference of 0,
    /// a server that is gone, or a channel that already had its client; [`OpenError::Exhausted`] for rings of
    /// more than [`MAPPED_PAGES_MAX`] pages.
    pub(crate) fn read<M: SharedBytes>(control: &M) -> Result<Self, OpenError> {
        if read_byte(control, SERVER_LIVE) != 1 || read_byte(control, CLIENT_LIVE) != 2 {
            return Err(OpenError::Stale);
        }
        let [left_low, left_high, right_low, right_high] = control.read_u32(ORDERS).to_le_bytes();
        let left = Order::new(u16::from_le_bytes([left_low, left_high]));
        let right = Order::new(u16::from_le_bytes([right_low, right_high]));
        let (Some(left), Some(right)) = (left, right) else {
            return Err(OpenError::Stale);
        };
        let orders = Orders::new(left, right).ok_or(OpenError::Stale)?;
        let pages = orders.pages();
        if pages > MAPPED_PAGES_MAX {
            return Err(OpenError::Exhausted);
        }
        let mut grants = Vec::with_capacity(pages);
        for index in 0..pages {
            let gref = control.read_u32(GRANTS.wrapping_add(index.wrapping_mul(4)));
            if gref == 0 {
                return Err(OpenError::Stale);
            }
            grants.push(GrantRef(gref));
        }
        Ok(Self { orders, grants })
    }
}

const _: () = assert!(GRANTS + MAPPED_PAGES_MAX * 4 <= PAGE_SIZE);
const _: () = assert!(
    GRANTS + MAPPED_PAGES_MAX * 4 <= 1024,
    "in-page rings start at 1,024"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vchan::testing::TestPage;

    fn offer(left: u32, right: u32) -> TestPage {
        let page = TestPage::new();
        page.write_u32(ORDERS, left | (right << 16));
        page.write_bytes(CLIENT_LIVE, &[2, 1]);
        for index in 0..(MAPPED_PAGES_MAX + 8) {
            page.write_u32(GRANTS + index * 4, u32::try_from(index).unwrap() + 100);
        }
        page
    }

    #[test]
    fn sizes_choose_the_orders_of_the_reference_server() {
        for (read, write, left, right) in [
            (1, 1, 10, 11),
            (1024, 1024, 10, 11),
            (1024, 2048, 10, 11),
            (2048, 1024, 11, 10),
            (2048, 2048, 11, 12),
            (4096, 4096, 12, 12),
            (4097, 2048, 13, 11),
            (2000, 9000, 11, 14),
            (65536, 65536, 16, 16),
            (1 << 20, 1 << 20, 20, 20),
        ] {
            let orders = Orders::for_sizes(read, write).expect("within a mebibyte");
            assert_eq!(
                (orders.left().get(), orders.right().get()),
                (left, right),
                "{read}/{write}"
            );
        }
        assert_eq!(Orders::for_sizes((1 << 20) + 1, 1), None);
    }

    #[test]
    fn page_counts_match_the_table_of_the_protocol() {
        assert_eq!(Orders::PAGES.pages(), 2);
        assert_eq!(Orders::QREXEC_DATA.pages(), 32);
        assert_eq!(Orders::for_sizes(1024, 1024).unwrap().pages(), 0);
    }

    #[test]
    fn v3_orders_outside_the_protocol_are_refused() {
        for (left, right) in [
            (9, 12),
            (12, 9),
            (21, 12),
            (12, 21),
            (0, 0),
            (10, 10),
            (11, 11),
            (0xffff, 12),
        ] {
            assert_eq!(
                Offer::read(&offer(left, right)),
                Err(OpenError::Stale),
                "{left}/{right}"
            );
        }
        assert_eq!(Offer::read(&offer(20, 20)), Err(OpenError::Exhausted));
    }

    #[test]
    fn grants_are_listed_left_then_right_and_in_page_rings_have_none() {
        let read = Offer::read(&offer(13, 11)).expect("a fine offer");
        assert_eq!(read.grants, [GrantRef(100), GrantRef(101)]);
        let read = Offer::read(&offer(12, 12)).expect("a fine offer");
        assert_eq!(read.grants, [GrantRef(100), GrantRef(101)]);
        assert!(
            Offer::read(&offer(10, 11))
                .expect("a fine offer")
                .grants
                .is_empty()
        );
    }

    #[test]
    fn v7_grant_reference_zero_is_refused() {
        let page = offer(12, 12);
        page.write_u32(GRANTS + 4, 0);
        assert_eq!(Offer::read(&page), Err(OpenError::Stale));
    }

    #[test]
    fn v6_a_channel_that_had_its_client_is_refused() {
        for (client, server) in [(1, 1), (0, 1), (2, 0), (7, 1), (2, 2)] {
            let page = offer(12, 12);
            page.write_bytes(CLIENT_LIVE, &[client, server]);
            assert_eq!(
                Offer::read(&page),
                Err(OpenError::Stale),
                "{client}/{server}"
            );
        }
    }
}
