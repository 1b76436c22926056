//! ICMP errors about packets of flows, true ones and false ones.

use std::net::IpAddr;

use fastrand::Rng;

use crate::packet::{Body, Damage, ICMP, ICMPV6, Packet};
use crate::script::{Flow, Step};
use crate::world::{SERVERS4, SERVERS6, own};

/// Puts errors between the packets of a flow.
pub(crate) fn insert(rng: &mut Rng, flows: &[Flow], number: usize, steps: &mut Vec<Step>) {
    let errors = if rng.u8(..3) == 0 { rng.usize(1..4) } else { 0 };
    for _ in 0..errors {
        let Some(about) = rng.choice(&*steps).cloned() else {
            return;
        };
        let error = error(rng, flows, number, &about);
        let at = rng.usize(1..=steps.len());
        steps.insert(at, error);
    }
}

/// The packet of `about` as whoever got it saw it.
fn as_received(flows: &[Flow], number: usize, about: &Step) -> Packet {
    let flow = &flows[number];
    let mut quote = about.packet.clone();
    quote.split = None;
    quote.padding = 0;
    quote.damage = Damage::None;
    quote.ttl = quote.ttl.saturating_sub(1).max(1);
    if about.port == 0 {
        // A reply: the client sees itself, and the resolver that it asked.
        quote.src = flow.server;
        quote.dst = flow.client;
        readdress(
            &mut quote.body,
            crate::packet::Selector::Is(flow.sport),
            false,
        );
    } else {
        quote.src = own(flow.is_v6());
        quote.dst = flow.remote;
        readdress(
            &mut quote.body,
            crate::packet::Selector::Outside(number),
            true,
        );
    }
    quote
}

/// Replaces the client's port.
fn readdress(body: &mut Body, port: crate::packet::Selector, is_source: bool) {
    match body {
        Body::Tcp(tcp) if is_source => tcp.sport = port,
        Body::Tcp(tcp) => tcp.dport = port,
        Body::Udp { sport, .. } if is_source => *sport = port,
        Body::Udp { dport, .. } => *dport = port,
        Body::Icmp { id, .. } => *id = port,
        Body::Error { .. } | Body::Raw(_) => {}
    }
}

fn error(rng: &mut Rng, flows: &[Flow], number: usize, about: &Step) -> Step {
    let flow = &flows[number];
    let v6 = flow.is_v6();
    let from_client = about.port == 0;
    let mut quote = as_received(flows, number, about);
    let header = if v6 { 40 } else { 20 + quote.options.len() };
    let keep = match rng.u8(..4) {
        0 => header + 8,
        1 => header + rng.usize(8..40),
        _ => 528,
    };
    if rng.u8(..8) == 0 {
        // About something that is no part of any flow.
        readdress(
            &mut quote.body,
            crate::packet::Selector::Is(rng.u16(..)),
            !from_client,
        );
    }
    let mtu = rng.u16(600..1500).to_be_bytes();
    let (kind, code, rest) = if v6 {
        match rng.u8(..6) {
            0 => (2, 0, [0, 0, mtu[0], mtu[1]]),
            1 => (3, 0, [0; 4]),
            2 => (4, 1, [0, 0, 0, 6]),
            _ => (1, rng.u8(..7), [0; 4]),
        }
    } else {
        match rng.u8(..8) {
            0 => (3, 4, [0, 0, mtu[0], mtu[1]]),
            1 => (11, 0, [0; 4]),
            2 => (12, 0, [20, 0, 0, 0]),
            3 => (4, 0, [0; 4]),
            4 if rng.bool() => (5, 1, [10, 137, 0, 77]),
            _ => (3, rng.u8(..16), [0; 4]),
        }
    };
    let routers: &[IpAddr] = if v6 { &SERVERS6 } else { &SERVERS4 };
    let (src, dst) = if from_client {
        (flow.client, flow.server)
    } else if rng.bool() {
        (flow.remote, own(v6))
    } else {
        (routers[rng.usize(..routers.len())], own(v6))
    };
    let body = Body::Error {
        kind,
        code,
        rest,
        quote: Box::new(quote),
        keep,
    };
    let mut packet = Packet::new(src, dst, if v6 { ICMPV6 } else { ICMP }, body);
    packet.id = rng.u16(..);
    packet.tos = 0xc0;
    Step {
        port: if from_client { flow.port } else { 0 },
        packet,
        flow: Some(number),
        change: None,
        at: 0,
    }
}
