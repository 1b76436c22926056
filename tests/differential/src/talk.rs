//! What the two ends of a flow send, mostly as they should.

use fastrand::Rng;

use crate::packet::{Body, ICMP, ICMPV6, Packet, Selector, TCP, Tcp, UDP};
use crate::script::{Flow, Step};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;

/// A packet of flow `number` without content; `up` is from the client.
pub(crate) fn packet(flows: &[Flow], number: usize, up: bool, body: Body) -> Packet {
    let flow = &flows[number];
    let own = crate::world::own(flow.is_v6());
    let (src, dst) = if up {
        (flow.client, flow.server)
    } else {
        (flow.remote, own)
    };
    Packet::new(src, dst, flow.protocol, body)
}

/// The ports of a packet of a flow.
pub(crate) fn ports(flows: &[Flow], number: usize, up: bool) -> (Selector, Selector) {
    let flow = &flows[number];
    if up {
        (Selector::Is(flow.sport), Selector::Is(flow.dport))
    } else {
        (Selector::Is(flow.dport), Selector::Outside(number))
    }
}

fn step(rng: &mut Rng, flows: &[Flow], number: usize, up: bool, body: Body) -> Step {
    let mut packet = packet(flows, number, up, body);
    packet.id = rng.u16(..);
    packet.dont_fragment = rng.bool();
    packet.tos = *rng.choice(&[0, 0, 0, 0x10, 0xb8]).unwrap_or(&0);
    packet.ttl = *rng.choice(&[64, 64, 128, 255, 2]).unwrap_or(&64);
    Step {
        port: if up { flows[number].port } else { 0 },
        packet,
        flow: Some(number),
        change: None,
        at: 0,
    }
}

/// All that is said in a flow.
pub(crate) fn steps(rng: &mut Rng, flows: &[Flow], number: usize) -> Vec<Step> {
    match flows[number].protocol {
        TCP => tcp(rng, flows, number),
        UDP => udp(rng, flows, number),
        ICMP | ICMPV6 => query(rng, flows, number),
        _ => other(rng, flows, number),
    }
}

fn length(rng: &mut Rng) -> usize {
    match rng.u8(..20) {
        0 => rng.usize(1200..1480),
        1 => rng.usize(1480..1800),
        2..6 => rng.usize(..1200),
        _ => rng.usize(..64),
    }
}

fn udp(rng: &mut Rng, flows: &[Flow], number: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for at in 0..rng.usize(1..8) {
        let up = at == 0 && rng.u8(..20) > 0 || rng.bool();
        let (sport, dport) = ports(flows, number, up);
        let unsummed = rng.u8(..20) == 0;
        let body = Body::Udp {
            sport,
            dport,
            payload: length(rng),
            unsummed,
        };
        steps.push(step(rng, flows, number, up, body));
    }
    steps
}

fn query(rng: &mut Rng, flows: &[Flow], number: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    let [kind, code] = flows[number].dport.to_be_bytes();
    let reply = if kind == 8 { 0 } else { kind + 1 };
    for at in 0..rng.usize(1..7) {
        let up = at == 0 && rng.u8(..20) > 0 || rng.bool();
        // Now and then a question from outside, or an answer that nobody asked for.
        let asks = if rng.u8(..12) == 0 { !up } else { up };
        let id = if up {
            Selector::Is(flows[number].sport)
        } else {
            Selector::Outside(number)
        };
        let body = Body::Icmp {
            kind: if asks { kind } else { reply },
            code,
            id,
            sequence: rng.u16(..4),
            payload: if kind == 13 { 12 } else { length(rng) },
        };
        steps.push(step(rng, flows, number, up, body));
    }
    steps
}

fn other(rng: &mut Rng, flows: &[Flow], number: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for at in 0..rng.usize(1..6) {
        let up = at == 0 && rng.u8(..10) > 0 || rng.bool();
        // A GRE header without anything that would make it one of another kind.
        let mut raw = vec![0, 0, 8, 0];
        raw.extend((0..rng.usize(4..80)).map(|_| rng.u8(..)));
        steps.push(step(rng, flows, number, up, Body::Raw(raw)));
    }
    steps
}

/// The two ends of a connection: what each sends next, and how far it has acknowledged.
struct Ends {
    next: [u32; 2],
    heard: [u32; 2],
    timestamps: bool,
}

impl Ends {
    /// A segment of one end, as it should be; `len` counts as sent.
    fn segment(
        &mut self,
        rng: &mut Rng,
        flows: &[Flow],
        number: usize,
        up: bool,
        flags: u8,
        len: usize,
    ) -> Tcp {
        let (sport, dport) = ports(flows, number, up);
        let at = usize::from(!up);
        let seq = self.next[at];
        let used = u32::try_from(len).unwrap_or(0)
            + u32::from(flags & SYN != 0)
            + u32::from(flags & FIN != 0);
        self.next[at] = seq.wrapping_add(used);
        // The other end gets it, unless it is lost.
        if rng.u8(..30) > 0 {
            self.heard[1 - at] = self.next[at];
        }
        let mut options = Vec::new();
        if self.timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(rng.u32(..).to_be_bytes());
            options.extend(rng.u32(..).to_be_bytes());
        }
        Tcp {
            sport,
            dport,
            seq,
            ack: if flags & ACK != 0 { self.heard[at] } else { 0 },
            flags,
            window: *rng
                .choice(&[502, 502, 8192, 65_535, 0, 29_200])
                .unwrap_or(&502),
            options,
            payload: len,
        }
    }
}

