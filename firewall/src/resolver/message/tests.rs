//! Messages as servers send them, and as attackers do.

use super::*;
use crate::rule::HostName;
use alloc::string::ToString;
use alloc::vec;
use proptest::prelude::*;
use simple_dns::rdata::{A, AAAA, CNAME, RData, TXT};
use simple_dns::{CLASS, Name as TheirName, Packet, ResourceRecord};

/// An answer of a real server for `www.example.com`, type A: one alias, two addresses.
pub(in crate::resolver) const REAL_ANSWER: &[u8] = b"\
    \xbe\xef\x81\x80\x00\x01\x00\x03\x00\x00\x00\x00\
    \x03www\x07example\x03com\x00\x00\x01\x00\x01\
    \xc0\x0c\x00\x05\x00\x01\x00\x00\x01\x2c\x00\x06\x03cdn\xc0\x10\
    \xc0\x2d\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x5d\xb8\xd8\x22\
    \xc0\x2d\x00\x01\x00\x01\x00\x00\x00\x50\x00\x04\x5d\xb8\xd8\x23";

pub(in crate::resolver) fn question(name: &str, family: Family) -> Question {
    let host = HostName::new(name).unwrap();
    let name = Name::of_host(&host).unwrap();
    Question { name, family }
}

fn www() -> Question {
    question("www.example.com", Family::Ipv4)
}

fn read(question: &Question, id: u16, message: &[u8]) -> (Option<Answer>, Vec<IpAddr>) {
    let mut addresses = Vec::new();
    let answer = question.read_answer(id, message, &mut |address| addresses.push(address));
    (answer, addresses)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn query_is_what_an_independent_parser_expects() {
    let mut bytes = Vec::new();
    question("_a.Example.COM", Family::Ipv6).write(0x1234, &mut bytes);
    assert_eq!(
        bytes,
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02_a\x07example\x03com\x00\x00\x1c\x00\x01"
    );
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!(packet.id(), 0x1234);
    assert_eq!(packet.questions.len(), 1);
    assert_eq!(packet.questions[0].qname.to_string(), "_a.example.com");
    let (id, asked) = Question::read(&bytes).unwrap();
    assert_eq!(id, 0x1234);
    assert!(asked.family == Family::Ipv6);
}

#[test]
fn real_answer_gives_the_addresses_of_the_alias() {
    let (answer, addresses) = read(&www(), 0xbeef, REAL_ANSWER);
    assert_eq!(answer, Some(Answer::Addresses(60)));
    assert_eq!(
        addresses,
        [address("93.184.216.34"), address("93.184.216.35")]
    );
}

#[test]
fn answers_to_something_else_are_not_ours() {
    let others = [
        question("www.example.org", Family::Ipv4),
        question("example.com", Family::Ipv4),
        question("www.example.com", Family::Ipv6),
    ];
    for other in others {
        assert_eq!(read(&other, 0xbeef, REAL_ANSWER).0, None);
    }
    assert_eq!(read(&www(), 0xbee0, REAL_ANSWER).0, None);
    let changed = |position: usize, byte: u8| {
        let mut message = Vec::from(REAL_ANSWER);
        message[position] = byte;
        read(&www(), 0xbeef, &message).0
    };
    assert_eq!(changed(2, 0x01), None, "a query");
    assert_eq!(changed(2, 0x91), None, "another operation");
    assert_eq!(changed(5, 0), None, "no question");
    assert_eq!(changed(5, 2), None, "two questions");
    assert_eq!(changed(32, 3), None, "another class");
}

#[test]
fn case_of_the_question_does_not_matter() {
    let mut message = Vec::from(REAL_ANSWER);
    message[13..16].copy_from_slice(b"WwW");
    assert_eq!(
        read(&www(), 0xbeef, &message).0,
        Some(Answer::Addresses(60))
    );
}

#[test]
fn response_codes_and_truncation_are_told_apart() {
    let with_flags = |high: u8, low: u8| {
        let mut message = Vec::from(REAL_ANSWER);
        message[2..4].copy_from_slice(&[high, low]);
        read(&www(), 0xbeef, &message)
    };
    assert_eq!(
        with_flags(0x83, 0x80),
        (Some(Answer::Truncated), Vec::new())
    );
    assert_eq!(
        with_flags(0x81, 0x83),
        (Some(Answer::NoSuchName), Vec::new())
    );
    assert_eq!(
        with_flags(0x81, 0x82),
        (Some(Answer::Failure(2)), Vec::new())
    );
    assert_eq!(
        with_flags(0x81, 0x85),
        (Some(Answer::Failure(5)), Vec::new())
    );
}

#[test]
fn message_cut_anywhere_says_nothing() {
    for len in 0..REAL_ANSWER.len() {
        let (answer, addresses) = read(&www(), 0xbeef, &REAL_ANSWER[..len]);
        let expected = (len >= 33).then_some(Answer::Failure(0));
        assert_eq!((answer, addresses), (expected, Vec::new()), "{len}");
    }
}

#[test]
fn counts_that_lie_are_not_believed() {
    let with_count = |count: u16| {
        let mut message = Vec::from(REAL_ANSWER);
        message[6..8].copy_from_slice(&count.to_be_bytes());
        read(&www(), 0xbeef, &message).0
    };
    assert_eq!(with_count(0xffff), Some(Answer::Failure(0)));
    assert_eq!(with_count(4), Some(Answer::Failure(0)));
    assert_eq!(with_count(2), Some(Answer::Addresses(60)));
    assert_eq!(with_count(0), Some(Answer::NoData));
}

fn their_name(text: &'static str) -> TheirName<'static> {
    TheirName::new(text).unwrap()
}

fn record(name: &'static str, ttl: u32, data: RData<'static>) -> ResourceRecord<'static> {
    ResourceRecord::new(their_name(name), CLASS::IN, ttl, data)
}

fn alias(name: &'static str, to: &'static str, ttl: u32) -> ResourceRecord<'static> {
    record(name, ttl, RData::CNAME(CNAME(their_name(to))))
}

