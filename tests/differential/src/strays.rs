//! Packets that belong to nothing, and what can happen to packets that do.

use std::net::IpAddr;

use fastrand::Rng;

use crate::packet::{Body, Damage, ICMP, ICMPV6, Packet, Selector, Split, TCP, Tcp, UDP};
use crate::rules;
use crate::script::{Flow, Step, absent};
use crate::world::{CLIENTS, SERVERS4, SERVERS6, own};

/// Changes some packets in ways that routers and networks do.
pub(crate) fn damage(rng: &mut Rng, steps: &mut [Step]) {
    for step in steps {
        let v6 = step.packet.is_v6();
        let packet = &mut step.packet;
        match rng.u8(..100) {
            0..2 => packet.ttl = rng.u8(..3),
            2..4 => packet.damage = Damage::TransportChecksum,
            4 if !v6 => packet.damage = Damage::HeaderChecksum,
            5 if !v6 => packet.options = vec![0x94, 4, 0, 0],
            6 if !v6 => packet.options = vec![1, 1, 1, 0],
            7 if !v6 => packet.options = vec![0x83, 7, 4, 8, 8, 8, 8, 0],
            5 if v6 => packet.extensions.push((60, vec![0, 0, 1, 4, 0, 0, 0, 0])),
            6 if v6 => packet.extensions.push((0, vec![0, 0, 1, 4, 0, 0, 0, 0])),
            7 if v6 => {
                let left = rng.u8(..2);
                let mut routing = vec![0, 2, 0, left, 0, 0, 0, 0];
                routing.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
                packet.extensions.push((43, routing));
            }
            8 => packet.padding = rng.usize(1..20),
            9..14 => split(rng, packet),
            _ => {}
        }
    }
}

/// Cuts a packet into fragments, which may come in any order, twice, or not at all.
fn split(rng: &mut Rng, packet: &mut Packet) {
    let size = *rng.choice(&[8, 8, 24, 256, 512, 1200]).unwrap_or(&512);
    packet.dont_fragment = false;
    // Something to cut.
    match &mut packet.body {
        Body::Udp { payload, .. } | Body::Icmp { payload, .. } if rng.bool() => {
            *payload = size * rng.usize(1..4) + rng.usize(..50);
        }
        _ => {}
    }
    let count = packet.pieces(size);
    if count > 60 {
        return;
    }
    let mut order: Vec<usize> = (0..count).collect();
    let mut overlap = None;
    let mut again = None;
    match rng.u8(..10) {
        0..3 => {}
        3 => again = Some(rng.usize(..count)),
        4..7 => rng.shuffle(&mut order),
        7 => order.push(rng.usize(..count)),
        8 => {
            order.remove(rng.usize(..count));
        }
        _ => overlap = Some(rng.usize(..count)),
    }
    packet.split = Some(Split {
        size,
        order,
        overlap,
        again,
    });
}

fn any(rng: &mut Rng, from: &[IpAddr]) -> IpAddr {
    from[rng.usize(..from.len())]
}

fn server(rng: &mut Rng, v6: bool) -> IpAddr {
    any(rng, if v6 { &SERVERS6 } else { &SERVERS4 })
}

/// Some packet between two addresses.
fn plain(rng: &mut Rng, src: IpAddr, dst: IpAddr) -> Packet {
    let v6 = src.is_ipv6();
    let sport = Selector::Is(rng.u16(1..));
    let dport = if rng.u8(..8) == 0 {
        68
    } else {
        rules::port(rng)
    };
    let dport = Selector::Is(dport);
    let (protocol, body) = match rng.u8(..20) {
        0..7 => (TCP, segment(rng, sport, dport)),
        7..12 => {
            let payload = rng.usize(..200);
            let unsummed = false;
            (
                UDP,
                Body::Udp {
                    sport,
                    dport,
                    payload,
                    unsummed,
                },
            )
        }
        12..18 => {
            let kinds: &[u8] = if v6 {
                &[128, 128, 128, 129, 133, 134, 135, 136, 137, 139, 200, 100]
            } else {
                &[8, 8, 8, 0, 13, 15, 17, 9, 10, 30, 42]
            };
            let kind = *rng.choice(kinds).unwrap_or(&8);
            let payload = rng.usize(20..60);
            let (id, sequence) = (Selector::Is(rng.u16(..100)), 1);
            let code = u8::from(rng.u8(..20) == 0);
            let body = Body::Icmp {
                kind,
                code,
                id,
                sequence,
                payload,
            };
            (if v6 { ICMPV6 } else { ICMP }, body)
        }
        _ => (47, Body::Raw(vec![0, 0, 8, 0, 1, 2, 3, 4])),
    };
    let mut packet = Packet::new(src, dst, protocol, body);
    packet.id = rng.u16(..);
    packet
}

