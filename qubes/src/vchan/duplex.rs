//! The two byte rings of a channel, for both roles.
//!
//! # Notification without atomic instructions
//!
//! Either side keeps a byte in which it asks the other for events; the asker sets bits, the other clears them. The
//! reference uses locked instructions on that byte. Plain single-byte copies serve as well, for these reasons:
//!
//! * Only the asker sets bits. Asking reads the byte and writes it back with one bit more; if the peer cleared a
//!   bit in between, writing it back costs a needless event later. Asking is followed by a full fence and another
//!   look at the index, so an index that moved before the peer could see the bit is noticed.
//! * Telling reads the byte after the index was published and a full fence. If the bit is not there, the peer has yet
//!   to ask, and will look at the index after that. If it is there, the whole byte is cleared **and then** an event
//!   is sent; a bit that the peer set in between is lost, but the peer finds the event pending when it goes to
//!   sleep, and whoever wakes evaluates everything and asks again.
//!
//! The bytes beside it belong to others (liveness), so nothing wider than a byte is ever written there.
//!
//! # Events
//!
//! An event that became due is remembered and sent by the owner of the port ([`Duplex::take_event`]), so that
//! several reads and writes cost one hypercall. It must be sent before the domain sleeps.

use alloc::vec::Vec;

use xen::PAGE_SIZE;
use xen::shared::{full_fence, read_fence, write_fence};
use xen::stream::{ByteStream, StreamError};

use super::layout::{
    CLIENT_LIVE, CLIENT_NOTIFY, GRANTS, LEFT_CONS, LEFT_PROD, NOTIFY_READ, NOTIFY_WRITE, ORDERS,
    Order, Orders, RIGHT_CONS, RIGHT_PROD, SERVER_LIVE, SERVER_NOTIFY,
};
use super::memory::{SharedBytes, read_byte};

/// Which end of a channel this is. The server owns the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Reads the left ring, writes the right one.
    Server,
    /// Reads the right ring, writes the left one.
    Client,
}

/// What the peer's live byte says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// No client has come yet. Only a server sees this.
    Waiting,
    /// Connected.
    Alive,
    /// Gone, or the byte holds something that the protocol does not have.
    Gone,
}

/// Where a ring's bytes are.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the control page, from this offset on.
    Control(usize),
    /// In pages of its own: the first one's index in the channel's list.
    Pages(usize),
}

/// One direction: a ring, and our private copy of the index that we move.
#[derive(Clone, Copy, Debug)]
struct Ring {
    order: Order,
    place: Place,
    /// The index that we move: consumer when reading, producer when writing. Never read back from the page.
    own: u32,
    /// Where `own` is published, bytes into the control page.
    own_at: usize,
    /// Where the peer publishes the other index.
    peer_at: usize,
}

/// A channel whose memory is in place: two byte rings, liveness and notification bits.
#[derive(Debug)]
pub struct Duplex<M> {
    role: Role,
    control: M,
    pages: Vec<M>,
    incoming: Ring,
    outgoing: Ring,
    event_due: bool,
    broken: bool,
}

/// The left and the right ring's orders, places and index offsets (`prod`, `cons`).
const fn rings(orders: Orders) -> [(Order, Place, usize, usize); 2] {
    let left = match orders.left().in_page_offset() {
        Some(offset) => Place::Control(offset),
        None => Place::Pages(0),
    };
    let right = match orders.right().in_page_offset() {
        Some(offset) => Place::Control(offset),
        None => Place::Pages(orders.left().pages()),
    };
    [
        (orders.left(), left, LEFT_PROD, LEFT_CONS),
        (orders.right(), right, RIGHT_PROD, RIGHT_CONS),
    ]
}

impl<M: SharedBytes> Duplex<M> {
    fn new(role: Role, control: M, pages: Vec<M>, orders: Orders) -> Self {
        let [left, right] = rings(orders);
        let (read, write) = match role {
            Role::Server => (left, right),
            Role::Client => (right, left),
        };
        let incoming = Ring {
            order: read.0,
            place: read.1,
            own: control.read_u32(read.3),
            own_at: read.3,
            peer_at: read.2,
        };
        let outgoing = Ring {
            order: write.0,
            place: write.1,
            own: control.read_u32(write.2),
            own_at: write.2,
            peer_at: write.3,
        };
        Self {
            role,
            control,
            pages,
            incoming,
            outgoing,
            event_due: false,
            broken: false,
        }
    }