fn a(name: &'static str, last: u32, ttl: u32) -> ResourceRecord<'static> {
    record(
        name,
        ttl,
        RData::A(A {
            address: 0x0a00_0000 | last,
        }),
    )
}

/// The answer of an independent implementation, compressed, to a question of ours.
fn answer(question: &Question, records: Vec<ResourceRecord<'static>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    question.write(7, &mut bytes);
    let mut packet = Packet::parse(&bytes).unwrap().into_reply();
    packet.answers = records;
    packet.build_bytes_vec_compressed().unwrap()
}

fn read_records(records: Vec<ResourceRecord<'static>>) -> (Option<Answer>, Vec<IpAddr>) {
    let question = question("a.example", Family::Ipv4);
    read(&question, 7, &answer(&question, records))
}

#[test]
fn aliases_are_followed_in_any_order_and_lower_the_time_to_live() {
    let (answer, addresses) = read_records(vec![
        a("c.example", 1, 300),
        alias("b.example", "c.example", 40),
        alias("a.example", "b.example", 100),
        a("c.example", 2, 200),
    ]);
    assert_eq!(answer, Some(Answer::Addresses(40)));
    assert_eq!(addresses, [address("10.0.0.1"), address("10.0.0.2")]);
}

#[test]
fn records_of_other_names_types_and_families_do_not_count() {
    let (answer, addresses) = read_records(vec![
        a("b.example", 1, 300),
        record(
            "a.example",
            300,
            RData::TXT(TXT::new().with_string("x").unwrap()),
        ),
        record("a.example", 300, RData::AAAA(AAAA { address: 1 })),
    ]);
    assert_eq!((answer, addresses), (Some(Answer::NoData), Vec::new()));
}

#[test]
fn addresses_beside_an_alias_do_not_count() {
    let (_, addresses) = read_records(vec![
        a("a.example", 1, 300),
        alias("a.example", "b.example", 300),
        a("b.example", 2, 300),
    ]);
    assert_eq!(addresses, [address("10.0.0.2")]);
}

#[test]
fn alias_without_an_address_is_no_data() {
    let (answer, _) = read_records(vec![alias("a.example", "b.example", 300)]);
    assert_eq!(answer, Some(Answer::NoData));
}

#[test]
fn aliases_in_a_circle_are_an_answer_without_sense() {
    let circle = vec![
        alias("a.example", "b.example", 300),
        alias("b.example", "a.example", 300),
        a("a.example", 1, 300),
    ];
    assert_eq!(read_records(circle).0, Some(Answer::Failure(0)));
    let itself = vec![alias("a.example", "a.example", 300)];
    assert_eq!(read_records(itself).0, Some(Answer::Failure(0)));
}

#[test]
fn address_of_a_wrong_length_spoils_the_answer() {
    let mut message = Vec::from(REAL_ANSWER);
    message[62] = 3;
    message.remove(66);
    assert_eq!(read(&www(), 0xbeef, &message).0, Some(Answer::Failure(0)));
}

#[test]
fn time_to_live_with_the_highest_bit_is_zero() {
    let (answer, _) = read_records(vec![a("a.example", 1, 0x8000_0000)]);
    assert_eq!(answer, Some(Answer::Addresses(0)));
}

#[test]
fn ipv6_addresses_are_read() {
    let question = question("a.example", Family::Ipv6);
    let records = vec![record(
        "a.example",
        5,
        RData::AAAA(AAAA {
            address: 0x2606 << 112 | 1,
        }),
    )];
    let (answer, addresses) = read(&question, 7, &answer(&question, records));
    assert_eq!(answer, Some(Answer::Addresses(5)));
    assert_eq!(addresses, [address("2606::1")]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn no_change_to_a_real_answer_is_a_panic(
        changes in proptest::collection::vec((0..REAL_ANSWER.len(), any::<u8>()), 1..8),
    ) {
        let mut message = Vec::from(REAL_ANSWER);
        for (position, byte) in changes {
            message[position] = byte;
        }
        let (answer, addresses) = read(&www(), 0xbeef, &message);
        prop_assert!(addresses.len() <= 3);
        if answer.is_none() {
            prop_assert!(addresses.is_empty());
        }
        let _ = Question::read(&message);
    }

    #[test]
    fn any_bytes_are_read_to_an_end(
        mut message in proptest::collection::vec(any::<u8>(), 33..600),
        is_answer in any::<bool>(),
    ) {
        if is_answer {
            message[..33].copy_from_slice(&REAL_ANSWER[..33]);
        }
        let (_, addresses) = read(&www(), 0xbeef, &message);
        prop_assert!(addresses.len() <= MAX_RECORDS);
    }
}
