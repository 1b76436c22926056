//! Names in rules, through the whole composition: settings in, frames in and out, DNS made by another implementation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use firewall::{
    ClientConfig, ClientId, DropReason, Frame, GATEWAY_MAC, Iface, Limits, Time, Verdict, Work,
};
use kernel::filter::{Filter, Options};
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, ResourceRecord};
use xenstore::ConfigEvent;

const CLIENT: [u8; 4] = [10, 137, 0, 10];
const OWN: [u8; 4] = [10, 137, 0, 6];
/// What clients ask, and what really answers.
const VIRTUAL: [u8; 4] = [10, 139, 1, 1];
const SERVER: [u8; 4] = [192, 168, 1, 1];
const UPLINK_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];
const CLIENT_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 10];
const C1: Iface = Iface::Client(ClientId(0));
/// What the name stands for when we ask, and when the client asks.
const WEB: [u8; 4] = [198, 51, 100, 1];
const WEB_TOO: [u8; 4] = [198, 51, 100, 2];
const ELSEWHERE: [u8; 4] = [198, 51, 100, 3];

struct World {
    filter: Filter,
    now: Time,
    /// Frames that the filter made, until a test looks at them.
    made: Vec<(Iface, Vec<u8>)>,
}

impl World {
    fn new(options: Options) -> Self {
        let mut filter = Filter::new(Limits::default(), [7; 32], options);
        let now = Time::from_secs(1);
        filter.change(ConfigEvent::Ready, now);
        filter.set_uplink(Some(UPLINK_MAC), now);
        filter
            .attach_client(ClientConfig {
                id: ClientId(0),
                domid: 3,
                mac: CLIENT_MAC,
                addresses: vec![CLIENT.into()],
                mtu: 1500,
            })
            .unwrap();
        let mut world = Self {
            filter,
            now,
            made: Vec::new(),
        };
        world.write("/qubes-ip", "10.137.0.6");
        world.write("/qubes-primary-dns", "192.168.1.1");
        world
    }

    fn write(&mut self, key: &str, value: &str) {
        let event = ConfigEvent::Written {
            key: key.into(),
            value: value.into(),
        };
        self.filter.change(event, self.now);
    }

    /// Commits rules for the client, and lets them come into force.
    fn rules(&mut self, rules: &[&str]) {
        const TREE: &str = "/qubes-firewall/10.137.0.10";
        let key = format!("{TREE}/");
        self.filter.change(ConfigEvent::Removed { key }, self.now);
        self.write(&format!("{TREE}/policy"), "drop");
        for (number, rule) in rules.iter().enumerate() {
            self.write(&format!("{TREE}/{number:04}"), rule);
        }
        self.write(TREE, "");
        self.settle();
    }