fn segment(rng: &mut Rng, sport: Selector, dport: Selector) -> Body {
    Body::Tcp(Tcp {
        sport,
        dport,
        seq: rng.u32(..),
        ack: rng.u32(..),
        flags: *rng
            .choice(&[2, 2, 2, 2, 16, 18, 4, 17, 0, 20])
            .unwrap_or(&2),
        window: 1000,
        options: Vec::new(),
        payload: rng.usize(..4) * 10,
    })
}

/// Destinations that nobody has, or everybody.
fn odd(rng: &mut Rng, v6: bool) -> IpAddr {
    let odd: &[&str] = if v6 {
        &[
            "::1",
            "::",
            "ff02::1",
            "ff02::1",
            "ff05::2",
            "fe80::1",
            "::ffff:1.2.3.4",
        ]
    } else {
        &[
            "127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "127.9.9.9",
        ]
    };
    let text = *rng.choice(odd).unwrap_or(&"127.0.0.1");
    text.parse().unwrap_or(own(v6))
}

/// A packet of no flow.
pub(crate) fn step(rng: &mut Rng, flows: &[Flow]) -> Step {
    let client = rng.usize(1..=CLIENTS.len());
    let others: Vec<IpAddr> = CLIENTS
        .iter()
        .flat_map(|own| own.addresses)
        .copied()
        .collect();
    let mine = any(rng, CLIENTS[client - 1].addresses);
    let v6 = mine.is_ipv6();
    let family: Vec<IpAddr> = others
        .iter()
        .copied()
        .filter(|own| own.is_ipv6() == v6)
        .collect();
    let from_client = rng.u8(..3) > 0;
    let (port, src, dst) = if from_client {
        let dst = match rng.u8(..12) {
            0..3 => own(v6),
            3..5 => any(rng, &family),
            5 => absent(v6),
            6 => odd(rng, v6),
            _ => server(rng, v6),
        };
        let src = match rng.u8(..12) {
            0..2 => any(rng, &family),
            2 => own(v6),
            3 => server(rng, v6),
            4 => odd(rng, v6),
            _ => mine,
        };
        (client, src, dst)
    } else {
        let src = match rng.u8(..8) {
            0 => any(rng, &family),
            1 => absent(v6),
            2 => own(v6),
            3 => odd(rng, v6),
            _ => server(rng, v6),
        };
        let dst = match rng.u8(..8) {
            0 => any(rng, &family),
            1 => server(rng, v6),
            2 => odd(rng, v6),
            _ => own(v6),
        };
        (0, src, dst)
    };
    let mut packet = plain(rng, src, dst);
    // From outside, towards the port of some flow.
    if !from_client && rng.bool() && !flows.is_empty() {
        let target = rng.usize(..flows.len());
        let outside = Selector::Outside(target);
        match &mut packet.body {
            Body::Tcp(tcp) => tcp.dport = outside,
            Body::Udp { dport, .. } => *dport = outside,
            Body::Icmp { id, .. } => *id = outside,
            _ => {}
        }
    }
    let mut step = Step {
        port,
        packet,
        flow: None,
        change: None,
        at: 0,
    };
    damage(rng, std::slice::from_mut(&mut step));
    // A first fragment that is too short for its transport, more often than chance has it.
    if v6 && from_client && step.packet.protocol == TCP && rng.u8(..12) == 0 {
        let size = 8;
        step.packet.split = Some(Split {
            size,
            order: (0..step.packet.pieces(size)).collect(),
            overlap: None,
            again: None,
        });
    }
    step
}