/// Options of a SYN: segment size, and sometimes window scaling and selective acknowledgement.
fn syn_options(rng: &mut Rng, timestamps: bool) -> Vec<u8> {
    let mut options = vec![2, 4, 5, 0xb4];
    if rng.bool() {
        options.extend([3, 3, rng.u8(..16), 1]);
    }
    if rng.bool() {
        options.extend([4, 2, 1, 1]);
    }
    if timestamps {
        options.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0]);
    }
    options
}

/// Makes a segment wrong in one way.
fn spoil(rng: &mut Rng, tcp: &mut Tcp) {
    const FAR: [u32; 8] = [1, 500, 5000, 66_000, 70_000, 1 << 20, 1 << 30, 1 << 31];
    let distance = *rng.choice(&FAR).unwrap_or(&1);
    match rng.u8(..6) {
        0 => tcp.seq = tcp.seq.wrapping_add(distance),
        1 => tcp.seq = tcp.seq.wrapping_sub(distance),
        2 => tcp.ack = tcp.ack.wrapping_add(distance),
        3 => tcp.ack = tcp.ack.wrapping_sub(distance),
        4 => {
            const ODD: [u8; 11] = [
                0,
                SYN | FIN,
                FIN,
                RST,
                RST | ACK,
                SYN | ACK,
                SYN,
                ACK | URG,
                PSH,
                FIN | ACK | PSH | URG,
                SYN | RST,
            ];
            // Now and then with the flags of congestion notification.
            let congestion = if rng.u8(..9) == 0 {
                rng.u8(..4) << 6
            } else {
                0
            };
            tcp.flags = *rng.choice(&ODD).unwrap_or(&0) | congestion;
        }
        _ => tcp.window = rng.u16(..),
    }
}

fn tcp(rng: &mut Rng, flows: &[Flow], number: usize) -> Vec<Step> {
    let near_wrap = |rng: &mut Rng| {
        if rng.u8(..5) == 0 {
            u32::MAX - rng.u32(..2000)
        } else {
            rng.u32(..)
        }
    };
    let mut ends = Ends {
        next: [near_wrap(rng), near_wrap(rng)],
        heard: [0, 0],
        timestamps: rng.u8(..4) == 0,
    };
    ends.heard = [ends.next[1], ends.next[0]];
    // Now and then a flow that was there before we were, or a plain client.
    let trouble = *rng.choice(&[0, 0, 2, 6, 15]).unwrap_or(&0);
    let mut plan: Vec<(bool, u8, usize)> = Vec::new();
    let opening = rng.u8(..12);
    if opening > 0 {
        plan.push((true, SYN, 0));
        if opening > 1 {
            plan.push((false, SYN | if opening == 2 { 0 } else { ACK }, 0));
            plan.push((true, if opening == 2 { SYN | ACK } else { ACK }, 0));
        }
    }
    for _ in 0..rng.usize(..12) {
        let len = if rng.u8(..3) == 0 { 0 } else { length(rng) };
        plan.push((rng.bool(), ACK | if len > 0 { PSH } else { 0 }, len));
    }
    let first = rng.bool();
    match rng.u8(..8) {
        0..4 => {
            plan.push((first, FIN | ACK, 0));
            if rng.bool() {
                plan.push((!first, ACK, 0));
            }
            plan.push((!first, FIN | ACK, 0));
            plan.push((first, ACK, 0));
        }
        4 => plan.push((first, RST, 0)),
        5 => plan.push((first, RST | ACK, 0)),
        _ => {}
    }
    // And again from the same port.
    if rng.u8(..4) == 0 {
        plan.extend([(true, SYN, 0), (false, SYN | ACK, 0), (true, ACK, 0)]);
    }
    let mut steps: Vec<Step> = Vec::new();
    for (up, flags, len) in plan {
        let mut segment = ends.segment(rng, flows, number, up, flags, len);
        if flags & SYN != 0 {
            segment.options = syn_options(rng, ends.timestamps);
        }
        if rng.u8(..100) < trouble {
            spoil(rng, &mut segment);
        }
        let lost = rng.u8(..100) < trouble;
        if !lost {
            steps.push(step(rng, flows, number, up, Body::Tcp(segment)));
        }
        // Something that was sent before, again.
        if rng.u8(..100) < trouble
            && let Some(old) = rng.choice(&steps).cloned()
        {
            steps.push(old);
        }
    }
    steps
}
