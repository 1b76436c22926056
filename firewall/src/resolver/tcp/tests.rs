//! Segments of a server, right and wrong. A whole conversation with an independent implementation is in
//! `tests/resolver_tcp.rs`.

use super::*;
use alloc::vec;
use proptest::prelude::*;

const FIRST: u32 = 0xffff_fff0;
const SERVER_FIRST: u32 = 0xffff_ff00;
const QUERY: &[u8] = b"0123456789abcdefghij";

/// A connection that has the server's SYN/ACK.
fn asking() -> Connection {
    let mut connection = Connection::new(50_000, 53, QUERY, FIRST, Time::ZERO);
    let syn = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!((flags(&syn), sequence(&syn)), (SYN, FIRST));
    assert_eq!(syn[20..], [2, 4, 4, 196]);
    let synack = segment(SERVER_FIRST, FIRST.wrapping_add(1), SYN | ACK, b"");
    assert_eq!(connection.receive(&synack, Time::ZERO), Outcome::Open);
    let query = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!(flags(&query), ACK | PSH);
    assert_eq!(sequence(&query), FIRST.wrapping_add(1));
    assert_eq!(acknowledgement(&query), SERVER_FIRST.wrapping_add(1));
    assert_eq!(query[20..22], [0, 20]);
    assert_eq!(query[22..], *QUERY);
    connection
}

/// What the server acknowledges when it has the query.
const QUERY_END: u32 = FIRST.wrapping_add(1 + 2 + 20);

fn segment(sequence: u32, acknowledgement: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 53, 0xc3, 0x50];
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledgement.to_be_bytes());
    bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}

fn data(offset: u32, payload: &[u8]) -> Vec<u8> {
    segment(
        SERVER_FIRST.wrapping_add(1 + offset),
        QUERY_END,
        ACK | PSH,
        payload,
    )
}

fn flags(segment: &[u8]) -> u8 {
    segment[13]
}

fn sequence(segment: &[u8]) -> u32 {
    u32::from_be_bytes(segment[4..8].try_into().unwrap())
}

fn acknowledgement(segment: &[u8]) -> u32 {
    u32::from_be_bytes(segment[8..12].try_into().unwrap())
}

#[test]
fn answer_in_pieces_is_put_together_and_the_connection_reset() {
    let mut connection = asking();
    assert_eq!(
        connection.receive(&data(0, b"\x00"), Time::ZERO),
        Outcome::Open
    );
    let ack = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!((flags(&ack), sequence(&ack)), (ACK, QUERY_END));
    assert_eq!(acknowledgement(&ack), SERVER_FIRST.wrapping_add(2));
    assert_eq!(
        connection.receive(&data(1, b"\x05he"), Time::ZERO),
        Outcome::Open
    );
    // Sent again with more, then more than there is.
    assert_eq!(
        connection.receive(&data(0, b"\x00\x05hel"), Time::ZERO),
        Outcome::Open
    );
    assert_eq!(
        connection.receive(&data(5, b"lo, world"), Time::ZERO),
        Outcome::Answered
    );
    assert_eq!(connection.answer(), b"hello");
    let reset = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!((flags(&reset), sequence(&reset)), (RST | ACK, QUERY_END));
    assert_eq!(connection.next_segment(Time::from_secs(9)), Ok(None));
    assert_eq!(
        connection.receive(&data(0, b"\x00\x05hello"), Time::ZERO),
        Outcome::Open
    );
}

#[test]
fn gap_is_answered_with_where_we_are() {
    let mut connection = asking();
    assert_eq!(
        connection.receive(&data(3, b"lo"), Time::ZERO),
        Outcome::Open
    );
    let ack = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!(acknowledgement(&ack), SERVER_FIRST.wrapping_add(1));
    assert_eq!(connection.answer(), b"");
}