    /// Lets everything happen that is due now.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let more = self.filter.tick(self.now, 64);
            self.take_made();
            if !more
                && self
                    .filter
                    .next_deadline(self.now)
                    .is_none_or(|due| due > self.now)
            {
                return;
            }
        }
        panic!("never settles");
    }

    fn take_made(&mut self) {
        while let Some(made) = self.filter.next_generated() {
            self.made.push((made.egress, made.bytes.to_vec()));
        }
    }

    fn process(&mut self, ingress: Iface, frame: &mut [u8]) -> Verdict {
        let mut work = [Work {
            ingress,
            frame: Frame::whole(frame),
            verdict: Verdict::Local,
        }];
        self.filter.process(&mut work, self.now);
        let [work] = work;
        let verdict = work.verdict;
        self.take_made();
        verdict
    }

    fn connect(&mut self, to: [u8; 4], port: u16) -> Verdict {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(CLIENT_MAC, GATEWAY_MAC)
            .ipv4(CLIENT, to, 64)
            .tcp(port, 80, 1, 1024)
            .syn()
            .write(&mut frame, &[])
            .unwrap();
        self.process(C1, &mut frame)
    }

    /// The DNS query among the frames made since the last time: port, message.
    fn own_query(&mut self) -> (u16, Vec<u8>) {
        let frames = std::mem::take(&mut self.made);
        let mut queries = frames.iter().filter(|(egress, _)| *egress == Iface::Uplink);
        let (_, frame) = queries.next().expect("no query");
        assert!(queries.next().is_none(), "more than one query");
        assert_eq!(frame[..6], GATEWAY_MAC);
        assert_eq!(frame[26..34], [OWN, SERVER].concat());
        udp(frame)
    }

    /// Our resolver's question is answered.
    fn answer_own(&mut self, addresses: &[[u8; 4]]) -> Verdict {
        let (port, query) = self.own_query();
        let mut frame = datagram(SERVER, 53, OWN, port, &answer(&query, addresses));
        let verdict = self.process(Iface::Uplink, &mut frame);
        self.settle();
        verdict
    }

    /// The client asks for a name; what the server gets: port, message.
    fn ask(&mut self, id: u16, name: &str) -> (u16, Vec<u8>) {
        let query = question(id, name);
        let mut frame = datagram(CLIENT, 5353, VIRTUAL, 53, &query);
        frame[..12].copy_from_slice(&[GATEWAY_MAC, CLIENT_MAC].concat());
        let forward = Verdict::Forward {
            egress: Iface::Uplink,
        };
        assert_eq!(self.process(C1, &mut frame), forward);
        udp(&frame)
    }

    /// The server answers a client's query.
    fn answer_client(&mut self, (port, query): (u16, Vec<u8>), addresses: &[[u8; 4]]) -> Verdict {
        let mut frame = datagram(SERVER, 53, OWN, port, &answer(&query, addresses));
        self.process(Iface::Uplink, &mut frame)
    }

    fn state_of(&self, name: &str) -> (String, Vec<IpAddr>) {
        let rules = self.filter.rules(None);
        let names = rules.iter().flat_map(|rules| &rules.names);
        let found = names.filter(|known| known.name == name).collect::<Vec<_>>();
        assert_eq!(found.len(), 1);
        (found[0].state.to_string(), found[0].addresses.clone())
    }
}

fn datagram(from: [u8; 4], port: u16, to: [u8; 4], to_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GATEWAY_MAC, UPLINK_MAC)
        .ipv4(from, to, 64)
        .udp(port, to_port)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// The source port and the payload of a UDP frame.
fn udp(frame: &[u8]) -> (u16, Vec<u8>) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match packet.transport {
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.payload().to_vec()),
        other => panic!("{other:?}"),
    }
}

fn question(id: u16, name: &str) -> Vec<u8> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(simple_dns::Question::new(
        Name::new(name).unwrap(),
        simple_dns::TYPE::A.into(),
        CLASS::IN.into(),
        false,
    ));
    packet.build_bytes_vec().unwrap()
}

/// The answer to a query: these addresses, for a minute.
fn answer(query: &[u8], addresses: &[[u8; 4]]) -> Vec<u8> {
    let query = Packet::parse(query).unwrap();
    let mut packet = query.into_reply();
    let name = packet.questions[0].qname.clone();
    for address in addresses {
        let data = RData::A(A::from(Ipv4Addr::from(*address)));
        let record = ResourceRecord::new(name.clone(), CLASS::IN, 60, data);
        packet.answers.push(record);
    }
    packet.build_bytes_vec().unwrap()
}

const ACCEPTED: Verdict = Verdict::Forward {
    egress: Iface::Uplink,
};
const REFUSED: Verdict = Verdict::Reject(DropReason::Policy);
const BY_NAME: &str = "action=accept dsthost=web.example proto=tcp dstports=80-80";
const DNS: &str = "action=accept specialtarget=dns";

#[test]
fn rule_by_name_lets_through_what_the_resolver_found_and_nothing_else() {
    let mut world = World::new(Options::default());
    world.rules(&[BY_NAME]);
    assert_eq!(world.state_of("web.example"), ("pending".into(), vec![]));
    assert_eq!(world.connect(WEB, 1000), REFUSED);
    world.made.retain(|(egress, _)| *egress == Iface::Uplink);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    assert_eq!(world.connect(WEB, 1001), ACCEPTED);
    assert_eq!(world.connect(ELSEWHERE, 1002), REFUSED);
    let web = vec![IpAddr::from(WEB)];
    assert_eq!(world.state_of("web.example"), ("resolved".into(), web));
}

