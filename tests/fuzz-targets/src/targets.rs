//! The targets. Each says how far its frames got.

use core::net::IpAddr;

use firewall::rule::{Family, RuleNumber};
use firewall::{Checksum, ClientId, Gso, GsoFamily, Iface};
use qubes::rule_text::{RuleText, parse_rule};

use crate::bytes::Bytes;
use crate::packets;
use crate::world::{
    CLIENT_MAC, GATEWAY_MAC, OWN4, OWN6, Reached, SERVER4, SERVER6, UPLINK_MAC, World, client4,
    client6,
};

/// The longest frame: a GSO frame of 64 KiB.
const FRAME_MAX: usize = 65_549;

/// Any bytes as a frame, on any interface, with anything that a ring can say of it.
pub fn frame(data: &[u8]) -> Reached {
    let mut bytes = Bytes::new(data);
    let ingress = packets::ingress(&mut bytes);
    let checksum = bytes.pick(&[Checksum::Unverified, Checksum::Validated, Checksum::Blank]);
    let gso = gso(&mut bytes);
    let mut frame = if bytes.byte() & 3 == 0 {
        bytes.rest().to_vec()
    } else {
        let mut frame = packets::frame(ingress, &mut bytes);
        packets::damage(&mut frame, &mut bytes);
        frame
    };
    frame.truncate(FRAME_MAX);
    let mut world = World::new();
    world.give(ingress, &frame, checksum, gso);
    // The same once more meets whatever the first one left behind.
    world.give(ingress, &frame, checksum, gso);
    world.pass(1_000);
    world.reached
}

fn gso(bytes: &mut Bytes<'_>) -> Option<Gso> {
    let family = bytes.pick(&[
        None,
        None,
        None,
        None,
        Some(GsoFamily::V4),
        Some(GsoFamily::V6),
    ]);
    family.map(|family| Gso {
        mss: bytes.word(),
        family,
    })
}

