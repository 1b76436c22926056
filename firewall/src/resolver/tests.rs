//! The resolver against servers, clients and attackers played by the tests.

use super::learn::ClientQuery;
use super::message::tests::question;
use super::*;
use crate::rule::{Action, Destination, Rule, RuleChain, RuleNumber, Traffic};
use crate::ruleset::{CompiledRules, HostPolicy, RuleEnvironment, RuleRef, UpperLayer};
use crate::ruleset::{HostLookup as _, HostState};
use alloc::format;
use alloc::vec;
use core::net::{Ipv4Addr, Ipv6Addr};
use proptest::prelude::*;

const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 139, 1, 1));
const SECOND: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 139, 1, 2));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 66));
const USER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 137, 0, 10));
const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 137, 0, 11));
const USER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 10));

fn host(text: &str) -> HostName {
    HostName::new(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A resolver with two servers that has asked for one name of one client.
fn asking() -> (Resolver, Transmit) {
    let mut resolver = Resolver::new([7; 32], true);
    resolver.set_servers(&[SERVER, SECOND], false, Time::ZERO);
    assert!(resolver.set_names(USER, [&host("a.example")], Time::ZERO));
    resolver.poll(Time::ZERO);
    let query = resolver.next_transmit().unwrap();
    assert_eq!(resolver.next_transmit(), None);
    (resolver, query)
}

/// The datagram that answers a query: response code, and addresses with a time to live.
fn answer(query: &Transmit, code: u8, addresses: &[&str], ttl: u32) -> Vec<u8> {
    let message = answer_message(&query.bytes[8..], code, addresses, ttl);
    let mut bytes = Vec::from([0, 53]);
    bytes.extend(&query.bytes[..2]);
    bytes.extend(u16::try_from(message.len() + 8).unwrap().to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(message);
    bytes
}

fn answer_message(query: &[u8], code: u8, addresses: &[&str], ttl: u32) -> Vec<u8> {
    let mut message = Vec::from(query);
    message[2..4].copy_from_slice(&[0x81, 0x80 | code]);
    message[7] = u8::try_from(addresses.len()).unwrap();
    for address in addresses {
        let (kind, data) = match ip(address) {
            IpAddr::V4(address) => (1, Vec::from(address.octets())),
            IpAddr::V6(address) => (28, Vec::from(address.octets())),
        };
        message.extend([0xc0, 12, 0, kind, 0, 1]);
        message.extend(ttl.to_be_bytes());
        message.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        message.extend(data);
    }
    message
}

fn receive(resolver: &mut Resolver, query: &Transmit, bytes: &[u8], now: Time) -> bool {
    resolver.receive(query.server, query.transport, bytes, now)
}

/// What a name stands for in the rules of a client.
fn lookup(resolver: &Resolver, user: IpAddr, name: &str) -> (HostState, Vec<IpAddr>) {
    let mut addresses = Vec::new();
    let hosts = resolver.hosts_of(user);
    let state = match user {
        IpAddr::V4(_) => hosts.addresses4(&host(name), &mut |a| addresses.push(a.into())),
        IpAddr::V6(_) => hosts.addresses6(&host(name), &mut |a| addresses.push(a.into())),
    };
    addresses.sort();
    addresses.dedup();
    (state, addresses)
}

fn changed(resolver: &mut Resolver) -> Vec<IpAddr> {
    core::iter::from_fn(|| resolver.next_changed()).collect()
}

/// Goes to the resolver's next deadline, again and again, until it sends something.
fn wait_for_packet(resolver: &mut Resolver, now: &mut Time) -> Transmit {
    for _ in 0..100 {
        resolver.poll(*now);
        if let Some(packet) = resolver.next_transmit() {
            return packet;
        }
        let deadline = resolver.next_deadline().unwrap();
        assert!(deadline > *now, "busy at {now:?}");
        *now = deadline;
    }
    panic!("nothing is sent");
}

fn seconds(time: Time) -> u64 {
    time.as_nanos() / 1_000_000_000
}

#[test]
fn name_is_asked_for_at_once_and_its_rules_are_told_of_the_answer() {
    let (mut resolver, query) = asking();
    assert_eq!((query.server, query.transport), (SERVER, Transport::Udp));
    assert_eq!(query.bytes[2..4], [0, 53]);
    assert_eq!(usize::from(query.bytes[5]), query.bytes.len());
    assert!(query.bytes[0] >= 0xc0);
    assert_eq!(
        lookup(&resolver, USER, "a.example"),
        (HostState::Unresolved, vec![])
    );
    let bytes = answer(&query, 0, &["192.0.2.1", "192.0.2.2"], 60);
    assert!(receive(
        &mut resolver,
        &query,
        &bytes,
        Time::from_millis(20)
    ));
    assert_eq!(changed(&mut resolver), [USER]);
    let expected = (HostState::Resolved, vec![ip("192.0.2.1"), ip("192.0.2.2")]);
    assert_eq!(lookup(&resolver, USER, "a.example"), expected);
    assert_eq!(resolver.counters().resolved, 1);
}

#[test]
fn rules_compiled_with_the_resolver_admit_what_it_found() {
    let (mut resolver, query) = asking();
    let rule = Rule {
        number: RuleNumber::new(0).unwrap(),
        action: Action::Accept,
        destination: Destination::Host(host("a.example")),
        traffic: Traffic::Any,
    };
    let chain = RuleChain::new(Family::Ipv4, Action::Drop, vec![rule]).unwrap();
    let decide = |resolver: &Resolver| {
        let environment = RuleEnvironment {
            resolvers4: &[],
            resolvers6: &[],
            hosts: &resolver.hosts_of(USER),
            host_policy: HostPolicy::PerRule,
        };
        let rules = CompiledRules::compile(&chain, &environment).unwrap();
        rules
            .decide4(Ipv4Addr::new(192, 0, 2, 1), UpperLayer::Other)
            .rule
    };
    assert_eq!(decide(&resolver), RuleRef::Policy);
    let bytes = answer(&query, 0, &["192.0.2.1"], 60);
    receive(&mut resolver, &query, &bytes, Time::ZERO);
    assert_eq!(
        decide(&resolver),
        RuleRef::Number(RuleNumber::new(0).unwrap())
    );
}

#[test]
fn name_is_asked_for_again_shortly_before_its_time_to_live_ends() {
    for (ttl, expected) in [(60, 54..=60), (0, 27..=30), (86_400, 3240..=3600)] {
        let (mut resolver, query) = asking();
        let mut now = Time::ZERO;
        let bytes = answer(&query, 0, &["192.0.2.1"], ttl);
        receive(&mut resolver, &query, &bytes, now);
        let again = wait_for_packet(&mut resolver, &mut now);
        assert!(expected.contains(&seconds(now)), "{ttl}: {now:?}");
        assert_ne!(again.bytes[..2], query.bytes[..2], "the same port");
        assert_ne!(again.bytes[8..10], query.bytes[8..10], "the same id");
        assert_eq!(again.bytes[10..], query.bytes[10..]);
    }
}

#[test]
fn servers_are_asked_in_turn_with_growing_patience_and_then_left_alone_for_a_while() {
    let (mut resolver, first) = asking();
    let mut now = Time::ZERO;
    let mut asked = vec![(0, first.server)];
    for _ in 0..6 {
        let query = wait_for_packet(&mut resolver, &mut now);
        asked.push((seconds(now), query.server));
    }
    let turns = [
        (0, SERVER),
        (1, SECOND),
        (2, SERVER),
        (4, SECOND),
        (6, SERVER),
        (10, SECOND),
    ];
    assert_eq!(asked[..6], turns);
    // The last one gets four seconds, then there is a pause of five and at most a tenth more.
    assert!((19..=20).contains(&asked[6].0), "{asked:?}");
    let view = resolver.names().next().unwrap();
    assert_eq!(view.state, HostState::Unresolved);
    assert_eq!(view.failure.unwrap().kind, FailureKind::Timeout);
    assert!(changed(&mut resolver).is_empty());
}

#[test]
fn pauses_between_failures_grow_to_a_bound() {
    let (mut resolver, mut query) = asking();
    let mut now = Time::ZERO;
    let mut pauses = Vec::new();
    for _ in 0..10 {
        receive(&mut resolver, &query, &answer(&query, 3, &[], 0), now);
        let before = seconds(now);
        query = wait_for_packet(&mut resolver, &mut now);
        pauses.push(seconds(now) - before);
    }
    for (pause, least) in pauses
        .iter()
        .zip([5, 10, 20, 40, 80, 160, 300, 300, 300, 300])
    {
        assert!(
            (least..=least + least / 10 + 1).contains(pause),
            "{pauses:?}"
        );
    }
}

#[test]
fn slow_server_still_counts() {
    let (mut resolver, first) = asking();
    let mut now = Time::ZERO;
    let second = wait_for_packet(&mut resolver, &mut now);
    assert_eq!(second.server, SECOND);
    let bytes = answer(&first, 0, &["192.0.2.1"], 60);
    assert!(receive(&mut resolver, &first, &bytes, now));
    assert_eq!(lookup(&resolver, USER, "a.example").0, HostState::Resolved);
    // The other one is too late.
    let bytes = answer(&second, 0, &["192.0.2.9"], 60);
    assert!(!receive(&mut resolver, &second, &bytes, now));
    assert_eq!(lookup(&resolver, USER, "a.example").1, [ip("192.0.2.1")]);
}

#[test]
fn forged_answers_have_no_effect() {
    let (mut resolver, query) = asking();
    let good = answer(&query, 0, &["192.0.2.66"], 60);
    let with = |position: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[position] ^= byte;
        bytes
    };
    for bytes in [
        with(1, 1),     // from another port
        with(3, 1),     // to another port
        with(5, 1),     // wrong length
        with(8, 1),     // wrong id
        with(10, 0x80), // a query
        with(13, 1),    // another number of questions
        with(21, 1),    // another name
        with(31, 1),    // another type
        with(33, 2),    // another class
        good[..8].to_vec(),
        good[..30].to_vec(),
        vec![],
    ] {
        let before = bytes.clone();
        receive(&mut resolver, &query, &bytes, Time::ZERO);
        assert_eq!(
            lookup(&resolver, USER, "a.example").0,
            HostState::Unresolved,
            "{before:?}"
        );
    }
    assert!(!resolver.receive(STRANGER, Transport::Udp, &good, Time::ZERO));
    assert!(!resolver.receive(SECOND, Transport::Udp, &good, Time::ZERO));
    assert!(!resolver.receive(SERVER, Transport::Tcp, &good, Time::ZERO));
    assert!(changed(&mut resolver).is_empty());
    assert!(resolver.counters().unexpected > 5);
    assert!(receive(&mut resolver, &query, &good, Time::ZERO));
    assert_eq!(changed(&mut resolver), [USER]);
}

#[test]
fn server_that_cannot_help_is_passed_over_at_once() {
    let (mut resolver, first) = asking();
    receive(
        &mut resolver,
        &first,
        &answer(&first, 2, &[], 0),
        Time::ZERO,
    );
    let second = resolver.next_transmit().unwrap();
    assert_eq!(second.server, SECOND);
    // The first one repeating itself changes nothing.
    receive(
        &mut resolver,
        &first,
        &answer(&first, 2, &[], 0),
        Time::ZERO,
    );
    assert_eq!(resolver.next_transmit(), None);
    receive(
        &mut resolver,
        &second,
        &answer(&second, 0, &["192.0.2.1"], 60),
        Time::ZERO,
    );
    assert_eq!(lookup(&resolver, USER, "a.example").0, HostState::Resolved);
}

#[test]
fn refusals_of_all_servers_are_a_failure_that_says_so() {
    let (mut resolver, mut query) = asking();
    for _ in 0..5 {
        receive(
            &mut resolver,
            &query,
            &answer(&query, 5, &[], 0),
            Time::ZERO,
        );
        query = resolver.next_transmit().unwrap();
    }
    receive(
        &mut resolver,
        &query,
        &answer(&query, 5, &[], 0),
        Time::ZERO,
    );
    assert_eq!(resolver.next_transmit(), None);
    let failure = resolver.names().next().unwrap().failure.unwrap();
    assert_eq!(failure.kind, FailureKind::ServerFailure(5));
    assert_eq!(resolver.counters().failed, 1);
}

#[test]
fn name_without_addresses_is_resolved_and_a_missing_name_is_not() {
    let (mut resolver, query) = asking();
    receive(
        &mut resolver,
        &query,
        &answer(&query, 0, &[], 0),
        Time::ZERO,
    );
    assert_eq!(
        lookup(&resolver, USER, "a.example"),
        (HostState::Resolved, vec![])
    );
    assert_eq!(changed(&mut resolver), [USER]);
    let (mut resolver, query) = asking();
    receive(
        &mut resolver,
        &query,
        &answer(&query, 3, &[], 0),
        Time::ZERO,
    );
    assert_eq!(
        lookup(&resolver, USER, "a.example").0,
        HostState::Unresolved
    );
    let failure = resolver.names().next().unwrap().failure.unwrap();
    assert_eq!(failure.kind, FailureKind::NoSuchName);
}

#[test]
fn last_good_answer_survives_failures_for_an_hour_and_no_longer() {
    let (mut resolver, query) = asking();
    let mut now = Time::ZERO;
    receive(
        &mut resolver,
        &query,
        &answer(&query, 0, &["192.0.2.1"], 60),
        now,
    );
    changed(&mut resolver);
    loop {
        resolver.poll(now);
        while resolver.next_transmit().is_some() {}
        if !changed(&mut resolver).is_empty() {
            break;
        }
        assert_eq!(lookup(&resolver, USER, "a.example").0, HostState::Resolved);
        now = resolver.next_deadline().unwrap();
    }
    assert_eq!(
        lookup(&resolver, USER, "a.example"),
        (HostState::Unresolved, vec![])
    );
    assert_eq!(now, Time::from_secs(60 + KEEP_SECS));
}

#[test]
fn addresses_that_rotate_stay_for_an_hour_beyond_their_time_to_live() {
    let (mut resolver, mut query) = asking();
    let mut now = Time::ZERO;
    let mut number = 0;
    while seconds(now) < 7200 {
        number += 1;
        let address = format!("192.0.2.{number}");
        receive(
            &mut resolver,
            &query,
            &answer(&query, 0, &[&address], 1200),
            now,
        );
        query = wait_for_packet(&mut resolver, &mut now);
    }
    let (_, addresses) = lookup(&resolver, USER, "a.example");
    assert!(!addresses.contains(&ip("192.0.2.1")));
    assert!(addresses.contains(&ip(&format!("192.0.2.{number}"))));
    assert!((4..=6).contains(&addresses.len()), "{addresses:?}");
}

#[test]
fn families_are_asked_for_on_their_own() {
    let mut resolver = Resolver::new([7; 32], true);
    resolver.set_servers(&[SERVER], false, Time::ZERO);
    resolver.set_names(USER, [&host("a.example")], Time::ZERO);
    resolver.set_names(USER6, [&host("a.example")], Time::ZERO);
    resolver.poll(Time::ZERO);
    let (v4, v6) = (
        resolver.next_transmit().unwrap(),
        resolver.next_transmit().unwrap(),
    );
    assert_eq!(v4.bytes[v4.bytes.len() - 3], 1);
    assert_eq!(v6.bytes[v6.bytes.len() - 3], 28);
    receive(
        &mut resolver,
        &v6,
        &answer(&v6, 0, &["2001:db8::1"], 60),
        Time::ZERO,
    );
    assert_eq!(changed(&mut resolver), [USER6]);
    assert_eq!(lookup(&resolver, USER6, "a.example").1, [ip("2001:db8::1")]);
    assert_eq!(
        lookup(&resolver, USER, "a.example").0,
        HostState::Unresolved
    );
}

#[test]
fn clients_share_lookups_and_all_are_told() {
    let (mut resolver, query) = asking();
    resolver.set_names(OTHER, [&host("a.example"), &host("a.example")], Time::ZERO);
    resolver.poll(Time::ZERO);
    assert_eq!(resolver.next_transmit(), None);
    receive(
        &mut resolver,
        &query,
        &answer(&query, 0, &["192.0.2.1"], 60),
        Time::ZERO,
    );
    assert_eq!(changed(&mut resolver), [USER, OTHER]);
    resolver.forget(USER);
    assert_eq!(lookup(&resolver, OTHER, "a.example").0, HostState::Resolved);
    resolver.forget(OTHER);
    assert_eq!(resolver.names().count(), 0);
    assert_eq!(resolver.next_deadline(), None);
}

#[test]
fn commit_asks_again_but_not_twice_within_seconds() {
    let (mut resolver, query) = asking();
    receive(
        &mut resolver,
        &query,
        &answer(&query, 0, &["192.0.2.1"], 600),
        Time::ZERO,
    );
    let commit = |resolver: &mut Resolver, now| {
        resolver.set_names(USER, [&host("a.example")], now);
        resolver.poll(now);
        resolver.next_transmit().is_some()
    };
    assert!(!commit(&mut resolver, Time::from_secs(4)));
    assert!(commit(&mut resolver, Time::from_secs(6)));
    assert_eq!(lookup(&resolver, USER, "a.example").0, HostState::Resolved);
}

#[test]
fn names_that_leave_the_rules_are_forgotten_with_their_lookups() {
    let (mut resolver, query) = asking();
    resolver.set_names(USER, [&host("b.example")], Time::ZERO);
    assert!(!receive(
        &mut resolver,
        &query,
        &answer(&query, 0, &["192.0.2.1"], 60),
        Time::ZERO
    ));
    assert_eq!(
        lookup(&resolver, USER, "a.example").0,
        HostState::Unresolved
    );
    assert_eq!(resolver.names().count(), 1);
}

#[test]
fn new_servers_are_asked_at_once_and_the_old_ones_no_longer_believed() {
    let (mut resolver, old) = asking();
    resolver.set_servers(&[SERVER, SECOND], false, Time::ZERO);
    assert!(resolver.is_ours(
        SERVER,
        Transport::Udp,
        u16::from_be_bytes([old.bytes[0], old.bytes[1]])
    ));
    resolver.set_servers(&[STRANGER], false, Time::ZERO);
    assert!(!receive(
        &mut resolver,
        &old,
        &answer(&old, 0, &["192.0.2.1"], 60),
        Time::ZERO
    ));
    resolver.poll(Time::ZERO);
    let new = resolver.next_transmit().unwrap();
    assert_eq!(new.server, STRANGER);
    receive(
        &mut resolver,
        &new,
        &answer(&new, 0, &["192.0.2.1"], 3600),
        Time::ZERO,
    );
    resolver.set_servers(&[STRANGER], true, Time::from_secs(1));
    resolver.poll(Time::from_secs(1));
    assert!(
        resolver.next_transmit().is_some(),
        "another uplink may know other addresses"
    );
}

#[test]
fn without_servers_names_wait() {
    let mut resolver = Resolver::new([7; 32], true);
    resolver.set_names(USER, [&host("a.example")], Time::ZERO);
    resolver.poll(Time::ZERO);
    assert_eq!(
        (resolver.next_transmit(), resolver.next_deadline()),
        (None, None)
    );
    resolver.set_servers(&[SERVER], false, Time::from_secs(5));
    resolver.poll(Time::from_secs(5));
    assert!(resolver.next_transmit().is_some());
}

#[test]
fn impossible_names_are_never_asked_for() {
    let mut resolver = Resolver::new([7; 32], true);
    resolver.set_servers(&[SERVER], false, Time::ZERO);
    resolver.set_names(USER, [&host("127.1"), &host("a..b")], Time::ZERO);
    resolver.poll(Time::ZERO);
    assert_eq!(
        (resolver.next_transmit(), resolver.next_deadline()),
        (None, None)
    );
    assert!(resolver.names().all(|view| {
        view.failure
            .is_some_and(|failure| failure.kind == FailureKind::ImpossibleName)
    }));
}

#[test]
fn lookups_and_names_are_bounded_and_the_rest_waits_or_is_refused() {
    let mut resolver = Resolver::new([7; 32], true);
    resolver.set_servers(&[SERVER], false, Time::ZERO);
    let names: Vec<_> = (0..MAX_NAMES + 5)
        .map(|n| host(&format!("h{n}.example")))
        .collect();
    assert!(!resolver.set_names(USER, &names, Time::ZERO));
    assert_eq!(resolver.counters().refused_names, 5);
    let mut answered = 0;
    loop {
        resolver.poll(Time::ZERO);
        assert!(resolver.exchanges.len() <= MAX_LOOKUPS);
        let Some(query) = resolver.next_transmit() else {
            break;
        };
        receive(
            &mut resolver,
            &query,
            &answer(&query, 0, &["192.0.2.1"], 60),
            Time::ZERO,
        );
        answered += 1;
    }
    assert_eq!(answered, MAX_NAMES);
    assert_eq!(
        lookup(&resolver, USER, "h1023.example").0,
        HostState::Resolved
    );
    assert_eq!(
        lookup(&resolver, USER, "h1024.example").0,
        HostState::Unresolved
    );
}

#[test]
fn truncated_answer_leads_to_a_connection_to_the_same_server() {
    let (mut resolver, query) = asking();
    let mut bytes = answer(&query, 0, &["192.0.2.66"], 60);
    bytes[10] |= 0x02;
    receive(&mut resolver, &query, &bytes, Time::ZERO);
    let syn = resolver.next_transmit().unwrap();
    assert_eq!((syn.server, syn.transport), (SERVER, Transport::Tcp));
    assert_eq!(syn.bytes[13], 2);
    assert!(lookup(&resolver, USER, "a.example").1.is_empty());
    // A refusal sends it on to the other server, by UDP.
    let mut refusal = vec![0, 53, syn.bytes[0], syn.bytes[1], 0, 0, 0, 0];
    let next = u32::from_be_bytes(syn.bytes[4..8].try_into().unwrap()).wrapping_add(1);
    refusal.extend(next.to_be_bytes());
    refusal.extend([0x50, 0x14, 0, 0, 0, 0, 0, 0]);
    receive(&mut resolver, &syn, &refusal, Time::ZERO);
    let second = resolver.next_transmit().unwrap();
    assert_eq!((second.server, second.transport), (SECOND, Transport::Udp));
}

/// A client's query and what its answer teaches, with everything right unless it is changed.
struct Conversation {
    client: IpAddr,
    port: u16,
    server: IpAddr,
    query: Vec<u8>,
}

fn conversation(name: &str, family: Family) -> Conversation {
    let mut query = Vec::new();
    question(name, family).write(0x4242, &mut query);
    Conversation {
        client: USER,
        port: 40_000,
        server: SERVER,
        query,
    }
}

impl Conversation {
    fn ask(&self, resolver: &mut Resolver, now: Time) {
        let client = (self.client, self.port);
        resolver.client_query(client, &[USER, USER6], self.server, &self.query, now);
    }

    fn answer(&self, resolver: &mut Resolver, addresses: &[&str], now: Time) -> bool {
        let message = answer_message(&self.query, 0, addresses, 60);
        resolver.client_answer((self.client, self.port), self.server, &message, now)
    }
}

fn with_names(learn: bool) -> Resolver {
    let mut resolver = Resolver::new([7; 32], learn);
    resolver.set_servers(&[SERVER, SECOND], false, Time::ZERO);
    resolver.set_names(USER, [&host("a.example")], Time::ZERO);
    resolver.set_names(USER6, [&host("a.example")], Time::ZERO);
    resolver.set_names(OTHER, [&host("a.example")], Time::ZERO);
    resolver.poll(Time::ZERO);
    changed(&mut resolver);
    resolver
}

#[test]
fn client_may_use_what_it_was_told_and_no_other_client_may() {
    let mut resolver = with_names(true);
    assert!(resolver.is_learning(&[USER]) && !resolver.is_learning(&[STRANGER]));
    let talk = conversation("A.Example", Family::Ipv4);
    talk.ask(&mut resolver, Time::ZERO);
    assert!(talk.answer(&mut resolver, &["192.0.2.7"], Time::from_millis(30)));
    assert_eq!(changed(&mut resolver), [USER]);
    // Our own lookup has not ended: a drop rule still reaches everything.
    let expected = (HostState::Unresolved, vec![ip("192.0.2.7")]);
    assert_eq!(lookup(&resolver, USER, "a.example"), expected);
    assert!(lookup(&resolver, OTHER, "a.example").1.is_empty());
    assert!(lookup(&resolver, USER6, "a.example").1.is_empty());
}

#[test]
fn ipv6_answers_count_for_the_clients_ipv6_address() {
    let mut resolver = with_names(true);
    let talk = conversation("a.example", Family::Ipv6);
    talk.ask(&mut resolver, Time::ZERO);
    assert!(talk.answer(&mut resolver, &["2001:db8::7"], Time::ZERO));
    assert_eq!(changed(&mut resolver), [USER6]);
    assert_eq!(lookup(&resolver, USER6, "a.example").1, [ip("2001:db8::7")]);
}

#[test]
fn known_addresses_are_no_news_but_live_longer() {
    let mut resolver = with_names(true);
    let talk = conversation("a.example", Family::Ipv4);
    for (second, news) in [(0, true), (1000, false)] {
        let now = Time::from_secs(second);
        talk.ask(&mut resolver, now);
        assert_eq!(talk.answer(&mut resolver, &["192.0.2.7"], now), news);
    }
    let end = 1000 + 60 + KEEP_SECS;
    resolver.poll(Time::from_secs(end - 1));
    assert_eq!(lookup(&resolver, USER, "a.example").1, [ip("192.0.2.7")]);
    changed(&mut resolver);
    resolver.poll(Time::from_secs(end));
    assert!(lookup(&resolver, USER, "a.example").1.is_empty());
    assert_eq!(changed(&mut resolver), [USER]);
}

#[test]
fn only_an_answer_to_a_query_of_this_client_teaches_anything_and_only_once() {
    let mut resolver = with_names(true);
    let talk = conversation("a.example", Family::Ipv4);
    assert!(
        !talk.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "nothing was asked"
    );
    talk.ask(&mut resolver, Time::ZERO);
    let mut other = conversation("a.example", Family::Ipv4);
    other.port = 40_001;
    assert!(
        !other.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "another port"
    );
    let mut other = conversation("a.example", Family::Ipv4);
    other.server = SECOND;
    assert!(
        !other.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "another server"
    );
    let mut other = conversation("a.example", Family::Ipv4);
    other.client = OTHER;
    assert!(
        !other.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "another client"
    );
    let mut other = conversation("a.example", Family::Ipv4);
    other.query[0] = 0;
    assert!(
        !other.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "another id"
    );
    assert!(talk.answer(&mut resolver, &["192.0.2.7"], Time::ZERO));
    assert!(
        !talk.answer(&mut resolver, &["192.0.2.66"], Time::ZERO),
        "a second answer"
    );
    talk.ask(&mut resolver, Time::ZERO);
    let late = Time::from_secs(11);
    assert!(
        !talk.answer(&mut resolver, &["192.0.2.66"], late),
        "too late"
    );
    assert_eq!(lookup(&resolver, USER, "a.example").1, [ip("192.0.2.7")]);
}

#[test]
fn answer_about_another_name_or_type_teaches_nothing() {
    for (name, family) in [("b.example", Family::Ipv4), ("a.example", Family::Ipv6)] {
        let mut resolver = with_names(true);
        let talk = conversation("a.example", Family::Ipv4);
        talk.ask(&mut resolver, Time::ZERO);
        let mut other = conversation(name, family);
        other.query[..2].copy_from_slice(&talk.query[..2]);
        assert!(!other.answer(&mut resolver, &["192.0.2.66"], Time::ZERO));
        assert!(changed(&mut resolver).is_empty());
    }
}

#[test]
fn queries_to_strangers_for_other_names_or_malformed_are_not_remembered() {
    let mut resolver = with_names(true);
    let mut talk = conversation("a.example", Family::Ipv4);
    talk.server = STRANGER;
    talk.ask(&mut resolver, Time::ZERO);
    assert!(!talk.answer(&mut resolver, &["192.0.2.66"], Time::ZERO));
    let talk = conversation("www.a.example", Family::Ipv4);
    talk.ask(&mut resolver, Time::ZERO);
    assert!(!talk.answer(&mut resolver, &["192.0.2.66"], Time::ZERO));
    for len in 0..20 {
        let mut talk = conversation("a.example", Family::Ipv4);
        talk.query.truncate(len);
        talk.ask(&mut resolver, Time::ZERO);
    }
    assert!(
        resolver
            .learner
            .unwrap()
            .answered(USER, query_of(0x4242), Time::ZERO)
            .is_none()
    );
}

fn query_of(id: u16) -> ClientQuery {
    ClientQuery {
        server: SERVER,
        port: 40_000,
        id,
    }
}

#[test]
fn learning_can_be_switched_off() {
    let mut resolver = with_names(false);
    assert!(!resolver.is_learning(&[USER]));
    let talk = conversation("a.example", Family::Ipv4);
    talk.ask(&mut resolver, Time::ZERO);
    assert!(!talk.answer(&mut resolver, &["192.0.2.7"], Time::ZERO));
    assert!(lookup(&resolver, USER, "a.example").1.is_empty());
}

#[test]
fn what_was_learned_goes_with_the_name() {
    let mut resolver = with_names(true);
    let talk = conversation("a.example", Family::Ipv4);
    talk.ask(&mut resolver, Time::ZERO);
    talk.answer(&mut resolver, &["192.0.2.7"], Time::ZERO);
    resolver.set_names(USER, [&host("a.example"), &host("b.example")], Time::ZERO);
    assert_eq!(lookup(&resolver, USER, "a.example").1, [ip("192.0.2.7")]);
    resolver.set_names(USER, [&host("b.example")], Time::ZERO);
    resolver.set_names(USER, [&host("a.example")], Time::ZERO);
    assert!(lookup(&resolver, USER, "a.example").1.is_empty());
}

#[test]
fn client_cannot_learn_without_end() {
    let mut resolver = with_names(true);
    let names: Vec<_> = (0..20).map(|n| host(&format!("h{n}.example"))).collect();
    resolver.set_names(USER, &names, Time::ZERO);
    for n in 0..20 {
        let talk = conversation(&format!("h{n}.example"), Family::Ipv4);
        let addresses: Vec<_> = (0..30).map(|last| format!("192.0.{n}.{last}")).collect();
        let addresses: Vec<_> = addresses.iter().map(|address| address.as_str()).collect();
        talk.ask(&mut resolver, Time::ZERO);
        talk.answer(&mut resolver, &addresses, Time::ZERO);
    }
    let all = (0..20).map(|n| lookup(&resolver, USER, &format!("h{n}.example")).1.len());
    assert_eq!(all.sum::<usize>(), 256);
}

/// What may happen to a resolver.
#[derive(Clone, Debug)]
enum Input {
    Names(u8, Vec<u8>),
    Forget(u8),
    Servers(u8, bool),
    Wait(u32),
    /// Answers the n-th packet that was sent: response code, truncated, addresses, time to live.
    Answer(usize, u8, bool, u8, u32),
    /// Sends back the n-th packet with changed bytes.
    Garbage(usize, Vec<(usize, u8)>),
    ClientAsks(u8, u16),
    ClientIsAnswered(u8, u16, u8),
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (0u8..4, proptest::collection::vec(0u8..30, 0..8)).prop_map(|(u, n)| Input::Names(u, n)),
        (0u8..4).prop_map(Input::Forget),
        (0u8..4, any::<bool>()).prop_map(|(count, new)| Input::Servers(count, new)),
        prop_oneof![0u32..3000, 0u32..8_000_000].prop_map(Input::Wait),
        (
            any::<usize>(),
            prop_oneof![Just(0u8), 0u8..6],
            any::<bool>(),
            0u8..4,
            0u32..9000
        )
            .prop_map(|(n, code, tc, count, ttl)| Input::Answer(n, code, tc, count, ttl)),
        (
            any::<usize>(),
            proptest::collection::vec((any::<usize>(), any::<u8>()), 0..6)
        )
            .prop_map(|(n, changes)| Input::Garbage(n, changes)),
        (0u8..30, 0u16..4).prop_map(|(name, id)| Input::ClientAsks(name, id)),
        (0u8..30, 0u16..4, 0u8..20)
            .prop_map(|(n, id, count)| Input::ClientIsAnswered(n, id, count)),
    ]
}

const USERS: [IpAddr; 4] = [USER, USER6, OTHER, STRANGER];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_sequence_of_events_breaks_the_bounds_or_keeps_the_resolver_busy(
        inputs in proptest::collection::vec(input(), 0..80),
    ) {
        let mut resolver = Resolver::new([9; 32], true);
        let mut now = Time::ZERO;
        let mut sent: Vec<Transmit> = Vec::new();
        let client_message = |name: u8, id: u16| {
            let mut query = Vec::new();
            question(&format!("h{name}.example"), Family::Ipv4).write(id, &mut query);
            query
        };
        for input in inputs {
            match input {
                Input::Names(user, names) => {
                    let names: Vec<_> =
                        names.into_iter().map(|n| host(&format!("h{n}.example"))).collect();
                    resolver.set_names(USERS[usize::from(user)], &names, now);
                }
                Input::Forget(user) => resolver.forget(USERS[usize::from(user)]),
                Input::Servers(count, is_new) => {
                    let servers = [SERVER, SECOND, STRANGER];
                    resolver.set_servers(&servers[..usize::from(count).min(3)], is_new, now);
                }
                Input::Wait(millis) => now = now.plus_nanos(u64::from(millis) * 1_000_000),
                Input::Answer(index, code, truncated, count, ttl) => {
                    let Some(query) = pick(&sent, index) else { continue };
                    if query.transport == Transport::Udp {
                        let addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3"];
                        let addresses = &addresses[..usize::from(count).min(3)];
                        let mut bytes = answer(&query, code, addresses, ttl);
                        bytes[10] |= u8::from(truncated) << 1;
                        receive(&mut resolver, &query, &bytes, now);
                    }
                }
                Input::Garbage(index, changes) => {
                    let Some(query) = pick(&sent, index) else { continue };
                    let mut bytes = query.bytes.clone();
                    bytes.swap(0, 2);
                    bytes.swap(1, 3);
                    for (position, byte) in changes {
                        let len = bytes.len();
                        bytes[position % len] = byte;
                    }
                    receive(&mut resolver, &query, &bytes, now);
                }
                Input::ClientAsks(name, id) => {
                    let message = client_message(name, id);
                    resolver.client_query((USER, 40_000), &USERS[..2], SERVER, &message, now);
                }
                Input::ClientIsAnswered(name, id, count) => {
                    let addresses: Vec<_> = (0..count).map(|n| format!("192.0.{name}.{n}")).collect();
                    let addresses: Vec<_> = addresses.iter().map(|text| text.as_str()).collect();
                    let message = answer_message(&client_message(name, id), 0, &addresses, 60);
                    resolver.client_answer((USER, 40_000), SERVER, &message, now);
                }
            }
            resolver.poll(now);
            prop_assert!(resolver.next_deadline().is_none_or(|deadline| deadline > now));
            prop_assert!(resolver.exchanges.len() <= MAX_LOOKUPS);
            prop_assert_eq!(resolver.records.len(), resolver.by_name.len());
            let running = resolver.records.values().filter(|r| r.lookup == Lookup::Running).count();
            prop_assert_eq!(running, resolver.exchanges.len());
            for (key, record) in &resolver.records {
                prop_assert_eq!(record.scheduled_at, record.wake_at());
                let is_scheduled =
                    record.scheduled_at.is_none_or(|time| resolver.schedule.contains_key(&(time, *key)));
                prop_assert!(is_scheduled && !record.users.is_empty());
            }
            let scheduled = resolver.records.values().filter(|r| r.scheduled_at.is_some()).count();
            prop_assert_eq!(scheduled, resolver.schedule.len());
            while let Some(packet) = resolver.next_transmit() {
                sent.push(packet);
            }
            for user in changed(&mut resolver) {
                prop_assert!(USERS.contains(&user));
            }
        }
    }
}

fn pick(sent: &[Transmit], index: usize) -> Option<Transmit> {
    let index = index.checked_rem(sent.len())?;
    // Recent packets are the interesting ones.
    sent.get(sent.len() - 1 - index.min(20)).cloned()
}