#[test]
fn answer_to_a_client_is_in_force_when_the_client_gets_it() {
    let mut world = World::new(Options::default());
    world.rules(&[BY_NAME, DNS]);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    let asked = world.ask(77, "web.example");
    assert_eq!(world.connect(WEB_TOO, 1000), REFUSED);
    let to_client = Verdict::Forward { egress: C1 };
    assert_eq!(world.answer_client(asked, &[WEB_TOO]), to_client);
    // No time passes and nothing else happens in between.
    assert_eq!(world.connect(WEB_TOO, 1001), ACCEPTED);
    assert_eq!(world.connect(ELSEWHERE, 1002), REFUSED);
}

#[test]
fn long_rule_lists_make_the_answer_wait_until_they_are_compiled() {
    let mut world = World::new(Options::default());
    let other = |number: usize| {
        let [high, low] = u16::try_from(number).unwrap().to_be_bytes();
        format!("action=drop dst4=203.{high}.{low}.0/24 proto=udp")
    };
    let mut rules: Vec<String> = (0..6000).map(other).collect();
    rules.extend([BY_NAME.into(), DNS.into()]);
    world.rules(&rules.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    let asked = world.ask(78, "web.example");
    assert_eq!(world.answer_client(asked, &[WEB_TOO]), Verdict::Held);
    assert!(world.made.is_empty());
    world.settle();
    let (egress, frame) = world.made.pop().unwrap();
    assert_eq!(egress, C1);
    // From the resolver that the client asked, to the client, with right checksums.
    assert_eq!(frame[26..34], [VIRTUAL, CLIENT].concat());
    let packet = SlicedPacket::from_ethernet(&frame).unwrap();
    let (Some(TransportSlice::Udp(udp)), Some(ip)) = (&packet.transport, packet.net) else {
        panic!("no UDP");
    };
    let etherparse::NetSlice::Ipv4(ip) = ip else {
        panic!("no IPv4");
    };
    let sum = udp
        .to_header()
        .calc_checksum_ipv4(&ip.header().to_header(), udp.payload());
    assert_eq!(sum.unwrap(), udp.checksum());
    assert_eq!(world.connect(WEB_TOO, 1001), ACCEPTED);
}

#[test]
fn answers_without_end_do_not_keep_earlier_ones_waiting() {
    let mut world = World::new(Options::default());
    let mut rules = vec!["action=drop dst4=203.0.113.0/24 proto=udp"; 6000];
    rules.extend([BY_NAME, DNS]);
    world.rules(&rules);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    let mut first_out = None;
    for round in 0..3000_u16 {
        let asked = world.ask(round, "web.example");
        let [high, low] = round.to_be_bytes();
        let verdict = world.answer_client(asked, &[[100, 64 + high, low, 1]]);
        if round == 0 {
            assert_eq!(verdict, Verdict::Held);
        }
        // One step of the main loop between two answers.
        world.filter.tick(world.now, 64);
        world.take_made();
        if !world.made.is_empty() {
            first_out = Some(round);
            break;
        }
    }
    assert!(first_out.is_some_and(|round| round > 0), "{first_out:?}");
    assert_eq!(world.connect([100, 64, 0, 1], 1000), ACCEPTED);
}

#[test]
fn only_answers_to_queries_of_this_client_teach() {
    let mut world = World::new(Options::default());
    world.rules(&[BY_NAME, DNS]);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    // Another name, and another id than the one asked for.
    let asked = world.ask(79, "other.example");
    let _ = world.answer_client(asked, &[WEB_TOO]);
    let (port, query) = world.ask(80, "web.example");
    let mut forged = query.clone();
    forged[1] ^= 1;
    let _ = world.answer_client((port, forged), &[WEB_TOO]);
    world.settle();
    assert_eq!(world.connect(WEB_TOO, 1000), REFUSED);
    let _ = world.answer_client((port, query), &[WEB_TOO]);
    assert_eq!(world.connect(WEB_TOO, 1001), ACCEPTED);
}

#[test]
fn learning_can_be_switched_off() {
    let mut world = World::new(Options::from_command_line(
        "root=/dev/xvda dns-learn=off ro",
    ));
    world.rules(&[BY_NAME, DNS]);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    let asked = world.ask(77, "web.example");
    let _ = world.answer_client(asked, &[WEB_TOO]);
    world.settle();
    assert_eq!(world.connect(WEB_TOO, 1000), REFUSED);
    assert_eq!(world.connect(WEB, 1001), ACCEPTED);
}

#[test]
fn unresolved_drop_rule_matches_everything_else_it_says() {
    let mut world = World::new(Options::default());
    world.rules(&["action=drop dsthost=web.example proto=tcp", "action=accept"]);
    assert_eq!(
        world.connect(ELSEWHERE, 1000),
        Verdict::Reject(DropReason::Rule)
    );
    world.made.retain(|(egress, _)| *egress == Iface::Uplink);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    assert_eq!(world.connect(ELSEWHERE, 1001), ACCEPTED);
    assert_eq!(world.connect(WEB, 1002), Verdict::Reject(DropReason::Rule));
}

#[test]
fn strict_parity_refuses_everything_while_a_name_has_no_address() {
    let mut world = World::new(Options::from_command_line("parity=strict"));
    world.rules(&[BY_NAME, "action=accept"]);
    let refused = Verdict::Reject(DropReason::InvalidRules);
    assert_eq!(world.connect(ELSEWHERE, 1000), refused);
    world.made.retain(|(egress, _)| *egress == Iface::Uplink);
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    assert_eq!(world.connect(ELSEWHERE, 1001), ACCEPTED);
}

#[test]
fn names_are_asked_for_when_the_uplink_comes_and_again_when_it_changes() {
    let mut world = World::new(Options::default());
    world.filter.set_uplink(None, world.now);
    world.rules(&[BY_NAME]);
    assert!(world.made.is_empty());
    world.filter.set_uplink(Some(UPLINK_MAC), world.now);
    world.settle();
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    // What was found is still in force when the uplink has gone and come back.
    world.filter.set_uplink(None, world.now);
    world.filter.set_uplink(Some(UPLINK_MAC), world.now);
    world.settle();
    assert_eq!(world.connect(WEB, 1000), ACCEPTED);
    assert_eq!(
        Packet::parse(&world.own_query_among().1)
            .unwrap()
            .questions
            .len(),
        1
    );
}

impl World {
    /// As [`World::own_query`], with other frames to the uplink allowed.
    fn own_query_among(&mut self) -> (u16, Vec<u8>) {
        self.made.retain(|(egress, _)| *egress == Iface::Uplink);
        self.made.truncate(1);
        self.own_query()
    }
}

#[test]
fn unanswered_queries_are_repeated_and_the_failure_shows() {
    let mut world = World::new(Options::default());
    world.rules(&[BY_NAME]);
    let mut queries = 0;
    for _ in 0..200 {
        queries += std::mem::take(&mut world.made).len();
        let Some(due) = world.filter.next_deadline(world.now) else {
            break;
        };
        if due > Time::from_secs(60) {
            break;
        }
        world.now = world.now.max(due);
        world.settle();
    }
    assert!((6..40).contains(&queries), "{queries}");
    assert_eq!(world.state_of("web.example").0, "unresolved: no answer");
}

#[test]
fn reports_tell_commits_and_what_names_stand_for() {
    let mut world = World::new(Options::default());
    world.rules(&[BY_NAME]);
    let report = world.filter.next_report().unwrap();
    let (path, count) = report.handled.unwrap();
    assert_eq!(path.to_string(), "/qubes-firewall-handled/10.137.0.10");
    assert_eq!(count, 1);
    let names: Vec<_> = report
        .names
        .iter()
        .map(|(path, value)| format!("{path} {value}"))
        .collect();
    assert_eq!(names, ["/dns/10.137.0.10/web.example set()"]);
    assert!(world.filter.next_report().is_none());
    assert_eq!(world.answer_own(&[WEB]), Verdict::Deliver);
    let report = world.filter.next_report().unwrap();
    assert_eq!(report.names[0].1, "{'198.51.100.1/32'}");
    assert_eq!(report.handled.unwrap().1, 1);
}