/// Any bytes as the text of a rule: understood or refused, and what is understood reads the same again.
pub fn rule_text(data: &[u8]) -> Reached {
    let number = RuleNumber::new(7).expect("a number");
    for family in [Family::Ipv4, Family::Ipv6] {
        match parse_rule(number, family, data) {
            Ok(Some(rule)) => {
                let text = RuleText(&rule).to_string();
                let again = parse_rule(number, family, text.as_bytes());
                assert_eq!(again, Ok(Some(rule)), "{text}");
            }
            Ok(None) => {}
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    // As a whole tree, which is compiled or refused; a packet meets either.
    let mut world = World::new();
    let rules: Vec<&[u8]> = data.split(|byte| *byte == b'\n').take(50).collect();
    world.rules(1, &rules);
    let mut none = Bytes::new(&[]);
    let ends = (IpAddr::V4(client4(1)), IpAddr::V4(SERVER4));
    let ingress = Iface::Client(ClientId(1));
    let frame = packets::packet(ingress, ends, 64, 1, (40_000, 443), &mut none, b"x");
    world.give(ingress, &frame, Checksum::Unverified, None);
    world.reached
}

/// Any bytes as what a resolver answers to our question for the name in client 0's rules.
pub fn dns_answer(data: &[u8]) -> Reached {
    let mut bytes = Bytes::new(data);
    let mut world = World::new();
    for _ in 0..4 {
        let asked = core::mem::take(&mut world.sent);
        for sent in asked {
            // Ethernet, IPv4 without options, UDP: nothing else asks over IPv4.
            if sent.egress != Iface::Uplink || sent.frame.get(23) != Some(&17) {
                continue;
            }
            let [a, b] = [sent.frame[34], sent.frame[35]];
            let port = u16::from_be_bytes([a, b]);
            let question = &sent.frame[42..];
            let server = IpAddr::from([
                sent.frame[30],
                sent.frame[31],
                sent.frame[32],
                sent.frame[33],
            ]);
            let mut answer = match bytes.byte() % 4 {
                0 => bytes.some(600).to_vec(),
                _ => {
                    // The right id and question, counts and records as they come.
                    let mut answer = question.to_vec();
                    answer[2] = 0x80 | bytes.byte();
                    answer[3] = bytes.byte();
                    for count in &mut answer[6..12] {
                        *count = bytes.byte() & 3;
                    }
                    answer.extend_from_slice(bytes.some(600));
                    answer
                }
            };
            packets::damage(&mut answer, &mut bytes);
            let ends = (server, IpAddr::V4(OWN4));
            let mut none = Bytes::new(&[]);
            let frame = packets::packet(Iface::Uplink, ends, 64, 1, (53, port), &mut none, &answer);
            world.give(Iface::Uplink, &frame, Checksum::Unverified, None);
        }
        world.pass(u64::from(bytes.byte()) * 30);
    }
    world.reached
}

/// Any bytes as what an ICMP error quotes, from the uplink and from the client, while a flow exists.
pub fn icmp_error(data: &[u8]) -> Reached {
    let mut bytes = Bytes::new(data);
    let mut world = World::new();
    let v6 = bytes.byte() & 1 == 1;
    let (client, server, own) = if v6 {
        (
            IpAddr::V6(client6(0)),
            IpAddr::V6(SERVER6),
            IpAddr::V6(OWN6),
        )
    } else {
        (
            IpAddr::V4(client4(0)),
            IpAddr::V4(SERVER4),
            IpAddr::V4(OWN4),
        )
    };
    let ingress = Iface::Client(ClientId(0));
    // Of a TCP segment: number, window, and SYN.
    let mut none = Bytes::new(&[0, 0, 0, 0, 1]);
    let kind = bytes.byte() % 3;
    let start = packets::packet(
        ingress,
        (client, server),
        64,
        kind,
        (40_000, 443),
        &mut none,
        b"hello",
    );
    world.sent.clear();
    world.give(ingress, &start, Checksum::Unverified, None);
    let outside = world.sent.pop().map_or(start, |sent| sent.frame);
    // What was sent, as far as wanted, damaged, and anything behind it.
    let mut quoted = outside.get(14..).unwrap_or_default().to_vec();
    quoted.truncate(usize::from(bytes.byte()));
    packets::damage(&mut quoted, &mut bytes);
    quoted.extend_from_slice(bytes.some(64));
    for (ingress, ends) in [
        (Iface::Uplink, (server, own)),
        (Iface::Client(ClientId(0)), (client, server)),
    ] {
        let error = packets::packet(ingress, ends, 64, 3, (0, 0), &mut bytes, &quoted);
        world.give(ingress, &error, Checksum::Unverified, None);
    }
    world.reached
}

/// Fragments with any offsets, lengths and contents.
pub fn fragments(data: &[u8]) -> Reached {
    let mut bytes = Bytes::new(data);
    let mut world = World::new();
    for _ in 0..64 {
        if bytes.is_empty() {
            break;
        }
        let ingress = packets::ingress(&mut bytes);
        let v6 = bytes.byte() & 1 == 1;
        let id = u16::from(bytes.byte() & 3);
        let more = bytes.byte() & 1 == 1;
        let offset = bytes.word() & 0x1fff;
        let offset = if bytes.byte() & 3 == 0 {
            offset
        } else {
            offset & 15
        };
        let content = bytes.some(300);
        let frame = fragment(ingress, v6, id, (offset, more), content);
        world.give(ingress, &frame, Checksum::Unverified, None);
        if bytes.byte() & 15 == 0 {
            world.pass(u64::from(bytes.byte()));
        }
    }
    world.pass(120);
    world.reached
}

fn fragment(
    ingress: Iface,
    v6: bool,
    id: u16,
    (offset, more): (u16, bool),
    content: &[u8],
) -> Vec<u8> {
    let (from, to) = match ingress {
        Iface::Uplink => (GATEWAY_MAC, UPLINK_MAC),
        Iface::Client(_) => (CLIENT_MAC, GATEWAY_MAC),
    };
    let client = match ingress {
        Iface::Client(id) => id.0,
        Iface::Uplink => 0,
    };
    let mut frame = [to, from].concat();
    if v6 {
        let (source, destination) = match ingress {
            Iface::Uplink => (SERVER6, OWN6),
            Iface::Client(_) => (client6(client), SERVER6),
        };
        let len = u16::try_from(content.len() + 8).expect("short");
        frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend_from_slice(&len.to_be_bytes());
        frame.extend_from_slice(&[44, 64]);
        frame.extend_from_slice(&source.octets());
        frame.extend_from_slice(&destination.octets());
        frame.extend_from_slice(&[17, 0]);
        frame.extend_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, u8::try_from(id).expect("small")]);
    } else {
        let (source, destination) = match ingress {
            Iface::Uplink => (SERVER4, OWN4),
            Iface::Client(_) => (client4(client), SERVER4),
        };
        let len = u16::try_from(content.len() + 20).expect("short");
        let mut header = vec![0x45, 0];
        header.extend_from_slice(&len.to_be_bytes());
        header.extend_from_slice(&id.to_be_bytes());
        header.extend_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
        header.extend_from_slice(&[64, 17, 0, 0]);
        header.extend_from_slice(&source.octets());
        header.extend_from_slice(&destination.octets());
        let sum = header
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>();
        let sum = (sum & 0xffff) + (sum >> 16);
        let field = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
        header[10..12].copy_from_slice(&field.to_be_bytes());
        frame.extend_from_slice(&[0x08, 0x00]);
        frame.extend_from_slice(&header);
    }
    frame.extend_from_slice(content);
    frame
}

