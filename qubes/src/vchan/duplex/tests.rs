//! Both ends of a channel in one program: byte by byte, racing, and in two threads.

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