#[test]
fn segments_that_do_not_fit_have_no_effect() {
    let mut fresh = Connection::new(50_000, 53, QUERY, FIRST, Time::ZERO);
    for bytes in [
        segment(1, FIRST, SYN | ACK, b""),
        segment(1, FIRST.wrapping_add(2), SYN | ACK, b""),
        segment(1, FIRST.wrapping_add(1), SYN, b""),
        segment(1, FIRST, RST | ACK, b""),
        segment(1, 0, RST, b""),
        vec![0; 19],
        vec![0xff; 40],
    ] {
        assert_eq!(fresh.receive(&bytes, Time::ZERO), Outcome::Open);
        assert_eq!(fresh.state, State::Connecting);
    }
    let mut connection = asking();
    for bytes in [
        segment(SERVER_FIRST, QUERY_END, RST, b""),
        segment(SERVER_FIRST.wrapping_add(2), QUERY_END, RST, b""),
        segment(
            SERVER_FIRST.wrapping_add(1),
            QUERY_END.wrapping_add(1),
            ACK,
            b"\x00\x01x",
        ),
        segment(SERVER_FIRST.wrapping_add(1), FIRST, ACK, b"\x00\x01x"),
        segment(SERVER_FIRST.wrapping_add(1), QUERY_END, PSH, b"\x00\x01x"),
        segment(
            SERVER_FIRST.wrapping_add(1),
            QUERY_END,
            SYN | ACK,
            b"\x00\x01x",
        ),
    ] {
        assert_eq!(connection.receive(&bytes, Time::ZERO), Outcome::Open);
        assert_eq!(connection.received, b"");
    }
}

#[test]
fn reset_and_early_close_end_the_connection() {
    let mut fresh = Connection::new(50_000, 53, QUERY, FIRST, Time::ZERO);
    let refused = segment(0, FIRST.wrapping_add(1), RST | ACK, b"");
    assert_eq!(fresh.receive(&refused, Time::ZERO), Outcome::Failed);
    assert_eq!(fresh.next_segment(Time::ZERO), Ok(None));
    let mut connection = asking();
    let reset = segment(SERVER_FIRST.wrapping_add(1), QUERY_END, RST, b"");
    assert_eq!(connection.receive(&reset, Time::ZERO), Outcome::Failed);
    let mut connection = asking();
    let close = segment(
        SERVER_FIRST.wrapping_add(1),
        QUERY_END,
        FIN | ACK,
        b"\x00\x05he",
    );
    assert_eq!(connection.receive(&close, Time::ZERO), Outcome::Failed);
}

#[test]
fn answer_with_the_servers_close_is_an_answer() {
    let mut connection = asking();
    let close = segment(
        SERVER_FIRST.wrapping_add(1),
        QUERY_END,
        FIN | ACK,
        b"\x00\x02ok",
    );
    assert_eq!(connection.receive(&close, Time::ZERO), Outcome::Answered);
    assert_eq!(connection.answer(), b"ok");
}

#[test]
fn answer_that_is_too_long_is_refused_before_it_comes() {
    let mut connection = asking();
    assert_eq!(
        connection.receive(&data(0, b"\x40\x01"), Time::ZERO),
        Outcome::Failed
    );
    let reset = connection.next_segment(Time::ZERO).unwrap().unwrap();
    assert_eq!(flags(&reset), RST | ACK);
}

#[test]
fn silent_server_is_asked_four_times() {
    let mut connection = Connection::new(50_000, 53, QUERY, FIRST, Time::ZERO);
    let mut sent = Vec::new();
    let mut now = Time::ZERO;
    let end = loop {
        match connection.next_segment(now) {
            Ok(Some(_)) => sent.push(now.as_nanos() / 1_000_000),
            Ok(None) => now = connection.deadline().unwrap(),
            Err(()) => break now,
        }
    };
    assert_eq!(sent, [0, 500, 1500, 3500]);
    assert_eq!(end, Time::from_millis(7500));
}

#[test]
fn acknowledged_query_is_not_sent_again() {
    let mut connection = asking();
    let ack = segment(SERVER_FIRST.wrapping_add(1), QUERY_END, ACK, b"");
    assert_eq!(
        connection.receive(&ack, Time::from_millis(100)),
        Outcome::Open
    );
    assert_eq!(connection.deadline(), None);
}

proptest! {
    #[test]
    fn no_segments_are_a_panic_or_take_more_than_the_bound(
        segments in proptest::collection::vec(
            (0u32..3000, prop_oneof![Just(QUERY_END), Just(FIRST), any::<u32>()], any::<u8>(),
             proptest::collection::vec(any::<u8>(), 0..1500)),
            0..40),
    ) {
        let mut connection = asking();
        for (offset, acknowledgement, flags, payload) in segments {
            let sequence = SERVER_FIRST.wrapping_add(1 + offset);
            let bytes = segment(sequence, acknowledgement, flags, &payload);
            connection.receive(&bytes, Time::ZERO);
            let _ = connection.next_segment(Time::ZERO);
            prop_assert!(connection.received.len() <= PREFIX_LEN + MAX_ANSWER);
        }
    }
}