/// All of it in any order, with rules that change and time that passes.
pub fn sequence(data: &[u8]) -> Reached {
    let mut bytes = Bytes::new(data);
    let mut world = World::new();
    for _ in 0..256 {
        if bytes.is_empty() {
            break;
        }
        match bytes.byte() % 16 {
            0 => world.forbid(),
            1 => world.allow(1),
            2 => world.pass(u64::from(bytes.word())),
            3 => world.pass(u64::from(bytes.byte()) % 8),
            4 => answer_last(&mut world, &mut bytes),
            5 => {
                let ingress = packets::ingress(&mut bytes);
                let v6 = bytes.byte() & 1 == 1;
                let place = (u16::from(bytes.byte() & 7), bytes.byte() & 1 == 1);
                let content = bytes.some(100);
                let frame = fragment(ingress, v6, 9, place, content);
                world.give(ingress, &frame, Checksum::Unverified, None);
            }
            _ => {
                let ingress = packets::ingress(&mut bytes);
                let mut frame = packets::frame(ingress, &mut bytes);
                if bytes.byte() & 7 == 0 {
                    packets::damage(&mut frame, &mut bytes);
                }
                world.give(ingress, &frame, Checksum::Unverified, None);
            }
        }
        if world.sent.len() > 64 {
            world.sent.drain(..32);
        }
    }
    world.reached
}

/// Turns the last frame that left by the uplink round and gives it back, as a server would; or quotes it in an error.
fn answer_last(world: &mut World, bytes: &mut Bytes<'_>) {
    let last = world
        .sent
        .iter()
        .rev()
        .find(|sent| sent.egress == Iface::Uplink);
    let Some(mut frame) = last.map(|sent| sent.frame.clone()) else {
        return;
    };
    let (addresses, len) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (26, 4),
        Some([0x86, 0xdd]) => (22, 16),
        _ => return,
    };
    let ports = addresses + 2 * len;
    if frame.len() < ports + 8 {
        return;
    }
    frame[..12].rotate_left(6);
    // Neither swap changes a sum.
    frame[addresses..addresses + 2 * len].rotate_left(len);
    if bytes.byte() & 1 == 0 {
        frame[ports..ports + 4].rotate_left(2);
    }
    world.give(Iface::Uplink, &frame, Checksum::Unverified, None);
}