    /// Lays out a server's control page, which must be zeroed, and takes its end.
    ///
    /// `pages` are the left ring's pages, then the right ring's; `grants` their references in the same order.
    pub(crate) fn serve(control: M, pages: Vec<M>, grants: &[u32], orders: Orders) -> Self {
        for (index, gref) in grants.iter().enumerate() {
            control.write_u32(GRANTS.wrapping_add(index.wrapping_mul(4)), *gref);
        }
        control.write_u32(ORDERS, orders.word());
        control.write_bytes(SERVER_NOTIFY, &[0]);
        control.write_bytes(CLIENT_NOTIFY, &[NOTIFY_WRITE]);
        control.write_bytes(SERVER_LIVE, &[1]);
        control.write_bytes(CLIENT_LIVE, &[2]);
        write_fence();
        Self::new(Role::Server, control, pages, orders)
    }

    /// Takes the client's end of mapped memory and tells the server. The event becomes due.
    pub(crate) fn join(control: M, pages: Vec<M>, orders: Orders) -> Self {
        let mut duplex = Self::new(Role::Client, control, pages, orders);
        duplex.control.write_bytes(CLIENT_LIVE, &[1]);
        duplex.control.write_bytes(SERVER_NOTIFY, &[NOTIFY_WRITE]);
        full_fence();
        duplex.event_due = true;
        duplex
    }

    /// Which end this is.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// What the peer's live byte says now.
    #[must_use]
    pub fn peer(&self) -> Peer {
        let (offset, waiting) = match self.role {
            Role::Server => (CLIENT_LIVE, true),
            Role::Client => (SERVER_LIVE, false),
        };
        match read_byte(&self.control, offset) {
            1 => Peer::Alive,
            2 if waiting => Peer::Waiting,
            _ => Peer::Gone,
        }
    }

    /// Whether an event became due since the last call. Then the peer must be notified before we sleep.
    #[must_use]
    pub const fn take_event(&mut self) -> bool {
        core::mem::replace(&mut self.event_due, false)
    }

    /// Says goodbye in the live byte and gives the memory back: the control page, then the ring pages.
    ///
    /// The caller notifies the peer afterwards, whatever the notification bits say. What the peer has not read
    /// yet it may still read for as long as it has the memory.
    pub(crate) fn close(self) -> (M, Vec<M>) {
        let offset = match self.role {
            Role::Server => SERVER_LIVE,
            Role::Client => CLIENT_LIVE,
        };
        write_fence();
        self.control.write_bytes(offset, &[0]);
        full_fence();
        (self.control, self.pages)
    }

    /// Asks the peer for an event after it has moved an index.
    fn ask(&self, bit: u8) {
        let offset = match self.role {
            Role::Server => CLIENT_NOTIFY,
            Role::Client => SERVER_NOTIFY,
        };
        let asked = read_byte(&self.control, offset);
        self.control.write_bytes(offset, &[asked | bit]);
        full_fence();
    }

    /// Notes that the peer must be told of an index that we have moved, if it asked for that.
    fn tell(&mut self, bit: u8) {
        full_fence();
        let offset = match self.role {
            Role::Server => SERVER_NOTIFY,
            Role::Client => CLIENT_NOTIFY,
        };
        if read_byte(&self.control, offset) & bit != 0 {
            self.control.write_bytes(offset, &[0]);
            self.event_due = true;
        }
    }

    /// Bytes that wait to be read.
    fn fill(&mut self) -> Result<u32, StreamError> {
        let produced = self.control.read_u32(self.incoming.peer_at);
        let fill = produced.wrapping_sub(self.incoming.own);
        if fill > self.incoming.order.bytes() {
            self.broken = true;
            return Err(StreamError);
        }
        read_fence();
        Ok(fill)
    }

    /// Bytes that can be written.
    fn space(&mut self) -> Result<u32, StreamError> {
        let consumed = self.control.read_u32(self.outgoing.peer_at);
        let fill = self.outgoing.own.wrapping_sub(consumed);
        match self.outgoing.order.bytes().checked_sub(fill) {
            Some(space) => {
                full_fence();
                Ok(space)
            }
            None => {
                self.broken = true;
                Err(StreamError)
            }
        }
    }

    /// The page that holds ring position `index`, the offset in it, and how many ring bytes follow there.
    fn locate(&self, ring: &Ring, index: u32) -> Option<(&M, usize, usize)> {
        let size = ring.order.bytes();
        let position = index & size.wrapping_sub(1);
        let to_wrap = usize::try_from(size.wrapping_sub(position)).ok()?;
        let position = usize::try_from(position).ok()?;
        match ring.place {
            Place::Control(base) => Some((&self.control, base.wrapping_add(position), to_wrap)),
            Place::Pages(first) => {
                let page = self.pages.get(first.wrapping_add(position / PAGE_SIZE))?;
                let offset = position % PAGE_SIZE;
                Some((page, offset, PAGE_SIZE.wrapping_sub(offset)))
            }
        }
    }
}

/// The smaller of a buffer's length and `limit`.
fn bounded(len: usize, limit: u32) -> usize {
    usize::try_from(limit).map_or(len, |limit| len.min(limit))
}

impl<M: SharedBytes> ByteStream for Duplex<M> {
    /// What has arrived is read even when the peer is gone; the error comes when nothing is left.
    ///
    /// A return of 0 for a buffer that is not empty also asks the peer for an event.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        if self.broken {
            return Err(StreamError);
        }
        let mut fill = self.fill()?;
        if fill == 0 {
            self.ask(NOTIFY_WRITE);
            fill = self.fill()?;
        }
        if fill == 0 {
            if self.peer() != Peer::Gone {
                return Ok(0);
            }
            // The last bytes may have come between our look at the index and our look at the live byte.
            full_fence();
            fill = self.fill()?;
            if fill == 0 {
                return Err(StreamError);
            }
        }
        let wanted = bounded(buffer.len(), fill);
        let mut done = 0usize;
        while done < wanted {
            let Some((page, offset, run)) = self.locate(&self.incoming, self.incoming.own) else {
                return Err(StreamError);
            };
            let end = done.saturating_add(run).min(wanted);
            let Some(piece) = buffer.get_mut(done..end) else {
                return Err(StreamError);
            };
            page.read_bytes(offset, piece);
            let moved = u32::try_from(piece.len()).map_err(|_| StreamError)?;
            self.incoming.own = self.incoming.own.wrapping_add(moved);
            done = end;
        }
        if done > 0 {
            full_fence();
            self.control
                .write_u32(self.incoming.own_at, self.incoming.own);
            self.tell(NOTIFY_READ);
        }
        Ok(done)
    }

    /// Fails at once when the peer is gone. Taking less than everything also asks the peer for an event.
    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.broken || self.peer() == Peer::Gone {
            return Err(StreamError);
        }
        let mut space = self.space()?;
        if bounded(bytes.len(), space) < bytes.len() {
            self.ask(NOTIFY_READ);
            space = self.space()?;
        }
        let wanted = bounded(bytes.len(), space);
        let mut done = 0usize;
        while done < wanted {
            let Some((page, offset, run)) = self.locate(&self.outgoing, self.outgoing.own) else {
                return Err(StreamError);
            };
            let end = done.saturating_add(run).min(wanted);
            let Some(piece) = bytes.get(done..end) else {
                return Err(StreamError);
            };
            page.write_bytes(offset, piece);
            let moved = u32::try_from(piece.len()).map_err(|_| StreamError)?;
            self.outgoing.own = self.outgoing.own.wrapping_add(moved);
            done = end;
        }
        if done > 0 {
            write_fence();
            self.control
                .write_u32(self.outgoing.own_at, self.outgoing.own);
            self.tell(NOTIFY_WRITE);
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vchan::layout::Offer;
    use crate::vchan::testing::TestPage;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    /// A connected pair, and the control page.
    fn pair(orders: Orders) -> (Duplex<TestPage>, Duplex<TestPage>, TestPage) {
        let control = TestPage::new();
        let pages: Vec<TestPage> = (0..orders.pages()).map(|_| TestPage::new()).collect();
        let grants: Vec<u32> = (0..orders.pages())
            .map(|index| 100 + u32::try_from(index).unwrap())
            .collect();
        let server = Duplex::serve(control.clone(), pages.clone(), &grants, orders);
        let offer = Offer::read(&control).expect("our own offer is fine");
        assert_eq!(offer.orders, orders);
        let client = Duplex::join(control.clone(), pages, offer.orders);
        (server, client, control)
    }

    fn every_order() -> Vec<Orders> {
        [
            (10, 11),
            (11, 10),
            (11, 12),
            (13, 11),
            (12, 12),
            (16, 12),
            (16, 16),
        ]
        .into_iter()
        .map(|(left, right)| {
            Orders::new(Order::new(left).unwrap(), Order::new(right).unwrap()).unwrap()
        })
        .collect()
    }

    #[test]
    fn a_server_page_has_the_documented_bytes() {
        let control = TestPage::new();
        let pages = (0..2).map(|_| TestPage::new()).collect();
        let _server = Duplex::serve(control.clone(), pages, &[0x11, 0x22], Orders::PAGES);
        let mut bytes = [0; 12];
        control.read_bytes(CLIENT_LIVE, &mut bytes);
        assert_eq!(bytes, [2, 1, 1, 0, 0x11, 0, 0, 0, 0x22, 0, 0, 0]);
        assert_eq!(control.read_u32(ORDERS), 0x000c_000c);
        for index in [LEFT_CONS, LEFT_PROD, RIGHT_CONS, RIGHT_PROD] {
            assert_eq!(control.read_u32(index), 0);
        }
    }

    /// Sends `bytes` from one end to the other in odd portions and returns what came out.
    fn carry(from: &mut Duplex<TestPage>, to: &mut Duplex<TestPage>, bytes: &[u8]) -> Vec<u8> {
        let (mut at, mut out) = (0, Vec::new());
        let mut buffer = [0; 777];
        while out.len() < bytes.len() {
            at += from.write(&bytes[at..]).unwrap();
            let read = to.read(&mut buffer).unwrap();
            out.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(to.read(&mut buffer), Ok(0), "nothing more than was written");
        out
    }

    #[test]
    fn bytes_cross_in_both_directions_at_every_order_and_wrap() {
        for orders in every_order() {
            let (mut server, mut client, _) = pair(orders);
            for round in 0..200usize {
                let bytes: Vec<u8> = (0..(round * 37) % 5000)
                    .map(|index| u8::try_from((index * 7 + round) % 251).unwrap())
                    .collect();
                assert!(
                    carry(&mut server, &mut client, &bytes) == bytes,
                    "{orders:?} {round}"
                );
                assert!(
                    carry(&mut client, &mut server, &bytes) == bytes,
                    "{orders:?} {round}"
                );
            }
        }
    }

    #[test]
    fn the_first_write_in_each_direction_makes_an_event_due() {
        let (mut server, mut client, _) = pair(Orders::PAGES);
        assert!(client.take_event(), "connecting makes one");
        assert_eq!(server.write(b"a"), Ok(1));
        assert!(server.take_event());
        assert_eq!(client.write(b"b"), Ok(1));
        assert!(client.take_event());
        assert_eq!(server.write(b"a"), Ok(1));
        assert!(!server.take_event(), "nobody asked again");
    }

    #[test]
    fn v2_an_empty_read_asks_and_a_short_write_asks() {
        let (mut server, mut client, control) = pair(Orders::PAGES);
        let mut buffer = [0; 16];
        assert_eq!(server.read(&mut buffer), Ok(0));
        assert_eq!(read_byte(&control, CLIENT_NOTIFY), NOTIFY_WRITE);
        assert_eq!(client.write(&[7; 5000]), Ok(4096));
        assert_eq!(
            read_byte(&control, SERVER_NOTIFY),
            NOTIFY_WRITE | NOTIFY_READ
        );
        assert_eq!(read_byte(&control, CLIENT_NOTIFY), 0, "fetched and cleared");
        assert_eq!(server.read(&mut buffer), Ok(16));
        assert!(server.take_event(), "the client waits for space");
    }

    #[test]
    fn v1_notification_leaves_the_neighbouring_bytes_alone() {
        let (mut server, mut client, control) = pair(Orders::PAGES);
        let mut buffer = [0; 4096];
        for _ in 0..3 {
            // Values that no correct peer writes: a wider write-back would be seen.
            control.write_bytes(CLIENT_NOTIFY, &[0xfc]);
            control.write_bytes(SERVER_NOTIFY, &[0xa8]);
            let _ = server.read(&mut buffer);
            assert_eq!(read_byte(&control, SERVER_NOTIFY), 0xa8);
            assert_eq!(read_byte(&control, CLIENT_NOTIFY), 0xfd);
            let _ = client.write(&[1; 4096]);
            let _ = client.write(&[1; 4096]);
            let _ = server.read(&mut buffer);
            let mut live = [0; 2];
            control.read_bytes(CLIENT_LIVE, &mut live);
            assert_eq!(live, [1, 1]);
        }
    }

    #[test]
    fn v3_an_impossible_producer_breaks_the_channel_for_good() {
        let (mut server, _client, control) = pair(Orders::PAGES);
        control.write_u32(LEFT_PROD, 4097);
        let mut buffer = [0xee; 8192];
        assert_eq!(server.read(&mut buffer), Err(StreamError));
        assert!(buffer.iter().all(|byte| *byte == 0xee), "nothing was read");
        control.write_u32(LEFT_PROD, 10);
        assert_eq!(server.read(&mut buffer), Err(StreamError));
        assert_eq!(server.write(b"x"), Err(StreamError));
    }

    #[test]
    fn v3_an_impossible_consumer_breaks_the_channel() {
        let (mut server, _client, control) = pair(Orders::PAGES);
        control.write_u32(RIGHT_CONS, 1);
        assert_eq!(server.write(b"x"), Err(StreamError));
    }

    #[test]
    fn v3_orders_and_our_own_indices_are_not_read_again() {
        let (mut server, mut client, control) = pair(Orders::PAGES);
        control.write_u32(ORDERS, 0x0014_0014);
        control.write_u32(LEFT_CONS, 0x8000_0000);
        control.write_u32(RIGHT_PROD, 0x8000_0000);
        assert_eq!(
            client.write(b"hello"),
            Err(StreamError),
            "the client sees a wild consumer"
        );
        control.write_u32(LEFT_PROD, 3);
        let mut buffer = [0; 8];
        assert_eq!(server.read(&mut buffer), Ok(3));
        assert_eq!(control.read_u32(LEFT_CONS), 3);
        assert_eq!(server.write(b"ab"), Ok(2));
        assert_eq!(control.read_u32(RIGHT_PROD), 2);
    }

    #[test]
    fn v4_an_unknown_live_byte_means_gone() {
        for value in [0, 3, 0x80, 0xff] {
            let (mut server, client, control) = pair(Orders::PAGES);
            control.write_bytes(CLIENT_LIVE, &[value]);
            assert_eq!(server.peer(), Peer::Gone);
            assert_eq!(server.write(b"x"), Err(StreamError));
            control.write_bytes(SERVER_LIVE, &[value]);
            assert_eq!(client.peer(), Peer::Gone);
        }
        let (_server, client, control) = pair(Orders::PAGES);
        control.write_bytes(SERVER_LIVE, &[2]);
        assert_eq!(client.peer(), Peer::Gone, "only a client can be awaited");
    }

    #[test]
    fn data_before_the_close_is_read_and_then_comes_the_end() {
        let (server, mut client, _) = pair(Orders::PAGES);
        let mut server = server;
        assert_eq!(server.write(b"last words"), Ok(10));
        let _ = server.close();
        assert_eq!(
            client.write(b"x"),
            Err(StreamError),
            "writers look at liveness first"
        );
        let mut buffer = [0; 6];
        assert_eq!(client.read(&mut buffer), Ok(6));
        assert_eq!(client.read(&mut buffer), Ok(4));
        assert_eq!(client.read(&mut buffer), Err(StreamError));
    }

    #[test]
    fn what_a_server_wrote_before_the_client_came_is_read() {
        let control = TestPage::new();
        let pages: Vec<TestPage> = (0..2).map(|_| TestPage::new()).collect();
        let mut server = Duplex::serve(control.clone(), pages.clone(), &[1, 2], Orders::PAGES);
        assert_eq!(server.peer(), Peer::Waiting);
        assert_eq!(server.write(b"early"), Ok(5));
        let mut client = Duplex::join(control, pages, Orders::PAGES);
        let mut buffer = [0; 16];
        assert_eq!(client.read(&mut buffer), Ok(5));
        assert_eq!(server.peer(), Peer::Alive);
    }

    #[test]
    fn indices_wrap_at_the_end_of_the_counter() {
        let control = TestPage::new();
        let pages: Vec<TestPage> = (0..2).map(|_| TestPage::new()).collect();
        let start = u32::MAX - 100;
        for index in [LEFT_CONS, LEFT_PROD, RIGHT_CONS, RIGHT_PROD] {
            control.write_u32(index, start);
        }
        let mut server = Duplex::serve(control.clone(), pages.clone(), &[1, 2], Orders::PAGES);
        let mut client = Duplex::join(control.clone(), pages, Orders::PAGES);
        let bytes: Vec<u8> = (0..=255).cycle().take(3000).collect();
        assert_eq!(client.write(&bytes), Ok(3000));
        let mut buffer = [0; 4000];
        assert_eq!(server.read(&mut buffer), Ok(3000));
        assert_eq!(&buffer[..3000], &bytes[..]);
        assert_eq!(control.read_u32(LEFT_CONS), start.wrapping_add(3000));
    }

    /// A page on which the peer acts in the very moment in which we ask for an event.
    struct Racing {
        page: TestPage,
        index: usize,
        value: u32,
    }

    impl SharedBytes for Racing {
        fn read_u32(&self, offset: usize) -> u32 {
            self.page.read_u32(offset)
        }
        fn write_u32(&self, offset: usize, value: u32) {
            self.page.write_u32(offset, value);
        }
        fn read_bytes(&self, offset: usize, to: &mut [u8]) {
            if offset == CLIENT_NOTIFY {
                // The peer moves its index and finds that nobody has asked yet.
                self.page.write_u32(self.index, self.value);
            }
            self.page.read_bytes(offset, to);
        }
        fn write_bytes(&self, offset: usize, from: &[u8]) {
            self.page.write_bytes(offset, from);
        }
    }

    #[test]
    fn v2_an_index_that_moves_while_we_ask_is_noticed_at_once() {
        let racing = |index, value| {
            let page = |_| Racing {
                page: TestPage::new(),
                index,
                value,
            };
            let pages = (0..2).map(page).collect();
            Duplex::serve(page(0), pages, &[1, 2], Orders::PAGES)
        };
        let mut buffer = [0; 16];
        let mut server = racing(LEFT_PROD, 5);
        assert_eq!(server.read(&mut buffer), Ok(5));
        let mut server = racing(RIGHT_CONS, 4096);
        assert_eq!(server.write(&[1; 4096]), Ok(4096), "nothing to ask for");
        assert_eq!(server.write(&[2; 100]), Ok(100));
    }

    /// One end in a thread that sleeps only when it may, and is woken only by events.
    fn pump(
        mut end: Duplex<TestPage>,
        wake: mpsc::Sender<()>,
        events: mpsc::Receiver<()>,
        total: usize,
        seed: u8,
    ) -> thread::JoinHandle<u64> {
        thread::spawn(move || {
            let (mut sent, mut received, mut sleeps) = (0usize, 0usize, 0u64);
            let pattern: Vec<u8> = (0..=255).collect();
            let mut buffer = [0; 3000];
            while sent < total || received < total {
                let mut moved = 0;
                if sent < total {
                    let start = (sent + usize::from(seed)) % 256;
                    let end_at = (start + (total - sent)).min(256);
                    let written = end
                        .write(&pattern[start..end_at])
                        .expect("the peer is alive");
                    sent += written;
                    moved += written;
                }
                let read = end.read(&mut buffer).expect("the peer is alive");
                for byte in &buffer[..read] {
                    assert_eq!(usize::from(*byte), (received + usize::from(seed)) % 256);
                    received += 1;
                }
                moved += read;
                if end.take_event() {
                    let _ = wake.send(());
                }
                if moved == 0 {
                    sleeps += 1;
                    events
                        .recv_timeout(Duration::from_secs(20))
                        .expect("a wake-up was lost");
                }
            }
            if end.take_event() {
                let _ = wake.send(());
            }
            sleeps
        })
    }

    #[test]
    fn v2_two_threads_that_sleep_on_events_only_lose_no_wake_up() {
        for orders in [
            Orders::for_sizes(1024, 1024).unwrap(),
            Orders::PAGES,
            Orders::QREXEC_DATA,
        ] {
            let (server, client, _) = pair(orders);
            let (to_server, server_events) = mpsc::channel();
            let (to_client, client_events) = mpsc::channel();
            let one = pump(server, to_client.clone(), server_events, 4 << 20, 9);
            let two = pump(client, to_server.clone(), client_events, 4 << 20, 9);
            let sleeps = one.join().unwrap() + two.join().unwrap();
            assert!(sleeps > 0, "the test must have slept to mean anything");
        }
    }
}
